"""D-Flow, learned priors and ensembles against closed forms of Gaussian data."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, guidance, inverse, oracles, processes, sample, solvers

PROCESS = processes.flow()
RNG = np.random.default_rng(4)
MEAN, VARIANCES = np.array([0.5, -1.0, 0.2]), np.array([0.4, 1.7, 3.0])
A = RNG.normal(size=(2, 3))
PRIOR = oracles.gaussian(MEAN, VARIANCES)
SEEN = inverse.measurement(inverse.matrix(A), np.array([0.8, -0.5]), 0.4)
GRID = grids.uniform(PROCESS, 12)


def ddim_map(grid):
    """The end of DDIM's steps is ``offset + slope z``, entry by entry, by its update in float64."""
    slope, offset = np.ones(3), np.zeros(3)
    for t, alpha, s, beta in zip(grid.t.sigma, grid.t.alpha, grid.s.sigma, grid.s.alpha, strict=True):
        gain = alpha * VARIANCES / (alpha**2 * VARIANCES + t**2)
        keep, pull = s / t, beta - alpha * s / t
        slope = (keep + pull * gain) * slope
        offset = (keep + pull * gain) * offset + pull * (MEAN - gain * alpha * MEAN)
    return slope, offset


@pytest.mark.paper("D-Flow: Differentiating through Flows for Controlled Generation")
def test_d_flow_finds_the_mode_of_the_noise(x64):
    """With penalty 1 the posterior mean of N(offset, slope^2); without, a noise that meets y, nearest to the start."""
    slope, offset = ddim_map(GRID)
    y, cost = np.array([0.8, -0.5]), lambda x: -SEEN.log_likelihood(x)
    start = jnp.asarray(RNG.normal(size=3))
    run = jax.jit(lambda x, p: inverse.d_flow(PRIOR, solvers.ddim(), GRID, x, cost, iterations=20, penalty=p))
    out = run(start, 1.0)
    reached = A * slope
    z = np.linalg.solve(reached.T @ reached / 0.16 + np.eye(3), reached.T @ (y - A @ offset) / 0.16)
    np.testing.assert_allclose(out.noise, z, atol=1e-7)
    np.testing.assert_allclose(out.x, offset + slope * z, atol=1e-7)
    after = inverse.posterior(oracles.gaussian(offset, slope**2), SEEN)
    np.testing.assert_allclose(out.x, after.mean, atol=1e-7)
    assert np.all(np.diff(out.costs) <= 1e-9) and int(out.nfe) == 12 * 41
    free = run(start, 0.0)
    np.testing.assert_allclose(A @ free.x, y, atol=1e-6)


def observations(count):
    """x ~ N(m, C) seen through random unit vectors."""
    rng = np.random.default_rng(8)
    covariance = np.array([[1.0, 0.7], [0.7, 1.0]])
    x = rng.multivariate_normal([1.0, -0.5], covariance, size=count)
    rows = rng.normal(size=(count, 2))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return covariance, rows, np.sum(rows * x, axis=1) + 0.1 * rng.normal(size=count)


def exact_em(mean, covariance, rows, y):
    """A round of EM by its expected sufficient statistics, and the log-likelihood before it."""
    seen = np.einsum("ni,ij,nj->n", rows, covariance, rows) + 0.01
    gains = rows @ covariance / seen[:, None]
    means = mean + gains * (y - rows @ mean)[:, None]
    covariances = covariance - np.einsum("ni,nj->nij", gains, rows @ covariance)
    after = means.mean(axis=0)
    spread = np.mean(covariances, axis=0) + np.cov(means.T, bias=True)
    return after, spread, -0.5 * np.sum((y - rows @ mean) ** 2 / seen + np.log(seen))


