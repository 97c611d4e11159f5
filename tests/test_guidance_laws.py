"""The laws that guided samplers draw from, against those in closed form."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.stats import norm

from diffjax import grids, guidance, interpolants, modifiers, oracles, processes, sample, solvers
from diffjax.levels import Array, Level, Row, Tree, value

VP, VE, FLOW = processes.vp(), processes.edm(sigma_max=80.0), processes.flow()
X = np.array([0.7, -1.1])


@value
class Chosen:
    """Two denoisers as one: the law under condition 1 and the one without, at condition 0."""

    given: Any
    plain: Any
    condition: Array

    def __call__(self, x: Tree, level: Level) -> Tree:
        c = self.condition
        return jax.tree.map(lambda a, b: c * a + (1 - c) * b, self.given(x, level), self.plain(x, level))


@value
class Given:
    """Noise that is an argument, (rows, draws, ...)."""

    z: Array

    def __call__(self, key: Array, index: Array, row: Row, x: Tree, draws: int) -> tuple[Tree, ...]:
        return tuple(self.z[index, k] for k in range(draws))


def variance(denoise, solver, grid) -> float:
    """The variance of the last state of a sampler that is linear in a scalar state of mean 0 and in its noise."""
    rows = len(grid)

    def end(x, z):
        return sample(jax.random.key(0), denoise, solver, grid, x=x, noise=Given(z)).x

    first, rest = jax.jit(jax.grad(end, argnums=(0, 1)))(jnp.zeros(()), jnp.zeros((rows, max(solver.draws, 1))))
    return float(first**2 * grid.start.sigma**2 + (rest**2).sum())


# --- characteristic guidance --------------------------------------------------------------------------------------


@pytest.mark.paper("Characteristic Guidance: Non-linear Correction for Diffusion Model at Large Guidance Scale")
def test_characteristic_is_exact_for_gaussians(x64):
    """The denoiser of p_c^scale p^(1 - scale) at every level of every process, where plain guidance is far from it."""
    given, plain = (np.array([[0.4, 0.1], [0.1, 0.3]]), np.array([[0.9, -0.2], [-0.2, 0.7]]))
    means = np.array([1.0, -0.5]), np.array([0.2, 0.1])
    denoise = Chosen(oracles.gaussian(means[0], given), oracles.gaussian(means[1], plain), np.ones(()))
    scale = 6.0
    precision = scale * np.linalg.inv(given) + (1 - scale) * np.linalg.inv(plain)
    mean = scale * np.linalg.solve(given, means[0]) + (1 - scale) * np.linalg.solve(plain, means[1])
    exact = oracles.gaussian(np.linalg.solve(precision, mean), np.linalg.inv(precision))
    for process, time in ((VP, 0.5), (VE, 1.5), (FLOW, 0.4)):
        level = process.level(time)
        guided = guidance.characteristic(denoise, np.zeros(()), scale, iterations=6, history=3)(X, level)
        np.testing.assert_allclose(guided, exact(X, level), rtol=1e-8)
        linear = guidance.characteristic(denoise, np.zeros(()), scale, iterations=0)(X, level)
        np.testing.assert_allclose(linear, guidance.classifier_free(denoise, np.zeros(()), scale)(X, level), rtol=1e-12)
        assert np.abs(linear - exact(X, level)).max() > 0.05


@pytest.mark.paper("Characteristic Guidance: Non-linear Correction for Diffusion Model at Large Guidance Scale")
def test_characteristic_on_mixtures(x64):
    """Its score violates the Fokker-Planck equation less, and its samples are nearer to the powered law."""
    given = oracles.mixture([0.5, 0.5], [[0.8], [1.6]], [0.15, 0.25])
    plain = oracles.mixture([0.5, 0.5], [[-0.8], [1.0]], [0.8, 0.9])
    denoise = Chosen(given, plain, np.ones(()))
    guided = [
        guidance.classifier_free(denoise, np.zeros(()), 6.0),
        guidance.characteristic(denoise, np.zeros(()), 6.0, iterations=5, history=2),
    ]
    grid = grids.karras(VE, 24)
    uniform = (np.arange(128) + 0.5) / 128
    starts = norm.ppf(uniform)[:, None] * 80
    run = jax.jit(
        lambda denoise: jax.vmap(lambda x: sample(jax.random.key(0), denoise, solvers.ddim(), grid, x=x).x)(starts)
    )
    line = np.linspace(-3, 5, 4001)
    clean = VE.level(1e-9)
    log = lambda law: np.asarray(jax.vmap(lambda x: law.log_density(x, clean))(line[:, None]))
    power = np.exp(6.0 * log(given) - 5.0 * log(plain))
    quantiles = np.interp(uniform, np.cumsum(power) / power.sum(), line)
    apart = [np.mean(np.abs(np.sort(np.asarray(run(denoise))[:, 0]) - quantiles)) for denoise in guided]
    assert apart[1] < 0.5 * apart[0]


# --- predictor-corrector guidance -----------------------------------------------------------------------------------


@pytest.mark.paper("Classifier-Free Guidance is a Predictor-Corrector")
def test_drift_identity(x64):
    """Ancestral guidance of scale g is the conditional flow and a Langevin drift of scale 2 g - 1, to round-off."""
    denoise = Chosen(
        oracles.gaussian([1.0, 0.2], 0.3), oracles.mixture([0.3, 0.7], [[1, 0], [-1, 0.5]], [0.4, 0.6]), np.ones(())
    )
    for g in (1.0, 2.5, 7.0):
        guided, sharper = (guidance.classifier_free(denoise, np.zeros(()), s) for s in (g, 2 * g - 1))
        for process, t in ((VP, 0.3), (FLOW, 0.6)):
            level = process.level(t)
            drift = process.reverse_sde(guided).drift(X, t)
            flow = process.probability_flow(denoise)(X, t)
            score = (level.alpha * sharper(X, level) - X) / level.sigma**2
            langevin = -0.5 * process.sde().diffusion(X, t) ** 2 * score
            np.testing.assert_allclose(drift, flow + langevin, rtol=1e-12)


@pytest.mark.paper("Classifier-Free Guidance is a Predictor-Corrector")
def test_predictor_corrector(x64):
    """The paper's counterexample: neither guided sampler has the powered law, and correctors approach it."""
    g = 3.0
    denoise = Chosen(oracles.gaussian(0.0, 1.0), oracles.gaussian(0.0, 2.0), np.ones(()))
    guided = guidance.classifier_free(denoise, np.zeros(()), g)
    grid = grids.karras(VE, 300)
    np.testing.assert_allclose(variance(guided, solvers.ddim(), grid), 2 ** (1 - g), rtol=0.03)
    halves = [variance(guided, solvers.ancestral(), grids.karras(VE, steps)) for steps in (150, 300)]
    np.testing.assert_allclose(2 * halves[1] - halves[0], (2 - 2 ** (2 - 2 * g)) / (2 * g - 1), rtol=0.01)
    powered = 2 / (g + 1)
    coarse = grids.karras(VE, 40)
    apart = []
    for correctors in (1, 4):
        pcg = guidance.predictor_corrector(denoise, np.zeros(()), g, correctors)
        solver = modifiers.langevin(solvers.ddim(), correctors, size=0.1)
        apart.append(abs(variance(pcg, solver, coarse) / powered - 1))
    assert apart[1] < 0.35 * apart[0]
    result = sample(jax.random.key(0), pcg, solver, coarse, shape=(), dtype=jnp.float64)
    assert int(result.nfe) == 40 * (2 * 4 + 1)


