"""Shared by all data sets: epoch seeds, class-balanced subsets, normalisation, batch counts."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.runtime import distributed

Batches = Iterator[tuple[Tensor, Tensor]]  # (images, labels)


def pixel_mean_std(description: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of pixel values in 0..255, each (1, 3, 1, 1), on `device`.

    Callers keep them: copying them to the device in every step would synchronise with the host.
    """
    moments = torch.tensor([description["mean"], description["std"]], device=device)
    return tuple(255 * moments.view(2, 1, 3, 1, 1))


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 images as fp32 in channels-last format, minus `mean`, divided by `std`."""
    return images.to(torch.float32, memory_format=torch.channels_last).sub_(mean).div_(std)


def stage_seed(seed: int, stage: str) -> int:
    """The seed of data order and augmentation in a stage: `dense`, `imp` or `sparse`.

    Stages draw different batches; otherwise LTH would train on those that produced its mask.
    """
    number = ("dense", "imp", "sparse").index(stage)
    return derived_seed(seed, number) if number else seed


def derived_seed(*numbers: int) -> int:
    """A 63-bit generator seed from `numbers`; trailing zeros do not change it."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def count_steps(images: int, batch_size: int) -> int:
    """Steps per epoch with a global `batch_size`; drops the last short batch.

    Raises UserError when there is no full batch or the ranks cannot share it equally.
    """
    if images < batch_size:
        raise UserError(f"--batch-size {batch_size} is larger than the {images} training images")
    distributed.local_slice(batch_size)
    return images // batch_size


def balanced_indices(labels: Tensor, limit: int) -> Tensor:
    """Shuffled indices of at most `limit` images, balanced over classes to one image; fixed seed.

    Takes the first image of every class in a shuffled order, then the second of each, and so on.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels[order]
    counts = torch.bincount(shuffled)
    within_class = torch.empty_like(order)  # index of each image in its class
    within_class[shuffled.argsort(stable=True)] = torch.cat([torch.arange(int(n)) for n in counts])
    chosen = order[torch.argsort(within_class * len(counts) + shuffled)[:limit]]
    return chosen[torch.randperm(len(chosen), generator=generator)]
