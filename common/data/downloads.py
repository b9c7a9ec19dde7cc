"""Small-image sets downloaded by torchvision, as uint8 tensors."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError


def read_torchvision(name: str, data_dir: str, size: int | None) -> tuple:
    """Read CIFAR10, CIFAR100 or SVHN as in `SMALL_IMAGES`, downloading it if it is missing.

    Raises UserError when the download fails.
    """
    from common.vision import torchvision

    dataset_class = getattr(torchvision.datasets, name)
    parts = []
    for split in ("train", "test"):
        split_argument = {"split": split} if name == "SVHN" else {"train": split == "train"}
        try:
            try:
                dataset = dataset_class(data_dir, **split_argument)
            except RuntimeError:  # torchvision found no files
                with _download_lock(Path(data_dir)):
                    dataset = dataset_class(data_dir, **split_argument, download=True)
        except (OSError, RuntimeError) as error:  # no network, no space, a broken archive
            raise UserError(
                f"{name.lower()} is not in {data_dir} and could not be downloaded ({error}): put "
                "torchvision's files there"
            ) from error
        images = torch.from_numpy(dataset.data)
        if name != "SVHN":
            images = images.permute(0, 3, 1, 2)
        labels = dataset.labels if name == "SVHN" else dataset.targets
        parts += [_resize(images.contiguous(), size), torch.as_tensor(labels, dtype=torch.int64)]
    return *parts, list(getattr(dataset, "classes", "0123456789")), None


@contextlib.contextmanager
def _download_lock(folder: Path) -> Iterator[None]:
    """Let one process at a time download into `folder`; remove new folders that stay empty."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock_file = folder / ".download.lock"
    try:
        with open(lock_file, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    finally:
        lock_file.unlink(missing_ok=True)
        for path in created:
            with contextlib.suppress(OSError):  # not empty: the download succeeded
                path.rmdir()


def _resize(images: Tensor, size: int | None) -> Tensor:
    if size in (None, images.shape[-1]):
        return images
    chunks = [
        F.interpolate(chunk.float(), (size, size), mode="bilinear", antialias=True)
        for chunk in images.split(1000)
    ]
    return torch.cat([chunk.round_().clamp_(0, 255).to(torch.uint8) for chunk in chunks])
