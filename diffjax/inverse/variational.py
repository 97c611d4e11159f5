"""RED-diff: a measurement solved by optimisation, with the denoiser as the regulariser."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.inverse.measurement import Measurement
from diffjax.inverse.systems import normal_like
from diffjax.levels import (
    CLEAN,
    UNSAVED,
    Array,
    Grid,
    Sample,
    Tree,
    all_finite,
    as_value,
    is_traced,
    remembers,
    value,
)
from diffjax.samplers.sequential import Counter
from diffjax.solvers.arguments import number


def red_diff(
    key: Array,
    denoise: Any,
    measurement: Measurement,
    grid: Grid,
    x: Tree,
    *,
    strength: Array = 0.25,
    optimiser: Any = None,
) -> Sample:
    """The mode of a variational posterior: a gradient step of the loss at every level of the grid, noisiest first.

        -log p(y | mu) + strength (sigma / alpha) sg[eps(x_t) - eps] . mu,     x_t = alpha mu + sigma eps

    sg holds its argument constant: eps(x_t) - eps = (alpha / sigma) (mu - x0(x_t)), so the network is not
    differentiated.  One point, the same for every key up to the noise of the steps: not a draw of the posterior.  For
    Gaussian data of covariance C the regulariser's gradient is ``strength mean_t (sigma^2 / c) (mu - m)``,
    c = alpha^2 C + sigma^2, where the prior's own is ``(mu - m) / C``: no one strength makes it the posterior mean.

    Args:
        measurement: of any operator and noise.
        grid: its steps' starts, at alpha > 0 and sigma > 0.
        x: where mu starts, clean data (for instance ``pseudo_inverse`` of y).
        strength: lambda, at least 0.  The authors' code weighs ``|y - A mu|^2 / 2``, whatever the noise: its 0.25 is
            this one times the noise's variance.
        optimiser: with ``init(x)`` and ``update(gradient, state, x) -> (change, state)``, as optax has them; default
            Adam of rate 0.1.

    Returns a `diffjax.Sample`; one denoiser call a step.

    A Variational Perspective on Solving Inverse Problems with Diffusion Models, arXiv:2305.04391.

    Raises ValueError for a grid that starts a step at alpha = 0 or sigma = 0, and a strength below 0.
    """
    number("strength", strength)
    if remembers(denoise):
        raise ValueError(f"red_diff needs a denoiser that does not remember, got {denoise!r}.")
    if not is_traced(grid) and (np.any(np.asarray(grid.t.alpha) == 0) or np.any(np.asarray(grid.t.sigma) == 0)):
        raise ValueError("the steps of the grid must start at alpha > 0 and sigma > 0.")
    optimiser = adam() if optimiser is None else optimiser
    denoise, x = as_value(denoise), jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf, jnp.float32)), x)
    if hasattr(denoise, "check"):
        denoise.check(grid.t)
    kind = jnp.result_type(*jax.tree.leaves(x))
    levels = jax.tree.map(lambda leaf: jnp.asarray(leaf, kind), grid.t)
    x, measurement = grid.process.enter(x, CLEAN), measurement.under(grid.process)

    def body(carry: tuple, given: tuple) -> tuple:
        mu, state, nfe, failed = carry
        index, level = given
        eps = normal_like(jax.random.fold_in(key, index), mu)
        noisy = jax.tree.map(lambda m, e: (level.alpha * m + level.sigma * e).astype(m.dtype), mu, eps)
        counter = Counter(denoise, None, nfe)
        x0 = counter(noisy, level)
        data = jax.grad(lambda m: -measurement.log_likelihood(m))(mu)
        pull = jax.tree.map(jnp.subtract, mu, x0)  # (sigma / alpha) (eps(x_t) - eps)
        gradient = jax.tree.map(lambda d, p: (d + strength * p).astype(d.dtype), data, pull)
        change, state = optimiser.update(gradient, state, mu)
        mu = jax.tree.map(lambda m, c: (m + c).astype(m.dtype), mu, change)
        failed = jnp.where((failed < 0) & ~all_finite(mu), index, failed)
        return (mu, state, counter.nfe, failed), None

    zero = jnp.zeros((), jnp.int32)
    carry = x, optimiser.init(x), zero, zero - 1
    (mu, _, nfe, failed), _ = jax.lax.scan(body, carry, (jnp.arange(len(grid), dtype=jnp.int32), levels))
    return Sample(grid.process.leave(mu, CLEAN), nfe, nfe, failed, UNSAVED)


def adam(rate: Array = 0.1, first: float = 0.9, second: float = 0.99) -> Adam:
    """Adam, for where optax is not installed.

    Raises ValueError for a rate that is not above 0.
    """
    number("rate", rate, 1e-12)
    return Adam(rate, first, second)


@value
class Adam:
    rate: Array
    first: Array
    second: Array
    factory = "adam"

    def init(self, x: Tree) -> tuple:
        zeros = jax.tree.map(jnp.zeros_like, x)
        return zeros, zeros, jnp.zeros((), jnp.int32)

    def update(self, gradient: Tree, state: tuple, x: Tree) -> tuple[Tree, tuple]:
        del x
        mean, square, count = state
        count = count + 1
        mean = jax.tree.map(lambda m, g: self.first * m + (1 - self.first) * g, mean, gradient)
        square = jax.tree.map(lambda s, g: self.second * s + (1 - self.second) * g**2, square, gradient)
        top, bottom = 1 - self.first**count, 1 - self.second**count
        change = jax.tree.map(lambda m, s: -self.rate * (m / top) / (jnp.sqrt(s / bottom) + 1e-8), mean, square)
        return change, (mean, square, count)
