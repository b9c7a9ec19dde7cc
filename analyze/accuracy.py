"""Accuracy of the arms against the rewind epoch, and against sparsity (Figures 5-10).

    python -m analyze.accuracy runs/quick

Writes figures/accuracy_rewind_* (a panel a width and sparsity) and figures/accuracy_sparsity_* (a panel a
width and rewind epoch): mean over seeds, a band of one sample standard deviation, the dense networks dashed.
"""

from pathlib import Path
from typing import Any

import pandas as pd

from analyze import style
from analyze.results import dense_runs, parse_root, sparse_runs, variants
from common import cli


def plot(runs: pd.DataFrame, dense: pd.DataFrame, x: str, panel: str, title: str) -> tuple[style.Figure, pd.DataFrame]:
    """Draw accuracy against column `x`, a row of panels a width and a column of panels a value of `panel`."""
    points = (
        runs.assign(variant=variants(runs))
        .groupby(["width", panel, "variant", x])["test_acc"]
        .agg(["mean", "std", "count"])
        .reset_index()
    )
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
                if len(curve):
                    axis.plot(curve[x], curve["mean"], **look)
                    spread = curve["std"].fillna(0)
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
    return figure, points


def main() -> None:
    root: Path = parse_root(__doc__).parse_args().root
    runs, dense = sparse_runs(root), dense_runs(root)
    for (model, dataset), group in runs.groupby(["model", "dataset"]):
        same = dense[(dense["model"] == model) & (dense["dataset"] == dataset)]
        pairs = group[group["source_seed"] != group["target_seed"]]
        count = len((pairs if len(pairs) else group)[["source_seed", "target_seed"]].drop_duplicates())
        title = f"{model} on {dataset}, {count} seed pair" + "s" * (count != 1)
        for x, panel in (("rewind", "sparsity"), ("sparsity", "rewind")):
            figure, points = plot(group, same, x, panel, title)
            style.save(figure, points, root / "figures", f"accuracy_{x}_{model}_{dataset}")


if __name__ == "__main__":
    cli.run(main)
