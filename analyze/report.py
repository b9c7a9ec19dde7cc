"""All figures and tables that the runs below a folder allow, in one file.

    python -m analyze.report runs/quick
    python -m analyze.report runs/quick --only results accuracy masks     # nothing that takes long

Runs the analyses of this package, and writes report.html (pictures inlined, opens without a
network) and report.md: what was found, what the words mean, every table and figure, the paper's
tables beside ours (also as tables/*.csv and *.tex), cost and settings. What cannot be made yet is
named with what is missing. Says before it starts how often networks will be evaluated.
"""

import contextlib
import os
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

from analyze.lib import pages, paper_numbers
from analyze.lib.pages import Block
from analyze.lib.runs import find_results, parse_root, sparse_runs
from analyze.lib.statistics import findings, summary, wilson
from common import checkpoint, cli
from common.errors import UserError

HERE = Path(__file__).parent
STAGES = ("train_dense", "prune_imp", "align_mask", "train_sparse")
MACHINE = ("precision", "device", "threads", "processes", "code", "commit")
CHECKSUMS = ("source", "target", "dense", "weights", "mask")
ANALYSES = {
    "results": (
        "Accuracy by arm",
        "What the arms reach on the test set, and how far each is from naive.",
    ),
    "accuracy": (
        "Accuracy against rewind epoch and sparsity (Figures 5 to 11)",
        "Means over pairs, with a band of one sample standard deviation; dense networks dashed.",
    ),
    "interpolation": (
        "The line from A to B (Figure 3)",
        "How far the loss rises between A and B, and between π(A) and B: the lower the barrier, "
        "the more the two lie in one basin, and the better the mask should fit.",
    ),
    "imp_barrier": (
        "Barrier between dense and pruned networks (Figure 4a)",
        "Whether pruning leaves the basin of the dense network. A point is a kept network: at the "
        "asked sparsities, and after every round with IMP_FLAGS=--keep-rounds.",
    ),
    "landscape": (
        "The plane through three networks (Figure 4b)",
        "Loss over the plane through π(LTH), permuted and π(A): whether they lie in one basin. One "
        "plane of all that there are; analyze.landscape --all draws the others.",
    ),
    "diversity": (
        "Ensembles (Table 1)",
        "How differently networks of one kind predict, and what they reach together.",
    ),
    "early_matching": (
        "Early matching (Table 15)",
        "How long B must have been trained before A can be matched to it.",
    ),
    "masks": ("Masks", "What the permuted mask of A shares with the mask that pruning B gives."),
    "methods": ("Matching methods", "The ways to find π beside each other."),
}
# Passed on to the analyses that evaluate networks.
FLAGS = {
    "interpolation": ("points", "images", "device", "data_dir"),
    "imp_barrier": ("points", "images", "device", "data_dir"),
    "landscape": ("grid", "images", "device", "data_dir"),
    "diversity": ("device", "data_dir"),
}
INTRODUCTION = """Pruning a trained network A gives a mask, and under it A trains well from an early
epoch on (LTH). Another network B, from another random initialisation, trains worse with it (naive).
The neurons of a layer can be permuted without changing what a network computes, and B may have
learned the same in another order. So find the permutation π that maps A onto B, permute the mask
with it, and train B with that (permuted). An independent implementation of the paper:"""
PAPER = {
    "Sparse Training from Random Initialization: Aligning Lottery Ticket Masks using Weight "
    "Symmetry (Adnan et al., ICML 2025, arXiv:2505.05143)": "https://arxiv.org/abs/2505.05143"
}
WORDS = {
    "A, B": "source and target: dense networks from two random initialisations; A is pruned, and B "
    "gets the mask",
    "k": "rewind epoch: sparse training starts from the weights after k epochs of dense training; "
    "epoch 0 is the initialisation",
    "IMP": "iterative magnitude pruning: prune 20% of the remaining weights, train, repeat",
    "sparsity": "share of the weights that are pruned: the white part of the masks above",
    "π": "a permutation of the neurons of every layer; π(A) computes what A does",
    "LTH": "A at epoch k, trained with A's mask (the lottery-ticket hypothesis)",
    "naive": "B at epoch k, trained with A's mask",
    "permuted": "B at epoch k, trained with π of A's mask",
    "barrier": "how far the loss on the line between two networks rises above that of its ends",
    "REPAIR": "renewed statistics of the activations on such a line, which collapse otherwise",
    "interval": "[low, high]: of a mean over pairs of networks, 95% (Student)",
}


