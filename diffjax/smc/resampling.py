"""Resampling: N weighted particles become N equally weighted ones, with E[copies of i] = N w_i.

A resampler is a value ``(key, log_weights) -> ancestors``, both of shape (N,): slot k takes the place of particle
``ancestors[k]``.  Log-weights need not be normalised; ``-inf`` is a weight of zero, which is never chosen.  Where all
are -inf there is nothing to choose from, and every particle is its own ancestor: `effective_size` is 0 then, and
`log_mean` -inf.

With gradients, a choice is not differentiable.  `scored` keeps the choice and gives the weights the gradient that the
choice does not have; `transported` moves the particles instead, smoothly, at the price of a bias.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffjax.levels import Array, static, value
from diffjax.solvers.arguments import integer, number

# --- weights ------------------------------------------------------------------------------------------------------


def log_mean(log_weights: Array) -> Array:
    """``log(mean_i exp(log_weights_i))``; -inf where all weights are zero.

    >>> log_mean(jnp.full(3, -jnp.inf))
    Array(-inf, dtype=float32)
    """
    return jax.nn.logsumexp(log_weights) - jnp.log(jnp.asarray(log_weights.size, log_weights.dtype))


def effective_size(log_weights: Array) -> Array:
    """Kish's effective sample size ``(sum w)^2 / sum w^2``, between 1 and N; 0 where all weights are zero.

    >>> effective_size(jnp.log(jnp.array([0.5, 0.5, 0.0])))
    Array(2., dtype=float32)
    """
    top = jnp.max(log_weights)
    weights = jnp.exp(log_weights - jnp.where(top == -jnp.inf, 0.0, top))
    squares = jnp.sum(weights**2)
    return jnp.where(top == -jnp.inf, 0.0, jnp.sum(weights) ** 2 / jnp.where(squares == 0, 1.0, squares))


def normalised(log_weights: Array) -> Array:
    """Weights that sum to 1; all 0 where all log-weights are -inf."""
    top = jnp.max(log_weights)
    weights = jnp.exp(log_weights - jnp.where(top == -jnp.inf, 0.0, top))
    return weights / jnp.where(top == -jnp.inf, 1.0, jnp.sum(weights))


# --- the schemes --------------------------------------------------------------------------------------------------


def multinomial() -> Multinomial:
    """N independent choices: ``P(ancestor = i) = w_i``.  The most variable scheme, and the one of most theorems."""
    return Multinomial()


def stratified() -> Stratified:
    """One uniform number in each of N equal strata: copies of i number within 2 of N w_i."""
    return Stratified()


def systematic() -> Systematic:
    """One uniform number moved through N equal strata: i has floor(N w_i) or ceil(N w_i) copies.

    ``ancestors[k] = min {i : w_1 + .. + w_i > (k + u) / N}``.  The cheapest, O(N), and the default.

    >>> systematic()(jax.random.key(0), jnp.log(jnp.array([0.5, 0.0, 0.5, 0.0])))
    Array([0, 0, 2, 2], dtype=int32)
    """
    return Systematic()


def residual() -> Residual:
    """floor(N w_i) copies of i for certain, and the rest of the places by `multinomial` with what is left of w."""
    return Residual()


def ssp() -> SSP:
    """Srinivasan sampling process: floor(N w_i) or ceil(N w_i) copies, negatively associated.

    The fractional parts are settled in pairs: of two, p and q, one becomes 0 (p + q < 1) or 1 (else), with the
    probability that keeps both means, and the other keeps the rest.  N sequential steps: for small N.
    """
    return SSP()


@value
class Multinomial:
    factory = "multinomial"

    def __call__(self, key: Array, log_weights: Array) -> Array:
        places = jax.random.uniform(key, log_weights.shape, log_weights.dtype)
        return _checked(log_weights, _inverse(normalised(log_weights), places))


@value
class Stratified:
    factory = "stratified"

    def __call__(self, key: Array, log_weights: Array) -> Array:
        count = log_weights.size
        within = jax.random.uniform(key, (count,), log_weights.dtype)
        places = (jnp.arange(count, dtype=within.dtype) + within) / count
        return _checked(log_weights, _inverse(normalised(log_weights), places))


@value
class Systematic:
    factory = "systematic"

    def __call__(self, key: Array, log_weights: Array) -> Array:
        count = log_weights.size
        share = jax.random.uniform(key, (), log_weights.dtype)
        sums = _sums(normalised(log_weights))
        # the places below the sum up to i are those k with k + u < N sum
        below = jnp.clip(jnp.ceil(count * sums - share), 0, count).astype(jnp.int32)
        return _checked(log_weights, _repeated(jnp.diff(below, prepend=0), count))


@value
class Residual:
    factory = "residual"

    def __call__(self, key: Array, log_weights: Array) -> Array:
        count = log_weights.size
        whole, rest = _split(normalised(log_weights))
        sure = _repeated(whole, count)
        total = jnp.sum(rest)
        places = jax.random.uniform(key, (count,), log_weights.dtype)
        drawn = _inverse(rest / jnp.where(total > 0, total, 1.0), places)
        return _checked(log_weights, jnp.where(jnp.arange(count) < jnp.sum(whole), sure, drawn))


@value
class SSP:
    factory = "ssp"

    def __call__(self, key: Array, log_weights: Array) -> Array:
        count = log_weights.size
        whole, rest = _split(normalised(log_weights))
        coins = jax.random.uniform(key, (count,), rest.dtype)
        zero = jnp.zeros((), jnp.int32)

        def settle(carry: tuple[Array, Array], item: tuple[Array, Array, Array]) -> tuple[Any, tuple[Array, Array]]:
            (held, p), (index, q, coin) = carry, item
            both = p + q
            up = both >= 1
            # the chance that it is the held one that is settled: at 1 if up, else at 0
            chance = jnp.where(up, (1 - q) / jnp.where(up, 2 - both, 1.0), q / jnp.where(both > 0, both, 1.0))
            first = coin < jnp.where(up & (both >= 2), 1.0, chance)
            settled, kept = jnp.where(first, held, index), jnp.where(first, index, held)
            left = jnp.where(up, both - 1, both)
            return (kept, left), (settled, up.astype(jnp.int32))

        items = (jnp.arange(1, count, dtype=jnp.int32), rest[1:], coins[1:])
        (last, _), (settled, ups) = jax.lax.scan(settle, (zero, rest[0]), items)
        copies = whole.at[settled].add(ups)
        # the last fraction is 0 or 1 but for rounding: it is what brings the number of copies to N
        copies = copies.at[last].add((count - jnp.sum(copies)).astype(jnp.int32))
        return _checked(log_weights, _repeated(jnp.maximum(copies, 0), count))


def _split(weights: Array) -> tuple[Array, Array]:
    """``(floor(N w), N w - floor(N w))``."""
    expected = weights.size * weights
    # a weight of exactly 1/N, that rounding left short of it, is one copy
    whole = jnp.floor(expected + 4 * jnp.finfo(weights.dtype).eps * jnp.maximum(expected, 1.0))
    return whole.astype(jnp.int32), jnp.maximum(expected - whole, 0.0)


def _sums(weights: Array) -> Array:
    """Cumulative sums that end in exactly 1."""
    sums = jnp.cumsum(weights)
    return sums / jnp.where(sums[-1] > 0, sums[-1], 1.0)


def _inverse(weights: Array, places: Array) -> Array:
    """The first i whose cumulative weight is above the place in [0, 1)."""
    below = 1 - jnp.finfo(places.dtype).epsneg
    # every search depends on its place alone: a binary search for all at once
    return jnp.searchsorted(_sums(weights), jnp.minimum(places, below), side="right").astype(jnp.int32)


def _repeated(copies: Array, count: int) -> Array:
    """``copies[i]`` times i, in order, N in all."""
    ends = jnp.cumsum(copies)
    # one mark where a particle's places begin; how many have begun by a place is its particle
    marks = jnp.zeros(count + 1, jnp.int32).at[jnp.minimum(ends, count)].add(1)
    return jnp.minimum(jnp.cumsum(marks)[:count], count - 1).astype(jnp.int32)


def _checked(log_weights: Array, ancestors: Array) -> Array:
    own = jnp.arange(log_weights.size, dtype=jnp.int32)
    return jnp.where(jnp.max(log_weights) == -jnp.inf, own, ancestors)


# --- with gradients -----------------------------------------------------------------------------------------------


def scored(resampler: Any = None) -> Scored:
    """The same choice, and weights ``w_a / stop_gradient(w_a)`` after it: 1, with the gradient of the chance of a.

    The gradient of log Z by automatic differentiation then is the estimate by the score of the choices, consistent
    as N grows, where without it the choices would count as constants.  Nothing changes in what is computed forwards.

    Args:
        resampler: the choice; default `systematic`.  The chance of a place to choose i is w_i for each of them on the
            average over places, which is what the estimate needs.

    Differentiable Particle Filtering without Modifying the Forward Pass, arXiv:2106.10314.
    """
    return Scored(systematic() if resampler is None else resampler)


@value
class Scored:
    resampler: Any
    factory = "scored"
    scored = True

    def __call__(self, key: Array, log_weights: Array) -> Array:
        return self.resampler(key, jax.lax.stop_gradient(log_weights))


def transported(regularisation: Array = 0.1, iterations: int = 50) -> Transported:
    """Particles moved by entropic optimal transport from the weighted to the equally weighted set: no choice at all.

    ``x_k <- N sum_i P_ki x_i`` with P the plan of least ``<P, C> + epsilon KL(P | 1/N w)``, C squared distances, by
    Sinkhorn's iterations; epsilon is ``regularisation`` times the mean of C.  Smooth in weights and particles;
    biased, as averages of particles are closer together, the less so the smaller the regularisation.  Equivariant
    under permutations.  O(N^2) memory; the ancestor recorded for a place is the one that gives most of it.

    Args:
        regularisation: in units of the mean squared distance, above 0.
        iterations: of Sinkhorn.

    Differentiable Particle Filtering via Entropy-Regularized Optimal Transport, arXiv:2102.07850.

    Raises ValueError for other numbers.
    """
    number("regularisation", regularisation, 1e-6)
    integer("iterations", iterations, 1, 10**6)
    return Transported(regularisation, iterations)


@value
class Transported:
    regularisation: Array
    iterations: int = static()
    factory = "transported"

    def matrix(self, log_weights: Array, flat: Array) -> Array:
        """The (N, N) matrix, rows of sum 1, that takes the (N, D) particles to the new ones."""
        count = flat.shape[0]
        squares = jnp.sum(flat**2, axis=1)
        cost = jnp.maximum(squares[:, None] + squares[None, :] - 2 * flat @ flat.T, 0.0)
        cost = cost / (self.regularisation * jax.lax.stop_gradient(jnp.maximum(jnp.mean(cost), 1e-30)))
        top = jnp.max(log_weights)
        alive = top > -jnp.inf
        target = jax.nn.log_softmax(jnp.where(alive, log_weights, 0.0))
        even = -jnp.log(jnp.asarray(count, flat.dtype))

        def sweep(potentials: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
            f, g = potentials
            g = -jax.nn.logsumexp(f[:, None] - cost + even, axis=0)
            f = -jax.nn.logsumexp((g + target)[None, :] - cost, axis=1)
            return (f, g), None

        start = (jnp.zeros(count, flat.dtype), jnp.zeros(count, flat.dtype))
        (f, g), _ = jax.lax.scan(sweep, start, None, length=self.iterations)
        plan = jnp.exp(f[:, None] + (g + target)[None, :] - cost)  # the last half sweep makes its rows sum to 1
        return jnp.where(alive, plan, jnp.eye(count, dtype=flat.dtype))
