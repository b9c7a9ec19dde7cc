"""Small images: a whole data set as uint8 tensors on the device."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.data.batches import Batches, balanced, count_steps, derived_seed, normalise, pixel_scale
from common.errors import UserError
from common.runtime import distributed

NO_FLIP = ("glyphs", "svhn")  # a mirrored digit is another sign
EVAL_BATCH = {"cpu": 500, "cuda": 2500}  # a GPU waits for launches where a batch is small

Draw = tuple[
    Tensor, ...
]  # of an epoch: the order of the images; the crop, y and x, and whether mirrored, of each


@dataclass(frozen=True)
class Resident:
    """A small-image set as uint8 tensors on the device; augmentation is a few tensor operations
    there.
    """

    train: Tensor  # (N, 3, S + 2 pad, S + 2 pad) uint8, padded with black for the random crop
    train_labels: Tensor
    test: Tensor  # (M, 3, S, S) uint8
    test_labels: Tensor
    pad: int
    flip: bool
    description: dict[str, Any]

    def __post_init__(self) -> None:
        self._scale  # now: networks side by side on a GPU would not wait for the one that makes it

    @property
    def device(self) -> torch.device:
        return self.train.device

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return tuple(self.test.shape[1:])

    def steps(self, batch_size: int) -> int:
        """Batches an epoch; the last short one is dropped."""
        return count_steps(len(self.train), batch_size)

    def train_batches(self, batch_size: int, seed: int, epoch: int) -> Batches:
        """Shuffled, cropped, flipped and normalised batches (images fp32 channels-last, labels)."""
        draw, part = self.draw(seed, epoch), distributed.local_slice(batch_size)
        for start in range(0, self.steps(batch_size) * batch_size, batch_size):
            yield self.batch(draw, slice(start + part.start, start + part.stop))

    def draw(self, seed: int, epoch: int) -> Draw:
        """The order and augmentation of an epoch, drawn on the CPU, so that every device sees the
        same.
        """
        generator, count = torch.Generator().manual_seed(derived_seed(seed, epoch)), len(self.train)
        order = torch.randperm(count, generator=generator)
        y, x = torch.randint(2 * self.pad + 1, (2, count), generator=generator)
        mirror = torch.rand(count, generator=generator) < (0.5 if self.flip else 0)
        return tuple(part.to(self.device) for part in (order, y, x, mirror))

    def batch(self, draw: Draw, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """The images at positions `rows` of an epoch, cropped, mirrored and normalised, and their
        labels.
        """
        order, y, x, mirror = draw
        chosen, size = order[rows], self.input_shape[-1]
        windows = self.train.unfold(2, size, 1).unfold(
            3, size, 1
        )  # a view: every crop of every image
        images = windows[chosen, :, y[chosen], x[chosen]]
        if self.flip:
            images = torch.where(mirror[chosen, None, None, None], images.flip(3), images)
        return self._normalise(images), self.train_labels[chosen]

    def eval_batches(
        self, split: str = "test", batch_size: int | None = None, limit: int | None = None
    ) -> Batches:
        """All images of `split` in order, or a balanced choice of `limit` with the classes mixed,
        not augmented, normalised.
        """
        batch_size = batch_size or EVAL_BATCH.get(self.device.type, 500)
        images, labels = (
            (self.test, self.test_labels) if split == "test" else (self.train, self.train_labels)
        )
        if split == "train" and self.pad:
            images = images[:, :, self.pad : -self.pad, self.pad : -self.pad]
        if limit is not None:
            chosen = balanced(labels.cpu(), limit).to(self.device)
            images, labels = images[chosen], labels[chosen]
        for start in range(
            distributed.RANK * batch_size, len(labels), distributed.WORLD_SIZE * batch_size
        ):
            yield (
                self._normalise(images[start : start + batch_size]),
                labels[start : start + batch_size],
            )

    def _normalise(self, images: Tensor) -> Tensor:
        return normalise(images, *self._scale)

    @functools.cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        return pixel_scale(self.description, self.device)


def make_resident(
    name: str,
    data_dir: str | None,
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    class_names: list[str],
    checksum: str | None,
    limit: int | None,
    device: torch.device,
    expected: dict[str, Any] | None,
) -> Resident:
    if expected:
        mean, std = expected["mean"], expected["std"]
    else:
        moments = (
            torch.stack(
                [
                    torch.stack([t.double().mean(), (t.double() ** 2).mean()])
                    for t in train.transpose(0, 1)
                ]
            )
            / 255
        )
        mean = moments[:, 0].tolist()
        std = (moments[:, 1] / 255 - moments[:, 0] ** 2).sqrt().clamp_min(1e-3).tolist()
    description = {
        "name": name,
        "data_dir": data_dir,
        "image_size": test.shape[-1],
        "limit_train": limit,
        "classes": len(class_names),
        "class_names": class_names,
        "mean": mean,
        "std": std,
        "checksum": checksum,
    }
    if limit is not None:
        if limit > len(train):
            raise UserError(
                f"--limit-train {limit} is more than the {len(train)} training images of {name}"
            )
        chosen = balanced(train_labels, limit).sort().values
        train, train_labels = train[chosen], train_labels[chosen]
    pad = test.shape[-1] // 8  # 4 px at 32 px, as in the paper
    train = F.pad(train, (pad, pad, pad, pad))
    tensors = [tensor.to(device) for tensor in (train, train_labels, test, test_labels)]
    return Resident(*tensors, pad, name not in NO_FLIP, description)
