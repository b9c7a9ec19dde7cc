"""Run folders: each records its experiment, the code that ran it, and whether it is finished.

arguments.json is written first and result.json last.
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

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # the file system has no locks
_locks: dict[Path, TextIO] = {}  # lock files that this process holds


def recorded_arguments(folder: Path) -> dict[str, Any]:
    """Return the arguments of the experiment in `folder`, or {} if there is none yet."""
    path = Path(folder) / "arguments.json"
    return checkpoint.load_json(path) if path.is_file() else {}


def is_finished(folder: Path, arguments: dict[str, Any]) -> bool:
    """Whether `folder` holds the finished run of `arguments`, and no process is working in it.

    A run that was killed between writing its result and removing its other files is unfinished;
    it resumes with nothing left to train. Raises UserError when the folder holds other files or a
    different experiment, naming the differences.
    """
    folder = Path(folder)
    if recorded := recorded_arguments(folder):
        arguments = json.loads(json.dumps(arguments))  # tuples as lists, as in the record
        keys = sorted((recorded.keys() | arguments.keys()) - {"code"})
        # A flag added to the code since then does not count while it is unset.
        keys = [key for key in keys if key in recorded or arguments[key]]
        changed = [key for key in keys if recorded.get(key) != arguments.get(key)]
        if changed:
            differences = ", ".join(
                f"{key} is {recorded.get(key)} there and {arguments.get(key)} here"
                for key in changed
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
    in_progress = (folder / ".lock").exists() or (folder / "resume.pt").exists()
    return (folder / "result.json").is_file() and not in_progress


def other_code(folder: Path, script: str) -> str:
    """Describe the code of a run if it differs from the current code; otherwise return ""."""
    run_code = "+".join(recorded_arguments(folder).get("code", ["unknown"]))
    current_code = provenance.code_digest(script)
    return "" if run_code == current_code else f"other code ({run_code} then, {current_code} now)"


def print_finished(folder: Path, script: str) -> None:
    """Print that there is nothing to do, and whether the code has changed since the run."""
    if code := other_code(folder, script):
        print(
            f"{folder} is finished, by {code}: nothing to do; to run the code as it is now, "
            "choose another --out, and a --tag to name it in tables"
        )
    else:
        print(f"{folder} is finished: nothing to do")


def claim(folder: Path, arguments: dict[str, Any], script: str) -> dict[str, Any]:
    """Lock `folder` and record in it the experiment's arguments and the digest of the code.

    Removes temporary files of killed processes, and prints a line if an interrupted run resumes
    under other code. Returns what the run's files record: `code`, all digests joined by +, and
    `commit`. Raises UserError when another process is working in the folder, or has used it for
    another experiment.
    """
    folder = Path(folder)
    _lock(folder)
    try:
        is_finished(folder, arguments)  # raises if another command has used the folder meanwhile
    except UserError:
        _unlock(folder)
        raise
    checkpoint.remove(folder.glob(".*.tmp"))
    stamp = provenance.stamp(script)
    codes = recorded_arguments(folder).get("code", [])
    if codes and codes[-1] != stamp["code"]:
        tqdm.write(f"{folder} resumes under other code ({codes[-1]} then, {stamp['code']} now)")
    if codes[-1:] != [stamp["code"]]:
        codes = [*codes, stamp["code"]]
        checkpoint.save_json(arguments | {"code": codes}, folder / "arguments.json")
    return stamp | {"code": "+".join(codes)}


def _lock(folder: Path) -> None:
    """Lock a folder until this process ends; the system releases the lock if it dies.

    Child processes do not inherit an fcntl lock: data workers can outlive a killed process.
    """
    path = folder / ".lock"
    if RANK or path in _locks:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder} is in use by {path.read_text().strip()}: wait for it") from None
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
    **extra: Any,
) -> None:
    """Write log.csv and, last, result.json: arguments, last metrics, code and machine, `extra`."""
    checkpoint.save_csv(rows, folder / "log.csv")
    seconds = sum(row.get("seconds", 0) for row in rows)
    result = {"stage": stage, "arguments": arguments, "seconds": seconds, **metrics(rows[-1])}
    result |= extra | stamp | provenance.environment(device)
    result["command"] = shlex.join(["python", *sys.argv])
    checkpoint.save_json(result, folder / "result.json")
    _unlock(folder)
    # Last, so that after a kill before this point the run is not trained again.
    checkpoint.remove([folder / "resume.pt"])


def metrics(row: dict[str, Any]) -> dict[str, float | None]:
    """Losses and accuracies of an epoch; None for NaN and inf, which JSON cannot represent."""
    values = {key: value for key, value in row.items() if key.startswith(("train_", "test_"))}
    return {key: value if math.isfinite(value) else None for key, value in values.items()}
