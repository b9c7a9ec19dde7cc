"""Read all masks below a folder and count the weights that they share."""

from pathlib import Path
from typing import Any

import pandas as pd

from analyze.lib.runs import NETWORK, SEEDS, check_unique, find_results, try_read, with_settings
from common import checkpoint, paths
from common.errors import UserError
from common.masking import Mask

PAIR = [*NETWORK, "tag", "mask_dataset", "sparsity", *SEEDS]
MASK = [*PAIR, "method", "match_epoch"]
COUNTS = ["layer", "weights", "kept", "kept_reference", "shared", "chance"]


def load_masks(root: Path) -> pd.DataFrame:
    """Load all masks below `root`, a row per mask: MASK, the file's content as `entry`, and `path`.

    Target, method and match epoch are None for masks as pruned. Raises UserError when there is no
    mask.
    """
    rows = []
    for run in [*find_results(root, "prune_imp"), *find_results(root, "align_mask")]:
        for path in paths.mask_files(run["path"]):
            if (entry := try_read(checkpoint.load, path, checkpoint.MASKS)) is None:
                continue
            model, dataset = entry["model"], (entry["dataset"] or {}).get("name")
            row = {"model": model["name"], "width": model.get("width"), "dataset": dataset}
            row["mask_dataset"] = entry.get("mask_dataset") or dataset
            row["match_epoch"] = entry["match_epoch"] if entry["method"] else None
            row |= {"tag": entry.get("tag") or "", "sparsity": paths.sparsity_of(path)}
            for section in ("imp", "align"):
                settings = entry.get(section) or {}
                row |= {f"{section}.{key}": value for key, value in settings.items()}
            rows.append(
                {key: entry.get(key) for key in MASK} | row | {"entry": entry, "path": path}
            )
    if not rows:
        raise UserError(f"no masks below {root}: run prune_imp.py first")
    masks = with_settings(pd.DataFrame(rows))
    check_unique(masks, MASK)
    return masks


def layer_overlap(mask: Mask, reference: Mask) -> list[dict[str, Any]]:
    """Return COUNTS of each layer: its weights, and how many each mask and both masks keep.

    `chance` is how many two random masks of these sparsities both keep on average.
    """
    rows = []
    for name, layer in mask.items():
        kept, kept_reference = int(layer.sum()), int(reference[name].sum())
        shared, chance = int((layer & reference[name]).sum()), kept * kept_reference / layer.numel()
        rows.append(dict(zip(COUNTS, (name, layer.numel(), kept, kept_reference, shared, chance))))
    return rows


def overlaps(masks: pd.DataFrame) -> pd.DataFrame:
    """Return MASK and COUNTS, a row per layer, for source masks against IMP's mask of the target.

    Method naive is the source's mask before it is permuted. Targets that were not pruned have no
    rows.
    """
    columns = [*NETWORK, "tag", "sparsity", "source_seed", "entry"]
    pruned = masks.loc[masks["method"].isna(), columns]
    references = pruned.rename(columns={"source_seed": "target_seed", "entry": "reference"})
    permuted = masks[masks["method"].notna()].merge(references)
    unpermuted = pruned.rename(columns={"dataset": "mask_dataset"})
    naive = permuted.drop(columns="entry").merge(unpermuted).drop_duplicates(PAIR)
    naive = naive.assign(method="naive", match_epoch=float("nan"))
    rows = []
    for row in [*permuted.to_dict("records"), *naive.to_dict("records")]:
        keys = {key: row[key] for key in MASK}
        layers = layer_overlap(row["entry"]["mask"], row["reference"]["mask"])
        rows += [keys | layer for layer in layers]
    return pd.DataFrame(rows, columns=[*MASK, *COUNTS])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Average `overlaps` over pairs: shared and chance in percent of the reference's weights."""
    sums = table.groupby(MASK, dropna=False)[["kept_reference", "shared", "chance"]].sum()
    share = 100 * sums[["shared", "chance"]].div(sums["kept_reference"], axis=0)
    share["ratio"] = share["shared"] / share["chance"]
    return (
        share.groupby([name for name in MASK if name not in SEEDS], dropna=False)
        .agg(
            shared=("shared", "mean"),
            shared_std=("shared", "std"),
            chance=("chance", "mean"),
            ratio=("ratio", "mean"),
            pairs=("shared", "count"),
        )
        .reset_index()
    )
