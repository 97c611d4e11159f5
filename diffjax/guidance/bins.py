"""Classifiers of noisy data into bins of a score, and the potentials that they give.

A score of clean data (a reward, how rare they are) is cut at edges into K bins, and a network learns the law of the bin
given the noisy state by cross entropy.  That law gives two potentials: the log-probability of a chosen bin, and the
log-expectation of exp(eta score), which is the *optimal* classifier guidance towards p(x) exp(eta score).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.guidance.energy import noise_levels, noised
from diffjax.levels import Array, Level, Process, Tree, is_traced, static, value


def bins(edges: Array, scores: Array) -> Array:
    """The bin 0 .. K - 1 of each score, K - 1 increasing ``edges``: the number of edges at or below it."""
    return jnp.searchsorted(jnp.asarray(edges), scores, side="right")


def quantile_edges(scores: Array, count: int) -> Array:
    """The ``count - 1`` edges that cut scores into ``count`` bins of equal numbers.

    >>> quantile_edges(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), 2)
    Array([3.], dtype=float32)
    """
    if count < 2:
        raise ValueError(f"count must be at least 2 bins, got {count!r}.")
    return jnp.quantile(jnp.asarray(scores, jnp.float32), jnp.arange(1, count) / count)


def bin_probability(apply: Callable[..., Array], params: Tree, process: Process, bin: Array) -> BinProbability:
    """The potential ``log p(bin | x_t)`` of a classifier ``apply(params, x, network time) -> (K,)`` logits.

    With bins of the minority score (`minority_score`) guidance towards a high bin makes rare data.

    Don't Play Favorites: Minority Guidance for Diffusion Models, arXiv:2301.12334 (the ordinal classifier).
    """
    return BinProbability(params, process, bin, apply)


@value
class BinProbability:
    params: Tree
    process: Process
    bin: Array
    apply: Callable = static()
    factory = "bin_probability"

    def __call__(self, x: Tree, level: Level) -> Array:
        return jax.nn.log_softmax(self.apply(self.params, x, self.process.network_time(level)))[self.bin]


def expected_tilt(
    apply: Callable[..., Array], params: Tree, process: Process, rewards: Array, eta: Array = 1.0
) -> ExpectedTilt:
    """The potential ``log sum_k p(bin k | x_t) exp(eta rewards[k])``, which is log E[exp(eta r(x_0)) | x_t].

    Another eta, also after training, is another number and nothing else.

    Args:
        apply: the classifier ``apply(params, x, network time) -> (K,)`` logits.
        rewards: (K,), what stands for each bin: its middle, or its mean.
        eta: strength of the tilt, the inverse of the KL regularisation.

    Efficient Controllable Diffusion via Optimal Classifier Guidance, arXiv:2505.21666.
    """
    return ExpectedTilt(params, process, rewards, eta, apply)


@value
class ExpectedTilt:
    params: Tree
    process: Process
    rewards: Array
    eta: Array
    apply: Callable = static()
    factory = "expected_tilt"

    def __call__(self, x: Tree, level: Level) -> Array:
        logs = jax.nn.log_softmax(self.apply(self.params, x, self.process.network_time(level)))
        return jax.nn.logsumexp(logs + self.eta * jnp.asarray(self.rewards, logs.dtype))


def bin_loss(process: Process, apply: Callable[..., Array], law: Any = None) -> BinLoss:
    """The cross entropy ``loss(params, key, x0, bins) -> (B,)`` of a classifier of noised data into bins.

    ``law`` is that of the levels, a quantile function ``(process, u) -> Level``; default times uniform in (0, end).
    """
    return BinLoss(process, law, apply)


@value
class BinLoss:
    process: Process
    law: Any
    apply: Callable = static()
    factory = "bin_loss"

    def __call__(self, params: Tree, key: Array, x0: Tree, bins: Array) -> Array:
        count = bins.shape[0]
        at, order, drawn = jax.random.split(key, 3)
        u = (jax.random.permutation(order, count) + jax.random.uniform(at, (count,))) / count
        level = noise_levels(self.process, self.law, u)
        x = jax.vmap(noised, (None, 0, 0, 0))(self.process, jax.random.split(drawn, count), x0, level)
        return jax.vmap(cross_entropy, (None, None, None, 0, 0, 0))(self.apply, params, self.process, x, level, bins)


def cross_entropy(apply: Callable, params: Tree, process: Process, x: Tree, level: Level, bin: Array) -> Array:
    """``-log p(bin | x_t)`` of one noisy sample."""
    return -bin_probability(apply, params, process, bin)(x, level)


def check_edges(edges: Array) -> None:
    """ValueError unless concrete edges increase."""
    if not is_traced(edges) and not (np.ndim(edges) == 1 and np.all(np.diff(np.asarray(edges, np.float64)) > 0)):
        raise ValueError(f"edges must be an increasing array, got {edges!r}.")
