"""Channel labels: which channel lies at each index of a tensor, and how operators propagate that.

The network runs on meta tensors under LabelMode, a TorchDispatchMode, which sees every operator.
Operators in RULES have a rule; PyTorch's decompositions take the others apart until only those
are left. An operator without a decomposition pins its inputs.

channel: an integer. At first every index along every dimension of a parameter is one of its own.
vector: channels that were created together, with consecutive numbers.
label: an int64 tensor of the shape of a value that gives the channel at every index. It is expanded
    (stride 0) along dimensions that the channel does not depend on; the others are its own. A
    weight has one label for each dimension. Operators that move the entries of a value move those
    of its labels in the same way. Along a dimension that no label has, a value has a fixed order.
tie: two channels are the same, because an operator adds or multiplies their values. Its tag
    distinguishes kinds of ties: exchanging channels must take ties to ties with the same tag.
block: a channel that stands for a set of channels whose order an operator ignores, as it does
    within a group of a convolution or of GroupNorm, or within an attention head.
pin: a channel must stay where it is, for a reason.
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
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
Arguments = dict[str, Any]  # of an operator, by the names in its schema; its own name as `name`


def labels(x: Tensor) -> list[Tensor]:
    return getattr(x, "labels", [])


def tensors(x: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]


def dims_of(label: Tensor) -> set[int]:
    """A label's own dimensions: of more than one entry, and not expanded."""
    return {dim for dim, size in enumerate(label.shape) if size > 1 and label.stride(dim)}


def unexpand(label: Tensor) -> Tensor:
    """The label with size 1 along dimensions that are not its own."""
    dims = dims_of(label)
    return label[tuple(slice(None if dim in dims else 1) for dim in range(label.dim()))]


def drop_constant_dims(label: Tensor) -> Tensor:
    """The label, expanded along dimensions along which its channels do not change."""
    for dim in dims_of(label):
        first = label.narrow(dim, 0, 1)
        if (unexpand(label) == unexpand(first)).all():
            label = first.expand(label.shape)
    return label


def fixed_dims(x: Tensor) -> set[int]:
    """The dimensions of a value that no label has, as negative numbers."""
    return {dim - x.dim() for dim in dims_of(x).difference(*map(dims_of, labels(x)))}


def shape_along(dims: Iterable[int], shape: Iterable[int]) -> list[int]:
    """The shape, but size 1 along all dimensions except `dims`."""
    return [size if dim in dims else 1 for dim, size in enumerate(shape)]


