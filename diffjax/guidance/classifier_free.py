"""Classifier-free guidance: extrapolation from the unconditional to the conditional clean estimate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.corrections.transform import check_within, condition_within, evaluations
from diffjax.guidance.rules import combined
from diffjax.guidance.schedules import as_scale, neutral, scale_at
from diffjax.levels import Array, Level, Tree, value


def classifier_free(denoise: Any, null: Tree, scale: Any = 1.0, rule: Any = None) -> Any:
    """``x0 = x0(condition) + (scale - 1) (x0(condition) - x0(null))``, both in one batched network call.

    Convention everywhere in diffjax: scale 1 is the conditional model, 0 the unconditional one; above 1 the
    condition is emphasised.  A learned variance (`diffjax.predictions.learned_range`) is that of the conditional model.

    Args:
        denoise: a denoiser with a ``condition`` field (as `Prediction.decode` makes it).
        null: what it is compared to, in the condition's structure and shape: "no condition", or a negative condition,
            from which the sample is pushed away.
        scale: a number, or a function of the level (`interval`, `ramp`, `sine`; best a value).
        rule: how the two estimates are combined: `rescale`, `apg`, `zero_star`; None extrapolates.

    Two network evaluations; one where a scale that is a function of the level is 1: that is decided in the compiled
    loop, not by masking (under a `jax.vmap` over scales both are made).

    Classifier-Free Diffusion Guidance, arXiv:2207.12598 (scale = 1 + w).

    Raises ValueError if ``denoise`` has no condition, null does not fit it, or a concrete scale is not finite.
    """
    null = fitting(denoise, null, "classifier_free")
    kind = Remembered if hasattr(rule, "init") else ClassifierFree
    return kind(denoise, null, as_scale("scale", scale), rule)


def fitting(denoise: Any, null: Tree, name: str, what: str = "null", leading: int = 0) -> Tree:
    """``null`` in the dtypes of the condition of ``denoise``; ValueError if there is none or it does not fit.

    ``leading`` axes come before the condition's.
    """
    held = dataclasses.is_dataclass(denoise) and any(f.name == "condition" for f in dataclasses.fields(denoise))
    condition = getattr(denoise, "condition", None) if held else None
    if condition is None:
        inside = getattr(denoise, "condition", None) is not None
        advice = f": guide the denoiser inside and transform the result, as in clipped({name}(...))"
        raise ValueError(
            f"{name} needs a denoiser with a condition of its own to replace, got {denoise!r}"
            f"{advice if inside else ''}."
        )
    shapes = [jax.tree.map(lambda leaf: jnp.shape(leaf)[leading:], null), jax.tree.map(jnp.shape, condition)]
    if jax.tree.structure(null) != jax.tree.structure(condition) or shapes[0] != shapes[1]:
        more = f" after {leading} leading axes" if leading else ""
        raise ValueError(f"{what} must have the condition's structure and shape {shapes[1]}{more}, got {shapes[0]}.")
    return jax.tree.map(lambda leaf, like: jnp.asarray(leaf, jnp.result_type(like)), null, condition)


def under_conditions(denoise: Any, conditions: Tree, call: Callable[[Any], Tree]) -> Tree:
    """``call(denoise)`` under each of the conditions along a leading axis, in one batched call."""
    return jax.vmap(lambda condition: call(dataclasses.replace(denoise, condition=condition)))(conditions)


def branches(self: Any, call: Callable[[Any], Tree]) -> tuple[Tree, Tree]:
    """``call`` of the conditional and of the unconditional denoiser."""
    conditions = jax.tree.map(lambda a, b: jnp.stack([jnp.asarray(a), b]), self.denoise.condition, self.null)
    both = under_conditions(self.denoise, conditions, call)
    return jax.tree.map(lambda leaf: leaf[0], both), jax.tree.map(lambda leaf: leaf[1], both)


def _guided(self: Any, x: Tree, level: Level, memory: Tree) -> tuple[Tree, Tree]:
    def full() -> tuple[Tree, Tree]:
        strong, weak = branches(self, lambda denoise: denoise(x, level))
        return combined(self.rule, strong, weak, scale_at(self.scale, level), x, level, memory)

    return full_or_alone(self.scale, level, full, lambda: (self.denoise(x, level), memory))


def full_or_alone(scale: Any, level: Level, full: Callable[[], Any], alone: Callable[[], Any]) -> Any:
    """``alone()`` where a scheduled scale is 1, else ``full()``."""
    return jax.lax.cond(neutral(scale, level), alone, full) if callable(scale) else full()


def _evaluations(self: Any, level: Level) -> Array:
    """Network evaluations of a call at ``level``."""
    each = evaluations(self.denoise, level)
    return each * jnp.where(neutral(self.scale, level), 1, 2)


@value
class ClassifierFree:
    denoise: Any
    null: Tree
    scale: Any
    rule: Any = None
    factory = "classifier_free"

    def __call__(self, x: Tree, level: Level) -> Tree:
        return _guided(self, x, level, None)[0]

    @property
    def with_variance(self) -> Callable[[Tree, Level], tuple[Tree, Tree]]:
        """``(x, level) -> (x0, share)``, the share that of the conditional branch; only where the denoiser has one."""
        _ = self.denoise.with_variance

        def guided(x: Tree, level: Level) -> tuple[Tree, Tree]:
            def full() -> tuple[Tree, Tree]:
                (strong, share), (weak, _) = branches(self, lambda denoise: denoise.with_variance(x, level))
                return combined(self.rule, strong, weak, scale_at(self.scale, level), x, level, None)[0], share

            return full_or_alone(self.scale, level, full, lambda: self.denoise.with_variance(x, level))

        return guided

    condition = property(condition_within)
    check = check_within
    evaluations = _evaluations


@value
class Remembered:
    """The same with a rule that remembers."""

    denoise: Any
    null: Tree
    scale: Any
    rule: Any
    factory = "classifier_free"

    def init(self, x: Tree) -> Tree:
        return self.rule.init(x)

    def apply(self, x: Tree, level: Level, memory: Tree) -> tuple[Tree, Tree]:
        return _guided(self, x, level, memory)

    condition = property(condition_within)
    check = check_within
    evaluations = _evaluations


def composed(denoise: Any, null: Tree, conditions: Tree, scales: Array) -> Composed:
    """``x0 = x0(null) + sum_k scales[k] (x0(c_k) - x0(null))``: several conditions at once, in one batched call.

    A conjunction of concepts; negative scales push away from a concept.  With one condition it is `classifier_free`.
    The sum of scores is not the score of the noised product of the laws: for that see the correctors of
    `diffjax.modifiers.langevin` and sequential Monte Carlo.  K + 1 network evaluations.

    Args:
        denoise: a denoiser with a ``condition`` field, which is replaced.
        null: the condition "no condition".
        conditions: like the denoiser's condition, with a leading axis K.
        scales: (K,), finite.

    Compositional Visual Generation with Composable Diffusion Models, arXiv:2206.01714.

    Raises ValueError if ``denoise`` has no condition, if shapes do not fit, or for scales that are not finite.
    """
    null = fitting(denoise, null, "composed")
    conditions = fitting(denoise, conditions, "composed", "conditions", leading=1)
    as_scale("scales", scales)
    counts = {leaf.shape[0] for leaf in jax.tree.leaves(conditions)}
    if np.ndim(scales) != 1 or counts != {np.shape(scales)[0]}:
        raise ValueError(f"scales must be one number a condition, got shape {np.shape(scales)} for {counts}.")
    return Composed(denoise, null, conditions, scales)


@value
class Composed:
    denoise: Any
    null: Tree
    conditions: Tree
    scales: Array
    factory = "composed"

    def __call__(self, x: Tree, level: Level) -> Tree:
        everything = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), self.conditions, self.null)
        estimates = under_conditions(self.denoise, everything, lambda denoise: denoise(x, level))
        scales = jnp.asarray(self.scales)
        weights = jnp.concatenate([scales, 1 - jnp.sum(scales, keepdims=True)])
        return jax.tree.map(lambda leaf: jnp.tensordot(weights.astype(leaf.dtype), leaf, 1), estimates)

    condition = property(condition_within)
    check = check_within

    def evaluations(self, level: Level) -> Array:
        """Network evaluations of a call at ``level``."""
        return (jnp.shape(self.scales)[0] + 1) * evaluations(self.denoise, level)
