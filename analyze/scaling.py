"""How the share of the gap that permuting closes changes with width and with training length.

    python -m analyze.scaling runs/cifar10
    python -m analyze.scaling runs/100-epochs runs/200-epochs

Prints the share of the LTH-naive gap that each permuted variant closes at each width, or at each
number T of dense epochs (with the same k, or the same k / T), with its 95% interval, over the pairs
of seeds that all widths, or all T, have. `per doubling` is the slope of a least-squares line
through the shares against log2 of width or T, with its interval over pairs: of little use for a
share that rises and then falls. Runs that differ in more than width or epochs are not compared.
Writes figures/scaling_* into the first folder.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from analyze.lib import panels, style
from analyze.lib.runs import SEEDS, accuracy_by_pair, caveats, shared_networks, sparse_runs
from analyze.lib.runs import with_gains
from analyze.lib.statistics import format_interval, holm, paired_test, ratio_interval
from common import cli
from common.errors import UserError

MODEL = ["model", "dataset"]
OTHER = {"width": "T", "T": "width"}  # what is equal along a series
STARS = """*  the interval excludes 0
** so it does after Holm's correction for the {} slopes of this table"""


def permuted_gains(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `with_gains` of permuted variants that have a gap, with a column T."""
    lengths = runs.groupby("dense_epochs", dropna=False)
    pairs = [with_gains(accuracy_by_pair(group)).assign(T=T) for T, group in lengths]
    return pd.concat(pairs).query("arm == 'permuted'").dropna(subset=["gain", "gap"])


def series_keys(x: str) -> list[str]:
    """Return the columns that are equal along a series, in which `x` changes."""
    return [*MODEL, OTHER[x], "sparsity", "k", "variant"]


def scaling(pairs: pd.DataFrame, x: str) -> pd.DataFrame:
    """Return a row per series and value of `x`, "width" or "T", of all series with several values.

    Columns `share`, `low` and `high`: the share of the gap in percent, a ratio of means over pairs,
    and its 95% interval (Fieller). Those of `paired_test`, and `p_holm`: the slope of the share per
    doubling of `x`, the same for all rows of a series. A pair counts with its linearised share
    (delta method), so that one with a small gap has no large weight. `pairs` are rows of
    `permuted_gains`; a value of `x` without a gap is left out.
    """
    pairs = pairs.dropna(subset=x)
    tables = [pairs.assign(k=pairs["rewind"].map("k={:g}".format))]
    if x == "T":
        later = pairs[pairs["rewind"] > 0]
        tables.append(later.assign(k=(later["rewind"] / later["T"]).map("k={:g}T".format)))
    points, slopes = [], []
    for names, series in pd.concat(tables).groupby(series_keys(x), dropna=False):
        table = series.pivot(index=SEEDS, columns=x, values=["gain", "gap"]).dropna()
        gain, gap = table["gain"], table["gap"].loc[:, lambda gaps: gaps.mean() > 0]
        if len(gap.columns) < 2:
            continue
        names, gain = dict(zip(series_keys(x), names)), gain[gap.columns]
        independent = not shared_networks(table.reset_index()[SEEDS])
        share = gain.mean() / gap.mean()
        of_pairs = 100 * (share + (gain - share * gap) / gap.mean())
        slope = np.polyfit(np.log2(gap.columns.astype(float)), of_pairs.T, 1)[0]
        slopes.append(names | paired_test(pd.Series(slope), independent))
        for value in gap:
            low, high = ratio_interval(gain[value], gap[value]) if independent else 2 * (np.nan,)
            bounds = {"low": 100 * low, "high": 100 * high}
            points.append(names | {x: value, "share": 100 * share[value]} | bounds)
    if not points:
        return pd.DataFrame()
    slopes = pd.DataFrame(slopes)
    slopes["p_holm"] = slopes.groupby(MODEL)["p"].transform(holm)
    return pd.DataFrame(points).merge(slopes, on=series_keys(x))


def panel_name(row: pd.Series, x: str) -> str:
    """Return what the series of a panel have in common, for example "T=20, 90%, k=5"."""
    other = f"{OTHER[x]}={row[OTHER[x]]:g}, " if pd.notna(row[OTHER[x]]) else ""
    return f"{other}{100 * row['sparsity']:.8g}%, {row['k']}"


def render(table: pd.DataFrame, x: str) -> str:
    """Format the shares of one model as a line per series and a column per value of `x`."""
    lines = {}
    for row in table.to_dict("records"):
        slope = f"{row['difference']:+.1f}"
        slope += format_interval(row["difference_low"], row["difference_high"])
        slope += "*" * (int(row["p"] < 0.05) + int(row["p_holm"] < 0.05))
        slope += f" ({row['pairs']} pair{'s' * (row['pairs'] != 1)})"
        line = lines.setdefault(f"{row['panel']}, {row['variant']}", {"per doubling": slope})
        line[f"{x}={row[x]:g}"] = f"{row['share']:.0f}%" + format_interval(row["low"], row["high"])
    columns = [f"{x}={value:g}" for value in sorted(table[x].unique())]
    return pd.DataFrame.from_dict(lines, "index")[[*columns, "per doubling"]].to_string(na_rep="-")


def plot(table: pd.DataFrame, x: str, title: str) -> style.Figure:
    """Draw the shares of one model against `x` (log scale), with a band of their 95% interval."""
    names = {"share": "mean", "panel": "column", "variant": "series"}
    points = table.rename(columns=names).assign(row="share of the gap closed (%)")
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
    runs = sparse_runs(*roots, group=MODEL, ignored=["epochs"])
    tables = {x: scaling(permuted_gains(runs), x) for x in OTHER}
    if all(table.empty for table in tables.values()):
        raise UserError(
            f"no pair of seeds below {', '.join(map(str, roots))} has LTH, naive and permuted of "
            "equal settings, and a gap, at two widths or lengths"
        )
    for x, table in tables.items():
        for (model, dataset), group in table.groupby(MODEL) if len(table) else ():
            group = group.assign(panel=[panel_name(row, x) for _, row in group.iterrows()])
            title = f"{model} on {dataset}: share of the LTH-naive gap closed"
            tests = group.drop_duplicates(series_keys(x))["p"].count()
            print(f"{title}, in percent [95% interval]\n{render(group, x)}")
            print(STARS.format(tests) + "\n" if tests else "")
            figure = plot(group, x, f"{title}, 95% intervals")
            style.save_figure(figure, group, roots[0] / "figures", f"scaling_{x}_{model}_{dataset}")
    for line in caveats(runs):
        print(line)


if __name__ == "__main__":
    cli.run(main)
