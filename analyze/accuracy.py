"""Accuracy of the arms against the rewind epoch, and against sparsity (Figures 5-10).

    python -m analyze.accuracy runs/quick

Writes figures/accuracy_rewind_* (a panel a width and sparsity) and figures/accuracy_sparsity_* (a panel a
width and rewind epoch): mean over seeds, a band of one sample standard deviation, the dense networks dashed.
With --paper the paper's curves stand beside ours, thin, in the cells that both have.
"""

from typing import Any

import pandas as pd

from analyze import paper, style
from analyze.results import dense_runs, of_one_network, parse_root, sparse_runs, variants
from common import cli


def means(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean, sample std and number of runs by width, sparsity, rewind epoch and variant."""
    key = ["width", "sparsity", "rewind", "variant"]
    return runs.assign(variant=variants(runs)).groupby(key)["test_acc"].agg(["mean", "std", "count"]).reset_index()


def plot(
    points: pd.DataFrame, dense: pd.DataFrame, x: str, panel: str, title: str, reference: pd.DataFrame | None = None
) -> style.Figure:
    """Draw accuracy against column `x`, a row of panels a width and a column of panels a value of `panel`.

    `points` has a mean and std a row (see `means`), `dense` the test accuracies of dense networks by width. A
    `reference` of the same form is drawn thin beside them.
    """
    widths, panels = sorted(points["width"].unique()), sorted(points[panel].unique())
    figure, axes = style.plt.subplots(
        len(widths),
        len(panels),
        figsize=(max(4.2, 0.9 + 2.4 * len(panels)), 0.9 + 2.1 * len(widths)),
        squeeze=False,
        sharex=True,
        sharey="row",
    )
    for row, width in zip(axes, widths):
        level = dense.loc[dense["width"] == width, "test_acc"].mean()
        for axis, value in zip(row, panels):
            here = points[(points["width"] == width) & (points[panel] == value)]
            for variant in sorted(points["variant"].unique(), key=style.rank):
                curve, look = here[here["variant"] == variant], style.look(variant)
                if reference is not None:
                    same = (
                        (reference["width"] == width) & (reference[panel] == value) & (reference["variant"] == variant)
                    )
                    thin = {"color": look["color"], "linewidth": 0.7, "alpha": 0.7, "linestyle": "-"}
                    axis.plot(reference.loc[same, x], reference.loc[same, "mean"], **thin)
                if len(curve):
                    axis.plot(curve[x], curve["mean"], **look)
                    spread = curve["std"].fillna(0)
                    if len(curve) == 1:  # a band has no width there
                        axis.errorbar(curve[x], curve["mean"], spread, color=look["color"], capsize=3)
                    axis.fill_between(
                        curve[x],
                        curve["mean"] - spread,
                        curve["mean"] + spread,
                        color=look["color"],
                        alpha=0.18,
                        linewidth=0,
                    )
            if not pd.isna(level):
                axis.axhline(level, **style.DENSE)
            shown = f"sparsity {100 * value:.4g}%" if panel == "sparsity" else f"rewind epoch {value}"
            axis.set_title(f"width {width:g}, {shown}")
            if x == "sparsity":
                axis.set_xticks(sorted(points[x].unique()), [f"{100 * s:.4g}" for s in sorted(points[x].unique())])
            elif points[x].nunique() <= 6:
                axis.set_xticks(sorted(points[x].unique()))
            else:
                axis.xaxis.set_major_locator(style.plt.MaxNLocator(integer=True, nbins=6))
        row[0].set_ylabel("test accuracy (%)")
    for axis in axes[-1]:
        axis.set_xlabel("sparsity (%)" if x == "sparsity" else "rewind epoch k")
    entries: dict[str, Any] = {}  # no panel need have all
    for axis in axes.flat:
        entries |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
    if len(entries) > 5:
        figure.set_figwidth(figure.get_figwidth() + 1.8)
        figure.legend(entries.values(), entries.keys(), loc="outside right upper")
    else:
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=len(entries))
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    parser = parse_root(__doc__)
    parser.add_argument("--paper", action="store_true", help="the paper's curves beside ours, thin")
    args = parser.parse_args()
    runs, dense = sparse_runs(args.root), dense_runs(args.root)
    for (model, dataset), group in runs.groupby(["model", "dataset"]):
        same = dense[(dense["model"] == model) & (dense["dataset"] == dataset)]
        reference = paper.of(paper.accuracies(), model, dataset) if args.paper else None
        if args.paper and reference.empty:
            print(f"the paper has no accuracies of {model} on {dataset}")
        pairs = group[~of_one_network(group)]
        count = len((pairs if len(pairs) else group)[["source_seed", "target_seed"]].drop_duplicates())
        title = f"{model} on {dataset}, {count} seed pair" + "s" * (count != 1)
        for x, panel in (("rewind", "sparsity"), ("sparsity", "rewind")):
            points = means(group)
            style.save(
                plot(points, same, x, panel, title, reference),
                points,
                args.root / "figures",
                f"accuracy_{x}_{model}_{dataset}",
            )


if __name__ == "__main__":
    cli.run(main)
