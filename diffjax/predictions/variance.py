"""Networks that also predict the variance of the reverse step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.levels import Level, Tree, static, value
from diffjax.predictions.prediction import Denoiser, Prediction


def learned_range(prediction: Prediction, apply: Callable[..., tuple], params: Tree, condition: Tree = None) -> Ranged:
    """The denoiser of a network ``apply(params, x, t, condition) -> (output, v)``.

    ``output`` is the prediction's target and v, shaped like it and in [-1, 1], says where the log variance of the
    reverse step lies between the posterior's (-1) and the forward step's (1).  For
    ``diffjax.solvers.ancestral(variance="learned")``; every other solver ignores v.
    Improved Denoising Diffusion Probabilistic Models, arXiv:2102.09672, equation 15.
    """
    return Ranged(params, condition, prediction, apply)


@value
class Ranged:
    params: Tree = dataclasses.field(repr=False)
    condition: Tree
    prediction: Prediction
    apply: Callable = static()
    factory = "learned_range"

    def __call__(self, x: Tree, level: Level) -> Tree:
        return self.with_variance(x, level)[0]

    def with_variance(self, x: Tree, level: Level) -> tuple[Tree, Tree]:
        """``(x0, share)`` with the share in [0, 1] of the way from the small to the large log variance."""
        found = []

        def output_only(*arguments):
            output, v = self.apply(*arguments)
            found.append(v)
            return output

        output = self.prediction.network(output_only, self.params, x, level, self.condition)
        share = jax.tree.map(lambda v: jnp.clip(0.5 * (v + 1), 0.0, 1.0), found[0])
        return self.prediction.to_x0(output, x, level), share

    def check(self, t: Level) -> None:
        """Raise ValueError if the target does not determine x_0 at some of the (concrete) levels ``t``."""
        Denoiser(self.params, self.condition, self.prediction, self.apply).check(t)
