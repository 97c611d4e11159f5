"""Adams methods: exponential linear multistep methods in any prediction and any variable.

    x_s = (psi_s / psi_t) x_t + psi_s int l(u) dm,   l the polynomial through the last readings v (see `quadrature`)

DEIS, LMS, the exact form of DPM-Solver multistep, UniP and SA-Solver without noise are points of this family.
"""

from __future__ import annotations

import numpy as np

from diffjax.levels import Array, Grid, is_traced, static, value
from diffjax.solvers.linear import Linear, Table
from diffjax.solvers.multistep import Multistep
from diffjax.solvers.quadrature import PREDICTIONS, VARIABLES, Residual, choice


def adams(
    order: int = 3,
    prediction: str = "noise",
    variable: str = "noise_to_signal",
    corrector: int = 0,
    start: str = "corrected",
    lower_last: bool = True,
) -> Linear:
    """Adams-Bashforth, and with a ``corrector`` Adams-Moulton, for a prediction in a variable.

    The defaults are LMS of k-diffusion, which is DEIS rhoAB: the noise is a polynomial in sigma / alpha.
    Denoiser calls: one a step (predict, evaluate, correct), and one more at the start for order 4.

    Args:
        order: 1 to 4 readings make the prediction.
        prediction: what is interpolated: "data", "noise", "velocity".
        variable: in which it is a polynomial: "time", "half_log_snr", "noise_to_signal".
        corrector: 0, or 2 to ``order`` + 1 readings, the new one among them, that correct a step once its end is
            read; then the order is ``corrector``, 4 at most.
        start: "corrected", so that the order is reached, or "plain", orders 1, 2, ... as in most implementations:
            then the order is 2 at most, 3 with a corrector.
        lower_last: the step to sigma = 0 is first order.  False keeps the order there, as k-diffusion does; it acts
            where the polynomial is finite: noise over sigma / alpha, velocity over time.

    A step from alpha = 0 is first order for the data and the noise, and in every variable but the time.
    Fast Sampling of Diffusion Models with Exponential Integrator, arXiv:2204.13902, section 3.

    Raises ValueError for arguments out of these ranges.

    >>> adams(order=2, prediction="data", variable="half_log_snr").order
    2
    """
    choice("order", order, (1, 2, 3, 4))
    choice("prediction", prediction, PREDICTIONS)
    choice("variable", variable, VARIABLES)
    choice("corrector", corrector, (0, *range(2, min(order + 1, 4) + 1)))
    method = Adams(order, prediction, variable, corrector, start, lower_last)
    return method.multistep().solver(method)


@value
class Adams:
    order: int = static()
    prediction: str = static()
    variable: str = static()
    corrector: int = static()
    start: str = static()
    lower_last: bool = static()
    factory = "adams"

    def multistep(self) -> Multistep:
        return Multistep(
            self.order,
            self.prediction,
            self.variable,
            self.corrector,
            start=self.start,
            lower_last=self.lower_last,
        )

    def table(self, grid: Grid) -> Table:
        return self.multistep().table(grid)


def res(order: int = 2, start: str = "corrected") -> Linear:
    """RES multistep (RES-2M, RES-3M): the clean estimate as a polynomial in the half-log-SNR, integrated exactly.

    Its two-step form satisfies the order conditions exactly, not to leading order only as DPM-Solver++(2M) does; it
    is ``adams(order, "data", "half_log_snr")``.  One denoiser call a step; the order is ``order``, 1 to 3.
    Improved Order Analysis and Design of Exponential Integrator for Diffusion Models Sampling, arXiv:2308.02157.

    Raises ValueError for another order or start.
    """
    choice("order", order, (1, 2, 3))
    return adams(order, "data", "half_log_snr", start=start)


def rosenbrock(order: int = 2, data_std: Array = 0.5, start: str = "corrected") -> Linear:
    """Exponential Rosenbrock form: the denoiser's slope for data N(0, data_std^2) is part of the exact solution.

    ``x_s = (psi_s / psi_t) x_t + psi_s int F dm``, psi^2 = alpha^2 data_std^2 + sigma^2, where F is the training target
    of EDM (times data_std), a polynomial in the half-log-SNR.  Data N(0, data_std^2) are solved exactly in one step;
    a small data_std is the data prediction and a large one the noise prediction.  One denoiser call a step;
    the order is ``order``, 1 to 3.

    Raises ValueError for another order or start, or unless data_std > 0.
    """
    choice("order", order, (1, 2, 3))
    if not is_traced(data_std) and not (np.ndim(data_std) == 0 and 0 < data_std < np.inf):
        raise ValueError(f"data_std must be a positive number, got {data_std!r}.")
    method = Rosenbrock(data_std, order, start)
    return Multistep(order, start=start).solver(method)


@value
class Rosenbrock:
    data_std: Array
    order: int = static()
    start: str = static()
    factory = "rosenbrock"

    def table(self, grid: Grid) -> Table:
        return Multistep(self.order, Residual(self.data_std), start=self.start).table(grid)
