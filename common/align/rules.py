"""What ATen operators do to channels: the tables at the end, from operator to rule.

A rule makes the value of an operator from its arguments: `a.x` is the first, others go by their
names (`a.given` has all), `a.out` is the shape, or a list of shapes, and `a.call(label)` runs the
operator on a label in place of `a.x`. It returns None when it cannot follow; what the operator
reads is pinned then.
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from common.align.channels import ENTRY, Channels, Value, along, arrange


def pointwise(channels: Channels, a: Any) -> Value:
    """All that is given broadcasts; what lies along the same dimension moves together."""
    given = [one for x in a.given.values() for one in (x if isinstance(x, list) else [x])]
    return channels.meet(Value(()), *given)


def scale(value: Value | None, rank: int) -> Value | None:
    """A number for every channel, as what is multiplied with a tensor of `rank` dimensions."""
    return value and arrange(value, [None, 0, *[None] * (rank - 2)])


def by_channel(channels: Channels, a: Any) -> Value:
    """Batch and instance normalisation, PReLU: parameters along the second dimension."""
    names = ("weight", "bias", "running_mean", "running_var")
    return channels.meet(a.x, *(scale(a.given.get(name), len(a.out)) for name in names))


def group_norm(channels: Channels, a: Any) -> Value:
    n, c, *rest = a.out
    blocks = channels.reshape(a.x, (n, a.num_groups, c // a.num_groups, *rest))
    channels.reduce(blocks, range(2, len(blocks.shape)))
    return by_channel(channels, a)


def normalise(channels: Channels, x: Value, dims: Iterable[int], *scales: Any) -> Value:
    """Divided by what is summed up over `dims`."""
    channels.reduce(x, dims)
    return channels.meet(x, *scales)


def reduction(channels: Channels, a: Any) -> Value:
    dims = a.given.get("dim")
    dims = range(len(a.x.shape)) if dims in (None, []) else dims
    return channels.reduce(a.x, [dims] if isinstance(dims, int) else dims, a.given.get("keepdim"))


def slide(channels: Channels, a: Any) -> Value:
    """Pooling and resizing of the last dimensions, as many as the operator's name says."""
    return channels.slide(a.x, range(-int(re.search(r"(\d)d", a.name)[1]), 0))


def dot(channels: Channels, x: Value, y: Value) -> Value:
    """The inner products of rows: of (..., i, k) and (..., j, k) they are (..., i, j)."""
    x = arrange(x, [*range(len(x.shape) - 1), None, len(x.shape) - 1])
    y = arrange(y, [*range(len(y.shape) - 2), None, len(y.shape) - 2, len(y.shape) - 1])
    return channels.reduce(channels.meet(x, y), [-1])


def turned(x: Value) -> Value:
    """The last two dimensions swapped."""
    return arrange(x, [*range(len(x.shape) - 2), len(x.shape) - 1, len(x.shape) - 2])


def linear(channels: Channels, a: Any) -> Value | None:
    return channels.meet(dot(channels, a.x, a.weight), a.bias) if len(a.x.shape) > 1 else None


def matmul(channels: Channels, a: Any) -> Value | None:
    *added, one, other = (value for value in a.given.values() if isinstance(value, Value))
    if min(len(one.shape), len(other.shape)) < 2:
        return None
    return channels.meet(dot(channels, one, turned(other)), *added)


def einsum(channels: Channels, a: Any) -> Value | None:
    *terms, out = a.equation.replace(" ", "").replace("->", ",").split(",")
    if "..." in a.equation or "->" not in a.equation:
        return None
    order = out + "".join(sorted({*"".join(terms)} - {*out}))
    dims = [[term.index(x) if x in term else None for x in order] for term in terms]
    product = channels.meet(*map(arrange, a.tensors, dims))
    return channels.reduce(product, range(len(out), len(order)))


def attention(channels: Channels, a: Any) -> Value:
    scores = channels.meet(dot(channels, a.query, a.key), a.attn_mask)
    channels.reduce(scores, [-1])
    return dot(channels, scores, turned(a.value))


