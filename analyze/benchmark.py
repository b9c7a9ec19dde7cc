"""How fast this code is against a standard PyTorch baseline, measured side by side in one run.

    python -m analyze.benchmark [--device cuda] [--out benchmark.csv]

Every row runs ours and the baseline in turn, several times, and prints the medians of the rates and
the median of the paired ratios. `training`: dense and masked networks, data included, against an
fp32 NCHW loop with PIL transforms in a DataLoader and torch.nn.utils.prune hooks
(analyze/lib/baselines.py), and what a mask costs. `parallel`: networks side by side against one
after the other and against the baseline. `line`: the line between two networks with REPAIR.
`matching`: one pass against layer by layer. `weights`: weight matching against its published
algorithm. `large`, on a GPU: networks that fill it, eager against --compile. The images are noise.
"""

import contextlib
import copy
import io
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from analyze.lib import baselines, lines
from common import checkpoint, cli, masking, provenance
from common.align.axes import find_axes
from common.align.matching import match_activations, match_weights
from common.data import Batches, Resident, make_resident
from common.errors import UserError
from common.masking import Mask
from common.models import build_model
from common.runtime.device import pick_device, pick_precision
from common.runtime.parallel import pick_count, run_all
from common.training import train

BATCH = 128
SGD = partial(torch.optim.SGD, lr=0.0, momentum=0.9, weight_decay=5e-4, fused=True)
SPARSITY = 0.9
SETUP = 300  # seconds that networks side by side wait for the slowest to end its first epoch
COUNTS = [4, 16]  # of networks side by side on a GPU
IMAGES = 2000  # of a line and of matching

Row = tuple[str, Callable[[], float], Callable[[], float]]  # name, and rates: ours, the baseline's


def random_images(count: int, size: int, device: torch.device) -> Resident:
    """Noise in the shape of a small-image set, with a test set too small to matter."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count + 8, 3, size, size), dtype=torch.uint8, generator=generator)
    labels, classes = torch.arange(count + 8) % 10, [*map(str, range(10))]
    parts = images[8:], labels[8:], images[:8], labels[:8], classes
    return make_resident("random", None, *parts, None, None, device, None)


def network(data: Resident, width: float = 1, seed: int = 0, name: str = "resnet20") -> nn.Module:
    return build_model(name, width, 10, data.input_shape, seed)


def random_mask(model: nn.Module) -> Mask:
    state = model.state_dict()
    return {name: torch.rand(state[name].shape) > SPARSITY for name in masking.prunable(model)}


# ---------------------------------------------------------------- rates


def timed(work: float, run: Callable[[], Any]) -> float:
    """`work` by the seconds that a second call of `run` takes."""
    for _ in range(2):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return work / (time.perf_counter() - start)


def timed_row(name: str, work: float, ours: Callable, baseline: Callable) -> Row:
    return name, partial(timed, work, ours), partial(timed, work, baseline)


def training_rate(
    models: list[nn.Module],
    data: Resident,
    mask: Mask | None = None,
    batch: int = BATCH,
    compiled: bool = False,
) -> float:
    """Images a second of all `models`, side by side, in the second of two epochs.

    The first sets up. The learning rate is 0, which costs what any other does and cannot diverge on
    images that nothing can be learned from. The second epochs start together, so that none is
    measured while it has the device to itself. No state is kept, which would weigh much here.
    """
    fork = multiprocessing.get_context("fork")
    together, start = fork.Barrier(len(models)), fork.Value("d")
    settings = {"make_optimiser": SGD, "batch_size": batch, "mask": mask, "seed": 0}
    settings |= {"precision": pick_precision(None, data.device), "compiled": compiled}
    settings |= {"name": "benchmark", "folder": None, "progress": False}

    def at_epoch(epoch: int) -> None:
        if epoch == 1:
            together.wait(SETUP)
            start.value = time.perf_counter()  # one clock for all processes

    def run(model: nn.Module) -> None:
        train(copy.deepcopy(model), data, [0.0, 0.0], at_epoch=at_epoch, **settings)

    runs = {str(number): partial(run, model) for number, model in enumerate(models)}
    with contextlib.redirect_stdout(io.StringIO()):  # here, because it holds for all threads
        run_all(runs, str(len(models)) if len(models) > 1 else None, 1, data)
    seconds = time.perf_counter() - start.value
    return len(models) * data.steps(batch) * batch / seconds


def baseline_rate(width: float, data: Resident, mask: Mask | None = None) -> float:
    """Images a second of the baseline's training; masks are hooks of torch.nn.utils.prune."""
    model = network(data, width).to(data.device)
    for name, entry in (mask or {}).items():
        module, _, parameter = name.rpartition(".")
        prune.custom_from_mask(model.get_submodule(module), parameter, entry.to(data.device))
    epoch = partial(baselines.train_epoch, model, baselines.loader(data, BATCH), data.device)
    return timed(data.steps(BATCH) * BATCH, epoch)


