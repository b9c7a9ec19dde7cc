"""Small-image data sets, resident on the device as uint8 tensors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.data.batches import (
    Batches,
    balanced_indices,
    count_steps,
    derived_seed,
    normalise,
    pixel_mean_std,
)
from common.errors import UserError
from common.runtime import distributed

NO_FLIP = ("glyphs", "svhn")  # a flipped digit is a different symbol
EVAL_BATCH = {"cpu": 500, "cuda": 1000}  # 5 GiB of activations for ResNet20 x16 in fp32

# (order of the images, crop y, crop x, whether flipped) of an epoch, each (N,).
EpochPlan = tuple[Tensor, ...]


@dataclass
class Resident:
    """A small-image data set on the device, augmented there by a few tensor operations."""

    train: Tensor  # (N, 3, S + 2 pad, S + 2 pad) uint8, zero-padded for the random crop
    train_labels: Tensor
    test: Tensor  # (M, 3, S, S) uint8
    test_labels: Tensor
    pad: int
    flip: bool
    description: dict[str, Any]

    def __post_init__(self) -> None:
        self._mean_std = pixel_mean_std(self.description, self.device)

    @property
    def device(self) -> torch.device:
        return self.train.device

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return tuple(self.test.shape[1:])

    def steps(self, batch_size: int) -> int:
        return count_steps(len(self.train), batch_size)

    def train_batches(self, batch_size: int, seed: int, epoch: int, first_step: int = 0) -> Batches:
        """This rank's shuffled, augmented batches: (images fp32 channels-last, labels)."""
        plan, local = self.plan_epoch(seed, epoch), distributed.local_slice(batch_size)
        for step in range(first_step, self.steps(batch_size)):
            start = step * batch_size
            yield self.batch(plan, slice(start + local.start, start + local.stop))

    def plan_epoch(self, seed: int, epoch: int) -> EpochPlan:
        """Sample the order and augmentation of an epoch on the CPU: the same on every device."""
        generator, count = torch.Generator().manual_seed(derived_seed(seed, epoch)), len(self.train)
        order = torch.randperm(count, generator=generator)
        y, x = torch.randint(2 * self.pad + 1, (2, count), generator=generator)
        flipped = torch.rand(count, generator=generator) < (0.5 if self.flip else 0)
        return tuple(values.to(self.device) for values in (order, y, x, flipped))

    def batch(self, plan: EpochPlan, positions: slice | Tensor) -> tuple[Tensor, Tensor]:
        """The augmented, normalised images at `positions` of an epoch, and their labels."""
        order, y, x, flipped = plan
        indices, size = order[positions], self.input_shape[-1]
        # Every crop of every image, as a view.
        windows = self.train.unfold(2, size, 1).unfold(3, size, 1)
        images = windows[indices, :, y[indices], x[indices]]
        if self.flip:
            images = torch.where(flipped[indices, None, None, None], images.flip(3), images)
        return normalise(images, *self._mean_std), self.train_labels[indices]

    def eval_batches(
        self, split: str = "test", batch_size: int | None = None, limit: int | None = None
    ) -> Batches:
        """This rank's batches of `split`, or of `limit` class-balanced images, not augmented."""
        batch_size = batch_size or EVAL_BATCH.get(self.device.type, 500)
        images, labels = self.test, self.test_labels
        if split == "train":
            size = self.input_shape[-1]
            unpadded = slice(self.pad, self.pad + size)
            images, labels = self.train[:, :, unpadded, unpadded], self.train_labels
        if limit is not None:
            indices = balanced_indices(labels.cpu(), limit).to(self.device)
            images, labels = images[indices], labels[indices]
        batches = list(zip(images.split(batch_size), labels.split(batch_size)))
        for images, labels in batches[distributed.RANK :: distributed.WORLD_SIZE]:
            yield normalise(images, *self._mean_std), labels


def make_resident(
    spec: dict[str, Any],
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    class_names: list[str],
    checksum: str | None,
    device: torch.device,
) -> Resident:
    """Build the data set described by `spec`, normalised by its `mean` and `std` if it has them.

    Otherwise by those of `train`. Raises UserError when `limit_train` exceeds the training images.
    """
    name, limit = spec["name"], spec.get("limit_train")
    if limit is not None and limit > len(train):
        raise UserError(f"--limit-train {limit} is more than the {len(train)} images of {name}")
    statistics = spec if "mean" in spec else pixel_statistics(train)
    description = {
        "name": name,
        "data_dir": spec.get("data_dir"),
        "image_size": test.shape[-1],
        "limit_train": limit,
        "images": {"train": len(train) if limit is None else limit, "test": len(test)},
        "classes": len(class_names),
        "class_names": class_names,
        "mean": statistics["mean"],
        "std": statistics["std"],
        "checksum": checksum,
    }
    if limit is not None:
        indices = balanced_indices(train_labels, limit).sort().values
        train, train_labels = train[indices], train_labels[indices]
    pad = test.shape[-1] // 8  # 4 px at 32 px, as in the paper
    train = F.pad(train, (pad, pad, pad, pad))
    tensors = [tensor.to(device) for tensor in (train, train_labels, test, test_labels)]
    return Resident(*tensors, pad, name not in NO_FLIP, description)


def pixel_statistics(images: Tensor) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel of uint8 images (N, C, H, W), in [0, 1]."""
    channels = (channel.double() for channel in images.transpose(0, 1))
    moments = [torch.stack([pixels.mean(), (pixels**2).mean()]) for pixels in channels]
    mean, square = torch.stack(moments, 1) / 255
    std = (square / 255 - mean**2).sqrt().clamp_min(1e-3)
    return {"mean": mean.tolist(), "std": std.tolist()}
