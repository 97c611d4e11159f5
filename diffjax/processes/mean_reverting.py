"""Noise around what is known: processes whose data decay to a given image or signal y while noise is added.

With ``z = x - y`` all are plain, ``x_t = y + alpha(t) (x_0 - y) + sigma(t) eps``: the difference to y is what decays.
A denoiser estimates that difference, and sampling starts at y + sigma(end) eps.
"""

from __future__ import annotations

import numpy as np

from diffjax.levels import Array, Process, Tree, arrays, value
from diffjax.processes.changed import shifted
from diffjax.processes.checks import positive
from diffjax.processes.conditioning import Conditioned


def ouve(y: Tree, gamma: Array = 1.5, sigma_min: Array = 0.05, sigma_max: Array = 0.5) -> Process:
    """The Ornstein-Uhlenbeck variance-exploding SDE of SGMSE+, ``dx = gamma (y - x) dt + g dw``, 0 <= t <= 1.

    ``g = sigma_min (sigma_max / sigma_min)^t sqrt(2 L)`` with L = log(sigma_max / sigma_min), so ``alpha = exp(-gamma
    t)`` and ``sigma^2 = sigma_min^2 L / (gamma + L) ((sigma_max / sigma_min)^(2t) - exp(-2 gamma t))``.

    Args:
        y: the degraded signal, shaped like a sample; sampling starts at it.
        gamma: how fast the mean goes to y: a share exp(-gamma) of the difference is left at the end.
        sigma_min, sigma_max: the noise of g, as in `ve`.

    Speech Enhancement and Dereverberation with Diffusion-based Generative Models, arXiv:2208.05830.  The paper's
    sampler is ``diffjax.modifiers.langevin(diffjax.solvers.reverse_diffusion(), size=snr**2)``, 30 steps.

    Raises ValueError unless ``0 < sigma_min < sigma_max`` and gamma > 0.

    >>> ouve(np.zeros(3)).level(1.0).alpha.round(3)
    np.float64(0.223)
    """
    positive(gamma=gamma, sigma_min=sigma_min, **{"sigma_max - sigma_min": sigma_max - sigma_min})
    return shifted(Process(OUVE(gamma, sigma_min, sigma_max), 1.0), y)


@value
class OUVE:
    gamma: Array
    sigma_min: Array
    sigma_max: Array
    factory = "ouve"

    def _parts(self, time):
        """sigma^2 = c (exp(2 L t) - exp(-2 gamma t)) with c = sigma_min^2 L / (gamma + L)."""
        xp, t, gamma, low, high = arrays(time, self.gamma, self.sigma_min, self.sigma_max)
        growth = xp.log(high / low)
        return xp, t, gamma, growth, low**2 * growth / (gamma + growth)

    def alpha(self, time):
        xp, t, gamma, *_ = self._parts(time)
        return xp.exp(-gamma * t)

    def sigma(self, time):
        xp, t, gamma, growth, c = self._parts(time)
        return xp.exp(-gamma * t) * xp.sqrt(c * xp.expm1(2 * (gamma + growth) * t))

    def half_log_snr(self, time):
        xp, t, gamma, growth, c = self._parts(time)
        ratio = c * xp.expm1(2 * (gamma + growth) * t)  # sigma^2 / alpha^2
        return xp.where(ratio > 0, -0.5 * xp.log(xp.where(ratio > 0, ratio, 1.0)), xp.inf)

    def time(self, half_log_snr):
        xp, given, gamma, growth, c = self._parts(half_log_snr)
        return xp.logaddexp(0.0, -2 * given - xp.log(c)) / (2 * (gamma + growth))

    def alpha_rate(self, time):
        return -self._parts(time)[2] * self.alpha(time)

    def variance_rate(self, time):
        xp, t, gamma, growth, c = self._parts(time)
        return c * (growth * xp.exp(2 * growth * t) + gamma * xp.exp(-2 * gamma * t))

    def sigma_rate(self, time):
        return _over_sigma(self, time)


