"""Speed of this code relative to a standard PyTorch baseline, measured in one run.

    python -m analyze.benchmark [--device cuda] [--out benchmark.csv]

Every row alternates ours and the baseline several times, and prints the medians of the rates and
the median of the paired ratios. `training`: dense and masked training, data included, against an
fp32 NCHW loop with PIL transforms in a DataLoader and torch.nn.utils.prune hooks
(analyze/lib/baselines.py); the cost of a mask and, on a GPU, the gain of --compile. `parallel`:
training networks in parallel against one after the other and against the baseline. `line`: the line
between two networks with REPAIR. `matching`: activation matching in one pass against layer by
layer. `weights`: weight matching against its published algorithm. The images are noise.
"""

import contextlib
import copy
import io
import multiprocessing
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from analyze.lib import baselines, lines
from common import checkpoint, cli, masking, provenance
from common.align.axes import find_axes
from common.align.matching import match_activations, match_weights
from common.data import Batches, Resident, make_resident
from common.masking import Mask
from common.models import build_model
from common.runtime.device import pick_device, pick_precision
from common.runtime.parallel import pick_count, run_all
from common.training import train

SIZE = 32  # of images, px
BATCH = 128
SGD = partial(torch.optim.SGD, lr=0.0, momentum=0.9, weight_decay=5e-4, fused=True)
SPARSITY = 0.9
STEPS = {"cpu": 40, "cuda": 390}  # per epoch, at width 1
REPEATS = 5
WIDTHS = {"cpu": [1], "cuda": [1, 4, 16]}
TIMEOUT = 300  # seconds that parallel networks wait for the slowest to end its first epoch
COUNTS = [4, 16]  # of parallel networks on a GPU
IMAGES = 2000  # for a line and for matching

Row = tuple[str, Callable[[], float], Callable[[], float]]  # name, our rate, the baseline's rate


def random_images(count: int, size: int, device: torch.device) -> Resident:
    """Return noise in the shape of a small-image set, with a test set of negligible cost."""
    images = torch.randint(256, (count + 8, 3, size, size), dtype=torch.uint8)
    labels, classes = torch.arange(count + 8) % 10, [*map(str, range(10))]
    parts = images[8:], labels[8:], images[:8], labels[:8], classes
    return make_resident({"name": "random"}, *parts, None, device)


def network(data: Resident, width: float = 1, seed: int = 0) -> nn.Module:
    return build_model("resnet20", width, 10, data.input_shape, seed).to(data.device)


def network_name(width: float) -> str:
    return f"resnet20 x{width:g}, {SIZE} px"


def random_mask(model: nn.Module) -> Mask:
    state = model.state_dict()
    return {name: torch.rand_like(state[name]) > SPARSITY for name in masking.prunable(model)}


# ---------------------------------------------------------------- rates


def rate(work: float, run: Callable[[], Any]) -> float:
    """Return `work` per second of the second call of `run`; the first one warms up."""
    for _ in range(2):
        start = time.perf_counter()
        run()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    return work / (time.perf_counter() - start)


def rates(work: float, *runs: Callable[[], Any]) -> list[Callable[[], float]]:
    return [partial(rate, work, run) for run in runs]


def training_rate(
    models: list[nn.Module], data: Resident, mask: Mask | None = None, compiled: bool = False
) -> float:
    """Return images per second of training all `models` in parallel, in the second of two epochs.

    The first epoch warms up. The learning rate is 0, which costs the same as any other and cannot
    diverge on noise. The second epochs start together, so that no network is measured while it has
    the device to itself. No resume state is written, as its cost would dominate so short a run.
    """
    fork = multiprocessing.get_context("fork")
    barrier, start = fork.Barrier(len(models)), fork.Value("d")
    options = {"make_optimiser": SGD, "batch_size": BATCH, "mask": mask, "seed": 0, "folder": None}
    options |= {"precision": pick_precision(None, data.device), "compiled": compiled}
    options |= {"name": "", "progress": False}

    def at_epoch(epoch: int) -> None:
        if epoch == 1:
            barrier.wait(TIMEOUT)
            start.value = time.perf_counter()  # the same clock in all processes

    def run(model: nn.Module) -> None:
        train(copy.deepcopy(model), data, [0.0, 0.0], at_epoch=at_epoch, **options)

    runs = {str(number): partial(run, model) for number, model in enumerate(models)}
    with contextlib.redirect_stdout(io.StringIO()):  # not in `run`, as it affects all threads
        run_all(runs, str(len(models)) if len(models) > 1 else None, 1, data)
    return len(models) * data.steps(BATCH) * BATCH / (time.perf_counter() - start.value)


def baseline_rate(width: float, data: Resident, mask: Mask | None = None) -> float:
    """Return images per second of training the baseline."""
    model = baselines.add_prune_hooks(network(data, width), mask or {})
    epoch = partial(baselines.train_epoch, model, baselines.make_loader(data, BATCH), data.device)
    return rate(data.steps(BATCH) * BATCH, epoch)


# ---------------------------------------------------------------- rows


def training(device: torch.device, widths: list[float]) -> Iterator[Row]:
    for width in widths:
        data = random_images(max(1, round(STEPS[device.type] / width)) * BATCH, SIZE, device)
        model = network(data, width)
        mask, dense = random_mask(model), partial(training_rate, [model], data)
        standard, masked = partial(baseline_rate, width, data), partial(dense, mask)
        yield f"dense training, {network_name(width)}", dense, standard
        yield f"masked training, {network_name(width)}", masked, partial(standard, mask)
        yield f"masked over dense training, {network_name(width)}", masked, dense
        if device.type == "cuda":
            yield (
                f"eager over --compile, {network_name(width)}",
                dense,
                partial(dense, compiled=True),
            )


