"""Masked tokens as a Markov chain of a fixed number of steps, for trees and particles.

A token is masked by time t with probability t, and stays so; back from t to s every masked token appears with
probability (t - s) / t, drawn from its law given all that is seen.  The reverse chain is a step of the kind that
`diffjax.smc.grow_tree`, ``steer_chain`` and ``branch_chain`` take.  A *conditional* is as in
`diffjax.nongaussian.unmasked`: ``(L,) -> (L, V)`` log-probabilities; a masked token is V.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, as_value, is_traced, static, value
from diffjax.samplers.shared import integer


def unmasking_chain(conditional: Callable[[Array], Array], vocabulary: int, steps: int) -> Unmasking:
    """The reverse chain of masked diffusion at the times 1, (N - 1) / N, .., 0: ``step(key, tokens, depth) -> tokens``.

    At depth i every masked token appears with probability 1 / (N - i), so that none is left at depth N.  Tokens of one
    step are independent given what was seen before it, which is the law of the data only as N grows.

    Args:
        conditional: of each token given those that are seen, as a network or `token_points`.
        vocabulary: V, at least 1.
        steps: N, at least 1.

    Simplified and Generalized Masked Diffusion for Discrete Data, arXiv:2406.04329, has this chain.

    Raises ValueError for sizes below 1.

    >>> chain = unmasking_chain(token_points(np.array([[0, 1], [1, 0]])), 2, 2)
    >>> tokens = chain.root(2)
    >>> for depth in range(2):
    ...     tokens = chain(jax.random.key(depth), tokens, depth)
    >>> bool((tokens < 2).all())
    True
    """
    integer("vocabulary", vocabulary, 1)
    integer("steps", steps, 1)
    return Unmasking(as_value(conditional), vocabulary, steps)


@value
class Unmasking:
    conditional: Any
    vocabulary: int = static()
    steps: int = static()
    factory = "unmasking_chain"

    def root(self, length: int) -> Array:
        """A sequence of which nothing is seen."""
        return jnp.full(length, self.vocabulary, jnp.int32)

    def __call__(self, key: Array, tokens: Array, depth: Array) -> Array:
        when, which = jax.random.split(key)
        appears = jax.random.uniform(when, tokens.shape) * (self.steps - depth) < 1
        drawn = jax.random.categorical(which, self.conditional(tokens), axis=-1).astype(tokens.dtype)
        return jnp.where((tokens == self.vocabulary) & appears, drawn, tokens)

    def completed(self, key: Array, tokens: Array) -> Array:
        """A draw of all that is masked at once, a clean estimate: what rewards of tokens can be asked of."""
        drawn = jax.random.categorical(key, self.conditional(tokens), axis=-1).astype(tokens.dtype)
        return jnp.where(tokens == self.vocabulary, drawn, tokens)


def completed_reward(
    chain: Unmasking, reward: Callable[[Array], Array], key: Array, draws: int = 4, temperature: Array = 1.0
) -> CompletedReward:
    """The value function ``temperature log mean_k exp(reward(x0_k) / temperature)`` of K completed draws.

    For tokens there is no mean of x_0 to judge; the draws, each token from its own law, stand for it.  They are fixed
    by the key and the depth.  Exact where nothing is masked.  One call of the network.

    Raises ValueError for draws below 1 or a temperature that is not above 0.
    """
    integer("draws", draws, 1)
    if not is_traced(temperature) and not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature!r}.")
    return CompletedReward(chain, as_value(reward), key, temperature, draws)


@value
class CompletedReward:
    chain: Any
    reward: Any
    key: Array
    temperature: Array
    draws: int = static()
    factory = "completed_reward"

    def __call__(self, tokens: Array, depth: Array) -> Array:
        keys = jax.random.split(jax.random.fold_in(self.key, depth), self.draws)
        one = lambda key: self.reward(self.chain.completed(key, tokens)) / self.temperature
        return self.temperature * (jax.nn.logsumexp(jax.vmap(one)(keys)) - jnp.log(self.draws))


def token_points(data: Array, weights: Array | None = None, vocabulary: int | None = None) -> TokenPoints:
    """The exact law of each token for data that are one of N sequences: ``(L,) -> (L, V)`` logs.

    Args:
        data: (N, L) integers from 0.
        weights: (N,), default even.
        vocabulary: V, default the largest token + 1.

    Where what is seen fits none of the sequences all tokens are as likely.

    Raises ValueError for data of another shape or kind, or weights that are negative.
    """
    data = np.asarray(data)
    if data.ndim != 2 or not np.issubdtype(data.dtype, np.integer) or data.size == 0 or data.min() < 0:
        raise ValueError(f"data must be (N, L) integers from 0, got {data!r}.")
    vocabulary = int(data.max()) + 1 if vocabulary is None else vocabulary
    if vocabulary <= data.max():
        raise ValueError(f"vocabulary must be above every token, got {vocabulary!r}.")
    weights = np.full(len(data), 1 / len(data)) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != (len(data),) or np.any(weights < 0) or not weights.sum() > 0:
        raise ValueError(f"weights must be {len(data)} numbers, not negative, got {weights!r}.")
    return TokenPoints(data, weights / weights.sum(), vocabulary)


@value
class TokenPoints:
    data: Array
    weights: Array
    vocabulary: int = static()
    factory = "token_points"

    def __call__(self, tokens: Array) -> Array:
        data = jnp.asarray(self.data)
        fits = jnp.all((tokens == self.vocabulary) | (tokens == data), axis=1)
        share = jnp.where(fits, jnp.asarray(self.weights, jnp.result_type(float)), 0.0)
        total = jnp.sum(share)
        chances = jnp.einsum("n,nlk->lk", share, jax.nn.one_hot(data, self.vocabulary, dtype=share.dtype))
        return jnp.log(jnp.where(total > 0, chances / jnp.where(total > 0, total, 1.0), 1 / self.vocabulary))
