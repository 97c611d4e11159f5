"""Networks that are told their own last estimate of the clean data.

Such a network is ``apply(params, x, t, (condition, estimate))`` with an estimate shaped like x, zeros where there is
none.  In training it is, in half of the samples, what the network says without one; in sampling that of the last step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.levels import CLEAN, Array, Level, Tree, static, value
from diffjax.predictions import Prediction
from diffjax.predictions.prediction import Denoiser


def stacked(apply: Callable, axis: int = -1) -> Stacked:
    """``apply(params, x, t, (condition, estimate))`` of a network that takes both stacked along ``axis``.

    The network has twice the channels at its input and as many as x at its output:
    ``UNet((8, 8, 2), output=1, ...)`` for images (8, 8, 1).

    Analog Bits: Generating Discrete Data using Diffusion Models with Self-Conditioning, arXiv:2208.04202, section 2.
    """
    return Stacked(apply, axis)


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Compared by what it is made of, as a network must be: losses hold it as static."""

    apply: Callable
    axis: int

    def __call__(self, params: Tree, x: Tree, t: Array, condition: Any) -> Tree:
        told, estimate = condition
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], self.axis), x, estimate)
        return self.apply(params, both, t, told)


def estimate(
    prediction: Prediction, apply: Callable, params: Tree, x: Tree, level: Level, condition: Tree, told: Array
) -> Tree:
    """What the network is told in training: its own estimate made without one, where ``told``, else zeros.

    In the data's coordinates, with no gradient.  One evaluation.
    """
    nothing = jax.tree.map(jnp.zeros_like, prediction.process.leave(x, level))
    output = prediction.network(apply, jax.lax.stop_gradient(params), x, level, (condition, nothing))
    x0 = prediction.process.leave(prediction.to_x0(output, x, level), CLEAN)
    return jax.tree.map(lambda a, zero: jax.lax.stop_gradient(jnp.where(told, a, zero)), x0, nothing)


def self_conditioned(
    prediction: Prediction, apply: Callable, params: Tree, condition: Tree = None, null: Tree = None, scale: Any = None
) -> SelfConditioned:
    """The denoiser of such a network: it remembers its last estimate, which the sampler threads.

    With ``null`` and ``scale`` it is guided, ``f(null) + scale (f(condition) - f(null))``, both told of the same
    estimate, which is the guided one: two network evaluations a call (`guidance.classifier_free` takes denoisers
    without a memory).

    Raises ValueError for a scale without null, or null without a scale.

    Analog Bits: Generating Discrete Data using Diffusion Models with Self-Conditioning, arXiv:2208.04202,
    algorithm 2.
    """
    if (null is None) != (scale is None):
        raise ValueError(f"guidance needs both null and scale, got null={null!r} and scale={scale!r}.")
    if null is not None:
        null = jax.tree.map(lambda n, c: jnp.asarray(n, jnp.result_type(c)), null, condition)
    return SelfConditioned(params, condition, null, scale, prediction, apply)


@value
class SelfConditioned:
    params: Tree = dataclasses.field(repr=False)
    condition: Tree
    null: Tree
    scale: Any
    prediction: Prediction
    network: Callable = static()
    factory = "self_conditioned"

    def init(self, x: Tree) -> Tree:
        """No estimate yet: zeros shaped like the data."""
        shapes = jax.eval_shape(lambda z: self.prediction.process.leave(z, CLEAN), x)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def apply(self, x: Tree, level: Level, memory: Tree) -> tuple[Tree, Tree]:
        """``(x0, memory)``: the clean estimate, and it as the network will be told of it."""
        call = lambda told: self.prediction.network(self.network, self.params, x, level, (told, memory))
        output = call(self.condition)
        if self.null is not None:
            output = jax.tree.map(lambda a, b: a + self.scale * (b - a), call(self.null), output)
        x0 = self.prediction.to_x0(output, x, level)
        return x0, jax.tree.map(lambda a, b: a.astype(b.dtype), self.prediction.process.leave(x0, CLEAN), memory)

    def evaluations(self, level: Level) -> int:
        """Network evaluations of a call."""
        del level
        return 1 if self.null is None else 2

    def check(self, t: Level) -> None:
        """Raise ValueError if the (concrete) levels ``t`` are not the process's, or do not determine x_0."""
        Denoiser(self.params, self.condition, self.prediction, self.network).check(t)
