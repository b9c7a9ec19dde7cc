"""Finding the permutation that maps the source network onto the target (paper, section 3)."""

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
    """Streaming correlation of the channels of two tensors: batches in fp32, totals in float64.

    Values are shifted by the mean of the first batch, so that large means do not swallow small
    variances.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, target: Tensor, source: Tensor) -> None:
        """Take in two (samples, channels) tensors of one batch."""
        if self.count == 0:
            self.shifts = target.mean(0), source.mean(0)
            self.sums = [torch.zeros_like(shift, dtype=torch.float64) for shift in self.shifts]
            self.squares = [total.clone() for total in self.sums]
            self.products = torch.outer(*self.sums)
        # A piece that stays in a processor's cache: several times faster.
        rows = max(4096, 2**18 // target.shape[1])
        for piece in zip(target.split(rows), source.split(rows)):
            pair = [t - shift for t, shift in zip(piece, self.shifts)]
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
        """The (target channels, source channels) correlation; a channel of zero variance correlates
        0 with everything.
        """
        deviations = []
        for total, square in zip(self.sums, self.squares):
            second = square / self.count
            variance = second - (total / self.count).square()
            # Below fp32's resolution of the sums a variance is rounding, not signal.
            deviations.append(torch.where(variance > 1e-7 * second, variance, 0).sqrt())
        scale = torch.outer(*deviations).cpu()
        return torch.where(scale > 0, self.covariance() / scale, 0).clamp(-1, 1)


class Correlation(Moments):
    result = Moments.correlation


class Covariance(Moments):
    result = Moments.covariance


class Summed:
    """A function of the two (samples, channels) tensors of a batch, summed over batches."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]):
        self.function, self.total = function, 0.0

    def add(self, target: Tensor, source: Tensor) -> None:
        if isinstance(self.total, float) and target.shape[1] > 1:
            self.matrix(target[:, 1:], source)  # once, because a transposed square does not show
        self.total = self.total + self.matrix(target, source).double().cpu()

    def matrix(self, target: Tensor, source: Tensor) -> Tensor:
        matrix, channels = self.function(target, source), (target.shape[1], source.shape[1])
        if matrix.shape != channels:
            raise ValueError(
                f"{self.function.__name__} made a {tuple(matrix.shape)} tensor, not one of "
                f"(target channels, source channels), {channels}"
            )
        return matrix

    def result(self) -> Tensor:
        return self.total


# By the name that --statistic takes: a class with `add` and `result` as above, or a function
# (target, source) -> (target channels, source channels) matrix that is summed over batches.
SIMILARITIES: dict[str, Any] = {"correlation": Correlation, "covariance": Covariance}


def new_similarity(name: str) -> Any:
    """What takes in batches by `add(target, source)` and gives the matrix by `result()`."""
    made = SIMILARITIES[name]
    return made() if isinstance(made, type) else Summed(made)


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
    """Correlate the channels of every axis in one pass over `batches` of images, in fp32 and
    evaluation mode.

    match_on: `post`, the values after the nonlinearity, or `pre`, before it. statistic: a name of
    SIMILARITIES. stream: where layers read an axis from several tensors, as from a residual stream,
    the `last` or the `mean` over all. Returns a (target channels, source channels) float64 matrix
    for each axis that is seen. One pass is enough: a permuted network computes the same function,
    so permuting early channels changes no later channel's values.
    """
    states = [model.state_dict() for model in (target, source)]
    moments: dict[str, list[Any]] = {axis: [] for axis in axes.sizes}
    wanted: dict[str, list[tuple[Any, Place]]] = {}
    for axis, places in axes.activations.items():
        for place in places if stream == "mean" else places[-1:]:
            moments[axis].append(new_similarity(statistic))
            node = place.tensor if match_on == "post" else axes.pre_activation[place.tensor]
            wanted.setdefault(node, []).append((moments[axis][-1], place))
    graph = functools.cache(functools.partial(export, target))  # holds for one number of images
    for images in batches:
        images = images.float()
        runs = [graph(images.shape).start(state, images) for state in states]
        for node, _ in lockstep(runs):
            for moment, place in wanted.get(node.name, ()):
                moment.add(*(samples(run.env[node], place) for run in runs))
    found = {}
    for axis, several in moments.items():
        if several:
            found[axis] = sum(moment.result() for moment in several) / len(several)
            if not found[axis].isfinite().all():
                raise ValueError(
                    f"{statistic} is NaN or inf along {axis}, perhaps of dead channels"
                )
    return found


