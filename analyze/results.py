"""Collect all finished sparse runs below a folder into one tidy table, and print it by arm.

    python -m analyze.results runs/quick

Writes results.csv, a row a run, and table.txt: the test accuracy of each arm, mean ± sample standard deviation, and
its difference to naive, paired by seeds, mean ± standard error, with the share of the LTH-naive gap that it closes.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit  # Student's t; scipy.stats takes a second to import

from analyze import style
from common import checkpoint, cli
from common.errors import UserError

COLUMNS = (
    "arm", "signs", "fan_in", "model", "width", "dataset", "mask_dataset", "sparsity", "sparsity_total", "rewind",
    "source_seed", "target_seed", "seed", "method", "match_epoch", "test_acc", "test_loss", "test_top5", "diverged", "seconds", "path",
)  # fmt: skip
CELL = ["model", "width", "dataset", "sparsity", "rewind"]
RUN = ["arm", "signs", "fan_in", "mask_dataset", "method", "match_epoch", "source_seed", "target_seed", "seed"]
PERMUTED = ("permuted", "random-permutation")
METRICS = ("test_acc", "test_loss", "seconds", "sparsity_total")


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
            skipped(f"{path}: {type(error).__name__} {error}")
    return found


def read_runs(root: Path, stage: str, row: Callable[[dict[str, Any]], dict[str, Any]]) -> list[dict[str, Any]]:
    """`row` of every finished run of `stage` below `root`; a run that lacks what it reads is skipped with one line."""
    rows = []
    for result in find_results(root, stage):
        try:
            rows.append(row(result))
        except (KeyError, TypeError) as error:
            skipped(result["folder"], f"its result.json lacks {error}")
    return rows


def readable(read: Callable[..., Any], *arguments: Any) -> Any:
    """What `read` returns, or None, with one line, where it cannot read a file."""
    try:
        return read(*arguments)
    except UserError as error:
        skipped(error)


def skipped(*why: object) -> None:
    print("skipped", *why, file=sys.stderr)


def sparse_runs(root: Path) -> pd.DataFrame:
    """All finished sparse runs below `root`, a row a run; accuracy in percent. Raises UserError when there is none."""

    def describe(result: dict[str, Any]) -> dict[str, Any]:
        row = {key: result["arguments"].get(key) for key in COLUMNS} | {key: result[key] for key in METRICS}
        row["test_top5"] = result.get("test_top5")  # of ImageNet
        row["diverged"] = result.get("diverged")  # the epoch of that
        row |= {key: bool(row[key]) for key in ("signs", "fan_in")}
        row["mask_dataset"] = row["mask_dataset"] or row["dataset"]
        method = row["method"] if row["arm"] in PERMUTED else None
        lacking = {*CELL, "arm", "target_seed"} - {key for key in row if row[key] is not None}
        if lacking:
            raise KeyError(*sorted(lacking))
        return row | {"method": method, "path": str(result["folder"])}

    rows = read_runs(root, "train_sparse", describe)
    if not rows:
        raise UserError(f"no finished sparse run below {root}: run train_sparse.py first")
    runs = pd.DataFrame(rows, columns=COLUMNS).sort_values([*CELL, *RUN], ignore_index=True)
    twice = int(runs.duplicated([*CELL, *RUN]).sum())
    if twice:  # other hyper-parameters: their mean would be of no experiment
        raise UserError(f"{twice} runs below {root} repeat arm, cell and seeds of others: keep experiments apart")
    return runs


def dense_runs(root: Path) -> pd.DataFrame:
    """All finished dense runs below `root`: model, width, dataset, seed, test_acc in percent, folder."""
    keys = ("model", "width", "dataset", "seed")
    rows = read_runs(
        root,
        "train_dense",
        lambda run: {key: run["arguments"][key] for key in keys} | {key: run[key] for key in ("test_acc", "folder")},
    )
    return pd.DataFrame(rows, columns=[*keys, "test_acc", "folder"])


def dense_files(root: Path) -> dict[str, Path]:
    """The weights that dense runs below `root` kept, by their digest, which later stages record."""
    return {checkpoint.digest(path): path for run in dense_runs(root)["folder"] for path in run.glob("epoch_*.pt")}


def variants(runs: pd.DataFrame) -> pd.Series:
    """What each run shows, as plots and tables call it: the arm, with matching method and sign transfer where set."""

    last = pd.to_numeric(runs["match_epoch"]).groupby([runs[key] for key in CELL[:3]]).transform("max")

    def name(run: pd.Series) -> str:
        text = run["arm"]
        if run["arm"] == "permuted" and run["method"] != "activation":
            text += f" ({run['method']})"
        if (
            pd.notna(run["match_epoch"]) and run["match_epoch"] < last[run.name]
        ):  # matched earlier than others: Table 15
            text += f" @{run['match_epoch']:g}"
        if run["mask_dataset"] != run["dataset"]:
            text += f" [{run['mask_dataset']} mask]"
        return text + " + signs" * run["signs"] + " + fan-in" * run["fan_in"]

    return runs.apply(name, axis=1)


def of_one_network(runs: pd.DataFrame) -> pd.Series:
    """Whether a run has the weights and the mask of one network, as LTH has."""
    return (runs["source_seed"] == runs["target_seed"]) & (runs["mask_dataset"] == runs["dataset"])


def by_pair(runs: pd.DataFrame) -> pd.DataFrame:
    """Accuracy by cell and pair of seeds (source, target), a column a variant.

    LTH and other runs of one network stand beside every pair with that source; imp-target beside that target.
    """
    runs = runs.assign(variant=variants(runs))
    single = of_one_network(runs)
    seeds = ["source_seed", "target_seed"]
    pairs = runs.loc[~single, [*CELL, *seeds]].drop_duplicates()
    side = runs["arm"].map({"imp-target": "target_seed"}).fillna("source_seed")
    parts = [runs[~single]]
    for key in seeds:
        alone = runs[single & (side == key)]
        parts.append(alone.drop(columns=[seed for seed in seeds if seed != key]).merge(pairs, on=[*CELL, key]))
    return pd.concat(parts).pivot_table(index=[*CELL, *seeds], columns="variant", values="test_acc")


def baseline(variant: str) -> str:
    """What a variant is compared with: the naive use of masks of the same data set."""
    _, foreign, mask = variant.partition(" [")
    return "naive" + foreign + mask.partition("]")[0] + "]" * bool(foreign)


def against_naive(pairs: pd.DataFrame) -> dict[str, dict[str, float]]:
    """For every variant: its difference to naive, mean and standard error over pairs, and the share of the gap closed.

    `pairs` has a row a pair and a column a variant. The share is in percent of the LTH-naive gap, both as means over
    the pairs that have all three; it is missing where there is no gap. Masks of another data set are compared with the
    naive use of the same masks.
    """
    found = {}
    for variant in pairs.columns:
        naive = baseline(variant)
        if variant == naive or naive not in pairs or pairs[[variant, naive]].dropna().empty:
            continue
        difference = (pairs[variant] - pairs[naive]).dropna()
        row = {"difference": difference.mean(), "difference_se": difference.sem(), "pairs": len(difference)}
        row["difference_low"], row["difference_high"] = t_interval(difference)
        if "lth" in pairs:
            both = pairs[list({"lth", naive, variant})].dropna()
            gain, gap = both[variant] - both[naive], both["lth"] - both[naive]
            if gap.mean() > 0:
                row["gap_closed"] = 100 * gain.mean() / gap.mean()
                row["gap_low"], row["gap_high"] = (100 * end for end in ratio_interval(gain, gap))
        found[variant] = row
    return found


def t_interval(values: pd.Series) -> tuple[float, float]:
    """The 95% interval of the mean (Student); missing for a single value."""
    half = stdtrit(len(values) - 1, 0.975) * values.sem() if len(values) > 1 else math.nan
    return values.mean() - half, values.mean() + half


def ratio_interval(numerators: pd.Series, denominators: pd.Series) -> tuple[float, float]:
    """The 95% interval of the ratio of two paired means (Fieller 1954).

    Missing for a single pair, and where the mean denominator cannot be told from zero.
    """
    count = len(numerators)
    if count < 2:
        return math.nan, math.nan
    (aa, ab), (_, bb) = np.cov(numerators, denominators) / count
    t, mean = stdtrit(count - 1, 0.975), denominators.mean()
    g = t**2 * bb / mean**2 if mean else math.inf
    if g >= 1:
        return math.nan, math.nan
    ratio = numerators.mean() / mean
    shift = g * ab / bb if bb > 0 else 0.0
    spread = aa - 2 * ratio * ab + ratio**2 * bb - g * (aa - ab**2 / bb if bb > 0 else 0.0)
    half = t / abs(mean) * math.sqrt(max(spread, 0.0))
    return (ratio - shift - half) / (1 - g), (ratio - shift + half) / (1 - g)


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a cell and variant: mean, sample std and number of runs, and the statistics of `against_naive`."""
    accuracy = runs.assign(variant=variants(runs)).groupby([*CELL, "variant"])["test_acc"].agg(["mean", "std", "count"])
    differences = {
        (*cell, variant): row
        for cell, pairs in by_pair(runs).groupby(level=CELL)
        for variant, row in against_naive(pairs).items()
    }
    columns = [
        "difference",
        "difference_se",
        "difference_low",
        "difference_high",
        "pairs",
        "gap_closed",
        "gap_low",
        "gap_high",
    ]
    extra = pd.DataFrame.from_dict(differences, orient="index", columns=columns)
    extra.index = (
        pd.MultiIndex.from_tuples(extra.index, names=accuracy.index.names) if len(extra) else accuracy.index[:0]
    )
    return accuracy.join(extra).reset_index()


