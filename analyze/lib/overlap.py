"""All masks below a folder, and how much they have in common."""

from pathlib import Path
from typing import Any

import pandas as pd

from analyze.lib.runs import NETWORK, SEEDS, find_results, readable
from common import checkpoint, paths
from common.errors import UserError
from common.masking import Mask

PAIR = [*NETWORK, "tag", "mask_dataset", "sparsity", *SEEDS]
MASK = [*PAIR, "method", "match_epoch"]
COUNTS = ["layer", "weights", "kept", "kept_reference", "shared", "chance"]

Masks = dict[tuple, dict[str, Any]]  # the entries of mask files, by the columns MASK


def load_all(root: Path) -> Masks:
    """All masks below `root`; target, method and match epoch are None as pruned."""
    found: Masks = {}
    folders = [
        run["folder"] for stage in ("prune_imp", "align_mask") for run in find_results(root, stage)
    ]
    for path in [path for folder in folders for path in paths.mask_files(folder)]:
        if (entry := readable(checkpoint.load, path, checkpoint.MASKS)) is None:
            continue
        model, dataset = entry["model"], (entry["dataset"] or {}).get("name")
        values = {
            "model": model["name"],
            "width": model.get("width"),
            "dataset": dataset,
            "tag": entry.get("tag") or "",
            "mask_dataset": entry.get("mask_dataset") or dataset,
            "sparsity": paths.sparsity_of(path),
            "match_epoch": entry["match_epoch"] if entry["method"] else None,
        }
        key = tuple((entry | values)[name] for name in MASK)
        if key in found:
            one, other = path, found[key]["path"]
            raise UserError(f"{one} repeats the mask of {other}: keep experiments apart")
        found[key] = entry | {"path": path}
    if not found:
        raise UserError(f"no masks below {root}: run prune_imp.py first")
    return found


def by_layer(mask: Mask, reference: Mask) -> list[dict[str, Any]]:
    """A row a layer: weights, those that each mask keeps, both keep, both keep by chance."""
    rows = []
    for name, entry in mask.items():
        kept, wanted = int(entry.sum()), int(reference[name].sum())
        shared, chance = int((entry & reference[name]).sum()), kept * wanted / entry.numel()
        rows.append(dict(zip(COUNTS, (name, entry.numel(), kept, wanted, shared, chance))))
    return rows


def overlaps(masks: Masks) -> pd.DataFrame:
    """A row a layer and mask of another network, where the target was pruned too.

    The method naive is the mask of the source, not permuted.
    """
    pruned = (None, None, None)  # target, method and match epoch of a mask as IMP left it
    compared: Masks = {}  # in place of the mask of its key: (mask, reference)
    for key, entry in masks.items():
        *network, dataset, tag, mask_dataset, sparsity, source, target, _, _ = key
        reference = masks.get((*network, dataset, tag, dataset, sparsity, target, *pruned))
        if target is None or reference is None:
            continue
        compared[key] = entry["mask"], reference["mask"]
        unpermuted = masks.get(
            (*network, mask_dataset, tag, mask_dataset, sparsity, source, *pruned)
        )
        if unpermuted:
            compared[*key[: len(PAIR)], "naive", None] = unpermuted["mask"], reference["mask"]
    rows = [dict(zip(MASK, key)) | row for key, pair in compared.items() for row in by_layer(*pair)]
    return pd.DataFrame(rows, columns=[*MASK, *COUNTS])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Shared and chance in percent of the reference's kept weights: means over pairs."""
    sums = table.groupby(MASK, dropna=False)[["kept_reference", "shared", "chance"]].sum()
    share = 100 * sums[["shared", "chance"]].div(sums["kept_reference"], axis=0)
    share["ratio"] = share["shared"] / share["chance"]
    group = [name for name in MASK if name not in SEEDS]
    return (
        share.groupby(group, dropna=False)
        .agg(
            shared=("shared", "mean"),
            shared_std=("shared", "std"),
            chance=("chance", "mean"),
            ratio=("ratio", "mean"),
            pairs=("shared", "count"),
        )
        .reset_index()
    )
