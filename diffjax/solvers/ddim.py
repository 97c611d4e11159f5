"""DDIM and ancestral sampling: one-step methods that are exact for a constant clean estimate.

x_s = sqrt(sigma_s^2 - std^2) / sigma_t x_t + (alpha_s - alpha_t sqrt(sigma_s^2 - std^2) / sigma_t) x_0 + std z
"""

from __future__ import annotations

import numpy as np

from diffjax.levels import Array, Grid, is_traced, namespace, ratio, value
from diffjax.solvers.coefficients import exponential, stochastic_exponential
from diffjax.solvers.linear import Linear, Table, stack


def ddim(eta: Array = 0.0) -> Linear:
    """DDIM: ``std = eta sigma_s sqrt(1 - exp(-2h))``; eta = 0 is the deterministic sampler, eta = 1 ancestral DDPM.

    Denoising Diffusion Implicit Models, arXiv:2010.02502, equations 12 and 16.  One denoiser call a step, order 1.

    Raises ValueError unless 0 <= eta <= 1.

    >>> ddim(eta=0.5)
    ddim(eta=0.5)
    """
    if not is_traced(eta) and not (np.ndim(eta) == 0 and 0 <= eta <= 1):
        raise ValueError(f"eta must be a number in [0, 1], got {eta!r}.")
    deterministic = not is_traced(eta) and eta == 0
    return Linear(DDIM(eta), order=1, draws=0 if deterministic else 1)


@value
class DDIM:
    eta: Array
    factory = "ddim"

    def table(self, grid: Grid) -> Table:
        if not is_traced(self.eta) and self.eta == 0:
            return Table(stack(*exponential(grid.t, grid.s)))
        return Table(stack(*stochastic_exponential(grid.t, grid.s, self.eta)))


def ancestral(variance: Array = 0.0) -> Linear:
    """Ancestral DDPM with a fixed variance between the two bounds of the reverse step.

    The mean is that of q(x_s | x_t, x_0); the log variance is interpolated, ``(1 - variance) log small + variance
    log large``: 0 is the posterior variance (optimal for data that are one point), 1 the variance of the forward
    step (optimal for data N(0, I)), which for a discrete process is beta.  The last step to sigma = 0 adds no noise.

    Denoising Diffusion Probabilistic Models, arXiv:2006.11239, section 3.2.  One denoiser call a step, order 1.

    Raises ValueError unless 0 <= variance <= 1.
    """
    if not is_traced(variance) and not (np.ndim(variance) == 0 and 0 <= variance <= 1):
        raise ValueError(f"variance must be a number in [0, 1] (small to large), got {variance!r}.")
    return Linear(Ancestral(variance), order=1, draws=1)


@value
class Ancestral:
    variance: Array
    factory = "ancestral"

    def table(self, grid: Grid) -> Table:
        keep, weight, small = stochastic_exponential(grid.t, grid.s, 1.0)
        xp = namespace(keep)
        # the forward step's std, sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2), is small sigma_t / sigma_s
        larger = ratio(grid.t.sigma, xp.where(grid.s.sigma == 0, grid.t.sigma, grid.s.sigma))
        return Table(stack(keep, weight, small * larger**self.variance))
