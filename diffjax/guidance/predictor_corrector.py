"""Predictor-corrector guidance: a conditional predictor and correctors towards the powered law.

In the SDE limit classifier-free guidance of scale g in an ancestral sampler is the probability flow of the conditional
model together with Langevin dynamics on ``p(x_t | c)^g' p(x_t)^(1 - g')``, g' = 2 g - 1:

    f x - b^2 s_g  =  (f x - b^2/2 s_1)  -  b^2/2 s_g',        s_g = g s(c) + (1 - g) s(null).

So the two halves may be chosen apart: how strong the corrector's law is, and how long it is followed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.corrections.transform import check_within, condition_within, evaluations
from diffjax.guidance.classifier_free import ClassifierFree, fitting
from diffjax.guidance.schedules import as_scale
from diffjax.levels import Array, Level, Tree, static, value


def predictor_corrector(
    denoise: Any, null: Tree, scale: Any = 1.0, correctors: int = 1, predictors: int = 1
) -> PredictorCorrector:
    """The first ``correctors`` calls of every row are guided (`classifier_free`), the other ``predictors`` conditional.

    For a solver that corrects before it predicts, `diffjax.modifiers.langevin`:

        sample(key, predictor_corrector(denoise, null, scale, correctors=K), langevin(ddim(), K, size=...), grid, ...)

    is the paper's PCG (which predicts first: the same in between, with correctors after the last prediction and none
    before the first): its correctors keep to the law p(x_t | c)^scale p(x_t)^(1 - scale) of every level, so that the
    samples follow the powered law of the data the better the more they are, which guided samplers without them do not.
    A denoiser that remembers the number of the call.  Two network evaluations a corrector's call, one a predictor's;
    under `jax.vmap` over keys too.

    Args:
        denoise, null, scale: as in `classifier_free`; scale 1 is the conditional model.
        correctors, predictors: calls of a row, in this order; those of the solver (``solver.calls`` in all).

    Classifier-Free Guidance is a Predictor-Corrector, arXiv:2408.09000, algorithm 1.

    Raises ValueError as `classifier_free`, and for numbers of calls below 0 or both 0.
    """
    null = fitting(denoise, null, "predictor_corrector")
    for name, number in (("correctors", correctors), ("predictors", predictors)):
        if not isinstance(number, int | np.integer) or number < 0:
            raise ValueError(f"{name} must be an integer of at least 0, got {number!r}.")
    if correctors + predictors == 0:
        raise ValueError("correctors and predictors must not both be 0.")
    return PredictorCorrector(denoise, null, as_scale("scale", scale), int(correctors), int(predictors))


@value
class PredictorCorrector:
    denoise: Any
    null: Tree
    scale: Any
    correctors: int = static()
    predictors: int = static()
    factory = "predictor_corrector"

    def init(self, x: Tree) -> Array:
        """The number of the call in its row."""
        del x
        return jnp.zeros((), jnp.int32)

    def apply(self, x: Tree, level: Level, memory: Array) -> tuple[Tree, Array]:
        guided = ClassifierFree(self.denoise, self.null, self.scale)
        x0 = jax.lax.cond(memory < self.correctors, lambda: guided(x, level), lambda: self.denoise(x, level))
        return x0, (memory + 1) % (self.correctors + self.predictors)

    condition = property(condition_within)
    check = check_within

    def evaluations(self, level: Level) -> Array:
        """Network evaluations of a guided call."""
        return 2 * evaluations(self.denoise, level)

    def spent(self, level: Level, memory: Array) -> Array:
        """Network evaluations of the call that left this memory."""
        last = (memory - 1) % (self.correctors + self.predictors)
        return evaluations(self.denoise, level) * jnp.where(last < self.correctors, 2, 1)
