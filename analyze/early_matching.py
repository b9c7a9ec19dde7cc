"""How early a target can be matched against (Table 15).

    python -m analyze.early_matching runs/mine

Accuracy of the permuted arm by the epoch of B's weights that `align_mask.py --target-epoch` matched
against, a column a rewind epoch (the paper's is 20), beside naive and LTH: mean ± sample std over
pairs of seeds. Writes early_matching.csv and figures/early_matching_*. Differences to naive, with
their intervals, are in analyze.results.
"""

import itertools

import pandas as pd

from analyze.lib import style
from analyze.lib.runs import CELL, NETWORK, other_mask, parse_root, remarks, sparse_runs
from common import checkpoint, cli
from common.errors import UserError


def plain(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that Table 15 compares: LTH, naive, and permuted by activations."""
    usual = ~runs["signs"] & ~runs["fan_in"] & other_mask(runs).isna()
    matched = (runs["arm"] == "permuted") & (runs["method"] == "activation")
    return runs[usual & (matched | runs["arm"].isin(["lth", "naive"]))]


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a cell, tag, arm and match epoch, which LTH and naive have not: mean, std and count.

    Raises UserError where no cell has two match epochs.
    """
    found = runs.groupby([*CELL, "tag", "arm", "match_epoch"], dropna=False)["test_acc"]
    found = found.agg(["mean", "std", "count"]).reset_index()
    if not (found.groupby([*CELL[:4], "tag"])["match_epoch"].nunique() > 1).any():
        raise UserError(
            "no permuted runs matched at two epochs of the target: "
            "align with --target-epoch and train them"
        )
    return found


def plot(found: pd.DataFrame, title: str) -> style.Figure:
    """Accuracy against match epoch, a panel a sparsity, a colour a rewind epoch; naive dotted."""
    panels = found.groupby("sparsity")
    size = (1 + 3.2 * len(panels), 3.2)
    figure, axes = style.plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, (sparsity, here) in zip(axes[0], panels):
        for color, (rewind, rows) in zip(itertools.cycle(style.WIDTHS), here.groupby("rewind")):
            curve, k = rows[rows["arm"] == "permuted"], f"k = {rewind}"
            look = {"color": color, "marker": "^", "capsize": 2, "label": f"permuted, {k}"}
            axis.errorbar(curve["match_epoch"], curve["mean"], curve["std"].fillna(0), **look)
            for level in rows.loc[rows["arm"] == "naive", "mean"]:
                axis.axhline(level, color=color, linestyle=":", label=f"naive, {k}")
        axis.set_title(f"sparsity {100 * sparsity:.4g}%")
        axis.set_xlabel("epoch of B that A is matched to")
    axes[0, 0].set_ylabel("test accuracy (%)")
    axes[0, -1].legend()
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    root = parse_root(__doc__).parse_args().root
    runs = plain(sparse_runs(root))
    found = table(runs)
    checkpoint.save_text(found.to_csv(index=False), root / "early_matching.csv")
    shown = found.assign(text=found["mean"].map("{:.2f}".format))
    shown["text"] += found["std"].map(" ± {:.2f}".format, "ignore").fillna("")
    shown["match"] = found["match_epoch"].map("{:g}".format, "ignore").fillna("")
    for (model, width, dataset, tag), group in shown.groupby([*NETWORK, "tag"]):
        title = f"{model} x{width:g} on {dataset}" + f" [{tag}]" * bool(tag)
        print(f"\n{title}: test accuracy in percent, by match epoch")
        grid = group.pivot(index=["sparsity", "arm", "match"], columns="rewind", values="text")
        print(grid.to_string(na_rep="-"))
        if group["match_epoch"].nunique() > 1:
            name = f"early_matching_{model}x{width:g}_{dataset}" + f"_{tag}" * bool(tag)
            points = group[found.columns]
            style.save(plot(points, title), points, root / "figures", name)
    for line in remarks(runs):
        print(line)
    print(f"wrote {root / 'early_matching.csv'}")


if __name__ == "__main__":
    cli.run(main)
