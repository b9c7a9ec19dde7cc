"""All figures and tables that the runs below a folder allow, in one file.

    python -m analyze.report runs/quick
    python -m analyze.report runs/quick --only results accuracy masks     # nothing that takes long

Runs the analyses of this package, and writes report.html (pictures inlined, opens without a
network) and report.md: what was found, what the words mean, every table and figure, the paper's
tables beside ours (also as tables/*.csv and *.tex), cost and settings. What cannot be made yet is
named with what is missing. Its text is in lib/report.json.
"""

import contextlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import binomtest

from analyze.lib import pages, paper_numbers
from analyze.lib.pages import Block, block
from analyze.lib.runs import find_results, parse_root, sparse_runs, text_of
from analyze.lib.statistics import findings, summary
from common import checkpoint, cli
from common.errors import UserError

LIB = Path(__file__).parent / "lib"
TEXT = json.loads((LIB / "report.json").read_text())
ANALYSES = TEXT["analyses"]
STAGES = ("train_dense", "prune_imp", "align_mask", "train_sparse")
SETTINGS = (
    r"^arguments\.(?!(source|target|dense|weights|mask|precision)$)"  # files; the precision used
    r"|^(precision|device|threads|processes|code|commit)$|^versions\.|^finished$"
)


def run(name: str, root: Path, flags: list[str]) -> tuple[str, str, list[Path]]:
    """Run one analysis: what it lacks, what it printed and skipped, and the files it wrote."""
    command = [sys.executable, "-m", f"analyze.{name}", str(root), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    # One that was killed tells nothing.
    told = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    if done.returncode == 2:
        return told[-1].partition("error: ")[2], "", []
    if done.returncode:  # a bug of ours, or of a run; the other analyses still count
        print(done.stderr, file=sys.stderr)
        return f"failed ({told[-1]})", "", []
    printed, wrote = done.stdout.splitlines(), "wrote "
    lines = [line for line in printed if not line.startswith(wrote)]
    lines += [line for line in told if line.startswith("skipped ")]
    files = [Path(line.removeprefix(wrote)) for line in printed if line.startswith(wrote)]
    return "", "\n".join(lines).strip(), files


def section(name: str, root: Path, options: dict[str, Any]) -> tuple[str, list[Block]]:
    """Run an analysis; what it lacks, or else nothing, and its part of the report."""
    flags = []
    for key in ANALYSES[name]["flags"]:
        if options[key]:
            flags.append(f"--{key.replace('_', '-')}")
            if options[key] is not True:
                flags.append(str(options[key]))
    lacks, text, files = run(name, root, flags)
    if lacks:
        return lacks, []
    blocks = [pages.heading(ANALYSES[name]["title"]), block("p", ANALYSES[name]["text"])]
    if text:
        blocks.append(block("pre", text))
    blocks += [pages.picture(path, root) for path in files if path.suffix == ".png"]
    command = shlex.join(["python", "-m", f"analyze.{name}", str(root), *flags])
    blocks += [block("p", f"Numbers, written by {command}")]
    tables = [path.relative_to(root).as_posix() for path in files if path.suffix == ".csv"]
    return "", blocks + [block("link", table, table) for table in tables]


def paper_tables(root: Path) -> list[Block]:
    """The tables of the paper that have cells in common with the runs below `root`."""
    blocks, ours = [], paper_numbers.measured(root)
    for number in paper_numbers.TABLES:
        with contextlib.suppress(UserError):
            shown = paper_numbers.save(number, ours, root / "tables")
            file = f"tables/table_{number}"
            blocks += [block("h3", f"Table {number}"), pages.table(shown)]
            blocks += [block("link", "CSV", f"{file}.csv"), block("link", "LaTeX", f"{file}.tex")]
    said = "Mean ± sample standard deviation, and ours minus the paper's."
    if not blocks:
        said = "No table of the paper has these networks, data sets, sparsities and rewind epochs."
    return [pages.heading("The paper's tables beside ours"), block("p", said), *blocks]


def settings(stages: dict[str, list[dict[str, Any]]]) -> pd.DataFrame:
    """A column a stage, with its finished runs and seconds: every value that their settings had."""
    table = {}
    for stage, found in stages.items():
        runs, files = pd.json_normalize(found), (run["path"] / "result.json" for run in found)
        runs["finished"] = [date.fromtimestamp(file.stat().st_mtime) for file in files]
        runs = runs.filter(regex=SETTINGS).rename(columns=lambda key: key.rpartition(".")[2])
        shown = runs.apply(lambda values: ", ".join(values.dropna().map(text_of).unique()))
        name = f"{stage}: {len(found)} runs, {sum(run['seconds'] for run in found):.0f} s"
        table[name] = shown.to_dict()
    table = pd.DataFrame(table).fillna("").rename_axis("setting")
    return table[(table != "").any(axis=1)]


def image_facts(dense: list[dict[str, Any]]) -> Iterable[str]:
    """A sentence a data set: its images, and what so many can tell apart."""
    for one in {run["arguments"]["dataset"]: run for run in dense if "images" in run}.values():
        count, accuracy = one["images"]["test"], one["test_acc"]
        right = binomtest(round(count * accuracy / 100), count)
        low, high = right.proportion_ci(method="wilson")
        yield (
            f"{one['arguments']['dataset']}: {one['images']['train']} training and {count} test "
            f"images of {one['classes']} classes. One test image is {100 / count:.2g} points, and "
            f"where {accuracy:.1f}% of them are right, an accuracy lies between {low:.1%} and "
            f"{high:.1%} (95%, Wilson): two single networks show no smaller difference."
        )


def gather(root: Path, options: dict[str, Any]) -> list[Block]:
    """The report as blocks, in order; prints what it does, and the seconds.

    `options` are passed on to the analyses that know them, where they are set. Raises UserError
    when no run has finished.
    """
    stages = {}
    for stage in STAGES:
        runs = [run for run in find_results(root, stage) if {"arguments", "seconds"} <= run.keys()]
        stages |= {stage: runs} if runs else {}
    if not stages:
        raise UserError(f"no finished run below {root}: run the stages first")
    names, missing, parts = options["only"] or [*ANALYSES], {}, []
    for name, about in ANALYSES.items():
        lacks, begun = "not asked for", time.monotonic()
        if name in names:
            print(f"{name:<16}", end="", flush=True)
            lacks, blocks = section(name, root, options)
            print(f"{time.monotonic() - begun:4.0f} s  {lacks}", flush=True)
            parts += blocks
        if lacks:
            missing[about["title"]] = lacks
    try:
        found, parts = findings(summary(sparse_runs(root))), parts + paper_tables(root)
    except UserError as error:
        found = [str(error)]
    drawing = root / "figures/overview.svg"
    drawing.parent.mkdir(exist_ok=True)
    shutil.copy(LIB / drawing.name, drawing)
    about = [pages.heading("What this is about"), block("p", TEXT["introduction"])]
    about += [block("link", *TEXT["paper"]), pages.picture(drawing, root)]
    parts = [*about, *(block("word", *word) for word in TEXT["words"].items()), *parts]
    if missing:
        parts += [pages.heading("What is missing")]
        parts += [block("word", *word) for word in missing.items()]
    parts += [pages.heading("Settings and cost"), pages.table(settings(stages))]
    commands = dict.fromkeys(run.get("command") for runs in stages.values() for run in runs)
    commands[shlex.join(["python", "-m", "analyze.report", *sys.argv[1:]])] = None
    parts += [block("p", f"Written on {datetime.now():%Y-%m-%d %H:%M}, after these commands:")]
    parts += [block("pre", "\n".join(filter(None, commands)))]
    titles = [text[3:] for _, text in parts if text.startswith("## ")]
    contents = [block("link", title, f"#{pages.anchor(title)}") for title in titles]
    opening = [block("p", text) for text in (*found, *image_facts(stages.get("train_dense", [])))]
    return [*opening, *contents, *parts]


def main() -> None:
    parser = parse_root(__doc__)
    add, several = parser.add_argument, cli.number(int, 3)
    names = f"some of {', '.join(ANALYSES)}"
    add("--only", nargs="+", choices=ANALYSES, metavar="NAME", help=names)
    add("--points", type=several, help="of each line (default: as each analysis)")
    add("--grid", type=several, help="points a side of the plane (default: landscape's)")
    add("--images", type=cli.positive, help="for REPAIR and the plane (default: as each)")
    cli.add_device(parser)
    add("--data-dir", help="if not where stage 1 found the data set")
    args = parser.parse_args()
    blocks = gather(args.root, vars(args) | {"paper": True})
    title = f"Report on {args.root.name}"
    markdown = "\n\n".join([f"# {title}", *(text for _, text in blocks)])
    checkpoint.save_text(f"{markdown}\n", args.root / "report.md")
    checkpoint.save_text(pages.page(title, blocks), args.root / "report.html")
    print(f"wrote report.md and {args.root / 'report.html'}")


if __name__ == "__main__":
    cli.run(main)
