"""How early a target can be matched against: `python -m analyze.early_matching runs/mine` (Table 15).

Accuracy of the permuted arm by the epoch of B's weights that `align_mask.py --target-epoch` matched against, a column
a rewind epoch, beside naive and LTH: mean ± sample std over pairs of seeds. Writes early_matching.csv and
figures/early_matching_*.
"""

from pathlib import Path

import pandas as pd

from analyze import style
from analyze.results import CELL, parse_root, sparse_runs
from common import checkpoint, cli
from common.errors import UserError


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a cell and match epoch: mean, std and count; LTH and naive have no match epoch. Raises UserError without two."""
    plain = runs[~runs["signs"] & ~runs["fan_in"] & runs["arm"].isin(["lth", "naive", "permuted"])]
    plain = plain[(plain["arm"] != "permuted") | (plain["method"] == "activation")]
    found = (
        plain.groupby([*CELL, "arm", "match_epoch"], dropna=False)["test_acc"]
        .agg(["mean", "std", "count"])
        .reset_index()
    )
    early = found[found["arm"] == "permuted"].groupby(CELL[:4])["match_epoch"].nunique()
    if early.empty or early.max() < 2:
        raise UserError(
            "no permuted runs matched at two epochs of the target: align with --target-epoch and train them"
        )
    return found


def plot(found: pd.DataFrame, title: str) -> style.Figure:
    """Accuracy against match epoch, a panel a sparsity, a line a rewind epoch; naive as a dotted level of its colour."""
    sparsities = sorted(found["sparsity"].unique())
    figure, axes = style.plt.subplots(1, len(sparsities), figsize=(1 + 3.2 * len(sparsities), 3.2), squeeze=False)
    for axis, sparsity in zip(axes[0], sparsities):
        here = found[found["sparsity"] == sparsity]
        for number, (rewind, lines) in enumerate(here.groupby("rewind")):
            colour = style.WIDTHS[number % len(style.WIDTHS)]
            curve = lines[lines["arm"] == "permuted"].sort_values("match_epoch")
            axis.errorbar(curve["match_epoch"], curve["mean"], curve["std"].fillna(0), color=colour, marker="^", capsize=2, label=f"permuted, k = {rewind}")  # fmt: skip
            for level in lines.loc[lines["arm"] == "naive", "mean"]:
                axis.axhline(level, color=colour, linestyle=":", label=f"naive, k = {rewind}")
        axis.set_title(f"sparsity {100 * sparsity:.4g}%")
        axis.set_xlabel("epoch of B that A is matched to")
    axes[0, 0].set_ylabel("test accuracy (%)")
    axes[0, -1].legend()
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    root: Path = parse_root(__doc__).parse_args().root
    found = table(sparse_runs(root))
    checkpoint.save_text(found.to_csv(index=False), root / "early_matching.csv")
    for (model, width, dataset), group in found.groupby(CELL[:3]):
        text = group["mean"].map("{:.2f}".format) + group["std"].map(lambda s: "" if pd.isna(s) else f" ± {s:.2f}")
        shown = group.assign(text=text, match=group["match_epoch"].map(lambda e: "" if pd.isna(e) else f"{e:g}"))
        print(f"\n{model} x{width:g} on {dataset}: test accuracy in percent, by match epoch")
        print(shown.pivot(index=["sparsity", "arm", "match"], columns="rewind", values="text").to_string(na_rep="-"))
        if group.loc[group["arm"] == "permuted", "match_epoch"].nunique() > 1:
            name = f"early_matching_{model}x{width:g}_{dataset}"
            style.save(plot(group, f"{model} x{width:g} on {dataset}"), group, root / "figures", name)
    print(f"wrote {root / 'early_matching.csv'}")


if __name__ == "__main__":
    cli.run(main)
