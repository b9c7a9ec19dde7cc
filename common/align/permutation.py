"""Permutation axes: which channels of a network move together; and permuting weights, masks and
signs by them.

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
    """Where an axis lies in a parameter, a buffer, or a node of the graph: along `dim`, at the
    (channels, entries) positions of each channel's entries; it has several after a flatten.

    groups: along the second dimension of a grouped convolution the channels of all groups lie side
    by side, more than the tensor has: the g-th block of rows sees the g-th part.
    """

    tensor: str
    dim: int
    axis: str
    positions: Tensor
    groups: int = 1


class BlockGroup(NamedTuple):
    """Axes that move together: each is cut into `blocks` equal blocks, whose order all of them
    share.

    An ordinary axis is a group of its own, of one block. Grouped convolutions, GroupNorm and the
    heads of attention need more: channels may be permuted within a block, and whole blocks with the
    blocks of the other axes.
    """

    axes: tuple[str, ...]
    blocks: int


@dataclass(frozen=True)
class Axes:
    """The permutation axes of a network.

    dims: for every parameter and buffer, where axes lie in it. sizes: channels of every axis that
    may be permuted. groups: these axes, each once, in the groups that move together. activations: for
    each of them, where in the nodes of the graph layers read it, in order, after a nonlinearity;
    for a residual stream the stem's and every block's. before: for every node the one ahead of that
    nonlinearity, or itself. pinned: for every layer whose channels must stay in order, how many
    they are and the reason. weights: the parameters of convolutions, linear layers and attention,
    which weight matching compares, also where they are not those of a module.
    """

    dims: dict[str, list[Place]]
    sizes: dict[str, int]
    groups: tuple[BlockGroup, ...]
    activations: dict[str, list[Place]]
    pre_activation: dict[str, str]
    pinned: dict[str, tuple[int, str]]
    weights: tuple[str, ...]

    def places(self, tensors: Iterable[str]) -> dict[str, list[Place]]:
        """For each axis where it lies in these tensors."""
        found: dict[str, list[Place]] = {axis: [] for axis in self.sizes}
        for place in itertools.chain(*(self.dims[name] for name in tensors)):
            found[place.axis].append(place)
        return found


def permute(
    tensors: dict[str, Tensor], dims: dict[str, list[Place]], permutation: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Permute weights, buffers, masks or signs; new tensors, the input stays as it is.

    permutation[axis][i] is the channel of the source that lands at position i; an axis without
    entry stays.
    """
    moved = {}
    for name, tensor in tensors.items():
        moving = [place for place in dims[name] if place.axis in permutation]
        moved[name] = tensor if moving else tensor.clone()
        for dim, places in itertools.groupby(moving, lambda place: place.dim):
            moved[name] = _move(moved[name], dim, [*places], permutation)
    return moved


def _move(tensor: Tensor, dim: int, places: list[Place], permutation: dict[str, Tensor]) -> Tensor:
    groups, size = places[0].groups, tensor.shape[dim]
    source = torch.arange(size * groups)
    for place in places:
        source[place.positions] = place.positions[permutation[place.axis]]
    # The rows of each group are in their new places already: now the columns of each.
    columns = (source % size).to(tensor.device).chunk(groups)
    parts = zip(tensor.chunk(groups), columns)
    return torch.cat([rows.index_select(dim, column) for rows, column in parts])


def by_channel(tensor: Tensor, place: Place) -> Tensor:
    """The entries of a tensor as (channels, entries, ...) of the axis that lies at `place`."""
    rows = tensor.unflatten(0, (place.groups, -1)).movedim(place.dim + 1, 1).flatten(0, 1)
    at = place.positions.flatten()
    if not torch.equal(at, torch.arange(len(rows))):
        rows = rows[at.to(tensor.device)]
    return rows.unflatten(0, place.positions.shape)


def identity(axes: Axes) -> dict[str, Tensor]:
    """The permutation that leaves every axis as it is."""
    return {axis: torch.arange(size) for axis, size in axes.sizes.items()}


def random_permutation(axes: Axes, seed: int) -> dict[str, Tensor]:
    """A uniformly random permutation of every axis, among those that its block group allows."""
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
    """Return the largest output difference of two state dicts relative to the largest output, in
    float64.

    Raises RuntimeError above 1e-6: the two are then not permutations of each other.
    """

    def double(value: Tensor) -> Tensor:
        return value.cpu().double() if value.is_floating_point() else value.cpu()

    outputs, kind = [], torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)  # of tensors that the forward pass makes itself
        with evaluation_mode(model):
            for state in (before, after):
                tensors = {**dict(model.named_buffers()), **state}  # some are not in a state dict
                weights = {name: double(value) for name, value in tensors.items()}
                call = model, weights, double(inputs)
                made = tree_leaves(torch.func.functional_call(*call, tie_weights=False))
                outputs.append(torch.cat([output.flatten() for output in made]))
    finally:
        torch.set_default_dtype(kind)
    one, other = outputs
    difference = float((one - other).abs().max() / one.abs().max().clamp_min(1e-30))
    if not difference < 1e-6:
        raise RuntimeError(
            f"the permuted network computes another function: outputs differ by {difference:.1e} "
            "of the largest"
        )
    return difference
