"""Laws of the noise level that training sees.

A law is a quantile function ``(process, u) -> Level`` of a uniform u in (0, 1), increasing in u towards the noise.
That leaves it free how the u of a batch are drawn: independently, or one in each of B equal strata, as in Variational
Diffusion Models, arXiv:2107.00630, which lowers the variance of the loss.  Laws that learn from the losses are in
`diffjax.training.adaptive`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, Level, Process, is_traced, narrowed, value, widened

Law: TypeAlias = Callable[[Process, Any], Level]

# u stays this far from 0 and 1: a score target is infinite at sigma = 0, a log-SNR at either end.
MARGIN = 2.0**-24


def uniform(low: float | int = 0.0, high: float | int = 1.0) -> Uniform:
    """Times uniform between ``low`` and ``high``, in units of the process's end.

    Raises ValueError unless 0 <= low < high <= 1.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"low={low} and high={high} must satisfy 0 <= low < high <= 1")
    return Uniform(low, high)


@value
class Uniform:
    low: Any
    high: Any
    factory = "uniform"

    def __call__(self, process: Process, u: Any) -> Level:
        return process.level(process.end * (self.low + (self.high - self.low) * u))


def logit_normal(mean: float | int = 0.0, std: float | int = 1.0) -> LogitNormal:
    """Times t with logit(t / end) normal: most training in the middle of the path.

    Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, arXiv:2403.03206, section 3.1.

    Raises ValueError unless std > 0.
    """
    return LogitNormal(mean, _positive("std", std))


@value
class LogitNormal:
    mean: Any
    std: Any
    factory = "logit_normal"

    def __call__(self, process: Process, u: Any) -> Level:
        return process.level(process.end * jax.nn.sigmoid(_normal(self, u)))


def mode(scale: float | int = 1.29) -> Mode:
    """Times ``end (u - scale (sin^2(pi u / 2) - u))``: a hump in the middle for scale > 0, at the ends for scale < 0.

    The density at both ends is ``1 / (1 + scale)`` and in the middle ``1 / (1 - scale (pi / 2 - 1))``: unlike a
    logit-normal law's it is positive at the ends.

    Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, arXiv:2403.03206, section 3.1.

    Raises ValueError unless -1 <= scale <= 2 / (pi - 2) = 1.75: outside the times are not increasing in u.
    """
    if not -1 <= scale <= 2 / (np.pi - 2):
        raise ValueError(f"scale must be in [-1, 2 / (pi - 2)], got {scale!r}")
    return Mode(scale)


@value
class Mode:
    scale: Any
    factory = "mode"

    def __call__(self, process: Process, u: Any) -> Level:
        return process.level(process.end * (u - self.scale * (jnp.sin(0.5 * jnp.pi * u) ** 2 - u)))


def cosmap() -> CosMap:
    """Times ``end tan(pi u / 2) / (1 + tan(pi u / 2))``: rectified flow sees the log-SNR of a cosine schedule.

    Their density is ``2 / (pi (1 - 2 t + 2 t^2))``, t in units of the end.

    Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, arXiv:2403.03206, section 3.1.
    """
    return CosMap()


@value
class CosMap:
    factory = "cosmap"

    def __call__(self, process: Process, u: Any) -> Level:
        sine, cosine = jnp.sin(0.5 * jnp.pi * u), jnp.cos(0.5 * jnp.pi * u)
        return process.level(process.end * sine / (sine + cosine))


def log_normal(mean: float | int = -1.2, std: float | int = 1.2) -> LogNormal:
    """Noise levels with log(sigma / alpha) normal, cut off at the ends of the process.

    Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364, table 1.

    Raises ValueError unless std > 0.
    """
    return LogNormal(mean, _positive("std", std))


@value
class LogNormal:
    mean: Any
    std: Any
    factory = "log_normal"

    def __call__(self, process: Process, u: Any) -> Level:
        return _within(process, process.level(half_log_snr=-_normal(self, u)))


def log_snr(low: float | int = -20.0, high: float | int = 20.0) -> LogSNR:
    """The log-SNR, 2 log(alpha / sigma), uniform between ``low`` and ``high``, cut off at the ends of the process.

    Raises ValueError unless low < high.
    """
    if not low < high:
        raise ValueError(f"low={low} must be below high={high}")
    return LogSNR(low, high)


@value
class LogSNR:
    low: Any
    high: Any
    factory = "log_snr"

    def __call__(self, process: Process, u: Any) -> Level:
        return _within(process, process.level(half_log_snr=0.5 * (self.high + (self.low - self.high) * u)))


def shifted(law: Law, shift: Any) -> Shifted:
    """The levels of ``law`` with every noise-to-signal ratio times ``shift``: what `grids.shifted` is to a grid.

    For rectified flow, times become ``shift t / (1 + (shift - 1) t)``; `grids.resolution_shift` gives the shift at
    which a larger image is as uncertain.

    Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, arXiv:2403.03206.

    Raises ValueError unless shift > 0.
    """
    return Shifted(law, _positive("shift", shift))


@value
class Shifted:
    law: Any
    shift: Any
    factory = "shifted"

    def __call__(self, process: Process, u: Any) -> Level:
        before = self.law(process, u)
        after = process.level(half_log_snr=narrowed(before) - jnp.log(self.shift))
        return _within(process, after, before)


def restricted(law: Law, low: Any, high: Any) -> Restricted:
    """``law`` between its quantiles ``low`` and ``high``: the part of it that one expert or one cluster trains on.

    Raises ValueError unless 0 <= low < high <= 1, where they are concrete.
    """
    if not is_traced(low, high) and not 0 <= low < high <= 1:
        raise ValueError(f"low={low} and high={high} must satisfy 0 <= low < high <= 1")
    return Restricted(law, low, high)


@value
class Restricted:
    law: Any
    low: Any
    high: Any
    factory = "restricted"

    def __call__(self, process: Process, u: Any) -> Level:
        return self.law(process, jnp.clip(self.low + (self.high - self.low) * u, MARGIN, 1 - MARGIN))


def log_snr_rate(law: Law, process: Process, u: Any) -> Array:
    """``|d lambda / du|`` of the log-SNR lambda at the quantile u: one over the law's density of the log-SNR there."""
    _, rate = jax.jvp(lambda u: 2 * law(process, u).half_log_snr, (u,), (jnp.ones_like(u),))
    return jnp.abs(rate)


def _normal(law: Any, u: Any) -> Any:
    return law.mean + law.std * jax.scipy.special.ndtri(u)


def _within(process: Process, level: Level, like: Level | None = None) -> Level:
    """The same level by its time, clipped to the process: its ends are finite."""
    trailing = 0 if like is None else widened(like).ndim - like.time.ndim
    return process.level(jnp.clip(level.time, 0.0, process.end), trailing=trailing)


def _positive(name: str, number: Any) -> Any:
    if not is_traced(number) and not number > 0:
        raise ValueError(f"{name} must be positive, got {number}")
    return number
