"""The cheap problem: 50 steps on a two-dimensional Gaussian mixture with correlated components."""

from __future__ import annotations

import numpy as np

STEPS = 50
WEIGHTS = [0.3, 0.3, 0.4]
MEANS = [[1.5, 0.0], [-1.0, 1.2], [-0.5, -1.4]]
COVARIANCES = [[[0.10, 0.05], [0.05, 0.08]], [[0.06, -0.02], [-0.02, 0.12]], [[0.2, 0.0], [0.0, 0.03]]]


def eigen() -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (3, 2) and eigenvectors (3, 2, 2) of the covariances."""
    values, vectors = np.linalg.eigh(np.asarray(COVARIANCES))
    return values, vectors
