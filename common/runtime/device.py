"""The device and the precision of training and evaluation."""

import contextlib
import ctypes
import os
from collections.abc import Iterator

import torch
from torch import nn

from common.errors import UserError
from common.runtime import distributed, onednn


def pick_device(name: str | None) -> torch.device:
    """The named device, by default CUDA if available; under torchrun each rank gets its own GPU.

    Raises UserError when the device is not available.
    """
    # Parallel runs would share the default 8 hardware queues of the GPU.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = distributed.local_device(torch.device(name))
        torch.zeros(1, device=device).cpu()
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # for calls without a device argument
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"device {name!r} is not available here ({reason}): try --device cpu"
        ) from error
    torch.backends.cudnn.deterministic = True  # bit-equal reruns
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, in all threads
    # Needed in NVIDIA's containers, which set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE.
    torch.set_float32_matmul_precision("highest")
    if device.type == "cpu":
        keep_freed_memory()
    distributed.initialise(device)
    return device


def keep_freed_memory() -> None:
    """Make glibc keep freed memory in the process for reuse; do nothing with another libc.

    Page faults on newly mapped activations cost nearly half of a forward pass on a CPU.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # from <malloc.h>
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)


def pick_precision(name: str | None, device: torch.device) -> str:
    """The named precision, by default bf16 on hardware with fast bf16 and else fp32."""
    if name is not None:
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        fast = False
    return "bf16" if fast else "fp32"


def in_onednn_layout(model: nn.Module, device: torch.device, precision: str) -> bool:
    """Whether `model` computes in oneDNN's blocked layout (common/runtime/onednn.py)."""
    return device.type == "cpu" and precision == "bf16" and onednn.is_suited(model)


@contextlib.contextmanager
def autocast(model: nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """Run forward passes of `model` in this context: bf16 autocast, and oneDNN's layout if used."""
    onednn_layout = in_onednn_layout(model, device, precision)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        with onednn.BlockedLayout() if onednn_layout else contextlib.nullcontext():
            yield
