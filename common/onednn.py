"""Convolutional networks on a CPU in oneDNN's own layout, where BatchNorm, ReLU and additions take half the time or less."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# What stays in the layout; all else is slow in it, as pooling, or does not know it.
SINGLE = {F.batch_norm, F.relu, torch.relu, Tensor.relu}
PAIR = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__}
ASKING = {Tensor.dim, Tensor.size} | {getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "is_mkldnn", "requires_grad")}  # fmt: skip


def suits(model: nn.Module) -> bool:
    """Whether the layout is there on this machine, in bf16, and has something to do in `model`."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    compiled = hasattr(model, "_orig_mod")  # such a network lays out its tensors itself
    return not compiled and any(isinstance(layer, nn.Conv2d) and layer.bias is None for layer in model.modules())


class Blocked(TorchFunctionMode):
    """Within it, and autocast to bf16, a network enters the layout at a convolution without bias and leaves it where it has to.

    The backward pass follows by itself.
    """

    def __torch_function__(self, function: Callable, types: Any, args: Sequence = (), kwargs: dict[str, Any] | None = None) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        if function is torch.conv2d and not kwargs and _enters(*args):
            return _convolve(*args)
        there = [isinstance(value, Tensor) and value.is_mkldnn for value in args]
        if any(there) and function not in ASKING and not (function in SINGLE or function in PAIR and all(there[:2])):
            args = [value.to_dense() if is_there else value for value, is_there in zip(args, there)]
        return function(*args, **kwargs)


def _enters(images: Tensor, weight: Tensor, bias: Tensor | None = None, *where: Any) -> bool:
    """Whether the layout takes a convolution: as nn.Conv2d calls it, and without bias, which autocast alone makes bf16."""
    known = images.dim() == 4 and images.dtype in (torch.float32, torch.bfloat16) and weight.dtype == torch.float32
    return known and bias is None and len(where) == 4 and all(isinstance(value, tuple) for value in where[:3])


def _convolve(images: Tensor, weight: Tensor, bias: None, stride: tuple, padding: tuple, dilation: tuple, groups: int) -> Tensor:  # fmt: skip
    if not images.is_mkldnn:
        images = images.to_mkldnn(torch.bfloat16)
    # Not conv2d, because autocast would make the weights bf16, which oneDNN takes as fp32 here.
    return torch.mkldnn_convolution(images, weight, bias, padding, stride, dilation, groups)
