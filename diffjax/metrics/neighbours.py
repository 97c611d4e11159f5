"""Metrics from nearest neighbours: precision and recall, and the distance to the training set."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from diffjax.levels import Array
from diffjax.metrics.sets import blocks, squared_distances, vectors


class PrecisionRecall(NamedTuple):
    """Both in [0, 1]."""

    precision: float
    recall: float


def precision_recall(samples: Array, reference: Array, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall: how much of each set lies in the manifold of the other.

    The manifold of a set is the union of the closed balls around its samples that reach their k-th nearest neighbour
    in the set (not counting themselves).  Precision: the share of ``samples`` in the manifold of ``reference``
    (quality); recall: the share of ``reference`` in the manifold of ``samples`` (coverage).  Two sets of one law do
    not reach 1: compare with the value for two sets of real data.

    Improved Precision and Recall Metric for Assessing Generative Models, arXiv:1904.06991, equations 1 and 2.

    Raises ValueError unless k >= 1 and both sets have more than k samples of one size.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k!r}.")
    a, b = vectors(least=k + 1, samples=samples, reference=reference)
    return PrecisionRecall(_covered(a, b, k), _covered(b, a, k))


def _covered(points: np.ndarray, manifold: np.ndarray, k: int) -> float:
    """The share of ``points`` within the k-th neighbour distance of some point of ``manifold``."""
    radii = np.concatenate([_neighbour(manifold[rows], manifold, k) for rows in blocks(len(manifold))])
    inside = [np.any(squared_distances(points[rows], manifold) <= radii, axis=1) for rows in blocks(len(points))]
    return float(np.mean(np.concatenate(inside)))


def _neighbour(points: np.ndarray, others: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each point to its k-th neighbour; the 0-th is itself, at distance 0."""
    return np.partition(squared_distances(points, others), k, axis=1)[:, k]


def nearest_distance(samples: Array, training: Array) -> np.ndarray:
    """Euclidean distance of each sample (N, ...) to its nearest training sample (M, ...), shape (N,).

    Memorisation shows as distances below those of held-out data: compare the two distributions.

    Raises ValueError if a set is empty or sizes differ.

    >>> nearest_distance([[0.0], [5.0]], [[1.0], [4.0], [9.0]])
    array([1., 1.])
    """
    a, b = vectors(samples=samples, training=training)
    nearest = [np.min(squared_distances(a[rows], b), axis=1) for rows in blocks(len(a))]
    return np.sqrt(np.concatenate(nearest))
