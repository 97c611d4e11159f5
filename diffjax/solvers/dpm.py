"""Exponential multistep methods in the half-log-SNR.

With ``h_i`` the steps in half-log-SNR, the exact solution for a constant clean estimate D is
``x_s = sigma_s / sigma_t x_t + alpha_s (1 - exp(-h)) D``; higher order comes from extrapolating D.
"""

from __future__ import annotations

from diffjax.levels import Array, Grid, namespace, restarts, rise, static, value
from diffjax.solvers.coefficients import exponential
from diffjax.solvers.linear import Linear, Table, stack


def dpmpp(order: int = 2) -> Linear:
    """DPM-Solver++ multistep, ``order`` 1 (= DDIM) or 2 (2M).  One denoiser call a step.

    ``D = x0_i + (x0_i - x0_{i-1}) h_i / (2 h_{i-1})``; steps without a usable history (the first, one after a gap, the
    last to sigma = 0, one after alpha = 0) are first order, which the order of the whole allows.
    DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models, arXiv:2211.01095, algorithm 2.

    Raises ValueError for another order.

    >>> dpmpp()
    dpmpp(order=2)
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}.")
    return Linear(DPMPP(order), order=order, history=order - 1)


@value
class DPMPP:
    order: int = static()
    factory = "dpmpp"

    def table(self, grid: Grid) -> Table:
        keep, weight = exponential(grid.t, grid.s)
        if self.order == 1:
            return Table(stack(keep, weight))
        slope = weight * extrapolation(grid)
        return Table(stack(keep, weight + slope, -slope))


def extrapolation(grid: Grid) -> Array:
    """``h_i / (2 h_{i-1})``, and 0 where the step has no usable history."""
    xp = namespace(grid.t)
    h = rise(grid.t, grid.s)
    before = xp.concatenate([h[:1], h[:-1]])
    usable = xp.isfinite(h) & xp.isfinite(before) & (before != 0) & ~restarts(grid)
    return xp.where(usable, 0.5 * xp.where(usable, h, 0.0) / xp.where(usable, before, 1.0), 0.0)
