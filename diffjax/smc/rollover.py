"""Starts that know the reward, and a budget of evaluations that is spent where it is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from diffjax.guidance.tilted import twist_gradient
from diffjax.levels import Array, Grid, Tree, all_finite, as_value
from diffjax.samplers.sequential import prepare
from diffjax.samplers.shared import integer, memoryless, select
from diffjax.smc.branching import Chosen
from diffjax.smc.mcmc import pcnl
from diffjax.smc.particles import drawn


class Started(NamedTuple):
    """N states (leading axis) at the grid's first level, the chains' acceptance, and evaluations of all of them."""

    x: Tree
    acceptance: Array
    nfe: Array


def twisted_start(
    key: Array,
    denoise: Any,
    twist: Any,
    grid: Grid,
    shape: tuple[int, ...],
    *,
    particles: int,
    steps: int,
    step: Array = 0.5,
    dtype: Any = jnp.float32,
) -> Started:
    """Starts of `diffjax.steer` from ``N(0, sigma^2 I) h(x)``, by chains of `pcnl`; give it ``initial="twisted"``.

    Each of the N chains begins at the prior and makes ``steps`` moves; the twist's gradient proposes.  ``2 steps``
    evaluations (and gradients) a chain.  It pays where the first clean estimate tells samples apart, as that of a
    few-step model does; that of an exact denoiser at pure noise is the data's mean, and nothing is gained.

    Ψ-Sampler: Initial Particle Sampling for SMC-Based Inference-Time Reward Alignment in Score
    Models, arXiv:2506.01320.

    Raises ValueError for a denoiser that remembers and integers below 1.
    """
    memoryless("twisted_start", denoise)
    integer("particles", particles, 1)
    integer("steps", steps, 1)
    kernel, denoise, twist = pcnl(step), as_value(denoise), as_value(twist)
    keys = jax.random.split(key, particles)
    level = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), grid.start)

    def tilt(x: Tree) -> tuple[Array, Tree]:
        log_h, _, slope = twist_gradient(denoise, twist, x, level)
        return log_h, slope

    def chain(key: Array) -> tuple[Tree, Array]:
        first, moves = jax.random.split(key)
        x = grid.process.standard_prior(first, shape, dtype, level)

        def move(x: Tree, i: Array) -> tuple[Tree, Array]:
            moved = kernel(jax.random.fold_in(moves, i), x, tilt, level.sigma)
            return moved.x, moved.acceptance

        x, acceptance = jax.lax.scan(move, x, jnp.arange(steps))
        return x, jnp.mean(acceptance)

    x, acceptance = jax.vmap(chain)(keys)
    leave = lambda x: grid.process.leave(x, level)
    return Started(jax.vmap(leave)(x), jnp.mean(acceptance), jnp.asarray(2 * steps * particles, jnp.int32))


def rollover(
    key: Array,
    denoise: Any,
    solver: Any,
    grid: Grid,
    shape: tuple[int, ...],
    *,
    reward: Callable[[Tree], Array],
    budget: int,
    dtype: Any = jnp.float32,
) -> Chosen:
    """Rollover budget forcing: go on as soon as a step is an improvement, and give what was not spent to later rows.

    Of every row's quota one candidate step after the other is tried and its clean estimate judged.  The first that is
    better than the state it started from is taken, and the rest of the quota goes to the next row; where none is, the
    best one.  An optimiser, not a sampler.

    Args:
        key, denoise, grid, shape: as for `diffjax.sample`, on a grid to sigma = 0.
        solver: stochastic, of one call a row, as `ancestral`; flows become such processes by their prediction and any
            stochastic solver (`diffjax.predictions.flow`, `diffjax.processes.changed`).
        reward: ``x0 -> number``.
        budget: denoiser calls in all, at least one a row; the one at the start is one more.

    Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget Forcing, arXiv:2503.19385,
    section 6.

    Returns a `Chosen`; ``rewards`` (rows,) those of the states that were taken, ``nfe`` the calls that were made.

    Raises ValueError for a deterministic solver or one of several calls, a remembering denoiser, and a smaller budget.
    """
    memoryless("rollover", denoise)
    if not solver.draws or not hasattr(solver, "update"):
        raise ValueError(f"rollover needs a stochastic solver of one call a row, as ancestral(), got {solver!r}.")
    integer("budget", budget, len(grid))
    key, x, rows, planned = prepare(key, denoise, solver, grid, shape, None, None, dtype, None)
    solver = cast(Any, planned)
    count, reward, denoise = len(grid), as_value(reward), as_value(denoise)
    rows = jax.tree.map(jnp.asarray, rows)
    quotas = jnp.full(count, budget // count, jnp.int32) + (jnp.arange(count) < budget % count)

    def estimated(x: Tree, level: Any) -> Tree:
        clean = level.sigma == 0
        safe = jax.tree.map(lambda s, t: jnp.where(clean, t, s), level, jax.tree.map(lambda leaf: leaf[-1], rows.t))
        known = jax.tree.map(lambda leaf: (leaf / level.alpha).astype(leaf.dtype), x)
        return select(clean, known, denoise(x, safe))

    class State(NamedTuple):
        row: Array
        tried: Array  # in this row
        left: Array  # of its quota and of what the rows before have left
        x: Tree
        x0: Tree
        memory: Tree
        reward: Array
        best: tuple  # x, x0, memory, reward of the best candidate of this row
        rewards: Array
        nfe: Array

    def body(state: State) -> State:
        row = jax.tree.map(lambda leaf: leaf[state.row], rows)
        noise = jax.tree.map(
            lambda leaf: leaf[0],
            drawn(key, state.row, state.tried[None], jax.tree.map(lambda leaf: leaf[None], state.x), solver.draws),
        )
        x, memory = solver.update(noise, state.x, state.x0, state.memory, row)
        x0 = estimated(x, row.s)
        candidate = (x, x0, memory, reward(x0))
        best = select(candidate[3] > state.best[3], candidate, state.best)
        best = select(state.tried == 0, candidate, best)
        # a step to sigma = 0 has no noise: one candidate is all there is
        done = (candidate[3] > state.reward) | (state.left <= 1) | (row.s.sigma == 0)
        after = state.row + done
        left = state.left - 1 + jnp.where(done, quotas[jnp.minimum(after, count - 1)], 0)
        x, x0, memory, taken = select(done, best, (state.x, state.x0, state.memory, state.reward))
        rewards = state.rewards.at[state.row].set(jnp.where(done, best[3], jnp.nan))
        tried = jnp.where(done, 0, state.tried + 1)
        return State(after, tried, left, x, x0, memory, taken, best, rewards, state.nfe + 1)

    zero = jnp.zeros((), jnp.int32)
    x0 = denoise(x, jax.tree.map(lambda leaf: leaf[0], rows.t))
    first, memory = reward(x0), solver.init(x)
    rewards = jnp.full(count, jnp.nan, jnp.result_type(first))
    state = State(zero, zero, quotas[0], x, x0, memory, first, (x, x0, memory, first), rewards, zero + 1)
    end = jax.lax.while_loop(lambda state: state.row < count, body, state)
    failed_at = jnp.where(all_finite(end.x), -1, count)
    last = jax.tree.map(lambda leaf: leaf[-1], rows.s)
    return Chosen(grid.process.leave(end.x, last), end.reward, end.rewards, end.nfe, failed_at)
