"""UniPC: the unified predictor-corrector, an exponential Adams pair in the half-log-SNR.

    UniP   x~_s = (transfer of DDIM) + B(h) sum_m a_m (v_m - v_0) / r_m,    over p readings, the latest v_0
    UniC   x_s  = the same with the new reading v(x~_s) among them,         which is the next step's v_0

For p >= 3 and for UniC-p with p >= 2 the equations for a are solved in full, B drops out, and the result is the exact
integral of the interpolating polynomial.  For two readings a = 1/2 is taken instead, and ``variant`` is seen.
"""

from __future__ import annotations

from diffjax.levels import Grid, static, value
from diffjax.solvers.linear import Linear, Table
from diffjax.solvers.multistep import Multistep
from diffjax.solvers.quadrature import choice


def unip(order: int = 2, variant: str = "B2", prediction: str = "data", start: str = "corrected") -> Linear:
    """UniP-p, the predictor alone: ``order`` p = 1 (DDIM) to 3.  One denoiser call a step.

    ``variant``: B(h) = h, "B1", or exp(h) - 1, "B2", with which UniP-2 is DPM-Solver++(2M).  ``prediction``: "data"
    or "noise".  Order p with the start "corrected", 2 at most with the published, "plain" one.
    UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models, arXiv:2302.04867, section 3.

    Raises ValueError for other arguments.
    """
    return _solver("unip", order, variant, prediction, start)


def unipc(order: int = 2, variant: str = "B2", prediction: str = "data", start: str = "corrected") -> Linear:
    """UniPC-p: UniP-p corrected by UniC-p with the reading that the next step makes anyway.  One denoiser call a step.

    ``order`` p = 1 to 3 is that of the predictor; the solver's order is p + 1.  For p = 3 that takes a start with one
    more call; with the published start, "plain", it is 3.  The last step is not corrected (nor is it as published).
    ``variant`` "B1" or "B2" and ``prediction`` as in `unip`.  States saved between steps are the predicted ones.
    UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models, arXiv:2302.04867, algorithms
    1 and 2, theorem 3.1.

    Raises ValueError for other arguments.

    >>> unipc().order
    3
    """
    return _solver("unipc", order, variant, prediction, start)


def _solver(name: str, order: int, variant: str, prediction: str, start: str) -> Linear:
    choice("order", order, (1, 2, 3))
    choice("variant", variant, ("B1", "B2"))
    choice("prediction", prediction, ("data", "noise"))
    method = UniPC(name, order, variant, prediction, start)
    return method.multistep().solver(method)


@value
class UniPC:
    name: str = static()
    order: int = static()
    variant: str = static()
    prediction: str = static()
    start: str = static()

    def __repr__(self) -> str:
        arguments = f"variant={self.variant!r}, prediction={self.prediction!r}, start={self.start!r}"
        return f"{self.name}(order={self.order}, {arguments})"

    def multistep(self) -> Multistep:
        corrector = self.order + 1 if self.name == "unipc" else 0
        return Multistep(self.order, self.prediction, corrector=corrector, form=self.variant, start=self.start)

    def table(self, grid: Grid) -> Table:
        return self.multistep().table(grid)
