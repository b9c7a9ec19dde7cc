"""All figures and tables that the runs below a folder allow, in one file.

    python -m analyze.report runs/quick
    python -m analyze.report runs/quick --only results accuracy masks     # nothing that takes long

Runs the analyses of this package, and writes report.html, one file that opens without a network:
what was found, what the words mean, every table and figure, the paper's tables beside ours (also as
tables/*.csv and *.tex), cost and settings. What cannot be made yet is named with what is missing.
Its text is in lib/report.json.
"""

import base64
import contextlib
import json
import re
import shlex
import shutil
import string
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import date, datetime
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import binomtest

from analyze.lib import paper_numbers
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
HTML = {
    "h2": '<h2 id="{1}">{0}</h2>',
    "h3": "<h3>{0}</h3>",
    "p": "<p>{0}</p>",
    "pre": "<pre>{0}</pre>",
    "word": "<p><b>{0}</b>: {1}</p>",
    "link": '<a href="{1}">{0}</a>',
}


def block(kind: str, *texts: str) -> str:
    """One of HTML: heading and anchor, paragraph, what was printed, word and meaning, link and
    address.
    """
    return HTML[kind].format(*map(escape, texts))


def heading(text: str) -> str:
    return block("h2", text, re.sub(r"\W+", "-", text.lower()).strip("-"))


def table(frame: pd.DataFrame) -> str:
    return f'<div class="wide">{frame.to_html(border=0, index_names=False)}</div>'


def picture(path: Path) -> str:
    """A PNG inlined, or an SVG, which takes the page's colours."""
    if path.suffix == ".svg":
        return path.read_text()
    image = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{escape(path.stem)}" src="data:image/png;base64,{image}"></p>'


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


def section(name: str, root: Path, options: dict[str, Any]) -> tuple[str, list[str]]:
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
    blocks = [heading(ANALYSES[name]["title"]), block("p", ANALYSES[name]["text"])]
    if text:
        blocks.append(block("pre", text))
    blocks += [picture(path) for path in files if path.suffix == ".png"]
    command = shlex.join(["python", "-m", f"analyze.{name}", str(root), *flags])
    blocks += [block("p", f"Numbers, written by {command}")]
    numbers = [path.relative_to(root).as_posix() for path in files if path.suffix == ".csv"]
    return "", blocks + [block("link", path, path) for path in numbers]


def paper_tables(root: Path) -> list[str]:
    """The tables of the paper that have cells in common with the runs below `root`."""
    blocks, ours = [], paper_numbers.measured(root)
    for number in paper_numbers.TABLES:
        with contextlib.suppress(UserError):
            shown = paper_numbers.save(number, ours, root / "tables")
            file = f"tables/table_{number}"
            blocks += [block("h3", f"Table {number}"), table(shown)]
            blocks += [block("link", "CSV", f"{file}.csv"), block("link", "LaTeX", f"{file}.tex")]
    said = "Mean ± sample standard deviation, and ours minus the paper's."
    if not blocks:
        said = "No table of the paper has these networks, data sets, sparsities and rewind epochs."
    return [heading("The paper's tables beside ours"), block("p", said), *blocks]


def settings(stages: dict[str, list[dict[str, Any]]]) -> pd.DataFrame:
    """A column a stage, with its finished runs and seconds: every value that their settings had."""
    columns = {}
    for stage, found in stages.items():
        runs, files = pd.json_normalize(found), (run["path"] / "result.json" for run in found)
        runs["finished"] = [date.fromtimestamp(file.stat().st_mtime) for file in files]
        runs = runs.filter(regex=SETTINGS).rename(columns=lambda key: key.rpartition(".")[2])
        shown = runs.apply(lambda values: ", ".join(values.dropna().map(text_of).unique()))
        name = f"{stage}: {len(found)} runs, {sum(run['seconds'] for run in found):.0f} s"
        columns[name] = shown.to_dict()
    values = pd.DataFrame(columns).fillna("").rename_axis("setting")
    return values[(values != "").any(axis=1)]


def image_facts(dense: list[dict[str, Any]]) -> Iterable[str]:
    """A sentence a data set: its images, and what so many can tell apart."""
    for one in {run["arguments"]["dataset"]: run for run in dense if "images" in run}.values():
        count, accuracy = one["images"]["test"], one["test_acc"]
        right = binomtest(round(count * accuracy / 100), count)
        low, high = right.proportion_ci(method="wilson")
        yield (
            f"{one['arguments']['dataset']}: {one['images']['train']} training and {count} test "
            f"images of {one['classes']} classes. One test image is {100 / count:.2g} points, and "
            f"where {accuracy:.1f}% of them are right, the accuracy on all such images lies "
            f"between {low:.1%} and {high:.1%} (95%, Wilson)."
        )


def gather(root: Path, options: dict[str, Any]) -> list[str]:
    """The report as blocks of HTML, in order; prints what it does, and the seconds.

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
    about = [heading("What this is about"), block("p", TEXT["introduction"])]
    about += [block("link", *TEXT["paper"]), picture(drawing)]
    parts = [*about, *(block("word", *word) for word in TEXT["words"].items()), *parts]
    if missing:
        parts += [heading("What is missing")]
        parts += [block("word", *word) for word in missing.items()]
    parts += [heading("Settings and cost"), table(settings(stages))]
    commands = dict.fromkeys(run.get("command") for runs in stages.values() for run in runs)
    commands[shlex.join(["python", "-m", "analyze.report", *sys.argv[1:]])] = None
    parts += [block("p", f"Written on {datetime.now():%Y-%m-%d %H:%M}, after these commands:")]
    parts += [block("pre", "\n".join(filter(None, commands)))]
    titles = re.findall(HTML["h2"].format("(.*)", "(.*)"), "\n".join(parts))
    contents = [f'<a href="#{anchor}">{title}</a>' for anchor, title in titles]
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
    page = string.Template((LIB / "report.html").read_text())
    words = {"title": escape(f"Report on {args.root.name}"), "body": "\n".join(blocks)}
    checkpoint.save_text(page.substitute(words), args.root / "report.html")
    print(f"wrote {args.root / 'report.html'}")


if __name__ == "__main__":
    cli.run(main)
