"""The Langevin corrector: steps of Langevin dynamics at the level where a step starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from diffjax.levels import Array, Grid, Info, Level, Row, Solver, Tree, is_traced, namespace, static, value


def langevin(solver: Solver, steps: int = 1, snr: Array = 0.16, size: Array | None = None) -> Langevin:
    """Predictor-corrector sampling: before each step of ``solver``, ``steps`` corrections at its level.

        x <- x + e score + sqrt(2 e) z,    score = (alpha x0 - x) / sigma^2.

    By default ``e = 2 (snr |z| / |score|)^2``, norms over the sample (score_sde takes their means over a batch, and
    multiplies by 1 - beta for discrete VP processes), so that the corrections' signal-to-noise ratio is ``snr``; with
    ``size`` given, ``e = size sigma^2``, and the corrections leave the law of an exact score unchanged up to
    O(size^2).  ``steps`` more denoiser calls and normal draws a row.

    Score-Based Generative Modeling through Stochastic Differential Equations, arXiv:2011.13456, algorithms 4 and 5.

    Raises ValueError unless steps is a positive integer and snr (or size) is above 0.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}.")
    chosen = snr if size is None else size
    if not is_traced(chosen) and not (np.all(np.isfinite(chosen)) and np.all(np.asarray(chosen) >= 0)):
        raise ValueError(f"snr and size must be finite and at least 0, got snr={snr!r}, size={size!r}.")
    return Langevin(solver, chosen, steps, size is None)


@value
class Langevin:
    inner: Any
    strength: Array
    steps: int = static()
    by_ratio: bool = static()

    def __repr__(self) -> str:
        name = "snr" if self.by_ratio else "size"
        return f"langevin({self.inner!r}, steps={self.steps}, {name}={self.strength!r})"

    @property
    def renoises(self) -> bool:
        return getattr(self.inner, "renoises", False)

    @property
    def order(self) -> int:
        return 0  # corrections of a fixed size leave an error of that size, whatever the grid

    @property
    def calls(self) -> int:
        return self.inner.calls + self.steps

    @property
    def draws(self) -> int:
        return self.inner.draws + self.steps

    @property
    def embedded(self) -> bool:
        return False

    def plan(self, grid: Grid) -> Row:
        return self.inner.plan(grid)

    def init(self, x: Tree) -> Tree:
        return self.inner.init(x)

    def step(
        self, noise: tuple[Tree, ...], denoise: Callable[[Tree, Level], Tree], x: Tree, memory: Tree, row: Row
    ) -> tuple[Tree, Tree, Info]:
        for z in noise[: self.steps]:
            x = self._correct(z, denoise(x, row.t), x, row)
        return self.inner.step(noise[self.steps :], denoise, x, memory, row)

    def _correct(self, z: Tree, x0: Tree, x: Tree, row: Row) -> Tree:
        level = row.t
        xp = namespace(x, x0, level)
        # a step that goes nowhere, or starts at the data, is the identity
        still = (level.sigma == 0) | (level.half_log_snr == row.s.half_log_snr)
        variance = xp.where(still, 1.0, level.sigma**2)
        score = jax.tree.map(lambda leaf, clean: xp.where(still, 0.0, (level.alpha * clean - leaf) / variance), x, x0)
        if self.by_ratio:
            squared = _squared(score)
            size = 2 * self.strength**2 * _squared(z) / xp.where(squared > 0, squared, 1.0)
            size = xp.where(squared > 0, size, 0.0)
        else:
            size = xp.where(still, 0.0, self.strength * level.sigma**2)
        std = xp.sqrt(2 * size)
        return jax.tree.map(lambda a, s, n: (a + size * s + std * n).astype(a.dtype), x, score, z)


def _squared(tree: Tree) -> Array:
    return sum((leaf**2).sum() for leaf in jax.tree.leaves(tree))
