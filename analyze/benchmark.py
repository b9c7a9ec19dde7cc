"""How fast this code is against a standard PyTorch baseline, measured side by side in one run.

    python -m analyze.benchmark [--device cuda] [--out benchmark.csv]

Every row runs both in turn, several times, and prints the medians of the rates and the median of
the paired ratios. `training`: dense and masked networks, data included, against an fp32 NCHW loop
with PIL transforms in a DataLoader and torch.nn.utils.prune hooks (analyze/lib/baselines.py), and
what a mask costs. `parallel`: networks side by side against one after the other and against the
baseline. `line`: the line between two networks with REPAIR. `matching`: one pass against layer by
layer. `weights`: weight matching against its published algorithm. `large`, on a GPU: networks that
fill it, eager against --compile. The images are noise.
"""

import contextlib
import copy
import io
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from analyze.lib import baselines, lines
from common import checkpoint, cli, masking, provenance
from common.align.axes import find_axes
from common.align.matching import match_activations, match_weights, matched_weights
from common.data import Resident
from common.errors import UserError
from common.masking import Mask
from common.models import build_model
from common.runtime.device import pick_device, pick_precision
from common.runtime.parallel import pick_count, run_all
from common.training import train

PARTS = ("training", "parallel", "large", "line", "matching", "weights")
BATCH = 128
SGD = partial(torch.optim.SGD, lr=0.0, momentum=0.9, weight_decay=5e-4, fused=True)
SPARSITY = 0.9
SETUP = 300  # seconds that networks side by side wait for the slowest to end its first epoch
THREADS = torch.get_num_threads()  # of a measurement on a CPU

Rate = Callable[[], float]  # runs something twice; how much of it a second, the second time
Comparison = tuple[str, Rate, Rate, float]  # name, ours, baseline, operations an image


def random_images(count: int, size: int, device: torch.device) -> Resident:
    """Noise in the shape of a small-image set, with a test set too small to matter."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count + 8, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (count + 8,), generator=generator)
    pad = size // 8
    description = {"name": "random", "classes": 10, "mean": [0.5] * 3, "std": [0.25] * 3}
    parts = (F.pad(images[8:], (pad,) * 4), labels[8:], images[:8], labels[:8])
    return Resident(*(part.to(device) for part in parts), pad, True, description)


def network(name: str, width: float, size: int, seed: int = 0) -> nn.Module:
    return build_model(name, width, 10, (3, size, size), seed)


def random_mask(model: nn.Module) -> Mask:
    state = model.state_dict()
    return {name: torch.rand(state[name].shape) > SPARSITY for name in masking.prunable(model)}


def flops(model: nn.Module, size: int) -> float:
    """Floating-point operations of a training step, an image; a multiply-add is two."""
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(model)(torch.randn(2, 3, size, size)).sum().backward()
    return counter.get_total_flops() / 2


# ---------------------------------------------------------------- rates


def timed(work: float, run: Callable[[], Any]) -> float:
    """`work` by the seconds that a second call of `run` takes."""
    for _ in range(2):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return work / (time.perf_counter() - start)


def training_rate(
    models: list[nn.Module],
    data: Resident,
    batch: int = BATCH,
    mask: Mask | None = None,
    parallel: str | None = None,
    compiled: bool = False,
) -> float:
    """Images a second of all `models` together, in the second of two epochs; the first sets up.

    The learning rate is 0, which costs what any other does and cannot diverge on images that
    nothing can be learned from. Side by side the second epochs start together, so that none is
    measured while it has the device to itself. No state is kept, which would weigh much here.
    """
    fork = multiprocessing.get_context("fork")
    together, spans = fork.Barrier(len(models) if parallel else 1), fork.SimpleQueue()
    settings = {"make_optimiser": SGD, "batch_size": batch, "mask": mask, "seed": 0}
    settings |= {"precision": pick_precision(None, data.device), "compiled": compiled}
    settings |= {"name": "benchmark", "folder": None, "progress": False}

    def run(model: nn.Module) -> None:
        ends = []

        def at_epoch(epoch: int) -> None:
            ends.append(time.perf_counter())  # one clock for all processes
            if epoch == 1:
                together.wait(SETUP)

        rows = train(copy.deepcopy(model), data, [0.0, 0.0], at_epoch=at_epoch, **settings)
        spans.put((ends[1] - rows[1]["seconds"], ends[1]))

    runs = {str(number): partial(run, model) for number, model in enumerate(models)}
    with contextlib.redirect_stdout(io.StringIO()):  # here, because it holds for all threads
        run_all(runs, parallel, 1, data)
    starts, ends = zip(*(spans.get() for _ in models))
    seconds = max(ends) - min(starts) if parallel else sum(ends) - sum(starts)
    return len(models) * data.steps(batch) * batch / seconds


def baseline_rate(width: float, data: Resident, mask: Mask | None = None) -> float:
    """Images a second of the baseline's training; masks are hooks of torch.nn.utils.prune."""
    model = network("resnet20", width, data.input_shape[-1]).to(data.device)
    for name, entry in (mask or {}).items():
        module, _, parameter = name.rpartition(".")
        prune.custom_from_mask(model.get_submodule(module), parameter, entry.to(data.device))
    epoch = partial(baselines.train_epoch, model, baselines.loader(data, BATCH), data.device)
    return timed(data.steps(BATCH) * BATCH, epoch)


