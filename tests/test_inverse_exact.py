"""The exact posterior against quadrature and Gaussian algebra, and the twist that is exact."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, guidance, inverse, oracles, processes, sample, solvers

PROCESS = processes.flow()
RNG = np.random.default_rng(3)
ROOTS = RNG.normal(size=(3, 3, 3))
PRIOR = oracles.mixture(
    np.array([0.5, 0.2, 0.3]), 2 * RNG.normal(size=(3, 3)), ROOTS @ ROOTS.swapaxes(1, 2) + 0.1 * np.eye(3)
)
DIAGONAL = oracles.mixture(np.array([0.4, 0.6]), RNG.normal(size=(2, 3)), np.array([0.7, 1.4]))
SEEN = inverse.measurement(inverse.matrix(RNG.normal(size=(2, 3))), np.array([0.8, -0.5]), 0.4)
X = np.array([0.6, -0.2, 1.1])


@pytest.mark.parametrize("prior", [PRIOR, DIAGONAL], ids=["full", "diagonal"])
def test_twist_posterior_and_evidence_are_bayes(prior, x64):
    """log p(y|x_t) = log p(x_t|y) - log p(x_t) + log p(y), at all levels and both ends; tilted, it is E[x_0|x_t, y]."""
    after, twist, log_y = inverse.posterior(prior, SEEN), inverse.exact(prior, SEEN), inverse.evidence(prior, SEEN)
    tilted = guidance.tilted(prior, twist)
    x = jnp.asarray(X)

    @jax.jit
    def both(level):
        bayes = after.log_density(x, level) - prior.log_density(x, level) + log_y
        return twist(prior, x, level), bayes, tilted(x, level), prior(x, level), after(x, level)

    for time in (0.05, 0.5, 0.95):
        (log_h, x0), bayes, shifted, plain, conditional = both(jax.tree.map(jnp.asarray, PROCESS.level(time)))
        np.testing.assert_allclose(log_h, bayes, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(x0, plain, rtol=1e-12)
        np.testing.assert_allclose(shifted, conditional, rtol=1e-10, atol=1e-10)
    ends = [both(jax.tree.map(jnp.asarray, PROCESS.level(time)))[0][0] for time in (0.0, 1.0)]
    np.testing.assert_allclose(ends, [SEEN.log_likelihood(x), log_y], rtol=1e-12)


def test_posterior_by_quadrature(x64):
    """Two dimensions, one observation: evidence, mean and covariance on a grid of a million points."""
    prior = oracles.mixture(np.array([0.3, 0.7]), np.array([[1.0, 0], [-1, 0.5]]), np.array([0.3, 0.6]))
    seen = inverse.measurement(inverse.matrix(np.array([[0.8, -0.6]])), np.array([0.4]), 0.3)
    line = np.linspace(-7, 7, 801)
    points = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    offset = points[:, None] - prior.means
    v = prior.variances[:, 0]
    density = (prior.weights / (2 * np.pi * v) * np.exp(-0.5 * (offset**2).sum(-1) / v)).sum(1)
    joint = density * np.exp(-0.5 * ((0.4 - points @ [0.8, -0.6]) / 0.3) ** 2) / (0.3 * np.sqrt(2 * np.pi))
    cell = (line[1] - line[0]) ** 2
    np.testing.assert_allclose(inverse.evidence(prior, seen), np.log(joint.sum() * cell), rtol=1e-9)
    after = inverse.posterior(prior, seen)
    share = joint / joint.sum()
    mean = share @ points
    np.testing.assert_allclose(after.weights @ after.means, mean, rtol=1e-9)
    spread = np.einsum("kde,ke,kfe->kdf", after.vectors, after.variances, after.vectors)
    second = np.einsum("k,kdf->df", after.weights, spread + after.means[:, :, None] * after.means[:, None])
    np.testing.assert_allclose(second, np.einsum("n,nd,nf->df", share, points, points), rtol=1e-8, atol=1e-9)


def test_gaussian_without_noise_and_without_information(x64):
    """An exact y is met; A = 0 returns the prior; both keep the oracle's kind and shape."""
    root = RNG.normal(size=(6, 6))
    prior = oracles.gaussian(RNG.normal(size=(2, 3)), root @ root.T)
    seen = inverse.measurement(inverse.downsample(2, (2, 3), axes=1), np.array([[0.3, -1.0, 2.0]]), 0.0)
    after = inverse.posterior(prior, seen)
    np.testing.assert_allclose(seen.operator(jnp.asarray(after.mean)), seen.y, atol=1e-10)
    draws = jax.vmap(lambda k: after.sample(k, dtype=jnp.float64))(jax.random.split(jax.random.key(0), 5))
    np.testing.assert_allclose(jax.vmap(seen.operator)(draws), np.broadcast_to(seen.y, (5, 1, 3)), atol=1e-6)
    nothing = inverse.measurement(inverse.matrix(np.zeros((1, 6)), (2, 3)), np.zeros(1), 0.5)
    same = inverse.posterior(prior, nothing)
    np.testing.assert_allclose(same.mean, prior.mean)
    np.testing.assert_allclose(same.vectors @ np.diag(same.variances) @ same.vectors.T, root @ root.T, atol=1e-12)
    np.testing.assert_allclose(inverse.evidence(prior, nothing), -0.5 * np.log(2 * np.pi * 0.25), rtol=1e-12)


def test_tilted_is_a_denoiser_everywhere():
    """jit, vmap, gradients, scale 0 and 1, both ends, evaluations, and a sampler."""
    twist = inverse.exact(DIAGONAL, SEEN)
    guided = guidance.tilted(DIAGONAL, twist)
    x = jnp.asarray(X, jnp.float32)
    both = jax.jit(lambda guided, level: (guided(x, level), DIAGONAL(x, level)))
    for time, scale in ((0.0, 1.0), (1.0, 1.0), (0.4, 0.0)):
        out, plain = both(dataclasses.replace(guided, scale=scale), jax.tree.map(jnp.float32, PROCESS.level(time)))
        np.testing.assert_allclose(out, plain, rtol=1e-6)
    grid = grids.uniform(PROCESS, 3)
    run = lambda key: sample(key, guided, solvers.ddim(), grid, shape=(3,))
    out = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 2))
    assert np.all(np.isfinite(out.x)) and out.nfe.tolist() == [3, 3]


def test_refusals():
    class Memory:
        init = apply = staticmethod(lambda *a: a)

    with pytest.raises(ValueError, match="remembers"):
        guidance.tilted(Memory(), inverse.exact(PRIOR, SEEN))
    with pytest.raises(ValueError, match="scale"):
        guidance.tilted(PRIOR, inverse.exact(PRIOR, SEEN), np.inf)
    with pytest.raises(ValueError, match="prior"):
        inverse.posterior(oracles.points(np.zeros((2, 3))), SEEN)
    with pytest.raises(ValueError, match="linear"):
        inverse.posterior(PRIOR, inverse.measurement(inverse.hdr((3,)), np.zeros(3)))
    with pytest.raises(ValueError, match="Gaussian noise"):
        inverse.posterior(PRIOR, inverse.measurement(inverse.identity((3,)), np.zeros(3), inverse.poisson_noise()))
    with pytest.raises(ValueError, match="acts on"):
        inverse.evidence(PRIOR, inverse.measurement(inverse.identity((2,)), np.zeros(2)))
