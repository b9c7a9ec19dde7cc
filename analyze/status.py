"""What of an experiment has run, and how long the rest will take, judged by what has run.

    bash run_all.sh status cifar10
    DRY_RUN=1 bash run_all.sh cifar10 | python -m analyze.status      # the same

Reads commands of the stages and looks for the result.json of each run that they make: a dense
network, an IMP chain, an alignment, a sparse network. The time left is that of training, without
start-up: epochs, at the pace of a stage and width, or else of its dense networks.
"""

import argparse
import json
import math
import shlex
import sys
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import NamedTuple

from common import paths  # and nothing that takes seconds to import

STAGES = {
    "train_dense.py": "dense",
    "prune_imp.py": "imp",
    "align_mask.py": "align",
    "train_sparse.py": "sparse",
}
FLAGS = {"--out": Path, "--dense": Path, "--target": Path, "--weights": Path, "--masks": Path}
FLAGS |= {"--seed": int, "--rewind": int, "--sparsity": float, "--epochs": float}


class Run(NamedTuple):
    stage: str
    group: Path  # the folder of its dense networks: runs of one width cost alike
    epochs: float  # what it trains; NaN before a dense network has finished
    files: tuple[Path, ...]  # result.json and masks: it has finished when all are there


def runs_of(command: str, pruned: dict[Path, list[Path]]) -> list[Run]:
    """The runs that a command of a stage makes; none of another command.

    `pruned` gathers the masks that commands of stage 2 make, by folder, for those of stage 3.
    """
    words = shlex.split(command, comments=True)
    stage = next((STAGES[word] for word in words if word in STAGES), None)
    if stage is None:
        return []
    parser = argparse.ArgumentParser("status", usage=argparse.SUPPRESS, allow_abbrev=False)
    for flag, kind in FLAGS.items():
        parser.add_argument(flag, nargs="+", type=kind, default=[])
    flags, _ = parser.parse_known_args(words)
    out, masks = flags.out[0], []
    inputs = flags.dense or flags.target or flags.weights
    group = inputs[0].parent if inputs else out
    dense = group.glob("seed*/result.json")
    total = next((load(path)["arguments"]["epochs"] for path in dense), math.nan)
    epochs = flags.epochs[0] if flags.epochs else None
    if stage == "dense":
        made = {paths.dense_folder(out, seed): total for seed in flags.seed}
    elif stage == "imp":
        rounds = len(flags.sparsity)
        if "--one-shot" not in words:
            rounds += math.ceil(math.log(1 - max(flags.sparsity), 0.8)) - 1
        # The paper fine-tunes for a quarter of the epochs.
        each = total - flags.rewind[0] if flags.rewind else epochs or total / 4
        made = dict.fromkeys(flags.out, rounds * each)
        masks = [paths.mask_file(Path(), sparsity) for sparsity in flags.sparsity]
        pruned |= dict.fromkeys(flags.out, masks)
    elif stage == "align":
        made = {out: 1}
        folder = flags.masks[0]
        masks = pruned.get(folder) or [path.name for path in paths.mask_files(folder)]
    else:
        cells = product(flags.sparsity, flags.rewind)
        made = {paths.sparse_folder(out, *cell): (epochs or total) - cell[1] for cell in cells}
    names = ["result.json", *masks]
    return [
        Run(stage, group, cost, tuple(folder / name for name in names))
        for folder, cost in made.items()
    ]


def pace(done: list[Run]) -> float:
    """Seconds by the clock that an epoch of these took, with as many at a time; NaN of none."""
    busy, until = 0.0, -math.inf
    ends = ((run.files[0].stat().st_mtime, load(run.files[0])["seconds"]) for run in done)
    for begun, ended in sorted((ended - seconds, ended) for ended, seconds in ends):
        busy += max(0.0, ended - max(begun, until))
        until = max(until, ended)
    epochs = sum(run.epochs for run in done)
    return busy / epochs if epochs else math.nan


def time_left(runs: list[Run]) -> dict[Run, float]:
    """What each run that is missing adds to the time left; NaN where nothing tells."""
    done, left = defaultdict(list), []
    for run in runs:
        if all(file.is_file() for file in run.files):
            done[run.stage, run.group].append(run)
        else:
            left.append(run)
    keys = {(run.stage, run.group) for run in left}
    paces = {key: pace(done[key] or done["dense", key[1]]) for key in keys}
    return {run: run.epochs * paces[run.stage, run.group] for run in left}


def duration(seconds: float) -> str:
    """90 -> '2 min', 7800 -> '2 h 10 min'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def describe(count: int, left: list[float]) -> str:
    known = [seconds for seconds in left if seconds >= 0]
    text = f"{count - len(left)} of {count}"
    if known:
        text += f", {'at least ' * (len(known) < len(left))}{duration(sum(known))} left"
    return text


def main() -> None:
    try:
        tell()
    except (LookupError, OSError, TypeError, ValueError) as error:
        print(f"status: error: a command or result.json makes no sense: {error}", file=sys.stderr)
        sys.exit(2)


def tell() -> None:
    """Print what is done and left of the commands on standard input, or those with work left."""
    pruned: dict[Path, list[Path]] = {}
    lines = {line: runs_of(line, pruned) for line in sys.stdin}
    if "--missing" in sys.argv:  # the commands that have something left to do
        for line, made in lines.items():
            if not all(file.is_file() for run in made for file in run.files):
                print(line, end="")
        return
    runs = [run for made in lines.values() for run in made]
    if not runs:
        print("status: error: no command of a stage on standard input", file=sys.stderr)
        sys.exit(2)
    left = time_left(runs)
    for stage in STAGES.values():
        mine = [run for run in runs if run.stage == stage]
        print(f"{stage:<8}{describe(len(mine), [left[run] for run in mine if run in left])}")
    print(f"runs done {describe(len(runs), [*left.values()])}")


def load(result: Path) -> dict:
    return json.loads(result.read_text())


if __name__ == "__main__":
    main()