# ---------------------------------------------------------------- what is compared


def training(device: torch.device, size: int, steps: int, widths: list[float]) -> Iterator[Row]:
    for width in widths:
        data = random_images(max(1, round(steps / width)) * BATCH, size, device)
        model = network(data, width)
        mask, about = random_mask(model), f"training, resnet20 x{width:g}, {size} px"
        dense, masked = (partial(training_rate, [model], data, one) for one in (None, mask))
        yield f"dense {about}", dense, partial(baseline_rate, width, data)
        yield f"masked {about}", masked, partial(baseline_rate, width, data, mask)
        yield f"masked over dense {about}", masked, dense


def parallel(device: torch.device, size: int, steps: int, widths: list[float]) -> Iterator[Row]:
    data = random_images(steps * BATCH, size, device)
    counts = [pick_count("auto", 99, 1, data)] if device.type == "cpu" else COUNTS
    models = [network(data, seed=seed) for seed in range(max(counts))]
    about = f"resnet20 x1, {size} px"
    for count in counts:
        together, alone = (partial(training_rate, models[:n], data) for n in (count, 1))
        yield f"{count} side by side over one after the other, {about}", together, alone
    for kind, mask in (("dense", None), ("masked", random_mask(models[0]))):
        baseline = partial(baseline_rate, 1, data, mask)
        yield f"{count} side by side, {kind}, {about}", partial(together, mask), baseline


def large(device: torch.device, *_: object) -> Iterator[Row]:
    """Networks that fill a GPU: whether --compile pays."""
    for name, width, size, batch in (
        ("resnet20", 1, 32, 128),
        ("resnet20", 16, 32, 128),
        ("vgg11", 1, 32, 128),
        ("resnet50", 1, 224, 256),
    ):
        data = random_images(20 * batch, size, device)
        eager = partial(training_rate, [network(data, width, 0, name)], data, batch=batch)
        about = f"eager over --compile, {name} x{width:g}, {size} px, batch {batch}"
        yield about, eager, partial(eager, compiled=True)


def pair(data: Resident, width: float = 1) -> list[nn.Module]:
    return [network(data, width, seed).to(data.device) for seed in (0, 1)]


def line(device: torch.device, size: int, *_: object) -> Iterator[Row]:
    """Three points of a line, with and without REPAIR, on the same images as test and train.

    The baseline has them from a DataLoader, and its network in NCHW.
    """
    data, alphas = random_images(IMAGES, size, device), (0.0, 0.5, 1.0)
    model, standard = pair(data)
    ends = [copy.deepcopy(one.state_dict()) for one in (model, standard)]
    model.to(memory_format=torch.channels_last)
    loader = baselines.loader(data, lines.BATCH, train=False)

    def loaded() -> Batches:
        return ((x.to(device), y.to(device)) for x, y in loader)

    resident = partial(data.eval_batches, "train", lines.BATCH)
    ours = partial(lines.metrics_along, model, *ends, alphas, resident, resident)
    theirs = partial(lines.metrics_along, standard, *ends, alphas, loaded, loaded)
    yield timed_row(f"line with REPAIR, resnet20 x1, {size} px", 15 * IMAGES, ours, theirs)


