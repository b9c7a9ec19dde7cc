"""Finding the permutation axes of a network: which channels move together, read off its traced
graph.

torch.fx traces the network. Every convolution or linear layer makes a new axis of output channels;
normalisation, activation and pooling keep the axis of their input; addition and gating tie two axes
into one (union-find); concatenation puts several side by side. What fixes the order of channels
pins their axis, with the reason. Change the network and its permutations follow; a layer that is
not known here is an error that names it.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from common.align.permutation import Axes, Carrier, Layout, Segment, Unit
from common.errors import UserError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CHANNEL_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Sigmoid,
    nn.Tanh,
    nn.PReLU,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.Softplus,
    nn.Softsign,
    nn.LogSigmoid,
    nn.Tanhshrink,
    nn.Softmax,
    nn.LogSoftmax,
)
POOLS = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.LPPool1d,
    nn.LPPool2d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.Upsample,
    nn.ZeroPad2d,
    nn.ReflectionPad2d,
)
KEEPS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity)
ORDERED = (nn.LocalResponseNorm, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle)

ACTIVATION_FUNCTIONS = {
    "relu",
    "relu_",
    "relu6",
    "leaky_relu",
    "elu",
    "selu",
    "celu",
    "gelu",
    "silu",
    "mish",
    "sigmoid",
    "sigmoid_",
    "tanh",
    "tanh_",
    "hardswish",
    "hardsigmoid",
    "hardtanh",
    "softplus",
    "softsign",
    "logsigmoid",
    "softmax",
    "log_softmax",
    "abs",
    "neg",
    "exp",
    "sqrt",
    "square",
    "pow",
    "clamp",
}
POOL_FUNCTIONS = {
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "interpolate",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "boolean_dispatch",  # what torch.fx calls F.max_pool2d and its kin
}
KEEP_FUNCTIONS = {
    "dropout",
    "dropout2d",
    "stochastic_depth",
    "contiguous",
    "clone",
    "detach",
    "float",
    "to",
}
ELEMENTWISE = {
    "add",
    "iadd",
    "add_",
    "sub",
    "isub",
    "sub_",
    "mul",
    "imul",
    "mul_",
    "truediv",
    "itruediv",
    "div",
    "div_",
    "maximum",
    "minimum",
}
REDUCTIONS = {"mean", "sum", "amax", "amin", "var", "std"}
RESHAPES = {"flatten", "view", "reshape", "unsqueeze", "squeeze"}


def trace(model: nn.Module) -> fx.GraphModule:
    """Trace `model` in evaluation mode; raises UserError when torch.fx cannot."""
    try:
        return fx.symbolic_trace(model.eval())
    except Exception as error:  # fx raises many kinds, from anywhere in the model's forward
        raise UserError(f"torch.fx cannot trace {type(model).__name__}: {error}") from error


def find_axes(model: nn.Module, input_shape: tuple[int, ...]) -> Axes:
    """Derive the axes of `model` for inputs of `input_shape` (without the batch dimension).

    Raises UserError that names the layer when one is not known.
    """
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if names.setdefault(id(parameter), name) != name:
            raise UserError(
                f"{name} and {names[id(parameter)]} are one weight under two names, which is not "
                "supported"
            )
    try:
        network = copy.deepcopy(model).to("meta")  # shapes only: nothing is computed
    except RuntimeError as error:  # weights that hooks compute, as torch.nn.utils.weight_norm does
        raise UserError(
            f"{type(model).__name__} cannot be copied: {str(error).splitlines()[0]}"
        ) from error
    return _Finder(trace(network), network.state_dict()).find(
        torch.empty(2, *input_shape, device="meta")
    )


class _Finder(fx.Interpreter):
    """Runs the graph on shapes and follows, for every value, which axes lie along each of its
    dimensions.

    Inside, an axis is known by the layer that makes it. `parent` is the union-find forest over
    these names; `parts` holds axes that turned out to be several side by side; `divisions` the
    layouts that share an order of blocks.
    """

    def __init__(self, graph: fx.GraphModule, state: dict[str, Tensor]):
        super().__init__(graph)
        self.extra_traceback = False  # an error's message stays what it is
        self.state = state
        self.parent: dict[str, str] = {}
        self.size: dict[str, int] = {}
        self.parts: dict[str, Layout] = {}
        self.reason: dict[str, str] = {}
        self.divisions: list[tuple[list[Layout], int, str]] = []
        self.layouts: dict[fx.Node, list[Layout]] = {}
        self.dims: dict[str, tuple[Layout, ...]] = {}
        self.computed: list[
            fx.Node
        ] = []  # values made anew, in graph order; pooling and reshaping only pass values on
        self.pointwise: set[fx.Node] = set()  # of these, the ones that keep every channel to itself
        self.activations: set[fx.Node] = set()

    def find(self, example: Tensor) -> Axes:
        with torch.device("meta"):  # for tensors that the forward pass makes itself
            self.run(example)
        units = self._units()
        dims = {
            name: tuple(self._resolve(layout) for layout in layouts)
            for name, layouts in self.dims.items()
        }
        for name, value in self.state.items():
            dims.setdefault(name, (None,) * value.dim())  # not used by the forward pass
        carriers = self._carriers()
        roots = [
            axis for axis in self.parent if self._root(axis) == axis and axis not in self.parts
        ]
        pinned = {
            axis: (self.size[axis], self.reason[axis]) for axis in roots if axis in self.reason
        }
        sizes = {axis: self.size[axis] for axis in roots if axis not in pinned}
        free = {
            name: tuple(self._unpin(layout, pinned) for layout in layouts)
            for name, layouts in dims.items()
        }
        together = {axis: unit for unit in units for axis in unit.axes}
        units = dict.fromkeys(together.get(axis, Unit((axis,), 1)) for axis in sizes)
        return Axes(
            free,
            sizes,
            tuple(units),
            {axis: tuple(carriers.get(axis, ())) for axis in sizes},
            pinned,
        )

    def _carriers(self) -> dict[str, list[Carrier]]:
        """The values that layers read each axis from; the last of them is the last value that
        carries it at all.
        """
        carriers: dict[str, list[Carrier]] = {}
        for node in self.computed:
            if all(user in self.pointwise for user in node.users):
                continue
            before = node
            while before in self.activations:
                before = before.all_input_nodes[0]
            for dim, layout in enumerate(self.layouts[node]):
                offset = 0
                for axis, size, repeat, _ in self._resolve(layout) or ():
                    carriers.setdefault(axis, []).append(
                        Carrier(node.name, before.name, dim, offset, repeat)
                    )
                    offset += size * repeat
        return carriers

    def _units(self) -> list[Unit]:
        """Gather the axes whose blocks move together; pins those for which no common order of
        blocks can be told.
        """
        while True:
            units: dict[str, tuple[dict[str, None], set[int]]] = {}
            pinned = len(self.reason)
            for layouts, blocks, where in self.divisions:
                resolved = [self._resolve(layout) for layout in layouts]
                if any(
                    r is None or len(r) != 1 or r[0].repeat != 1 or r[0].axis in self.reason
                    for r in resolved
                ):
                    for layout in resolved:
                        self._pin(layout, f"{where} groups it with channels of fixed order")
                    continue
                axes, counts = dict.fromkeys(r[0].axis for r in resolved), {blocks}
                for axis in list(axes):
                    if axis in units:
                        axes |= units[axis][0]
                        counts |= units[axis][1]
                for axis in axes:
                    units[axis] = axes, counts
                if len(counts) > 1:
                    for axis in axes:
                        self.reason.setdefault(
                            axis, f"{where} groups it otherwise than another layer does"
                        )
            if (
                len(self.reason) == pinned
            ):  # a pin may fix the axes that move with it, so until nothing changes
                order = list(self.parent).index
                return [
                    Unit(tuple(sorted(axes, key=order)), *counts) for axes, counts in units.values()
                ]

    # -- union-find

    def _new(self, axis: str, size: int) -> Layout:
        self.parent.setdefault(axis, axis)
        self.size[axis] = size
        return (Segment(axis, size),)

    def _root(self, axis: str) -> str:
        while self.parent[axis] != axis:
            axis = self.parent[axis]
        return axis

    def _pin(self, layout: Layout, reason: str) -> None:
        for segment in self._resolve(layout) or ():
            self.reason.setdefault(segment.axis, reason)

    def _join(self, one: Layout, other: Layout, where: str) -> Layout:
        """Tie two layouts of the same length, entry by entry; None, and both pinned, where that
        cannot be told.
        """
        one, other = self._resolve(one), self._resolve(other)
        if one is None or other is None:
            self._pin(one or other, f"{where} joins it with values of fixed order")
            return None
        if [segment[1:] for segment in one] == [segment[1:] for segment in other]:
            for left, right in zip(one, other):
                self._unite(left.axis, right.axis)
            return one
        for whole, parts in ((one, other), (other, one)):
            if len(whole) == 1 and whole[0].repeat == 1 and whole[0].axis not in self.reason:
                self.parts[whole[0].axis] = parts
                return parts
        for layout in (one, other):
            self._pin(layout, f"{where} joins channels that are grouped differently")
        return None

    def _unite(self, one: str, other: str) -> None:
        # The axis that was made first gives its name to both.
        first, second = sorted((one, other), key=list(self.parent).index)
        if first != second:
            self.parent[second] = first
            if second in self.reason:
                self.reason.setdefault(first, self.reason[second])

    def _resolve(self, layout: Layout) -> Layout:
        """The layout in terms of the axes that there are by now."""
        if layout is None:
            return None
        result: list[Segment] = []
        for segment in layout:
            axis = self._root(segment.axis)
            if axis in self.parts:
                result += [
                    part._replace(repeat=part.repeat * segment.repeat)
                    for part in self._resolve(self.parts[axis])
                ]
            else:
                result.append(segment._replace(axis=axis))
        return tuple(result)

    @staticmethod
    def _unpin(layout: Layout, pinned: dict[str, Any]) -> Layout:
        """None where nothing along a dimension may move, so that a reader sees at once what is
        fixed.
        """
        return (
            None if layout is None or all(segment.axis in pinned for segment in layout) else layout
        )

    # -- running

    def run_node(self, node: fx.Node) -> Any:
        try:
            value = super().run_node(node)
        except (RuntimeError, ValueError) as error:  # the network's own, on shapes alone
            raise UserError(
                f"{_where(node)} fails for inputs of this shape: {str(error).splitlines()[0]}"
            ) from error
        if node.op == "placeholder":
            self.layouts[node] = [None] * value.dim() if isinstance(value, Tensor) else []
        elif node.op == "get_attr":
            if isinstance(value, Tensor):
                value = value.to("meta")  # a constant stays behind when a module moves
            self.layouts[node] = self._parameter(node.target, value)
        elif node.op == "output":
            for source in node.all_input_nodes:
                for layout in self.layouts[source]:
                    self._pin(layout, "it is the output of the network")
        elif node.op == "call_module":
            self.layouts[node] = self._module(
                node, node.target, self.submodules[node.target], value
            )
        else:
            self.layouts[node] = self._function(node, value)
        if isinstance(value, Tensor) and node.op != "output":
            # A rule that does not give the shape that the network computes is not the right one.
            entries = [
                size if layout is None else sum(s.size * s.repeat for s in layout)
                for size, layout in zip(value.shape, self.layouts[node])
            ]
            if len(self.layouts[node]) != value.dim() or entries != list(value.shape):
                raise _unknown(_where(node))
        return value

    def _parameter(self, name: str, value: Any) -> list[Layout]:
        """A parameter that the forward pass reads itself: its dimensions are open, and tied by what
        they meet.
        """
        if name not in self.state:  # a constant, which no permutation reaches
            return [None] * value.dim() if isinstance(value, Tensor) else []
        if name not in self.dims:
            large = [dim for dim, size in enumerate(value.shape) if size > 1]
            self.dims[name] = tuple(
                self._new(name if len(large) == 1 else f"{name}.{dim}", size)
                if dim in large
                else None
                for dim, size in enumerate(value.shape)
            )
        return list(self.dims[name])

    def _input(self, node: fx.Node) -> list[Layout]:
        return list(self.layouts[node.all_input_nodes[0]])

    def _made(self, node: fx.Node, activation: bool = False) -> None:
        """Note a value that is computed channel by channel."""
        self.computed.append(node)
        self.pointwise.add(node)
        if activation:
            self.activations.add(node)

    def _module(self, node: fx.Node, name: str, module: nn.Module, value: Tensor) -> list[Layout]:
        layouts = self._input(node)
        if isinstance(module, CONVOLUTIONS):
            layouts[1] = self._weights(
                name, module, layouts[1], module.in_channels, module.out_channels, module.groups
            )
            layouts[2:] = self._neighbours(layouts[2:], name)
            self.computed.append(node)
        elif isinstance(module, nn.Linear):
            layouts[-1] = self._weights(
                name, module, layouts[-1], module.in_features, module.out_features, 1
            )
            self.computed.append(node)
        elif isinstance(module, (*CHANNEL_NORMS, nn.GroupNorm)):
            if isinstance(module, nn.GroupNorm) and 1 < module.num_groups < module.num_channels:
                self.divisions.append(([layouts[1]], module.num_groups, name))
            self._record(
                name,
                module,
                dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (layouts[1],)),
            )
            self._made(node)
        elif isinstance(module, nn.LayerNorm):
            self._record(
                name,
                module,
                dict.fromkeys(("weight", "bias"), tuple(layouts[-len(module.normalized_shape) :])),
            )
            self._made(node)
        elif isinstance(module, ACTIVATIONS):
            if isinstance(module, nn.PReLU):
                self._record(
                    name, module, {"weight": (layouts[1] if module.num_parameters > 1 else None,)}
                )
            self._made(node, activation=True)
        elif isinstance(module, nn.Flatten):
            layouts = self._reshape(node, value)
        elif isinstance(module, ORDERED):
            for layout in layouts:
                self._pin(layout, f"{name} ({type(module).__name__}) fixes its order")
            layouts = [None] * value.dim()
        elif isinstance(module, nn.MultiheadAttention):
            layouts = self._attention(node, name, module)
        elif isinstance(module, POOLS):
            layouts[2:] = self._neighbours(layouts[2:], name)
        elif not isinstance(module, KEEPS):
            raise _unknown(f"layer {name} ({type(module).__name__})")
        return layouts

    def _neighbours(self, layouts: list[Layout], where: str) -> list[Layout]:
        """What convolutions and pools do to the dimensions that they slide over: neighbours must
        stay neighbours.
        """
        for layout in layouts:
            self._pin(layout, f"{where} slides over it")
        return [None] * len(layouts)

    def _weights(
        self, name: str, module: nn.Module, fan_in: Layout, size_in: int, size_out: int, groups: int
    ) -> Layout:
        """Lay out the weights of a convolution or linear layer; return the layout of its output
        channels.
        """
        if groups == size_in == size_out:  # depthwise: every channel stays itself
            fan_out, columns = fan_in, None
        else:
            fan_out, columns = self._new(name, size_out), fan_in
            if groups > 1:
                fan_in = self._resolve(fan_in)
                self.divisions.append(([fan_in, fan_out], groups, name))
                single = fan_in is not None and len(fan_in) == 1 and groups < size_in
                columns = (
                    (fan_in[0]._replace(size=size_in // groups, groups=groups),) if single else None
                )
        self._record(
            name,
            module,
            {
                "weight": (fan_out, columns) + (None,) * (module.weight.dim() - 2),
                "bias": (fan_out,),
            },
        )
        return fan_out

    def _attention(self, node: fx.Node, name: str, module: nn.MultiheadAttention) -> list[Layout]:
        """Self-attention: heads trade places whole; inside one, queries move with keys, and values
        with what reads them.
        """
        plain = module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn
        if len(node.all_input_nodes) > 1 or not plain:
            raise _unknown(f"layer {name} (MultiheadAttention between different inputs)")
        layouts, out = self._input(node), self._new(name, module.embed_dim)
        keys, values = (
            self._new(f"{name}.keys", module.embed_dim),
            self._new(f"{name}.values", module.embed_dim),
        )
        self.divisions.append(([keys, values], module.num_heads, name))
        rows = (*keys, *keys, *values)  # in_proj holds queries, keys and values
        self._record(name, module, {"in_proj_weight": (rows, layouts[-1]), "in_proj_bias": (rows,)})
        self._record(f"{name}.out_proj", module.out_proj, {"weight": (out, values), "bias": (out,)})
        self.computed.append(node)
        return [*layouts[:-1], out]

    def _record(self, name: str, module: nn.Module, entries: dict[str, tuple[Layout, ...]]) -> None:
        for key, layouts in entries.items():
            if getattr(module, key, None) is None:
                continue
            full = f"{name}.{key}"
            if full not in self.state:
                raise UserError(
                    f"{full} is no parameter of its own (a parametrisation?): store it as a plain "
                    "weight first"
                )
            if full in self.dims:  # a layer that is used twice ties the axes of both uses
                layouts = tuple(
                    self._join(a, b, name) if a or b else None
                    for a, b in zip(self.dims[full], layouts)
                )
            self.dims[full] = layouts

    def _function(self, node: fx.Node, value: Any) -> list[Layout]:
        name = _called(node)
        where = _where(node)
        live = any(layout for source in node.all_input_nodes for layout in self.layouts[source])
        if not isinstance(value, Tensor):
            if (
                live
                and name not in ("getattr", "size", "dim")
                and not isinstance(value, (int, float, type(None)))
            ):
                raise _unknown(where)
            return []
        if not live:  # nothing that may move goes in
            return [None] * value.dim()
        operands = [
            source for source in node.all_input_nodes if isinstance(self.env[source], Tensor)
        ]
        if name in ACTIVATION_FUNCTIONS and len(operands) == 1:
            self._made(node, activation=True)
            return self._input(node)
        if name in KEEP_FUNCTIONS:
            return self._input(node)
        if name in POOL_FUNCTIONS:
            layouts = self._input(node)
            return [*layouts[:2], *self._neighbours(layouts[2:], where)]
        if (
            name in ELEMENTWISE | ACTIVATION_FUNCTIONS
        ):  # two operands, as of pow and clamp, are tied
            self._made(node)
            return self._broadcast(node, value, where)
        if name in RESHAPES:
            return self._reshape(node, value)
        if name in REDUCTIONS:
            return self._reduce(node, *_bind(node, _reduction))
        if name in ("cat", "concat"):
            return self._concatenate(
                node,
                *_bind(
                    node, lambda tensors, dim=0, axis=None: (tensors, dim if axis is None else axis)
                ),
                where,
            )
        if name == "layer_norm":
            self._made(node)
            shape, *scales = _bind(
                node, lambda x, shape, weight=None, bias=None, eps=1e-5: (shape, weight, bias)
            )
            layouts = self._input(node)
            for scale in filter(None, scales):
                layouts[-len(shape) :] = [
                    self._join(a, b, where)
                    for a, b in zip(layouts[-len(shape) :], self.layouts[scale])
                ]
            return layouts
        if name == "permute":
            order = _bind(node, lambda x, *given, dims=None: dims or given)
            return [
                self._input(node)[dim]
                for dim in (order[0] if isinstance(order[0], (tuple, list)) else order)
            ]
        if name in ("transpose", "swapaxes"):
            layouts, (one, other) = (
                self._input(node),
                _bind(node, lambda x, dim0, dim1: (dim0, dim1)),
            )
            layouts[one], layouts[other] = layouts[other], layouts[one]
            return layouts
        if name in ("expand", "expand_as"):
            sizes, layouts = self.env[node.all_input_nodes[0]].shape, self._input(node)
            kept = [
                layout if size == now else None
                for layout, size, now in zip(layouts, sizes, value.shape[-len(sizes) :])
            ]
            return [None] * (value.dim() - len(kept)) + kept
        if name == "getitem" and isinstance(
            self.env[node.args[0]], tuple
        ):  # of attention: (values, weights)
            return (
                self._input(node) if node.args[1] == 0 else [None] * value.dim()
            )  # weights are of places to places
        if name == "getitem":
            return self._slice(node, node.args[1], where)
        if name == "pad":
            return self._pad(
                node, *_bind(node, lambda x, pad, mode="constant", value=None: (pad, mode))
            )
        raise _unknown(where)

    def _broadcast(self, node: fx.Node, value: Tensor, where: str) -> list[Layout]:
        """Elementwise with two operands: dimensions of equal size are tied, those of size one
        follow the other.
        """
        result: list[Layout | str] = ["open"] * value.dim()
        for source in node.all_input_nodes:
            if not isinstance(self.env[source], Tensor):
                continue
            shape, layouts = self.env[source].shape, self.layouts[source]
            for back in range(1, len(shape) + 1):
                if shape[-back] == value.shape[-back] and (shape[-back] > 1 or layouts[-back]):
                    before = result[-back]
                    both = before != "open" and (before or layouts[-back])
                    result[-back] = (
                        self._join(before, layouts[-back], where) if both else layouts[-back]
                    )
        return [None if layout == "open" else layout for layout in result]

    def _reshape(self, node: fx.Node, value: Tensor) -> list[Layout]:
        """Match the dimensions before and after, stretch by stretch of equal product, in row-major
        order.
        """
        source = node.all_input_nodes[0]
        # Dimensions of size one carry nothing and are left out; zip with the new shape puts them
        # back.
        old = [
            (size, layout)
            for size, layout in zip(self.env[source].shape, self.layouts[source])
            if size > 1
        ]
        new = [size for size in value.shape if size > 1]
        result: list[Layout] = []
        while new:
            taken, made = [old.pop(0)], [new.pop(0)]
            while (have := math.prod(size for size, _ in taken)) != (want := math.prod(made)):
                if have < want:
                    taken.append(old.pop(0))
                else:
                    made.append(new.pop(0))
            (_, first), *rest = taken
            if len(made) > 1 or any(layout for _, layout in rest):
                for _, layout in taken:
                    self._pin(layout, f"{node.name} reshapes it together with another dimension")
                result += [None] * len(made)
            else:
                pixels = math.prod(size for size, _ in rest)
                result.append(
                    first
                    and tuple(segment._replace(repeat=segment.repeat * pixels) for segment in first)
                )
        remaining = iter(result)
        return [next(remaining) if size > 1 else None for size in value.shape]

    def _reduce(self, node: fx.Node, dim: Any, keep: bool) -> list[Layout]:
        layouts = self._input(node)
        reduced = {
            d % len(layouts)
            for d in (
                range(len(layouts)) if dim is None else [dim] if isinstance(dim, int) else dim
            )
        }
        return [
            None if d in reduced else layout
            for d, layout in enumerate(layouts)
            if keep or d not in reduced
        ]

    def _slice(self, node: fx.Node, index: Any, where: str) -> list[Layout]:
        index = index if isinstance(index, tuple) else (index,)
        layouts, result = self._input(node), []
        if Ellipsis in index:
            at, given = index.index(Ellipsis), sum(entry is not None for entry in index) - 1
            index = (*index[:at], *[slice(None)] * (len(layouts) - given), *index[at + 1 :])
        for entry in index:
            if entry is None:
                result.append(None)
                continue
            layout = layouts.pop(0)
            if entry != slice(None):
                self._pin(layout, f"{where} takes a part of it")
                layout = None
            if not isinstance(entry, int):
                result.append(layout)
        return result + layouts

    def _pad(self, node: fx.Node, pad: Any, mode: str) -> list[Layout]:
        layouts = self._input(node)
        for back in range(1, len(pad) // 2 + 1):
            if layouts[-back] and any(pad[2 * back - 2 : 2 * back]):
                # Channels of a constant are interchangeable: an axis of their own before and
                # behind.
                ends = [
                    self._new(f"{node.name}.{side}", size) if size > 0 else ()
                    for side, size in zip(("before", "behind"), pad[2 * back - 2 : 2 * back])
                ]
                if mode == "constant" and min(pad[2 * back - 2 : 2 * back]) >= 0:
                    layouts[-back] = (*ends[0], *layouts[-back], *ends[1])
                else:
                    self._pin(layouts[-back], f"{node.name} repeats or cuts a part of it")
                    layouts[-back] = None
        if any(layouts):
            self._made(node)
        return layouts

    def _concatenate(
        self, node: fx.Node, tensors: list[fx.Node], dim: int, where: str
    ) -> list[Layout]:
        result = list(self.layouts[tensors[0]])
        dim %= len(result)
        parts: list[Segment] = []
        for source in tensors if any(self.layouts[source][dim] for source in tensors) else ():
            layout = self.layouts[source][dim]
            if (
                layout is None
            ):  # fixed channels beside free ones: an axis of their own that is pinned
                layout = self._new(f"{source.name} in {node.name}", self.env[source].shape[dim])
                self._pin(layout, f"{where} joins channels of fixed order")
            parts += layout
        for other in range(len(result)):
            for source in tensors[1:]:
                if other != dim and (result[other] or self.layouts[source][other]):
                    result[other] = self._join(result[other], self.layouts[source][other], where)
        result[dim] = tuple(parts) or None
        return result


def _unknown(where: str) -> UserError:
    return UserError(f"the axes of {where} are not known: teach common/align/axes.py its rule")


def _called(node: fx.Node) -> str:
    return (
        node.target
        if isinstance(node.target, str)
        else getattr(node.target, "__name__", str(node.target))
    )


def _where(node: fx.Node) -> str:
    """What a node calls, and the layer in whose forward pass it does."""
    inside = list(node.meta.get("nn_module_stack", {}).values())
    return f"{_called(node)} in " + (
        f"{inside[-1][0]} ({inside[-1][1].__name__})" if inside else "the network itself"
    )


def _bind(node: fx.Node, signature: Callable) -> Any:
    """Read a call's arguments by name, however they were passed; raises UserError for a way that is
    not known.
    """
    try:
        return signature(*node.args, **node.kwargs)
    except TypeError as error:
        raise _unknown(_where(node)) from error


def _reduction(
    x: Any,
    dim: Any = None,
    keepdim: bool = False,
    *,
    axis: Any = None,
    unbiased: Any = None,
    correction: Any = None,
    dtype: Any = None,
) -> tuple[Any, bool]:
    return (axis if dim is None else dim), keepdim
