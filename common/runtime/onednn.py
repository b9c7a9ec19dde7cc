"""oneDNN's blocked layout for CNNs on a CPU: halves the time of all but the convolutions."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from common.errors import UserError

# Functions that keep the layout. All others do not support it, or are slow in it, like pooling.
UNARY = {F.relu, torch.relu, Tensor.relu, Tensor.register_hook, Tensor.retain_grad}
ADDITION = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__}
QUERIES = {Tensor.dim, Tensor.size} | {
    getattr(Tensor, name).__get__
    for name in ("shape", "ndim", "dtype", "device", "is_mkldnn", "requires_grad")
}

SUITED = ("ResNet20",)  # class names: ResNet20 is 1.15 times as fast, ResNet50 is no faster


def is_suited(model: nn.Module) -> bool:
    """Whether `model` is faster in the layout and this machine supports it."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return type(model).__name__ in SUITED  # torch.compile chooses its own layouts


class BlockedLayout(TorchFunctionMode):
    """Make convolutions without bias return tensors in the layout, under autocast to bf16.

    Functions without support for the layout get dense tensors. Autograd handles the backward pass.
    Raises UserError for in-place operations on tensors in the layout.
    """

    def __torch_function__(
        self,
        function: Callable,
        types: Any,
        args: Sequence = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.conv2d and not kwargs and _can_convolve(*args):
            return _convolve(*args)
        add = function in ADDITION and _can_add(*args)
        normalise = function is F.batch_norm and _can_normalise(**kwargs)
        if function in UNARY | QUERIES or add or normalise:
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        in_place = name == "__setitem__" or name.endswith("_") and not name.endswith("__")
        if in_place and args and _has_layout(args[0]):
            raise UserError(
                f"{name} changes a tensor in oneDNN's layout in place: use an out-of-place "
                "operation, or remove the network from SUITED in common/runtime/onednn.py"
            )
        kwargs = {key: _to_dense(value) for key, value in kwargs.items()}
        return function(*_to_dense(args), **kwargs)


def _has_layout(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_mkldnn


def _can_add(left: Any, right: Any = None, *_: Any) -> bool:
    """Whether oneDNN can add two values; it does not broadcast."""
    return _has_layout(left) and _has_layout(right) and left.shape == right.shape


def _can_normalise(weight: Any = None, bias: Any = None, training: bool = False, **_: Any) -> bool:
    """Whether oneDNN can do a BatchNorm: only an affine one, and in evaluation mode no backward."""
    return weight is not None and bias is not None and (training or not torch.is_grad_enabled())


def _to_dense(value: Any) -> Any:
    if type(value) in (list, tuple):  # e.g. the argument of torch.cat
        return type(value)(_to_dense(item) for item in value)
    return value.to_dense() if _has_layout(value) else value


def _can_convolve(
    images: Tensor, weight: Tensor, bias: Tensor | None = None, *geometry: Any
) -> bool:
    """Whether a conv2d can use the layout: called by nn.Conv2d, under autocast, without bias."""
    from_nn = len(geometry) == 4 and all(isinstance(value, tuple) for value in geometry[:3])
    supported = bias is None and images.dim() == 4 and weight.dtype == torch.float32
    floats = images.dtype in (torch.float32, torch.bfloat16)
    return from_nn and supported and floats and torch.is_autocast_enabled("cpu")


def _convolve(
    images: Tensor, weight: Tensor, _: None, stride: tuple, padding: tuple, *rest: Any
) -> Tensor:
    if not images.is_mkldnn:
        images = images.to_mkldnn(torch.bfloat16)
    # Not conv2d: autocast would cast the weights to bf16, but oneDNN wants fp32 weights here.
    return torch.mkldnn_convolution(images, weight, None, padding, stride, *rest)
