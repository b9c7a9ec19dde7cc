"""The one training loop, evaluation, and learning-rate schedules."""

import contextlib
import ctypes
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from common import checkpoint
from common.data import Batches, Resident, Streamed
from common.errors import UserError
from common.masking import Mask, Masker


def pick_device(name: str | None) -> torch.device:
    """The named device, or CUDA where there is one; raises UserError when it is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {name!r} is not available here ({str(error).splitlines()[0]}): try --device cpu"
        ) from error
    torch.backends.cudnn.deterministic = True  # the same numbers on every run
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Let this process reuse freed activations instead of handing them back to the system, where libc is glibc.

    Faulting large blocks in anew for every layer costs nearly half of a forward pass on a CPU.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # of <malloc.h>
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc: nothing is lost but speed
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)


def pick_precision(name: str | None, device: torch.device) -> str:
    """The named precision, or bf16 where the hardware is fast at it and fp32 elsewhere."""
    if name is not None:
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bf16" if fast else "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def learning_rates(schedule: str, lr: float, epochs: int, warmup: int = 0) -> list[float]:
    """The learning rate of each epoch: `cosine` from lr to 0, or `step` down to a tenth every 30 epochs.

    A linear warm-up raises it to lr over the first `warmup` epochs.
    """
    rates = []
    for epoch in range(epochs):
        factor = 0.5 * (1 + math.cos(math.pi * epoch / epochs)) if schedule == "cosine" else 0.1 ** (epoch // 30)
        rates.append(lr * factor * min(1.0, (epoch + 1) / max(warmup, 1)))
    return rates


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, precision: str = "fp32") -> tuple[float, float]:
    """Mean cross-entropy in nats and accuracy in percent, in evaluation mode."""
    model.eval()
    loss = correct = count = 0
    for images, labels in batches:
        with autocast(images.device, precision):
            logits = model(images).float()
        loss += F.cross_entropy(logits, labels, reduction="sum").double()
        correct += (logits.argmax(1) == labels).sum()
        count += len(labels)
    return float(loss) / count, 100 * float(correct) / count


def cpu_state(model: nn.Module) -> dict[str, Tensor]:
    """A contiguous copy of the state dict on the CPU, as checkpoints hold it."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}


def train(
    model: nn.Module,
    data: Resident | Streamed,
    rates: list[float],
    *,
    name: str,
    folder: Path,
    seed: int,
    batch_size: int,
    momentum: float,
    weight_decay: float,
    precision: str,
    first_epoch: int = 0,
    mask: Mask | None = None,
    at_epoch: Callable[[int], Any] = lambda epoch: None,
) -> list[dict[str, Any]]:
    """Train `model` in place by SGD, one epoch for every learning rate in `rates`; return a row of metrics an epoch.

    Epochs count from `first_epoch`, and `at_epoch(k)` is called after k epochs. With a mask, the masked weights
    are zero before and after every step, and every epoch checks it. After each epoch the state goes to
    `folder`/resume.pt, from where the run called `name` goes on if it is cut off; the caller removes it in the end.
    Raises RuntimeError when a pruned weight is not zero.
    """
    device, last = data.device, first_epoch + len(rates)
    model.to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(
        model.parameters(),
        lr=0.0,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=False,
        fused=device.type in ("cuda", "cpu"),
    )
    masker = Masker(model, mask) if mask is not None else None
    rows = _resume(folder, name, model, optimiser, precision)
    if masker:
        masker.apply()
    steps = data.steps(batch_size)
    progress = tqdm(
        total=len(rates) * steps * batch_size, initial=len(rows) * steps * batch_size, desc=name, unit="img", unit_scale=True,
        disable=None, leave=False, dynamic_ncols=True,
    )  # fmt: skip
    for epoch in range(first_epoch + len(rows), last):
        start = time.perf_counter()
        for group in optimiser.param_groups:
            group["lr"] = rates[epoch - first_epoch]
        model.train()
        # Summed on the device: reading a number here would make the host wait at every step.
        loss_sum, correct = (torch.zeros((), device=device) for _ in range(2))
        for images, labels in data.train_batches(batch_size, seed, epoch):
            with autocast(device, precision):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            if masker:
                masker.apply()
            loss_sum += loss.detach()
            correct += (logits.argmax(1) == labels).sum()
            progress.update(batch_size)
        if masker:
            masker.check()
        test_loss, test_acc = evaluate(model, data.eval_batches("test"), precision)
        row = {
            "epoch": epoch + 1,
            "lr": rates[epoch - first_epoch],
            "train_loss": float(loss_sum) / steps,
            "train_acc": 100 * float(correct) / (steps * batch_size),
            "test_loss": test_loss,
            "test_acc": test_acc,
            "seconds": time.perf_counter() - start,
        }
        rows.append(row)
        at_epoch(epoch + 1)
        state = {"name": name, "precision": precision, "state_dict": cpu_state(model)}
        state |= {"optimiser": optimiser.state_dict(), "rows": rows}
        checkpoint.save(state, folder / "resume.pt")
        progress.set_postfix(test_acc=f"{test_acc:.2f}", test_loss=f"{test_loss:.3f}")
        tqdm.write(
            f"{name}  epoch {epoch + 1:3d}/{last}  lr {row['lr']:.4f}  train loss {row['train_loss']:.3f} acc {row['train_acc']:5.2f}%"
            f"  test loss {test_loss:.3f} acc {test_acc:5.2f}%  {row['seconds']:6.1f} s  {steps * batch_size / row['seconds']:7,.0f} img/s"
        )
    progress.close()
    return rows


def _resume(
    folder: Path, name: str, model: nn.Module, optimiser: torch.optim.Optimizer, precision: str
) -> list[dict[str, Any]]:
    """Load the state of an earlier run of this name into model and optimiser; return its rows, or none.

    Raises UserError when that run was of another precision, as a mixture would be no experiment.
    """
    path = Path(folder) / "resume.pt"
    if not path.is_file():
        return []
    try:
        state = checkpoint.load(path, ("name", "precision", "state_dict", "optimiser", "rows"))
    except UserError as error:
        tqdm.write(f"{name}  starts again: {error}")
        return []
    if state["name"] != name:
        return []
    if state["precision"] != precision:
        raise UserError(f"{path} was trained in {state['precision']} and not {precision}: set --precision or remove it")
    model.load_state_dict(state["state_dict"])
    optimiser.load_state_dict(state["optimiser"])
    tqdm.write(f"{name}  goes on after epoch {state['rows'][-1]['epoch']}")
    return state["rows"]
