"""Search over the noise: the verifier picks among starts of a deterministic sampler, or among paths.

Deterministic solvers make the sample a function of the noise it starts from, so that search is over that noise.  These
maximise a verifier; they do not sample a tilted law (`diffjax.steer` does).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, Grid, Level, Tree, as_value, is_traced
from diffjax.samplers.sequential import normal_noise, prepare, sample
from diffjax.samplers.shared import integer, memoryless, take
from diffjax.solvers.arguments import number


class Searched(NamedTuple):
    """The best sample found, its reward, the rewards in the order of the search, and all network evaluations.

    ``start`` is the noise of the best sample; of paths, None.
    """

    x: Tree
    reward: Array
    rewards: Array
    nfe: Array
    start: Tree | None


def random_search(
    key: Array,
    denoise: Any,
    solver: Any,
    grid: Grid,
    shape: tuple[int, ...],
    *,
    verifier: Callable[[Tree], Array],
    candidates: int,
    **options: Any,
) -> Searched:
    """The best of N independent samples, under any solver.  N sample's evaluations.

    Args:
        key, denoise, solver, grid, shape: as for `diffjax.sample`, as further ``options`` are.
        verifier: ``x -> number``, of samples.
        candidates: N.

    Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps, arXiv:2501.09732.
    """
    integer("candidates", candidates, 1)
    keys = jax.random.split(key, candidates)
    starts = jax.vmap(lambda key: _noise(key, grid, shape, options))(keys)
    found = jax.vmap(lambda key, x: sample(key, denoise, solver, grid, x=x, **_plain(options)))(keys, starts)
    rewards = jax.vmap(verifier)(found.x)
    best = jnp.argmax(rewards)
    return Searched(take(found.x, best), rewards[best], rewards, jnp.sum(found.nfe), take(starts, best))


def zero_order_search(
    key: Array,
    denoise: Any,
    solver: Any,
    grid: Grid,
    shape: tuple[int, ...],
    *,
    verifier: Callable[[Tree], Array],
    candidates: int,
    rounds: int,
    radius: Array = 0.3,
    **options: Any,
) -> Searched:
    """Search around a pivot: each round tries N neighbours of the best noise so far and moves to a better one.

    A neighbour is ``sqrt(1 - radius^2) pivot + radius noise``, which has the law of the prior if the pivot has.  ``1 +
    rounds N`` samples' evaluations; ``rewards`` (rounds + 1,) those of the pivots, which never fall.

    Args:
        radius: in (0, 1]; 1 is random search.
        candidates, rounds: N and the number of rounds; the rest as for `random_search`.

    Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps, arXiv:2501.09732.
    """
    integer("candidates", candidates, 1)
    integer("rounds", rounds, 1)
    number("radius", radius, 1e-6, 1.0)
    first, walk, noise = jax.random.split(key, 3)
    run = lambda x: sample(noise, denoise, solver, grid, x=x, **_plain(options))

    def judged(start: Tree) -> tuple[Tree, Tree, Array, Array]:
        found = run(start)
        return start, found.x, verifier(found.x), found.nfe

    def round_(best: tuple, index: Array) -> tuple[tuple, Array]:
        keys = jax.random.split(jax.random.fold_in(walk, index), candidates)
        fresh = jax.vmap(lambda key: _noise(key, grid, shape, options))(keys)
        near = lambda pivot, z: (jnp.sqrt(1 - radius**2) * pivot + radius * z).astype(pivot.dtype)
        tried = jax.vmap(judged)(jax.tree.map(near, best[0], fresh))
        every = jax.tree.map(lambda old, new: jnp.concatenate([old[None], new]), best, tried)
        top = take(every, jnp.argmax(every[2]))
        return (*top[:3], best[3] + jnp.sum(tried[3])), top[2]

    pivot = judged(_noise(first, grid, shape, options))
    (start, x, reward, nfe), path = jax.lax.scan(round_, pivot, jnp.arange(rounds))
    return Searched(x, reward, jnp.concatenate([pivot[2][None], path]), nfe, start)


def path_search(
    key: Array,
    denoise: Any,
    solver: Any,
    grid: Grid,
    shape: tuple[int, ...],
    *,
    verifier: Callable[[Tree], Array],
    kept: int,
    copies: int,
    back: int,
    ahead: int,
    first: int,
    dtype: Any = jnp.float32,
) -> Searched:
    """Search over paths: N states are noised to M neighbours each, carried on and judged by their clean estimates.

    From the state before row ``first`` on: add noise to go ``back`` rows, run ``ahead`` rows (so that a round wins
    ``ahead - back``), keep the N of the N M states whose clean estimates the verifier likes best, until the end of the
    grid, where the best of the N is returned.

    Args:
        solver: deterministic, of one call a row and no memory (`ddim`, `euler`).
        verifier: ``x0 -> number``.
        kept, copies: N and M.
        back, ahead, first: rows, ``1 <= back < ahead`` and ``back <= first``.

    Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps, arXiv:2501.09732.

    Raises ValueError for another solver, a denoiser that remembers, or rows that do not fit.
    """
    memoryless("path_search", denoise)
    for name, given in (("kept", kept), ("copies", copies), ("back", back)):
        integer(name, given, 1)
    integer("ahead", ahead, back + 1)
    integer("first", first, back, len(grid))
    if solver.draws or solver.calls != 1 or not hasattr(solver, "update") or grid.gaps:
        raise ValueError(f"path_search needs a deterministic solver of one call a row and no gaps, got {solver!r}.")
    key, start_key = jax.random.split(key)
    begin = lambda key: prepare(key, denoise, solver, grid, shape, None, None, dtype, None)
    rows = begin(start_key)[2]
    x = jax.vmap(lambda key: begin(key)[1])(jax.random.split(start_key, kept))
    if jax.tree.leaves(jax.eval_shape(solver.init, take(x, 0))):
        raise ValueError(f"path_search needs a solver without memory, got {solver!r}.")
    rows, count, denoise = jax.tree.map(jnp.asarray, rows), len(grid), as_value(denoise)
    level = lambda index: jax.tree.map(lambda leaf: leaf[jnp.minimum(index, count - 1)], rows.t)

    def run(x: Tree, begin: Array, length: int) -> Tree:
        def one(x: Tree, i: Array) -> tuple[Tree, None]:
            row = take(rows, jnp.minimum(begin + i, count - 1))
            new, _ = solver.update((), x, denoise(x, row.t), (), row)
            return jax.tree.map(lambda a, b: jnp.where(begin + i < count, a, b), new, x), None

        return jax.lax.scan(one, x, jnp.arange(length))[0]

    def noised(key: Array, x: Tree, low: Level, high: Level) -> Tree:
        keep = high.alpha / low.alpha
        std = jnp.sqrt(jnp.maximum(high.sigma**2 - (keep * low.sigma) ** 2, 0.0))
        (z,) = normal_noise(key, jnp.zeros((), jnp.int32), x, 1)
        return jax.tree.map(lambda leaf, z: (keep * leaf + std * z).astype(leaf.dtype), x, z)

    many = jax.vmap(run, in_axes=(0, None, None))
    x, at = many(x, 0, first), first
    evaluations, rewards, index = kept * first, [], 0
    while at < count:
        keys = jax.random.split(jax.random.fold_in(key, index), kept * copies)
        copied = jax.tree.map(lambda leaf: jnp.repeat(leaf, copies, axis=0), x)
        low, high = level(at), level(at - back)
        copied = jax.vmap(lambda key, x, low=low, high=high: noised(key, x, low, high))(keys, copied)
        length = min(ahead, count - at + back)
        moved, at, index = many(copied, at - back, length), at - back + length, index + 1
        evaluations += kept * copies * length
        estimates = moved
        if at < count:
            here = level(at)
            estimates = jax.vmap(lambda x, here=here: denoise(x, here))(moved)
            evaluations += kept * copies
        found = jax.vmap(verifier)(estimates)
        best = jnp.argsort(-found)[:kept]
        x = take(moved, best)
        rewards.append(found[best[0]])
    final = jax.vmap(verifier)(x)
    best = jnp.argmax(final)
    each = getattr(denoise, "evaluations", None)
    cost = evaluations * (1 if each is None else each(level(0)))
    return Searched(take(x, best), final[best], jnp.stack(rewards or [final[best]]), jnp.asarray(cost), None)


def _noise(key: Array, grid: Grid, shape: tuple[int, ...], options: dict) -> Tree:
    if not isinstance(grid, Grid):
        raise ValueError(f"grid must be a Grid (see diffjax.grids), got {grid!r}.")
    if not is_traced(grid) and np.ndim(grid.start.alpha):
        raise ValueError("search needs one noise level for the whole state.")
    return grid.process.prior(key, shape, options.get("dtype", jnp.float32), grid.start)


def _plain(options: dict) -> dict:
    return {name: given for name, given in options.items() if name != "dtype"}
