"""Which matching method is best: `python -m analyze.methods runs/quick`.

A row for every method that permuted masks below the folder, means over pairs of seeds. By network: the cosine of
π(A) and B over the matched weights, and the loss barrier between them with and without REPAIR (where
analyze.interpolation has measured it). By sparsity: the cosine of π(m_A ⊙ A) and B, the weights that π(m_A) shares
with IMP's mask of B over what chance gives (where B was pruned too), and the accuracy of sparse training minus naive
with its standard error. Writes methods.csv; a dash stands for what is missing.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analyze import masks as mask_overlap
from analyze.interpolation import alignments, barrier, caches
from analyze.results import CELL, parse_root, readable, sparse_runs, summary, variants
from common import checkpoint, cli, masking
from common.axes import find_axes
from common.errors import UserError
from common.matching import matched_weights, objective
from common.models import build_model
from common.permutation import inverse, permute

NETWORK = CELL[:3]
NAIVE = "naive"


def cosine(one: dict, other: dict) -> float:
    """The cosine of the angle between two sets of tensors."""
    return objective(one, other) / np.sqrt(objective(one, one) * objective(other, other))


def measures(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Two rows a mask that one permutation moved, the method's and naive's: cosines to B of A and of m_A ⊙ A, barriers."""
    source, target = (checkpoint.load(run[role], checkpoint.WEIGHTS) for role in ("source", "target"))
    model = build_model(**target["model"])
    axes = find_axes(model, target["model"]["input_shape"])
    names = matched_weights(model)
    a, b = ({name: end["state_dict"][name] for name in names} for end in (source, target))
    permutation = checkpoint.load(run["path"], ("permutation",))["permutation"]
    moved = permute(a, axes.dims, permutation)
    about = dict(zip(NETWORK, (*(target["model"][key] for key in ("name", "width")), target["dataset"]["name"])))
    about |= {key: run[key] for key in ("source_seed", "target_seed", "match_epoch")}
    curves = barriers(run)
    _, _, single = run["path"].stem.partition("_")  # permutation_0.90.pt is of one sparsity
    rows = []
    for path in sorted(run["path"].parent.glob(f"mask_{single or '*'}.pt")):
        mask = checkpoint.load(path, checkpoint.MASKS)
        unpermuted = permute(mask["mask"], axes.dims, inverse(permutation))
        here = about | {"sparsity": float(path.stem.partition("_")[2])}
        for method, curve, weights, kept in (
            (mask["method"], "aligned", moved, mask["mask"]), (NAIVE, "naive", a, unpermuted),
        ):  # fmt: skip
            found = {"cosine": cosine(weights, b), "masked_cosine": cosine(masking.apply(weights, kept), b)}
            rows.append(here | {"method": method} | found | curves.get(curve, {}))
    return rows


def barriers(run: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The barriers in test loss that analyze.interpolation has left of an alignment, by curve (naive, aligned).

    Of several measurements the one of most points, and then of most images for REPAIR, counts.
    """
    found: dict[str, dict[str, float]] = {}
    for curve, pattern in caches(run, "*", "*").items():
        measured = {tuple(map(int, path.stem.split("_")[-3:-1])): path for path in pattern.parent.glob(pattern.name)}
        if measured:
            for repaired, rows in pd.read_csv(measured[max(measured)]).groupby("repair"):
                name = "barrier, REPAIR" if repaired else "barrier"
                found.setdefault(curve, {})[name] = barrier(rows["test_loss"].to_numpy(), rows["alpha"].to_numpy())
    return found


def table(root: Path) -> pd.DataFrame:
    """The whole comparison, a row a (network, match epoch, sparsity, method). Raises UserError without an alignment."""
    key = [*NETWORK, "sparsity", "method", "match_epoch"]
    found = pd.DataFrame([row for run in alignments(root) for row in readable(measures, run) or []])
    if found.empty:
        raise UserError(f"no alignment below {root} can be read: run align_mask.py again")
    found = found.drop_duplicates([*key, "source_seed", "target_seed"])  # naive comes with every method
    result = found.drop(columns=["source_seed", "target_seed"]).groupby(key).mean().reset_index()
    shared = mask_overlap.overlaps(mask_overlap.load_all(root))
    shared = shared[shared["mask_dataset"] == shared["dataset"]]
    if len(shared):
        ratio = mask_overlap.summary(shared)[[*key, "ratio"]].rename(columns={"ratio": "overlap/chance"})
        result = _beside(result, ratio)
    try:
        runs = sparse_runs(root)
    except UserError:  # none yet
        return result
    plain = ~runs["signs"] & ~runs["fan_in"] & (runs["mask_dataset"] == runs["dataset"])
    runs = runs[plain & runs["arm"].isin([NAIVE, "permuted", "random-permutation"])]
    if runs.empty:
        return result
    about = runs.assign(variant=variants(runs), method=runs["method"].where(runs["arm"] != NAIVE, NAIVE))
    about = about[["variant", "method", "match_epoch", *NETWORK]].drop_duplicates()
    columns = {"rewind": "k", "mean": "accuracy", "difference": "minus naive", "difference_se": "± SE"}
    accuracy = summary(runs).merge(about, on=["variant", *NETWORK]).rename(columns=columns)
    return _beside(result, accuracy[[*key, *columns.values()]])


def _beside(table: pd.DataFrame, more: pd.DataFrame) -> pd.DataFrame:
    """Add the columns of `more`, by network, sparsity, method and match epoch; naive has none, and stands at each."""
    key = [*NETWORK, "sparsity", "method", "match_epoch"]
    naive = more["method"] == NAIVE
    epochs = table[["match_epoch"]].drop_duplicates()
    spread = more[naive].drop(columns="match_epoch").merge(epochs, how="cross")
    matched = pd.concat([more[~naive].astype({"match_epoch": epochs["match_epoch"].dtype}), spread[more.columns]])
    return table.merge(matched, how="left", on=key)


def main() -> None:
    root = parse_root(__doc__).parse_args().root
    found = table(root)
    checkpoint.save_text(found.to_csv(index=False), root / "methods.csv")
    for (model, width, dataset, epoch), group in found.groupby([*NETWORK, "match_epoch"]):
        print(f"\n{model} x{width:g} on {dataset}, matched at epoch {epoch}")
        print(
            group.drop(columns=[*NETWORK, "match_epoch"]).to_string(
                index=False, na_rep="-", float_format="{:.3f}".format
            )
        )
    print(f"wrote {root / 'methods.csv'}")


if __name__ == "__main__":
    cli.run(main)
