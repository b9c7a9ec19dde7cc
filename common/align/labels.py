"""Labels: which channel of a network lies where in a tensor, and what operators do to that.

A network runs on meta tensors under a mode that sees every operator. The few at the end have a
rule; all others are taken apart by PyTorch's own decompositions until those are left.

A label has the shape of its value and holds the number of the channel that lies at each index; it
is expanded (its stride is zero) along dimensions that it says nothing about. What only moves
entries moves those of labels, too. Along a dimension without label nothing may move.
"""

import bisect
import contextlib
import itertools
import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
Given = dict[str, Any]


def labels(x: Tensor) -> list[Tensor]:
    return getattr(x, "labels", [])


def tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in tree.tree_leaves(x) if isinstance(leaf, Tensor)]


def along(label: Tensor) -> set[int]:
    """The dimensions that a label tells about."""
    return {dim for dim, size in enumerate(label.shape) if size > 1 and label.stride(dim)}


def core(label: Tensor) -> Tensor:
    """A label of size one along the dimensions that it says nothing about."""
    dims = along(label)
    return label[tuple(slice(None if dim in dims else 1) for dim in range(label.dim()))]


def lean(label: Tensor) -> Tensor:
    """A label that says nothing about dimensions along which it repeats itself."""
    for dim in along(label):
        first = label.narrow(dim, 0, 1)
        if (core(label) == core(first)).all():
            label = first.expand(label.shape)
    return label


def in_order(x: Tensor) -> set[int]:
    """The dimensions along which nothing may move, counted from the end."""
    return {dim - x.dim() for dim in along(x).difference(*map(along, labels(x)))}


def only(dims: Iterable[int], shape: Iterable[int]) -> list[int]:
    """A shape of size one along all other dimensions."""
    return [size if dim in dims else 1 for dim, size in enumerate(shape)]


