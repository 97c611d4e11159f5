"""Branching with random offspring: populations of several types, whose individuals live and are observed on their own.

The state is how many individuals there are of each type.  What is observed of each individual by itself is a product
over the population, and stays one backwards: the tree below an individual does not depend on the others.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, is_traced, value
from diffjax.smoothing.potentials import Guided, Message, Point, floats, less


def population(log_values: Array, log_scale: Array = 0.0) -> Population:
    """The potential ``log h(n) = log_scale + sum_j n_j log_values[j]`` of numbers n (T,) of individuals of T types.

    -inf is for a type of which there are none: the likelihood of having seen nothing of it, each with probability
    1 - q, is ``log(1 - q)``.

    Raises ValueError unless log_values has one axis.
    """
    log_values = floats(log_values)
    if log_values.ndim != 1:
        raise ValueError(f"log_values must have shape (T,), got {log_values.shape}.")
    return Population(log_values, jnp.asarray(log_scale, log_values.dtype))


@value
class Population:
    log_values: Array  # (T,)
    log_scale: Array
    factory = "population"

    def __call__(self, x: Array) -> Array:
        return self.log_scale + jnp.sum(_powers(x, self.log_values))

    def times(self, other: Any) -> Any:
        return other.times(self) if isinstance(other, Point) else jax.tree.map(jnp.add, self, other)


def branching(offspring: Array, probabilities: Array, surrogate: Array | None = None) -> Branching:
    """The kernel of a multi-type branching process: every individual is replaced by a random number of children.

    An individual of type i has the children ``offspring[k]`` with probability ``probabilities[i, k]``.  With
    ``h(n) = prod_j h_j^(n_j)`` after it, before it there is ``(k h)_i = sum_k probabilities[i, k] prod_j
    h_j^offspring[k, j]``, the generating function, and guided an individual of type i has the children k with
    probability ``probabilities[i, k] prod_j h_j^offspring[k, j] / (k h)_i``: weight 1.  The state is (T,) integers, and
    the path says how many individuals of type i had the offspring k, (T, K): the tree, but for names.

    Args:
        offspring: (K, T) integers, not negative: the numbers of children of each type.
        probabilities: (T, K), not negative.  Rows that do not sum to 1 have a mass.
        surrogate: another such matrix, whose pull-back is used instead; weights correct for it.

    ``sequential``, `chain`, ``observed`` of `population` potentials, and with a ``log_likelihood`` any observation of
    the whole population.

    Automatic Backward Filtering Forward Guiding for Markov processes and graphical models, arXiv:2010.03509.

    Raises ValueError for shapes that do not fit and negative entries.

    >>> import diffjax
    >>> doubling = branching([[0], [2]], [[0.4, 0.6]])  # an individual dies or splits
    >>> _, before = doubling.backward(diffjax.smoothing.population([-jnp.inf]))  # extinct afterwards
    >>> float(jnp.exp(before(jnp.array([2]))))
    0.1600...
    """
    offspring = np.asarray(offspring)
    matrices = [floats(probabilities)] if surrogate is None else [floats(probabilities), floats(surrogate)]
    shape = offspring.shape[::-1]
    if offspring.ndim != 2 or not np.issubdtype(offspring.dtype, np.integer) or np.any(offspring < 0):
        raise ValueError(f"offspring must be (K, T) integers, not negative, got {offspring!r}.")
    for given in matrices:
        if given.shape != shape:
            raise ValueError(f"probabilities and surrogate must be of shape (T, K) = {shape}, got {given.shape}.")
        if not is_traced(given) and not np.all(np.asarray(given) >= 0):
            raise ValueError(f"the entries of probabilities and surrogate must not be negative, got {given!r}.")
    return Branching(offspring, *(jnp.log(given) for given in matrices))


@value
class Branching:
    offspring: Array  # (K, T)
    log_matrix: Array  # (T, K)
    log_surrogate: Array | None = None
    factory = "branching"
    parts = 1

    def noise(self, key: Array, index: Array = 0) -> Array:
        types, ways = self.log_matrix.shape
        return jax.random.normal(jax.random.fold_in(key, index), (types, ways - 1), self.log_matrix.dtype)

    def backward(self, h: Any) -> tuple[Message, Population]:
        if not isinstance(h, Population):
            raise ValueError(f"a branching kernel pulls back a population potential, got {h!r}.")
        logs = self.log_matrix if self.log_surrogate is None else self.log_surrogate
        source = Population(jax.nn.logsumexp(self._joint(logs, h), axis=1), h.log_scale)
        return Message(h, source), source

    def forward(self, message: Message, x: Array, noise: Array) -> Guided:
        joint = self._joint(self.log_matrix, message.target)
        masses = jax.nn.logsumexp(joint, axis=1)
        shares = jnp.exp(joint - jnp.where(masses == -jnp.inf, 0.0, masses)[:, None])
        born = jax.vmap(multinomial)(noise, x, shares)
        y = (born @ jnp.asarray(self.offspring, born.dtype)).sum(axis=0)
        ratios = less(masses, message.source.log_values)  # 0 for the exact pull-back, -inf where nothing is possible
        return Guided(y.astype(x.dtype), jnp.sum(_powers(x, ratios)), born.astype(x.dtype))

    def _joint(self, logs: Array, h: Population) -> Array:
        """``log p[i, k] + sum_j offspring[k, j] log h_j``."""
        return logs + jnp.sum(_powers(jnp.asarray(self.offspring), h.log_values), axis=1)


def multinomial(noise: Array, count: Array, shares: Array) -> Array:
    """How many of ``count`` fall to each of K shares, from K - 1 standard normal numbers, by quantiles of binomials."""
    tails = jnp.cumsum(shares[::-1])[::-1][:-1]
    chances = jnp.clip(jnp.where(tails > 0, shares[:-1] / jnp.where(tails > 0, tails, 1.0), 0.0), 0.0, 1.0)

    def draw(left: Array, given: tuple[Array, Array]) -> tuple[Array, Array]:
        z, chance = given
        found = _binomial_quantile(jax.scipy.stats.norm.cdf(z), left, chance)
        return left - found, found

    rest, found = jax.lax.scan(draw, jnp.asarray(count, shares.dtype), (noise, chances))
    return jnp.concatenate([found, rest[None]])


def _binomial_quantile(u: Array, count: Array, chance: Array) -> Array:
    """The least m of which P(draw <= m) = I_(1 - chance)(count - m, m + 1) is at least u, by bisection."""

    def halve(ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = jnp.floor(0.5 * (low + high))
        enough = jax.scipy.special.betainc(jnp.maximum(count - middle, 1.0), middle + 1, 1 - chance) >= u
        inside = high - low > 1
        return jnp.where(inside & ~enough, middle, low), jnp.where(inside & enough, middle, high)

    apart = lambda ends: jnp.any(ends[1] - ends[0] > 1)
    return jax.lax.while_loop(apart, halve, (-jnp.ones_like(count), count))[1]


def _powers(counts: Array, logs: Array) -> Array:
    """``counts logs``, 0 where there are none, also of -inf."""
    none = counts == 0
    return jnp.where(none, 0.0, counts * jnp.where(none, 0.0, logs))
