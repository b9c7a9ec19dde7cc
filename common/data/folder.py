"""Images in class folders, train/<class>/* and test/<class>/* (or val/*), read by torchvision."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from common import checkpoint
from common.errors import UserError
from common.runtime import distributed


def read_folder(folder: Path, size: int | None) -> tuple:
    """All images, cropped to squares and resized to `size` px, decoded once and kept beside them.

    Without a size they must be squares of one size. Raises UserError for what is no such image.
    """
    train, test = image_folders(folder, ("test", "val"))
    samples = train.samples + test.samples
    # The listing tells one set of files from another wherever it lies, the times an old cache.
    listing, times = hashlib.sha256(), 0
    for path, label in samples:
        with _named(path):
            status = os.stat(path)
        listing.update(f"{path.removeprefix(str(folder))} {label} {status.st_size}\n".encode())
        times += status.st_mtime_ns
    checksum = listing.hexdigest()[:16]
    cache, stamp = folder / f".decoded-{size or 'native'}.pt", f"{checksum} {times}"
    if cache.is_file():
        with contextlib.suppress(UserError):  # a cache that cannot be read is made again
            kept = checkpoint.load(cache, ("stamp", "parts"))
            if kept["stamp"] == stamp:
                return *kept["parts"], train.classes, checksum
    files = [path for split in (train, test) for path in Path(split.root).glob("*/**/[!.]*.*")]
    if len(files) > len(samples):
        left = f"{len(files) - len(samples)} files of {folder} are left out"
        tqdm.write(f"{left}: they do not end as torchvision's pictures do (.jpg, .png, .webp, ...)")
    side = size or read_picture(samples[0][0]).width
    images = np.empty((len(samples), 3, side, side), np.uint8)
    bar = tqdm(samples, f"decoding {folder}", unit="img", disable=None, leave=False)
    for row, (path, _) in enumerate(bar):
        image = read_picture(path)
        if size is None and image.size != (side, side):
            shape = f"{image.width}x{image.height} px, and not all images are {side}x{side}"
            raise UserError(f"{path} is {shape}: set --image-size to crop and resize them")
        square = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
        images[row] = np.asarray(square).transpose(2, 0, 1)
    parts = []
    for split, pixels in zip((train, test), np.split(images, [len(train)])):
        parts += [torch.from_numpy(pixels), torch.tensor(split.targets)]
    # Of several processes, one might find what another command has just written.
    if distributed.WORLD_SIZE == 1:
        with contextlib.suppress(UserError):  # a read-only data folder only costs time
            checkpoint.save({"stamp": stamp, "parts": parts}, cache)
    return *parts, train.classes, checksum


def image_folders(folder: Path, tests: tuple[str, ...]) -> tuple[Any, Any]:
    """torchvision's ImageFolder of train/, and of the first of `tests` that is there.

    Raises UserError unless both have the same class folders, at least two, none of them empty.
    """
    from common.vision import torchvision  # here, because it takes seconds that others need not pay

    if not folder.is_dir():
        raise UserError(f"no such data folder: {folder} (set --data-dir)")
    test = next((folder / name for name in tests if (folder / name).is_dir()), None)
    if not (folder / "train").is_dir() or test is None:
        wanted = f"train/ and {' or '.join(f'{name}/' for name in tests)}"
        raise UserError(f"{folder} needs {wanted}, each with one folder of images a class")
    try:
        splits = [
            torchvision.datasets.ImageFolder(str(path), loader=read_picture)
            for path in (folder / "train", test)
        ]
    except OSError as error:
        raise UserError(f"{folder}: {error}") from error
    classes, test_classes = (split.classes for split in splits)
    if odd := sorted(set(classes) ^ set(test_classes)):
        raise UserError(
            f"the classes of {folder}/train and {test} differ: {', '.join(odd[:5])} in one alone"
        )
    if len(classes) < 2:
        raise UserError(f"{folder}/train has one class folder: at least two are needed")
    return tuple(splits)


def read_picture(path: str) -> Image.Image:
    """An image in RGB, as torchvision reads it: no orientation in its EXIF is heeded.

    Raises UserError for what is no image, or cannot be one of 8 bits without loss.
    """
    with _named(path), Image.open(path) as image:
        if image.mode.startswith(("I", "F")):  # Pillow would clip it to 8 bits
            raise UserError(f"{path} has more than 8 bits a channel: save it with 8")
        return image.convert("RGB")


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Tell what is wrong with a file in one line."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no image that can be read: {error}") from error
