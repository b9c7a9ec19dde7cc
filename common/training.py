"""The training loop of all stages, evaluation, and learning-rate schedules."""

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

TQDM_OPTIONS = {"unit": "img", "unit_scale": True, "leave": False, "dynamic_ncols": True}
CHANCE_FRACTION = 0.97  # of the loss at chance level, above which a run has not learned

# Choices of --schedule: f(epoch, epochs) -> factor of the learning rate; epochs count from 0.
SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "cosine": lambda epoch, epochs: 0.5 * (1 + math.cos(math.pi * epoch / epochs)),
    "step": lambda epoch, epochs: 0.1 ** (epoch // 30),
}

MakeOptimiser = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Augment = Callable[[Tensor, torch.Generator], Tensor]
LossFn = Callable[[Tensor, Tensor], Tensor]


class Diverged(UserError):
    """Weights became NaN or infinite; `rows` holds the metrics up to and including that epoch."""

    def __init__(self, name: str, rows: list[dict[str, Any]]):
        event = f"{name} diverged in epoch {rows[-1]['epoch']}, its weights are NaN or infinite"
        super().__init__(f"{event}: try a smaller --lr or more --warmup")
        self.rows = rows


def learning_rates(schedule: str, lr: float, epochs: int, warmup: int = 0) -> list[float]:
    """Return the learning rate of each epoch: `lr` times the factor of the schedule.

    The first `warmup` epochs are scaled by a linear warm-up. Raises ValueError when the schedule
    gives a negative, infinite or NaN rate.
    """
    factors = [min(1.0, (epoch + 1) / max(warmup, 1)) for epoch in range(epochs)]
    rates = [lr * SCHEDULES[schedule](epoch, epochs) * factors[epoch] for epoch in range(epochs)]
    if not all(0 <= rate < math.inf for rate in rates):
        raise ValueError(f"the schedule {schedule} gives rates below 0, NaN or inf: {rates}")
    return rates


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, topk: tuple[int, ...] = (), precision: str = "fp32"
) -> list[float]:
    """Return mean cross-entropy (nats), accuracy (percent) and top-k accuracy for each k in `topk`.

    Puts the model in evaluation mode; sums over all processes.
    """
    model.eval()
    count, loss, correct = 0, 0, [0] * (1 + len(topk))
    for images, labels in batches:
        with autocast(model, images.device, precision):
            logits = model(images).float()
        count += len(labels)
        loss += F.cross_entropy(logits, labels, reduction="sum").double()
        for index, k in enumerate((1, *topk)):
            predictions = logits.topk(min(k, logits.shape[1])).indices
            correct[index] += (predictions == labels[:, None]).sum()
    count, loss, *correct = distributed.all_gather(count, loss, *correct).sum(0).tolist()
    return [loss / count, *(100 * hits / count for hits in correct)]


