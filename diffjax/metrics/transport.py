"""Optimal transport: along random lines, where it is a sort, and with an entropy, where it is a fixed point."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, is_traced, namespace
from diffjax.metrics.sets import squared_distances, vectors
from diffjax.solvers.arguments import number, positive


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


def sinkhorn_divergence(samples: Array, reference: Array, entropy: Array, iterations: int = 500) -> Array:
    """``OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2`` with the cost |x - y|^2 and an entropy, in squared units.

        OT(a, b) = min_P sum_ij P_ij |x_i - y_j|^2 + entropy KL(P | a b),     P with marginals a and b.

    Between |mean difference|^2 (entropy = inf) and W_2^2 (entropy = 0); 0 for equal sets only, |v|^2 for a set and
    itself shifted by v at every entropy.  Use one entropy for all sets that are compared.

    Interpolating between Optimal Transport and MMD using Sinkhorn Divergences, arXiv:1810.08278.

    Args:
        samples, reference: (N, ...) and (M, ...), of equal weights; N M numbers are held.
        entropy: above 0; a few per cent of the mean squared distance is near W_2^2.
        iterations: at most; each shrinks what is left by a factor, which is near 1 for a small entropy.

    Raises ValueError if sizes differ, the entropy is not above 0 or iterations is below 1.

    >>> float(round(sinkhorn_divergence([[0.0], [1.0]], [[3.0], [2.0]], 0.5), 6))
    4.0
    """
    positive("entropy", entropy)
    number("iterations", iterations, 1.0)
    a, b = vectors(samples=samples, reference=reference)
    cost = lambda x, y: _entropic(squared_distances(x, y), entropy, iterations)
    total = cost(a, b) - 0.5 * cost(a, a) - 0.5 * cost(b, b)
    return total if is_traced(total) else float(total)


def _entropic(cost: Array, entropy: Array, iterations: int) -> Array:
    """The value of the entropic transport between equal weights: the means of both potentials at the fixed point."""
    xp = namespace(cost)

    def soft(values: Array, axis: int) -> Array:  # -entropy log mean exp(values / entropy)
        top = xp.max(values, axis=axis, keepdims=True)
        mean = xp.mean(xp.exp((values - top) / entropy), axis=axis)
        return -xp.squeeze(top, axis) - entropy * xp.log(mean)

    def update(g: Array) -> tuple[Array, Array]:
        f = soft(g[None] - cost, 1)
        return f, soft(f[:, None] - cost, 0)

    f, g = update(xp.zeros(cost.shape[1], cost.dtype))
    if xp is jnp:
        f, g = jax.lax.fori_loop(1, iterations, lambda _, both: update(both[1]), (f, g))
    else:
        for _ in range(1, iterations):
            before, (f, g) = f, update(g)
            if np.max(np.abs(f - before)) <= 1e-12 * (np.mean(cost) + entropy):
                break
    return xp.mean(f) + xp.mean(g)  # after an exact update of g the dual value is off by the square of what is left


def _quantiles(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the quantile functions of n and m sorted samples are both constant: two indices and the width."""
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)  # in units of 1 / (n m): integers, exact
    widths = np.diff(ends, prepend=0) / (n * m)
    return (ends - 1) // m, (ends - 1) // n, widths
