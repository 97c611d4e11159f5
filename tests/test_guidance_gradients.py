"""Guidance by gradients of potentials, against closed-form conditional laws; minority guidance without training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, guidance, oracles, predictions, processes, sample, solvers

PROCESS = processes.vp()
WEIGHTS = np.array([0.7, 0.2, 0.1])
MEANS = np.array([[0.0, 0.0], [2.5, 0.0], [0.0, 2.5]])
DATA = oracles.mixture(WEIGHTS, MEANS, np.full(3, 0.09))


def belongs(k):
    """log p(component k | x_t): the classifier of noisy data."""
    return lambda x, level: jnp.log(DATA.responsibilities(x, level)[k])


def remembering():
    denoise = predictions.data(PROCESS).decode(lambda p, x, t, c: x * c, None, 1.0)
    return guidance.onetime_negative(denoise, 0.0, PROCESS.level(1.0))


@pytest.mark.paper("More Control for Free! Image Synthesis with Semantic Diffusion Guidance")
def test_gradient_of_a_log_probability_is_conditioning():
    """F = log p(y | x_t): the guided denoiser is the conditional one, several F add up, an ancestral step follows."""
    first = oracles.mixture([1.0], MEANS[1:2], [0.09])
    # the sum of two, 1.5 log p(1 | x) + log p(not 2 | x), whose product with p has weights in closed form
    other = lambda x, level: jnp.log1p(-DATA.responsibilities(x, level)[2])
    both = guidance.gradient(DATA, (belongs(1), other), (1.5, 1.0))
    nested = guidance.gradient(guidance.gradient(DATA, belongs(1), 1.5), other)

    @jax.jit
    def run(t):
        level = PROCESS.level(t)
        x = level.alpha * jnp.array([1.0, 0.4]) + level.sigma * jnp.array([0.3, -0.6])
        return x, guidance.gradient(DATA, belongs(1))(x, level), first(x, level), both(x, level), nested(x, level)

    def log_product(x, level):
        """log p + 1.5 log p(1 | x) + log p(not 2 | x) in NumPy."""
        c = level.alpha**2 * 0.09 + level.sigma**2
        parts = WEIGHTS / c * np.exp(-0.5 * np.sum((x - level.alpha * MEANS) ** 2, -1) / c)
        return np.log(parts.sum()) + 1.5 * np.log(parts[1] / parts.sum()) + np.log(parts[:2].sum() / parts.sum())

    for t in (0.05, 0.4, 0.9):
        level, h = PROCESS.level(t), 1e-5
        x, guided, conditional, summed, one_by_one = run(jnp.float32(t))
        np.testing.assert_allclose(guided, conditional, atol=2e-4)
        wide = np.asarray(x, np.float64)
        score = [(log_product(wide + h * e, level) - log_product(wide - h * e, level)) / (2 * h) for e in np.eye(2)]
        np.testing.assert_allclose(summed, (x + level.sigma**2 * np.array(score)) / level.alpha, rtol=2e-3, atol=1e-3)
        np.testing.assert_allclose(summed, one_by_one, atol=1e-4)
    assert both.evaluations(level) == 1
    # the mean of an ancestral step moves by the variance times the gradient, to first order in the step
    grid = grids.times(PROCESS, [0.5, 0.499])
    row = jax.tree.map(lambda leaf: leaf[0], solvers.ancestral().plan(grid))
    level = PROCESS.level(0.5)
    step = lambda denoise: solvers.ancestral().kernel(x, denoise(x, level), row)
    moved, variance = step(guidance.gradient(DATA, belongs(1), 2.0))[0] - step(DATA)[0], step(DATA)[1] ** 2
    np.testing.assert_allclose(moved, 2 * variance * jax.grad(belongs(1))(x, level), rtol=2e-2)


def test_samples_of_a_gradient_and_both_ends():
    """Drawn with the classifier's gradient nearly all are of the component; both ends are left as they are."""
    guided = guidance.gradient(DATA, belongs(2))
    grid = grids.uniform(PROCESS, 40)
    draw = lambda key: sample(key, guided, solvers.ancestral(), grid, shape=(2,))
    found = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 400))
    assert np.mean(np.linalg.norm(found.x - MEANS[2], axis=-1) < 4 * 0.3) > 0.99
    assert np.all(found.nfe == 40) and np.all(found.failed_at == -1)
    np.testing.assert_allclose(found.x.mean(0), MEANS[2], atol=5 * 0.3 / np.sqrt(400) + 0.02)
    flow = processes.flow()
    x = jnp.array([0.2, 0.1])
    steep = guidance.gradient(DATA, lambda x, level: jnp.sum(x) / level.alpha, 7.0)
    for t in (0.0, 1.0):
        np.testing.assert_array_equal(steep(x, flow.level(t)), DATA(x, flow.level(t)))
    trees = guidance.gradient(lambda x, level: x, lambda x, level: jnp.sum(x["a"]) * x["b"], 1.0)
    moved = trees({"a": jnp.ones(3), "b": jnp.float32(2.0)}, flow.level(0.5))
    np.testing.assert_allclose(moved["a"], np.full(3, 2.0))  # 1 + 0.5 * 2
    np.testing.assert_allclose(moved["b"], 3.5)


