"""Figures of several panels that more than one command draws: Figures 3 and 5 to 10."""

from typing import Any

import pandas as pd

from analyze.lib import style
from analyze.lib.runs import variant

ALPHA = "α (0: A, 1: B)"


def accuracy(
    points: pd.DataFrame,
    dense: pd.DataFrame,
    x: str,
    panel: str,
    title: str,
    reference: pd.DataFrame | None = None,
) -> style.Figure:
    """Draw accuracy against column `x`: a row of panels a width, a column a value of `panel`.

    `points` has width, sparsity, rewind, variant, mean and std, `dense` the width, tag and test_acc
    of dense networks. A `reference` of the form of `points` is drawn thin beside them.
    """
    widths, panels = sorted(points["width"].unique()), sorted(points[panel].unique())
    size = (max(4.2, 0.9 + 2.4 * len(panels)), 0.9 + 2.1 * len(widths))
    figure, axes = style.plt.subplots(
        len(widths), len(panels), figsize=size, squeeze=False, sharex=True, sharey="row"
    )
    dense = dense.assign(variant=[variant("dense", tag=tag) for tag in dense["tag"]])
    looks, levels = style.looks(points["variant"].unique()), style.looks(dense["variant"].unique())
    ticks = sorted(points[x].unique())
    for row, width in zip(axes, widths):
        for axis, value in zip(row, panels):
            for name, look in looks.items():
                if reference is not None:
                    curve = _curve(reference, name, width, panel, value)
                    thin = {"color": look["color"], "linewidth": 0.7, "alpha": 0.7}
                    axis.plot(curve[x], curve["mean"], **thin)
                curve = _curve(points, name, width, panel, value)
                if len(curve):
                    _draw(axis, curve[x], curve["mean"], curve["std"].fillna(0), **look)
            same = dense[dense["width"] == width].groupby("variant")["test_acc"].mean()
            for name, level in same.items():
                axis.axhline(level, linewidth=1, **levels[name])
            where = f"sparsity {100 * value:.4g}%" if panel == "sparsity" else f"k = {value}"
            axis.set_title(f"width {width:g}, {where}")
            if x == "sparsity":
                axis.set_xticks(ticks, [f"{100 * tick:.4g}" for tick in ticks])
            elif len(ticks) <= 6:
                axis.set_xticks(ticks)
            else:
                axis.xaxis.set_major_locator(style.plt.MaxNLocator(integer=True, nbins=6))
        row[0].set_ylabel("test accuracy (%)")
    for axis in axes[-1]:
        axis.set_xlabel("sparsity (%)" if x == "sparsity" else "rewind epoch k")
    _legend(figure)
    figure.suptitle(title, fontsize=10)
    return figure


def _curve(points: pd.DataFrame, name: str, width: float, panel: str, value: float) -> pd.DataFrame:
    here = (points["width"] == width) & (points[panel] == value)
    return points[here & (points["variant"] == name)]


def _draw(axis: Any, x: Any, mean: pd.Series, spread: pd.Series, **look: Any) -> None:
    axis.plot(x, mean, **look)
    color = look["color"]
    if len(x) == 1:  # a band has no width there
        axis.errorbar(x, mean, spread, color=color, capsize=3)
    axis.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.15, linewidth=0)


def _legend(figure: style.Figure) -> None:
    entries: dict[str, Any] = {}  # no panel need have all
    for axis in figure.axes:
        entries |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
    if len(entries) > 5:
        figure.set_figwidth(figure.get_figwidth() + 1.8)
        place: dict[str, Any] = {"loc": "outside right upper"}
    else:
        place = {"loc": "outside lower center", "ncols": len(entries)}
    figure.legend(entries.values(), entries.keys(), **place)


def draw_mean(axis: Any, rows: pd.DataFrame, metric: str, **look: object) -> None:
    """Draw the mean over pairs of `metric` against alpha, with a band of a standard deviation."""
    curve = rows.groupby("alpha")[metric].agg(["mean", "std"]).fillna(0)
    _draw(axis, curve.index, curve["mean"], curve["std"], **look)


def widths(table: pd.DataFrame, title: str) -> style.Figure:
    """Figure 3: test loss, a colour a width, without REPAIR and with it; A dotted, π(A) solid."""
    panels = [repaired for repaired in (False, True) if (table["repair"] == repaired).any()]
    size = (0.8 + 3.6 * len(panels), 3.4)
    figure, axes = style.plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True)
    for axis, repaired in zip(axes[0], panels):
        here = table[table["repair"] == repaired]
        for (width, kind), rows in here.groupby(["width", "curve"]):
            start, dashes = ("A", ":") if kind == "naive" else ("π(A)", "-")
            look = style.width_look(width) | {"linestyle": dashes, "markersize": 3}
            draw_mean(axis, rows, "test_loss", **look, label=f"width {width:g}, {start} to B")
        axis.set_title("with REPAIR" if repaired else "without REPAIR")
        axis.set_xlabel(ALPHA)
    axes[0, 0].set_ylabel("test loss (nats)")
    figure.legend(*axes[0, -1].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(title, fontsize=10)
    return figure
