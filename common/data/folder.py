"""Images in class folders, train/<class>/* and test/<class>/* (or val/), decoded once and kept."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from common import checkpoint
from common.errors import UserError
from common.runtime import distributed

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff")


def read_folder(folder: Path, size: int | None) -> tuple:
    """Read train/<class>/* and test/<class>/* (or val/), and keep the decoded form beside them for
    the next start.
    """
    train, test, classes = folder_splits(folder, ("test", "val"))
    files = [_images(split, classes) for split in (train, test)]
    # The listing tells one set of files from another wherever it lies; the times tell whether a
    # cache is stale.
    listing, times = hashlib.sha256(), hashlib.sha256()
    for path, label in files[0] + files[1]:
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        listing.update(f"{path.removeprefix(str(folder))} {label} {status.st_size}\n".encode())
        times.update(f"{status.st_mtime_ns}\n".encode())
    checksum = listing.hexdigest()[:16]
    stamp = checksum + times.hexdigest()
    native, cache = folder / ".decoded-native.pt", folder / f".decoded-{size or 'native'}.pt"
    for kept in {cache, native}:
        if kept.is_file():
            with contextlib.suppress(UserError):  # a cache that cannot be read is made again
                stored = checkpoint.load(kept, ("stamp", "parts"))
                if stored["stamp"] == stamp and size in (None, stored["parts"][0].shape[-1]):
                    return *stored["parts"], classes, checksum
    parts: list[Tensor] = []
    for pairs in files:
        size = size or _common_size(pairs[0][0])
        images = np.empty((len(pairs), 3, size, size), np.uint8)
        for row, (path, _) in enumerate(
            tqdm(pairs, f"decoding {folder}", unit="img", disable=None, leave=False)
        ):
            images[row] = _decode(path, size, given=cache != native)
        parts += [torch.from_numpy(images), torch.tensor([label for _, label in pairs])]
    if (
        distributed.WORLD_SIZE == 1
    ):  # of several, one might have found what another command has just written
        with contextlib.suppress(UserError):  # a read-only data folder only costs time
            checkpoint.save({"stamp": stamp, "parts": parts}, cache)
    return *parts, classes, checksum


def folder_splits(folder: Path, tests: tuple[str, ...]) -> tuple[Path, Path, list[str]]:
    """Find train/ and the first of `tests`, with equal class folders; raises UserError when they
    are not so.
    """
    if not folder.is_dir():
        raise UserError(f"no such data folder: {folder} (set --data-dir)")
    test = next((folder / name for name in tests if (folder / name).is_dir()), None)
    if not (folder / "train").is_dir() or test is None:
        wanted = f"{tests[0]}/" + "".join(f" (or {name}/)" for name in tests[1:])
        raise UserError(
            f"{folder} needs train/ and {wanted}, each with one folder of images a class"
        )
    train_classes, test_classes = (
        sorted(
            entry.name
            for entry in split.iterdir()
            if entry.is_dir() and not entry.name.startswith(".")
        )
        for split in (folder / "train", test)
    )
    if train_classes != test_classes:
        odd = sorted(set(train_classes) ^ set(test_classes))
        raise UserError(
            f"the classes of {folder}/train and {test} differ: {', '.join(odd[:5])} only in one of "
            "them"
        )
    if len(train_classes) < 2:
        raise UserError(
            f"{folder}/train has {len(train_classes)} class folders; at least two are needed"
        )
    return folder / "train", test, train_classes


def _images(split: Path, classes: list[str]) -> list[tuple[str, int]]:
    """Every image below the class folders with its label; strings, as there may be very many."""
    pairs = []
    for label, name in enumerate(classes):
        inside = (
            os.path.join(folder, file)
            for folder, _, files in os.walk(split / name)
            for file in files
        )
        found = sorted(path for path in inside if path.lower().endswith(SUFFIXES))
        if not found:
            raise UserError(f"no images in {split / name} (looked for {' '.join(SUFFIXES)})")
        pairs += [(path, label) for path in found]
    return pairs


def _common_size(path: str) -> int:
    with opened(path) as image:
        if image.width != image.height:
            raise UserError(
                f"{path} is {image.width}x{image.height}: set --image-size to crop and resize all "
                "images"
            )
        return image.width


def _decode(path: str, size: int, given: bool) -> np.ndarray:
    with opened(path) as image:
        if image.size != (size, size):
            if not given:
                raise UserError(
                    f"{path} is {image.width}x{image.height} and others {size}x{size}: set "
                    "--image-size"
                )
            image.draft("RGB", (2 * size, 2 * size))  # JPEG: decode no larger than needed
            image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


@contextlib.contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """Open an image; what is no image, or a broken one, is a UserError, also when it shows only
    while decoding.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would clip it to 8 bits
                raise UserError(f"{path} has more than 8 bits a channel: save it with 8")
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no image that can be read: {error}") from error
