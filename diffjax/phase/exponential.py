"""Exponential integrators of phase space: exact where the clean estimate is constant.

Given x_0, deviations d = u - a x_0 are moved from t to s by ``K`` and noise (the reverse SDE), or by the flow of
``d' = (F + Q S^-1 / 2) d`` (the ODE), with ``Psi S_t Psi^T = S_s``.  In units of a square root, S = L L^T, that flow
is a rotation, and the orthogonal factor of ``L_s^-1 K L_t = L_s^T E^T L_t^-T`` is it up to O(h^3) (it is symmetric in
time).  So Psi is a product of a few of them: without a differential equation, with the right covariance whatever the
number of factors, and also at s = 0, where S_s is singular.
"""

from __future__ import annotations

import itertools
from typing import Any

from diffjax.levels import Array, Grid, namespace, rise, static, value
from diffjax.phase import matrices
from diffjax.phase.solvers import Affine, Phase, Table


def exponential(order: int = 1, eta: int | float = 0, factors: int = 8) -> Phase:
    """``u_s = a_s D + M (u_t - a_t D) + noise``, exact for constant D, with D the clean estimate.

    ``eta = 0`` is the probability-flow ODE (gDDIM), 1 the reverse SDE, whose noise is that of ``u_s | u_t, x_0``.
    Order 2 takes D in the middle of the step, by the line in the half-log-SNR through this estimate and the last; the
    first step, and one to t = 0, are of order 1.  One call a step.

    gDDIM: Generalized denoising diffusion implicit models, arXiv:2206.05564, for CLD.

    Raises ValueError unless order is 1 or 2, eta is 0 or 1 and factors >= 1.

    >>> exponential(order=2).calls
    1
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}.")
    if eta not in (0, 1):
        raise ValueError(f"eta must be 0 or 1, got {eta!r}.")
    if not isinstance(factors, int) or factors < 1:
        raise ValueError(f"factors must be an integer of at least 1, got {factors!r}.")
    method = Exponential(order, int(eta), factors)
    return Phase(method, order=order, draws=int(eta), history=order - 1, weak_order=order)


def flow(schedule: Any, t: Array, s: Array, factors: int = 8) -> Array:
    """Psi(s, t), the flow of deviations under the probability-flow ODE, (..., n, n)."""
    xp = namespace(t, s)
    total = matrices.identity(xp, t, schedule.variables)
    times = [t + (s - t) * (k / factors) for k in range(factors)] + [s]
    for before, after in itertools.pairwise(times):
        left, right = (matrices.factor(schedule.moments(at)[1]) for at in (after, before))
        right = xp.linalg.inv(right)
        moved = matrices.transpose(right @ schedule.forward(after, before) @ left)
        total = left @ matrices.polar(moved) @ right @ total
    return total


@value
class Exponential:
    order: int = static()
    eta: int = static()
    factors: int = static()
    factory = "exponential"

    def table(self, grid: Grid) -> Table:
        schedule, t, s = grid.process.schedule, grid.t.time, grid.s.time
        before, after = (schedule.moments(at)[0] for at in (t, s))
        noise: tuple[Array, ...] = ()
        if self.eta:
            move, covariance = schedule.kernel(t, s)
            noise = (matrices.factor(covariance),)
        else:
            move = flow(schedule, t, s, self.factors)
        weights = after - matrices.act(move, before)
        if self.order == 1:
            return Table(Affine(move, (weights,), noise))
        share = _extrapolation(grid)[:, None]
        return Table(Affine(move, ((1 + share) * weights, -share * weights), noise))


def _extrapolation(grid: Grid) -> Array:
    """c with ``D = x0 + c (x0 - the last x0)`` in the middle of the step: half the ratio of the steps."""
    xp, step = namespace(grid.t), rise(grid.t, grid.s)
    last = xp.concatenate([xp.ones_like(step[:1]), step[:-1]])
    first = xp.arange(len(step)) == 0
    return xp.where(first | ~xp.isfinite(step), 0.0, 0.5 * xp.where(xp.isfinite(step), step, 0.0) / last)
