"""Particles over any Markov chain: tokens, counts, points of a manifold, as `diffjax.steer` over a solver.

A chain is what `grow_tree` takes, ``step(key, x, depth) -> x`` from a root, with states of any kind; a value function
``value(x, depth)`` is the logarithm of a positive h, exact at the end and any guess of E[h(x_end) | x] before.  Depth
by depth the weights gain a potential of the values, particles are resampled if few are effective, and all make a step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffjax.levels import Array, Tree, all_finite, as_value, static, value
from diffjax.samplers.shared import inline, integer, take
from diffjax.smc.branching import Chosen, Judged, Single
from diffjax.smc.particles import (
    Place,
    Weighted,
    collapsed,
    effective_sizes,
    estimate,
    placed,
    resample,
    start,
    threshold_checked,
)
from diffjax.smc.resampling import systematic
from diffjax.smc.steering import Steered
from diffjax.smc.twists import difference, owed
from diffjax.solvers.arguments import number


def steer_chain(
    key: Array,
    step: Any,
    root: Tree,
    length: int,
    value: Any,
    *,
    particles: int,
    potential: Any = None,
    resampler: Any = None,
    threshold: Array = 0.5,
    every: int = 1,
    weighed: bool = False,
) -> Steered:
    """Steer ``particles`` copies of a Markov chain towards ``p(x_end) exp(value(x_end, length))``, with exact weights.

    At depth i ``w <- w G(value(x_i, i))``, resampling if ``(sum w)^2 / sum w^2 < threshold N``, and a step; at the end
    ``w <- w h / (the product of all G)``.  Without gradients, so that states may be discrete.

    Args:
        step: ``(key, x, depth) -> x``, best a pytree; with ``weighed``: ``-> (x, log p / q)``, for a step that is drawn
            from q instead of the chain's p.
        root: the state at depth 0, of every particle.
        length: steps.
        value: ``(x, depth) -> log h``.
        particles, potential, resampler, threshold, every: as for `diffjax.steer`; resamplers that choose.

    A General Framework for Inference-time Scaling and Steering of Diffusion Models, arXiv:2501.06848, algorithm 1.

    Returns a `Steered`; ``nfe`` counts the steps of all particles.

    Raises ValueError for arguments out of range.
    """
    place = placed(particles, None, None)
    integer("length", length, 1)
    integer("every", every, 1)
    threshold_checked(threshold)
    potential = difference() if potential is None else potential
    resampler = systematic() if resampler is None else resampler
    if not callable(step) or not callable(value):
        raise ValueError(f"step and value must be callable, got {step!r} and {value!r}.")
    if hasattr(resampler, "matrix") or not callable(resampler):
        raise ValueError(f"resampler must choose among particles (systematic(), ...), got {resampler!r}.")
    chain = Chain(as_value(step), as_value(value), potential, resampler, bool(weighed))
    run = _run if inline((chain,), key, root) else _compiled
    return run(place, length, every, chain, key, jax.tree.map(jnp.asarray, root), threshold)


@value
class Chain:
    step: Any
    value: Any
    potential: Any
    resampler: Any
    weighed: bool = static()


def _run(place: Place, length: int, every: int, chain: Chain, key: Array, root: Tree, threshold: Array) -> Steered:
    count = place.count
    keys = jax.vmap(lambda slot: jax.random.fold_in(key, slot))(jnp.arange(count))
    x = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), root)
    seen = lambda x, depth: jax.vmap(lambda x: jnp.asarray(chain.value(x, depth), jnp.result_type(float)))(x)
    kind = jnp.result_type(float)
    nothing, none = jnp.zeros(count, kind), jnp.full((), -1, jnp.int32)

    def judge(state: tuple, depth: Array) -> tuple[tuple, Array]:
        x, paid, memory = state
        gain, memory = chain.potential.step(seen(x, depth), paid, memory)
        return (x, paid + gain, memory), gain

    def body(carry: tuple, depth: Array) -> tuple[tuple, Any]:
        state, weighted, failed = carry
        scheduled = depth % every == 0
        skip = lambda state, depth: (state, nothing)
        state, gain = judge(state, depth) if every == 1 else jax.lax.cond(scheduled, judge, skip, state, depth)
        weighted = _gained(weighted, gain)
        state, weighted, choice = resample(key, depth, place, chain.resampler, threshold, scheduled, weighted, state)
        x, paid, memory = state
        moved = jax.vmap(lambda key, x: chain.step(jax.random.fold_in(key, depth), x, depth))(keys, x)
        if chain.weighed:
            moved, ratios = moved
            weighted = _gained(weighted, jnp.asarray(ratios, kind))
        moved = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), moved, x)
        failed = jnp.where((failed < 0) & _wrong(moved, weighted), depth, failed)
        return ((moved, paid, memory), weighted, failed), choice

    state = x, nothing, chain.potential.init(nothing)
    depths = jnp.arange(length, dtype=jnp.int32)
    (state, weighted, failed), choices = jax.lax.scan(body, (state, start(place, kind), none), depths)
    x, paid, _ = state
    weighted = _gained(weighted, owed(seen(x, jnp.asarray(length, jnp.int32)), paid))
    ess = effective_sizes(choices, weighted)
    failed = jnp.where((failed < 0) & _wrong(x, weighted), length, failed)
    return Steered(
        x,
        weighted.log_weights,
        estimate(weighted),
        ess,
        choices.resampled,
        choices.ancestors,
        jnp.asarray(count * length, jnp.int32),
        failed,
        collapsed(ess),
    )


_compiled = jax.jit(_run, static_argnums=(0, 1, 2))


def branch_chain(
    key: Array,
    step: Any,
    root: Tree,
    length: int,
    value: Any,
    *,
    candidates: int,
    block: int = 1,
    temperature: Array = 0.0,
) -> Chosen:
    """Every ``block`` steps of a chain keep one of ``candidates`` continuations, as `blockwise` does of a solver.

    Kept with probability ``softmax(value / temperature)``; at temperature 0 the best.  block = 1 is SVDD, at
    temperature 0 greedy; one block of all steps is best-of-n.  With exact soft values
    ``temperature log E[exp(r(x_end) / temperature) | x]`` and many candidates the law is p(x_end) exp(r / temperature).

    Args:
        step, root, length: as for `steer_chain`.
        value: ``(x, depth) -> number``, the reward at the end.
        candidates, block: at least 1; temperature: at least 0.

    Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding,
    arXiv:2408.08252, algorithm 1.

    Returns a `Chosen`.

    Raises ValueError as `steer_chain`, and for a negative temperature.
    """
    number("temperature", temperature)
    integer("candidates", candidates, 1)
    integer("block", block, 1)
    greedy = jnp.asarray(temperature) == 0
    warm = jnp.where(greedy, 1.0, temperature)
    key, chance = jax.random.split(key)
    value = as_value(value)
    options: Any = dict(particles=candidates, potential=Judged(), resampler=Single(greedy), threshold=1.0, every=block)
    found = steer_chain(key, step, root, length, Scaled(value, 1 / warm), **options)
    rewards = jax.vmap(lambda x: jnp.asarray(value(x, jnp.asarray(length, jnp.int32)), float))(found.x)
    index = Single(greedy)(chance, rewards / warm)[0]
    return Chosen(take(found.x, index), rewards[index], rewards, found.nfe, found.failed_at)


@value
class Scaled:
    value: Any
    inverse: Array

    def __call__(self, x: Tree, depth: Array) -> Array:
        return self.inverse * self.value(x, depth)


def _gained(weighted: Weighted, gain: Array) -> Weighted:
    return weighted._replace(log_weights=weighted.log_weights + gain)


def _wrong(x: Tree, weighted: Weighted) -> Array:
    return ~all_finite(x) | jnp.any(jnp.isnan(weighted.log_weights) | (weighted.log_weights == jnp.inf))
