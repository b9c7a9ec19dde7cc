"""Collect all finished sparse runs below a folder into one tidy table, and print it by arm.

    python -m analyze.results runs/quick

Writes results.csv, a row a run, and prints mean ± sample standard deviation of the test accuracy by arm, the
paired difference permuted - naive with its standard error, and the share of the LTH-naive gap that it closes.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from common import checkpoint, cli
from common.errors import UserError

COLUMNS = (
    "arm", "signs", "model", "width", "dataset", "sparsity", "sparsity_total", "rewind", "source_seed", "target_seed", "seed",
    "method", "match_epoch", "test_acc", "test_loss", "seconds", "path",
)  # fmt: skip
RUN = ["arm", "signs", "method", "match_epoch", "source_seed", "target_seed", "seed"]
CELL = ["model", "width", "dataset", "sparsity", "rewind"]


def find_results(root: Path, stage: str) -> list[dict[str, Any]]:
    """Read the result.json of every finished run of `stage` below `root`, in path order, each with its `folder`.

    A file that cannot be read is skipped with one line. Raises UserError when `root` is no folder.
    """
    if not root.is_dir():
        raise UserError(f"no such folder: {root}")
    found = []
    for path in sorted(root.rglob("result.json")):
        try:
            result = json.loads(path.read_text())
            if result["stage"] == stage:
                found.append(result | {"folder": path.parent})
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"skipped {path}: {type(error).__name__} {error}", file=sys.stderr)
    return found


def sparse_runs(root: Path) -> pd.DataFrame:
    """All finished sparse runs below `root`, a row a run; accuracy in percent. Raises UserError when there is none."""
    rows = []
    for result in find_results(root, "train_sparse"):
        row = {key: result["arguments"].get(key) for key in COLUMNS} | {
            key: result[key] for key in ("test_acc", "test_loss", "seconds", "sparsity_total")
        }
        unpermuted = row["arm"] in ("lth", "naive")
        rows.append(
            row
            | {
                "signs": bool(row["signs"]),
                "method": None if unpermuted else row["method"],
                "path": str(result["folder"]),
            }
        )
    if not rows:
        raise UserError(f"no finished sparse run below {root}: run train_sparse.py first")
    runs = pd.DataFrame(rows, columns=COLUMNS).sort_values([*CELL, *RUN], ignore_index=True)
    twice = int(runs.duplicated([*CELL, *RUN]).sum())
    if twice:  # other hyper-parameters: their mean would be of no experiment
        raise UserError(
            f"{twice} runs below {root} repeat arm, cell and seeds of others: keep experiments in folders of their own"
        )
    return runs


def dense_runs(root: Path) -> pd.DataFrame:
    """All finished dense runs below `root`: model, width, dataset, seed, test_acc in percent, folder."""
    keys = ("model", "width", "dataset", "seed")
    rows = [
        {key: run["arguments"][key] for key in keys} | {key: run[key] for key in ("test_acc", "folder")}
        for run in find_results(root, "train_dense")
    ]
    return pd.DataFrame(rows, columns=[*keys, "test_acc", "folder"])


def by_pair(runs: pd.DataFrame) -> pd.DataFrame:
    """Accuracy by cell and pair, a column an arm; a pair is told by its source, which lth shares with the others."""
    return runs.pivot_table(index=[*CELL, "source_seed"], columns="arm", values="test_acc")


def summarise(pairs: pd.DataFrame) -> dict[str, Any]:
    """Mean and sample std of each arm, permuted - naive with its standard error, and the share of the gap closed.

    `pairs` has a row a pair and a column an arm. The share is that of the means, over the pairs that have all arms.
    """
    row: dict[str, Any] = {}
    for arm in ("lth", "naive", "permuted"):
        if arm in pairs:
            values = pairs[arm].dropna()
            row |= {arm: values.mean(), f"{arm}_std": values.std(), f"{arm}_n": len(values)}
    if {"naive", "permuted"} <= set(pairs):
        difference = (pairs["permuted"] - pairs["naive"]).dropna()
        row |= {"difference": difference.mean(), "difference_se": difference.sem(), "pairs": len(difference)}
        if "lth" in pairs:
            means = pairs[["lth", "naive", "permuted"]].dropna().mean()
            gap = means["lth"] - means["naive"]
            row["gap_closed"] = 100 * (means["permuted"] - means["naive"]) / gap if gap > 0 else float("nan")
    return row


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a cell (model, width, data set, sparsity, rewind epoch), with the statistics of `summarise`."""
    return pd.DataFrame([dict(zip(CELL, cell)) | summarise(pairs) for cell, pairs in by_pair(runs).groupby(level=CELL)])


