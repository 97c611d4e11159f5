"""CHORDS: solvers that start at different times, the slower ones correcting the faster ones.

Core k starts at row i_k, 0 = i_0 < i_1 < ... < i_{K-1}, where one coarse jump takes it from the first call of core
k - 1: core 0 is the sequential solver and core K - 1 the first at the end.  All cores make one row a tick.  When core
k - 1 reaches the row b at which core k has begun, and core k goes from row c to c + 1,

    x_k  <-  F(x_k) + G(x_{k-1}) - G(x_k at b),

with F the row and G a coarse jump b -> c + 1 with the clean estimates at b, which are known: no further call.  From
then on b = c + 1.  Who corrects whom at which tick does not depend on the data.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import CLEAN, UNSAVED, Array, Grid, Row, Sample, Saved, Solver, Tree, all_finite, as_value
from diffjax.samplers.sequential import _first_step, left, prepare
from diffjax.samplers.shared import (
    advance,
    cast,
    change,
    ends,
    finished,
    has_memory,
    inline,
    integer,
    jumps,
    memoryless,
    put,
    select,
    take,
    tolerance,
)
from diffjax.solvers.ddim import ddim

# of 50 steps, as published
STARTS = {4: (0, 8, 16, 32), 6: (0, 3, 6, 12, 24, 36), 8: (0, 2, 4, 8, 16, 24, 32, 40)}


def chords(
    key: Array,
    denoise: Any,
    solver: Solver,
    grid: Grid,
    shape: tuple[int, ...] | None = None,
    *,
    cores: int = 4,
    starts: tuple[int, ...] | None = None,
    core: int | None = None,
    tol: Array | None = None,
    coarse: Solver | None = None,
    x: Tree | None = None,
    start: Array | None = None,
    dtype: Any = jnp.float32,
    save: str | tuple[str, ...] = (),
    final_denoise: bool = False,
) -> Sample:
    """The solution of the flow by ``cores`` solvers that start at different times (CHORDS): approximate, or exact.

    ``x_k <- F(x_k) + G(x_{k-1}) - G(x_k at b)`` when core k - 1 is where core k started or was last corrected.  Core k
    is done after ``k + steps - starts[k]`` ticks.  One tick is one call of the denoiser on the states of all cores.

    Args:
        key, denoise, grid, shape, x, start, dtype, final_denoise: as for `sample`. The denoiser must not remember.
        solver: a deterministic solver without memory.
        cores: K.
        starts: the rows at which the cores start, (0, i_1, ...), increasing; default those published for 50 steps and
            4, 6 or 8 cores, scaled to the grid.
        core: the one to wait for: 0 is the sequential sample, ``cores - 1``, the default, the fastest.
        tol: instead, stop at the first core whose output differs from the one before by at most this (root mean square
            of the difference over that of the output), at the latest at core 0. Before the fastest core's output there
            is that of one jump to the end.
        coarse: what jumps, a deterministic one-call solver without memory; default ``solver`` if it is one, else
            `diffjax.solvers.ddim()`.
        save: "states": the outputs of the cores in ``saved.states`` (cores + 1, ...), the jump to the end first, then
            the fastest core; those that were not waited for are NaN.

    Returns a `Sample`: ``rounds`` is ticks times calls a row, ``nfe`` counts the cores at work.  ``failed_at`` is the
    first row at which the core that is returned left a non-finite state.

    CHORDS: Diffusion Sampling Accelerator with Multi-core Hierarchical ODE Solvers, arXiv:2507.15260, algorithm 1.

    Raises ValueError for a stochastic solver or one with memory, starts that do not increase from 0 or leave the grid,
    another core, both core and tol, tol < 0, and as `sample` does.

    >>> import diffjax, jax
    >>> denoise = diffjax.oracles.gaussian(0.0, 1.0)
    >>> grid = diffjax.grids.uniform(diffjax.processes.vp(), 50, stop=1e-3)
    >>> int(chords(jax.random.key(0), denoise, diffjax.solvers.ddim(), grid, shape=()).rounds)
    21
    """
    memoryless("chords", denoise)
    save = (save,) if isinstance(save, str) else tuple(save)
    if not set(save) <= {"states"}:
        raise ValueError(f"save must be 'states' or nothing, got {save!r}.")
    if tol is not None:
        tolerance(tol)
        if core is not None:
            raise ValueError(f"give at most one of core={core!r} and tol={tol!r}.")
    noise_key, x, rows, solver = prepare(key, denoise, solver, grid, shape, x, start, dtype, None)
    _deterministic("solver", solver, x)
    if coarse is None:
        coarse = solver if hasattr(solver, "update") else ddim()
    _deterministic("coarse", coarse, x)
    if not hasattr(coarse, "update"):
        raise ValueError(f"coarse must make one denoiser call a row, got {coarse!r}.")
    grid = grid if start is None else grid[_first_step(grid, start) :]
    count = rows.t.time.shape[0]
    starts = _starts(cores, starts, count)
    if core is not None:
        integer("core", core, 0, len(starts) - 1)

    schedule = _schedule(starts, count)
    nodes = ends(solver.plan(grid))
    leaps = cast(coarse.plan(jumps(grid, nodes, schedule.pairs[:, 0], schedule.pairs[:, 1])), x)
    awaited = len(starts) - 1 if core is None else core
    options = Options(starts, awaited if tol is None else None, "states" in save, final_denoise)
    denoise = as_value(denoise)
    run = _run if inline(denoise, noise_key, x, rows, leaps) else _compiled
    result = run(denoise, solver, coarse, x, rows, leaps, schedule, 0.0 if tol is None else tol, options)
    return left(result, grid.process, CLEAN if final_denoise else jax.tree.map(lambda leaf: leaf[-1], rows.s))


def _deterministic(name: str, solver: Any, x: Tree) -> None:
    if not isinstance(solver, Solver) or solver.draws or has_memory(solver, x):
        raise ValueError(f"chords needs a deterministic {name} without memory, got {name}={solver!r}.")


def _starts(cores: int, starts: tuple[int, ...] | None, count: int) -> tuple[int, ...]:
    if starts is None:
        if cores not in STARTS:
            raise ValueError(f"cores must be among {tuple(STARTS)} unless starts are given, got {cores!r}.")
        chosen = tuple(round(row * count / 50) for row in STARTS[cores])
    else:
        chosen = tuple(int(row) for row in starts)
    if not chosen or chosen[0] != 0 or np.any(np.diff(chosen) <= 0) or chosen[-1] >= count:
        raise ValueError(
            f"starts must increase from 0 to at most {count - 1}, the last row, got {chosen!r}"
            + (f" from cores={cores!r}: the grid is too short for them." if starts is None else ".")
        )
    return chosen


class Schedule(NamedTuple):
    """What happens when, (ticks, K): whether a core is where it began, and whether and by which jump it is corrected.

    ``pairs`` (J + K, 2) are the jumps between the rows' levels: those of the corrections, then those out of the cores'
    first rows, into the next core or, from the last, to the end.
    """

    begins: np.ndarray
    corrected: np.ndarray
    leap: np.ndarray
    pairs: np.ndarray


def _schedule(starts: tuple[int, ...], count: int) -> Schedule:
    shape = (count, len(starts))
    begins, corrected, leap = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape, np.int32)
    begin, pairs = list(starts), []
    for tick in range(count):
        for k in range(len(starts)):
            row, slower = (starts[j] + tick - j for j in (k, k - 1))
            if tick < k or row >= count:
                continue
            begins[tick, k] = row == begin[k]
            if k > 0 and slower == begin[k]:
                corrected[tick, k], leap[tick, k] = True, len(pairs)
                pairs.append((begin[k], row + 1))
                begin[k] = row + 1
    pairs += zip(starts, [*starts[1:], count], strict=True)
    return Schedule(begins, corrected, leap, np.array(pairs))


class Options(NamedTuple):
    """The static arguments of the loop."""

    starts: tuple[int, ...]
    core: int | None
    states: bool
    final_denoise: bool


class Carry(NamedTuple):
    """The loop: the cores' states, where they began and the estimates there (K, ...), and the outputs (K + 1, ...)."""

    tick: Array
    x: Tree
    begin: Tree
    begin_x0: Tree
    outputs: Tree
    nfe: Array
    failed_at: Array  # (K,)
    chosen: Array  # the output that is returned, -1 as long as there is none


