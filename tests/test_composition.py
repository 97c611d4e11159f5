"""Composed energies, the chains and particles that sample them, and starts that know the reward."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, oracles, processes, smc, solvers, steer
from diffjax.levels import Level

VP = processes.vp()
FIRST = oracles.mixture([0.3, 0.7], np.array([-1.0, 0.8]), [0.1, 0.15])
SECOND = oracles.mixture([0.5, 0.5], np.array([-0.6, 1.2]), [0.2, 0.1])
PRODUCT = smc.composed((FIRST.log_density, SECOND.log_density))
KEYS = jax.random.split(jax.random.key(4), 20_000)
DRAWS = jax.random.split(jax.random.key(5), 20_000)  # others than those of the kernels
POINTS = np.linspace(-6, 6, 6001)
LEVEL = VP.level(0.1)
ANCESTRAL = solvers.ancestral()
WIDE = solvers.ancestral(1.0)  # with the larger of its two variances: weights want proposals that are not too narrow


@pytest.fixture(autouse=True)
def double(x64):
    """All tests here run in float64."""


def _at(log_density, level):
    """Z, mean and variance at a level, by quadrature."""
    density = np.exp(np.asarray(jax.vmap(lambda x: log_density(x, level))(POINTS)))
    z = np.trapezoid(density, POINTS)
    mean = np.trapezoid(density * POINTS, POINTS) / z
    return z, mean, np.trapezoid(density * POINTS**2, POINTS) / z - mean**2


@pytest.mark.paper("Composition and Control with Distilled Energy Diffusion Models and Sequential Monte Carlo")
def test_particles_along_energies_are_unbiased_for_any_number_of_steps():
    """Z, and averages times Z, of a product and of a tempered density at the last level, after a dozen steps."""
    grid = grids.log_snr(VP, 12, start=0.6, stop=0.05, to_data=False)
    level = jax.tree.map(lambda leaf: leaf[-1], grid.s)
    for densities, weights in (((FIRST, SECOND), (1.0, 1.0)), ((FIRST, SECOND), (1.5, 0.0))):
        target = smc.composed(tuple(law.log_density for law in densities), weights)
        run = lambda key, target=target: smc.energy_smc(
            key, target, WIDE, grid, (), particles=8, threshold=0.7, dtype=jnp.float64
        )
        found = jax.jit(jax.vmap(run))(KEYS[:4000])
        z = np.exp(np.asarray(found.log_z))
        values = z * np.sum(np.asarray(jax.vmap(smc.normalised)(found.log_weights) * found.x), axis=1)
        exact = _at(target, level)
        for estimate, true in ((z, exact[0]), (values, exact[0] * exact[1])):
            assert abs(estimate.mean() - true) < 4 * estimate.std() / np.sqrt(4000), (estimate.mean(), true)
        assert 0 < found.resampled.mean() < 1


def test_a_density_that_ends_is_reported():
    """Where a composed density is 0 paths are lost: the first row that meets such a place has failed."""
    limited = lambda x, level: jnp.where(x > 0, FIRST.log_density(x, level), -jnp.inf)
    run = lambda key: smc.energy_smc(key, smc.composed((limited,)), WIDE, grids.log_snr(VP, 4), (), particles=16)
    assert (jax.vmap(run)(KEYS[:20]).failed_at == 0).mean() > 0.9


@pytest.mark.paper("Composition and Control with Distilled Energy Diffusion Models and Sequential Monte Carlo")
def test_a_distilled_energy_is_the_projection_on_gradients():
    """Of a linear field with a curl the symmetric part is left, where the loss has no slope."""
    level = Level(*(jnp.asarray(v) for v in (0.5, 0.8, 0.6, np.log(0.8 / 0.6))))
    matrix = np.array([[-1.0, 0.7, 0.2], [-0.3, -2.0, 0.5], [0.4, -0.1, -1.5]])
    denoise = lambda x, level: (x + level.sigma**2 * matrix @ x) / level.alpha
    energy = lambda flat: lambda x, level: 0.5 * x @ flat.reshape(3, 3) @ x
    points = np.concatenate([np.eye(3), -np.eye(3)])  # of covariance a third of I
    loss = lambda flat: jnp.mean(jax.vmap(lambda x: smc.distillation_loss(energy(flat), denoise, x, level))(points))
    symmetric, curl = (matrix + matrix.T) / 2, (matrix - matrix.T) / 2
    value, slope = jax.value_and_grad(loss)(symmetric.reshape(-1))
    np.testing.assert_allclose(slope, 0.0, atol=1e-12)
    np.testing.assert_allclose(value, 0.36 * np.sum(curl**2) / 3 / 3, rtol=1e-10)


def _drift(kernel, density, x):
    """What one move changes in averages of some functions, in standard errors of the change."""
    moved = jax.jit(jax.vmap(lambda key, x: kernel(key, x, density)))(KEYS[: len(x)], x)
    functions = (lambda x: x, lambda x: x**2, lambda x: x**4, lambda x: np.sin(3 * x))
    changes = [np.asarray(f(moved.x) - f(x)) for f in functions]
    return max(abs(c.mean()) / (c.std() / np.sqrt(c.size)) for c in changes), moved.acceptance.mean()


@pytest.mark.paper("Reduce, Reuse, Recycle: Compositional Generation with Energy-Based Diffusion Models and MCMC")
def test_adjusted_kernels_leave_the_density_as_it_is():
    """MALA and HMC with steps so large that the unadjusted ones are far off."""
    mixture = smc.composed((FIRST.log_density, SECOND.log_density), (0.4, 0.6), "mixture")
    density = lambda x: jax.value_and_grad(lambda x: mixture(x, LEVEL))(x)
    x = jax.vmap(lambda key: FIRST.sample(key, LEVEL, jnp.float64))(DRAWS)
    other = jax.vmap(lambda key: SECOND.sample(key, LEVEL, jnp.float64))(DRAWS)
    x = jnp.where(np.arange(len(KEYS)) < 0.4 * len(KEYS), x, other)
    for adjusted, unadjusted in ((smc.mala(0.15), smc.ula(0.15)), (smc.hmc(0.6, 3), smc.uhmc(0.6, 3))):
        off, acceptance = _drift(adjusted, density, x)
        assert off < 4.5 and 0.2 < acceptance < 0.95, (adjusted, off, acceptance)
        assert _drift(unadjusted, density, x)[0] > 8, unadjusted


@pytest.mark.paper("Reduce, Reuse, Recycle: Compositional Generation with Energy-Based Diffusion Models and MCMC")
def test_chains_at_every_level_mend_a_product():
    """The sum of scores alone makes another law; chains between its rows make the product's, also a negation's."""
    grid = grids.log_snr(VP, 24, start=0.8, stop=0.01, to_data=False)
    level = jax.tree.map(lambda leaf: leaf[-1], grid.s)
    target = smc.composed((FIRST.log_density, SECOND.log_density), (1.5, -0.4))
    exact, errors = _at(target, level)[1:], []
    for steps in (0, 4):
        run = lambda key, steps=steps: smc.annealed_mcmc(
            key, target, ANCESTRAL, grid, (), kernel=smc.hmc(0.5, 5), steps=steps, dtype=jnp.float64
        )
        found = jax.jit(jax.vmap(run))(KEYS[:4000])
        errors.append(abs(np.asarray(found.x).mean() - exact[0]) + abs(np.asarray(found.x).var() - exact[1]))
        assert (found.nfe == 24 * (1 + 6 * steps)).all() and (found.failed_at == -1).all()
    assert errors[1] < 0.5 * errors[0] and errors[0] > 0.05, errors
    assert 0.3 < found.acceptance.mean() < 1


@pytest.mark.paper("Ψ-Sampler: Initial Particle Sampling for SMC-Based Inference-Time Reward Alignment in Score Models")
def test_preconditioned_langevin_is_exact_in_any_dimension():
    """A normal prior and a linear reward: invariant. In 4096 dimensions it still moves where MALA does not."""
    s, slope = 1.3, 0.8
    tilt = lambda x: (slope * x, jnp.full_like(x, slope))
    x = slope * s**2 + s * jax.vmap(lambda key: jax.random.normal(key, (), jnp.float64))(DRAWS)
    kernel = lambda key, x, tilt: smc.pcnl(0.9)(key, x, tilt, s)
    assert _drift(kernel, tilt, x)[0] < 4.5
    wrong = lambda key, x, tilt: smc.pcnl(0.9)(key, x, tilt, 1.1 * s)
    assert _drift(wrong, tilt, x)[0] > 8
    x = jax.vmap(lambda key: jax.random.normal(key, (4096,), jnp.float64))(DRAWS[:32])
    bent = lambda x: jax.value_and_grad(lambda x: jnp.sin(x.sum() / 64))(x)
    full = lambda x: jax.value_and_grad(lambda x: jnp.sin(x.sum() / 64) - 0.5 * x @ x)(x)
    crank = jax.jit(jax.vmap(lambda key, x: smc.pcnl(0.5)(key, x, bent)))(KEYS[:32], x)
    langevin = jax.jit(jax.vmap(lambda key, x: smc.mala(0.25)(key, x, full)))(KEYS[:32], x)
    assert crank.acceptance.mean() > 0.7 and langevin.acceptance.mean() < 0.1


@pytest.mark.paper("Ψ-Sampler: Initial Particle Sampling for SMC-Based Inference-Time Reward Alignment in Score Models")
def test_twisted_starts_keep_the_target():
    """Particles that start from the prior times h: the same posterior mean, and log Z without the start's share."""
    law, grid = oracles.gaussian(0.5, 0.4), grids.log_snr(VP, 24, start=0.3)
    twist = smc.reward(lambda x0: 1.5 * x0)

    def run(key):
        started = smc.twisted_start(key, law, twist, grid, (), particles=64, steps=20, dtype=jnp.float64)
        options: Any = dict(particles=64, twist=twist, dtype=jnp.float64)
        twisted = steer(key, law, ANCESTRAL, grid, x=started.x, initial="twisted", **options)
        return started, twisted, steer(key, law, ANCESTRAL, grid, (), **options)

    started, twisted, plain = jax.jit(jax.vmap(run))(KEYS[:200])
    assert 0.5 < started.acceptance.mean() <= 1
    means = [np.sum(np.asarray(jax.vmap(smc.normalised)(f.log_weights) * f.x), axis=1) for f in (twisted, plain)]
    error = np.hypot(means[0].std(), means[1].std()) / np.sqrt(200)
    assert abs(means[0].mean() - means[1].mean()) < 4 * error + 0.01, (means[0].mean(), means[1].mean())
    assert twisted.ess[:, 0].mean() == 64 > plain.ess[:, 0].mean() + 5
    # the share of the start: log E exp(1.5 x0(x)) over x ~ N(0, sigma^2), x0 linear in x
    level = grid.start
    gain = 0.4 * level.alpha / (0.4 * level.alpha**2 + level.sigma**2)
    share = 1.5 * (0.5 - gain * 0.5 * level.alpha) + 0.5 * (1.5 * gain * level.sigma) ** 2
    z = [np.exp(np.asarray(f.log_z)) for f in (twisted, plain)]
    ratio = z[0].mean() * np.exp(share) / z[1].mean()
    assert abs(ratio - 1) < 4 * np.hypot(*(v.std() / v.mean() for v in z)) / np.sqrt(200)


def test_bad_input():
    for match, call in (
        ("kind", lambda: smc.composed((FIRST,), kind="sum")),
        ("weights", lambda: smc.composed((FIRST,), (1.0, 2.0))),
        ("weights", lambda: smc.composed((FIRST, SECOND), (1.5, -0.4), "mixture")),
        ("leaps", lambda: smc.hmc(0.1, 0)),
        ("step", lambda: smc.pcnl(5.0)),
        ("kernel", lambda: smc.energy_smc(KEYS[0], PRODUCT, solvers.ddim(), grids.log_snr(VP, 4), (), particles=2)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
