"""The sequential sampler: one `lax.scan` over the rows of a solver's plan.

The plan is made once, outside the loop and outside its own jit, in float64 when everything is concrete; the compiled
loop takes rows, solver and denoiser as arguments, so rebuilding any of them with other numbers compiles nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.corrections.transform import spent
from diffjax.levels import (
    CLEAN,
    Array,
    Grid,
    Level,
    Process,
    Row,
    Sample,
    Saved,
    Solver,
    Tree,
    all_finite,
    as_value,
    has_functions,
    is_traced,
    joins,
    remembers,
)
from diffjax.modifiers.gaps import renoised
from diffjax.samplers.progress import tick
from diffjax.solvers.learned_variance import with_variance

SAVES = ("states", "x0")
# Up to this many entries a sample all noise is drawn in one operation before the loop: the same numbers, fewer kernels.
_EARLY = 1024


def sample(
    key: Array,
    denoise: Any,
    solver: Solver,
    grid: Grid,
    shape: tuple[int, ...] | None = None,
    *,
    x: Tree | None = None,
    start: Array | None = None,
    dtype: Any = jnp.float32,
    save: str | tuple[str, ...] = (),
    every: int = 1,
    final_denoise: bool = False,
    progress: bool = False,
    remat: bool = False,
    noise: Callable[[Array, Array, Row, Tree, int], tuple[Tree, ...]] | None = None,
) -> Sample:
    """Draw one sample by running ``solver`` along ``grid``; batches come from `jax.vmap` over keys.

    Works eagerly (compiled once per shapes and types), under `jit`, `vmap`, `grad` and `pmap`.

    Args:
        key: one PRNG key; it fixes the sample whatever the batch and the devices.
        denoise: ``(x, level) -> x0``, best a pytree (as predictions and oracles are), so that parameters and
            conditions are arguments of the compiled loop; a plain function is compiled for its identity.
            A denoiser that remembers has ``init(x) -> memory`` and ``apply(x, level, memory) -> (x0, memory)``.
        shape: the shape of one sample, for a draw from the prior.
        x: replaces the prior: the state at the grid's first level or, with ``start``, clean data.
        start: a time; ``x`` is noised to the first level of the grid at or below it, and the noisier steps are
            skipped (image-to-image).
        dtype: of a draw from the prior; float32 or wider. A given ``x`` keeps its own.
        save: "states" (the start, then after every ``every``-th row and the last), "x0" (the clean estimates made
            in those rows), or both.
        final_denoise: replace the result by the clean estimate there: for grids that end at sigma > 0; one call.  With
            ``grid[:k]`` it is the jump of A Geometric Perspective on Diffusion Models, arXiv:2305.19947 (ODE-Jump).
        progress: a progress bar that ticks once a row, also under vmap.
        remat: recompute each row in the backward pass, so that gradients keep one state a row.
        noise: ``(key, row index, row, x, draws) -> draws standard normal trees``, best a pytree; default independent
            draws for every row. `diffjax.noises` has others: a Brownian path that grids of different lengths share,
            stored noise.

    Returns a `Sample`.  Denoiser calls: ``solver.calls`` a row.

    Raises ValueError for a grid or denoiser that the solver cannot run, and for arguments that do not fit.

    >>> import diffjax, jax
    >>> denoise = diffjax.oracles.gaussian(0.0, 1.0)
    >>> grid = diffjax.grids.uniform(diffjax.processes.flow(), 8)
    >>> sample(jax.random.key(0), denoise, diffjax.solvers.ddim(), grid, shape=()).nfe
    Array(8, dtype=int32)
    """
    if final_denoise and hasattr(grid.process.schedule, "variables"):
        raise ValueError("final_denoise needs a state of data alone; end the grid of this process at 0.")
    save = (save,) if isinstance(save, str) else tuple(save)
    if not set(save) <= set(SAVES):
        raise ValueError(f"save must be among {SAVES}, got {save!r}.")
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be an integer of at least 1, got {every!r}.")
    noise_key, x, rows, solver = prepare(key, denoise, solver, grid, shape, x, start, dtype, noise)
    options = Options(save, every, final_denoise, progress, remat)
    denoise, noise = as_value(denoise), as_value(noise)
    # a closure may hold tracers of the caller, which must not enter a cache
    run = _run if has_functions(denoise, noise) and is_traced(key, x, rows) else _compiled
    result = run(noise_key, x, denoise, solver, rows, noise, options)
    return left(result, grid.process, CLEAN if final_denoise else jax.tree.map(lambda leaf: leaf[-1], rows.s))


def prepare(
    key: Array,
    denoise: Any,
    solver: Solver,
    grid: Grid,
    shape: tuple[int, ...] | None,
    x: Tree | None,
    start: Array | None,
    dtype: Any,
    noise: Any,
) -> tuple[Array, Tree, Row, Solver]:
    """What every driver over rows begins with: ``(noise key, state at the first row, rows, solver)``, all checked."""
    check_arguments(denoise, solver, grid, shape, x, start, dtype)
    prior_key, noise_key = jax.random.split(key)
    plan = planned(denoise, solver, grid, start, noise)
    x = entered(prior_key, plan, shape, x, dtype)
    kind = jnp.finfo(jnp.result_type(*jax.tree.leaves(x))).dtype
    rows = jax.tree.map(lambda leaf: (jnp.asarray if is_traced(leaf) else np.asarray)(leaf, kind), plan.rows)
    return noise_key, x, rows, plan.solver


class Plan(NamedTuple):
    """What a run knows before it has a key: the solver, its rows, and how a given state gets to the first of them."""

    solver: Solver
    rows: Row
    process: Process
    given: Level  # at which a given state is
    join: tuple[Array, Array]  # it enters as keep x + std z


def planned(denoise: Any, solver: Solver, grid: Grid, start: Array | None, noise: Any) -> Plan:
    """The plan of a run, checked by the noise source and the denoiser."""
    process = grid.process
    refuse_of_data(process, denoise, solver)
    given = grid.start if start is None else CLEAN
    grid = dataclasses.replace(grid, process=dataclasses.replace(process, coordinates=None))
    if grid.gaps:
        solver = renoised(solver)
    if start is not None:
        grid = grid[_first_step(grid, start) :]
    rows = solver.plan(grid)
    if hasattr(noise, "check"):
        noise.check(solver, rows)
    if hasattr(denoise, "check"):
        denoise.check(rows.t)
    if start is None:  # a churned first step is noisier than the state that was given
        keep, std = (part[0] for part in joins(dataclasses.replace(grid, t=rows.t, s=rows.s)))
    else:
        keep, std = (leaf[0] for leaf in (rows.t.alpha, rows.t.sigma))
    return Plan(solver, rows, process, given, (keep, std))


def refuse_of_data(process: Process, *parts: Any) -> None:
    """Raise ValueError for something that acts on data where what it is given is in the coordinates of a process."""
    if process.coordinates is None:
        return
    marked = lambda node: getattr(node, "of_data", None) is not None
    for node in jax.tree.leaves(parts, is_leaf=marked):
        if marked(node) and node.of_data:
            raise ValueError(
                f"{node!r} is of data, but denoisers and solvers see the standard state of {process!r}: give"
                " measurement.under(process)."
            )


def entered(key: Array, plan: Plan, shape: tuple[int, ...] | None, x: Tree | None, dtype: Any) -> Tree:
    """The state at the first row: a draw from the prior, or ``x`` noised as far as it takes."""
    if shape is not None:
        x = plan.process.standard_prior(key, shape, dtype, jax.tree.map(lambda leaf: leaf[0], plan.rows.t))
    else:
        x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf, jnp.float32)), x)
        x = _noised(key, plan.process.enter(x, plan.given), *plan.join)
    _check_axes(plan.rows, x)
    return x


def left(result: Sample, process: Process, last: Level) -> Sample:
    """What a sampler returns, in the coordinates of the data; ``x`` is at the level ``last``."""
    if process.coordinates is None:
        return result
    saved = result.saved
    if saved.states is not None:
        saved = saved._replace(states=jax.vmap(process.leave)(saved.states, saved.states_level))
    if saved.x0 is not None:
        saved = saved._replace(x0=jax.vmap(lambda x0: process.leave(x0, CLEAN))(saved.x0))
    return result._replace(x=process.leave(result.x, last), saved=saved)


def _check_axes(rows: Row, x: Tree) -> None:
    """Levels have no axes, or one for every axis of the state: they would broadcast against its last ones."""
    axes = np.ndim(rows.t.alpha) - 1
    for leaf in jax.tree.leaves(x):
        if axes not in (0, np.ndim(leaf)):
            raise ValueError(
                f"the grid's levels have shape {np.shape(rows.t.alpha)[1:]} and the state {np.shape(leaf)}: give one"
                " level for the whole state, or as many axes as it has (trailing= of the grid appends them)."
            )


class Options(NamedTuple):
    """The static arguments of the loop."""

    save: tuple[str, ...]
    every: int
    final_denoise: bool
    progress: bool
    remat: bool


class Carry(NamedTuple):
    """What the loop carries."""

    x: Tree
    solver: Tree  # the solver's memory
    denoiser: Tree  # the denoiser's memory
    nfe: Array
    failed_at: Array
    states: Tree | None
    x0: Tree | None


class Counter:
    """The denoiser as a plain call that counts evaluations and threads its memory, for the length of one trace."""

    def __init__(self, denoise: Any, memory: Tree, nfe: Array):
        self.denoise, self.memory, self.nfe = denoise, memory, nfe

    def __call__(self, x: Tree, level: Level) -> Tree:
        if remembers(self.denoise):
            x0, self.memory = self.denoise.apply(x, level, self.memory)
        else:
            x0 = self.denoise(x, level)
        return self._counted(x, x0, level)

    def with_variance(self, x: Tree, level: Level) -> tuple[Tree, Tree]:
        """The clean estimate and the predicted variance of the reverse step, in one call."""
        x0, share = with_variance(self.denoise)(x, level)
        return self._counted(x, x0, level), share

    def _counted(self, x: Tree, x0: Tree, level: Level) -> Tree:
        expected, found = (jax.tree.map(jnp.shape, tree) for tree in (x, x0))
        if expected != found:
            raise ValueError(f"denoise returned shape {found} for a state of shape {expected}; they must be equal.")
        self.nfe = self.nfe + spent(self.denoise, level, self.memory)
        return jax.tree.map(lambda leaf, like: jnp.asarray(leaf, jnp.result_type(like)), x0, x)


def initial_evaluations(denoise: Any) -> int:
    """Network evaluations of a denoiser's ``init``, where that makes any and says so."""
    return getattr(denoise, "initial_evaluations", 0)


