"""One file with the figures and tables that the runs below a folder allow.

    python -m analyze.report runs/quick
    python -m analyze.report runs/quick --only results accuracy masks     # only fast ones

Runs the analyses of this package and writes report.html, which needs no other file and no internet:
findings, a glossary, every table and figure, the paper's tables beside ours (also as tables/*.csv
and *.tex), settings and cost. An analysis that cannot run yet is listed with what it lacks. The
text of the report is in lib/report.json.
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
from analyze.lib.runs import find_results, format_setting, root_parser, sparse_runs
from analyze.lib.statistics import findings, summary
from common import checkpoint, cli
from common.errors import UserError

LIB = Path(__file__).parent / "lib"
TEXT = json.loads((LIB / "report.json").read_text())
ANALYSES = TEXT["analyses"]
STAGES = ("train_dense", "prune_imp", "align_mask", "train_sparse")
SETTINGS = (
    # Not files, and not the requested precision, as the one that was used follows.
    r"^arguments\.(?!(source|target|dense|weights|mask|precision)$)"
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
    """Fill the HTML template `kind` with escaped texts."""
    return HTML[kind].format(*map(escape, texts))


def heading(text: str) -> str:
    return block("h2", text, re.sub(r"\W+", "-", text.lower()).strip("-"))


def table(frame: pd.DataFrame) -> str:
    return f'<div class="wide">{frame.to_html(border=0, index_names=False)}</div>'


def image(path: Path) -> str:
    """Return HTML of an inlined PNG or SVG; an SVG takes the colours of the page."""
    if path.suffix == ".svg":
        return path.read_text()
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}"></p>'


def run(name: str, root: Path, flags: list[str]) -> tuple[str, str, list[Path]]:
    """Run an analysis; return its error or "", what it printed and skipped, and its files."""
    command = [sys.executable, "-m", f"analyze.{name}", str(root), *flags]
    process = subprocess.run(command, capture_output=True, text=True)
    # A killed process leaves no message.
    errors = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
    if process.returncode == 2:
        return errors[-1].partition("error: ")[2], "", []
    if process.returncode:  # a bug, or a broken run; continue with the other analyses
        print(process.stderr, file=sys.stderr)
        return f"failed ({errors[-1]})", "", []
    printed = process.stdout.splitlines()
    lines = [line for line in printed if not line.startswith("wrote ")]
    lines += [line for line in errors if line.startswith("skipped ")]
    files = [Path(line.removeprefix("wrote ")) for line in printed if line.startswith("wrote ")]
    return "", "\n".join(lines).strip(), files


def section(name: str, root: Path, options: dict[str, Any]) -> tuple[str, list[str]]:
    """Run an analysis; return its error or "", and the blocks of its section."""
    flags = []
    for key in ANALYSES[name]["flags"]:
        if options[key]:
            flags.append(f"--{key.replace('_', '-')}")
            if options[key] is not True:
                flags.append(str(options[key]))
    error, text, files = run(name, root, flags)
    if error:
        return error, []
    blocks = [heading(ANALYSES[name]["title"]), block("p", ANALYSES[name]["text"])]
    if text:
        blocks.append(block("pre", text))
    blocks += [image(path) for path in files if path.suffix == ".png"]
    command = shlex.join(["python", "-m", f"analyze.{name}", str(root), *flags])
    blocks += [block("p", f"Numbers, written by {command}")]
    tables = [path.relative_to(root).as_posix() for path in files if path.suffix == ".csv"]
    return "", blocks + [block("link", path, path) for path in tables]


def paper_tables(root: Path, ensembles: bool) -> list[str]:
    """Return blocks of the paper's tables that have cells in common with the runs below `root`."""
    blocks, ours = [], paper_numbers.our_results(root, ensembles)
    for number in paper_numbers.TABLES:
        with contextlib.suppress(UserError):
            comparison = paper_numbers.save_comparison(number, ours, root / "tables")
            file = f"tables/table_{number}"
            blocks += [block("h3", f"Table {number}"), table(comparison)]
            blocks += [block("link", "CSV", f"{file}.csv"), block("link", "LaTeX", f"{file}.tex")]
    text = "Mean ± sample standard deviation, and ours minus the paper's. "
    if other := paper_numbers.other_settings(root):
        text += f"Our settings that differ from the paper's (in brackets): {other}."
    if not blocks:
        text = "No table of the paper has these networks, data sets, sparsities, rewind epochs and "
        text += "methods (runs of several settings have others, as naive [lr=0.5])."
    return [heading("The paper's tables beside ours"), block("p", text), *blocks]


