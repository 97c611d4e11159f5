"""Choosing among continuations, starts and paths, on Gaussians, where what should come out is known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import grids, oracles, processes, smc, solvers

VP = processes.vp()
GRID = grids.log_snr(VP, 12)
LAW = oracles.gaussian(np.zeros(4), np.ones(4))
KEYS = jax.random.split(jax.random.key(2), 400)
ANCESTRAL = solvers.ancestral()
LARGEST = {4: 1.02938}  # the mean of the largest of as many standard normals


def first(x0):
    return x0[0]


def far(x0):
    return -jnp.sum((x0 - 1.5) ** 2)


def _many(method, *arguments, **options):
    """A method on many keys, in one program."""
    solver = options.pop("solver", ANCESTRAL)
    return jax.jit(jax.vmap(lambda key: method(key, LAW, solver, GRID, (4,), *arguments, **options)))(KEYS)


@pytest.fixture(scope="module")
def plain():
    """Samples of the discretised chain, by far the most of them those of a normal law of some variance."""
    run = lambda key: diffjax.sample(key, LAW, ANCESTRAL, GRID, shape=(4,)).x
    return np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(9), 20_000)))


def _close(values, expected, extra=0.0):
    values = np.asarray(values, np.float64)
    assert abs(values.mean() - expected) < 4 * values.std() / np.sqrt(values.size) + extra, (values.mean(), expected)


@pytest.mark.paper("Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps")
def test_best_of_n_is_the_order_statistic(plain):
    """Of stochastic samples and of the starts of a deterministic one, whose flow only scales them."""
    found = _many(smc.best_of_n, reward=first, candidates=4)
    _close(found.reward, LARGEST[4] * plain.std())
    np.testing.assert_array_equal(found.reward, found.rewards.max(1))
    assert (found.nfe == 4 * len(GRID)).all()
    found = _many(smc.random_search, solver=solvers.ddim(), verifier=first, candidates=4)
    _close(found.reward, LARGEST[4] * float(np.asarray(found.rewards).std()))
    assert (found.nfe == 4 * len(GRID)).all()


@pytest.mark.paper("Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps")
def test_zero_order_search_climbs():
    """Its pivots never fall, its starts stay in the prior's shell, and near search beats random in many dimensions."""
    options = dict(solver=solvers.ddim(), verifier=far)
    near = _many(smc.zero_order_search, candidates=4, rounds=8, radius=0.5, **options)
    random = _many(smc.random_search, candidates=33, **options)
    assert (np.diff(near.rewards, axis=1) >= 0).all()
    assert (near.nfe == random.nfe).all() and (random.nfe == 33 * len(GRID)).all()
    difference = np.asarray(near.reward - random.reward)
    assert difference.mean() > 4 * difference.std() / 20
    norms = np.sum(np.asarray(near.start) ** 2, axis=1)
    assert norms.mean() < 4 * (1 + 3 * 1.5)


@pytest.mark.paper("Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps")
def test_search_over_paths():
    """Better than as many samples as it keeps, for calls that are counted."""
    options = dict(verifier=far, kept=2, copies=4, back=1, ahead=4, first=3)
    found = _many(smc.path_search, solver=solvers.ddim(), **options)
    # 3 rows of two states; rounds that end at rows 6, 9, 12, the first two judged by a call
    assert (found.nfe == 2 * 3 + 8 * (4 + 1 + 4 + 1 + 4)).all()
    few = _many(smc.random_search, solver=solvers.ddim(), verifier=far, candidates=2)
    difference = np.asarray(found.reward - few.reward)
    assert difference.mean() > 1.0 > 4 * difference.std() / 20


def test_searches_move_within_the_law_of_the_prior():
    """With a verifier that is as good as chance, neighbours of a pivot and states that are noised again keep their law.

    Variances by the linear recursion of DDIM's steps, in NumPy.
    """
    chance = lambda x: jnp.cos(1e4 * x[0])
    solver = solvers.ddim()
    walk = _many(smc.zero_order_search, solver=solver, verifier=chance, candidates=1, rounds=4, radius=0.6)
    error = 4 * np.sqrt(2 / walk.start.size)
    assert abs(np.var(walk.start) / float(GRID.start.sigma) ** 2 - 1) < error
    paths = _many(smc.path_search, solver=solver, verifier=chance, kept=1, copies=1, back=3, ahead=9, first=6)
    alpha, sigma = (np.append(np.asarray(a), np.asarray(b)[-1]) for a, b in zip(GRID.t[1:3], GRID.s[1:3], strict=True))

    def moved(variance, begin, end):
        for i in range(begin, end):
            shrink = sigma[i + 1] / sigma[i]
            x0 = alpha[i] / (alpha[i] ** 2 + sigma[i] ** 2)
            variance = variance * (shrink + (alpha[i + 1] - alpha[i] * shrink) * x0) ** 2
        return variance

    keep = alpha[3] / alpha[6]
    variance = keep**2 * moved(sigma[0] ** 2, 0, 6) + sigma[3] ** 2 - (keep * sigma[6]) ** 2
    variance = moved(variance, 3, len(GRID))
    assert abs(np.var(paths.x) / variance - 1) < error, (np.var(paths.x), variance)


