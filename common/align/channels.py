"""Labels: which channel of a network lies where in a tensor, and what operators do to that.

The rules of operators are made of these: values meet (what lies along the same dimension is the
same), are reduced (the order is free: what is left are blocks), slide (the order must stay), are
reshaped (what is joined to a channel becomes its entries), and lie side by side (cat).
"""

import bisect
import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

ENTRY = 2**32  # a label is the number of a channel, plus ENTRY times which of its entries it is


class Value(NamedTuple):
    """A tensor of the graph. Each label broadcasts to its shape, has size one along dimensions that
    it says nothing about, and names the channel that lies at each index of the others.
    """

    shape: tuple[int, ...]
    labels: tuple[Tensor, ...] = ()


def along(label: Tensor) -> set[int]:
    """The dimensions that a label tells about."""
    return {dim for dim, size in enumerate(label.shape) if size > 1}


def in_order(x: Value) -> set[int]:
    """The dimensions along which nothing may move."""
    return {dim for dim, size in enumerate(x.shape) if size > 1}.difference(*map(along, x.labels))


def only(dims: Iterable[int], shape: Iterable[int]) -> list[int]:
    """A shape of size one along all other dimensions."""
    return [size if dim in dims else 1 for dim, size in enumerate(shape)]


def arrange(x: Value, order: Iterable[int | None]) -> Value:
    """Dimensions in another order, without those of size one that it leaves out; None is new."""
    order = tuple(order)
    old = [dim for dim in order if dim is not None]
    gone = [dim for dim in range(len(x.shape)) if dim not in old]
    at = (0,) * len(gone) + tuple(dim if dim is None else slice(None) for dim in order)
    shape = tuple(1 if dim is None else x.shape[dim] for dim in order)
    return Value(shape, tuple(label.permute(gone + old)[at] for label in x.labels))


