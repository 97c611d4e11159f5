"""Grids that go back: noise is added between some steps.

After the last step of a pass the state is taken to a noisier level by the forward transition, and denoised again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from diffjax.levels import Array, Grid, Level, concrete


def restart(
    grid: Grid, intervals: Sequence[tuple[int, int, Array, Array]], rho: Array = 7.0, inflation: Array = 1.0
) -> Grid:
    """Restart sampling: after the step that comes to ``low``, K times noise up to ``high`` and N steps down again.

    ``intervals`` are tuples ``(N, K, low, high)`` with noise-to-signal ratios sigma / alpha (of EDM: sigma); ``low``
    is moved to the nearest level at which a step of the grid ends.  The N steps are spaced like `karras` with ``rho``.
    The noise ``x <- x + sqrt(high^2 - low^2) z`` (in units of alpha) contracts the errors made so far, which a small
    step of an SDE solver cannot do without making its own; K = 0 is the grid itself.  ``inflation`` multiplies it.
    Denoiser calls: the solver's, for each of the ``sum of N K`` further steps.

    Restart Sampling for Improving Generative Processes, arXiv:2306.14878, algorithm 1.

    Raises ValueError for a grid with gaps or levels per frame, N < 1, K < 0, or unless ``0 < low < high``, within the
    process.

    >>> import diffjax
    >>> grid = diffjax.grids.karras(diffjax.processes.edm(), 10)
    >>> restart(grid, [(3, 2, 0.06, 0.3)])
    Grid(edm(sigma_max=80.0), steps=16, gaps=True)
    """
    grid = _plain(grid)
    process = grid.process
    ends = np.exp(-grid.s.half_log_snr)
    passes: dict[int, list[tuple[Level, Level]]] = {}
    for steps, repeats, low, high in intervals:
        if steps < 1 or repeats < 0 or not 0 < low < high:
            raise ValueError(f"an interval is (N >= 1, K >= 0, 0 < low < high), got {(steps, repeats, low, high)!r}.")
        index = int(np.argmin(np.abs(ends - low)))
        if ends[index] == 0 or ends[index] >= high:
            raise ValueError(f"no level of the grid is near low={low!r} and below high={high!r}.")
        u = np.linspace(0.0, 1.0, steps + 1)[:-1]
        ratios = (high ** (1 / rho) + u * (ends[index] ** (1 / rho) - high ** (1 / rho))) ** rho
        times = process.level(half_log_snr=-np.log(ratios)).time
        if times[0] > process.end * (1 + 1e-9):
            raise ValueError(f"high={high!r} is beyond the noise at the end of {process!r}.")
        inner = process.level(np.minimum(times, process.end))
        below = _joined(_part(inner, slice(1, None)), _part(grid.s, slice(index, index + 1)))
        passes.setdefault(index, []).extend([(inner, below)] * repeats)
    pieces = []
    for index in range(len(grid)):
        here = slice(index, index + 1)
        pieces += [(_part(grid.t, here), _part(grid.s, here)), *passes.get(index, ())]
    t, s = (_joined(*levels) for levels in zip(*pieces, strict=True))
    return _with_gaps(grid, t, s, inflation, any(passes.values()))


def time_travel(grid: Grid, jump: int = 10, repeats: int = 10, inflation: Array = 1.0) -> Grid:
    """RePaint's resampling: every ``jump`` steps go as many back, so that each stretch is walked ``repeats`` times.

    The stretches lie one after another from the end of the grid; a shorter one at its start is walked once.  With
    conditioning by projection (inpainting), the noise lets the known part and the generated part agree.  repeats = 1
    is the grid itself.

    RePaint: Inpainting using Denoising Diffusion Probabilistic Models, arXiv:2201.09865, section 4.2.

    Raises ValueError for a grid with gaps or levels per frame, or unless jump and repeats are positive integers.

    >>> import diffjax
    >>> time_travel(diffjax.grids.uniform(diffjax.processes.flow(), 4), jump=2, repeats=2).t.time
    array([1.  , 0.75, 1.  , 0.75, 0.5 , 0.25, 0.5 , 0.25])
    """
    if not (isinstance(jump, int) and isinstance(repeats, int) and jump >= 1 and repeats >= 1):
        raise ValueError(f"jump and repeats must be positive integers, got jump={jump!r}, repeats={repeats!r}.")
    grid = _plain(grid)
    order: list[int] = list(range(len(grid) % jump))
    for first in range(len(grid) % jump, len(grid), jump):
        order += list(range(first, first + jump)) * repeats
    t, s = (jax.tree.map(lambda leaf: leaf[np.array(order)], level) for level in (grid.t, grid.s))
    return _with_gaps(grid, t, s, inflation, repeats > 1)


def half_back(grid: Grid, inflation: Array = 1.0) -> Grid:
    """Every step goes two levels down, and noise goes one of them back: stochastic sampling of distilled models.

    From ``u_0 > u_1 > .. > u_N`` the steps ``u_i -> u_{i+2}`` for i = 0 .. N - 2, after each of which noise takes the
    state to u_{i+1}, and ``u_{N-1} -> u_N``: N steps again.  With `ddim` a student makes each of them as
    `diffjax.training.progressive_distillation` with ``stochastic=True`` trains it.  One step is the grid itself.

    On Distillation of Guided Diffusion Models, arXiv:2210.03142 (N-step stochastic sampling).

    Raises ValueError for a grid with gaps or levels per frame.

    >>> import diffjax
    >>> out = half_back(diffjax.grids.uniform(diffjax.processes.flow(), 4))
    >>> out.t.time, out.s.time
    (array([1.  , 0.75, 0.5 , 0.25]), array([0.5 , 0.25, 0.  , 0.  ]))
    """
    grid = _plain(grid)
    ends = np.minimum(np.arange(len(grid)) + 1, len(grid) - 1)
    return _with_gaps(grid, grid.t, jax.tree.map(lambda leaf: leaf[ends], grid.s), inflation, len(grid) > 1)


def _plain(grid: Grid) -> Grid:
    grid = concrete(grid)
    if grid.gaps or np.ndim(grid.t.alpha) != 1:
        raise ValueError("the grid must have no gaps and one level a step.")
    return grid


def _part(level: Level, which: slice) -> Level:
    return Level(*(leaf[which] for leaf in level))


def _joined(*levels: Level) -> Level:
    return Level(*(np.concatenate(leaves) for leaves in zip(*levels, strict=True)))


def _with_gaps(grid: Grid, t: Level, s: Level, inflation: Array, gaps: bool) -> Grid:
    return dataclasses.replace(grid, t=t, s=s, inflation=grid.inflation * inflation, gaps=gaps)
