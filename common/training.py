"""The one training loop, evaluation, and learning-rate schedules."""

import contextlib
import ctypes
import itertools
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from common import checkpoint, distributed, onednn
from common.data import Batches, Resident, Streamed
from common.errors import UserError
from common.masking import Mask, Masker

TRIALS = 3  # of a step, before it is captured
SLOW = 1.0  # seconds; a resume.pt that takes longer is not written after every epoch,
SHARE = 0.05  # but so often that it takes this part of the time
CHANCE = 0.97  # of the loss of guessing: a run that ends above has learned next to nothing


class Diverged(UserError):
    """Weights became NaN or infinite; `rows` are the run's rows of metrics, up to the epoch of that."""

    def __init__(self, name: str, rows: list[dict[str, Any]]):
        super().__init__(
            f"{name} diverged in epoch {rows[-1]['epoch']}, its weights are NaN or infinite: "
            "try a smaller --lr or more --warmup"
        )
        self.rows = rows


def pick_device(name: str | None) -> torch.device:
    """The named device, or CUDA where there is one, and each process's own GPU; raises UserError when it is not there."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # or networks side by side share 8 queues to the GPU
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = distributed.own(torch.device(name))
        torch.zeros(1, device=device).cpu()
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # for what asks for no device, as torch.cuda.synchronize
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {name!r} is not available here ({str(error).splitlines()[0]}): try --device cpu"
        ) from error
    torch.backends.cudnn.deterministic = True  # the same numbers on every run
    if device.type == "cpu":
        keep_freed_memory()
    distributed.join(device)
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


@contextlib.contextmanager
def computing(model: nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """For forward passes of `model`, in fp32 or, where that is safe, in bf16."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        with onednn.Blocked() if _blocked(model, device, precision) else contextlib.nullcontext():
            yield


def _blocked(model: nn.Module, device: torch.device, precision: str) -> bool:
    return device.type == "cpu" and precision == "bf16" and onednn.suits(model)


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
def evaluate(model: nn.Module, batches: Batches, precision: str = "fp32", top: tuple[int, ...] = ()) -> list[float]:
    """Mean cross-entropy in nats and accuracy in percent, in evaluation mode, over the batches of all processes.

    For every k in `top` also how often, in percent, the label is among the k largest logits.
    """
    model.eval()
    loss = correct = count = 0
    among = [0] * len(top)
    for images, labels in batches:
        with computing(model, images.device, precision):
            logits = model(images).float()
        loss += F.cross_entropy(logits, labels, reduction="sum").double()
        correct += (logits.argmax(1) == labels).sum()
        for place, k in enumerate(top):
            among[place] += (logits.topk(min(k, logits.shape[1])).indices == labels[:, None]).sum()
        count += len(labels)
    count, loss, *right = distributed.total(count, loss, correct, *among)
    return [loss / count, *(100 * hits / count for hits in right)]