# --- classifiers ----------------------------------------------------------------------------------------------------

LAW = oracles.mixture([0.2, 0.3, 0.5], [[1.0, 0.6], [1.4, -0.4], [-1.2, 0.7]], [0.1, 0.2, 0.3])
CLASS = oracles.mixture([0.4, 0.6], LAW.means[:2], [0.1, 0.2])


@value
class Bayes:
    """The logits of the exact classifier, {0, 1} against {2}, of states, times a factor; of clean samples too."""

    factor: Array = 1.0

    def __call__(self, x: Array, level: Level | None = None) -> Array:
        level = VP.level(1e-4) if level is None else level
        share = LAW.responsibilities(x, level)
        return self.factor * jnp.log(jnp.stack([share[0] + share[1], share[2]]))


@pytest.mark.paper("Diffusion Models Beat GANs on Image Synthesis")
@pytest.mark.paper("Studying Classifier(-Free) Guidance From a Classifier-Centric Perspective")
def test_exact_classifier(x64):
    """With the exact classifier the conditional denoiser is the plain one and the classifier's gradient."""
    for process in (VP, VE, FLOW):
        for time in (process.end, 0.4 * process.end, 0.05):
            level = process.level(time)
            guided = guidance.classifier(LAW, Bayes(), 0)(X, level)
            expected = LAW(X, level) if level.alpha == 0 else CLASS(X, level)
            np.testing.assert_allclose(guided, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.paper("Elucidating The Design Space of Classifier-Guided Diffusion Generation")
def test_calibrated_classifier(x64):
    """An overconfident classifier is calibrated by its fitted temperature, and guides to the conditional law again.

    Lower marginal temperature, the joint density: the sample is drawn to the mode of the class.
    """
    draws = jax.vmap(LAW.sample)(jax.random.split(jax.random.key(0), 4000)).astype(jnp.float64)
    level = VP.level(0.3)
    noised = level.alpha * draws + level.sigma * jax.random.normal(jax.random.key(1), draws.shape)
    true = jax.vmap(lambda x: Bayes()(x, level))(noised)
    labels = np.asarray(jax.random.categorical(jax.random.key(2), true))
    temperature = guidance.fitted_temperature(4.0 * np.asarray(true), labels)
    np.testing.assert_allclose(temperature, 0.25, rtol=0.1)  # 4 sigma of 4000 draws
    guided = lambda **settings: guidance.classifier(LAW, Bayes(4.0), 0, **settings)(X, level)
    exact = guidance.classifier(LAW, Bayes(), 0)(X, level)
    np.testing.assert_allclose(guided(joint=0.25, marginal=0.25), exact, rtol=1e-12)
    assert np.abs(guided() - exact).max() > 0.1
    # with marginal 0 what is climbed is the logit itself
    climbed = guidance.classifier(LAW, Bayes(), 0, joint=2.0, marginal=0.0)(X, level)
    gradient = jax.grad(lambda x: 2 * Bayes()(x, level)[0])(X)
    np.testing.assert_allclose(climbed, LAW(X, level) + level.sigma**2 / level.alpha * gradient, rtol=1e-12)
    # of clean data, at low noise, the estimate serves as well as the state
    low = VP.level(0.02)
    on = guidance.classifier(LAW, Bayes(), 0, on="estimate")
    np.testing.assert_allclose(on(X, low), guidance.classifier(LAW, Bayes(), 0)(X, low), atol=0.02)
    half = guidance.classifier(LAW, Bayes(), 0, guidance.sine(0.0, 1.0))(X, FLOW.level(0.5))
    np.testing.assert_allclose(half, CLASS(X, FLOW.level(0.5)), rtol=1e-9)


@pytest.mark.paper("Studying Classifier(-Free) Guidance From a Classifier-Centric Perspective")
def test_away_from_the_boundary(x64):
    """Guidance takes samples away from the decision boundary; a flow between sets brings them back to the data."""
    margin = lambda x: Bayes()(x)[0] - Bayes()(x)[1]
    line = lambda x: 3.0 * x[0] - 4.0 * x[1] + 1.0
    np.testing.assert_allclose(guidance.boundary_distance(line, X), line(X) / 5, rtol=1e-12)
    starts = np.random.default_rng(5).normal(size=(48, 2))
    grid = grids.uniform(FLOW, 16)
    run = jax.jit(
        lambda denoise: jax.vmap(lambda x: sample(jax.random.key(0), denoise, solvers.ddim(), grid, x=x).x)(starts)
    )
    drawn = {scale: run(guidance.classifier(LAW, Bayes(), 0, scale)) for scale in (1.0, 4.0)}
    distances = jax.jit(jax.vmap(lambda x: guidance.boundary_distance(margin, x)))
    far = {scale: distances(x) for scale, x in drawn.items()}
    assert np.mean(far[4.0]) > np.mean(far[1.0]) + 4 * np.std(far[4.0] - far[1.0]) / np.sqrt(48)
    # the post-processor: the exact flow from the guided set, smoothed, to the data
    generated = oracles.mixture(np.ones(48), np.asarray(drawn[4.0]), np.full(48, 0.02))
    data = jax.vmap(CLASS.sample)(jax.random.split(jax.random.key(3), 48)).astype(jnp.float64)
    field = interpolants.exact(interpolants.linear(), generated, CLASS)
    times = np.linspace(0.0, 1.0, 5)
    after = jax.jit(jax.vmap(lambda x: interpolants.ode(field.velocity, times, x).x))(drawn[4.0])
    apart = lambda x: _w2(np.asarray(x), np.asarray(data))
    assert apart(after) < 0.7 * apart(drawn[4.0])


def _w2(a: np.ndarray, b: np.ndarray) -> float:
    cost = ((a[:, None] - b[None]) ** 2).sum(-1)
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))