def matching(device: torch.device, size: int, *_: object) -> Iterator[Row]:
    """One pass against layer by layer."""
    data = random_images(IMAGES, size, device)
    ends = [one.to(memory_format=torch.channels_last) for one in pair(data)]
    axes = find_axes(ends[0], data.input_shape)

    def batches() -> Iterator[torch.Tensor]:
        return (x for x, _ in data.eval_batches("train", lines.BATCH))

    def ours() -> None:
        match_activations(*ends, axes, batches())

    theirs = partial(baselines.match_layer_by_layer, *ends, axes, batches)
    yield timed_row(f"activation matching, resnet20 x1, {size} px", IMAGES, ours, theirs)


def weights(device: torch.device, *_: object) -> Iterator[Row]:
    """From the same start, in the same order of axes; rates of whole matchings."""
    data = random_images(1, 32, device)
    networks = pair(data, 4)
    axes = find_axes(networks[0], data.input_shape)
    ends = [{name: one.state_dict()[name] for name in axes.weights} for one in networks]
    methods = (match_weights, baselines.match_weights_every_axis)
    ours, theirs = (partial(method, *ends, axes) for method in methods)
    yield timed_row("weight matching, resnet20 x4", 1, ours, theirs)


PARTS = {part.__name__: part for part in (training, parallel, large, line, matching, weights)}


def compare(row: Row, repeats: int) -> dict[str, Any]:
    """Both in turn: medians of the rates, and median and range of the paired ratios."""
    name, *rates = row
    pairs = [[rate() for rate in rates] for _ in range(repeats)]
    ratios = [ours / baseline for ours, baseline in pairs]
    ours, baseline = map(statistics.median, zip(*pairs))
    found = {"measure": name, "ours /s": ours, "baseline /s": baseline}
    return found | {"ratio": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def main() -> None:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, help="what to measure (default: all)")
    add("--size", type=cli.number(int, 8), default=32, help="of images, px (default: %(default)s)")
    add("--steps", type=cli.positive, help="a repeat at width 1 (default: 40 on a CPU, else 390)")
    add("--repeats", type=cli.positive, help="default: 5 on a CPU, else 4; fewer but for training")
    add(
        "--widths",
        type=cli.above_0,
        nargs="+",
        help="of training (default: 1 on a CPU, else 1 4 16)",
    )
    add("--out", type=Path, help="write the table as CSV too, as far as it has come")
    cli.add_device(parser)
    args = parser.parse_args()
    device = pick_device(args.device)
    cpu = device.type == "cpu"
    if cpu and args.only == ["large"]:
        raise UserError("--only large measures networks that fill a GPU: name one with --device")
    if cpu and torch.cuda.is_available():
        raise UserError("to measure the CPU beside a GPU, set CUDA_VISIBLE_DEVICES to nothing")
    steps, repeats = args.steps or (40 if cpu else 390), args.repeats or (5 if cpu else 4)
    widths = args.widths or ([1] if cpu else [1, 4, 16])
    name, precision = provenance.environment(device)["device"], pick_precision(None, device)
    threads = torch.get_num_threads()
    print(f"{name}, {threads} threads, torch {torch.__version__}, {precision}, {repeats} repeats")
    print("images a second (weight matching: runs), ours over the baseline's, and their ratio")
    rows = []
    for part in args.only or PARTS:
        if part == "large" and cpu:
            continue
        few = repeats if part == "training" else max(1, repeats // 2)
        for row in PARTS[part](device, args.size, steps, widths):
            rows.append(compare(row, few))
            print("{measure}: {ours /s:,.4g} over {baseline /s:,.4g}".format(**rows[-1]), end=", ")
            print("{ratio:.2f} ({min:.2f} to {max:.2f})".format(**rows[-1]), flush=True)
            if args.out:
                checkpoint.save_csv(rows, args.out)


if __name__ == "__main__":
    cli.run(main)
