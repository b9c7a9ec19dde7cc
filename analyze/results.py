"""Collect all finished sparse runs below a folder into one tidy table, and print it by arm.

    python -m analyze.results runs/quick

Writes results.csv, a row per run, and table.txt: the test accuracy of each arm, mean ± sample
standard deviation, and its difference to naive of the same tag, paired by seeds, with the 95%
interval, the share of the LTH-naive gap that it closes, and the smallest difference that this many
pairs can detect. summary.csv has all of these as numbers, figures/gains_* show the differences with
their intervals. `--against "permuted (masked)"` prints the differences to that variant instead of
naive, and writes nothing.
"""

import math
import textwrap
from collections.abc import Callable
from typing import Any

import pandas as pd

from analyze.lib import style
from analyze.lib.runs import COLUMNS, NETWORK, caveats, root_parser, save_table, sparse_runs
from analyze.lib.statistics import findings, format_interval, format_mean, summary
from common import checkpoint, cli
from common.errors import UserError
from common.provenance import ROOT, code_digest

DIFFERENCE = "minus naive, in points (share of the LTH-naive gap closed)"
TESTED = """minus naive, in points [95% interval, Student, paired by seeds] (share of the LTH-naive
gap closed; the smallest difference that so many pairs show with a probability of 80%)"""
AGAINST = """minus {}, in points [95% interval, Student, paired by seeds] (the smallest difference
that so many pairs show with a probability of 80%)"""
MAX_COLUMNS = 5  # panels in a row of a figure
STARS = """*  the interval excludes 0
** so it does after Holm's correction for the {} differences of this table"""


def render(runs: pd.DataFrame, against: str | None = None) -> str:
    """Format the summary as aligned text: accuracies and differences to naive of each network.

    With `against`, differences are to that variant instead, and the gap to LTH is left out.
    """
    table, lines = summary(runs, against), []
    for network, rows in table.groupby(NETWORK):
        of_network = runs[(runs[NETWORK] == list(network)).all(axis=1)]
        model, width, dataset = network
        lines += [f"{model} x{width:g} on {dataset}", ""]
        lines += ["test accuracy in percent, mean ± sample standard deviation"]
        lines += [_grid(rows, lambda row: format_mean(row.mean, row.std))]
        differences = rows[rows["difference"].notna()]
        if len(differences):
            tests = differences["p"].count()
            heading = TESTED if tests else DIFFERENCE
            if of_network["tag"].nunique() > 1:
                heading = heading.replace("naive", "naive of the same tag", 1)
            if against:
                heading = AGAINST.format(against)
            lines += ["", heading, _grid(differences, _difference)]
            lines += [STARS.format(tests)] if tests else []
            if differences["pairs"].nunique() > 1:
                fewest, most = differences["pairs"].min(), differences["pairs"].max()
                lines += [f"these are over {fewest} to {most} pairs of networks (see summary.csv)"]
        lines += caveats(of_network)
        if rows["count"].max() == 1:
            lines += ["one pair only: there is no spread to tell an effect from chance"]
        lines += [""]
    sentences = [] if against else findings(table)
    return "\n".join([*lines, *(textwrap.fill(text, 100) for text in sentences)])


def _grid(table: pd.DataFrame, format_row: Callable[[Any], str]) -> str:
    """Format a grid with a column per variant and a line per cell, transposed for many variants."""
    names = sorted(table["variant"].unique(), key=style.sort_key)
    texts = table.assign(text=list(map(format_row, table.itertuples())))
    grid = texts.pivot(index="cell", columns="variant", values="text").fillna("-")
    grid = grid.loc[table["cell"].unique(), names]
    grid = grid.rename_axis(index=None, columns=None)
    return (grid if len(names) <= 4 else grid.T).to_string()


def _difference(row: Any) -> str:
    text = f"{row.difference:+.2f}" + format_interval(row.difference_low, row.difference_high)
    text += "*" * (int(row.p < 0.05) + int(row.p_holm < 0.05))
    notes = []
    if pd.notna(row.gap_closed):
        notes.append(f"{row.gap_closed:.0f}%")
    if pd.notna(row.detectable):
        notes.append(f"{row.detectable:.1f}")
    return f"{text} ({'; '.join(notes)})" if notes else text


def plot(rows: pd.DataFrame, title: str) -> style.Figure:
    """Draw each variant's difference to naive with its 95% interval, a panel per cell."""
    cells, styles = rows["cell"].unique(), style.variant_styles(rows["variant"].unique())
    ncols = min(len(cells), MAX_COLUMNS)
    nrows = math.ceil(len(cells) / ncols)
    size = (1.6 + 2.4 * ncols, 0.4 + nrows * (0.7 + 0.24 * len(styles)))
    figure, axes = style.plt.subplots(
        nrows, ncols, figsize=size, squeeze=False, sharex=True, sharey=True
    )
    for axis in axes.flat[len(cells) :]:
        axis.remove()
    for axis, cell in zip(axes.flat, cells):
        axis.tick_params(labelbottom=True)  # the last row may be short
        axis.axvline(0, color="0.6", linewidth=0.8)
        for row in rows[rows["cell"] == cell].itertuples():
            y = [*styles].index(row.variant)
            error = row.difference_high - row.difference  # NaN draws no bar
            marker = styles[row.variant] | {"linestyle": "", "capsize": 2}
            axis.errorbar(row.difference, y, xerr=error, **marker)
        axis.set(title=cell, xlabel="minus naive (points)")
        axis.set_yticks(range(len(styles)), [*styles])
        axis.set_ylim(len(styles) - 0.5, -0.5)
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    parser = root_parser(__doc__)
    parser.add_argument(
        "--against", metavar="VARIANT", help="print differences to this variant instead of naive"
    )
    args = parser.parse_args()
    root, runs = args.root, sparse_runs(args.root)
    if args.against:
        names = runs["variant"].unique()
        if args.against not in names:
            raise UserError(
                f"no variant {args.against} below {root}: give one of {', '.join(names)}"
            )
        print(render(runs, args.against))
        return
    # Integers, though not all runs have them.
    integers = dict.fromkeys(("match_epoch", "diverged", "dense_epochs"), "Int64")
    text = render(runs)
    checkpoint.save_text(text + "\n", root / "table.txt")
    print(f"{text}\nwrote {root / 'table.txt'}")
    for subject, key, scripts in (
        ("runs", "code", ["train_sparse.py"]),
        ("runs' masks", "mask_code", ["prune_imp.py", "analyze/other_masks.py"]),
    ):
        current = tuple(code_digest(ROOT / script) for script in scripts)
        old = ~runs[key].dropna().str.endswith(current)
        if old.any():
            print(f"{old.sum()} {subject} are by other code than {scripts[0]} and common/ are now")
    save_table(runs[COLUMNS].astype(integers), root / "results.csv")
    save_table(table := summary(runs), root / "summary.csv")
    differences = table[table["difference"].notna() & table["sparsity"].notna()]
    for (model, width, dataset), rows in differences.groupby(NETWORK):
        figure = plot(rows, f"{model} x{width:g} on {dataset}, test accuracy, 95% intervals")
        style.save_figure(figure, rows, root / "figures", f"gains_{model}x{width:g}_{dataset}")


if __name__ == "__main__":
    cli.run(main)
