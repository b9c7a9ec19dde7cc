"""Figures of several panels that more than one command draws: Figures 3 and 5 to 11."""

from pathlib import Path
from typing import Any

import pandas as pd

from analyze.lib import style

ALPHA = "α (0: A, 1: B)"
LABELS = {
    "sparsity": "sparsity (%)",
    "rewind": "rewind epoch k",
    "match_epoch": "epoch of B that A is matched to",
}
METRICS = {
    "test_acc": ("accuracy", "test accuracy (%)"),
    "test_top5": ("top5", "top-5 accuracy (%)"),
}


def accuracy(
    points: pd.DataFrame, x: str, panel: str, title: str, metric: str = "test_acc"
) -> style.Figure:
    """Draw accuracy against column `x`: a row of panels a width, a column a value of `panel`.

    `points` has width, sparsity, rewind, variant, mean and std; a row without `x` is a level, one
    without `panel` stands in all.
    """
    points = points.assign(sparsity=100 * points["sparsity"])
    widths, panels, ticks = (sorted(points[key].dropna().unique()) for key in ("width", panel, x))
    size = (max(4.2, 0.9 + 2.4 * len(panels)), 0.9 + 2.1 * len(widths))
    figure, axes = style.plt.subplots(
        len(widths), len(panels), figsize=size, squeeze=False, sharex=True, sharey="row"
    )
    looks = style.looks(points["variant"].unique())
    for row, width in zip(axes, widths):
        for axis, value in zip(row, panels):
            shown = points[panel].isna() | (points[panel] == value)
            here = points[shown & (points["width"] == width)].sort_values(x)
            for name, look in looks.items():
                curve = here[here["variant"] == name]
                for level in curve.loc[curve[x].isna(), "mean"]:
                    axis.axhline(level, **look)
                if len(curve := curve.dropna(subset=x)):
                    _draw(axis, curve[x], curve["mean"], curve["std"].fillna(0), **look)
            axis.set_title(f"width {width:g}, {LABELS[panel]}: {value:.4g}")
            axis.set_xticks(ticks if len(ticks) <= 6 else ticks[:: len(ticks) // 4])
            axis.set_xlabel(LABELS[x])
            axis.set_ylabel(METRICS[metric][1])
            axis.label_outer()
    _legend(figure)
    figure.suptitle(title, fontsize=10)
    return figure


def save_accuracy(points: pd.DataFrame, title: str, metric: str, folder: Path, name: str) -> None:
    """Draw and write `accuracy` against rewind epoch, and against sparsity; {} in `name`."""
    for x, panel in (("rewind", "sparsity"), ("sparsity", "rewind")):
        figure = accuracy(points, x, panel, title, metric)
        style.save(figure, points, folder, name.format(f"{METRICS[metric][0]}_{x}"))


def _draw(axis: Any, x: Any, mean: pd.Series, spread: pd.Series, **look: Any) -> None:
    axis.plot(x, mean, **look)
    if len(x) == 1:  # a band has no width there
        axis.errorbar(x, mean, spread, color=look["color"], capsize=3)
    axis.fill_between(x, mean - spread, mean + spread, color=look["color"], alpha=0.15, linewidth=0)


def _legend(figure: style.Figure) -> None:
    entries: dict[str, Any] = {}  # no panel need have all
    for axis in figure.axes:
        entries |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
    beside = len(entries) > 5
    figure.set_figwidth(figure.get_figwidth() + 1.8 * beside)
    place = "outside right upper" if beside else "outside lower center"
    columns = 1 if beside else len(entries)
    figure.legend(entries.values(), entries.keys(), loc=place, ncols=columns)


def draw_mean(axis: Any, rows: pd.DataFrame, metric: str, **look: object) -> None:
    """Draw the mean over pairs of `metric` against alpha, with a band of a standard deviation."""
    curve = rows.groupby("alpha")[metric].agg(["mean", "std"]).fillna(0)
    _draw(axis, curve.index, curve["mean"], curve["std"], **look)


def widths(table: pd.DataFrame, title: str) -> style.Figure:
    """Figure 3: test loss, a colour a width, without REPAIR and with it; A dotted, π(A) solid."""
    panels = table.groupby("repair")
    size = (0.8 + 3.6 * len(panels), 3.4)
    figure, axes = style.plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True)
    for axis, (repaired, here) in zip(axes[0], panels):
        for (width, kind), rows in here.groupby(["width", "curve"]):
            start, dashes = ("A", ":") if kind == "naive" else ("π(A)", "-")
            look = style.width_look(width) | {"linestyle": dashes, "markersize": 3}
            draw_mean(axis, rows, "test_loss", **look, label=f"width {width:g}, {start} to B")
        axis.set_title("with REPAIR" if repaired else "without REPAIR")
        axis.set_xlabel(ALPHA)
    axes[0, 0].set_ylabel("test loss (nats)")
    _legend(figure)
    figure.suptitle(title, fontsize=10)
    return figure
