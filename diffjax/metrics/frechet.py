"""The Frechet distance: between the Gaussians with the means and covariances of two sets of features.

    d^2 = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1^(1/2) C_2 C_1^(1/2))^(1/2))

the squared 2-Wasserstein distance of the two Gaussians.
"""

from __future__ import annotations

import numpy as np

from diffjax.levels import Array
from diffjax.metrics.sets import vectors


def frechet_distance(samples: Array, reference: Array) -> float:
    """Squared Frechet distance of two sets of features, (N, D) and (M, D).

    Means and covariances (with N - 1) in float64.  Biased upwards by O(D / N): compare at equal N only, and with
    the distance of two sets of real data.  With Inception features this is the FID.

    GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium, arXiv:1706.08500, equation 6.

    Raises ValueError for fewer than two samples in a set, or sizes that differ.

    >>> frechet_distance([[0.0], [2.0]], [[1.0], [3.0]])
    1.0
    """
    a, b = (np.asarray(points) for points in vectors(least=2, samples=samples, reference=reference))
    moments = [(points.mean(0), np.cov(points, rowvar=False).reshape(points.shape[1], -1)) for points in (a, b)]
    return gaussian_frechet_distance(*moments[0], *moments[1])


def gaussian_frechet_distance(mean: Array, covariance: Array, other_mean: Array, other_covariance: Array) -> float:
    """Squared Frechet distance of N(mean (D,), covariance (D, D)) and another Gaussian, in float64.

    The trace of the matrix square root is the sum of the singular values of C_1^(1/2) C_2^(1/2), with the factors
    from the eigen-decompositions, in which eigenvalues that rounding cannot tell from 0 are 0: singular covariances
    (fewer samples than features) cost no accuracy.

    >>> gaussian_frechet_distance([0.0, 0.0], [[1.0, 0.0], [0.0, 4.0]], [3.0, 0.0], [[4.0, 0.0], [0.0, 4.0]])
    10.0
    """
    means = [np.asarray(m, np.float64).reshape(-1) for m in (mean, other_mean)]
    covariances = [np.asarray(c, np.float64) for c in (covariance, other_covariance)]
    size = means[0].size
    if means[1].size != size or any(c.shape != (size, size) for c in covariances):
        shapes = [np.shape(a) for a in (mean, covariance, other_mean, other_covariance)]
        raise ValueError(f"expected means (D,) and covariances (D, D) of one D, got shapes {shapes}.")
    roots = [_root(c) for c in covariances]
    cross = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    # tr(C) from the same eigenvalues, so that the distance of equal sets is 0 to rounding
    traces = sum(np.sum(root**2) for root in roots)
    return float(np.sum((means[0] - means[1]) ** 2) + max(traces - 2 * cross, 0.0))


def _root(covariance: Array) -> Array:
    """``R`` with ``R R^T = covariance``: eigenvectors times the roots of the eigenvalues."""
    values, columns = np.linalg.eigh(0.5 * (covariance + covariance.T))
    # the root of a rounding error of 1e-16 would be 1e-8: what cannot be told from 0 is 0
    noise = len(values) * np.finfo(np.float64).eps * np.max(np.abs(values))
    return columns * np.sqrt(np.where(values > noise, values, 0.0))
