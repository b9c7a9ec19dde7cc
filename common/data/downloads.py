"""Small-image sets that torchvision downloads, and the generated glyphs, as uint8 tensors."""

import contextlib
import fcntl
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError


def read_glyphs(size: int) -> tuple:
    from common.data.glyphs import glyphs

    parts = [torch.from_numpy(part) for part in glyphs(size)]
    # Generated images depend on library versions: later stages must see the very same ones.
    checksum = hashlib.sha256(parts[0].numpy().tobytes() + parts[2].numpy().tobytes()).hexdigest()[
        :16
    ]
    return *parts, list("0123456789"), checksum


def read_torchvision(name: str, data_dir: str, size: int | None) -> tuple:
    from common.vision import torchvision

    def read(train: bool, download: bool):
        if name == "svhn":
            return torchvision.datasets.SVHN(
                data_dir, "train" if train else "test", download=download
            )
        kind = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
        return kind(data_dir, train, download=download)

    parts, names = [], None
    for train in (True, False):
        try:
            try:
                split = read(train, download=False)
            except RuntimeError:  # torchvision's word for "not there"
                with _alone(Path(data_dir)):
                    split = read(train, download=True)
        except (OSError, RuntimeError) as error:  # no network, no space, a broken archive
            raise UserError(
                f"{name} is not in {data_dir} and could not be downloaded ({error}): put "
                "torchvision's files there"
            ) from error
        images = torch.from_numpy(np.ascontiguousarray(split.data))
        if name != "svhn":
            images = images.permute(0, 3, 1, 2).contiguous()
        names = getattr(split, "classes", None) or list("0123456789")
        labels = split.labels if name == "svhn" else split.targets
        parts += [_resize(images, size), torch.as_tensor(np.asarray(labels), dtype=torch.int64)]
    return *parts, list(names), None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time download into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".download.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _resize(images: Tensor, size: int | None) -> Tensor:
    if size in (None, images.shape[-1]):
        return images
    pieces = [
        F.interpolate(piece.float(), (size, size), mode="bilinear", antialias=True)
        for piece in images.split(1000)
    ]
    return torch.cat([piece.round_().clamp_(0, 255).to(torch.uint8) for piece in pieces])
