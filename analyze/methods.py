"""Which matching method is best: `python -m analyze.methods runs/quick`.

A row for every method that permuted masks below the folder; values are means over pairs of seeds.
By network: the cosine of π(A) and B over the matched weights, and the loss barrier between them
with and without REPAIR (from barriers.csv, which analyze.interpolation writes). By sparsity: the
cosine of π(m_A ⊙ A) and B, how many weights π(m_A) shares with IMP's mask of B relative to
chance (if B was pruned too), and the accuracy of sparse training and its difference to naive
with the standard error. Writes methods.csv; a dash marks a missing value.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from analyze.lib import overlap
from analyze.lib.networks import alignments
from analyze.lib.runs import (
    NETWORK,
    SEEDS,
    foreign_mask_dataset,
    root_parser,
    save_table,
    sparse_runs,
    try_read,
    without_signs_or_fan_in,
)
from analyze.lib.statistics import summary
from common import checkpoint, cli, masking
from common.align.axes import find_axes
from common.align.matching import objective
from common.align.permutation import inverse, permute
from common.errors import UserError
from common.masking import Mask
from common.models import build_model

LINE = ["permutation", "curve"]
KEYS = [*NETWORK, "tag", "sparsity", "method", "match_epoch"]


def cosine(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the cosine of the angle between two sets of tensors."""
    return objective(a, b) / np.sqrt(objective(a, a) * objective(b, b))


def cosines(weights: dict[str, Tensor], mask: Mask, target: dict[str, Tensor]) -> dict[str, float]:
    """Return the cosines of weights, and of the weights that a mask keeps, with the target's."""
    masked = masking.apply(weights, mask)
    return {"cosine": cosine(weights, target), "masked_cosine": cosine(masked, target)}


def measure_alignment(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the `cosines` of a row of `alignments`: a naive row and one of its method."""
    networks = [checkpoint.load(run[end], checkpoint.WEIGHTS) for end in ("source", "target")]
    model = networks[1]["model"]
    axes = find_axes(build_model(**model), model["input_shape"])
    a, b = ({name: entry["state_dict"][name] for name in axes.weights} for entry in networks)
    permutation = checkpoint.load(run["permutation"], ("permutation",))["permutation"]
    entry = checkpoint.load(run["mask"], checkpoint.MASKS)
    permuted = permute(a, axes.dims, permutation)
    unpermuted_mask = permute(entry["mask"], axes.dims, inverse(permutation))
    row = {key: run[key] for key in (*KEYS, *SEEDS, "permutation", "mask")}
    naive = row | {"method": "naive", "match_epoch": None, "curve": "naive"}
    naive |= cosines(a, unpermuted_mask, b)
    return [naive, row | {"curve": "aligned"} | cosines(permuted, entry["mask"], b)]


def measure_alignments(root: Path, masks: pd.DataFrame) -> pd.DataFrame:
    """Return cosines and barriers by KEYS, means over pairs. Raises UserError if there are none.

    `masks` are from `load_masks`, whose tags name the settings of their chains.
    """
    runs = alignments(root).sort_values("match_epoch", kind="stable").to_dict("records")
    table = pd.DataFrame([row for run in runs for row in try_read(measure_alignment, run) or []])
    if table.empty:
        raise UserError(f"no alignment below {root} can be read: run align_mask.py again")
    table["tag"] = table.pop("mask").map(masks.set_index("path")["tag"])
    if (root / "barriers.csv").is_file():
        # Alignments of several tags may have the same permutation.
        barriers = pd.read_csv(root / "barriers.csv").drop_duplicates([*LINE, "repair"])
        barriers = barriers.pivot(index=LINE, columns="repair")["test"]
        barriers = barriers.rename(columns={False: "barrier", True: "barrier, REPAIR"})
        table["permutation"] = table["permutation"].map(checkpoint.digest)
        table = table.join(barriers, on=LINE)
    # Every alignment of a pair has a naive row: keep the one with the latest B.
    table = table.drop_duplicates([*KEYS, *SEEDS], keep="last").drop(columns=[*SEEDS, *LINE])
    return table.groupby(KEYS, dropna=False).mean().reset_index()


def accuracies(root: Path, masks: pd.DataFrame) -> pd.DataFrame:
    """Return accuracy and its difference to naive by KEYS and rewind epoch `k`.

    `masks` are from `load_masks`. Raises UserError when there is no sparse run.
    """
    runs = sparse_runs(root)
    runs = without_signs_or_fan_in(runs[foreign_mask_dataset(runs).isna()])
    runs = runs[runs["arm"].isin(["naive", "permuted", "random-permutation"])]
    if runs.empty:
        raise UserError(f"no naive or permuted run below {root} with a mask of its own data set")
    keys = runs[["variant", "method", "match_epoch", "tag", *NETWORK]].copy()
    masks = masks.assign(mask=masks["path"].map(checkpoint.digest)).drop_duplicates("mask")
    for key in ("method", "tag"):  # of the mask, as those of a run have its settings appended
        keys[key] = runs["mask"].map(masks.set_index("mask")[key]).fillna(keys[key])
    keys["method"] = keys["method"].fillna("naive")
    keys = keys.drop_duplicates().astype({"match_epoch": float})  # None if all are naive
    names = {"rewind": "k", "mean": "accuracy"}
    names |= {"difference": "minus naive", "difference_se": "± SE"}
    table = summary(runs).merge(keys, on=["variant", *NETWORK]).rename(columns=names)
    return table[[*KEYS, "variant", *names.values()]]


def compare_methods(root: Path) -> pd.DataFrame:
    """Return the whole comparison, a row per value of KEYS and rewind epoch.

    Raises UserError when there is no alignment.
    """
    masks = overlap.load_masks(root)
    table = measure_alignments(root, masks)
    shared = overlap.overlaps(masks)
    shared = overlap.summary(shared[shared["mask_dataset"] == shared["dataset"]])
    shared = shared.rename(columns={"ratio": "overlap/chance"})
    table = table.merge(shared[[*KEYS, "overlap/chance"]], how="left", on=KEYS)
    accuracy = try_read(accuracies, root, masks)  # no sparse run yet, or two that clash
    return table if accuracy is None else table.merge(accuracy, how="left", on=KEYS)


def main() -> None:
    root = root_parser(__doc__).parse_args().root
    table = compare_methods(root)
    for (model, width, dataset), group in table.groupby(NETWORK):
        print(f"\n{model} x{width:g} on {dataset}")
        columns = group.drop(columns=NETWORK)
        print(columns.to_string(index=False, na_rep="-", float_format="{:.3f}".format))
    save_table(table, root / "methods.csv")


if __name__ == "__main__":
    cli.run(main)
