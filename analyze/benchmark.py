"""How fast this code is against the plain way, measured side by side in one run.

    python -m analyze.benchmark

Every row runs both ways in turn, several times, and prints the medians and the median of the paired ratios:
training (data included) of dense and masked networks against an fp32 NCHW loop with PIL transforms in a
DataLoader and torch.nn.utils.prune hooks; what a mask costs; the line between two networks
with REPAIR; one-pass matching against layer by layer, for
ResNet20 and for ResNet50 at 224 px; weight matching against its algorithm as it reads.
"""

import contextlib
import copy
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from analyze import interpolation
from common import cli, masking
from common.axes import find_axes, trace
from common.data import Batches, Resident
from common.matching import Moments, assign, channels_last, match_activations, match_weights, matched_weights, objective
from common.models import build_model
from common.permutation import Axes, identity, permute
from common.training import pick_device, pick_precision, train

BATCH, SPARSITY = 128, 0.9
PARTS = ("training", "line", "matching", "resnet50", "weights")


def random_images(count: int, size: int, device: torch.device) -> Resident:
    """Noise in the shape of a small-image set, with a test set too small to matter."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count + 8, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (count + 8,), generator=generator)
    pad = size // 8
    description = {"mean": [0.5] * 3, "std": [0.25] * 3}
    parts = (F.pad(images[8:], (pad,) * 4), labels[8:], images[:8], labels[:8])
    return Resident(*(part.to(device) for part in parts), pad, True, description)


# ---------------------------------------------------------------- the plain way


class PilImages(torch.utils.data.Dataset):
    """The training images as PIL images with torchvision's transforms, one at a time."""

    def __init__(self, data: Resident, augment: bool = True):
        from PIL import Image

        from common.vision import torchvision

        transforms, pad = torchvision.transforms, data.pad
        size = data.input_shape[-1]
        images = data.train[:, :, pad:-pad, pad:-pad].permute(0, 2, 3, 1).cpu().numpy()
        self.images, self.labels = [Image.fromarray(image) for image in images], data.train_labels.tolist()
        augmentation = [transforms.RandomCrop(size, pad), transforms.RandomHorizontalFlip()] if augment else []
        finish = [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.25,) * 3)]
        self.transform = transforms.Compose([*augmentation, *finish])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def plain_epoch(model: nn.Module, images: PilImages, device: torch.device) -> None:
    """One epoch as research code often writes it: fp32, NCHW, two loader workers, `.item()` at every step."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    loader = torch.utils.data.DataLoader(images, BATCH, shuffle=True, drop_last=True, num_workers=2)
    model.train()
    total = 0.0
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        loss = F.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        total += loss.item()


@torch.no_grad()
def plain_line(model: nn.Module, ends: list[dict[str, Tensor]], alphas: Any, images: PilImages, device: torch.device) -> list:  # fmt: skip
    """What `interpolation.along` measures, on one set of images as both splits, a pass of the loader for each number."""
    loader = torch.utils.data.DataLoader(images, 250, num_workers=2)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]

    def test() -> tuple[float, float]:
        model.eval()
        loss = correct = 0.0
        for x, y in loader:
            logits = model(x.to(device))
            loss += F.cross_entropy(logits, y.to(device), reduction="sum").item()
            correct += (logits.argmax(1).cpu() == y).sum().item()
        return loss / len(images), 100 * correct / len(images)

    rows = []
    for alpha in alphas:
        model.load_state_dict(interpolation.line(*ends, float(alpha)))
        rows += [test(), test()]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        model.train()
        for x, _ in loader:
            model(x.to(device))
        rows += [test(), test()]
    return rows


def match_layer_by_layer(
    source: nn.Module, target: nn.Module, axes: Axes, batches: Callable[[], Any]
) -> dict[str, Tensor]:
    """Match one axis after the other through ever longer sub-networks, each time over all batches.

    After each axis the source is permuted by what is known so far, as published re-basin codes do.
    """
    source = copy.deepcopy(source)
    original = {name: value.clone() for name, value in source.state_dict().items()}
    position = {node.name: i for i, node in enumerate(trace(source).graph.nodes)}
    permutation: dict[str, Tensor] = {}
    for axis in sorted(axes.sizes, key=lambda axis: position[axes.carriers[axis][-1].node]):
        carrier = axes.carriers[axis][-1]
        heads = [cut(model, carrier.node) for model in (target, source)]
        moments = Moments()
        with torch.no_grad():
            for images in batches():
                moments.add(*(channels_last(head(images), carrier, axes.sizes[axis]) for head in heads))
        permutation[axis] = assign(moments.correlation())
        source.load_state_dict(permute(original, axes.dims, permutation))
    return permutation


def match_weights_plainly(
    source: dict[str, Tensor], target: dict[str, Tensor], axes: Axes, seed: int = 0
) -> tuple[dict[str, Tensor], float]:
    """Weight matching as Algorithm 1 of Ainsworth et al. (2023) reads: every sweep solves every axis anew.

    Knows ordinary axes only, one block each. Returns the permutation and the objective that it reaches.
    """
    permutation = identity(axes)
    generator = torch.Generator().manual_seed(seed)
    best, improved = objective(source, target), True
    while improved:
        improved = False
        for position in torch.randperm(len(axes.sizes), generator=generator).tolist():
            axis, size = list(axes.sizes.items())[position]
            moved = permute(source, axes.dims, permutation)
            similarity = torch.zeros(size, size, dtype=torch.float64)
            for name, layouts in axes.dims.items():
                for dim, layout in enumerate(layouts if name in source else ()):
                    if layout and layout[0].axis == axis:
                        here, there = (tensors[name].movedim(dim, 0).reshape(size, -1) for tensors in (target, moved))
                        similarity += here @ there.T
            candidate = permutation | {axis: permutation[axis][assign(similarity)]}
            reached = objective(permute(source, axes.dims, candidate), target)
            if reached > best + 1e-7 * abs(best):
                permutation, best, improved = candidate, reached, True
    return permutation, best


def cut(model: nn.Module, last: str) -> fx.GraphModule:
    """The sub-network from the input to the graph node called `last`."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    traced = trace(model)
    for node in traced.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.name == last:
            graph.output(copies[node])
            break
    return fx.GraphModule(traced, graph)


