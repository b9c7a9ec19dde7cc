"""How fast this code is against a standard PyTorch baseline, measured side by side in one run.

    python -m analyze.benchmark [--device cuda] [--out benchmark.csv]

Every row runs ours and the baseline in turn, several times, and prints the medians of the rates and
the median of the paired ratios. `training`: dense and masked networks, data included, against an
fp32 NCHW loop with PIL transforms in a DataLoader and torch.nn.utils.prune hooks
(analyze/lib/baselines.py), what a mask costs and, on a GPU, whether --compile pays. `parallel`:
networks side by side against one after the other and against the baseline. `line`: the line between
two networks with REPAIR. `matching`: one pass against layer by layer. `weights`: weight matching
against its published algorithm. The images are noise.
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
STEPS = {"cpu": 40, "cuda": 390}  # of training, at width 1
REPEATS = 5
WIDTHS = {"cpu": [1], "cuda": [1, 4, 16]}
SETUP = 300  # seconds that networks side by side wait for the slowest to end its first epoch
COUNTS = [4, 16]  # of networks side by side on a GPU
IMAGES = 2000  # of a line and of matching

Row = tuple[str, Callable[[], float], Callable[[], float]]  # name, and rates: ours, the baseline's


def random_images(count: int, size: int, device: torch.device) -> Resident:
    """Noise in the shape of a small-image set, with a test set too small to matter."""
    images = torch.randint(256, (count + 8, 3, size, size), dtype=torch.uint8)
    labels, classes = torch.arange(count + 8) % 10, [*map(str, range(10))]
    parts = images[8:], labels[8:], images[:8], labels[:8], classes
    return make_resident({"name": "random"}, *parts, None, device)


def network(data: Resident, width: float = 1, seed: int = 0) -> nn.Module:
    return build_model("resnet20", width, 10, data.input_shape, seed).to(data.device)


def about(width: float) -> str:
    return f"resnet20 x{width:g}, {SIZE} px"


def random_mask(model: nn.Module) -> Mask:
    state = model.state_dict()
    return {name: torch.rand_like(state[name]) > SPARSITY for name in masking.prunable(model)}


# ---------------------------------------------------------------- rates


def rate(work: float, run: Callable[[], Any]) -> float:
    """`work` by the seconds that a second call of `run` takes."""
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
    """Images a second of all `models`, side by side, in the second of two epochs.

    The first sets up. The learning rate is 0, which costs what any other does and cannot diverge on
    images that nothing can be learned from. The second epochs start together, so that none is
    measured while it has the device to itself. No state is kept, which would weigh much here.
    """
    fork = multiprocessing.get_context("fork")
    together, start = fork.Barrier(len(models)), fork.Value("d")
    how = {"make_optimiser": SGD, "batch_size": BATCH, "mask": mask, "seed": 0, "folder": None}
    how |= {"precision": pick_precision(None, data.device), "compiled": compiled}

    def at_epoch(epoch: int) -> None:
        if epoch == 1:
            together.wait(SETUP)
            start.value = time.perf_counter()  # one clock for all processes

    def run(model: nn.Module) -> None:
        quietly = {"name": "", "progress": False, "at_epoch": at_epoch}
        train(copy.deepcopy(model), data, [0.0, 0.0], **how, **quietly)

    runs = {str(number): partial(run, model) for number, model in enumerate(models)}
    with contextlib.redirect_stdout(io.StringIO()):  # here, because it holds for all threads
        run_all(runs, str(len(models)) if len(models) > 1 else None, 1, data)
    return len(models) * data.steps(BATCH) * BATCH / (time.perf_counter() - start.value)


def baseline_rate(width: float, data: Resident, mask: Mask | None = None) -> float:
    """Images a second of the baseline's training."""
    model = baselines.pruned(network(data, width), mask or {})
    epoch = partial(baselines.train_epoch, model, baselines.loader(data, BATCH), data.device)
    return rate(data.steps(BATCH) * BATCH, epoch)


# ---------------------------------------------------------------- what is compared


def training(device: torch.device, widths: list[float]) -> Iterator[Row]:
    for width in widths:
        data = random_images(max(1, round(STEPS[device.type] / width)) * BATCH, SIZE, device)
        model = network(data, width)
        mask, dense = random_mask(model), partial(training_rate, [model], data)
        standard, masked = partial(baseline_rate, width, data), partial(dense, mask)
        yield f"dense training, {about(width)}", dense, standard
        yield f"masked training, {about(width)}", masked, partial(standard, mask)
        yield f"masked over dense training, {about(width)}", masked, dense
        if device.type == "cuda":
            yield f"eager over --compile, {about(width)}", dense, partial(dense, compiled=True)


