"""One network on several GPUs: `torchrun --standalone --nproc-per-node 4 train_dense.py ...`.

torchrun starts one process (rank) per GPU. Each rank trains on its share of every batch; only rank
0 writes files and prints. Without torchrun the world size is 1 and this module changes nothing.
"""

import os
import sys
import time
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.errors import UserError

_torchrun = distributed.is_available() and distributed.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if _torchrun else 0
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if _torchrun else 1
ERROR_DELAY = 10  # seconds


def local_device(device: torch.device) -> torch.device:
    """This rank's own GPU, or `device` itself without torchrun or on a CPU.

    Raises UserError when there are too few GPUs, or `device` has an index.
    """
    if WORLD_SIZE == 1 or device.type != "cuda":
        return device
    local_world_size, count = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if device.index is not None or 0 < count < local_world_size:
        raise UserError(
            f"torchrun started {local_world_size} processes for {count} GPUs: start one "
            "process per GPU, without a number in --device"
        )
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def initialise(device: torch.device) -> None:
    """Initialise the process group: NCCL and gloo on GPUs, gloo on CPUs."""
    if WORLD_SIZE > 1 and not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def shut_down() -> None:
    """Destroy the process group once all ranks are done, and exit this process."""
    if WORLD_SIZE > 1 and distributed.is_initialized():
        barrier()
        distributed.destroy_process_group()
        sys.stdout.flush(), sys.stderr.flush()
        # A normal exit would abort while threads of gloo are still running.
        os._exit(0)


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap `model`, which is on `device`: the ranks train it as one process would.

    Gradients are averaged over the ranks, and BatchNorm uses statistics of the global batch.
    """
    if WORLD_SIZE == 1:
        return model
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:  # nn.SyncBatchNorm supports only GPUs
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.__class__ = _SyncBatchNorm
    return nn.parallel.DistributedDataParallel(model)


class _Gather(torch.autograd.Function):
    """All-gather of the ranks' batches; backward all-reduces and keeps this rank's gradients."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        batches = [torch.empty_like(images) for _ in range(WORLD_SIZE)]
        distributed.all_gather(batches, images)
        return torch.cat(batches)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        return gradient.chunk(WORLD_SIZE)[RANK]


class _SyncBatchNorm(_BatchNorm):
    """BatchNorm over the global batch, on CPUs."""

    def _check_input_dim(self, images: Tensor) -> None:
        """Accept any number of dimensions."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        output = super().forward(_Gather.apply(images.float().contiguous()))
        return output.chunk(WORLD_SIZE)[RANK].to(images.dtype)


def local_slice(batch_size: int) -> slice:
    """This rank's part of a global batch; raises UserError when the batch has no equal parts."""
    if batch_size % WORLD_SIZE:
        raise UserError(f"--batch-size {batch_size} cannot be divided among {WORLD_SIZE} processes")
    local = batch_size // WORLD_SIZE
    return slice(RANK * local, (RANK + 1) * local)


def let_rank_zero_print_first() -> None:
    """Delay an error message on other ranks: torchrun stops them when rank 0 has failed."""
    if RANK:
        time.sleep(ERROR_DELAY)


def all_gather(*values: Tensor | float) -> Tensor:
    """The values of all ranks as (world size, values) float64 on the CPU.

    Without a process group, the rows of the other ranks are 0.
    """
    rows = torch.zeros(WORLD_SIZE, len(values), dtype=torch.float64)
    rows[RANK] = torch.tensor([float(value) for value in values], dtype=torch.float64)
    if WORLD_SIZE > 1 and distributed.is_initialized():
        distributed.all_reduce(rows)
    return rows


def barrier() -> None:
    """Wait until all ranks have called this."""
    all_gather(0)