def samples(value: Tensor, place: Place) -> Tensor:
    """An activation as (samples, channels) of the axis that lies at `place`."""
    return by_channel(value, place).movedim(0, -1).flatten(0, -2)


def assign(similarity: Tensor) -> Tensor:
    """The permutation that maximises the summed similarity; index[i] is the source channel for
    target position i.
    """
    return torch.from_numpy(linear_sum_assignment(similarity.numpy(), maximize=True)[1])


def assign_blocks(within: list[Tensor], fixed: list[Tensor], blocks: int) -> list[Tensor]:
    """The permutations of axes that share an order of blocks, of the largest summed similarity.

    A source block can go to the place of any target block; the channels of the `within` axes can
    also be permuted inside it, those of the `fixed` axes not. Exact: the best order inside is found
    for each pair of blocks, and then the best pairing. Returns a permutation for each of `within`,
    then for each of `fixed`.
    """
    score = torch.zeros(blocks, blocks, dtype=torch.float64)
    orders: list[Tensor] = []  # (target block, source block, channel within)
    for position, similarity in enumerate([*within, *fixed]):
        size = len(similarity) // blocks
        pairs = similarity.unflatten(0, (blocks, size)).unflatten(2, (blocks, size)).transpose(1, 2)
        order = torch.arange(size).expand(blocks, blocks, size)
        if position < len(within) and size > 1:
            order = torch.stack([assign(pair) for pair in pairs.flatten(0, 1)]).view(
                blocks, blocks, size
            )
        score += pairs.gather(3, order[..., None]).sum((2, 3))
        orders.append(order)
    placed = assign(score)
    return [
        (placed[:, None] * order.shape[2] + order[torch.arange(blocks), placed]).flatten()
        for order in orders
    ]


def match_activations(
    source: nn.Module, target: nn.Module, axes: Axes, batches: Iterable[Tensor], **how: str
) -> tuple[Permutation, list[dict]]:
    """Activation matching: for every axis the permutation of the source that correlates best with
    the target.

    `how` goes to `similarities`. Returns the permutation and a row an axis: channels, how many
    moved, mean matched similarity before and after.
    """
    matrices = similarities(source, target, axes, batches, **how)
    permutation = {}
    for names, blocks in axes.groups:
        if matrices.keys() >= set(names):  # inside an attention layer no values are seen
            permutation |= zip(names, assign_blocks([matrices[axis] for axis in names], [], blocks))
    rows = describe(permutation)
    for row in rows:
        matrix, index = matrices[row["axis"]], permutation[row["axis"]]
        row["before"] = float(matrix.diagonal().mean())
        row["after"] = float(matrix[torch.arange(len(index)), index].mean())
    return permutation, rows


def describe(permutation: Permutation) -> list[dict[str, Any]]:
    """A row an axis: how many channels it has, and how many move."""
    rows = []
    for axis, index in permutation.items():
        moved = int((index != torch.arange(len(index))).sum())
        rows.append({"axis": axis, "channels": len(index), "moved": moved})
    return rows


# ---------------------------------------------------------------- weight matching


def objective(source: dict[str, Tensor], target: dict[str, Tensor]) -> float:
    """The inner product <source, target> over all entries of `source`, in float64."""
    return sum(
        float((value * target[name]).sum(dtype=torch.float64)) for name, value in source.items()
    )


class Products:
    """The (target channels, source channels) inner products of an axis, summed over its places.

    They are kept from visit to visit, so that only what has changed in between is multiplied.
    """

    def __init__(self, channels: int) -> None:
        self.total = torch.zeros(channels, channels, dtype=torch.float64)  # on the CPU
        self.seen: dict[tuple[str, int], Tensor] = {}  # the source at each place, at the last visit

    def update(
        self, places: list[Place], target: dict[str, Tensor], source: dict[str, Tensor]
    ) -> Tensor:
        """The products with the source as it is now."""
        gained = None
        for place in places:
            now, then = source[place.tensor], self.seen.get(place[:2])
            if now is then:
                continue
            self.seen[place[:2]], fixed = now, target[place.tensor]
            if then is not None:
                if now.dim() > 1 and place.groups == 1:  # few neighbours move in later sweeps
                    side = int(place.dim == 0)
                    at = (now != then).movedim(side, 0).flatten(1).any(1).nonzero().flatten()
                    now, then, fixed = (one.index_select(side, at) for one in (now, then, fixed))
                now = now - then
            fixed, now = (by_channel(one, place).flatten(1) for one in (fixed, now))
            gained = fixed @ now.T if gained is None else gained.addmm_(fixed, now.T)
        if gained is not None:
            self.total += gained.cpu()
        return self.total

    def move(self, order: Tensor, source: dict[str, Tensor]) -> None:
        """Follow the source after this axis, and no other beside it, has moved."""
        there = (order != torch.arange(len(order))).nonzero().flatten()
        self.total[:, there] = self.total[:, order[there]]
        self.seen = {(tensor, dim): source[tensor] for tensor, dim in self.seen}


