"""Augmentations `(generator, image) -> image` of one stored image (H, W, C): for the `augment` of `batches`.

`batches` gives every position of the global order a generator of its own, so that what is drawn depends on the seed and
the position alone: not on hosts, threads, or where a run was resumed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Augment = Callable[[np.random.Generator, np.ndarray], np.ndarray]


def chain(*steps: Augment) -> Augment:
    """One after the other, all drawing from the same generator."""

    def augment(generator: np.random.Generator, image: np.ndarray) -> np.ndarray:
        for step in steps:
            image = step(generator, image)
        return image

    return augment


def flip(chance: float | int = 0.5, axis: int = 1) -> Augment:
    """The mirror image (left and right; `axis=0` upside down) with probability `chance`.

    Raises:
        ValueError: chance outside [0, 1], or an axis that is not 0 or 1.
    """
    if not 0 <= chance <= 1 or axis not in (0, 1):
        raise ValueError(f"chance must be in [0, 1] and axis 0 or 1, got {chance!r} and {axis!r}")
    return lambda generator, image: np.flip(image, axis) if generator.random() < chance else image


def shift(pixels: int = 1, fill: Any = 0) -> Augment:
    """Moved by up to so many pixels each way, uniformly; `fill` comes in from outside ("edge": the border's values).

    Raises:
        ValueError: pixels below 0.
    """
    if pixels < 0:
        raise ValueError(f"pixels must be at least 0, got {pixels!r}")
    mode: dict[str, Any] = {"mode": "edge"} if isinstance(fill, str) else {"mode": "constant", "constant_values": fill}
    if isinstance(fill, str) and fill != "edge":
        raise ValueError(f"fill must be a number or 'edge', got {fill!r}")

    def augment(generator: np.random.Generator, image: np.ndarray) -> np.ndarray:
        down, right = generator.integers(0, 2 * pixels + 1, 2)
        padded = np.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)), **mode)
        return padded[down : down + image.shape[0], right : right + image.shape[1]]

    return augment


def crop(height: int, width: int, random: bool = True) -> Augment:
    """A window of (height, width), at random or in the middle: images of different sizes become one size.

    Raises:
        ValueError: sizes below 1; when called, an image that is smaller.
    """
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1, got {height!r} and {width!r}")

    def augment(generator: np.random.Generator, image: np.ndarray) -> np.ndarray:
        room = image.shape[0] - height, image.shape[1] - width
        if min(room) < 0:
            raise ValueError(f"an image of shape {image.shape} has no window of {height} x {width}: resize it first")
        top, left = (int(generator.integers(0, free + 1)) if random else free // 2 for free in room)
        return image[top : top + height, left : left + width]

    return augment


def resize(height: int, width: int) -> Augment:
    """Area averages (whole blocks) or nearest pixels: small enough to need no image library.

    A size that divides the image's is averaged over blocks and rounded for integers; any other takes the nearest.

    Raises:
        ValueError: sizes below 1.
    """
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1, got {height!r} and {width!r}")

    def augment(generator: np.random.Generator, image: np.ndarray) -> np.ndarray:
        del generator
        rows, columns = image.shape[:2]
        if rows % height == 0 and columns % width == 0:
            blocks = image.reshape(height, rows // height, width, columns // width, -1).mean((1, 3))
            return np.rint(blocks).astype(image.dtype) if np.issubdtype(image.dtype, np.integer) else blocks
        down = ((np.arange(height) + 0.5) * rows / height).astype(int)
        right = ((np.arange(width) + 0.5) * columns / width).astype(int)
        return image[down[:, None], right]

    return augment


def dequantize() -> Augment:
    """Uniform noise in [-1/2, 1/2) added to whole numbers: a density of the result bounds the probabilities of theirs.

    Flow++: Improving Flow-Based Generative Models with Variational Dequantization and Architecture Design,
    arXiv:1902.00275, section 3.1 (uniform dequantization).
    """
    return lambda generator, image: (image + generator.random(image.shape) - 0.5).astype(np.float32)
