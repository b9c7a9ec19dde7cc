"""The paper's numbers (paper_numbers.csv, by our names), and its tables beside our results."""

from pathlib import Path

import pandas as pd

from analyze.lib.runs import CELL, NETWORK, find_results, sparse_runs
from analyze.lib.statistics import format_mean
from common import checkpoint
from common.cli import PAPER, paper_value
from common.errors import UserError

TABLES = (1, *range(5, 17))
KEYS = [*CELL, "variant", "metric"]
METRICS = {
    "test_acc": "test accuracy (%)",
    "test_top5": "top-5 accuracy (%)",
    "mean_acc": "test accuracy (%)",
    "ensemble_acc": "of the ensemble (%)",
    "disagreement": "disagreement",
    "kl": "KL (nats)",
    "js": "JS (nats)",
}
ENSEMBLE_METRICS = [*METRICS][2:]  # of Table 1


def read_tables(pattern: str) -> pd.DataFrame:
    """Read the rows whose table matches a regular expression; sparsity is a fraction."""
    table = pd.read_csv(Path(__file__).with_suffix(".csv"), dtype={"table": str, "width": float})
    return table[table["table"].str.fullmatch(pattern)]


def accuracies(metric: str = "test_acc") -> pd.DataFrame:
    """Return mean and std by cell and variant, in percent, from Tables 5 to 14 and 16.

    The dense levels of the figures are included; they have no rewind epoch. Table 16 has masks of
    CIFAR-10. Metric `test_top5` is the top-5 accuracy.
    """
    table = read_tables(r"[5-9]|1[0-46]|figure-dense-line")
    return table.loc[table["metric"] == metric, [*CELL, "variant", "mean", "std"]]


def lines() -> pd.DataFrame:
    """Return Figure 3: test loss in nats by network and alpha, from π(A) to B with REPAIR."""
    table = read_tables("figure3").dropna(subset="alpha").rename(columns={"mean": "test_loss"})
    table = table.assign(curve="aligned", repair=True)
    return table[[*NETWORK, "alpha", "curve", "repair", "test_loss"]]


def our_results(root: Path, ensembles: bool = True) -> pd.DataFrame:
    """Return mean and std by KEYS of the runs below `root`, in the metrics of the paper's tables.

    With `ensembles`, those of Table 1 are read from diversity.csv, which analyze.diversity writes:
    of five sparse networks, whose masks have one source, and of all dense ones.
    """
    runs = sparse_runs(root).melt([*CELL, "variant"], ["test_acc", "test_top5"], "metric")
    parts = [runs.groupby(KEYS)["value"].agg(["mean", "std"]).dropna(subset="mean").reset_index()]
    if ensembles and (root / "diversity.csv").is_file():
        columns = [*CELL, "variant", "members", "sources", *ENSEMBLE_METRICS]
        table = pd.read_csv(root / "diversity.csv").reindex(columns=columns)
        of_one_source = table["members"].eq(5) & table["sources"].le(1)
        table = table[of_one_source | table["variant"].eq("dense")]
        parts.append(table.melt([*CELL, "variant"], ENSEMBLE_METRICS, "metric", "mean"))
    return pd.concat(parts)


def other_settings(root: Path) -> str:
    """The settings of runs below `root` that are not the paper's, with its own in brackets."""
    stages = ("train_dense", "prune_imp", "train_sparse")
    results = [find_results(root, stage) for stage in stages]
    arguments = [[run.get("arguments", {}) for run in runs] for runs in results]
    datasets = {run.get("dataset") for runs in arguments for run in runs}
    dataset = "imagenet" if "imagenet" in datasets else "small images"
    differences = []
    for stage, runs, paper in zip(stages, arguments, PAPER.values()):
        expected = {name: paper_value(values, dataset) for name, values in paper.items()}
        for name, value in (expected | {"image_size": None, "limit_train": None}).items():
            if others := {run.get(name, value) for run in runs} - {value}:
                ours, paper_text = ", ".join(map(str, others)), "none" if value is None else value
                differences.append(f"{stage} {name} {ours} ({paper_text})")
    return "; ".join(differences)


def compare(number: int, ours: pd.DataFrame) -> pd.DataFrame:
    """Join a table of the paper with `our_results` in the cells that both have.

    Columns are KEYS, mean, std, paper, paper_std and difference. Table 1 is joined for any rewind
    epoch, because the paper does not state its own.
    """
    theirs = read_tables(str(number)).rename(columns={"mean": "paper", "std": "paper_std"})
    keys = [name for name in KEYS if theirs[name].notna().any()]
    table = theirs[[*keys, "paper", "paper_std"]].merge(ours, on=keys)
    table["difference"] = table["mean"] - table["paper"]
    return table[[*KEYS, "mean", "std", "paper", "paper_std", "difference"]]


def layout(comparison: pd.DataFrame) -> pd.DataFrame:
    """Return `compare` as text in the paper's layout.

    Ours, the paper's and the difference are below each other, with a column per rewind epoch, or
    per metric in Table 1.
    """
    columns = "metric" if comparison["metric"].isin(ENSEMBLE_METRICS).any() else "rewind"
    digits = 3 if columns == "metric" else 2  # as in the paper
    cells = []
    for row in comparison.itertuples():
        cell = {
            "dataset": row.dataset,
            "metric": METRICS[row.metric],
            "rewind": "-" if pd.isna(row.rewind) else f"k = {row.rewind:g}",
        }
        cell |= {"sparsity": f"{100 * row.sparsity:.4g}%", "method": row.variant}
        lines = {"ours": format_mean(row.mean, row.std, digits)}
        lines |= {"paper": format_mean(row.paper, row.paper_std, digits)}
        lines |= {"difference": f"{row.difference:+.{digits}f}"}
        cells += [cell | {"numbers": line, "text": text} for line, text in lines.items()]
    table = pd.DataFrame(cells)
    rows = [key for key in ("dataset", "metric", "rewind") if table[key].nunique() > 1]
    rows = [key for key in (*rows, "sparsity", "method", "numbers") if key != columns]
    return table.pivot_table("text", rows, columns, "first", sort=False).fillna("")


def save_comparison(number: int, ours: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Write a table of the paper beside `our_results` as CSV and LaTeX; return its `layout`.

    Raises UserError when `ours` has none of its cells.
    """
    comparison = compare(number, ours)
    if comparison.empty:
        cells = read_tables(str(number))[CELL].dropna(axis=1)
        if number == 1:
            ensembles = "ensembles of five networks: ENSEMBLE=5, then python -m analyze.diversity"
            raise UserError(f"Table 1 needs {ensembles}")
        if len(others := cells.merge(ours)["variant"].unique()):
            raise UserError(f"Table {number} has none of the variants {', '.join(others)}")
        needed = (f"{key} {', '.join(map(str, cells[key].unique()))}" for key in cells)
        raise UserError(f"no run for Table {number}, which has {'; '.join(needed)}")
    table = layout(comparison)
    checkpoint.save_text(comparison.to_csv(index=False), folder / f"table_{number}.csv")
    latex = table.to_latex(escape=True, multirow=False).replace("±", r"$\pm$")
    checkpoint.save_text(latex, folder / f"table_{number}.tex")
    return table
