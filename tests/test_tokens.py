"""Guided sequences of tokens with an enumerable law: unmasking, and the optimal classifier, by exact KL divergences.

The conditional of the chain is exact, by sums over all its sequences: a fixture, not a model of the library.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import nongaussian, training
from diffjax.nongaussian.tokens import guided_logits
from tests import tiny

LENGTH, VOCABULARY, ETA = 4, 3, 1.0
ALL = np.array(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))
STATES = np.array(list(itertools.product(range(VOCABULARY + 1), repeat=LENGTH)))
TRANSITION = np.array([[0.7, 0.2, 0.1], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4]])
BASE = np.array([0.6, 0.3, 0.1])[ALL[:, 0]] * np.prod(TRANSITION[ALL[:, :-1], ALL[:, 1:]], axis=1)
REWARDS = (ALL == 2).sum(axis=1).astype(float)  # how many are the rarest token
TARGET = BASE * np.exp(ETA * REWARDS) / np.sum(BASE * np.exp(ETA * REWARDS))


def agree(x):
    """Which of all sequences are those that x may become."""
    return jnp.all((x == VOCABULARY) | (x == ALL), axis=-1)


def conditional(x):
    """log p(x_i = v | what is not masked), by enumeration."""
    weights = jnp.where(agree(x), BASE, 0.0)
    shares = jnp.einsum("n,niv->iv", weights, jax.nn.one_hot(ALL, VOCABULARY))
    return jnp.log(shares / jnp.sum(weights))


def exact_potential(x):
    """log E[exp(eta r) | x]."""
    weights = jnp.where(agree(x), BASE, 0.0)
    return jnp.log(jnp.sum(weights * np.exp(ETA * REWARDS)) / jnp.sum(weights))


def law(potential):
    """The guided sampler's law of all sequences, exactly: sums over every order, state by state."""
    place = jnp.arange(LENGTH)
    logits = lambda x: jax.vmap(lambda i: guided_logits(conditional, potential, x, i, VOCABULARY))(place)
    kernels = np.asarray(jax.nn.softmax(jax.vmap(logits)(jnp.asarray(STATES, jnp.int32)), axis=-1))
    index = {tuple(s): n for n, s in enumerate(STATES)}
    mass = np.zeros(len(STATES))
    mass[index[(VOCABULARY,) * LENGTH]] = 1.0
    for _ in range(LENGTH):
        after = np.zeros_like(mass)
        for n in np.flatnonzero(mass):
            masked = np.flatnonzero(STATES[n] == VOCABULARY)
            for i, v in itertools.product(masked, range(VOCABULARY)):
                new = STATES[n].copy()
                new[i] = v
                after[index[tuple(new)]] += mass[n] * kernels[n, i, v] / len(masked)
        mass = after
    return np.array([mass[index[tuple(s)]] for s in ALL])


def divergence(p):
    return np.sum(p * np.log(p / TARGET))


def test_unmasking_is_exact_with_exact_conditionals_and_potentials(x64):
    """The law by enumeration, without and with guidance; and draws of it."""
    np.testing.assert_allclose(law(None), BASE, rtol=1e-10)
    np.testing.assert_allclose(law(exact_potential), TARGET, rtol=1e-10)
    draw = lambda key: nongaussian.unmasked(key, conditional, LENGTH, VOCABULARY, exact_potential)
    found = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4000))
    codes = np.asarray(found.x) @ VOCABULARY ** np.arange(LENGTH)[::-1]
    counts = np.bincount(codes, minlength=len(ALL))
    expected = 4000 * TARGET
    assert np.sum((counts - expected) ** 2 / expected) < len(ALL) + 4 * np.sqrt(2 * len(ALL))
    masked = np.sum(np.asarray(found.states) == VOCABULARY, axis=-1)
    assert np.all(masked == np.arange(LENGTH, -1, -1))


@pytest.mark.paper("Efficient Controllable Diffusion via Optimal Classifier Guidance")
def test_optimal_classifier_of_tokens_comes_nearer_in_every_round():
    """KL of the guided law to the tilted one, both enumerated, over rounds; and its exact limit."""
    edges, rewards = np.arange(LENGTH) + 0.5, np.arange(LENGTH + 1.0)

    def network(params, x):
        return tiny.apply(params, jax.nn.one_hot(x, VOCABULARY + 1).reshape(-1), jnp.mean(x == VOCABULARY))

    @jax.jit
    def fit(key, params, visits, bins, mask):
        def one(params, key):
            pick = jax.random.randint(key, (256,), 0, mask.sum().astype(int))
            logs = jax.nn.log_softmax(jax.vmap(network, (None, 0))(params, visits.x[pick]))
            return -jnp.take_along_axis(logs, bins[pick][:, None], axis=1).mean()

        return tiny.train(one, params, key, 400, rate=1e-2)[0]

    start = tiny.init(jax.random.key(1), LENGTH * (VOCABULARY + 1), LENGTH + 1, width=32)
    reward = lambda x: jnp.sum(x == 2).astype(jnp.float32)
    options = dict(rounds=3, count=1500, eta=ETA)
    found = training.optimal_token_classifier(
        jax.random.key(0), conditional, network, start, fit, reward, edges, rewards, LENGTH, VOCABULARY, **options
    )
    guided = lambda round: law(training.token_tilt(network, round.params, rewards, ETA))
    base, rounds = divergence(BASE), [divergence(guided(round)) for round in found]
    assert base > 0.5 and rounds[0] < 0.2 * base
    assert rounds[2] < 0.7 * rounds[0] and rounds[2] < 0.03 * base
    assert found[2].reward > found[0].reward + 0.3  # roll-outs of the base model from guided states
    assert abs(float(found[0].reward) - BASE @ REWARDS) < 4 * np.sqrt(1.0 / 1500)


def test_visits_turn_where_they_say():
    """The state has as many tokens as were guided; with guidance to token 2 those are 2, the rest the base model's."""
    forced = lambda x: 50.0 * jnp.sum(x == 2)
    uniform = lambda x: jnp.zeros((LENGTH, VOCABULARY))
    out = jax.jit(
        lambda key: training.token_visits(
            key, uniform, forced, lambda x: jnp.sum(x == 2) / 1.0, LENGTH, VOCABULARY, 600
        )
    )(jax.random.key(0))
    shown = np.asarray(out.x) != VOCABULARY
    assert np.all(np.asarray(out.x)[shown] == 2)
    counts = np.bincount(shown.sum(1), minlength=LENGTH)
    assert len(counts) == LENGTH and np.all(np.abs(counts - 150) < 4 * np.sqrt(112.5))
    rest = np.asarray(out.reward) - shown.sum(1)
    free = LENGTH - shown.sum(1)
    assert abs(rest.sum() - free.sum() / 3) < 4 * np.sqrt(free.sum() * 2 / 9)
    with pytest.raises(ValueError, match="length"):
        nongaussian.unmasked(jax.random.key(0), uniform, 0, 2)
