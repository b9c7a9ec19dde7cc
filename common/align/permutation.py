"""The permutation axes of a network, which are channels that move together, and the permutation of
weights, masks and signs along them.

common/align/axes.py derives the axes of a network from its graph.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from common.align.graph import evaluation_mode


class Place(NamedTuple):
    """Where an axis lies in a parameter, a buffer, or the value of a node of the graph.

    dim: the dimension. positions: (channels, entries) indices along it; a channel has several
    entries after a flatten. groups: 1, but along dimension 1 of a grouped convolution's weight the
    number of groups: positions // size is the group, whose block of rows they index.
    """

    tensor: str
    dim: int
    axis: str
    positions: Tensor
    groups: int = 1


class BlockGroup(NamedTuple):
    """Axes that move together: each consists of `blocks` equal blocks, in an order that all share.

    An ordinary axis is a group of its own with one block. Grouped convolutions, GroupNorm and
    attention heads have more: channels can be permuted within a block, and whole blocks together
    with those of the other axes.
    """

    axes: tuple[str, ...]
    blocks: int


@dataclass(frozen=True)
class Axes:
    """The permutation axes of a network.

    dims: for every parameter and buffer, where axes lie in it. sizes: the number of channels of
    every axis. groups: the axes in groups that move together, each axis in one. activations: for
    every axis, where it lies in the activations that layers read, in graph order and after the
    nonlinearity; for a residual stream, in the output of the stem and of every block.
    pre_activation: for every node of the graph the node ahead of its nonlinearity, or itself.
    pinned: for every layer whose channels cannot be permuted, their number and the reason.
    weights: the weights and biases of convolutions, linear layers and attention, which weight
    matching compares; they need not belong to such modules.
    """

    dims: dict[str, list[Place]]
    sizes: dict[str, int]
    groups: tuple[BlockGroup, ...]
    activations: dict[str, list[Place]]
    pre_activation: dict[str, str]
    pinned: dict[str, tuple[int, str]]
    weights: tuple[str, ...]

    def places(self, tensors: Iterable[str]) -> dict[str, list[Place]]:
        """For every axis, where it lies in these tensors."""
        places: dict[str, list[Place]] = {axis: [] for axis in self.sizes}
        for place in itertools.chain(*(self.dims[name] for name in tensors)):
            places[place.axis].append(place)
        return places


def permute(
    tensors: dict[str, Tensor], dims: dict[str, list[Place]], permutation: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return permuted copies of weights, buffers, masks or signs.

    permutation[axis][i] is the source channel that moves to position i. Axes that are not in
    `permutation` stay.
    """
    moved = {}
    for name, tensor in tensors.items():
        moving = [place for place in dims[name] if place.axis in permutation]
        moved[name] = tensor if moving else tensor.clone()
        for dim, places in itertools.groupby(moving, lambda place: place.dim):
            moved[name] = _permute_dim(moved[name], dim, [*places], permutation)
    return moved


def _permute_dim(
    tensor: Tensor, dim: int, places: list[Place], permutation: dict[str, Tensor]
) -> Tensor:
    groups, size = places[0].groups, tensor.shape[dim]
    source = torch.arange(size * groups)
    for place in places:
        source[place.positions] = place.positions[permutation[place.axis]]
    # Dimension 0 is permuted before: each group of rows has the columns of its new position.
    columns = (source % size).to(tensor.device).chunk(groups)
    parts = zip(tensor.chunk(groups), columns)
    return torch.cat([rows.index_select(dim, column) for rows, column in parts])


def by_channel(tensor: Tensor, place: Place) -> Tensor:
    """Gather the entries of an axis, which lies at `place`: (channels, entries, ...)."""
    rows = tensor.unflatten(0, (place.groups, -1)).movedim(place.dim + 1, 1).flatten(0, 1)
    index = place.positions.flatten()
    if not torch.equal(index, torch.arange(len(rows))):
        rows = rows[index.to(tensor.device)]
    return rows.unflatten(0, place.positions.shape)


def identity(axes: Axes) -> dict[str, Tensor]:
    """The identity permutation of every axis."""
    return {axis: torch.arange(size) for axis, size in axes.sizes.items()}


def random_permutation(axes: Axes, seed: int) -> dict[str, Tensor]:
    """A uniformly random permutation of every axis, among those that its group allows."""
    generator = torch.Generator().manual_seed(seed)
    permutation = {}
    for names, blocks in axes.groups:
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
    """Return the largest difference between the outputs of two state dicts, relative to the largest
    output.

    Raises RuntimeError above 1e-6, in float64, or 1e-3, in float32 if the network's code is bound
    to that: the two are not permutations of each other.
    """

    def outputs(state: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        def cast(value: Tensor) -> Tensor:
            return value.cpu().to(dtype) if value.is_floating_point() else value.cpu()

        tensors = {**dict(model.named_buffers()), **state}  # not all are in a state dict
        weights = {name: cast(value) for name, value in tensors.items()}
        default_dtype = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)  # of tensors that the forward pass creates
            with evaluation_mode(model):
                call = model, weights, cast(inputs)
                leaves = tree_leaves(torch.func.functional_call(*call, tie_weights=False))
        finally:
            torch.set_default_dtype(default_dtype)
        return torch.cat([leaf.flatten() for leaf in leaves if isinstance(leaf, Tensor)])

    try:
        old, new = (outputs(state, torch.float64) for state in (before, after))
        tolerance = 1e-6
    except RuntimeError:
        old, new = (outputs(state, torch.float32) for state in (before, after))
        tolerance = 1e-3
    difference = float((old - new).abs().max() / old.abs().max().clamp_min(1e-30))
    if not difference < tolerance:
        raise RuntimeError(
            f"the permuted network computes another function: outputs differ by {difference:.1e} "
            "of the largest"
        )
    return difference
