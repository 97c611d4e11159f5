"""Ising spins on a cylinder, exactly: the law, its observables and its denoiser, by a transfer matrix.

Spins s = -1 or 1 on ``length`` rings of ``width`` sites, ``p(s) ~ exp(beta sum s s' + field sum s)`` over neighbours,
periodic around the cylinder and free at its ends.  All 2^width states of a ring are carried from ring to ring, so that
a sum over 2^(length width) states costs length 4^width products.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, Level, value

_SMALLEST = 1e-8  # a variance whose inverse keeps float32 fields finite


def ring_states(width: int) -> np.ndarray:
    """All states of a ring, (2^width, width)."""
    return 1.0 - 2.0 * (np.arange(2**width)[:, None] >> np.arange(width)[::-1] & 1)


def log_partition(beta: Array, fields: Array) -> Array:
    """``log sum_s exp(beta sum s s' + sum fields s)``, with a field (length, width) for every site."""
    kind = jnp.result_type(beta, fields)
    beta, fields, width = jnp.asarray(beta, kind), jnp.asarray(fields, kind), np.shape(fields)[1]
    states = ring_states(width).astype(kind)
    ring = beta * np.sum(states * np.roll(states, 1, axis=1), axis=1)
    bonds = jnp.exp(beta * (states @ states.T - width))  # at most 1

    def row(log_v: Array, field: Array) -> tuple[Array, None]:
        log_v = log_v + ring + states @ field
        top = jax.lax.stop_gradient(log_v.max())
        return jnp.log(bonds @ jnp.exp(log_v - top)) + top + width * beta, None

    last, _ = jax.lax.scan(row, jnp.zeros(len(states), kind), fields[:-1])
    return jax.nn.logsumexp(last + ring + states @ fields[-1])


@value
class Ising:
    """The exact denoiser ``E[s | x_t]``; ``condition = (beta, field)``, numbers.

    Noise is a field: ``p(s | x) ~ p(s) exp(alpha x . s / sigma^2)``, so that the estimate is the magnetisation in it.
    """

    condition: tuple[Array, Array]
    factory = "Ising"

    def __call__(self, x: Array, level: Level) -> Array:
        beta, field = self.condition
        noise = level.alpha * x / jnp.maximum(level.sigma**2, _SMALLEST)
        return jax.grad(log_partition, 1)(jnp.asarray(beta, x.dtype), jnp.asarray(field + noise, x.dtype))


class Observables(NamedTuple):
    """Per site or bond: of a law exactly, or of a set of configurations."""

    magnetisation: float  # E[M], M the mean spin
    size: float  # sqrt(E[M^2])
    alignment: float  # E[s s'] of neighbours: minus the energy of a bond


def exact(beta: float, field: float, shape: tuple[int, int]) -> Observables:
    """Derivatives of log Z."""
    sites = shape[0] * shape[1]
    bonds = sites + (shape[0] - 1) * shape[1]
    alignment, magnetisation, bend = _slopes(jnp.float32(beta), jnp.float32(field), shape)
    m = float(magnetisation) / sites
    return Observables(m, float(np.sqrt(m**2 + float(bend) / sites**2)), float(alignment) / bonds)


@functools.partial(jax.jit, static_argnums=2)
def _slopes(beta: Array, field: Array, shape: tuple[int, int]) -> tuple[Array, Array, Array]:
    """Of log Z: by beta, by the field, and by the field twice."""
    gradient = jax.grad(lambda beta, field: log_partition(beta, jnp.full(shape, field)), (0, 1))
    slopes, bends = jax.jvp(lambda field: gradient(beta, field), (field,), (jnp.ones_like(field),))
    return *slopes, bends[1]


def measured(spins: np.ndarray) -> Observables:
    """Means over configurations (N, length, width); signs are taken of what is not quite a spin."""
    s = np.where(np.asarray(spins, np.float64) > 0, 1.0, -1.0)
    around, along = s * np.roll(s, 1, axis=2), s[:, 1:] * s[:, :-1]
    bonds = around[0].size + along[0].size
    m = s.mean((1, 2))
    return Observables(
        float(m.mean()), float(np.sqrt(np.mean(m**2))), float((around.sum() + along.sum()) / bonds / len(s))
    )
