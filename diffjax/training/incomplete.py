"""Training on measurements that are noisy and lack entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.guidance.energy import noise_levels, noised
from diffjax.levels import Array, Level, as_value, static, value
from diffjax.predictions import Prediction
from diffjax.solvers.arguments import number
from diffjax.training.weightings import unweighted


def incomplete(
    prediction: Prediction,
    apply: Callable[..., Array],
    std: Array,
    *,
    penalty: Array | None = None,
    law: Any = None,
    weighting: Callable[[Level], Array] = unweighted,
) -> Incomplete:
    """The loss ``loss(params, key, x0, y, mask) -> (B,)`` of a denoiser D held against noisy entries y = x_0 + std n.

        loss = weight ( |m (y - D(x_t))|^2 + 2 penalty alpha std^2 sum_i m_i dD_i/dx_i ) / size,
        x_t = alpha x0 + sigma z

    What is noised, x0, decides the penalty.

    * Draws of p(x_0 | y) under the current prior, in rounds of `diffjax.inverse.expectation_maximisation`: penalty
      None.  If the prior is right, (draw, y) has the law of (x_0, y), and the least loss is E[x_0 | x_t].
    * The measurement itself, x0 = y, for a start without a prior: penalty 1.  By Stein's identity the loss is then
      ``|m (x_0 - D)|^2`` up to a constant, and D the denoiser of x_t, whose noise is sigma^2 + alpha^2 std^2.

    In between it trades variance against bias: with exact draws of Gaussian data N(0, v) a penalty p makes the least
    loss ``alpha (v - p std^2) / (alpha^2 v + sigma^2) x_t``, a prior that is too narrow.

    Args:
        prediction, apply: as for `denoising`.
        std: of the noise of y, a number or an array like a sample, at least 0.
        penalty: at least 0; the divergence is estimated by a derivative along one random direction.  None: 0.
        law: of the levels, a quantile function ``(process, u) -> Level``; default times uniform in (0, end).
        weighting: ``level -> number``, of the squared error of x_0.

    Thompson Sampling with Diffusion Generative Prior, arXiv:2301.05182.  (From its description: the paper's
    finite difference is a derivative here; its text with the constants was not at hand.)

    Raises ValueError for a negative penalty.
    """
    if penalty is not None:
        number("penalty", penalty)
    return Incomplete(prediction, law, std, penalty, as_value(weighting), apply)


@value
class Incomplete:
    prediction: Prediction
    law: Any
    std: Array
    penalty: Any
    weighting: Any
    apply: Callable = static()
    factory = "incomplete"

    def __call__(self, params: Any, key: Array, x0: Array, y: Array, mask: Array) -> Array:
        process, count = self.prediction.process, len(x0)
        at, order, drawn, probe = jax.random.split(key, 4)
        u = (jax.random.permutation(order, count) + jax.random.uniform(at, (count,))) / count
        level = noise_levels(process, self.law, u)
        x = jax.vmap(noised, (None, 0, 0, 0))(process, jax.random.split(drawn, count), x0, level)
        denoise = self.prediction.decode(self.apply, params)

        def one(key: Array, x: Array, y: Array, mask: Array, level: Level) -> Array:
            mask = jnp.asarray(mask, x.dtype)
            if self.penalty is None:
                found, change = denoise(x, level), 0.0
            else:
                b = mask * jax.random.rademacher(key, x.shape, x.dtype)
                found, slope = jax.jvp(lambda x: denoise(x, level), (x,), (b,))
                change = 2 * self.penalty * level.alpha * jnp.asarray(self.std, x.dtype) ** 2 * b * slope
            return self.weighting(level) * jnp.mean(mask * (y - found) ** 2 + change)

        return jax.vmap(one)(jax.random.split(probe, count), x, y, mask, level)
