"""Reuse, then predict: p consecutive rows in one round of calls, at states extrapolated with the last known prediction.

From the exact state x_i and the noise eps that was predicted last, the states x~_{i+1} .. x~_{i+p-1} are guessed by
solver steps in which the prediction stays eps.  The network is called on x_i and all guesses at once, and the rows are
then made with what it predicts there: row i + j uses the noise predicted at x~_{i+j}.  Nothing is iterated, so the
result is an approximation, except for p = 1 or where the predicted noise is constant along the way.
"""

from __future__ import annotations

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
    is_traced,
)
from diffjax.samplers.sequential import drawn_noise, left, prepare
from diffjax.samplers.shared import call, finished, inline, integer, memoryless, select, take

READINGS = ("noise", "data")


def reuse_then_predict(
    key: Array,
    denoise: Any,
    solver: Solver,
    grid: Grid,
    shape: tuple[int, ...] | None = None,
    *,
    stride: int = 2,
    warmup: int = 5,
    reuse: str = "noise",
    x: Tree | None = None,
    start: Array | None = None,
    dtype: Any = jnp.float32,
    final_denoise: bool = False,
    noise: Callable[[Array, Array, Row, Tree, int], tuple[Tree, ...]] | None = None,
) -> Sample:
    """An approximation of `sample` in about ``steps / stride`` rounds of calls, each on ``stride`` states (ParaStep).

    ``x~_{j+1} = step_j(x~_j; eps_last)``, one batch ``eps_j = eps(x~_j)``, then ``x_{j+1} = step_j(x_j; eps_j)``.

    Args:
        key, denoise, grid, shape, x, start, dtype, final_denoise, noise: as for `sample`. The denoiser must not
            remember.
        solver: one call a row, made at the state itself; it may be stochastic and have memory.
        stride: p, the rows in a round (the devices of the paper).
        warmup: rows that are made one after the other before, at least 1; the paper's code has 5.
        reuse: what stays constant and what a row takes over from the guessed state: "noise", as in the paper, or
            "data", the clean estimate.

    Returns a `Sample` with ``error``, the root mean square over the reused rows of the difference between the reused
    noise and the one that was then predicted at the same state, in units of the noise (with "data" in units of the
    data): 0 where nothing was approximated, and of the size of the relative error of the steps otherwise.  It is not a
    bound on the error of the sample.  ``rounds`` is ``warmup + ceil((rows - warmup) / stride)``, ``nfe`` that of
    `sample`.

    Communication-Efficient Diffusion Denoising Parallelization via Reuse-then-Predict Mechanism, arXiv:2505.14741,
    section 3, in the variant for one device (BatchStep): all rows of a round reuse the noise of the last row of the
    round before, where device j of the paper reuses the one it has predicted itself, p rows earlier.

    Raises ValueError for a solver with several calls a row, stride < 1, warmup < 1, another ``reuse``, "noise" where a
    row after the warm-up starts at alpha = 0, and as `sample` does.

    >>> import diffjax, jax
    >>> denoise = diffjax.oracles.gaussian(0.0, 1.0)
    >>> grid = diffjax.grids.uniform(diffjax.processes.vp(), 50, stop=1e-3)
    >>> out = reuse_then_predict(jax.random.key(0), denoise, diffjax.solvers.ddim(), grid, shape=(), stride=3)
    >>> int(out.rounds), int(out.nfe)
    (20, 50)
    """
    memoryless("reuse_then_predict", denoise)
    integer("stride", stride, 1)
    integer("warmup", warmup, 1)
    if reuse not in READINGS:
        raise ValueError(f"reuse must be among {READINGS}, got {reuse!r}.")
    noise_key, x, rows, solver = prepare(key, denoise, solver, grid, shape, x, start, dtype, noise)
    if not hasattr(solver, "update"):
        raise ValueError(f"reuse_then_predict needs a solver of one call a row, at the state itself, got {solver!r}.")
    count = rows.t.time.shape[0]
    warmup = min(warmup, count)
    after = np.asarray([True]) if is_traced(rows) else np.asarray(rows.t.alpha)[warmup:]
    if reuse == "noise" and np.any(after == 0):
        raise ValueError(f"reuse='noise' needs alpha > 0 after the warm-up of warmup={warmup!r} rows; use 'data'.")
    # whole rounds: what is missing in the last one repeats its last row
    index = np.minimum(np.arange(warmup, warmup + -(-(count - warmup) // stride) * stride), count - 1)
    index = index.reshape(-1, stride).astype(np.int32)
    plan = Plan(take(rows, slice(None, warmup)), take(rows, index), index)
    options = Options(count, reuse, final_denoise)
    denoise, noise = as_value(denoise), as_value(noise)
    run = _run if inline((denoise, noise), noise_key, x, rows) else _compiled
    last = jax.tree.map(lambda leaf: leaf[-1], rows.s)
    result = run(denoise, solver, noise_key, x, plan, last, noise, options)
    return left(result, grid.process, CLEAN if final_denoise else last)


class Options(NamedTuple):
    """The static arguments of the loop."""

    count: int
    reuse: str
    final_denoise: bool


class Plan(NamedTuple):
    """Rows of the warm-up (W, ...), rows of the rounds (R, p, ...) and their indices (R, p)."""

    first: Row
    rounds: Row
    index: Array


class Carry(NamedTuple):
    """The loop: state, solver's memory, the last prediction and the counts."""

    x: Tree
    memory: Tree
    reading: Tree
    nfe: Array
    failed_at: Array
    square: Array  # the sum over reused rows of the mean square of what reuse got wrong


def _run(
    denoise: Any, solver: Any, key: Array, x: Tree, plan: Plan, last: Level, noise: Any, options: Options
) -> Sample:
    warmup, (rounds, stride) = plan.first.t.time.shape[0], plan.index.shape
    zero = jnp.zeros((), jnp.int32)

    def read(x: Tree, x0: Tree, level: Level) -> Tree:
        """The noise in ``x``, or the clean estimate."""
        if options.reuse == "data":
            return x0
        return jax.tree.map(lambda x, x0: ((x - level.alpha * x0) / level.sigma).astype(x.dtype), x, x0)

    def clean(x: Tree, reading: Tree, level: Level) -> Tree:
        if options.reuse == "data":
            return reading
        return jax.tree.map(lambda x, eps: ((x - level.sigma * eps) / level.alpha).astype(x.dtype), x, reading)

    def moved(x0: Tree, x: Tree, guess: Tree, level: Level) -> Tree:
        """The clean estimate at ``x`` with the reading made at ``guess``: bit for bit x0 where they are the same."""
        if options.reuse == "data":
            return x0
        return jax.tree.map(lambda c, x, g: (c + (x - g) / level.alpha).astype(x.dtype), x0, x, guess)

    def drawn(index: Array, row: Row) -> tuple[Tree, ...]:
        return drawn_noise(noise, key, index, row, x, solver.draws)

    def warm(carry: Carry, item: tuple[Array, Row]) -> tuple[Carry, None]:
        index, row = item
        x0, nfe = call(denoise, carry.x, row.t)
        new, memory = solver.update(drawn(index, row), carry.x, x0, carry.memory, row)
        failed_at = jnp.where((carry.failed_at < 0) & ~all_finite(new), index, carry.failed_at)
        reading = read(carry.x, x0, row.t)
        return Carry(new, memory, reading, carry.nfe + nfe, failed_at, carry.square), None

    def group(carry: Carry, item: tuple[Array, Row]) -> tuple[Carry, None]:
        index, rows = item
        inside = index[0] + jnp.arange(stride) < options.count
        draws = jax.vmap(drawn)(index, rows) if solver.draws else ()

        def extrapolate(state: tuple[Tree, Tree], item: tuple) -> tuple[tuple[Tree, Tree], Tree]:
            x, memory = state
            row, draws = item
            return solver.update(draws, x, clean(x, carry.reading, row.t), memory, row), x

        _, guesses = jax.lax.scan(extrapolate, (carry.x, carry.memory), (rows, draws))
        x0, each = jax.vmap(lambda x, level: call(denoise, x, level))(guesses, rows.t)
        readings = jax.vmap(read)(guesses, x0, rows.t)

        def step(state: tuple[Tree, Tree, Array], item: tuple) -> tuple[tuple[Tree, Tree, Array], None]:
            x, memory, failed_at = state
            index, row, draws, guess, x0, inside = item
            new, after = solver.update(draws, x, moved(x0, x, guess, row.t), memory, row)
            new, after = select(inside, (new, after), (x, memory))
            failed_at = jnp.where((failed_at < 0) & ~all_finite(new), index, failed_at)
            return (new, after, failed_at), None

        items = (index, rows, draws, guesses, x0, inside)
        (new, memory, failed_at), _ = jax.lax.scan(step, (carry.x, carry.memory, carry.failed_at), items)
        wrong = jax.vmap(lambda reading: _mean_square(reading, carry.reading))(readings)
        square = carry.square + jnp.sum(jnp.where(inside & (jnp.arange(stride) > 0), wrong, 0.0))
        nfe = carry.nfe + jnp.sum(jnp.where(inside, each, 0), dtype=jnp.int32)
        return Carry(new, memory, take(readings, jnp.sum(inside) - 1), nfe, failed_at, square), None

    kind = jnp.result_type(*jax.tree.leaves(x))
    carry = Carry(x, solver.init(x), x, zero, zero - 1, jnp.zeros((), kind))
    carry, _ = jax.lax.scan(warm, carry, (jnp.arange(warmup, dtype=jnp.int32), plan.first))
    if rounds:
        carry, _ = jax.lax.scan(group, carry, (plan.index, plan.rounds))
    reused = max(1, options.count - warmup - rounds)
    error = jnp.sqrt(carry.square / reused)
    result = Sample(carry.x, carry.nfe, zero + warmup + rounds, carry.failed_at, UNSAVED, error=error)
    return finished(denoise, result, last, options.final_denoise)


_compiled = jax.jit(_run, static_argnames="options")


def _mean_square(a: Tree, b: Tree) -> Array:
    leaves = jax.tree.leaves(jax.tree.map(lambda a, b: (a - b).reshape(-1), a, b))
    return jnp.mean(jnp.concatenate(leaves) ** 2)
