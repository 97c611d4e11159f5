"""Weighted stochastic differential equations against quadrature: annealing, guidance, products, tilts, controls."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, oracles, processes, smc
from diffjax.levels import Level, value

VP = processes.vp()
GRIDS = (grids.log_snr(VP, 256, stop=1e-4),)
FIRST = oracles.mixture([0.3, 0.7], np.array([-1.0, 0.8]), [0.1, 0.15])
SECOND = oracles.mixture([0.5, 0.5], np.array([-0.6, 1.2]), [0.2, 0.1])
GAUSSIAN = oracles.gaussian(0.5, 0.6)
KEYS = jax.random.split(jax.random.key(1), 32)
CLEAN = Level(np.float64(0), np.float64(1), np.float64(0), np.float64(np.inf))
POINTS = np.linspace(-8, 8, 16001)


@pytest.fixture(autouse=True)
def double(x64):
    """All tests here run in float64."""


def log_likelihood(y):
    return -((y - 0.4) ** 2) / 0.5 - 0.2


def reward(y):
    return jnp.sin(2 * y) - 0.5 * y**2


def strength(level):
    """Reaches 1 where the state is clean."""
    return level.alpha**2 / (level.alpha**2 + level.sigma**2)


@value
class LogDensity:
    law: Any

    def __call__(self, y, level):
        return self.law.log_density(level.alpha * y, level)


def _exact(laws, weights, tilt=None):
    """log Z, mean and variance by quadrature."""
    each = [jax.vmap(lambda y, law=law: law.log_density(y, CLEAN))(POINTS) for law in laws]
    logs = sum(w * log for w, log in zip(weights, each, strict=True))
    density = np.exp(np.asarray(logs if tilt is None else logs + tilt(POINTS)))
    z = np.trapezoid(density, POINTS)
    mean = np.trapezoid(density * POINTS, POINTS) / z
    return np.log(z), mean, np.trapezoid(density * POINTS**2, POINTS) / z - mean**2


@functools.partial(jax.jit, static_argnames=("particles", "grid"))
def _compiled(keys, target, threshold, control, eta, particles, grid):
    plan = dict(threshold=threshold, control=control, eta=eta, dtype=jnp.float64)
    run = lambda key: smc.weighted_sde(key, target, GRIDS[grid], (), particles=particles, **plan)
    return jax.vmap(run)(keys)


def _run(target, threshold=0.5, control=None, eta=1.0, particles=256):
    return _compiled(KEYS, target, threshold, control, eta, particles, 0)


def _pooled(found):
    """Z, mean and variance with standard errors, all populations as one: averages weighted by each one's Z."""
    z = np.exp(np.asarray(found.log_z))
    weights = np.asarray(jax.vmap(smc.normalised)(found.log_weights))
    first, second = (np.sum(weights * np.asarray(found.x) ** k, axis=1) for k in (1, 2))
    mean, error = np.sum(z * first) / z.sum(), lambda off: np.sqrt(np.sum((z / z.sum() * off) ** 2))
    square = second - 2 * mean * first + mean**2
    variance = np.sum(z * square) / z.sum()
    spread = z.std() / z.mean() / np.sqrt(z.size)
    return (np.log(z.mean()), spread), (mean, error(first - mean)), (variance, error(square - variance))


def _agrees(found, exact, bias=0.04):
    """log Z, mean and variance, each within four standard errors and the error of 256 steps."""
    assert (found.failed_at == -1).all() and (found.collapsed_at == -1).all()
    for (estimate, error), true in zip(_pooled(found), exact, strict=True):
        assert abs(estimate - true) < 4 * error + bias, (estimate, true, error)


