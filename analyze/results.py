"""Collect all finished sparse runs below a folder into one tidy table, and print it by arm.

    python -m analyze.results runs/quick

Writes results.csv, a row a run, and table.txt: the test accuracy of each arm, mean ± sample
standard deviation, and its difference to naive of the same tag, paired by seeds, with its 95%
interval, the share of the LTH-naive gap that it closes, and the smallest difference that so many
pairs could show.
summary.csv has all of these as numbers, figures/gains_* are the differences with their intervals.
`--against "permuted (masked)"` prints the differences to another variant than naive, and writes
nothing.
"""

import math
import textwrap
from collections.abc import Callable
from typing import Any

import pandas as pd

from analyze.lib import style
from analyze.lib.runs import COLUMNS, NETWORK, parse_root, remarks, save, sparse_runs
from analyze.lib.statistics import findings, interval, plus_minus, summary
from common import checkpoint, cli
from common.errors import UserError
from common.provenance import ROOT, code_digest

DIFFERENCE = "minus naive, in points (share of the LTH-naive gap closed)"
TESTED = """minus naive, in points [95% interval, Student, paired by seeds] (share of the LTH-naive
gap closed; the smallest difference that so many pairs show with a probability of 80%)"""
AGAINST = """minus {}, in points [95% interval, Student, paired by seeds] (the smallest difference
that so many pairs show with a probability of 80%)"""
ACROSS = 5  # panels of a figure beside each other
STARS = """*  the interval excludes 0
** so it does after Holm's correction for the {} differences of this table"""


def render(runs: pd.DataFrame, against: str | None = None) -> str:
    """The summary as aligned text: each network's accuracies, and differences to naive.

    `against` is a variant in place of naive, and of its gap to LTH nothing is said then.
    """
    table, lines = summary(runs, against), []
    for network, block in table.groupby(NETWORK):
        model, width, dataset = network
        lines += [f"{model} x{width:g} on {dataset}", ""]
        lines += ["test accuracy in percent, mean ± sample standard deviation"]
        lines += [_grid(block, lambda row: plus_minus(row.mean, row.std))]
        differences = block[block["difference"].notna()]
        if len(differences):
            tests = differences["p"].count()
            heading = TESTED if tests else DIFFERENCE
            if against:
                heading = AGAINST.format(against)
            lines += ["", heading, _grid(differences, _difference)]
            lines += [STARS.format(tests)] if tests else []
        lines += remarks(runs[(runs[NETWORK] == list(network)).all(axis=1)])
        if block["count"].max() == 1:
            lines += ["one pair only: there is no spread to tell an effect from chance"]
        lines += [""]
    told = [] if against else findings(table)
    return "\n".join([*lines, *(textwrap.fill(text, 100) for text in told)])


def _grid(table: pd.DataFrame, show: Callable[[Any], str]) -> str:
    """A column a variant and a line a cell; the other way round where there are many variants."""
    names = sorted(table["variant"].unique(), key=style.rank)
    shown = table.assign(text=list(map(show, table.itertuples())))
    grid = shown.pivot(index="cell", columns="variant", values="text").fillna("-")
    grid = grid.loc[table["cell"].unique(), names]
    grid = grid.rename_axis(index=None, columns=None)
    return (grid if len(names) <= 4 else grid.T).to_string()


def _difference(row: Any) -> str:
    text = f"{row.difference:+.2f}" + interval(row.difference_low, row.difference_high)
    text += "*" * (int(row.p < 0.05) + int(row.p_holm < 0.05))
    notes = []
    if pd.notna(row.gap_closed):
        notes.append(f"{row.gap_closed:.0f}%")
    if pd.notna(row.detectable):
        notes.append(f"{row.detectable:.1f}")
    return f"{text} ({'; '.join(notes)})" if notes else text


def plot(rows: pd.DataFrame, title: str) -> style.Figure:
    """Each variant's difference to naive with its 95% interval: a panel a cell."""
    cells, looks = rows["cell"].unique(), style.looks(rows["variant"].unique())
    across = min(len(cells), ACROSS)
    down = math.ceil(len(cells) / across)
    size = (1.6 + 2.4 * across, 0.4 + down * (0.7 + 0.24 * len(looks)))
    figure, axes = style.plt.subplots(
        down, across, figsize=size, squeeze=False, sharex=True, sharey=True
    )
    for axis in axes.flat[len(cells) :]:
        axis.remove()
    for axis, cell in zip(axes.flat, cells):
        axis.tick_params(labelbottom=True)  # the last row may be short
        axis.axvline(0, color="0.6", linewidth=0.8)
        for row in rows[rows["cell"] == cell].itertuples():
            place, look = [*looks].index(row.variant), looks[row.variant]
            half = row.difference_high - row.difference  # no bar where there is none
            dot = look | {"linestyle": "", "capsize": 2}
            axis.errorbar(row.difference, place, xerr=half, **dot)
        axis.set(title=cell, xlabel="minus naive (points)")
        axis.set_yticks(range(len(looks)), [*looks])
        axis.set_ylim(len(looks) - 0.5, -0.5)
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    parser = parse_root(__doc__)
    parser.add_argument(
        "--against", metavar="VARIANT", help="print differences to it, not to naive"
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
    # Whole numbers, though not all runs have them.
    counts = dict.fromkeys(("match_epoch", "diverged", "dense_epochs"), "Int64")
    text = render(runs)
    checkpoint.save_text(text + "\n", root / "table.txt")
    print(f"{text}\nwrote {root / 'table.txt'}")
    for what, key, script in (
        ("runs", "code", "train_sparse.py"),
        ("runs' masks", "mask_code", "prune_imp.py"),
    ):
        old = ~runs[key].dropna().str.endswith(code_digest(ROOT / script))
        if old.any():
            print(f"{old.sum()} {what} are by other code than {script} and common/ are now")
    save(runs[COLUMNS].astype(counts), root / "results.csv")
    save(table := summary(runs), root / "summary.csv")
    differences = table[table["difference"].notna() & table["sparsity"].notna()]
    for (model, width, dataset), rows in differences.groupby(NETWORK):
        about = f"{model} x{width:g} on {dataset}"
        figure = plot(rows, f"{about}, test accuracy, 95% intervals")
        style.save(figure, rows, root / "figures", f"gains_{model}x{width:g}_{dataset}")


if __name__ == "__main__":
    cli.run(main)
