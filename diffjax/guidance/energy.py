"""Exact energy guidance: the intermediate energy of exp(-beta E), learned by contrasting noisy samples.

The law q0(x_0) exp(-beta E(x_0)) / Z, noised to a level, has the score ``score of q_t + grad f(x_t)`` with

    f(x_t, t) = log E[exp(-beta E(x_0)) | x_t]

under q.  The energy at the posterior mean, or its posterior mean, are not f: guidance by them has another law.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.levels import Array, Level, Process, Tree, is_traced, static, value


def energy(apply: Callable[..., Array], params: Tree, process: Process) -> Energy:
    """The potential of a network: ``F(x, level) = apply(params, x, network time) -> scalar``, for `gradient`.

    Trained by `contrastive_energy` it is log E[exp(-beta E(x_0)) | x_t] up to a constant of the level.

    Contrastive Energy Prediction for Exact Energy-Guided Diffusion Sampling in Offline Reinforcement Learning,
    arXiv:2304.12824.
    """
    return Energy(params, process, apply)


@value
class Energy:
    params: Tree
    process: Process
    apply: Callable = static()
    factory = "energy"

    def __call__(self, x: Tree, level: Level) -> Array:
        return self.apply(self.params, x, self.process.network_time(level)).reshape(())


def contrastive_energy(
    process: Process,
    apply: Callable[..., Array],
    group: int,
    beta: Array = 1.0,
    *,
    normalise: str = "batch",
    law: Any = None,
) -> ContrastiveEnergy:
    """The loss ``loss(params, key, x0, energies) -> (B,)`` whose minimiser is the exact intermediate energy.

    A batch is cut into groups of K samples of q0 that share a level, and in each

        loss = -sum_i w_i log softmax_i(f(x_t^i, t)),        w = exp(-beta E(x_0)) / Z,

    so that f learns the ratios of p(x_t) to q(x_t), up to a constant of the level, and no energy has to be evaluated
    at noisy states.  With Z a constant the minimiser is f = log E[exp(-beta E) | x_t] at any K: given the noisy states
    w is exp(f) in the mean, and a cross entropy is least at its weights.  Z is an estimate from samples, from the whole
    batch (an error of O(1 / B)), or from the group, the softmax of the paper, which is O(1 / K) off.  What is returned
    is the terms of the sum, in units in which their mean over the batch is the mean over the groups.

    Args:
        process: that noises the data.
        apply: ``f``: a network ``apply(params, x, network time) -> scalar``, of one sample.
        group: K, at least 2; it must divide the batch.
        beta: the inverse temperature.
        normalise: "batch" or "group", over what the weights are normalised.
        law: of the levels, a quantile function ``(process, u) -> Level``; default times uniform in (0, end).

    Contrastive Energy Prediction for Exact Energy-Guided Diffusion Sampling in Offline Reinforcement Learning,
    arXiv:2304.12824.

    Raises ValueError for a group below 2, another normalise and, when called, for a batch that the group does not
    divide.
    """
    if normalise not in ("batch", "group"):
        raise ValueError(f"normalise must be 'batch' or 'group', got {normalise!r}.")
    if isinstance(group, bool) or not isinstance(group, int) or group < 2:
        raise ValueError(f"group must be an integer of at least 2, got {group!r}.")
    return ContrastiveEnergy(process, beta, law, apply, group, normalise)


@value
class ContrastiveEnergy:
    process: Process
    beta: Array
    law: Any
    apply: Callable = static()
    group: int = static()
    normalise: str = static()
    factory = "contrastive_energy"

    def __call__(self, params: Tree, key: Array, x0: Tree, energies: Array) -> Array:
        count = energies.shape[0]
        if count % self.group:
            raise ValueError(f"group={self.group} must divide the batch of {count}.")
        groups = count // self.group
        at, drawn = jax.random.split(key)
        u = (jnp.arange(groups) + jax.random.uniform(at, (groups,))) / groups  # stratified over the groups
        level = noise_levels(self.process, self.law, jnp.repeat(u, self.group))
        x = jax.vmap(noised, (None, 0, 0, 0))(self.process, jax.random.split(drawn, count), x0, level)
        f = jax.vmap(energy(self.apply, params, self.process))(x, level).reshape(groups, self.group)
        weights = jax.nn.softmax(-self.beta * energies.reshape(groups, self.group), self._axes)
        weights = weights * (count if self.normalise == "batch" else self.group)
        return (-weights * jax.nn.log_softmax(f, axis=-1)).reshape(count)

    @property
    def _axes(self) -> Any:
        return (0, 1) if self.normalise == "batch" else -1


# --- what losses of potentials share --------------------------------------------------------------------------------


def noise_levels(process: Process, law: Any, u: Array) -> Level:
    """The levels (B,) of uniforms (B,), times ``u end`` where there is no law."""
    if law is not None:
        return jax.vmap(lambda v: law(process, v))(u)
    end = process.end if is_traced(process.end) else float(process.end)
    return jax.vmap(process.level)(end * jnp.clip(u, 2.0**-24, 1 - 2.0**-24))


def noised(process: Process, key: Array, x0: Tree, level: Level) -> Tree:
    """``alpha x_0 + sigma eps`` in standard coordinates, of one sample."""
    leaves, structure = jax.tree.flatten(x0)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    return process.enter(process.noised(x0, structure.unflatten(drawn), level), level)
