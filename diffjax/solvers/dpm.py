"""DPM-Solver (noise prediction) and DPM-Solver++ (data prediction): exponential methods in the half-log-SNR.

With ``h`` the step in half-log-SNR, the exact solutions for a constant prediction are

    x_s = alpha_s / alpha_t x_t - sigma_s (exp(h) - 1) eps,   x_s = sigma_s / sigma_t x_t + alpha_s (1 - exp(-h)) x0;

higher order comes from a polynomial in the half-log-SNR through readings of earlier steps (multistep) or of
levels inside the step (singlestep).
"""

from __future__ import annotations

import numpy as np

from diffjax.levels import Array, Grid, is_traced, static, value
from diffjax.solvers.exponential_runge_kutta import Tableau, exponential_table
from diffjax.solvers.linear import Linear, Table
from diffjax.solvers.multistep import Multistep
from diffjax.solvers.quadrature import choice

FORMS = ("midpoint", "heun")
_R2 = 2 / 3  # the second inner node: no other one gives order 3 with three calls


def dpmpp(
    order: int = 2, form: str = "midpoint", singlestep: bool = False, r1: Array | None = None, start: str = "corrected"
) -> Linear:
    """DPM-Solver++ of ``order`` 1 (= DDIM), 2 or 3 (2M, 3M; 2S, 3S if ``singlestep``).

    2M: ``x_s = sigma_s / sigma_t x_t + alpha_s (1 - exp(-h)) D``, ``D = x0_i + (x0_i - x0_{i-1}) h_i / (2 h_{i-1})``.
    Steps without a usable history (the first, one after a gap, the last to sigma = 0, one after alpha = 0) are
    first order, which order 2 allows; for order 3 the first step is corrected when its end is read.

    Args:
        order: 1, 2 or 3; it is the order reached.
        form: of the slope's weight: "midpoint" as above, or "heun", the exact integral of the interpolating
            polynomial.  Where they are the same (orders 1 and 3M) it is not seen.  (Most
            implementations of 3M halve the second derivative's weight, which loses the third order.)
        singlestep: ``order`` denoiser calls a step, at fractions 0, r1 (and 2/3) of it in half-log-SNR, instead of one.
        r1: inner node of 2S in (0, 1], default 1/2, or of 3S in (0, 2/3), default 1/3.
        start: of 3M: "corrected", or "plain" as published, which limits the order to 2.

    DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models, arXiv:2211.01095, algorithms 1
    and 2 and appendix B.  On x - mu it is the ODE sampler of processes that revert to a mean mu.
    MRS: A Fast Sampler for Mean Reverting Diffusion based on ODE and SDE Solvers, arXiv:2502.07856.

    Raises ValueError for arguments out of these ranges.

    >>> dpmpp()
    dpmpp(order=2, form='midpoint')
    """
    return _solver("data", order, form, singlestep, r1, start)


def dpm_solver(
    order: int = 2, form: str = "midpoint", singlestep: bool = True, r1: Array | None = None, start: str = "corrected"
) -> Linear:
    """DPM-Solver of ``order`` 1 (= DDIM), 2 or 3: singlestep (DPM-Solver-2, -3) or multistep (2M, 3M), for the noise.

    2: ``u = alpha_r / alpha_t x - sigma_r (exp(r1 h) - 1) eps(x)`` at the fraction r1 of the step, then
    ``x_s = alpha_s / alpha_t x - sigma_s (exp(h) - 1) (eps(x) + (eps(u) - eps(x)) / (2 r1))``.
    The arguments, and what is done at the start and the ends, are those of `dpmpp`.
    DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps, arXiv:2206.00927,
    algorithms 1, 2, 4 and 5; DPM-2 of k-diffusion is order 2 with r1 = 1/2.

    Raises ValueError for arguments out of these ranges.

    >>> dpm_solver(order=3).calls
    3
    """
    return _solver("noise", order, form, singlestep, r1, start)


def _solver(prediction: str, order: int, form: str, singlestep: bool, r1: Array | None, start: str) -> Linear:
    choice("order", order, (1, 2, 3))
    choice("form", form, FORMS)
    if not singlestep or order == 1:
        if r1 is not None:
            raise ValueError(f"r1={r1!r} is the inner node of singlestep methods of order 2 and 3; leave it out.")
        multistep = DPM(prediction, order, form, start)
        return multistep.multistep().solver(multistep)
    node: Array = (1 / 2 if order == 2 else 1 / 3) if r1 is None else r1
    if not is_traced(node) and not (np.ndim(node) == 0 and 0 < node and (node <= 1 if order == 2 else node < _R2)):
        raise ValueError(f"r1 must be in (0, {'1]' if order == 2 else '2/3)'} for order {order}, got {r1!r}.")
    if start != "corrected":
        raise ValueError(f"start={start!r} is for multistep methods; singlestep ones have no start.")
    return Linear(SinglestepDPM(prediction, order, form, node), order=order, calls=order)


_NAMES = {"data": "dpmpp", "noise": "dpm_solver"}


@value
class DPM:
    prediction: str = static()
    order: int = static()
    form: str = static()
    start: str = static()

    def __repr__(self) -> str:
        extra = "" if self.prediction == "data" else ", singlestep=False"
        extra += "" if self.start == "corrected" else f", start={self.start!r}"
        return f"{_NAMES[self.prediction]}(order={self.order}, form={self.form!r}{extra})"

    def multistep(self) -> Multistep:
        form = "B2" if self.form == "midpoint" and self.order == 2 else "exact"
        return Multistep(self.order, self.prediction, form=form, start=self.start)

    def table(self, grid: Grid) -> Table:
        return self.multistep().table(grid)


@value
class SinglestepDPM:
    prediction: str = static()
    order: int = static()
    form: str = static()
    r1: Array

    def __repr__(self) -> str:
        name = _NAMES[self.prediction]
        return f"{name}(order={self.order}, form={self.form!r}, singlestep=True, r1={self.r1})"

    def table(self, grid: Grid) -> Table:
        r1, r2, heun = self.r1, _R2, self.form == "heun"
        if self.order == 2:
            tableau = Tableau((r1,), ((),), ((0, 1 / r1) if heun else (1 / (2 * r1),),))
        else:
            out = ((), (0, 1 / r2))
            if heun:
                first, second = r1 * (r2 - r1), r2 * (r2 - r1)
                out = ((0, r2 / first, -1 / first), (0, -r1 / second, 1 / second))
            tableau = Tableau((r1, r2), ((), ((0, 1 / r1),)), out)
        return exponential_table(grid, self.prediction, tableau)