@pytest.mark.paper("Feynman-Kac Correctors in Diffusion: Annealing, Guidance, and Product of Experts")
@pytest.mark.parametrize("gamma", [2.0, 0.6])
def test_annealing(gamma):
    """The weights mend what the annealed score alone makes."""
    exact = _exact((FIRST,), (gamma,))
    _agrees(_run(smc.annealed(FIRST, gamma)), exact)
    alone = np.asarray(_run(smc.annealed(FIRST, gamma), threshold=0.0).x)
    if gamma > 1:
        assert abs(alone.mean() - exact[1]) > 4 * alone.std() / np.sqrt(alone.size)


@pytest.mark.paper("Feynman-Kac Correctors in Diffusion: Annealing, Guidance, and Product of Experts")
def test_guidance_and_products():
    """Two models: classifier-free guidance above 1, a product, and a geometric mean; any eta."""
    for target, weights, eta in (
        (smc.guided(FIRST, SECOND, 1.6), (1.6, -0.6), 1.0),
        (smc.product(FIRST, SECOND), (1.0, 1.0), 1.0),
        (smc.guided(FIRST, SECOND, 0.4), (0.4, 0.6), 0.6),
    ):
        _agrees(_run(target, eta=eta), _exact((FIRST, SECOND), weights))


@pytest.mark.paper(
    "Solving Inverse Problems via Diffusion-Based Priors: An Approximation-Free Ensemble Sampling Approach"
)
def test_posterior_of_a_measurement():
    """Full guidance, from the target at a level where it is easy, with Hutchinson's Laplacian, exact in one dimension.

    log Z is relative to the integral there; the drift alone makes another law.
    """
    grid = grids.log_snr(VP, 64, start=0.1, stop=1e-3)
    level = jax.tree.map(lambda leaf: leaf[0], grid.t)
    logs = jax.vmap(lambda y: FIRST.log_density(level.alpha * y, level))(POINTS) + log_likelihood(POINTS)
    density = np.exp(np.asarray(logs)) * float(level.alpha)
    z = np.trapezoid(density, POINTS)
    sums = np.cumsum(density) / density.sum()
    places = np.random.default_rng(0).uniform(size=(32, 256))
    x = float(level.alpha) * np.interp(places, sums, POINTS)
    target = smc.posterior(FIRST, log_likelihood, probes=1)
    run = lambda key, x: smc.weighted_sde(key, target, grid, x=x, particles=256)
    found = jax.jit(jax.vmap(run))(KEYS, x)
    exact = _exact((FIRST,), (1.0,), log_likelihood)
    _agrees(found, (exact[0] - np.log(z), *exact[1:]))


@pytest.mark.paper("Feynman-Kac Correctors in Diffusion: Annealing, Guidance, and Product of Experts")
def test_tilt_by_a_growing_reward():
    """Half guidance, which needs no Laplacian, and a strength that reaches 1 at the data."""
    _agrees(_run(smc.tilted(FIRST, reward, strength)), _exact((FIRST,), (1.0,), reward))


@pytest.mark.paper("DriftLite: Lightweight Drift Control for Inference-Time Scaling of Diffusion Models")
def test_controls_take_the_variance_away():
    """A Gaussian's perfect control is linear: in the span of its score, so that the weights become constant."""
    target, exact = smc.annealed(GAUSSIAN, 2.0), _exact((GAUSSIAN,), (2.0,))
    energy = smc.energy_controlled((LogDensity(GAUSSIAN),))
    variance = []
    for control in (None, smc.variance_controlled(), energy):
        found = _run(target, threshold=0.0, control=control)
        variance.append(float(np.var(found.log_weights, axis=1).mean()))
        if len(variance) == 2:
            np.testing.assert_allclose(found.log_z, exact[0], atol=1e-4)
    assert variance[1] < 1e-8 * variance[0] and variance[2] < 0.1 * variance[0], variance


