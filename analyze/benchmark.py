"""How fast this code is against the plain way, measured side by side in one run.

    python -m analyze.benchmark [--device cuda] [--out benchmark.csv]

Every row runs both ways in turn, several times, and prints the medians of the rates and the median of the paired
ratios: training, data included, of dense and masked networks against an fp32 NCHW loop with PIL transforms in a
DataLoader and torch.nn.utils.prune hooks (analyze/plain.py), with the arithmetic that it reaches; what a mask costs;
networks side by side against one after the other; the data alone; the line between two networks with REPAIR; one-pass
matching against layer by layer, for ResNet20 and for ResNet50 at 224 px; weight matching against its algorithm as it
reads. Last, from the rates of a few steps of each network: how long the presets of run_all.sh take on this machine.
"""

import resource
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from analyze import interpolation
from analyze.hours import PRESETS, hours
from analyze.plain import BATCH, PilImages, match_layer_by_layer, match_weights_plainly, plain_line, plain_loader
from analyze.rates import (
    THREADS,
    Rate,
    flops,
    magnitude_mask,
    measured,
    network,
    plain_rate,
    random_images,
    stacked_rate,
    timed,
    training_rate,
)  # fmt: skip
from common import checkpoint, cli
from common.axes import find_axes
from common.data import Batches
from common.errors import UserError
from common.matching import match_activations, match_weights, matched_weights
from common.parallel import pick_count
from common.training import pick_device, pick_precision

PARTS = ("training", "parallel", "large", "stacked", "data", "line", "matching", "resnet50", "weights", "hours")


def compare(
    name: str, ours: Rate, other: Rate, unit: str, repeats: int, device: torch.device, work: float = 0
) -> dict[str, Any]:
    """Measure both in turn; medians of the rates and of the paired ratio ours / other.

    `work` is in floating-point operations a unit, where their rate says something.
    """
    pairs = [(measured(ours, device), measured(other, device)) for _ in range(repeats)]
    ratios = sorted(a / b for a, b in pairs)
    rates = [statistics.median(column) for column in zip(*pairs)]
    return {
        "measure": name, "ours": rates[0], "other": rates[1], "unit": unit, "ratio": statistics.median(ratios), "min": ratios[0],
        "max": ratios[-1], "TFLOP/s": rates[0] * work / 1e12 or float("nan"),
    }  # fmt: skip


