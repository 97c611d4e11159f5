"""Epsilon scaling: the noise estimate made smaller, against the exposure bias of sampling."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.corrections.transform import Plain, Remembering, transformed
from diffjax.levels import Array, Level, Tree, is_traced, value


def epsilon_scaled(denoise: Any, scale: Array = 1.005, slope: Array = 0.0) -> Plain | Remembering:
    """``eps <- eps / lambda``, with ``lambda = scale + slope time``.  No further denoiser calls.

    A sampler feeds the network states with a larger variance than those it was trained on, and it answers with too
    much noise; ``lambda >= 1``, mostly a constant a little above 1, takes some of it back.  In terms of the clean
    estimate, ``x0 <- x0 / lambda + (1 - 1 / lambda) x / alpha``; where alpha = 0 there is nothing to change.

    Elucidating the Exposure Bias in Diffusion Models, arXiv:2308.15321.

    Raises ValueError unless scale > 0 and slope is finite.
    """
    if not is_traced(scale, slope) and not (np.all(np.asarray(scale) > 0) and np.all(np.isfinite(slope))):
        raise ValueError(f"need scale > 0 and a finite slope, got scale={scale!r}, slope={slope!r}.")
    return transformed(denoise, EpsilonScale(scale, slope))


@value
class EpsilonScale:
    scale: Array
    slope: Array
    factory = "epsilon_scaled"

    def __call__(self, x: Tree, x0: Tree, level: Level) -> Tree:
        time = jnp.reshape(level.time, jnp.shape(level.time) + (1,) * (jnp.ndim(level.alpha) - jnp.ndim(level.time)))
        excess = 1 - 1 / (self.scale + self.slope * time)
        nothing = level.alpha == 0
        back = jnp.where(nothing, 0.0, excess / jnp.where(nothing, 1.0, level.alpha))
        kept = jnp.where(nothing, 1.0, 1 - excess)
        return jax.tree.map(lambda clean, leaf: (kept * clean + back * leaf).astype(clean.dtype), x0, x)


def variance_gap(states: Tree, level: Level, variance: Array) -> Array:
    """The exposure bias of a sampler at its saved levels: the variance of its states less that of noised data.

    ``var(x_t) - (alpha^2 variance + sigma^2)``, averaged over entries, with ``states`` (samples, levels, ...) as saved
    by ``vmap`` of ``sample(..., save="states").saved`` and ``variance`` that of the data's entries (a number, or of
    the shape of a sample).  Positive where the network is fed noisier states than in training.

    Elucidating the Exposure Bias in Diffusion Models, arXiv:2308.15321.
    """

    def leaf(x: Array) -> Array:
        widen = (Ellipsis,) + (None,) * (x.ndim - 2)
        expected = level.alpha[widen] ** 2 * variance + level.sigma[widen] ** 2
        return jnp.mean(jnp.var(x, axis=0) - expected, axis=tuple(range(1, x.ndim - 1)))

    return jnp.mean(jnp.stack([leaf(x) for x in jax.tree.leaves(states)]), axis=0)
