"""All figures and tables that the runs below a folder allow, in one file.

    python -m analyze.report runs/quick

Runs every analysis of this package, and writes report.md and report.html with their tables (beside
the paper's numbers where the paper has the same cell), their pictures (inlined in the HTML, which
opens without a network), the settings, the hardware and the cost of each stage. What cannot be made
yet is named with what is missing.
"""

import base64
import html
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from analyze.lib import paper_numbers
from analyze.lib.runs import CELL, find_results, parse_root, sparse_runs
from analyze.lib.statistics import summary
from common import checkpoint, cli
from common.errors import UserError

STAGES = ("train_dense", "prune_imp", "align_mask", "train_sparse")
# What is run, and which figures it writes; by the start of their names.
ANALYSES = {
    "results": ("Accuracy by arm", ""),
    "accuracy": ("Accuracy against rewind epoch and sparsity (Figures 5-10)", "accuracy_"),
    "interpolation": ("The line from A to B (Figure 3)", "interpolation_"),
    "imp_barrier": ("Barrier after each pruning round (Figure 4a)", "imp_barrier_"),
    "landscape": ("The plane through three networks (Figure 4b)", "landscape_"),
    "diversity": ("Ensembles (Table 1)", ""),
    "early_matching": ("Early matching (Table 15)", "early_matching_"),
    "masks": ("Masks", ""),
    "methods": ("Matching methods", ""),
}
# The flags of those that evaluate networks, beside --device and --data-dir.
COSTLY = {
    "interpolation": ("points", "images"),
    "imp_barrier": ("points", "images"),
    "landscape": ("grid", "images"),
    "diversity": (),
}
TAGS = {"title": "h1", "heading": "h2", "text": "p", "code": "pre"}
Block = tuple[str, Any]  # kind (one of TAGS, table, picture) and content


def run(name: str, root: Path, flags: list[str]) -> tuple[bool, str]:
    """Run one analysis: whether it made its files, and what it printed and skipped.

    Of one that made none, the line that says what is missing.
    """
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", f"analyze.{name}", str(root), *flags]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    # One that was killed tells nothing.
    told = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    if done.returncode == 2:
        return False, told[-1].partition("error: ")[2]
    if done.returncode:  # a bug of ours, or of a run; the other analyses still count
        print(done.stderr, file=sys.stderr)
        return False, f"failed ({told[-1]})"
    lines = [line for line in done.stdout.splitlines() if not line.startswith("wrote ")]
    lines += [line for line in told if line.startswith("skipped ")]
    return True, "\n".join(lines).strip()


def costs(root: Path) -> pd.DataFrame:
    """A row a stage: finished runs, seconds in them, devices, versions, and digests of the code."""
    rows = []
    for stage in STAGES:
        found = find_results(root, stage)
        hardware = {
            f"{one['device']}, {one['threads']} threads, torch {one['versions']['torch']}"
            for one in found
        }
        rows.append(
            {
                "stage": stage,
                "runs": len(found),
                "seconds": round(sum(one["seconds"] for one in found)),
                "hardware": "; ".join(sorted(hardware)),
                "code": "; ".join(sorted({one.get("code", "unknown") for one in found})),
            }
        )
    return pd.DataFrame(rows).query("runs > 0")


def settings(root: Path) -> pd.DataFrame:
    """The arguments of each stage, every value that its runs had."""
    values: dict[tuple[str, str], set[str]] = {}
    for stage in STAGES:
        for found in find_results(root, stage):
            for key, value in found["arguments"].items():
                if key not in ("source", "target", "dense", "weights", "mask"):  # checksums
                    values.setdefault((stage, key), set()).add(str(value))
    rows = [(*key, ", ".join(sorted(several))) for key, several in values.items()]
    return pd.DataFrame(rows, columns=["stage", "argument", "values"])


def differences(root: Path) -> pd.DataFrame:
    """Every variant minus naive in points, and percent of the gap closed, with 95% intervals."""
    table = summary(sparse_runs(root)).dropna(subset=["difference"])

    def shown(value: float, low: float, high: float) -> str:
        interval = "" if pd.isna(low) else f" ({low:.1f} to {high:.1f})"
        return "" if pd.isna(value) else f"{value:.1f}{interval}"

    for mean, name in (("difference", "difference"), ("gap_closed", "gap")):
        ends = table[f"{name}_low"], table[f"{name}_high"]
        table[mean] = list(map(shown, table[mean], *ends))
    names = {"difference": "minus naive", "gap_closed": "gap closed, %"}
    return table[[*CELL, "variant", "pairs", *names]].rename(columns=names).astype({"pairs": int})