# --- events ---------------------------------------------------------------------------------------------------------


@pytest.mark.paper(
    "User-defined Event Sampling and Uncertainty Quantification in Diffusion Models for Physical Dynamical Systems"
)
def test_event(x64):
    """Exact for a Gaussian and a linear event at all levels; right in the limit of no noise for a mixture."""
    a, c = np.array([0.8, -0.5]), 1.2
    mean, covariance = np.array([0.3, -0.2]), np.array([[0.5, 0.2], [0.2, 0.4]])
    law, constraint = oracles.gaussian(mean, covariance), lambda x: a @ x
    twist = guidance.event(constraint, c)
    for process, time in ((VP, 0.6), (VE, 2.0), (FLOW, 0.3)):
        level = process.level(time)
        gain = level.alpha * covariance @ np.linalg.inv(level.alpha**2 * covariance + level.sigma**2 * np.eye(2))
        posterior = covariance - level.alpha * gain @ covariance
        centre, spread = mean + gain @ (X - level.alpha * mean), np.sqrt(a @ posterior @ a)
        np.testing.assert_allclose(twist(law, X, level)[0], norm.logcdf((a @ centre - c) / spread), rtol=1e-10)
        # E[x_0 | x_t, a x_0 > c]: the mean of a truncated Gaussian
        z = (c - a @ centre) / spread
        exact = centre + posterior @ a / spread * norm.pdf(z) / norm.sf(z)
        np.testing.assert_allclose(guidance.event_guided(law, constraint, c)(X, level), exact, rtol=1e-9)
    level = VP.level(0.0)
    assert twist(law, np.array([2.0, -1.0]), level)[0] == 0 and twist(law, mean, level)[0] == -np.inf
    # the tail of a mixture, a nonlinear event: given x_t at lower and lower noise, against quadrature
    curved = lambda x: (x**2).sum()
    draws = np.random.default_rng(6).normal(size=(20000, 2))
    errors = []
    for time in (0.4, 0.1, 0.01):
        level = VP.level(time)
        x = np.array([0.9, 0.6]) * level.alpha
        share, v = np.asarray(LAW.responsibilities(x, level)), np.asarray(LAW.variances)[:, 0]
        gains = level.alpha * v / (level.alpha**2 * v + level.sigma**2)
        tail = 0.0
        for k in range(3):
            clean = LAW.means[k] + gains[k] * (x - level.alpha * LAW.means[k])
            clean = clean + np.sqrt(v[k] * (1 - level.alpha * gains[k])) * draws
            tail += share[k] * np.mean((clean**2).sum(1) > 1.5)
        errors.append(abs(float(np.exp(guidance.event(curved, 1.5)(LAW, x, level)[0])) - tail))
    assert errors[2] < errors[1] < 0.2 * errors[0] and errors[2] < 4 * np.sqrt(0.25 / 20000) + 0.01