class Channels:
    """What is known of the channels of a network: which are the same, in a block, or in order."""

    def __init__(self) -> None:
        self.starts = [0]  # of each vector of channels that is made, and the end of the last
        self.ties = [torch.zeros(5, 0, dtype=torch.int64)]  # two channels, their entries, a mark
        self.members = [torch.zeros(2, 0, dtype=torch.int64)]  # a block, a channel in it
        self.pins: list[tuple[Tensor, str]] = []
        self.columns: dict[int, Tensor] = {}  # what those of grouped convolutions stand for
        self.where = ""  # the operator, for reasons

    def fresh(self, shape: Iterable[int]) -> Tensor:
        """New channels."""
        shape = tuple(shape)
        self.starts.append(self.starts[-1] + math.prod(shape))
        return torch.arange(self.starts[-2], self.starts[-1]).view(shape)

    def constant(self, shape: Iterable[int], dims: Iterable[int]) -> Value:
        """All the same along `dims`, so that any channels may lie there."""
        shape = tuple(shape)
        return self.value(shape, [self.fresh(only({dim}, shape)) for dim in dims if shape[dim] > 1])

    def vector(self, label: Tensor) -> int:
        """The vector that (the first of) its channels were made in."""
        return bisect.bisect(self.starts, int(label.flatten()[0] % ENTRY)) - 1

    def tie(self, one: Tensor, other: Tensor, mark: Tensor | int = 0) -> None:
        """Channels of two labels are the same, entry by entry; others have another mark."""
        rows = one % ENTRY, other % ENTRY, one // ENTRY, other // ENTRY, torch.as_tensor(mark)
        self.ties.append(torch.stack(torch.broadcast_tensors(*rows)).flatten(1))

    def tell(self, label: Tensor) -> None:
        """These channels, and no others, take part in something, which is told by a mark."""
        self.tie(label, label, len(self.ties))

    def pin(self, what: Any, why: str) -> None:
        """A label, or all labels of values, must stay in order."""

        def one(leaf: Any) -> None:
            if isinstance(leaf, Tensor):
                self.pins.append((leaf % ENTRY, f"{self.where} {why}"))

        fx.node.map_aggregate(what, one)

    def group(self, label: Tensor, dims: Iterable[int]) -> Tensor | None:
        """What is left of a label when the order along `dims` is free: blocks of channels."""
        dims = sorted(along(label) & {*dims})
        if not dims:
            return label
        if len(dims) == len(along(label)):
            return None
        rows = label.movedim(dims, [*range(-len(dims), 0)]).flatten(-len(dims)).flatten(0, -2)
        entry, shape = rows[:, 0] // ENTRY, only(along(label) - {*dims}, label.shape)
        if (rows // ENTRY != entry[:, None]).any():
            self.pin(label, "mixes parts of its channels")
            return rows[:, 0].view(shape)
        channels, which = torch.unique((rows % ENTRY).sort(1).values, dim=0, return_inverse=True)
        blocks = self.fresh([len(channels)])
        pairs = torch.broadcast_tensors(blocks[:, None], channels)
        self.members.append(torch.stack(pairs).flatten(1))
        return (blocks[which] + entry * ENTRY).view(shape)

    def value(self, shape: Iterable[int], labels: Iterable[Tensor | None]) -> Value:
        """A value with these labels, without those that say less than another."""
        kept: list[Tensor] = []
        for label in sorted((x for x in labels if x is not None), key=lambda x: -len(along(x))):
            if not along(label):
                self.tell(label)
            elif not any(along(label) <= along(other) for other in kept):
                kept.append(label)
        return Value(tuple(shape), tuple(kept))

    def slide(self, x: Value, dims: Iterable[int], why: str = "slides over it") -> Value:
        """The order along `dims` must stay, as neighbours must stay neighbours."""
        dims, labels = {dim % len(x.shape) for dim in dims}, []
        for label in x.labels:
            self.tell(label)
            fixed = along(label) & dims
            if fixed == along(label):
                self.pin(label, why)
            elif fixed:
                whole = self.fresh(only(along(label) - fixed, label.shape))
                shape = only(fixed, label.shape)
                self.tie(whole, label, torch.arange(math.prod(shape)).view(shape))
                labels.append(whole)
            else:
                labels.append(label)
        return self.value(x.shape, labels)

    def meet(self, *values: Any) -> Value:
        """Broadcast values and tie, entry by entry, what lies along the same dimensions."""
        given = [value for value in values if isinstance(value, Value)]
        rank = max(len(x.shape) for x in given)
        given = [arrange(x, [None] * (rank - len(x.shape)) + [*range(len(x.shape))]) for x in given]
        stay = set().union(*map(in_order, given))
        given = [self.slide(x, stay, "joins it with values of fixed order") for x in given]
        for x, y in itertools.combinations(given, 2):
            for one, other in itertools.product(x.labels, y.labels):
                both = along(one) & along(other)
                if both:
                    sides = (self.group(label, along(label) - both) for label in (one, other))
                    self.tie(*sides)
        shape = [max(sizes) for sizes in zip(*(x.shape for x in given))]
        return self.value(shape, itertools.chain(*(x.labels for x in given)))

    def reduce(self, x: Value, dims: Iterable[int], keepdim: bool = False) -> Value:
        """Take dimensions together in a way that does not look at their order."""
        kept = {*range(len(x.shape))} - {dim % len(x.shape) for dim in dims}
        for label in x.labels:
            self.tell(label)
        labels = [self.group(label, along(label) - kept) for label in x.labels]
        x = self.value(only(kept, x.shape), labels)
        return x if keepdim else arrange(x, sorted(kept))

    def reshape(self, x: Value, shape: Iterable[int]) -> Value:
        """Cut dimensions, or join them: what is joined to a channel becomes its entries."""
        shape = tuple(shape)
        ends = [[1, *itertools.accumulate(sizes, int.__mul__)] for sizes in (x.shape, shape)]
        cuts = {*ends[0]} & {*ends[1]}
        old, new = ([sum(cut <= start for cut in cuts) for start in one[:-1]] for one in ends)
        labels, taken = [], set()
        for label in x.labels:
            part = {old[dim] for dim in along(label)}
            if part & taken:
                self.pin(label, "joins it with other channels")
                continue
            taken |= part
            full = [size if at in part else 1 for size, at in zip(x.shape, old)]
            joined = [n if m == 1 else 1 for n, m in zip(full, label.shape)]
            place = torch.arange(math.prod(joined)).view(joined)
            entry = label // ENTRY * place.numel() + place
            cut = [size if at in part else 1 for size, at in zip(shape, new)]
            labels.append(tidy((label % ENTRY).expand(full).reshape(cut), entry.reshape(cut)))
        return self.value(shape, labels)

    def cat(self, values: list[Value], dim: int) -> Value:
        """Side by side along `dim`; along the others they meet."""
        dim = dim % len(values[0].shape)
        rest, pieces, moving = [], [], False
        for x in values:
            here = [label for label in x.labels if dim in along(label)]
            piece = next((label for label in here if along(label) == {dim}), None)
            self.pin([label for label in here if label is not piece], "joins it with others")
            if piece is None:
                piece = self.fresh(only({dim}, x.shape))
                self.pin(piece, "joins values of fixed order")
            pieces.append(piece)
            moving = moving or bool(here)
            others = [label for label in x.labels if dim not in along(label)]
            rest.append(x._replace(labels=others))
        common = self.meet(*rest)
        shape, labels = [*common.shape], [*common.labels]
        shape[dim] = sum(x.shape[dim] for x in values)
        if moving:
            labels.append(torch.cat(pieces, dim))
        return self.value(shape, labels)


def tidy(channel: Tensor, entry: Tensor) -> Tensor:
    """A label that says nothing about dimensions along which only the entries of channels vary."""
    lone, rest = channel, entry
    for dim in along(channel):
        if (lone == lone.narrow(dim, 0, 1)).all():
            lone = lone.narrow(dim, 0, 1)
        else:
            rest = rest.narrow(dim, 0, 1)
    return lone if (entry == rest).all() else channel + ENTRY * entry
