"""Figures with several panels, drawn from a table with a row per point."""

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
    "width": "width",
    "T": "epochs of dense training T",
}
METRICS = {
    "test_acc": ("accuracy", "test accuracy (%)"),
    "test_top5": ("top5", "top-5 accuracy (%)"),
}
LINE_METRICS = {"test_loss": "test loss (nats)", "test_acc": "test accuracy (%)"}
LINES = {"naive": ("A to B", ":", "naive"), "aligned": ("π(A) to B", "-", "permuted")}
MAX_TICKS = 6  # Matplotlib chooses the ticks if there are more values


def draw(
    points: pd.DataFrame, x: str, styles: dict[Any, dict], title: str, order: str = "row"
) -> style.Figure:
    """Draw a grid of panels, and in each a curve per `series`: `mean`, with a band of `std`.

    `points` has columns `row` (the y label of a row of panels), `column` (the title of a panel),
    `series`, `mean`, `x`, and `std`, or `low` and `high` for a band from one to the other. `styles`
    has the line style of each series, and its label if that is not its name. A point without `x`
    becomes a horizontal line, one without `column` is drawn in all columns, and a style without a
    line gets error bars instead of a band. Rows are in the order of `points`, columns are sorted by
    `order`, a column of `points`.
    """
    rows = points["row"].dropna().unique()
    columns = points.sort_values(order, kind="stable")["column"].dropna().unique()
    height = 0.9 + 2.3 * len(rows) + 0.1 * len(styles)  # the legend has two columns
    size = (max(5.6, 0.9 + 2.6 * len(columns)), height)
    grid = {"figsize": size, "squeeze": False, "sharex": True, "sharey": "row"}
    figure, axes = style.plt.subplots(len(rows), len(columns), **grid)
    ticks, legend = sorted(points[x].dropna().unique()), {}
    for (row, column), axis in zip(itertools.product(rows, columns), axes.flat):
        in_column = points["column"].isna() | (points["column"] == column)
        panel = points[in_column & (points["row"] == row)].sort_values(x)
        for series, line_style in styles.items():
            curve = panel[panel["series"] == series]
            line_style = {"label": series} | line_style
            for level in curve.loc[curve[x].isna(), "mean"]:
                axis.axhline(level, **line_style)
            curve = curve.dropna(subset=x)
            mean, std = curve["mean"], curve.get("std", 0)
            low, high = curve.get("low", mean - std), curve.get("high", mean + std)
            low, high = low.fillna(mean), high.fillna(mean)
            if len(curve):
                axis.plot(curve[x], mean, **line_style)
                color = {"color": line_style["color"]}
                if len(curve) == 1 or not line_style["linestyle"]:  # a band would join the points
                    error = mean - low, high - mean
                    axis.errorbar(curve[x], mean, error, linestyle="", capsize=3, **color)
                else:
                    edge = {"linewidth": 0.5, "linestyle": line_style["linestyle"]}
                    axis.fill_between(curve[x], low, high, alpha=0.2, **edge, **color)
        axis.set(title=column, xlabel=LABELS[x], ylabel=row)
        axis.label_outer()
        if len(ticks) <= MAX_TICKS:
            axis.set_xticks(ticks)
        handles, labels = axis.get_legend_handles_labels()
        legend |= zip(labels, handles)  # a panel may lack some series
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=2)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_accuracy(
    points: pd.DataFrame, x: str, panel: str, title: str, metric: str = "test_acc"
) -> style.Figure:
    """Draw accuracy against `x`, with a row of panels per width and a column per value of `panel`.

    `points` has columns width, sparsity, rewind, variant, mean and std.
    """
    points = points.assign(sparsity=100 * points["sparsity"]).sort_values(["width", panel])
    row = points["width"].map("width {:g}\n".format) + METRICS[metric][1]
    column = points[panel].map((LABELS[panel] + ": {:.8g}").format, "ignore")
    points = points.assign(row=row, column=column, series=points["variant"])
    return draw(points, x, style.variant_styles(points["variant"].unique()), title, panel)


def save_accuracy(points: pd.DataFrame, title: str, metric: str, folder: Path, name: str) -> None:
    """Draw and save accuracy against rewind epoch and against sparsity; `name` contains a {}."""
    for x, panel in (("rewind", "sparsity"), ("sparsity", "rewind")):
        figure = draw_accuracy(points, x, panel, title, metric)
        style.save_figure(figure, points, folder, name.format(f"{METRICS[metric][0]}_{x}"))


def draw_lines(curves: pd.DataFrame, title: str, barriers: pd.Series | None = None) -> style.Figure:
    """Draw Figure 3: loss above accuracy, without and with REPAIR; from A dotted, from π(A) solid.

    `curves` has columns width, curve (naive or aligned), repair, alpha, and test_loss, test_acc or
    both. Several widths have a colour each. `barriers`, indexed by width, curve and repair, go into
    the legend.
    """
    styles, several = {}, curves["width"].nunique() > 1
    for width, curve in curves.groupby(["width", "curve"]).groups:
        label, linestyle, variant = LINES[curve]
        if several:
            label = f"width {width:g}, {label}"
        if barriers is not None:
            values = barriers[width, curve]
            label += f": barrier {values[False]:.3f}, REPAIR {values[True]:.3f}"
        line_style = {"label": label, "linestyle": linestyle, "markersize": 3}
        styles[width, curve] = (
            style.width_style(width) if several else style.STYLES[variant]
        ) | line_style
    keys = ["repair", "width", "curve", "alpha"]
    points = curves.melt(keys, [name for name in LINE_METRICS if name in curves], "metric")
    points = points.groupby(["metric", *keys], sort=False)["value"].agg(["mean", "std"])
    points = points.reset_index().sort_values("repair", kind="stable")
    points["series"] = [*zip(points["width"], points["curve"])]
    points["row"] = points["metric"].map(LINE_METRICS)
    points["column"] = points["repair"].map({False: "without REPAIR", True: "with REPAIR"})
    return draw(points, "alpha", styles, title)
