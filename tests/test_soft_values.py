"""Soft values by regression, against their closed form on a mixture, and the laws that they steer to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, guidance, oracles, processes, smc, solvers, steer
from tests import tiny

PROCESS = processes.vp()
WEIGHTS, MEANS, VARIANCE, ALPHA, GAIN = np.array([0.8, 0.2]), np.array([[-1.0], [1.0]]), 0.09, 0.8, 1.0
DATA = oracles.mixture(WEIGHTS, MEANS, np.full(2, VARIANCE))
REWARD = lambda x0: GAIN * x0[0]


def soft(x, level):
    """alpha log E[exp(r / alpha) | x_t] of the linear reward: components are Gaussian given x_t."""
    c = level.alpha**2 * VARIANCE + level.sigma**2
    centres = MEANS[:, 0] + level.alpha * VARIANCE / c * (x[0] - level.alpha * MEANS[:, 0])
    spread = VARIANCE * level.sigma**2 / c
    logs = jnp.log(DATA.responsibilities(x, level)) + GAIN * centres / ALPHA + 0.5 * (GAIN / ALPHA) ** 2 * spread
    return ALPHA * jax.nn.logsumexp(logs)


@pytest.fixture(scope="module")
def learned():
    """Value networks of the three kinds, trained at once."""

    def fit(kind):
        loss = guidance.soft_value_loss(PROCESS, tiny.apply, ALPHA, kind)

        def one(params, key):
            x0 = jax.vmap(DATA.sample)(jax.random.split(key, 512))
            return loss(params, jax.random.fold_in(key, 1), x0, x0[:, 0] * GAIN).mean()

        return tiny.train(one, tiny.init(jax.random.key(0), 1, 1, width=24), jax.random.key(1), 500, rate=1e-2)[0]

    return {kind: jax.jit(lambda kind=kind: fit(kind))() for kind in ("soft", "mean")}


@pytest.mark.paper(
    "Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding"
)
def test_the_regression_learns_the_soft_value(learned):
    """Root mean square errors over states at five levels: learned, the mean reward, the reward of the mean."""

    @jax.jit
    def values():
        levels = jax.vmap(PROCESS.level)(jnp.array([0.1, 0.25, 0.4, 0.6, 0.9]))
        keys = jax.random.split(jax.random.key(3), (5, 300))
        x = jax.vmap(lambda keys, level: jax.vmap(lambda key: DATA.sample(key, level))(keys))(keys, levels)
        at = lambda f: jax.vmap(lambda x, level: jax.vmap(lambda x: f(x, level))(x))(x, levels)
        network = lambda params: at(lambda x, level: tiny.apply(params, x, level.time)[0])
        mean = at(lambda x, level: REWARD(DATA(x, level)))
        return at(soft), network(learned["soft"]), network(learned["mean"]), mean

    exact, found, averaged, mean = values()
    rms = lambda a, b: float(np.sqrt(np.mean((a - b) ** 2)))
    assert rms(found, exact) < 0.06
    assert rms(averaged, mean) < 0.06  # E[r | x_t], which for a linear reward is that of the mean
    assert rms(mean, exact) > 0.2 and np.all(np.asarray(exact - mean) > -1e-4)


@pytest.mark.paper(
    "Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding"
)
def test_decoding_by_a_learned_soft_value(learned):
    """The share of the rarer component under SVDD, and of weighted particles, with the learned value.

    SVDD chooses by exp(v / alpha) of the continuous process: with M = 16 and 80 steps it stays some per cent below the
    tilted share (0.65 of 0.75 with the exact value and 20 steps).  Weights have no such bias, whatever the twist.
    """
    grid, count = grids.uniform(PROCESS, 80), 400
    logs = np.log(WEIGHTS) + GAIN * MEANS[:, 0] / ALPHA
    share = np.exp(logs[1]) / np.exp(logs).sum()
    keys = jax.random.split(jax.random.key(5), count)
    twist = lambda scale: guidance.learned_value(tiny.apply, learned["soft"], PROCESS, REWARD, scale)

    @jax.jit
    def run():
        options = dict(twist=twist(1.0), candidates=16, temperature=ALPHA)
        found = jax.vmap(lambda key: smc.svdd(key, DATA, solvers.ancestral(), grid, (1,), **options).x[0])(keys)
        options = dict(twist=twist(1 / ALPHA), particles=500, proposal="base")
        populations = jax.vmap(lambda key: steer(key, DATA, solvers.ancestral(), grid, (1,), **options))(keys[:8])
        return found, populations

    found, populations = run()
    error = np.sqrt(share * (1 - share) / count)
    assert -0.06 - 4 * error < np.mean(found > 0) - share < 4 * error
    weights = jax.vmap(smc.normalised)(populations.log_weights)
    shares = np.sum(np.asarray(weights) * (np.asarray(populations.x)[..., 0] > 0), axis=1)
    assert abs(shares.mean() - share) < 4 * shares.std(ddof=1) / np.sqrt(8) + 0.01
    log_z = np.log(np.sum(WEIGHTS * np.exp(GAIN * MEANS[:, 0] / ALPHA + 0.5 * (GAIN / ALPHA) ** 2 * VARIANCE)))
    z = np.exp(np.asarray(populations.log_z) - log_z)
    assert abs(z.mean() - 1) < 4 * z.std(ddof=1) / np.sqrt(8) + 0.03  # 80 steps are not the exact reverse


def test_where_nothing_is_noisy_it_is_the_reward_and_kinds_have_their_minima(x64):
    """The twist at sigma = 0; each loss is least at the value that it says, for two rewards of equal chance."""
    zero = lambda params, x, t: params + 0 * x
    twist = guidance.learned_value(zero, jnp.float64(7.0), PROCESS, lambda x0: 3.0 * x0[0], 2.0)
    x, clean = jnp.array([0.5]), PROCESS.level(0.0)
    log_h, x0 = twist(DATA, x, clean)
    np.testing.assert_allclose([log_h, x0[0]], [3.0, 0.5], rtol=1e-12)
    np.testing.assert_allclose(twist(DATA, x, PROCESS.level(0.5))[0], 14.0)
    rewards = np.array([0.2, 1.5])
    expected = {"mean": rewards.mean()}
    expected |= dict.fromkeys(("soft", "square"), ALPHA * np.log(np.mean(np.exp(rewards / ALPHA))))
    for kind, best in expected.items():
        loss = guidance.soft_value_loss(PROCESS, zero, ALPHA, kind)
        both = lambda v, loss=loss: sum(loss.error(v, x, PROCESS.level(0.5), r) for r in rewards)
        np.testing.assert_allclose(jax.grad(both)(jnp.float64(best)), 0.0, atol=1e-12)
        assert both(best) < min(both(best - 0.1), both(best + 0.1))
    with pytest.raises(ValueError, match="kind"):
        guidance.soft_value_loss(PROCESS, zero, ALPHA, "hard")
    with pytest.raises(ValueError, match="temperature"):
        guidance.soft_value_loss(PROCESS, zero, 0.0)
