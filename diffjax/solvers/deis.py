"""DEIS: the noise as a polynomial in time (tAB) or in rho = sigma / alpha (rhoAB), or Runge-Kutta in rho."""

from __future__ import annotations

from diffjax.levels import Grid, static, value
from diffjax.solvers.linear import Linear, Table
from diffjax.solvers.multistep import Multistep
from diffjax.solvers.quadrature import choice
from diffjax.solvers.runge_kutta import heun, kutta3, rk4

_VARIABLES = {"tab": "time", "rhoab": "noise_to_signal"}
_TABLEAUS = {"heun": heun, "kutta3": kutta3, "rk4": rk4}


def deis(order: int = 3, variant: str = "tab", start: str = "corrected") -> Linear:
    """DEIS multistep: ``x_s = alpha_s / alpha_t x_t + alpha_s int l d(sigma / alpha)``, l through the last readings.

    ``variant``: l is a polynomial of the noise in time, "tab", or in sigma / alpha, "rhoab".  Order 1 is DDIM.  (The
    paper counts the degree, ``order - 1``.)  One denoiser call a step and one more at the start for order 4; the order
    is ``order``, 1 to 4, with the start "corrected", and 2 at most with the published, "plain" one.
    Fast Sampling of Diffusion Models with Exponential Integrator, arXiv:2204.13902, equations 14 and 15.

    Raises ValueError for another order, variant or start.

    >>> deis(order=2)
    deis(order=2, variant='tab', start='corrected')
    """
    choice("order", order, (1, 2, 3, 4))
    choice("variant", variant, tuple(_VARIABLES))
    method = DEIS(order, variant, start)
    return method.multistep().solver(method)


@value
class DEIS:
    order: int = static()
    variant: str = static()
    start: str = static()
    factory = "deis"

    def multistep(self) -> Multistep:
        return Multistep(self.order, "noise", _VARIABLES[self.variant], start=self.start)

    def table(self, grid: Grid) -> Table:
        return self.multistep().table(grid)


def rho_rk(tableau: str = "heun") -> Linear:
    """DEIS rhoRK: a Runge-Kutta method for ``d(x / alpha) / d rho = eps`` in rho = sigma / alpha.

    ``tableau``: "heun" (order and calls 2), "kutta3" (3) or "rk4" (4).
    Fast Sampling of Diffusion Models with Exponential Integrator, arXiv:2204.13902, section 4.

    Raises ValueError for another tableau.
    """
    choice("tableau", tableau, tuple(_TABLEAUS))
    return _TABLEAUS[tableau]("noise_to_signal")