class Labels(TorchDispatchMode):
    """What is known of the channels of a network: which are the same, in a block, or in order."""

    def __init__(self) -> None:
        super().__init__()
        self.starts = [0]  # of each vector of channels that is made, and the end of the last
        self.ties = [torch.zeros(3, 0, dtype=torch.int64)]  # two channels, a mark
        self.members = [torch.zeros(2, 0, dtype=torch.int64)]  # a block, a channel in it
        self.pins: list[tuple[Tensor, str]] = []
        self.columns: dict[int, Tensor] = {}  # what those of grouped convolutions stand for
        self.where = ""  # the operator, for reasons
        self.products = 0  # how often matrices were multiplied

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [META if isinstance(one, torch.device) else one for one in args]
        kwargs = {key: META if key == "device" else one for key, one in (kwargs or {}).items()}
        name = op.overloadpacket.__name__.rstrip("_")
        rule = RULES.get(name, pointwise if torch.Tag.pointwise in op.tags else None)
        if rule is None and op.namespace != "prim":  # of which one asks for the device
            # What PyTorch fails to take apart is pinned below.
            with self, contextlib.suppress(NotImplementedError, RuntimeError):
                taken_apart = decomposition_table.get(op, op.decompose)(*args, **kwargs)
                if taken_apart is not NotImplemented:
                    return taken_apart
        out = op(*args, **kwargs)
        given = dict(zip((one.name for one in op._schema.arguments), args), **kwargs, name=name)
        read, outs = tensors(given), tensors(out)
        mark = len(self.ties)  # these channels, and no others of their vectors, take part in this
        for label in itertools.chain(*map(labels, read)):
            if label.numel() and not self.is_whole(label):
                self.tie(label, label, mark)
        if rule == "move":
            moved = [tensors(op(label, *args[1:], **kwargs)) for label in labels(read[0])]
            made = [[label[i] for label in moved] for i in range(len(outs))]
        else:
            made = [(rule or unknown)(self, given, one, *read) for one in outs]
        for one, found in zip(outs, made):
            self.give(one, found)
        return out

    def give(self, x: Tensor, found: Iterable[Tensor | None]) -> Tensor:
        """Label a tensor, without those that say less than another."""
        x.labels = []
        found = [lean(label) for label in found if label is not None]
        for label in sorted(found, key=lambda label: -len(along(label))):
            if not along(label):
                self.tie(label, label, len(self.ties))  # a channel by itself
            elif not any(along(label) <= along(other) for other in x.labels):
                x.labels.append(core(label).expand(x.shape))
        return x

    def fresh(self, shape: Iterable[int]) -> Tensor:
        """New channels."""
        self.starts.append(self.starts[-1] + math.prod(shape))
        return torch.arange(self.starts[-2], self.starts[-1]).view(shape)

    def is_whole(self, label: Tensor) -> bool:
        """Whether it has all channels of a vector, or of several that were made in turn."""
        found = torch.unique(core(label))
        low, end = int(found[0]), int(found[-1]) + 1
        return len(found) == end - low and all(
            self.starts[bisect.bisect_left(self.starts, one)] == one for one in (low, end)
        )

    def tie(self, one: Tensor, other: Tensor, mark: Tensor | int = 0) -> None:
        """Channels of two labels are the same, entry by entry; others have another mark."""
        rows = torch.broadcast_tensors(core(one), core(other), torch.as_tensor(mark))
        self.ties.append(torch.stack(rows).view(3, -1))

    def pin(self, found: Iterable[Tensor], why: str) -> None:
        """These channels must stay in order."""
        self.pins += [(core(label), f"{self.where} {why}") for label in found]

    def group(self, label: Tensor, dims: Iterable[int]) -> Tensor | None:
        """What is left of a label when the order along `dims` is free: blocks of channels."""
        free = sorted(along(label) & {*dims})
        if not free or len(free) == len(along(label)):
            return None if free else label
        rows = core(label).movedim(free, [*range(-len(free), 0)]).flatten(-len(free)).sort(-1)[0]
        sets, which = torch.unique(rows.flatten(0, -2), dim=0, return_inverse=True)
        blocks = self.fresh([len(sets)])
        self.members.append(torch.stack(torch.broadcast_tensors(blocks[:, None], sets)).flatten(1))
        return blocks[which].view(only(along(label) - {*free}, label.shape))

    def slide(self, x: Tensor, dims: Iterable[int], why: str = "slides over it") -> list[Tensor]:
        """The order along `dims` must stay, as neighbours must stay neighbours."""
        dims, kept = {dim % x.dim() for dim in dims}, []
        for label in labels(x):
            fixed = along(label) & dims
            if fixed == along(label):
                self.pin([label], why)
            elif fixed:
                whole = self.fresh(only(along(label) - fixed, label.shape))
                shape = only(fixed, label.shape)
                self.tie(whole, label, torch.arange(math.prod(shape)).view(shape))
                kept.append(whole)
            else:
                kept.append(core(label))
        return kept


# ---------------------------------------------------------------- the rules


def unknown(known: Labels, given: Given, out: Tensor, *read: Tensor) -> list[Tensor]:
    known.pin(itertools.chain(*map(labels, read)), "keeps its order")
    return []


def pointwise(known: Labels, given: Given, out: Tensor, *read: Tensor) -> list[Tensor]:
    """What is given broadcasts; what lies along the same dimension moves together."""
    stay, met = set().union(*map(in_order, read)), []
    for x in read:
        here = [dim for dim in stay if -dim <= x.dim()]
        slid = known.slide(x, here, "joins it with values of fixed order")
        new = [label.expand(out.shape) for label in slid]
        for pair in itertools.product(met, new):
            both = set.intersection(*map(along, pair))
            if both:
                known.tie(*(known.group(label, along(label) - both) for label in pair))
        met += [label for label in new if along(label) not in map(along, met)]
    return met


def reduction(known: Labels, given: Given, out: Tensor, x: Tensor) -> list[Tensor]:
    """Takes dimensions together in a way that does not look at their order."""
    dims = given.get("dim")
    dims = [dims] if isinstance(dims, int) else dims or range(x.dim())
    dims, keepdim = [dim % x.dim() for dim in dims], out.dim() == x.dim()
    left = [known.group(label, dims) for label in labels(x)]
    return [core(label).amax(dims, keepdim) for label in left if label is not None]