def parallel(device: torch.device, _: object) -> Iterator[Row]:
    data = random_images(STEPS[device.type] * BATCH, SIZE, device)
    counts = [pick_count("auto", 99, 1, data)] if device.type == "cpu" else COUNTS
    models = [network(data, seed=seed) for seed in range(max(counts))]
    for count in counts:
        together, alone = (partial(training_rate, models[:n], data) for n in (count, 1))
        yield f"{count} side by side over one after the other, {about(1)}", together, alone
    for kind, mask in (("dense", None), ("masked", random_mask(models[0]))):
        baseline = partial(baseline_rate, 1, data, mask)
        yield f"{count} side by side, {kind}, {about(1)}", partial(together, mask), baseline


def line(device: torch.device, _: object) -> Iterator[Row]:
    """Three points of a line, with and without REPAIR, on the same images as test and train.

    The baseline has them from a DataLoader, and its network in NCHW.
    """
    data = random_images(IMAGES, SIZE, device)
    models = [network(data, seed=seed) for seed in (0, 1)]
    ends = [copy.deepcopy(model.state_dict()) for model in models]
    models[0].to(memory_format=torch.channels_last)
    loader = baselines.loader(data, lines.BATCH, train=False)

    def loaded() -> Batches:
        return ((x.to(device), y.to(device)) for x, y in loader)

    along = partial(lines.metrics_along, alphas=(0.0, 0.5, 1.0))
    resident = partial(data.eval_batches, "train", lines.BATCH)
    ours = partial(along, models[0], *ends, test=resident, train=resident)
    theirs = partial(along, models[1], *ends, test=loaded, train=loaded)
    yield f"line with REPAIR, {about(1)}", *rates(15 * IMAGES, ours, theirs)


def matching(device: torch.device, _: object) -> Iterator[Row]:
    """One pass against layer by layer."""
    data = random_images(IMAGES, SIZE, device)
    ends = [network(data, seed=seed).to(memory_format=torch.channels_last) for seed in (0, 1)]
    images = [batch for batch, _ in data.eval_batches("train", lines.BATCH)]
    what = *ends, find_axes(ends[0], data.input_shape), images
    ways = partial(match_activations, *what), partial(baselines.match_layer_by_layer, *what)
    yield f"activation matching, {about(1)}", *rates(IMAGES, *ways)


def weights(device: torch.device, _: object) -> Iterator[Row]:
    """From the same start, in the same order of axes; rates of whole matchings."""
    data = random_images(1, 32, device)
    states = [network(data, 4, seed).state_dict() for seed in (0, 1)]
    axes = find_axes(network(data, 4), data.input_shape)
    ends = [{name: state[name] for name in axes.weights} for state in states]
    ways = match_weights, baselines.match_weights_every_axis
    yield "weight matching, resnet20 x4", *rates(1, *(partial(way, *ends, axes) for way in ways))


PARTS = {part.__name__: part for part in (training, parallel, line, matching, weights)}


def compare(row: Row, repeats: int) -> dict[str, Any]:
    """Both in turn: medians of the rates, and median and range of the paired ratios."""
    name, *both = row
    pairs = pd.DataFrame([[one() for one in both] for _ in range(repeats)])
    pairs.columns = ["ours /s", "baseline /s"]
    ratios = pairs["ours /s"] / pairs["baseline /s"]
    found = {"ratio": ratios.median(), "min": ratios.min(), "max": ratios.max()}
    return {"measure": name, **pairs.median(), **found}


def main() -> None:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    fewer = "of training, and half as many of the others (default: %(default)s)"
    add("--repeats", type=cli.positive, default=REPEATS, help=fewer)
    add("--widths", type=cli.positive_float, nargs="+", help=f"of training (default: {WIDTHS})")
    add("--out", type=Path, help="write the table as CSV too, as far as it has come")
    cli.add_device(parser)
    args = parser.parse_args()
    device = pick_device(args.device)
    name, precision = provenance.environment(device)["device"], pick_precision(None, device)
    how = f"{torch.get_num_threads()} threads, torch {torch.__version__}, {precision}"
    print(f"{name}, {how}, {args.repeats} repeats")
    print("images a second (weight matching: runs), ours over the baseline's, and their ratio")
    rows, shown = [], "{measure}: {ours /s:,.4g} over {baseline /s:,.4g}, "
    shown += "{ratio:.2f} ({min:.2f} to {max:.2f})"
    for part in args.only:
        repeats = args.repeats if part == "training" else max(1, args.repeats // 2)
        for row in PARTS[part](device, args.widths or WIDTHS[device.type]):
            rows.append(compare(row, repeats))
            print(shown.format(**rows[-1]), flush=True)
            if args.out:
                checkpoint.save_csv(rows, args.out)


if __name__ == "__main__":
    cli.run(main)
