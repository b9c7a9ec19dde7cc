"""Baselines of analyze.benchmark: standard PyTorch code and published algorithms."""

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


def make_loader(data: Resident, batch_size: int, train: bool = True) -> DataLoader:
    """Return a DataLoader of the training images, as PIL images with torchvision's transforms.

    It has a persistent worker per core, at most 8; starting workers would dominate a short epoch.
    """
    from common.vision import torchvision

    transforms, size = torchvision.transforms, data.input_shape[-1]
    images = transforms.functional.center_crop(data.train, size).cpu()
    dataset = [*zip(map(transforms.ToPILImage(), images), data.train_labels.tolist())]
    steps = [transforms.RandomCrop(size, data.pad), transforms.RandomHorizontalFlip()] * train
    steps += [transforms.ToTensor(), transforms.Normalize(0.5, 0.25)]
    transform = transforms.Compose(steps)

    def collate(batch: list[tuple[Any, int]]) -> list[Tensor]:
        return default_collate([(transform(image), label) for image, label in batch])

    workers = {"num_workers": min(cores(), 8), "persistent_workers": True}
    return DataLoader(dataset, batch_size, train, collate_fn=collate, drop_last=train, **workers)


def add_prune_hooks(model: nn.Module, mask: Mask) -> nn.Module:
    """Prune the model in place with the hooks of torch.nn.utils.prune, and return it."""
    for name, layer_mask in mask.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        prune.custom_from_mask(module, "weight", layer_mask)
    return model


@torch.backends.cudnn.flags(enabled=True, allow_tf32=True)
def train_epoch(model: nn.Module, loader: DataLoader, device: torch.device) -> None:
    """Train an epoch as typical research code does: default fp32, NCHW, `.item()` every step."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    model.train()
    total = 0.0
    for x, y in loader:
        loss = F.cross_entropy(model(x.to(device)), y.to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        total += loss.item()


@torch.no_grad()
def match_layer_by_layer(
    source: nn.Module, target: nn.Module, axes: Axes, batches: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Match one axis at a time by the activations of all batches, as published re-basin codes do.

    Each axis runs the sub-network up to it, with the source permuted by the axes matched before.
    """
    original = source.state_dict()
    states = [target.state_dict(), original]
    graph_of = functools.cache(functools.partial(export, target))
    permutation: dict[str, Tensor] = {}
    for axis, (*_, place) in axes.activations.items():
        moments = Moments()
        for images in batches:
            runs = [graph_of(images.shape).start(state, images) for state in states]
            for node, _ in lockstep(runs):
                if node.name == place.tensor:  # the end of the sub-network
                    moments.add(*(samples(run.env[node], place) for run in runs))
                    break
        permutation[axis] = assign(moments.correlation())
        states[1] = permute(original, axes.dims, permutation)
    return permutation


def match_weights_every_axis(
    source: dict[str, Tensor], target: dict[str, Tensor], axes: Axes, seed: int = 0
) -> tuple[dict[str, Tensor], float]:
    """Match weights by Algorithm 1 of Ainsworth et al. (2023), solving every axis in every sweep.

    Like the authors' code, it permutes only the weights of the axis. Supports only axes of one
    block. Returns the permutation and its objective.
    """
    permutation, names = identity(axes), list(axes.sizes)
    places = axes.places(source)
    generator = torch.Generator().manual_seed(seed)
    improved = True
    while improved:
        improved = False
        for index in torch.randperm(len(names), generator=generator).tolist():
            axis, size = names[index], axes.sizes[names[index]]
            tensors = {place.tensor: source[place.tensor] for place in places[axis]}
            permuted = permute(tensors, axes.dims, permutation)
            similarity = torch.zeros(size, size, dtype=torch.float64)
            for place in places[axis]:
                pair = (target[place.tensor], permuted[place.tensor])
                rows, columns = (by_channel(weight, place).flatten(1) for weight in pair)
                similarity += (rows @ columns.T).cpu()
            order, before = assign(similarity), similarity.trace()
            if similarity[torch.arange(size), order].sum() > before + 1e-7 * abs(before):
                permutation[axis], improved = permutation[axis][order], True
    return permutation, objective(permute(source, axes.dims, permutation), target)
