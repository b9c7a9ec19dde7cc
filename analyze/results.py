"""Collect all finished sparse runs below a folder into one tidy table, and print it by arm.

    python -m analyze.results runs/quick

Writes results.csv, a row a run, and table.txt: the test accuracy of each arm, mean ± sample
standard deviation, and its difference to naive, paired by seeds, mean ± standard error, with the
share of the LTH-naive gap that it closes. summary.csv has the 95% intervals.
"""

from collections.abc import Callable

import pandas as pd

from analyze.lib import style
from analyze.lib.runs import NETWORK, baselines, parse_root, remarks, sparse_runs
from analyze.lib.statistics import overall, summary
from common import checkpoint, cli

DIFFERENCE = (
    "minus naive, mean ± standard error over pairs of seeds, and share of the LTH-naive gap closed"
)
INTERVAL = "* the 95% interval (Student, paired by seeds) excludes 0; all are in summary.csv"


def render(runs: pd.DataFrame) -> str:
    """The summary as aligned text, for each network the accuracies and the differences to naive."""
    cells, compared, lines = summary(runs), baselines(runs), []
    cells["cell"] = [f"{100 * s:.4g}%, k={k}" for s, k in zip(cells["sparsity"], cells["rewind"])]
    totals = overall(runs).assign(cell="all").set_index(NETWORK)
    for network, block in cells.groupby(NETWORK):
        model, width, dataset = network
        one_seed = block["count"].max() == 1
        if block["cell"].nunique() > 1 and network in totals.index:
            block = pd.concat([block, totals.loc[[network]]])
        lines += [f"{model} x{width:g} on {dataset}", ""]
        lines += ["test accuracy in percent, mean ± sample standard deviation"]
        lines += [_grid(block, lambda row: _mean(row["mean"], row["std"]))]
        others = block[[name != compared[name][0][0] for name in block["variant"]]]
        if others["difference"].notna().any():
            lines += ["", DIFFERENCE, _grid(others, _difference), INTERVAL]
            used = others[["variant", "baseline"]].dropna().itertuples(index=False)
            untagged = {style.label(name) for name, naive in used if naive != compared[name][0][0]}
            if untagged:
                names = ", ".join(sorted(untagged))
                lines += [
                    f"compared with naive without a tag, for want of one with theirs: {names}"
                ]
        lines += remarks(runs[(runs[NETWORK] == list(network)).all(axis=1)])
        if one_seed:
            lines += ["one seed only: there is no spread to tell an effect from chance"]
        lines += [""]
    return "\n".join(lines)


def _grid(table: pd.DataFrame, show: Callable[[pd.Series], str]) -> str:
    """A column a variant and a line a cell; the other way round where there are many variants."""
    shown = table.assign(text=[show(row) for _, row in table.iterrows()])
    names = sorted(table["variant"].unique(), key=style.rank)
    grid = shown.pivot(index="cell", columns="variant", values="text").fillna("-")
    grid = grid.loc[table["cell"].unique(), names].rename(columns=style.label)
    grid = grid.rename_axis(index=None, columns=None)
    return (grid if len(names) <= 4 else grid.T).to_string()


def _mean(mean: float, spread: float, form: str = ".2f") -> str:
    """A mean with its spread; a single run has none."""
    if pd.isna(mean):
        return "-"
    return f"{mean:{form}}" if pd.isna(spread) else f"{mean:{form}} ± {spread:.2f}"


def _difference(row: pd.Series) -> str:
    text = _mean(row["difference"], row["difference_se"], "+.2f")
    text += "*" * (row["difference_low"] > 0 or row["difference_high"] < 0)
    return text if pd.isna(row["gap_closed"]) else text + f" ({row['gap_closed']:.0f}%)"


def main() -> None:
    root = parse_root(__doc__).parse_args().root
    runs = sparse_runs(root)
    # Whole numbers, though not all runs have them.
    counts = {key: pd.to_numeric(runs[key]).astype("Int64") for key in ("match_epoch", "diverged")}
    text = render(runs)
    checkpoint.save_text(runs.assign(**counts).to_csv(index=False), root / "results.csv")
    checkpoint.save_text(summary(runs).to_csv(index=False), root / "summary.csv")
    checkpoint.save_text(text + "\n", root / "table.txt")
    print(text)
    print(f"wrote {root / 'results.csv'} ({len(runs)} runs) summary.csv and table.txt")


if __name__ == "__main__":
    cli.run(main)
