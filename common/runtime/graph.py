"""A training step on a GPU as one CUDA graph, which a single launch replays."""

import contextlib
import itertools
import sys
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from common.data.resident import Resident

EAGER_STEPS = 3  # before the capture, in which libraries and optimisers set up what they need


def capturable(optimiser: torch.optim.Optimizer, device: torch.device) -> bool:
    """Make the steps of any optimiser of torch.optim that allows it capturable; whether it does.

    The graph reads the learning rate and the step count from tensors on the device.
    """
    groups = optimiser.param_groups
    if not isinstance(optimiser, torch.optim.SGD) and any("capturable" not in g for g in groups):
        return False
    for group in groups:
        group["lr"] = torch.zeros((), device=device)
        if "capturable" in group:
            group["capturable"] = True
    return True


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Nothing can be captured on the default stream: leave it, and let it wait in the end."""
    default = torch.cuda.default_stream(device)
    if torch.cuda.current_stream(device) != default:  # networks side by side have streams already
        yield
        return
    side = torch.cuda.Stream(device)
    side.wait_stream(default)
    with torch.cuda.stream(side):
        yield
    default.wait_stream(side)


@contextlib.contextmanager
def own_default_generator(device: torch.device) -> Iterator[None]:
    """Within it the device's default generator has a state that nobody else has.

    Up to torch 2.12 that state says for all threads that something is being captured, and in torch
    2.6 no graph can then be replayed, whether it draws or not.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    before = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    finally:
        generator.graphsafe_set_state(before)


class GraphedStep:
    """A training step on resident data, captured once a few steps have run, and replayed then.

    The graph reads the order and augmentation of the epoch, and the place in it, from tensors of
    its own. Capturing computes nothing, so that there is nothing to restore.
    """

    # One sets up or captures at a time: to wait for the whole device, as the compiler does to time
    # kernels, fails while any stream is capturing, and breaks that. Replays go on meanwhile.
    alone = threading.Lock()
    broken = False  # torch 2.6 to 2.12 can capture nothing more once a capture has failed

    def __init__(
        self,
        step: Callable[[Tensor, Tensor], None],
        data: Resident,
        batch_size: int,
        generator: torch.Generator | None = None,
    ):
        """`generator`: of what the step draws at random on the device, if it does."""
        self.data, self.batch_size, self.steps = data, batch_size, data.steps(batch_size)
        self.draw = data.draw(0, 0)
        self.rows = torch.arange(batch_size, device=data.device)
        self.step, self.calls, self.replay = step, 0, self._step
        self.generator = generator

    def start(self, seed: int, epoch: int, first_step: int = 0) -> Iterator[tuple]:
        """Set the tensors to a step of an epoch; an empty batch for it and each that follows."""
        for held, drawn in zip(self.draw, self.data.draw(seed, epoch)):
            held.copy_(drawn)
        first = first_step * self.batch_size
        torch.arange(first, first + self.batch_size, out=self.rows)
        return itertools.repeat((), self.steps - first_step)

    def __call__(self) -> None:
        with self.alone if self.calls <= EAGER_STEPS else contextlib.nullcontext():
            if self.calls == EAGER_STEPS and not GraphedStep.broken:
                self.replay = self._capture()
            self.calls += 1
            self.replay()

    def _step(self) -> None:
        self.step(*self.data.batch(self.draw, self.rows))
        self.rows.add_(self.batch_size).remainder_(self.steps * self.batch_size)

    def _capture(self) -> Callable[[], None]:
        """Capture the step; returns what replays it, or the step itself where that fails."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.data.device)
        if self.generator:
            graph.register_generator_state(self.generator)
        torch.cuda.synchronize(self.data.device)
        try:
            with (
                own_default_generator(self.data.device),
                torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
            ):
                self._step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # an edited step may ask the device for a value
            # The end of a broken capture raises in turn: the cause is in the context.
            cause = str(error.__context__ or error).partition("\n")[0]
            tqdm.write(f"no CUDA graph of a step, which is slower: {cause}", file=sys.stderr)
            GraphedStep.broken = True
            if self.generator:  # up to torch 2.12 it takes itself to be capturing for ever
                self.generator.graphsafe_set_state(self.generator.clone_state())
            return self._step
        return graph.replay
