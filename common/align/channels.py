"""Labels: which channel of a network lies where in a tensor, and what operators do to that."""

import bisect
import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

SLOT = 2**32  # a label is the number of a channel, plus SLOT times the entry of it


class Value(NamedTuple):
    """A tensor of the graph. Each label broadcasts to its shape, has size one along dimensions that
    it says nothing about, and names the channel that lies at each index of the others.
    """

    shape: tuple[int, ...]
    labels: tuple[Tensor, ...] = ()


def along(label: Tensor) -> set[int]:
    """The dimensions that a label tells about."""
    return {dim for dim, size in enumerate(label.shape) if size > 1}


def only(dims: Iterable[int], shape: Iterable[int]) -> list[int]:
    """A shape of size one along all other dimensions."""
    return [size if dim in dims else 1 for dim, size in enumerate(shape)]


def uniform(label: Tensor) -> bool:
    """Whether a label says, by channel 0, that entries are all the same, as after `expand`."""
    return not (label % SLOT).any()


def arrange(x: Value, order: Iterable[int | None]) -> Value:
    """Dimensions in another order; None is a new one, of size one."""
    order = tuple(order)
    old = [dim for dim in order if dim is not None]
    at = tuple(dim if dim is None else slice(None) for dim in order)
    shape = tuple(1 if dim is None else x.shape[dim] for dim in order)
    return Value(shape, tuple(label.permute(old)[at] for label in x.labels))


def plain(shapes: Any) -> Any:
    """Values along which nothing may move."""
    if isinstance(shapes, list):
        return [plain(one) for one in shapes]
    return None if shapes is None else Value(shapes)