def beside_paper(root: Path, analysis: str) -> pd.DataFrame:
    """Our numbers beside the paper's, in the cells that both have: Tables 1, 5 to 14, 15 and 16."""
    key = [*CELL, "variant"]
    if analysis == "results":
        runs = sparse_runs(root)
        ours, theirs = summary(runs), paper_numbers.accuracies()
        ours = ours[[*key, "mean", "std", "count"]]
        if runs["test_top5"].notna().any():
            top5 = summary(runs.assign(test_acc=runs["test_top5"]))
            ours, theirs = (
                table.merge(more[[*key, "mean"]].rename(columns={"mean": "top 5"}), "left", key)
                for table, more in ((ours, top5), (theirs, paper_numbers.accuracies(("top5",))))
            )
    elif analysis == "diversity":
        ours, theirs = pd.read_csv(root / "diversity.csv"), paper_numbers.ensembles()
        key.remove("rewind")
    elif analysis == "early_matching":
        ours, theirs = pd.read_csv(root / "early_matching.csv"), paper_numbers.early_matching()
        key = [*CELL, "arm", "match_epoch"]
    else:
        return pd.DataFrame()
    return ours.merge(theirs, on=key, suffixes=("", ", paper"))


def gather(root: Path, options: dict[str, Any]) -> list[Block]:
    """The report as blocks, in order.

    `options` are passed on to the analyses that know them, where they are set.
    """
    blocks: list[Block] = [("title", f"Report on {root.name}")]
    if (cost := costs(root)).empty:
        raise UserError(f"no finished run below {root}: run the stages first")
    missing: list[Block] = []
    for name, (title, prefix) in tqdm(ANALYSES.items(), "analyses", unit="analysis", disable=None):
        known = ("device", "data_dir", *COSTLY[name]) if name in COSTLY else ()
        flags = [f"--{key.replace('_', '-')}={options[key]}" for key in known if options[key]]
        made, text = run(name, root, flags)
        if not made:
            missing.append(("text", f"{title}: {text}"))
            continue
        blocks += [("heading", title), ("code", text)] if text else [("heading", title)]
        if name == "results" and not (table := differences(root)).empty:
            said = "Minus naive in points, and share of the LTH-naive gap closed, 95% intervals:"
            blocks += [("text", said), ("table", table)]
        if not (table := beside_paper(root, name)).empty:
            blocks += [("text", "Beside the paper's numbers:"), ("table", table.round(3))]
        if prefix:
            pictures = sorted((root / "figures").glob(f"{prefix}*.png"))
            blocks += [("picture", path) for path in pictures]
    if missing:
        blocks += [("heading", "What is missing"), *missing]
    blocks += [("heading", "Cost"), ("table", cost)]
    return [*blocks, ("heading", "Settings"), ("table", settings(root))]


def markdown(blocks: list[Block], root: Path) -> str:
    """The blocks as Markdown; pictures by their path from `root`."""

    def table(content: pd.DataFrame) -> str:
        rows = [content.columns, ["---"] * content.shape[1], *content.fillna("").to_numpy()]
        escaped = ((str(entry).replace("|", "\\|") for entry in row) for row in rows)
        return "\n".join(f"| {' | '.join(row)} |" for row in escaped)

    show: dict[str, Callable[[Any], str]] = {
        "title": "# {}".format,
        "heading": "## {}".format,
        "text": str,
        "code": "```\n{}\n```".format,
        "table": table,
        "picture": lambda path: f"![{path.stem}]({path.relative_to(root).as_posix()})",
    }
    return "\n\n".join(show[kind](content) for kind, content in blocks) + "\n"


STYLE = """
body{font:15px/1.5 sans-serif;max-width:72em;margin:2em auto;padding:0 1em}
pre{background:#f5f5f5;padding:1em;overflow-x:auto;font-size:12px}
img{max-width:min(100%,52em)} figure{margin:1em 0}
table{border-collapse:collapse;font-size:13px}
td,th{padding:.2em .7em;text-align:left;border-bottom:1px solid #ddd}
"""


def page(blocks: list[Block]) -> str:
    """The blocks as one HTML page that needs no other file."""
    parts = ['<!doctype html><html lang="en"><head><meta charset="utf-8">']
    parts += [f"<title>{html.escape(blocks[0][1])}</title><style>{STYLE}</style></head><body>"]
    for kind, content in blocks:
        if kind == "table":
            parts.append(content.to_html(index=False, na_rep="", border=0))
        elif kind == "picture":
            image = base64.b64encode(content.read_bytes()).decode()
            source = f"data:image/png;base64,{image}"
            parts.append(f'<figure><img alt="{content.stem}" src="{source}"></figure>')
        else:
            parts.append(f"<{TAGS[kind]}>{html.escape(content)}</{TAGS[kind]}>")
    return "\n".join([*parts, "</body></html>\n"])


def main() -> None:
    parser = parse_root(__doc__)
    several = cli.number(int, 3)
    parser.add_argument("--points", type=several, help="of each line (default: interpolation's)")
    parser.add_argument(
        "--grid", type=several, help="points a side of each plane (default: landscape's)"
    )
    parser.add_argument(
        "--images", type=cli.positive, help="for REPAIR and the plane (default: as each)"
    )
    cli.add_device(parser)
    parser.add_argument("--data-dir", help="if not where stage 1 found the data set")
    args = parser.parse_args()
    blocks = gather(args.root, vars(args))
    checkpoint.save_text(markdown(blocks, args.root), args.root / "report.md")
    checkpoint.save_text(page(blocks), args.root / "report.html")
    print(f"wrote {args.root / 'report.md'} and report.html")


if __name__ == "__main__":
    cli.run(main)
