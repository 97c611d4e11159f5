"""Active selection and Thompson sampling where the optimal design and the posterior are closed form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, guidance, inverse, oracles, processes, sample, solvers

PROCESS = processes.flow()
GRID = grids.uniform(PROCESS, 4)
DDIM = solvers.ddim()
# entry 1 varies the most but entry 0; 0 tells nearly all about 1, so that 2 is the best second measurement
COVARIANCE = np.array([[9.0, 5.8, 0.0], [5.8, 4.0, 0.0], [0.0, 0.0, 1.0]])
PRIOR = oracles.gaussian(np.zeros(3), COVARIANCE)
TRUTH = jnp.array([3.5, 2.0, -1.2])


def greedy(covariance, std, count):
    """The order of the largest variances given what was measured before, in float64."""
    order, c = [], covariance.copy()
    for _ in range(count):
        index = int(np.argmax([c[i, i] if i not in order else -1 for i in range(len(c))]))
        order.append(index)
        c = c - np.outer(c[index], c[index]) / (c[index, index] + std**2)
    return order, c


@pytest.mark.paper("Active Diffusion Subsampling")
def test_the_entropy_is_that_of_the_formula():
    """Against loops; 0 and log P in the limits."""
    y, s = np.random.default_rng(0).normal(size=(5, 2)), 0.7
    for m in range(2):
        sums = [np.mean([np.exp(-((a - b) ** 2) / (2 * s**2)) for b in y[:, m]]) for a in y[:, m]]
        np.testing.assert_allclose(inverse.predicted_entropy(jnp.asarray(y), s)[m], -np.mean(np.log(sums)), rtol=1e-5)
    np.testing.assert_allclose(inverse.predicted_entropy(jnp.asarray(y), 1e-4), np.log(5), rtol=1e-5)
    np.testing.assert_allclose(inverse.predicted_entropy(jnp.zeros((5, 2)), s), 0.0, atol=1e-6)


@pytest.mark.paper("Active Diffusion Subsampling")
def test_active_measures_as_the_optimal_design_and_ends_at_the_posterior():
    """Which entries for eight keys, and the particles' moments, against the greedy design of the Gaussian."""
    std, grid, keys = 0.3, grids.uniform(PROCESS, 24), jax.random.split(jax.random.key(3), 8)

    def run(key):
        reveal = lambda index: TRUTH[index]
        solver = solvers.sde_dpmpp()
        return inverse.active(key, PRIOR, solver, grid, reveal, (3,), std=std, at=(3, 6), particles=64, spread=1.0)

    out = jax.jit(jax.vmap(run))(keys)
    order, covariance = greedy(COVARIANCE, std, 2)
    assert order == [0, 2]
    assert [o.tolist() for o in out.order] == [order] * 8
    assert out.seen[0].tolist() == [1, 0, 1] and out.failed_at.tolist() == [-1] * 8
    assert out.nfe.tolist() == [64 * (24 * solvers.sde_dpmpp().calls + 2)] * 8
    seen = inverse.measurement(inverse.mask(np.array([True, False, True])), np.array([3.5, -1.2]), std)
    after, x = inverse.posterior(PRIOR, seen), np.asarray(out.x).reshape(-1, 3)
    # four standard errors of 512 particles, and what the first quarter of the path, which did not know, leaves
    np.testing.assert_array_less(np.abs(x.mean(axis=0) - after.mean) / np.sqrt(np.diag(covariance)), 0.18 + 0.07)


@pytest.mark.paper("Thompson Sampling with Diffusion Generative Prior")
def test_mixed_observation_is_exact_for_independent_entries(x64):
    """E[x_0 | x_t, y] of the Gaussian posterior at several levels, and unseen entries untouched."""
    prior = oracles.gaussian(np.array([0.3, -0.2, 1.0]), np.array([0.5, 2.0, 1.0]))
    seen = inverse.measurement(inverse.diagonal(np.array([1.0, 0.7, 0.0])), np.array([1.1, -0.4, 0.0]), 0.3)
    v = np.array([0.5, 2.0, 1.0])
    spread = lambda level: level.sigma**2 * v / (level.sigma**2 + level.alpha**2 * v)
    mixed, after = inverse.mixed_observation(prior, seen, spread), inverse.posterior(prior, seen)
    x = jnp.array([0.2, 1.4, -0.7])
    for time in (0.1, 0.5, 0.9):
        level = PROCESS.level(time)
        np.testing.assert_allclose(mixed(x, level), after(x, level), rtol=1e-10)


