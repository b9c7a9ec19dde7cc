"""How fast this code is against the plain way, measured side by side in one run.

    python -m analyze.benchmark [--device cuda] [--out benchmark.csv]

Every row runs both ways in turn, several times, and prints the medians of the rates and the median of the paired
ratios: training, data included, of dense and masked networks against an fp32 NCHW loop with PIL transforms in a
DataLoader and torch.nn.utils.prune hooks (analyze/plain.py), with the arithmetic that it reaches; what a mask costs;
networks side by side against one after the other; the data alone; the line between two networks with REPAIR; one-pass
matching against layer by layer, for ResNet20 and for ResNet50 at 224 px; weight matching against its algorithm as it
reads. Last, from the rates of a few steps of each network: how long the presets of run_all.sh take on this machine.
"""

import contextlib
import copy
import io
import json
import os
import resource
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from analyze import interpolation
from analyze.plain import BATCH, PilImages, match_layer_by_layer, match_weights_plainly, plain_epoch, plain_line
from common import checkpoint, cli, masking
from common.axes import find_axes
from common.data import Batches, Resident
from common.errors import UserError
from common.masking import Mask
from common.matching import match_activations, match_weights, matched_weights
from common.models import build_model
from common.parallel import pick_count, run_all
from common.training import pick_device, pick_precision, train

SPARSITY = 0.9
PARTS = ("training", "parallel", "stacked", "data", "line", "matching", "resnet50", "weights", "hours")
PRESETS = ("quick", "cifar10", "cifar100", "vgg11", "svhn", "imagenet")
IMAGES = {"glyphs": 10_000, "cifar10": 50_000, "cifar100": 50_000, "svhn": 73_257, "imagenet": 1_281_167}
Rate = Callable[[], float]  # runs something once; how much of it a second


