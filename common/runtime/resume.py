"""The state of a run that is cut off, and how it goes on."""

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

EVERY = 30  # seconds between two writings of resume.pt at the ends of epochs
stopping = threading.Event()  # set by a signal: runs stop after their step


@contextlib.contextmanager
def signals_end_steps() -> Iterator[None]:
    """Within it SIGTERM, as a scheduler sends it ahead of the end, and Ctrl-C let runs finish their
    step; a second Ctrl-C ends them at once.
    """

    def stop(number: int, _: Any) -> None:
        if stopping.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopping.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def until_stopped(batches: Iterator[Any]) -> Iterator[Any]:
    """The first of `batches`, and more until a signal comes: an evaluation that nobody will see."""
    for batch in batches:
        yield batch
        if stopping.is_set():
            return


class Resume:
    """Writes a run's state to `folder`/resume.pt now and then, also within an epoch.

    The state of an earlier run called `name` is taken up: model, optimiser, `rows` of the epochs
    that it finished, and of the one after those `step`, how many steps are done, `sums`, of which
    this process has its part, and `started`, when it would have begun without a break. Raises
    UserError when that was of another precision or optimiser, as a mixture would be no experiment.
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
        """`minutes` are those between two writings within an epoch."""
        self.path = folder / "resume.pt" if folder else None
        self.name, self.model, self.optimiser, self.sums = name, model, optimiser, sums
        self.how = f"{precision} by {type(optimiser).__name__}"
        self.rows: list[dict[str, Any]] = []
        self.step, self.within = 0, 60 * minutes
        self.saved = self.started = time.perf_counter()
        if stopping.is_set():
            raise KeyboardInterrupt
        if self.path and self.path.is_file():
            self._load()

    def save_or_stop(self, step: int = 0, last: bool = False) -> None:
        """Write the state, `step` steps into an epoch, if it is due; stop where a signal came.

        After the `last` epoch it is due, and nothing is left to be stopped.
        """
        self.step, every = step, self.within if step else EVERY
        due = last or time.perf_counter() - self.saved > every
        # Several processes write together, when the clock of the first says so, and stop when a
        # signal came to any: that one may have left its evaluation.
        stop = stopping.is_set() and not last
        if distributed.WORLD_SIZE > 1:
            asked = distributed.gathered(due, stop)
            due, stop = asked[0, 0], asked[:, 1].any()
        if self.path and (due or stop):
            self._write()
        if stop:
            raise KeyboardInterrupt

    def _write(self) -> None:
        weights = {key: value.cpu().contiguous() for key, value in self.model.state_dict().items()}
        state = {"name": self.name, "how": self.how, "state_dict": weights}
        state |= {"optimiser": self.optimiser.state_dict()["state"], "rows": self.rows}
        state |= {"step": self.step, "sums": distributed.gathered(*self.sums)}
        state["seconds"] = time.perf_counter() - self.started
        checkpoint.save(state, self.path)
        self.saved = time.perf_counter()

    def _load(self) -> None:
        keys = ("name", "how", "state_dict", "optimiser", "rows", "step")
        try:
            state = checkpoint.load(self.path, keys)
        except UserError as error:
            tqdm.write(f"{self.name}  starts again: {error}")
            return
        if state["name"] != self.name:
            return
        if state["how"] != self.how:
            other = f"{self.path} was trained in {state['how']} and not {self.how}"
            raise UserError(f"{other}: go back to that, or remove the file to start again")
        check_fits(state["state_dict"], self.model, self.path, "the network as it is now")
        # The settings are this run's, as a graph may need them; the rest is the file's.
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state["optimiser"], "param_groups": groups})
        for parameter, kept in self.optimiser.state.items():
            for key, value in kept.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    # In the layout of the weights: fused optimisers pair them by memory.
                    kept[key] = torch.empty_like(parameter).copy_(value)
        self.rows, self.step = state["rows"], state["step"]
        done = [f"epoch {self.rows[-1]['epoch']}"] if self.rows else []
        if self.step:
            # Also where other processes than these had summed.
            self.sums.copy_(state["sums"][distributed.RANK :: distributed.WORLD_SIZE].sum(0))
            self.started -= state["seconds"]
            done.append(f"{self.step} steps")
        tqdm.write(f"{self.name}  goes on after {' and '.join(done)}")
