"""Glyphs: a generated ten-class data set of coloured digits, drawn in matplotlib's fonts.

Font, size, position, rotation, shear, colours, clutter and noise vary. All arithmetic is done by
Pillow or in NumPy integers: the same versions of Pillow and matplotlib draw identical images from
the same seed.
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
CANVAS = 64  # px of the templates, larger than the digits in the images
NOISE = 30  # largest absolute noise, in 0..255
CONTRAST = (20, 126)  # range of (digit - background) in each colour channel


def read_glyphs(size: int, seed: int = 0) -> tuple:
    """Draw the data set in the format of `SMALL_IMAGES`, with images of `size` px."""
    templates, parts = _templates(), []
    for split, count in enumerate((TRAIN, TEST)):
        labels = np.arange(count) % 10
        images = _draw(templates, labels, size, np.random.default_rng([seed, split, size]))
        parts += [torch.from_numpy(images), torch.from_numpy(labels)]
    # The images depend on library versions; later stages must use identical ones.
    checksum = hashlib.sha256(b"".join(images.numpy().tobytes() for images in parts[::2]))
    return *parts, list("0123456789"), checksum.hexdigest()[:16]


def _templates() -> list[list[Image.Image]]:
    """A centred greyscale image of every digit, as templates[font][digit]."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    templates = []
    for name in FONTS:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 48)
        templates.append([])
        for digit in "0123456789":
            image = Image.new("L", (CANVAS, CANVAS))
            ImageDraw.Draw(image).text((CANVAS // 2, CANVAS // 2), digit, 255, font, anchor="mm")
            templates[-1].append(image)
    return templates


def _draw(
    templates: list[list[Image.Image]], labels: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Images (N, 3, size, size) uint8: the digit of each label over two digits of clutter."""
    n = len(labels)
    fonts = rng.integers(len(FONTS), size=(3, n))
    digits = np.stack([labels, *rng.integers(10, size=(2, n))])
    angle = rng.uniform(-0.45, 0.45, (3, n))
    shear = rng.uniform(-0.3, 0.3, (3, n))
    scale = rng.uniform(0.9, 1.5, (3, n)) * size / CANVAS
    shift = rng.uniform(-0.15, 0.15, (3, 2, n)) * size
    # The clutter lies near the corners, half outside the image.
    corner = rng.integers(0, 2, (2, 2, n)) * 2 - 1
    shift[1:] += corner * 0.62 * size
    alpha = np.empty((3, n, size, size), np.int32)
    for k in range(3):
        for i in range(n):
            matrix = _inverse_affine(angle[k, i], shear[k, i], scale[k, i], *shift[k, :, i], size)
            template = templates[fonts[k, i]][digits[k, i]]
            affine = Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
            alpha[k, i] = template.transform((size, size), *affine)
    background = rng.integers(0, 130, (n, 3), dtype=np.int32)
    digit_colour, clutter_colour = background + rng.integers(*CONTRAST, (2, n, 3), dtype=np.int32)
    slope = rng.integers(-50, 51, (n, 2, 1, 1, 1), dtype=np.int32)
    ramp = np.arange(size, dtype=np.int32) * 2 - size + 1
    images = background[:, :, None, None] + slope[:, 0] * ramp[:, None] // size
    images = images + slope[:, 1] * ramp // size
    for layer, colour in ((alpha[1:].max(0), clutter_colour), (alpha[0], digit_colour)):
        weight = layer[:, None]
        images = (images * (255 - weight) + colour[:, :, None, None] * weight) // 255
    images += rng.integers(-NOISE, NOISE + 1, images.shape, dtype=np.int32)
    return images.clip(0, 255).astype(np.uint8)


def _inverse_affine(
    angle: float, shear: float, scale: float, dx: float, dy: float, size: int
) -> tuple[float, ...]:
    """Pillow's six affine coefficients, which map output to input pixels.

    They undo the shift (px), then the rotation (rad) and the shear, then the scale.
    """
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    a, b, d, e = cos + shear * sin, sin - shear * cos, -sin, cos
    x, y = size / 2 + dx, size / 2 + dy
    return a, b, CANVAS / 2 - a * x - b * y, d, e, CANVAS / 2 - d * x - e * y