def test_likeness_to_a_reference():
    """Similarity to a reference rises with the scale; a Gram matrix does not know where things are."""
    reference, eps = jnp.array([2.4, 0.2]), jnp.array([0.3, -0.4])
    grid = grids.uniform(PROCESS, 20)
    like = guidance.likeness(reference, eps)

    @jax.jit
    @jax.vmap
    def far(scale):
        draw = lambda key: sample(key, guidance.gradient(DATA, like, scale), solvers.ddim(), grid, shape=(2,)).x
        return jnp.linalg.norm(jax.vmap(draw)(jax.random.split(jax.random.key(0), 64)) - reference, axis=-1).mean()

    distances = far(jnp.array([0.0, 0.4, 0.7, 1.0]))
    assert np.all(np.diff(distances) < -0.05), distances
    level = PROCESS.level(0.3)
    image = jax.random.normal(jax.random.key(1), (4, 3))
    style = guidance.likeness(image, jnp.zeros((4, 3)), statistics="style")
    content = guidance.likeness(image, jnp.zeros((4, 3)))
    np.testing.assert_allclose(style(level.alpha * image[::-1], level), 0.0, atol=1e-6)
    assert content(level.alpha * image[::-1], level) < -0.1
    seen = np.asarray(jax.random.normal(jax.random.key(2), (4, 3)), np.float64)
    clean = float(level.alpha) * np.asarray(image, np.float64)
    np.testing.assert_allclose(content(jnp.float32(seen), level), -0.5 * np.sum((seen - clean) ** 2), rtol=1e-5)
    grams = (seen.T @ seen - clean.T @ clean) / 4
    np.testing.assert_allclose(style(jnp.float32(seen), level), -0.5 * np.sum(grams**2), rtol=1e-5)
    log_h, x0 = guidance.potential_twist(content)(oracles.gaussian(0.0, 1.0), image, level)
    np.testing.assert_allclose(log_h, content(image, level))
    np.testing.assert_allclose(x0, level.alpha * image, rtol=1e-5)


@pytest.mark.paper("Self-Guided Generation of Minority Samples Using Diffusion Models")
def test_self_minority_guidance_raises_the_share_of_the_rare():
    """Rare components and low densities with the scale, on the components; by the gradient of the reconstruction."""
    grid = grids.uniform(PROCESS, 25)
    level = PROCESS.level(0.5)

    def one(key, scale):
        guided = guidance.self_minority(DATA, jax.random.fold_in(key, 1), level, scale, at=grid.t.time[::2])
        return sample(key, guided, solvers.ancestral(), grid, shape=(2,))

    run = jax.jit(jax.vmap(jax.vmap(one, (0, None)), (None, 0)))
    found = run(jax.random.split(jax.random.key(0), 600), jnp.array([0.0, 1.0, 2.0]))
    distances = np.linalg.norm(found.x[..., None, :] - MEANS, axis=-1)
    rare = np.mean(distances.argmin(-1) > 0, axis=1)
    densities = -np.asarray(jax.vmap(jax.vmap(lambda x: DATA.log_density(x, PROCESS.level(0.0))))(found.x)).mean(1)
    error = np.sqrt(0.3 * 0.7 / 600)
    assert abs(rare[0] - 0.3) < 4 * error
    assert np.all(np.diff(rare) > 4 * error), rare
    assert np.all(np.diff(densities) > 0.1), densities
    assert np.mean(distances.min(-1) < 4 * 0.3, axis=1).min() > 0.97
    assert np.all(found.nfe == 25 + 13)


def test_self_minority_gradient_and_when_it_acts():
    """Against a derivative by differences of the same loss; elsewhere in time the plain denoiser, at its cost."""
    again, level = PROCESS.level(0.5), PROCESS.level(0.3)
    x = jnp.array([0.9, 0.3])
    key = jax.random.key(4)
    guided = guidance.self_minority(DATA, key, again, 0.7, normalised=False)
    seed = jax.random.fold_in(key, np.float32(0.3).view(np.uint32))
    eps = np.asarray(jax.random.normal(jax.random.split(seed, 1)[0], (2,)))
    x0 = DATA(x, level)
    rebuilt = DATA(again.alpha * x0 + again.sigma * eps, again)
    lost = lambda x: np.linalg.norm(np.asarray(DATA(x, level)) - np.asarray(rebuilt))
    h = 3e-3
    slope = np.array([(lost(x + h * e) - lost(x - h * e)) / (2 * h) for e in np.eye(2, dtype=np.float32)])
    np.testing.assert_allclose(guided(x, level), x0 + 0.7 * level.sigma**2 / level.alpha * slope, atol=2e-3)
    unit = guidance.self_minority(DATA, key, again, 0.7, at=jnp.array([0.3]))
    expected = x0 + 0.7 * level.sigma**2 / level.alpha * slope / np.abs(slope).max()
    np.testing.assert_allclose(unit(x, level), expected, atol=3e-3)
    other = PROCESS.level(0.31)
    np.testing.assert_allclose(unit(x, other), DATA(x, other), rtol=1e-6)
    assert int(unit.evaluations(level)) == 2 and int(unit.evaluations(other)) == 1
    # the score of rare data is larger, and falls with the exact log-density
    draws = jax.vmap(DATA.sample)(jax.random.split(jax.random.key(5), 300))
    scores = jax.jit(jax.vmap(lambda k, x: guidance.minority_score(k, DATA, x, again, draws=8)))(
        jax.random.split(jax.random.key(6), 300), draws
    )
    logs = jax.vmap(lambda x: DATA.log_density(x, PROCESS.level(0.0)))(draws)
    assert np.corrcoef(scores, logs)[0, 1] < -0.5


def test_refused():
    with pytest.raises(ValueError, match="scale for every"):
        guidance.gradient(DATA, (belongs(0), belongs(1)), (1.0,))
    with pytest.raises(ValueError, match="finite"):
        guidance.gradient(DATA, belongs(0), np.inf)
    with pytest.raises(ValueError, match="statistics"):
        guidance.likeness(jnp.zeros(2), jnp.zeros(2), statistics="both")
    with pytest.raises(ValueError, match="remembers"):
        guidance.self_minority(remembering(), jax.random.key(0), PROCESS.level(0.5))