def brownian_bridge(y: Tree, duration: Array = 1.0, scale: Array = 1.0) -> Process:
    """The Brownian bridge from the data to a known y, ``x_t = (1 - u) x_0 + u y + scale sqrt(T u (1 - u)) eps``.

    Here u = t / T and 0 <= t <= T = ``duration``.  It starts and ends without noise, so the first step of a sampler has
    to make all of its noise anew (``ddim(eta=1.0)`` and ``ancestral()`` do); others are refused, unless the grid starts
    below ``duration``.

    Frame Interpolation with Consecutive Brownian Bridge Diffusion, arXiv:2405.05953.

    Raises ValueError unless duration > 0 and scale > 0.

    >>> brownian_bridge(np.zeros(3)).level(0.5).sigma
    np.float64(0.5)
    """
    positive(duration=duration, scale=scale)
    return shifted(Process(BrownianBridge(duration, scale), duration), y)


def consecutive_bridges(
    before: Tree, after: Tree, duration: Array = 1.0, scale: Array = 1.0
) -> tuple[Process, Process]:
    """The Brownian bridges from a middle frame to the frame before it and to the frame after it.

    One network serves both: it is told where on the way from ``before`` (0) by way of the middle (``duration``) to
    ``after`` (twice that) a state is.  Their leaves have the same structure, so they can be stacked.

    Frame Interpolation with Consecutive Brownian Bridge Diffusion, arXiv:2405.05953.

    Raises ValueError as `brownian_bridge`.
    """
    sides = []
    for frame, direction in ((before, -1.0), (after, 1.0)):
        process = brownian_bridge(frame, duration, scale)
        placed = Conditioned(process.schedule, Placed(duration, direction))
        sides.append(Process(placed, process.end, process.coordinates))
    return sides[0], sides[1]


@value
class Placed:
    origin: Array
    direction: Array
    factory = "placed"

    def __call__(self, told: Array) -> Array:
        return self.origin + self.direction * told


@value
class BrownianBridge:
    duration: Array
    scale: Array
    factory = "brownian_bridge"

    def _parts(self, time):
        xp, t, duration, scale = arrays(time, self.duration, self.scale)
        return xp, t / duration, duration, scale

    def alpha(self, time):
        return 1 - self._parts(time)[1]

    def sigma(self, time):
        xp, u, duration, scale = self._parts(time)
        return scale * xp.sqrt(duration * u * (1 - u))

    def half_log_snr(self, time):
        xp, u, duration, scale = self._parts(time)
        inside = (u > 0) & (u < 1)
        safe = xp.where(inside, u, 0.5)
        finite = 0.5 * (xp.log1p(-safe) - xp.log(safe) - xp.log(duration)) - xp.log(scale)
        return xp.where(inside, finite, xp.where(u <= 0, xp.inf, -xp.inf))

    def time(self, half_log_snr):
        xp, given, duration, scale = arrays(half_log_snr, self.duration, self.scale)
        return duration * xp.exp(-xp.logaddexp(0.0, 2 * given + xp.log(duration) + 2 * xp.log(scale)))

    def alpha_rate(self, time):
        xp, u, duration, _ = self._parts(time)
        return -xp.ones_like(u) / duration

    def variance_rate(self, time):
        _, u, _, scale = self._parts(time)
        return scale**2 * (0.5 - u)

    def sigma_rate(self, time):
        return _over_sigma(self, time)


def _over_sigma(schedule, time):
    """sigma' from sigma sigma', with its infinities where sigma = 0."""
    rate, sigma = schedule.variance_rate(time), schedule.sigma(time)
    xp, rate, sigma = arrays(rate, sigma)
    return xp.where(sigma > 0, rate / xp.where(sigma > 0, sigma, 1.0), xp.copysign(np.inf, rate))
