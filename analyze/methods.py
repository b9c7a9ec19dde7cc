"""Which matching method is best: `python -m analyze.methods runs/quick`.

A row for every method that permuted masks below the folder, means over pairs of seeds. By network:
the cosine of π(A) and B over the matched weights, and the loss barrier between them with and
without REPAIR (where analyze.interpolation has measured it). By sparsity: the cosine of
π(m_A ⊙ A) and B, the weights that π(m_A) shares with IMP's mask of B over what chance gives (where
B was pruned too), and the accuracy of sparse training minus naive with its standard error. Writes
methods.csv; a dash stands for what is missing.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from analyze.lib import overlap
from analyze.lib.lines import alignments, kept_barriers
from analyze.lib.runs import NETWORK, SEEDS, parse_root, readable, sparse_runs, variants
from analyze.lib.statistics import summary
from common import checkpoint, cli, masking, paths
from common.align.axes import find_axes
from common.align.matching import matched_weights, objective
from common.align.permutation import inverse, permute
from common.errors import UserError
from common.models import build_model

NAIVE = "naive"
KEY = [*NETWORK, "tag", "sparsity", "method", "match_epoch"]


def cosine(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The cosine of the angle between two sets of tensors."""
    return objective(one, other) / np.sqrt(objective(one, one) * objective(other, other))


def measures(run: dict[str, Any]) -> list[dict[str, Any]]:
    """A row of the method and one of naive for every mask that a permutation moved."""
    source, target = (
        checkpoint.load(run[role], checkpoint.WEIGHTS) for role in ("source", "target")
    )
    model = build_model(**target["model"])
    dims = find_axes(model, target["model"]["input_shape"]).dims
    names = matched_weights(model)
    a, b = ({name: end["state_dict"][name] for name in names} for end in (source, target))
    permutation = checkpoint.load(run["path"], ("permutation",))["permutation"]
    moved = permute(a, dims, permutation)
    barriers = {kind: kept_barriers(run, kind) for kind in ("naive", "aligned")}
    rows = []
    for path in paths.mask_files(run["path"].parent):
        sparsity = paths.sparsity_of(path)
        if run["sparsity"] not in (None, sparsity):
            continue
        mask = checkpoint.load(path, checkpoint.MASKS)
        unpermuted = permute(mask["mask"], dims, inverse(permutation))
        about = {key: run[key] for key in (*NETWORK, *SEEDS, "match_epoch")}
        about |= {"sparsity": sparsity, "tag": mask.get("tag") or ""}
        for method, kind, weights, kept in (
            (mask["method"], "aligned", moved, mask["mask"]),
            (NAIVE, "naive", a, unpermuted),
        ):
            row = about | {"method": method, "cosine": cosine(weights, b)}
            row["masked_cosine"] = cosine(masking.apply(weights, kept), b)
            rows.append(row | barriers[kind])
    return rows


def table(root: Path) -> pd.DataFrame:
    """The whole comparison, a row a (network, match epoch, sparsity, method, rewind epoch).

    Raises UserError without an alignment.
    """
    found = pd.DataFrame([row for run in alignments(root) for row in readable(measures, run) or []])
    if found.empty:
        raise UserError(f"no alignment below {root} can be read: run align_mask.py again")
    found = found.drop_duplicates([*KEY, *SEEDS])  # naive comes with every method
    result = found.drop(columns=SEEDS).groupby(KEY).mean().reset_index()
    shared = overlap.overlaps(overlap.load_all(root))
    shared = shared[shared["mask_dataset"] == shared["dataset"]]
    if len(shared):
        ratio = overlap.summary(shared)[[*KEY, "ratio"]].rename(columns={"ratio": "overlap/chance"})
        result = _beside(result, ratio)
    try:
        runs = sparse_runs(root)
    except UserError:  # none yet
        return result
    plain = ~runs["signs"] & ~runs["fan_in"] & (runs["mask_dataset"] == runs["dataset"])
    runs = runs[plain & runs["arm"].isin([NAIVE, "permuted", "random-permutation"])]
    if runs.empty:
        return result
    about = runs.assign(variant=variants(runs), method=runs["method"].fillna(NAIVE))
    about = about[["variant", "method", "match_epoch", "tag", *NETWORK]].drop_duplicates()
    columns = {
        "rewind": "k",
        "mean": "accuracy",
        "difference": "minus naive",
        "difference_se": "± SE",
    }
    accuracy = summary(runs).merge(about, on=["variant", *NETWORK]).rename(columns=columns)
    return _beside(result, accuracy[[*KEY, *columns.values()]])


def _beside(table: pd.DataFrame, more: pd.DataFrame) -> pd.DataFrame:
    """Add the columns of `more`; naive, which has no match epoch there, stands at each."""
    naive = more["method"] == NAIVE
    epochs = table[["match_epoch"]].drop_duplicates()
    everywhere = more[naive].drop(columns="match_epoch").merge(epochs, how="cross")
    matched = more[~naive].astype({"match_epoch": epochs["match_epoch"].dtype})
    return table.merge(pd.concat([matched, everywhere[more.columns]]), how="left", on=KEY)


def main() -> None:
    root = parse_root(__doc__).parse_args().root
    found = table(root)
    checkpoint.save_text(found.to_csv(index=False), root / "methods.csv")
    for (model, width, dataset, epoch), group in found.groupby([*NETWORK, "match_epoch"]):
        print(f"\n{model} x{width:g} on {dataset}, matched at epoch {epoch}")
        shown = group.drop(columns=[*NETWORK, "match_epoch"])
        print(shown.to_string(index=False, na_rep="-", float_format="{:.3f}".format))
    print(f"wrote {root / 'methods.csv'}")


if __name__ == "__main__":
    cli.run(main)
