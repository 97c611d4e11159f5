"""Kernels between finite sets, and kernels with Gamma increments."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, as_value, is_traced, value
from diffjax.smoothing.potentials import Guided, Masses, Message, Point, Table, floats, less
from diffjax.solvers.arguments import positive

# --- finite sets ------------------------------------------------------------------------------------------------------


def finite(matrix: Array, surrogate: Array | None = None) -> Finite:
    """The kernel with ``P(y = j | x = i) = matrix[i, j]`` from 0 .. S - 1 to 0 .. T - 1.

    ``(k h)(i) = sum_j matrix[i, j] h(j)``; guided, i goes to j with probability matrix[i, j] h(j) / (k h)(i).  ``push``
    takes `Masses`.  One row is a prior; with a `point` after it, it is an observation.

    Args:
        matrix: shape (S, T), not negative.  Rows that do not sum to 1 are kernels with a mass.
        surrogate: another such matrix, whose pull-back is used instead: then the weights are (k h)(i) / (l h)(i).

    Automatic Backward Filtering Forward Guiding for Markov processes and graphical models, arXiv:2010.03509.

    Raises ValueError for shapes that do not fit and negative entries.
    """
    matrices = [floats(matrix)] if surrogate is None else [floats(matrix), floats(surrogate)]
    for given in matrices:
        if given.ndim != 2 or given.shape != matrices[0].shape:
            raise ValueError(f"matrix and surrogate must be of one shape (S, T), got {[m.shape for m in matrices]}.")
        if not is_traced(given) and not np.all(np.asarray(given) >= 0):
            raise ValueError(f"the entries of matrix and surrogate must not be negative, got {given!r}.")
    return Finite(*(jnp.log(given) for given in matrices))


class Logarithms(NamedTuple):
    """A kernel of masses ``exp(log_matrix)``, for associative scans."""

    log_matrix: Array

    def pull(self, h: Table) -> Table:
        return Table(jax.nn.logsumexp(self.log_matrix + h.log_values, axis=1))

    def then(self, other: Logarithms) -> Logarithms:
        """First this, then the other."""
        return Logarithms(jax.nn.logsumexp(self.log_matrix[:, :, None] + other.log_matrix[None], axis=1))


@value
class Finite:
    log_matrix: Array  # (S, T)
    log_surrogate: Array | None = None
    factory = "finite"
    parts = 1

    def noise(self, key: Array, index: Array = 0) -> Array:
        return jax.random.normal(jax.random.fold_in(key, index), (), self.log_matrix.dtype)

    def backward(self, h: Table | Point) -> tuple[Message, Table]:
        logs = self.log_matrix if self.log_surrogate is None else self.log_surrogate
        source = _seen(logs, h) if isinstance(h, Point) else Logarithms(logs).pull(h)
        return Message(h, source), source

    def forward(self, message: Message, x: Array, noise: Array) -> Guided:
        h, row = message.target, self.log_matrix[x]
        if isinstance(h, Point):
            y, log_mass = h.x, row[h.x] + h.log_scale
        else:
            logs = row + h.log_values
            log_mass = jax.nn.logsumexp(logs)
            sums = jnp.cumsum(jnp.exp(logs - jnp.where(log_mass == -jnp.inf, 0.0, log_mass)))
            # the inverse of the distribution function at a uniform number: a function of normal noise
            place = jax.scipy.stats.norm.cdf(noise) * sums[-1]
            last = jnp.max(jnp.where(logs > -jnp.inf, jnp.arange(len(logs)), 0))
            y = jnp.minimum(jnp.sum(sums <= place), last).astype(jnp.int32)
        exact = jnp.where(log_mass == -jnp.inf, -jnp.inf, 0.0)
        return Guided(y, exact if self.log_surrogate is None else less(log_mass, message.source(x)), y)

    def push(self, message: Message, measure: Masses) -> Masses:
        """The guided measure after the kernel, that of the exact backward map or of the surrogate's."""
        ratio = less(measure.log_masses, message.source.log_values)
        if isinstance(message.target, Point):
            h = message.target
            here = jnp.arange(self.log_matrix.shape[1]) == h.x
            joint = jnp.where(here, self.log_matrix + h.log_scale, -jnp.inf)
        else:
            joint = self.log_matrix + message.target.log_values
        return Masses(jax.nn.logsumexp(ratio[:, None] + joint, axis=0))

    def element(self) -> Logarithms:
        return Logarithms(self.log_matrix if self.log_surrogate is None else self.log_surrogate)


