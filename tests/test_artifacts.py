"""Artifacts found by jumps of the score and repaired on the way; initial noise that is optimised and stays valid."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import diagnostics, grids, guidance, oracles, processes, sample, solvers
from diffjax.diagnostics.reinjected import score_jump

FLOW = processes.flow()
PIXEL = oracles.mixture([0.5, 0.5], [-1.0, 1.0], [0.01, 0.01])  # of every pixel, independently
PATCH = np.zeros((8, 8), bool)
PATCH[2:4, 5:7] = True


def good(x, level):
    return jax.vmap(lambda v: PIXEL(v, level))(x.reshape(-1)).reshape(x.shape)


def broken(x, level):
    """The exact denoiser, which for some of the way takes a patch to where no data are."""
    wrong = PATCH & (level.time > 0.04) & (level.time < 0.12)
    return jnp.where(wrong, 5.0, good(x, level))


@pytest.fixture(scope="module")
def drawn():
    grid = grids.uniform(FLOW, 50)
    fixed = lambda solver: diagnostics.reinjected(solver, low=1.8, high=4.0)
    keys = jax.random.split(jax.random.key(0), 40)

    def run(denoise, solver):
        return jax.vmap(lambda key: sample(key, denoise, solver, grid, shape=(8, 8), save="x0"))(keys)

    return jax.jit(lambda: {
        "good": run(good, solvers.ddim()),
        "broken": run(broken, solvers.ddim()),
        "repaired": run(broken, fixed(solvers.ddim())),
        "unneeded": run(good, fixed(solvers.ddim())),
        "stochastic": run(broken, fixed(solvers.ddim(0.5))),
    })()  # fmt: skip


@pytest.mark.paper("Temporal Score Analysis for Understanding and Correcting Diffusion Artifacts")
def test_artifacts_are_found_and_repaired_on_the_way(drawn):
    """A corrupted patch: the jumps of its score tell it from the rest, and new noise brings it back to the data."""
    off = lambda found: np.abs(np.abs(np.asarray(found.x)) - 1) > 0.45  # 4.5 standard deviations of a mode
    maps = np.asarray(jax.vmap(lambda saved: diagnostics.score_jumps(saved, 1.8, 4.0))(drawn["broken"].saved))
    inside, outside = maps[:, PATCH].ravel(), maps[:, ~PATCH].ravel()
    auc = np.mean(inside[:, None] > outside[None])
    rates = {name: off(found)[:, PATCH].mean() for name, found in drawn.items()}
    assert auc > 0.99
    assert rates["broken"] > 0.95 and rates["good"] < 0.01
    assert rates["repaired"] < 0.02 and rates["stochastic"] < 0.05
    # where nothing was found nothing was changed: pixels are independent
    rest = np.isclose(drawn["repaired"].x, drawn["broken"].x, atol=1e-6)[:, ~PATCH]
    assert rest.mean() > 0.9
    assert np.isclose(drawn["unneeded"].x, drawn["good"].x, atol=1e-6).mean() > 0.9
    assert off(drawn["unneeded"]).mean() < 0.01
    assert np.all(drawn["repaired"].nfe == 50)


def test_the_jump_is_a_robust_score():
    """Against NumPy; and a solver whose threshold is never reached is the solver itself."""
    change = np.array([0.1, -0.2, 0.3, 0.4, -5.0])
    centre = np.median(np.abs(change))
    expected = (np.abs(change) - centre) / (1.4826 * np.median(np.abs(np.abs(change) - centre)))
    np.testing.assert_allclose(score_jump(jnp.asarray(change)), expected, rtol=1e-5)
    np.testing.assert_array_equal(score_jump(jnp.ones(4)), np.zeros(4))
    x = jax.random.normal(jax.random.key(0), (8, 8))
    grid = grids.uniform(FLOW, 6)
    run = lambda solver: sample(jax.random.key(1), broken, solver, grid, x=x).x
    np.testing.assert_allclose(run(diagnostics.reinjected(solvers.dpmpp(), np.inf)), run(solvers.dpmpp()), atol=1e-6)
    with pytest.raises(ValueError, match="threshold"):
        diagnostics.reinjected(solvers.ddim(), 0.0)
    with pytest.raises(ValueError, match="low"):
        diagnostics.reinjected(solvers.ddim(), low=1.0, high=0.0)
    with pytest.raises(ValueError, match="save"):
        diagnostics.score_jumps(sample(jax.random.key(1), good, solvers.ddim(), grid, x=x).saved)


VP = processes.vp()
MEANS = np.array([[-1.5, 0.0], [1.5, 0.0]])
DATA = oracles.mixture([0.85, 0.15], MEANS, np.full(2, 0.04))


@pytest.mark.paper("InitNO: Boosting Text-to-Image Diffusion Models via Initial Noise Optimization")
def test_optimised_noise_raises_success_within_its_divergence():
    """A rare component is asked for: nearly always made, with noise that stays in bounds and samples that are data."""
    grid = grids.uniform(VP, 25)
    loss = lambda x: -jnp.log(DATA.responsibilities(x, grid.start)[1])

    def one(key, bound):
        keywords = {"steps": 60, "rounds": 1, "learning_rate": 0.05}
        found = guidance.optimised_noise(key, loss, (2,), threshold=-1.0, divergence=bound, **keywords)
        x = sample(key, DATA, solvers.ddim(), grid, x=found.x).x
        return found, x, sample(key, DATA, solvers.ddim(), grid, x=jax.random.normal(key, (2,))).x

    found, x, plain = jax.jit(jax.vmap(one, (0, None)))(jax.random.split(jax.random.key(0), 300), 0.4)
    distances = lambda x: np.linalg.norm(np.asarray(x)[:, None] - MEANS, axis=-1)
    success, before = np.mean(distances(x).argmin(1) == 1), np.mean(distances(plain).argmin(1) == 1)
    assert abs(before - 0.15) < 4 * np.sqrt(0.15 * 0.85 / 300) and success > 0.4
    assert np.all(found.divergence <= 0.4 * (1 + 1e-4)) and found.divergence.mean() > 0.3
    assert np.mean(distances(x).min(1) < 4.5 * 0.2) > 0.97
    assert not np.any(found.valid) and np.all(found.rounds == 1)


def test_optimised_noise_of_a_quadratic_loss():
    """The bound, the threshold, the rounds and the tree, against a loss whose gradient is known."""
    target = jnp.full(4, 3.0)
    loss = lambda x: 0.5 * jnp.sum((x["a"] - target) ** 2)
    key = jax.random.key(2)

    @jax.jit
    def run(threshold, bound, rate):
        keywords = {"threshold": threshold, "divergence": bound, "learning_rate": rate, "steps": 40, "rounds": 3}
        return guidance.optimised_noise(key, loss, {"a": (4,)}, **keywords)

    free = run(5e-2, 1e9, 0.5)
    assert bool(free.valid) and int(free.rounds) == 1 and free.loss < 5e-2 and free.divergence > 0.5
    tight = run(1e-2, 1e-3, 0.5)
    z = [jax.random.normal(jax.random.split(jax.random.fold_in(key, i), 1)[0], (4,)) for i in range(3)]
    assert not bool(tight.valid) and int(tight.rounds) == 3
    np.testing.assert_allclose(tight.divergence, 1e-3, rtol=1e-3)
    starts = [float(loss({"a": v})) for v in z]
    best = z[int(np.argmin(starts))]  # moved by so little the best start stays the best
    assert tight.loss < min(starts)
    np.testing.assert_allclose(tight.x["a"], best, atol=4 * np.sqrt(2e-3 * 4))
    easy = run(1e9, 1e-3, 0.5)
    np.testing.assert_allclose(easy.x["a"], z[0], atol=1e-6)  # accepted as it was drawn
    assert bool(easy.valid) and int(easy.rounds) == 1
    with pytest.raises(ValueError, match="steps"):
        guidance.optimised_noise(key, loss, {"a": (4,)}, threshold=0.0, steps=0)
    with pytest.raises(ValueError, match="divergence"):
        guidance.optimised_noise(key, loss, {"a": (4,)}, threshold=0.0, divergence=0.0)


def test_a_place_that_jumps_is_noised_to_the_level_of_the_step_from_the_estimate_before():
    """By hand: ``alpha_s x0_before + sigma_s z`` at the one entry that jumps, the plain step at the others."""
    inner = solvers.ddim()
    solver = diagnostics.reinjected(inner, low=-10.0, high=10.0)
    row = jax.tree.map(lambda leaf: leaf[4], solver.plan(grids.uniform(processes.vp(), 8)))
    x, before, z, change = jnp.asarray(np.random.default_rng(0).normal(size=(4, 20)), jnp.float32)
    after = before + 0.01 * change.at[7].set(1e4)
    old, memory = solver.init(x)
    new, _, _ = solver.step(
        (z,), lambda x, level: after, x, (old, memory._replace(x0=before, made=jnp.array(True))), row
    )
    plain, _, _ = inner.step((), lambda x, level: after, x, inner.init(x), row)
    expected = plain.at[7].set(row.s.alpha * before[7] + row.s.sigma * z[7])
    np.testing.assert_allclose(new, expected, rtol=1e-6)
