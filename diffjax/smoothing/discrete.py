"""Kernels between finite sets."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, is_traced, value
from diffjax.smoothing.potentials import Guided, Masses, Message, Point, Table, floats, less


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

    def push(self, measure: Masses) -> Masses:
        return Masses(jax.nn.logsumexp(measure.log_masses[:, None] + self.log_matrix, axis=0))


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
        return self.guided(message).push(measure)

    def guided(self, message: Message) -> Logarithms:
        if isinstance(message.target, Point):
            h = message.target
            here = jnp.arange(self.log_matrix.shape[1]) == h.x
            joint = jnp.where(here, self.log_matrix + h.log_scale, -jnp.inf)
        else:
            joint = self.log_matrix + message.target.log_values
        source = message.source.log_values[:, None]
        return Logarithms(jnp.where(source == -jnp.inf, -jnp.inf, less(joint, source)))  # none is guided from there

    def element(self) -> Logarithms:
        return Logarithms(self.log_matrix if self.log_surrogate is None else self.log_surrogate)


def _seen(logs: Array, h: Point) -> Table:
    return Table(logs[:, h.x] + h.log_scale)
