"""One network on several GPUs: `torchrun --standalone --nproc-per-node 4 train_dense.py ...`.

It starts a process for each GPU. All do the same with their share of every batch; the first alone
writes files and prints. Without torchrun there is one process, which has all of every batch, and
nothing here does anything.
"""

import os
import sys
import time
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.errors import UserError

_launched = distributed.is_available() and distributed.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if _launched else 0  # of this process
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if _launched else 1
ERROR_DELAY = 10  # seconds


def local_device(device: torch.device) -> torch.device:
    """This process's own device of a kind; raises UserError when there are too few GPUs."""
    if WORLD_SIZE == 1 or device.type != "cuda":
        return device
    here, count = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if device.index is not None or 0 < count < here:
        raise UserError(
            f"torchrun started {here} processes, each for a GPU of its own, and {count} GPUs are "
            "here: start as many, without a number in --device"
        )
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def initialise(device: torch.device) -> None:
    """Meet the other processes, each on its own device."""
    if WORLD_SIZE > 1 and not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def shut_down() -> None:
    """Part from the other processes when all are done, and end this one."""
    if WORLD_SIZE > 1 and distributed.is_initialized():
        barrier()
        distributed.destroy_process_group()
        sys.stdout.flush(), sys.stderr.flush()
        # gloo's threads may live on, and would abort an interpreter that ends under them.
        os._exit(0)


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """What trains `model`, which is on `device`, as one process would with the whole batch.

    Gradients are averaged over the processes, and BatchNorm takes its statistics over all of them.
    """
    if WORLD_SIZE == 1:
        return model
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:  # torch has that for GPUs only
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.__class__ = _SyncBatchNorm
    return nn.parallel.DistributedDataParallel(model)


class _Gather(torch.autograd.Function):
    """The batches of all processes, in their order; of the gradients each gets that of its part."""

    @staticmethod
    def forward(context: Any, images: Tensor) -> Tensor:
        parts = [torch.empty_like(images) for _ in range(WORLD_SIZE)]
        distributed.all_gather(parts, images)
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        return gradient.chunk(WORLD_SIZE)[RANK]


class _SyncBatchNorm(_BatchNorm):
    """BatchNorm over the batch of all processes, on CPUs."""

    def _check_input_dim(self, images: Tensor) -> None:
        """Images of any dimensions."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        whole = super().forward(_Gather.apply(images.float().contiguous()))
        return whole.chunk(WORLD_SIZE)[RANK].to(images.dtype)


def local_slice(batch_size: int) -> slice:
    """Where this process's part of a batch lies; raises UserError when it has no equal parts."""
    if batch_size % WORLD_SIZE:
        raise UserError(f"--batch-size {batch_size} cannot be divided among {WORLD_SIZE} processes")
    part = batch_size // WORLD_SIZE
    return slice(RANK * part, (RANK + 1) * part)


def let_rank_zero_speak() -> None:
    """Before an error is told: the first process tells most, and torchrun then ends the others."""
    if RANK:
        time.sleep(ERROR_DELAY)


def gathered(*values: Tensor | float) -> Tensor:
    """The values of all processes that have joined, a row each, in float64 on the CPU."""
    rows = torch.zeros(WORLD_SIZE, len(values), dtype=torch.float64)
    rows[RANK] = torch.tensor([float(value) for value in values], dtype=torch.float64)
    if WORLD_SIZE > 1 and distributed.is_initialized():
        distributed.all_reduce(rows)
    return rows


def barrier() -> None:
    """Until every process is here."""
    gathered(0)
