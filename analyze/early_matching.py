"""How early a target can be matched against (Table 15).

    python -m analyze.early_matching runs/mine

Accuracy of the permuted arm by the epoch of B's weights that `align_mask.py --target-epoch` matched
against, a column a rewind epoch (the paper's is 20), beside naive and LTH: mean ± sample std over
pairs of seeds. Writes early_matching.csv and figures/early_matching_*. analyze.results has the
differences to naive, with their intervals.
"""

import pandas as pd

from analyze.lib import style
from analyze.lib.panels import accuracy
from analyze.lib.runs import (
    CELL,
    other_mask,
    parse_root,
    plain,
    remarks,
    save,
    sparse_runs,
    with_tag,
)
from analyze.lib.statistics import plus_minus
from common import cli
from common.errors import UserError

COLUMNS = [*CELL, "tag", "arm", "match_epoch"]


def compared(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that Table 15 compares: LTH, naive, and permuted by activations."""
    runs = plain(runs[other_mask(runs).isna()])
    matched = (runs["arm"] == "permuted") & (runs["method"] == "activation")
    return runs[matched | runs["arm"].isin(["lth", "naive"])]


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a cell, tag, arm and match epoch, which LTH and naive have not: mean, std and count.

    Raises UserError where no cell has two match epochs.
    """
    found = runs.groupby(COLUMNS, dropna=False)["test_acc"].agg(["mean", "std", "count"])
    found = found.reset_index()
    if not (found.groupby(COLUMNS[:-2])["match_epoch"].nunique() > 1).any():
        missing = "no permuted runs matched at two epochs of the target"
        raise UserError(f"{missing}: align with --target-epoch and train them")
    return found.assign(variant=with_tag(found["arm"].replace("lth", "LTH"), found["tag"]))


def main() -> None:
    root = parse_root(__doc__).parse_args().root
    runs = compared(sparse_runs(root))
    found = table(runs)
    save(found, root / "early_matching.csv")
    shown = found.assign(text=list(map(plus_minus, found["mean"], found["std"])))
    shown["match"] = found["match_epoch"].map("{:g}".format, "ignore").fillna("")
    for (model, dataset), group in shown.groupby(["model", "dataset"]):
        title = f"{model} on {dataset}: test accuracy in percent, by match epoch"
        rows = ["width", "sparsity", "variant", "match"]
        grid = group.pivot(index=rows, columns="rewind", values="text")
        print(f"{title}\n{grid.to_string(na_rep='-')}")
        for rewind, points in group.groupby("rewind"):
            about = f"{model} on {dataset}, k = {rewind}"
            figure = accuracy(points, "match_epoch", "sparsity", about)
            name = f"early_matching_{model}_{dataset}_k{rewind:03d}"
            style.save(figure, points[found.columns], root / "figures", name)
    for line in remarks(runs):
        print(line)


if __name__ == "__main__":
    cli.run(main)
