"""Which channels of a network may be permuted together, read off its traced graph; and permuting by them.

torch.fx traces the network. Every convolution or linear layer makes a new axis of output channels;
normalisation, activation and pooling keep the axis of their input; addition ties two axes into one
(union-find). The result says for every dimension of every parameter and buffer which axes lie along it.
Change the network and its permutations follow; a layer that is not known here is an error that names it.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from common.errors import UserError


class Segment(NamedTuple):
    """A stretch of a dimension: `size` channels of an axis, each `repeat` entries long (after a flatten over space)."""

    axis: str
    size: int
    repeat: int = 1


Layout = tuple[Segment, ...] | None  # one dimension of a tensor; None: nothing along it may move


class Carrier(NamedTuple):
    """Where the channels of an axis can be seen: in `dim` of a graph node's output, `repeat` entries each from `offset`."""

    node: str
    dim: int
    offset: int
    repeat: int


@dataclass(frozen=True)
class Axes:
    """The permutation axes of a network.

    dims: for every parameter and buffer, one Layout a dimension.
    sizes: channels of every axis that may be permuted.
    carriers: for each of them, the last tensor in graph order that carries it, after its nonlinearity.
    pinned: for every axis that must stay in order, the reason.
    """

    dims: dict[str, tuple[Layout, ...]]
    sizes: dict[str, int]
    carriers: dict[str, Carrier]
    pinned: dict[str, str]


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
    graph = trace(copy.deepcopy(model).to("meta"))  # shapes only: nothing is computed
    return _Finder(graph).find(torch.empty(2, *input_shape, device="meta"))


# ---------------------------------------------------------------- permuting