def run(name: str, root: Path, flags: list[str]) -> tuple[bool, str]:
    """Run one analysis: whether it made its files, and what it printed and skipped.

    Of one that made none, the line that says what is missing.
    """
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
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


def evaluations(root: Path, points: int | None, grid: int | None) -> dict[str, int]:
    """How often analyses evaluate a network, at most: what was kept is not evaluated again."""

    def files(*patterns: str) -> int:
        return sum(len(list(root.rglob(pattern))) for pattern in patterns)

    return {
        "interpolation": 8 * (points or 21) * files("permutation*.pt"),
        "imp_barrier": 4 * (points or 11) * files("round_*.pt", "sparse_*.pt"),
        "landscape": (grid or 21) ** 2,
        "diversity": files("final.pt", "sparse_*.pt", "epoch_0000.pt"),
    }


def stamps(root: Path) -> dict[Path, int]:
    """When each table and figure was written."""
    files = [*root.glob("*.csv"), *root.glob("figures/*.png"), *root.glob("figures/*.csv")]
    return {path: path.stat().st_mtime_ns for path in sorted(files)}


def section(name: str, root: Path, options: dict[str, Any]) -> tuple[str, list[Block]]:
    """Run an analysis; what it lacks, or else nothing, and its part of the report."""
    flags = ["--paper"] * (name == "accuracy")
    for key in FLAGS.get(name, ()):
        if options[key]:
            flags += [f"--{key.replace('_', '-')}", str(options[key])]
    before = stamps(root)
    made, text = run(name, root, flags)
    if not made:
        return text, []
    written = [path for path, stamp in stamps(root).items() if before.get(path) != stamp]
    title, sentence = ANALYSES[name]
    blocks: list[Block] = [("h2", title), ("p", sentence), *[("pre", text)] * bool(text)]
    blocks += [("picture", path) for path in written if path.suffix == ".png"]
    command = shlex.join(["python", "-m", f"analyze.{name}", str(root), *flags])
    blocks += [("p", f"Numbers, written by {command}")]
    tables = [path.relative_to(root).as_posix() for path in written if path.suffix == ".csv"]
    return "", [*blocks, ("links", dict(zip(tables, tables)))]


def paper_tables(root: Path) -> list[Block]:
    """The tables of the paper that have cells in common with the runs below `root`."""
    blocks, ours = [], paper_numbers.measured(root)
    for number in paper_numbers.TABLES:
        with contextlib.suppress(UserError):
            shown = paper_numbers.save(number, ours, root / "tables")
            file = f"tables/table_{number}"
            links = {"CSV": f"{file}.csv", "LaTeX": f"{file}.tex"}
            blocks += [("h3", f"Table {number}"), ("table", shown), ("links", links)]
    said = "Mean ± sample standard deviation, and ours minus the paper's."
    if not blocks:
        said = "No table of the paper has these networks, data sets, sparsities and rewind epochs."
    return [("h2", "The paper's tables beside ours"), ("p", said), *blocks]


def together(values: Iterable[Any]) -> str:
    """The different values that are there, in order of appearance."""
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def settings(stages: dict[str, list[dict[str, Any]]]) -> pd.DataFrame:
    """A column a stage, with its finished runs and seconds: every value that their settings had."""
    table = {}
    for stage, found in stages.items():
        runs = []
        for run in found:
            when = date.fromtimestamp(os.stat(run["folder"] / "result.json").st_mtime)
            machine = {key: run.get(key) for key in MACHINE} | run.get("versions", {})
            runs.append(run["arguments"] | machine | {"finished": when})
        keys = dict.fromkeys(key for run in runs for key in run if key not in CHECKSUMS)
        name = f"{stage}: {len(found)} runs, {sum(run['seconds'] for run in found):.0f} s"
        table[name] = {key: together(run.get(key) for run in runs) for key in keys}
    table = pd.DataFrame(table).fillna("").rename_axis("setting")
    return table[(table != "").any(axis=1)]