# ---------------------------------------------------------------- comparisons


def training(
    widths: list[float], size: int, steps: int, device: torch.device
) -> Iterator[Comparison]:
    for width in widths:
        data = random_images(max(1, round(steps / width)) * BATCH, size, device)
        model = network("resnet20", width, size)
        mask, work = random_mask(model), flops(model, size)
        about = f"training, resnet20 x{width:g}, {size} px"
        dense, masked = (partial(training_rate, [model], data, mask=one) for one in (None, mask))
        yield (f"dense {about}", dense, partial(baseline_rate, width, data), work)
        yield (f"masked {about}", masked, partial(baseline_rate, width, data, mask), work)
        yield (f"masked over dense {about}", masked, dense, 0)


def parallel(
    counts: list[int], size: int, steps: int, device: torch.device
) -> Iterator[Comparison]:
    data = random_images(steps * BATCH, size, device)
    models = [network("resnet20", 1, size, seed) for seed in range(max(counts))]
    mask, work, about = random_mask(models[0]), flops(models[0], size), f"resnet20 x1, {size} px"
    for count in counts:
        together = partial(training_rate, models[:count], data, parallel=str(count))
        alone = partial(training_rate, models[:2], data)
        name = f"{count} side by side over one after the other, {about}"
        yield (name, together, alone, work)
    for kind, one in (("dense", None), ("masked", mask)):
        name = f"{count} side by side, {kind}, {about}"
        baseline = partial(baseline_rate, 1, data, one)
        yield (name, partial(together, mask=one), baseline, work)


def large(device: torch.device) -> Iterator[Comparison]:
    """Whether --compile pays, and the arithmetic reached by networks that fill a GPU."""
    for name, width, size, batch in (
        ("resnet20", 1, 32, 128),
        ("resnet20", 16, 32, 128),
        ("vgg11", 1, 32, 128),
        ("resnet50", 1, 224, 256),
    ):
        data, model = random_images(20 * batch, size, device), network(name, width, size)
        eager = partial(training_rate, [model], data, batch)
        about = f"eager over --compile, {name} x{width:g}, {size} px, batch {batch}"
        yield (about, eager, partial(eager, compiled=True), flops(model, size))


def line(size: int, device: torch.device, images: int = 2000) -> Iterator[Comparison]:
    """Three points of a line, with and without REPAIR, on the same images as test and train."""
    data, alphas = random_images(images, size, device), (0.0, 0.5, 1.0)
    model, standard = (network("resnet20", 1, size, seed).to(device) for seed in (0, 1))
    ends = [copy.deepcopy(one.state_dict()) for one in (model, standard)]
    model.to(memory_format=torch.channels_last)
    batches = partial(data.eval_batches, "train")
    loader = baselines.loader(data, 250, train=False)
    runs = (
        partial(lines.metrics_along, model, *ends, alphas, batches, batches),
        partial(baselines.line_with_repair, standard, ends, alphas, loader, device),
    )
    rates = (partial(timed, 5 * len(alphas) * images, run) for run in runs)
    yield f"line with REPAIR, resnet20 x1, {size} px", *rates, 0


def matching(
    size: int, device: torch.device, name: str = "resnet20", images: int = 2000
) -> Iterator[Comparison]:
    """One pass against layer by layer."""
    data = random_images(images, size, device)
    pair = [network(name, 1, size, seed).to(device) for seed in (0, 1)]
    pair = [one.to(memory_format=torch.channels_last) for one in pair]
    axes = find_axes(pair[0], data.input_shape)

    def batches() -> Iterator[torch.Tensor]:
        return (x for x, _ in data.eval_batches("train", 250))

    def ours() -> None:
        match_activations(*pair, axes, batches())

    baseline = partial(baselines.match_layer_by_layer, *pair, axes, batches)
    rates = (partial(timed, images, run) for run in (ours, baseline))
    yield f"activation matching, {name} x1, {size} px, over layer by layer", *rates, 0


