"""Coefficients-preserving sampling: Gaussian steps for policy gradients on flow models."""

from __future__ import annotations

import math

from diffjax.levels import Array, Grid, namespace, ratio, rise, value
from diffjax.solvers.arguments import is_zero, number
from diffjax.solvers.linear import Linear, Table, stack


def flow_cps(eta: Array = 0.5) -> Linear:
    """Coefficients-preserving sampling: a fixed share of the noise is renewed in every step.

    ``x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std z`` with ``std = sigma_s sin(eta pi / 2)``: the total noise
    coefficient stays sigma_s, for flow matching and every other Gaussian process.  eta = 0 is Euler on the flow
    (DDIM), eta = 1 renews all of the noise.  On data that are one point every marginal is exact, where an SDE's Euler
    step leaves too much noise; on spread-out data the law is too narrow, and since the share does not shrink with the
    step it does not converge for eta > 0.

    One denoiser call a step, order 1 at eta = 0; has a `kernel` for likelihood ratios.
    Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching, arXiv:2509.05952.

    Raises ValueError unless 0 <= eta <= 1.

    >>> flow_cps(0.7)
    flow_cps(eta=0.7)
    """
    number("eta", eta, 0.0, 1.0)
    if is_zero(eta):
        return Linear(FlowCPS(eta), order=1)
    return Linear(FlowCPS(eta), order=1, draws=1, weak_order=0)


@value
class FlowCPS:
    eta: Array
    factory = "flow_cps"

    def table(self, grid: Grid) -> Table:
        t, s = grid.t, grid.s
        xp = namespace(t, self.eta)
        h = rise(t, s)
        angle = xp.where(h == 0, 0.0, 0.5 * math.pi * xp.asarray(self.eta))  # s = t is the identity
        kept = xp.where(self.eta == 1, xp.where(h == 0, 1.0, 0.0), xp.cos(angle))
        # alpha_s - alpha_t sigma_s / sigma_t kept, free of cancellation for small h
        weight = -s.alpha * (xp.expm1(-h) * kept - 2 * xp.sin(0.5 * angle) ** 2)
        columns = [ratio(s.sigma, t.sigma) * kept, weight]
        return Table(stack(*columns, *([] if is_zero(self.eta) else [s.sigma * xp.sin(angle)])))
