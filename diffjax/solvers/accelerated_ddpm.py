"""Provably accelerated DDPM: half of the noise before the score, half after it."""

from __future__ import annotations

from diffjax.levels import Grid, namespace, ratio, rise, root, value
from diffjax.solvers.coefficients import stochastic_exponential
from diffjax.solvers.linear import Linear, Table, stack


def accelerated_ddpm() -> Linear:
    """DDPM with half of the noise before the score and half after it.

    The forward step is ``x_t = a x_s + sqrt(B) z``, a = alpha_t / alpha_s and B = sigma_t^2 - a^2 sigma_s^2; then
    ``y = x_t + sqrt(B / 2) z``, ``x_s = (y + B score(y, t) + sqrt(B / 2) z') / a``.  The steps from alpha = 0 and to
    sigma = 0 are ancestral.  Both noises are divided by a: with the second outside the brackets, as in the paper's
    public code, the variance is of first order only.

    One denoiser call at y and two draws a step; weak order 1, and 2 on Gaussian data.
    Accelerating Convergence of Score-Based Diffusion Models, Provably, arXiv:2403.03852, section 3.2.
    """
    return Linear(AcceleratedDDPM(), order=1, draws=2, entry=True)


@value
class AcceleratedDDPM:
    factory = "accelerated_ddpm"

    def table(self, grid: Grid) -> Table:
        t, s = grid.t, grid.s
        xp = namespace(t)
        singular = (t.alpha == 0) | (s.sigma == 0)
        growth = xp.where(singular, 1.0, ratio(s.alpha, xp.where(t.alpha == 0, s.alpha, t.alpha)))  # 1 / a
        share = -xp.expm1(-2 * xp.maximum(rise(t, s), 0.0))
        half = xp.where(singular, 0.0, t.sigma * root(0.5 * share))
        kept = growth * (1 - share)
        keep, weight, std = stochastic_exponential(t, s, xp.asarray(1.0))
        out = stack(
            xp.where(singular, keep, kept),
            xp.where(singular, weight, growth * share * t.alpha),
            xp.where(singular, std, kept * half),
            growth * half,
        )
        return Table(out, entry=stack(xp.ones_like(half), half, xp.zeros_like(half)))
