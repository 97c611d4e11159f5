"""Sliced Wasserstein distance: optimal transport along random lines, where it is a sort."""

from __future__ import annotations

import jax
import numpy as np

from diffjax.levels import Array, is_traced, namespace
from diffjax.metrics.sets import vectors


def sliced_wasserstein(
    key: Array, samples: Array, reference: Array, projections: int = 256, order: Array = 2.0
) -> Array:
    """``(mean over directions u of W_p(u . samples, u . reference)^p)^(1/p)``, in the units of the samples.

    W_p of two one-dimensional empirical laws, of any two numbers of samples, is exact: the distance of their
    quantile functions.  The directions are uniform on the sphere and fixed by ``key``: use one key for all sets that
    are compared.  For samples that are one set shifted by v it tends to ``|v| / sqrt(D)`` (p = 2).

    Sliced and Radon Wasserstein Barycenters of Measures, doi:10.1007/s10851-014-0506-3.

    Args:
        samples, reference: (N, ...) and (M, ...).
        projections: number of directions.
        order: p, at least 1.

    Raises ValueError if sizes differ, projections is below 1 or order below 1.

    >>> sliced_wasserstein(jax.random.key(0), [[0.0], [1.0]], [[3.0], [2.0]])
    2.0
    """
    if projections < 1 or not order >= 1:
        raise ValueError(f"need projections >= 1 and order >= 1, got {projections!r} and {order!r}.")
    a, b = vectors(samples=samples, reference=reference)
    directions = jax.random.normal(key, (a.shape[1], projections))
    directions = directions if is_traced(directions, a, b) else np.asarray(directions, np.float64)
    xp = namespace(directions, a, b)
    directions = directions / xp.linalg.norm(directions, axis=0)
    a, b = xp.sort(a @ directions, axis=0), xp.sort(b @ directions, axis=0)
    first, second, widths = _quantiles(len(a), len(b))
    powers = xp.sum(xp.abs(a[first] - b[second]) ** order * widths[:, None], axis=0)
    total = xp.mean(powers)
    # equal sets have distance 0, and a derivative of 0 rather than 0 times infinity
    distance = xp.where(total > 0, xp.where(total > 0, total, 1.0) ** (1 / order), 0.0)
    return distance if is_traced(distance) else float(distance)


def _quantiles(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the quantile functions of n and m sorted samples are both constant: two indices and the width."""
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)  # in units of 1 / (n m): integers, exact
    widths = np.diff(ends, prepend=0) / (n * m)
    return (ends - 1) // m, (ends - 1) // n, widths
