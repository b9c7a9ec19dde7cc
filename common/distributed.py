"""One network on several GPUs: `torchrun --standalone --nproc-per-node 4 train_dense.py ...` starts a process for each.

All processes do the same with their share of every batch; the first alone writes files and prints. Without torchrun
there is one process, which has all of every batch, and nothing here does anything.
"""

import os

import torch
from torch import Tensor, distributed, nn

from common.errors import UserError

_launched = distributed.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if _launched else 0  # of this process
PROCESSES = int(os.environ["WORLD_SIZE"]) if _launched else 1


def join(device: torch.device) -> torch.device:
    """Meet the other processes; returns the device of this one. Raises UserError when there are more of them than GPUs."""
    if PROCESSES == 1:
        return device
    if device.type == "cuda":
        place, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if device.index is not None or place >= count:
            raise UserError(f"torchrun gives every process a GPU of its own: leave {device} out, and start at most {count} here")  # fmt: skip
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        distributed.init_process_group()
    return device


def leave() -> None:
    """Part from the other processes, when all are done."""
    if distributed.is_initialized():
        wait()
        distributed.destroy_process_group()


def spread(model: nn.Module, device: torch.device) -> nn.Module:
    """What trains `model`, which is on `device`, as one process would with the whole batch.

    Gradients are averaged over the processes, and on GPUs BatchNorm takes its statistics over all of them. On CPUs,
    for which torch has no such BatchNorm, they are each process's own.
    """
    if PROCESSES == 1:
        return model
    if device.type == "cuda":
        return nn.parallel.DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model), [device])
    return nn.parallel.DistributedDataParallel(model)


def share(batch_size: int) -> slice:
    """Where this process's part of a batch lies; raises UserError when a batch has no equal parts."""
    if batch_size % PROCESSES:
        raise UserError(f"--batch-size {batch_size} cannot be divided among {PROCESSES} processes")
    part = batch_size // PROCESSES
    return slice(RANK * part, (RANK + 1) * part)


def total(*values: Tensor | float) -> list[float]:
    """The sum of each value over all processes."""
    sums = torch.tensor([float(value) for value in values], dtype=torch.float64)
    if PROCESSES > 1:
        distributed.all_reduce(sums)
    return sums.tolist()


def wait() -> None:
    """Until every process is here."""
    if PROCESSES > 1 and distributed.is_initialized():
        total(0)
