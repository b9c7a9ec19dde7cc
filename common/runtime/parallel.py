"""Several runs side by side: processes of one thread on a CPU, threads with a stream each on a GPU.

Runs share nothing but the data, which nobody writes, so each gives the same numbers in any company.
"""

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

from common.data import Resident, Streamed
from common.errors import UserError, explain
from common.runtime import distributed, resume

CLOSED = 141  # exit code where nobody reads what is printed, as of `| head`
MOST_STREAMS = 32  # that CUDA hands out before it hands out the first again

Run = Callable[[], None]
Data = Resident | Streamed


def run_all(runs: dict[str, Run], asked: str | None, width: float, data: Data) -> None:
    """Call each of `runs`, by folder, one after the other or side by side as `--parallel` asks."""
    if distributed.WORLD_SIZE > 1 and asked is not None:
        several = "--parallel trains several networks on one GPU"
        raise UserError(f"{several}, and torchrun one network on several: choose one")
    with resume.signals_end_steps():
        if asked is None:
            for folder, run in runs.items():
                run()
                print(f"wrote {folder}")
        else:
            side_by_side(runs, pick_count(asked, len(runs), width, data), data.device)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_count(asked: str, runs: int, width: float, data: Data) -> int:
    """How many runs go side by side: as asked; `auto`: about one a core, or what fills a GPU."""
    if asked != "auto":
        count = int(asked)
    elif data.device.type == "cpu":
        # Few runs share a few cores, rather than leave some idle at the end.
        count = runs if runs < 2 * cores() <= 8 else cores()
    else:
        # A step of ResNet20 x1 on small images uses a small part of a GPU, one of x16 all of it.
        count = round(16 / width) if isinstance(data, Resident) else 1
    return max(1, min(count, runs, MOST_STREAMS))


def side_by_side(runs: dict[str, Run], count: int, device: torch.device) -> None:
    """Call each of `runs`, `count` at a time; one that fails stops no other.

    Raises UserError when runs ended in what the user can mend, and RuntimeError when one had a bug,
    after all others have ended.
    """
    failed = (_in_processes if device.type == "cpu" else _in_threads)(runs, count, device)
    if resume.stopping.is_set():
        raise KeyboardInterrupt
    if CLOSED in failed.values():
        raise BrokenPipeError
    bugs = [name for name, code in failed.items() if code not in (2, -signal.SIGKILL)]
    if failed:
        names = ", ".join(bugs or failed)
        line = f"{len(failed)} of {len(runs)} runs failed ({names}): see above; the same command "
        raise (RuntimeError if bugs else UserError)(line + "does them again")


def _in_processes(runs: dict[str, Run], count: int, device: torch.device) -> dict[str, int]:
    """Exit codes of the runs that failed, by name; forked, so that the data are held once."""
    context = multiprocessing.get_context("fork")
    waiting, running, failed = list(runs.items()), {}, {}

    def child(name: str, run: Run) -> None:
        # On Linux, a run does not outlive the command.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        # Whatever the count, so that it changes no bit.
        torch.set_num_threads(1)
        # Its own: if it were killed while it held a common one, all others would wait for ever.
        tqdm.set_lock(threading.RLock())
        os._exit(_outcome(name, run))

    bar = tqdm(total=len(runs), unit="run", disable=None, leave=False, dynamic_ncols=True)
    try:
        while waiting or running:
            while waiting and len(running) < count:
                name, run = waiting.pop(0)
                process = context.Process(target=child, args=(name, run))
                process.start()
                running[process.sentinel] = name, process
            if resume.stopping.is_set():
                waiting.clear()
                for _, process in running.values():
                    process.terminate()  # after its step
            for sentinel in multiprocessing.connection.wait(list(running), timeout=1):
                name, process = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    failed[name] = process.exitcode
                if process.exitcode < 0:  # it could not say so itself
                    ended = signal.Signals(-process.exitcode)
                    why = ", as when memory runs out: train fewer side by side"
                    why *= ended == signal.SIGKILL
                    print(f"{name}: error: ended by {ended.name}{why}", file=sys.stderr)
                bar.update()
    finally:
        bar.close()
        for _, process in running.values():
            process.terminate()
    return failed


def _in_threads(runs: dict[str, Run], count: int, device: torch.device) -> dict[str, int]:
    """Exit codes of the runs that failed, by name; each thread has a stream of the GPU."""

    def prepare() -> None:
        torch.set_num_threads(1)  # or each would have a team of all cores, in the way of the others
        if device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream(device))

    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the data were written on another stream
    with ThreadPoolExecutor(count, initializer=prepare) as pool:
        codes = dict(zip(runs, pool.map(_outcome, runs, runs.values())))
    return {name: code for name, code in codes.items() if code}


def _outcome(name: str, run: Run) -> int:
    """Call a run; its exit code, after the reason for it was printed."""
    if resume.stopping.is_set():
        return 130
    try:
        try:
            run()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return CLOSED
    except Exception as error:
        line = explain(error)
        told = f"{name}: error: {line}" if line else f"{name}:\n{traceback.format_exc()}"
        print(told, file=sys.stderr)
        return 2 if line else 1
    return 0
