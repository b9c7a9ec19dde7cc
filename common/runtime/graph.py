"""Training steps captured as a CUDA graph, so that one launch replays a whole step."""

import contextlib
import itertools
import sys
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from common.data.resident import Resident

EAGER_STEPS = 3  # warm-up before the capture: libraries and optimisers allocate their state


def make_capturable(optimiser: torch.optim.Optimizer, device: torch.device) -> bool:
    """Prepare a torch.optim optimiser for capture; return whether it supports that.

    Its learning rate and step count become tensors on the device, which the graph reads.
    """
    groups = optimiser.param_groups
    is_sgd = isinstance(optimiser, torch.optim.SGD)
    if not is_sgd and any("capturable" not in group for group in groups):
        return False
    for group in groups:
        group["lr"] = torch.zeros((), device=device)
        if is_sgd:  # its other implementations read the learning rate on the host
            group["fused"], group["foreach"] = True, False
        else:
            group["capturable"] = True
    optimiser._warned_capturable_if_run_uncaptured = True  # the first steps are, deliberately
    return True


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Run the block on a side stream, as CUDA cannot capture the default stream."""
    default = torch.cuda.default_stream(device)
    if torch.cuda.current_stream(device) != default:  # parallel runs have their own streams
        yield
        return
    side = torch.cuda.Stream(device)
    side.wait_stream(default)
    with torch.cuda.stream(side):
        yield
    default.wait_stream(side)


@contextlib.contextmanager
def separate_generator_state(device: torch.device) -> Iterator[None]:
    """Give the device's default generator a separate state within the block.

    Up to torch 2.12, a capture marks the generator's state as capturing for all threads. In torch
    2.6 they can then replay no graph, even one that draws no random numbers.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    previous = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    finally:
        generator.graphsafe_set_state(previous)


class GraphedStep:
    """A training step on resident data: runs eagerly a few times, is captured, then replayed.

    The graph reads the order and augmentation of the epoch, and the positions of the batch, from
    static tensors. A capture computes nothing, so there is no state to restore.
    """

    # Threads warm up and capture one at a time: torch.compile synchronises the device to time
    # kernels, which fails, and breaks the capture, while any stream is capturing. Replays go on.
    setup_lock = threading.Lock()
    capture_failed = False  # torch 2.6 to 2.12 can capture nothing after a failed capture

    def __init__(
        self,
        step: Callable[[Tensor, Tensor], None],
        data: Resident,
        batch_size: int,
        generator: torch.Generator | None = None,
    ):
        """`generator`: the CUDA generator that the step draws from, if any."""
        self.data, self.batch_size, self.steps = data, batch_size, data.steps(batch_size)
        self.plan = data.plan_epoch(0, 0)
        self.positions = torch.arange(batch_size, device=data.device)
        self.step, self.calls, self.replay = step, 0, self._step
        self.generator = generator

    def start(self, seed: int, epoch: int, first_step: int = 0) -> Iterator[tuple]:
        """Go to a step of an epoch; return an empty batch for each of its remaining steps."""
        for static, new in zip(self.plan, self.data.plan_epoch(seed, epoch)):
            static.copy_(new)
        first = first_step * self.batch_size
        torch.arange(first, first + self.batch_size, out=self.positions)
        return itertools.repeat((), self.steps - first_step)

    def __call__(self) -> None:
        with self.setup_lock if self.calls <= EAGER_STEPS else contextlib.nullcontext():
            if self.calls == EAGER_STEPS and not GraphedStep.capture_failed:
                self.replay = self._capture()
            self.calls += 1
            self.replay()

    def _step(self) -> None:
        self.step(*self.data.batch(self.plan, self.positions))
        self.positions.add_(self.batch_size).remainder_(self.steps * self.batch_size)

    def _capture(self) -> Callable[[], None]:
        """Capture the step; return the graph's replay, or the eager step if the capture fails."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.data.device)
        if self.generator:
            graph.register_generator_state(self.generator)
        torch.cuda.synchronize(self.data.device)
        try:
            with (
                separate_generator_state(self.data.device),
                torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
            ):
                self._step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # e.g. a step that synchronises with the host
            # Ending a failed capture raises another error, whose context is the cause.
            cause = str(error.__context__ or error).partition("\n")[0]
            tqdm.write(f"no CUDA graph, so training is slower: {cause}", file=sys.stderr)
            GraphedStep.capture_failed = True
            if self.generator:  # up to torch 2.12 its state stays marked as capturing
                self.generator.graphsafe_set_state(self.generator.clone_state())
            return self._step
        return graph.replay