def weights(width: float, device: torch.device) -> Iterator[Comparison]:
    """From the same start, in the same order of axes; rates of whole matchings."""
    pair = [network("resnet20", width, 32, seed).to(device) for seed in (0, 1)]
    axes, names = find_axes(pair[0], (3, 32, 32)), matched_weights(pair[0])
    ends = [{name: one.state_dict()[name] for name in names} for one in pair]
    methods = (match_weights, baselines.match_weights_every_axis)
    rates = (partial(timed, 1, partial(method, *ends, axes)) for method in methods)
    yield f"weight matching, resnet20 x{width:g}, over the published algorithm", *rates, 0


# ---------------------------------------------------------------- measuring them


def measured(rate: Rate, device: torch.device) -> float:
    """The rate, on a CPU in a new process, away from the memory that another left in pieces.

    This process must have kept to one thread, as threads do not survive a fork. Raises RuntimeError
    when the new process fails.
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


def compare(comparison: Comparison, repeats: int, device: torch.device) -> dict[str, Any]:
    """A row: medians of the rates, and median and range of the paired ratios."""
    name, *rates, operations = comparison
    pairs = [[measured(rate, device) for rate in rates] for _ in range(repeats)]
    ratios = [ours / baseline for ours, baseline in pairs]
    ours, baseline = map(statistics.median, zip(*pairs))
    row = {"measure": name, "ours /s": ours, "baseline /s": baseline}
    row |= {"ratio": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    row["TFLOP/s"] = ours * operations / 1e12 or math.nan
    if device.type == "cuda":
        row["GB"] = torch.cuda.max_memory_allocated(device) / 1e9
        torch.cuda.reset_peak_memory_stats(device)
    return row


def show(rows: list[dict[str, Any]]) -> None:
    forms = {name: "{:,.4g}".format for name in ("ours /s", "baseline /s")}
    look = {"index": False, "na_rep": "", "float_format": "{:.2f}".format}
    print(pd.DataFrame(rows).to_string(formatters=forms, **look), flush=True)


def main() -> None:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    add("--size", type=cli.number(int, 8), default=32, help="of images, px (default: %(default)s)")
    add("--steps", type=cli.positive, help="a repeat at width 1 (default: 40 on a CPU, else 390)")
    add("--repeats", type=cli.positive, help="default: 5 on a CPU, else 4; fewer but for training")
    width = cli.number(float, 0, open_low=True)
    add("--widths", type=width, nargs="+", help="of training (default: 1 on a CPU, else 1 4 16)")
    add("--out", type=Path, help="write the table as CSV too, as far as it has come")
    cli.add_device(parser)
    args = parser.parse_args()
    device = pick_device(args.device)
    cpu = device.type == "cpu"
    if cpu and list(args.only) == ["large"]:
        raise UserError("--only large measures networks that fill a GPU: name one with --device")
    if cpu and torch.cuda.is_available():
        raise UserError("to measure the CPU beside a GPU, set CUDA_VISIBLE_DEVICES to nothing")
    if cpu:
        torch.set_num_threads(1)  # here alone: see `measured`
    steps, repeats = args.steps or (40 if cpu else 390), args.repeats or (5 if cpu else 4)
    widths = args.widths or ([1] if cpu else [1, 4, 16])
    counts = [pick_count("auto", 99, 1, random_images(1, 8, device))] if cpu else [4, 16]
    parts = {
        "training": training(widths, args.size, steps, device),
        "parallel": parallel(counts, args.size, steps, device),
        "large": large(device) if not cpu else (),
        "line": line(args.size, device),
        "matching": matching(args.size, device),
        "weights": weights(4, device),
    }
    name, precision = provenance.environment(device)["device"], pick_precision(None, device)
    print(f"{name}, {THREADS} threads, torch {torch.__version__}, {precision}, {repeats} repeats")
    print("images a second (weight matching: runs); ratio: median, min and max of the pairs")
    rows = []
    for part in args.only:
        few = repeats if part == "training" else max(1, repeats // 2)
        for comparison in parts[part]:
            rows.append(compare(comparison, few, device))
            show(rows[-1:])
            if args.out:
                checkpoint.save_csv(rows, args.out)
    print()
    show(rows)


if __name__ == "__main__":
    cli.run(main)
