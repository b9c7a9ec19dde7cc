"""Data sets: small images resident on the training device, ImageNet streamed.

Both kinds offer the same two methods, `train_batches` and `eval_batches`, and a `description` for
checkpoints. Where several processes train one network (common/runtime/distributed.py), both give
each process its share. The order and augmentation of an epoch depend on (seed, stage, epoch) alone.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.data.batches import Batches, balanced, derived_seed, stage_seed
from common.data.downloads import read_torchvision
from common.data.folder import read_folder
from common.data.glyphs import read_glyphs
from common.data.imagenet import Streamed
from common.data.resident import Resident, make_resident
from common.errors import UserError

__all__ = [
    "DATASETS",
    "Batches",
    "Resident",
    "Streamed",
    "balanced",
    "derived_seed",
    "load_data",
    "load_described",
    "reader",
    "stage_seed",
]

# Small-image sets by the name that --dataset takes: (data_dir, image_size or None) -> training
# images (N, 3, S, S) in uint8, their labels in int64, test images, their labels, the names of the
# classes, and a checksum of data that are not the same everywhere, else None.
SMALL_IMAGES: dict[str, Callable[[str, int | None], tuple]] = {
    "glyphs": lambda data_dir, image_size: read_glyphs(image_size or 32),
    "cifar10": partial(read_torchvision, "CIFAR10"),
    "cifar100": partial(read_torchvision, "CIFAR100"),
    "svhn": partial(read_torchvision, "SVHN"),
    "folder": lambda data_dir, image_size: read_folder(Path(data_dir), image_size),
}
DATASETS = (*SMALL_IMAGES, "imagenet")


def load_data(
    name: str,
    data_dir: str | None = None,
    image_size: int | None = None,
    limit_train: int | None = None,
    device: torch.device | str = "cpu",
    expected: dict[str, Any] | None = None,
    workers: int = 8,
) -> Resident | Streamed:
    """Load a data set onto `device`; image_size in px, limit_train in images.

    `expected` is the description in a checkpoint: its normalisation is taken over.
    Raises UserError when the data are missing, malformed, or not those of `expected`.
    """
    device = torch.device(device)
    data_dir = data_dir or "data"
    if name == "imagenet":
        if limit_train or image_size:
            raise UserError(
                "--limit-train and --image-size are for the small-image sets, not for imagenet"
            )
        data = Streamed(Path(data_dir), device, workers)
    else:
        parts = SMALL_IMAGES[name](data_dir, image_size)
        where = None if name == "glyphs" else data_dir
        data = make_resident(name, where, *parts, limit_train, device, expected)
    if expected:
        for key in ("classes", "class_names", "checksum"):
            if data.description.get(key) != expected.get(key):
                if name == "glyphs":
                    raise UserError(
                        "these glyphs are not the checkpoint's: other versions of Pillow or "
                        "matplotlib drew them"
                    )
                raise UserError(
                    f"{name} in {data_dir} is not the data of the checkpoint: its {key} differs"
                )
    return data


def load_described(
    description: dict[str, Any],
    data_dir: str | None = None,
    device: torch.device | str = "cpu",
    workers: int = 8,
) -> Resident | Streamed:
    """Load the data set that a checkpoint describes; only its place may differ."""
    return load_data(
        description["name"],
        data_dir or description["data_dir"],
        description["image_size"] if description["name"] != "imagenet" else None,
        description["limit_train"],
        device,
        expected=description,
        workers=workers,
    )


def reader(
    data_dir: str | None, device: torch.device, workers: int
) -> Callable[[dict[str, Any]], Resident | Streamed]:
    """As `load_described`, with each data set read once."""
    loaded: dict[str, Resident | Streamed] = {}

    def read(description: dict[str, Any]) -> Resident | Streamed:
        key = json.dumps(description)
        if key not in loaded:
            loaded[key] = load_described(description, data_dir, device, workers)
        return loaded[key]

    return read