def _run(
    denoise: Any,
    solver: Solver,
    coarse: Any,
    x: Tree,
    rows: Row,
    leaps: Row,
    schedule: Schedule,
    tol: Array,
    options: Options,
) -> Sample:
    cores, count = len(options.starts), rows.t.time.shape[0]
    rows, leaps, schedule = jax.tree.map(jnp.asarray, (rows, leaps, schedule))
    own = jnp.arange(cores, dtype=jnp.int32)
    starts = jnp.asarray(options.starts, jnp.int32)
    first_start = schedule.pairs.shape[0] - cores

    def leap(x: Tree, x0: Tree, index: Array) -> Tree:
        return coarse.update((), x, x0, coarse.init(x), take(leaps, index))[0]

    def body(carry: Carry) -> Carry:
        tick = carry.tick
        row = starts + tick - own
        active = (tick >= own) & (row < count)
        part = take(rows, jnp.clip(row, 0, count - 1))
        step = jax.vmap(lambda x, row: advance(denoise, solver, (), x, solver.init(x), row))
        new, _, x0, each = step(carry.x, part)
        begin, begin_x0 = _where(schedule.begins[tick], (carry.x, x0), (carry.begin, carry.begin_x0))

        # a core from which the one before has taken the start over: its jump from there, in place of its own
        slower = jnp.maximum(own - 1, 0)
        better = jax.vmap(leap)(take(carry.x, slower), take(x0, slower), schedule.leap[tick])
        worse = jax.vmap(leap)(begin, begin_x0, schedule.leap[tick])
        better = jax.tree.map(lambda f, a, b: f + (a - b), new, better, worse)
        new = _where(schedule.corrected[tick], better, new)

        # the core that has made its first call starts the next one, or jumps to the end
        latest = jnp.minimum(tick, cores - 1)
        jump = leap(take(carry.x, latest), take(x0, latest), first_start + latest)
        following = jnp.minimum(tick + 1, cores - 1)
        new = select(tick < cores - 1, put(new, following, jump), new)
        outputs = select(tick == cores - 1, put(carry.outputs, 0, jump), carry.outputs)

        ready = active & (row == count - 1)
        ending = jnp.concatenate([jnp.zeros(1, bool), ready[::-1]])
        reversed_states = jax.tree.map(lambda leaf: jnp.concatenate([leaf[:1], leaf[::-1]]), new)
        outputs = _where(ending, reversed_states, outputs)
        healthy = jax.vmap(all_finite)(new)
        failed_at = jnp.where((carry.failed_at < 0) & active & ~healthy, row, carry.failed_at)
        nfe = carry.nfe + jnp.sum(jnp.where(active, each, 0), dtype=jnp.int32)
        return Carry(tick + 1, new, begin, begin_x0, outputs, nfe, failed_at, choose(ending, outputs))

    def choose(ending: Array, outputs: Tree) -> Array:
        if options.core is not None:
            wanted = cores - options.core
            return jnp.where(ending[wanted], wanted, -1).astype(jnp.int32)
        changes = jax.vmap(change)(take(outputs, slice(1, None)), take(outputs, slice(None, -1)))
        enough = ending[1:] & ((changes <= tol) | (own == cores - 1))
        return jnp.where(jnp.any(enough), jnp.argmax(enough) + 1, -1).astype(jnp.int32)

    states = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (cores, *leaf.shape)), x)
    outputs = jax.tree.map(lambda leaf: jnp.full((cores + 1, *leaf.shape), jnp.nan, leaf.dtype), x)
    zero = jnp.zeros((), jnp.int32)
    carry = Carry(zero, states, states, states, outputs, zero, jnp.full(cores, -1, jnp.int32), zero - 1)
    end = jax.lax.while_loop(lambda carry: carry.chosen < 0, body, carry)

    last = jax.tree.map(lambda leaf: leaf[-1], rows.s)
    saved = UNSAVED
    if options.states:
        levels = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (cores + 1, *leaf.shape)), last)
        saved = Saved(end.outputs, levels, None, None)
    failed_at = end.failed_at[cores - end.chosen]
    result = Sample(take(end.outputs, end.chosen), end.nfe, end.tick * solver.calls, failed_at, saved)
    return finished(denoise, result, last, options.final_denoise)


_compiled = jax.jit(_run, static_argnames="options")


def _where(mask: Array, first: Tree, second: Tree) -> Tree:
    """``first`` for the entries of the leading axis that the mask names, else ``second``."""
    return jax.vmap(select)(mask, first, second)
