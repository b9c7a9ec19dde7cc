"""Which matching method is best: `python -m analyze.methods runs/quick`.

A row for every method that permuted masks below the folder, means over pairs of seeds. By network:
the cosine of π(A) and B over the matched weights, and the loss barrier between them with and
without REPAIR (from barriers.csv, which analyze.interpolation writes). By sparsity: the cosine of
π(m_A ⊙ A) and B, the weights that π(m_A) shares with IMP's mask of B over what chance gives
(where B was pruned too), and the accuracy of sparse training minus naive with its standard error.
Writes methods.csv; a dash stands for what is missing.
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
    other_mask,
    parse_root,
    plain,
    readable,
    save,
    sparse_runs,
)
from analyze.lib.statistics import summary
from common import checkpoint, cli, masking
from common.align.axes import find_axes
from common.align.matching import objective
from common.align.permutation import inverse, permute
from common.errors import UserError
from common.masking import Mask
from common.models import build_model

NAIVE = "naive"
LINE = ["permutation", "curve"]
ROW = [*NETWORK, "tag", "sparsity", "method", "match_epoch"]


def cosine(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The cosine of the angle between two sets of tensors."""
    return objective(one, other) / np.sqrt(objective(one, one) * objective(other, other))


def cosines(weights: dict[str, Tensor], mask: Mask, target: dict[str, Tensor]) -> dict[str, float]:
    """Of weights, and of those that a mask keeps, with the target's."""
    kept = masking.apply(weights, mask)
    return {"cosine": cosine(weights, target), "masked_cosine": cosine(kept, target)}


def measures(run: dict[str, Any]) -> list[dict[str, Any]]:
    """A row of naive and one of the method, of a mask that a permutation moved."""
    ends = [checkpoint.load(run[end], checkpoint.WEIGHTS) for end in ("source", "target")]
    axes = find_axes(build_model(**ends[1]["model"]), ends[1]["model"]["input_shape"])
    a, b = ({name: end["state_dict"][name] for name in axes.weights} for end in ends)
    permutation = checkpoint.load(run["permutation"], ("permutation",))["permutation"]
    entry = checkpoint.load(run["mask"], checkpoint.MASKS)
    moved = permute(a, axes.dims, permutation)
    unpermuted = permute(entry["mask"], axes.dims, inverse(permutation))
    about = {key: run[key] for key in (*ROW, *SEEDS, "permutation")}
    about["tag"] = entry.get("tag") or ""
    naive = about | {"method": NAIVE, "match_epoch": None, "curve": "naive"}
    naive |= cosines(a, unpermuted, b)
    return [naive, about | {"curve": "aligned"} | cosines(moved, entry["mask"], b)]


def table(root: Path) -> pd.DataFrame:
    """The whole comparison, a row a (network, match epoch, sparsity, method, rewind epoch).

    Raises UserError without an alignment.
    """
    runs = alignments(root).sort_values("match_epoch", kind="stable").to_dict("records")
    found = pd.DataFrame([row for run in runs for row in readable(measures, run) or []])
    if found.empty:
        raise UserError(f"no alignment below {root} can be read: run align_mask.py again")
    if (root / "barriers.csv").is_file():
        barriers = pd.read_csv(root / "barriers.csv").pivot(index=LINE, columns="repair")["test"]
        barriers = barriers.rename(columns={False: "barrier", True: "barrier, REPAIR"})
        found["permutation"] = [str(path.relative_to(root)) for path in found["permutation"]]
        found = found.join(barriers, on=LINE)
    # Naive comes with every method; that beside the latest B counts.
    found = found.drop_duplicates([*ROW, *SEEDS], keep="last").drop(columns=[*SEEDS, *LINE])
    result = found.groupby(ROW, dropna=False).mean().reset_index()
    masks = overlap.load_all(root)
    shared = overlap.overlaps(masks)
    shared = overlap.summary(shared[shared["mask_dataset"] == shared["dataset"]])
    shared = shared.rename(columns={"ratio": "overlap/chance"})
    result = result.merge(shared[[*ROW, "overlap/chance"]], how="left", on=ROW)
    try:
        runs = sparse_runs(root)
    except UserError:  # none yet
        return result
    runs = plain(runs[other_mask(runs).isna()])
    runs = runs[runs["arm"].isin([NAIVE, "permuted", "random-permutation"])]
    names = {"rewind": "k", "mean": "accuracy"}
    names |= {"difference": "minus naive", "difference_se": "± SE"}
    about = runs[["variant", "method", "match_epoch", "tag", *NETWORK]].copy()
    made = masks.assign(mask=masks["path"].map(checkpoint.digest)).drop_duplicates("mask")
    for key in ("method", "tag"):  # of its mask: a run's name its own settings, too
        about[key] = runs["mask"].map(made.set_index("mask")[key]).fillna(about[key])
    about["method"] = about["method"].fillna(NAIVE)
    about = about.drop_duplicates().astype({"match_epoch": float})  # of naive alone it is None
    accuracy = summary(runs).merge(about, on=["variant", *NETWORK]).rename(columns=names)
    return result.merge(accuracy[[*ROW, "variant", *names.values()]], how="left", on=ROW)


def main() -> None:
    root = parse_root(__doc__).parse_args().root
    found = table(root)
    for (model, width, dataset), group in found.groupby(NETWORK):
        print(f"\n{model} x{width:g} on {dataset}")
        shown = group.drop(columns=NETWORK)
        print(shown.to_string(index=False, na_rep="-", float_format="{:.3f}".format))
    save(found, root / "methods.csv")


if __name__ == "__main__":
    cli.run(main)
