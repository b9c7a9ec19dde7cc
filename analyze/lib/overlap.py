"""All masks below a folder, and how much they have in common."""

from pathlib import Path
from typing import Any

import pandas as pd

from analyze.lib.runs import NETWORK, SEEDS, find_results, readable, refuse_repeats
from common import checkpoint, paths
from common.errors import UserError
from common.masking import Mask

PAIR = [*NETWORK, "tag", "mask_dataset", "sparsity", *SEEDS]
MASK = [*PAIR, "method", "match_epoch"]
COUNTS = ["layer", "weights", "kept", "kept_reference", "shared", "chance"]


def load_all(root: Path) -> pd.DataFrame:
    """All masks below `root`, a row each, with the file's content as `entry`.

    Target, method and match epoch are None as pruned. Raises UserError when there is none.
    """
    rows = []
    for run in [*find_results(root, "prune_imp"), *find_results(root, "align_mask")]:
        for path in paths.mask_files(run["path"]):
            if (entry := readable(checkpoint.load, path, checkpoint.MASKS)) is None:
                continue
            model, dataset = entry["model"], (entry["dataset"] or {}).get("name")
            about = {"model": model["name"], "width": model.get("width"), "dataset": dataset}
            about["mask_dataset"] = entry.get("mask_dataset") or dataset
            about["match_epoch"] = entry["match_epoch"] if entry["method"] else None
            about |= {"tag": entry.get("tag") or "", "sparsity": paths.sparsity_of(path)}
            rows.append(
                {key: entry.get(key) for key in MASK} | about | {"entry": entry, "path": path}
            )
    if not rows:
        raise UserError(f"no masks below {root}: run prune_imp.py first")
    masks = pd.DataFrame(rows)
    refuse_repeats(masks, MASK)
    return masks


def by_layer(mask: Mask, reference: Mask) -> list[dict[str, Any]]:
    """A row a layer: weights, those that each mask keeps, both keep, both keep by chance."""
    rows = []
    for name, entry in mask.items():
        kept, wanted = int(entry.sum()), int(reference[name].sum())
        shared, chance = int((entry & reference[name]).sum()), kept * wanted / entry.numel()
        rows.append(dict(zip(COUNTS, (name, entry.numel(), kept, wanted, shared, chance))))
    return rows


def overlaps(masks: pd.DataFrame) -> pd.DataFrame:
    """A row a layer and mask of another network, where the target was pruned too.

    The method naive is the mask of the source, not permuted.
    """
    columns = [*NETWORK, "tag", "sparsity", "source_seed", "entry"]
    pruned = masks.loc[masks["method"].isna(), columns]
    references = pruned.rename(columns={"source_seed": "target_seed", "entry": "reference"})
    permuted = masks[masks["method"].notna()].merge(references)
    own = pruned.rename(columns={"dataset": "mask_dataset"})
    naive = permuted.drop(columns="entry").merge(own).drop_duplicates(PAIR)
    naive = naive.assign(method="naive", match_epoch=float("nan"))
    rows = []
    for run in [*permuted.to_dict("records"), *naive.to_dict("records")]:
        about = {key: run[key] for key in MASK}
        layers = by_layer(run["entry"]["mask"], run["reference"]["mask"])
        rows += [about | layer for layer in layers]
    return pd.DataFrame(rows, columns=[*MASK, *COUNTS])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Shared and chance in percent of the reference's kept weights: means over pairs."""
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
