"""Metrics that need a classifier's opinion."""

from __future__ import annotations

import numpy as np

from diffjax.levels import Array


def accuracy(logits: Array, labels: Array) -> float:
    """The share of samples whose largest logit, of (N, C), is that of their label, of (N,).

    With the labels that a conditional model was asked for, it says how often the model delivers.

    Raises ValueError if the shapes do not fit.

    >>> accuracy([[2.0, 1.0], [0.0, 3.0]], [0, 0])
    0.5
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) < 1:
        raise ValueError(f"expected logits (N, C) and labels (N,), got {logits.shape} and {labels.shape}.")
    return float(np.mean(np.argmax(logits, axis=1) == labels))
