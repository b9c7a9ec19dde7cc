"""All figures and tables that the runs below a folder allow, in one file: `python -m analyze.report runs/quick`.

Runs every analysis of this package, and writes report.md and report.html with their tables (beside the paper's
numbers where the paper has the same cell), their pictures (inlined in the HTML, which opens without a network), the
settings, the hardware and the cost of each stage. What cannot be made yet is named with what is missing.
"""

import base64
import html
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from analyze import paper
from analyze.results import CELL, find_results, parse_root, sparse_runs, summary
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
COSTLY = {  # the flags of those that evaluate networks
    "interpolation": ("device", "data_dir", "points", "images"),
    "imp_barrier": ("device", "data_dir", "points", "images"),
    "landscape": ("device", "data_dir", "grid", "images"),
    "diversity": ("device", "data_dir"),
}
Block = tuple[str, Any]  # kind (heading, text, code, table, picture) and content


def run(name: str, root: Path, flags: list[str]) -> tuple[bool, str]:
    """Run one analysis; whether it made its files, and what it printed and skipped, or the line that says what is missing."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", f"analyze.{name}", str(root), *flags], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )  # fmt: skip
    told = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]  # none of one that was killed
    if done.returncode == 2:
        return False, told[-1].partition("error: ")[2]
    if done.returncode:  # a bug of ours, or of a run; the other analyses still count
        print(done.stderr, file=sys.stderr)
        return False, f"failed ({told[-1]})"
    lines = [line for line in done.stdout.splitlines() if not line.startswith("wrote ")]
    lines += [line for line in told if line.startswith("skipped ")]
    return True, "\n".join(lines).strip()


def costs(root: Path) -> pd.DataFrame:
    """A row a stage: finished runs, seconds in them, devices and versions."""
    rows = []
    for stage in STAGES:
        found = find_results(root, stage)
        if found:
            devices = sorted(
                {f"{one['device']}, {one['threads']} threads, torch {one['versions']['torch']}" for one in found}
            )
            rows.append({"stage": stage, "runs": len(found), "seconds": round(sum(one["seconds"] for one in found)), "hardware": "; ".join(devices)})  # fmt: skip
    return pd.DataFrame(rows)


def settings(root: Path) -> pd.DataFrame:
    """The arguments of each stage, every value that its runs had."""
    rows = []
    for stage in STAGES:
        values: dict[str, dict[str, None]] = {}
        for found in find_results(root, stage):
            for key, value in found["arguments"].items():
                values.setdefault(key, {})[str(value)] = None
        for key, several in values.items():
            if key not in ("source", "target", "dense", "weights", "mask"):  # checksums
                rows.append({"stage": stage, "argument": key, "values": ", ".join(sorted(several))})
    return pd.DataFrame(rows)


def differences(root: Path) -> pd.DataFrame:
    """Every variant minus naive in points, and the share of the gap closed in percent, with 95% intervals over pairs."""
    table = summary(sparse_runs(root)).dropna(subset=["difference"])

    def shown(row: pd.Series, name: str) -> str:
        low, high = row[f"{name}_low"], row[f"{name}_high"]
        interval = "" if pd.isna(low) else f" ({low:.1f} to {high:.1f})"
        return "" if pd.isna(row[name]) else f"{row[name]:.1f}{interval}"

    for name, column in (("difference", "minus naive"), ("gap", "gap closed, %")):
        table[column] = [shown(row, name) for _, row in table.rename(columns={"gap_closed": "gap"}).iterrows()]
    return table[[*CELL, "variant", "pairs", "minus naive", "gap closed, %"]].astype({"pairs": int})


def beside_paper(root: Path, analysis: str) -> pd.DataFrame:
    """Our numbers beside the paper's, in the cells that both have: Tables 5 to 14 and 16, 1, and 15."""
    if analysis == "results":
        runs, columns = sparse_runs(root), [*CELL, "variant", "mean", "std", "count"]
        ours, theirs, key = summary(runs)[columns], paper.accuracies(), [*CELL, "variant"]
        if runs["test_top5"].notna().any():
            top5 = summary(runs.assign(test_acc=runs["test_top5"]))[[*key, "mean"]].rename(columns={"mean": "top 5"})
            ours = ours.merge(top5, "left", key)
            theirs = theirs.merge(paper.accuracies(("top5",))[[*key, "mean"]].rename(columns={"mean": "top 5"}), "left", key)  # fmt: skip
    elif analysis == "diversity":
        ours, theirs = pd.read_csv(root / "diversity.csv"), paper.ensembles()
        key = [*CELL[:4], "variant"]
    elif analysis == "early_matching":
        ours, theirs = pd.read_csv(root / "early_matching.csv"), paper.early_matching()
        key = [*CELL, "arm", "match_epoch"]
    else:
        return pd.DataFrame()
    return ours.merge(theirs, on=key, suffixes=("", ", paper"))