def training_rows(width: float, size: int, steps: int, repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Dense and masked training against the plain way, and masked against dense."""
    data, model = random_images(steps * BATCH, size, device), network("resnet20", width, size)
    mask, work = magnitude_mask(model), flops(model, size)
    about = f"training, resnet20 x{width:g}, {size} px"
    dense, masked = (partial(training_rate, [model], data, mask=one) for one in (None, mask))
    others = [partial(plain_rate, width, data, one) for one in (None, mask)]
    yield compare(f"dense {about}", dense, others[0], "images/s", repeats, device, work)
    yield compare(f"masked {about}", masked, others[1], "images/s", repeats, device, work)
    yield compare(f"masked over dense {about}", masked, dense, "images/s", repeats, device)


def large_rows(repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Whether --compile pays, and what part of a GPU's arithmetic the networks reach that fill it by themselves."""
    for name, width, size, batch in (
        ("resnet20", 1, 32, 128),
        ("resnet20", 16, 32, 128),
        ("vgg11", 1, 32, 128),
        ("resnet50", 1, 224, 256),
    ):
        data, model = random_images(20 * batch, size, device), network(name, width, size)
        eager, compiled = (partial(training_rate, [model], data, batch, compiled=one) for one in (False, True))
        about = f"eager over --compile, {name} x{width:g}, {size} px, batch {batch}"
        yield compare(about, eager, compiled, "images/s", repeats, device, flops(model, size))


def parallel_rows(
    counts: list[int], size: int, steps: int, repeats: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Networks side by side, as the stages run them, against one after the other; the most also against the plain way."""
    data = random_images(steps * BATCH, size, device)
    mask = magnitude_mask(network("resnet20", 1, size))
    for count in counts:
        models = [network("resnet20", 1, size, seed) for seed in range(count)]
        about, work = f"resnet20 x1, {size} px", flops(models[0], size)
        together = partial(training_rate, models, data, parallel=str(count))
        alone = partial(training_rate, models[:2], data)
        yield compare(f"{count} side by side over one after the other, {about}", together, alone, "images/s", repeats, device, work)  # fmt: skip
    for kind, kept in (("dense", None), ("masked", mask)):
        name = f"{count} side by side, {kind}, over the plain way, {about}"
        other = partial(plain_rate, 1, data, kept)
        yield compare(name, partial(together, mask=kept), other, "images/s", repeats, device, work)


def stacked_row(count: int, size: int, steps: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """The other way to train networks at once, which the stages do not take."""
    data = random_images(steps * BATCH, size, device)
    models = [network("resnet20", 1, size, seed) for seed in range(count)]
    together = partial(training_rate, models, data, parallel=str(count))
    return compare(
        f"{count} side by side over stacked by vmap, resnet20 x1, {size} px", together,
        partial(stacked_rate, models, data), "images/s", repeats, device,
    )  # fmt: skip


def data_row(size: int, steps: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """The augmented batches of an epoch, with no network."""
    data = random_images(steps * BATCH, size, device)
    loader = plain_loader(PilImages(data))

    def consume(batches: Any) -> None:
        for images, labels in batches:
            images.to(device), labels.to(device)

    ours = partial(timed, steps * BATCH, lambda: consume(data.train_batches(BATCH, 0, 0)))
    return compare(f"data alone, {size} px", ours, partial(timed, steps * BATCH, lambda: consume(loader)), "images/s", repeats, device)  # fmt: skip


def line_row(size: int, images: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Three points of a line between two networks, with and without REPAIR, on `images` images as test and as train."""
    data = random_images(images, size, device)
    precision, alphas = pick_precision(None, device), (0.0, 0.5, 1.0)
    loader = plain_loader(PilImages(data, augment=False), 250, shuffle=False)
    ends = [network("resnet20", 1, size, seed).to(device).state_dict() for seed in (0, 1)]
    model, plain = (
        network("resnet20", 1, size).to(device, memory_format=torch.channels_last),
        network("resnet20", 1, size),
    )
    plain.to(device)

    def batches() -> Batches:
        return data.eval_batches("train")

    work = 5 * len(alphas) * images
    return compare(
        f"line with REPAIR, resnet20 x1, {size} px",
        lambda: timed(work, lambda: interpolation.along(model, *ends, alphas, batches, batches, precision)),
        lambda: timed(work, lambda: plain_line(plain, ends, alphas, loader, device)), "images/s", repeats, device,
    )  # fmt: skip


def matching_row(name: str, size: int, images: int, batch: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """One pass against layer by layer, on the same images."""
    data = random_images(images, size, device)
    source, target = (network(name, 1, size, seed).to(device, memory_format=torch.channels_last) for seed in (0, 1))
    axes = find_axes(source, data.input_shape)

    def batches() -> Any:
        return (x for x, _ in data.eval_batches("train", batch))

    return compare(
        f"matching in one pass, {name} x1, {size} px",
        lambda: timed(images, lambda: match_activations(source, target, axes, batches())),
        lambda: timed(images, lambda: match_layer_by_layer(source, target, axes, batches)), "images/s", repeats, device,
    )  # fmt: skip


def weight_matching_row(width: float, repeats: int, device: torch.device) -> dict[str, Any]:
    """Our weight matching against the algorithm as it reads, from the same start in the same order."""
    networks = [network("resnet20", width, 32, seed).to(device) for seed in (0, 1)]
    axes, names = find_axes(networks[0], (3, 32, 32)), matched_weights(networks[0])
    ends = [{name: one.state_dict()[name] for name in names} for one in networks]
    return compare(
        f"weight matching, resnet20 x{width:g}", lambda: timed(1, lambda: match_weights(*ends, axes)),
        lambda: timed(1, lambda: match_weights_plainly(*ends, axes)), "runs/s", repeats, device,
    )  # fmt: skip


def show(table: pd.DataFrame) -> str:
    forms = {name: "{:,.4g}".format for name in ("ours", "other", "images/s", "hours")}
    return table.to_string(index=False, na_rep="", formatters=forms, float_format="{:.2f}".format)


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all; large: GPUs only)"
    )
    parser.add_argument("--size", type=cli.number(int, 8), default=32, help="image size in px (default: %(default)s)")
    parser.add_argument(
        "--steps", type=cli.positive, help="training steps a repeat at width 1 (default: 40 on a CPU, else 390)"
    )
    parser.add_argument("--repeats", type=cli.positive, help="default: 5 on a CPU, else 4")
    parser.add_argument(
        "--widths",
        type=cli.number(float, 0, open_low=True),
        nargs="+",
        help="to train at (default: 1 on a CPU, else 1 4 16)",
    )
    parser.add_argument("--out", type=Path, help="write the table as CSV too, as far as it has come")
    cli.add_device(parser)
    args = parser.parse_args()
    device = pick_device(args.device)
    cpu = device.type == "cpu"
    if cpu:
        torch.set_num_threads(1)  # here alone: see `measured`
    steps, repeats = args.steps or (40 if cpu else 390), args.repeats or (5 if cpu else 4)
    few, size = max(1, repeats // 2), args.size
    cores = pick_count("auto", 99, 1, random_images(1, 8, device))
    if cpu and list(args.only) == ["large"]:
        raise UserError("--only large measures networks that fill a GPU: name one with --device")
    if cpu and torch.cuda.is_available():
        raise UserError("to measure the CPU of a machine with a GPU, hide the GPU: set CUDA_VISIBLE_DEVICES to nothing")

    def rows_asked_for() -> Iterator[dict[str, Any]]:
        if "training" in args.only:
            for width in args.widths or ((1,) if cpu else (1, 4, 16)):
                yield from training_rows(width, size, max(1, round(steps / width)), repeats, device)
        if "parallel" in args.only:
            yield from parallel_rows([cores] if cpu else [4, 16], size, steps, few, device)
        if "large" in args.only and not cpu:
            yield from large_rows(few, device)
        if "stacked" in args.only:
            yield stacked_row(cores, size, max(1, steps // 4), few, device)
        if "data" in args.only:
            yield data_row(size, steps, few, device)
        if "line" in args.only:
            yield line_row(size, 2000, few, device)
        if "matching" in args.only:
            yield matching_row("resnet20", size, 2000, 250, few, device)
        if "resnet50" in args.only:
            yield matching_row("resnet50", 7 * size, 16, 16, 1, device)
        if "weights" in args.only:
            yield weight_matching_row(4, few, device)

    name = checkpoint.environment(device)["device"]
    print(f"{name}, {THREADS} threads, torch {torch.__version__}, {pick_precision(None, device)}, {repeats} repeats; ratio: median, min and max of the pairs")  # fmt: skip
    rows = []
    for row in rows_asked_for():
        if not cpu:
            row["GB"] = torch.cuda.max_memory_allocated(device) / 1e9
            torch.cuda.reset_peak_memory_stats(device)
        rows.append(row)
        print(show(pd.DataFrame([row])), flush=True)
        if args.out:
            checkpoint.save_text(pd.DataFrame(rows).to_csv(index=False), args.out)
    if rows:
        print("\n" + show(pd.DataFrame(rows)))
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"peak memory of a process: {peak / 1e6:.1f} GB")
    if "hours" in args.only:
        table = hours(PRESETS, max(1, steps // 5), device)
        print("\nhours of training on images in memory, networks side by side as --parallel auto does:\n" + show(table))
        if args.out:
            checkpoint.save_text(table.to_csv(index=False), args.out.with_stem(args.out.stem + "_hours"))


if __name__ == "__main__":
    cli.run(main)