def reshape(known: Labels, given: Given, out: Tensor, x: Tensor, *like: Tensor) -> list[Tensor]:
    """Cuts dimensions, or joins them: what is joined to a channel becomes its entries."""
    made: list[tuple[Tensor, Tensor]] = []
    for old in labels(x):
        new = lean(old.reshape(out.shape))
        if any(along(new) & along(b) and not along(old) & along(a) for a, b in made):
            known.pin([new], "joins it with other channels")
        else:
            made.append((old, new))
    return [new for _, new in made]


def window(known: Labels, given: Given, out: Tensor, x: Tensor) -> list[Tensor]:
    """Pooling and resizing of the last dimensions, as many as the operator's name says."""
    return known.slide(x, range(-int(re.search(r"(\d)d", given["name"])[1]), 0))


def cat(known: Labels, given: Given, out: Tensor, *read: Tensor) -> list[Tensor]:
    """Side by side along `dim`, as channels of their own, which those of cat(x, -x) need to be told
    apart by; along the others they meet.
    """
    dim, start, rest = given.get("dim", 0) % out.dim(), 0, []
    made = known.fresh(only({dim}, out.shape))
    for x in filter(Tensor.numel, read):
        here = [label for label in labels(x) if dim in along(label)]
        here.sort(key=lambda label: len(along(label)))
        part, start = made.narrow(dim, start, x.shape[dim]), start + x.shape[dim]
        if here and len(along(here[0])) == 1:
            known.tie(part, here.pop(0))
        else:
            known.pin([part], "joins values of fixed order")
        known.pin(here, "joins it with others")
        rest.append(x.narrow(dim, 0, 1))
        rest[-1].labels = [one.narrow(dim, 0, 1) for one in labels(x) if dim not in along(one)]
    met = pointwise(known, given, out.narrow(dim, 0, 1), *rest)
    moving = any(dim in along(label) for x in read for label in labels(x))
    return [*met, made] if moving else met


def stack(known: Labels, given: Given, out: Tensor, *read: Tensor) -> list[Tensor]:
    dim = given.get("dim", 0)
    with known:
        return labels(torch.cat([x.unsqueeze(dim) for x in read], dim))


def pad(known: Labels, given: Given, out: Tensor, x: Tensor) -> list[Tensor]:
    """Entries of a constant are channels of their own."""
    made, pairs = [*map(core, labels(x))], zip(given["pad"][::2], given["pad"][1::2])
    if min(given["pad"]) < 0:
        return unknown(known, given, out, x)
    for dim, (low, high) in zip(reversed(range(out.dim())), pairs):
        for i, label in enumerate(made):
            if label.shape[dim] > 1:
                shape = [*label.shape[:dim], low + high, *label.shape[dim + 1 :]]
                made[i] = torch.cat([label, known.fresh(shape)], dim).roll(low, dim)
    return made


def constant(known: Labels, given: Given, out: Tensor, *read: Tensor) -> list[Tensor]:
    """All the same, so that any channels may lie there."""
    return [known.fresh(only({dim}, out.shape)) for dim in along(out)]


def index(known: Labels, given: Given, out: Tensor, x: Tensor, *by: Tensor) -> list[Tensor]:
    """What is looked up by a number keeps it."""
    dims = [dim for dim, one in enumerate(given["indices"]) if one is not None]
    unknown(known, given, out, *by)
    slid = known.slide(x, dims, "looks up parts of it")
    if dims[-1] - dims[0] >= len(dims):
        known.pin(slid, "looks up parts of it")
        return []
    front = (slice(None),) * dims[0]
    new = front + (None,) * (out.dim() - x.dim() + len(dims))
    return [label[front + (0,) * len(dims)][new] for label in slid]


