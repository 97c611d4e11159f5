"""A denoiser of patches as a denoiser of images of any size."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.corrections.transform import check, condition_within, evaluations
from diffjax.levels import Array, Level, as_value, remembers, static, value


def patchwise(denoise: Any, patch: int, stride: int) -> Patchwise:
    """The mean of the estimates of all patches that contain a pixel:  ``x0 = sum_p R_p^T D(R_p x) / sum_p R_p^T 1``.

    R_p cuts the patch p out of an image; patches start every ``stride`` pixels, and the last ones end at the border.
    A prior of patches, which can be learned from one photograph, becomes one of images.  With ``stride = patch`` that
    divides the image the patches are independent and the estimate is their exact one; where they overlap it is no
    posterior mean of any law, but has no seams.

    Args:
        denoise: of patches (patch, patch, ...), that does not remember.
        patch, stride: pixels, 1 <= stride <= patch.

    Returns a denoiser of images (H, W, ...) at one noise level; all patches of a call are one batch of the denoiser,
    counted as one evaluation.

    Raises ValueError for a denoiser that remembers, numbers out of range, and images smaller than a patch.

    >>> import diffjax, jax.numpy as jnp
    >>> image = patchwise(diffjax.oracles.gaussian(jnp.zeros((2, 2)), 1.0), 2, 1)
    >>> image(jnp.ones((3, 5)), diffjax.processes.edm().level(1.0)).shape
    (3, 5)
    """
    if remembers(denoise):
        raise ValueError(f"patchwise needs a denoiser that does not remember, got {denoise!r}.")
    if patch < 1 or not 1 <= stride <= patch:
        raise ValueError(f"need patch >= 1 and stride from 1 to patch, got {patch!r} and {stride!r}.")
    return Patchwise(as_value(denoise), patch, stride)


@value
class Patchwise:
    denoise: Any
    patch: int = static()
    stride: int = static()
    factory = "patchwise"

    def __call__(self, x: Array, level: Level) -> Array:
        if x.ndim < 2 or min(x.shape[:2]) < self.patch:
            raise ValueError(f"an image must have at least {self.patch} pixels along two axes, got shape {x.shape}.")
        rows, columns = (_starts(n, self.patch, self.stride) for n in x.shape[:2])
        inside = np.arange(self.patch)
        row = (rows[:, None] + inside)[:, None, :, None]  # (rows, columns, patch, patch)
        column = (columns[:, None] + inside)[None, :, None, :]
        cut = x[row, column]
        every = jax.vmap(jax.vmap(lambda patch: self.denoise(patch, level)))(cut)
        count = np.zeros(x.shape[:2])
        np.add.at(count, np.broadcast_arrays(row, column), 1)
        total = jnp.zeros(x.shape, every.dtype).at[row, column].add(every)
        return total / jnp.asarray(count, total.dtype).reshape(count.shape + (1,) * (x.ndim - 2))

    condition = property(condition_within)

    def check(self, t: Level) -> None:
        check(self.denoise, t)
        if np.ndim(t.alpha) > 1:
            raise ValueError(f"patchwise needs one noise level for the whole image, got {np.shape(t.alpha)[1:]}.")

    def evaluations(self, level: Level) -> Array:
        """Of one patch: how many there are is a matter of the image."""
        return evaluations(self.denoise, level)


def _starts(size: int, patch: int, stride: int) -> np.ndarray:
    """Where patches start along an axis."""
    return np.append(np.arange(0, size - patch, stride), size - patch)
