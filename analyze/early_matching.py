"""How early a target can be matched against (Table 15).

    python -m analyze.early_matching runs/mine

Accuracy of the permuted arm by the epoch of B's weights that `align_mask.py --target-epoch` matched
against, a column a rewind epoch, beside naive and LTH: mean ± sample std over pairs of seeds.
Writes early_matching.csv and figures/early_matching_*.
"""

from pathlib import Path

import pandas as pd

from analyze.lib import style
from analyze.lib.runs import CELL, NETWORK, other_mask, parse_root, remarks, sparse_runs
from common import checkpoint, cli
from common.errors import UserError


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a cell, tag, arm and match epoch, which LTH and naive have not: mean, std and count.

    Raises UserError where no cell has two match epochs.
    """
    found = runs.groupby([*CELL, "tag", "arm", "match_epoch"], dropna=False)["test_acc"]
    found = found.agg(["mean", "std", "count"]).reset_index()
    early = found[found["arm"] == "permuted"].groupby([*CELL[:4], "tag"])["match_epoch"].nunique()
    if early.empty or early.max() < 2:
        raise UserError(
            "no permuted runs matched at two epochs of the target: "
            "align with --target-epoch and train them"
        )
    return found


def plain(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that Table 15 compares: LTH, naive, and permuted by activations."""
    runs = runs[~runs["signs"] & ~runs["fan_in"] & other_mask(runs).isna()]
    permuted = (runs["arm"] == "permuted") & (runs["method"] == "activation")
    return runs[permuted | runs["arm"].isin(["lth", "naive"])]


def plot(found: pd.DataFrame, title: str) -> style.Figure:
    """Accuracy against match epoch, a panel a sparsity, a line a rewind epoch.

    Naive is a dotted level of the same colour.
    """
    sparsities = sorted(found["sparsity"].unique())
    size = (1 + 3.2 * len(sparsities), 3.2)
    figure, axes = style.plt.subplots(1, len(sparsities), figsize=size, squeeze=False)
    for axis, sparsity in zip(axes[0], sparsities):
        here = found[found["sparsity"] == sparsity]
        for number, (rewind, lines) in enumerate(here.groupby("rewind")):
            look = {"color": style.WIDTHS[number % len(style.WIDTHS)], "marker": "^", "capsize": 2}
            curve = lines[lines["arm"] == "permuted"].sort_values("match_epoch")
            x, spread = curve["match_epoch"], curve["std"].fillna(0)
            axis.errorbar(x, curve["mean"], spread, label=f"permuted, k = {rewind}", **look)
            for level in lines.loc[lines["arm"] == "naive", "mean"]:
                name = f"naive, k = {rewind}"
                axis.axhline(level, color=look["color"], linestyle=":", label=name)
        axis.set_title(f"sparsity {100 * sparsity:.4g}%")
        axis.set_xlabel("epoch of B that A is matched to")
    axes[0, 0].set_ylabel("test accuracy (%)")
    axes[0, -1].legend()
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    root: Path = parse_root(__doc__).parse_args().root
    runs = plain(sparse_runs(root))
    found = table(runs)
    checkpoint.save_text(found.to_csv(index=False), root / "early_matching.csv")
    for (model, width, dataset, tag), group in found.groupby([*NETWORK, "tag"]):
        title = f"{model} x{width:g} on {dataset}" + f" [{tag}]" * bool(tag)
        spread = group["std"].map(" ± {:.2f}".format, "ignore").fillna("")
        match = group["match_epoch"].map("{:g}".format, "ignore").fillna("")
        shown = group.assign(text=group["mean"].map("{:.2f}".format) + spread, match=match)
        shown = shown.pivot(index=["sparsity", "arm", "match"], columns="rewind", values="text")
        print(f"\n{title}: test accuracy in percent, by match epoch")
        print(shown.to_string(na_rep="-"))
        if group.loc[group["arm"] == "permuted", "match_epoch"].nunique() > 1:
            name = f"early_matching_{model}x{width:g}_{dataset}" + f"_{tag}" * bool(tag)
            style.save(plot(group, title), group, root / "figures", name)
    for line in remarks(runs):
        print(line)
    print(f"wrote {root / 'early_matching.csv'}")


if __name__ == "__main__":
    cli.run(main)
