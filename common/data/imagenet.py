"""ImageNet, streamed from its files."""

import copy
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from common.data.batches import Batches, balanced, count_steps, derived_seed, normalise, pixel_scale
from common.data.folder import image_folders
from common.errors import UserError
from common.runtime import distributed
from common.runtime.seeding import seeded

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Streamed:
    """ImageNet read by DataLoader workers, with torchvision's transforms (the paper's)."""

    input_shape = (3, 224, 224)

    def __init__(self, folder: Path, device: torch.device, workers: int):
        from common.vision import v2

        # First val/, because ImageNet's own test/ has no labels.
        self.augmented, test = image_folders(folder, ("val", "test"))
        self.plain = {"train": copy.copy(self.augmented), "test": test}
        # As uint8, a quarter of what the workers would have to hand over; the device does the rest.
        crop = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.PILToTensor()]
        self.augmented.transform = v2.Compose(crop)
        for images in self.plain.values():
            images.transform = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
        self.device, self.workers = device, min(workers, os.cpu_count() or 1)
        self.description = {
            "name": "imagenet",
            "data_dir": str(folder),
            "image_size": 224,
            "limit_train": None,
            "images": {"train": len(self.augmented), "test": len(test)},
            "classes": len(test.classes),
            "class_names": test.classes,
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "checksum": None,
        }
        self._scale = pixel_scale(self.description, device)

    def steps(self, batch_size: int) -> int:
        return count_steps(len(self.augmented), batch_size)

    def train_batches(self, batch_size: int, seed: int, epoch: int, first_step: int = 0) -> Batches:
        """Shuffled, cropped, flipped and normalised batches (images fp32 channels-last, labels)."""
        generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
        order = torch.randperm(len(self.augmented), generator=generator)
        places = torch.arange(self.steps(batch_size) * batch_size).view(-1, batch_size)
        own = places[first_step:, distributed.local_slice(batch_size)]
        keys = ((seed, epoch, place + 1, int(order[place])) for place in own.flatten().tolist())
        yield from self._load(_Seeded(self.augmented), keys, own.shape[1])

    def eval_batches(
        self, split: str = "test", batch_size: int = 250, limit: int | None = None
    ) -> Batches:
        images = self.plain[split]
        chosen = torch.arange(len(images))
        if limit is not None:
            chosen = balanced(torch.tensor(images.targets), limit)
        own = chosen[distributed.RANK :: distributed.WORLD_SIZE].tolist()
        yield from self._load(images, own, batch_size)

    def _load(self, images: Any, keys: Iterable, batch_size: int) -> Batches:
        """Batches of images[key] for each of `keys`, in their order."""
        loader = torch.utils.data.DataLoader(
            images,
            batch_size,
            sampler=keys,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # other threads may draw from the global one
        )
        try:
            for images, labels in loader:
                images = images.to(self.device, non_blocking=True)
                yield normalise(images, *self._scale), labels.to(self.device, non_blocking=True)
        except UserError as error:  # of a worker: its last line is the message, after a traceback
            line = str(error).strip().splitlines()[-1]
            raise UserError(line.rpartition("UserError: ")[2]) from None


class _Seeded(torch.utils.data.Dataset):
    """Images by numbers that seed the augmentation, whatever the workers, and by their index."""

    def __init__(self, images: Any):
        self.images = images

    def __getitem__(self, key: tuple[int, ...]) -> Any:
        *numbers, index = key
        with seeded(derived_seed(*numbers)):
            return self.images[index]
