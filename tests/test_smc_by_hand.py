"""Parts of particle methods by hand where tests of laws cannot tell: proposals, softened rewards, quotas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, oracles, processes, smc, solvers

VP = processes.vp()
LAW = oracles.gaussian(np.zeros(2), np.ones(2))


@pytest.mark.paper("Ψ-Sampler: Initial Particle Sampling for SMC-Based Inference-Time Reward Alignment in Score Models")
def test_the_proposal_of_preconditioned_langevin(x64):
    """``rho x + sqrt(1 - rho^2) s (z + sqrt(h) s grad f / 2)``, and the ratio of Metropolis with Gaussian densities.

    An adjusted kernel is exact whatever it proposes, so that a wrong proposal shows in its acceptance only.
    """
    h, s, x = 0.7, 1.6, np.array([0.4, -1.1])
    tilt = lambda x: (jnp.sin(x).sum(), jnp.cos(x))
    f, slope = (lambda x: np.sin(x).sum()), np.cos
    rho = (1 - h / 4) / (1 + h / 4)
    width = np.sqrt(1 - rho**2) * s
    mean = lambda x: rho * x + width * 0.5 * np.sqrt(h) * s * slope(x)
    kernel = jax.jit(jax.vmap(lambda key: smc.pcnl(h)(key, jnp.asarray(x), tilt, s)))
    moved = kernel(jax.random.split(jax.random.key(0), 4000))
    proposed = np.asarray(moved.x)[np.any(np.asarray(moved.x) != x, axis=1)]
    log_target = lambda x: f(x) - 0.5 * np.sum(x**2) / s**2
    log_q = lambda new, old: -0.5 * np.sum((new - mean(old)) ** 2) / width**2
    ratios = [log_target(new) - log_target(x) + log_q(x, new) - log_q(new, x) for new in proposed]
    accepted = np.asarray(moved.acceptance)[np.any(np.asarray(moved.x) != x, axis=1)]
    np.testing.assert_allclose(accepted, np.minimum(np.exp(ratios), 1), rtol=1e-9)
    # weighted by one over their acceptance the accepted ones are the proposals
    weights = 1 / accepted
    share = weights / weights.sum()
    error = np.sqrt(share**2 @ (proposed - mean(x)) ** 2)
    assert np.all(np.abs(share @ proposed - mean(x)) < 4 * error)
    assert np.all(np.abs(np.sqrt(share @ (proposed - mean(x)) ** 2) / width - 1) < 4 / np.sqrt(proposed.shape[0]))


def test_a_softened_reward():
    """``temper scale reward`` on the way, all of it at the data, and no NaN where temper 0 meets a reward of -inf."""
    twist = smc.reward(
        lambda x0: jnp.where(x0[0] > 0, x0.sum(), -jnp.inf), 3.0, lambda level: jnp.where(level.time > 0.5, 0.0, 0.4)
    )
    x, below = jnp.array([0.8, 0.5]), jnp.array([-0.8, 0.5])
    levels = [jax.tree.map(jnp.float32, VP.level(t)) for t in (0.0, 0.3, 0.9)]
    found = [[float(twist(LAW, state, level)[0]) for level in levels] for state in (x, below)]
    middle = 0.4 * 3 * float(LAW(x, levels[1]).sum())
    np.testing.assert_allclose(found[0], [3 * 1.3, middle, 0.0], rtol=1e-5)
    assert found[1] == [-np.inf, -np.inf, 0.0]


@pytest.mark.paper("Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget Forcing")
def test_quotas_roll_over():
    """Equal rewards are no improvement: all of each quota, but for the last row's single candidate."""
    grid = grids.log_snr(VP, 6)
    run = lambda key, reward, budget: smc.rollover(
        key, LAW, solvers.ancestral(), grid, (2,), reward=reward, budget=budget
    )
    same = lambda x0: jnp.zeros(())
    assert [int(run(jax.random.key(0), same, budget).nfe) for budget in (6, 27)] == [7, 1 + 27 - (27 // 6) + 1]
    found = jax.jit(jax.vmap(lambda key: run(key, lambda x0: x0[0], 27)))(jax.random.split(jax.random.key(1), 50))
    assert (found.nfe <= 28).all() and (found.nfe >= 7).all() and len(np.unique(found.nfe)) > 1