def parallel(device: torch.device, _: object) -> Iterator[Row]:
    data = random_images(STEPS[device.type] * BATCH, SIZE, device)
    counts = [pick_count("auto", 99, 1, data)] if device.type == "cpu" else COUNTS
    models = [network(data, seed=seed) for seed in range(max(counts))]
    for count in counts:
        concurrent, single = (partial(training_rate, models[:n], data) for n in (count, 1))
        yield (
            f"{count} side by side over one after the other, {network_name(1)}",
            concurrent,
            single,
        )
    for kind, mask in (("dense", None), ("masked", random_mask(models[0]))):
        baseline = partial(baseline_rate, 1, data, mask)
        yield (
            f"{count} side by side, {kind}, {network_name(1)}",
            partial(concurrent, mask),
            baseline,
        )


def line(device: torch.device, _: object) -> Iterator[Row]:
    """Evaluate three points of a line, with and without REPAIR, on the same test and train images.

    The baseline reads them from a DataLoader and has its network in NCHW.
    """
    data = random_images(IMAGES, SIZE, device)
    models = [network(data, seed=seed) for seed in (0, 1)]
    states = [copy.deepcopy(model.state_dict()) for model in models]
    models[0].to(memory_format=torch.channels_last)
    loader = baselines.make_loader(data, lines.BATCH, train=False)

    def loaded() -> Batches:
        return ((x.to(device), y.to(device)) for x, y in loader)

    evaluate = partial(lines.evaluate_line, alphas=(0.0, 0.5, 1.0))
    resident = partial(data.eval_batches, "train", lines.BATCH)
    ours = partial(evaluate, models[0], *states, test=resident, train=resident)
    theirs = partial(evaluate, models[1], *states, test=loaded, train=loaded)
    yield f"line with REPAIR, {network_name(1)}", *rates(15 * IMAGES, ours, theirs)


def matching(device: torch.device, _: object) -> Iterator[Row]:
    """Match by activations in one pass and layer by layer."""
    data = random_images(IMAGES, SIZE, device)
    models = [network(data, seed=seed).to(memory_format=torch.channels_last) for seed in (0, 1)]
    images = [batch for batch, _ in data.eval_batches("train", lines.BATCH)]
    inputs = *models, find_axes(models[0], data.input_shape), images
    runs = partial(match_activations, *inputs), partial(baselines.match_layer_by_layer, *inputs)
    yield f"activation matching, {network_name(1)}", *rates(IMAGES, *runs)


def weights(device: torch.device, _: object) -> Iterator[Row]:
    """Match weights from the same start, with the axes in the same order; rates are matchings/s."""
    data = random_images(1, 32, device)
    states = [network(data, 4, seed).state_dict() for seed in (0, 1)]
    axes = find_axes(network(data, 4), data.input_shape)
    states = [{name: state[name] for name in axes.weights} for state in states]
    algorithms = match_weights, baselines.match_weights_every_axis
    runs = (partial(algorithm, *states, axes) for algorithm in algorithms)
    yield "weight matching, resnet20 x4", *rates(1, *runs)


PARTS = {part.__name__: part for part in (training, parallel, line, matching, weights)}


def compare(row: Row, repeats: int) -> dict[str, Any]:
    """Measure both in turn; return the medians of the rates, and median and range of the ratios."""
    name, *measures = row
    pairs = pd.DataFrame([[measure() for measure in measures] for _ in range(repeats)])
    pairs.columns = ["ours /s", "baseline /s"]
    ratios = pairs["ours /s"] / pairs["baseline /s"]
    ratio = {"ratio": ratios.median(), "min": ratios.min(), "max": ratios.max()}
    return {"measure": name, **pairs.median(), **ratio}


def main() -> None:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    repeats = "of training rows, and half as many of the others (default: %(default)s)"
    add("--repeats", type=cli.positive, default=REPEATS, help=repeats)
    add("--widths", type=cli.positive_float, nargs="+", help=f"of training (default: {WIDTHS})")
    add("--out", type=Path, help="also write the table as CSV, after every row")
    cli.add_device(parser)
    args = parser.parse_args()
    if args.widths and "training" not in args.only:
        parser.error("--widths are those of training: add it to --only")
    device = pick_device(args.device)
    name, precision = provenance.environment(device)["device"], pick_precision(None, device)
    environment = f"{torch.get_num_threads()} threads, torch {torch.__version__}, {precision}"
    print(f"{name}, {environment}, {args.repeats} repeats")
    print("images a second (weight matching: runs), ours over the baseline's, and their ratio")
    rows, line_format = [], "{measure}: {ours /s:,.4g} over {baseline /s:,.4g}, "
    line_format += "{ratio:.2f} ({min:.2f} to {max:.2f})"
    for part in args.only:
        repeats = args.repeats if part == "training" else max(1, args.repeats // 2)
        for row in PARTS[part](device, args.widths or WIDTHS[device.type]):
            rows.append(compare(row, repeats))
            print(line_format.format(**rows[-1]), flush=True)
            if args.out:
                checkpoint.save_csv(rows, args.out)


if __name__ == "__main__":
    cli.run(main)
