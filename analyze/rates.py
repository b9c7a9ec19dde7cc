"""Rates of training and of what else analyze.benchmark measures, each run once to warm up and then timed."""

import contextlib
import copy
import io
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from analyze.plain import BATCH, PilImages, plain_epoch, plain_loader
from common import checkpoint, masking
from common.data import Resident
from common.masking import Mask
from common.models import build_model
from common.parallel import run_all
from common.training import pick_precision, train

SPARSITY = 0.9
SETUP = 300  # seconds that networks side by side wait for the slowest to have its first epoch behind it
THREADS = torch.get_num_threads()  # of a measurement on a CPU
Rate = Callable[[], float]  # runs something twice; how much of it a second, the second time


def random_images(count: int, size: int, device: torch.device) -> Resident:
    """Noise in the shape of a small-image set, with a test set too small to matter."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count + 8, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (count + 8,), generator=generator)
    pad = size // 8
    description = {"classes": 10, "mean": [0.5] * 3, "std": [0.25] * 3}
    parts = (F.pad(images[8:], (pad,) * 4), labels[8:], images[:8], labels[:8])
    return Resident(*(part.to(device) for part in parts), pad, True, description)


def network(name: str, width: float, size: int, seed: int = 0) -> nn.Module:
    return build_model(name, width, 1000 if name == "resnet50" else 10, (3, size, size), seed)


def magnitude_mask(model: nn.Module) -> Mask:
    state = model.state_dict()
    whole = masking.dense_mask(state, masking.prunable(model))
    return masking.prune_by_magnitude(state, whole, masking.keep_count(masking.size(whole), SPARSITY))


def flops(model: nn.Module, size: int) -> float:
    """Floating-point operations of a training step, an image: forward and backward, a multiply-add as two."""
    model, images = copy.deepcopy(model), torch.randn(2, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    return counter.get_total_flops() / len(images)


def timed(work: float, run: Callable[[], Any]) -> float:
    """`work` by the seconds that a second call of `run` takes."""
    for _ in range(2):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return work / (time.perf_counter() - start)


def measured(rate: Rate, device: torch.device) -> float:
    """The rate, on a CPU in a process of its own, so that neither way works in memory that another left in pieces.

    This process must have kept to one thread, as threads do not survive a fork. Raises RuntimeError when that process fails.
    """
    if device.type != "cpu":
        return rate()
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def child() -> None:
        torch.set_num_threads(THREADS)
        results.put(rate())

    process = context.Process(target=child)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError("a measurement failed: see above")
    return results.get()


def training_rate(
    models: list[nn.Module], data: Resident, batch: int = BATCH, mask: Mask | None = None, parallel: str | None = None,
    compiled: bool = False,
) -> float:  # fmt: skip
    """Images a second of all `models` together, in the second of two epochs; the first sets everything up.

    The learning rate is 0, which costs what any other does and cannot diverge on images that nothing can be learned from.
    No state is kept after an epoch, which would weigh much in a short one. Side by side they start
    their second epochs together, so that none is measured while it has the device to itself.
    """
    precision, images = pick_precision(None, data.device), data.steps(batch) * batch
    together = multiprocessing.get_context("fork").Barrier(len(models) if parallel else 1)

    def run(model: nn.Module, result: Path) -> None:
        ends: list[float] = []

        def at_epoch(epoch: int) -> None:
            ends.append(time.perf_counter())  # one clock for all processes
            if epoch == 1:
                together.wait(SETUP)

        try:
            rows = train(
                copy.deepcopy(model), data, [0.0] * 2, name="benchmark", folder=None, seed=0, batch_size=batch, momentum=0.9,
                weight_decay=5e-4, precision=precision, mask=mask, at_epoch=at_epoch, compiled=compiled, progress=False,
            )  # fmt: skip
        except BaseException:
            together.abort()  # the others need not wait
            raise
        checkpoint.save_json([ends[1] - rows[1]["seconds"], ends[1]], result)

    with tempfile.TemporaryDirectory() as place:
        results = [Path(place) / f"{number}.json" for number in range(len(models))]
        with contextlib.redirect_stdout(io.StringIO()):  # here, because it holds for all threads
            run_all({str(file): partial(run, model, file) for model, file in zip(models, results)}, parallel, 1, data)
        starts, ends = zip(*(json.loads(file.read_text()) for file in results))
    seconds = max(ends) - min(starts) if parallel else sum(ends) - sum(starts)
    return len(models) * images / seconds


def plain_rate(width: float, data: Resident, mask: Mask | None = None) -> float:
    """Images a second of the plain way: masks are hooks of torch.nn.utils.prune."""
    model = network("resnet20", width, data.input_shape[-1]).to(data.device)
    for name, entry in (mask or {}).items():
        module, _, parameter = name.rpartition(".")
        prune.custom_from_mask(model.get_submodule(module), parameter, entry.to(data.device))
    loader = plain_loader(PilImages(data))
    return timed(data.steps(BATCH) * BATCH, lambda: plain_epoch(model, loader, data.device))


def stacked_rate(models: list[nn.Module], data: Resident) -> float:
    """Images a second of all `models` together, their parameters stacked and the step mapped over them by vmap."""
    device, base = data.device, models[0]
    dtype = torch.bfloat16 if pick_precision(None, device) == "bf16" else torch.float32
    for model in models:
        model.to(device)
    parameters, buffers = stack_module_state(models)
    momenta = {name: torch.zeros_like(value) for name, value in parameters.items()}

    def cast(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # vmap knows no autocast of BatchNorm
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}

    def loss(weights: dict, statistics: dict, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = functional_call(base, (cast(weights), cast(statistics)), (images.to(dtype),))
        return F.cross_entropy(logits.float(), labels)

    step = vmap(grad_and_value(loss))
    draws = [data.draw(seed, 0) for seed in range(len(models))]

    def epoch() -> None:
        for start in range(0, data.steps(BATCH) * BATCH, BATCH):
            batches = [data.batch(draw, slice(start, start + BATCH)) for draw in draws]
            gradients, _ = step(parameters, buffers, *(torch.stack(part) for part in zip(*batches)))
            with torch.no_grad():
                for name, value in parameters.items():
                    momenta[name].mul_(0.9).add_(gradients[name] + 5e-4 * value)
                    value.sub_(0.02 * momenta[name])

    return timed(len(models) * data.steps(BATCH) * BATCH, epoch)
