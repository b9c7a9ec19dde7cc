"""Small images: a whole data set as uint8 tensors on the device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.data.batches import Batches, balanced, count_steps, derived_seed, normalise, pixel_scale
from common.errors import UserError
from common.runtime import distributed

NO_FLIP = ("glyphs", "svhn")  # a mirrored digit is another sign
EVAL_BATCH = {"cpu": 500, "cuda": 1000}  # 5 GiB of activations for ResNet20 x16 in fp32

# Of an epoch: the order of the images; the crop, y and x, and whether mirrored, of each.
Draw = tuple[Tensor, ...]


@dataclass
class Resident:
    """Small images as uint8 tensors on the device, augmented by a few tensor operations there."""

    train: Tensor  # (N, 3, S + 2 pad, S + 2 pad) uint8, padded with black for the random crop
    train_labels: Tensor
    test: Tensor  # (M, 3, S, S) uint8
    test_labels: Tensor
    pad: int
    flip: bool
    description: dict[str, Any]

    def __post_init__(self) -> None:
        self._scale = pixel_scale(self.description, self.device)

    @property
    def device(self) -> torch.device:
        return self.train.device

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return tuple(self.test.shape[1:])

    def steps(self, batch_size: int) -> int:
        return count_steps(len(self.train), batch_size)

    def train_batches(self, batch_size: int, seed: int, epoch: int, first_step: int = 0) -> Batches:
        """Shuffled, cropped, flipped and normalised batches (images fp32 channels-last, labels)."""
        draw, part = self.draw(seed, epoch), distributed.local_slice(batch_size)
        for step in range(first_step, self.steps(batch_size)):
            start = step * batch_size
            yield self.batch(draw, slice(start + part.start, start + part.stop))

    def draw(self, seed: int, epoch: int) -> Draw:
        """The order and augmentation of an epoch, drawn on the CPU: the same on every device."""
        generator, count = torch.Generator().manual_seed(derived_seed(seed, epoch)), len(self.train)
        order = torch.randperm(count, generator=generator)
        y, x = torch.randint(2 * self.pad + 1, (2, count), generator=generator)
        mirror = torch.rand(count, generator=generator) < (0.5 if self.flip else 0)
        return tuple(part.to(self.device) for part in (order, y, x, mirror))

    def batch(self, draw: Draw, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """The images at positions `rows` of an epoch, augmented and normalised; their labels."""
        order, y, x, mirror = draw
        chosen, size = order[rows], self.input_shape[-1]
        # A view: every crop of every image.
        windows = self.train.unfold(2, size, 1).unfold(3, size, 1)
        images = windows[chosen, :, y[chosen], x[chosen]]
        if self.flip:
            images = torch.where(mirror[chosen, None, None, None], images.flip(3), images)
        return normalise(images, *self._scale), self.train_labels[chosen]

    def eval_batches(
        self, split: str = "test", batch_size: int | None = None, limit: int | None = None
    ) -> Batches:
        """The images of `split`, not augmented, in order; or `limit` of all classes, mixed."""
        batch_size = batch_size or EVAL_BATCH.get(self.device.type, 500)
        images, labels = self.test, self.test_labels
        if split == "train":
            size = self.input_shape[-1]
            inside = slice(self.pad, self.pad + size)
            images, labels = self.train[:, :, inside, inside], self.train_labels
        if limit is not None:
            chosen = balanced(labels.cpu(), limit).to(self.device)
            images, labels = images[chosen], labels[chosen]
        batches = list(zip(images.split(batch_size), labels.split(batch_size)))
        for some, their_labels in batches[distributed.RANK :: distributed.WORLD_SIZE]:
            yield normalise(some, *self._scale), their_labels


def make_resident(
    wanted: dict[str, Any],
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    class_names: list[str],
    checksum: str | None,
    device: torch.device,
) -> Resident:
    """The data set of a description, normalised by its moments or, where it has none, by its own.

    Raises UserError when there are fewer images than its `limit_train`.
    """
    name, limit = wanted["name"], wanted.get("limit_train")
    if limit is not None and limit > len(train):
        raise UserError(f"--limit-train {limit} is more than the {len(train)} images of {name}")
    moments = wanted if "mean" in wanted else pixel_moments(train)
    description = {
        "name": name,
        "data_dir": wanted.get("data_dir"),
        "image_size": test.shape[-1],
        "limit_train": limit,
        "images": {"train": len(train) if limit is None else limit, "test": len(test)},
        "classes": len(class_names),
        "class_names": class_names,
        "mean": moments["mean"],
        "std": moments["std"],
        "checksum": checksum,
    }
    if limit is not None:
        chosen = balanced(train_labels, limit).sort().values
        train, train_labels = train[chosen], train_labels[chosen]
    pad = test.shape[-1] // 8  # 4 px at 32 px, as in the paper
    train = F.pad(train, (pad, pad, pad, pad))
    tensors = [tensor.to(device) for tensor in (train, train_labels, test, test_labels)]
    return Resident(*tensors, pad, name not in NO_FLIP, description)


def pixel_moments(images: Tensor) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel of uint8 images (N, C, H, W), in [0, 1]."""
    channels = (channel.double() for channel in images.transpose(0, 1))
    moments = [torch.stack([pixels.mean(), (pixels**2).mean()]) for pixels in channels]
    mean, square = torch.stack(moments, 1) / 255
    std = (square / 255 - mean**2).sqrt().clamp_min(1e-3)
    return {"mean": mean.tolist(), "std": std.tolist()}