def gather(root: Path, options: dict[str, Any]) -> list[Block]:
    """The report as blocks, in order; `options` are passed on to the analyses that know them, where they are set."""
    blocks: list[Block] = [("heading", f"Report on {root.name}")]
    if (cost := costs(root)).empty:
        raise UserError(f"no finished run below {root}: run the stages first")
    missing = []
    for name, (title, prefix) in tqdm(ANALYSES.items(), "analyses", unit="analysis", disable=None):
        known = {key: options[key] for key in COSTLY.get(name, ()) if options[key] is not None}
        flags = [part for key, value in known.items() for part in (f"--{key.replace('_', '-')}", str(value))]
        made, text = run(name, root, flags)
        if not made:
            missing.append(f"{title}: {text}")
            continue
        blocks += [("heading", title), ("code", text)] if text else [("heading", title)]
        if name == "results" and not (table := differences(root)).empty:
            blocks += [("text", "Minus naive in points, and share of the LTH-naive gap closed, with 95% intervals:"), ("table", table)]  # fmt: skip
        if not (table := beside_paper(root, name)).empty:
            blocks += [("text", "Beside the paper's numbers:"), ("table", table.round(3))]
        if prefix:
            blocks += [("picture", path) for path in sorted((root / "figures").glob(f"{prefix}*.png"))]
    if missing:
        blocks += [("heading", "What is missing"), *(("text", line) for line in missing)]
    blocks += [("heading", "Cost"), ("table", cost), ("heading", "Settings"), ("table", settings(root))]
    return blocks


def markdown(blocks: list[Block], root: Path) -> str:
    """The blocks as Markdown; pictures by their path from `root`."""
    parts = []
    for number, (kind, content) in enumerate(blocks):
        if kind == "heading":
            parts.append(("## " if number else "# ") + content)
        elif kind == "code":
            parts.append(f"```\n{content}\n```")
        elif kind == "table":
            rows = [content.columns, ["---"] * content.shape[1], *content.fillna("").astype(str).to_numpy()]
            parts.append(
                "\n".join("| " + " | ".join(str(entry).replace("|", "\\|") for entry in row) + " |" for row in rows)
            )
        elif kind == "picture":
            parts.append(f"![{content.stem}]({content.relative_to(root).as_posix()})")
        else:
            parts.append(content)
    return "\n\n".join(parts) + "\n"


def page(blocks: list[Block]) -> str:
    """The blocks as one HTML page that needs no other file."""
    parts = []
    for number, (kind, content) in enumerate(blocks):
        if kind == "heading":
            level = 2 if number else 1
            parts.append(f"<h{level}>{html.escape(content)}</h{level}>")
        elif kind == "code":
            parts.append(f"<pre>{html.escape(content)}</pre>")
        elif kind == "table":
            parts.append(content.to_html(index=False, na_rep="", border=0))
        elif kind == "picture":
            image = base64.b64encode(content.read_bytes()).decode()
            parts.append(f'<figure><img alt="{content.stem}" src="data:image/png;base64,{image}"></figure>')
        else:
            parts.append(f"<p>{html.escape(content)}</p>")
    look = (
        "body{font:15px/1.5 sans-serif;max-width:72em;margin:2em auto;padding:0 1em}pre{background:#f5f5f5;padding:1em;"
        "overflow-x:auto;font-size:12px}img{max-width:min(100%,52em)}figure{margin:1em 0}table{border-collapse:collapse;font-size:13px}"
        "td,th{padding:.2em .7em;text-align:left;border-bottom:1px solid #ddd}"
    )
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(blocks[0][1])}</title>'
    return f"{head}<style>{look}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"


def main() -> None:
    parser = parse_root(__doc__)
    parser.add_argument("--points", type=cli.number(int, 3), help="of each line (default: as analyze.interpolation)")
    parser.add_argument(
        "--grid", type=cli.number(int, 3), help="points a side of each plane (default: as analyze.landscape)"
    )
    parser.add_argument("--images", type=cli.positive, help="for REPAIR and the plane (default: as each analysis)")
    cli.add_device(parser)
    parser.add_argument("--data-dir", help="if not where stage 1 found the data set")
    args = parser.parse_args()
    blocks = gather(args.root, vars(args))
    checkpoint.save_text(markdown(blocks, args.root), args.root / "report.md")
    checkpoint.save_text(page(blocks), args.root / "report.html")
    print(f"wrote {args.root / 'report.md'} and report.html")


if __name__ == "__main__":
    cli.run(main)
