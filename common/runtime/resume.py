"""Saving the state of a run, and resuming from it."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import checkpoint
from common.errors import UserError
from common.models import check_fits
from common.runtime import distributed

SAVE_INTERVAL = 30  # minimum seconds between two saves of resume.pt at the ends of epochs
stop_requested = threading.Event()  # set by a signal: runs stop after their current step


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Let runs finish their step on SIGTERM, which schedulers send before they kill, or Ctrl-C.

    A second Ctrl-C interrupts at once.
    """

    def stop(number: int, _: Any) -> None:
        if stop_requested.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop_requested.set()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def was_stopped(error: BaseException) -> bool:
    """Whether a signal ended the run, perhaps by ending its data workers."""
    workers_ended = stop_requested.is_set() and "DataLoader worker" in str(error)
    return workers_ended or isinstance(error, KeyboardInterrupt)


def until_stopped(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield `batches`, at least one, until a signal comes, which discards the evaluation."""
    for batch in batches:
        yield batch
        if stop_requested.is_set():
            return


class Resume:
    """Saves a run's state to `folder`/resume.pt at intervals, and restores it if it exists.

    The state of a run `name` is its model, its optimiser, `rows` of metrics of the finished epochs,
    and of the current epoch: `step`, the number of steps done; `sums`, this rank's running sums of
    metrics; and `started`, its start time without the interruption. Raises UserError when the saved
    run had another precision or optimiser.
    """

    def __init__(
        self,
        folder: Path | None,
        name: str,
        precision: str,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        sums: Tensor,
        minutes: float,
    ):
        """`minutes`: time between two saves within an epoch."""
        self.path = folder / "resume.pt" if folder else None
        self.name, self.model, self.optimiser, self.sums = name, model, optimiser, sums
        self.setup = f"{precision} by {type(optimiser).__name__}"
        self.rows: list[dict[str, Any]] = []
        self.step, self.step_interval = 0, 60 * minutes
        self.last_save = self.started = time.perf_counter()
        if stop_requested.is_set():
            raise KeyboardInterrupt
        if self.path and self.path.is_file():
            self._load()

    def save_or_stop(self, step: int = 0, last: bool = False) -> None:
        """Save the state, `step` steps into an epoch, if due; raise KeyboardInterrupt on a signal.

        After the `last` epoch it always saves and never stops.
        """
        self.step, interval = step, self.step_interval if step else SAVE_INTERVAL
        due = last or time.perf_counter() - self.last_save > interval
        # Ranks save together, by the clock of rank 0. They all stop when a signal came to any of
        # them, because that rank may have skipped part of its evaluation.
        stop = stop_requested.is_set() and not last
        if distributed.WORLD_SIZE > 1:
            votes = distributed.all_gather(due, stop)
            due, stop = votes[0, 0], votes[:, 1].any()
        if self.path and (due or stop):
            self._write()
        if stop:
            raise KeyboardInterrupt

    def _write(self) -> None:
        weights = {key: value.cpu().contiguous() for key, value in self.model.state_dict().items()}
        state = {"name": self.name, "how": self.setup, "state_dict": weights}
        state |= {"optimiser": self.optimiser.state_dict()["state"], "rows": self.rows}
        state |= {"step": self.step, "sums": distributed.all_gather(*self.sums)}
        state["seconds"] = time.perf_counter() - self.started
        checkpoint.save(state, self.path)
        self.last_save = time.perf_counter()

    def _load(self) -> None:
        keys = ("name", "how", "state_dict", "optimiser", "rows", "step")
        try:
            state = checkpoint.load(self.path, keys)
        except UserError as error:
            tqdm.write(f"{self.name}  starts again: {error}")
            return
        if state["name"] != self.name:
            return
        if state["how"] != self.setup:
            difference = f"{self.path} was trained in {state['how']} and not {self.setup}"
            raise UserError(f"{difference}: go back to that, or remove the file to start again")
        check_fits(state["state_dict"], self.model, self.path, "the network as it is now")
        # Keep this run's param_groups, which a CUDA graph may read; load only the state.
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state["optimiser"], "param_groups": groups})
        for parameter, values in self.optimiser.state.items():
            for key, value in values.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    # In the weights' memory format: fused optimisers assume equal strides.
                    values[key] = torch.empty_like(parameter).copy_(value)
        self.rows, self.step = state["rows"], state["step"]
        done = [f"epoch {self.rows[-1]['epoch']}"] if self.rows else []
        if self.step:
            # Ranks split the saved sums, also when the world size has changed.
            self.sums.copy_(state["sums"][distributed.RANK :: distributed.WORLD_SIZE].sum(0))
            self.started -= state["seconds"]
            done.append(f"{self.step} steps")
        tqdm.write(f"{self.name}  resumes after {' and '.join(done)}")
