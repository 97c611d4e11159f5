"""Rectified flow: the straight path ``x_t = (1 - t) x_0 + t eps`` between data (t = 0) and noise (t = 1)."""

from __future__ import annotations

from diffjax.levels import Process, arrays, value


def flow() -> Process:
    """Rectified flow, also the conditional optimal-transport path: ``alpha = 1 - t``, ``sigma = t``, 0 <= t <= 1.

    Time runs from data to noise as in every process here; papers on flow matching often run it the other way.
    Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow, arXiv:2209.03003, and
    Flow Matching for Generative Modeling, arXiv:2210.02747 (with sigma_min = 0).

    >>> float(flow().level(0.25).alpha)
    0.75
    """
    return Process(Flow(), 1.0)


@value
class Flow:
    factory = "flow"

    def alpha(self, time):
        return 1.0 - arrays(time)[1]

    def sigma(self, time):
        return arrays(time)[1]

    def half_log_snr(self, time):
        xp, t = arrays(time)
        inside = (t > 0) & (t < 1)
        safe = xp.where(inside, t, 0.5)
        return xp.where(inside, xp.log1p(-safe) - xp.log(safe), xp.where(t <= 0, xp.inf, -xp.inf))

    def time(self, half_log_snr):
        xp, value_ = arrays(half_log_snr)
        # sigmoid(-value), overflow-free on both sides
        return xp.exp(-xp.logaddexp(0.0, value_))

    def alpha_rate(self, time):
        xp, t = arrays(time)
        return -xp.ones_like(t)

    def sigma_rate(self, time):
        xp, t = arrays(time)
        return xp.ones_like(t)

    def variance_rate(self, time):
        return arrays(time)[1]
