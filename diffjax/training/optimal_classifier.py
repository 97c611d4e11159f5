"""SLCD: the optimal classifier guidance, learned where the guided sampler goes.

The law p(x_0) exp(eta r(x_0)) / Z is sampled by adding grad log E[exp(eta r) | x_t] to the score, and that expectation
is a matter of supervised learning: classify the reward given the noisy state (`diffjax.guidance.bins`).  What to learn
on are states that the guided sampler visits, with rewards that the *base* model reaches from there:

    roll in with guidance from the prior to a random level t, record x_t, roll out without guidance, record the reward.

The roll-out has to be stochastic: its end must be a draw from q(x_0 | x_t), not the one point of the flow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.guidance.bins import bins, check_edges, expected_tilt
from diffjax.guidance.gradient import gradient
from diffjax.levels import Array, Grid, Level, Solver, Tree, as_value, remembers, static, value
from diffjax.nongaussian.tokens import unmasked
from diffjax.samplers.sequential import sample


class Visits(NamedTuple):
    """States of the guided sampler, their levels, and the rewards that the base model reached from them; (B, ...)."""

    x: Tree
    level: Any  # a Level; None of tokens
    reward: Array


def visits(
    key: Array,
    denoise: Any,
    potential: Any,
    reward: Callable[[Tree], Array],
    solver: Solver,
    grid: Grid,
    shape: Any,
    count: int,
    scale: Array = 1.0,
) -> Visits:
    """``count`` draws of (x_t, t, reward): guided down to a random row of the grid, then by ``denoise`` alone.

    Network evaluations: a row each, of the solver's calls.

    Args:
        key: one PRNG key.
        denoise: the base denoiser, which does not remember.
        potential: ``F(x, level)`` of the guidance (see `gradient`), None for none.
        reward: ``reward(x0) -> scalar``.
        solver: stochastic, so that the roll-out draws from the base model's law given the state.
        shape: of one sample.
        scale: of the guidance.

    Efficient Controllable Diffusion via Optimal Classifier Guidance, arXiv:2505.21666.

    Raises ValueError for a deterministic solver and for a denoiser that remembers.
    """
    if not solver.draws:
        raise ValueError(f"solver must be stochastic, or every state has one reward, got {solver!r}.")
    if remembers(denoise):
        raise ValueError(f"denoise must not remember, got {denoise!r}.")
    base = as_value(denoise)
    guided = base if potential is None else gradient(base, potential, scale)

    def one(key: Array) -> Visits:
        where, walk = jax.random.split(key)
        index = jax.random.randint(where, (), 0, len(grid))
        turn = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32)[index], grid.t)
        found = sample(walk, RollIn(guided, base, turn), solver, grid, shape, save="states")
        states = jax.tree.map(lambda leaf: leaf[index], found.saved.states)
        return Visits(states, turn, reward(found.x))

    return jax.vmap(one)(jax.random.split(key, count))


@value
class RollIn:
    """``guided`` at levels noisier than ``turn``, ``base`` from there on."""

    guided: Any
    base: Any
    turn: Level

    def __call__(self, x: Tree, level: Level) -> Tree:
        noisier = level.half_log_snr < self.turn.half_log_snr - 1e-6 * (1 + jnp.abs(self.turn.half_log_snr))
        return jax.tree.map(lambda a, b: jnp.where(noisier, a, b), self.guided(x, level), self.base(x, level))


class Round(NamedTuple):
    """One round: the classifier's parameters after it, and the mean reward of its visits."""

    params: Tree
    reward: Array


def optimal_classifier(
    key: Array,
    denoise: Any,
    apply: Callable[..., Array],
    params: Tree,
    fit: Callable[[Array, Tree, Visits, Array, Array], Tree],
    reward: Callable[[Tree], Array],
    edges: Array,
    rewards: Array,
    solver: Solver,
    grid: Grid,
    shape: Any,
    *,
    rounds: int,
    count: int,
    eta: Array = 1.0,
) -> list[Round]:
    """SLCD: rounds of visits of the guided sampler, and a classifier that is fitted to all visits so far.

    Round 0 visits without guidance.  The visits of all rounds stay in one buffer of fixed shape (rounds * count), so
    that everything compiles once; a mask says which are there (learning on the aggregate is what has no regret).

    Args:
        apply: ``apply(params, x, network time) -> (K,)`` logits; ``params`` are those it begins with.
        fit: ``fit(key, params, visits, bins, mask) -> params``, training of any kind: bins (B,) are the labels and mask
            (B,) the weights of a cross entropy (`cross_entropy`).
        edges, rewards: (K - 1,) increasing and (K,), see `bins` and `expected_tilt`.
        rounds, count: how often, and visits each.
        eta: of the target p(x) exp(eta r(x)).

    Returns a `Round` for each; guide with ``gradient(denoise, expected_tilt(apply, params, process, rewards, eta))``.

    Efficient Controllable Diffusion via Optimal Classifier Guidance, arXiv:2505.21666.

    Raises ValueError as `visits`, and for edges that do not increase or rewards that do not fit them.
    """
    tilted = lambda params: expected_tilt(apply, params, grid.process, rewards, eta)

    def draw(key: Array, params: Tree, scale: float) -> Visits:
        return visits(key, denoise, tilted(params), reward, solver, grid, shape, count, scale)

    return _rounds(key, draw, params, fit, edges, rewards, rounds, count)