@pytest.mark.paper(
    "Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding"
)
def test_soft_values_give_the_tilted_law(plain):
    """A linear reward's value is linear in the clean estimate: e^{x / alpha} moves the mean by the variance / alpha."""
    found = _many(smc.svdd, reward=first, candidates=32, temperature=1.5)
    moved = plain[:, 0].var() / 1.5
    _close(found.x[:, 0], moved, extra=2 * moved / 32)
    _close(found.x[:, 1], 0.0)
    assert abs(np.asarray(found.x[:, 0]).std() - plain.std()) < 4 * plain.std() / np.sqrt(800)


@pytest.mark.paper("CoDe: Blockwise Control for Denoising Diffusion Models")
def test_blocks_go_from_best_of_n_to_a_choice_in_every_row(plain):
    """A choice in every row earns more reward; one block is `best_of_n`."""
    rewards = []
    for block in (1, len(GRID)):
        rewards.append(np.asarray(_many(smc.blockwise, reward=first, candidates=4, block=block).reward))
    _close(rewards[1], LARGEST[4] * plain.std())
    difference = rewards[0] - rewards[1]
    assert difference.mean() > 4 * difference.std() / 20


@pytest.mark.paper("Symbolic Music Generation with Non-Differentiable Rule Guided Diffusion")
def test_rules_are_broken_less_with_more_candidates(plain):
    """The number of negative entries, which has no gradient."""
    loss = lambda x0: jnp.sum(x0 < 0).astype(jnp.float32)
    found = _many(smc.scg, loss=loss, candidates=8)
    np.testing.assert_array_equal(-found.reward, jax.vmap(loss)(found.x))
    assert -found.reward.mean() < 0.5 < 1.5 < np.sum(plain < 0, axis=1).mean()


@pytest.mark.paper("A General Framework for Inference-time Scaling and Steering of Diffusion Models")
def test_steering_beats_best_of_n_at_equal_evaluations():
    """The best of eight steered particles earns more than the best of eight samples."""
    best = _many(smc.best_of_n, reward=far, candidates=8)

    def steered(key, *arguments):
        twist = smc.reward(far, 2.0)
        return smc.steer(key, *arguments, particles=8, twist=twist, proposal="base", every=2, potential=smc.maximum())

    found = _many(steered)
    rewards = np.asarray(jax.vmap(jax.vmap(far))(found.x)).max(1)
    difference = rewards - np.asarray(best.reward)
    assert (found.nfe == best.nfe).all() and difference.mean() > 4 * difference.std() / 20, difference.mean()


@pytest.mark.paper("Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget Forcing")
def test_rolled_over_evaluations():
    """Never above the budget; with one call a row it is the base sampler; better than best-of-n for the same calls."""
    budget = 8 * len(GRID)
    found = _many(smc.rollover, reward=far, budget=budget)
    assert (found.nfe <= budget + 1).all() and (found.failed_at == -1).all()
    best = _many(smc.best_of_n, reward=far, candidates=8)
    difference = np.asarray(found.reward - best.reward)
    assert difference.mean() > 4 * difference.std() / 20
    np.testing.assert_allclose(found.reward, jax.vmap(far)(found.x), rtol=1e-4, atol=1e-4)


def test_bad_input():
    call = lambda method, **options: method(KEYS[0], LAW, options.pop("solver", ANCESTRAL), GRID, (4,), **options)
    for match, method, options in (
        ("exactly one", smc.blockwise, dict(candidates=2)),
        ("candidates", smc.best_of_n, dict(reward=first)),
        ("temperature", smc.svdd, dict(reward=first, candidates=2, temperature=-1.0)),
        ("stochastic", smc.blockwise, dict(reward=first, candidates=2, solver=solvers.ddim())),
        ("stochastic", smc.rollover, dict(reward=first, budget=99, solver=solvers.ddim())),
        ("budget", smc.rollover, dict(reward=first, budget=1)),
        ("radius", smc.zero_order_search, dict(verifier=first, candidates=2, rounds=1, radius=0.0)),
        ("deterministic", smc.path_search, dict(verifier=first, kept=1, copies=1, back=1, ahead=2, first=1)),
        ("ahead", smc.path_search, dict(verifier=first, kept=1, copies=1, back=2, ahead=2, first=2)),
    ):
        with pytest.raises(ValueError, match=match):
            call(method, **options)
