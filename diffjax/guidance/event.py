"""Event guidance: samples of which a function exceeds a threshold, with the probability of the event at every level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.guidance.tilted import Tilted, tilted
from diffjax.levels import Array, Level, Tree, as_value, dot, is_traced, value


def event_guided(denoise: Any, constraint: Callable[[Tree], Array], threshold: Array = 0.0, scale: Any = 1.0) -> Tilted:
    """``x0 + scale sigma^2 / alpha grad_x log P(C(x_0) > threshold | x_t)``, samples of the event (`event`).

    Args:
        denoise: a denoiser that does not remember.
        constraint: C, of a clean sample, a differentiable scalar; best a value.
        threshold: what C is to exceed.
        scale: 1 is the conditional law, as far as x_0 given x_t is Gaussian; 0 is ``denoise``.

    Network evaluations: those of ``denoise`` (derivatives, here up to the second, are not counted).

    User-defined Event Sampling and Uncertainty Quantification in Diffusion Models for Physical Dynamical Systems,
    arXiv:2306.07526.

    Raises ValueError as `tilted` and `event`.
    """
    return tilted(denoise, event(constraint, threshold), scale)


def event(constraint: Callable[[Tree], Array], threshold: Array = 0.0) -> Event:
    """The twist ``log h = log Phi((C(x0) - threshold) / sqrt(grad C . S grad C))``, S the covariance of x_0 given x_t.

    ``S = sigma^2 / alpha dx0/dx`` is that of the exact denoiser (with the score s, ``sigma^2 / alpha^2 (I + sigma^2
    ds/dx)``), and C is linear at x0: exact for Gaussian data and a linear C, and for any data as the noise goes to 0.
    One vector-Jacobian product a call.  ``exp(log h)`` is the probability of the event given the state.  At sigma = 0 h
    is 1 or 0; at alpha = 0, where S is not to be had from dx0/dx = 0, it is 1.

    For a bare set of points S falls faster than sigma^2 between them, so that h is far too small where only another
    point is in the event, and its gradient (of S more than of C) has no bound.  Where the variance of C is below
    rounding, eps^2 (sigma / alpha)^2 |grad C|^2, x0 counts as known, as at sigma = 0: draws stay finite, but many miss
    a rare event.  Data with some width, as noise of observation gives, are followed much better.

    User-defined Event Sampling and Uncertainty Quantification in Diffusion Models for Physical Dynamical Systems,
    arXiv:2306.07526.

    Raises ValueError for a threshold that is not finite.
    """
    if not is_traced(threshold) and not np.isfinite(threshold):
        raise ValueError(f"threshold must be finite, got {threshold!r}.")
    return Event(as_value(constraint), threshold)


@value
class Event:
    constraint: Any
    threshold: Array
    factory = "event"

    def __call__(self, denoise: Any, x: Tree, level: Level) -> tuple[Array, Tree]:
        x0, pull = jax.vjp(lambda x: denoise(x, level), x)
        number, slope = jax.value_and_grad(self.constraint)(x0)
        start, still = jnp.asarray(level.alpha == 0), jnp.asarray(level.sigma == 0)
        alpha = jnp.where(start, 1.0, level.alpha)
        factor, square = level.sigma**2 / alpha, dot(slope, slope)
        variance = factor * dot(slope, pull(slope)[0])
        rounding = jnp.finfo(square.dtype).eps ** 2 * factor / alpha * square
        known = (variance > jax.lax.stop_gradient(rounding)) & ~start & ~still
        margin = (number - self.threshold) / jnp.sqrt(jnp.where(known, variance, 1.0))
        log_h = jax.scipy.special.log_ndtr(jnp.where(known, margin, 0.0))
        certain = jnp.where(number > self.threshold, 0.0, -jnp.inf)
        return jnp.where(known, log_h, jnp.where(start, 0.0, certain)), x0
