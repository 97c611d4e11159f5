"""Rules, schedules and skipped calls of guidance, against NumPy in float64 and laws in closed form."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, guidance, oracles, processes, sample, solvers
from diffjax.guidance.rules import in_target
from diffjax.levels import Array, Level, Tree, value

PROCESS = processes.vp()
LEVEL = PROCESS.level(0.4)
X = np.random.default_rng(0).normal(size=12)
STRONG, WEAK = np.random.default_rng(1).normal(size=(2, 12))
SCALE = 3.7


@value
class Pair:
    """A denoiser whose estimate is its condition."""

    condition: Tree

    def __call__(self, x: Tree, level: Level) -> Tree:
        return self.condition


@value
class Classes:
    """The exact denoiser of a mixture whose weights are the softmax of the condition."""

    law: Any
    condition: Array

    def __call__(self, x: Array, level: Level) -> Array:
        return dataclasses.replace(self.law, weights=jax.nn.softmax(self.condition))(x, level)


def target(x0, x, level, of):
    """The quantity of a clean estimate, from its definition."""
    eps = (x - level.alpha * x0) / level.sigma
    return {"data": x0, "velocity": level.alpha * eps - level.sigma * x0, "flow": eps - x0}[of]


def clean(y, x, level, of):
    """Its inverse, by solving the two linear equations."""
    row = {"data": [1, 0], "velocity": [-level.sigma, level.alpha], "flow": [-1, 1]}[of]
    matrix = np.array([[level.alpha, level.sigma], row])
    return np.linalg.solve(matrix, np.stack([x, y]))[0]


@pytest.mark.paper("Common Diffusion Noise Schedules and Sample Steps are Flawed")
@pytest.mark.parametrize("of", ["data", "velocity", "flow"])
def test_rescale(x64, of):
    """The paper's equations 15 to 17; with share 1 the guided output has the deviation of the conditional one."""
    for share in (0.7, 1.0):
        rule = guidance.rescale(share, of)
        x0 = guidance.autoguidance(Pair(STRONG), Pair(WEAK), SCALE, rule)(X, LEVEL)
        positive, negative = (target(a, X, LEVEL, of) for a in (STRONG, WEAK))
        guided = negative + SCALE * (positive - negative)
        rescaled = guided * positive.std() / guided.std()
        np.testing.assert_allclose(x0, clean(share * rescaled + (1 - share) * guided, X, LEVEL, of), rtol=1e-12)
    np.testing.assert_allclose(target(x0, X, LEVEL, of).std(), positive.std(), rtol=1e-12)


@pytest.mark.paper("Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models")
def test_projected(x64):
    """Its update is orthogonal to the conditional estimate and no longer than asked; momentum is the recurrence."""
    call = lambda rule: guidance.autoguidance(Pair(STRONG), Pair(WEAK), SCALE, rule)
    plain = call(None)(X, LEVEL)
    np.testing.assert_allclose(call(guidance.apg(parallel=1.0))(X, LEVEL), plain, rtol=1e-12)
    update = call(guidance.apg())(X, LEVEL) - STRONG
    assert abs(update @ STRONG) < 1e-12
    parallel = (plain - STRONG) @ STRONG / (STRONG @ STRONG) * STRONG
    np.testing.assert_allclose(update, plain - STRONG - parallel, rtol=1e-10)
    short = call(guidance.apg(parallel=1.0, norm=0.5))(X, LEVEL) - STRONG
    np.testing.assert_allclose(np.linalg.norm(short), 0.5 * (SCALE - 1), rtol=1e-12)
    remembered = call(guidance.apg(parallel=1.0, momentum=-0.6))
    _, memory = remembered.apply(X, LEVEL, remembered.init(X))
    second, _ = remembered.apply(X, LEVEL, memory)
    np.testing.assert_allclose(second, STRONG + (SCALE - 1) * 0.4 * (STRONG - WEAK), rtol=1e-12)


@pytest.mark.paper("CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models")
def test_zero_star(x64):
    """The scale is the least-squares one; where it is zero-init the state of a flow stands still, without a call."""
    level = processes.flow().level(0.4)
    guided = guidance.autoguidance(Pair(STRONG), Pair(WEAK), SCALE, guidance.zero_star())
    v, strong, weak = (target(a, X, level, "flow") for a in (guided(X, level), STRONG, WEAK))
    s = np.linalg.lstsq(weak[:, None], strong, rcond=None)[0][0]
    np.testing.assert_allclose(v, (1 - SCALE) * s * weak + SCALE * strong, rtol=1e-12)
    grid = grids.uniform(processes.flow(), 10)
    run = lambda share: sample(
        jax.random.key(0), guidance.zero_init(Pair(STRONG), share), solvers.ddim(), grid, x=X, save="states"
    )
    kept = run(0.2)
    np.testing.assert_allclose(kept.saved.states[2], X, rtol=1e-12)
    assert np.abs(kept.saved.states[3] - X).max() > 0.1 and int(kept.nfe) == 8


