"""The one training loop, evaluation, and learning-rate schedules."""

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from common.data import Batches, Resident, Streamed, derived_seed
from common.errors import UserError
from common.masking import Mask, Masker
from common.runtime import distributed, graph
from common.runtime.device import autocast, in_onednn_layout
from common.runtime.resume import Resume, until_stopped

BAR = {"unit": "img", "unit_scale": True, "leave": False, "dynamic_ncols": True}
CHANCE = 0.97  # of the loss of guessing: a run that ends above it has learned next to nothing

# By the name that --schedule takes: the factor of the learning rate in an epoch, of so many.
SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "cosine": lambda epoch, epochs: 0.5 * (1 + math.cos(math.pi * epoch / epochs)),
    "step": lambda epoch, epochs: 0.1 ** (epoch // 30),
}

MakeOptimiser = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Augment = Callable[[Tensor, torch.Generator], Tensor]
LossFn = Callable[[Tensor, Tensor], Tensor]


class Diverged(UserError):
    """Weights became NaN or infinite; `rows` are the run's rows of metrics, up to that epoch."""

    def __init__(self, name: str, rows: list[dict[str, Any]]):
        where = f"{name} diverged in epoch {rows[-1]['epoch']}, its weights are NaN or infinite"
        super().__init__(f"{where}: try a smaller --lr or more --warmup")
        self.rows = rows


def learning_rates(schedule: str, lr: float, epochs: int, warmup: int = 0) -> list[float]:
    """The learning rate of each epoch, lr times the factor of a schedule.

    A linear warm-up raises it to that over the first `warmup` epochs. Raises ValueError when the
    schedule gives what is no learning rate.
    """
    warm = [min(1.0, (epoch + 1) / max(warmup, 1)) for epoch in range(epochs)]
    rates = [lr * SCHEDULES[schedule](epoch, epochs) * warm[epoch] for epoch in range(epochs)]
    if not all(0 <= rate < math.inf for rate in rates):
        raise ValueError(f"the schedule {schedule} gives rates below 0, NaN or inf: {rates}")
    return rates


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, top: tuple[int, ...] = (), precision: str = "fp32"
) -> list[float]:
    """Mean cross-entropy in nats and accuracy in percent, in evaluation mode, over all processes.

    For every k in `top` also how often, in percent, the label is among the k largest logits.
    """
    model.eval()
    count, loss, right = 0, 0, [0] * (1 + len(top))
    for images, labels in batches:
        with autocast(model, images.device, precision):
            logits = model(images).float()
        count += len(labels)
        loss += F.cross_entropy(logits, labels, reduction="sum").double()
        for place, k in enumerate((1, *top)):
            largest = logits.topk(min(k, logits.shape[1])).indices
            right[place] += (largest == labels[:, None]).sum()
    count, loss, *right = distributed.all_gather(count, loss, *right).sum(0).tolist()
    return [loss / count, *(100 * hits / count for hits in right)]


def cpu_state(model: nn.Module) -> dict[str, Tensor]:
    """A contiguous copy of the state dict on the CPU, as checkpoints hold it."""
    state = model.state_dict().items()
    return {key: value.detach().cpu().contiguous().clone() for key, value in state}


