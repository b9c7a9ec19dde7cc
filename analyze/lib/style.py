"""One look for all figures: figures.mplstyle, and in looks.csv the colour (Okabe and Ito's, for
the colour-blind), marker and line of each variant, which keep the arms apart in grey, too.
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

from analyze.lib.runs import save as save_table
from common import checkpoint

HERE = Path(__file__).parent
plt.style.use(HERE / "figures.mplstyle")
LOOKS = pd.read_csv(HERE / "looks.csv", index_col=0, keep_default_na=False).to_dict("index")
OTHER = {"color": "0.5", "marker": ".", "linestyle": "-"}
# Of variants that only begin with a known name: with a tag, matched early, or the paper's.
DASHES = ("-.", ":", (0, (3, 1, 1, 1)), "--")
WIDTHS = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9")


def width_look(width: float) -> dict[str, str]:
    """Colour and marker of a width: six powers of 2 in a row have their own."""
    place = round(math.log2(width)) % len(WIDTHS)
    return {"color": WIDTHS[place], "marker": "os^Dv*"[place]}


def looks(variants: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line style of each variant, in the order in which they are shown.

    One that only begins with a known name, as tagged variants do, looks like that one, with a line
    style of its own; any other is grey.
    """
    found, dashes = {}, itertools.cycle(DASHES)
    for variant in sorted(variants, key=rank):
        look = LOOKS.get(known := _known(variant), OTHER).copy()
        if known and variant != known:
            look["linestyle"] = next(dashes)
        found[variant] = look
    return found


def rank(variant: str) -> tuple[int, int, str]:
    """The order in which arms and variants are shown; @2 comes before @10."""
    return [*LOOKS, ""].index(_known(variant)), len(variant), variant


def _known(variant: str) -> str:
    """The longest name with a look that `variant`, but for its match epoch, begins with."""
    plain = re.sub(r" @\d+", "", variant)
    return max((name for name in ("", *LOOKS) if plain.startswith(name)), key=len)


def save(figure: Figure, table: pd.DataFrame, folder: Path, name: str) -> None:
    """Write a figure as PNG and PDF, and its data as CSV beside them."""
    for suffix in ("png", "pdf"):
        with checkpoint.atomic_write(folder / f"{name}.{suffix}") as file:
            figure.savefig(file, format=suffix)
    plt.close(figure)
    print(f"wrote {folder / name}.png")  # and the PDF beside it
    save_table(table, folder / f"{name}.csv")
