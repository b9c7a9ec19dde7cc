"""ImageNet, streamed from its files."""

import functools
import os
from pathlib import Path
from typing import Any

import torch

from common.data.batches import Batches, balanced, count_steps, derived_seed, normalise, pixel_scale
from common.data.folder import folder_splits, opened
from common.errors import UserError
from common.runtime import distributed
from common.runtime.seeding import seeded

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Streamed:
    """ImageNet read from class folders by DataLoader workers, with torchvision's transforms
    (paper's augmentation).
    """

    input_shape = (3, 224, 224)

    def __init__(self, folder: Path, device: torch.device, workers: int):
        from common.vision import (
            torchvision,
            v2,
        )  # here, because it takes seconds that small images need not pay

        train, test, classes = folder_splits(
            folder, ("val", "test")
        )  # ImageNet's own test/ has no labels
        read = functools.partial(torchvision.datasets.ImageFolder, loader=_read_picture)
        # As uint8, a quarter of what the workers would have to hand over; the device does the rest.
        try:
            self.augmented = read(
                train,
                v2.Compose(
                    [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.PILToTensor()]
                ),
            )
            plain = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
            self.plain = {"train": read(train, plain), "test": read(test, plain)}
        except FileNotFoundError as error:
            raise UserError(str(error).splitlines()[0]) from error
        if odd := set(self.augmented.classes + self.plain["test"].classes) - set(classes):
            raise UserError(
                f"{folder} has folders that are no class: remove {', '.join(sorted(odd))}"
            )
        self.device, self.workers = device, min(workers, os.cpu_count() or 1)
        self.description = {
            "name": "imagenet",
            "data_dir": str(folder),
            "image_size": 224,
            "limit_train": None,
            "classes": len(classes),
            "class_names": classes,
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "checksum": None,
        }
        self._scale = pixel_scale(self.description, device)

    def steps(self, batch_size: int) -> int:
        return count_steps(len(self.augmented), batch_size)

    def train_batches(self, batch_size: int, seed: int, epoch: int) -> Batches:
        generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
        order = torch.randperm(len(self.augmented), generator=generator).tolist()
        items, part = (
            _Seeded(self.augmented, order, seed, epoch),
            distributed.local_slice(batch_size),
        )
        starts = range(0, self.steps(batch_size) * batch_size, batch_size)
        mine = [start + place for start in starts for place in range(part.start, part.stop)]
        yield from self._load(torch.utils.data.Subset(items, mine), part.stop - part.start)

    def eval_batches(
        self, split: str = "test", batch_size: int = 250, limit: int | None = None
    ) -> Batches:
        images = self.plain[split]
        if limit is not None:
            images = torch.utils.data.Subset(
                images, balanced(torch.tensor(images.targets), limit).tolist()
            )
        mine = range(distributed.RANK, len(images), distributed.WORLD_SIZE)
        yield from self._load(torch.utils.data.Subset(images, mine), batch_size)

    def _load(self, items: Any, batch_size: int) -> Batches:
        loader = torch.utils.data.DataLoader(
            items,
            batch_size,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # other threads may draw from the global one
        )
        try:
            for images, labels in loader:
                images = images.to(self.device, non_blocking=True)
                yield normalise(images, *self._scale), labels.to(self.device, non_blocking=True)
        except UserError as error:  # of a worker: its last line is the message, after a traceback
            raise UserError(
                str(error).strip().splitlines()[-1].rpartition("UserError: ")[2]
            ) from None


def _read_picture(path: str) -> Any:
    with opened(path) as image:
        return image.convert("RGB")


class _Seeded(torch.utils.data.Dataset):
    """Items in a given order, each augmented from its own seed, so that the number of workers
    changes nothing.
    """

    def __init__(self, items: Any, order: list[int], seed: int, epoch: int):
        self.items, self.order, self.seed, self.epoch = items, order, seed, epoch

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> Any:
        with seeded(derived_seed(self.seed, self.epoch, position + 1)):
            return self.items[self.order[position]]
