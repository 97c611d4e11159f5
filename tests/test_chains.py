"""Steering of discrete chains against their enumerated laws."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import nongaussian, smc
from diffjax.levels import value

LENGTH, STEPS, CLASSES = 3, 3, 2
DATA = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1]])
WEIGHTS = np.array([0.4, 0.3, 0.2, 0.1])
LAW = nongaussian.token_points(DATA, WEIGHTS)
CHAIN = nongaussian.unmasking_chain(LAW, CLASSES, STEPS)
STATES = np.array(list(itertools.product([0, 1, CLASSES], repeat=LENGTH)))
ENDS = np.flatnonzero((STATES < CLASSES).all(1))
KEYS = jax.random.split(jax.random.key(0), 4000)


def number(tokens):
    """The place of a sequence in STATES."""
    return jnp.sum(tokens * 3 ** jnp.arange(LENGTH - 1, -1, -1))


def reward(tokens):
    """Not differentiable: how many ones, and a prize for a pattern."""
    return 1.0 * jnp.sum(tokens == 1) + 1.5 * jnp.all(tokens == jnp.array([0, 1, 1]))


def chances(state):
    """P(token | what is seen) by counting, in NumPy."""
    fits = np.all((state == CLASSES) | (state == DATA), axis=1) * WEIGHTS
    if fits.sum() == 0:
        return np.full((LENGTH, CLASSES), 1 / CLASSES)
    return np.array([[fits[DATA[:, i] == k].sum() for k in range(CLASSES)] for i in range(LENGTH)]) / fits.sum()


def transition(depth):
    """All 27 x 27 probabilities of a step."""
    share = 1 / (STEPS - depth)
    moves = np.zeros((len(STATES), len(STATES)))
    for i, state in enumerate(STATES):
        p = chances(state)
        for j, new in enumerate(STATES):
            each = [
                float(new[k] == state[k])
                if state[k] < CLASSES
                else 1 - share
                if new[k] == CLASSES
                else share * p[k, new[k]]
                for k in range(LENGTH)
            ]
            moves[i, j] = np.prod(each)
    return moves


MOVES = [transition(depth) for depth in range(STEPS)]
REWARDS = np.array([float(np.sum(s == 1)) + 1.5 * np.array_equal(s, [0, 1, 1]) for s in STATES])


def soft_values(temperature):
    """``temperature log E[exp(r / temperature) | x]`` at every depth and state, by the Bellman recursion."""
    values = [np.where((STATES < CLASSES).all(1), REWARDS / temperature, 0.0)]
    for move in MOVES[::-1]:
        values.append(np.log(move @ np.exp(values[-1])))
    return temperature * np.stack(values[::-1])


def tilted(temperature):
    """The law of the end times exp(r / temperature), over ENDS, and log Z."""
    end = np.linalg.multi_dot(MOVES)[-1][ENDS] * np.exp(REWARDS[ENDS] / temperature)
    return end / end.sum(), np.log(end.sum())


@value
class Exact:
    table: Any

    def __call__(self, tokens, depth):
        return jnp.asarray(self.table, jnp.float32)[depth, number(tokens)]


MILD = 0.4  # of a reward that leaves no heavy tails to the weights of `total`


def mild(tokens):
    return MILD * reward(tokens)


GUESS = nongaussian.completed_reward(CHAIN, mild, jax.random.key(5), draws=2)
RUN: Any = dict(root=CHAIN.root(LENGTH), length=STEPS)


def law_of(tokens, weights=None):
    """Shares of the ENDS."""
    places = np.asarray(jax.vmap(number)(tokens.reshape(-1, LENGTH)))
    weights = np.ones(len(places)) if weights is None else np.asarray(weights).reshape(-1)
    return np.bincount(places, weights, len(STATES))[ENDS] / weights.sum()


def test_the_chain_is_the_enumerated_one():
    """Without a reward: shares of the ends within 4 standard errors, exact chances, and nothing left masked."""
    for state in STATES:
        np.testing.assert_allclose(np.exp(LAW(jnp.asarray(state))), chances(state), rtol=1e-6)
    run = lambda key: smc.steer_chain(key, CHAIN, value=lambda x, depth: 0.0, particles=8, **RUN)
    found = jax.jit(jax.vmap(run))(KEYS)
    expected, exact = law_of(found.x), np.linalg.multi_dot(MOVES)[-1][ENDS]
    assert (np.abs(expected - exact) < 4 * np.sqrt(exact * (1 - exact) / (8 * len(KEYS))) + 1e-9).all()
    assert (found.log_z == 0).all() and not found.resampled.any() and (found.nfe == 8 * STEPS).all()


@pytest.mark.paper("A General Framework for Inference-time Scaling and Steering of Diffusion Models")
@pytest.mark.parametrize("potential", [smc.difference(), smc.maximum(), smc.total()], ids=repr)
def test_steered_tokens_have_the_tilted_law(potential):
    """The same API on discrete tokens: E[Z] = Z, and E[Z times the weighted law] = Z times the tilted law."""
    law, log_z = tilted(1 / MILD)
    run = lambda key: smc.steer_chain(key, CHAIN, value=GUESS, particles=4, potential=potential, threshold=0.95, **RUN)
    found = jax.jit(jax.vmap(run))(KEYS)
    z = np.exp(np.asarray(found.log_z, np.float64))
    error = 4 / np.sqrt(len(z))
    assert abs(z.mean() - np.exp(log_z)) < error * z.std(), (z.mean(), np.exp(log_z))
    places = np.asarray(jax.vmap(jax.vmap(number))(found.x))
    w = np.asarray(jax.vmap(smc.normalised)(found.log_weights))
    each = np.stack([z * np.where(places == end, w, 0.0).sum(1) for end in ENDS], 1)
    assert (np.abs(each.mean(0) - np.exp(log_z) * law) < error * each.std(0) + 1e-9).all()
    assert 0.05 < found.resampled.mean() < 0.95 and (found.failed_at == -1).all()


@pytest.mark.paper("A General Framework for Inference-time Scaling and Steering of Diffusion Models")
def test_steering_beats_best_of_n_at_equal_steps():
    """The tilted mean reward comes nearer with particles; importance sampling of as many is worse in log Z."""
    law, log_z = tilted(0.5)
    rewards = law @ REWARDS[ENDS]
    errors = {}
    for threshold in (0.0, 0.6):
        run = lambda key, threshold=threshold: smc.steer_chain(
            key, CHAIN, value=Exact(soft_values(0.5) / 0.5), particles=8, threshold=threshold, **RUN
        )
        found = jax.jit(jax.vmap(run))(KEYS)
        errors[threshold] = np.mean((np.asarray(found.log_z) - log_z) ** 2)
        w = np.asarray(jax.vmap(smc.normalised)(found.log_weights))
        got = (w * np.asarray(jax.vmap(jax.vmap(reward))(found.x))).sum(1)
        share = np.exp(np.asarray(found.log_z) - log_z)
        each = share * (got - rewards)
        assert abs(each.mean()) < 4 * each.std() / np.sqrt(len(each))
    assert errors[0.6] < 0.7 * errors[0.0], errors


@pytest.mark.paper(
    "Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding"
)
def test_soft_value_based_decoding_of_tokens():
    """With exact values and many candidates the law is the tilted one; with one it is the chain's; greedy climbs."""
    law, _ = tilted(0.7)
    plain = np.linalg.multi_dot(MOVES)[-1][ENDS]
    value_of = Exact(soft_values(0.7))
    gap = {}
    for candidates in (1, 2, 32):
        run = lambda key, candidates=candidates: smc.branch_chain(
            key, CHAIN, value=value_of, candidates=candidates, temperature=0.7, **RUN
        )
        found = jax.jit(jax.vmap(run))(KEYS)
        share = law_of(found.x)
        gap[candidates] = 0.5 * np.abs(share - law).sum()
        if candidates == 1:
            assert 0.5 * np.abs(share - plain).sum() < 0.03
    # sampling noise of 4,000 draws over 8 ends: 0.5 sum sqrt(2 p q / (pi n)) is 0.015; 1 / 32 is the method's own
    assert gap[32] < 0.04 < gap[2] < gap[1], gap
    greedy = jax.jit(jax.vmap(lambda key: smc.branch_chain(key, CHAIN, value=value_of, candidates=32, **RUN)))(KEYS)
    assert greedy.reward.mean() > 3.4 > law @ REWARDS[ENDS]  # the best there is: 3.5


