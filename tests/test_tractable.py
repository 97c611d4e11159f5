"""Hidden Markov chains against all their paths, and inpainting steered by a tractable prior against the exact law."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, inverse, oracles, processes, sample, solvers
from diffjax.inverse.tractable import geometric_mean, marginals
from diffjax.oracles.hidden_markov import Marginals

PROCESS = processes.vp()
LENGTH = 3
START, TRANSITION = np.array([0.3, 0.7]), np.array([[0.8, 0.2], [0.45, 0.55]])
MEANS, STDS = np.array([-1.0, 0.6]), np.array([0.4, 0.2])
X = np.array([0.3, -0.9, 0.8])


def paths(stds):
    """The same law as a mixture of all K^L paths."""
    all_paths = list(itertools.product(range(2), repeat=LENGTH))
    weight = lambda p: START[p[0]] * np.prod([TRANSITION[a, b] for a, b in itertools.pairwise(p)])
    at = lambda values: np.array([[values[k] for k in p] for p in all_paths])
    return oracles.mixture(np.array([weight(p) for p in all_paths]), at(MEANS), at(stds) ** 2), np.array(all_paths)


@pytest.fixture(scope="module")
def chain():
    return oracles.hidden_markov(START, TRANSITION, MEANS, STDS, length=LENGTH)


def test_forward_backward_is_the_sum_over_paths(chain, x64):
    """Estimate, density, score and the law of every entry, at three levels and both ends."""
    law, all_paths = paths(STDS)
    x = jnp.asarray(X)
    for time in (0.1, 0.5, 0.97):
        level = PROCESS.level(time)
        np.testing.assert_allclose(chain(x, level), law(x, level), rtol=1e-11)
        np.testing.assert_allclose(chain.log_density(x, level), law.log_density(x, level), rtol=1e-11)
        np.testing.assert_allclose(chain.score(x, level), law.score(x, level), rtol=1e-9)
        found = marginals(chain, x, level)
        weights = np.asarray(law.responsibilities(x, level))
        summed = [[weights[all_paths[:, i] == k].sum() for i in range(LENGTH)] for k in range(2)]
        np.testing.assert_allclose(np.exp(found.log_weights), summed, rtol=1e-10)
        every = marginals(law, x, level)
        np.testing.assert_allclose(every.mean, found.mean, rtol=1e-10)
        second = lambda m: np.sum(np.exp(m.log_weights) * (m.variances + m.means**2), axis=0)
        np.testing.assert_allclose(second(every), second(found), rtol=1e-10)
    np.testing.assert_allclose(chain(x, PROCESS.level(0.0)), x, rtol=1e-12)
    prior = sum(START[k] * MEANS[k] for k in range(2))
    np.testing.assert_allclose(chain(x, processes.flow().level(1.0))[0], prior, rtol=1e-12)


def test_draws_of_the_chain(chain):
    """Pair frequencies and means of 4,000 draws, within four standard errors."""
    x = np.asarray(jax.jit(jax.vmap(chain.sample))(jax.random.split(jax.random.key(0), 4000)))
    law, _ = paths(STDS)
    mean = law.weights @ law.means
    second = (law.weights[:, None, None] * (law.means[:, :, None] * law.means[:, None])).sum(0)
    second = second + np.diag(law.weights @ law.variances)
    products = x[:, :, None] * x[:, None]
    assert np.all(np.abs(x.mean(0) - mean) < 4 * x.std(0) / np.sqrt(4000))
    assert np.all(np.abs(products.mean(0) - second) < 4 * products.std(0) / np.sqrt(4000))


@pytest.mark.paper("Image Inpainting via Tractable Steering of Diffusion Models")
@pytest.mark.parametrize("noise, stds", [(0.3, STDS), (0.0, STDS), (0.3, np.zeros(2)), (0.0, np.zeros(2))])
def test_soft_evidence_and_known_entries_together(noise, stds, x64):
    """E[x_0 | x_t, y] by forward-backward, against the posterior of the enumerated mixture; a mask, and weights."""
    chain = oracles.hidden_markov(START, TRANSITION, MEANS, stds, length=LENGTH)
    law, _ = paths(stds)
    x, weights = jnp.asarray(X), np.array([0.0, -0.7, 0.0])
    denoise = oracles.gaussian(np.zeros(LENGTH), 1.0)
    masked = inverse.measurement(inverse.mask(weights != 0), np.array([0.6]), noise)
    scaled = inverse.measurement(inverse.diagonal(weights), -0.7 * np.array([0.0, 0.6, 0.0]), 0.7 * noise)
    for seen in (masked, scaled):
        steered = inverse.tractable_steering(denoise, chain, seen, 0.0, until=np.inf)
        # an exact y of values has no density: nearly exact stands for it
        after = inverse.posterior(
            law, masked if noise or stds.any() else inverse.measurement(masked.operator, np.array([0.6]), 1e-3)
        )
        for time in (0.2, 0.8):
            level = PROCESS.level(time)
            np.testing.assert_allclose(steered(x, level), after(x, level), rtol=1e-9, atol=1e-12)
            same = inverse.tractable_steering(denoise, law, masked, 0.0, until=np.inf)
            if noise:
                np.testing.assert_allclose(same(x, level), after(x, level), rtol=1e-9)


@pytest.mark.paper("Image Inpainting via Tractable Steering of Diffusion Models")
def test_the_geometric_mixture(x64):
    """Against quadrature for a Gaussian, sums for values, and its limits; later levels are the denoiser's own."""
    x0, r2, a = jnp.array([0.4, -0.2]), 0.3, 0.35
    grid = np.linspace(-8, 8, 200_001)
    density = lambda m, v: np.exp(-0.5 * (grid - m) ** 2 / v)
    one = Marginals(jnp.zeros((1, 2)), jnp.array([[1.0, 0.1]]), jnp.array([[0.5, 0.04]]))
    found = geometric_mean(one, x0, r2, a)
    for i in range(2):
        p = density(x0[i], r2) ** a * density(one.means[0, i], one.variances[0, i]) ** (1 - a)
        np.testing.assert_allclose(found[i], np.sum(grid * p) / np.sum(p), rtol=1e-8)
    values = Marginals(
        jnp.log(jnp.array([[0.2, 0.9], [0.8, 0.1]])), jnp.array([[-1.0] * 2, [0.6] * 2]), jnp.zeros((2, 2))
    )
    p = np.exp(values.log_weights) ** (1 - a) * np.exp(-0.5 * a * (values.means - x0) ** 2 / r2)
    np.testing.assert_allclose(geometric_mean(values, x0, r2, a), (p * values.means).sum(0) / p.sum(0), rtol=1e-10)
    apart = Marginals(jnp.log(jnp.array([[0.3], [0.7]])), jnp.array([[-4.0], [4.0]]), jnp.array([[0.05], [0.2]]))
    p = (
        sum(
            np.exp(w) / np.sqrt(2 * np.pi * v) * density(m, v)
            for w, m, v in zip(apart.log_weights[:, 0], apart.means[:, 0], apart.variances[:, 0], strict=True)
        )
        ** (1 - a)
        * density(1.5, 30.0) ** a
    )
    np.testing.assert_allclose(
        geometric_mean(apart, jnp.array([1.5]), 30.0, a)[0], np.sum(grid * p) / np.sum(p), rtol=1e-6
    )
    np.testing.assert_allclose(geometric_mean(apart, x0[:1], r2, 0.0), apart.mean, rtol=1e-12)
    np.testing.assert_allclose(geometric_mean(values, x0, r2, 1.0), x0, rtol=0)
    denoise, law = oracles.gaussian(np.zeros(2), 1.0), oracles.gaussian(np.ones(2), 0.5)
    seen = inverse.measurement(inverse.mask(np.array([True, False])), np.array([1.0]), 0.1)
    steered = inverse.tractable_steering(denoise, law, seen, lambda level: 0.5, until=0.5)
    early, late = PROCESS.level(half_log_snr=0.49), PROCESS.level(half_log_snr=0.51)
    assert np.all(steered(x0, late) == denoise(x0, late)) and np.all(steered(x0, early) != denoise(x0, early))
    assert np.all(steered(x0, PROCESS.level(0.0)) == denoise(x0, PROCESS.level(0.0)))


