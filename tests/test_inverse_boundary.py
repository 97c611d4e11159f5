"""One starting noise for all inputs: against the closed form of Gaussian posteriors, and on a mixture."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, inverse, oracles, processes, sample, solvers
from diffjax.levels import value
from diffjax.oracles.mixture import Mixture

PROCESS = processes.flow()
SIZE, SEEN, NOISE = 4, 2, 0.2
RNG = np.random.default_rng(3)
A = RNG.normal(size=(SEEN, SIZE)) / np.sqrt(SIZE)
ROOT = RNG.normal(size=(SIZE, SIZE))
MEAN, COVARIANCE = RNG.normal(size=SIZE), ROOT @ ROOT.T / SIZE + 0.1 * np.eye(SIZE)


@value
class Conditional:
    """E[x_0 | x_t, y] for a Gaussian mixture prior of K components, y = A x + noise: ``model(y)`` is a denoiser."""

    base: Any  # mixture oracle of the posterior at y = 0
    gains: Any  # (K, D, M)
    precisions: Any  # (K, M, M) of y
    means: Any  # (K, M) of y
    logs: Any  # (K,)

    def __call__(self, y):
        gap = y - self.means
        logs = self.logs - 0.5 * jnp.einsum("km,kmn,kn->k", gap, self.precisions, gap)
        shifted = self.base.means + jnp.einsum("kdm,m->kd", self.gains, y)
        return Mixture(jax.nn.softmax(logs), shifted, self.base.variances, self.base.vectors)


def conditional(weights, means, covariances):
    """The exact conditional model, all numbers that do not depend on y made in float64."""
    gains, precisions, after, shifted, logs = [], [], [], [], []
    for weight, mean, covariance in zip(weights, means, covariances, strict=True):
        total = A @ covariance @ A.T + NOISE**2 * np.eye(SEEN)
        gain = covariance @ A.T @ np.linalg.inv(total)
        gains.append(gain)
        precisions.append(np.linalg.inv(total))
        after.append(covariance - gain @ A @ covariance)
        shifted.append(mean - gain @ A @ mean)
        logs.append(np.log(weight) - 0.5 * np.linalg.slogdet(total)[1])
    base = oracles.mixture(weights, np.stack(shifted), np.stack([0.5 * (c + c.T) for c in after]))
    return Conditional(base, np.stack(gains), np.stack(precisions), np.stack(means) @ A.T, np.array(logs))


def pairs(rng, weights, means, covariances, count):
    """Clean samples and what is seen of them."""
    which = rng.choice(len(weights), size=count, p=weights)
    x = np.stack([rng.multivariate_normal(means[k], covariances[k]) for k in which])
    return x, x @ A.T + NOISE * rng.normal(size=(count, SEEN))


def sampler(model, steps):
    grid = grids.uniform(PROCESS, steps)
    return lambda x, y: sample(jax.random.key(0), model(y), solvers.ddim(), grid, x=x).x


def ddim_map(after, steps):
    """DDIM's steps as ``offset + M z`` for a Gaussian of the covariance ``after``: (M, N) with offset = N mean."""
    grid, eye = grids.uniform(PROCESS, steps), np.eye(SIZE)
    slope, centre = eye, np.zeros((SIZE, SIZE))
    for t, alpha, s, beta in zip(grid.t.sigma, grid.t.alpha, grid.s.sigma, grid.s.alpha, strict=True):
        gain = alpha * after @ np.linalg.inv(alpha**2 * after + t**2 * eye)
        keep, pull = s / t, beta - alpha * s / t
        slope, centre = (keep * eye + pull * gain) @ slope, keep * centre + pull * (gain @ centre + eye - alpha * gain)
    return slope, centre


def test_the_cost_of_every_candidate_is_the_closed_form(x64):
    """Gaussian posteriors: costs to 1e-9, and nothing is better than M^+ mean (x - offset) on the same pairs."""
    law = [1.0], [MEAN], [COVARIANCE]
    model, rng = conditional(*law), np.random.default_rng(0)
    x, y = pairs(rng, *law, 12)
    gain = np.asarray(model.gains)[0]
    after = COVARIANCE - gain @ A @ COVARIANCE
    slope, centre = ddim_map(after, 7)
    offset = (MEAN + (y - MEAN @ A.T) @ gain.T) @ centre.T
    optimum = np.linalg.solve(slope, np.mean(x - offset, axis=0))
    candidates = np.concatenate([rng.normal(size=(40, SIZE)), optimum[None]])
    found = inverse.best_boundary(sampler(model, 7), candidates, y, x)
    expected = [np.mean((offset + slope @ z - x) ** 2) for z in candidates]
    np.testing.assert_allclose(found.costs, expected, rtol=1e-9)
    assert int(found.index) == 40
    np.testing.assert_array_equal(found.x, optimum)
    # a part at a time, and another distance
    absolute = lambda a, b: jnp.max(jnp.abs(a - b))
    parts = inverse.best_boundary(sampler(model, 7), candidates[:10], y, x, distance=absolute, batch=4)
    expected = [np.mean(np.max(np.abs(offset + slope @ z - x), axis=1)) for z in candidates[:10]]
    np.testing.assert_allclose(parts.costs, expected, rtol=1e-9)
    assert int(parts.index) == np.argmin(expected)


@pytest.mark.paper("Solving Diffusion ODEs with Optimal Boundary Conditions for Better Image Super-Resolution")
@pytest.mark.parametrize("steps", [5, 20])
def test_one_noise_serves_inputs_it_was_not_chosen_on(steps):
    """A mixture of two: on other pairs its error is below that of random noise, by more than 4 standard errors.

    It lies between those of a random noise and of the posterior mean, which is the least.
    """
    law = [0.4, 0.6], [MEAN, -MEAN], [COVARIANCE, 0.5 * COVARIANCE]
    model, rng = conditional(*law), np.random.default_rng(1)
    candidates = jnp.asarray(rng.normal(size=(128, SIZE)), jnp.float32)
    x, y = (jnp.asarray(part, jnp.float32) for part in pairs(rng, *law, 24))
    run = sampler(model, steps)
    found = inverse.best_boundary(run, candidates, y, x)
    clean, seen = (jnp.asarray(part, jnp.float32) for part in pairs(rng, *law, 400))
    error = lambda z: jax.vmap(lambda y, c: jnp.mean((run(z, y) - c) ** 2))(seen, clean)
    fresh = jnp.asarray(rng.normal(size=(64, SIZE)), jnp.float32)
    chosen, random = jax.jit(lambda: (error(found.x), jnp.mean(jax.vmap(error)(fresh), axis=0)))()
    gap = np.asarray(random - chosen)
    assert gap.mean() > 4 * gap.std() / 20
    mean = jax.vmap(lambda y: model(y).weights @ model(y).means)(seen)
    least = np.mean((mean - clean) ** 2, axis=1)
    assert chosen.mean() > least.mean()


def test_refusals():
    run, three, two = (lambda x, y: x + y), np.zeros(3), np.zeros(2)
    with pytest.raises(ValueError, match="references must be as many"):
        inverse.best_boundary(run, three, three, two)
    with pytest.raises(ValueError, match="candidates need one leading axis"):
        inverse.best_boundary(run, {"a": three, "b": two}, three, three)
    with pytest.raises(ValueError, match="batch"):
        inverse.best_boundary(run, three, three, three, batch=0)
