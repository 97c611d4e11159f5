"""Guidance by a worse model: extrapolation from a weak to a strong denoiser of the same law."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.corrections.transform import check, condition_within, evaluations
from diffjax.guidance.classifier_free import full_or_alone
from diffjax.guidance.rules import combined
from diffjax.guidance.schedules import as_scale, neutral, scale_at
from diffjax.levels import Array, Grid, Level, Tree, as_value, concrete, is_traced, ratio, remembers, value


def autoguidance(denoise: Any, weak: Any, scale: Any = 1.0, rule: Any = None) -> Any:
    """``x0 = x0_strong + (scale - 1) (x0_strong - x0_weak)``: away from the errors of a worse model.

    The weak model has the same task and condition and more of the same errors (smaller, or trained for less long, or
    one whose attention is perturbed), so that the direction between the two is that of the improvement.

    Args:
        denoise: the strong denoiser; a guided one too.
        weak: any denoiser of the same state.
        scale: 1 is the strong model; a number or a function of the level, as in `classifier_free`.
        rule: as in `classifier_free`.

    Network evaluations: those of both, of the strong one alone where a scheduled scale is 1.

    Guiding a Diffusion Model with a Bad Version of Itself, arXiv:2406.02507, equation 3.

    Raises ValueError for denoisers that remember, and a concrete scale that is not finite.
    """
    _plain("autoguidance", denoise=denoise, weak=weak)
    kind = RememberedAuto if hasattr(rule, "init") else AutoGuidance
    return kind(as_value(denoise), as_value(weak), as_scale("scale", scale), rule)


def _plain(name: str, **denoisers: Any) -> None:
    for which, denoise in denoisers.items():
        if remembers(denoise):
            raise ValueError(f"{name} needs a {which} that does not remember, got {denoise!r}.")


def _guided(self: Any, x: Tree, level: Level, memory: Tree) -> tuple[Tree, Tree]:
    strong = self.denoise(x, level)

    def full() -> tuple[Tree, Tree]:
        return combined(self.rule, strong, self.weak(x, level), scale_at(self.scale, level), x, level, memory)

    return full_or_alone(self.scale, level, full, lambda: (strong, memory))


def _check(self: Any, t: Level) -> None:
    check(self.denoise, t)
    check(self.weak, t)


def _evaluations(self: Any, level: Level) -> Array:
    """Network evaluations of a call at ``level``."""
    more = jnp.where(neutral(self.scale, level), 0, evaluations(self.weak, level))
    return evaluations(self.denoise, level) + more


@value
class AutoGuidance:
    denoise: Any
    weak: Any
    scale: Any
    rule: Any = None
    factory = "autoguidance"

    def __call__(self, x: Tree, level: Level) -> Tree:
        return _guided(self, x, level, None)[0]

    condition = property(condition_within)
    check = _check
    evaluations = _evaluations


@value
class RememberedAuto:
    """The same with a rule that remembers."""

    denoise: Any
    weak: Any
    scale: Any
    rule: Any
    factory = "autoguidance"

    def init(self, x: Tree) -> Tree:
        return self.rule.init(x)

    def apply(self, x: Tree, level: Level, memory: Tree) -> tuple[Tree, Tree]:
        return _guided(self, x, level, memory)

    condition = property(condition_within)
    check = _check
    evaluations = _evaluations


def weak_to_strong(denoise: Any, weak: Any, grid: Grid, steps: int | None = None) -> WeakToStrong:
    """Reflection: a step down with the strong model and back up with the weak one, before each of the first steps.

    With t and s the levels of a step, r = sigma_s / sigma_t and k = alpha_s - alpha_t r its DDIM numbers, the strong
    step to x_s = r x + k x0_strong(x) and the weak step back lead to
    ``x~ = x + (k / r) (x0_strong(x) - x0_weak(x_s))``, and the sampler goes on from there.  As a denoiser,

        x0 = x0_strong(x~) + x0_strong(x) - x0_weak(x_s):

    with `solvers.ddim` on ``grid`` that is the paper's algorithm to round-off, but for the weak model's level: here it
    is that of x_s, where the paper inverts with the level of t at x_s.  Every other solver runs as well.  For small
    steps it is `autoguidance` with scale 2.  Three network evaluations where it reflects, else one.

    Args:
        denoise: the strong denoiser.
        weak: the weak one.
        grid: the grid of the run, which tells the next level.
        steps: how many of its first steps reflect; default all.  A step to sigma = 0, where there is no way back, does
            not.  0 is the strong model.

    Weak-to-Strong Diffusion with Reflection, arXiv:2502.00473, algorithm 1.

    Raises ValueError for denoisers that remember, a grid with levels per frame, and steps below 0.
    """
    _plain("weak_to_strong", denoise=denoise, weak=weak)
    t, s = concrete((grid.t, grid.s))
    if np.ndim(t.time) != 1 or np.ndim(t.alpha) != 1:
        raise ValueError("weak_to_strong needs a grid with one level a step.")
    if steps is not None and not (isinstance(steps, int | np.integer) and steps >= 0):
        raise ValueError(f"steps must be an integer of at least 0, got {steps!r}.")
    most = len(grid) if steps is None else steps
    xp = jnp if is_traced(s) else np
    on = (xp.arange(len(grid)) < most) & (s.sigma > 0)
    return WeakToStrong(as_value(denoise), as_value(weak), t.time, s, on)


@value
class WeakToStrong:
    denoise: Any
    weak: Any
    times: Array  # (N,), of the steps' entries
    next: Level  # (N,), of their exits
    on: Array  # (N,), whether a step reflects
    factory = "weak_to_strong"

    def __call__(self, x: Tree, level: Level) -> Tree:
        strong = self.denoise(x, level)
        index = self._index(level)
        kind = jnp.result_type(*jax.tree.leaves(x))
        s = jax.tree.map(lambda leaf: jnp.asarray(leaf, kind)[index], self.next)
        shrink = ratio(s.sigma, level.sigma)
        rise = s.alpha - level.alpha * shrink

        def reflected() -> Tree:
            below = jax.tree.map(lambda a, b: (shrink * a + rise * b).astype(a.dtype), x, strong)
            shift = jax.tree.map(jnp.subtract, strong, self.weak(below, s))
            moved = jax.tree.map(lambda a, d: (a + rise / shrink * d).astype(a.dtype), x, shift)
            return jax.tree.map(lambda a, d: (a + d).astype(a.dtype), self.denoise(moved, level), shift)

        return jax.lax.cond(self._on(level), reflected, lambda: strong)

    def _index(self, level: Level) -> Array:
        """The step that begins at a level."""
        return jnp.argmin(jnp.abs(jnp.asarray(self.times) - level.time))

    def _on(self, level: Level) -> Array:
        return jnp.asarray(self.on)[self._index(level)]

    condition = property(condition_within)
    check = _check

    def evaluations(self, level: Level) -> Array:
        """Network evaluations of a call at ``level``."""
        once = evaluations(self.denoise, level)
        return once + jnp.where(self._on(level), once + evaluations(self.weak, level), 0)
