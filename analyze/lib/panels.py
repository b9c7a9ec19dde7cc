"""Figures of several panels, drawn from a table with a row a point."""

import itertools
from pathlib import Path
from typing import Any

import pandas as pd

from analyze.lib import style

LABELS = {
    "alpha": "α (0: A, 1: B)",
    "sparsity": "sparsity (%)",
    "rewind": "rewind epoch k",
    "match_epoch": "epoch of B that A is matched to",
}
METRICS = {
    "test_acc": ("accuracy", "test accuracy (%)"),
    "test_top5": ("top5", "top-5 accuracy (%)"),
}
ALONG = {"test_loss": "test loss (nats)", "test_acc": "test accuracy (%)"}  # a line
STARTS = {"naive": ("A to B", ":", "naive"), "aligned": ("π(A) to B", "-", "permuted")}
TICKS = 6  # more are thinned out by Matplotlib


def draw(
    points: pd.DataFrame, x: str, looks: dict[Any, dict], title: str, order: str = "row"
) -> style.Figure:
    """A panel for each `row` (its y label) and `column` (its title) of `points`, and in it a curve
    a `series`, by `mean`, with a band of `std`.

    `looks` has the style of each series, and its label where that is another. A point without `x`
    is a level; one without `column` stands in all columns. Where a style has no line, bars stand
    for the band. Rows are in the order of `points`, columns in that of its column `order`.
    """
    rows = points["row"].dropna().unique()
    columns = points.sort_values(order, kind="stable")["column"].dropna().unique()
    height = 0.9 + 2.3 * len(rows) + 0.1 * len(looks)  # the legend has two columns
    size = (max(5.6, 0.9 + 2.6 * len(columns)), height)
    grid = {"figsize": size, "squeeze": False, "sharex": True, "sharey": "row"}
    figure, axes = style.plt.subplots(len(rows), len(columns), **grid)
    ticks, legend = sorted(points[x].dropna().unique()), {}
    for (row, column), axis in zip(itertools.product(rows, columns), axes.flat):
        shown = points["column"].isna() | (points["column"] == column)
        here = points[shown & (points["row"] == row)].sort_values(x)
        for series, look in looks.items():
            curve = here[here["series"] == series]
            look = {"label": series} | look
            for level in curve.loc[curve[x].isna(), "mean"]:
                axis.axhline(level, **look)
            curve = curve.dropna(subset=x)
            mean, spread = curve["mean"], curve["std"].fillna(0)
            if len(curve):
                axis.plot(curve[x], mean, **look)
                colour = {"color": look["color"]}
                if len(curve) == 1 or not look["linestyle"]:  # a band would join them
                    axis.errorbar(curve[x], mean, spread, linestyle="", capsize=3, **colour)
                else:
                    band = (curve[x], mean - spread, mean + spread)
                    axis.fill_between(*band, alpha=0.15, linewidth=0, **colour)
        axis.set(title=column, xlabel=LABELS[x], ylabel=row)
        axis.label_outer()
        if len(ticks) <= TICKS:
            axis.set_xticks(ticks)
        handles, labels = axis.get_legend_handles_labels()
        legend |= zip(labels, handles)  # no panel need have all
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=2)
    figure.suptitle(title, fontsize=10)
    return figure


def accuracy(
    points: pd.DataFrame, x: str, panel: str, title: str, metric: str = "test_acc"
) -> style.Figure:
    """Draw accuracy against column `x`: a row of panels a width, a column a value of `panel`.

    `points` has width, sparsity, rewind, variant, mean and std.
    """
    points = points.assign(sparsity=100 * points["sparsity"]).sort_values(["width", panel])
    row = points["width"].map("width {:g}\n".format) + METRICS[metric][1]
    column = points[panel].map((LABELS[panel] + ": {:.8g}").format, "ignore")
    points = points.assign(row=row, column=column, series=points["variant"])
    return draw(points, x, style.looks(points["variant"].unique()), title, panel)


def save_accuracy(points: pd.DataFrame, title: str, metric: str, folder: Path, name: str) -> None:
    """Draw and write `accuracy` against rewind epoch, and against sparsity; {} in `name`."""
    for x, panel in (("rewind", "sparsity"), ("sparsity", "rewind")):
        figure = accuracy(points, x, panel, title, metric)
        style.save(figure, points, folder, name.format(f"{METRICS[metric][0]}_{x}"))


def lines(curves: pd.DataFrame, title: str, barriers: pd.Series | None = None) -> style.Figure:
    """Figure 3: loss above and accuracy below, without and with REPAIR; from A dotted.

    Of several widths each has its colour. `curves` have width, curve (naive or aligned), repair,
    alpha, and test_loss and test_acc or one of them. Mean `barriers` by the first three stand in
    the legend.
    """
    looks, several = {}, curves["width"].nunique() > 1
    for width, curve in curves.groupby(["width", "curve"]).groups:
        label, line, variant = STARTS[curve]
        if several:
            label = f"width {width:g}, {label}"
        if barriers is not None:
            numbers = barriers[width, curve]
            label += f": barrier {numbers[False]:.3f}, REPAIR {numbers[True]:.3f}"
        look = {"label": label, "linestyle": line, "markersize": 3}
        looks[width, curve] = (style.width_look(width) if several else style.LOOKS[variant]) | look
    key = ["repair", "width", "curve", "alpha"]
    points = curves.melt(key, [name for name in ALONG if name in curves], "metric")
    points = points.groupby(["metric", *key], sort=False)["value"].agg(["mean", "std"])
    points = points.reset_index().sort_values("repair", kind="stable")
    points["series"] = [*zip(points["width"], points["curve"])]
    points["row"] = points["metric"].map(ALONG)
    points["column"] = points["repair"].map({False: "without REPAIR", True: "with REPAIR"})
    return draw(points, "alpha", looks, title)
