"""Clean estimates kept in the range of the data: clipping and dynamic thresholding, for every solver."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.corrections.transform import Plain, Remembering, transformed
from diffjax.levels import Array, Level, Tree, is_traced, value


def clipped(denoise: Any, low: Array = -1.0, high: Array = 1.0) -> Plain | Remembering:
    """``x0 <- clip(x0, low, high)``: static thresholding.  No further denoiser calls.

    Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding, arXiv:2205.11487, section 2.3.

    Raises ValueError unless low < high.
    """
    if not is_traced(low, high) and not np.all(np.asarray(low) < np.asarray(high)):
        raise ValueError(f"low must be below high, got low={low!r}, high={high!r}.")
    return transformed(denoise, Clip(low, high))


@value
class Clip:
    low: Array
    high: Array
    factory = "clipped"

    def __call__(self, x: Tree, x0: Tree, level: Level) -> Tree:
        del x, level
        return jax.tree.map(lambda leaf: jnp.clip(leaf, self.low, self.high).astype(leaf.dtype), x0)


def thresholded(
    denoise: Any, quantile: Array = 0.995, bound: Array = 1.0, maximum: Array = np.inf
) -> Plain | Remembering:
    """Dynamic thresholding: ``x0 <- clip(x0, -s, s) bound / s`` with s the ``quantile`` of |x0| over the sample.

    s is at least ``bound`` (data lie in [-bound, bound]; then it is clipping) and at most ``maximum``.  Large guidance
    scales drive x0 out of the data's range; this pulls it back without saturating it.  No further denoiser calls.

    Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding, arXiv:2205.11487, section 2.3;
    DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models, arXiv:2211.01095, section 4.3.

    Raises ValueError unless 0 < quantile <= 1 and 0 < bound <= maximum.
    """
    if not is_traced(quantile, bound, maximum) and not (0 < quantile <= 1 and 0 < bound <= maximum):
        raise ValueError(
            f"need 0 < quantile <= 1 and 0 < bound <= maximum, got {quantile!r}, bound={bound!r}, maximum={maximum!r}."
        )
    return transformed(denoise, Threshold(quantile, bound, maximum))


@value
class Threshold:
    quantile: Array
    bound: Array
    maximum: Array
    factory = "thresholded"

    def __call__(self, x: Tree, x0: Tree, level: Level) -> Tree:
        del x, level
        sizes = jnp.concatenate([jnp.abs(leaf).reshape(-1) for leaf in jax.tree.leaves(x0)])
        s = jnp.clip(jnp.quantile(sizes, self.quantile), self.bound, self.maximum)
        return jax.tree.map(lambda leaf: (jnp.clip(leaf, -s, s) * (self.bound / s)).astype(leaf.dtype), x0)
