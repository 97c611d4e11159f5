"""Diffusion with forward models: signals that were never seen, behind a denoiser of what is seen of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.levels import Array, Grid, Level, Sample, Solver, Tree, all_finite
from diffjax.predictions.prediction import Denoiser
from diffjax.predictions.targets import Data
from diffjax.samplers.sequential import sample


def through(
    apply: Callable, render: Callable[[Tree, Tree], Tree], seen: Callable[[Tree], Tree] | None = None
) -> Through:
    """A network of observations that makes a signal first: ``render(apply(params, x, t, (context, view)), view)``.

    It predicts the data, ``diffjax.predictions.data(process)``: the loss is `diffjax.training.denoising` of that
    prediction, |render(S, view) - o|^2 for an observation o, and samples of observations come from
    ``data(process).decode(through(...), params, (context, view))``.  With enough views the best S is E[signal | o_t,
    context].  What no view of the loss shows of S, the loss leaves free; so are novel views supervised: the observation
    is ``{"target": o, "novel": o'}``, render makes both, and ``seen=lambda x: x["target"]`` hides the second from the
    network, which is never told its state.

    Args:
        apply: ``apply(params, x, t, condition) -> signal``, any tree of floating numbers.
        render: the differentiable forward model, ``render(signal, view) -> observation``.
        seen: what of the noised observations the network is given; default all.

    Returns a network of the condition ``(context, view)``; it has ``signal(params, x, t, condition)``.

    Diffusion with Forward Models: Solving Stochastic Inverse Problems Without Direct Supervision, arXiv:2306.11719.
    """
    return Through(apply, render, seen)


@dataclasses.dataclass(frozen=True)
class Through:
    apply: Callable
    render: Callable
    seen: Callable | None

    def signal(self, params: Tree, x: Tree, t: Array, condition: tuple[Tree, Tree]) -> Tree:
        """The signal before it is rendered."""
        return self.apply(params, x if self.seen is None else self.seen(x), t, condition)

    def __call__(self, params: Tree, x: Tree, t: Array, condition: tuple[Tree, Tree]) -> Tree:
        return self.render(self.signal(params, x, t, condition), condition[1])


def signal(denoise: Any, x: Tree, level: Level) -> Tree:
    """The signal behind the clean estimate of a denoiser made of `through`, at a noised observation.

    Raises ValueError for another denoiser.
    """
    check_through(denoise)
    prediction = denoise.prediction
    scale, time = prediction.target.inputs(prediction.process, level)
    scaled = x if scale is None else jax.tree.map(lambda leaf: (scale * leaf).astype(leaf.dtype), x)
    return denoise.apply.signal(denoise.params, prediction.process.leave(scaled, level), time, denoise.condition)


def draw_signal(
    key: Array, denoise: Any, solver: Solver, grid: Grid, shape: Any = None, **settings: Any
) -> tuple[Tree, Sample]:
    """A signal, drawn by diffusing observations of it: the one behind the last clean estimate.

    The law of a signal given the context, if the context and the observation determine it; else it is its mean given
    those two.  (Draw several views at once, or one after the other with those before as context.)  The last step of
    the grid is the jump to the clean estimate, whatever the solver, so that the observation is the signal's:
    ``render(signal, view) = x``.

    Args:
        denoise: made of `through`, with the context and the view as its condition.
        grid: of at least 2 steps, down to sigma = 0.
        shape, settings: as `diffjax.sample` takes them; nothing is saved.

    Returns ``(signal, Sample)``; one more evaluation than the solver's steps but the last.

    Raises ValueError for another denoiser, a shorter grid, and as `diffjax.sample` does.
    """
    check_through(denoise)
    if len(grid) < 2:
        raise ValueError(f"grid must have at least 2 steps, got {len(grid)}.")
    if {"save", "every", "final_denoise", "start"} & set(settings):
        raise ValueError(f"draw_signal takes x, dtype, noise, remat and progress, got {sorted(settings)}.")
    out = sample(key, denoise, solver, grid[:-1], shape, **settings)
    before = jax.tree.map(lambda leaf: jnp.asarray(leaf[-2], jnp.float32), grid.s)
    found = signal(denoise, grid.process.enter(out.x, before), before)
    failed = jnp.where((out.failed_at < 0) & ~all_finite(found), len(grid) - 1, out.failed_at)
    x = denoise.apply.render(found, denoise.condition[1])
    return found, Sample(x, out.nfe + 1, out.rounds + 1, failed, out.saved)


def check_through(denoise: Any) -> None:
    """Raise ValueError unless the denoiser renders a signal."""
    if not isinstance(denoise, Denoiser) or not isinstance(denoise.apply, Through):
        raise ValueError(f"denoise must be data(process).decode(through(...), ...), got {denoise!r}.")
    if not isinstance(denoise.prediction.target, Data):
        raise ValueError(f"what is rendered is a prediction of the data, got {denoise.prediction!r}.")