def overall(runs: pd.DataFrame) -> pd.DataFrame:
    """As `summary`, a row a (model, width, data set) and variant, of each pair's mean over the cells that have all."""
    group = CELL[:3]
    rows = []
    for key, cells in by_pair(runs).groupby(level=group):
        complete = cells.dropna(axis=1, how="all").dropna()
        pairs = complete.groupby(level=[*group, "source_seed", "target_seed"]).mean()
        differences = against_naive(pairs)
        for variant in pairs:
            mean = {"variant": variant, "mean": pairs[variant].mean(), "std": pairs[variant].std(), "count": len(pairs)}
            rows.append(dict(zip(group, key)) | mean | differences.get(variant, {}))
    return pd.DataFrame(rows)


def render(runs: pd.DataFrame) -> str:
    """The summary as aligned text: for each (model, width, data set) the accuracies, then the differences to naive."""
    lines = []
    cells, totals = summary(runs), overall(runs)
    for key, block in cells.groupby(CELL[:3]):
        model, width, dataset = key
        names = sorted(block["variant"].unique(), key=style.rank)
        rows = [
            (f"{100 * s:.4g}%", str(k), part.set_index("variant"))
            for (s, k), part in block.groupby(["sparsity", "rewind"])
        ]
        if len(rows) > 1 and len(totals):
            same = totals[(totals[CELL[:3]] == list(key)).all(axis=1)]
            rows += [("all", "all", same.set_index("variant"))] if len(same) else []
        lines += [f"{model} x{width:g} on {dataset}", "", "test accuracy in percent, mean ± sample standard deviation"]
        lines += _grid(names, rows, lambda row: _mean(row["mean"], row["std"]))
        others = [name for name in names if name != baseline(name)]
        lines += ["", "minus naive, mean ± standard error over pairs of seeds, and share of the LTH-naive gap closed"]
        lines += _grid(others, rows, _difference)
        lines += ["* the 95% interval (Student, paired by seeds) excludes 0; the intervals are in summary.csv"]
        lines += diverged_lines(runs[(runs[CELL[:3]] == list(key)).all(axis=1)])
        if block["count"].max() == 1:
            lines += ["one seed only: there is no spread to tell an effect from chance"]
        lines += [""]
    return "\n".join(lines)


