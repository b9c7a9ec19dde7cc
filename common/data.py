"""Data sets: small images resident on the training device, ImageNet streamed.

Both kinds offer the same two methods, `train_batches` and `eval_batches`, and a `description` for checkpoints. Where
several processes train one network (common/distributed.py), both give each process its share.
The order and augmentation of an epoch depend on (seed, epoch) alone.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common import distributed
from common.errors import UserError
from common.folder import folder_splits, opened, read_folder
from common.seeding import seeded

DATASETS = ("glyphs", "cifar10", "cifar100", "svhn", "imagenet", "folder")
NO_FLIP = ("glyphs", "svhn")  # a mirrored digit is another sign
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EVAL_BATCH = {"cpu": 500, "cuda": 2500}  # a GPU waits for launches where a batch is small

Batches = Iterator[tuple[Tensor, Tensor]]
Draw = tuple[Tensor, ...]  # of an epoch: the order of the images; the crop, y and x, and whether mirrored, of each


def load_data(
    name: str,
    data_dir: str | None = None,
    image_size: int | None = None,
    limit_train: int | None = None,
    device: torch.device | str = "cpu",
    expected: dict[str, Any] | None = None,
    workers: int = 8,
) -> "Resident | Streamed":
    """Load a data set onto `device`; image_size in px, limit_train in images.

    `expected` is the description in a checkpoint: its normalisation is taken over.
    Raises UserError when the data are missing, malformed, or not those of `expected`.
    """
    device = torch.device(device)
    data_dir = data_dir or "data"
    if name == "imagenet":
        if limit_train or image_size:
            raise UserError("--limit-train and --image-size are for the small-image sets, not for imagenet")
        data = Streamed(Path(data_dir), device, workers)
    elif name == "folder":
        data = _resident(name, data_dir, *read_folder(Path(data_dir), image_size), limit_train, device, expected)
    elif name == "glyphs":
        data = _resident(name, None, *_read_glyphs(image_size or 32), limit_train, device, expected)
    else:
        data = _resident(name, data_dir, *_read_torchvision(name, data_dir, image_size), limit_train, device, expected)
    if expected:
        for key in ("classes", "class_names", "checksum"):
            if data.description.get(key) != expected.get(key):
                if name == "glyphs":
                    raise UserError(
                        "these glyphs are not the checkpoint's: other versions of Pillow or matplotlib drew them"
                    )
                raise UserError(f"{name} in {data_dir} is not the data of the checkpoint: its {key} differs")
    return data


def load_described(
    description: dict[str, Any], data_dir: str | None = None, device: torch.device | str = "cpu", workers: int = 8
) -> "Resident | Streamed":
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
) -> Callable[[dict[str, Any]], "Resident | Streamed"]:
    """As `load_described`, with each data set read once."""
    loaded: dict[str, Resident | Streamed] = {}

    def read(description: dict[str, Any]) -> Resident | Streamed:
        key = json.dumps(description)
        if key not in loaded:
            loaded[key] = load_described(description, data_dir, device, workers)
        return loaded[key]

    return read


# ---------------------------------------------------------------- small images


@dataclass(frozen=True)
class Resident:
    """A small-image set as uint8 tensors on the device; augmentation is a few tensor operations there."""

    train: Tensor  # (N, 3, S + 2 pad, S + 2 pad) uint8, padded with black for the random crop
    train_labels: Tensor
    test: Tensor  # (M, 3, S, S) uint8
    test_labels: Tensor
    pad: int
    flip: bool
    description: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return self.train.device

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return tuple(self.test.shape[1:])

    def steps(self, batch_size: int) -> int:
        """Batches an epoch; the last short one is dropped."""
        return _steps(len(self.train), batch_size)

    def train_batches(self, batch_size: int, seed: int, epoch: int) -> Batches:
        """Shuffled, cropped, flipped and normalised batches (images fp32 channels-last, labels)."""
        draw, part = self.draw(seed, epoch), distributed.share(batch_size)
        for start in range(0, self.steps(batch_size) * batch_size, batch_size):
            yield self.batch(draw, slice(start + part.start, start + part.stop))

    def draw(self, seed: int, epoch: int) -> Draw:
        """The order and augmentation of an epoch, drawn on the CPU, so that every device sees the same."""
        generator, count = torch.Generator().manual_seed(epoch_seed(seed, epoch)), len(self.train)
        order = torch.randperm(count, generator=generator)
        y, x = torch.randint(2 * self.pad + 1, (2, count), generator=generator)
        mirror = torch.rand(count, generator=generator) < (0.5 if self.flip else 0)
        return tuple(part.to(self.device) for part in (order, y, x, mirror))

    def batch(self, draw: Draw, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """The images at positions `rows` of an epoch, cropped, mirrored and normalised, and their labels."""
        order, y, x, mirror = draw
        chosen, size = order[rows], self.input_shape[-1]
        windows = self.train.unfold(2, size, 1).unfold(3, size, 1)  # a view: every crop of every image
        images = windows[chosen, :, y[chosen], x[chosen]]
        if self.flip:
            images = torch.where(mirror[chosen, None, None, None], images.flip(3), images)
        return self._normalise(images), self.train_labels[chosen]

    def eval_batches(self, split: str = "test", batch_size: int | None = None, limit: int | None = None) -> Batches:
        """All images of `split` in order, or a balanced choice of `limit` with the classes mixed, not augmented, normalised."""
        batch_size = batch_size or EVAL_BATCH.get(self.device.type, 500)
        images, labels = (self.test, self.test_labels) if split == "test" else (self.train, self.train_labels)
        if split == "train" and self.pad:
            images = images[:, :, self.pad : -self.pad, self.pad : -self.pad]
        if limit is not None:
            chosen = balanced(labels.cpu(), limit).to(self.device)
            images, labels = images[chosen], labels[chosen]
        for start in range(distributed.RANK * batch_size, len(labels), distributed.PROCESSES * batch_size):
            yield self._normalise(images[start : start + batch_size]), labels[start : start + batch_size]

    def _normalise(self, images: Tensor) -> Tensor:
        return _normalise(images, *self._scale)

    @functools.cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        return _pixel_scale(self.description, self.device)


def _pixel_scale(description: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of pixel values; to be kept, because copying them over would stall every step."""
    mean, std = (torch.tensor(description[key], device=device).view(1, 3, 1, 1) for key in ("mean", "std"))
    return mean * 255, std * 255