def overall(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a (model, width, data set): the same statistics of each pair's mean over its cells."""
    group = CELL[:3]
    means = by_pair(runs).dropna().groupby(level=[*group, "source_seed"]).mean()  # only cells that have every arm
    return pd.DataFrame([dict(zip(group, key)) | summarise(pairs) for key, pairs in means.groupby(level=group)])


def render(runs: pd.DataFrame) -> str:
    """The table as aligned text, a block a (model, width, data set)."""
    lines = []
    cells, totals = table(runs), overall(runs)
    for (model, width, dataset), block in cells.groupby(CELL[:3]):
        lines += [f"{model} x{width:g} on {dataset}, test accuracy in percent, mean ± std over pairs", HEADER]
        lines += [_line(f"{100 * row['sparsity']:.4g}%", f"{row['rewind']:d}", row) for row in block.to_dict("records")]
        same = totals[(totals[CELL[:3]] == [model, width, dataset]).all(axis=1)] if len(totals) else totals
        lines += [_line("all", "all", row) for row in same.to_dict("records")] if len(block) > 1 else []
        lines += [""]
    lines += ["permuted-naive: mean ± standard error over pairs; gap closed: (permuted - naive) / (LTH - naive)"]
    return "\n".join(lines)


HEADER = f"{'sparsity':>8} {'k':>4} {'LTH':>14} {'naive':>14} {'permuted':>14} {'permuted-naive':>16} {'pairs':>5} {'gap closed':>10}"


def _line(sparsity: str, rewind: str, row: dict[str, Any]) -> str:
    arms = [_mean(row.get(arm), row.get(f"{arm}_std")) for arm in ("lth", "naive", "permuted")]
    difference = _mean(row.get("difference"), row.get("difference_se"), "+.2f")
    closed = row.get("gap_closed", float("nan"))
    closed = "" if pd.isna(closed) else f"{closed:.0f}%"
    pairs = row.get("pairs", float("nan"))
    return f"{sparsity:>8} {rewind:>4} {arms[0]:>14} {arms[1]:>14} {arms[2]:>14} {difference:>16} {'' if pd.isna(pairs) else int(pairs):>5} {closed:>10}"


def _mean(mean: float | None, spread: float | None, style: str = ".2f") -> str:
    """A mean with its spread; one run has none."""
    if mean is None or pd.isna(mean):
        return "-"
    return f"{mean:{style}}" if spread is None or pd.isna(spread) else f"{mean:{style}} ± {spread:.2f}"


def parse_root(doc: str) -> argparse.ArgumentParser:
    parser = cli.Parser(doc)
    parser.add_argument("root", type=Path, help="folder of runs")
    return parser


def main() -> None:
    root = parse_root(__doc__).parse_args().root
    runs = sparse_runs(root)
    checkpoint.save_text(runs.to_csv(index=False), root / "results.csv")
    text = render(runs)
    checkpoint.save_text(text + "\n", root / "table.txt")
    print(text)
    print(f"wrote {root / 'results.csv'} ({len(runs)} runs) and {root / 'table.txt'}")


if __name__ == "__main__":
    cli.run(main)
