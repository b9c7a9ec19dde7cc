"""SIGKILL at random moments of all stages, also during writes: the same bits, and nothing left.

KILLS=200 sets how many, at least.
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


def deadly(left, *command):
    """Run a stage that kills itself, and what it started, at the `left`-th event from here.

    Events are before and after a file is synchronised, renamed or deleted, and after an epoch.
    """
    os.setsid()

    def event():
        nonlocal left
        left -= 1
        if left == 0:
            os.killpg(0, signal.SIGKILL)

    def eventful(function):
        def called(*arguments, **more):
            event()
            value = function(*arguments, **more)
            event()
            return value

        return called

    for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink"), (Masker, "check")):
        setattr(owner, name, eventful(getattr(owner, name)))
    start(*command)


def kills_until_done(command, draw):
    """Call a stage until it ends by itself, with kills by event and by the clock; how many."""
    kills = 0
    while True:
        by_clock = draw.random() < 0.3
        process = fork(deadly, 0 if by_clock else draw.randrange(1, 150), *command)
        process.join(draw.uniform(0, 3) if by_clock else None)
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it has no group yet
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -signal.SIGKILL
        kills += 1


@forks
def test_killed_stages_end_with_the_same_bits_and_leave_nothing(runs, tmp_path):
    draw, kills, root = random.Random(KILLS), 0, tmp_path / "runs"
    while kills < KILLS:
        for command in (stage1(root / "dense", "--seed 0 1"), *pipeline(root, 0, 1)):
            beside = draw.choice(["", "--parallel 2"]) * ("align_mask" not in command[0])
            kills += kills_until_done((*command, beside), draw)
        same_files(root, runs)
        for folder in {path.parent for path in root.rglob("*") if path.is_file()}:
            pair = folder, runs / folder.relative_to(root)
            found, wanted = ({path.name for path in place.iterdir()} for place in pair)
            assert found == wanted
        shutil.rmtree(root)
    print(f"{kills} kills")
