"""Stochastic exponential multistep methods in the half-log-SNR: SDE-DPM-Solver++ and SA-Solver.

The reverse SDEs ``dx = [f x - (1 + tau^2)/2 g^2 score] dt + tau g dW`` all have the marginals of the process.  With
tau constant along a step of length h in the half-log-SNR lambda, the exact solution in terms of the clean estimate is

    x_s = sigma_s / sigma_t exp(-tau^2 h) x_t + alpha_s k int_0^h exp(-k (h - u)) D(lambda_t + u) du
          + sigma_s sqrt(1 - exp(-2 tau^2 h)) z,                                               k = 1 + tau^2,

and the methods differ in the polynomial that stands for D.
"""

from __future__ import annotations

from collections.abc import Callable

from diffjax.levels import Array, Grid, Level, namespace, ratio, rise, root, static, value
from diffjax.solvers.arguments import choice, integer, is_zero, number, number_or_function
from diffjax.solvers.linear import Linear, Table
from diffjax.solvers.newton import Law, exponential_moments, history, multistep


def sde_dpmpp(order: int = 2, eta: Array = 1.0, form: str = "midpoint") -> Linear:
    """SDE-DPM-Solver++ multistep: 1, 2M or 3M.

    ``x_s = sigma_s / sigma_t exp(-eta h) x_t + alpha_s (1 - exp(-(1 + eta) h)) D + sigma_s sqrt(1 - exp(-2 eta h)) z``
    with D extrapolated from ``order`` clean estimates.  ``eta`` is the tau^2 of the module: 1 is the time reversal of
    the forward SDE, 0 is DPM-Solver++.  ``form`` of order 2: "midpoint" (D is its value half way) or "heun" (D linear,
    integrated exactly); order 3 always integrates exactly.  Order 3 corrects its first step afterwards, without a
    further call, because a first-order start would leave it at order 2.

    One denoiser call a step; order ``order`` at eta = 0, weak order at most 2 for eta > 0 and strong order 1.
    DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models, arXiv:2211.01095, section 5.

    Raises ValueError unless order is 1, 2 or 3, eta >= 0 and form is one of the two.

    >>> sde_dpmpp(order=3, eta=0.5)
    sde_dpmpp(order=3, eta=0.5, form='midpoint')
    """
    integer("order", order, 1, 3)
    number("eta", eta)
    choice("form", form, ("midpoint", "heun"))
    method = SDEDPMPP(order, eta, form)
    past = history(order)
    if is_zero(eta):
        return Linear(method, order=order, history=past)
    return Linear(method, order=order, history=past, draws=1, weak_order=min(order, 2))


@value
class SDEDPMPP:
    order: int = static()
    eta: Array
    form: str = static()
    factory = "sde_dpmpp"

    def table(self, grid: Grid) -> Table:
        law = _law(grid, self.eta, self.form if self.order == 2 else "exact")
        noise = not is_zero(self.eta)
        return multistep(grid, law, self.order, noise=noise)


def sa_solver(
    predictor_order: int = 3,
    corrector_order: int = 4,
    tau: float | Array | Callable[[Level], Array] = 1.0,
    mode: str = "PEC",
    form: str = "exact",
) -> Linear:
    """SA-Solver: a stochastic Adams predictor (Bashforth) and corrector (Moulton) on the SDE of the module.

    The polynomial through the last ``predictor_order`` clean estimates predicts; the one through the new estimate and
    the ``corrector_order - 1`` before it corrects, with the same noise.  ``corrector_order = 0`` has no corrector.
    "PEC" makes one denoiser call a step, at the predicted state, which is also the state that the sampler saves;
    "PECE" makes a second call at the corrected state.

    Args:
        tau: the amount of noise, 0 (ODE) and up, or a function of the level at which a step starts.  The paper's
            choice for pixel-space models is 1 where 0.05 <= sigma / alpha <= 1, else 0.
        form: "exact", or "rescaled": rules with two nodes integrate the linear term as if the exponential were 1, the
            paper's modification for few steps.

    Order ``predictor_order`` without corrector, else the smaller of corrector_order and predictor_order + 1, at most 3
    (a fourth order would need further start-up steps); weak order at most 2 and strong order 1 where tau > 0.
    Without corrector, order 3 corrects its first step.
    SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models, arXiv:2309.05019, equations 15 and 18.

    Raises ValueError unless predictor_order is 1 to 3, corrector_order 0 to 4 (above 0 for PECE), and tau >= 0.

    >>> sa_solver(2, 2, tau=0.5)
    sa_solver(predictor_order=2, corrector_order=2, tau=0.5, mode='PEC', form='exact')
    """
    integer("predictor_order", predictor_order, 1, 3)
    choice("mode", mode, ("PEC", "PECE"))
    integer("corrector_order", corrector_order, int(mode == "PECE"), 4)
    choice("form", form, ("exact", "rescaled"))
    method = SASolver(predictor_order, corrector_order, number_or_function("tau", tau), mode, form)
    twice = mode == "PECE"
    order = min(corrector_order, predictor_order + 1, 3) if corrector_order else predictor_order
    past = history(predictor_order, corrector_order, twice)
    calls = 2 if twice else 1
    if is_zero(method.tau):
        return Linear(method, order=order, calls=calls, history=past)
    return Linear(method, order=order, calls=calls, history=past, draws=1, weak_order=min(order, 2))


@value
class SASolver:
    predictor_order: int = static()
    corrector_order: int = static()
    tau: Callable[[Level], Array]
    mode: str = static()
    form: str = static()
    factory = "sa_solver"

    def table(self, grid: Grid) -> Table:
        law = _law(grid, self.tau(grid.t) ** 2, self.form)
        noise = not is_zero(self.tau)
        twice = self.mode == "PECE"
        return multistep(grid, law, self.predictor_order, self.corrector_order, twice=twice, noise=noise)


def _law(grid: Grid, eta: Array, form: str) -> Law:
    """The law of the module with tau^2 = eta."""
    t, s = grid.t, grid.s
    xp = namespace(t, eta)
    h = rise(t, s)
    eta = xp.broadcast_to(xp.asarray(eta), h.shape)
    decay = xp.where(eta == 0, 0.0, xp.where(eta == 0, 1.0, eta) * h)  # h may be infinite
    z = h + decay
    moments = exponential_moments(z, 4)
    linear = {"exact": None, "heun": None, "midpoint": 0.5 * moments[0], "rescaled": 0.5 * z}[form]
    keep = ratio(s.sigma, t.sigma) * xp.exp(-decay)
    std = s.sigma * root(-xp.expm1(-2 * decay))
    return Law(keep, std, (t.half_log_snr, s.half_log_snr), moments, linear)
