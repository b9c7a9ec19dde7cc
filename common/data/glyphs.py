"""Glyphs: a generated ten-class image set of coloured digits, drawn in the fonts that matplotlib
ships.

Font, size, place, rotation, shear, colours, clutter and noise vary. All arithmetic is Pillow's and
integer NumPy's, so the same versions of Pillow and matplotlib draw the same images from the same
seed.
"""

import hashlib
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

FONTS = """DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSansMono-Bold
    DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic STIXGeneral STIXGeneralBol STIXGeneralItalic
    cmr10 cmss10 cmtt10""".split()
TRAIN, TEST = 10_000, 1_000
CANVAS = 64  # px of the templates, several times the size at which they are drawn
NOISE = 30  # largest absolute noise, of 255
CONTRAST = (20, 126)  # of ink above paper in each colour


def read_glyphs(size: int, seed: int = 0) -> tuple:
    """Images of `size` px and labels, for training and testing, class names, and a checksum."""
    templates, parts = _templates(), []
    for part, count in enumerate((TRAIN, TEST)):
        labels = np.arange(count) % 10
        images = _draw(templates, labels, size, np.random.default_rng([seed, part, size]))
        parts += [torch.from_numpy(images), torch.from_numpy(labels)]
    # They depend on library versions: later stages must see the very same ones.
    checksum = hashlib.sha256(b"".join(images.numpy().tobytes() for images in parts[::2]))
    return *parts, list("0123456789"), checksum.hexdigest()[:16]


def _templates() -> list[list[Image.Image]]:
    """A grey picture of every digit in every font, centred."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    templates = []
    for name in FONTS:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 48)
        templates.append([])
        for digit in "0123456789":
            picture = Image.new("L", (CANVAS, CANVAS))
            ImageDraw.Draw(picture).text((CANVAS // 2, CANVAS // 2), digit, 255, font, anchor="mm")
            templates[-1].append(picture)
    return templates


def _draw(
    templates: list[list[Image.Image]], labels: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    n = len(labels)
    fonts = rng.integers(len(FONTS), size=(3, n))
    digits = np.stack([labels, *rng.integers(10, size=(2, n))])
    angle = rng.uniform(-0.45, 0.45, (3, n))
    shear = rng.uniform(-0.3, 0.3, (3, n))
    scale = rng.uniform(0.9, 1.5, (3, n)) * size / CANVAS
    shift = rng.uniform(-0.15, 0.15, (3, 2, n)) * size
    # Two more digits stand half outside the picture, as clutter: place them near the corners.
    corner = rng.integers(0, 2, (2, 2, n)) * 2 - 1
    shift[1:] += corner * 0.62 * size
    ink = np.empty((3, n, size, size), np.int32)
    for k in range(3):
        for i in range(n):
            where = _inverse_affine(angle[k, i], shear[k, i], scale[k, i], *shift[k, :, i], size)
            digit = templates[fonts[k, i]][digits[k, i]]
            look = Image.Transform.AFFINE, where, Image.Resampling.BILINEAR
            ink[k, i] = digit.transform((size, size), *look)
    paper = rng.integers(0, 130, (n, 3), dtype=np.int32)
    colour, clutter = paper + rng.integers(*CONTRAST, (2, n, 3), dtype=np.int32)
    slope = rng.integers(-50, 51, (n, 2, 1, 1, 1), dtype=np.int32)
    ramp = np.arange(size, dtype=np.int32) * 2 - size + 1
    picture = paper[:, :, None, None] + slope[:, 0] * ramp[:, None] // size
    picture = picture + slope[:, 1] * ramp // size
    for layer, hue in ((ink[1:].max(0), clutter), (ink[0], colour)):
        weight = layer[:, None]
        picture = (picture * (255 - weight) + hue[:, :, None, None] * weight) // 255
    picture += rng.integers(-NOISE, NOISE + 1, picture.shape, dtype=np.int32)
    return picture.clip(0, 255).astype(np.uint8)


def _inverse_affine(
    angle: float, shear: float, scale: float, dx: float, dy: float, size: int
) -> tuple[float, ...]:
    """Pillow maps output to input: undo the shift, then the rotation and shear, then the scale."""
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    a, b, d, e = cos + shear * sin, sin - shear * cos, -sin, cos
    x, y = size / 2 + dx, size / 2 + dy
    return a, b, CANVAS / 2 - a * x - b * y, d, e, CANVAS / 2 - d * x - e * y
