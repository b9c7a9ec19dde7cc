"""Which runs of an experiment are finished, and how long the others will take.

    bash run_all.sh status cifar10
    DRY_RUN=1 bash run_all.sh cifar10 | python -m analyze.status      # the same

Reads stage commands from standard input and looks for the result.json of each run that they make:
a dense network, an IMP chain, an alignment, a sparse network. The time left is training time
without start-up: epochs times the seconds per epoch of finished runs of that stage and width, or
else of its dense networks.
"""

import json
import math
import shlex
import sys
from collections import defaultdict
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

from common import paths  # and nothing that takes seconds to import

STAGES = {
    "train_dense.py": "dense",
    "prune_imp.py": "imp",
    "align_mask.py": "align",
    "train_sparse.py": "sparse",
}
# Flags that select runs, paths and speed; all others are settings of a run.
NOT_SETTINGS = """--seed --sparsity --save-epochs --dense --source --target --weights --masks --out
    --data-dir --device --workers --parallel --checkpoint-minutes""".split()


class Run(NamedTuple):
    stage: str
    group: Path  # the folder of its dense networks, whose runs have the same cost per epoch
    epochs: float  # to train; NaN before a dense network has finished
    files: list[Path]  # result.json, weights, masks: they exist when the run has finished
    settings: dict[str, list[str]]  # flags and their values

    def finished(self) -> bool:
        return all(file.is_file() for file in self.files)

    def has_same_settings(self) -> bool:
        """Whether the finished run was made with these settings, if its result records them."""
        command = json.loads(self.files[0].read_text()).get("command")
        return (
            command is None or select_settings(parse_flags(shlex.split(command))) == self.settings
        )


def parse_flags(words: list[str]) -> dict[str, list[str]]:
    """Return the flags of a stage command with their values."""
    flags: dict[str, list[str]] = defaultdict(list)
    start = next((index for index, word in enumerate(words) if word in STAGES), 0)
    for word in words[start:]:
        if word.startswith("--"):
            values = flags[word]
        elif flags:
            values.append(word)
    return flags


def select_settings(flags: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the flags that are settings of a run."""
    excluded = NOT_SETTINGS + ["--rewind"] * ("--arm" in flags)  # in stage 4 it selects runs
    return {flag: values for flag, values in flags.items() if flag not in excluded}


def planned_runs(command: str, masks_by_folder: dict[Path, list[str]]) -> list[Run]:
    """Return the runs that a stage command makes; other commands make none.

    Commands of stage 2 add the names of their masks to `masks_by_folder`, commands of stage 3 read
    them.
    """
    words = shlex.split(command, comments=True)
    flags = parse_flags(words)
    settings = select_settings(flags)  # before the lookups below add missing flags
    stage = next((STAGES[word] for word in words if word in STAGES), None)
    if stage is None:
        return []
    out, sparsities = [*map(Path, flags["--out"])], [*map(float, flags["--sparsity"])]
    weights = flags["--dense"] or flags["--target"] or flags["--weights"]
    group = Path(weights[0]).parent if weights else out[0]
    finished = (json.loads(path.read_text()) for path in group.glob("seed*/result.json"))
    dense = next((result["arguments"] for result in finished), {"epochs": math.nan})
    dense_epochs = dense["epochs"]
    epochs, rewinds = [*map(float, flags["--epochs"])], [*map(int, flags["--rewind"])]
    names = []
    if stage == "dense":
        names = [paths.epoch_file(Path(), int(epoch)).name for epoch in flags["--save-epochs"]]
        costs = {paths.dense_folder(out[0], seed): dense_epochs for seed in flags["--seed"]}
    elif stage == "imp":
        rounds = len(sparsities)
        if "--one-shot" not in words:
            rounds += math.ceil(math.log(1 - max(sparsities), 0.8)) - 1
        default = 20 if dense.get("dataset") == "imagenet" else 50  # as in PAPER of common/cli.py
        round_epochs = dense_epochs - rewinds[0] if rewinds else [*epochs, default][0]
        names = [paths.mask_file(Path(), sparsity).name for sparsity in sparsities]
        costs = dict.fromkeys(out, rounds * round_epochs)
        masks_by_folder |= dict.fromkeys(out, names)
    elif stage == "align":
        costs, masks = {out[0]: 1}, Path(flags["--masks"][0])
        names = masks_by_folder.get(masks) or [path.name for path in paths.mask_files(masks)]
    else:
        cells = product(sparsities, rewinds)
        last_epoch = [*epochs, dense_epochs][0]
        costs = {paths.sparse_folder(out[0], *cell): last_epoch - cell[1] for cell in cells}
    names = ["result.json", *names]
    return [
        Run(stage, group, cost, [folder / name for name in names], settings)
        for folder, cost in costs.items()
    ]


def seconds_per_epoch(runs: list[Run]) -> float:
    """Return the wall-clock seconds per epoch of finished runs; NaN if there is none.

    Time in which several runs overlapped counts once.
    """
    busy, last_end = 0.0, -math.inf
    results = [run.files[0] for run in runs]
    ends = ((path.stat().st_mtime, json.loads(path.read_text())["seconds"]) for path in results)
    for start, end in sorted((end - seconds, end) for end, seconds in ends):
        busy += max(0.0, end - max(start, last_end))
        last_end = max(last_end, end)
    epochs = sum(run.epochs for run in runs)
    return busy / epochs if epochs else math.nan


def progress(runs: list[Run], speeds: dict[tuple[str, Path], float]) -> str:
    """Format progress, for example '41 of 108, 2 h 10 min left'.

    `speeds` are seconds per epoch by stage and group.
    """
    left = [run.epochs * speeds[run[:2]] for run in runs if not run.finished()]
    known = [seconds for seconds in left if seconds >= 0]
    text = f"{len(runs) - len(left)} of {len(runs)}"
    at_least = "at least " * (len(known) < len(left))
    return text + f", {at_least}{duration(sum(known))} left" * bool(known)


def duration(seconds: float) -> str:
    """Format a duration: 90 as '2 min', 7800 as '2 h 10 min'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def main() -> None:
    try:
        print_status()
    except (LookupError, OSError, TypeError, ValueError) as error:
        print(f"status: error: a command or result.json is invalid: {error}", file=sys.stderr)
        sys.exit(2)


def print_status() -> None:
    """Print the progress of the commands on standard input, or with --missing those still to run.

    These are the commands with a run that is unfinished or has other settings, and all that are not
    of a stage.
    """
    masks_by_folder: dict[Path, list[str]] = {}
    commands = {line: planned_runs(line, masks_by_folder) for line in sys.stdin}
    if "--missing" in sys.argv:
        for line, runs in commands.items():
            if not runs or not all(run.finished() and run.has_same_settings() for run in runs):
                print(line, end="")
        return
    runs, finished = list(chain(*commands.values())), defaultdict(list)
    if not runs:
        raise ValueError("no command of a stage on standard input")
    for run in filter(Run.finished, runs):
        finished[run[:2]].append(run)
    keys = {run[:2] for run in runs}
    speeds = {key: seconds_per_epoch(finished[key] or finished["dense", key[1]]) for key in keys}
    for stage in STAGES.values():
        print(f"{stage:<8}{progress([run for run in runs if run.stage == stage], speeds)}")
    print(f"runs done {progress(runs, speeds)}")


if __name__ == "__main__":
    main()
