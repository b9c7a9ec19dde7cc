"""What of an experiment has run, and how long the rest will take, judged by what has run.

    bash run_all.sh status cifar10
    DRY_RUN=1 bash run_all.sh cifar10 | python -m analyze.status      # the same

Reads commands of the stages and looks for the result.json of each run that they make: a dense
network, an IMP chain, an alignment, a sparse network. The time left is that of training, without
start-up: epochs, at the pace of a stage and width, or else of its dense networks.
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
# Flags that say which runs, where and how fast, and not how a run is made.
PLACES = """--seed --sparsity --save-epochs --dense --source --target --weights --masks --out
    --data-dir --device --workers --parallel --compile --checkpoint-minutes""".split()


class Run(NamedTuple):
    stage: str
    group: Path  # the folder of its dense networks: runs of one width cost alike
    epochs: float  # what it trains; NaN before a dense network has finished
    files: list[Path]  # result.json and masks: it has finished when all are there
    settings: dict[str, list[str]]  # the flags that say how it is made

    def finished(self) -> bool:
        return all(file.is_file() for file in self.files)

    def as_asked(self) -> bool:
        """Whether a finished run was made by these flags, as far as its result tells."""
        command = json.loads(self.files[0].read_text()).get("command")
        return command is None or settings_of(flags_of(shlex.split(command))) == self.settings


def flags_of(words: list[str]) -> dict[str, list[str]]:
    """The flags of a command of a stage, with their values."""
    flags: dict[str, list[str]] = defaultdict(list)
    begin = next((place for place, word in enumerate(words) if word in STAGES), 0)
    for word in words[begin:]:
        if word.startswith("--"):
            values = flags[word]
        elif flags:
            values.append(word)
    return flags


def settings_of(flags: dict[str, list[str]]) -> dict[str, list[str]]:
    """Those that say how a run is made."""
    places = PLACES + ["--rewind"] * ("--arm" in flags)  # of stage 4 it says which runs
    return {flag: values for flag, values in flags.items() if flag not in places}


def runs_of(command: str, pruned: dict[Path, list[str]]) -> list[Run]:
    """The runs that a command of a stage makes; none of another command.

    `pruned` gathers the masks that commands of stage 2 make, by folder, for those of stage 3.
    """
    words = shlex.split(command, comments=True)
    flags = flags_of(words)
    settings = settings_of(flags)  # before defaults are looked up below
    stage = next((STAGES[word] for word in words if word in STAGES), None)
    if stage is None:
        return []
    out, sparsities = [*map(Path, flags["--out"])], [*map(float, flags["--sparsity"])]
    weights = flags["--dense"] or flags["--target"] or flags["--weights"]
    group = Path(weights[0]).parent if weights else out[0]
    finished = (json.loads(path.read_text()) for path in group.glob("seed*/result.json"))
    dense = next((result["arguments"] for result in finished), {"epochs": math.nan})
    total = dense["epochs"]
    epochs, rewinds = [*map(float, flags["--epochs"])], [*map(int, flags["--rewind"])]
    names = []
    if stage == "dense":
        made = {paths.dense_folder(out[0], seed): total for seed in flags["--seed"]}
    elif stage == "imp":
        rounds = len(sparsities)
        if "--one-shot" not in words:
            rounds += math.ceil(math.log(1 - max(sparsities), 0.8)) - 1
        usual = 20 if dense.get("dataset") == "imagenet" else 50  # as in PAPER of common/cli.py
        each = total - rewinds[0] if rewinds else [*epochs, usual][0]
        names = [paths.mask_file(Path(), sparsity).name for sparsity in sparsities]
        made = dict.fromkeys(out, rounds * each)
        pruned |= dict.fromkeys(out, names)
    elif stage == "align":
        made, masks = {out[0]: 1}, Path(flags["--masks"][0])
        names = pruned.get(masks) or [path.name for path in paths.mask_files(masks)]
    else:
        cells = product(sparsities, rewinds)
        until = [*epochs, total][0]
        made = {paths.sparse_folder(out[0], *cell): until - cell[1] for cell in cells}
    names = ["result.json", *names]
    return [
        Run(stage, group, cost, [folder / name for name in names], settings)
        for folder, cost in made.items()
    ]


def pace(done: list[Run]) -> float:
    """Seconds by the clock that an epoch of these took, with as many at a time; NaN of none."""
    busy, until = 0.0, -math.inf
    results = [run.files[0] for run in done]
    ends = ((path.stat().st_mtime, json.loads(path.read_text())["seconds"]) for path in results)
    for begun, ended in sorted((ended - seconds, ended) for ended, seconds in ends):
        busy += max(0.0, ended - max(begun, until))
        until = max(until, ended)
    epochs = sum(run.epochs for run in done)
    return busy / epochs if epochs else math.nan


def describe(runs: list[Run], paces: dict[tuple[str, Path], float]) -> str:
    """For example '41 of 108, 2 h 10 min left'; `paces` by stage and group."""
    left = [run.epochs * paces[run[:2]] for run in runs if not run.finished()]
    known = [seconds for seconds in left if seconds >= 0]
    text = f"{len(runs) - len(left)} of {len(runs)}"
    at_least = "at least " * (len(known) < len(left))
    return text + f", {at_least}{duration(sum(known))} left" * bool(known)


def duration(seconds: float) -> str:
    """90 -> '2 min', 7800 -> '2 h 10 min'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def main() -> None:
    try:
        tell()
    except (LookupError, OSError, TypeError, ValueError) as error:
        print(f"status: error: a command or result.json makes no sense: {error}", file=sys.stderr)
        sys.exit(2)


def tell() -> None:
    """Print what is done and left of the commands on standard input, or those with work left."""
    pruned: dict[Path, list[str]] = {}
    lines = {line: runs_of(line, pruned) for line in sys.stdin}
    if "--missing" in sys.argv:  # commands with something left to do, of other flags, and unknown
        for line, made in lines.items():
            if not made or not all(run.finished() and run.as_asked() for run in made):
                print(line, end="")
        return
    runs, done = list(chain(*lines.values())), defaultdict(list)
    if not runs:
        raise ValueError("no command of a stage on standard input")
    for run in filter(Run.finished, runs):
        done[run[:2]].append(run)
    alike = {run[:2] for run in runs}
    paces = {about: pace(done[about] or done["dense", about[1]]) for about in alike}
    for stage in STAGES.values():
        print(f"{stage:<8}{describe([run for run in runs if run.stage == stage], paces)}")
    print(f"runs done {describe(runs, paces)}")


if __name__ == "__main__":
    main()
