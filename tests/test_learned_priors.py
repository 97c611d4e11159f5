"""Priors learned from measurements: expectation maximisation with a network, and losses on incomplete, noisy data."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, guidance, inverse, metrics, oracles, predictions, processes, sample, solvers, training
from tests import tiny

PROCESS = processes.vp()


@pytest.mark.slow
@pytest.mark.paper("Learning Diffusion Priors from Observations by Expectation Maximization")
def test_a_network_learns_a_curve_from_random_projections():
    """Every datum seen in two of three random directions: Sinkhorn divergence of the prior to the curve, by round."""
    size, count, std = 3, 1024, 0.1

    def curve(key):
        angle = jax.random.uniform(key, (count,), maxval=2 * jnp.pi)
        return jnp.stack([jnp.cos(angle), jnp.sin(angle), 0.7 * jnp.cos(2 * angle)], 1)

    directions = jnp.linalg.qr(jax.random.normal(jax.random.key(3), (count, size, 2)))[0].transpose(0, 2, 1)
    y = jnp.einsum("nmd,nd->nm", directions, curve(jax.random.key(1)))
    y = y + std * jax.random.normal(jax.random.key(4), y.shape)
    seen = lambda index: inverse.measurement(inverse.matrix(directions[index]), y[index], std)
    grid = grids.log_snr(PROCESS, 16, start=0.65)

    def draw(key, prior, seen):
        guided = guidance.tilted(prior, inverse.pigdm(seen, 0.5))
        return sample(key, guided, solvers.sde_dpmpp(), grid, shape=(size,)).x

    keys = jax.random.split(jax.random.key(7), 400)
    generate = jax.jit(
        jax.vmap(lambda key, prior: sample(key, prior, solvers.ddim(), grid, shape=(size,)).x, (0, None))
    )
    test = curve(jax.random.key(2))[:400]
    off = lambda x: metrics.sinkhorn_divergence(x[:400], test, 0.1, 100)
    start, em = oracles.gaussian(np.zeros(size), 1.0), inverse.expectation_maximisation
    warm, _ = em(jax.random.key(0), start, seen, count, draw, inverse.fit_gaussian, 3)
    prediction = predictions.edm(PROCESS, 0.7, conditioning="time")
    network = prediction.decode(tiny.apply, tiny.init(jax.random.key(5), size, size, width=48))
    loss, optimiser = training.denoising(prediction, tiny.apply), training.adam(1e-2, warmup=20, steps=500)
    learn = training.maximisation(network, loss, optimiser, steps=500, batch=512, ema=training.ema.warmed(0.99))
    rounds = [off(generate(keys, warm))]

    def fit(key, prior, draws):
        prior = learn(key, prior, draws)
        rounds.append(off(generate(keys, prior)))
        return prior

    em(jax.random.key(9), warm, seen, count, draw, fit, 4)
    floor = off(curve(jax.random.key(6)))
    assert floor < 0.1 * rounds[0]
    assert np.all(np.diff(rounds) < 0) and rounds[-1] < 0.45 * rounds[0]


def test_maximisation_goes_on_from_the_last_parameters():
    """From ``start`` after a Gaussian, from the network after a network; the optimum of a quadratic loss."""
    apply = lambda params, x, t, condition=None: params + 0 * x
    prediction = predictions.data(PROCESS)
    start = prediction.decode(apply, jnp.full(2, 5.0))
    draws = jnp.asarray(np.random.default_rng(0).normal([1.0, -2.0], 0.1, (64, 2)))
    loss = training.denoising(prediction, apply)
    one = training.maximisation(start, loss, training.adam(1e-9, warmup=0), steps=1, batch=64)
    first = one(jax.random.key(0), oracles.gaussian(np.zeros(2), 1.0), draws)
    np.testing.assert_allclose(first.params, 5.0, atol=1e-6)
    other = prediction.decode(apply, jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(one(jax.random.key(0), other, draws).params, [1.0, 2.0], atol=1e-6)
    many = training.maximisation(start, loss, training.adam(0.3, warmup=0, steps=200), steps=200, batch=32)
    np.testing.assert_allclose(many(jax.random.key(0), first, draws).params, draws.mean(0), atol=0.05)
    with pytest.raises(ValueError, match="draws"):
        one(jax.random.key(0), first, draws[:8])
    with pytest.raises(ValueError, match="params"):
        training.maximisation(oracles.gaussian(0.0, 1.0), loss, training.adam(), steps=1)
    with pytest.raises(ValueError, match="steps"):
        training.maximisation(start, loss, training.adam(), steps=0)


@pytest.mark.paper("Thompson Sampling with Diffusion Generative Prior")
def test_the_optimum_of_the_loss_on_incomplete_data():
    """Gaussian data, an affine denoiser at one level: slopes and offsets in closed form, within sampling errors.

    Exact with draws of the posterior and no penalty, or with the measurements and penalty 1; a penalty on draws is
    biased as it says.
    """
    mean, variance, std, count = 0.7, 0.5, 0.6, 20_000
    flow = processes.flow()
    level = flow.level(0.4)
    alpha, sigma = 0.6, 0.4
    affine = lambda params, x, t, condition=None: params[0] * x + params[1]
    rng = np.random.default_rng(0)
    x0 = mean + np.sqrt(variance) * rng.normal(size=(count, 2))
    mask = rng.random((count, 2)) < 0.5
    y = np.where(mask, x0 + std * rng.normal(size=x0.shape), 0.0)
    gain = np.where(mask, variance / (variance + std**2), 0.0)
    draws = mean + gain * (y - mean) + np.sqrt((1 - gain) * variance) * rng.normal(size=x0.shape)
    x0, y, mask, draws = (jnp.asarray(a, jnp.float32) for a in (x0, y, mask, draws))

    @jax.jit
    def least(noised, penalty):
        law = lambda process, u: jax.tree.map(lambda leaf: jnp.asarray(leaf) + 0 * u, level)
        loss = training.incomplete(predictions.data(flow), affine, std, penalty=penalty, law=law)
        return tiny.minimum(lambda p: loss(p, jax.random.key(0), noised, y, mask).mean(), jnp.zeros(2))

    bottom = alpha**2 * variance + sigma**2
    exact = {
        "draws": (least(draws, None), alpha * variance / bottom),
        "measured": (least(y, 1.0), alpha * variance / (bottom + alpha**2 * std**2)),
        "penalised": (least(draws, 1.0), alpha * (variance - std**2) / bottom),
        "unpenalised": (least(y, 0.0), alpha * (variance + std**2) / (bottom + alpha**2 * std**2)),
    }
    for name, (found, slope) in exact.items():
        np.testing.assert_allclose(found[0], slope, atol=0.04, err_msg=name)
        np.testing.assert_allclose(found[1], mean - slope * alpha * mean, atol=0.04, err_msg=name)
    with pytest.raises(ValueError, match="penalty"):
        training.incomplete(predictions.data(flow), affine, std, penalty=-1.0)


@pytest.mark.slow
@pytest.mark.paper("Thompson Sampling with Diffusion Generative Prior")
def test_thompson_sampling_with_a_prior_learned_from_incomplete_noisy_tasks():
    """Six kinds of bandits, whose tasks were seen in half of the arms with noise: regret against a Gaussian prior's.

    The Gaussian is learned from the same data; measured 8.0 against 9.6.
    """
    arms, std, count, rounds = 6, 0.5, 1024, 40
    kinds = 1.0 * np.eye(arms) - 1.0 * np.roll(np.eye(arms), 1, axis=1)
    law = oracles.mixture(np.ones(arms), kinds, np.full(arms, 0.01))
    tasks = jax.vmap(law.sample)(jax.random.split(jax.random.key(0), count))
    mask = jnp.argsort(jax.random.uniform(jax.random.key(1), (count, arms)), axis=1) < arms // 2
    weights = mask.astype(jnp.float32)
    y = weights * (tasks + 0.3 * jax.random.normal(jax.random.key(2), tasks.shape))
    seen = lambda index: inverse.measurement(inverse.diagonal(weights[index]), y[index], 0.3)
    grid = grids.log_snr(PROCESS, 12, start=0.7)

    def draw(key, prior, seen):
        guided = guidance.tilted(prior, inverse.pigdm(seen, 0.35))
        return sample(key, guided, solvers.sde_dpmpp(), grid, shape=(arms,)).x

    em, start = inverse.expectation_maximisation, oracles.gaussian(np.zeros(arms), 0.35)
    warm, _ = em(jax.random.key(3), start, seen, count, draw, inverse.fit_gaussian, 4)
    prediction = predictions.edm(PROCESS, 0.6, conditioning="time")
    network = prediction.decode(tiny.apply, tiny.init(jax.random.key(5), arms, arms, width=64))
    loss = training.incomplete(prediction, tiny.apply, 0.3)
    optimiser = training.adam(1e-2, warmup=20, steps=500)
    learn = training.maximisation(network, loss, optimiser, steps=500, batch=256, ema=training.ema.warmed(0.99))
    fit = lambda key, prior, draws: learn(key, prior, (draws, y, weights))
    learned, _ = em(jax.random.key(6), warm, seen, count, draw, fit, 4)

    def regret(key, prior):
        task = jnp.asarray(kinds)[jax.random.randint(jax.random.fold_in(key, 1), (), 0, arms)]
        pull = lambda key, arm: task[arm] + std * jax.random.normal(key)
        out = inverse.thompson(key, lambda key, seen: draw(key, prior, seen), pull, arms, rounds, std=std)
        return jnp.sum(jnp.max(task) - task[out.arms])

    keys = jax.random.split(jax.random.key(7), 256)
    both = [np.asarray(jax.jit(jax.vmap(regret, (0, None)))(keys, prior)) for prior in (learned, warm)]
    gap = both[1] - both[0]
    assert gap.mean() > 4 * gap.std() / np.sqrt(len(gap))