@pytest.mark.paper("Thompson Sampling with Diffusion Generative Prior")
def test_thompson_draws_from_the_posterior_and_a_prior_that_knows_regrets_less():
    """Two kinds of tasks, which the mixture prior knows and independent Gaussians do not.

    The draw's moments after a reward are those of the exact posterior.
    """
    means, std, arms = np.array([[1.0, 0.0, 0.2, -1.0], [-1.0, 0.2, 0.0, 1.0]]), 1.0, 4
    kinds = oracles.mixture(np.ones(2), means, np.full(2, 0.01))
    covariance = 0.01 * np.eye(arms) + np.cov(means.T, bias=True)
    moments = oracles.gaussian(means.mean(axis=0), np.diag(np.diag(covariance)))
    grid = grids.uniform(PROCESS, 12, start=0.98)

    def draw(prior):
        def one(key, seen):
            guided = guidance.tilted(prior, inverse.mmps(seen))
            return sample(key, guided, solvers.sde_dpmpp(), grid, shape=(arms,)).x

        return one

    def regret(key, prior):
        task = jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 1)), means[0], means[1])
        pull = lambda key, arm: task[arm] + std * jax.random.normal(key)
        out = inverse.thompson(key, draw(prior), pull, arms, 20, std=std)
        return jnp.sum(jnp.max(task) - task[out.arms]), out

    keys = jax.random.split(jax.random.key(0), 48)
    (first, out), (second, _) = (jax.jit(jax.vmap(regret, (0, None)))(keys, prior) for prior in (kinds, moments))
    assert out.arms.shape == (48, 20) and out.arms.dtype == jnp.int32
    gap = np.asarray(second - first)
    assert np.mean(gap) > 4 * np.std(gap) / np.sqrt(len(gap))
    counts = np.array([2.0, 0.0, 1.0, 0.0])
    seen = inverse.measurement(inverse.diagonal(np.sqrt(counts) / std), np.array([0.9, 0.0, -0.3, 0.0]), 1.0)
    draws = jax.jit(jax.vmap(draw(moments), (0, None)))(jax.random.split(jax.random.key(2), 2000), seen)
    after = inverse.posterior(moments, seen)
    error = np.sqrt(after.variances / 2000)
    np.testing.assert_array_less(np.abs(np.mean(draws, axis=0) - after.mean), 4 * error + 0.02)


@pytest.mark.paper("Thompson Sampling with Diffusion Generative Prior")
def test_thompson_measures_the_mean_rewards():
    """What a draw is told about the arms, replayed in float64: posterior means under N(0, I), without exploration."""
    table, std = np.array([0.1, 0.05, 0.3]), 2.0

    def draw(key, seen):
        w = seen.operator.weights
        return w * seen.y / (1 + w**2) + jnp.array([0.5, 0.3, 0.2]) / (1 + w**2)  # as N((0.5, 0.3, 0.2), I)

    pull = lambda key, arm: jnp.asarray(table)[arm]
    out = inverse.thompson(jax.random.key(0), draw, pull, 3, 8, std=std)
    counts, arms = np.zeros(3), []
    for _ in range(8):
        precision = 1 + counts / std**2
        arms.append(int(np.argmax(([0.5, 0.3, 0.2] + counts * table / std**2) / precision)))
        counts[arms[-1]] += 1
    assert out.arms.tolist() == arms
    np.testing.assert_allclose(out.rewards, table[arms], rtol=1e-6)
    assert len(set(arms)) > 1


@pytest.mark.parametrize(
    "wrong, name",
    [
        (lambda: inverse.active(None, PRIOR, DDIM, GRID, jnp.sum, (3,), std=1.0, at=(2, 1)), "at must"),
        (lambda: inverse.active(None, PRIOR, DDIM, GRID, jnp.sum, (3,), std=-1.0, at=(1,)), "std"),
        (
            lambda: inverse.active(None, PRIOR, DDIM, GRID, jnp.sum, (3,), std=1.0, at=(1,), particles=1),
            "particles",
        ),
        (lambda: inverse.thompson(None, jnp.sum, jnp.sum, 0, 3, std=1.0), "arms"),
        (
            lambda: inverse.mixed_observation(
                PRIOR, inverse.measurement(inverse.mask(np.ones(3, bool)), np.zeros(3)), None
            ),
            "diagonal",
        ),
    ],
)
def test_bad_input(wrong, name):
    with pytest.raises(ValueError, match=name):
        wrong()