def test_refused():
    for wrong in (
        lambda: guidance.rescale(1.5),
        lambda: guidance.rescale(0.5, "noise"),
        lambda: guidance.apg(norm=0.0),
        lambda: guidance.apg(parallel=np.inf),
        lambda: guidance.zero_star("score"),
        lambda: guidance.interval(2.0, 1.0, 0.5),
        lambda: guidance.interval(np.nan),
        lambda: guidance.ramp(2.0, power=0.0),
        lambda: guidance.ramp(2.0, shape="linear"),
        lambda: guidance.sine(np.inf),
        lambda: guidance.zero_init(Pair(STRONG), 1.1),
        lambda: guidance.adaptive(Pair(STRONG), WEAK, threshold=1.1),
        lambda: guidance.adaptive(Pair(STRONG), WEAK, of="noise"),
        lambda: guidance.composed(Pair(STRONG), WEAK, np.stack([WEAK, WEAK]), [1.0]),
        lambda: guidance.composed(Pair(STRONG), WEAK, WEAK, [1.0]),
        lambda: guidance.linear_guidance(Pair(STRONG), WEAK, np.zeros((3, 2, 4)), np.zeros(4, bool)),
        lambda: guidance.fitted_weights(np.zeros((2, 3)), np.zeros((2, 4))),
        lambda: guidance.weak_to_strong(Pair(STRONG), Pair(WEAK), grids.uniform(PROCESS, 3), -1),
        lambda: guidance.autoguidance(guidance.adaptive(Pair(STRONG), WEAK), Pair(WEAK)),
        lambda: guidance.cads(Pair(1), jax.random.key(0)),
        lambda: guidance.cads(Pair(STRONG), jax.random.key(0), low=0.9, high=0.5),
        lambda: guidance.predictor_corrector(Pair(STRONG), WEAK, correctors=0, predictors=0),
        lambda: guidance.characteristic(Pair(STRONG), WEAK, iterations=-1),
        lambda: guidance.refined_noise(X, lambda x: x, steps=-1),
        lambda: guidance.refined_noise(X, lambda x: x, limit=0.0),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_several_conditions_of_gaussians(x64):
    """With one covariance the composition is the exact denoiser of the Gaussian whose mean is composed likewise."""
    covariance = np.array([[0.7, 0.2], [0.2, 0.4]])
    law = oracles.gaussian(np.zeros(2), covariance)

    @value
    class Shifted:
        condition: Array

        def __call__(self, x, level):
            return dataclasses.replace(law, mean=self.condition)(x, level)

    means, null, scales = np.array([[1.0, 0.3], [-0.5, 0.8]]), np.array([0.1, -0.2]), np.array([2.0, -0.7])
    guided = guidance.composed(Shifted(means[0]), null, means, scales)
    exact = oracles.gaussian(null + scales @ (means - null), covariance)
    for process in (PROCESS, processes.flow()):
        for time in (process.end, 0.5, 0.1):
            level = process.level(time)
            np.testing.assert_allclose(guided(X[:2], level), exact(X[:2], level), rtol=1e-12)


# Four modes: class A has two of them, and guidance away from B prefers the farther one.
MODES = oracles.mixture(np.ones(4), [[1.0, 0.6], [2.2, -0.4], [-1.2, 0.7], [-0.8, -0.9]], np.full(4, 0.09))
A, PRIOR = np.array([3.0, 3.0, -3.0, -3.0]), np.zeros(4)
STARTS = np.random.default_rng(2).normal(size=(32, 2))
GRID = grids.uniform(processes.flow(), 16)


def drawn(denoise, starts=STARTS, solver=None, grid=GRID, save=()):
    run = lambda x: sample(jax.random.key(0), denoise, solver or solvers.ddim(), grid, x=x, save=save)
    return jax.vmap(run)(starts)


@pytest.mark.paper("Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models")
def test_adaptive():
    """Threshold 1 is plain guidance; below, calls are saved at a deviation that grows with the saving.

    Linear guidance deviates less than a run whose unconditional estimates are left out in the same calls.
    """
    denoise = Classes(MODES, jnp.asarray(A, jnp.float32))
    starts = STARTS.astype(np.float32)
    plain = drawn(guidance.classifier_free(denoise, PRIOR, SCALE), starts, save=("states", "x0"))
    saved, deviations = [], []
    for threshold in (1.0, 0.9999, 0.99):
        result = drawn(guidance.adaptive(denoise, PRIOR, SCALE, threshold), starts)
        saved.append(float(32 - result.nfe.mean()))
        deviations.append(float(np.sqrt(np.mean((result.x - plain.x) ** 2))))
    assert saved[0] == 0 and deviations[0] < 1e-5
    assert 8 < saved[1] < saved[2] and deviations[0] < deviations[1] < deviations[2] and deviations[1] < 0.05

    levels = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), GRID.t)
    states = plain.saved.states[:, :-1]
    velocity = lambda condition: jax.vmap(
        lambda path: jax.vmap(lambda x, level: in_target("flow", Classes(MODES, condition)(x, level), x, level))(
            path, levels
        )
    )(states)
    weights = guidance.fitted_weights(velocity(jnp.asarray(A)), velocity(jnp.asarray(PRIOR)))
    skip = (np.arange(16) % 2 == 1) & (np.arange(16) > 3)
    linear = drawn(guidance.linear_guidance(denoise, PRIOR, weights, skip, SCALE), starts)
    assert np.all(linear.nfe == 32 - skip.sum())
    left_out = guidance.linear_guidance(denoise, PRIOR, weights * 0 + (np.eye(16)[:, None] * [[1], [0]]), skip, SCALE)
    distance = lambda x: float(np.sqrt(np.mean((x - plain.x) ** 2)))
    assert distance(linear.x) < 0.3 * distance(drawn(left_out, starts).x)


