"""Several runs side by side: processes of one thread on a CPU, threads with a stream each on a GPU.

Runs share nothing but the data, which nobody writes, so each gives the same numbers in any company.
"""

import contextlib
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from common.errors import UserError

Run = Callable[[], None]


def pick_count(asked: str, runs: int, width: float, device: torch.device) -> int:
    """How many runs go side by side: the number asked for, or for `auto` one a core, on a GPU as many as fill it."""
    if asked != "auto":
        count = int(asked)
    elif device.type == "cpu":
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    else:
        count = round(16 / width)  # a step of ResNet20 x1 uses a small part of a GPU, one of x16 all of it
    return max(1, min(count, runs))


def run_all(runs: dict[str, Run], asked: str | None, width: float, device: torch.device) -> None:
    """Call each of `runs`, one after the other, or side by side as `--parallel` asks."""
    if asked is None:
        for run in runs.values():
            run()
    else:
        side_by_side(runs, pick_count(asked, len(runs), width, device), device)


def side_by_side(runs: dict[str, Run], count: int, device: torch.device) -> None:
    """Call each of `runs`, `count` at a time; one that fails stops no other.

    Raises UserError when runs ended in one, and RuntimeError when one had a bug, after all others have ended.
    """
    failed = (_in_processes if device.type == "cpu" else _in_threads)(runs, count, device)
    bugs = [name for name, code in failed.items() if code != 2]
    if failed:
        kind = RuntimeError if bugs else UserError
        raise kind(f"{len(failed)} of {len(runs)} runs failed ({', '.join(bugs or failed)}): see above; the same command does them again")  # fmt: skip


def _in_processes(runs: dict[str, Run], count: int, device: torch.device) -> dict[str, int]:
    """Exit codes of the runs that failed, by name. Forked, so that the data are read once and held once."""
    context = multiprocessing.get_context("fork")
    slots, failed = threading.Semaphore(count), {}

    def child(name: str, run: Run) -> None:
        torch.set_num_threads(1)  # of any count, so that the number of runs side by side changes no bit
        os._exit(_outcome(name, run))

    def watch(name: str, process: multiprocessing.Process) -> None:
        process.join()
        if process.exitcode:
            failed[name] = process.exitcode
        slots.release()

    watchers = []
    for name, run in runs.items():
        slots.acquire()
        process = context.Process(target=child, args=(name, run), daemon=True)
        process.start()
        watchers.append(threading.Thread(target=watch, args=(name, process)))
        watchers[-1].start()
    for watcher in watchers:
        watcher.join()
    return failed


def _in_threads(runs: dict[str, Run], count: int, device: torch.device) -> dict[str, int]:
    """Exit codes of the runs that failed, by name. Kernels of different streams share the GPU."""

    def work(name: str, run: Run) -> int:
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            return _outcome(name, run)

    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the data were written on another stream
    with ThreadPoolExecutor(count) as pool:
        codes = dict(zip(runs, pool.map(work, runs, runs.values())))
    return {name: code for name, code in codes.items() if code}


def _outcome(name: str, run: Run) -> int:
    """Call a run; its exit code, after the reason for it was printed."""
    try:
        run()
    except UserError as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception:
        print(f"{name}:\n{traceback.format_exc()}", file=sys.stderr)
        return 1
    finally:
        sys.stdout.flush(), sys.stderr.flush()
    return 0