def _normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return images.to(torch.float32, memory_format=torch.channels_last).sub_(mean).div_(std)


def epoch_seed(seed: int, epoch: int, item: int = 0) -> int:
    """A 64-bit generator seed that depends on seed, epoch and item alone."""
    return int(np.random.SeedSequence([seed, epoch, item]).generate_state(1, np.uint64)[0] >> 1)


def _steps(images: int, batch_size: int) -> int:
    if images < batch_size:
        raise UserError(f"--batch-size {batch_size} is larger than the {images} training images")
    distributed.share(batch_size)
    return images // batch_size


def balanced(labels: Tensor, limit: int) -> Tensor:
    """Indices of `limit` images, or all there are: equally many of every class (to one), mixed; always the same choice."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels[order]
    # Rank of every image within its class, in shuffled order: take all of rank 0, then of rank 1, ...
    by_class = torch.argsort(shuffled, stable=True)
    counts = torch.bincount(shuffled)
    rank = torch.empty_like(order)
    rank[by_class] = torch.cat([torch.arange(int(count)) for count in counts])
    chosen = order[torch.argsort(rank * len(counts) + shuffled)[:limit]]
    return chosen[torch.randperm(len(chosen), generator=generator)]


def _resident(
    name: str, data_dir: str | None, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor,
    class_names: list[str], checksum: str | None, limit: int | None, device: torch.device, expected: dict[str, Any] | None,
) -> Resident:  # fmt: skip
    if expected:
        mean, std = expected["mean"], expected["std"]
    else:
        moments = (
            torch.stack([torch.stack([t.double().mean(), (t.double() ** 2).mean()]) for t in train.transpose(0, 1)])
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
            raise UserError(f"--limit-train {limit} is more than the {len(train)} training images of {name}")
        chosen = balanced(train_labels, limit).sort().values
        train, train_labels = train[chosen], train_labels[chosen]
    pad = test.shape[-1] // 8  # 4 px at 32 px, as in the paper
    train = F.pad(train, (pad, pad, pad, pad))
    tensors = [tensor.to(device) for tensor in (train, train_labels, test, test_labels)]
    return Resident(*tensors, pad, name not in NO_FLIP, description)


def _read_glyphs(size: int) -> tuple:
    from common.glyphs import glyphs

    parts = [torch.from_numpy(part) for part in glyphs(size)]
    # Generated images depend on library versions: later stages must see the very same ones.
    checksum = hashlib.sha256(parts[0].numpy().tobytes() + parts[2].numpy().tobytes()).hexdigest()[:16]
    return *parts, list("0123456789"), checksum


def _read_torchvision(name: str, data_dir: str, size: int | None) -> tuple:
    from common.vision import torchvision

    def read(train: bool, download: bool):
        if name == "svhn":
            return torchvision.datasets.SVHN(data_dir, "train" if train else "test", download=download)
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
                f"{name} is not in {data_dir} and could not be downloaded ({error}): put torchvision's files there"
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
        F.interpolate(piece.float(), (size, size), mode="bilinear", antialias=True) for piece in images.split(1000)
    ]
    return torch.cat([piece.round_().clamp_(0, 255).to(torch.uint8) for piece in pieces])


# ---------------------------------------------------------------- ImageNet


class Streamed:
    """ImageNet read from class folders by DataLoader workers, with torchvision's transforms (paper's augmentation)."""

    input_shape = (3, 224, 224)

    def __init__(self, folder: Path, device: torch.device, workers: int):
        from common.vision import torchvision, v2  # here, because it takes seconds that small images need not pay

        train, test, classes = folder_splits(folder, ("val", "test"))  # ImageNet's own test/ has no labels
        read = functools.partial(torchvision.datasets.ImageFolder, loader=_read_picture)
        try:  # as uint8, a quarter of what the workers would have to hand over; the device does the rest
            self.augmented = read(
                train, v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.PILToTensor()])
            )
            plain = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
            self.plain = {"train": read(train, plain), "test": read(test, plain)}
        except FileNotFoundError as error:
            raise UserError(str(error).splitlines()[0]) from error
        if odd := set(self.augmented.classes + self.plain["test"].classes) - set(classes):
            raise UserError(f"{folder} has folders that are no class: remove {', '.join(sorted(odd))}")
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
        self._scale = _pixel_scale(self.description, device)

    def steps(self, batch_size: int) -> int:
        return _steps(len(self.augmented), batch_size)

    def train_batches(self, batch_size: int, seed: int, epoch: int) -> Batches:
        generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
        order = torch.randperm(len(self.augmented), generator=generator).tolist()
        items, part = _Seeded(self.augmented, order, seed, epoch), distributed.share(batch_size)
        starts = range(0, self.steps(batch_size) * batch_size, batch_size)
        mine = [start + place for start in starts for place in range(part.start, part.stop)]
        yield from self._load(torch.utils.data.Subset(items, mine), part.stop - part.start)

    def eval_batches(self, split: str = "test", batch_size: int = 250, limit: int | None = None) -> Batches:
        images = self.plain[split]
        if limit is not None:
            images = torch.utils.data.Subset(images, balanced(torch.tensor(images.targets), limit).tolist())
        mine = range(distributed.RANK, len(images), distributed.PROCESSES)
        yield from self._load(torch.utils.data.Subset(images, mine), batch_size)

    def _load(self, items: Any, batch_size: int) -> Batches:
        loader = torch.utils.data.DataLoader(
            items,
            batch_size,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or it would draw from the global one, beside other threads
        )
        try:
            for images, labels in loader:
                images = images.to(self.device, non_blocking=True)
                yield _normalise(images, *self._scale), labels.to(self.device, non_blocking=True)
        except UserError as error:  # of a worker: its last line is the message, after a traceback
            raise UserError(str(error).strip().splitlines()[-1].rpartition("UserError: ")[2]) from None


def _read_picture(path: str) -> Any:
    with opened(path) as image:
        return image.convert("RGB")


class _Seeded(torch.utils.data.Dataset):
    """Items in a given order, each augmented from its own seed, so that the number of workers changes nothing."""

    def __init__(self, items: Any, order: list[int], seed: int, epoch: int):
        self.items, self.order, self.seed, self.epoch = items, order, seed, epoch

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> Any:
        with seeded(epoch_seed(self.seed, self.epoch, position + 1)):
            return self.items[self.order[position]]
