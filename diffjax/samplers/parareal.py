"""Parareal: a cheap solver across blocks of the grid, corrected by an accurate one inside all blocks at once.

With F the fine and G the coarse solution over a block, and U_k^n the state before block n in iteration k,

    U_{k+1}^{n+1} = F(U_k^n) + G(U_{k+1}^n) - G(U_k^n),        U_0^{n+1} = G(U_0^n),    U_k^0 = x.

All F of an iteration are one batch.  After k iterations the first k blocks are exact, so B iterations give the fine
solution whatever the coarse solver is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import (
    CLEAN,
    UNSAVED,
    Array,
    Grid,
    Level,
    Row,
    Sample,
    Solver,
    Tree,
    all_finite,
    as_value,
    namespace,
)
from diffjax.noises import Stored
from diffjax.samplers.sequential import _first_step, drawn_noise, left, prepare
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


def parareal(
    key: Array,
    denoise: Any,
    solver: Solver,
    grid: Grid,
    shape: tuple[int, ...] | None = None,
    *,
    coarse: Solver | None = None,
    blocks: int | None = None,
    tol: Array = 1e-3,
    max_rounds: int | None = None,
    x: Tree | None = None,
    start: Array | None = None,
    dtype: Any = jnp.float32,
    final_denoise: bool = False,
    noise: Callable[[Array, Array, Row, Tree, int], tuple[Tree, ...]] | None = None,
) -> Sample:
    """The sample of ``solver`` by parareal iterations over ``blocks`` parts of the grid (SRDS).

    ``U_{k+1}^{n+1} = F(U_k^n) + G(U_{k+1}^n) - G(U_k^n)``: G is one row of ``coarse`` across a block, F the rows of
    ``solver`` inside it.  The noise of a stochastic solver belongs to the row's index and is the same in every
    iteration, so that its sequential sample is the fixed point, as for a deterministic one.

    Args:
        key, denoise, grid, shape, x, start, dtype, final_denoise, noise: as for `sample`. The denoiser must not
            remember.
        solver: the fine solver. One with memory starts anew in every block, and the fixed point is then its sequential
            run with these restarts; otherwise it is the sample that `sample` draws with the same key.
        coarse: the coarse solver, without memory. One that is stochastic draws at the indices after the rows' own.
            Default: a stochastic ``solver`` of one call and no history itself, since its long steps forget as its short
            ones do; else `diffjax.solvers.ddim()`.
        blocks: B, at most the grid's steps; default the square root of their number, where the serial depth is least.
        tol: stop when no state between blocks changes by more than this in one iteration (root mean square, relative to
            the state; the paper looks at the last state alone). 0 asks for no change at all.
        max_rounds: stop after so many iterations; B are always enough.

    Returns a `Sample`.  ``rounds`` is the serial depth in network calls of what is run here: with L rows a block, f
    and g calls a row of the two solvers and K iterations ``B g + sum_{k < K} (L f + (B - 1 - k) g)``, since blocks that
    are exact are not solved again.  A machine that starts block n as soon as its state is there (pipelining) needs
    ``K L f + (B - K) g``, never more than the sequential run.  ``nfe`` counts the same blocks.  A non-finite state in
    the exact part ends the loop and is reported in ``failed_at``, a row of the fine solver.

    Not reverse-differentiable (the number of iterations depends on the data).

    Self-Refining Diffusion Samplers: Enabling Parallelization via Parareal Iterations, arXiv:2412.08292, algorithm 1.

    Raises ValueError for a coarse solver with memory, a fine one with memory on a grid with gaps or under churn, blocks
    outside 1 .. steps, max_rounds < 1, tol < 0, and as `sample` does.

    >>> import diffjax, jax
    >>> denoise = diffjax.oracles.gaussian(0.0, 1.0)
    >>> grid = diffjax.grids.uniform(diffjax.processes.vp(), 16, stop=1e-3)
    >>> out = parareal(jax.random.key(0), denoise, diffjax.solvers.ddim(), grid, shape=(), max_rounds=1)
    >>> int(out.rounds), int(out.nfe)
    (11, 23)
    """
    memoryless("parareal", denoise)
    tolerance(tol)
    if max_rounds is not None:
        integer("max_rounds", max_rounds, 1)
    noise_key, x, _, solver = prepare(key, denoise, solver, grid, shape, x, start, dtype, None)
    grid = grid if start is None else grid[_first_step(grid, start) :]
    blocks = max(1, round(len(grid) ** 0.5)) if blocks is None else blocks
    integer("blocks", blocks, 1, len(grid))
    if coarse is None:
        coarse = solver if hasattr(solver, "kernel") and not isinstance(noise, Stored) else ddim()
    if not isinstance(coarse, Solver) or has_memory(coarse, x):
        raise ValueError(f"coarse must be a solver without memory (see diffjax.solvers), got {coarse!r}.")
    if isinstance(noise, Stored) and coarse.draws:
        raise ValueError(f"coarse={coarse!r} draws noise of its own, which stored noise does not have.")

    rows, edges = _cut(solver, grid, blocks, has_memory(solver, x))
    nodes = ends(rows)
    across = coarse.plan(jumps(grid, nodes, edges[:-1], edges[1:]))
    if across.t.time.shape[0] != blocks:
        raise ValueError(f"coarse must make one row of a step, got {coarse!r}.")
    check = getattr(noise, "check", None)
    if check is not None:
        check(solver, rows)
    if hasattr(denoise, "check"):
        denoise.check(rows.t)
    size = int(np.max(np.diff(edges)))
    index = edges[:-1, None] + np.arange(size)
    inside = index < edges[1:, None]
    index = np.minimum(index, edges[1:, None] - 1)
    inner, across = cast(take(rows, index), x), cast(across, x)
    last = jax.tree.map(lambda leaf: leaf[-1], across.s)
    plan = Plan(inner, index.astype(np.int32), inside, across, last)
    iterations = blocks if max_rounds is None else min(max_rounds, blocks)
    denoise, noise = as_value(denoise), as_value(noise)
    run = _run if inline((denoise, noise), key, x, plan) else _compiled
    result = run(denoise, solver, coarse, noise_key, x, plan, tol, iterations, noise, final_denoise)
    return left(result, grid.process, CLEAN if final_denoise else last)


def _cut(solver: Solver, grid: Grid, blocks: int, restarts: bool) -> tuple[Row, np.ndarray]:
    """The rows of all blocks one after the other, and the B + 1 row indices between which the blocks lie."""
    steps = np.round(np.linspace(0, len(grid), blocks + 1)).astype(int)
    if not restarts:
        rows = solver.plan(grid)
        if rows.t.time.shape[0] == len(grid):
            return rows, steps
    if getattr(solver, "renoises", False):
        raise ValueError(
            f"solver={solver!r} remembers and adds noise between its steps: it cannot start anew inside a grid; use a"
            " one-step solver."
        )
    parts = [solver.plan(grid[begin:end]) for begin, end in itertools.pairwise(steps)]
    xp = namespace(*parts)
    edges = np.cumsum([0, *(part.t.time.shape[0] for part in parts)])
    return jax.tree.map(lambda *leaves: xp.concatenate(leaves), *parts), edges


class Plan(NamedTuple):
    """Fine rows (B, L, ...), their indices and which of them exist (B, L), coarse rows (B, ...), the last level."""

    inner: Row
    index: Array
    inside: Array
    across: Row
    last: Level


class Carry(NamedTuple):
    """The loop: ``states`` (B + 1, ...) between the blocks and the coarse solutions ``coarse`` (B, ...) from them."""

    states: Tree
    coarse: Tree
    iteration: Array
    settled: Array
    nfe: Array
    rounds: Array
    failed_at: Array


def _run(
    denoise: Any,
    solver: Solver,
    coarse: Solver,
    key: Array,
    x: Tree,
    plan: Plan,
    tol: Array,
    iterations: Array,
    noise: Any,
    final_denoise: bool,
) -> Sample:
    blocks, size = plan.index.shape
    # traced, so that they can be indexed in the loop
    inner, across = jax.tree.map(jnp.asarray, (plan.inner, plan.across))
    zero = jnp.zeros((), jnp.int32)

    def fine(x: Tree, rows: Row, index: Array, inside: Array) -> tuple[Tree, Array, Array]:
        """The end of a block, the network evaluations, and its first row that left a non-finite state or -1."""

        def body(carry: tuple, item: tuple) -> tuple[tuple, None]:
            x, memory, nfe, failed_at = carry
            row, index, inside = item
            draws = drawn_noise(noise, key, index, row, x, solver.draws)
            new, after, _, more = advance(denoise, solver, draws, x, memory, row)
            new, after = select(inside, (new, after), (x, memory))
            failed_at = jnp.where((failed_at < 0) & ~all_finite(new), index, failed_at)
            return (new, after, nfe + jnp.where(inside, more, 0), failed_at), None

        (x, _, nfe, failed_at), _ = jax.lax.scan(body, (x, solver.init(x), zero, zero - 1), (rows, index, inside))
        return x, nfe, failed_at

    def jump(x: Tree, block: Array) -> tuple[Tree, Array]:
        row = take(across, block)
        draws = drawn_noise(noise, key, jnp.asarray(plan.index)[-1, -1] + 1 + block, row, x, coarse.draws)
        x, _, _, nfe = advance(denoise, coarse, draws, x, coarse.init(x), row)
        return x, nfe

    def body(carry: Carry) -> Carry:
        k, old = carry.iteration, carry.states
        solved, each, failed = jax.vmap(fine)(take(old, slice(None, -1)), inner, plan.index, plan.inside)
        front = take(solved, k)

        def correct(block: Array, state: tuple) -> tuple:
            states, guesses, nfe = state
            guess, more = jump(take(states, block), block)
            here = take(solved, block)
            corrected = jax.tree.map(lambda f, g, h: f + (g - h), here, guess, take(guesses, block))
            # a guess far ahead may blow up; the front, which is exact, may not
            fallback = select(all_finite(here), here, front)
            states = put(states, block + 1, select(all_finite(corrected), corrected, fallback))
            return states, put(guesses, block, guess), nfe + more

        needed = jnp.arange(blocks) >= k
        states = put(old, k + 1, front)
        nfe = carry.nfe + jnp.sum(jnp.where(needed, each, 0), dtype=jnp.int32)
        states, guesses, nfe = jax.lax.fori_loop(k + 1, blocks, correct, (states, carry.coarse, nfe))
        changes = jax.vmap(change)(take(states, slice(1, None)), take(old, slice(1, None)))
        settled = jnp.all(jnp.where(needed, changes, 0.0) <= tol)
        rounds = carry.rounds + size * solver.calls + (blocks - 1 - k) * coarse.calls
        return Carry(states, guesses, k + 1, settled, nfe, rounds, failed[k])

    def unfinished(carry: Carry) -> Array:
        return (carry.iteration < iterations) & ~carry.settled & (carry.failed_at < 0)

    def predict(x: Tree, block: Array) -> tuple[Tree, tuple[Tree, Array]]:
        x, nfe = jump(x, block)
        return x, (x, nfe)

    _, (guesses, evaluations) = jax.lax.scan(predict, x, jnp.arange(blocks, dtype=jnp.int32))
    states = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), x, guesses)
    nfe, rounds = jnp.sum(evaluations, dtype=jnp.int32), zero + blocks * coarse.calls
    carry = Carry(states, guesses, zero, jnp.zeros((), bool), nfe, rounds, zero - 1)
    end = jax.lax.while_loop(unfinished, body, carry)
    result = Sample(take(end.states, -1), end.nfe, end.rounds, end.failed_at, UNSAVED)
    return finished(denoise, result, plan.last, final_denoise)


_compiled = jax.jit(_run, static_argnames="final_denoise")