@pytest.mark.paper(
    "User-defined Event Sampling and Uncertainty Quantification in Diffusion Models for Physical Dynamical Systems"
)
def test_event_samples():
    """Samples of an event in the tail of a Gaussian have its conditional moments."""
    law = oracles.gaussian(np.zeros(2), 1.0)
    guided = guidance.event_guided(law, lambda x: x[0], 2.0)
    grid = grids.uniform(VP, 64)
    keys = jax.random.split(jax.random.key(0), 512)
    x = jax.vmap(lambda key: sample(key, guided, solvers.ancestral(), grid, shape=(2,)).x)(keys)
    exact = norm.pdf(2.0) / norm.sf(2.0)
    spread = np.sqrt(1 + 2 * exact - exact**2)
    assert abs(x[:, 0].mean() - exact) < 4 * spread / np.sqrt(512) + 0.03
    assert np.mean(x[:, 0] > 2.0) > 0.97
    assert abs(x[:, 1].mean()) < 4 / np.sqrt(512) and abs(x[:, 1].std() - 1) < 4 / np.sqrt(1024)


def test_event_between_points_is_finite():
    """Two points in float32: the variance falls to 0 through all sizes, and guidance ends in the plain estimate."""
    law = lambda x, level: 2 * jax.nn.sigmoid(2 * level.alpha * x / level.sigma**2) - 1  # -1 and 1
    guided = guidance.event_guided(law, lambda x: x[0], 0.5)
    level = VP.level(half_log_snr=1.5)
    x = jnp.linspace(-9.0, 3.0, 2000)[:, None] * level.alpha
    found, plain = (jax.vmap(lambda x, f=f: f(x, level))(x) for f in (guided, law))
    assert jnp.isfinite(found).all()
    odds = np.exp(np.minimum(2 * np.asarray(x, np.float64)[:, 0] * float(level.alpha / level.sigma**2), 0.0))
    far = 4 * odds < 0.5 * np.finfo(np.float32).eps ** 2 * float(level.sigma / level.alpha) ** 2
    near = (odds > 1e-3) & (x[:, 0] < 0)
    assert far.sum() > 100 and (found == plain)[far].all() and (found > plain)[near].all()