class LabelMode(TorchDispatchMode):
    """Propagates labels through operators, and collects ties, blocks and pins."""

    def __init__(self) -> None:
        super().__init__()
        self.offsets = [0]  # of vectors: the i-th has channels offsets[i] to offsets[i + 1] - 1
        self.ties = [torch.zeros(3, 0, dtype=torch.int64)]  # channel, channel, tag
        self.members = [torch.zeros(2, 0, dtype=torch.int64)]  # block, channel in it
        self.pins: list[tuple[Tensor, str]] = []
        # The columns of a grouped convolution's weight are other input channels in every group.
        # Maps the first channel of the columns to the label of all these input channels.
        self.group_columns: dict[int, Tensor] = {}
        self.location = ""  # of the current operator in the network, for reasons
        self.num_matmuls = 0  # matrix multiplications and convolutions so far

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [META if isinstance(arg, torch.device) else arg for arg in args]
        kwargs = {key: META if key == "device" else arg for key, arg in (kwargs or {}).items()}
        name = op.overloadpacket.__name__.rstrip("_")
        rule = RULES.get(name, pointwise if torch.Tag.pointwise in op.tags else None)
        if rule is None and op.namespace != "prim":  # prim.device has no decomposition
            # An operator that PyTorch fails to decompose pins its inputs below.
            with self, contextlib.suppress(RuntimeError):
                decomposed = decomposition_table.get(op, op.decompose)(*args, **kwargs)
                if decomposed is not NotImplemented:
                    return decomposed
        out = op(*args, **kwargs)
        arguments = dict(zip((arg.name for arg in op._schema.arguments), args), **kwargs, name=name)
        inputs, outputs = tensors(arguments), tensors(out)
        # An operator that uses a part of a vector distinguishes its channels from the others.
        tag = len(self.ties)
        for label in itertools.chain(*map(labels, inputs)):
            if label.numel() and not self.is_whole(label):
                self.tie(label, label, tag)
        if rule == "move":
            moved = [tensors(op(label, *args[1:], **kwargs)) for label in labels(inputs[0])]
            new_labels = zip(*moved)
        else:
            new_labels = [(rule or pin_inputs)(self, arguments, x, *inputs) for x in outputs]
        for x, new in zip(outputs, new_labels):
            self.set_labels(x, new)
        return out

    def set_labels(self, x: Tensor, new: Iterable[Tensor | None]) -> Tensor:
        """Label a value, without labels whose dimensions another label has too."""
        x.labels = []
        new = [drop_constant_dims(label) for label in new if label is not None]
        for label in sorted(new, key=lambda label: -len(dims_of(label))):
            if not dims_of(label):
                self.tie(label, label, len(self.ties))  # a single channel, like no other
            elif not any(dims_of(label) <= dims_of(other) for other in x.labels):
                x.labels.append(unexpand(label).expand(x.shape))
        return x

    def new_channels(self, shape: Iterable[int]) -> Tensor:
        """A label of `shape` with a new vector of channels."""
        self.offsets.append(self.offsets[-1] + math.prod(shape))
        return torch.arange(self.offsets[-2], self.offsets[-1]).view(shape)

    def is_whole(self, label: Tensor) -> bool:
        """Whether a label has all channels of a vector, or of several consecutive ones."""
        channels = torch.unique(unexpand(label))
        start, end = int(channels[0]), int(channels[-1]) + 1
        return len(channels) == end - start and all(
            self.offsets[bisect.bisect_left(self.offsets, edge)] == edge for edge in (start, end)
        )

    def tie(self, label: Tensor, other: Tensor, tag: Tensor | int = 0) -> None:
        """Tie the channels of two labels, index by index."""
        rows = torch.broadcast_tensors(unexpand(label), unexpand(other), torch.as_tensor(tag))
        self.ties.append(torch.stack(rows).view(3, -1))

    def pin(self, pinned: Iterable[Tensor], reason: str) -> None:
        """Pin all channels of some labels."""
        self.pins += [(unexpand(label), f"{self.location} {reason}") for label in pinned]

    def to_blocks(self, label: Tensor, dims: Iterable[int]) -> Tensor | None:
        """Replace the channels of a label along `dims` by the block that holds them; None if it has
        no other dimension.
        """
        free = sorted(dims_of(label) & {*dims})
        if not free or len(free) == len(dims_of(label)):
            return None if free else label
        rows = unexpand(label).movedim(free, [*range(-len(free), 0)])
        rows = rows.flatten(-len(free)).sort(-1)[0]
        sets, index = torch.unique(rows.flatten(0, -2), dim=0, return_inverse=True)
        blocks = self.new_channels([len(sets)])
        self.members.append(torch.stack(torch.broadcast_tensors(blocks[:, None], sets)).flatten(1))
        return blocks[index].view(shape_along(dims_of(label) - {*free}, label.shape))

    def fix_order(
        self, x: Tensor, dims: Iterable[int], reason: str = "slides over it"
    ) -> list[Tensor]:
        """Return the labels of a value that remain when its order along `dims` is fixed.

        A label along `dims` alone is pinned. One along other dimensions, too, is replaced by new
        channels along those, which are tied to their entries along `dims`, tagged by position.
        """
        dims, remaining = {dim % x.dim() for dim in dims}, []
        for label in labels(x):
            fixed = dims_of(label) & dims
            if fixed == dims_of(label):
                self.pin([label], reason)
            elif fixed:
                whole = self.new_channels(shape_along(dims_of(label) - fixed, label.shape))
                shape = shape_along(fixed, label.shape)
                self.tie(whole, label, torch.arange(math.prod(shape)).view(shape))
                remaining.append(whole)
            else:
                remaining.append(unexpand(label))
        return remaining


# ---------------------------------------------------------------- rules
# A rule gets an operator's arguments, one of its outputs, and the tensors among the arguments. It
# returns the labels of that output, whose shapes need only broadcast to the output's.


