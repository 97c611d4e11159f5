"""Spacings of the noise-to-signal ratio ``sigma / alpha``, for any process.

Each runs from ``sigma_max`` to ``sigma_min`` in steps that are even in some function of the ratio, and then, if
``to_data``, makes a last step to time 0.  Defaults: the ratio at the process's end (at 0.999 of it where alpha
vanishes), and 0.002 or the process's smallest ratio above that.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import special

from diffjax.grids.spacings import limits
from diffjax.grids.times import times
from diffjax.levels import Array, Grid, Process


def karras(
    process: Process,
    steps: int = 20,
    rho: Array = 7.0,
    sigma_max: Array | None = None,
    sigma_min: Array | None = None,
    to_data: bool = True,
) -> Grid:
    """Even in ``(sigma / alpha)^(1 / rho)``: the grid of EDM.

    Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364, equation 5.

    Raises ValueError unless ``0 < sigma_min < sigma_max`` and rho > 0.
    """
    if not rho > 0:
        raise ValueError(f"rho must be above 0, got {rho!r}.")

    def spaced(high: Array, low: Array, u: Array) -> Array:
        return (high ** (1 / rho) + u * (low ** (1 / rho) - high ** (1 / rho))) ** rho

    return _spaced(process, steps, sigma_max, sigma_min, to_data, spaced)


def exponential(
    process: Process,
    steps: int = 20,
    sigma_max: Array | None = None,
    sigma_min: Array | None = None,
    to_data: bool = True,
) -> Grid:
    """Even in ``log(sigma / alpha)``, which are also the "Lu lambdas" of diffusers; karras with rho to infinity.

    Like `log_snr`, with the ends given as noise-to-signal ratios.

    Raises ValueError unless ``0 < sigma_min < sigma_max``.
    """
    return _spaced(process, steps, sigma_max, sigma_min, to_data, lambda high, low, u: high * (low / high) ** u)


def beta(
    process: Process,
    steps: int = 20,
    a: Array = 0.6,
    b: Array = 0.6,
    sigma_max: Array | None = None,
    sigma_min: Array | None = None,
    to_data: bool = True,
) -> Grid:
    """Quantiles of a beta distribution: ``sigma_min + (sigma_max - sigma_min) F^{-1}(1 - u)``, F that of Beta(a, b).

    With a, b < 1 dense at both ends.  Beta Sampling is All You Need: Efficient Image Generation Strategy for Diffusion
    Models using Stepwise Spectral Analysis, arXiv:2407.12173.

    Raises ValueError unless ``0 < sigma_min < sigma_max``, a > 0 and b > 0.
    """
    if not a > 0 or not b > 0:
        raise ValueError(f"a and b must be above 0, got a={a!r}, b={b!r}.")

    def spaced(high: Array, low: Array, u: Array) -> Array:
        return low + (high - low) * special.betaincinv(a, b, 1 - u)

    return _spaced(process, steps, sigma_max, sigma_min, to_data, spaced)


def _spaced(
    process: Process,
    steps: int,
    sigma_max: Array | None,
    sigma_min: Array | None,
    to_data: bool,
    spaced: Callable[[Array, Array, Array], Array],
) -> Grid:
    """The grid through ``spaced(high, low, u)`` for u even from 0 to 1."""
    process, first, _ = limits(process, steps, None, 0.0)
    if process.level(first).alpha == 0:
        first = (1 - 1e-3) * first
    noisiest, cleanest = (np.exp(-process.level(t).half_log_snr) for t in (first, 0.0))
    high = noisiest if sigma_max is None else np.float64(sigma_max)
    low = max(0.002, cleanest) if sigma_min is None else np.float64(sigma_min)
    if not 0 < low < high:
        raise ValueError(f"need 0 < sigma_min < sigma_max, got sigma_min={low!r}, sigma_max={high!r}.")
    last_step = bool(to_data and cleanest == 0)
    inner = steps - int(last_step)
    ratios = spaced(high, low, np.linspace(0.0, 1.0, max(inner, 1) + 1)[: inner + 1])
    inside = np.clip(process.level(half_log_snr=-np.log(ratios)).time, 0.0, process.end)
    return times(process, list(inside) + [0.0] * last_step)
