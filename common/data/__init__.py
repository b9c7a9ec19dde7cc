"""Data sets: small images resident on the training device, ImageNet streamed.

Both kinds offer the same two methods, `train_batches` and `eval_batches`, and a `description` for
checkpoints. Where several processes train one network (common/runtime/distributed.py), both give
each process its share. The order and augmentation of an epoch depend on (seed, stage, epoch) alone.
"""

import functools
import json
from collections.abc import Callable
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
    "stage_seed",
]

# Small-image sets by the name that --dataset takes: (data_dir, image_size or None) -> training
# images (N, 3, S, S) in uint8, their labels in int64, test images, their labels, the names of the
# classes, and a checksum of data that are not the same everywhere, else None.
SMALL_IMAGES: dict[str, Callable[[str, int | None], tuple]] = {
    "glyphs": lambda data_dir, image_size: read_glyphs(image_size or 32),
    "cifar10": functools.partial(read_torchvision, "CIFAR10"),
    "cifar100": functools.partial(read_torchvision, "CIFAR100"),
    "svhn": functools.partial(read_torchvision, "SVHN"),
    "folder": lambda data_dir, image_size: read_folder(Path(data_dir), image_size),
}
DATASETS = (*SMALL_IMAGES, "imagenet")


def load_data(
    wanted: dict[str, Any],
    data_dir: str | None = None,
    device: torch.device | str = "cpu",
    workers: int = 8,
) -> Resident | Streamed:
    """Load a data set onto `device`, from `data_dir` or where it was.

    `wanted` is the `dataset` of a checkpoint, whose normalisation is taken over, or has `name` and,
    if at all, `image_size` in px and `limit_train` in images. Raises UserError when the data are
    missing, malformed, or not the checkpoint's.
    """
    device, name = torch.device(device), wanted["name"]
    data_dir = data_dir or wanted.get("data_dir") or "data"
    size, limit = wanted.get("image_size"), wanted.get("limit_train")
    if name == "imagenet":
        if limit or size not in (None, Streamed.input_shape[-1]):
            raise UserError(
                "--limit-train and --image-size are for the small-image sets, not for imagenet"
            )
        data = Streamed(Path(data_dir), device, workers)
    else:
        where = {"data_dir": None if name == "glyphs" else data_dir}
        data = make_resident(wanted | where, *SMALL_IMAGES[name](data_dir, size), device)
    for key in ("class_names", "checksum"):
        if key in wanted and wanted[key] != data.description[key]:
            raise UserError(
                f"{name} in {data_dir} is not the data of the checkpoint: its {key} differs"
            )
    return data


def load_described(description: dict[str, Any], *where: Any) -> Resident | Streamed:
    """As `load_data`, with each data set read once."""
    return _load_once(json.dumps(description), *where)


@functools.cache
def _load_once(description: str, *where: Any) -> Resident | Streamed:
    return load_data(json.loads(description), *where)
