"""Guidance by a probe: a small network that reads a condition from the hidden states of the frozen denoiser.

The denoiser's hidden states know where things are long before its output shows it, so that a probe on them is small,
quick to train, and works at every noise level.  Nothing of the denoiser is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.guidance.energy import noise_levels, noised
from diffjax.guidance.hooks import with_features
from diffjax.levels import Array, Level, Tree, static, value


def probe(apply: Callable[..., Tree], params: Tree, target: Tree) -> Probe:
    """The twist ``log h = -|A(features(x, t), t) - target|^2 / 2``, for `tilted` and `steer`.

    Scale 1 / tau^2 is a Gaussian likelihood of standard deviation tau around the target.  At sigma = 0 it is what the
    probe reads there, no likelihood of clean data.  One network evaluation, with its derivative.

    Args:
        apply: the probe ``apply(params, features, network time) -> tree``, shaped like ``target``; the features are
            what the denoiser's network returns with ``features=True`` (`diffjax.networks`).
        target: the condition that is asked for.

    LaCon: Late-Constraint Diffusion for Steerable Guided Image Synthesis, arXiv:2305.11520.
    """
    return Probe(params, target, apply)


@value
class Probe:
    params: Tree
    target: Tree
    apply: Callable = static()
    factory = "probe"

    def __call__(self, denoise: Any, x: Tree, level: Level) -> tuple[Array, Tree]:
        x0, features = with_features(denoise, x, level)
        found = self.apply(self.params, features, denoise.prediction.process.network_time(level))
        return -0.5 * _square(found, self.target), x0


def probe_loss(network: Any, apply: Callable[..., Tree], law: Any = None) -> ProbeLoss:
    """The loss ``loss(params, key, x0, targets) -> (B,)`` of a probe, ``|A(features(x_t), t) - target|^2``.

    ``network`` is the frozen network's denoiser (`Prediction.decode`), ``targets`` (B, ...) the condition of each clean
    sample, ``law`` that of the levels, a quantile function ``(process, u) -> Level``; default times uniform in
    (0, end).

    LaCon: Late-Constraint Diffusion for Steerable Guided Image Synthesis, arXiv:2305.11520.
    """
    return ProbeLoss(network, law, apply)


@value
class ProbeLoss:
    denoise: Any
    law: Any
    apply: Callable = static()
    factory = "probe_loss"

    def __call__(self, params: Tree, key: Array, x0: Tree, targets: Tree) -> Array:
        process = self.denoise.prediction.process
        count = jax.tree.leaves(x0)[0].shape[0]
        at, order, drawn = jax.random.split(key, 3)
        u = (jax.random.permutation(order, count) + jax.random.uniform(at, (count,))) / count
        level = noise_levels(process, self.law, u)
        x = jax.vmap(noised, (None, 0, 0, 0))(process, jax.random.split(drawn, count), x0, level)

        def one(x: Tree, level: Level, target: Tree) -> Array:
            _, features = with_features(self.denoise, x, level)
            return _square(self.apply(params, features, process.network_time(level)), target)

        return jax.vmap(one)(x, level, targets)


def _square(found: Tree, target: Tree) -> Array:
    return sum(jnp.square(a - b).sum() for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(target), strict=True))
