"""A prior learned from measurements alone, by expectation maximisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array
from diffjax.oracles.gaussian import Gaussian, gaussian


def expectation_maximisation(
    key: Array,
    prior: Any,
    seen: Callable[[Array], Any],
    count: int,
    draw: Callable[[Array, Any, Any], Array],
    fit: Callable[[Array, Any, Array], Any],
    rounds: int,
) -> tuple[Any, Array]:
    """Draw x from p(x | y) under the current prior for every measurement, fit the prior to the draws, and again.

        x_i ~ p_k(x | y_i),     p_{k+1} = argmax_p mean_i log p(x_i)

    The likelihood of the measurements does not fall in a round, up to the errors of the draws and of the fit.

    Args:
        prior: a denoiser that is a pytree (network, oracle), to start from; `fit_gaussian` of rough guesses does.
        seen: ``index -> measurement`` of the index-th observation (traced), each with its own operator or mask.
        count: of the observations.
        draw: ``(key, prior, measurement) -> x``, a posterior sampler; it runs under jit and vmap, for instance
            `diffjax.sample` of the `diffjax.guidance.tilted` prior with the twist `mmps`.
        fit: ``(key, prior, samples) -> prior``, the samples (count, ...): some epochs of denoising score matching from
            the last parameters, or `fit_gaussian`.  It is not compiled here.
        rounds: at least 1.

    Returns the last prior, and the draws that it was fitted to.

    Learning Diffusion Priors from Observations by Expectation Maximization, arXiv:2405.13712.

    Raises ValueError for rounds or count below 1.
    """
    if rounds < 1 or count < 1:
        raise ValueError(f"need rounds >= 1 and count >= 1, got {rounds!r} and {count!r}.")
    indices = jnp.arange(count, dtype=jnp.int32)
    expectation = jax.jit(lambda keys, prior: jax.vmap(lambda key, index: draw(key, prior, seen(index)))(keys, indices))
    samples = None
    for index in range(rounds):
        first, second = jax.random.split(jax.random.fold_in(key, index))
        samples = expectation(jax.random.split(first, count), prior)
        prior = fit(second, prior, samples)
    return prior, samples


def fit_gaussian(key: Array, prior: Any, samples: Array) -> Gaussian:
    """The Gaussian of the greatest likelihood, ``N(mean, covariance)`` of the samples (N, ...), as an oracle.

    The maximisation step in closed form, and the warm start of a learned prior; ``key`` and ``prior`` are not used.
    """
    del key, prior
    flat = np.asarray(samples, np.float64).reshape(len(samples), -1)
    covariance = np.cov(flat, rowvar=False, bias=True)
    shape = np.shape(samples)[1:]
    return gaussian(flat.mean(axis=0).reshape(shape), covariance.reshape(() if shape == () else (flat.shape[1],) * 2))
