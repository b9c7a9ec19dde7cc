"""One look for all figures: a fixed, colour-blind-safe colour and a marker for each arm."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from common import checkpoint

# Okabe and Ito's palette; markers and line styles keep the arms apart in grey.
ARMS = {
    "lth": {"label": "LTH", "color": "#0072B2", "marker": "o"},
    "naive": {"label": "naive", "color": "#D55E00", "marker": "s"},
    "permuted": {"label": "permuted", "color": "#009E73", "marker": "^"},
    "permuted (weight)": {"label": "permuted (weight)", "color": "#009E73", "marker": "v", "linestyle": "--"},
    "permuted (masked)": {"label": "permuted (masked)", "color": "#009E73", "marker": "D", "linestyle": ":"},
    "permuted (activation-covariance)": {
        "label": "permuted (covariance)",
        "color": "#332288",
        "marker": "p",
        "linestyle": "--",
    },
    "permuted (activation-pre)": {"label": "permuted (pre)", "color": "#882255", "marker": "<", "linestyle": "--"},
    "permuted (activation-mean)": {
        "label": "permuted (stream mean)",
        "color": "#999933",
        "marker": ">",
        "linestyle": "--",
    },
    "permuted (identity)": {"label": "identity", "color": "#D55E00", "marker": "1", "linestyle": ":"},
    "shuffled": {"label": "shuffled", "color": "#E69F00", "marker": "x", "linestyle": "--"},
    "random-permutation": {"label": "random permutation", "color": "#E69F00", "marker": "+", "linestyle": ":"},
    "imp-target": {"label": "IMP on target", "color": "#56B4E9", "marker": "*", "linestyle": "--"},
    "naive + signs": {"label": "naive + signs", "color": "#CC79A7", "marker": "s", "linestyle": "--"},
    "permuted + signs": {"label": "permuted + signs", "color": "#CC79A7", "marker": "^"},
    "permuted + fan-in": {"label": "permuted + fan-in", "color": "#661100", "marker": "h", "linestyle": "-."},
    "permuted (masked) + signs": {"label": "masked + signs", "color": "#CC79A7", "marker": "D", "linestyle": ":"},
}
DENSE = {"label": "dense", "color": "black", "linestyle": "--", "linewidth": 1}

plt.rcParams.update(
    {
        "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": "0.9", "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.linewidth": 1.4, "lines.markersize": 4.5,
        "legend.frameon": False, "legend.fontsize": 8, "figure.constrained_layout.use": True, "savefig.dpi": 200, "pdf.fonttype": 42,
    }
)  # fmt: skip


WIDTHS = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9")


def width_look(width: float) -> dict[str, str]:
    """Colour and marker of a width: 1, 2, 4, 8, 16 and 32 times have their own."""
    place = round(math.log2(max(width, 1))) % len(WIDTHS)
    return {"color": WIDTHS[place], "marker": "os^Dv*"[place]}


def look(variant: str) -> dict[str, str]:
    """Label, colour and marker of an arm or variant; one that has none of its own is grey."""
    return ARMS.get(variant, {"label": variant, "color": "0.5", "marker": "."})


def label(variant: str) -> str:
    return look(variant)["label"]


def rank(variant: str) -> tuple[int, str]:
    """The order in which arms and variants are shown."""
    return (list(ARMS).index(variant) if variant in ARMS else len(ARMS), variant)


def save(figure: Figure, table: pd.DataFrame, folder: Path, name: str) -> None:
    """Write a figure as PNG and PDF, and its data as CSV beside them."""
    for suffix in ("png", "pdf"):
        with checkpoint.replacing(folder / f"{name}.{suffix}") as file:
            figure.savefig(file, format=suffix)
    checkpoint.save_text(table.to_csv(index=False), folder / f"{name}.csv")
    plt.close(figure)
    print(f"wrote {folder / name}.png, .pdf and .csv")
