"""Soft values learned from rewards: v(x_t) = alpha log E[exp(r(x_0) / alpha) | x_t], by regression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.guidance.energy import noise_levels, noised
from diffjax.levels import Array, Level, Process, Tree, as_value, static, value
from diffjax.solvers.arguments import number

KINDS = ("soft", "square", "mean")


def soft_value_loss(
    process: Process,
    apply: Callable[..., Array],
    temperature: Array,
    kind: str = "soft",
    *,
    law: Any = None,
) -> SoftValueLoss:
    """The regression ``loss(params, key, x0, rewards) -> (B,)`` of a value network on noised data and their rewards.

        "soft"    e^z - z - 1,  z = (r - v(x_t)) / alpha  least at alpha log E[exp(r / alpha) | x_t], the soft value
        "square"  (e^(r / alpha) - e^(v(x_t) / alpha))^2  least there too, ruled by the largest rewards
        "mean"    (r - v(x_t))^2                          least at E[r | x_t], which is below it

    "soft" is a Bregman divergence of exp(r / alpha), relative where "square" is absolute.  x0 are samples of the base
    model (noised they are states of its sampler) with any black-box rewards; of pairs that were visited by a sampler,
    their `error`.

    Args:
        apply: ``apply(params, x, network time) -> number`` (or an array with one entry).
        temperature: alpha, above 0.
        law: of the levels, a quantile function ``(process, u) -> Level``; default times uniform in (0, end).

    Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding,
    arXiv:2408.08252 (the regression of SVDD-MC, "mean" in its code).

    Raises ValueError for another kind and a temperature that is not above 0.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be among {KINDS}, got {kind!r}.")
    number("temperature", temperature, 1e-12)
    return SoftValueLoss(process, law, temperature, apply, kind)


@value
class SoftValueLoss:
    process: Process
    law: Any
    temperature: Array
    apply: Callable = static()
    kind: str = static()
    factory = "soft_value_loss"

    def __call__(self, params: Tree, key: Array, x0: Tree, rewards: Array) -> Array:
        count = rewards.shape[0]
        at, order, drawn = jax.random.split(key, 3)
        u = (jax.random.permutation(order, count) + jax.random.uniform(at, (count,))) / count
        level = noise_levels(self.process, self.law, u)
        x = jax.vmap(noised, (None, 0, 0, 0))(self.process, jax.random.split(drawn, count), x0, level)
        return jax.vmap(lambda x, level, reward: self.error(params, x, level, reward))(x, level, rewards)

    def error(self, params: Tree, x: Tree, level: Level, reward: Array) -> Array:
        """The loss of one state and the reward that was reached from it, as `diffjax.training.visits` has them."""
        v = self.apply(params, x, self.process.network_time(level)).reshape(())
        if self.kind == "mean":
            return (reward - v) ** 2
        if self.kind == "square":
            return (jnp.exp(reward / self.temperature) - jnp.exp(v / self.temperature)) ** 2
        z = (reward - v) / self.temperature
        return jnp.expm1(z) - z


def learned_value(
    apply: Callable[..., Array], params: Tree, process: Process, reward: Callable[[Tree], Array], scale: Array = 1.0
) -> LearnedValue:
    """A learned value as a twist: ``scale v(x_t)``, and ``scale reward(x_0)`` where nothing is noisy.

    For `diffjax.smc.svdd` (which divides by its temperature) with scale 1; for `diffjax.steer` towards
    ``p exp(reward / alpha)`` with scale 1 / alpha.  One denoiser call for the clean estimate, and one of the value
    network, which is not counted.

    Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding,
    arXiv:2408.08252.
    """
    return LearnedValue(params, process, as_value(reward), scale, apply)


@value
class LearnedValue:
    params: Tree
    process: Process
    reward: Any
    scale: Array
    apply: Callable = static()
    factory = "learned_value"

    def __call__(self, denoise: Any, x: Tree, level: Level) -> tuple[Array, Tree]:
        x0 = denoise(x, level)
        clean = jnp.all(jnp.asarray(level.sigma) == 0)
        v = self.apply(self.params, x, self.process.network_time(level)).reshape(())
        return self.scale * jnp.where(clean, self.reward(x0), v), x0