@pytest.mark.paper("Image Inpainting via Tractable Steering of Diffusion Models")
def test_steering_inpaints_where_replacement_and_repaint_miss():
    """A sharp denoiser that is off, a blurred tractable prior: modes from the one, details from the other.

    Share of the modes of x given one of four entries, and the width of the modes, against the exact posterior.
    """
    means = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [-1, 1, -1, -1], [-1, -1, 1, 1], [1, -1, -1, 1], [-1, 1, 1, -1.0]])
    weights, count = np.array([0.3, 0.05, 0.2, 0.15, 0.2, 0.1]), 600
    data, blurred = (oracles.mixture(weights, means, np.full(6, v)) for v in (0.01, 0.09))
    off = means + 0.05 * np.random.default_rng(0).normal(size=means.shape)
    network = oracles.mixture(np.ones(6), off, np.full(6, 0.015))  # knows not how frequent the modes are
    seen = inverse.measurement(inverse.mask(np.arange(4) == 0), np.array([1.0]), 0.1)
    after, tractable = inverse.posterior(data, seen), inverse.posterior(blurred, seen)
    grid = grids.log_snr(PROCESS, 24)
    keys = jax.random.split(jax.random.key(0), count)

    def draw(grid, steer):
        def one(key):
            denoise = inverse.replacement(network, seen, jax.random.fold_in(key, 1))
            if steer is not None:
                denoise = inverse.tractable_steering(denoise, tractable, None, until=steer, share=0.1)
            return sample(key, denoise, solvers.ancestral(), grid, shape=(4,)).x

        return jax.vmap(one)(keys)

    repaint = grids.time_travel(grid, jump=4, repeats=4)
    whole = jax.jit(lambda: jax.lax.map(lambda until: draw(grid, until), jnp.array([-np.inf, 1.0, np.inf])))()
    found = dict(zip(("replacement", "steered", "prior"), whole, strict=True))
    found["repaint"] = jax.jit(lambda: draw(repaint, None))()

    def judged(x):
        mode = np.argmin(np.linalg.norm(np.asarray(x)[:, None] - means, axis=-1), axis=1)
        shares = np.bincount(mode, minlength=6) / count
        rest = (np.asarray(x) - means[mode])[:, 1:]
        return 0.5 * np.abs(shares - after.weights).sum(), np.sqrt(np.mean(rest**2))

    off, width = {}, {}
    for name, x in found.items():
        off[name], width[name] = judged(x)
    error = 4 * np.sqrt(0.25 / count)
    assert off["steered"] < error + 0.04 and off["prior"] < error + 0.04
    assert off["replacement"] > off["steered"] + error and off["repaint"] > off["steered"] + error
    assert width["prior"] > 2 * width["steered"] and abs(width["steered"] - 0.1) < 0.05


