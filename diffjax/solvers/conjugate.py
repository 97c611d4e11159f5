"""Conjugate integrators: Euler steps for a rescaled state, whose linear part is partly solved exactly."""

from __future__ import annotations

import numpy as np

from diffjax.levels import Array, Grid, is_traced, namespace, value
from diffjax.solvers.coefficients import difference, exponential, noise_reading
from diffjax.solvers.linear import Linear, Table, stack
from diffjax.solvers.quadrature import measure, transfer, variable


def conjugate(rate: Array = 0.0) -> Linear:
    """The conjugate integrator with B = ``rate`` times the identity (lambda-DDIM).

    With ``y = exp(rate t) x / alpha`` the ODE is ``dy/dt = rate y + exp(rate t) (sigma / alpha)' eps``; the first term
    takes an Euler step, the second is integrated exactly for a constant eps.  rate = 0 is DDIM; ``rate`` is in units of
    1 / time, of either sign.  The steps from alpha = 0 and to sigma = 0 are those of DDIM.  One call, order 1.
    Efficient Integrators for Diffusion Generative Models, arXiv:2310.07894, section 3 (conjugate integrators).

    Raises ValueError unless rate is a finite number.

    >>> conjugate(rate=0.5)
    conjugate(rate=0.5)
    """
    if not is_traced(rate) and not (np.ndim(rate) == 0 and np.isfinite(rate)):
        raise ValueError(f"rate must be a finite number, got {rate!r}.")
    return Linear(Conjugate(rate), order=1)


@value
class Conjugate:
    rate: Array
    factory = "conjugate"

    def table(self, grid: Grid) -> Table:
        t, s = grid.t, grid.s
        xp = namespace(t, self.rate)
        over = measure("noise", "time", grid, t, s)
        step = difference(t, s)
        growth = xp.exp(self.rate * (over.points - xp.where(over.regular, variable("time", s), 0.0)))
        integral = xp.sum(over.weights * growth, axis=0)
        keep, _ = transfer("noise", t, s)
        keep = keep * xp.exp(-self.rate * step) * (1 + self.rate * step)
        p, q = noise_reading(t)
        exact = exponential(t, s)
        plain = ~over.regular
        columns = [xp.where(plain, a, b) for a, b in zip(exact, (keep, integral), strict=True)]
        reads = stack(xp.where(plain, 0.0, p), xp.where(plain, 1.0, q))
        return Table(stack(*columns), reads=reads[:, None])
