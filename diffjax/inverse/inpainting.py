"""Twists for what is known exactly: the last step of sequential Monte Carlo puts it in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffjax.guidance.tilted import twist_gradient
from diffjax.inverse.filters import log_normal, minus_constant, noise_to_signal
from diffjax.inverse.measurement import Measurement
from diffjax.inverse.operators import pseudo_inverse
from diffjax.inverse.systems import needs_spectrum, noise_variance
from diffjax.inverse.twists import mmps
from diffjax.levels import Array, Level, Tree, value


def inpainting(measurement: Measurement, twist: Any = None) -> Inpainting:
    """A twist for entries, or a linear measurement, that are known exactly: ``x_0 = x0 + A^+ (y - A x0)`` at the end.

    Above sigma = 0 it is ``twist``.  A step to sigma = 0 adds no noise, and no x0 of a particle meets an exact y.  In
    `diffjax.steer` the seen part of that step is drawn as if with std sigma_t / alpha_t instead, given y: so it is y,
    and the weight is ``N(A^+ y; x0, (sigma_t / alpha_t)^2)`` over the seen directions.  Noise above 0 leaves ``twist``
    as it is.

    Args:
        measurement: of an operator with a spectrum (a `mask`: inpainting) and isotropic noise, usually 0.
        twist: of the same measurement, for the levels above 0; default `mmps`.

    Practical and Asymptotically Exact Conditional Sampling in Diffusion Models, arXiv:2306.17775, section 3.3
    (inpainting).

    Raises ValueError for an operator without a spectrum or noise that is not isotropic.
    """
    needs_spectrum("inpainting", measurement)
    return Inpainting(measurement, mmps(measurement) if twist is None else twist)


@value
class Inpainting:
    measurement: Any
    twist: Any
    factory = "inpainting"

    def __call__(self, denoise: Any, x: Tree, level: Level) -> tuple[Array, Tree]:
        return self.twist(denoise, x, level)

    def gradient(self, denoise: Any, x: Tree, level: Level) -> tuple[Array, Tree, Tree]:
        """``(log_h, x0, grad log h)`` of the twist."""
        return twist_gradient(denoise, self.twist, x, level)

    def check(self, t: Level) -> None:
        if hasattr(self.twist, "check"):
            self.twist.check(t)

    def settle(self, x0: Tree, level: Level) -> tuple[Tree, Array]:
        """``(x_0, log h)`` for a clean estimate made at a level, in the step to sigma = 0."""
        seen, a = self.measurement, self.measurement.operator
        exact = noise_variance(seen, x0) == 0
        missing = pseudo_inverse(a, seen.residual(x0))
        spread = noise_to_signal(level)
        log_h = log_normal(a, missing, lambda q: q > 0, lambda q: jnp.broadcast_to(spread, jnp.shape(q)))
        log_h = jnp.where(exact, log_h - minus_constant(self, x0), seen.log_likelihood(x0))
        filled = jax.tree.map(lambda leaf, c: jnp.where(exact, leaf + c, leaf).astype(leaf.dtype), x0, missing)
        return filled, log_h
