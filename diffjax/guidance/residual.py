"""Residual classifier-free guidance: the negative branch is not computed but remembered.

Guidance extrapolates from the noise under a negative condition, eps = eps' + scale (eps(condition) - eps').  Here eps'
is the noise that would lead to a fixed clean estimate r, the *virtual residual noise*

    eps' = delta (x - alpha r) / sigma      so that
    x0 = x0(c) + (scale - 1) (x0(c) - delta r - (1 - delta) x / alpha)

with x0(c) the conditional estimate.  r is the input image ("self-negative", no further network call) or the
estimate under the negative condition at the first level ("onetime-negative", one further call a sample); delta
softens the effect.  With delta = 1 this is classifier-free guidance with the negative estimate replaced by r.

It is meant for few steps at high noise, where negative estimates change little from call to call.  Towards the data
the negative estimate of classifier-free guidance meets the conditional one, so that its effect ends, while r stays
and pushes on: many steps to sigma = 0 with a large scale overshoot.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.corrections.transform import check, evaluations
from diffjax.guidance.conditions import conditioned
from diffjax.levels import Array, Level, Tree, as_value, is_traced, remembers, value


def self_negative(denoise: Any, reference: Tree, scale: Array = 1.0, delta: Array = 1.0) -> SelfNegative:
    """``x0 = x0(c) + (scale - 1) (x0(c) - delta reference - (1 - delta) x / alpha)``: guidance without further calls.

    The reference is the clean input of image-to-image, or what the data look like without a condition (their mean,
    say).  Scale 1 is the conditional model.  Network evaluations: those of ``denoise``.

    Args:
        denoise: a denoiser that does not remember; it need not have a condition.
        reference: clean data, a tree of the state's shape.
        scale: as in `classifier_free`; 1 is no guidance.
        delta: the share of the virtual residual noise; other than 1 only where alpha > 0.

    StreamDiffusion: A Pipeline-level Solution for Real-time Interactive Generation, arXiv:2312.12491
    (self-negative).

    Raises ValueError for a denoiser that remembers, a concrete scale or delta that is not finite and, on a grid that
    starts at alpha = 0, for delta other than 1.
    """
    _check("self_negative", denoise, scale, delta)
    return SelfNegative(as_value(denoise), reference, scale, delta)


def onetime_negative(denoise: Any, null: Tree, level: Level, scale: Array = 1.0, delta: Array = 1.0) -> OnetimeNegative:
    """Classifier-free guidance whose negative estimate is made once a sample, at its first state.

    ``x0 = x0(c) + (scale - 1) (x0(c) - delta r - (1 - delta) x / alpha)``, with r the estimate under the condition
    ``null`` at the state and ``level`` that the sampler begins with.  A denoiser that remembers (r).  Network
    evaluations: those of ``denoise``, and one more a sample.

    Args:
        denoise: a denoiser with a ``condition`` (see `classifier_free`).
        null: the negative condition.
        level: that of the grid's first row, ``grid.start`` or with the sampler's ``start`` ``grid[k:].start``.
        scale: as in `classifier_free`; 1 is no guidance.
        delta: the share of the virtual residual noise; other than 1 only where alpha > 0.

    StreamDiffusion: A Pipeline-level Solution for Real-time Interactive Generation, arXiv:2312.12491
    (onetime-negative).

    Raises ValueError as `self_negative`, for a denoiser without a condition, and on a grid that begins elsewhere.
    """
    _check("onetime_negative", denoise, scale, delta)
    conditioned(denoise, null)  # refuses what has no condition
    return OnetimeNegative(denoise, null, level, scale, delta)


@value
class SelfNegative:
    denoise: Any
    reference: Tree
    scale: Array
    delta: Array
    factory = "self_negative"

    def __call__(self, x: Tree, level: Level) -> Tree:
        return _guided(self.denoise(x, level), self.reference, x, level, self.scale, self.delta)

    @property
    def condition(self) -> Tree:
        return getattr(self.denoise, "condition", None)

    def check(self, t: Level) -> None:
        check(self.denoise, t)
        _check_levels(self.delta, t)

    def evaluations(self, level: Level) -> Array:
        return evaluations(self.denoise, level)


@value
class OnetimeNegative:
    denoise: Any
    null: Tree
    level: Level
    scale: Array
    delta: Array
    factory = "onetime_negative"

    def init(self, x: Tree) -> Tree:
        """The negative estimate at the first state."""
        level = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(*jax.tree.leaves(x))), self.level)
        null = jax.tree.map(lambda new, old: jnp.asarray(new, jnp.result_type(old)), self.null, self.condition)
        x0 = conditioned(self.denoise, null)(x, level)
        return jax.tree.map(lambda leaf, like: jnp.asarray(leaf, jnp.result_type(like)), x0, x)

    def apply(self, x: Tree, level: Level, memory: Tree) -> tuple[Tree, Tree]:
        return _guided(self.denoise(x, level), memory, x, level, self.scale, self.delta), memory

    @property
    def condition(self) -> Tree:
        return self.denoise.condition

    def check(self, t: Level) -> None:
        check(self.denoise, t)
        _check_levels(self.delta, t)
        if not is_traced(t, self.level):
            first = jax.tree.map(lambda leaf: np.asarray(leaf[0]), t)
            if not all(np.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(first[:3], self.level[:3], strict=True)):
                raise ValueError(
                    f"level must be that of the first row, time {first.time!r}, got time {self.level.time!r}."
                )

    @property
    def initial_evaluations(self) -> Array:
        return evaluations(self.denoise, self.level)

    def evaluations(self, level: Level) -> Array:
        return evaluations(self.denoise, level)


def _guided(x0: Tree, reference: Tree, x: Tree, level: Level, scale: Array, delta: Array) -> Tree:
    away = scale - 1
    # at alpha = 0 the check leaves delta = 1 only, and the factor is 0
    start = level.alpha == 0
    raw = jnp.where(start, 0.0, (1 - delta) / jnp.where(start, 1.0, level.alpha))

    def leaf(clean: Array, kept: Array, state: Array) -> Array:
        return (clean + away * (clean - delta * kept - raw * state)).astype(clean.dtype)

    return jax.tree.map(leaf, x0, reference, x)


def _check(name: str, denoise: Any, scale: Array, delta: Array) -> None:
    if remembers(denoise):
        raise ValueError(f"{name} cannot wrap a denoiser that remembers, got {denoise!r}.")
    for what, number in (("scale", scale), ("delta", delta)):
        if not is_traced(number) and not np.all(np.isfinite(number)):
            raise ValueError(f"{what} must be finite, got {number!r}.")


def _check_levels(delta: Array, t: Level) -> None:
    if not is_traced(t, delta) and np.any(np.asarray(t.alpha) == 0) and np.any(np.asarray(delta) != 1):
        raise ValueError(f"delta must be 1 on a grid that starts at alpha = 0, got {delta!r}.")
