"""Progressive distillation: a student that makes in one step what its teacher makes in two, and again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.grids.gaps import half_back
from diffjax.guidance.distilled import truncated_snr
from diffjax.guidance.energy import noised
from diffjax.levels import Array, Grid, Level, Tree, ratio, static, value
from diffjax.predictions import Prediction


def halved(grid: Grid) -> Grid:
    """The grid of every second level: a step for two.  Raises ValueError unless the steps are even in number."""
    _even(grid)
    every = lambda level, first: jax.tree.map(lambda leaf: leaf[first::2], level)
    return dataclasses.replace(grid, t=every(grid.t, 0), s=every(grid.s, 1))


def two_steps(denoise: Any, x: Tree, t: Level, middle: Level, s: Level) -> Tree:
    """The estimate with which one DDIM step from t to s ends where two of ``denoise`` end.

        x0 = (x'' - (sigma_s / sigma_t) x) / (alpha_s - (sigma_s / sigma_t) alpha_t),   x'' after both steps

    Two denoiser calls.

    Progressive Distillation for Fast Sampling of Diffusion Models, arXiv:2202.00512, algorithm 2.
    """

    def step(x: Tree, t: Level, s: Level) -> Tree:
        keep = ratio(s.sigma, t.sigma)
        return jax.tree.map(lambda x, x0: keep * x + (s.alpha - keep * t.alpha) * x0, x, denoise(x, t))

    after, keep = step(step(x, t, middle), middle, s), ratio(s.sigma, t.sigma)
    return jax.tree.map(lambda new, x: ((new - keep * x) / (s.alpha - keep * t.alpha)).astype(x.dtype), after, x)


def progressive_distillation(
    prediction: Prediction,
    apply: Callable[..., Tree],
    teacher: Callable[[Tree], Any],
    grid: Grid,
    *,
    scales: tuple[float, float] | None = None,
    stochastic: bool = False,
    weighting: Callable[[Level], Array] = truncated_snr,
) -> ProgressiveDistillation:
    """The loss ``loss(params, key, x0, condition) -> (B,)`` of a student for ``halved(grid)``.

        loss = weight(t) mean( (x0_student(x_t, t) - two_steps(x0_teacher, x_t, t, middle, s))^2 )

    at the levels of the student's grid.  With ``scales`` it is the second stage of guided distillation: the condition
    becomes ``(condition, w)``, w uniform between them, for the student and for its teacher: the student of
    `diffjax.guidance.guidance_distillation` first (or the guided denoiser itself), then the last student.

    Args:
        prediction, apply: of the student, as for `guidance_distillation`.
        teacher: ``teacher(condition) -> denoiser``.
        grid: of the teacher, with an even number of steps, down to data or not.
        scales: the lowest and the highest w.
        stochastic: a student for ``half_back(halved(grid))``, whose steps are two of its levels long and begin at all
            of them: targets are two of the teacher's steps of one of these levels each, and at the last level one.  The
            teacher makes steps of that length: a student of the stage before does, and a denoiser that was not
            distilled makes them by DDIM.  Sampled with `ddim`, which adds the noise of the grid's gaps.
        weighting: ``level -> number``; default max(SNR, 1).

    On Distillation of Guided Diffusion Models, arXiv:2210.03142 (stage two; what it does at the last level of the
    stochastic one is derived here: the teacher has a step of just this length).
    Progressive Distillation for Fast Sampling of Diffusion Models, arXiv:2202.00512, algorithm 2.

    Raises ValueError for an odd number of steps, a grid with gaps, and unless the lowest scale is below the highest.
    """
    _even(grid)
    if scales is not None and not (len(scales) == 2 and np.all(np.isfinite(scales)) and scales[0] < scales[1]):
        raise ValueError(f"scales must be two finite numbers, the lowest first, got {scales!r}.")
    return ProgressiveDistillation(prediction, _strides(grid, stochastic), scales, apply, teacher, weighting)


def _strides(grid: Grid, stochastic: bool) -> tuple[Level, Level, Level]:
    """The levels (t, middle, s) of every step of the student."""
    half = halved(grid)
    if not stochastic:
        return half.t, jax.tree.map(lambda leaf: leaf[::2], grid.s), half.s
    last = len(half) - 1
    # the last one is one step of the teacher: the first of the two stays where it is
    middle = jax.tree.map(lambda t, s: np.concatenate([s[:last], t[last:]]), half.t, half.s)
    return half.t, middle, half_back(half).s


@value
class ProgressiveDistillation:
    prediction: Prediction
    strides: tuple[Level, Level, Level]
    scales: Any
    apply: Callable = static()
    teacher: Callable = static()
    weighting: Callable = static()
    factory = "progressive_distillation"

    def __call__(self, params: Tree, key: Array, x0: Tree, condition: Tree = None) -> Array:
        process, count = self.prediction.process, jax.tree.leaves(x0)[0].shape[0]
        kind = jnp.result_type(*jax.tree.leaves(x0))
        order, drawn, scale_key = jax.random.split(key, 3)
        steps = len(self.strides[0].time)
        index = jax.random.permutation(order, count) % steps  # as many samples for every step
        t, middle, s = jax.tree.map(lambda leaf: jnp.asarray(leaf, kind)[index], self.strides)
        x = jax.vmap(noised, (None, 0, 0, 0))(process, jax.random.split(drawn, count), x0, t)
        if self.scales is not None:
            low, high = self.scales
            condition = (condition, low + (high - low) * jax.random.uniform(scale_key, (count,), kind))

        def one(x: Tree, t: Level, middle: Level, s: Level, condition: Tree) -> Array:
            wanted = jax.lax.stop_gradient(two_steps(self.teacher(condition), x, t, middle, s))
            found = self.prediction.decode(self.apply, params, condition)(x, t)
            squares = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.square(a - b), found, wanted))
            return self.weighting(t) * sum(leaf.sum() for leaf in squares) / sum(leaf.size for leaf in squares)

        return jax.vmap(one)(x, t, middle, s, condition)


class Stage(NamedTuple):
    """A student and the grid that it is for."""

    params: Tree
    grid: Grid


def halvings(
    key: Array,
    params: Tree,
    teacher: Callable[[Tree], Any],
    grid: Grid,
    prediction: Prediction,
    apply: Callable[..., Tree],
    fit: Callable[[Array, Tree, Any], Tree],
    stages: int,
    **options: Any,
) -> list[Stage]:
    """``stages`` rounds of `progressive_distillation`, each student the teacher of the next, of half the steps.

    Args:
        params: with which the first student begins (those of its teacher, where it is the same network).
        teacher: the first, ``condition -> denoiser``; ``grid`` its own.
        fit: ``fit(key, params, loss) -> params``, training of any kind.
        options: scales, stochastic and weighting of `progressive_distillation`.

    Returns a `Stage` for each: sample with ``prediction.decode(apply, params, condition)``, `ddim` and its grid.

    On Distillation of Guided Diffusion Models, arXiv:2210.03142.

    Raises ValueError unless the steps of the grid can be halved so often.
    """
    if stages < 1 or len(grid) % 2**stages:
        raise ValueError(f"{len(grid)} steps cannot be halved stages={stages!r} times.")
    found = []
    for stage in range(stages):
        loss = progressive_distillation(prediction, apply, teacher, grid, **options)
        params, grid = fit(jax.random.fold_in(key, stage), params, loss), halved(grid)
        found.append(Stage(params, half_back(grid) if options.get("stochastic") else grid))
        teacher = lambda condition, params=params: prediction.decode(apply, params, condition)
    return found


def _even(grid: Grid) -> None:
    if len(grid) % 2 or getattr(grid, "gaps", False):
        raise ValueError(f"grid must have an even number of steps and no gaps, got {len(grid)} steps.")
