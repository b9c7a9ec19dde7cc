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
from common.errors import UserError
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
REPEATS = {"cpu": 5, "cuda": 4}
WIDTHS = {"cpu": [1], "cuda": [1, 4, 16]}
SETUP = 300  # seconds that networks side by side wait for the slowest to end its first epoch
COUNTS = [4, 16]  # of networks side by side on a GPU
IMAGES = 2000  # of a line and of matching
LARGE = [("resnet20", 1, 32, 128), ("resnet20", 16, 32, 128), ("vgg11", 1, 32, 128)]
LARGE += [("resnet50", 1, 224, 256)]  # network, width, px, batch

Row = tuple[str, Callable[[], float], Callable[[], float]]  # name, and rates: ours, the baseline's


def random_images(count: int, size: int, device: torch.device) -> Resident:
    """Noise in the shape of a small-image set, with a test set too small to matter."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count + 8, 3, size, size), dtype=torch.uint8, generator=generator)
    labels, classes = torch.arange(count + 8) % 10, [*map(str, range(10))]
    parts = images[8:], labels[8:], images[:8], labels[:8], classes
    return make_resident("random", None, *parts, None, None, device, None)


def network(data: Resident, width: float = 1, seed: int = 0, name: str = "resnet20") -> nn.Module:
    return build_model(name, width, 10, data.input_shape, seed).to(data.device)


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


def training_rate(
    models: list[nn.Module],
    data: Resident,
    mask: Mask | None = None,
    batch: int = BATCH,
    **more: bool,
) -> float:
    """Images a second of all `models`, side by side, in the second of two epochs.

    The first sets up. The learning rate is 0, which costs what any other does and cannot diverge on
    images that nothing can be learned from. The second epochs start together, so that none is
    measured while it has the device to itself. No state is kept, which would weigh much here.
    """
    fork = multiprocessing.get_context("fork")
    together, start = fork.Barrier(len(models)), fork.Value("d")
    how = {"make_optimiser": SGD, "batch_size": batch, "mask": mask, "seed": 0, "folder": None}
    how |= {"precision": pick_precision(None, data.device), "name": "", "progress": False} | more

    def at_epoch(epoch: int) -> None:
        if epoch == 1:
            together.wait(SETUP)
            start.value = time.perf_counter()  # one clock for all processes

    def run(model: nn.Module) -> None:
        train(copy.deepcopy(model), data, [0.0, 0.0], at_epoch=at_epoch, **how)

    runs = {str(number): partial(run, model) for number, model in enumerate(models)}
    with contextlib.redirect_stdout(io.StringIO()):  # here, because it holds for all threads
        run_all(runs, str(len(models)) if len(models) > 1 else None, 1, data)
    return len(models) * data.steps(batch) * batch / (time.perf_counter() - start.value)


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
        mask, about = random_mask(model), f"training, resnet20 x{width:g}, {SIZE} px"
        dense, masked = (partial(training_rate, [model], data, one) for one in (None, mask))
        yield f"dense {about}", dense, partial(baseline_rate, width, data)
        yield f"masked {about}", masked, partial(baseline_rate, width, data, mask)
        yield f"masked over dense {about}", masked, dense


def parallel(device: torch.device, _: object) -> Iterator[Row]:
    data = random_images(STEPS[device.type] * BATCH, SIZE, device)
    counts = [pick_count("auto", 99, 1, data)] if device.type == "cpu" else COUNTS
    models = [network(data, seed=seed) for seed in range(max(counts))]
    about = f"resnet20 x1, {SIZE} px"
    for count in counts:
        together, alone = (partial(training_rate, models[:n], data) for n in (count, 1))
        yield f"{count} side by side over one after the other, {about}", together, alone
    for kind, mask in (("dense", None), ("masked", random_mask(models[0]))):
        baseline = partial(baseline_rate, 1, data, mask)
        yield f"{count} side by side, {kind}, {about}", partial(together, mask), baseline


def large(device: torch.device, _: object) -> Iterator[Row]:
    """Networks that fill a GPU: whether --compile pays."""
    for name, width, size, batch in LARGE:
        data = random_images(20 * batch, size, device)
        eager = partial(training_rate, [network(data, width, 0, name)], data, batch=batch)
        about = f"eager over --compile, {name} x{width:g}, {size} px, batch {batch}"
        yield about, eager, partial(eager, compiled=True)


def line(device: torch.device, _: object) -> Iterator[Row]:
    """Three points of a line, with and without REPAIR, on the same images as test and train.

    The baseline has them from a DataLoader, and its network in NCHW.
    """
    data, alphas = random_images(IMAGES, SIZE, device), (0.0, 0.5, 1.0)
    model, standard = (network(data, seed=seed) for seed in (0, 1))
    ends = [copy.deepcopy(one.state_dict()) for one in (model, standard)]
    model.to(memory_format=torch.channels_last)
    loader = baselines.loader(data, lines.BATCH, train=False)

    def loaded() -> Batches:
        return ((x.to(device), y.to(device)) for x, y in loader)

    resident = partial(data.eval_batches, "train", lines.BATCH)
    ours = partial(lines.metrics_along, model, *ends, alphas, resident, resident)
    theirs = partial(lines.metrics_along, standard, *ends, alphas, loaded, loaded)
    rates = (partial(rate, 15 * IMAGES, one) for one in (ours, theirs))
    yield f"line with REPAIR, resnet20 x1, {SIZE} px", *rates


def matching(device: torch.device, _: object) -> Iterator[Row]:
    """One pass against layer by layer."""
    data = random_images(IMAGES, SIZE, device)
    ends = [network(data, seed=seed).to(memory_format=torch.channels_last) for seed in (0, 1)]
    axes = find_axes(ends[0], data.input_shape)

    def batches() -> Iterator[torch.Tensor]:
        return (x for x, _ in data.eval_batches("train", lines.BATCH))

    def ours() -> None:
        match_activations(*ends, axes, batches())

    theirs = partial(baselines.match_layer_by_layer, *ends, axes, batches)
    rates = (partial(rate, IMAGES, one) for one in (ours, theirs))
    yield f"activation matching, resnet20 x1, {SIZE} px", *rates


def weights(device: torch.device, _: object) -> Iterator[Row]:
    """From the same start, in the same order of axes; rates of whole matchings."""
    data = random_images(1, 32, device)
    networks = [network(data, 4, seed) for seed in (0, 1)]
    axes = find_axes(networks[0], data.input_shape)
    ends = [{name: one.state_dict()[name] for name in axes.weights} for one in networks]
    methods = (match_weights, baselines.match_weights_every_axis)
    yield (
        "weight matching, resnet20 x4",
        *(partial(rate, 1, partial(m, *ends, axes)) for m in methods),
    )


PARTS = {part.__name__: part for part in (training, parallel, large, line, matching, weights)}


def compare(row: Row, repeats: int) -> dict[str, Any]:
    """Both in turn: medians of the rates, and median and range of the paired ratios."""
    name, *rates = row
    columns = ["ours /s", "baseline /s"]
    pairs = pd.DataFrame([[one() for one in rates] for _ in range(repeats)], columns=columns)
    ratios = pairs["ours /s"] / pairs["baseline /s"]
    found = {"ratio": ratios.median(), "min": ratios.min(), "max": ratios.max()}
    return {"measure": name, **pairs.median(), **found}


def main() -> None:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, help="what to measure (default: all)")
    fewer = f"of training, and half as many of the others (default: {REPEATS})"
    add("--repeats", type=cli.positive, help=fewer)
    add("--widths", type=cli.above_0, nargs="+", help=f"of training (default: {WIDTHS})")
    add("--out", type=Path, help="write the table as CSV too, as far as it has come")
    cli.add_device(parser)
    args = parser.parse_args()
    device = pick_device(args.device)
    kind = device.type
    if kind == "cpu" and args.only == ["large"]:
        raise UserError("--only large measures networks that fill a GPU: name one with --device")
    repeats, widths = args.repeats or REPEATS[kind], args.widths or WIDTHS[kind]
    name, precision = provenance.environment(device)["device"], pick_precision(None, device)
    threads = torch.get_num_threads()
    print(f"{name}, {threads} threads, torch {torch.__version__}, {precision}, {repeats} repeats")
    print("images a second (weight matching: runs), ours over the baseline's, and their ratio")
    rows, shown = [], "{measure}: {ours /s:,.4g} over {baseline /s:,.4g}, "
    shown += "{ratio:.2f} ({min:.2f} to {max:.2f})"
    for part in args.only or PARTS:
        if part == "large" and kind == "cpu":
            continue
        few = repeats if part == "training" else max(1, repeats // 2)
        for row in PARTS[part](device, widths):
            rows.append(compare(row, few))
            print(shown.format(**rows[-1]), flush=True)
            if args.out:
                checkpoint.save_csv(rows, args.out)


if __name__ == "__main__":
    cli.run(main)
