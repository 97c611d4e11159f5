"""Steps and samplers for inverse problems against their formulas in NumPy, noise and levels included."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.linalg import expm

from diffjax import grids, inverse, oracles, processes, solvers
from diffjax.inverse.splitting import inner_grid
from diffjax.inverse.steps import oscillator
from diffjax.inverse.variational import adam

FLOW = processes.flow()
A = np.random.default_rng(5).normal(size=(2, 3))
Y = np.array([0.8, -0.5])
SEEN = inverse.measurement(inverse.matrix(A), Y, 0.4)
KNOWN, RANGE = np.linalg.pinv(A) @ Y, np.linalg.pinv(A) @ A
PRIOR = oracles.gaussian(np.array([0.5, -1.0, 0.2]), np.diag([0.4, 1.7, 3.0]))
X = np.array([0.6, -0.2, 1.1])


@pytest.fixture(autouse=True)
def double(x64):
    """All tests here run in float64."""


def step(solver, draws=(), t=0.6, s=0.4):
    row = jax.tree.map(lambda leaf: np.asarray(leaf)[0], solver.plan(grids.times(FLOW, [t, s])))
    x = jnp.asarray(X)
    return np.asarray(solver.step(tuple(map(jnp.asarray, draws)), PRIOR, x, solver.init(x), row)[0])


def ddim(x, x0, t=0.6, s=0.4):
    return s / t * x + ((1 - s) - (1 - t) * s / t) * x0


def test_mcg_projects_on_the_measurement_noised_to_the_level_of_the_step():
    """``x_s + A^+ A (alpha_s A^+ y + sigma_s z - x_s)`` after the step of `dps`."""
    z = np.array([0.3, -1.2, 0.7])
    moved = step(inverse.dps(solvers.ddim(), SEEN, 0.3))
    expected = moved + RANGE @ (0.6 * KNOWN + 0.4 * z - moved)
    np.testing.assert_allclose(step(inverse.mcg(solvers.ddim(), SEEN, 0.3), (z,)), expected, rtol=1e-10)


def test_lanpaint_moves_by_its_oscillator_around_the_doubly_drawn_centre():
    """One inner step, an oscillator around alpha (x0 + (1 + strength) (A^+ y - A^+ A x0)), then the solver's."""
    strength, friction, size = 0.7, 1.5, 0.4
    v, z, w = np.array([[0.4, -0.3, 1.0], [-0.8, 0.1, 0.5], [0.2, 0.9, -0.6]])
    x0 = np.asarray(PRIOR(jnp.asarray(X), FLOW.level(0.6)))
    centre = 0.4 * (x0 + (1 + strength) * (KNOWN - RANGE @ x0)) / 0.6
    power = expm(size * np.array([[0.0, 1.0], [-1.0, -friction]]))
    root = np.linalg.cholesky(np.eye(2) - power @ power.T)
    u = power[0, 0] * (X / 0.6 - centre) + power[0, 1] * v + root[0, 0] * z
    x = 0.6 * (u + centre)
    x0 = np.asarray(PRIOR(jnp.asarray(x), FLOW.level(0.6)))
    expected = ddim(x, x0 + KNOWN - RANGE @ x0)
    solver = inverse.lanpaint(solvers.ddim(), SEEN, 1, strength, friction, size)
    np.testing.assert_allclose(step(solver, (v, z, w)), expected, rtol=1e-9)
    np.testing.assert_allclose(oscillator(friction, size)[1], root, atol=1e-10)


@pytest.mark.parametrize("name", ["replacement", "ilvr"])
def test_the_measured_part_of_the_state_is_noised_data(name):
    """A denoiser that turns the state around shows what it is given: N(alpha y, sigma^2), the same in every call."""
    keep, level = inverse.mask(np.array([True, False])), FLOW.level(0.6)
    turned = lambda x, level: x[::-1]

    def one(key, x):
        if name == "ilvr":
            return inverse.ilvr(turned, keep, jnp.array([0.7, 5.0]), key)(x, level)
        return inverse.replacement(turned, inverse.measurement(keep, np.array([0.7]), 0.0), key)(x, level)

    x = jnp.array([9.0, -2.0])
    both = jax.jit(jax.vmap(lambda key: (one(key, x), one(key, x + 1))))
    found, again = (np.asarray(part) for part in both(jax.random.split(jax.random.key(0), 4000)))
    np.testing.assert_allclose(found[:, 0], 0.7, rtol=1e-12)  # of the estimate y itself
    np.testing.assert_allclose(found[:, 1], again[:, 1], rtol=1e-12)
    assert abs(found[:, 1].mean() - 0.4 * 0.7) < 4 * 0.6 / np.sqrt(4000)
    assert abs(found[:, 1].std() / 0.6 - 1) < 4 / np.sqrt(8000)


