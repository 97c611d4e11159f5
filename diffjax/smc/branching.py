"""Branching: a sample is continued several times, and one continuation is kept.

All of these are `diffjax.steer` with one ancestor for every place: the candidates of a block start from the same state.
At the end one of the last candidates is kept.  Kept by chance in proportion to ``exp(value / temperature)`` they
approximate the tilted law, and are exact for exact values and many candidates; kept for being the best they maximise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import CLEAN, Array, Grid, Level, Solver, Tree, as_value, is_traced, value
from diffjax.samplers.shared import integer
from diffjax.smc.steering import steer
from diffjax.smc.twists import reward as reward_twist
from diffjax.solvers.arguments import number


class Chosen(NamedTuple):
    """One sample and its reward, ``nfe`` network evaluations of all candidates, ``failed_at`` as in `steer`.

    ``rewards``: of the candidates that the last choice was among.
    """

    x: Tree
    reward: Array
    rewards: Array
    nfe: Array
    failed_at: Array


@value
class Single:
    greedy: Array  # a leaf, so that changing it compiles nothing
    factory = "single"

    def __call__(self, key: Array, log_weights: Array) -> Array:
        best, drawn = jnp.argmax(log_weights), jax.random.categorical(key, log_weights)
        chosen = jnp.where(self.greedy, best, drawn).astype(jnp.int32)
        return jnp.full(log_weights.size, chosen, jnp.int32)


def single(greedy: bool = False) -> Single:
    """The resampler with one ancestor for all places, drawn with probability w_i, or the best one.

    Drawn, it leaves the estimate of Z unbiased, with a large variance; the best one does not.

    >>> single(greedy=True)(jax.random.key(0), jnp.array([0.0, 2.0, 1.0]))
    Array([1, 1, 1], dtype=int32)
    """
    return Single(greedy)


def blockwise(
    key: Array,
    denoise: Any,
    solver: Solver,
    grid: Grid,
    shape: tuple[int, ...] | None = None,
    *,
    reward: Callable[[Tree], Array] | None = None,
    twist: Any = None,
    candidates: int,
    block: int = 1,
    temperature: Array = 0.0,
    x: Tree | None = None,
    **options: Any,
) -> Chosen:
    """Every ``block`` rows keep one of ``candidates`` continuations, by the value of their clean estimate.

    Kept with probability ``softmax(value / temperature)``; at temperature 0 the best.  One block of all rows is
    `best_of_n`; block = 1 is `svdd`; any block at temperature 0 is CoDe.  Without gradients.

    Where all candidates have the same value nothing is chosen.

    Args:
        key, denoise, solver, grid, shape: as for `diffjax.sample`, the solver stochastic.
        reward: ``x0 -> number``, judged at the clean estimate; or
        twist: a value function of states, ``(denoise, x, level) -> (value, x0)``, as an exact or learned one.
        candidates: M, at least 1; 1 is the base sampler.
        block: rows from one choice to the next.
        temperature: alpha, at least 0.
        x: one state at the grid's first level, from which all candidates start, as a noised reference; else each starts
            from its own draw of the prior.
        options: further ones of `diffjax.steer` (final_denoise, dtype, mesh, axis).

    CoDe: Blockwise Control for Denoising Diffusion Models, arXiv:2502.00968.

    Returns a `Chosen`.  Denoiser calls: one a row and candidate.

    Raises ValueError as `steer`, unless exactly one of reward and twist is given, and for a negative temperature.
    """
    if (reward is None) == (twist is None):
        raise ValueError(f"give exactly one of reward={reward!r} and twist={twist!r}.")
    number("temperature", temperature)
    integer("candidates", candidates, 1)
    integer("block", block, 1)
    if not isinstance(grid, Grid):
        raise ValueError(f"grid must be a Grid (see diffjax.grids), got {grid!r}.")
    if reward is not None:
        twist = reward_twist(reward)
    last = CLEAN if options.get("final_denoise") else jax.tree.map(lambda leaf: leaf[-1], grid.s)
    if not is_traced(last.sigma) and np.any(np.asarray(last.sigma) != 0):
        raise ValueError("choices need a grid that ends at sigma = 0, or final_denoise=True.")
    greedy = jnp.asarray(temperature) == 0
    warm = jnp.where(greedy, 1.0, temperature)
    if x is not None:
        x = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (candidates, *jnp.shape(leaf))), x)
    key, chance = jax.random.split(key)
    plan = dict(particles=candidates, x=x, twist=Tempered(twist, 1 / warm), proposal="base", potential=Judged())
    # equal weights leave nothing to choose: their effective size is not below that of all
    plan |= dict(resampler=Single(greedy), threshold=1.0, every=block)
    found = steer(key, denoise, solver, grid, shape, **plan, **options)
    rewards = jax.vmap(lambda x: _value(twist, grid.process.enter(x, last), last))(found.x)
    index = Single(greedy)(chance, rewards / warm)[0]
    chosen = jax.tree.map(lambda leaf: leaf[index], found.x)
    return Chosen(chosen, rewards[index], rewards, found.nfe, found.failed_at)


def best_of_n(key: Array, denoise: Any, solver: Solver, grid: Grid, shape: Any = None, **options: Any) -> Chosen:
    """The best of ``candidates`` independent samples: `blockwise` with one block.  Arguments are those of `blockwise`.

    For deterministic solvers: `diffjax.smc.random_search`.

    >>> import diffjax
    >>> law, grid = diffjax.oracles.gaussian(0.0, 1.0), diffjax.grids.log_snr(diffjax.processes.vp(), 8)
    >>> options = dict(reward=lambda x0: x0, candidates=16)
    >>> found = best_of_n(jax.random.key(0), law, diffjax.solvers.ancestral(), grid, (), **options)
    >>> bool(found.reward == found.rewards.max())
    True
    """
    integer("candidates", options.get("candidates"), 1)
    return blockwise(key, denoise, solver, grid, shape, block=len(grid), **options)


def svdd(
    key: Array,
    denoise: Any,
    solver: Solver,
    grid: Grid,
    shape: tuple[int, ...] | None = None,
    *,
    candidates: int,
    temperature: Array,
    **options: Any,
) -> Chosen:
    """Soft value-based decoding: in every row one of M proposals with probability ``softmax(value / temperature)``.

    The value is the reward at the clean estimate (``reward``, SVDD-PM) or any soft value ``alpha log E[exp(r(x_0) /
    alpha) | x_t]`` (``twist``; learned: SVDD-MC).  With exact values, many proposals and small steps its law is the
    tilted one.  (Released code takes the best instead: temperature 0.)

    Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding,
    arXiv:2408.08252.

    Arguments, what is returned and raised: see `blockwise`.
    """
    return blockwise(key, denoise, solver, grid, shape, candidates=candidates, temperature=temperature, **options)


def scg(
    key: Array,
    denoise: Any,
    solver: Solver,
    grid: Grid,
    shape: tuple[int, ...] | None = None,
    *,
    loss: Callable[[Tree], Array],
    candidates: int,
    **options: Any,
) -> Chosen:
    """Stochastic control guidance: in every row keep the candidate whose clean estimate breaks a rule the least.

    ``loss``: ``x0 -> number``, any function, as a count of broken rules; the rest as for `blockwise`.

    Symbolic Music Generation with Non-Differentiable Rule Guided Diffusion, arXiv:2402.14285.
    """
    negative = Negative(as_value(loss))
    return blockwise(key, denoise, solver, grid, shape, reward=negative, candidates=candidates, **options)


@value
class Negative:
    function: Any

    def __call__(self, x0: Tree) -> Array:
        return -self.function(x0)


@value
class Tempered:
    twist: Any
    inverse: Array

    def __call__(self, denoise: Any, x: Tree, level: Level) -> tuple[Array, Tree]:
        found, x0 = self.twist(denoise, x, level)
        return self.inverse * found, x0


@value
class Judged:
    """``G = h(x) / h(parent)``, but 1 in the first row: the candidates of the first block are yet to be made."""

    factory = "judged"
    telescopes = False

    def init(self, like: Array) -> Array:
        return jnp.zeros_like(like)

    def step(self, log_h: Array, paid: Array, memory: Array) -> tuple[Array, Array]:
        # a parent without any hope (-inf) is forgiven: its children are compared by themselves
        gain = log_h - jnp.where(paid == -jnp.inf, 0.0, paid)
        return jnp.where(memory == 0, 0.0, gain), jnp.ones_like(memory)


def _value(twist: Any, x: Tree, last: Level) -> Array:
    """The exact reward, of a state without noise."""
    last = jax.tree.map(jnp.asarray, last)
    known = lambda x, level: jax.tree.map(lambda leaf: (leaf / level.alpha).astype(leaf.dtype), x)
    return twist(known, x, last)[0]
