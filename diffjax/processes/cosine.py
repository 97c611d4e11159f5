"""The cosine process ``alpha = cos(pi t / 2)``, ``sigma = sin(pi t / 2)``: both ends are exact."""

from __future__ import annotations

import math

from diffjax.levels import Process, arrays, value


def cosine() -> Process:
    """Variance-preserving process with ``alpha = cos(pi t / 2)``, ``sigma = sin(pi t / 2)``, 0 <= t <= 1.

    The continuous form without offset (the discrete one with s = 0.008 is ``ddpm(schedule="cosine")``).
    Progressive Distillation for Fast Sampling of Diffusion Models, arXiv:2202.00512, section 2.

    >>> float(cosine().level(1.0).alpha)
    0.0
    """
    return Process(Cosine(), 1.0)


_QUARTER = 0.5 * math.pi


@value
class Cosine:
    factory = "cosine"

    def alpha(self, time):
        # sin of the complement: cos(pi / 2) is 6e-17 in floating point, sin(0) is 0
        xp, t = arrays(time)
        return xp.sin(_QUARTER * (1.0 - t))

    def sigma(self, time):
        xp, t = arrays(time)
        return xp.sin(_QUARTER * t)

    def half_log_snr(self, time):
        xp, t = arrays(time)
        inside = (t > 0) & (t < 1)
        safe = xp.where(inside, t, 0.5)
        ends = xp.where(t <= 0, xp.inf, -xp.inf)
        # log cot, by the tangent of the smaller angle: near 0 and 1 the other one has lost the digits of t or 1 - t
        early = safe < 0.5
        tangent = xp.log(xp.tan(_QUARTER * xp.where(early, safe, 1.0 - safe)))
        return xp.where(inside, xp.where(early, -tangent, tangent), ends)

    def time(self, half_log_snr):
        xp, value_ = arrays(half_log_snr)
        return xp.arctan(xp.exp(-value_)) / _QUARTER

    def alpha_rate(self, time):
        return -_QUARTER * self.sigma(time)

    def sigma_rate(self, time):
        return _QUARTER * self.alpha(time)

    def variance_rate(self, time):
        return _QUARTER * self.sigma(time) * self.alpha(time)
