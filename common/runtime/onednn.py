"""Convolutional networks on a CPU in oneDNN's layout: half the time for all but convolutions."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from common.errors import UserError

# What stays in the layout; all else is slow in it, as pooling, or does not know it.
SINGLE = {F.relu, torch.relu, Tensor.relu, Tensor.register_hook, Tensor.retain_grad}
PAIR = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__}
ASKING = {Tensor.dim, Tensor.size} | {
    getattr(Tensor, name).__get__
    for name in ("shape", "ndim", "dtype", "device", "is_mkldnn", "requires_grad")
}

SUITED = ("ResNet20",)  # classes of networks: ResNet20 is 1.15 times as fast, ResNet50 is not


def suits(model: nn.Module) -> bool:
    """Whether `model` gains by the layout and this machine has it."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return type(model).__name__ in SUITED  # compiled networks lay out their tensors themselves


class Blocked(TorchFunctionMode):
    """Within it and autocast to bf16, convolutions without bias enter the layout.

    What does not know the layout leaves it. The backward pass follows by itself. Raises UserError
    for what would have to change a tensor of the layout in place.
    """

    def __torch_function__(
        self,
        function: Callable,
        types: Any,
        args: Sequence = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.conv2d and not kwargs and _enters(*args):
            return _convolve(*args)
        pair = function in PAIR and _alike(*args)
        norm = function is F.batch_norm and _learns(**kwargs)
        if function in SINGLE | ASKING or pair or norm:
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        in_place = name == "__setitem__" or name.endswith("_") and not name.endswith("__")
        if in_place and args and _is_blocked(args[0]):
            raise UserError(
                f"{name} changes in place what oneDNN's layout holds: write it out of place, or "
                "take the network out of SUITED in common/runtime/onednn.py"
            )
        return function(*_plain(args), **{key: _plain(value) for key, value in kwargs.items()})


def _is_blocked(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_mkldnn


def _alike(first: Any, second: Any = None, *_: Any) -> bool:
    """Whether oneDNN can add two values: it does not broadcast."""
    return _is_blocked(first) and _is_blocked(second) and first.shape == second.shape


def _learns(weight: Any = None, bias: Any = None, training: bool = False, **_: Any) -> bool:
    """Whether oneDNN can do a BatchNorm: with scale and shift, and no fixed statistics backward."""
    return weight is not None and bias is not None and (training or not torch.is_grad_enabled())


def _plain(value: Any) -> Any:
    if type(value) in (list, tuple):  # as torch.cat takes
        return type(value)(_plain(each) for each in value)
    return value.to_dense() if _is_blocked(value) else value


def _enters(images: Tensor, weight: Tensor, bias: Tensor | None = None, *where: Any) -> bool:
    """Whether the layout takes a convolution: as nn.Conv2d calls it, under autocast, no bias."""
    from_nn = len(where) == 4 and all(isinstance(value, tuple) for value in where[:3])
    plain = bias is None and images.dim() == 4 and weight.dtype == torch.float32
    floats = images.dtype in (torch.float32, torch.bfloat16)
    return from_nn and plain and floats and torch.is_autocast_enabled("cpu")


def _convolve(
    images: Tensor, weight: Tensor, _: None, stride: tuple, padding: tuple, *rest: Any
) -> Tensor:
    if not images.is_mkldnn:
        images = images.to_mkldnn(torch.bfloat16)
    # Not conv2d, because autocast would make the weights bf16, which oneDNN takes as fp32 here.
    return torch.mkldnn_convolution(images, weight, None, padding, stride, *rest)