def train(
    model: nn.Module,
    data: Resident | Streamed,
    rates: list[float],
    *,
    make_optimiser: MakeOptimiser,
    augment: Augment | None = None,
    loss_fn: LossFn = F.cross_entropy,
    name: str,
    folder: Path | None,
    seed: int,
    batch_size: int,
    precision: str,
    first_epoch: int = 0,
    mask: Mask | None = None,
    at_epoch: Callable[[int], Any] = lambda epoch: None,
    compiled: bool = False,
    progress: bool = True,
    checkpoint_minutes: float = 10,
) -> list[dict[str, Any]]:
    """Train `model` in place, one epoch for every learning rate in `rates`; return a row an epoch.

    `make_optimiser(parameters)` gives any optimiser of torch.optim; its learning rate is set here.
    `augment(images, generator)` changes a batch of cropped, mirrored and normalised images, in the
    same shape, at random by a generator on their device, which depends on seed, epoch and step.
    `loss_fn(logits, labels)` gives a batch's mean; evaluation is by cross-entropy in any case.
    Epochs count from `first_epoch`, and `at_epoch(k)` is called after k epochs. With a mask, the
    masked weights are zero before and after every step, and every epoch checks it. The state goes
    to `folder`/resume.pt at the ends of epochs and, within one, every `checkpoint_minutes`; the run
    called `name` goes on from there if it is cut off, and the caller removes it in the end. On CUDA
    a step on resident data is one captured graph. `progress` shows a bar and a line an epoch, not
    the last alone.

    Raises RuntimeError when a pruned weight is not zero, Diverged when a weight is not finite
    after an epoch, and UserError when `compiled` finds no compiler.
    """
    device, last = data.device, first_epoch + len(rates)
    forward = prepared(model, device, precision, compiled)
    optimiser = make_optimiser(model.parameters())
    graphed = device.type == "cuda" and isinstance(data, Resident) and distributed.WORLD_SIZE == 1
    graphed = graphed and graph.make_capturable(optimiser, device)
    masker = Masker(model, mask or {})
    # Summed on the device and read once an epoch, so that the host does not wait at every step.
    sums = torch.zeros(2, device=device)
    loss_sum, correct = sums
    resume = Resume(folder, name, precision, model, optimiser, sums, checkpoint_minutes)
    rows = resume.rows
    masker.apply()
    generator = torch.Generator(device) if augment else None

    def step(images: Tensor, labels: Tensor) -> None:
        if augment:
            images = augmented(augment, images, generator)
        with autocast(forward, device, precision):
            logits = forward(images)
        loss = loss_fn(logits.float(), labels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        masker.apply()
        loss_sum.add_(loss.detach(), alpha=len(labels))
        correct.add_((logits.argmax(1) == labels).sum())

    steps = data.steps(batch_size)
    images = steps * batch_size
    top = (5,) if data.description["name"] == "imagenet" else ()
    if graphed:
        step = graph.GraphedStep(step, data, batch_size, generator)
    done = len(rows) * images + resume.step * batch_size
    hidden = None if progress and distributed.RANK == 0 else True  # None: where nobody looks
    bar = tqdm(desc=name, initial=done, total=len(rates) * images, disable=hidden, **BAR)
    with bar, graph.side_stream(device) if graphed else contextlib.nullcontext():
        for epoch in range(first_epoch + len(rows), last):
            rate = rates[epoch - first_epoch]
            set_rate(optimiser, rate)
            model.train()
            if resume.step == 0:
                resume.started = time.perf_counter()
                sums.zero_()
            start = seed, epoch, resume.step
            batches = step.start(*start) if graphed else data.train_batches(batch_size, *start)
            for number, batch in enumerate(batches, resume.step + 1):
                if augment:
                    generator.manual_seed(derived_seed(seed, epoch, number))
                step(*batch)
                bar.update(batch_size)
                resume.save_or_stop(number)
            masker.check()
            # Final numbers in fp32, as analyses have them: no tie of rounded logits decides.
            exact = "fp32" if epoch + 1 == last else precision
            test = evaluate(model, until_stopped(data.eval_batches("test")), top, exact)
            resume.save_or_stop(steps)
            row = {"epoch": epoch + 1, "lr": rate} | epoch_metrics(sums, images, test)
            row["seconds"] = time.perf_counter() - resume.started
            rows.append(row)
            if not nn.utils.get_total_norm(model.parameters(), math.inf).isfinite():
                raise Diverged(name, rows)
            at_epoch(epoch + 1)
            resume.save_or_stop(last=epoch + 1 == last)
            bar.set_postfix(test_acc=f"{row['test_acc']:.2f}", test_loss=f"{row['test_loss']:.3f}")
            if progress:
                tqdm.write(describe(name, row, last, images))
    if not progress and rows:  # of a run beside others; its epochs are in log.csv
        tqdm.write(describe(name, rows[-1], last, images))
    warn_at_chance(name, rows, data.description["classes"])
    optimiser.zero_grad(set_to_none=True)  # gradients lie in the memory of the graph
    return rows


def prepared(model: nn.Module, device: torch.device, precision: str, compiled: bool) -> nn.Module:
    """Lay `model` out on `device`; the module that trains it, compiled or of several processes."""
    if compiled and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise UserError("--compile needs a C++ compiler: install g++ or leave --compile out")
    forward = torch.compile(model) if compiled else model
    onednn_layout = in_onednn_layout(forward, device, precision)
    layout = torch.contiguous_format if onednn_layout else torch.channels_last
    model.to(device, memory_format=layout)
    return distributed.data_parallel(forward, device)


def epoch_metrics(sums: Tensor, images: int, test: list[float]) -> dict[str, float]:
    """Of an epoch of `images` images, from what `sums` has of each process, and of the test set."""
    loss, right = distributed.all_gather(*sums).sum(0).tolist()
    row = {"train_loss": loss / images, "train_acc": 100 * right / images}
    return row | dict(zip(("test_loss", "test_acc", "test_top5"), test))


def augmented(augment: Augment, images: Tensor, generator: torch.Generator) -> Tensor:
    """`augment(images, generator)`; raises ValueError when that is not as many such images."""
    new = augment(images, generator)
    if new.shape != images.shape or new.dtype != images.dtype:
        raise ValueError(
            f"{getattr(augment, '__name__', augment)} made {tuple(new.shape)} {new.dtype} "
            f"of images {tuple(images.shape)} {images.dtype}: it must keep both"
        )
    return new


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group, in place where it is a tensor of a graph."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def describe(name: str, row: dict[str, Any], last: int, images: int) -> str:
    """The line that an epoch of `images` images prints."""
    return (
        f"{name}  epoch {row['epoch']:3d}/{last}  lr {row['lr']:.4f}"
        f"  train loss {row['train_loss']:.3f} acc {row['train_acc']:5.2f}%"
        f"  test loss {row['test_loss']:.3f} acc {row['test_acc']:5.2f}%"
        f"  {row['seconds']:6.1f} s  {images / row['seconds']:7,.0f} img/s"
    )


def warn_at_chance(name: str, rows: list[dict[str, Any]], classes: int) -> None:
    """Print a line when a run ends with the loss of guessing."""
    guessing = math.log(classes)
    if rows and rows[-1]["train_loss"] > CHANCE * guessing:
        tqdm.write(
            f"{name}  has hardly learned: train loss {rows[-1]['train_loss']:.3f}, and guessing "
            f"has {guessing:.3f}: try another --lr, more --warmup or more --epochs"
        )
