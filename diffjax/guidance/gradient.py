"""Guidance by gradients of potentials of the noisy state, and potentials that compare it with a reference.

A *potential* is a function ``F(x, level) -> scalar`` of the state itself: the log-probability that a classifier of
noisy data gives, a learned energy, minus a distance.  If ``exp(F)`` is the conditional expectation of some
``h(x_0) >= 0`` given x_t, the guided denoiser is exactly that of the data law times h.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.corrections.transform import check_within, condition_within, evaluations_within
from diffjax.guidance.tilted import shifted_estimate
from diffjax.levels import Array, Level, Tree, as_value, is_traced, remembers, value


def gradient(denoise: Any, potential: Any, scale: Any = 1.0) -> Gradient | RememberingGradient:
    """``x0 + scale sigma^2 / alpha grad_x F(x, level)``: the score of ``p_t(x) exp(scale F(x))`` (Tweedie's formula).

    Under an ancestral step this is the shift of its mean by ``scale`` times the variance times the gradient, to first
    order in the step; under any other solver it is the same change of the score.  At alpha = 0 (there is no signal to
    guide) and at sigma = 0 the estimate is left as it is.  Scale 0 is ``denoise``.  Network evaluations: those of
    ``denoise``.

    Args:
        denoise: any denoiser, also one that remembers.
        potential: ``F(x, level) -> scalar``, best a pytree, or a tuple of potentials, which are summed.
        scale: a number, or a tuple of as many as there are potentials.

    More Control for Free! Image Synthesis with Semantic Diffusion Guidance, arXiv:2112.05744.

    Raises ValueError if the numbers of potentials and scales differ or a concrete scale is not finite.

    >>> import diffjax
    >>> level = diffjax.processes.flow().level(0.5)
    >>> guided = gradient(diffjax.oracles.gaussian(0.0, 1.0), lambda x, level: 3.0 * x, 2.0)
    >>> float(guided(jnp.float32(1.0), level) - guided.denoise(jnp.float32(1.0), level))  # 2 * 0.5^2 / 0.5 * 3
    3.0
    """
    several = isinstance(potential, tuple) and not callable(potential)
    potentials = tuple(as_value(f) for f in (potential if several else (potential,)))
    scales = scale if isinstance(scale, tuple) else (scale,) * len(potentials)
    if not potentials or len(scales) != len(potentials):
        raise ValueError(f"needs a scale for every potential, got {len(potentials)} potentials and scale={scale!r}.")
    if not is_traced(scales) and not all(np.all(np.isfinite(s)) for s in scales):
        raise ValueError(f"scale must be finite, got {scale!r}.")
    kind = RememberingGradient if remembers(denoise) else Gradient
    return kind(as_value(denoise), potentials, scales)


@value
class Gradient:
    denoise: Any
    potentials: tuple
    scales: tuple
    factory = "gradient"

    def __call__(self, x: Tree, level: Level) -> Tree:
        return shifted_estimate(self.denoise(x, level), self.slope(x, level), level)

    def slope(self, x: Tree, level: Level) -> Tree:
        """The gradient of the sum of the scaled potentials."""
        total = lambda x: sum(s * f(x, level) for s, f in zip(self.scales, self.potentials, strict=True))
        return jax.grad(total)(x)

    condition = property(condition_within)
    check = check_within
    evaluations = evaluations_within


@value
class RememberingGradient:
    denoise: Any
    potentials: tuple
    scales: tuple
    factory = "gradient"
    slope = Gradient.slope

    def init(self, x: Tree) -> Tree:
        return self.denoise.init(x)

    def apply(self, x: Tree, level: Level, memory: Tree) -> tuple[Tree, Tree]:
        x0, memory = self.denoise.apply(x, level, memory)
        return shifted_estimate(x0, self.slope(x, level), level), memory

    condition = property(condition_within)
    check = check_within
    evaluations = evaluations_within


def potential_twist(potential: Any) -> PotentialTwist:
    """A potential as a twist: ``twist(denoise, x, level) -> (F(x, level), x0)``, for `steer` and `tilted`."""
    return PotentialTwist(as_value(potential))


@value
class PotentialTwist:
    potential: Any
    factory = "potential_twist"

    def __call__(self, denoise: Callable[[Tree, Level], Tree], x: Tree, level: Level) -> tuple[Array, Tree]:
        return self.potential(x, level), denoise(x, level)


# --- potentials ---------------------------------------------------------------------------------------------------


def likeness(reference: Tree, eps: Tree, features: Any = None, statistics: str = "content") -> Likeness:
    """``F = -|f(x, level) - f(alpha reference + sigma eps, level)|^2 / 2``: the state looks like a noised reference.

    Args:
        reference: clean data of the state's shape.
        eps: standard normal noise of that shape, one draw for the whole trajectory.
        features: ``f(x, level) -> tree``, of a network trained on noisy data; default the state itself.
        statistics: "content" compares the features place by place; "style" their Gram matrices, the mean over all
            places of the products of two channels (last axis), which do not know where anything is.

    More Control for Free! Image Synthesis with Semantic Diffusion Guidance, arXiv:2112.05744.

    Raises ValueError for other statistics.
    """
    if statistics not in ("content", "style"):
        raise ValueError(f"statistics must be 'content' or 'style', got {statistics!r}.")
    features = as_value(_itself if features is None else features)
    return Likeness(reference, eps, features, as_value(_gram if statistics == "style" else _same))


@value
class Likeness:
    reference: Tree
    eps: Tree
    features: Any
    statistics: Any
    factory = "likeness"

    def __call__(self, x: Tree, level: Level) -> Array:
        noised = jax.tree.map(lambda a, b: level.alpha * a + level.sigma * b, self.reference, self.eps)
        read = lambda state: jax.tree.map(self.statistics, self.features(state, level))
        squares = jax.tree.map(lambda a, b: jnp.square(a - b).sum(), read(x), read(noised))
        return -0.5 * functools.reduce(jnp.add, jax.tree.leaves(squares))


def _itself(x: Tree, level: Level) -> Tree:
    del level
    return x


def _same(leaf: Array) -> Array:
    return leaf


def _gram(leaf: Array) -> Array:
    flat = leaf.reshape(-1, leaf.shape[-1])
    return flat.T @ flat / len(flat)
