"""ImageNet, streamed from image files."""

import copy
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from common.data.batches import (
    Batches,
    balanced_indices,
    count_steps,
    derived_seed,
    normalise,
    pixel_mean_std,
)
from common.data.folder import image_folders
from common.errors import UserError
from common.runtime import distributed
from common.runtime.seeding import seeded

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Streamed:
    """ImageNet, read by DataLoader workers with torchvision's transforms, as in the paper."""

    input_shape = (3, 224, 224)

    def __init__(self, folder: Path, device: torch.device, workers: int):
        from common.vision import v2

        # val/ comes first because ImageNet's test/ has no labels.
        self.train_set, test = image_folders(folder, ("val", "test"))
        self.eval_sets = {"train": copy.copy(self.train_set), "test": test}
        # Workers send uint8, a quarter of the bytes of fp32; the device normalises.
        augmentation = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.PILToTensor()]
        self.train_set.transform = v2.Compose(augmentation)
        for eval_set in self.eval_sets.values():
            eval_set.transform = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
        self.device, self.workers = device, min(workers, os.cpu_count() or 1)
        self.description = {
            "name": "imagenet",
            "data_dir": str(folder),
            "image_size": 224,
            "limit_train": None,
            "images": {"train": len(self.train_set), "test": len(test)},
            "classes": len(test.classes),
            "class_names": test.classes,
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "checksum": None,
        }
        self._mean_std = pixel_mean_std(self.description, device)

    def steps(self, batch_size: int) -> int:
        return count_steps(len(self.train_set), batch_size)

    def train_batches(self, batch_size: int, seed: int, epoch: int, first_step: int = 0) -> Batches:
        """This rank's shuffled, augmented batches: (images fp32 channels-last, labels)."""
        generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
        order = torch.randperm(len(self.train_set), generator=generator)
        positions = torch.arange(self.steps(batch_size) * batch_size).view(-1, batch_size)
        local = positions[first_step:, distributed.local_slice(batch_size)]
        keys = ((seed, epoch, i + 1, int(order[i])) for i in local.flatten().tolist())
        yield from self._load(_Seeded(self.train_set), keys, local.shape[1])

    def eval_batches(
        self, split: str = "test", batch_size: int = 250, limit: int | None = None
    ) -> Batches:
        """This rank's batches of `split`, or of `limit` class-balanced images, not augmented."""
        dataset = self.eval_sets[split]
        indices = torch.arange(len(dataset))
        if limit is not None:
            indices = balanced_indices(torch.tensor(dataset.targets), limit)
        local = indices[distributed.RANK :: distributed.WORLD_SIZE].tolist()
        yield from self._load(dataset, local, batch_size)

    def _load(self, dataset: Any, keys: Iterable, batch_size: int) -> Batches:
        """Batches of dataset[key] for the `keys` in order."""
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_size,
            sampler=keys,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # other threads may use the global one
            worker_init_fn=_leave_process_group,
        )
        try:
            for images, labels in loader:
                images = images.to(self.device, non_blocking=True)
                yield normalise(images, *self._mean_std), labels.to(self.device, non_blocking=True)
        except UserError as error:  # from a worker: a traceback whose last line is the message
            line = str(error).strip().splitlines()[-1]
            raise UserError(line.rpartition("UserError: ")[2]) from None


def _leave_process_group(_: int) -> None:
    """Shield a worker from a signal to the group, as torchrun's SIGTERM: its run stops it."""
    os.setpgrp()


class _Seeded(torch.utils.data.Dataset):
    """A data set with keys (*seeds, index): augmentation does not depend on the worker."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, ...]) -> Any:
        *seeds, index = key
        with seeded(derived_seed(*seeds)):
            return self.dataset[index]