def normal_noise(key: Array, index: Array, x: Tree, draws: int) -> tuple[Tree, ...]:
    """Standard normal trees shaped like ``x`` that depend on the key and the row's index alone."""
    key = jax.random.fold_in(key, index)
    leaves, structure = jax.tree.flatten(x)
    count = draws * len(leaves)
    keys = [key] if count == 1 else [jax.random.fold_in(key, i) for i in range(count)]
    normals = [jax.random.normal(k, jnp.shape(leaf), leaf.dtype) for k, leaf in zip(keys, leaves * draws, strict=True)]
    return tuple(structure.unflatten(normals[i : i + len(leaves)]) for i in range(0, count, len(leaves)))


def drawn_noise(noise: Any, key: Array, index: Array, row: Row, x: Tree, draws: int) -> tuple[Tree, ...]:
    """The noise of a row from the source ``noise``, or `normal_noise` where that is None."""
    if not draws:
        return ()
    return normal_noise(key, index, x, draws) if noise is None else noise(key, index, row, x, draws)


def _run(key: Array, x: Tree, denoise: Any, solver: Solver, rows: Row, noise: Any, options: Options) -> Sample:
    count = rows.t.time.shape[0]
    slots = -(-count // options.every)
    zero = jnp.zeros((), jnp.int32)
    carry = Carry(
        x,
        solver.init(x),
        denoise.init(x) if remembers(denoise) else None,
        zero + initial_evaluations(denoise),
        zero - 1,
        _buffer(x, slots) if "states" in options.save else None,
        _buffer(x, slots) if "x0" in options.save else None,
    )

    indices = jnp.arange(count, dtype=jnp.int32)
    early = solver.draws and noise is None and count * solver.draws * size(x) <= _EARLY
    drawn = jax.vmap(lambda index: normal_noise(key, index, x, solver.draws))(indices) if early else None

    def body(carry: Carry, indexed: tuple[Array, Row, Tree]) -> tuple[Carry, None]:
        index, row, draws = indexed
        counter = Counter(denoise, carry.denoiser, carry.nfe)
        if draws is None:
            draws = drawn_noise(noise, key, index, row, carry.x, solver.draws)
        x, memory, info = solver.step(draws, counter, carry.x, carry.solver, row)
        finite = all_finite(x)
        failed_at = jnp.where((carry.failed_at < 0) & ~finite, index, carry.failed_at)
        slot = index // options.every  # overwritten until the last row of its group
        if options.progress:
            tick(index, count)
        return Carry(
            x,
            memory,
            counter.memory,
            counter.nfe,
            failed_at,
            _write(carry.states, x, slot),
            _write(carry.x0, info.x0, slot),
        ), None

    body = jax.checkpoint(body) if options.remat else body
    end, _ = jax.lax.scan(body, carry, (indices, rows, drawn))
    result, nfe, rounds = end.x, end.nfe, count * solver.calls
    if options.final_denoise:
        counter = Counter(denoise, end.denoiser, nfe)
        result = counter(result, jax.tree.map(lambda leaf: leaf[-1], rows.s))
        nfe, rounds = counter.nfe, rounds + 1
    return Sample(result, nfe, jnp.asarray(rounds, jnp.int32), end.failed_at, _saved(x, end, rows, options))


_compiled = jax.jit(_run, static_argnames="options")


def _saved(start: Tree, end: Carry, rows: Row, options: Options) -> Saved:
    count = rows.t.time.shape[0]
    last = np.minimum(np.arange(options.every, count + options.every, options.every), count) - 1
    states = states_level = x0_level = None
    if end.states is not None:
        states = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, end.states)
        # after a row the state is at the next row's level: with noise added in between that is not the row's s
        after = jax.tree.map(lambda t, s: jnp.concatenate([t, s[-1:]]), rows.t, rows.s)
        states_level = jax.tree.map(lambda leaf: leaf[np.concatenate([[0], last + 1])], after)
    if end.x0 is not None:
        x0_level = jax.tree.map(lambda leaf: leaf[last], rows.t)
    return Saved(states, states_level, end.x0, x0_level)


