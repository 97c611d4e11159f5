"""Metrics of whole data sets: one pass over batches, on any features, with nothing held but sums and a sample.

    real = metrics.summary(features, batches_of_images)            # once; `save` and `Summary.load` keep it
    metrics.compare(metrics.summary(features, batches_of_samples), real)

The features are the user's: any function of a batch, compiled or not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from diffjax.levels import Array
from diffjax.metrics.frechet import gaussian_frechet_distance
from diffjax.metrics.kernel import kid
from diffjax.metrics.neighbours import precision_recall


class Summary(NamedTuple):
    """What is kept of a set of N features of length D; all in float64."""

    count: int
    mean: np.ndarray  # (D,)
    scatter: np.ndarray  # (D, D): the sum of (f - mean)(f - mean)^T
    kept: np.ndarray  # (K, D): a uniform sample of the features, all of them where there is room
    tickets: np.ndarray  # (K,): the draws by which they were chosen, ascending
    room: int

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance."""
        return self.scatter / (self.count - 1)

    def save(self, file: str | os.PathLike) -> None:
        """Write as ``.npz``."""
        np.savez(file, **self._asdict())  # type: ignore[arg-type]

    @classmethod
    def load(cls, file: str | os.PathLike) -> Summary:
        """Read what `save` wrote; nothing in it is unpickled.

        Raises ValueError if it is another file.
        """
        with np.load(file, allow_pickle=False) as stored:
            if set(stored) != set(cls._fields):
                raise ValueError(f"{os.fspath(file)} must hold {cls._fields}, found {tuple(stored)}.")
            numbers: Any = {name: stored[name] for name in stored}
        return cls(**(numbers | {name: int(numbers[name]) for name in ("count", "room")}))


class Comparison(NamedTuple):
    """Metrics of a set against a reference."""

    frechet_distance: float
    kid: float
    precision: float
    recall: float
    samples: int
    reference: int


def summary(
    features: Callable[[Any], Array], batches: Iterable[Any], *, room: int = 10_000, seed: int = 0, first: int = 0
) -> Summary:
    """The summary of ``features(batch) -> (B, ...)`` over all batches; the division into batches does not matter.

    Means and scatter by the pairwise update, ``S += S_b + n n_b / (n + n_b) (m_b - m)(m_b - m)^T``, which loses no
    digits however many batches there are.  The sample is the ``room`` features with the smallest tickets, and
    the ticket of number n of the set is a function of ``(seed, n)`` alone.

    Args:
        features: the user's own; what it returns is flattened to (B, D).
        batches: an iterable, for example over a generator of samples; ends where the set ends.
        room: how many features to keep for the metrics that need pairs (KID, precision and recall).
        seed: of the tickets.
        first: number of the first sample, where several hosts share a set (then `merged`).

    Raises ValueError for a room below 1, features that are not finite or change their length, and no samples at all.
    """
    if room < 1 or first < 0:
        raise ValueError(f"room must be at least 1 and first at least 0, got {room!r} and {first!r}.")
    found, number = None, first
    for batch in batches:
        rows = np.asarray(features(batch), np.float64)
        if rows.ndim < 1 or len(rows) == 0:
            continue
        rows = rows.reshape(len(rows), -1)
        if not np.all(np.isfinite(rows)):
            raise ValueError(f"features must be finite, got others among samples {number} to {number + len(rows) - 1}.")
        tickets = _tickets(seed, number, len(rows))
        mean = rows.mean(0)
        centred = rows - mean
        order = np.argsort(tickets)[:room]
        part = Summary(len(rows), mean, centred.T @ centred, rows[order], tickets[order], room)
        found = part if found is None else merged(found, part)
        number += len(rows)
    if found is None:
        raise ValueError("batches must hold at least one sample, got none.")
    return found


def merged(a: Summary, b: Summary) -> Summary:
    """The summary of two disjoint parts of a set, as if it had been made at once.

    Raises ValueError if their features differ in length or their rooms in size.
    """
    if a.mean.shape != b.mean.shape or a.room != b.room:
        found = [(len(one.mean), one.room) for one in (a, b)]
        raise ValueError(f"both must have features of one length and one room, got (length, room) {found}.")
    count, shift = a.count + b.count, b.mean - a.mean
    mean = a.mean + shift * (b.count / count)
    scatter = a.scatter + b.scatter + np.outer(shift, shift) * (a.count * b.count / count)
    tickets = np.concatenate([a.tickets, b.tickets])
    order = np.argsort(tickets)[: a.room]
    return Summary(count, mean, scatter, np.concatenate([a.kept, b.kept])[order], tickets[order], a.room)


def compare(samples: Summary, reference: Summary, k: int = 3) -> Comparison:
    """Frechet distance of all features; KID, precision and recall (``k`` neighbours) of those that were kept.

    With Inception features the first is the FID.  It is biased upwards by O(D / N), and precision and recall depend on
    N: compare at equal N only, and with the same for two sets of real data.

    GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium, arXiv:1706.08500, equation 6.
    Demystifying MMD GANs, arXiv:1801.01401, section 4.
    Improved Precision and Recall Metric for Assessing Generative Models, arXiv:1904.06991, equations 1 and 2.

    Raises ValueError for fewer than two samples in a set (or k + 1 kept ones), or features of another length.
    """
    for name, one in (("samples", samples), ("reference", reference)):
        if one.count < 2:
            raise ValueError(f"{name} must have at least 2 samples, got {one.count}.")
    moments = samples.mean, samples.covariance, reference.mean, reference.covariance
    distance = gaussian_frechet_distance(*moments)
    covered = precision_recall(samples.kept, reference.kept, k)
    kernel = float(kid(samples.kept, reference.kept))
    return Comparison(distance, kernel, covered.precision, covered.recall, samples.count, reference.count)


def _tickets(seed: int, first: int, count: int) -> np.ndarray:
    """Uniform draws, number n a function of (seed, n): a counter-based generator set to n."""
    generator = np.random.Philox(key=seed)
    generator.advance(first // 4)  # one state of the counter gives four numbers of 64 bits
    raw = generator.random_raw(count + first % 4)[first % 4 :]
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