def _seen(logs: Array, h: Point) -> Table:
    return Table(logs[:, h.x] + h.log_scale)


# --- Gamma increments -------------------------------------------------------------------------------------------------


@value
class Increment:
    """``h(x) = Gamma(target - x; shape, rate)``, and 0 from the target on."""

    target: Array
    shape: Array
    rate: Array
    log_scale: Array

    def __call__(self, x: Array) -> Array:
        return self.log_scale + _log_gamma(self.target - x, self.shape, self.rate)


def gamma(shape: Array, rate: Any, surrogate: Array | None = None) -> Gamma:
    """The kernel ``x -> x + g``, g ~ Gamma(shape, rate(x)), of a number: a process with Gamma increments over a step.

    A known state v after steps of shapes a_1 .. a_n pulls back to h(x) = Gamma(v - x; a_1 + .. + a_n, rate).  Guided,
    ``y = x + (v - x) b`` with b ~ Beta(a, what is left of the shapes): a draw of the surrogate, weighed by the
    likelihood ratio ``(rate(x) / l)^shape exp(-(rate(x) - l) (y - x))``.  Draws are quantiles: not differentiable.

    Args:
        shape: above 0; of a process, its rate of jumps times the time of the step.
        rate: above 0, or a function of x.
        surrogate: the rate l of the backward map, the same for all steps; default ``rate``, if that is a number.

    Automatic Backward Filtering Forward Guiding for Markov processes and graphical models, arXiv:2010.03509.

    Raises ValueError for other numbers, and for a rate that is a function without a surrogate.
    """
    if surrogate is None and callable(rate):
        raise ValueError("a rate that is a function needs a surrogate, the rate of the backward map.")
    surrogate = rate if surrogate is None else surrogate
    for name, given in (("shape", shape), ("surrogate", surrogate), *(() if callable(rate) else (("rate", rate),))):
        positive(name, given)
    return Gamma(floats(shape), as_value(rate) if callable(rate) else floats(rate), floats(surrogate))


@value
class Gamma:
    shape: Array
    rate: Any
    surrogate: Array
    factory = "gamma"
    parts = 1

    def noise(self, key: Array, index: Array = 0) -> Array:
        return jax.random.normal(jax.random.fold_in(key, index), (), self.shape.dtype)

    def backward(self, h: Any) -> tuple[Message, Increment]:
        if isinstance(h, Point):
            kind = self.shape.dtype
            source = Increment(h.x.astype(kind), self.shape, self.surrogate, h.log_scale.astype(kind))
        elif isinstance(h, Increment):
            source = Increment(h.target, h.shape + self.shape, h.rate, h.log_scale)
        else:
            raise ValueError(f"a gamma kernel pulls back a point or an Increment, got {h!r}.")
        return Message(h, source), source

    def forward(self, message: Message, x: Array, noise: Array) -> Guided:
        h = message.target
        if isinstance(h, Point):
            y = h.x.astype(self.shape.dtype)
        else:
            y = x + (h.target - x) * _beta_quantile(jax.scipy.stats.norm.cdf(noise), self.shape, h.shape)
        rate = self.rate(x) if callable(self.rate) else self.rate
        log_weight = self.shape * jnp.log(rate / self.surrogate) - (rate - self.surrogate) * (y - x)
        return Guided(y, jnp.where(y >= x, log_weight, -jnp.inf), y)


def _log_gamma(x: Array, shape: Array, rate: Array) -> Array:
    inside = x > 0
    x = jnp.where(inside, x, 1.0)
    logs = shape * jnp.log(rate) - jax.scipy.special.gammaln(shape) + (shape - 1) * jnp.log(x) - rate * x
    return jnp.where(inside, logs, -jnp.inf)


def _beta_quantile(u: Array, a: Array, b: Array) -> Array:
    """The u-quantile of Beta(a, b), by bisection."""
    steps = jnp.finfo(u.dtype).nmant + 8

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        below = jax.scipy.special.betainc(a, b, middle) < u
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low, high = jax.lax.fori_loop(0, steps, halve, (jnp.zeros_like(u), jnp.ones_like(u)))
    return jnp.clip(0.5 * (low + high), 0.0, 1 - jnp.finfo(u.dtype).epsneg)
