"""The plain way to do what this project does fast, to measure against: training, evaluation and matching."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from analyze import interpolation
from common.axes import trace
from common.data import Resident
from common.matching import Moments, assign, channels_last, objective
from common.parallel import cores
from common.permutation import Axes, identity, permute

BATCH = 128


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


def plain_loader(images: PilImages, batch: int = BATCH, shuffle: bool = True) -> torch.utils.data.DataLoader:
    """Batches from a worker a core, at most 8, which stay from epoch to epoch: starting them would weigh much in a short one."""
    return torch.utils.data.DataLoader(images, batch, shuffle, drop_last=shuffle, num_workers=min(cores(), 8), persistent_workers=True)  # fmt: skip


def plain_epoch(model: nn.Module, loader: torch.utils.data.DataLoader, device: torch.device) -> None:
    """One epoch as research code often writes it: fp32, NCHW, `.item()` at every step."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
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
def plain_line(model: nn.Module, ends: list[dict[str, Tensor]], alphas: Any, loader: torch.utils.data.DataLoader, device: torch.device) -> list:  # fmt: skip
    """What `interpolation.along` measures, on one set of images as both splits, a pass of the loader for each number."""
    images = len(loader.dataset)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]

    def test() -> tuple[float, float]:
        model.eval()
        loss = correct = 0.0
        for x, y in loader:
            logits = model(x.to(device))
            loss += F.cross_entropy(logits, y.to(device), reduction="sum").item()
            correct += (logits.argmax(1).cpu() == y).sum().item()
        return loss / images, 100 * correct / images

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
                        similarity += (here @ there.T).cpu()
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