def cpu_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a contiguous copy of the state dict on the CPU, as saved in checkpoints."""
    entries = model.state_dict().items()
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in entries}


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
    """Train `model` in place, one epoch per learning rate in `rates`; return a row per epoch.

    `make_optimiser(parameters)` returns a torch.optim optimiser; its learning rate is set here.
    `augment(images, generator)` transforms a batch of cropped, flipped and normalised images and
    keeps its shape; the generator is on their device and seeded by seed, epoch, step and
    rank.
    `loss_fn(logits, labels)` returns the mean of a batch; evaluation always uses cross-entropy.
    Epochs count from `first_epoch`; `at_epoch(k)` is called after k epochs.
    With a mask, pruned weights are zero before and after every step, which every epoch checks.
    The state is saved to `folder`/resume.pt after epochs and every `checkpoint_minutes`. The next
    call with the same `name` resumes from it; the caller removes the file at the end.
    On CUDA a step on resident data is captured as one CUDA graph.
    `progress` shows a bar and prints every epoch, otherwise only the last one.

    Raises RuntimeError when a pruned weight is not zero, Diverged when a weight is not finite
    after an epoch, and UserError when `compiled` is set and there is no C++ compiler.
    """
    device, last_epoch = data.device, first_epoch + len(rates)
    forward = prepare_model(model, device, precision, compiled)
    optimiser = make_optimiser(model.parameters())
    graphed = device.type == "cuda" and isinstance(data, Resident) and distributed.WORLD_SIZE == 1
    graphed = graphed and graph.make_capturable(optimiser, device)
    masker = Masker(model, mask or {})
    # Summed on the device and read once per epoch, to avoid a synchronisation in every step.
    sums = torch.zeros(2, device=device)
    loss_sum, correct = sums
    resume = Resume(folder, name, precision, model, optimiser, sums, checkpoint_minutes)
    rows = resume.rows
    masker.apply()
    generator = torch.Generator(device) if augment else None

    def train_step(images: Tensor, labels: Tensor) -> None:
        if augment:
            images = apply_augment(augment, images, generator)
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
    epoch_images = steps * batch_size
    topk = (5,) if data.description["name"] == "imagenet" else ()
    if graphed:
        train_step = graph.GraphedStep(train_step, data, batch_size, generator)
    images_done = len(rows) * epoch_images + resume.step * batch_size
    total = len(rates) * epoch_images
    # With disable=None tqdm shows the bar on terminals only.
    disable = None if progress and distributed.RANK == 0 else True
    bar = tqdm(desc=name, initial=images_done, total=total, disable=disable, **TQDM_OPTIONS)
    with bar, graph.side_stream(device) if graphed else contextlib.nullcontext():
        for epoch in range(first_epoch + len(rows), last_epoch):
            rate = rates[epoch - first_epoch]
            set_learning_rate(optimiser, rate)
            model.train()
            if resume.step == 0:
                resume.started = time.perf_counter()
                sums.zero_()
            start = seed, epoch, resume.step
            if graphed:
                batches = train_step.start(*start)
            else:
                batches = data.train_batches(batch_size, *start)
            for step, batch in enumerate(batches, resume.step + 1):
                if augment:
                    generator.manual_seed(derived_seed(seed, epoch, step, distributed.RANK))
                train_step(*batch)
                bar.update(batch_size)
                resume.save_or_stop(step)
            masker.check()
            # The last epoch is evaluated in fp32, as in the analyses: bf16 logits can tie.
            test_precision = "fp32" if epoch + 1 == last_epoch else precision
            test_batches = until_stopped(data.eval_batches("test"))
            test = evaluate(model, test_batches, topk, test_precision)
            resume.save_or_stop(steps)
            row = {"epoch": epoch + 1, "lr": rate} | epoch_metrics(sums, epoch_images, test)
            row["seconds"] = time.perf_counter() - resume.started
            rows.append(row)
            if not nn.utils.get_total_norm(model.parameters(), math.inf).isfinite():
                raise Diverged(name, rows)
            at_epoch(epoch + 1)
            resume.save_or_stop(last=epoch + 1 == last_epoch)
            bar.set_postfix(test_acc=f"{row['test_acc']:.2f}", test_loss=f"{row['test_loss']:.3f}")
            if progress:
                tqdm.write(format_epoch(name, row, last_epoch, epoch_images))
    if not progress and rows:
        tqdm.write(format_epoch(name, rows[-1], last_epoch, epoch_images))
    warn_at_chance(name, rows, data.description["classes"])
    optimiser.zero_grad(set_to_none=True)  # frees gradients in the CUDA graph's memory
    return rows


def prepare_model(
    model: nn.Module, device: torch.device, precision: str, compiled: bool
) -> nn.Module:
    """Move `model` to `device`; return the module to train, compiled or data-parallel."""
    if compiled and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise UserError("--compile needs a C++ compiler: install g++ or leave --compile out")
    forward = torch.compile(model) if compiled else model
    onednn_layout = in_onednn_layout(forward, device, precision)
    layout = torch.contiguous_format if onednn_layout else torch.channels_last
    model.to(device, memory_format=layout)
    return distributed.data_parallel(forward, device)


def epoch_metrics(sums: Tensor, images: int, test: list[float]) -> dict[str, float]:
    """Name the metrics of an epoch on `images` images.

    `sums` holds loss and correct predictions of this process, `test` the result of `evaluate`.
    """
    loss, correct = distributed.all_gather(*sums).sum(0).tolist()
    row = {"train_loss": loss / images, "train_acc": 100 * correct / images}
    return row | dict(zip(("test_loss", "test_acc", "test_top5"), test))


def apply_augment(augment: Augment, images: Tensor, generator: torch.Generator) -> Tensor:
    """Return `augment(images, generator)`; raises ValueError if its shape or dtype differs."""
    augmented = augment(images, generator)
    if augmented.shape != images.shape or augmented.dtype != images.dtype:
        raise ValueError(
            f"{getattr(augment, '__name__', augment)} made {tuple(augmented.shape)} "
            f"{augmented.dtype} of images {tuple(images.shape)} {images.dtype}: it must keep both"
        )
    return augmented


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups; in place if a CUDA graph reads it."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def format_epoch(name: str, row: dict[str, Any], last_epoch: int, images: int) -> str:
    """Return the line to print for an epoch on `images` images."""
    return (
        f"{name}  epoch {row['epoch']:3d}/{last_epoch}  lr {row['lr']:.4f}"
        f"  train loss {row['train_loss']:.3f} acc {row['train_acc']:5.2f}%"
        f"  test loss {row['test_loss']:.3f} acc {row['test_acc']:5.2f}%"
        f"  {row['seconds']:6.1f} s  {images / row['seconds']:7,.0f} img/s"
    )


def warn_at_chance(name: str, rows: list[dict[str, Any]], classes: int) -> None:
    """Print a warning if the training loss is at chance level after the last epoch."""
    chance_loss = math.log(classes)
    if rows and rows[-1]["train_loss"] > CHANCE_FRACTION * chance_loss:
        tqdm.write(
            f"{name}  has hardly learned: train loss {rows[-1]['train_loss']:.3f}, chance level "
            f"{chance_loss:.3f}: try another --lr, more --warmup or more --epochs"
        )
