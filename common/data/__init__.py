"""Data sets: small images resident on the training device, ImageNet streamed.

Both kinds have the methods `train_batches` and `eval_batches`, and a `description` for checkpoints.
Under torchrun (common/runtime/distributed.py) each rank gets its share of every batch. The order
and augmentation of an epoch depend only on (seed, stage, epoch).
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.data.batches import Batches, balanced_indices, derived_seed, stage_seed
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
    "balanced_indices",
    "derived_seed",
    "load_data",
    "load_cached",
    "stage_seed",
]

# Small-image sets by their --dataset name: (data_dir, image_size or None) -> training images
# (N, 3, S, S) uint8, training labels int64, test images, test labels, class names, and a checksum,
# which is None for data sets that are the same on every machine.
SMALL_IMAGES: dict[str, Callable[[str, int | None], tuple]] = {
    "glyphs": lambda data_dir, image_size: read_glyphs(image_size or 32),
    "cifar10": functools.partial(read_torchvision, "CIFAR10"),
    "cifar100": functools.partial(read_torchvision, "CIFAR100"),
    "svhn": functools.partial(read_torchvision, "SVHN"),
    "folder": lambda data_dir, image_size: read_folder(Path(data_dir), image_size),
}
DATASETS = (*SMALL_IMAGES, "imagenet")


def load_data(
    spec: dict[str, Any],
    data_dir: str | None = None,
    device: torch.device | str = "cpu",
    workers: int = 8,
) -> Resident | Streamed:
    """Load a data set onto `device`, from `data_dir` or else from the folder named in `spec`.

    `spec` is the `dataset` entry of a checkpoint, whose normalisation is reused, or a dict with
    `name` and optionally `image_size` (px) and `limit_train` (images). Raises UserError when the
    data are missing, malformed, or differ from the checkpoint's.
    """
    device, name = torch.device(device), spec["name"]
    data_dir = data_dir or spec.get("data_dir") or "data"
    size, limit = spec.get("image_size"), spec.get("limit_train")
    if name == "imagenet":
        if limit or size not in (None, Streamed.input_shape[-1]):
            raise UserError(
                "--limit-train and --image-size are for the small-image sets, not for imagenet"
            )
        data = Streamed(Path(data_dir), device, workers)
    else:
        location = {"data_dir": None if name == "glyphs" else data_dir}
        data = make_resident(spec | location, *SMALL_IMAGES[name](data_dir, size), device)
    for key in ("images", "class_names", "checksum"):
        if key in spec and spec[key] != data.description[key]:
            fix = "pass the --data-dir of stage 1"
            if name == "glyphs":
                fix = "use the versions of Pillow and matplotlib of stage 1 (see its result.json)"
            raise UserError(
                f"{name} in {data_dir} is not the data of the checkpoint, its {key} differs: {fix}"
            )
    return data


def load_cached(spec: dict[str, Any], *args: Any) -> Resident | Streamed:
    """Like `load_data`, but reads each data set only once per process."""
    return _load_once(json.dumps(spec), *args)


@functools.cache
def _load_once(spec_json: str, *args: Any) -> Resident | Streamed:
    return load_data(json.loads(spec_json), *args)
