"""Permutation axes: which channels of a network move together; and permuting weights, masks and
signs by them.

common/align/axes.py derives the axes of a network from its traced graph.
"""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Segment(NamedTuple):
    """A stretch of a dimension: `size` channels of an axis, each `repeat` entries long (after a
    flatten over space).

    With `groups` > 1 it is the second dimension of a grouped convolution: the g-th block of rows
    has `size` entries that stand for the g-th `size` channels of the axis.
    """

    axis: str
    size: int
    repeat: int = 1
    groups: int = 1


Layout = tuple[Segment, ...] | None  # one dimension of a tensor; None: nothing along it may move


class Unit(NamedTuple):
    """Axes that move together: each is cut into `blocks` equal blocks, whose order all of them
    share.

    An ordinary axis is a unit of its own, of one block. Grouped convolutions and GroupNorm need
    more: channels may be permuted within a block, and whole blocks with the blocks of the other
    axes.
    """

    axes: tuple[str, ...]
    blocks: int


class Carrier(NamedTuple):
    """Where the channels of an axis can be seen: in `dim` of a graph node's output, `repeat`
    entries each from `offset`.

    node: after the nonlinearity, where one follows. before: the node ahead of that nonlinearity, or
    the same.
    """

    node: str
    before: str
    dim: int
    offset: int
    repeat: int


@dataclass(frozen=True)
class Axes:
    """The permutation axes of a network.

    dims: for every parameter and buffer, one Layout a dimension. sizes: channels of every axis that
    may be permuted. units: these axes, each once, in the units that move together. carriers: for
    each of them, the tensors that layers read it from, in graph order; for a residual stream the
    stem's and every block's. pinned: for every axis that must stay in order, its channels and the
    reason.
    """

    dims: dict[str, tuple[Layout, ...]]
    sizes: dict[str, int]
    units: tuple[Unit, ...]
    carriers: dict[str, tuple[Carrier, ...]]
    pinned: dict[str, tuple[int, str]]


def permute(
    tensors: dict[str, Tensor], dims: dict[str, tuple[Layout, ...]], permutation: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Permute weights, buffers, masks or signs; new tensors, the input stays as it is.

    permutation[axis][i] is the channel of the source that lands at position i; an axis without
    entry stays.
    """
    return {name: _permute_one(tensor, dims[name], permutation) for name, tensor in tensors.items()}


def _permute_one(
    tensor: Tensor, layouts: tuple[Layout, ...], permutation: dict[str, Tensor]
) -> Tensor:
    for dim, layout in enumerate(layouts):
        if layout and any(segment.axis in permutation for segment in layout):
            if layout[0].groups > 1:
                tensor = _permute_within_groups(tensor, layout[0], permutation[layout[0].axis])
            else:
                tensor = tensor.index_select(dim, _index(layout, permutation).to(tensor.device))
    return tensor.clone()


def _permute_within_groups(weight: Tensor, segment: Segment, order: Tensor) -> Tensor:
    """Permute the second dimension of a grouped convolution's weight, whose rows are in their new
    places already.
    """
    blocks = weight.unflatten(0, (segment.groups, -1))
    within = (order % segment.size).view(segment.groups, 1, segment.size, *[1] * (weight.dim() - 2))
    return blocks.gather(2, within.to(weight.device).expand_as(blocks)).flatten(0, 1)


def _index(layout: tuple[Segment, ...], permutation: dict[str, Tensor]) -> Tensor:
    pieces, offset = [], 0
    for axis, size, repeat, _ in layout:
        order = permutation.get(axis, torch.arange(size))
        pieces.append((offset + order[:, None] * repeat + torch.arange(repeat)).flatten())
        offset += size * repeat
    return torch.cat(pieces)


class Place(NamedTuple):
    """Where an axis lies in a tensor."""

    tensor: str
    dim: int
    offset: int
    repeat: int
    groups: int


def find_places(tensors: dict[str, Tensor], axes: Axes) -> dict[str, list[Place]]:
    """Every place in `tensors` along which each axis lies."""
    places: dict[str, list[Place]] = {axis: [] for axis in axes.sizes}
    for name in tensors:
        for dim, layout in enumerate(axes.dims[name]):
            offset = 0
            for axis, size, repeat, groups in layout or ():
                if axis in places:
                    places[axis].append(Place(name, dim, offset, repeat, groups))
                offset += size * repeat
    return places


def channel_rows(tensor: Tensor, place: Place, size: int) -> Tensor:
    """The entries of a tensor as one row a channel of the axis of `size` channels that lies at
    `place`.
    """
    if (
        place.groups > 1
    ):  # (groups * rows, channels a group, ...): the channels of a group meet its rows only
        return tensor.unflatten(0, (place.groups, -1)).transpose(1, 2).reshape(size, -1)
    return (
        tensor.movedim(place.dim, 0).narrow(0, place.offset, size * place.repeat).reshape(size, -1)
    )


def identity(axes: Axes) -> dict[str, Tensor]:
    """The permutation that leaves every axis as it is."""
    return {axis: torch.arange(size) for axis, size in axes.sizes.items()}


def random_permutation(axes: Axes, seed: int) -> dict[str, Tensor]:
    """A uniformly random permutation of every axis, among those that its unit allows."""
    generator = torch.Generator().manual_seed(seed)
    permutation = {}
    for names, blocks in axes.units:
        order = torch.randperm(blocks, generator=generator)
        for axis in names:
            size = axes.sizes[axis] // blocks
            within = torch.stack([torch.randperm(size, generator=generator) for _ in range(blocks)])
            permutation[axis] = (order[:, None] * size + within).flatten()
    return permutation


def inverse(permutation: dict[str, Tensor]) -> dict[str, Tensor]:
    return {axis: torch.argsort(index) for axis, index in permutation.items()}


@torch.no_grad()
def check_same_function(
    model: nn.Module, before: dict[str, Tensor], after: dict[str, Tensor], inputs: Tensor
) -> float:
    """Return the largest output difference of two state dicts relative to the largest output, in
    float64.

    Raises RuntimeError above 1e-6: the two are then not permutations of each other.
    """
    network = copy.deepcopy(model).cpu().double().eval()
    outputs = []
    for state in (before, after):
        double = {
            name: value.cpu().double() if value.is_floating_point() else value
            for name, value in state.items()
        }
        outputs.append(torch.func.functional_call(network, double, inputs.cpu().double()))
    difference = float(
        (outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max().clamp_min(1e-30)
    )
    if not difference < 1e-6:
        raise RuntimeError(
            f"the permuted network computes another function: outputs differ by {difference:.1e} "
            "of the largest"
        )
    return difference