def test_twists_of_counts_are_densities_of_counts():
    """The Gaussian surrogate is of ``y / rate``: a density of y is it over the rate, entry by entry."""
    rate, counts, level = 2.5, np.array([3.0, 0.0, 6.0]), FLOW.level(0.5)
    seen = inverse.measurement(inverse.identity((3,)), counts, inverse.poisson_noise(rate))
    prior, x = oracles.gaussian(np.zeros(3), 1.7 * np.eye(3)), jnp.asarray(X)
    total = np.maximum(counts, 1) / rate**2 + 1.7 * 0.25 / (0.25 + 0.25 * 1.7)
    gap = counts / rate - np.asarray(prior(x, level))
    expected = np.sum(-0.5 * gap**2 / total - 0.5 * np.log(2 * np.pi * total) - np.log(rate))
    for twist in (inverse.mmps(seen), inverse.pigdm(seen, 1.7), inverse.tmpd(seen)):
        np.testing.assert_allclose(twist(prior, x, level)[0], expected, rtol=1e-10)


# --- alternating samplers: the law of every round, for y = x + noise and data N(0, v), by linear recursions -----------

V, NOISE, SEEN_Y = 2.0, 0.3, 1.5
ONE = oracles.gaussian(np.zeros(1), V)
IDENTITY = inverse.measurement(inverse.identity((1,)), np.array([SEEN_Y]), NOISE)


def judged(mean, variance, width):
    """Of z ~ N(z; x, width^2) p(y | z), x ~ N(mean, variance)."""
    precision = 1 / width**2 + 1 / NOISE**2
    share = 1 / width**2 / precision
    return share * mean + SEEN_Y / NOISE**2 / precision, share**2 * variance + 1 / precision


def has_law(x, mean, variance, loose):
    x = np.asarray(x)[:, 0]
    assert abs(x.mean() - mean) < 4 * np.sqrt(variance / x.size) + loose * abs(mean), (x.mean(), mean)
    assert abs(x.var() / variance - 1) < 4 * np.sqrt(2 / x.size) + loose, (x.var(), variance)


@pytest.mark.paper("Improving Diffusion Inverse Problem Solving with Decoupled Noise Annealing")
def test_decoupled_annealing_has_the_law_of_its_rounds():
    """ODE, draw with ``spread sigma / alpha``, noise of the next level: mean and variance after three levels."""
    grid, spread = grids.times(FLOW, [0.9, 0.6, 0.3, 0.0]), 0.5
    run = lambda key: inverse.daps(key, ONE, IDENTITY, grid, (1,), spread=spread, steps=4, dtype=jnp.float64).x
    found = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 8000))
    mean, variance = 0.0, 0.9**2
    for t, after in ((0.9, 0.6), (0.6, 0.3), (0.3, None)):
        inner = inner_grid(FLOW, jax.tree.map(np.asarray, FLOW.level(t)), 4)
        gain = 1.0
        for a, b in zip(np.asarray(inner.t.time), np.asarray(inner.s.time), strict=True):
            gain = ddim(gain, (1 - a) * V / ((1 - a) ** 2 * V + a**2) * gain, a, b)
        mean, variance = judged(gain * mean, gain**2 * variance, spread * t / (1 - t))
        if after is not None:
            mean, variance = (1 - after) * mean, (1 - after) ** 2 * variance + after**2
    has_law(found, mean, variance, 0.0)


@pytest.mark.paper("Principled Probabilistic Imaging using Diffusion Models as Plug-and-Play Priors")
def test_split_gibbs_with_falling_widths_has_the_law_of_its_rounds():
    """From N(0, rho_1^2), three widths that fall: each round at its own level."""
    stds = np.array([2.0, 0.8, 0.5])
    run = lambda key: inverse.pnp_dm(key, ONE, IDENTITY, FLOW, (1,), stds=stds, steps=40, dtype=jnp.float64).x
    found = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(1), 8000))
    mean, variance = 0.0, stds[0] ** 2
    for rho in stds:
        mean, variance = judged(mean, variance, rho)
        share = V / (V + rho**2)  # and the denoising posterior
        mean, variance = share * mean, share**2 * variance + share * rho**2
    has_law(found, mean, variance, 0.02)


def test_the_optimiser_is_adam():
    """Against optax, for gradients of several sizes."""
    ours, theirs, x = adam(0.05), optax.adam(0.05, b1=0.9, b2=0.99), jnp.asarray(X)
    state, other = ours.init(x), theirs.init(x)
    for gradient in (jnp.array([1.0, -3.0, 0.01]), jnp.array([2.0, 0.5, 0.0]), jnp.array([-1.0, 0.2, 1e-3])):
        change, state = ours.update(gradient, state, x)
        expected, other = theirs.update(gradient, other, x)
        np.testing.assert_allclose(change, expected, rtol=1e-6)