def test_a_better_step_needs_its_ratio():
    """A step from another law with its weight p / q: the same target, and Z with less variance."""
    moves, soft = jnp.asarray(np.stack(MOVES), jnp.float32), jnp.asarray(soft_values(1.0), jnp.float32)

    def optimal(key, tokens, depth):
        here = number(tokens)
        logs = jnp.log(moves[depth, here])
        guided = jax.nn.log_softmax(logs + soft[depth + 1])
        new = jax.random.categorical(key, guided)
        return jnp.asarray(STATES, jnp.int32)[new], logs[new] - guided[new]

    run = lambda key: smc.steer_chain(key, optimal, value=Exact(soft), particles=2, weighed=True, **RUN)
    found = jax.jit(jax.vmap(run))(KEYS)
    np.testing.assert_allclose(found.log_z, tilted(1.0)[1], atol=1e-5)  # Doob's transform: no variance at all
    shares, law = law_of(found.x), tilted(1.0)[0]
    assert (np.abs(shares - law) < 4 * np.sqrt(law / (2 * len(KEYS))) + 1e-9).all()


def test_bad_input():
    good: Any = dict(value=GUESS, particles=4, **RUN)
    for match, options in {
        "particles": dict(particles=0),
        "length": dict(length=0),
        "every": dict(every=0),
        "threshold": dict(threshold=-1.0),
        "callable": dict(value=3.0),
        "resampler": dict(resampler=smc.transported()),
    }.items():
        with pytest.raises(ValueError, match=match):
            smc.steer_chain(KEYS[0], CHAIN, **{**good, **options})
    with pytest.raises(ValueError, match="temperature"):
        smc.branch_chain(KEYS[0], CHAIN, value=GUESS, candidates=2, temperature=-1.0, **RUN)
    for match, call in {
        "steps": lambda: nongaussian.unmasking_chain(LAW, 2, 0),
        "data": lambda: nongaussian.token_points(np.array([0.5])),
        "vocabulary": lambda: nongaussian.token_points(DATA, vocabulary=1),
        "weights": lambda: nongaussian.token_points(DATA, np.array([-1.0, 1, 1, 1])),
        "draws": lambda: nongaussian.completed_reward(CHAIN, reward, KEYS[0], draws=0),
        "temperature": lambda: nongaussian.completed_reward(CHAIN, reward, KEYS[0], temperature=0.0),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
