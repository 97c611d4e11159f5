"""Speculative sampling: many stochastic steps in one round of calls, with exactly the law of the sequential sampler.

A stochastic step draws from N(m, std^2).  With a guessed mean m' and a standard normal z, m' + std z is a draft of it.
The next drafts follow from it without the network, which is then called on all of them at once.  With the true means,
each draft in turn becomes a draw from N(m, std^2) by the reflection-maximal coupling: with d = (m' - m) / std,

    x = m' + std z                          if log u <= -<z, d> - |d|^2 / 2   (accepted),
    x = m + std (z - 2 <z, d> d / |d|^2)    else.

A draft is accepted with probability 2 Phi(-|d| / 2), the most that any coupling reaches.  What follows the first
rejection is thrown away, but the rejected one itself becomes a proper draw: a round always settles a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.levels import CLEAN, UNSAVED, Array, Grid, Level, Row, Sample, Solver, Tree, all_finite, as_value
from diffjax.samplers.sequential import drawn_noise, left, prepare
from diffjax.samplers.shared import call, finished, inline, integer, memoryless, select, take

DRAFTS = ("stale", "fresh")


def speculative(
    key: Array,
    denoise: Any,
    solver: Solver,
    grid: Grid,
    shape: tuple[int, ...] | None = None,
    *,
    draft: str | Callable[[Tree, Level], Tree] = "stale",
    window: int = 16,
    x: Tree | None = None,
    start: Array | None = None,
    dtype: Any = jnp.float32,
    final_denoise: bool = False,
    noise: Callable[[Array, Array, Row, Tree, int], tuple[Tree, ...]] | None = None,
) -> Sample:
    """A draw from the law of a stochastic sampler in few rounds, for any draft and without a tolerance.

    Accept ``m' + std z`` if ``log u <= -<z, d> - |d|^2 / 2`` with ``d = (m' - m) / std``, else reflect.

    It is the law that is that of `sample`, not the sample: keys give other draws, except where every draft is accepted,
    since the noise of a row is that of `sample`.  Acceptance falls with the dimension and towards the data, where |d|
    grows.  A row without noise (the last one, usually) is only accepted if the draft is equal to it, but does not cost
    a round of its own.

    Args:
        key, denoise, grid, shape, x, start, dtype, final_denoise, noise: as for `sample`. The denoiser must not
            remember, and the noise must be independent from row to row.
        solver: one with a ``kernel``: one call, one draw and no history, as `diffjax.solvers.ancestral` and
            `diffjax.solvers.ddim` with eta > 0.
        draft: the clean estimate of all drafts of a round. "stale": that of the state before the current one, known
            from the last round; "fresh": that of the current state, at the price of a call before, so that the first
            draft is always accepted; or a cheap denoiser ``(x, level) -> x0``, called on one draft after the other and
            not counted.
        window: drafts in a round.

    Returns a `Sample`: ``rounds`` network calls in sequence, ``nfe`` network evaluations in all, ``accepted`` drafts
    and ``rejected`` ones, together the number of rows.  ``failed_at`` is the first row whose state is not finite, where
    the loop ends.

    Not reverse-differentiable (the number of rounds depends on the data).

    Diffusion Models are Secretly Exchangeable: Parallelizing DDPMs via Autospeculation, arXiv:2505.03983, algorithm 1
    (the drafts); Accelerated Diffusion Models via Speculative Sampling, arXiv:2501.05370, section 3 (the coupling).

    Raises ValueError for a solver without a kernel, as deterministic ones and those with history are, for a grid with
    gaps, another draft, window < 1, and as `sample` does.

    >>> import diffjax, jax
    >>> denoise = diffjax.oracles.gaussian(0.5, 0.0)  # one point: a stale estimate is as good as a fresh one
    >>> grid = diffjax.grids.uniform(diffjax.processes.vp(), 32)
    >>> out = speculative(jax.random.key(0), denoise, diffjax.solvers.ancestral(), grid, shape=())
    >>> int(out.rounds), int(out.rejected)
    (3, 0)
    """
    memoryless("speculative", denoise)
    integer("window", window, 1)
    if draft not in DRAFTS if isinstance(draft, str) else not callable(draft):
        raise ValueError(f"draft must be among {DRAFTS} or a denoiser (x, level) -> x0, got {draft!r}.")
    noise_key, x, rows, solver = prepare(key, denoise, solver, grid, shape, x, start, dtype, noise)
    if not hasattr(solver, "kernel"):
        raise ValueError(
            "speculative needs a stochastic solver with a kernel, of one call, one draw and no history, as ancestral()"
            f" or ddim(eta=1), on a grid without gaps, got solver={solver!r}."
        )
    options = Options(draft if isinstance(draft, str) else "given", min(window, rows.t.time.shape[0]), final_denoise)
    draft = as_value(None if isinstance(draft, str) else draft)
    denoise, noise = as_value(denoise), as_value(noise)
    run = _run if inline((denoise, draft, noise), noise_key, x, rows) else _compiled
    result = run(denoise, draft, solver, noise_key, x, rows, noise, options)
    return left(result, grid.process, CLEAN if final_denoise else jax.tree.map(lambda leaf: leaf[-1], rows.s))


def couple(noise: Tree, coin: Array, guess: Tree, mean: Tree, std: Array) -> tuple[Tree, Array]:
    """``(x, accepted)``: x ~ N(mean, std^2) that is ``guess + std noise`` as often as possible.

    ``noise`` is standard normal and ``coin`` uniform in [0, 1), both independent of ``guess``, ``mean`` and ``std``,
    which broadcasts against the state.  Where std = 0 the means must be equal for acceptance.
    """
    usable = all_finite(guess)

    def difference(guess: Array, mean: Array) -> Array:
        shift = jnp.where(std == 0, 0.0, (guess - mean) / jnp.where(std == 0, 1.0, std))
        return jnp.where(usable, shift, 0.0).astype(mean.dtype)

    d = jax.tree.map(difference, guess, mean)
    square, along = _dot(d, d), _dot(noise, d)
    possible = all_finite(jax.tree.map(lambda a, b: jnp.where((std == 0) & (a != b), jnp.nan, 0.0), guess, mean))
    accepted = usable & possible & (jnp.log(coin) <= -along - 0.5 * square)
    twice = jnp.where(square > 0, 2 * along / jnp.where(square > 0, square, 1.0), 0.0)
    reflected = jax.tree.map(lambda m, z, d: (m + std * (z - twice * d)).astype(m.dtype), mean, noise, d)
    drafted = jax.tree.map(lambda m, z: (m + std * z).astype(m.dtype), guess, noise)
    return select(accepted, drafted, reflected), accepted


def _dot(a: Tree, b: Tree) -> Array:
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), a, b)), start=jnp.zeros(()))


class Options(NamedTuple):
    """The static arguments of the loop."""

    draft: str
    window: int
    final_denoise: bool


class Carry(NamedTuple):
    """The loop: ``begin`` rows are settled, ``x`` is the state after them, ``x0`` the estimate that drafts use."""

    begin: Array
    x: Tree
    x0: Tree
    nfe: Array
    rounds: Array
    accepted: Array
    failed_at: Array


def _run(denoise: Any, draft: Any, solver: Any, key: Array, x: Tree, rows: Row, noise: Any, options: Options) -> Sample:
    count, size = rows.t.time.shape[0], options.window
    rows = jax.tree.map(jnp.asarray, rows)
    zero = jnp.zeros((), jnp.int32)
    coin_key = jax.random.fold_in(key, count)  # no row's

    def random(index: Array, row: Row) -> tuple[Tree, Array]:
        (z,) = drawn_noise(noise, key, index, row, x, 1)
        return z, jax.random.uniform(jax.random.fold_in(coin_key, index))

    def body(carry: Carry) -> Carry:
        inside = carry.begin + jnp.arange(size, dtype=jnp.int32) < count
        index = jnp.minimum(carry.begin + jnp.arange(size, dtype=jnp.int32), count - 1)
        part = take(rows, index)
        # each row's noise and coin are used up by the round that settles it: what a rejection throws away told nothing
        noises, coins = jax.vmap(random)(index, part)
        fresh, first = call(denoise, carry.x, take(part.t, 0)) if options.draft == "fresh" else (carry.x0, zero)

        def guess(state: Tree, item: tuple[Row, Tree]) -> tuple[Tree, tuple[Tree, Tree]]:
            row, z = item
            x0 = _shaped(draft(state, row.t), state) if options.draft == "given" else fresh
            mean, std = solver.kernel(state, x0, row)
            drafted = jax.tree.map(lambda m, z: (m + std * z).astype(m.dtype), mean, z)
            return drafted, (state, mean)

        _, (states, guesses) = jax.lax.scan(guess, carry.x, (part, noises))
        if options.draft == "fresh":  # the first state's call has been made
            x0, each = jax.vmap(lambda x, level: call(denoise, x, level))(*take((states, part.t), slice(1, None)))
            x0 = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), fresh, x0)
            each = jnp.concatenate([first[None], each])
        else:
            x0, each = jax.vmap(lambda x, level: call(denoise, x, level))(states, part.t)
        means, stds = jax.vmap(solver.kernel)(states, x0, part)
        settled, accepted = jax.vmap(couple)(noises, coins, guesses, means, stds)

        run = jnp.sum(jnp.cumprod(accepted & inside, dtype=jnp.int32), dtype=jnp.int32)
        stride = jnp.minimum(run + 1, jnp.sum(inside, dtype=jnp.int32))
        new = take(settled, stride - 1)
        end = carry.begin + stride
        return Carry(
            end,
            new,
            take(x0, stride - 1),
            carry.nfe + jnp.sum(jnp.where(inside, each, 0), dtype=jnp.int32),
            carry.rounds + (2 if options.draft == "fresh" and size > 1 else 1),
            carry.accepted + run,
            jnp.where(all_finite(new), -1, end - 1),
        )

    x0, nfe, rounds = x, zero, zero
    if options.draft == "stale":  # no round before the first
        x0, nfe = call(denoise, x, take(rows.t, 0))
        rounds = zero + 1
    carry = Carry(zero, x, x0, nfe, rounds, zero, zero - 1)
    end = jax.lax.while_loop(lambda carry: (carry.begin < count) & (carry.failed_at < 0), body, carry)
    result = Sample(end.x, end.nfe, end.rounds, end.failed_at, UNSAVED, end.accepted, end.begin - end.accepted)
    return finished(denoise, result, jax.tree.map(lambda leaf: leaf[-1], rows.s), options.final_denoise)


_compiled = jax.jit(_run, static_argnames="options")


def _shaped(x0: Tree, x: Tree) -> Tree:
    expected, found = (jax.tree.map(jnp.shape, tree) for tree in (x, x0))
    if expected != found:
        raise ValueError(f"draft returned shape {found} for a state of shape {expected}; they must be equal.")
    return jax.tree.map(lambda leaf, like: jnp.asarray(leaf, jnp.result_type(like)), x0, x)
