"""Twists and potentials: what the particles of `diffjax.steer` are weighted by.

A *twist* is a positive function h(x_t, level) that approximates ``E[h(x_0) | x_t]``, a value called as
``twist(denoise, x, level) -> (log_h, x0)``: a number and the plain clean estimate made on the way.  At sigma = 0, where
x0 = x / alpha, it must be the exact log-likelihood or reward.  A method ``gradient(denoise, x, level) -> (log_h, x0,
grad_x log_h)`` replaces automatic differentiation.

A *potential* says how a twist's values become the weights G of the rows: whatever it is, the last one makes their
product h(x_0) exactly, so that all potentials have the same target and differ in when particles are judged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, Level, Tree, as_value, is_traced, value


def reward(function: Callable[[Tree], Array], scale: Array = 1.0, temper: Any = None) -> Reward:
    """The twist ``log h = temper(level) scale reward(x0)`` at the clean estimate x0, for the target p e^{scale reward}.

    Differentiable rewards may also propose (`diffjax.steer` with ``proposal="tilted"``); any other is fine with
    ``proposal="base"``.  One denoiser call.

    Args:
        function: ``x0 -> number``.  -inf excludes a sample, and a path whose clean estimate passes there; ``temper`` 0
            keeps such paths.
        scale: 1 / temperature; lambda of FK steering.
        temper: ``level -> number`` in [0, 1] that softens the reward where x0 says little; 1 at sigma = 0 whatever it
            returns.  Default 1 everywhere.

    Raises ValueError if ``function`` is not callable or a concrete scale is not finite.
    """
    if not callable(function) or not (temper is None or callable(temper)):
        raise ValueError(f"function and temper must be callable, got {function!r} and {temper!r}.")
    if not is_traced(scale) and not np.all(np.isfinite(scale)):
        raise ValueError(f"scale must be finite, got {scale!r}.")
    return Reward(as_value(function), scale, as_value(temper))


@value
class Reward:
    function: Any
    scale: Array
    temper: Any
    factory = "reward"

    def __call__(self, denoise: Any, x: Tree, level: Level) -> tuple[Array, Tree]:
        x0 = denoise(x, level)
        log_h = self.scale * self.function(x0)
        if self.temper is not None:
            share = jnp.where(jnp.all(level.sigma == 0), 1.0, self.temper(level))
            log_h = jnp.where(share == 0, 0.0, share * jnp.where(share == 0, 0.0, log_h))
        return log_h, x0


# --- potentials ---------------------------------------------------------------------------------------------------


def difference() -> Difference:
    """``G_t = h(x_t) / h(x_before)``: the weights of twisted sequential Monte Carlo, and "diff" of FK steering.

    A General Framework for Inference-time Scaling and Steering of Diffusion Models, arXiv:2501.06848.
    """
    return Difference()


def maximum() -> Maximum:
    """``log G_t = max_{s >= t} log h(x_s)``: prefers particles that promised much once.

    A General Framework for Inference-time Scaling and Steering of Diffusion Models, arXiv:2501.06848.
    """
    return Maximum()


def total() -> Total:
    """``log G_t = sum_{s >= t} log h(x_s)``: prefers particles that promise much for long.

    A General Framework for Inference-time Scaling and Steering of Diffusion Models, arXiv:2501.06848.
    """
    return Total()


@value
class Difference:
    """``step(log_h, paid, memory) -> (log G, memory)``, ``paid`` the logarithm of the product of the G so far."""

    factory = "difference"
    telescopes = True  # the product so far is h at the state: it can be made anew for a state that has moved

    def init(self, like: Array) -> Array:
        return jnp.zeros_like(like)

    def step(self, log_h: Array, paid: Array, memory: Array) -> tuple[Array, Array]:
        return owed(log_h, paid), memory


@value
class Maximum:
    factory = "maximum"
    telescopes = False

    def init(self, like: Array) -> Array:
        return jnp.full_like(like, -jnp.inf)

    def step(self, log_h: Array, paid: Array, memory: Array) -> tuple[Array, Array]:
        best = jnp.maximum(memory, log_h)
        return best, best


@value
class Total:
    factory = "total"
    telescopes = False

    def init(self, like: Array) -> Array:
        return jnp.zeros_like(like)

    def step(self, log_h: Array, paid: Array, memory: Array) -> tuple[Array, Array]:
        return memory + log_h, memory + log_h


def owed(log_h: Array, paid: Array) -> Array:
    """``log_h - paid``: -inf for a particle whose product has been zero before, not NaN."""
    return jnp.where(paid == -jnp.inf, -jnp.inf, log_h - jnp.where(paid == -jnp.inf, 0.0, paid))
