"""Several runs in parallel: single-threaded processes on a CPU, threads with CUDA streams on a GPU.

Runs share only the data, which they do not modify, so that none changes the numbers of another.
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

BROKEN_PIPE = 141  # exit code when the reader of stdout has closed it, e.g. `| head`
MAX_STREAMS = 32  # size of PyTorch's pool of CUDA streams

Run = Callable[[], None]
Data = Resident | Streamed


def run_all(runs: dict[str, Run], parallel: str | None, width: float, data: Data) -> None:
    """Call each of `runs` (folder -> function), sequentially or as `--parallel` says.

    Raises UserError for `--parallel` under torchrun, and what `run_in_parallel` raises.
    """
    if distributed.WORLD_SIZE > 1 and parallel is not None:
        raise UserError(
            "--parallel trains several networks on one GPU, torchrun one network on several: "
            "choose one"
        )
    with resume.stop_on_signals():
        if parallel is None:
            for folder, run in runs.items():
                run()
                print(f"wrote {folder}")
        else:
            run_in_parallel(runs, pick_count(parallel, len(runs), width, data), data.device)


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_count(parallel: str, runs: int, width: float, data: Data) -> int:
    """How many of `runs` to train at a time; `auto`: about one per core, or what fills a GPU."""
    if parallel != "auto":
        count = int(parallel)
    elif data.device.type == "cpu":
        # A few runs on a few cores all start at once: no core idles at the end.
        count = runs if runs < 2 * cores() <= 8 else cores()
    else:
        # On small images, ResNet20 x1 uses a small part of a GPU, ResNet20 x16 all of it.
        count = round(16 / width) if isinstance(data, Resident) else 1
    return max(1, min(count, runs, MAX_STREAMS))


def run_in_parallel(runs: dict[str, Run], count: int, device: torch.device) -> None:
    """Call each of `runs`, `count` at a time; a failure does not stop the others.

    After all have ended, raises RuntimeError if a run had a bug, or else UserError if one failed.
    """
    failed = (_in_processes if device.type == "cpu" else _in_threads)(runs, count, device)
    if resume.stop_requested.is_set():
        raise KeyboardInterrupt
    if BROKEN_PIPE in failed.values():
        raise BrokenPipeError
    bugs = [name for name, code in failed.items() if code not in (2, -signal.SIGKILL)]
    if failed:
        names = ", ".join(bugs or failed)
        summary = f"{len(failed)} of {len(runs)} runs failed ({names})"
        kind = RuntimeError if bugs else UserError
        raise kind(f"{summary}: see above")


def _in_processes(runs: dict[str, Run], count: int, device: torch.device) -> dict[str, int]:
    """Fork a process per run, so that all share the data; return failed runs' exit codes."""
    context = multiprocessing.get_context("fork")
    pending, running, failed = list(runs.items()), {}, {}

    def run_child(name: str, run: Run) -> None:
        # On Linux, end this process when its parent dies (PR_SET_PDEATHSIG).
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        # Independent of `count`, so that results are bit-identical.
        torch.set_num_threads(1)
        # Not the shared lock: if a process were killed holding it, the others would deadlock.
        tqdm.set_lock(threading.RLock())
        os._exit(_exit_code(name, run))

    bar = tqdm(total=len(runs), unit="run", disable=None, leave=False, dynamic_ncols=True)
    try:
        while pending or running:
            while pending and len(running) < count:
                name, run = pending.pop(0)
                process = context.Process(target=run_child, args=(name, run))
                process.start()
                running[process.sentinel] = name, process
            if resume.stop_requested.is_set():
                pending.clear()
                for _, process in running.values():
                    process.terminate()  # ends after its step
            for sentinel in multiprocessing.connection.wait(list(running), timeout=1):
                name, process = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    failed[name] = process.exitcode
                if process.exitcode < 0:  # killed by a signal, without a message
                    sent = signal.Signals(-process.exitcode)
                    hint = ", as when memory runs out: run fewer in parallel"
                    hint *= sent == signal.SIGKILL
                    print(f"{name}: error: killed by {sent.name}{hint}", file=sys.stderr)
                bar.update()
    finally:
        bar.close()
        for _, process in running.values():
            process.terminate()
    return failed


def _in_threads(runs: dict[str, Run], count: int, device: torch.device) -> dict[str, int]:
    """Call the runs in threads, each with its own CUDA stream; return failed ones' exit codes."""

    def initialise_thread() -> None:
        torch.set_num_threads(1)  # otherwise each thread starts an OpenMP team of all cores
        if device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream(device))

    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the data were copied on another stream
    with ThreadPoolExecutor(count, initializer=initialise_thread) as pool:
        codes = dict(zip(runs, pool.map(_exit_code, runs, runs.values())))
    return {name: code for name, code in codes.items() if code}


def _exit_code(name: str, run: Run) -> int:
    """Call a run, print its error if any, and return its exit code."""
    if resume.stop_requested.is_set():
        return 130
    try:
        try:
            run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        return BROKEN_PIPE
    except (Exception, KeyboardInterrupt) as error:
        if resume.was_stopped(error):
            return 130
        line = explain(error)
        message = f"{name}: error: {line}" if line else f"{name}:\n{traceback.format_exc()}"
        print(message, file=sys.stderr)
        return 2 if line else 1
    return 0
