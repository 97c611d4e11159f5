"""Distilled-in guidance: a student that is told the scale, and gives the guided estimate in one evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.guidance.energy import noise_levels, noised
from diffjax.levels import Array, Level, Tree, static, value
from diffjax.predictions import Prediction


def guidance_distillation(
    prediction: Prediction,
    apply: Callable[..., Tree],
    teacher: Callable[[Tree, Array], Any],
    low: float = 1.0,
    high: float = 5.0,
    *,
    law: Any = None,
    weighting: Callable[[Level], Array] | None = None,
) -> GuidanceDistillation:
    """The loss ``loss(params, key, x0, condition) -> (B,)`` of a student that is told the scale w of the guidance.

        loss = weight(level) mean( (x0_student(x_t, t, (condition, w)) - x0_teacher(x_t, t, condition; w))^2 )

    with w uniform in [low, high].  A student of enough capacity is the guided denoiser at every scale, with one
    evaluation a call: ``prediction.decode(apply, params, (condition, w))``.

    Args:
        prediction: what the student's network predicts.
        apply: ``apply(params, x, t, (condition, w))``, for example a `diffjax.networks` network with
            ``condition=(label(n), vector(1))`` behind a function that reshapes w.
        teacher: ``teacher(condition, w) -> denoiser``, for example a `classifier_free` one.
        low, high: the scales (1 is the conditional model; the paper's w is one less).
        law: of the levels, a quantile function ``(process, u) -> Level``; default times uniform in (0, end).
        weighting: ``weighting(level) -> number``; default ``max(SNR, 1)``, the paper's, which is the larger of the
            squared errors of x_0 and of the noise.

    On Distillation of Guided Diffusion Models, arXiv:2210.03142 (stage one).

    Raises ValueError unless low < high.
    """
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ValueError(f"needs finite low < high, got low={low!r}, high={high!r}.")
    weighting = truncated_snr if weighting is None else weighting
    return GuidanceDistillation(prediction, law, low, high, apply, teacher, weighting)


def truncated_snr(level: Level) -> Array:
    """``max(alpha^2 / sigma^2, 1)``, at most 1e4."""
    return jnp.clip(jnp.exp(2 * level.half_log_snr), 1.0, 1e4)


@value
class GuidanceDistillation:
    prediction: Prediction
    law: Any
    low: Array
    high: Array
    apply: Callable = static()
    teacher: Callable = static()
    weighting: Callable = static()
    factory = "guidance_distillation"

    def __call__(self, params: Tree, key: Array, x0: Tree, condition: Tree) -> Array:
        process = self.prediction.process
        count = jax.tree.leaves(x0)[0].shape[0]
        at, order, drawn, scale_key = jax.random.split(key, 4)
        u = (jax.random.permutation(order, count) + jax.random.uniform(at, (count,))) / count
        level = noise_levels(process, self.law, u)
        scale = self.low + (self.high - self.low) * jax.random.uniform(scale_key, (count,))
        x = jax.vmap(noised, (None, 0, 0, 0))(process, jax.random.split(drawn, count), x0, level)

        def one(x: Tree, level: Level, condition: Tree, scale: Array) -> Array:
            wanted = jax.lax.stop_gradient(self.teacher(condition, scale)(x, level))
            found = self.prediction.decode(self.apply, params, (condition, scale))(x, level)
            squares = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.square(a - b), found, wanted))
            mean = sum(leaf.sum() for leaf in squares) / sum(leaf.size for leaf in squares)
            return self.weighting(level) * mean

        return jax.vmap(one)(x, level, condition, scale)