def token_visits(
    key: Array,
    conditional: Callable[[Array], Array],
    potential: Callable[[Array], Array] | None,
    reward: Callable[[Array], Array],
    length: int,
    vocabulary: int,
    count: int,
    scale: Array = 1.0,
) -> Visits:
    """`visits` of sequences of tokens: unmasked with guidance to a random number of entries, and then without.

    Conditional, potential ``F(x)`` and sizes are those of `diffjax.nongaussian.unmasked`; levels are None.

    Efficient Controllable Diffusion via Optimal Classifier Guidance, arXiv:2505.21666.
    """
    guide = None if potential is None else lambda x: scale * potential(x)

    def one(key: Array) -> Visits:
        where, walk = jax.random.split(key)
        turn = jax.random.randint(where, (), 0, length)
        found = unmasked(walk, conditional, length, vocabulary, guide, turn)
        return Visits(found.states[turn], None, reward(found.x))

    return jax.vmap(one)(jax.random.split(key, count))


def token_tilt(apply: Callable[..., Array], params: Tree, rewards: Array, eta: Array = 1.0) -> TokenTilt:
    """The potential ``log sum_k p(bin k | x) exp(eta rewards[k])`` of a classifier ``apply(params, x) -> (K,)`` logits.

    Efficient Controllable Diffusion via Optimal Classifier Guidance, arXiv:2505.21666.
    """
    return TokenTilt(params, rewards, eta, apply)


@value
class TokenTilt:
    params: Tree
    rewards: Array
    eta: Array
    apply: Callable = static()
    factory = "token_tilt"

    def __call__(self, x: Array) -> Array:
        logs = jax.nn.log_softmax(self.apply(self.params, x))
        return jax.nn.logsumexp(logs + self.eta * jnp.asarray(self.rewards, logs.dtype))


def optimal_token_classifier(
    key: Array,
    conditional: Callable[[Array], Array],
    apply: Callable[..., Array],
    params: Tree,
    fit: Callable[[Array, Tree, Visits, Array, Array], Tree],
    reward: Callable[[Array], Array],
    edges: Array,
    rewards: Array,
    length: int,
    vocabulary: int,
    *,
    rounds: int,
    count: int,
    eta: Array = 1.0,
) -> list[Round]:
    """SLCD for sequences of tokens: `optimal_classifier` with `token_visits`.

    Args:
        conditional, length, vocabulary: of the base model, as for `diffjax.nongaussian.unmasked`.
        apply: ``apply(params, x) -> (K,)`` logits of the reward's bin given a partly masked x; the rest as for
            `optimal_classifier`.

    Returns a `Round` for each; guide with ``unmasked(..., potential=token_tilt(apply, params, rewards, eta))``.

    Efficient Controllable Diffusion via Optimal Classifier Guidance, arXiv:2505.21666.

    Raises ValueError for edges that do not increase or rewards that do not fit them.
    """

    def draw(key: Array, params: Tree, scale: float) -> Visits:
        tilt = token_tilt(apply, params, rewards, eta)
        return token_visits(key, conditional, tilt, reward, length, vocabulary, count, scale)

    return _rounds(key, draw, params, fit, edges, rewards, rounds, count)


def _rounds(
    key: Array, draw: Any, params: Tree, fit: Any, edges: Array, rewards: Array, rounds: int, count: int
) -> list[Round]:
    check_edges(edges)
    if np.shape(rewards) != (np.shape(edges)[0] + 1,):
        raise ValueError(f"rewards must have one entry more than the edges {np.shape(edges)}, got {np.shape(rewards)}.")
    found, buffer = [], None
    for i in range(rounds):
        drawn, fitted = jax.random.split(jax.random.fold_in(key, i))
        new = draw(drawn, params, float(i > 0))  # the same program in every round: scale 0 is no guidance
        if buffer is None:
            buffer = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * rounds), new)
        place = lambda all, part, i=i: jax.lax.dynamic_update_slice_in_dim(all, part, i * count, 0)
        buffer = jax.tree.map(place, buffer, new)
        mask = (jnp.arange(rounds * count) < (i + 1) * count).astype(jnp.float32)
        params = fit(fitted, params, buffer, bins(edges, buffer.reward), mask)
        found.append(Round(params, new.reward.mean()))
    return found
