"""Variance-exploding processes: ``alpha = 1`` and sigma grows.

`ve` has ``sigma = sigma_min (sigma_max / sigma_min)^t`` for 0 <= t <= 1, so at t = 0 the noise is sigma_min, not 0.
`edm` has sigma itself as time, ``sigma = t`` for 0 <= t <= sigma_max.
"""

from __future__ import annotations

from diffjax.levels import Array, Process, arrays, value
from diffjax.processes.checks import positive


def ve(sigma_min: Array = 0.01, sigma_max: Array = 50.0) -> Process:
    """Variance-exploding SDE with geometric noise, ``sigma(t) = sigma_min (sigma_max / sigma_min)^t``, 0 <= t <= 1.

    At t = 0 noise of standard deviation sigma_min is left: pass ``final_denoise=True`` to the sampler to remove it.
    Score-Based Generative Modeling through Stochastic Differential Equations, arXiv:2011.13456, equations 9 and 31.

    Raises ValueError unless ``0 < sigma_min < sigma_max``.
    """
    positive(sigma_min=sigma_min, **{"sigma_max - sigma_min": sigma_max - sigma_min})
    return Process(VE(sigma_min, sigma_max), 1.0)


def edm(sigma_max: Array = 80.0) -> Process:
    """The process of EDM: ``x_t = x_0 + t eps`` for 0 <= t <= sigma_max, with the noise level as time.

    Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364, section 3.

    >>> float(edm().level(2.0).sigma)
    2.0
    """
    positive(sigma_max=sigma_max)
    return Process(EDM(sigma_max), sigma_max)


@value
class VE:
    sigma_min: Array
    sigma_max: Array
    factory = "ve"

    def alpha(self, time):
        xp, t = arrays(time)
        return xp.ones_like(t)

    def half_log_snr(self, time):
        xp, t, low, high = arrays(time, self.sigma_min, self.sigma_max)
        return -xp.log(low) - t * xp.log(high / low)

    def sigma(self, time):
        xp, value_ = arrays(self.half_log_snr(time))
        return xp.exp(-value_)

    def time(self, half_log_snr):
        xp, value_, low, high = arrays(half_log_snr, self.sigma_min, self.sigma_max)
        return (-value_ - xp.log(low)) / xp.log(high / low)

    def alpha_rate(self, time):
        xp, t = arrays(time)
        return xp.zeros_like(t)

    def sigma_rate(self, time):
        xp, _, low, high = arrays(time, self.sigma_min, self.sigma_max)
        return self.sigma(time) * xp.log(high / low)

    def variance_rate(self, time):
        return self.sigma(time) * self.sigma_rate(time)


@value
class EDM:
    sigma_max: Array
    factory = "edm"

    def alpha(self, time):
        xp, t = arrays(time)
        return xp.ones_like(t)

    def sigma(self, time):
        return arrays(time)[1]

    def half_log_snr(self, time):
        xp, t = arrays(time)
        return xp.where(t == 0, xp.inf, -xp.log(xp.where(t == 0, 1.0, t)))

    def time(self, half_log_snr):
        xp, value_ = arrays(half_log_snr)
        return xp.exp(-value_)

    def alpha_rate(self, time):
        xp, t = arrays(time)
        return xp.zeros_like(t)

    def sigma_rate(self, time):
        xp, t = arrays(time)
        return xp.ones_like(t)

    def variance_rate(self, time):
        return arrays(time)[1]