def random_images(count: int, size: int, device: torch.device) -> Resident:
    """Noise in the shape of a small-image set, with a test set too small to matter."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count + 8, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (count + 8,), generator=generator)
    pad = size // 8
    description = {"mean": [0.5] * 3, "std": [0.25] * 3}
    parts = (F.pad(images[8:], (pad,) * 4), labels[8:], images[:8], labels[:8])
    return Resident(*(part.to(device) for part in parts), pad, True, description)


def network(name: str, width: float, size: int, seed: int = 0) -> nn.Module:
    return build_model(name, width, 1000 if name == "resnet50" else 10, (3, size, size), seed)


def plain_network(width: float, size: int, mask: Mask | None, device: torch.device) -> nn.Module:
    """A network whose masks are hooks of torch.nn.utils.prune."""
    model = network("resnet20", width, size).to(device)
    for name, entry in (mask or {}).items():
        module, _, parameter = name.rpartition(".")
        prune.custom_from_mask(model.get_submodule(module), parameter, entry.to(device))
    return model


def magnitude_mask(model: nn.Module) -> Mask:
    state = model.state_dict()
    whole = masking.dense_mask(state, masking.prunable(model))
    return masking.prune_by_magnitude(state, whole, masking.keep_count(masking.size(whole), SPARSITY))


def flops(model: nn.Module, size: int) -> float:
    """Floating-point operations of a training step, an image: forward and backward, a multiply-add as two."""
    model, images = copy.deepcopy(model), torch.randn(2, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    return counter.get_total_flops() / len(images)


# ---------------------------------------------------------------- rates


def timed(work: float, run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return work / (time.perf_counter() - start)


def training_rate(
    models: list[nn.Module], data: Resident, batch: int = BATCH, mask: Mask | None = None, parallel: str | None = None,
    compiled: bool = False,
) -> float:  # fmt: skip
    """Images a second of all `models` together, in the second of two epochs; the first sets everything up."""
    precision, images = pick_precision(None, data.device), data.steps(batch) * batch

    def run(model: nn.Module, folder: Path) -> None:
        ends: list[float] = []
        train(
            copy.deepcopy(model), data, [0.02] * 2, name="benchmark", folder=folder, seed=0, batch_size=batch, momentum=0.9,
            weight_decay=5e-4, precision=precision, mask=mask, at_epoch=lambda epoch: ends.append(time.perf_counter()),
            compiled=compiled, progress=False,
        )  # fmt: skip
        checkpoint.save_json(ends[1] - ends[0], folder / "seconds.json")

    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / str(number) for number in range(len(models))]
        with contextlib.redirect_stdout(io.StringIO()):  # here, because it holds for all threads
            run_all({str(f): partial(run, model, f) for model, f in zip(models, folders)}, parallel, 1, data)
        seconds = [json.loads((folder / "seconds.json").read_text()) for folder in folders]
    return len(models) * images / sum(seconds) if parallel is None else sum(images / each for each in seconds)


def stacked_rate(models: list[nn.Module], data: Resident) -> float:
    """Images a second of all `models` together, their parameters stacked and the step mapped over them by vmap."""
    device, base = data.device, models[0]
    dtype = torch.bfloat16 if pick_precision(None, device) == "bf16" else torch.float32
    for model in models:
        model.to(device)
    parameters, buffers = stack_module_state(models)
    momenta = {name: torch.zeros_like(value) for name, value in parameters.items()}

    def cast(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # vmap knows no autocast of BatchNorm
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}

    def loss(weights: dict, statistics: dict, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = functional_call(base, (cast(weights), cast(statistics)), (images.to(dtype),))
        return F.cross_entropy(logits.float(), labels)

    step = vmap(grad_and_value(loss))
    draws = [data.draw(seed, 0) for seed in range(len(models))]

    def epoch() -> None:
        for start in range(0, data.steps(BATCH) * BATCH, BATCH):
            batches = [data.batch(draw, slice(start, start + BATCH)) for draw in draws]
            gradients, _ = step(parameters, buffers, *(torch.stack(part) for part in zip(*batches)))
            with torch.no_grad():
                for name, value in parameters.items():
                    momenta[name].mul_(0.9).add_(gradients[name] + 5e-4 * value)
                    value.sub_(0.02 * momenta[name])

    epoch()
    return timed(len(models) * data.steps(BATCH) * BATCH, epoch)


# ---------------------------------------------------------------- rows


def compare(
    name: str, ours: Rate, other: Rate, unit: str, repeats: int, warm_up: int = 1, work: float = 0
) -> dict[str, Any]:
    """Run both in turn after a warm-up; medians of the rates and of the paired ratio ours / other.

    `work` is in floating-point operations a unit, where their rate says something.
    """
    pairs = [(ours(), other()) for _ in range(warm_up + repeats)][warm_up:]
    ratios = sorted(a / b for a, b in pairs)
    rates = [statistics.median(column) for column in zip(*pairs)]
    return {
        "measure": name, "ours": rates[0], "other": rates[1], "unit": unit, "ratio": statistics.median(ratios), "min": ratios[0],
        "max": ratios[-1], "TFLOP/s": rates[0] * work / 1e12 or None,
    }  # fmt: skip


def training_rows(width: float, size: int, steps: int, repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Dense and masked training against the plain way, and masked against dense."""
    data, model = random_images(steps * BATCH, size, device), network("resnet20", width, size)
    pil, mask, work = PilImages(data), magnitude_mask(model), flops(model, size)
    about = f"training, resnet20 x{width:g}, {size} px"
    dense, masked = (partial(training_rate, [model], data, mask=one) for one in (None, mask))
    others = [
        partial(timed, steps * BATCH, partial(plain_epoch, plain_network(width, size, one, device), pil, device))
        for one in (None, mask)
    ]
    yield compare(f"dense {about}", dense, others[0], "images/s", repeats, work=work)
    yield compare(f"masked {about}", masked, others[1], "images/s", repeats, work=work)
    yield compare(f"masked over dense {about}", masked, dense, "images/s", repeats)


