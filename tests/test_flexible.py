"""Stochastic splitting of phase space, and processes that mix the entries of the data."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from diffjax import grids, oracles, phase, processes, solvers
from diffjax.levels import static, value
from tests import contract
from tests.test_phase import law_error

# --- stochastic splitting -----------------------------------------------------------------------------------------


@pytest.mark.paper("Efficient Integrators for Diffusion Generative Models")
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_reduced_step_is_the_papers(share):
    """Noise, momentum and position of PSLD in turn, written with Gamma, nu and M, the score read once."""
    gamma, nu, beta, t, s = 0.3, 4.3, 8.0, 0.6, 0.55
    process, point = phase.psld(gamma, nu, 0.04, beta), 0.7
    mass, b = 4 / (gamma - nu) ** 2, beta * (t - s)
    random = np.random.default_rng(0)
    x, m = random.normal(size=(2, 3))
    ex, em = random.normal(size=(2, 3))
    row = contract.at(phase.oba(noise=share).plan(grids.times(process, [t, s])), 0)
    found, _, _ = phase.oba().step((np.stack([ex, em]),), lambda y, level: point + 0 * y, np.stack([x, m]), (), row)
    x = np.exp(-b * share * gamma / 2) * x + np.sqrt(1 - np.exp(-b * share * gamma)) * ex
    m = np.exp(-b * nu / 2) * m + np.sqrt(mass * (1 - np.exp(-b * nu))) * em
    mean, covariance = process.schedule.moments(np.float64(t))
    sx, sm = np.linalg.solve(covariance, mean[:, None] * point - np.stack([x, m]))
    m = m + b / 2 * (x + 2 * nu * m + 2 * mass * nu * sm)
    x = x + b / 2 * ((1 + share) * gamma * x - m / mass + (1 + share) * gamma * sx)
    np.testing.assert_allclose(found, [x, m], rtol=1e-9)


@pytest.mark.paper("Efficient Integrators for Diffusion Generative Models")
def test_reducing_saves_more_than_calls():
    """At 60 calls, the exact error of the law: reduced below naive, and three parts in four below Euler-Maruyama."""
    process, calls = phase.psld(), 60
    error = lambda solver: law_error(solver, process, calls // solver.calls)
    euler, naive, reduced = (error(s) for s in (phase.euler_maruyama(), phase.oba(reduced=False), phase.oba()))
    assert reduced < 0.7 * naive
    assert error(phase.oba("obab")) < 0.6 * euler < 1.2 * reduced


def test_refusals():
    with pytest.raises(ValueError, match="parts must"):
        phase.oba("ob")
    with pytest.raises(ValueError, match="noise must"):
        phase.oba(noise=-1.0)
    with pytest.raises(ValueError, match="positive definite"):
        phase.flexible(np.diag([1.0, 0.0]), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="antisymmetric"):
        phase.flexible(np.eye(2), np.eye(2))
    with pytest.raises(ValueError, match=r"\(n, n\)"):
        phase.flexible(np.eye(2), np.zeros((3, 3)))
    with pytest.raises(ValueError, match="all entries are data"):
        phase.exponential(order=2).plan(grids.times(MIXED, [1.0, 0.5]))
    with pytest.raises(ValueError, match="flexible"):
        phase.metric_bound(jax.random.key(0), lambda y, level: y, phase.cld(), jnp.zeros(2))


# --- mixing the data ----------------------------------------------------------------------------------------------

D, Q = np.array([[0.5, 0.2], [0.2, 0.9]]), np.array([[0.0, -1.3], [1.3, 0.0]])
MIXED = phase.flexible(D, Q, 1.0, 6.0)
MEAN, COVARIANCE = contract.GAUSSIAN.means[0], contract.GAUSSIAN.covariances[0]


@value
class Exact:
    """E[x_0 | x_t] of N(MEAN, COVARIANCE) by conditioning the state itself, not what is told of it."""

    schedule: object
    traced: bool = static(default=False)

    def __call__(self, y, level):
        xp = jnp if self.traced else np
        moved, spread = self.schedule.moments(level.time)
        x = xp.linalg.solve(self.schedule.statistic(level), y.reshape(2, -1))
        total = moved @ COVARIANCE @ moved.T + spread
        gain = COVARIANCE @ moved.T @ xp.linalg.inv(total)
        return (MEAN[:, None] + gain @ (x - (moved @ MEAN)[:, None])).reshape(y.shape)


def marginal(time):
    moved, spread = MIXED.schedule.moments(np.float64(time))
    return moved @ MEAN, moved @ COVARIANCE @ moved.T + spread


@pytest.mark.paper("A Flexible Diffusion Model")
def test_moments_of_mixed_entries():
    """E is the matrix exponential, the covariance solves its equation, N(0, 1) is kept, levels invert."""
    schedule = MIXED.schedule

    def rate(t, s):
        change = -(D + Q) @ s.reshape(2, 2)
        return schedule.rate(t) * (change + change.T + 2 * D).reshape(-1)

    for time in (0.01, 0.4, 1.0):
        moved, spread = schedule.moments(np.float64(time))
        np.testing.assert_allclose(moved, expm(-(D + Q) * (time + 2.5 * time**2)), rtol=1e-9, atol=1e-12)
        for start in (np.zeros((2, 2)), np.eye(2)):
            end = solve_ivp(rate, (0, time), start.reshape(-1), method="DOP853", rtol=1e-12, atol=1e-14).y[:, -1]
            exact = spread + moved @ start @ moved.T
            np.testing.assert_allclose(exact, end.reshape(2, 2), rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(spread, np.eye(2) - moved @ moved.T, atol=1e-12)
    level = MIXED.level(np.array([0.02, 0.3, 0.9]))
    np.testing.assert_allclose(MIXED.level(half_log_snr=level.half_log_snr).time, level.time, rtol=1e-10)
    np.testing.assert_allclose(level.alpha**2, np.linalg.det(schedule.moments(level.time)[0]), rtol=1e-9)
    step = 1e-5
    for rates, name in ((schedule.alpha_rate, "alpha"), (schedule.sigma_rate, "sigma")):
        ahead, behind = (getattr(schedule, name)(level.time + h) for h in (step, -step))
        np.testing.assert_allclose((ahead - behind) / (2 * step), rates(level.time), rtol=1e-5)


def mixed_law_error(solver, steps, first=0.9, last=0.05):
    """Distance of mean and covariance at ``last`` from the exact ones; affine, so without samples."""
    rows = solver.plan(grids.times(MIXED, np.linspace(first, last, steps + 1)))
    basis = np.concatenate([np.zeros((2 + 2 * solver.draws, 1)), np.eye(2 + 2 * solver.draws)], 1)
    noise = tuple(basis[2 + 2 * k : 4 + 2 * k] for k in range(solver.draws))
    mean, covariance = marginal(first)
    for i in range(steps):
        out, _, _ = solver.step(noise, Exact(MIXED.schedule), basis[:2], (), contract.at(rows, i))
        matrix = out[:, 1:] - out[:, :1]
        mean = out[:, 0] + matrix[:, :2] @ mean
        covariance = matrix[:, :2] @ covariance @ matrix[:, :2].T + matrix[:, 2:] @ matrix[:, 2:].T
    exact = marginal(last)
    return float(np.sqrt(np.sum((mean - exact[0]) ** 2) + np.sum((covariance - exact[1]) ** 2)))


@pytest.mark.paper("A Flexible Diffusion Model")
@pytest.mark.parametrize(
    "solver",
    [
        phase.exponential(),
        phase.exponential(eta=1),
        phase.euler_maruyama(),
        phase.euler_maruyama(0),
        phase.sscs(),
        phase.sscs(0),
    ],
    ids=repr,
)
def test_orders_where_entries_are_mixed(solver):
    errors = [mixed_law_error(solver, steps) for steps in (64, 128)]
    assert np.log2(errors[0] / errors[1]) > 0.9 and errors[1] < 0.3
    # exact for a point, in one step to the data
    if "exponential" in repr(solver):
        start = np.random.default_rng(0).normal(size=(2, 3))
        row = contract.at(solver.plan(grids.times(MIXED, [1.0, 0.0])), 0)
        out, _, info = solver.step((start,) * solver.draws, lambda y, level: 0.4 + 0 * y, start, (), row)
        np.testing.assert_allclose(out, 0.4, atol=1e-12)
        np.testing.assert_allclose(info.x0, 0.4, atol=1e-12)


@pytest.mark.paper("A Flexible Diffusion Model")
def test_without_mixing_it_is_the_scalar_process():
    """D = 1/2, Q = 0 is VP under DDIM; with Q the same path is turned, and scalar denoisers stay exact."""
    times, start = np.linspace(1.0, 0.0, 6), np.random.default_rng(1).normal(size=(2, 4))
    vp = processes.vp()
    plain = contract.run(solvers.ddim(), _columns, start, solvers.ddim().plan(grids.times(vp, times)))
    for turn in (0.0, 1.3):
        process = phase.flexible(np.eye(2) / 2, turn * np.array([[0, -1.0], [1.0, 0]]), 0.1, 20.0)
        np.testing.assert_allclose(process.level(times)[1:3], vp.level(times)[1:3], rtol=1e-10, atol=1e-12)
        turned = lambda x, t, s=process.schedule, p=process: np.linalg.solve(s.statistic(p.level(np.float64(t))), x)
        solver = phase.exponential(factors=64)
        found = contract.run(solver, _columns, turned(start, 1.0), solver.plan(grids.times(process, times)))
        for x, y, t in zip(found, plain, times, strict=True):
            np.testing.assert_allclose(x, turned(y, t), atol=1e-9 if turn == 0 else 2e-3)


def _columns(y, level):
    return contract.MIXTURE(y.T, level).T


SPREAD = np.array([[8.0, 7.6], [7.6, 8.0]])


def mixed_bound(free, keys, x0):
    """Of Gaussian data with the exact denoiser of the process, tr D being fixed."""
    half = free["factor"] @ free["factor"].T
    half = half / jnp.trace(half)  # as much noise as D = 1/2 has
    process = phase.flexible(half, free["turn"] * jnp.array([[0, -1.0], [1.0, 0]]), 2.0)

    def denoise(y, level):
        moved, noise = process.schedule.moments(level.time)
        told = moved.T @ jnp.linalg.inv(noise) @ moved
        return jnp.linalg.solve(jnp.linalg.inv(jnp.asarray(SPREAD, y.dtype)) + told, told @ y / level.alpha)

    return jax.vmap(lambda k, x: phase.metric_bound(k, denoise, process, x, draws=2, strata=16))(keys, x0)


def expected_bound(process):
    """Its mean over data and draws: what the path of J costs depends on its ends alone, as the denoiser is exact."""
    (first, noise), (last, kept) = (process.schedule.moments(np.float64(t)) for t in (1e-3, 1.0))
    told, end = first.T @ np.linalg.inv(noise) @ first, last.T @ np.linalg.inv(kept) @ last
    logdet = lambda matrix: np.linalg.slogdet(matrix)[1]
    decoded = 0.5 * logdet(told / (2 * np.pi * np.e))
    path = 0.5 * (logdet(np.linalg.inv(SPREAD) + told) - logdet(np.linalg.inv(SPREAD) + end))
    prior = 0.5 * (np.trace(kept + last @ SPREAD @ last.T) - 2 - logdet(kept))
    return decoded - path - prior


@pytest.mark.paper("A Flexible Diffusion Model")
def test_bound_with_metric_and_turn_that_are_learned():
    """Its estimates are unbiased, it is below the likelihood, and its gradient in D and Q leads to a better process."""
    x0 = jax.vmap(oracles.gaussian(np.zeros(2), SPREAD).sample)(jax.random.split(jax.random.key(1), 200))
    keys = jax.random.split(jax.random.key(2), 200)

    def mean(free):
        bounds = mixed_bound(free, keys, x0)
        return jnp.mean(bounds), bounds

    free = {"factor": jnp.eye(2), "turn": jnp.asarray(0.1)}
    (_, found), slope = jax.jit(jax.value_and_grad(mean, has_aux=True))(free)
    make = lambda f: phase.flexible(f @ f.T / np.trace(f @ f.T), [[0, -0.1], [0.1, 0]], 2.0)
    before, after = (expected_bound(make(np.eye(2) + size * np.asarray(slope["factor"]))) for size in (0.0, 0.5))
    assert abs(found.mean() - before) < 4 * found.std() / np.sqrt(len(found)) + 2e-3
    entropy = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * SPREAD)[1]
    assert before + 0.15 < after < -entropy, (before, after, -entropy)


def test_noised_states_have_the_law_of_the_process():
    x0 = np.array([[1.3], [-0.4]])
    eps = np.random.default_rng(9).normal(size=(2, 100_000))
    moved, spread = MIXED.schedule.moments(np.float64(0.2))
    x, told = phase.metric_noised(MIXED, x0 + 0 * eps, eps, np.float64(0.2))
    np.testing.assert_allclose(x.mean(1), moved @ x0[:, 0], atol=0.01)
    np.testing.assert_allclose(np.cov(x), spread, atol=0.01)
    np.testing.assert_allclose(told.mean(1), MIXED.level(0.2).alpha * x0[:, 0], atol=0.02)
    assert dataclasses.is_dataclass(MIXED.schedule)