def diverged_lines(runs: pd.DataFrame) -> list[str]:
    """Names the runs that diverged, which count with the accuracy that they had then."""
    lost = runs[runs["diverged"].notna()]
    names = [f"{run.path} in epoch {run.diverged:.0f}" for run in lost.itertuples()]
    return [f"{len(lost)} of {len(runs)} runs diverged, and count as they ended: {', '.join(names)}"] if names else []


def _grid(names: list[str], rows: list[tuple[str, str, pd.DataFrame]], show: Callable[[pd.Series], str]) -> list[str]:
    """A column a variant and a line a cell; the other way round where there are many variants."""
    cells = [[show(table.loc[name]) if name in table.index else "-" for name in names] for _, _, table in rows]
    labels = [style.label(name) for name in names]
    if len(names) <= 4:
        lines = [["sparsity", "k", *labels], *([*row[:2], *cell] for row, cell in zip(rows, cells))]
    else:
        heads = [sparsity if sparsity == "all" else f"{sparsity}, k={rewind}" for sparsity, rewind, _ in rows]
        lines = [["", *heads], *([label, *column] for label, column in zip(labels, zip(*cells)))]
    widths = [max(map(len, column)) for column in zip(*lines)]
    left = len(names) > 4
    return [
        "  ".join(
            f"{entry:<{width}}" if left and not n else f"{entry:>{width}}"
            for n, (entry, width) in enumerate(zip(line, widths))
        )
        for line in lines
    ]


def _mean(mean: float, spread: float, form: str = ".2f") -> str:
    """A mean with its spread; a single run has none."""
    if pd.isna(mean):
        return "-"
    return f"{mean:{form}}" if pd.isna(spread) else f"{mean:{form}} ± {spread:.2f}"


def _difference(row: pd.Series) -> str:
    closed = row.get("gap_closed", float("nan"))
    share = "" if pd.isna(closed) else f" ({closed:.0f}%)"
    sure = row.get("difference_low", math.nan) > 0 or row.get("difference_high", math.nan) < 0
    text = _mean(row.get("difference", float("nan")), row.get("difference_se", float("nan")), "+.2f")
    return text + "*" * bool(sure) + share


def parse_root(doc: str) -> argparse.ArgumentParser:
    parser = cli.Parser(doc)
    parser.add_argument("root", type=Path, help="folder of runs")
    return parser


def main() -> None:
    root = parse_root(__doc__).parse_args().root
    runs = sparse_runs(root)
    counts = {key: pd.to_numeric(runs[key]).astype("Int64") for key in ("match_epoch", "diverged")}  # which not all have
    whole = runs.assign(**counts)
    checkpoint.save_text(whole.to_csv(index=False), root / "results.csv")
    checkpoint.save_text(summary(runs).to_csv(index=False), root / "summary.csv")
    text = render(runs)
    checkpoint.save_text(text + "\n", root / "table.txt")
    print(text)
    print(f"wrote {root / 'results.csv'} ({len(runs)} runs) summary.csv and table.txt")


if __name__ == "__main__":
    cli.run(main)
