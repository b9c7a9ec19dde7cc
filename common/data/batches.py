"""What all data sets share: the seed of an epoch, balanced choices of images, normalisation,
batches.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.runtime import distributed

Batches = Iterator[tuple[Tensor, Tensor]]  # of images and labels


def pixel_scale(description: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of pixel values; to be kept, because copying them over would
    stall every step.
    """
    mean, std = (
        torch.tensor(description[key], device=device).view(1, 3, 1, 1) for key in ("mean", "std")
    )
    return mean * 255, std * 255


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return images.to(torch.float32, memory_format=torch.channels_last).sub_(mean).div_(std)


def stage_seed(seed: int, stage: str) -> int:
    """The seed of order and augmentation in a stage: `dense`, `imp` or `sparse`.

    No stage repeats the batches of another, or LTH would see again those that made its mask.
    """
    number = ("dense", "imp", "sparse").index(stage)
    return derived_seed(seed, number) if number else seed


def derived_seed(*numbers: int) -> int:
    """A 64-bit generator seed that depends on all of `numbers`, and on nothing else."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def count_steps(images: int, batch_size: int) -> int:
    if images < batch_size:
        raise UserError(f"--batch-size {batch_size} is larger than the {images} training images")
    distributed.local_slice(batch_size)
    return images // batch_size


def balanced(labels: Tensor, limit: int) -> Tensor:
    """Indices of `limit` images, or all there are: equally many of every class (to one), mixed;
    always the same choice.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels[order]
    # Rank of every image within its class, in shuffled order: take all of rank 0, then of rank 1,
    # ...
    by_class = torch.argsort(shuffled, stable=True)
    counts = torch.bincount(shuffled)
    rank = torch.empty_like(order)
    rank[by_class] = torch.cat([torch.arange(int(count)) for count in counts])
    chosen = order[torch.argsort(rank * len(counts) + shuffled)[:limit]]
    return chosen[torch.randperm(len(chosen), generator=generator)]
