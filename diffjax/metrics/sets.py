"""Sets of samples as matrices, and what every metric needs of them: checks and pairwise distances."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, is_traced, namespace


def vectors(*, least: int = 1, **named: Array) -> tuple[Array, ...]:
    """The named sets, each (N, ...), as matrices (N, D): float64 NumPy when all are concrete.

    Raises ValueError if a set has no sample axis or fewer than ``least`` samples, or if their lengths D differ.
    """
    sets = tuple(named.values())
    if is_traced(sets):
        sets = [jnp.asarray(points, jnp.result_type(float, *sets)) for points in sets]
    else:
        sets = [np.asarray(points, np.float64) for points in sets]
    for name, points in zip(named, sets, strict=True):
        if np.ndim(points) < 1 or len(points) < least:
            raise ValueError(f"{name} must be at least {least} samples (N, ...), got shape {np.shape(points)}.")
    sets = [points.reshape(len(points), -1) for points in sets]
    if len({points.shape[1] for points in sets}) != 1:
        shapes = {name: np.shape(points) for name, points in named.items()}
        raise ValueError(f"the samples of all sets must have the same size, got {shapes}.")
    return tuple(sets)


def squared_distances(a: Array, b: Array) -> Array:
    """``|a_i - b_j|^2``, shape (N, M), through one matrix product."""
    xp = namespace(a, b)
    # about the common centre, so that the expansion of the square does not cancel
    centre = xp.mean(b, axis=0)
    a, b = a - centre, b - centre
    squares = xp.sum(a**2, axis=1)[:, None] - 2 * a @ b.T + xp.sum(b**2, axis=1)
    return xp.maximum(squares, 0.0)


def blocks(count: int, size: int = 2048) -> Iterator[slice]:
    """Slices of at most ``size`` rows: N x M tables are never held whole."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
