"""How early in its training the target can be matched (Table 15).

    python -m analyze.early_matching runs/mine

Accuracy of the permuted arm by the epoch of B's weights that A was matched to (`align_mask.py
--target-epoch`), with a column per rewind epoch (the paper's is 20), beside naive and LTH: mean ±
sample std over pairs of seeds. Writes early_matching.csv and figures/early_matching_*.
analyze.results has the differences to naive, with their intervals.
"""

import pandas as pd

from analyze.lib import style
from analyze.lib.panels import draw_accuracy
from analyze.lib.runs import (
    CELL,
    caveats,
    foreign_mask_dataset,
    root_parser,
    save_table,
    sparse_runs,
    with_tag,
    without_signs_or_fan_in,
)
from analyze.lib.statistics import format_mean
from common import cli
from common.errors import UserError

KEYS = [*CELL, "tag", "arm", "method", "match_epoch"]


def select_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that Table 15 compares: LTH, naive, and permuted by activation matching."""
    runs = without_signs_or_fan_in(runs[foreign_mask_dataset(runs).isna()])
    method = runs["method"].str.split().str[0]  # without settings of the alignment
    by_activation = (runs["arm"] == "permuted") & (method == "activation")
    return runs[by_activation | runs["arm"].isin(["lth", "naive"])]


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """Return mean, std and count of the accuracy by KEYS; LTH and naive have no match epoch.

    Raises UserError if no cell has two match epochs.
    """
    table = runs.groupby(KEYS, dropna=False)["test_acc"].agg(["mean", "std", "count"])
    table = table.reset_index()
    if not (table.groupby(KEYS[:-1], dropna=False)["match_epoch"].nunique() > 1).any():
        message = "no permuted runs matched by activations at two epochs of the target"
        raise UserError(f"{message}: align with --target-epoch and train them")
    with_settings = table["method"].mask(table["method"] == "activation")
    arm = table["arm"].replace("lth", "LTH") + (" (" + with_settings + ")").fillna("")
    return table.assign(variant=with_tag(arm, table["tag"]))


def main() -> None:
    root = root_parser(__doc__).parse_args().root
    runs = select_runs(sparse_runs(root))
    table = summarise(runs)
    save_table(table, root / "early_matching.csv")
    rows = table.assign(text=list(map(format_mean, table["mean"], table["std"])))
    rows["match"] = table["match_epoch"].map("{:g}".format, "ignore").fillna("")
    for (model, dataset), group in rows.groupby(["model", "dataset"]):
        title = f"{model} on {dataset}: test accuracy in percent, by match epoch"
        index = ["width", "sparsity", "variant", "match"]
        grid = group.pivot(index=index, columns="rewind", values="text")
        print(f"{title}\n{grid.to_string(na_rep='-')}")
        for rewind, points in group.groupby("rewind"):
            title = f"{model} on {dataset}, k = {rewind}"
            figure = draw_accuracy(points, "match_epoch", "sparsity", title)
            name = f"early_matching_{model}_{dataset}_k{rewind:03d}"
            style.save_figure(figure, points[table.columns], root / "figures", name)
    for line in caveats(runs):
        print(line)


if __name__ == "__main__":
    cli.run(main)
