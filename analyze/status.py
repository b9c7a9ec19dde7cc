"""What of an experiment has run, and how long the rest will take, judged by what has run.

    bash run_all.sh status cifar10
    DRY_RUN=1 bash run_all.sh cifar10 | python -m analyze.status      # the same

Reads commands of the stages and looks for the result.json of each run that they make: a dense
network, an IMP chain, an alignment, a sparse network. The time left is that of training, without
start-up; a stage without a finished run is judged by the epochs of the dense networks.
"""

import json
import math
import shlex
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

from common import paths  # and nothing that takes seconds to import

STAGES = {
    "train_dense": "dense",
    "prune_imp": "imp",
    "align_mask": "align",
    "train_sparse": "sparse",
}


class Run(NamedTuple):
    stage: str
    group: Path  # the folder of its dense networks: runs of one width cost alike
    epochs: float  # what it trains; NaN before a dense network has finished
    seconds: float  # what it took; NaN before it has finished
    ended: float  # in seconds, by the clock


def runs_of(command: str) -> Iterator[Run]:
    """The runs that a command of a stage makes; none of another command."""
    words = shlex.split(command, comments=True)
    scripts = [word[:-3] for word in words if word.endswith(".py") and word[:-3] in STAGES]
    if not scripts:
        return
    stage, flags = STAGES[scripts[0]], {}
    for word in words:
        if word.startswith("--"):
            values = flags[word] = []
        elif flags:
            values.append(word)
    outs, sparsities = map(Path, flags["--out"]), [float(s) for s in flags.get("--sparsity", [])]
    rewinds = [int(k) for k in flags.get("--rewind", [])]
    inputs = [flags[key][0] for key in ("--dense", "--target", "--weights") if key in flags]
    group = Path(inputs[0]).parent if inputs else Path(flags["--out"][0])
    dense = [finished(path) for path in group.glob("seed*")]
    total = next((run["arguments"]["epochs"] for run in dense if run), math.nan)
    given = [float(epochs) for epochs in flags.get("--epochs", [])]

    def run(folder: Path, epochs: float, masks: list[Path]) -> Run:
        result = finished(folder)
        if result is None or not all(mask.is_file() for mask in masks):
            return Run(stage, group, epochs, math.nan, math.nan)
        ended = (folder / "result.json").stat().st_mtime
        return Run(stage, group, epochs, result["seconds"], ended)

    for out in outs:
        if stage == "dense":
            for seed in flags["--seed"]:
                yield run(paths.dense_folder(out, int(seed)), total, [])
        elif stage == "imp":
            chain = (
                0 if "--one-shot" in flags else math.ceil(math.log(1 - max(sparsities), 0.8)) - 1
            )
            # The paper fine-tunes for a quarter of the epochs.
            each = total - rewinds[0] if rewinds else (given or [total / 4])[0]
            masks = [paths.mask_file(out, sparsity) for sparsity in sparsities]
            yield run(out, (chain + len(sparsities)) * each, masks)
        elif stage == "align":
            sources = paths.mask_files(Path(flags["--masks"][0]))
            yield run(out, 1, [out / source.name for source in sources])
        else:
            for sparsity, rewind in product(sparsities, rewinds):
                folder = paths.sparse_folder(out, sparsity, rewind)
                yield run(folder, (given or [total])[0] - rewind, [])


def finished(folder: Path) -> dict | None:
    """The result.json of a run, which is written last of all."""
    path = folder / "result.json"
    return json.loads(path.read_text()) if path.is_file() else None


def time_left(runs: list[Run], stage: str) -> list[float]:
    """What each run of `stage` that is missing adds to the time left; NaN where nothing tells.

    The pace of a width is that of its runs of this stage, or else of its dense networks; as many
    run at a time as did so far.
    """
    done = [run for run in runs if run.seconds >= 0]
    parallel = at_once([run for run in done if run.stage == stage] or done)
    left = []
    for waiting in (run for run in runs if run.stage == stage and math.isnan(run.seconds)):
        near = [run for run in done if run.group == waiting.group]
        alike = [r for r in near if r.stage == stage] or [r for r in near if r.stage == "dense"]
        epochs = sum(run.epochs for run in alike)
        pace = sum(run.seconds for run in alike) / epochs if epochs else math.nan
        left.append(waiting.epochs * pace / parallel)
    return left


def at_once(done: list[Run]) -> float:
    """How many of these runs there were at a time, on average while there was any."""
    busy, until = 0.0, -math.inf
    for begun, ended in sorted((run.ended - run.seconds, run.ended) for run in done):
        busy += max(0.0, ended - max(begun, until))
        until = max(until, ended)
    return sum(run.seconds for run in done) / busy if busy else 1.0


def duration(seconds: float) -> str:
    """90 -> '2 min', 7800 -> '2 h 10 min'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def main() -> None:
    if "--missing" in sys.argv:
        for line in sys.stdin:
            if any(math.isnan(run.seconds) for run in runs_of(line)):
                print(line, end="")
        return
    runs = [run for line in sys.stdin for run in runs_of(line)]
    if not runs:
        print("status: error: no command of a stage on standard input", file=sys.stderr)
        sys.exit(2)
    left: list[float] = []
    for stage in STAGES.values():
        count = sum(run.stage == stage for run in runs)
        mine = time_left(runs, stage)
        left += mine
        print(f"{stage:<8}{describe(count - len(mine), count, mine)}")
    print(f"runs done {describe(len(runs) - len(left), len(runs), left)}")


def describe(done: int, count: int, left: list[float]) -> str:
    known = [seconds for seconds in left if seconds >= 0]
    text = f"{done} of {count}"
    if known:
        text += f", {'at least ' * (len(known) < len(left))}{duration(sum(known))} left"
    return text


if __name__ == "__main__":
    main()