class Channels:
    """What is known of the channels of a network: which are the same, in a block, or in order."""

    def __init__(self) -> None:
        self.starts = [0, 1]  # of each vector of channels that is made, and the end of the last
        self.edges = [torch.zeros(5, 0, dtype=torch.int64)]  # two channels, their entries, an index
        self.members = [torch.zeros(2, 0, dtype=torch.int64)]  # a block, a channel in it
        self.pins: list[tuple[Tensor, str]] = []
        self.columns: dict[int, Tensor] = {}  # what those of grouped convolutions stand for
        self.where = ""  # the operator, for reasons

    def fresh(self, shape: Iterable[int]) -> Tensor:
        """New channels."""
        shape = tuple(shape)
        self.starts.append(self.starts[-1] + math.prod(shape))
        return torch.arange(self.starts[-2], self.starts[-1]).view(shape)

    def vector(self, label: Tensor) -> int:
        """The vector that (the first of) its channels were made in."""
        return bisect.bisect(self.starts, int(label.flatten()[0] % SLOT)) - 1

    def tie(self, one: Tensor, other: Tensor, index: Tensor | int = 0) -> None:
        """Channels of two labels are the same, or at `index` parts of the same, entry by entry."""
        rows = one % SLOT, other % SLOT, one // SLOT, other // SLOT, torch.as_tensor(index)
        self.edges.append(torch.stack(torch.broadcast_tensors(*rows)).flatten(1))

    def tell(self, label: Tensor) -> None:
        """These channels, and no others, take part in something."""
        if not uniform(label):
            self.tie(label, label, self.fresh([1]))

    def pin(self, label: Tensor, why: str) -> None:
        if not uniform(label):
            self.pins.append((label % SLOT, f"{self.where} {why}"))

    def pin_all(self, values: Any, why: str) -> None:
        if isinstance(values, Value):
            for label in values.labels:
                self.pin(label, why)
        elif isinstance(values, (list, tuple, dict)):
            for value in values.values() if isinstance(values, dict) else values:
                self.pin_all(value, why)

    def fix(self, label: Tensor, dims: Iterable[int], why: str) -> Tensor | None:
        """What is left of a label when the order along `dims` must stay."""
        dims = along(label) & set(dims)
        if dims == along(label) or dims and uniform(label):
            return self.pin(label, why)
        if not dims:
            return label
        whole = self.fresh(only(along(label) - dims, label.shape))
        shape = only(dims, label.shape)
        self.tie(whole, label, torch.arange(math.prod(shape)).view(shape))
        return whole

    def group(self, label: Tensor, dims: Iterable[int]) -> Tensor | None:
        """What is left of a label when the order along `dims` is free: blocks of channels."""
        dims = sorted(along(label) & set(dims))
        if not dims:
            return label
        if len(dims) == len(along(label)) or uniform(label):
            return self.tell(label)
        rows = label.movedim(dims, [*range(-len(dims), 0)]).flatten(-len(dims)).flatten(0, -2)
        slots = rows // SLOT
        if (slots != slots[:, :1]).any():
            return self.fix(label, dims, "mixes parts of its channels")
        channels, which = torch.unique((rows % SLOT).sort(1).values, dim=0, return_inverse=True)
        blocks = self.fresh([len(channels)])
        pairs = torch.broadcast_tensors(blocks[:, None], channels)
        self.members.append(torch.stack(pairs).flatten(1))
        return (blocks[which] + slots[:, 0] * SLOT).view(only(along(label) - {*dims}, label.shape))

    def value(self, shape: Iterable[int], labels: Iterable[Tensor | None]) -> Value:
        """A value with these labels, without those that say less than another."""
        kept: list[Tensor] = []
        for label in sorted((x for x in labels if x is not None), key=lambda x: -len(along(x))):
            if label.numel() == 1:
                self.tell(label)
            elif not any(along(label) <= along(other) for other in kept):
                kept.append(label)
        return Value(tuple(shape), tuple(kept))

    def meet(self, *values: Any) -> Value:
        """Broadcast values and tie, entry by entry, what lies along the same dimensions."""
        return functools.reduce(self._meet, [x for x in values if isinstance(x, Value)])

    def _meet(self, x: Value, y: Value) -> Value:
        rank = max(len(x.shape), len(y.shape))
        pair = [arrange(v, [None] * (rank - len(v.shape)) + [*range(len(v.shape))]) for v in (x, y)]
        labels, sides = [], []
        for one, other in (pair, pair[::-1]):
            same = set().union(*(along(label) for label in other.labels if uniform(label)))
            varies = {dim for dim, size in enumerate(other.shape) if size > 1} - same
            known = set().union(*map(along, other.labels))
            shared: list[Tensor] = []
            for label in one.labels:
                met = along(label) & varies
                if met:
                    least = None if uniform(label) else self.group(label, along(label) - met)
                    if least is not None:
                        least = self.fix(least, met - known, "joins it with values of fixed order")
                    shared += [] if least is None else [least]
                    label = label if met < along(label) and not uniform(label) else least
                labels.append(label)
            sides.append(shared)
        for a, b in itertools.product(*sides):
            if both := along(a) & along(b):
                self.tie(self.group(a, along(a) - both), self.group(b, along(b) - both))
        return self.value([max(sizes) for sizes in zip(*(v.shape for v in pair))], labels)

    def reduce(self, x: Value, dims: Iterable[int], keepdim: bool = False) -> Value:
        """Take dimensions together in a way that does not look at their order."""
        kept = set(range(len(x.shape))) - {dim % len(x.shape) for dim in dims}
        dims = tuple(set(range(len(x.shape))) - kept)
        x = self.value(only(kept, x.shape), [self.group(label, dims) for label in x.labels])
        if keepdim:
            return x
        shape = tuple(x.shape[dim] for dim in sorted(kept))
        return Value(shape, tuple(label.squeeze(dims) for label in x.labels))

    def slide(self, x: Value, dims: Iterable[int], why: str = "slides over it") -> Value:
        """Neighbours along `dims` must stay neighbours."""
        dims = [dim % len(x.shape) for dim in dims]
        return self.value(x.shape, [self.fix(label, dims, why) for label in x.labels])

    def einsum(self, equation: str, *values: Value) -> Value:
        """Sum of products, which is what every contraction is."""
        inputs, output = equation.replace(" ", "").split("->")
        ranks = [len(value.shape) for value in values]
        terms = [
            term.replace("...", "ABCDEFGH"[8 - rank + len(term.replace("...", "")) :])
            for term, rank in zip(inputs.split(","), ranks)
        ]
        output = output.replace("...", "".join(sorted({*"ABCDEFGH"} & {*"".join(terms)})))
        order = output + "".join(sorted({*"".join(terms)} - {*output}))
        aligned = [
            arrange(value, [term.index(x) if x in term else None for x in order])
            for term, value in zip(terms, values)
        ]
        return self.reduce(self.meet(*aligned), range(len(output), len(order)))

    def reshape(self, x: Value, shape: Iterable[int]) -> Value:
        """Cut dimensions, or join them: what is joined to a channel becomes its entries."""
        shape = tuple(shape)
        before = [[1, *itertools.accumulate(sizes, int.__mul__)] for sizes in (x.shape, shape)]
        cuts = {*before[0]} & {*before[1]}
        old, new = ([sum(cut <= at for cut in cuts) for at in ends[:-1]] for ends in before)
        labels, left = [], sorted(x.labels, key=uniform)
        while left:
            label, *left = left
            joined = {old[dim] for dim in along(label)}
            for other in left:
                if not joined.isdisjoint(old[dim] for dim in along(other)):
                    self.pin(other, "joins it with other channels")
            left = [x for x in left if joined.isdisjoint(old[dim] for dim in along(x))]
            full = [size if at in joined else 1 for size, at in zip(x.shape, old)]
            entries = [n if m == 1 else 1 for n, m in zip(full, label.shape)]
            place = torch.arange(math.prod(entries)).view(entries)
            slot = label // SLOT * place.numel() + place
            label = (label % SLOT + SLOT * slot).expand(full)
            label = label.reshape([n if at in joined else 1 for n, at in zip(shape, new)])
            # Say nothing about dimensions along which only the entries of channels vary.
            lone, slot = label % SLOT, label // SLOT
            for dim in along(label) if label.any() else ():
                if torch.equal(lone, lone.narrow(dim, 0, 1).expand_as(lone)):
                    lone = lone.narrow(dim, 0, 1)
                else:
                    slot = slot.narrow(dim, 0, 1)
            labels.append(lone if (label // SLOT == slot).all() else label)
        return self.value(shape, labels)

    def cat(self, values: list[Value], dim: int) -> Value:
        """Side by side along `dim`; along the others they meet."""
        rank = len(values[0].shape)
        dim, others = dim % rank, set(range(rank)) - {dim % rank}
        found = [[label for label in value.labels if dim in along(label)] for value in values]
        rest = (
            Value(tuple(only(others, x.shape)), tuple(y for y in x.labels if dim not in along(y)))
            for x in values
        )
        common, pieces = self.meet(*rest), []
        alike = len({tuple(along(x[0])) if x else () for x in found}) == 1
        for value, labels in zip(values, found):
            for label in labels[1:]:
                self.pin(label, "joins it with other channels")
            if not labels or uniform(labels[0]):
                new = self.fresh(only({dim}, value.shape))
                if not labels:
                    self.pin(new, "joins values of fixed order")
                pieces.append(new)
            elif alike:
                pieces.append(labels[0])
            else:
                pieces.append(self.fix(labels[0], others, "joins it with values of fixed order"))
        shape = [*common.shape]
        shape[dim] = sum(value.shape[dim] for value in values)
        return self.value(shape, [*common.labels, *([torch.cat(pieces, dim)] * any(found))])

    def expand(self, x: Value, shape: Iterable[int]) -> Value:
        """Entries that are repeated are all the same."""
        shape = tuple(shape)
        x = arrange(x, [None] * (len(shape) - len(x.shape)) + [*range(len(x.shape))])
        wider = [{dim} for dim, size in enumerate(shape) if size > x.shape[dim]]
        return self.value(shape, [*x.labels, *(torch.zeros(only(d, shape)).long() for d in wider)])
