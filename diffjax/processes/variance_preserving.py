"""Processes with linear beta: variance preserving and sub-VP.

With ``B(t) = beta_min t + (beta_max - beta_min) t^2 / 2`` (the integral of beta), both have ``alpha = exp(-B/2)``;
``sigma^2 = 1 - exp(-B)`` for VP and ``sigma = 1 - exp(-B)`` for sub-VP.  Everything near t = 0 goes through expm1, so
that sigma keeps its relative precision.
"""

from __future__ import annotations

from typing import Any

from diffjax.levels import Array, Process, arrays, value
from diffjax.processes.checks import positive


def vp(beta_min: Array = 0.1, beta_max: Array = 20.0) -> Process:
    """Variance-preserving SDE ``dx = -beta(t) x / 2 dt + sqrt(beta(t)) dW`` with beta linear in t, 0 <= t <= 1.

    Score-Based Generative Modeling through Stochastic Differential Equations, arXiv:2011.13456, equations 11 and 32.

    Raises ValueError unless ``0 < beta_min < beta_max``.

    >>> float(vp().level(1.0).alpha)
    0.00657
    """
    _check(beta_min, beta_max)
    return Process(VP(beta_min, beta_max), 1.0)


def sub_vp(beta_min: Array = 0.1, beta_max: Array = 20.0) -> Process:
    """Sub-VP SDE: the drift of VP with ``g^2 = beta (1 - exp(-2 B))``, whose variance stays below that of VP.

    Score-Based Generative Modeling through Stochastic Differential Equations, arXiv:2011.13456, equation 13 (sub-VP).
    """
    _check(beta_min, beta_max)
    return Process(SubVP(beta_min, beta_max), 1.0)


def _check(beta_min: Array, beta_max: Array) -> None:
    positive(beta_min=beta_min)
    positive(**{"beta_max - beta_min": beta_max - beta_min})


def _parts(schedule: VP | SubVP, time: Array) -> tuple[Any, Array, Array]:
    """The array namespace, beta(t) and its integral B(t)."""
    xp, t, low, high = arrays(time, schedule.beta_min, schedule.beta_max)
    return xp, low + (high - low) * t, t * (low + 0.5 * (high - low) * t)


def _alpha(schedule: VP | SubVP, time: Array) -> Array:
    xp, _, integral = _parts(schedule, time)
    return xp.exp(-0.5 * integral)


def _alpha_rate(schedule: VP | SubVP, time: Array) -> Array:
    xp, beta, integral = _parts(schedule, time)
    return -0.5 * beta * xp.exp(-0.5 * integral)


def _time(xp, integral: Array, beta_min: Array, beta_max: Array) -> Array:
    """The positive root of B(t) = integral, in the form without cancellation."""
    return 2 * integral / (beta_min + xp.sqrt(beta_min**2 + 2 * (beta_max - beta_min) * integral))


@value
class VP:
    beta_min: Array
    beta_max: Array
    factory = "vp"

    def alpha(self, time):
        return _alpha(self, time)

    def sigma(self, time):
        xp, _, integral = _parts(self, time)
        return xp.sqrt(-xp.expm1(-integral))

    def half_log_snr(self, time):
        xp, _, integral = _parts(self, time)
        # -log(exp(B) - 1) / 2 without the exponential, which overflows in float32 at B = 88
        with_zero = xp.where(integral == 0, 1.0, integral)
        return xp.where(integral == 0, xp.inf, -0.5 * (with_zero + xp.log(-xp.expm1(-with_zero))))

    def time(self, half_log_snr):
        xp, value_, b0, b1 = arrays(half_log_snr, self.beta_min, self.beta_max)
        return _time(xp, xp.logaddexp(0.0, -2 * value_), b0, b1)

    def alpha_rate(self, time):
        return _alpha_rate(self, time)

    def variance_rate(self, time):
        xp, beta, integral = _parts(self, time)
        return 0.5 * beta * xp.exp(-integral)

    def sigma_rate(self, time):
        xp, _, integral = _parts(self, time)
        sigma = self.sigma(time)
        rate = self.variance_rate(time) / xp.where(integral == 0, 1.0, sigma)
        return xp.where(integral == 0, xp.inf, rate)


@value
class SubVP:
    beta_min: Array
    beta_max: Array
    factory = "sub_vp"

    def alpha(self, time):
        return _alpha(self, time)

    def sigma(self, time):
        xp, _, integral = _parts(self, time)
        return -xp.expm1(-integral)

    def half_log_snr(self, time):
        # sigma / alpha = 2 sinh(B / 2), again without an exponential that overflows
        xp, _, integral = _parts(self, time)
        with_zero = xp.where(integral == 0, 1.0, integral)
        return xp.where(integral == 0, xp.inf, -(0.5 * with_zero + xp.log(-xp.expm1(-with_zero))))

    def time(self, half_log_snr):
        xp, value_, b0, b1 = arrays(half_log_snr, self.beta_min, self.beta_max)
        # arcsinh(exp(m) / 2) is m to the last bit of a float64 from m = 20 on
        m = xp.minimum(-value_, 20.0)
        return _time(xp, 2 * xp.where(-value_ > 20.0, -value_, xp.arcsinh(0.5 * xp.exp(m))), b0, b1)

    def alpha_rate(self, time):
        return _alpha_rate(self, time)

    def sigma_rate(self, time):
        xp, beta, integral = _parts(self, time)
        return beta * xp.exp(-integral)

    def variance_rate(self, time):
        return self.sigma(time) * self.sigma_rate(time)