@pytest.mark.paper("Weak-to-Strong Diffusion with Reflection")
def test_reflection(x64):
    """With DDIM it is the paper's algorithm; for small steps autoguidance of scale 2; and it brings samples home."""
    truth, strong, weak = (oracles.mixture([0.4, 0.6], [[-1 + m], [1 + m]], [0.1, 0.2]) for m in (0.0, 0.2, 0.5))
    grid = grids.uniform(PROCESS, 12)[:11]
    guided = guidance.weak_to_strong(strong, weak, grid)
    levels = [jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], grid.t) for i in range(11)]
    levels.append(jax.tree.map(lambda leaf: np.asarray(leaf)[-1], grid.s))

    def ddim(denoise, x, t, s):
        x0 = np.asarray(denoise(x, t))
        return s.alpha * x0 + s.sigma * (x - t.alpha * x0) / t.sigma

    x = np.array([0.8])
    for t, s in itertools.pairwise(levels[:4]):
        below = ddim(strong, x, t, s)
        eps = (below - s.alpha * (x0 := np.asarray(weak(below, s)))) / s.sigma
        x = ddim(strong, t.alpha * x0 + t.sigma * eps, t, s)
    result = sample(jax.random.key(0), guided, solvers.ddim(), grid, x=np.array([0.8]), save="states")
    np.testing.assert_allclose(result.saved.states[3], x, rtol=1e-9)
    assert int(result.nfe) == 33

    auto = guidance.autoguidance(strong, weak, 2.0)
    gaps = []
    for steps in (64, 128):
        fine = grids.uniform(PROCESS, steps)
        level = PROCESS.level(0.5)
        gaps.append(abs(float((guidance.weak_to_strong(strong, weak, fine)(x, level) - auto(x, level))[0])))
    assert 1.8 < gaps[0] / gaps[1] < 2.2

    starts = np.linspace(-2, 2, 41)[:, None]
    end = lambda denoise: drawn(denoise, starts, grid=grids.uniform(PROCESS, 24)).x
    home = np.asarray(end(truth))
    error = lambda denoise: np.sqrt(np.mean((np.asarray(end(denoise)) - home) ** 2))
    assert error(guidance.weak_to_strong(strong, weak, grids.uniform(PROCESS, 24))) < 0.75 * error(strong)


@pytest.mark.paper("Guiding a Diffusion Model with a Bad Version of Itself")
def test_autoguidance(x64):
    """Of two Gaussians whose means err the same way, the scale that takes the error back is exact at every level."""
    strong, weak, truth = (oracles.gaussian([m, 1.0], [0.5, 0.3]) for m in (0.2, 0.5, 0.0))
    guided = guidance.autoguidance(strong, weak, 5 / 3)
    for time in (1.0, 0.5, 0.1):
        level = PROCESS.level(time)
        np.testing.assert_allclose(guided(X[:2], level), truth(X[:2], level), rtol=1e-12, atol=1e-14)


