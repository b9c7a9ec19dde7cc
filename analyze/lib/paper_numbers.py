"""The paper's numbers (paper_numbers.csv, in our names), and its tables beside ours."""

from pathlib import Path

import pandas as pd

from analyze.lib.runs import CELL, NETWORK, sparse_runs
from analyze.lib.statistics import plus_minus
from common import checkpoint
from common.errors import UserError

TABLES = (1, *range(5, 17))
KEY = [*CELL, "variant", "metric"]
NAMES = {
    "test_acc": "test accuracy (%)",
    "test_top5": "top-5 accuracy (%)",
    "mean_acc": "test accuracy (%)",
    "ensemble_acc": "of the ensemble (%)",
    "disagreement": "disagreement",
    "kl": "KL (nats)",
    "js": "JS (nats)",
}
MEASURES = [*NAMES][2:]  # of Table 1


def numbers(tables: str) -> pd.DataFrame:
    """The rows of some tables (a regular expression): percent, nats, sparsity as a share."""
    table = pd.read_csv(Path(__file__).with_suffix(".csv"), dtype={"table": str, "width": float})
    return table[table["table"].str.fullmatch(tables)]


def accuracies(metric: str = "test_acc") -> pd.DataFrame:
    """Tables 5 to 14, 16 (masks of CIFAR-10) and the dense levels of the figures, which have no
    rewind epoch, by cell and variant. `test_top5`: how often the label is among five guesses.
    """
    table = numbers(r"[5-9]|1[0-46]|figure-dense-line")
    return table.loc[table["metric"] == metric, [*CELL, "variant", "mean", "std"]]


def lines() -> pd.DataFrame:
    """Figure 3: test loss in nats by network and alpha, from π(A) to B with REPAIR."""
    table = numbers("figure3").dropna(subset="alpha").rename(columns={"mean": "test_loss"})
    table = table.assign(curve="aligned", repair=True)
    return table[[*NETWORK, "alpha", "curve", "repair", "test_loss"]]


def of(table: pd.DataFrame, model: str, dataset: str) -> pd.DataFrame:
    """The rows of one network and data set."""
    return table[(table["model"] == model) & (table["dataset"] == dataset)]


def measured(root: Path) -> pd.DataFrame:
    """What the runs below `root` have of the paper's tables: KEY, mean and std.

    Of Table 1 what analyze.diversity wrote.
    """
    runs = sparse_runs(root).melt([*CELL, "variant"], ["test_acc", "test_top5"], "metric")
    parts = [runs.groupby(KEY)["value"].agg(["mean", "std"]).dropna(subset="mean").reset_index()]
    if (root / "diversity.csv").is_file():
        sets = pd.read_csv(root / "diversity.csv")
        parts.append(sets.melt([*CELL, "variant"], MEASURES, "metric", "mean"))
    return pd.concat(parts)


def beside(number: int, ours: pd.DataFrame) -> pd.DataFrame:
    """The cells of a table of the paper that `ours`, from `measured`, has too: KEY, mean, std,
    paper, paper_std and difference. Table 1 does not say its rewind epoch.
    """
    theirs = numbers(str(number)).rename(columns={"mean": "paper", "std": "paper_std"})
    key = [name for name in KEY if theirs[name].notna().any()]
    both = theirs[[*key, "paper", "paper_std"]].merge(ours, on=key)
    both["difference"] = both["mean"] - both["paper"]
    return both[[*KEY, "mean", "std", "paper", "paper_std", "difference"]]


def layout(both: pd.DataFrame) -> pd.DataFrame:
    """A table from `beside` as the paper has it, as text: below each other ours, the paper's and
    the difference, a column a rewind epoch; in Table 1 a column a measure.
    """
    across = "metric" if both["metric"].isin(MEASURES).any() else "rewind"
    digits = 3 if across == "metric" else 2  # as the paper has
    cells = []
    for row in both.itertuples():
        cell = {
            "dataset": row.dataset,
            "metric": NAMES[row.metric],
            "rewind": "-" if pd.isna(row.rewind) else f"k = {row.rewind:g}",
        }
        cell |= {"sparsity": f"{100 * row.sparsity:.4g}%", "method": row.variant}
        lines = {"ours": plus_minus(row.mean, row.std, digits)}
        lines |= {"paper": plus_minus(row.paper, row.paper_std, digits)}
        lines |= {"difference": f"{row.difference:+.{digits}f}"}
        cells += [cell | {"numbers": line, "text": text} for line, text in lines.items()]
    table = pd.DataFrame(cells)
    rows = [key for key in ("dataset", "metric", "rewind") if table[key].nunique() > 1]
    rows = [key for key in (*rows, "sparsity", "method", "numbers") if key != across]
    return table.pivot_table("text", rows, across, "first", sort=False).fillna("")


def save(number: int, ours: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Write a table of the paper beside `ours` as CSV and LaTeX; returns its layout.

    Raises UserError when `ours` has none of its cells.
    """
    both = beside(number, ours)
    if both.empty:
        cells = numbers(str(number))[CELL].dropna(axis=1)
        needs = (f"{key} {', '.join(map(str, cells[key].unique()))}" for key in cells)
        raise UserError(f"no run for Table {number}, which is of {'; '.join(needs)}")
    shown = layout(both)
    checkpoint.save_text(both.to_csv(index=False), folder / f"table_{number}.csv")
    latex = shown.to_latex(escape=True, multirow=False).replace("±", r"$\pm$")
    checkpoint.save_text(latex, folder / f"table_{number}.tex")
    return shown
