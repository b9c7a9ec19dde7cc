"""SIGKILL all stages at random moments, also during writes: results are bit-equal, files complete.

KILLS=200 sets the minimum number of kills.
"""

import contextlib
import os
import random
import shutil
import signal
from pathlib import Path

from common.masking import Masker
from tests.conftest import fork, forks, pipeline, same_files, stage1, start

KILLS = int(os.environ.get("KILLS", "5"))


def run_and_kill(events, *command):
    """Run a stage that kills itself and its children at the given number of events.

    Events are before and after every fsync, rename, deletion and mask check (once per epoch).
    """
    os.setsid()

    def count_event():
        nonlocal events
        events -= 1
        if events == 0:
            os.killpg(0, signal.SIGKILL)

    def counted(function):
        def wrapper(*args, **kwargs):
            count_event()
            value = function(*args, **kwargs)
            count_event()
            return value

        return wrapper

    for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink"), (Masker, "check")):
        setattr(owner, name, counted(getattr(owner, name)))
    start(*command)


def kills_until_done(command, rng):
    """Call a stage until it finishes, killing it by event or after a time; return the kills."""
    kills = 0
    while True:
        by_time = rng.random() < 0.3
        process = fork(run_and_kill, 0 if by_time else rng.randrange(1, 150), *command)
        process.join(rng.uniform(0, 3) if by_time else None)
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it has no process group yet
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -signal.SIGKILL
        kills += 1


@forks
def test_killed_stages_end_with_the_same_bits_and_leave_nothing(runs, tmp_path):
    rng, kills, root = random.Random(KILLS), 0, tmp_path / "runs"
    while kills < KILLS:
        for command in (stage1(root / "dense", "--seed 0 1"), *pipeline(root, 0, 1)):
            parallel = rng.choice(["", "--parallel 2"]) * ("align_mask" not in command[0])
            kills += kills_until_done((*command, parallel), rng)
        same_files(root, runs)
        for folder in {path.parent for path in root.rglob("*") if path.is_file()}:
            pair = folder, runs / folder.relative_to(root)
            names, expected = ({path.name for path in folder.iterdir()} for folder in pair)
            assert names == expected
        shutil.rmtree(root)
    print(f"{kills} kills")