def image_facts(dense: list[dict[str, Any]]) -> Iterable[str]:
    """A sentence a data set: its images, and what so many can tell apart."""
    for one in {run["arguments"]["dataset"]: run for run in dense if "images" in run}.values():
        count, accuracy = one["images"]["test"], one["test_acc"]
        low, high = wilson(accuracy, count)
        yield (
            f"{one['arguments']['dataset']}: {one['images']['train']} training and {count} test "
            f"images of {one['classes']} classes. One test image is {100 / count:.2g} points, and "
            f"where {accuracy:.1f}% of them are right, an accuracy lies between {low:.1f}% and "
            f"{high:.1f}% (95%, Wilson): two single networks show no smaller difference."
        )


def gather(root: Path, options: dict[str, Any]) -> list[Block]:
    """The report as blocks, in order; prints what it will cost and what it does.

    `options` are passed on to the analyses that know them, where they are set. Raises UserError
    when no run has finished.
    """
    stages = {}
    for stage in STAGES:
        runs = [run for run in find_results(root, stage) if {"arguments", "seconds"} <= run.keys()]
        stages |= {stage: runs} if runs else {}
    if not stages:
        raise UserError(f"no finished run below {root}: run the stages first")
    dense, names = stages.get("train_dense", []), options["only"] or [*ANALYSES]
    counts = evaluations(root, options["points"], options["grid"]).items()
    expected = ", ".join(f"{count} for {name}" for name, count in counts if name in names)
    pace = max((run["seconds"] / run["arguments"].get("epochs", 1) for run in dense), default=0)
    print(f"evaluations of a network, at most: {expected or 'none'}")
    print(f"(an epoch of training took {pace:.1f} s, and an evaluation takes less)")
    missing, parts = {}, []
    for name, (title, _) in ANALYSES.items():
        if name not in names:
            missing[title] = "not asked for"
            continue
        begun = time.monotonic()
        print(f"{name:<16}", end="", flush=True)
        lacks, blocks = section(name, root, options)
        print(f"{time.monotonic() - begun:4.0f} s  {lacks}", flush=True)
        parts += blocks
        if lacks:
            missing[title] = lacks
    try:
        found, parts = findings(summary(sparse_runs(root))), parts + paper_tables(root)
    except UserError as error:
        found = [str(error)]
    drawing = root / "figures/overview.svg"
    drawing.parent.mkdir(exist_ok=True)
    shutil.copy(HERE / "lib/overview.svg", drawing)
    about = [("h2", "What this is about"), ("p", INTRODUCTION), ("links", PAPER)]
    parts = [*about, ("drawing", drawing), ("words", WORDS), *parts]
    parts += [("h2", "What is missing"), ("words", missing)] if missing else []
    parts += [("h2", "Settings and cost"), ("table", settings(stages))]
    commands = dict.fromkeys(run.get("command") for runs in stages.values() for run in runs)
    commands[shlex.join(["python", "-m", "analyze.report", *sys.argv[1:]])] = None
    parts += [("p", f"Written on {datetime.now():%Y-%m-%d %H:%M}, after these commands:")]
    parts += [("pre", "\n".join(filter(None, commands)))]
    opening = [("p", text) for text in (*found, *image_facts(dense))]
    return [*opening, pages.contents(parts), *parts]


def main() -> None:
    parser = parse_root(__doc__)
    add, several = parser.add_argument, cli.number(int, 3)
    add(
        "--only", nargs="+", choices=ANALYSES, metavar="NAME", help=f"some of {', '.join(ANALYSES)}"
    )
    add("--points", type=several, help="of each line (default: as each analysis)")
    add("--grid", type=several, help="points a side of the plane (default: landscape's)")
    add("--images", type=cli.positive, help="for REPAIR and the plane (default: as each)")
    cli.add_device(parser)
    add("--data-dir", help="if not where stage 1 found the data set")
    args = parser.parse_args()
    blocks, title = gather(args.root, vars(args)), f"Report on {args.root.name}"
    checkpoint.save_text(pages.markdown(title, blocks, args.root), args.root / "report.md")
    checkpoint.save_text(pages.page(title, blocks), args.root / "report.html")
    print(f"wrote report.md and {args.root / 'report.html'}")


if __name__ == "__main__":
    cli.run(main)