@pytest.mark.parametrize(
    "wrong, name",
    [
        (lambda: oracles.hidden_markov([0.5, 0.5], np.ones((3, 2)), [0.0, 1.0]), "transition"),
        (lambda: oracles.hidden_markov([0.5, 0.5], np.zeros((2, 2)), [0.0, 1.0]), "transition"),
        (lambda: oracles.hidden_markov([0.5, 0.5], np.ones((2, 2)), [0.0, 1.0], -1.0), "stds"),
        (lambda: oracles.hidden_markov([0.5, 0.5], np.ones((2, 2)), [0.0, 1.0], length=0), "length"),
        (lambda: steering(share=1.5), "share"),
        (lambda: steering(variance=0.0), "variance"),
        (lambda: steering(until=np.nan), "until"),
        (lambda: steering(prior=oracles.points(np.zeros((2, 3)))), "prior"),
        (lambda: steering(operator=inverse.matrix(np.ones((1, 3)))), "mask"),
    ],
)
def test_bad_input(wrong, name):
    with pytest.raises(ValueError, match=name):
        wrong()


def steering(prior=None, operator=None, **options):
    prior = oracles.hidden_markov(START, TRANSITION, MEANS, length=LENGTH) if prior is None else prior
    operator = inverse.mask(np.array([True, False, False])) if operator is None else operator
    seen = inverse.measurement(operator, np.ones(1), 0.1)
    return inverse.tractable_steering(oracles.gaussian(np.zeros(LENGTH), 1.0), prior, seen, **options)
