"""Run folders: each knows which experiment it holds, under which code it was made, and whether it
is finished.

arguments.json is written first, and result.json last of all.
"""

import errno
import fcntl
import json
import math
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from common import checkpoint, provenance
from common.errors import UserError
from common.runtime.distributed import RANK

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems that have none
_locks: dict[Path, TextIO] = {}  # of the folders that this process works in


def recorded(folder: Path) -> dict[str, Any]:
    """The arguments of the experiment that `folder` holds; none where it holds none yet."""
    path = Path(folder) / "arguments.json"
    return checkpoint.load_json(path) if path.is_file() else {}


def is_finished(folder: Path, arguments: dict[str, Any]) -> bool:
    """Whether `folder` holds the finished run that `arguments` describe, and nobody works there.

    One that was killed after its result is none yet: it goes on, and nothing is left to be trained.
    Raises UserError when it holds a different experiment, naming the difference, or other files.
    """
    folder = Path(folder)
    if before := recorded(folder):
        now = json.loads(json.dumps(arguments))
        keys = sorted((before.keys() | now.keys()) - {"code"})
        # A flag that has come since, and is not set, changes nothing.
        keys = [key for key in keys if key in before or now[key]]
        changed = [key for key in keys if before.get(key) != now.get(key)]
        if changed:
            differences = ", ".join(
                f"{key} is {before.get(key)} there and {now.get(key)} here" for key in changed
            )
            raise UserError(
                f"{folder} holds another experiment ({differences}): "
                "choose another --out or remove it"
            )
    elif folder.exists() and (
        not folder.is_dir()
        or any(not entry.name.endswith((".tmp", ".lock")) for entry in folder.iterdir())
    ):
        raise UserError(f"{folder} exists and holds no run of this project: choose another --out")
    left = (folder / ".lock").exists() or (folder / "resume.pt").exists()
    return (folder / "result.json").is_file() and not left


def other_code(folder: Path, script: str) -> str:
    """By which code a run was made, and which is here now, where they differ; else nothing."""
    then, now = "+".join(recorded(folder).get("code", ["unknown"])), provenance.code_digest(script)
    return "" if then == now else f"other code ({then} then, {now} now)"


def say_finished(folder: Path, script: str) -> None:
    """Print that there is nothing to do, and when the code was another then."""
    if made_by := other_code(folder, script):
        print(
            f"{folder} is finished, by {made_by}: nothing to do; to run the code as it is now, "
            "choose another --out, and a --tag to name it in tables"
        )
    else:
        print(f"{folder} is finished: nothing to do")


def claim(folder: Path, arguments: dict[str, Any], script: str) -> dict[str, Any]:
    """Record in `folder`, before anything else, which experiment it holds, and under which code.

    Clears what a killed writer left; says so when the code changed since the run was cut off.
    Returns the stamp of its files: `code`, all digests joined by +, and `commit`. Raises UserError
    when another process works there.
    """
    folder = Path(folder)
    _lock(folder)
    checkpoint.remove(folder.glob(".*.tmp"))
    stamp = provenance.stamp(script)
    codes = recorded(folder).get("code", [])
    if codes and codes[-1] != stamp["code"]:
        tqdm.write(f"{folder} goes on under other code ({codes[-1]} then, {stamp['code']} now)")
    if codes[-1:] != [stamp["code"]]:
        codes = [*codes, stamp["code"]]
        checkpoint.save_json(arguments | {"code": codes}, folder / "arguments.json")
    return stamp | {"code": "+".join(codes)}


def _lock(folder: Path) -> None:
    """Keep a folder for this process until it ends; the system releases the lock of a dead one.

    The lock is not inherited: workers that read images outlive a process that is killed.
    """
    path = folder / ".lock"
    if RANK or path in _locks:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder} is in work by {path.read_text().strip()}: leave it") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()} since {time.ctime()}\n")
    file.flush()
    _locks[path] = file


def _unlock(folder: Path) -> None:
    path = folder / ".lock"
    if path in _locks:
        path.unlink(missing_ok=True)
        _locks.pop(path).close()


def finish(
    folder: Path,
    stage: str,
    arguments: dict[str, Any],
    rows: list[dict[str, Any]],
    device: torch.device,
    stamp: dict[str, Any],
    **more: Any,
) -> None:
    """Write log.csv and then, last of all, result.json of a run: what it was, metrics, machine."""
    checkpoint.save_csv(rows, folder / "log.csv")
    seconds = sum(row.get("seconds", 0) for row in rows)
    result = {"stage": stage, "arguments": arguments, "seconds": seconds, **metrics(rows[-1])}
    result |= more | stamp | provenance.environment(device)
    result["command"] = shlex.join(["python", *sys.argv])
    checkpoint.save_json(result, folder / "result.json")
    _unlock(folder)
    checkpoint.remove([folder / "resume.pt"])  # last: without it the run would be trained again


def metrics(row: dict[str, Any]) -> dict[str, float | None]:
    """Losses and accuracies of an epoch; None for NaN and inf, which JSON has not."""
    found = {key: value for key, value in row.items() if key.startswith(("train_", "test_"))}
    return {key: value if math.isfinite(value) else None for key, value in found.items()}