def permute(
    tensors: dict[str, Tensor], dims: dict[str, tuple[Layout, ...]], permutation: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Permute weights, buffers, masks or signs; new tensors, the input stays as it is.

    permutation[axis][i] is the channel of the source that lands at position i; an axis without entry stays.
    """
    return {name: _permute_one(tensor, dims[name], permutation) for name, tensor in tensors.items()}


def _permute_one(tensor: Tensor, layouts: tuple[Layout, ...], permutation: dict[str, Tensor]) -> Tensor:
    for dim, layout in enumerate(layouts):
        if layout and any(segment.axis in permutation for segment in layout):
            tensor = tensor.index_select(dim, _index(layout, permutation).to(tensor.device))
    return tensor.clone()


def _index(layout: tuple[Segment, ...], permutation: dict[str, Tensor]) -> Tensor:
    pieces, offset = [], 0
    for axis, size, repeat in layout:
        order = permutation.get(axis, torch.arange(size))
        pieces.append((offset + order[:, None] * repeat + torch.arange(repeat)).flatten())
        offset += size * repeat
    return torch.cat(pieces)


def random_permutation(axes: Axes, seed: int) -> dict[str, Tensor]:
    """A uniformly random permutation of every axis."""
    generator = torch.Generator().manual_seed(seed)
    return {axis: torch.randperm(size, generator=generator) for axis, size in axes.sizes.items()}


def inverse(permutation: dict[str, Tensor]) -> dict[str, Tensor]:
    return {axis: torch.argsort(index) for axis, index in permutation.items()}


@torch.no_grad()
def check_same_function(model: nn.Module, before: dict[str, Tensor], after: dict[str, Tensor], inputs: Tensor) -> float:
    """Return the largest output difference of two state dicts relative to the largest output, in float64.

    Raises RuntimeError above 1e-6: the two are then not permutations of each other.
    """
    network = copy.deepcopy(model).cpu().double().eval()
    outputs = []
    for state in (before, after):
        network.load_state_dict(state)
        outputs.append(network(inputs.cpu().double()))
    difference = float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max().clamp_min(1e-30))
    if not difference < 1e-6:
        raise RuntimeError(
            f"the permuted network computes another function: outputs differ by {difference:.1e} of the largest"
        )
    return difference


# ---------------------------------------------------------------- finding the axes

ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink,
)  # fmt: skip
POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
KEEPS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

ACTIVATION_FUNCTIONS = {
    "relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "sigmoid_", "tanh",
    "tanh_", "hardswish", "hardsigmoid", "hardtanh", "softplus", "softsign", "logsigmoid", "abs", "neg", "exp", "sqrt", "clamp",
}  # fmt: skip
POOL_FUNCTIONS = {
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "interpolate",
}  # fmt: skip
KEEP_FUNCTIONS = {"dropout", "dropout2d", "contiguous", "clone", "detach", "float", "to"}
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
    "div",
    "div_",
    "maximum",
    "minimum",
}


class _Finder(fx.Interpreter):
    """Runs the graph on shapes and follows, for every value, which axes lie along each of its dimensions.

    Inside, an axis is known by the layer that makes it; `parent` is the union-find forest over these names.
    """

    def __init__(self, graph: fx.GraphModule):
        super().__init__(graph)
        self.parent: dict[str, str] = {}
        self.size: dict[str, int] = {}
        self.reason: dict[str, str] = {}
        self.layouts: dict[fx.Node, list[Layout]] = {}
        self.dims: dict[str, tuple[Layout, ...]] = {}
        self.computed: list[fx.Node] = []  # values made anew, in graph order; pooling and reshaping only pass values on

    def find(self, example: Tensor) -> Axes:
        self.run(example)
        dims = {name: tuple(self._resolve(layout) for layout in layouts) for name, layouts in self.dims.items()}
        for name, value in self.module.state_dict().items():
            dims.setdefault(name, (None,) * value.dim())  # not used by the forward pass
        carriers: dict[str, Carrier] = {}
        for node in self.computed:
            for dim, layout in enumerate(self.layouts[node]):
                offset = 0
                for axis, size, repeat in self._resolve(layout) or ():
                    carriers[axis] = Carrier(node.name, dim, offset, repeat)
                    offset += size * repeat
        roots = [axis for axis in self.parent if self._root(axis) == axis]
        pinned = {axis: self.reason[axis] for axis in roots if axis in self.reason}
        sizes = {axis: self.size[axis] for axis in roots if axis not in pinned}
        free = {name: tuple(self._unpin(layout, pinned) for layout in layouts) for name, layouts in dims.items()}
        return Axes(free, sizes, {axis: carriers[axis] for axis in sizes}, pinned)

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
        for segment in layout or ():
            self.reason.setdefault(self._root(segment.axis), reason)

    def _join(self, one: Layout, other: Layout, where: str) -> Layout:
        if one is None or other is None:
            self._pin(one or other, f"{where} joins it with values of fixed order")
            return None
        if [segment[1:] for segment in one] != [segment[1:] for segment in other]:
            raise UserError(f"{where} joins channels that are grouped differently, which is not supported")
        for left, right in zip(one, other):
            # The axis that was made first gives its name to both.
            first, second = sorted((self._root(left.axis), self._root(right.axis)), key=list(self.parent).index)
            if first != second:
                self.parent[second] = first
                if second in self.reason:
                    self.reason.setdefault(first, self.reason[second])
        return one

    def _resolve(self, layout: Layout) -> Layout:
        return layout and tuple(segment._replace(axis=self._root(segment.axis)) for segment in layout)

    @staticmethod
    def _unpin(layout: Layout, pinned: dict[str, str]) -> Layout:
        """None where nothing along a dimension may move, so that a reader sees at once what is fixed."""
        return None if layout is None or all(segment.axis in pinned for segment in layout) else layout

    # -- running

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        where = f"{node.target if isinstance(node.target, str) else node.name} ({node.op})"
        if node.op == "placeholder":
            self.layouts[node] = [None] * value.dim()
        elif node.op == "get_attr":
            self.layouts[node] = [None] * value.dim()
            self.dims[node.target] = (None,) * value.dim()
        elif node.op == "output":
            for source in node.all_input_nodes:
                for layout in self.layouts.get(source, ()):
                    self._pin(layout, "it is the output of the network")
        elif node.op == "call_module":
            self._module(node, node.target, self.submodules[node.target], value)
        elif isinstance(value, Tensor):
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            self._function(node, name, value, where)
        return value

    def _input(self, node: fx.Node) -> list[Layout]:
        return list(self.layouts[node.all_input_nodes[0]])

    def _module(self, node: fx.Node, name: str, module: nn.Module, value: Tensor) -> None:
        layouts = self._input(node)
        if isinstance(module, CONVOLUTIONS):
            layouts[1] = self._weights(name, module, layouts[1], module.in_channels, module.out_channels, module.groups)
            self.computed.append(node)
        elif isinstance(module, nn.Linear):
            layouts[-1] = self._weights(name, module, layouts[-1], module.in_features, module.out_features, 1)
            self.computed.append(node)
        elif isinstance(module, BATCH_NORMS):
            self._per_channel(name, module, layouts[1])
            self.computed.append(node)
        elif isinstance(module, ACTIVATIONS):
            self.computed.append(node)
        elif isinstance(module, nn.Flatten):
            layouts = self._flatten(node, module.start_dim, module.end_dim)
        elif not isinstance(module, POOLS + KEEPS):
            raise UserError(
                f"the axes of layer {name} ({type(module).__name__}) are not known: teach common/permutation.py its rule"
            )
        self.layouts[node] = layouts

    def _weights(
        self, name: str, module: nn.Module, fan_in: Layout, size_in: int, size_out: int, groups: int
    ) -> Layout:
        """Lay out the weights of a convolution or linear layer; return the layout of its output channels."""
        if groups == size_in == size_out:  # depthwise: every channel stays itself
            fan_out, fan_in = fan_in, None
        else:
            fan_out = self._new(name, size_out)
            if groups > 1:
                self._pin(fan_in, f"the grouped convolution {name} reads it")
                self._pin(fan_out, f"the grouped convolution {name} makes it")
                fan_in = None
        self._record(
            name, module, {"weight": (fan_out, fan_in) + (None,) * (module.weight.dim() - 2), "bias": (fan_out,)}
        )
        return fan_out

    def _per_channel(self, name: str, module: nn.Module, layout: Layout) -> None:
        keys = ("weight", "bias", "running_mean", "running_var")
        self._record(name, module, {key: (layout,) for key in keys})

    def _record(self, name: str, module: nn.Module, entries: dict[str, tuple[Layout, ...]]) -> None:
        for key, layouts in entries.items():
            if getattr(module, key, None) is None:
                continue
            full = f"{name}.{key}"
            if full in self.dims:  # a layer that is used twice ties the axes of both uses
                layouts = tuple(self._join(a, b, name) if a or b else None for a, b in zip(self.dims[full], layouts))
            self.dims[full] = layouts

    def _function(self, node: fx.Node, name: str, value: Tensor, where: str) -> None:
        if name in ACTIVATION_FUNCTIONS:
            self.layouts[node] = self._input(node)
            self.computed.append(node)
        elif name in POOL_FUNCTIONS | KEEP_FUNCTIONS:
            self.layouts[node] = self._input(node)
        elif name in ELEMENTWISE:
            self.layouts[node] = self._broadcast(node, value, where)
            self.computed.append(node)
        elif name == "flatten":
            start, end = _bind(node, lambda x, start_dim=0, end_dim=-1: (start_dim, end_dim))
            self.layouts[node] = self._flatten(node, start, end)
        elif name in ("view", "reshape"):
            self.layouts[node] = self._reshape(node, value, where)
        elif name == "mean":
            dim, keep = _bind(node, lambda x, dim=None, keepdim=False: (dim, keepdim))
            self.layouts[node] = self._mean(node, dim, keep)
        elif name in ("cat", "concat"):
            self.layouts[node] = self._concatenate(node, *_bind(node, lambda tensors, dim=0: (tensors, dim)), where)
        else:
            raise UserError(f"the axes of {where} are not known: teach common/permutation.py its rule")

    def _broadcast(self, node: fx.Node, value: Tensor, where: str) -> list[Layout]:
        """Elementwise with two operands: dimensions of equal size are tied, those of size one follow the other."""
        result: list[Layout | str] = ["open"] * value.dim()
        for source in node.all_input_nodes:
            shape, layouts = self.env[source].shape, self.layouts[source]
            for back in range(1, len(shape) + 1):
                if shape[-back] == value.shape[-back] and (shape[-back] > 1 or layouts[-back]):
                    before = result[-back]
                    both = before != "open" and (before or layouts[-back])
                    result[-back] = self._join(before, layouts[-back], where) if both else layouts[-back]
        return [None if layout == "open" else layout for layout in result]

    def _flatten(self, node: fx.Node, start: int, end: int) -> list[Layout]:
        source = node.all_input_nodes[0]
        layouts, shape = self._input(node), self.env[source].shape
        start, end = start % len(shape), end % len(shape)
        first, rest = layouts[start], layouts[start + 1 : end + 1]
        if any(rest):
            for layout in [first, *rest]:
                self._pin(layout, f"{node.name} flattens it behind another dimension")
            first = None
        pixels = math.prod(shape[start + 1 : end + 1])
        merged = first and tuple(segment._replace(repeat=segment.repeat * pixels) for segment in first)
        return [*layouts[:start], merged, *layouts[end + 1 :]]

    def _reshape(self, node: fx.Node, value: Tensor, where: str) -> list[Layout]:
        shape = self.env[node.all_input_nodes[0]].shape
        if value.shape == shape:
            return self._input(node)
        if value.shape == (*shape[: value.dim() - 1], math.prod(shape[value.dim() - 1 :])):  # view(n, -1)
            return self._flatten(node, value.dim() - 1, -1)
        raise UserError(f"{where} reshapes {tuple(shape)} to {tuple(value.shape)}, whose axes are not known")

    def _mean(self, node: fx.Node, dim: Any, keep: bool) -> list[Layout]:
        layouts = self._input(node)
        reduced = {
            d % len(layouts) for d in (range(len(layouts)) if dim is None else [dim] if isinstance(dim, int) else dim)
        }
        return [None if d in reduced else layout for d, layout in enumerate(layouts) if keep or d not in reduced]

    def _concatenate(self, node: fx.Node, tensors: list[fx.Node], dim: int, where: str) -> list[Layout]:
        result = list(self.layouts[tensors[0]])
        dim %= len(result)
        parts: list[Segment] = []
        for source in tensors:
            layout = self.layouts[source][dim]
            if layout is None:  # fixed channels beside free ones: an axis of their own that is pinned
                layout = self._new(f"{source.name} in {node.name}", self.env[source].shape[dim])
                self._pin(layout, f"{where} joins channels of fixed order")
            parts += layout
        for other in range(len(result)):
            for source in tensors[1:]:
                if other != dim and (result[other] or self.layouts[source][other]):
                    result[other] = self._join(result[other], self.layouts[source][other], where)
        result[dim] = tuple(parts)
        return result


def _bind(node: fx.Node, signature: Callable) -> Any:
    """Read a call's arguments by name, however they were passed."""
    return signature(*node.args, **node.kwargs)
