"""The style of all figures: figures.mplstyle, and the style of each variant in looks.csv.

Colours are those of Okabe and Ito, for colour-blind readers. Markers and lines distinguish the arms
in greyscale, too.
"""

import itertools
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from analyze.lib.runs import save_table
from common import checkpoint

FOLDER = Path(__file__).parent
plt.style.use(FOLDER / "figures.mplstyle")
STYLES = pd.read_csv(FOLDER / "looks.csv", index_col=0, keep_default_na=False).to_dict("index")
DEFAULT = {"color": "0.5", "marker": ".", "linestyle": "-"}
# For variants that only begin with a known name: tagged, matched early, or from the paper.
DASHES = ("-.", ":", (0, (3, 1, 1, 1)), "--")
WIDTH_COLOURS = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9")


def width_style(width: float) -> dict[str, str]:
    """Return colour and marker of a width; six successive powers of 2 are all different."""
    index = round(math.log2(width)) % len(WIDTH_COLOURS)
    return {"color": WIDTH_COLOURS[index], "marker": "os^Dv*"[index]}


def variant_styles(variants: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return colour, marker and line style of each variant, in the order of `sort_key`.

    A variant that only begins with a known name, for example a tagged one, has the style of that
    name with another line style. Any other variant is grey.
    """
    styles, dashes = {}, itertools.cycle(DASHES)
    for variant in sorted(variants, key=sort_key):
        style = STYLES.get(known := _known_name(variant), DEFAULT).copy()
        if known and variant != known:
            style["linestyle"] = next(dashes)
        styles[variant] = style
    return styles


def sort_key(variant: str) -> tuple[int, int, str]:
    """Return the key that sorts variants for display; @2 comes before @10."""
    return [*STYLES, ""].index(_known_name(variant)), len(variant), variant


def _known_name(variant: str) -> str:
    """Return the longest name in STYLES that `variant`, without its match epoch, begins with."""
    plain = re.sub(r" @\d+", "", variant)
    return max((name for name in ("", *STYLES) if plain.startswith(name)), key=len)


def save_figure(figure: Figure, table: pd.DataFrame, folder: Path, name: str) -> None:
    """Save a figure as PNG and PDF, and its data as CSV."""
    for suffix in ("png", "pdf"):
        with checkpoint.atomic_write(folder / f"{name}.{suffix}") as file:
            figure.savefig(file, format=suffix)
    plt.close(figure)
    print(f"wrote {folder / name}.png")  # and the PDF beside it
    save_table(table, folder / f"{name}.csv")