# --- coupled models ---------------------------------------------------------------------------------------------------


@pytest.mark.paper("Projected Coupled Diffusion for Test-Time Constrained Joint Generation")
def test_coupled():
    """Two mixtures with a quadratic cost: the masses of the product's modes and its means; a box is never left."""
    first = oracles.mixture([0.5, 0.5], [[-1.0], [1.0]], [0.1, 0.1])
    second = oracles.mixture([0.3, 0.7], [[-0.8], [1.2]], [0.15, 0.15])
    strength = 1.0
    joint = guidance.coupled(
        guidance.side_by_side(first, second), lambda xy: 0.5 * ((xy[0] - xy[1]) ** 2).sum(), strength
    )
    grid = grids.times(VP, np.geomspace(1.0, 0.01, 24))
    solver = modifiers.langevin(solvers.ddim(eta=1.0), 4, size=0.3)
    keys = jax.random.split(jax.random.key(0), 1500)
    starts = jax.random.normal(jax.random.key(9), (2, 1500, 1))
    draw = lambda key, x, y: sample(key, joint, solver, grid, x=(x, y)).x
    x, y = (np.asarray(part)[:, 0] for part in jax.vmap(draw)(keys, *starts))
    # the product of every pair of modes with exp(-strength (x - y)^2 / 2) is Gaussian
    weights, means = np.zeros((2, 2)), np.zeros((2, 2, 2))
    for i in range(2):
        for j in range(2):
            precision = np.diag([1 / 0.1, 1 / 0.15]) + strength * np.array([[1, -1], [-1, 1]])
            m = np.array([first.means[i, 0], second.means[j, 0]])
            prior = np.array([m[0] / 0.1, m[1] / 0.15])
            means[i, j] = np.linalg.solve(precision, prior)
            log = 0.5 * (prior @ means[i, j] - m[0] ** 2 / 0.1 - m[1] ** 2 / 0.15)
            weights[i, j] = first.weights[i] * second.weights[j] * np.exp(log)
    weights /= weights.sum()
    found = np.array([[np.mean((np.sign(x) == a) & (np.sign(y) == b)) for b in (-1, 1)] for a in (-1, 1)])
    near = (x > 0) & (y > 0)
    np.testing.assert_allclose([x[near].mean(), y[near].mean()], means[1, 1], atol=0.06)
    assert np.abs(found - weights).max() < 4 * np.sqrt(0.25 / 1500) + 0.02
    boxed = guidance.constrained(joint, lambda xy: jax.tree.map(lambda leaf: jnp.clip(leaf, -0.5, 0.9), xy))
    ends = grids.uniform(VP, 8)
    x, y = jax.vmap(lambda x, y: sample(keys[0], boxed, solvers.ddim(), ends, x=(x, y)).x)(*starts[:, :64])
    assert x.min() >= -0.5 and y.min() >= -0.5 and x.max() <= np.float32(0.9) and y.max() <= np.float32(0.9)