def pin_inputs(mode: LabelMode, arguments: Arguments, out: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The rule of operators that are not in RULES and have no decomposition."""
    mode.pin(itertools.chain(*map(labels, inputs)), "depends on its order")
    return []


def pointwise(mode: LabelMode, arguments: Arguments, out: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Broadcasts its inputs: channels that meet along a dimension are tied."""
    fixed, out_labels = set().union(*map(fixed_dims, inputs)), []
    for x in inputs:
        dims = [dim for dim in fixed if -dim <= x.dim()]
        remaining = mode.fix_order(x, dims, "combines it with values of fixed order")
        new = [label.expand(out.shape) for label in remaining]
        for pair in itertools.product(out_labels, new):
            shared = set.intersection(*map(dims_of, pair))
            if shared:
                mode.tie(*(mode.to_blocks(label, dims_of(label) - shared) for label in pair))
        out_labels += [label for label in new if dims_of(label) not in map(dims_of, out_labels)]
    return out_labels


def reduction(mode: LabelMode, arguments: Arguments, out: Tensor, x: Tensor) -> list[Tensor]:
    """Reduces dimensions: the order along them does not matter."""
    dims = arguments.get("dim")
    dims = [dims] if isinstance(dims, int) else dims or range(x.dim())
    dims, keepdim = [dim % x.dim() for dim in dims], out.dim() == x.dim()
    remaining = [mode.to_blocks(label, dims) for label in labels(x)]
    return [unexpand(label).amax(dims, keepdim) for label in remaining if label is not None]


def reshape(
    mode: LabelMode, arguments: Arguments, out: Tensor, x: Tensor, *like: Tensor
) -> list[Tensor]:
    """Splits or joins dimensions; where two labelled ones are joined, pins the channels of one."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for old in labels(x):
        new = drop_constant_dims(old.reshape(out.shape))
        if any(dims_of(new) & dims_of(b) and not dims_of(old) & dims_of(a) for a, b in pairs):
            mode.pin([new], "flattens it with other channels")
        else:
            pairs.append((old, new))
    return [new for _, new in pairs]


def window(mode: LabelMode, arguments: Arguments, out: Tensor, x: Tensor) -> list[Tensor]:
    """Pools or resizes the last dimensions, whose number is in the operator's name."""
    return mode.fix_order(x, range(-int(re.search(r"(\d)d", arguments["name"])[1]), 0))


def cat(mode: LabelMode, arguments: Arguments, out: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Concatenates. Along `dim` the output has new channels, tied to those of the inputs, so that
    cat(x, -x) does not have each channel twice; along other dimensions it is pointwise.
    """
    dim, start, slices = arguments.get("dim", 0) % out.dim(), 0, []
    joined = mode.new_channels(shape_along({dim}, out.shape))
    for x in filter(Tensor.numel, inputs):
        along_dim = [label for label in labels(x) if dim in dims_of(label)]
        along_dim.sort(key=lambda label: len(dims_of(label)))
        part, start = joined.narrow(dim, start, x.shape[dim]), start + x.shape[dim]
        if along_dim and len(dims_of(along_dim[0])) == 1:
            mode.tie(part, along_dim.pop(0))
        else:
            mode.pin([part], "concatenates values of fixed order")
        mode.pin(along_dim, "concatenates it with others")
        slices.append(x.narrow(dim, 0, 1))
        others = [label.narrow(dim, 0, 1) for label in labels(x) if dim not in dims_of(label)]
        slices[-1].labels = others
    out_labels = pointwise(mode, arguments, out.narrow(dim, 0, 1), *slices)
    labelled = any(dim in dims_of(label) for x in inputs for label in labels(x))
    return [*out_labels, joined] if labelled else out_labels


def stack(mode: LabelMode, arguments: Arguments, out: Tensor, *inputs: Tensor) -> list[Tensor]:
    dim = arguments.get("dim", 0)
    with mode:
        return labels(torch.cat([x.unsqueeze(dim) for x in inputs], dim))


def pad(mode: LabelMode, arguments: Arguments, out: Tensor, x: Tensor) -> list[Tensor]:
    """Pads with a constant, in new channels."""
    padded, pairs = [*map(unexpand, labels(x))], zip(arguments["pad"][::2], arguments["pad"][1::2])
    if min(arguments["pad"]) < 0:
        return pin_inputs(mode, arguments, out, x)
    for dim, (low, high) in zip(reversed(range(out.dim())), pairs):
        for i, label in enumerate(padded):
            if label.shape[dim] > 1:
                shape = [*label.shape[:dim], low + high, *label.shape[dim + 1 :]]
                padded[i] = torch.cat([label, mode.new_channels(shape)], dim).roll(low, dim)
    return padded


def constant(mode: LabelMode, arguments: Arguments, out: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Creates a constant, whose order is free along every dimension: new channels."""
    return [mode.new_channels(shape_along({dim}, out.shape)) for dim in dims_of(out)]


def index(
    mode: LabelMode, arguments: Arguments, out: Tensor, x: Tensor, *indices: Tensor
) -> list[Tensor]:
    """Indexes by tensors, which fixes the order along the indexed dimensions."""
    dims = [dim for dim, entry in enumerate(arguments["indices"]) if entry is not None]
    pin_inputs(mode, arguments, out, *indices)
    remaining = mode.fix_order(x, dims, "indexes it")
    if dims[-1] - dims[0] >= len(dims):  # not adjacent: the indexed dimensions come first
        mode.pin(remaining, "indexes it")
        return []
    front = (slice(None),) * dims[0]
    new = front + (None,) * (out.dim() - x.dim() + len(dims))
    return [label[front + (0,) * len(dims)][new] for label in remaining]


def channelwise(
    mode: LabelMode, arguments: Arguments, out: Tensor, x: Tensor, *parameters: Tensor
) -> list[Tensor]:
    """Batch normalisation and PReLU, whose parameters lie along dimension 1."""
    with mode:
        parameters = [value.view(-1, *[1] * (x.dim() - 2)) for value in parameters]
        if arguments.get("training"):  # InstanceNorm: statistics of the input itself
            dims = [dim for dim in range(x.dim()) if dim != 1]
            parameters.append(x.mean(dims, keepdim=True))
    return pointwise(mode, arguments, out, x, *parameters)


def matmul(
    mode: LabelMode, arguments: Arguments, out: Tensor, x: Tensor, y: Tensor
) -> list[Tensor]:
    """Multiplies each row of x with each column of y, and sums."""
    mode.num_matmuls += 1
    with mode:
        return labels((x.unsqueeze(-1) * y.unsqueeze(-3)).sum(-2))


def convolution(
    mode: LabelMode, arguments: Arguments, out: Tensor, x: Tensor, weight: Tensor, *bias: Tensor
) -> list[Tensor]:
    """Fixes the order over space, and multiplies matrices in each group of channels."""
    mode.num_matmuls += 1
    space, groups = range(2, out.dim()), arguments["groups"]
    x, weight = (mode.set_labels(v.clone(), mode.fix_order(v, space)) for v in (x, weight))
    with mode:
        x = x.flatten(2).sum(2).unflatten(1, (groups, 1, -1))  # (n, groups, 1, columns)
        weight = weight.flatten(2).sum(2).unflatten(0, (groups, -1))  # (groups, rows, columns)
        if arguments["transposed"]:
            weight = weight.transpose(1, 2)
    if groups > 1 and weight.shape[2] > 1:
        # Ties would make the input channels of all groups the same: use group_columns instead.
        columns = [label for label in labels(weight) if dims_of(label) == {2}]
        inputs = [unexpand(label) for label in labels(x) if dims_of(label) == {1, 3}]
        if arguments["transposed"] or len(columns) != 1 or len(inputs) != 1:
            return pin_inputs(mode, arguments, out, x, weight, *bias)
        mode.pin(columns, "differs from group to group")
        first = int(columns[0].flatten()[0])
        mode.tie(mode.group_columns.setdefault(first, inputs[0]), inputs[0])
        rows = [label[..., :1] for label in labels(weight) if label is not columns[0]]
        weight = mode.set_labels(weight[..., :1], rows)
    with mode:
        y = (x * weight).sum(3).flatten(1)
        for value in bias:
            y = y + value
    return [unexpand(label)[(..., *[None] * len(space))] for label in labels(y)]


RULES = {
    name: rule
    for rule, names in {
        # The operator moves entries, and is applied to the labels themselves.
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
        channelwise: "batch_norm prelu",
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
# In addition to those that PyTorch tags as pointwise.
POINTWISE = (
    "instance_norm group_norm layer_norm rms_norm softmax log_softmax pad alias detach log_sigmoid "
    "hardswish hardtanh hardsigmoid relu6 leaky_relu elu selu celu mish masked_fill"
).split()
POINTWISE += [name for name, rule in RULES.items() if rule in (pointwise, channelwise, pad)]


def is_pointwise(node: fx.Node) -> bool:
    """Whether a node computes new values, each channel from the same channel."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target.overloadpacket.__name__.rstrip("_")
    # copy_ is the slice assignment x[a:b] = y, which may put y's channels elsewhere.
    return name != "copy" and (name in POINTWISE or torch.Tag.pointwise in node.target.tags)
