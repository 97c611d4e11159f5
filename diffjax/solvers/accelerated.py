"""Provably accelerated DDIM and DDPM: one more order for one more estimate, or for noise on both sides of the score."""

from __future__ import annotations

from diffjax.levels import Grid, namespace, ratio, rise, value
from diffjax.solvers.coefficients import exponential, noise_reading, stochastic_exponential
from diffjax.solvers.linear import Linear, Table, stack
from diffjax.solvers.newton import chain, usable


def accelerated_ddim() -> Linear:
    """DDIM with the noise estimate extrapolated from two, linearly in ``u = alpha^2 / (alpha^2 + sigma^2)``.

    With r = sigma / alpha, ``x_s = alpha_s / alpha_t x_t + alpha_s (r_s - r_t) eps_t + alpha_s [u_t (r_s - r_t) -
    (arctan r_s - arctan r_t)] / (u_t - u_before) (eps_before - eps_t)``; for a variance-preserving process u is
    alpha-bar.  Steps without a usable history are DDIM's.  One denoiser call a step, order 2.
    Accelerating Convergence of Score-Based Diffusion Models, Provably, arXiv:2403.03852, section 3.1.

    >>> accelerated_ddim()
    accelerated_ddim()
    """
    return Linear(AcceleratedDDIM(), order=2, history=1)


@value
class AcceleratedDDIM:
    factory = "accelerated_ddim"

    def table(self, grid: Grid) -> Table:
        t, s = grid.t, grid.s
        xp = namespace(t)
        fine = usable(grid)
        known = fine & chain(grid, 1)[0]
        start, end = (xp.exp(-xp.where(fine, level.half_log_snr, 0.0)) for level in (t, s))
        share = 1 / (1 + start**2)
        before = xp.concatenate([share[:1], share[:-1]])
        gap = xp.where(known, share - before, 1.0)
        slope = s.alpha * (share * (end - start) - (xp.arctan(end) - xp.arctan(start))) / gap
        slope = xp.where(known, slope, 0.0)
        keep, weight = exponential(t, s)  # in the clean estimate, where the noise is not determined or not wanted
        growth = xp.where(fine, s.alpha / xp.where(t.alpha == 0, 1.0, t.alpha), keep)
        now = xp.where(fine, s.alpha * (end - start), weight)
        zero, one = xp.zeros_like(keep), xp.ones_like(keep)
        p, q = noise_reading(t)
        reads = stack(xp.where(fine, p, zero), xp.where(fine, q, one))[:, None]
        return Table(stack(growth, now - slope, slope), reads=reads)


def accelerated_ddpm() -> Linear:
    """DDPM with half of the noise before the score and half after it.

    The forward step is ``x_t = a x_s + sqrt(B) z``, a = alpha_t / alpha_s and B = sigma_t^2 - a^2 sigma_s^2; then
    ``y = x_t + sqrt(B / 2) z``, ``x_s = (y + B score(y, t) + sqrt(B / 2) z') / a``.  The steps from alpha = 0 and to
    sigma = 0 are ancestral.  Both noises are divided by a: with the second outside the brackets, as in the paper's
    public code, the variance is of first order only.

    One denoiser call at y and two draws a step; weak order 1, and 2 on Gaussian data.
    Accelerating Convergence of Score-Based Diffusion Models, Provably, arXiv:2403.03852, section 3.2.
    """
    return Linear(AcceleratedDDPM(), order=1, draws=2)


@value
class AcceleratedDDPM:
    factory = "accelerated_ddpm"

    def table(self, grid: Grid) -> Table:
        t, s = grid.t, grid.s
        xp = namespace(t)
        singular = (t.alpha == 0) | (s.sigma == 0)
        growth = xp.where(singular, 1.0, ratio(s.alpha, xp.where(t.alpha == 0, s.alpha, t.alpha)))  # 1 / a
        share = -xp.expm1(-2 * xp.maximum(rise(t, s), 0.0))
        half = xp.where(singular, 0.0, t.sigma * xp.sqrt(0.5 * share))
        kept = growth * (1 - share)
        keep, weight, std = stochastic_exponential(t, s, xp.asarray(1.0))
        out = stack(
            xp.where(singular, keep, kept),
            xp.where(singular, weight, growth * share * t.alpha),
            xp.where(singular, std, kept * half),
            growth * half,
        )
        return Table(out, entry=stack(xp.ones_like(half), half, xp.zeros_like(half)))
