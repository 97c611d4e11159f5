"""InvSR: a network of the noise to start from, trained through a frozen denoiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.inverse.partial_inversion import predicted_start
from diffjax.levels import CLEAN, Array, Process, Tree, as_value, remembers, static, value
from diffjax.training.times import MARGIN


def mean_square(a: Tree, b: Tree) -> Array:
    """The mean of (a - b)^2 over all entries of all leaves."""
    squares = jax.tree.leaves(jax.tree.map(lambda u, v: jnp.square(u - v), a, b))
    return sum(leaf.sum() for leaf in squares) / sum(leaf.size for leaf in squares)


def noise_predictor(
    denoise: Any, process: Process, predict: Callable, law: Any, distance: Callable[[Tree, Tree], Array] = mean_square
) -> NoisePredictor:
    """The loss ``loss(params, key, x0, y) -> (B,)`` of a noise predictor: one denoiser call against the data.

        distance(D(x_t), x0),    x_t = alpha y + sigma predict(params, y, t)    with the degraded y in place of x0

    With the mean square the best prediction makes D(x_t) = E[x_0 | y], where the denoiser reaches that: one step from
    there has the least error that there is, and the law of posterior means, not of data.  Each further step costs
    error, and for Gaussian data brings nothing for it, because the start was not made for the flow.  The denoiser's
    parameters are not trained; the gradient goes through it.

    Args:
        denoise: frozen; one that does not remember.
        process: of the denoiser.
        predict: ``predict(params, y, t) -> eps`` of one sample, or `diffjax.inverse.NormalNoise` to draw from.
        law: of the levels to start from (`diffjax.training`: ``uniform(0.1, 0.25)``, ...).
        distance: ``(estimate, x0) -> number``; the paper adds a perceptual distance and an adversarial one.

    Arbitrary-steps Image Super-resolution via Diffusion Inversion, arXiv:2412.09013.

    Raises ValueError for a denoiser that remembers.
    """
    if remembers(denoise):
        raise ValueError(f"noise_predictor needs a denoiser that does not remember, got {denoise!r}.")
    return NoisePredictor(as_value(denoise), process, as_value(law), predict, distance)


@value
class NoisePredictor:
    denoise: Any
    process: Process
    law: Any
    predict: Callable = static()
    distance: Callable = static()
    factory = "noise_predictor"

    def __call__(self, params: Tree, key: Array, x0: Tree, y: Tree) -> Array:
        def one(key: Array, x0: Tree, y: Tree) -> Array:
            key_level, key_noise = jax.random.split(key)
            level = self.law(self.process, jax.random.uniform(key_level, minval=MARGIN, maxval=1 - MARGIN))
            start = predicted_start(self.process, self.predict, params, y, level, key_noise)
            estimate = self.denoise(self.process.enter(start, level), level)
            return self.distance(self.process.leave(estimate, CLEAN), x0)

        return jax.vmap(one)(jax.random.split(key, jax.tree.leaves(x0)[0].shape[0]), x0, y)
