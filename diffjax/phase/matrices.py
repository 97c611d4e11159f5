"""Small matrices of linear SDEs, in NumPy or JAX, for many times at once.

For ``du = F u dtau + G dW`` with ``Q = G G^T`` the transition over a span tau is ``u -> E u + N(0, N)`` with

    E = exp(tau F),     N = int_0^tau exp(r F) Q exp(r F)^T dr,     N(2 tau) = N(tau) + E(tau) N(tau) E(tau)^T.

Both start as Taylor series over a short span and are doubled: nothing is subtracted, so that entries of different
orders in tau (tau^3, tau^2 and tau for position and momentum) all keep their relative precision.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from diffjax.levels import Array, namespace, root

_DOUBLINGS = 9  # spans up to tau |F| = 256 ...
_TERMS = 14  # ... whose 512th part, of norm at most 1/2, has a remainder of 0.5^14 / 14! < 1e-15


def transition(drift: Array, diffusion: Array, span: Array) -> tuple[Array, Array]:
    """``(E, N)`` of shape (*span.shape, n, n) for spans >= 0; E alone also for spans below 0."""
    xp = namespace(drift, diffusion, span)
    step = (span / 2**_DOUBLINGS)[..., None, None]
    size = drift.shape[-1]
    moved = xp.eye(size, dtype=step.dtype) + xp.zeros_like(step)
    spread = xp.zeros_like(moved)
    power, term = xp.eye(size, dtype=step.dtype), diffusion
    for k in range(1, _TERMS):
        power = power @ drift
        moved = moved + step**k / float(math.factorial(k)) * power
        spread = spread + step**k / float(math.factorial(k)) * term
        term = drift @ term + term @ drift.T

    def doubled(_: Any, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        moved, spread = pair
        return moved @ moved, spread + moved @ spread @ transpose(moved)

    if xp is not np:
        return jax.lax.fori_loop(0, _DOUBLINGS, doubled, (moved, spread))  # one body to compile, not nine
    pair = (moved, spread)
    for i in range(_DOUBLINGS):
        pair = doubled(i, pair)
    return pair


def transpose(matrix: Array) -> Array:
    """Of the last two axes."""
    return namespace(matrix).swapaxes(matrix, -1, -2)


def inverse(matrix: Array) -> Array:
    """Of a positive definite matrix, scaled to unit diagonal first: its entries may differ by many orders."""
    xp = namespace(matrix)
    size = xp.sqrt(xp.diagonal(matrix, axis1=-2, axis2=-1))
    both = size[..., :, None] * size[..., None, :]
    return xp.linalg.inv(matrix / both) / both


def factor(matrix: Array) -> Array:
    """A square root L, ``L L^T = matrix``, of a positive semi-definite matrix, scaled to unit diagonal first."""
    xp = namespace(matrix)
    size = root(xp.diagonal(matrix, axis1=-2, axis2=-1))
    safe = xp.where(size == 0, 1.0, size)
    scaled = matrix / (safe[..., :, None] * safe[..., None, :])
    values, vectors = xp.linalg.eigh(0.5 * (scaled + transpose(scaled)))
    return size[..., :, None] * vectors * root(values)[..., None, :]


def polar(matrix: Array) -> Array:
    """The orthogonal matrix nearest to a matrix."""
    left, _, right = namespace(matrix).linalg.svd(matrix)
    return left @ right


def stationary(drift: Array, diffusion: Array) -> Array:
    """The covariance with ``F S + S F^T + Q = 0``."""
    xp = namespace(drift, diffusion)
    size = drift.shape[-1]
    one = xp.eye(size, dtype=drift.dtype)
    both = xp.kron(drift, one) + xp.kron(one, drift)
    return -xp.linalg.solve(both, diffusion.reshape(-1)).reshape(size, size)


def times(matrix: Array, vector: Array) -> Array:
    """Matrix times vector, over leading axes."""
    return (matrix @ vector[..., None])[..., 0]


def act(matrix: Array, mean: Array) -> Array:
    """Matrix times a vector, or times a matrix where ``mean`` has as many axes."""
    return matrix @ mean if mean.ndim == matrix.ndim else times(matrix, mean)


def identity(xp: Any, like: Array, size: int) -> Array:
    """The identity for every entry of ``like``."""
    return xp.zeros((*like.shape, size, size), like.dtype) + xp.eye(size, dtype=like.dtype)
