"""Which states a network is trained on: those of the forward process, or some that sampling will show it.

A switch is a value ``(loss, params, item, level) -> (x, eps)`` of one sample: the state, and the noise that would make
it of the data, from which the target is made.  No gradient goes through a state.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffjax.levels import Level, Tree, combine, is_traced, root, static, value
from diffjax.training.couplings import normal_like
from diffjax.training.times import MARGIN

DRAWN, ROLLED = 0xD1, 0xD2  # folded into a sample's key


def perturbed(strength: float | int = 0.1) -> Perturbed:
    """Input perturbation: ``x = alpha x0 + sigma (eps + strength xi)`` with fresh noise xi; the target keeps eps.

    The network sees states that are as far off as its own errors will take them.  Its optimum is the posterior mean
    at a higher noise level, ``sigma sqrt(1 + strength^2)``, but of eps itself, which shrinks what it predicts.

    Input Perturbation Reduces Exposure Bias in Diffusion Models, arXiv:2301.11706.

    Raises ValueError unless strength >= 0.
    """
    if not is_traced(strength) and not strength >= 0:
        raise ValueError(f"strength must be at least 0, got {strength!r}")
    return Perturbed(strength)


@value
class Perturbed:
    strength: Any
    factory = "perturbed"

    def __call__(self, loss: Any, params: Tree, item: Any, level: Level) -> tuple[Tree, Tree]:
        xi = normal_like(jax.random.fold_in(item.key, DRAWN), item.x0)
        parts = (level.alpha, level.sigma, level.sigma * self.strength)
        return combine(parts, (item.x0, item.eps, xi)), item.eps


def scheduled_sampling(
    rolls: int = 1, share: float | int = 0.5, span: float | int = 0.1, noise: float | int = 1.0
) -> ScheduledSampling:
    """Train, in a share of the samples, on states that the network itself has come to in ``rolls`` steps.

    The data are noised to the quantile ``u + span (1 - u)`` of the law and the network takes ``rolls`` steps down to
    u, evenly spaced, without gradient,

        x_s = alpha_s D + sqrt(sigma_s^2 - std^2) eps_hat + std z,

    with std ``noise`` times that of an ancestral step (0 is DDIM, 1 DDPM).  There the target is made of the data and
    ``eps = (x - alpha x0) / sigma``: what would have been right.  Costs ``rolls`` evaluations more.

    Of a state that the network has made the best estimate is E[x0 | that state], which knows less of x0 than one at
    its level does.  So this fits tasks whose condition all but determines x0; elsewhere it draws samples to the mean.

    Markup-to-Image Diffusion Models with Scheduled Sampling, arXiv:2210.05147.

    Args:
        rolls: steps of the network, at least 1.
        share: probability of such a state, in [0, 1].
        span: how far above it the steps start, in (0, 1], as a part of what the law has above it.
        noise: of a step, in [0, 1].

    Raises ValueError for numbers outside these ranges.
    """
    if not isinstance(rolls, int) or rolls < 1:
        raise ValueError(f"rolls must be a positive integer, got {rolls!r}")
    for name, number in {"share": share, "noise": noise}.items():
        if not is_traced(number) and not 0 <= number <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {number!r}")
    if not is_traced(span) and not 0 < span <= 1:
        raise ValueError(f"span must be in (0, 1], got {span!r}")
    return ScheduledSampling(share, span, noise, rolls, False)


def unrolled(rolls: int = 1, share: float | int = 0.5) -> ScheduledSampling:
    """Step-unrolled training: the network's own clean estimate, noised anew at the same level, is what it sees next.

    `scheduled_sampling` that stays at its level and keeps nothing of the old noise: ``x = alpha D + sigma z``,
    ``rolls`` times, for a network that may change its mind.

    Step-unrolled Denoising Autoencoders for Text Generation, arXiv:2112.06749 (there of tokens).

    Raises ValueError as `scheduled_sampling`.
    """
    checked = scheduled_sampling(rolls, share)
    return ScheduledSampling(share, 1.0, 1.0, checked.rolls, True)


@value
class ScheduledSampling:
    share: Any
    span: Any
    noise: Any
    rolls: int = static()
    anew: bool = static()
    factory = "scheduled_sampling"

    def __call__(self, loss: Any, params: Tree, item: Any, level: Level) -> tuple[Tree, Tree]:
        frozen = jax.lax.stop_gradient(params)
        plain = combine((level.alpha, level.sigma), (item.x0, item.eps))
        u = jnp.clip(item.u, MARGIN, 1 - MARGIN)
        top = u if self.anew else u + self.span * (1 - MARGIN - u)
        stops = top + (u - top) * jnp.arange(self.rolls + 1) / self.rolls
        levels = jax.vmap(lambda u: loss.law(loss.prediction.process, u))(stops)
        at = lambda i: jax.tree.map(lambda leaf: leaf[i], levels)
        x = combine((at(0).alpha, at(0).sigma), (item.x0, item.eps))
        key = jax.random.fold_in(item.key, ROLLED)
        for i in range(self.rolls):
            z = normal_like(jax.random.fold_in(key, i), item.x0)
            s = level if i + 1 == self.rolls else at(i + 1)
            x = self._step(loss, frozen, x, z, at(i), s, item.condition)
        made = jax.tree.map(lambda x, x0: (x - level.alpha * x0) / level.sigma, x, item.x0)
        rolled = jax.random.bernoulli(jax.random.fold_in(key, self.rolls), self.share)
        return jax.tree.map(lambda a, b: jnp.where(rolled, a, b), (x, made), (plain, item.eps))

    def _step(self, loss: Any, params: Tree, x: Tree, z: Tree, t: Level, s: Level, told: Tree) -> Tree:
        if loss.self_conditioning is not None:
            told = (told, jax.tree.map(jnp.zeros_like, x))
        output = loss.prediction.network(loss.apply, params, x, t, told)
        x0 = loss.prediction.to_x0(output, x, t)
        if self.anew:
            return combine((s.alpha, s.sigma), (x0, z))
        eps = jax.tree.map(lambda x, x0: (x - t.alpha * x0) / t.sigma, x, x0)
        kept = jnp.exp(2 * (t.half_log_snr - s.half_log_snr))  # (alpha_t sigma_s / (sigma_t alpha_s))^2
        std = self.noise * s.sigma * root(1 - kept)
        return combine((s.alpha, root(s.sigma**2 - std**2), std), (x0, eps, z))
