"""Noise between steps: churn as in EDM's algorithm 2, gaps that keep the marginal, and their composition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, modifiers, oracles, processes, sample, solvers
from tests import contract
from tests.contract import GAUSSIAN, MIXTURE, STARTS, at, length, run

EDM = processes.edm()


def draws(i, like=STARTS, count=2):
    return tuple(np.random.default_rng((i, k)).normal(size=like.shape) for k in range(count))


@pytest.mark.parametrize("churn", [3.0, 30.0])
def test_algorithm_2(churn):
    """Heun with churn is algorithm 2 of the paper, written out with its own symbols."""
    low, high, inflation, n = 0.05, 50.0, 1.007, 9
    grid = grids.karras(EDM, n, sigma_max=60.0)
    solver = modifiers.churned(solvers.heun(), churn, low, high, inflation)
    rows = solver.plan(grid)
    normals = [draws(i, count=1)[0] for i in range(n + 1)]

    levels = [*grid.t.sigma, 0.0]
    gammas = [min(churn / n, 2**0.5 - 1) if low <= sigma <= high else 0.0 for sigma in levels[:-1]]
    assert 0 < sum(g == 0 for g in gammas) < n
    denoised = lambda x, sigma: MIXTURE(x, EDM.level(sigma))
    x = STARTS * levels[0]
    for i in range(n):
        t, s = levels[i], levels[i + 1]
        raised = t + gammas[i] * t
        noisy = x + np.sqrt(raised**2 - t**2) * inflation * normals[i]
        slope = (noisy - denoised(noisy, raised)) / raised
        x = noisy + (s - raised) * slope
        if s != 0:
            x = noisy + (s - raised) * 0.5 * (slope + (x - denoised(x, s)) / s)
        np.testing.assert_allclose(rows.t.sigma[i], raised, rtol=1e-10)

    # the noise of a step is added at the end of the row before it: row i holds the draw of step i + 1
    assert gammas[0] == 0.0
    found = run(solver, MIXTURE, STARTS * levels[0], rows, lambda i: (normals[i + 1],))[-1]
    np.testing.assert_allclose(found, x, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "base", [solvers.heun, solvers.dpmpp, lambda: solvers.ddim(1.0)], ids=["heun", "dpmpp", "ddim"]
)
def test_no_churn_is_the_base_solver(base):
    """Without churn, or outside its interval, levels and states are those of the base solver bit for bit."""
    rows = base().plan(contract.rough(7))
    noise = lambda i: draws(i, count=base().draws)
    expected = run(base(), MIXTURE, STARTS, rows, noise)[-1]
    for solver in (
        modifiers.churned(base(), 0.0),
        modifiers.churned(base(), 40.0, 1e5, 1e6),
        modifiers.renoised(base()),
    ):
        changed = solver.plan(contract.rough(7))
        for a, b in zip(jax.tree.leaves((changed.t, changed.s)), jax.tree.leaves((rows.t, rows.s)), strict=True):
            np.testing.assert_array_equal(a, b)
        wide = lambda i: (np.ones_like(STARTS), *noise(i))
        np.testing.assert_allclose(run(solver, MIXTURE, STARTS, changed, wide)[-1], expected, rtol=1e-13)


def test_churn_stays_in_the_process():
    """A level beyond the noisy end is lowered to it; the level of pure noise and the data are left alone."""
    for process in (processes.flow(), processes.vp(), EDM):
        rows = modifiers.churned(solvers.euler(), 1e3).plan(grids.uniform(process, 4))
        assert np.all(rows.t.time <= process.end) and rows.t.time[0] == process.end
        ratio = rows.t.sigma[1:] / rows.t.alpha[1:] * rows.s.alpha[:-1] / rows.s.sigma[:-1]
        inside = rows.t.time[1:] < process.end * (1 - 1e-9)
        np.testing.assert_allclose(ratio[inside], 2**0.5, rtol=1e-9)
        assert np.all(ratio <= 2**0.5 * (1 + 1e-9))


def restart_grid(steps):
    """Down to 0.2, back up to 0.6, down again to 0.01, with ``steps`` in each leg."""
    down = contract.rough(steps, 0.9, 0.2)
    again = contract.rough(steps, 0.6, 0.01)
    t, s = (np.concatenate([a, b]) for a, b in ((down.t.time, again.t.time), (down.s.time, again.s.time)))
    return grids.pairs(processes.vp(), t, s)


@pytest.mark.parametrize(
    "base", [solvers.heun, solvers.dpmpp, lambda: solvers.ddim(1.0)], ids=["heun", "dpmpp", "ddim"]
)
def test_gaps_keep_the_marginal(base):
    """On Gaussian data the law at the end of a restart grid tends to the exact marginal, at the base solver's order."""
    solver = modifiers.renoised(base())
    goal = GAUSSIAN.marginal(processes.vp().level(0.01))

    def error(steps):
        found = contract.moments(solver, solver.plan(restart_grid(steps)))
        return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(found, goal, strict=True))))

    found = contract.ladder(error)
    order = 1 if base().draws else base().order
    assert found.settled and found.order > order - 0.2, found