@pytest.mark.paper("Learning Diffusion Priors from Observations by Expectation Maximization")
def test_em_learns_a_gaussian_prior_from_projections():
    """Every round is the closed form's from where the last one ended, the likelihood rises, the truth comes near."""
    count, rounds, grid = 1024, 4, grids.uniform(PROCESS, 16)
    covariance, rows, y = observations(count)
    lines, values = jnp.asarray(rows, jnp.float32)[:, None], jnp.asarray(y, jnp.float32)[:, None]

    def seen(index):
        line = lines[index]
        return inverse.measurement(inverse.linear(lambda x: line @ x, (2,)), values[index], 0.1)

    def draw(key, prior, seen):
        return sample(key, guidance.tilted(prior, inverse.mmps(seen)), solvers.sde_dpmpp(), grid, shape=(2,)).x

    path = [oracles.gaussian(np.zeros(2), 0.5 * np.array([[2.0, 0.1], [0.1, 2.0]]))]

    def fit(key, prior, samples):
        path.append(inverse.fit_gaussian(key, prior, samples))
        return path[-1]

    last, samples = inverse.expectation_maximisation(jax.random.key(1), path[0], seen, count, draw, fit, rounds)
    assert samples.shape == (count, 2) and last is path[-1]
    vectors = [np.asarray(p.vectors) for p in path]
    moments = [(p.mean, (v * p.variances) @ v.T) for p, v in zip(path, vectors, strict=True)]
    likelihoods = []
    for (mean, before), (new_mean, new) in itertools.pairwise(moments):
        expected_mean, expected, likelihood = exact_em(mean, before, rows, y)
        likelihoods.append(likelihood)
        error = np.sqrt(np.diag(expected) / count)  # of the draws
        assert np.all(np.abs(new_mean - expected_mean) < 4 * error + 0.01)
        assert np.all(np.abs(new - expected) < 4 * np.sqrt(2 / count) * np.max(np.diag(expected)))
    assert np.all(np.diff(likelihoods) > 0)
    gaps = [np.max(np.abs(c - covariance)) for _, c in moments]
    assert gaps[-1] < 0.5 * gaps[0]


@pytest.mark.paper("Ensemble Kalman Diffusion Guidance: A Derivative-free Method for Inverse Problems")
def test_the_ensemble_update_is_kalmans_and_a_preconditioned_gradient(x64):
    """Against formulas with the ensemble's own covariances."""
    x, variance, y = RNG.normal(size=(7, 3)), np.array([0.2, 0.5]), np.array([0.8, -0.5])
    c = np.cov(x.T, bias=True)
    gain = c @ A.T @ np.linalg.inv(A @ c @ A.T + np.diag(variance))
    args = jnp.asarray(x), jnp.asarray(x @ A.T), jnp.asarray(y), jnp.asarray(variance)
    np.testing.assert_allclose(inverse.ensemble_update(*args), x + (y - x @ A.T) @ gain.T, rtol=1e-10)
    slopes = ((y - x @ A.T) / variance) @ A @ c
    moved = np.asarray(inverse.ensemble_update(*args, 0.3)) - x
    ratio = moved / slopes
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-9)
    assert ratio[0, 0] > 0
    weights = ((y - x @ A.T) / variance) @ (x @ A.T - (x @ A.T).mean(axis=0)).T / 7
    np.testing.assert_allclose(ratio[0, 0], 0.3 / np.linalg.norm(weights), rtol=1e-9)


@pytest.mark.paper("Ensemble Kalman Diffusion Guidance: A Derivative-free Method for Inverse Problems")
def test_enkg_needs_no_derivative():
    """An operator whose derivative is 0 everywhere is met to its own resolution; without moves it is the solver."""
    rounded = inverse.nonlinear(lambda x: jnp.round(50 * (x[:2] + 0.3 * x[1:] ** 2)) / 50, (3,))
    y, grid = jnp.array([1.4, 0.6]), grids.uniform(PROCESS, 16, start=0.95)
    seen = inverse.measurement(rounded, y, 0.1)
    run = jax.jit(
        lambda step: inverse.enkg(jax.random.key(0), PRIOR, seen, grid, (3,), particles=48, step=step, steps=2)
    )
    out, plain = run(1.0), run(0.0)
    misfit = lambda x: float(jnp.sqrt(jnp.mean((jax.vmap(rounded)(x) - y) ** 2)))
    assert out.x.shape == (48, 3) and int(out.failed_at) == -1 and int(out.nfe) == 48 * 16 * (1 + 2)
    assert misfit(plain.x) > 1.0 and misfit(out.x) < 0.25 * misfit(plain.x)


@pytest.mark.parametrize(
    "wrong, name",
    [
        (lambda: inverse.d_flow(PRIOR, solvers.ddim(eta=1.0), GRID, np.zeros(3), jnp.sum), "without noise"),
        (lambda: inverse.d_flow(PRIOR, solvers.ddim(), GRID, np.zeros(3), jnp.sum, penalty=-1.0), "penalty"),
        (lambda: inverse.d_flow(PRIOR, solvers.ddim(), GRID, np.zeros(3), jnp.sum, iterations=0), "iterations"),
        (lambda: inverse.enkg(None, PRIOR, SEEN, GRID, (3,)), "alpha > 0"),
        (lambda: inverse.enkg(None, PRIOR, SEEN, GRID, (3,), particles=1), "particles"),
        (lambda: inverse.expectation_maximisation(None, PRIOR, jnp.sum, 3, jnp.sum, jnp.sum, 0), "rounds"),
    ],
)
def test_bad_input(wrong, name):
    with pytest.raises(ValueError, match=name):
        wrong()
