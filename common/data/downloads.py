"""Small-image sets that torchvision downloads, as uint8 tensors."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError


def read_torchvision(name: str, data_dir: str, size: int | None) -> tuple:
    """CIFAR10, CIFAR100 or SVHN, downloaded if missing; raises UserError where that fails."""
    from common.vision import torchvision

    read = getattr(torchvision.datasets, name)
    parts = []
    for split in ("train", "test"):
        which = {"split": split} if name == "SVHN" else {"train": split == "train"}
        try:
            try:
                found = read(data_dir, **which)
            except RuntimeError:  # torchvision's word for "not there"
                with _alone(Path(data_dir)):
                    found = read(data_dir, **which, download=True)
        except (OSError, RuntimeError) as error:  # no network, no space, a broken archive
            raise UserError(
                f"{name.lower()} is not in {data_dir} and could not be downloaded ({error}): put "
                "torchvision's files there"
            ) from error
        images = torch.from_numpy(found.data)
        if name != "SVHN":
            images = images.permute(0, 3, 1, 2)
        labels = found.labels if name == "SVHN" else found.targets
        parts += [_resize(images.contiguous(), size), torch.as_tensor(labels, dtype=torch.int64)]
    return *parts, list(getattr(found, "classes", "0123456789")), None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time download into a folder; where that fails, nothing is left."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".download.lock"
    try:
        with open(path, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    finally:
        path.unlink(missing_ok=True)
        for one in made:
            with contextlib.suppress(OSError):  # it holds the data
                one.rmdir()


def _resize(images: Tensor, size: int | None) -> Tensor:
    if size in (None, images.shape[-1]):
        return images
    pieces = [
        F.interpolate(piece.float(), (size, size), mode="bilinear", antialias=True)
        for piece in images.split(1000)
    ]
    return torch.cat([piece.round_().clamp_(0, 255).to(torch.uint8) for piece in pieces])