def test_inflation_multiplies_the_added_variance():
    solver = modifiers.renoised(solvers.ddim())
    process = processes.vp()
    plan = lambda inflation: solver.plan(grids.pairs(process, [0.8, 0.6], [0.3, 0.1], inflation=inflation))
    (_, plain), (_, inflated) = (contract.moments(solver, plan(k)) for k in (1.0, 1.3))
    # what the noise adds at 0.6 goes through one more linear step
    a, b = process.level(0.6), process.level(0.3)
    added = a.sigma**2 - (a.alpha / b.alpha * b.sigma) ** 2
    _, last = solver.plan(grids.pairs(process, [0.8, 0.6], [0.3, 0.1])), process.level(0.1)
    linear = ddim_matrix(a, last)
    np.testing.assert_allclose(inflated - plain, (1.3**2 - 1) * added * linear @ linear.T, rtol=1e-9, atol=1e-12)


def ddim_matrix(t, s):
    """The linear part of one DDIM step on Gaussian data, from its textbook form."""
    gain = t.alpha * GAUSSIAN.covariances[0] @ np.linalg.inv(GAUSSIAN.marginal(t)[1])
    return s.alpha * gain + s.sigma / t.sigma * (np.eye(2) - t.alpha * gain)


def test_restart_on_a_restart_adds_noise_once():
    """Noise between steps is added once, whoever asks for it: the sampler, renoised or churned."""
    oracle = oracles.gaussian(GAUSSIAN.means[0], GAUSSIAN.covariances[0])
    grid = restart_grid(3)
    draw = lambda solver: sample(jax.random.key(3), oracle, solver, grid, shape=(2,)).x
    expected = draw(solvers.heun())
    for solver in (
        modifiers.renoised(solvers.heun()),
        modifiers.renoised(modifiers.renoised(solvers.heun())),
        modifiers.churned(solvers.heun(), 0.0),
        modifiers.renoised(modifiers.churned(solvers.heun(), 0.0)),
        modifiers.churned(modifiers.renoised(solvers.heun()), 0.0),
    ):
        np.testing.assert_allclose(draw(solver), expected, rtol=2e-5)
    solver = modifiers.churned(solvers.heun(), 0.5)
    fine = contract.moments(solver, solver.plan(restart_grid(200)))
    goal = GAUSSIAN.marginal(processes.vp().level(0.01))
    np.testing.assert_allclose(fine[1], goal[1], rtol=1e-3, atol=1e-3)
    assert modifiers.churned(modifiers.churned(solvers.heun(), 1.0), 2.0).draws == 1


def test_history_restarts_after_a_gap():
    """A multistep method uses no history across added noise: after the gap it is the fresh start on the second leg."""
    grid = restart_grid(4)
    solver = modifiers.renoised(solvers.dpmpp())
    rows = solver.plan(grid)
    states = run(solver, MIXTURE, STARTS, rows, lambda i: draws(i, count=1))
    fresh = solvers.dpmpp().plan(contract.rough(4, 0.6, 0.01))
    np.testing.assert_allclose(run(solvers.dpmpp(), MIXTURE, states[4], fresh)[-1], states[-1], rtol=1e-10)


def test_state_is_at_the_level_of_its_row():
    """The covariance before a row is the marginal at the row's entry, also right after noise was added."""
    solver = modifiers.renoised(solvers.heun())
    rows = solver.plan(restart_grid(300))
    half = jax.tree.map(lambda leaf: leaf[:300], rows)  # the last row here ends with the noise
    assert rows.s.time[299] == 0.2 and rows.t.time[300] == 0.6
    mean, covariance = contract.moments(solver, half)
    goal = GAUSSIAN.marginal(at(rows, 300).t)
    np.testing.assert_allclose(mean, goal[0], atol=1e-4)
    np.testing.assert_allclose(covariance, goal[1], atol=1e-4)
    assert length(half) == 300


def test_the_sampler_brings_a_given_state_to_a_churned_start():
    """A state given at the grid's start is taken to the first churned level by added noise."""
    process = processes.vp()
    grid = grids.uniform(process, 4, start=0.5, stop=0.1)
    solver = modifiers.churned(solvers.euler(), 0.4)
    entry = at(solver.plan(grid), 0).t
    x = jnp.zeros(4000)
    states = sample(jax.random.key(0), lambda x, level: x, solver, grid, x=x, save="states").saved.states
    expected = entry.sigma**2 - (entry.alpha / grid.start.alpha * grid.start.sigma) ** 2
    assert float(jnp.var(states[0])) == pytest.approx(float(expected), rel=0.1)
    drawn = sample(jax.random.key(0), lambda x, level: x, solver, grid, shape=(4000,), save="states").saved.states
    assert float(jnp.var(drawn[0])) == pytest.approx(float(entry.sigma) ** 2, rel=0.1)


def test_refused():
    for bad in ({"churn": -1.0}, {"low": -1.0}, {"low": 2.0, "high": 1.0}, {"inflation": 0.0}, {"churn": np.nan}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            modifiers.churned(solvers.heun(), **bad)


def test_repr_is_the_call():
    inner = repr(solvers.heun())
    expected = f"churned({inner}, churn=1.0, low=0.0, high=inf, inflation=1.0)"
    assert repr(modifiers.churned(solvers.heun(), 1.0)) == expected
    assert repr(modifiers.renoised(solvers.heun())) == f"renoised({inner})"