def by_channel(
    known: Labels, given: Given, out: Tensor, x: Tensor, *scales: Tensor
) -> list[Tensor]:
    """Batch normalisation, PReLU: parameters along the second dimension."""
    with known:
        scales = [scale.view(-1, *[1] * (x.dim() - 2)) for scale in scales]
        if given.get("training"):  # by the statistics of these very values, as InstanceNorm
            scales.append(x.mean([dim for dim in range(x.dim()) if dim != 1], keepdim=True))
    return pointwise(known, given, out, x, *scales)


def matmul(known: Labels, given: Given, out: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
    """The inner products of the rows of x and the columns of y."""
    known.products += 1
    with known:
        return labels((x.unsqueeze(-1) * y.unsqueeze(-3)).sum(-2))


def convolution(
    known: Labels, given: Given, out: Tensor, x: Tensor, weight: Tensor, *bias: Tensor
) -> list[Tensor]:
    """Slides over space, and sums over the channels of each group."""
    known.products += 1
    space, groups = range(2, out.dim()), given["groups"]
    x, weight = (known.give(v.clone(), known.slide(v, space)) for v in (x, weight))
    with known:
        x = x.flatten(2).sum(2).unflatten(1, (groups, 1, -1))  # (n, groups, 1, columns)
        weight = weight.flatten(2).sum(2).unflatten(0, (groups, -1))  # (groups, rows, columns)
        if given["transposed"]:
            weight = weight.transpose(1, 2)
    if groups > 1 and weight.shape[2] > 1:
        # The columns of the weight stand for other channels in every group: note which.
        inner = [label for label in labels(weight) if along(label) == {2}]
        outer = [core(label) for label in labels(x) if along(label) == {1, 3}]
        if given["transposed"] or len(inner) != 1 or len(outer) != 1:
            return unknown(known, given, out, x, weight, *bias)
        known.pin(inner, "differs from group to group")
        known.tie(known.columns.setdefault(int(inner[0].flatten()[0]), outer[0]), outer[0])
        rows = [label[..., :1] for label in labels(weight) if label is not inner[0]]
        weight = known.give(weight[..., :1], rows)
    with known:
        y = (x * weight).sum(3).flatten(1)
        for one in bias:
            y = y + one
    return [core(label)[(..., *[None] * len(space))] for label in labels(y)]


RULES = {
    name: rule
    for rule, names in {
        "move": "expand permute transpose t numpy_T swapaxes swapdims movedim slice select split "
        "split_with_sizes chunk unbind narrow unsqueeze squeeze unfold flip roll detach alias",
        reshape: "view _unsafe_view reshape flatten unflatten view_as reshape_as",
        reduction: "sum mean amax amin var std var_mean prod any all norm linalg_vector_norm "
        "logsumexp",
        cat: "cat concat",
        stack: "stack",
        index: "index",
        matmul: "mm bmm",
        convolution: "convolution",
        by_channel: "batch_norm prelu",
        pad: "constant_pad_nd",
        constant: "zeros ones full empty zeros_like ones_like full_like empty_like new_zeros "
        "new_ones new_full new_empty",
        pointwise: "clone contiguous to type_as _to_copy copy fill zero lift_fresh_copy dropout "
        "feature_dropout alpha_dropout",
        window: "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d "
        "avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
        "adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d "
        "reflection_pad2d replication_pad2d",
    }.items()
    for name in names.split()
}
# Also what PyTorch tags so.
POINTWISE = (
    "instance_norm group_norm layer_norm rms_norm softmax log_softmax pad alias detach log_sigmoid "
    "hardswish hardtanh hardsigmoid relu6 leaky_relu elu selu celu mish masked_fill"
).split()
POINTWISE += [name for name, rule in RULES.items() if rule in (pointwise, by_channel, pad)]


def is_pointwise(node: fx.Node) -> bool:
    """Whether it makes values anew, each channel from itself."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target.overloadpacket.__name__.rstrip("_")
    return name in POINTWISE or torch.Tag.pointwise in node.target.tags