def large_rows(repeats: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Networks that fill a GPU by themselves: what part of its arithmetic they reach, and whether --compile pays."""
    for name, width, size, batch in (("resnet20", 16, 32, 128), ("vgg11", 1, 32, 128), ("resnet50", 1, 224, 256)):
        data, model = random_images(10 * batch, size, device), network(name, width, size)
        eager, compiled = (partial(training_rate, [model], data, batch, compiled=one) for one in (False, True))
        about = f"eager over --compile, {name} x{width:g}, {size} px, batch {batch}"
        yield compare(about, eager, compiled, "images/s", repeats, warm_up=0, work=flops(model, size))


def parallel_rows(
    counts: list[int], size: int, steps: int, repeats: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Networks side by side, as the stages run them, against one after the other and against the plain way."""
    data = random_images(steps * BATCH, size, device)
    pil, mask = PilImages(data), magnitude_mask(network("resnet20", 1, size))
    plain = {kept is not None: plain_network(1, size, kept, device) for kept in (None, mask)}
    for count in counts:
        models = [network("resnet20", 1, size, seed) for seed in range(count)]
        about, work = f"resnet20 x1, {size} px", flops(models[0], size)
        together = partial(training_rate, models, data, parallel=str(count))
        alone = partial(training_rate, models[:2], data)
        yield compare(f"{count} side by side over one after the other, {about}", together, alone, "images/s", repeats, work=work)  # fmt: skip
        for kind, kept in (("dense", None), ("masked", mask)):
            other = partial(timed, steps * BATCH, partial(plain_epoch, plain[kept is not None], pil, device))
            name = f"{count} side by side, {kind}, over the plain way, {about}"
            yield compare(name, partial(together, mask=kept), other, "images/s", repeats, work=work)


def stacked_row(count: int, size: int, steps: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """The other way to train networks at once, which the stages do not take."""
    data = random_images(steps * BATCH, size, device)
    models = [network("resnet20", 1, size, seed) for seed in range(count)]
    together = partial(training_rate, models, data, parallel=str(count))
    return compare(
        f"{count} side by side over stacked by vmap, resnet20 x1, {size} px", together,
        partial(stacked_rate, copy.deepcopy(models), data), "images/s", repeats,
    )  # fmt: skip


def data_row(size: int, steps: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """The augmented batches of an epoch, with no network."""
    data = random_images(steps * BATCH, size, device)
    loader = torch.utils.data.DataLoader(PilImages(data), BATCH, shuffle=True, drop_last=True, num_workers=2)

    def consume(batches: Any) -> None:
        for images, labels in batches:
            images.to(device), labels.to(device)

    ours = partial(timed, steps * BATCH, lambda: consume(data.train_batches(BATCH, 0, 0)))
    return compare(f"data alone, {size} px", ours, partial(timed, steps * BATCH, lambda: consume(loader)), "images/s", repeats)  # fmt: skip


def line_row(size: int, images: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Three points of a line between two networks, with and without REPAIR, on `images` images as test and as train."""
    data = random_images(images, size, device)
    pil, precision, alphas = PilImages(data, augment=False), pick_precision(None, device), (0.0, 0.5, 1.0)
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
        lambda: timed(work, lambda: plain_line(plain, ends, alphas, pil, device)), "images/s", repeats,
    )  # fmt: skip


def matching_row(
    name: str, size: int, images: int, batch: int, repeats: int, device: torch.device, warm_up: int = 1
) -> dict[str, Any]:
    """One pass against layer by layer, on the same images."""
    data = random_images(images, size, device)
    source, target = (network(name, 1, size, seed).to(device, memory_format=torch.channels_last) for seed in (0, 1))
    axes = find_axes(source, data.input_shape)

    def batches() -> Any:
        return (x for x, _ in data.eval_batches("train", batch))

    return compare(
        f"matching in one pass, {name} x1, {size} px",
        lambda: timed(images, lambda: match_activations(source, target, axes, batches())),
        lambda: timed(images, lambda: match_layer_by_layer(source, target, axes, batches)), "images/s", repeats, warm_up,
    )  # fmt: skip


def weight_matching_row(width: float, repeats: int, device: torch.device) -> dict[str, Any]:
    """Our weight matching against the algorithm as it reads, from the same start in the same order."""
    networks = [network("resnet20", width, 32, seed).to(device) for seed in (0, 1)]
    axes, names = find_axes(networks[0], (3, 32, 32)), matched_weights(networks[0])
    ends = [{name: one.state_dict()[name] for name in names} for one in networks]
    return compare(
        f"weight matching, resnet20 x{width:g}", lambda: timed(1, lambda: match_weights(*ends, axes)),
        lambda: timed(1, lambda: match_weights_plainly(*ends, axes)), "runs/s", repeats,
    )  # fmt: skip


# ---------------------------------------------------------------- presets


def epochs(preset: str) -> dict[tuple[str, float, str], float]:
    """Epochs that a preset of run_all.sh trains, by (model, width, data set), read off the commands that it prints."""
    script = Path(__file__).parents[1] / "run_all.sh"
    plain = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME")}
    dry = subprocess.run(["bash", script, preset], env=plain | {"DRY_RUN": "1"}, capture_output=True, text=True, check=True)  # fmt: skip
    total: dict[tuple[str, float, str], float] = {}
    dense: dict[str, tuple] = {}  # what each dense folder holds, and the epochs it was trained
    for line in dry.stdout.splitlines():
        words = shlex.split(line)
        flags = {
            word: [value for value in _until_flag(words[place + 1 :])]
            for place, word in enumerate(words) if word.startswith("--")
        }  # fmt: skip
        if words[1] == "train_dense.py":
            (name,), (model,), (width,), (seed,), (out,) = (flags[key] for key in ("--dataset", "--model", "--width", "--seed", "--out"))  # fmt: skip
            key = (model, float(width), name)
            count = int(flags.get("--epochs", [cli.paper_value(cli.PAPER["dense"]["epochs"], name)])[0])
            share = int(flags["--limit-train"][0]) / IMAGES[name] if "--limit-train" in flags else 1
            dense[f"{out}/seed{seed}"] = (key, count, share)
        elif words[1] in ("prune_imp.py", "train_sparse.py"):
            key, whole, share = dense[flags.get("--dense", flags.get("--weights"))[0]]
            sparsities = [float(value) for value in flags["--sparsity"]]
            if words[1] == "prune_imp.py":
                each = int(flags.get("--epochs", [cli.paper_value(cli.PAPER["imp"]["epochs"], key[2])])[0])
                count = rounds(sparsities) * each
            else:
                count = len(sparsities) * sum(whole - int(k) for k in flags["--rewind"])
        else:
            continue
        total[key] = total.get(key, 0) + count * share
    return total


def _until_flag(words: list[str]) -> list[str]:
    return words[: next((place for place, word in enumerate(words) if word.startswith("--")), len(words))]


def rounds(sparsities: list[float]) -> int:
    """Rounds of an IMP chain through all of `sparsities`, at 20% of the remaining weights a round."""
    left, count = 1.0, 0
    for sparsity in sorted(sparsities):
        while left > 1 - sparsity + 1e-9:
            left, count = max(0.8 * left, 1 - sparsity), count + 1
    return count


def hours(presets: tuple[str, ...], steps: int, device: torch.device) -> pd.DataFrame:
    """A row a preset and network: epochs, images a second measured over a few steps, and hours, training alone."""
    rates: dict[tuple, float] = {}
    rows = []
    for preset in presets:
        for (model, width, name), count in epochs(preset).items():
            size = {"imagenet": 224, "glyphs": 16}.get(name, 32)
            batch = {"imagenet": 256 if device.type == "cuda" else 16}.get(name, BATCH)
            key = (model, width, size)
            if key not in rates:
                few = max(1, round(steps / width**2)) if device.type == "cpu" else steps
                few = 1 if name == "imagenet" and device.type == "cpu" else few
                data = random_images(few * batch, size, device)
                many = pick_count("auto", 99, width, data) if name != "imagenet" else 1
                models = [network(model, width, size, seed) for seed in range(many)]
                rates[key] = training_rate(models, data, batch, parallel=str(many) if many > 1 else None)
            rows.append({
                "preset": preset, "model": model, "width": width, "dataset": name, "epochs": round(count), "images/s": rates[key],
                "hours": count * IMAGES[name] / rates[key] / 3600,
            })  # fmt: skip
    return pd.DataFrame(rows)


def show(table: pd.DataFrame) -> str:
    forms = {name: "{:,.4g}".format for name in ("ours", "other", "images/s", "hours")}
    return table.to_string(index=False, na_rep="", formatters=forms, float_format="{:.2f}".format)


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--size", type=cli.number(int, 8), default=32, help="image size in px (default: %(default)s)")
    parser.add_argument("--steps", type=cli.positive, help="training steps a repeat (default: 15 on a CPU, else 200)")
    parser.add_argument("--repeats", type=cli.positive, help="default: 5 on a CPU, else 3")
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
    steps, repeats = args.steps or (15 if cpu else 200), args.repeats or (5 if cpu else 3)
    few, size = max(1, repeats // 2), args.size
    cores = pick_count("auto", 99, 1, random_images(1, 8, device))
    if cpu and torch.cuda.is_available():
        raise UserError("to measure the CPU of a machine with a GPU, hide the GPU: set CUDA_VISIBLE_DEVICES to nothing")

    def measured() -> Iterator[dict[str, Any]]:
        if "training" in args.only:
            for width in args.widths or ((1,) if cpu else (1, 4, 16)):
                yield from training_rows(width, size, max(1, round(steps / width)), repeats, device)
            if not cpu:
                yield from large_rows(few, device)
        if "parallel" in args.only:
            yield from parallel_rows([cores] if cpu else [4, 16], size, steps, few, device)
        if "stacked" in args.only:
            yield stacked_row(cores, size, max(1, steps // 4), few, device)
        if "data" in args.only:
            yield data_row(size, steps, few, device)
        if "line" in args.only:
            yield line_row(size, 5000, few, device)
        if "matching" in args.only:
            yield matching_row("resnet20", size, 2000, 250, few, device)
        if "resnet50" in args.only:
            yield matching_row("resnet50", 7 * size, 32, 16, 1, device, warm_up=0)
        if "weights" in args.only:
            yield weight_matching_row(4, few, device)

    name = checkpoint.environment(device)["device"]
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {pick_precision(None, device)}, {repeats} repeats; ratio: median, min and max of the pairs")  # fmt: skip
    rows = []
    for row in measured():
        if not cpu:
            row["GB"] = torch.cuda.max_memory_allocated(device) / 1e9
            torch.cuda.reset_peak_memory_stats(device)
        rows.append(row)
        print(show(pd.DataFrame([row])), flush=True)
        if args.out:
            checkpoint.save_text(pd.DataFrame(rows).to_csv(index=False), args.out)
    if rows:
        print("\n" + show(pd.DataFrame(rows)))
    print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")
    if "hours" in args.only:
        table = hours(PRESETS, max(1, steps // 5), device)
        print("\nhours of training, networks side by side as --parallel auto does:\n" + show(table))
        if args.out:
            checkpoint.save_text(table.to_csv(index=False), args.out.with_stem(args.out.stem + "_hours"))


if __name__ == "__main__":
    cli.run(main)