# --- densities --------------------------------------------------------------------------------------------------------


@pytest.mark.paper("Devil is in the Details: Density Guidance for Detail-Aware Generation with Flow Models")
def test_density(x64):
    """The log-density at the end is the one asked for, up to the solver's error; unguided it is not."""
    first, last = 0.9, 0.05
    grid = grids.times(VP, np.linspace(first, last, 129))
    start, end = VP.level(first), VP.level(last)
    x = np.array([0.9, -0.4])
    before = float(LAW.log_density(x, start))
    run = lambda denoise, solver: float(LAW.log_density(sample(jax.random.key(0), denoise, solver, grid, x=x).x, end))
    found = []
    for wanted in (-4.0, -2.0):
        rate = (before - wanted) / (first - last)
        found.append(run(guidance.density(LAW, VP, rate), solvers.heun()))
    np.testing.assert_allclose(found, [-4.0, -2.0], atol=5e-3)
    plain = run(guidance.density(LAW, VP, rate, scale=0.0), solvers.heun())
    assert abs(plain + 2.0) > 0.3

    # with noise along the level sets: to the first order of Euler's steps
    fine = grids.times(VP, np.linspace(first, last, 1001))
    guided = guidance.density(LAW, VP, rate, eta=0.7)
    ends = jax.vmap(
        lambda key: sample(key, guided, solvers.euler_maruyama(0.7), fine, x=x, noise=guidance.tangential(LAW)).x
    )(jax.random.split(jax.random.key(1), 8))
    reached = jax.vmap(lambda x: LAW.log_density(x, end))(ends)
    np.testing.assert_allclose(reached, -2.0, atol=0.1)
    assert ends.std(0).max() > 0.1


@pytest.mark.paper("Devil is in the Details: Density Guidance for Detail-Aware Generation with Flow Models")
def test_score_alignment(x64):
    """Of a Gaussian the scores are aligned, and scaling the noise down raises the log-density of the sample."""
    law = oracles.gaussian(np.array([0.5, -0.2]), np.array([[0.6, 0.3], [0.3, 0.4]]))
    t, s = VP.level(1.0), VP.level(0.01)
    flow = lambda x: law.flow(x, t, s)
    alignment = guidance.score_alignment(flow, lambda x: law.score(x, t), lambda x: law.score(x, s))
    x = X - np.asarray(t.alpha * law.mean)
    small = 1e-5
    moved = lambda h: law.log_density(flow(x + h * law.score(x, t)), s)
    np.testing.assert_allclose(alignment(x), (moved(small) - moved(-small)) / (2 * small), rtol=1e-6)
    assert alignment(x) > 0
    densities = [float(law.log_density(flow(t.alpha * law.mean + r * X), s)) for r in (1.5, 1.0, 0.5)]
    assert densities[0] < densities[1] < densities[2]
