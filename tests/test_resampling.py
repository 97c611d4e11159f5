"""Resampling: the right number of copies on the average, as evenly as promised, and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import smc

WEIGHTS = np.array([0.05, 0.3, 0.0, 0.25, 0.4])
ORDER = np.array([3, 0, 4, 1, 2])
KEYS = jax.random.split(jax.random.key(0), 4000)
SCHEMES = (smc.multinomial(), smc.systematic(), smc.stratified(), smc.residual(), smc.ssp())


@pytest.fixture(autouse=True)
def double(x64):
    """All tests here run in float64."""


@jax.jit
def _counts(scheme, log_weights):
    return jax.vmap(lambda key: jnp.bincount(scheme(key, log_weights), length=5))(KEYS)


@jax.jit
def _matrix(scheme, log_weights, x):
    return scheme.matrix(log_weights, x)


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_copies(scheme):
    """N w_i copies on the average, also of permuted weights; unnormalised; none of what has no weight."""
    for order in (np.arange(5), ORDER):
        weights = WEIGHTS[order]
        with np.errstate(divide="ignore"):
            counts = np.asarray(_counts(scheme, jnp.asarray(np.log(weights) + 100.0)))
        assert (counts.sum(1) == 5).all()
        assert (counts[:, weights == 0] == 0).all()
        error = counts.std(0) / np.sqrt(len(KEYS))
        np.testing.assert_array_less(np.abs(counts.mean(0) - 5 * weights), 4.5 * error + 1e-12)
        expected = 5 * weights
        if scheme in (SCHEMES[1], SCHEMES[4]):
            assert (counts >= np.floor(expected + 1e-9)).all() and (counts <= np.ceil(expected - 1e-9)).all()
        if scheme is SCHEMES[3]:
            assert (counts >= np.floor(expected + 1e-9)).all()


def test_the_schemes_are_ordered_by_their_variance():
    """Multinomial copies vary most, those that are the floor or the ceiling of N w_i least."""
    spread = {s.factory: float(np.sum(np.asarray(_counts(s, jnp.log(WEIGHTS))).var(0))) for s in SCHEMES}
    least = np.sum(5 * WEIGHTS % 1 * (1 - 5 * WEIGHTS % 1))
    for name in ("systematic", "ssp", "residual"):  # the last one has a single place left to draw here
        np.testing.assert_allclose(spread[name], least, rtol=0.05)
    assert least < spread["stratified"] < spread["multinomial"]
    np.testing.assert_allclose(spread["multinomial"], 5 * np.sum(WEIGHTS * (1 - WEIGHTS)), rtol=0.05)


def test_all_weights_zero_is_reported():
    """-inf everywhere: everyone is its own ancestor, the effective size is 0, log Z is -inf, and nothing is NaN."""
    nothing = jnp.full(5, -jnp.inf)
    for scheme in SCHEMES:
        np.testing.assert_array_equal(_counts(scheme, nothing), 1)
    assert smc.effective_size(nothing) == 0 and smc.log_mean(nothing) == -np.inf
    np.testing.assert_array_equal(smc.normalised(nothing), 0)
    np.testing.assert_array_equal(_matrix(smc.transported(0.1, 400), nothing, jnp.ones((5, 2))), np.eye(5))


def test_effective_size_and_mean():
    """Against NumPy, at any scale."""
    logs = np.array([0.3, -1.0, 2.0])
    w = np.exp(logs)
    for shift in (0.0, 1e4, -1e4):
        np.testing.assert_allclose(smc.effective_size(logs + shift), w.sum() ** 2 / (w**2).sum(), rtol=1e-9)
        np.testing.assert_allclose(smc.log_mean(jnp.asarray(logs + shift)), np.log(w.mean()) + shift, rtol=1e-12)


def test_equal_weights():
    """Nothing to choose."""
    for scheme in SCHEMES[1:]:
        np.testing.assert_array_equal(_counts(scheme, jnp.full(5, 3.0)), 1)


def test_transport():
    """The plan's marginals, the weighted mean, permutations, and the limit of little regularisation."""
    x = jax.random.normal(KEYS[0], (5, 2))
    logs = jnp.log(jnp.asarray(WEIGHTS))
    matrix = _matrix(smc.transported(0.1, 400), logs, x)
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(matrix.mean(0), WEIGHTS, atol=1e-6)
    np.testing.assert_allclose((matrix @ x).mean(0), WEIGHTS @ x, atol=1e-5)
    moved = _matrix(smc.transported(0.1, 400), logs[ORDER], x[ORDER])
    np.testing.assert_allclose(moved, matrix[ORDER][:, ORDER], atol=1e-12)
    even = _matrix(smc.transported(1e-3, 400), jnp.zeros(5), x)
    np.testing.assert_allclose(even, np.eye(5), atol=1e-6)


def test_gradients():
    """What a choice hides, `scored` gives back on the average; the transport has its own."""
    values = jnp.array([1.0, -2.0, 0.5, 3.0, 0.7])

    def after(slope, key, scheme):
        logs = slope * jnp.arange(5.0) / 5
        chosen = scheme(key, logs)
        normal = jax.nn.log_softmax(logs)[chosen]
        return jnp.mean(jnp.exp(normal - jax.lax.stop_gradient(normal)) * values[chosen])

    exact = jax.grad(lambda slope: jax.nn.softmax(slope * jnp.arange(5.0) / 5) @ values)(0.4)
    found = jax.vmap(lambda key: jax.grad(after)(0.4, key, smc.scored(smc.multinomial())))(KEYS)
    assert abs(found.mean() - exact) < 4 * found.std() / np.sqrt(len(KEYS))
    plan = lambda slope: smc.transported(0.3, 500).matrix(slope * jnp.arange(5.0) / 5, values[:, None])
    np.testing.assert_allclose(jax.grad(lambda slope: jnp.mean(plan(slope) @ values))(0.4), exact, rtol=1e-3)


def test_bad_input():
    for regularisation, iterations in ((0.0, 5), (0.1, 0), (np.nan, 5)):
        with pytest.raises(ValueError, match=r"regularisation|iterations"):
            smc.transported(regularisation, iterations)
