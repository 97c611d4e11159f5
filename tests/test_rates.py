"""The identity under all weights, against automatic differentiation of densities in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import oracles
from diffjax.levels import Level
from diffjax.smc import rates

RNG = np.random.default_rng(0)


def _law(count):
    factors = RNG.normal(size=(count, 3, 3)) / 2
    covariances = factors @ factors.transpose(0, 2, 1) + 0.3 * np.eye(3)
    return oracles.mixture(RNG.uniform(0.5, 1, count), RNG.normal(size=(count, 3)), covariances)


LAWS = (_law(2), _law(3), _law(2))
POINTS = RNG.normal(size=(6, 3))
CURVE = RNG.normal(size=(3, 3))


def _level(u):
    """Of y = x / alpha, whose noise variance is u."""
    return Level(u, jnp.ones_like(u), jnp.sqrt(u), -0.5 * jnp.log(u))


def reward(y):
    return jnp.sin(y @ CURVE[0]) - 0.3 * y @ CURVE @ y


U, BETA, BETA_RATE = 0.7, 0.6, -1.3  # beta falls with u


def log_target(weights, tilted, y, tau):
    """At the clock tau = U - u."""
    u = U - tau
    total = sum(w * law.log_density(y, _level(u)) for w, law in zip(weights, LAWS, strict=False))
    return total + tilted * (BETA - BETA_RATE * tau) * reward(y)


def scores(y):
    return tuple(law.score(y, _level(jnp.asarray(U))) for law in LAWS)


@pytest.fixture(autouse=True)
def double(x64):
    """All tests here run in float64."""


def _missed(weights, tilted, drift, rate):
    """What the rate misses of the master identity at all points, for some amounts of noise; weights are arguments."""

    def residual(y, eta, weights):
        path = rates.path_of(lambda y, tau: log_target(weights, tilted, y, tau), y, 0.0)
        motion = rates.motion_of(lambda y: drift(y, eta, weights), y, eta**2)
        return rates.log_weight_rate(path, motion) - rate(y, weights)

    over = jax.vmap(jax.vmap(residual, in_axes=(0, None, None)), in_axes=(None, 0, None))
    found = jax.jit(jax.vmap(over, in_axes=(None, None, 0)))(POINTS, np.array([0.0, 1.0, 1.5]), np.asarray(weights))
    return np.abs(np.asarray(found)).max()


def mixed(y, weights):
    return sum(w * s for w, s in zip(weights, scores(y), strict=False))


def product(y, weights):
    return rates.product_rate(weights, scores(y)[: len(weights)])


def test_the_identity_is_the_residual_of_the_equation():
    """p g = d/dtau p + div(p v) - eta^2 / 2 laplacian p, with p differentiated itself, not its logarithm."""
    drift = lambda y: jnp.sin(CURVE @ y)

    def residual(y):
        density = lambda y, tau: jnp.exp(log_target((1.3, -0.4), 1.0, y, tau))
        path = rates.path_of(lambda y, tau: log_target((1.3, -0.4), 1.0, y, tau), y, 0.0)
        g = rates.log_weight_rate(path, rates.motion_of(drift, y, 1.7))
        hessian = jax.hessian(density)(y, 0.0)
        change = jax.grad(density, 1)(y, 0.0) + jnp.trace(jax.jacfwd(lambda y: density(y, 0.0) * drift(y))(y))
        return (change - 0.85 * jnp.trace(hessian)) / density(y, 0.0) - g

    np.testing.assert_allclose(jax.jit(jax.vmap(residual))(POINTS), 0.0, atol=1e-12)


@pytest.mark.paper("Feynman-Kac Correctors in Diffusion: Annealing, Guidance, and Product of Experts")
@pytest.mark.parametrize(
    "weights", [[(2.5,), (0.7,)], [(-1.5, 2.5), (1.0, 1.0), (0.3, 0.7)], [(0.5, -0.2, 1.4)]], ids=len
)
def test_products_annealing_and_guidance(weights):
    """No Laplacian and no eta in the rate."""
    drift = lambda y, eta, weights: 0.5 * (1 + eta**2) * mixed(y, weights)
    assert _missed(weights, 0.0, drift, product) < 1e-12


@pytest.mark.paper("Feynman-Kac Correctors in Diffusion: Annealing, Guidance, and Product of Experts")
def test_the_named_cases_are_the_named_formulas():
    first, second, _ = scores(POINTS[0])
    for weights, named in (
        ((2.5,), 0.5 * 2.5 * 1.5 * first @ first),
        ((-1.5, 2.5), 0.5 * 2.5 * 1.5 * (first - second) @ (first - second)),
        ((1.0, 1.0), first @ second),
        ((0.3, 0.7), -0.5 * 0.3 * 0.7 * (first - second) @ (first - second)),
    ):
        np.testing.assert_allclose(product(POINTS[0], weights), named, rtol=1e-12)


@pytest.mark.paper(
    "Solving Inverse Problems via Diffusion-Based Priors: An Approximation-Free Ensemble Sampling Approach"
)
@pytest.mark.parametrize("guidance", [0.0, 1.0, 0.4])
def test_tilts(guidance):
    """Half guidance needs no Laplacian, full guidance and all between do; of one density and of a product."""
    slope = lambda y: BETA * jax.grad(reward)(y)
    drift = lambda y, eta, weights: 0.5 * (1 + eta**2) * (mixed(y, weights) + slope(y)) - 0.5 * guidance * slope(y)

    def rate(y, weights):
        curvature = None if guidance == 1.0 else BETA * rates.divergence(jax.grad(reward), y)
        tilt = rates.tilt_rate(slope(y), curvature, mixed(y, weights), guidance)
        return product(y, weights) + tilt - BETA_RATE * reward(y)

    assert _missed([(1.0, 0.0), (0.8, 0.5)], 1.0, drift, rate) < 1e-12


@pytest.mark.paper("DriftLite: Lightweight Drift Control for Inference-Time Scaling of Diffusion Models")
def test_controls():
    """Any field beside the drift."""
    control = lambda y: jnp.tanh(CURVE @ y)
    drift = lambda y, eta, weights: 0.5 * (1 + eta**2) * mixed(y, weights) + control(y)

    def rate(y, weights):
        extra = rates.control_rate(rates.divergence(control, y), control(y), mixed(y, weights))
        return product(y, weights) + extra

    assert _missed([(1.6,)], 0.0, drift, rate) < 1e-12


def test_a_linear_forward_drift_adds_a_constant():
    """In x of dx = f x dt + g dW: (W - 1) D f for products, and -f <x, beta grad r> for the tilt."""
    f, g2, weights = -0.8, 1.9, (0.8, 0.5)
    # at t = T - tau: alpha = exp(f (t - T)), with noise such that at tau = 0 the variance is U and alpha = 1

    def level(tau):
        alpha = jnp.exp(-f * tau)
        variance = (U + g2 / (2 * f)) * alpha**2 - g2 / (2 * f)
        return Level(tau, alpha, jnp.sqrt(variance), jnp.log(alpha) - 0.5 * jnp.log(variance))

    def log_density(x, tau):
        total = sum(w * law.log_density(x, level(tau)) for w, law in zip(weights, LAWS, strict=False))
        return total + (BETA - BETA_RATE * tau) * reward(x)

    slope = lambda x: BETA * jax.grad(reward)(x)

    def residual(x):
        drift = lambda x: -f * x + g2 * (mixed(x, weights) + slope(x)) - 0.5 * g2 * slope(x)
        found = rates.log_weight_rate(rates.path_of(log_density, x, 0.0), rates.motion_of(drift, x, g2))
        tilt = rates.tilt_rate(slope(x), None, mixed(x, weights), 1.0)
        expected = g2 * (product(x, weights) + tilt) - BETA_RATE * reward(x)
        return found - expected - (sum(weights) - 1) * 3 * f + f * x @ slope(x)

    np.testing.assert_allclose(jax.jit(jax.vmap(residual))(POINTS), 0.0, atol=1e-12)


def test_hutchinson_is_unbiased():
    """Signs: exact on diagonal Jacobians, right on the average elsewhere."""
    key = jax.random.key(0)
    np.testing.assert_allclose(rates.divergence(lambda y: y**2, POINTS[0], key), 2 * POINTS[0].sum(), rtol=1e-12)
    field = lambda y: jnp.sin(CURVE @ y)
    found = jax.jit(jax.vmap(lambda key: rates.divergence(field, POINTS[0], key, 2)))(jax.random.split(key, 4000))
    exact = rates.divergence(field, POINTS[0])
    assert abs(found.mean() - exact) < 4 * found.std() / np.sqrt(4000)