# ---------------------------------------------------------------- measuring


def compare(
    name: str, ours: Callable[[], None], other: Callable[[], None], work: int, unit: str, repeats: int, warm_up: int = 1
) -> dict[str, Any]:
    """Run both in turn after a warm-up; medians of the rates and of the paired ratio ours / other."""
    times: list[tuple[float, float]] = []
    for repeat in range(warm_up + repeats):
        pair = []
        for run in (ours, other):
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            pair.append(time.perf_counter() - start)
        if repeat >= warm_up:
            times.append(tuple(pair))
    ratios = sorted(b / a for a, b in times)
    rates = [work / statistics.median(column) for column in zip(*times)]
    return {
        "measure": name,
        "ours": rates[0],
        "other": rates[1],
        "unit": unit,
        "ratio": statistics.median(ratios),
        "min": ratios[0],
        "max": ratios[-1],
    }


def training_rows(size: int, steps: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Dense and masked training against the plain way, and masked against dense."""
    data = random_images(steps * BATCH, size, device)
    pil = PilImages(data)
    precision = pick_precision(None, device)
    model = build_model("resnet20", 1, 10, data.input_shape)
    mask = masking.dense_mask(model.state_dict(), masking.prunable(model))
    mask = masking.prune_by_magnitude(model.state_dict(), mask, masking.keep_count(masking.size(mask), SPARSITY))

    def ours(with_mask: bool) -> None:
        network = copy.deepcopy(model)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            train(
                network, data, [0.02], name="benchmark", folder=Path(folder), seed=0, batch_size=BATCH, momentum=0.9,
                weight_decay=5e-4, precision=precision, mask=mask if with_mask else None,
            )  # fmt: skip

    plain, hooked = copy.deepcopy(model).to(device), copy.deepcopy(model).to(device)
    for name, entry in mask.items():
        module, _, parameter = name.rpartition(".")
        prune.custom_from_mask(hooked.get_submodule(module), parameter, entry.to(device))
    images = steps * BATCH
    about = f"resnet20 x1, {size} px, {precision}"
    return [
        compare(
            f"dense training, {about}",
            lambda: ours(False),
            lambda: plain_epoch(plain, pil, device),
            images,
            "images/s",
            repeats,
        ),
        compare(
            f"masked training, {about}",
            lambda: ours(True),
            lambda: plain_epoch(hooked, pil, device),
            images,
            "images/s",
            repeats,
        ),
        compare(
            f"masked over dense, {about}", lambda: ours(True), lambda: ours(False), images, "images/s", 2 * repeats
        ),
    ]


def line_row(size: int, images: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Three points of a line between two networks, with and without REPAIR, on `images` images as test and as train."""
    data = random_images(images, size, device)
    pil, precision, alphas = PilImages(data, augment=False), pick_precision(None, device), (0.0, 0.5, 1.0)
    ends = [build_model("resnet20", 1, 10, data.input_shape, seed).state_dict() for seed in (0, 1)]
    model = build_model("resnet20", 1, 10, data.input_shape)
    plain = copy.deepcopy(model).to(device)
    model.to(device, memory_format=torch.channels_last)

    def batches() -> Batches:
        return data.eval_batches("train")

    return compare(
        f"line with REPAIR, resnet20 x1, {size} px, {precision}",
        lambda: interpolation.along(model, *ends, alphas, batches, batches, precision),
        lambda: plain_line(plain, ends, alphas, pil, device), 5 * len(alphas) * images, "images/s", repeats,
    )  # fmt: skip


def matching_row(
    name: str, size: int, images: int, batch: int, repeats: int, device: torch.device, warm_up: int = 1
) -> dict[str, Any]:
    """One pass against layer by layer, on the same images."""
    data = random_images(images, size, device)
    source, target = (
        build_model(name, 1, 10, data.input_shape, seed).to(device, memory_format=torch.channels_last)
        for seed in (0, 1)
    )
    axes = find_axes(source, data.input_shape)

    def batches() -> Any:
        return (x for x, _ in data.eval_batches("train", batch))

    return compare(
        f"matching in one pass, {name} x1, {size} px", lambda: match_activations(source, target, axes, batches()),
        lambda: match_layer_by_layer(source, target, axes, batches), images, "images/s", repeats, warm_up,
    )  # fmt: skip


def weight_matching_row(width: float, repeats: int, device: torch.device) -> dict[str, Any]:
    """Our weight matching against the algorithm as it reads, from the same start in the same order."""
    networks = [build_model("resnet20", width, seed=seed).to(device) for seed in (0, 1)]
    axes, names = find_axes(networks[0], (3, 32, 32)), matched_weights(networks[0])
    ends = [{name: network.state_dict()[name] for name in names} for network in networks]
    return compare(
        f"weight matching, resnet20 x{width:g}", lambda: match_weights(*ends, axes),
        lambda: match_weights_plainly(*ends, axes), 1, "runs/s", repeats,
    )  # fmt: skip


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--size", type=cli.number(int, 8), default=32, help="image size in px (default: %(default)s)")
    parser.add_argument("--steps", type=cli.positive, default=15, help="training steps a repeat (default: %(default)s)")
    parser.add_argument("--repeats", type=cli.positive, default=5, help="default: %(default)s")
    cli.add_device(parser)
    args = parser.parse_args()
    device = pick_device(args.device)
    rows = training_rows(args.size, args.steps, args.repeats, device) if "training" in args.only else []
    few = max(1, args.repeats // 2)
    if "line" in args.only:
        rows.append(line_row(args.size, 5000, few, device))
    if "matching" in args.only:
        rows.append(matching_row("resnet20", args.size, 2000, 250, few, device))
    if "resnet50" in args.only:
        rows.append(matching_row("resnet50", 7 * args.size, 32, 16, 1, device, warm_up=0))
    if "weights" in args.only:
        rows.append(weight_matching_row(4, few, device))
    print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.repeats} repeats; ratio: median, min and max of the pairs"
    )
    print(
        pd.DataFrame(rows).to_string(
            index=False, formatters={"ours": "{:,.4g}".format, "other": "{:,.4g}".format}, float_format="{:.2f}".format
        )
    )


if __name__ == "__main__":
    cli.run(main)
