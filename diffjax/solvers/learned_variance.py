"""Ancestral sampling with a variance that the network predicts.

The denoiser gives, in the same call, the clean estimate and where the variance lies between its two bounds:
``denoise.with_variance(x, level) -> (x0, v)`` with v in [0, 1] shaped like the state (`predictions.learned_range`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from diffjax.levels import Array, Grid, Info, Level, Row, Tree, combine, concrete, is_traced, namespace, value
from diffjax.solvers.coefficients import stochastic_exponential
from diffjax.solvers.linear import check


class Bounds(NamedTuple):
    """The mean's coefficients, and the bounds of the variance as ``small`` and the log of large / small."""

    mean: tuple[Array, Array]
    small: Array
    log_ratio: Array


@value
class LearnedRange:
    """Made by ``ancestral(variance="learned")``."""

    order = 1
    calls = 1
    draws = 1
    embedded = False

    def __repr__(self) -> str:
        return "ancestral(variance='learned')"

    def plan(self, grid: Grid) -> Row:
        grid = grid if is_traced(grid) else concrete(grid)
        check(self, grid)
        t, s = grid.t, grid.s
        xp = namespace(t)
        keep, weight, small = stochastic_exponential(t, s, xp.asarray(1.0))
        last = s.sigma == 0
        log_ratio = xp.log(xp.where(last, 1.0, t.sigma / xp.where(last, 1.0, s.sigma)))
        return Row(t, s, Bounds((keep, weight), small, log_ratio))

    def init(self, x: Tree) -> Tree:
        del x
        return ()

    def step(
        self, noise: tuple[Tree, ...], denoise: Callable[[Tree, Level], Tree], x: Tree, memory: Tree, row: Row
    ) -> tuple[Tree, Tree, Info]:
        c: Bounds = row.coefficients
        x0, v = with_variance(denoise)(x, row.t)

        def leaf(mean: Array, share: Array, z: Array) -> Array:
            xp = namespace(mean, share)
            return (mean + c.small * xp.exp(xp.clip(share, 0.0, 1.0) * c.log_ratio) * z).astype(mean.dtype)

        return jax.tree.map(leaf, combine(c.mean, (x, x0)), v, noise[0]), memory, Info(x0)


def with_variance(denoise: Any) -> Callable[[Tree, Level], tuple[Tree, Tree]]:
    """The denoiser's method; ValueError if it has none."""
    method = getattr(denoise, "with_variance", None)
    if method is None:
        raise ValueError(
            "ancestral(variance='learned') needs a denoiser with with_variance(x, level) -> (x0, v), for instance"
            f" diffjax.predictions.learned_range(...), got {denoise!r}."
        )
    return method
