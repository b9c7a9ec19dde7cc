"""What all data sets share: seeds of epochs, balanced choices of images, normalisation, batches."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.runtime import distributed

Batches = Iterator[tuple[Tensor, Tensor]]  # of images and labels


def pixel_scale(description: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of pixel values, to be kept: copying them over would stall every step."""
    scale = torch.tensor([description["mean"], description["std"]], device=device)
    return tuple(255 * scale.view(2, 1, 3, 1, 1))


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return images.to(torch.float32, memory_format=torch.channels_last).sub_(mean).div_(std)


def stage_seed(seed: int, stage: str) -> int:
    """The seed of order and augmentation in a stage: `dense`, `imp` or `sparse`.

    No stage repeats the batches of another, or LTH would see again those that made its mask.
    """
    number = ("dense", "imp", "sparse").index(stage)
    return derived_seed(seed, number) if number else seed


def derived_seed(*numbers: int) -> int:
    """A 63-bit generator seed that depends on all of `numbers` but zeros at their end."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def count_steps(images: int, batch_size: int) -> int:
    """Batches an epoch, of all processes together; the last short one is dropped."""
    if images < batch_size:
        raise UserError(f"--batch-size {batch_size} is larger than the {images} training images")
    distributed.local_slice(batch_size)
    return images // batch_size


def balanced(labels: Tensor, limit: int) -> Tensor:
    """Indices of `limit` images, or all: equally many of a class (to one), mixed; always the same.

    Takes the first image of every class in a shuffled order, then the second of each, and so on.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels[order]
    counts = torch.bincount(shuffled)
    rank = torch.empty_like(order)  # of an image within its class
    rank[shuffled.argsort(stable=True)] = torch.cat([torch.arange(int(n)) for n in counts])
    chosen = order[torch.argsort(rank * len(counts) + shuffled)[:limit]]
    return chosen[torch.randperm(len(chosen), generator=generator)]