def match_weights(
    source: dict[str, Tensor],
    target: dict[str, Tensor],
    axes: Axes,
    start: Permutation | None = None,
    seed: int = 0,
) -> tuple[Permutation, list[float]]:
    """Weight matching: raise <π(source), target> axis by axis until no axis improves it (Ainsworth
    et al. 2023, Alg. 1).

    `source` and `target` hold the tensors to match, the source's already masked for mask-aware
    matching. Starts from `start` or the identity, and visits the axes in an order drawn from
    `seed`. Returns the permutation and the objective at the start and after every sweep, which
    never falls.
    """
    permutation = identity(axes) | (start or {})
    moved = permute(source, axes.dims, permutation)
    places = axes.places(source)
    tensors = {axis: {place.tensor for place in found} for axis, found in places.items()}
    groups = {axis: group for group in axes.groups for axis in group.axes}
    products = {axis: Products(size) for axis, size in axes.sizes.items()}
    generator = torch.Generator().manual_seed(seed)
    names, history = list(axes.sizes), [objective(moved, target)]
    stale = set(names)  # axes beside which something has moved since they were last optimal
    while stale:
        history.append(history[-1])
        for position in torch.randperm(len(names), generator=generator).tolist():
            axis = names[position]
            if axis not in stale:
                continue
            stale.discard(axis)
            members = [axis, *(other for other in groups[axis].axes if other != axis)]
            beside = [place.tensor for member in members for place in places[member]]
            touched = {name: moved[name] for name in beside}
            apart = len(beside) == len(touched)
            if not apart:
                products |= {member: Products(axes.sizes[member]) for member in members}
            sums, counted = [], set()  # a tensor along which several members lie counts once
            for member in members:
                here = [place for place in places[member] if place.tensor not in counted]
                sums.append(products[member].update(here, target, moved))
                counted |= tensors[member]
            best = sum(float(one.trace()) for one in sums) if apart else objective(touched, target)
            # Judged by the true gain: where axes of a group, or one axis twice, share a tensor,
            # their best orders depend on each other, and the assignment is a proposal. So there are
            # two of them, with the others' orders free or kept.
            for free in sorted({len(members), 1}, reverse=True):
                orders = assign_blocks(sums[:free], sums[free:], groups[axis].blocks)
                steps = dict(zip(members, orders))
                if apart:
                    gain = sum(map(matched_sum, sums, orders)) - best
                else:
                    gain = objective(permute(touched, axes.dims, steps), target) - best
                if gain > 1e-7 * abs(best):
                    moved |= permute(touched, axes.dims, steps)
                    history[-1] += gain
                    for member, step in steps.items():
                        permutation[member] = permutation[member][step]
                        products[member].move(step, moved)
                    stale |= {name for name in names if tensors[name] & touched.keys()}
                    if apart:
                        stale.discard(axis)  # the assignment was exact
                    break
    return permutation, history


def matched_sum(similarity: Tensor, order: Tensor) -> float:
    """The summed similarity of what `order` matches."""
    return float(similarity[torch.arange(len(order)), order].sum())


def match_weights_best(
    source: dict[str, Tensor], target: dict[str, Tensor], axes: Axes, restarts: int, seed: int = 0
) -> Permutation:
    """The best of `restarts` weight matchings: from the identity, and from random permutations."""
    starts = [identity(axes), *(random_permutation(axes, seed + i) for i in range(1, restarts))]
    tries = [match_weights(source, target, axes, start, seed + i) for i, start in enumerate(starts)]
    return max(tries, key=lambda found: found[1][-1])[0]
