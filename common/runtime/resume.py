"""The state of a run that is cut off, and how it goes on."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from common import checkpoint
from common.errors import UserError
from common.runtime import distributed

EVERY = 30  # seconds between two writings of resume.pt
stopping = threading.Event()  # set by SIGTERM: runs stop after their epoch


@contextlib.contextmanager
def sigterm_ends_epochs() -> Iterator[None]:
    """Within it SIGTERM, as a scheduler sends it ahead of the end, lets runs finish their epoch."""
    before = signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Resume:
    """Writes a run's state to `folder`/resume.pt now and then; `rows` are those that it took up.

    The state of an earlier run called `name` is loaded into model and optimiser. Raises UserError
    when that was of another precision or optimiser, as a mixture would be no experiment.
    """

    def __init__(
        self,
        folder: Path | None,
        name: str,
        precision: str,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
    ):
        self.path = Path(folder) / "resume.pt" if folder else None
        self.name, self.model, self.optimiser = name, model, optimiser
        self.how = f"{precision} by {type(optimiser).__name__}"
        self.rows: list[dict[str, Any]] = []
        self.saved = time.perf_counter()
        if stopping.is_set():
            raise KeyboardInterrupt
        if self.path and self.path.is_file():
            self._load()

    def save(self, last: bool) -> None:
        """Write the state if it is due, or after the last epoch; stop where SIGTERM came."""
        # Several processes write together, when the clock of the first says so.
        stop = distributed.agree(stopping.is_set() and not last)
        due = distributed.agree(last or stop or time.perf_counter() - self.saved > EVERY)
        if self.path and due:
            self._write()
        if stop:
            raise KeyboardInterrupt

    def _write(self) -> None:
        weights = {key: value.cpu().contiguous() for key, value in self.model.state_dict().items()}
        state = {"name": self.name, "how": self.how, "state_dict": weights}
        state |= {"optimiser": self.optimiser.state_dict()["state"], "rows": self.rows}
        checkpoint.save(state, self.path)
        self.saved = time.perf_counter()

    def _load(self) -> None:
        keys = ("name", "how", "state_dict", "optimiser", "rows")
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
        self.model.load_state_dict(state["state_dict"])
        # The settings are this run's, as a graph may need them; the rest is the file's.
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state["optimiser"], "param_groups": groups})
        for parameter, kept in self.optimiser.state.items():
            for key, value in kept.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    # In the layout of the weights: fused optimisers pair them by memory.
                    kept[key] = torch.empty_like(parameter).copy_(value)
        self.rows = state["rows"]
        tqdm.write(f"{self.name}  goes on after epoch {self.rows[-1]['epoch']}")