@pytest.mark.paper("DriftLite: Lightweight Drift Control for Inference-Time Scaling of Diffusion Models")
def test_controls_leave_more_particles_effective():
    """A mixture's perfect control is not in the span, and yet most of the variance goes."""
    target, exact = smc.annealed(FIRST, 2.0), _exact((FIRST,), (2.0,))
    plain = _run(target, threshold=0.0)
    found = _run(target, threshold=0.0, control=smc.variance_controlled())
    _agrees(found, exact)
    spread = [float(np.var(r.log_weights, axis=1).mean()) for r in (plain, found)]
    assert spread[1] < 0.5 * spread[0], spread


@pytest.mark.paper("DriftLite: Lightweight Drift Control for Inference-Time Scaling of Diffusion Models")
def test_controls_know_that_the_reward_grows():
    """A Gaussian with a quadratic reward whose strength grows: the perfect control is linear, and beta' r is in it."""
    target = smc.tilted(GAUSSIAN, log_likelihood, lambda level: strength(level) ** 2)
    exact = _exact((GAUSSIAN,), (1.0,), log_likelihood)
    plain = float(np.var(_run(target, threshold=0.0).log_weights, axis=1).mean())
    for control, share in ((smc.variance_controlled(("models", "reward")), 0.01), (smc.energy_controlled(), 0.1)):
        found = _run(target, threshold=0.0, control=control)
        assert float(np.var(found.log_weights, axis=1).mean()) < share * plain, (control, plain)
        _agrees(found, exact, bias=0.02)


def test_trees_and_devices():
    """A state of two leaves with a product of models; eight devices make no difference."""
    law = lambda x, level: {"a": FIRST(x["a"], level), "b": jax.vmap(lambda b: GAUSSIAN(b, level))(x["b"])}
    x = {"a": 150 * jax.random.normal(KEYS[0], (16,)), "b": 150 * jax.random.normal(KEYS[1], (16, 2))}
    run = lambda mesh: smc.weighted_sde(
        KEYS[2], smc.annealed(law, 2.0), grids.log_snr(VP, 16), particles=16, x=x, mesh=mesh, threshold=0.9
    )
    one, many = run(None), run(jax.make_mesh((8,), ("p",)))
    assert one.resampled.any() and one.x["b"].shape == (16, 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8), one, many)


@value
class AboveZero:
    low: Any = -np.inf

    def __call__(self, y):
        return jnp.where(y > 0, 0.0, self.low)


@pytest.mark.parametrize("strength", [strength, 1.0])
def test_a_density_that_ends_is_reported(strength):
    """A reward of -inf, growing or always there, fails where it is met first; a finite one that is as low does not."""
    run = lambda low: _run(smc.tilted(oracles.gaussian(0.0, 1.0), AboveZero(low), strength), particles=16)
    assert (run(-np.inf).failed_at == 0).mean() > 0.9  # a sixteenth of nothing lies below 0 in some populations
    assert (run(-50.0).failed_at == -1).all()


def test_bad_input():
    good = smc.annealed(FIRST, 2.0)
    for match, call in {
        "gamma": lambda: smc.annealed(FIRST, 0.0),
        "weights": lambda: smc.target((FIRST, SECOND), (1.0, -1.0)),
        "weights ": lambda: smc.target((FIRST,), (1.0, 2.0)),
        "guidance": lambda: smc.tilted(FIRST, reward, guidance=2.0),
        "memory": lambda: smc.product(FIRST, 3.0),
        "controls": lambda: smc.variance_controlled(("curl",)),
        "target": lambda: smc.weighted_sde(KEYS[0], FIRST, GRIDS[0], (), particles=4),
        "eta": lambda: smc.weighted_sde(KEYS[0], good, GRIDS[0], (), particles=4, eta=0.0),
        "alpha": lambda: smc.weighted_sde(KEYS[0], good, grids.uniform(processes.flow(), 4), (), particles=4),
        "ancestors": lambda: smc.weighted_sde(KEYS[0], good, GRIDS[0], (), particles=4, resampler=smc.transported()),
    }.items():
        with pytest.raises(ValueError, match=match.strip()):
            call()
