"""What analyze.benchmark measures against: standard PyTorch code, and published algorithms."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.data import DataLoader, default_collate

from common.align.graph import export, lockstep
from common.align.matching import Moments, assign, objective, samples
from common.align.permutation import Axes, by_channel, identity, permute
from common.data import Resident
from common.masking import Mask
from common.runtime.parallel import cores


def loader(data: Resident, batch: int, train: bool = True) -> DataLoader:
    """Batches of the training images, as PIL images with torchvision's transforms.

    From a worker a core, at most 8, which stay: their start would weigh much in a short epoch.
    """
    from common.vision import torchvision

    transforms, size = torchvision.transforms, data.input_shape[-1]
    images = transforms.functional.center_crop(data.train, size).cpu()
    pictures = [*zip(map(transforms.ToPILImage(), images), data.train_labels.tolist())]
    steps = [transforms.RandomCrop(size, data.pad), transforms.RandomHorizontalFlip()] * train
    steps += [transforms.ToTensor(), transforms.Normalize(0.5, 0.25)]
    transform = transforms.Compose(steps)

    def collate(rows: list[tuple[Any, int]]) -> list[Tensor]:
        return default_collate([(transform(picture), label) for picture, label in rows])

    workers = {"num_workers": min(cores(), 8), "persistent_workers": True}
    return DataLoader(pictures, batch, train, collate_fn=collate, drop_last=train, **workers)


def pruned(model: nn.Module, mask: Mask) -> nn.Module:
    """The network with hooks of torch.nn.utils.prune."""
    for name, kept in mask.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        prune.custom_from_mask(module, "weight", kept)
    return model


@torch.backends.cudnn.flags(enabled=True, allow_tf32=True)
def train_epoch(model: nn.Module, batches: DataLoader, device: torch.device) -> None:
    """One epoch as research code often has it: fp32 by PyTorch's defaults, NCHW, `.item()` at every
    step.
    """
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    model.train()
    total = 0.0
    for x, y in batches:
        loss = F.cross_entropy(model(x.to(device)), y.to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        total += loss.item()


@torch.no_grad()
def match_layer_by_layer(
    source: nn.Module, target: nn.Module, axes: Axes, batches: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Match axis after axis through ever longer sub-networks, each time over all batches.

    After each axis the source is permuted by what is known so far, as published re-basin codes do.
    """
    original = source.state_dict()
    ends = [target.state_dict(), original]
    graph_of = functools.cache(functools.partial(export, target))
    permutation: dict[str, Tensor] = {}
    for axis, (*_, place) in axes.activations.items():
        moments = Moments()
        for images in batches:
            runs = [graph_of(images.shape).start(end, images) for end in ends]
            for node, _ in lockstep(runs):
                if node.name == place.tensor:  # the sub-network up to here
                    moments.add(*(samples(run.env[node], place) for run in runs))
                    break
        permutation[axis] = assign(moments.correlation())
        ends[1] = permute(original, axes.dims, permutation)
    return permutation


def match_weights_every_axis(
    source: dict[str, Tensor], target: dict[str, Tensor], axes: Axes, seed: int = 0
) -> tuple[dict[str, Tensor], float]:
    """Algorithm 1 of Ainsworth et al. (2023): every sweep solves every axis anew.

    Knows axes of one block each. Returns the permutation and the objective that it reaches.
    """
    permutation, names = identity(axes), list(axes.sizes)
    places = axes.places(source)
    generator = torch.Generator().manual_seed(seed)
    best, improved = objective(source, target), True
    while improved:
        improved = False
        for position in torch.randperm(len(names), generator=generator).tolist():
            axis, size = names[position], axes.sizes[names[position]]
            moved = permute(source, axes.dims, permutation)
            similarity = torch.zeros(size, size, dtype=torch.float64)
            for place in places[axis]:
                pair = (target[place.tensor], moved[place.tensor])
                here, there = (by_channel(one, place).flatten(1) for one in pair)
                similarity += (here @ there.T).cpu()
            candidate = permutation | {axis: permutation[axis][assign(similarity)]}
            reached = objective(permute(source, axes.dims, candidate), target)
            if reached > best + 1e-7 * abs(best):
                permutation, best, improved = candidate, reached, True
    return permutation, best