def cpu_state(model: nn.Module) -> dict[str, Tensor]:
    """A contiguous copy of the state dict on the CPU, as checkpoints hold it."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}


def train(
    model: nn.Module,
    data: Resident | Streamed,
    rates: list[float],
    *,
    name: str,
    folder: Path | None,
    seed: int,
    batch_size: int,
    momentum: float,
    weight_decay: float,
    precision: str,
    first_epoch: int = 0,
    mask: Mask | None = None,
    at_epoch: Callable[[int], Any] = lambda epoch: None,
    compiled: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train `model` in place by SGD, one epoch for every learning rate in `rates`; return a row of metrics an epoch.

    Epochs count from `first_epoch`, and `at_epoch(k)` is called after k epochs. With a mask, the masked weights
    are zero before and after every step, and every epoch checks it. After each epoch the state goes to
    `folder`/resume.pt (after fewer where writing is slow), from where the run called `name` goes on if it is cut off; the caller removes it in the end.
    On CUDA a step on resident data is one captured graph, and the host waits for the device once an epoch only.
    Raises RuntimeError when a pruned weight is not zero, Diverged when a weight is not finite after an epoch, and
    UserError when `compiled` finds no compiler.
    """
    if compiled and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise UserError("--compile needs a C++ compiler, and none is here: install g++ or leave --compile out")
    device, last = data.device, first_epoch + len(rates)
    graphed = device.type == "cuda" and isinstance(data, Resident) and distributed.PROCESSES == 1
    forward = torch.compile(model) if compiled else model
    blocked = _blocked(forward, device, precision)
    model.to(device, memory_format=torch.contiguous_format if blocked else torch.channels_last)
    forward = distributed.spread(forward, device)
    optimiser = torch.optim.SGD(
        model.parameters(),
        lr=torch.zeros((), device=device) if graphed else 0.0,  # a tensor is read by the graph at every step
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=False,
        fused=device.type in ("cuda", "cpu"),
    )
    for parameter in model.parameters():
        optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    masker = Masker(model, mask) if mask is not None else None
    rows = _resume(folder, name, model, optimiser, precision) if folder else []
    if masker:
        masker.apply()
    loss_sum, correct = (torch.zeros((), device=device) for _ in range(2))  # summed on the device, read once an epoch

    def step(images: Tensor, labels: Tensor) -> None:
        with computing(forward, device, precision):
            logits = forward(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if masker:
            masker.apply()
        loss_sum.add_(loss.detach())
        correct.add_((logits.argmax(1) == labels).sum())

    model.train()
    steps = data.steps(batch_size)
    top = (5,) if data.description.get("name") == "imagenet" else ()
    if graphed:
        changed = [*model.state_dict().values(), *(s["momentum_buffer"] for s in optimiser.state.values())]
        step = GraphedStep(step, data, batch_size, [*changed, loss_sum, correct])
    bar = tqdm(
        total=len(rates) * steps * batch_size, initial=len(rows) * steps * batch_size, desc=name, unit="img", unit_scale=True,
        disable=None if progress and distributed.RANK == 0 else True, leave=False, dynamic_ncols=True,
    )  # fmt: skip
    took, saved = 0.0, time.perf_counter()  # the last writing of resume.pt: seconds, and when it ended
    for epoch in range(first_epoch + len(rows), last):
        start = time.perf_counter()
        _set_rate(optimiser, rates[epoch - first_epoch])
        model.train()
        loss_sum.zero_(), correct.zero_()
        for batch in step.start(seed, epoch) if graphed else data.train_batches(batch_size, seed, epoch):
            step(*batch)
            bar.update(batch_size)
        if masker:
            masker.check()
        test_loss, test_acc, *test_top = evaluate(model, data.eval_batches("test"), precision, top)
        loss, right = distributed.total(loss_sum, correct)
        row = {
            "epoch": epoch + 1,
            "lr": rates[epoch - first_epoch],
            "train_loss": loss / (steps * distributed.PROCESSES),
            "train_acc": 100 * right / (steps * batch_size),
            "test_loss": test_loss,
            "test_acc": test_acc,
            **{f"test_top{k}": value for k, value in zip(top, test_top)},
            "seconds": time.perf_counter() - start,
        }
        rows.append(row)
        if not nn.utils.get_total_norm(model.parameters(), math.inf).isfinite():
            bar.close()
            raise Diverged(name, rows)
        at_epoch(epoch + 1)
        begin = time.perf_counter()
        if folder and (epoch + 1 == last or _due(took, begin - saved)):
            state = {"name": name, "precision": precision, "state_dict": cpu_state(model)}
            state |= {"optimiser": optimiser.state_dict(), "rows": rows}
            checkpoint.save(state, folder / "resume.pt")
            saved = time.perf_counter()
            took = saved - begin
        bar.set_postfix(test_acc=f"{test_acc:.2f}", test_loss=f"{test_loss:.3f}")
        tqdm.write(
            f"{name}  epoch {epoch + 1:3d}/{last}  lr {row['lr']:.4f}  train loss {row['train_loss']:.3f} acc {row['train_acc']:5.2f}%"
            f"  test loss {test_loss:.3f} acc {test_acc:5.2f}%  {row['seconds']:6.1f} s  {steps * batch_size / row['seconds']:7,.0f} img/s"
        )
    bar.close()
    guessing = math.log(data.description["classes"])
    if rows and rows[-1]["train_loss"] > CHANCE * guessing:
        tqdm.write(
            f"{name}  ends at chance: train loss {rows[-1]['train_loss']:.3f}, and guessing has {guessing:.3f}: "
            "try another --lr, more --warmup or more --epochs"
        )
    optimiser.zero_grad(set_to_none=True)  # gradients lie in the memory of the graph, which can go now
    return rows


def _due(took: float, since: float) -> bool:
    """Whether to write resume.pt: yes, unless it `took` long the last time, which is too few seconds ago.

    Several processes write it together and would not agree on times, so they write it always.
    """
    return took < SLOW or SHARE * since > took or distributed.PROCESSES > 1


def _set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class GraphedStep:
    """A training step on resident data as one CUDA graph, which a single launch replays.

    The graph reads the order and augmentation of the epoch, and the place in it, from tensors of its own. `changed` are the
    tensors that a step changes: trying it out before it is captured must leave no trace.
    """

    capturing = threading.Lock()  # one capture at a time, whatever other runs do meanwhile

    def __init__(self, step: Callable[[Tensor, Tensor], None], data: Resident, batch_size: int, changed: list[Tensor]):
        self.data, self.batch_size, self.steps = data, batch_size, data.steps(batch_size)
        self.draw = data.draw(0, 0)
        self.rows = torch.arange(batch_size, device=data.device)

        def whole() -> None:
            step(*data.batch(self.draw, self.rows))
            self.rows.add_(batch_size).remainder_(self.steps * batch_size)

        with torch.no_grad():
            before = [value.clone() for value in changed]
        with self.capturing:
            self.replay = _capture(whole, data.device)
        with torch.no_grad():
            for value, kept in zip(changed, before):
                value.copy_(kept)

    def start(self, seed: int, epoch: int) -> Iterator[tuple]:
        """Set the tables to the start of an epoch; an empty batch for each step of it."""
        for mine, drawn in zip(self.draw, self.data.draw(seed, epoch)):
            mine.copy_(drawn)
        torch.arange(self.batch_size, out=self.rows)
        return itertools.repeat((), self.steps)

    def __call__(self) -> None:
        self.replay()


def _capture(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Call `work` a few times and then capture it as a CUDA graph; returns what replays it, or `work` where that fails."""
    current = torch.cuda.current_stream(device)
    # No graph may hold what libraries do at first, nor be captured on the default stream; a run side by side has its own.
    side = torch.cuda.Stream(device) if current == torch.cuda.default_stream(device) else current
    side.wait_stream(current)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        for _ in range(TRIALS):
            work()
        torch.cuda.synchronize(device)  # what follows may be on the default stream again
        try:
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # an edited step may ask the device for a value
            cause = str(error.__context__ or error).partition("\n")[0]  # the end of a broken capture raises in turn
            tqdm.write(
                f"steps are launched one by one, which is slower: no CUDA graph of them ({cause})", file=sys.stderr
            )
            return work
    return graph.replay


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
    rates = [group["lr"] for group in optimiser.param_groups]
    optimiser.load_state_dict(state["optimiser"])
    for group, rate in zip(optimiser.param_groups, rates):
        group["lr"] = rate  # on its device
    # Into the layout of the weights, which the file may not have: fused SGD pairs them by their place in memory.
    for parameter in model.parameters():
        kept = optimiser.state[parameter]
        kept["momentum_buffer"] = torch.empty_like(parameter).copy_(kept["momentum_buffer"])
    tqdm.write(f"{name}  goes on after epoch {state['rows'][-1]['epoch']}")
    return state["rows"]
