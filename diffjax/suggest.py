"""Noise levels for a data set: how much noise to start from, where to stop, where to train."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from diffjax.levels import Array, Process, concrete


class Suggestion(NamedTuple):
    """Noise-to-signal ratios sigma / alpha, and the process's times that have them."""

    sigma_data: float  # for edm preconditioning
    sigma_min: float
    sigma_max: float
    rho: float  # for grids.karras
    p_mean: float  # of log(sigma / alpha) in training
    p_std: float
    start: float  # the time of sigma_max
    stop: float  # the time of sigma_min


def suggest(process: Process, data: Array, tolerance: float = 0.06) -> Suggestion:
    """Sigma range, rho and training noise from statistics of the data (samples, ...), by the following rule.

    * ``sigma_data^2`` is the mean variance of the entries.
    * ``sigma_max = sqrt(E |x_0 - m|^2 / (2 tolerance))``, m the data's mean: at that noise the law of x_t is within
      ``tolerance`` nats (Kullback-Leibler) of a Gaussian around ``alpha m``, because that holds for every x_0 and the
      divergence is convex.  The default reproduces EDM's 80 for CIFAR-10 (3072 entries of standard deviation 0.5); it
      grows with the root of the number of entries, as it must.  The prior is a Gaussian around 0: where ``|m|^2`` is
      not small, centre the data, or the mean counts like a further sample: it is added to E |x_0 - m|^2 here.
    * ``sigma_min = 0.004 sigma_data``, ``rho = 7``, ``p_std = 1.2`` and ``p_mean = log(sigma_data) - 0.507``: EDM's
      0.002, 7, 1.2 and -1.2 at its sigma_data of 0.5, carried over by scale.

    Both ends are brought into the range of the process.  Scaling the data by c scales every sigma by c and adds log(c)
    to p_mean.

    Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364, table 1 (the constants).

    Raises ValueError for fewer than two samples, constant or non-finite data, or a tolerance that is not above 0.

    >>> import diffjax
    >>> data = np.array([[0.5, -0.5], [-0.5, 0.5]])
    >>> suggest(diffjax.processes.edm(), data).sigma_data
    0.5
    """
    data = np.asarray(data, np.float64)
    if data.ndim < 1 or len(data) < 2 or not np.all(np.isfinite(data)):
        raise ValueError(f"data must be at least two finite samples along the first axis, got shape {data.shape}.")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be above 0, got {tolerance!r}.")
    flat = data.reshape(len(data), -1)
    variance = float(np.mean(np.var(flat, axis=0)))
    if not variance > 0:
        raise ValueError("data must not be constant.")
    sigma_data = float(np.sqrt(variance))
    second_moment = float(np.mean(np.sum(flat**2, axis=1)))  # = E |x_0 - m|^2 + |m|^2
    high, low = np.sqrt(second_moment / (2 * tolerance)), 0.004 * sigma_data
    process = concrete(process)
    noisiest, cleanest = (np.exp(-process.level(t).half_log_snr) for t in (process.end, 0.0))
    high, low = np.minimum(high, noisiest), np.maximum(low, cleanest)
    if not low < high:
        raise ValueError(
            f"the process reaches ratios from {cleanest} to {noisiest} only, which the data are not within."
        )
    start, stop = (float(process.level(half_log_snr=-np.log(ratio)).time) for ratio in (high, low))
    p_mean = float(np.log(sigma_data) - 1.2 - np.log(0.5))
    end = float(process.end)
    return Suggestion(sigma_data, float(low), float(high), 7.0, p_mean, 1.2, min(start, end), max(stop, 0.0))
