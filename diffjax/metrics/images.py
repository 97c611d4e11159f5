"""Metrics of a reconstruction against the image itself, pixel by pixel (PSNR) and window by window (SSIM)."""

from __future__ import annotations

import numpy as np

from diffjax.levels import Array, is_traced, namespace
from diffjax.metrics.sets import vectors


def psnr(images: Array, truth: Array, span: float = 1.0) -> Array:
    """Peak signal-to-noise ratio ``10 log10(span^2 / mean (image - truth)^2)`` in decibels, of every image.

    Args:
        images, truth: (N, ...), of one shape.
        span: of the values that pixels may have (1 for [0, 1], 2 for [-1, 1], 255 for bytes), above 0.

    Returns (N,); infinite where an image is its truth.

    Raises ValueError for shapes that differ and a span that is not above 0.

    >>> [float(value) for value in psnr([[0.0, 0.0]], [[0.1, -0.1]])]
    [20.0]
    """
    _checked(images, truth, span)
    a, b = vectors(images=images, truth=truth)
    xp = namespace(a, b)
    error = xp.mean((a - b) ** 2, axis=1)
    positive = error > 0
    return xp.where(positive, 10 * xp.log10(span**2 / xp.where(positive, error, 1.0)), xp.inf)


def ssim(images: Array, truth: Array, span: float = 1.0, window: int = 11, std: float = 1.5) -> Array:
    """Mean structural similarity of every image, with a Gaussian window and biased moments.

        (2 m_x m_y + c1) (2 s_xy + c2) / ((m_x^2 + m_y^2 + c1) (s_x^2 + s_y^2 + c2)),   c_k = (K_k span)^2

    averaged over the positions where the whole window is inside the image, and over channels; K = 0.01, 0.03.  1 where
    an image is its truth, also a constant one.  The values depend on where 0 is: black, for images in [0, span].

    Args:
        images, truth: (N, H, W) or (N, H, W, channels), of one shape.
        span: as for `psnr`.
        window: pixels along each side, odd, at most H and W; std: of the Gaussian, in pixels, above 0.

    Returns (N,).

    Image Quality Assessment: From Error Visibility to Structural Similarity (Wang et al., IEEE Transactions on Image
    Processing 13 (2004) 600-612), equation 13.

    Raises ValueError for shapes that differ or do not hold a window, and numbers out of range.
    """
    _checked(images, truth, span)
    shape = np.shape(images)
    if len(shape) not in (3, 4):
        raise ValueError(f"images must have shape (N, H, W) or (N, H, W, channels), got {shape}.")
    if window < 1 or window % 2 == 0 or window > min(shape[1:3]):
        raise ValueError(f"window must be odd, from 1 to the sides of {shape[1:3]}, got {window!r}.")
    if not std > 0:
        raise ValueError(f"std must be above 0, got {std!r}.")
    a, b = (points.reshape(shape) for points in vectors(images=images, truth=truth))
    xp = namespace(a, b)
    line = np.exp(-0.5 * ((np.arange(window) - window // 2) / std) ** 2)
    line = line / line.sum()

    def local(x: Array) -> Array:
        for axis in (1, 2):
            count = x.shape[axis] - window + 1
            at = lambda k, x=x, axis=axis, count=count: x[(slice(None),) * axis + (slice(k, k + count),)]
            x = sum(float(w) * at(k) for k, w in enumerate(line))
        return x

    mean_a, mean_b = local(a), local(b)
    # about the images' own means: the squares of bright images would cancel
    da, db = (x - xp.mean(x, axis=(1, 2), keepdims=True) for x in (a, b))
    near_a, near_b = local(da), local(db)
    var_a, var_b, both = local(da**2) - near_a**2, local(db**2) - near_b**2, local(da * db) - near_a * near_b
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    found = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return xp.mean(found.reshape(shape[0], -1), axis=1)


def _checked(images: Array, truth: Array, span: float) -> None:
    if np.shape(images) != np.shape(truth):
        raise ValueError(f"images and truth must have one shape, got {np.shape(images)} and {np.shape(truth)}.")
    if not is_traced(span) and not span > 0:
        raise ValueError(f"span must be above 0, got {span!r}.")
