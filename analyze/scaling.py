"""How the share of the gap that permuting closes changes with width and with training length.

    python -m analyze.scaling runs/cifar10
    python -m analyze.scaling runs/100-epochs runs/200-epochs

Prints the share of the LTH-naive gap that each permuted variant closes at each width, or at each
number T of dense epochs (of runs in several folders, with the same k or the same k / T), with its
95% interval. `per doubling` is the slope of a line through the shares of a pair of seeds: its mean
over the pairs that have a gap at all widths, or all T, and its interval. Writes figures/scaling_*
into the first folder.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from analyze.lib import panels, style
from analyze.lib.runs import (
    CELL,
    RUN,
    SEEDS,
    accuracy_by_pair,
    caveats,
    check_unique,
    shared_networks,
    sparse_runs,
    with_gains,
)
from analyze.lib.statistics import format_interval, gain_statistics, holm, paired_test
from common import cli
from common.errors import UserError

MODEL = ["model", "dataset"]
OTHER = {"width": "T", "T": "width"}  # what stays the same along a series
SHARE = ["gap_closed", "gap_low", "gap_high"]
STARS = """*  the interval excludes 0
** so it does after Holm's correction for the {} slopes of this table"""


def permuted_shares(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `with_gains` of permuted variants, with columns T and share, in percent.

    The share is NaN for a pair without a gap.
    """
    pairs = with_gains(accuracy_by_pair(runs))
    share = (100 * pairs["gain"] / pairs["gap"]).where(pairs["gap"] > 0)
    lengths = runs["dense_epochs"].unique()
    length = lengths[0] if len(lengths) == 1 else math.nan
    return pairs.assign(share=share, T=length)[pairs["arm"] == "permuted"]


def series_keys(x: str) -> list[str]:
    """Return the columns that are equal along a series, in which `x` changes."""
    return [*MODEL, OTHER[x], "sparsity", "k", "variant"]


def scaling(pairs: pd.DataFrame, x: str) -> pd.DataFrame:
    """Return a row per series and value of `x`, "width" or "T", of all series with several values.

    Columns gap_closed, gap_low and gap_high are those of `gain_statistics`; those of `paired_test`,
    and p_holm, are of the slope of the share per doubling of `x`, the same for all rows of a
    series. `pairs` are rows of `permuted_shares`.
    """
    keys, tables = series_keys(x), [pairs.assign(k=pairs["rewind"].map("k={:g}".format))]
    if x == "T":
        later = pairs[pairs["rewind"] > 0]
        tables.append(later.assign(k=(later["rewind"] / later["T"]).map("k={:g}T".format)))
    points, slopes = [], []
    for names, series in pd.concat(tables).groupby(keys, dropna=False):
        shares = series.pivot(index=SEEDS, columns=x, values="share")
        if len(shares.columns) < 2:
            continue
        shares, names = shares.dropna(), dict(zip(keys, names))
        slope = np.polyfit(np.log2(shares.columns.astype(float)), shares.T, 1)[0]
        independent = not shared_networks(shares.reset_index())
        slopes.append(names | paired_test(pd.Series(slope), independent))
        for value, group in series.groupby(x):
            share = pd.Series(gain_statistics(group)).reindex(SHARE)
            points.append(names | {x: value, **share, "count": len(group)})
    if not points:
        return pd.DataFrame()
    slopes = pd.DataFrame(slopes)
    slopes["p_holm"] = slopes.groupby(MODEL)["p"].transform(holm)
    return pd.DataFrame(points).merge(slopes, on=keys)


def render(table: pd.DataFrame, x: str) -> str:
    """Format the shares of one model as a line per series and a column per value of `x`."""
    lines = {}
    for row in table.sort_values(x, kind="stable").to_dict("records"):
        other = f"{OTHER[x]} {row[OTHER[x]]:g}, " if pd.notna(row[OTHER[x]]) else ""
        name = f"{other}{100 * row['sparsity']:.8g}%, {row['k']}, {row['variant']}"
        share = f"{row['gap_closed']:.0f}%" + format_interval(row["gap_low"], row["gap_high"])
        slope = f"{row['difference']:+.1f}"
        slope += format_interval(row["difference_low"], row["difference_high"])
        slope += "*" * (int(row["p"] < 0.05) + int(row["p_holm"] < 0.05))
        slope += f" ({row['pairs']} pair{'s' * (row['pairs'] != 1)})"
        line = lines.setdefault(name, {"per doubling": slope if row["pairs"] else "-"})
        line[f"{x} {row[x]:g}"] = share if pd.notna(row["gap_closed"]) else "-"
    grid = pd.DataFrame.from_dict(lines, "index").fillna("-")
    columns = [f"{x} {value:g}" for value in sorted(table[x].unique())]
    return grid[[*columns, "per doubling"]].to_string()


def plot(table: pd.DataFrame, x: str, title: str) -> style.Figure:
    """Draw the shares of one model against `x` (log scale), with a band of their 95% interval."""
    names = {"gap_closed": "mean", "gap_low": "low", "gap_high": "high", "variant": "series"}
    other = table[OTHER[x]].map(f"{OTHER[x]} {{:g}}, ".format, "ignore").fillna("")
    column = other + (100 * table["sparsity"]).map("{:.8g}%, ".format) + table["k"]
    points = table.rename(columns=names).assign(row="share of the gap closed (%)", column=column)
    styles = style.variant_styles(table["variant"].unique())
    figure = panels.draw(points, x, styles, title, "sparsity")
    ticks = sorted(table[x].unique())
    for axis in figure.axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{value:g}" for value in ticks])
    return figure


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("roots", type=Path, nargs="+", metavar="root", help="folder of runs")
    roots = parser.parse_args().roots
    runs = [*map(sparse_runs, roots)]
    check_unique(pd.concat(runs), [*CELL, *RUN, "dense_epochs"])
    pairs = pd.concat(map(permuted_shares, runs))
    tables = {x: scaling(pairs, x) for x in OTHER}
    if all(table.empty for table in tables.values()):
        raise UserError(
            f"no permuted variant at two widths or lengths below {', '.join(map(str, roots))}: "
            "train at several widths, or give the folders of several lengths"
        )
    for x, table in tables.items():
        for (model, dataset), group in table.groupby(MODEL) if len(table) else ():
            title = f"{model} on {dataset}: share of the LTH-naive gap closed"
            tests = group.drop_duplicates(series_keys(x))["p"].count()
            print(f"{title}, in percent [95% interval]\n{render(group, x)}")
            print(STARS.format(tests) + "\n" if tests else "")
            figure = plot(group, x, f"{title}, 95% intervals")
            style.save_figure(figure, group, roots[0] / "figures", f"scaling_{x}_{model}_{dataset}")
    for line in dict.fromkeys(line for root in runs for line in caveats(root)):
        print(line)


if __name__ == "__main__":
    cli.run(main)