def size(x: Tree) -> int:
    """How many entries a tree has."""
    return sum(np.size(leaf) for leaf in jax.tree.leaves(x))


def _buffer(x: Tree, slots: int) -> Tree:
    return jax.tree.map(lambda leaf: jnp.zeros((slots, *leaf.shape), leaf.dtype), x)


def _write(buffer: Tree | None, x: Tree, slot: Array) -> Tree | None:
    if buffer is None:
        return None
    return jax.tree.map(
        lambda b, leaf: jax.lax.dynamic_update_index_in_dim(b, leaf.astype(b.dtype), slot, 0), buffer, x
    )


def _noised(key: Array, x: Tree, keep: Array, std: Array) -> Tree:
    if not is_traced(keep, std) and np.all(keep == 1) and np.all(std == 0):
        return x
    (noise,) = normal_noise(key, 0, x, 1)
    return jax.tree.map(lambda leaf, z: (keep * leaf + std * z).astype(leaf.dtype), x, noise)


def _first_step(grid: Grid, start: Array) -> int:
    if is_traced(grid, start):
        raise ValueError(
            "start must be concrete, because it decides the number of steps; pass a grid from start instead."
        )
    below = np.asarray(grid.t.time).reshape(len(grid), -1).max(axis=1) <= start * (1 + 1e-9)
    if not np.any(below):
        raise ValueError(f"start must be at or above the time of some step of the grid {grid.t.time!r}, got {start!r}.")
    return int(np.argmax(below))


def check_arguments(denoise, solver, grid, shape, x, start, dtype) -> None:
    """What every driver refuses."""
    if not isinstance(grid, Grid):
        raise ValueError(f"grid must be a Grid (see diffjax.grids), got {grid!r}.")
    if not isinstance(solver, Solver):
        raise ValueError(f"solver must have plan, init and step (see diffjax.solvers), got {solver!r}.")
    if not callable(denoise) and not remembers(denoise):
        raise ValueError(f"denoise must be callable as denoise(x, level), got {denoise!r}.")
    if (shape is None) == (x is None):
        raise ValueError(f"give exactly one of shape={shape!r} (a draw from the prior) and x.")
    if start is not None and x is None:
        raise ValueError(f"start={start!r} needs x, the clean data to be noised.")
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 32:
        raise ValueError(f"dtype must be float32 or wider (networks may cast inside), got {dtype!r}.")
