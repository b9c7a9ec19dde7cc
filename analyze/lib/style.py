"""One look for all figures: a fixed, colour-blind-safe colour and a marker for each arm."""

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from common import checkpoint

# Okabe and Ito's palette; markers and line styles keep the arms apart in grey.
LOOKS = {  # label, colour, marker, line style
    "lth": ("LTH", "#0072B2", "o", "-"),
    "naive": ("naive", "#D55E00", "s", "-"),
    "permuted": ("permuted", "#009E73", "^", "-"),
    "permuted (weight)": ("permuted (weight)", "#009E73", "v", "--"),
    "permuted (masked)": ("permuted (masked)", "#009E73", "D", ":"),
    "permuted (activation-covariance)": ("permuted (covariance)", "#332288", "p", "--"),
    "permuted (activation-pre)": ("permuted (pre)", "#882255", "<", "--"),
    "permuted (activation-mean)": ("permuted (stream mean)", "#999933", ">", "--"),
    "permuted (identity)": ("identity", "#D55E00", "1", ":"),
    "shuffled": ("shuffled", "#E69F00", "x", "--"),
    "random-permutation": ("random permutation", "#E69F00", "+", ":"),
    "imp-target": ("IMP on target", "#56B4E9", "*", "--"),
    "naive + signs": ("naive + signs", "#CC79A7", "s", "--"),
    "permuted + signs": ("permuted + signs", "#CC79A7", "^", "-"),
    "permuted + fan-in": ("permuted + fan-in", "#661100", "h", "-."),
    "permuted (masked) + signs": ("masked + signs", "#CC79A7", "D", ":"),
    "dense": ("dense", "black", "", "--"),
}
# Of variants without a look of their own, as tags and early matching make them.
DASHES = ((0, (3, 1, 1, 1)), (0, (8, 2)), (0, (1, 1)), (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))

plt.rcParams.update(
    {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "0.9",
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "lines.linewidth": 1.4,
        "lines.markersize": 4.5,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "figure.constrained_layout.use": True,
        "savefig.dpi": 200,
        "pdf.fonttype": 42,
    }
)


WIDTHS = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9")


def width_look(width: float) -> dict[str, str]:
    """Colour and marker of a width: 1, 2, 4, 8, 16 and 32 times have their own."""
    place = round(math.log2(max(width, 1))) % len(WIDTHS)
    return {"color": WIDTHS[place], "marker": "os^Dv*"[place]}


def looks(variants: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Label, colour, marker and line style of each variant, in the order in which they are shown.

    One that only begins with a known name, as tagged variants do, looks like that one, with a line
    style of its own; any other is grey.
    """
    found: dict[str, dict[str, Any]] = {}
    dashes: dict[str, Iterator[Any]] = {}
    for variant in sorted(variants, key=rank):
        base = _base(variant)
        label, color, marker, line = LOOKS.get(base, ("", "0.5", ".", "-"))
        if variant != base:
            line = next(dashes.setdefault(base, itertools.cycle(DASHES)))
        label += variant.removeprefix(base)
        found[variant] = dict(label=label, color=color, marker=marker, linestyle=line)
    return found


def label(variant: str) -> str:
    return looks([variant])[variant]["label"]


def rank(variant: str) -> tuple[int, str]:
    """The order in which arms and variants are shown."""
    return [*LOOKS, ""].index(_base(variant)), variant


def _base(variant: str) -> str:
    """The longest name with a look that `variant` begins with, or nothing."""
    return max((name for name in ("", *LOOKS) if variant.startswith(name)), key=len)


def save(figure: Figure, table: pd.DataFrame, folder: Path, name: str) -> None:
    """Write a figure as PNG and PDF, and its data as CSV beside them."""
    for suffix in ("png", "pdf"):
        with checkpoint.replacing(folder / f"{name}.{suffix}") as file:
            figure.savefig(file, format=suffix)
    checkpoint.save_text(table.to_csv(index=False), folder / f"{name}.csv")
    plt.close(figure)
    print(f"wrote {folder / name}.png, .pdf and .csv")
