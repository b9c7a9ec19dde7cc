"""Finds the permutation that maps the source network onto the target (paper, section 3)."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from common.align.graph import export, lockstep
from common.align.permutation import Axes, Place, by_channel, identity, permute, random_permutation

Permutation = dict[str, Tensor]


class Moments:
    """Streaming covariance and correlation of the channels of two tensors: fp32 within a batch,
    float64 across batches.

    Values are shifted by the mean of the first batch, because a large mean would cost a small
    variance its precision.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, target: Tensor, source: Tensor) -> None:
        """Add two (samples, channels) tensors of one batch."""
        if self.count == 0:
            self.shifts = target.mean(0), source.mean(0)
            self.sums = [torch.zeros_like(shift, dtype=torch.float64) for shift in self.shifts]
            self.squares = [total.clone() for total in self.sums]
            self.products = torch.outer(*self.sums)
        # Chunks that fit the CPU cache are several times faster.
        rows = max(4096, 2**18 // target.shape[1])
        for chunks in zip(target.split(rows), source.split(rows)):
            pair = [chunk - shift for chunk, shift in zip(chunks, self.shifts)]
            for values, total, square in zip(pair, self.sums, self.squares):
                total += values.sum(0)
                square += values.square().sum(0)
            self.products += pair[0].T @ pair[1]
        self.count += len(target)

    def covariance(self) -> Tensor:
        """The (target channels, source channels) covariance, in float64 on the CPU."""
        means = [total / self.count for total in self.sums]
        return (self.products / self.count - torch.outer(*means)).cpu()

    def correlation(self) -> Tensor:
        """The (target channels, source channels) correlation, 0 for channels of zero variance."""
        deviations = []
        for total, square in zip(self.sums, self.squares):
            second_moment = square / self.count
            variance = second_moment - (total / self.count).square()
            # A smaller variance is the rounding error of fp32 sums.
            deviations.append(torch.where(variance > 1e-7 * second_moment, variance, 0).sqrt())
        scale = torch.outer(*deviations).cpu()
        return torch.where(scale > 0, self.covariance() / scale, 0).clamp(-1, 1)


class Correlation(Moments):
    result = Moments.correlation


class Covariance(Moments):
    result = Moments.covariance


class Summed:
    """Sums a function of two (samples, channels) tensors over batches."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]):
        self.function, self.total = function, 0.0

    def add(self, target: Tensor, source: Tensor) -> None:
        if isinstance(self.total, float) and target.shape[1] > 1:
            self.matrix(target[:, 1:], source)  # a square matrix does not show a transposition
        self.total = self.total + self.matrix(target, source).double().cpu()

    def matrix(self, target: Tensor, source: Tensor) -> Tensor:
        matrix, channels = self.function(target, source), (target.shape[1], source.shape[1])
        if matrix.shape != channels:
            raise ValueError(
                f"{self.function.__name__} returned a {tuple(matrix.shape)} tensor instead of "
                f"(target channels, source channels) {channels}"
            )
        return matrix

    def result(self) -> Tensor:
        return self.total


# Choices of --statistic: a class with `add` and `result` as above, or a function f(target, source)
# that returns a (target channels, source channels) matrix, which is summed over batches.
SIMILARITIES: dict[str, Any] = {"correlation": Correlation, "covariance": Covariance}


def new_similarity(name: str) -> Any:
    """A new accumulator, with `add(target, source)` and `result()`."""
    similarity = SIMILARITIES[name]
    return similarity() if isinstance(similarity, type) else Summed(similarity)


@torch.no_grad()
def similarities(
    source: nn.Module,
    target: nn.Module,
    axes: Axes,
    batches: Iterable[Tensor],
    match_on: str = "post",
    statistic: str = "correlation",
    stream: str = "last",
) -> dict[str, Tensor]:
    """Compare the channels of every axis in one pass over `batches` of images, in fp32 and
    evaluation mode.

    match_on: activations after (`post`) or before (`pre`) the nonlinearity. statistic: a key of
    SIMILARITIES. stream: for an axis with several activations, as a residual stream, the `last` or
    the `mean` over all. Returns a (target channels, source channels) float64 matrix for each axis
    that has activations. One pass is enough: permuting a network's early channels does not change
    the values of later ones.
    """
    states = [model.state_dict() for model in (target, source)]
    accumulators: dict[str, list[Any]] = {axis: [] for axis in axes.sizes}
    by_node: dict[str, list[tuple[Any, Place]]] = {}
    for axis, places in axes.activations.items():
        for place in places if stream == "mean" else places[-1:]:
            accumulators[axis].append(new_similarity(statistic))
            node = place.tensor if match_on == "post" else axes.pre_activation[place.tensor]
            by_node.setdefault(node, []).append((accumulators[axis][-1], place))
    graph = functools.cache(functools.partial(export, target))  # a graph has a fixed batch size
    for images in batches:
        images = images.float()
        runs = [graph(images.shape).start(state, images) for state in states]
        for node, _ in lockstep(runs):
            for accumulator, place in by_node.get(node.name, ()):
                accumulator.add(*(samples(run.env[node], place) for run in runs))
    matrices = {}
    for axis, parts in accumulators.items():
        if parts:
            matrices[axis] = sum(part.result() for part in parts) / len(parts)
            if not matrices[axis].isfinite().all():
                raise ValueError(
                    f"{statistic} is NaN or inf along {axis}, perhaps because of dead channels"
                )
    return matrices


def samples(value: Tensor, place: Place) -> Tensor:
    """Flatten an activation to the (samples, channels) of the axis at `place`."""
    return by_channel(value, place).movedim(0, -1).flatten(0, -2)


def assign(similarity: Tensor) -> Tensor:
    """The permutation with the largest sum of matched similarities (linear assignment).

    Entry i is the source channel for target channel i.
    """
    return torch.from_numpy(linear_sum_assignment(similarity.numpy(), maximize=True)[1])


def assign_blocks(free: list[Tensor], fixed: list[Tensor], blocks: int) -> list[Tensor]:
    """The permutations of axes that share an order of blocks, with the largest summed similarity.

    Every axis has a similarity matrix. Within blocks the channels of `free` axes can be permuted,
    those of `fixed` axes not. Exact: solves the assignment within every pair of blocks, and then
    that of the blocks. Returns a permutation for each axis of `free`, then of `fixed`.
    """
    score = torch.zeros(blocks, blocks, dtype=torch.float64)
    orders: list[Tensor] = []  # (target block, source block, channel in the block)
    for position, similarity in enumerate([*free, *fixed]):
        size = len(similarity) // blocks
        pairs = similarity.unflatten(0, (blocks, size)).unflatten(2, (blocks, size)).transpose(1, 2)
        order = torch.arange(size).expand(blocks, blocks, size)
        if position < len(free) and size > 1:
            order = torch.stack([assign(pair) for pair in pairs.flatten(0, 1)]).view(
                blocks, blocks, size
            )
        score += pairs.gather(3, order[..., None]).sum((2, 3))
        orders.append(order)
    block = assign(score)
    return [
        (block[:, None] * order.shape[2] + order[torch.arange(blocks), block]).flatten()
        for order in orders
    ]


def match_activations(
    source: nn.Module, target: nn.Module, axes: Axes, batches: Iterable[Tensor], **options: str
) -> tuple[Permutation, list[dict]]:
    """Activation matching: for every axis the permutation of the source that correlates best with
    the target.

    `options` are those of `similarities`. Returns the permutation and a row per axis: its channels,
    how many move, and, if it has activations, the mean similarity of matched channels before and
    after.
    """
    matrices = similarities(source, target, axes, batches, **options)
    permutation = {}
    for names, blocks in axes.groups:
        if matrices.keys() >= set(names):
            permutation |= zip(names, assign_blocks([matrices[axis] for axis in names], [], blocks))
    permutation = identity(axes) | permutation  # an axis without activations stays in place
    rows = describe(permutation)
    for row in [row for row in rows if row["axis"] in matrices]:
        matrix, index = matrices[row["axis"]], permutation[row["axis"]]
        row["before"] = float(matrix.diagonal().mean())
        row["after"] = matched_sum(matrix, index) / len(index)
    return permutation, rows


def describe(permutation: Permutation) -> list[dict[str, Any]]:
    """A row per axis: how many channels it has, and how many move."""
    rows = []
    for axis, index in permutation.items():
        moved = int((index != torch.arange(len(index))).sum())
        rows.append({"axis": axis, "channels": len(index), "moved": moved})
    return rows


# ---------------------------------------------------------------- weight matching


def objective(source: dict[str, Tensor], target: dict[str, Tensor]) -> float:
    """The inner product <source, target>, summed over the tensors of `source`, in float64."""
    return sum(
        float((value * target[name]).sum(dtype=torch.float64)) for name, value in source.items()
    )


def products(
    size: int, places: list[Place], target: dict[str, Tensor], source: dict[str, Tensor]
) -> Tensor:
    """The (target channels, source channels) inner products of an axis of `size` channels, summed
    over `places`.
    """
    total = torch.zeros(size, size, dtype=torch.float64)
    for place in places:
        fixed, moving = (by_channel(x[place.tensor], place).flatten(1) for x in (target, source))
        total += (fixed @ moving.T).cpu()
    return total


def match_weights(
    source: dict[str, Tensor],
    target: dict[str, Tensor],
    axes: Axes,
    start: Permutation | None = None,
    seed: int = 0,
) -> tuple[Permutation, list[float]]:
    """Weight matching: raise <π(source), target> axis by axis until no axis improves it (Ainsworth
    et al. 2023, Alg. 1).

    `source` and `target` hold the tensors to match; mask-aware matching masks the source's first.
    Starts from `start` or the identity, and visits the axes in an order drawn from `seed`. Returns
    the permutation, and the objective, which never decreases, at the start and after every sweep.
    """
    permutation = identity(axes) | (start or {})
    permuted = permute(source, axes.dims, permutation)
    places = axes.places(source)
    tensors = {axis: {place.tensor for place in along} for axis, along in places.items()}
    groups = {axis: group for group in axes.groups for axis in group.axes}
    generator = torch.Generator().manual_seed(seed)
    names, history = list(axes.sizes), [objective(permuted, target)]
    stale = set(names)  # axes with a tensor that has changed since they were last optimal

    def improve(axis: str) -> float:
        """Permute an axis, and those of its group, and return by how much the objective rises."""
        members = [axis, *(other for other in groups[axis].axes if other != axis)]
        occurrences = [place.tensor for member in members for place in places[member]]
        current = {name: permuted[name] for name in occurrences}
        independent = len(occurrences) == len(current)
        matrices, counted = [], set()  # a tensor along which several members lie counts once
        for member in members:
            remaining = [place for place in places[member] if place.tensor not in counted]
            matrices.append(products(axes.sizes[member], remaining, target, permuted))
            counted.update(tensors[member])
        if independent:
            before = sum(float(matrix.trace()) for matrix in matrices)
        else:
            before = objective(current, target)
        # Where axes of a group, or one axis twice, lie along the same tensor, their best orders
        # depend on each other. The assignment is then a proposal, and accepted if the objective
        # rises: first with all axes of the group free, then with this one alone.
        for free in sorted({len(members), 1}, reverse=True):
            orders = assign_blocks(matrices[:free], matrices[free:], groups[axis].blocks)
            steps = dict(zip(members, orders))
            if independent:
                gain = sum(map(matched_sum, matrices, orders)) - before
            else:
                gain = objective(permute(current, axes.dims, steps), target) - before
            if gain > 1e-7 * abs(before):
                permuted.update(permute(current, axes.dims, steps))
                for member, step in steps.items():
                    permutation[member] = permutation[member][step]
                stale.update(name for name in names if tensors[name] & current.keys())
                if independent:
                    stale.discard(axis)  # the assignment was exact
                return gain
        return 0.0

    while stale:
        history.append(history[-1])
        for position in torch.randperm(len(names), generator=generator).tolist():
            axis = names[position]
            if axis in stale:
                stale.discard(axis)
                history[-1] += improve(axis)
    return permutation, history


def matched_sum(similarity: Tensor, order: Tensor) -> float:
    """The sum of the similarities that `order` matches."""
    return float(similarity[torch.arange(len(order)), order].sum())


def match_weights_best(
    source: dict[str, Tensor], target: dict[str, Tensor], axes: Axes, restarts: int, seed: int = 0
) -> Permutation:
    """The best of `restarts` weight matchings, from the identity and random permutations."""
    starts = [identity(axes), *(random_permutation(axes, seed + i) for i in range(1, restarts))]
    runs = [match_weights(source, target, axes, start, seed + i) for i, start in enumerate(starts)]
    return max(runs, key=lambda run: run[1][-1])[0]  # by the last objective
