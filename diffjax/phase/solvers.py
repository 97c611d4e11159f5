"""The solvers of phase space: one machine of steps that are linear in the state, the clean estimates and fresh noise.

    stage j    u_j = A_j u + sum_i b_ji x0_i + sum_k C_jk z_k,    x0_j = denoise(r_j . u_j, level_j)
    step       u'  = A u   + sum_i b_i  x0_i + sum_k C_k  z_k

with n x n matrices A and C, n-vectors b and the statistic r of `linear_sde`.  A method is what fills them in, in
float64 before the loop.  Where the n entries are all data (`flexible`), b and r are n x n matrices too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax.levels import Array, Grid, Info, Level, Row, Tree, concrete, is_traced, namespace, static, value
from diffjax.phase import matrices


class Affine(NamedTuple):
    """A state as a function of the step's start u, its clean estimates (the remembered one last) and its noise."""

    keep: Array  # (R, n, n)
    clean: tuple[Array, ...] = ()  # (R, n) or (R, n, n) each, one for every estimate
    noise: tuple[Array, ...] = ()  # (R, n, n) each

    def map(self, matrix: Array) -> Affine:
        """The state times a matrix."""
        clean = tuple(matrices.act(matrix, b) for b in self.clean)
        return Affine(matrix @ self.keep, clean, tuple(matrix @ c for c in self.noise))

    def plus(self, other: Affine) -> Affine:
        """The sum of two, of different numbers of terms."""
        return Affine(self.keep + other.keep, _sum(self.clean, other.clean), _sum(self.noise, other.noise))

    def estimate(self, index: int, weights: Array) -> Affine:
        """With ``weights x0_index`` added."""
        return self.plus(Affine(0 * self.keep, (0 * weights,) * index + (weights,)))

    def draw(self, index: int, matrix: Array) -> Affine:
        """With ``matrix z_index`` added."""
        return self.plus(Affine(0 * self.keep, (), (0 * matrix,) * index + (matrix,)))

    def score(self, moments: tuple[Array, Array], index: int, state: Affine | None = None) -> Affine:
        """``S^-1 (a x0_index - state)``, ``state`` being that of the stage (default this one)."""
        mean, covariance = moments
        precision = matrices.inverse(covariance)
        minus = (self if state is None else state).map(-precision)
        return minus.estimate(index, matrices.act(precision, mean))


def _sum(left: tuple, right: tuple) -> tuple:
    short, long = sorted((left, right), key=len)
    return tuple(a + b for a, b in zip(short, long, strict=False)) + long[len(short) :]


class Table(NamedTuple):
    """What a method fills in: the step, its stages and the levels at which they are read; None is the step's start."""

    out: Affine
    stages: tuple[Affine | None, ...] = (None,)
    levels: tuple[Level | None, ...] = (None,)


class Plan(NamedTuple):
    """The coefficients of a row."""

    out: Affine
    stages: tuple[Affine | None, ...]
    levels: tuple[Level, ...]
    reads: tuple[Array, ...]  # the statistic r of every stage, (R, n) or (R, n, n)
    start: Affine  # E[u_0 | u_t] from the state and the first estimate


@value
class Phase:
    """A solver of phase space, defined by a table."""

    method: Any
    order: int = static()
    calls: int = static(default=1)
    draws: int = static(default=0)
    history: int = static(default=0)
    weak_order: int = static(default=1)
    embedded: bool = static(default=False)
    phase: bool = static(default=True)

    def __repr__(self) -> str:
        return repr(self.method)

    def plan(self, grid: Grid) -> Row:
        if not hasattr(grid.process.schedule, "variables"):
            raise ValueError(f"{self!r} needs a process of diffjax.phase, got {grid.process!r}.")
        method, grid = (self.method, grid) if is_traced(self.method, grid) else (self.method, concrete(grid))
        if not is_traced(grid):
            if np.any(grid.t.time <= grid.s.time) or np.any(grid.t.time[1:] != grid.s.time[:-1]):
                raise ValueError(f"{self!r} needs decreasing times without gaps, got {grid.t.time!r}, {grid.s.time!r}.")
            if np.ndim(grid.t.time) != 1:
                raise ValueError(f"{self!r} needs one time a step, got times of shape {grid.t.time.shape}.")
        schedule = grid.process.schedule
        if self.history and hasattr(schedule, "statistic"):
            raise ValueError(f"{self!r} remembers an estimate of one entry, and all entries are data in {schedule!r}.")
        table = method.table(grid)
        levels = tuple(grid.t if level is None else level for level in table.levels)
        reads = tuple(statistic(schedule, level) for level in levels)
        (mean, _), (first, _) = schedule.moments(grid.t.time), schedule.moments(0 * grid.t.time)
        back, _ = schedule.kernel(grid.t.time, 0 * grid.t.time)
        start = Affine(back, (first - matrices.act(back, mean),))
        return Row(grid.t, grid.s, Plan(table.out, table.stages, levels, reads, start))

    def init(self, x: Tree) -> Tree:
        return (jax.tree.map(lambda leaf: namespace(leaf).zeros_like(leaf[0]), x),) * self.history

    def step(
        self, noise: tuple[Tree, ...], denoise: Callable[[Tree, Level], Tree], x: Tree, memory: Tree, row: Row
    ) -> tuple[Tree, Tree, Info]:
        plan = row.coefficients
        estimates: tuple[Tree, ...] = ()
        for stage, level, read in zip(plan.stages, plan.levels, plan.reads, strict=True):
            state = x if stage is None else apply(stage, x, estimates, noise)
            y = jax.tree.map(lambda leaf, r=read: _read(r, leaf), state)
            estimates = (*estimates, denoise(y, level))
        start = apply(plan.start, x, estimates, ())
        return apply(plan.out, x, (*estimates, *memory), noise), estimates[: self.history], Info(start)


def apply(affine: Affine, x: Tree, clean: tuple[Tree, ...], noise: tuple[Tree, ...]) -> Tree:
    """The state that an `Affine` stands for; estimates and draws without a coefficient are left out."""

    def leaf(leaf: Array, *others: Array) -> Array:
        total = _rows(affine.keep, leaf)
        for b, x0 in zip(affine.clean, others, strict=False):
            total = total + (_rows(b, x0) if b.ndim == 2 else b.reshape(b.shape + (1,) * x0.ndim) * x0)
        for c, z in zip(affine.noise, others[len(clean) :], strict=False):
            total = total + _rows(c, z)
        return total.astype(leaf.dtype)

    return jax.tree.map(leaf, x, *clean, *noise)


def _rows(matrix: Array, leaf: Array) -> Array:
    return (matrix @ leaf.reshape(leaf.shape[0], -1)).reshape(matrix.shape[0], *leaf.shape[1:])


def _read(read: Array, leaf: Array) -> Array:
    return _rows(read, leaf) if read.ndim == 2 else _rows(read[None], leaf)[0]


def statistic(schedule: Any, level: Level) -> Array:
    """r with ``y = r . u``, of shape (..., n), or (..., n, n) where all entries are data."""
    if hasattr(schedule, "statistic"):
        return schedule.statistic(level)
    mean, covariance = schedule.moments(level.time)
    solved = matrices.times(matrices.inverse(covariance), mean)
    xp = namespace(solved)
    return level.alpha[..., None] * solved / xp.sum(mean * solved, -1)[..., None]
