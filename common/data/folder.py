"""Image folders: train/<class>/* and test/<class>/* (or val/<class>/*), listed by torchvision."""

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
    """Read all images as in `SMALL_IMAGES`, cropped to squares and resized to `size` px.

    Caches the decoded images in `folder`. Without a `size`, all images must be squares of one size.
    Raises UserError for files that are missing, unreadable, or of another size.
    """
    train, test = image_folders(folder, ("test", "val"))
    samples = train.samples + test.samples
    # Names, labels and sizes identify the data set wherever it is; times detect a stale cache.
    listing, times = hashlib.sha256(), 0
    for path, label in samples:
        with _file_errors(path):
            status = os.stat(path)
        listing.update(f"{path.removeprefix(str(folder))} {label} {status.st_size}\n".encode())
        times += status.st_mtime_ns
    checksum = listing.hexdigest()[:16]
    cache, stamp = folder / f".decoded-{size or 'native'}.pt", f"{checksum} {times}"
    if cache.is_file():
        with contextlib.suppress(UserError):  # decode again if the cache is damaged
            cached = checkpoint.load(cache, ("stamp", "parts"))
            if cached["stamp"] == stamp:
                return *cached["parts"], train.classes, checksum
    files = [path for split in (train, test) for path in Path(split.root).glob("*/**/[!.]*.*")]
    if len(files) > len(samples):
        ignored = f"ignored {len(files) - len(samples)} files of {folder}"
        tqdm.write(f"{ignored}: their extensions are not torchvision's (.jpg, .png, .webp, ...)")
    side = size or read_image(samples[0][0]).width
    images = np.empty((len(samples), 3, side, side), np.uint8)
    bar = tqdm(samples, f"decoding {folder}", unit="img", disable=None, leave=False)
    for row, (path, _) in enumerate(bar):
        image = read_image(path)
        if size is None and image.size != (side, side):
            shape = f"{image.width}x{image.height} px, but the first image is {side}x{side}"
            raise UserError(f"{path} is {shape}: set --image-size to crop and resize all images")
        square = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
        images[row] = np.asarray(square).transpose(2, 0, 1)
    parts = []
    for split, pixels in zip((train, test), np.split(images, [len(train)])):
        parts += [torch.from_numpy(pixels), torch.tensor(split.targets)]
    # Under torchrun, saving waits for all ranks, but one may have found another command's cache.
    if distributed.WORLD_SIZE == 1:
        with contextlib.suppress(UserError):  # a read-only folder only costs time
            checkpoint.save({"stamp": stamp, "parts": parts}, cache)
    return *parts, train.classes, checksum


def image_folders(folder: Path, test_names: tuple[str, ...]) -> tuple[Any, Any]:
    """torchvision ImageFolders of train/ and of the first folder of `test_names` that exists.

    Raises UserError unless both have the same classes, at least two, none of them empty.
    """
    from common.vision import torchvision  # here, because this import takes seconds

    if not folder.is_dir():
        raise UserError(f"no such data folder: {folder} (set --data-dir)")
    test = next((folder / name for name in test_names if (folder / name).is_dir()), None)
    if not (folder / "train").is_dir() or test is None:
        needed = f"train/ and {' or '.join(f'{name}/' for name in test_names)}"
        raise UserError(f"{folder} needs {needed}, each with one folder of images per class")
    try:
        splits = [
            torchvision.datasets.ImageFolder(str(path), loader=read_image)
            for path in (folder / "train", test)
        ]
    except OSError as error:
        raise UserError(f"{folder}: {error}") from error
    classes, test_classes = (split.classes for split in splits)
    if unmatched := sorted(set(classes) ^ set(test_classes)):
        names = ", ".join(unmatched[:5])
        raise UserError(f"the classes of {folder}/train and {test} differ: {names} in only one")
    if len(classes) < 2:
        raise UserError(f"{folder}/train has one class folder: add at least one more")
    return tuple(splits)


def read_image(path: str) -> Image.Image:
    """Read an image as RGB like torchvision, which ignores the EXIF orientation.

    Raises UserError when the file is not a readable image or has more than 8 bits per channel.
    """
    with _file_errors(path), Image.open(path) as image:
        if image.mode.startswith(("I", "F")):  # Pillow would clip it to 8 bits
            raise UserError(f"{path} has more than 8 bits per channel: save it with 8 bits")
        return image.convert("RGB")


@contextlib.contextmanager
def _file_errors(path: str) -> Iterator[None]:
    """Turn the errors of a damaged or missing image file into a UserError that names it."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error