def settings(stages: dict[str, list[dict[str, Any]]]) -> pd.DataFrame:
    """Return all values of each setting, a column per stage, headed by its runs and seconds.

    `stages` are the results of `find_results` by stage.
    """
    columns = {}
    for stage, results in stages.items():
        runs = pd.json_normalize(results)
        times = ((run["path"] / "result.json").stat().st_mtime for run in results)
        runs["finished"] = [*map(date.fromtimestamp, times)]
        runs = runs.filter(regex=SETTINGS).rename(columns=lambda key: key.rpartition(".")[2])
        texts = runs.apply(lambda values: ", ".join(values.dropna().map(format_setting).unique()))
        name = f"{stage}: {len(results)} runs, {sum(run['seconds'] for run in results):.0f} s"
        columns[name] = texts.to_dict()
    frame = pd.DataFrame(columns).fillna("").rename_axis("setting")
    return frame[(frame != "").any(axis=1)]


def dataset_facts(dense: list[dict[str, Any]]) -> Iterable[str]:
    """Yield a sentence per data set: its images, and the accuracy difference that they resolve."""
    runs = [run for run in dense if "images" in run]
    for run in {(run["arguments"]["dataset"], str(run["images"])): run for run in runs}.values():
        count, accuracy = run["images"]["test"], run["test_acc"]
        test = binomtest(round(count * accuracy / 100), count)
        low, high = test.proportion_ci(method="wilson")
        yield (
            f"{run['arguments']['dataset']}: {run['images']['train']} training and {count} test "
            f"images of {run['classes']} classes. One test image is {100 / count:.2g} points. If "
            f"{accuracy:.1f}% of them are classified correctly, the accuracy on all such images "
            f"lies between {low:.1%} and {high:.1%} (95%, Wilson)."
        )


def build_report(root: Path, options: dict[str, Any]) -> list[str]:
    """Run the analyses and return the report as blocks of HTML; print the seconds of each.

    `options` that are set are passed on to the analyses that have such a flag. Raises UserError
    when no run has finished.
    """
    stages = {}
    for stage in STAGES:
        runs = [run for run in find_results(root, stage) if {"arguments", "seconds"} <= run.keys()]
        stages |= {stage: runs} if runs else {}
    if not stages:
        raise UserError(f"no finished run below {root}: run the stages first")
    names, missing, sections = options["only"] or [*ANALYSES], {}, []
    for name, texts in ANALYSES.items():
        reason, start = "not requested", time.monotonic()
        if name in names:
            print(f"{name:<16}", end="", flush=True)
            reason, blocks = section(name, root, options)
            print(f"{time.monotonic() - start:4.0f} s  {reason}", flush=True)
            sections += blocks
        if reason:
            missing[texts["title"]] = reason
    try:
        opening = findings(summary(sparse_runs(root)))
        sections += paper_tables(root, ANALYSES["diversity"]["title"] not in missing)
    except UserError as error:
        opening = [str(error)]
    opening += dataset_facts(stages.get("train_dense", []))
    sections = [*introduction(root), *sections]
    if missing:
        sections += [heading("What is missing")]
        sections += [block("word", *item) for item in missing.items()]
    sections += [heading("Settings and cost"), table(settings(stages))]
    commands = dict.fromkeys(run.get("command") for runs in stages.values() for run in runs)
    commands[shlex.join(["python", "-m", "analyze.report", *sys.argv[1:]])] = None
    sections += [block("p", f"Written on {datetime.now():%Y-%m-%d %H:%M}, after these commands:")]
    sections += [block("pre", "\n".join(filter(None, commands)))]
    headings = re.findall(HTML["h2"].format("(.*)", "(.*)"), "\n".join(sections))
    contents = [f'<a href="#{anchor}">{title}</a>' for anchor, title in headings]
    return [*(block("p", text) for text in opening), *contents, *sections]


def introduction(root: Path) -> list[str]:
    """Return blocks with the idea, a drawing, which is copied to figures/, and the glossary."""
    drawing = root / "figures/overview.svg"
    drawing.parent.mkdir(exist_ok=True)
    shutil.copy(LIB / drawing.name, drawing)
    blocks = [heading("What this is about"), block("p", TEXT["introduction"])]
    blocks += [block("link", *TEXT["paper"]), image(drawing)]
    return blocks + [block("word", *item) for item in TEXT["words"].items()]


def main() -> None:
    parser = root_parser(__doc__)
    add, at_least_3 = parser.add_argument, cli.number(int, 3)
    add("--only", nargs="+", choices=ANALYSES, metavar="NAME", help=f"of {', '.join(ANALYSES)}")
    add("--points", type=at_least_3, help="points per line (default: that of each analysis)")
    add("--grid", type=at_least_3, help="points per side of the plane (default: landscape's)")
    add("--images", type=cli.positive, help="for REPAIR and the plane (default: of each analysis)")
    cli.add_device(parser)
    add("--data-dir", help="folder of the data set (default: as in stage 1)")
    args = parser.parse_args()
    blocks = build_report(args.root, vars(args) | {"paper": True})
    template = string.Template((LIB / "report.html").read_text())
    values = {"title": escape(f"Report on {args.root.name}"), "body": "\n".join(blocks)}
    checkpoint.save_text(template.substitute(values), args.root / "report.html")
    print(f"wrote {args.root / 'report.html'}")


if __name__ == "__main__":
    cli.run(main)
