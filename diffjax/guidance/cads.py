"""CADS: noise in the condition, most at high noise, so that a strongly guided sampler stays diverse."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.corrections.transform import check_within, evaluations_within
from diffjax.guidance.conditions import conditioned
from diffjax.guidance.schedules import noise_share
from diffjax.levels import Array, Level, Tree, is_traced, key_at, remembers, value


def cads(denoise: Any, key: Array, noise: Array = 0.25, low: Array = 0.6, high: Array = 0.9, mix: Array = 1.0) -> Cads:
    """``denoise`` under the condition ``sqrt(g) y + noise sqrt(1 - g) z``, brought back to y's mean and deviation.

    g is 1 at levels whose share of noise u = sigma / (alpha + sigma) is at most ``low``, 0 from ``high`` on and linear
    between.  With y' the noised condition, ``y_new = mix r + (1 - mix) y'``, r = (y' - mean(y')) std(y) / std(y') +
    mean(y), leaf by leaf; r = y where y' has no deviation.  z is new at every level and the same for all states of a
    level.  noise 0 with mix 1 leaves the condition as it is.  Composes with `classifier_free` and all that goes through
    it: the condition that is noised is the innermost one (`conditioned`), the null stays.

    Args:
        denoise: a denoiser with a condition of floating-point numbers (an embedding) somewhere inside.
        key: one key a sample: ``vmap(lambda key: sample(key, cads(guided, jax.random.fold_in(key, 1)), ...))``.
        noise: the paper's s, at least 0.
        low, high: 0 <= low <= high <= 1, the paper's tau_1 and tau_2.
        mix: the paper's psi, in [0, 1].

    CADS: Unleashing the Diversity of Diffusion Models through Condition-Annealed Sampling, arXiv:2310.17347.

    Raises ValueError for a denoiser that remembers, one without a condition or with integers in it, and numbers out
    of range.
    """
    if remembers(denoise):
        raise ValueError(f"cads cannot wrap a denoiser that remembers, got {denoise!r}: put it around the inner one.")
    condition = getattr(denoise, "condition", None)
    if condition is None or not all(
        jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in jax.tree.leaves(condition)
    ):
        raise ValueError(f"cads needs a denoiser with a floating-point condition (an embedding), got {denoise!r}.")
    if not is_traced(noise) and not (np.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise must be at least 0, got {noise!r}.")
    if not is_traced(low, high) and not 0 <= low <= high <= 1:
        raise ValueError(f"need 0 <= low <= high <= 1, got low={low!r}, high={high!r}.")
    if not is_traced(mix) and not 0 <= mix <= 1:
        raise ValueError(f"mix must be in [0, 1], got {mix!r}.")
    return Cads(denoise, key, noise, low, high, mix)


@value
class Cads:
    denoise: Any
    key: Array
    noise: Array
    low: Array
    high: Array
    mix: Array
    factory = "cads"

    def __call__(self, x: Tree, level: Level) -> Tree:
        return conditioned(self.denoise, self.noised(level))(x, level)

    def noised(self, level: Level) -> Tree:
        """The condition at a level."""
        share = jnp.max(jnp.asarray(noise_share(level)))
        width = jnp.asarray(self.high - self.low)
        ramp = jnp.where(width > 0, (self.high - share) / jnp.where(width > 0, width, 1.0), share <= self.low)
        g = jnp.clip(ramp, 0.0, 1.0)
        leaves, structure = jax.tree.flatten(self.condition)
        keys = jax.random.split(key_at(self.key, level), len(leaves))
        return structure.unflatten([self._leaf(k, jnp.asarray(y), g) for k, y in zip(keys, leaves, strict=True)])

    def _leaf(self, key: Array, y: Array, g: Array) -> Array:
        z = jax.random.normal(key, y.shape, y.dtype)
        noised = jnp.sqrt(g) * y + self.noise * jnp.sqrt(1 - g) * z
        spread = jnp.std(noised)
        flat = spread <= 8 * jnp.finfo(y.dtype).eps * jnp.max(jnp.abs(noised))
        factor = jnp.std(y) / jnp.where(flat, 1.0, spread)
        back = jnp.where(flat | (jnp.asarray(self.noise) == 0), y, (noised - jnp.mean(noised)) * factor + jnp.mean(y))
        new = self.mix * back + (1 - self.mix) * noised
        return jnp.where(g == 1, y, new).astype(y.dtype)

    @property
    def condition(self) -> Tree:
        return self.denoise.condition

    check = check_within
    evaluations = evaluations_within
