"""Minority guidance: towards data that the model's own denoiser finds hard to reconstruct.

A denoiser favours what is common: noise a rare sample, denoise it, and it comes back as something more common.  The
distance between the two is a score of how rare a sample is, which needs nothing but the denoiser.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.corrections.transform import check, condition_within, evaluations
from diffjax.guidance.tilted import shifted_estimate
from diffjax.levels import Array, Level, Tree, as_value, is_traced, remembers, value


def distance(a: Tree, b: Tree) -> Array:
    """The Euclidean distance over all leaves, whose derivative at 0 is 0."""
    square = sum(jnp.square(x - y).sum() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def minority_score(
    key: Array,
    denoise: Any,
    x0: Tree,
    level: Level,
    draws: int = 1,
    measure: Callable[[Tree, Tree], Array] = distance,
) -> Array:
    """``E d(x_0, denoise(alpha x_0 + sigma eps, level))``: how far a sample is from its own reconstruction.

    Large for rare data.  ``draws`` network evaluations.

    Args:
        key: of the noise.
        denoise: ``(x, level) -> x0``.
        x0: one clean sample.
        level: of the noise; so high that details are lost and the kind of data is not (0.5 to 0.9 of the end).
        draws: of the noise, whose mean is taken.
        measure: the distance of two trees; the papers take LPIPS.

    Don't Play Favorites: Minority Guidance for Diffusion Models, arXiv:2301.12334.
    """
    score = lambda key: measure(x0, denoise(_renoised(key, x0, level), level))
    return jax.vmap(score)(jax.random.split(key, draws)).mean()


def self_minority(
    denoise: Any,
    key: Array,
    level: Level,
    scale: Array = 0.0,
    *,
    at: Array | None = None,
    normalised: bool = True,
    measure: Callable[[Tree, Tree], Array] = distance,
) -> SelfMinority:
    """``x0 + scale sigma^2 / alpha g``, g the gradient in x of ``d(x0(x), stop(x0(renoised x0)))``.

    The clean estimate is noised to ``level`` and denoised again; what this loses is what is rare in it, and the state
    goes where more is lost.  The gradient goes through the first call only.  Under an ancestral step the change is
    ``scale`` times the variance of the step, the paper's schedule.  The noise depends on the key and the state's level
    alone.  Two network evaluations (one of them also backwards) where the guidance acts, one elsewhere.

    Args:
        denoise: a denoiser that does not remember.
        key: of the noise; one for each sample.
        level: to which the estimate is noised again; the paper's is at 0.8 of the steps.
        scale: 0 is no guidance.
        at: the times where the guidance acts, for example ``grid.t.time[::5]`` (intermittent guidance, which costs so
            much less) or those above some time; None: everywhere.
        normalised: divide the gradient by its largest entry, as the paper does.
        measure: the distance of two trees; the paper takes LPIPS.

    At alpha = 0 and at sigma = 0 the estimate is left as it is.

    Self-Guided Generation of Minority Samples Using Diffusion Models, arXiv:2407.11555.

    Raises ValueError for a denoiser that remembers and a concrete scale that is not finite.
    """
    if remembers(denoise):
        raise ValueError(f"self_minority cannot wrap a denoiser that remembers, got {denoise!r}.")
    if not is_traced(scale) and not np.all(np.isfinite(scale)):
        raise ValueError(f"scale must be finite, got {scale!r}.")
    at = None if at is None else jnp.asarray(at, jnp.float32)
    return SelfMinority(
        as_value(denoise), key, level, scale, at, as_value(_unit if normalised else None), as_value(measure)
    )


@value
class SelfMinority:
    denoise: Any
    key: Array
    level: Level
    scale: Array
    at: Array | None
    normalise: Any
    measure: Any
    factory = "self_minority"

    def __call__(self, x: Tree, level: Level) -> Tree:
        if self.at is None:
            return self._guided(x, level)
        # by the level alone, which no batch changes: so the other calls are saved for real
        return jax.lax.cond(self._active(level), self._guided, self.denoise, x, level)

    def _active(self, level: Level) -> Array:
        assert self.at is not None
        return jnp.any(jnp.abs(level.time - self.at) <= 1e-5 * (1e-3 + jnp.abs(self.at)))

    def _guided(self, x: Tree, level: Level) -> Tree:
        key = jax.random.fold_in(self.key, jax.lax.bitcast_convert_type(jnp.float32(level.time), jnp.uint32))
        again = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(*jax.tree.leaves(x))), self.level)

        # by a pull-back instead of stop_gradient, so that the result still has its own derivative in x
        x0, back = jax.vjp(lambda x: self.denoise(x, level), x)
        rebuilt = self.denoise(_renoised(key, x0, again), again)
        (slope,) = back(jax.grad(self.measure)(x0, rebuilt))
        if self.normalise is not None:
            slope = self.normalise(slope)
        return shifted_estimate(x0, slope, level, self.scale)

    condition = property(condition_within)

    def check(self, t: Level) -> None:
        check(self.denoise, t)
        check(self.denoise, jax.tree.map(lambda leaf: np.asarray(leaf)[None], self.level))

    def evaluations(self, level: Level) -> Array:
        """Network evaluations of a call at ``level``."""
        own, again = evaluations(self.denoise, level), evaluations(self.denoise, self.level)
        return own + (again if self.at is None else jnp.where(self._active(level), again, 0))


def _unit(slope: Tree) -> Tree:
    largest = jnp.stack([jnp.abs(leaf).max() for leaf in jax.tree.leaves(slope)]).max()
    return jax.tree.map(lambda leaf: leaf / jnp.where(largest > 0, largest, 1.0), slope)


def _renoised(key: Array, x0: Tree, level: Level) -> Tree:
    leaves, structure = jax.tree.flatten(x0)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        (level.alpha * leaf + level.sigma * jax.random.normal(k, leaf.shape, leaf.dtype)).astype(leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return structure.unflatten(drawn)