@pytest.mark.paper(
    "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models"
)
def test_interval():
    """Guidance at high noise removes a mode that guidance in the middle keeps, at more calls."""
    denoise = Classes(MODES, jnp.asarray(A, jnp.float32))
    starts = np.random.default_rng(3).normal(size=(256, 2)).astype(np.float32)
    shares, calls = [], []
    for scale in (guidance.interval(6.0, 0.0, 2.0), guidance.interval(6.0)):
        result = drawn(guidance.classifier_free(denoise, PRIOR, scale), starts)
        near = np.argmin(((result.x[:, None] - MODES.means) ** 2).sum(-1), axis=1)
        shares.append(np.mean(near == 0))
        calls.append(int(result.nfe[0]))
    assert calls == [26, 32]
    assert shares[0] > shares[1] + 4 * np.sqrt(0.25 / 256)


@pytest.mark.paper("CADS: Unleashing the Diversity of Diffusion Models through Condition-Annealed Sampling")
def test_cads():
    """Under strong guidance the share of the rarer mode of the class comes back, and the class is kept."""
    starts = np.random.default_rng(4).normal(size=(256, 2)).astype(np.float32)
    denoise = guidance.classifier_free(Classes(MODES, jnp.asarray(A, jnp.float32)), PRIOR, 4.0)
    keys = jax.random.split(jax.random.key(1), 256)

    def run(noise):
        draw = lambda key, x: sample(
            key, guidance.cads(denoise, jax.random.fold_in(key, 1), noise, 0.4, 0.8), solvers.ddim(), GRID, x=x
        )
        near = np.argmin(((jax.vmap(draw)(keys, starts).x[:, None] - MODES.means) ** 2).sum(-1), axis=1)
        counts = np.bincount(near, minlength=4) / 256
        entropy = -sum(p * np.log(p) for p in counts[:2] / counts[:2].sum() if p > 0)
        return entropy, counts[:2].sum()

    (before, accurate), (after, still) = run(0.0), run(1.5)
    assert after > before + 0.1 and still > accurate - 0.06


def test_noised_condition(x64):
    """Mean and deviation of the condition at three levels, from the schedule; rescaled, those of the clean one."""
    y = 2.0 + np.random.default_rng(7).normal(size=4000)
    for share, g in ((0.5, 1.0), (0.65, 5 / 6), (0.75, 0.5), (0.95, 0.0)):
        level = processes.flow().level(share)
        noised = guidance.cads(Pair(y), jax.random.key(0), 0.3, 0.6, 0.9, mix=0.0).noised(level)
        np.testing.assert_allclose(np.mean(noised), np.sqrt(g) * y.mean(), atol=4 * 0.3 / np.sqrt(4000))
        np.testing.assert_allclose(np.std(noised), np.sqrt(g * y.var() + 0.09 * (1 - g)), rtol=4 / np.sqrt(2000))
        back = guidance.cads(Pair(y), jax.random.key(0), 0.3, 0.6, 0.9).noised(level)
        np.testing.assert_allclose([np.mean(back), np.std(back)], [y.mean(), y.std()], rtol=1e-10)


@pytest.mark.paper("Noise-Level Diffusion Guidance: Well Begun is Half Done")
def test_refined_noise(x64):
    """The class becomes more likely given the noise, the norm stays, and fewer samples miss the class."""
    level = GRID[1:].start
    denoise = Classes(MODES, A)
    direction = guidance.noise_direction(denoise, Classes(MODES, PRIOR), level)
    refine = jax.vmap(lambda x: guidance.refined_noise(x, direction, steps=8, rate=0.2))
    refined = refine(STARTS)
    np.testing.assert_allclose(np.linalg.norm(refined, axis=1), np.linalg.norm(STARTS, axis=1), rtol=1e-12)
    likely = lambda x: np.log(jax.vmap(lambda x: MODES.responsibilities(x, level))(x)[:, :2].sum(1))
    assert np.mean(likely(refined) > likely(STARTS) - 1e-12) > 0.9
    assert np.mean(likely(refined)) > np.mean(likely(STARTS)) + 0.05
    np.testing.assert_array_equal(guidance.refined_noise(X, direction, steps=0), X)
    flow = guidance.noise_direction(denoise, Classes(MODES, PRIOR), level, "flow")  # minus the difference of eps - x0
    np.testing.assert_allclose(flow(STARTS[0]), (1 + level.alpha / level.sigma) * direction(STARTS[0]), rtol=1e-9)