def convolution(channels: Channels, a: Any) -> Value | None:
    space = range(2, len(a.out))
    x, weight = (channels.reduce(channels.slide(v, space), space) for v in (a.x, a.weight))
    (n, c), (rows, columns) = x.shape, weight.shape
    x = channels.reshape(x, (n, a.groups, c // a.groups))
    weight = channels.reshape(weight, (a.groups, rows // a.groups, columns))
    transposed = "transpose" in a.name
    if a.groups > 1 and columns > 1:
        # The second dimension of the weight stands for other channels in every group: note which.
        inner = [label for label in weight.labels if along(label) == {2}]
        outer = [label for label in x.labels if along(label) == {1, 2}]
        if transposed or len(inner) != 1 or len(outer) != 1 or (outer[0] >= ENTRY).any():
            return None
        channels.pin(inner[0], "differs from group to group")
        known = channels.columns.setdefault(channels.vector(inner[0]), outer[0])
        channels.tie(known, outer[0])
        others = tuple(label for label in weight.labels if along(label) != {2})
        weight = Value((*weight.shape[:2], 1), others)
    y = dot(channels, arrange(x, [1, 0, 2]), turned(weight) if transposed else weight)
    y = channels.reshape(arrange(y, [1, 0, 2]), a.out[:2])
    return channels.meet(arrange(y, [0, 1, *[None] * len(space)]), scale(a.bias, len(a.out)))


def pick(channels: Channels, a: Any) -> Value | list[Value]:
    """What picks or moves whole slices along `dim` does the same to labels."""
    dims = a.given.get("dim", a.given.get("dims"))
    dims = {dim % len(a.x.shape) for dim in (dims if isinstance(dims, list) else [dims])}
    shapes = a.out if isinstance(a.out, list) else [a.out]
    picked: list[list[Tensor]] = [[] for _ in shapes]
    for label in a.x.labels:
        same = label if len(shapes[0]) == len(a.x.shape) else label.squeeze([*dims])
        done = a.call(label) if dims & along(label) else [same] * len(shapes)
        for labels, one in zip(picked, [done] if isinstance(done, Tensor) else done):
            labels.append(one)
    values = [*map(channels.value, shapes, picked)]
    return values if isinstance(a.out, list) else values[0]


def pad(channels: Channels, a: Any) -> Value:
    """Entries of a constant are channels of their own; other padding looks at the order."""
    x, pairs = a.x, zip(a.pad[::2], a.pad[1::2])
    ends = {len(a.out) - 1 - back: pair for back, pair in enumerate(pairs) if any(pair)}
    if a.given.get("mode", "constant") != "constant" or min(a.pad) < 0:
        return channels.slide(x, ends)
    for dim in ends.keys() & set().union(*map(along, x.labels)):
        shape = (*x.shape[:dim], sum(ends[dim]), *x.shape[dim + 1 :])
        x = channels.cat([x, channels.constant(shape, [dim])], dim)
        x = Value(x.shape, tuple(label.roll(ends[dim][0], dim) for label in x.labels))
    return x


def index(channels: Channels, a: Any) -> Value | None:
    """What is looked up by a number keeps it."""
    table = a.given.get("weight", a.x)
    indices = a.indices if isinstance(a.indices, list) else [a.indices]
    dims = [dim for dim, one in enumerate(indices) if one is not None]
    if dims[-1] - dims[0] >= len(dims):
        return None
    channels.pin(indices, "looks up by it")
    kept = [dim for dim in range(len(table.shape)) if dim not in dims]
    order = [*kept[: dims[0]], *[None] * (len(a.out) - len(kept)), *kept[dims[0] :]]
    return arrange(channels.slide(table, dims, "looks up parts of it"), order)


def stack(channels: Channels, a: Any) -> Value:
    dim = a.dim % len(a.out)
    order = [*range(dim), None, *range(dim, len(a.out) - 1)]
    return channels.cat([arrange(x, order) for x in a.tensors], dim)


def expand(channels: Channels, a: Any) -> Value:
    """Dimensions in front; what is repeated counts as in order, except where it broadcasts."""
    return channels.meet(a.x, Value((1,) * len(a.out)))


CONTRACTIONS = {  # values made anew, by summing over channels
    "linear": linear,
    "matmul mm bmm addmm baddbmm": matmul,
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d": convolution,
}
POINTWISE = {  # values made anew, each channel from itself; also what PyTorch tags as pointwise
    "batch_norm instance_norm prelu": by_channel,
    "group_norm": group_norm,
    "layer_norm rms_norm": lambda channels, a: normalise(
        channels, a.x, range(-len(a.normalized_shape), 0), a.weight, a.given.get("bias")
    ),
    "softmax log_softmax": lambda channels, a: normalise(channels, a.x, [a.dim]),
    "constant_pad_nd pad": pad,
    "dropout feature_dropout alpha_dropout contiguous to type_as alias detach copy fill zero "
    "_to_copy lift_fresh_copy log_sigmoid hardswish hardtanh hardsigmoid relu6 leaky_relu elu selu "
    "celu mish masked_fill": pointwise,
}
PASSING = {  # values passed on
    "view _unsafe_view reshape flatten unflatten squeeze unsqueeze view_as reshape_as": (
        lambda channels, a: channels.reshape(a.x, a.out)
    ),
    "permute transpose t swapaxes swapdims movedim numpy_T": (
        lambda channels, a: Value(a.out, tuple(map(a.call, a.x.labels)))
    ),
    "slice select split split_with_sizes chunk unbind narrow flip roll": pick,
    "cat concat": lambda channels, a: channels.cat(a.tensors, a.dim),
    "stack": stack,
    "expand expand_as broadcast_to": expand,
    "index embedding": index,
    "_weight_norm": lambda channels, a: normalise(
        channels, a.v, {*range(len(a.v.shape))} - {a.dim}, a.g
    ),
    "mean sum amax amin var std prod any all norm linalg_vector_norm logsumexp": reduction,
    "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d "
    "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d reflection_pad2d "
    "replication_pad2d": slide,
    "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty": (
        lambda channels, a: Value(a.out)
    ),
}
RULES = {
    name: (rule, table)
    for table in (CONTRACTIONS, POINTWISE, PASSING)
    for names, rule in table.items()
    for name in names.split()
}
