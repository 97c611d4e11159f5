"""Linear SDEs with auxiliary variables: their law, their solvers, and what is told to the denoiser."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.stats import norm, qmc

import diffjax
from diffjax import grids, oracles, phase, processes, solvers
from diffjax.levels import CLEAN
from diffjax.phase.exponential import flow
from diffjax.phase.solvers import statistic
from tests import contract

D3 = np.array([[0.3, 0.1, 0.0], [0.1, 0.5, 0.0], [0.0, 0.0, 1.5]])
Q3 = np.array([[0.0, -1.0, 0.4], [1.0, 0.0, -1.2], [-0.4, 1.2, 0.0]])
H3 = np.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.3], [0.0, 0.3, 1.5]])
PROCESSES = {
    "cld": phase.cld(),
    "psld": phase.psld(0.3, 4.3, beta_min=2.0, beta_max=12.0),
    "three": phase.recipe(D3, Q3, H3, beta_min=1.0, beta_max=6.0),
}
DATA, FIRST, LAST = contract.GAUSSIAN, 0.9, 0.05


def moment_ode(process, time, covariance=None):
    """``(a, S)`` at a time by the moment ODE, from those at 0."""
    schedule = process.schedule
    size = schedule.variables

    def rate(t, y):
        a, s = y[:size], y[size:].reshape(size, size)
        change = schedule.drift @ s
        drift = np.concatenate([schedule.drift @ a, (change + change.T + schedule.diffusion).reshape(-1)])
        return schedule.rate(t) * drift

    start = np.concatenate([np.eye(size)[0], (schedule.start if covariance is None else covariance).reshape(-1)])
    end = solve_ivp(rate, (0, time), start, method="DOP853", rtol=1e-12, atol=1e-15).y[:, -1]
    return end[:size], end[size:].reshape(size, size)


# --- the law ------------------------------------------------------------------------------------------------------


@pytest.mark.paper("Generative Diffusions in Augmented Spaces: A Complete Recipe")
@pytest.mark.parametrize("name", PROCESSES)
def test_moments_are_those_of_the_moment_ode(name):
    process = PROCESSES[name]
    for time in (0.003, 0.2, 1.0):
        for found, exact in zip(process.schedule.moments(np.float64(time)), moment_ode(process, time), strict=True):
            # entry by entry: position and momentum differ by orders of magnitude at small times
            np.testing.assert_allclose(found, exact, rtol=1e-7, atol=1e-13)


@pytest.mark.paper("Generative Diffusions in Augmented Spaces: A Complete Recipe")
def test_closed_form_kernel_of_critical_damping():
    gamma, nu, kappa, beta = 0.3, 4.3, 0.04, 8.0
    process = phase.psld(gamma, nu, kappa, beta)
    mass = 4 / (gamma - nu) ** 2
    for time in (0.01, 0.4, 1.0):
        b = beta * time
        # F + (gamma + nu) / 4 is nilpotent, so its exponential is a polynomial
        nilpotent = np.array([[(nu - gamma) / 4, 1 / (2 * mass)], [-0.5, (gamma - nu) / 4]])
        assert np.abs(nilpotent @ nilpotent).max() < 1e-12
        moved = np.exp(-(gamma + nu) * b / 4) * (np.eye(2) + b * nilpotent)
        kept = np.diag([1.0, mass])
        exact = kept + moved @ (np.diag([0.0, kappa * mass]) - kept) @ moved.T
        mean, covariance = process.schedule.moments(np.float64(time))
        np.testing.assert_allclose(mean, moved[:, 0], rtol=1e-10)
        np.testing.assert_allclose(covariance, exact, rtol=1e-9, atol=1e-12)


def test_moments_by_simulation():
    process, steps, paths = PROCESSES["psld"], 400, 20_000
    schedule, random = process.schedule, np.random.default_rng(0)
    root = np.linalg.cholesky(schedule.diffusion)
    u = np.stack([np.full(paths, 1.5), np.sqrt(schedule.start[1, 1]) * random.normal(size=paths)])
    for i in range(steps):
        h = schedule.clock((i + 1) / steps * 0.5) - schedule.clock(i / steps * 0.5)
        u = u + h * schedule.drift @ u + np.sqrt(h) * root @ random.normal(size=u.shape)
    mean, covariance = schedule.moments(np.float64(0.5))
    np.testing.assert_allclose(u.mean(1), 1.5 * mean, atol=0.02)
    np.testing.assert_allclose(np.cov(u), covariance, atol=0.03)


@pytest.mark.paper("Score-Based Generative Modeling with Critically-Damped Langevin Diffusion")
def test_cld_is_psld_without_noise_in_the_position():
    cld, psld = phase.cld(0.25, 0.04, 4.0), phase.psld(0.0, 4.0, 0.04, 8.0)
    for ours, other in zip(cld.schedule.moments(np.float64(0.3)), psld.schedule.moments(np.float64(0.3)), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-12)
    eigenvalues = np.linalg.eigvals(cld.schedule.drift)
    np.testing.assert_allclose(eigenvalues, -2.0, atol=1e-6)  # one, twice: critical


@pytest.mark.paper("A Flexible Diffusion Model")
def test_what_the_recipe_keeps_and_what_it_holds():
    random = np.random.default_rng(1)
    root, turn = random.normal(size=(2, 4, 4))
    process = phase.recipe(root @ root.T, turn - turn.T)  # R^-1 and omega
    _, kept = moment_ode(process, 1.0, np.eye(4))
    np.testing.assert_allclose(kept, np.eye(4), atol=1e-9)
    np.testing.assert_allclose(PROCESSES["three"].schedule.stationary(), np.linalg.inv(H3), atol=1e-12)
    # one variable: the variance-preserving process
    vp, single = processes.vp(), phase.recipe([[0.5]], [[0.0]], beta_min=0.1, beta_max=20.0)
    for ours, other in zip(single.level(np.array([0.01, 0.5, 1])), vp.level(np.array([0.01, 0.5, 1])), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-9)
    # noise in the momentum alone: critically damped
    mass = 0.25
    cld = phase.recipe(np.diag([0, 1.0]), [[0, -1.0], [1.0, 0]], np.diag([1, 1 / mass]), beta_min=4.0)
    for ours, other in zip(
        cld.schedule.moments(np.float64(0.3)), phase.cld().schedule.moments(np.float64(0.3)), strict=True
    ):
        np.testing.assert_allclose(ours, other, rtol=1e-10)


@pytest.mark.parametrize("name", PROCESSES)
def test_kernel_and_flow(name):
    process = PROCESSES[name]
    schedule = process.schedule
    for t, s in ((0.9, 0.1), (0.5, 0.499), (0.7, 0.0)):
        t, s = np.float64(t), np.float64(s)
        (mean, before), (_, after) = schedule.moments(t), schedule.moments(s)
        gain, noise = schedule.kernel(t, s)
        forward = schedule.forward(s, t)
        np.testing.assert_allclose(forward @ schedule.moments(s)[0], mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(gain @ before, after @ forward.T, atol=1e-12)  # the joint law
        np.testing.assert_allclose(gain @ before @ gain.T + noise, after, atol=1e-12)
        move = flow(schedule, t, s)
        np.testing.assert_allclose(move @ before @ move.T, after, atol=1e-12)
    exact = (
        solve_ivp(
            lambda t, y: (
                schedule.rate(t)
                * (schedule.drift + 0.5 * schedule.diffusion @ np.linalg.inv(schedule.moments(np.float64(t))[1]))
                @ y.reshape(before.shape)
            ).reshape(-1),
            (0.9, 0.1),
            np.eye(len(before)).reshape(-1),
            method="DOP853",
            rtol=1e-10,
            atol=1e-12,
        )
        .y[:, -1]
        .reshape(before.shape)
    )
    errors = [np.abs(flow(schedule, np.float64(0.9), np.float64(0.1), k) - exact).max() for k in (64, 128)]
    assert errors[1] < 1e-2 and 3.5 < errors[0] / errors[1] < 4.5  # of second order in the factors


# --- the statistic ------------------------------------------------------------------------------------------------


def test_levels_invert_and_differentiate():
    process = PROCESSES["cld"]
    level = process.level(np.array([0.02, 0.3, 0.9]))
    np.testing.assert_allclose(process.level(half_log_snr=level.half_log_snr).time, level.time, rtol=1e-10)
    step, schedule = 1e-5, process.schedule
    for rate, name in ((schedule.alpha_rate, "alpha"), (schedule.sigma_rate, "sigma")):
        ahead, behind = (getattr(schedule, name)(level.time + h) for h in (step, -step))
        np.testing.assert_allclose((ahead - behind) / (2 * step), rate(level.time), rtol=1e-5)
    clean = process.level(0.0)
    assert (clean.alpha, clean.sigma, clean.half_log_snr) == (1, 0, np.inf)


@pytest.mark.parametrize("name", PROCESSES)
def test_scalar_denoiser_knows_all_that_the_state_does(name):
    """E[x_0 | u_t] by Bayes' rule over the whole state, component by component, without the statistic."""
    process, data = PROCESSES[name], contract.MIXTURE
    schedule, time = process.schedule, np.float64(0.35)
    n = schedule.variables
    mean, covariance = schedule.moments(time)
    u = np.random.default_rng(2).normal(size=(n, 5, 2))
    lift = np.kron(mean[:, None], np.eye(2))  # (2 n, 2): of x_0 into the state
    noise = np.kron(covariance, np.eye(2))
    flat = u.transpose(1, 0, 2).reshape(5, -1)
    weights, means = [], []
    for weight, centre, spread in zip(*data, strict=True):
        total = lift @ spread @ lift.T + noise
        off = flat - lift @ centre
        solved = np.linalg.solve(total, off.T).T
        weights.append(np.log(weight) - 0.5 * np.sum(off * solved, 1) - 0.5 * np.linalg.slogdet(total)[1])
        means.append(centre + solved @ lift @ spread)
    weights = np.exp(np.array(weights) - np.max(weights, 0))
    exact = np.sum((weights / weights.sum(0))[..., None] * np.array(means), 0)
    level = process.level(time)
    y = np.tensordot(statistic(schedule, level), u, 1)
    np.testing.assert_allclose(data(y, level), exact, rtol=1e-9, atol=1e-10)


# --- solvers ------------------------------------------------------------------------------------------------------


@functools.cache
def marginal(process, time):
    mean, covariance = process.schedule.moments(np.float64(time))
    total = np.kron(np.outer(mean, mean), DATA.covariances[0]) + np.kron(covariance, np.eye(2))
    return np.kron(mean, DATA.means[0]), total


def law_error(solver, process, steps):
    """Distance of mean and covariance at LAST from the exact ones, on Gaussian data; affine, so without samples."""
    rows = solver.plan(grids.times(process, np.linspace(FIRST, LAST, steps + 1)))
    n = process.schedule.variables
    size, held = 2 * n, 2 * solver.history
    total = size + held + size * solver.draws
    basis = np.concatenate([np.zeros((1, total)), np.eye(total)])
    fold = lambda part: part.reshape(-1, n, 2).transpose(1, 0, 2)
    u, memory = fold(basis[:, :size]), tuple(basis[:, size + 2 * k : size + 2 * k + 2] for k in range(solver.history))
    noise = tuple(fold(basis[:, size * (k + 1) + held : size * (k + 2) + held]) for k in range(solver.draws))
    mean, covariance = marginal(process, FIRST)
    mean, covariance = np.pad(mean, (0, held)), np.pad(covariance, (0, held))
    for i in range(steps):
        out, after, _ = solver.step(noise, DATA, u, memory, contract.at(rows, i))
        columns = np.concatenate([out.transpose(1, 0, 2).reshape(-1, size), *after], 1)
        matrix = (columns[1:] - columns[0]).T
        keep, fresh = matrix[:, : size + held], matrix[:, size + held :]
        mean = columns[0] + keep @ mean
        covariance = keep @ covariance @ keep.T + fresh @ fresh.T
    exact = marginal(process, LAST)
    return float(np.sqrt(np.sum((mean[:size] - exact[0]) ** 2) + np.sum((covariance[:size, :size] - exact[1]) ** 2)))


@functools.cache
def exact_flow(process):
    """Five states of the marginal at FIRST, and where the probability flow takes them."""
    schedule = process.schedule
    n = schedule.variables
    mean, covariance = marginal(process, FIRST)
    draws = np.random.default_rng(0).normal(size=(5, 2 * n)) @ np.linalg.cholesky(covariance).T + mean
    start = draws.reshape(5, n, 2).transpose(1, 0, 2)

    def velocity(t, y):
        flat = y.reshape(n, 5, 2).transpose(1, 0, 2).reshape(5, -1)
        centre, spread = marginal(process, float(t))  # the score of the state's own Gaussian
        score = -np.linalg.solve(spread, (flat - centre).T).T.reshape(5, n, 2).transpose(1, 0, 2)
        drift = np.tensordot(schedule.drift, y.reshape(n, 5, 2), 1) - 0.5 * np.tensordot(schedule.diffusion, score, 1)
        return schedule.rate(t) * drift.reshape(-1)

    end = solve_ivp(velocity, (FIRST, LAST), start.reshape(-1), method="DOP853", rtol=1e-10, atol=1e-12)
    return start, end.y[:, -1].reshape(start.shape)


def flow_error(solver, process, steps):
    start, goal = exact_flow(process)
    rows = solver.plan(grids.times(process, np.linspace(FIRST, LAST, steps + 1)))
    return float(np.sqrt(np.mean((contract.run(solver, DATA, start, rows)[-1] - goal) ** 2)))


SOLVERS = [
    phase.exponential(),
    phase.exponential(order=2),
    phase.exponential(eta=1),
    phase.exponential(order=2, eta=1),
    phase.euler_maruyama(),
    phase.euler_maruyama(eta=0),
    phase.sscs(),
    phase.sscs(eta=0),
    *(phase.symplectic(kind, reduced) for kind in ("euler", "verlet") for reduced in (False, True)),
    phase.oba(),
    phase.oba(reduced=False),
    phase.oba("bao", noise=0.3),
    phase.oba("obab", reduced=False),
    phase.oba("oabao", noise=0.0),
]


@pytest.mark.paper("Score-Based Generative Modeling with Critically-Damped Langevin Diffusion")
@pytest.mark.paper("gDDIM: Generalized denoising diffusion implicit models")
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_orders_against_the_exact_gaussian(solver, name):
    process = PROCESSES[name]
    if process.schedule.variables != 2 and ("symplectic" in repr(solver) or "oba(" in repr(solver)):
        with pytest.raises(ValueError, match="two variables"):
            solver.plan(grids.times(process, [1.0, 0.0]))
        return
    error = law_error if solver.draws else flow_error
    errors = [error(solver, process, steps) for steps in (256, 512)]
    order = solver.weak_order if solver.draws else solver.order
    assert np.log2(errors[-2] / errors[-1]) > order - 0.1
    assert errors[-1] < 0.03


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("eta", [0, 1])
def test_one_step_to_the_data_is_exact_for_a_point(name, eta):
    process, point = PROCESSES[name], np.array([0.7, -1.2])
    solver = phase.exponential(eta=eta)
    start = process.schedule.coloured(np.random.default_rng(3).normal(size=(process.schedule.variables, 2)), 1.0)
    rows = solver.plan(grids.times(process, [1.0, 0.0]))
    denoise = lambda y, level: point + 0 * y
    noise = np.random.default_rng(4).normal(size=start.shape)
    end = contract.run(solver, denoise, start, rows, lambda i: (noise,) * solver.draws)[-1]
    np.testing.assert_allclose(end[0], point, atol=1e-12)
    assert np.abs(end[1:]).max() > 1e-3  # the momentum is still noise


def test_law_is_exact_for_a_point_in_any_number_of_steps():
    """Mean and covariance of the whole state, with an estimate that is constant."""
    process, times = PROCESSES["psld"], np.array([1.0, 0.8, 0.3, 0.05])
    for solver in (phase.exponential(), phase.exponential(order=2), phase.exponential(eta=1)):
        plan = solver.plan(grids.times(process, times)).coefficients.out
        mean, covariance = process.schedule.moments(times[0])
        for i in range(3):
            mean = plan.keep[i] @ mean + sum(b[i] for b in plan.clean)
            covariance = plan.keep[i] @ covariance @ plan.keep[i].T + sum(c[i] @ c[i].T for c in plan.noise)
        exact = process.schedule.moments(times[-1])
        np.testing.assert_allclose(mean, exact[0], atol=1e-12)
        np.testing.assert_allclose(covariance, exact[1], atol=1e-12)


# --- in the sampler -----------------------------------------------------------------------------------------------


def test_sampler_runs_a_scalar_denoiser_in_phase_space():
    data = oracles.gaussian(np.array([0.6, -0.4]), np.array([1.2, 0.4]))
    process = phase.cld()
    grid = grids.times(process, np.linspace(1, 0, 81) ** 2)
    keys = jax.random.split(jax.random.key(0), 4000)

    def draw(key):
        return diffjax.sample(
            key, data, phase.exponential(order=2), grid, shape=(2, 2), save=("states", "x0"), every=40
        )

    result = jax.jit(jax.vmap(draw))(keys)
    assert result.x.shape == (4000, 2, 2) and int(result.nfe[0]) == 80 and int(result.failed_at.max()) == -1
    x = np.asarray(result.x, np.float64)[:, 0]
    np.testing.assert_allclose(x.mean(0), [0.6, -0.4], atol=0.06)
    np.testing.assert_allclose(x.var(0), [1.2, 0.4], rtol=0.08)
    np.testing.assert_allclose(result.saved.states[:, -1], result.x)
    start = np.asarray(result.saved.states[:, 0], np.float64)[:, :, 0]
    np.testing.assert_allclose(np.cov(start.T), process.schedule.moments(1.0)[1], atol=0.08)
    assert result.saved.x0.shape == (4000, 2, 2, 2)


def test_estimate_of_the_whole_start():
    """Info.x0 is E[u_0 | u_t]: for a point its auxiliary part is the regression of the start on the state."""
    process, point = PROCESSES["psld"], np.array([0.5])
    schedule, t = process.schedule, np.float64(0.6)
    u = np.random.default_rng(5).normal(size=(2, 1))
    solver = phase.exponential()
    row = contract.at(solver.plan(grids.times(process, [0.6, 0.2])), 0)
    _, _, info = solver.step((), lambda y, level: point, u, (), row)
    forward, (mean, covariance) = schedule.forward(np.float64(0.0), t), schedule.moments(t)
    exact = schedule.start @ forward.T @ np.linalg.solve(covariance, u[:, 0] - mean * point)
    np.testing.assert_allclose(info.x0[:, 0], [0.5, exact[1]], atol=1e-12)


def test_refusals():
    process = phase.cld()
    grid = grids.times(process, [1.0, 0.5, 0.0])
    denoise = oracles.gaussian(0.0, 1.0)
    for solver in (solvers.ddim(), solvers.dpmpp(), solvers.heun()):
        with pytest.raises(ValueError, match=r"use a solver of diffjax\.phase"):
            diffjax.sample(jax.random.key(0), denoise, solver, grid, shape=(2,))
    with pytest.raises(ValueError, match=r"process of diffjax\.phase"):
        phase.sscs().plan(grids.times(processes.vp(), [1.0, 0.5]))
    with pytest.raises(ValueError, match="without gaps"):
        phase.sscs().plan(grids.pairs(process, [1.0, 0.9], [0.5, 0.1]))
    with pytest.raises(ValueError, match="final_denoise"):
        diffjax.sample(jax.random.key(0), denoise, phase.sscs(), grid, shape=(2,), final_denoise=True)
    with pytest.raises(ValueError, match="antisymmetric"):
        phase.recipe(np.eye(2), np.eye(2))
    with pytest.raises(ValueError, match="positive semi-definite"):
        phase.recipe(-np.eye(2), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="must reach every variable"):
        phase.linear_sde(-np.eye(2), [[1.0], [0.0]], [0.0])
    with pytest.raises(ValueError, match="differ"):
        phase.psld(1.0, 1.0)
    with pytest.raises(ValueError, match="start"):
        phase.linear_sde(-np.eye(2), np.eye(2), [0.1, 0.1])


# --- speed against error ------------------------------------------------------------------------------------------


def quantile_error(x):
    """Wasserstein-1 distance of 1-d samples from the mixture 0.4 N(1, 0.04) + 0.6 N(-0.8, 0.09)."""
    line = np.linspace(-3, 3, 20_001)
    exact = 0.4 * norm.cdf(line, 1, 0.2) + 0.6 * norm.cdf(line, -0.8, 0.3)
    return float(np.mean(np.abs(np.searchsorted(np.sort(x), line) / len(x) - exact)) * 6)


LINE = contract.Mixture(np.array([0.4, 0.6]), np.array([[1.0], [-0.8]]), np.array([[[0.04]], [[0.09]]]))


def phase_error(process, solver, steps, power=2.0):
    """On 4096 quasi-random starts."""
    n, random = process.schedule.variables, np.random.default_rng(6)
    z = norm.ppf(qmc.Sobol(n, rng=7).random(4096)).T[:, :, None]
    x = process.schedule.coloured(z, 1.0)
    rows = solver.plan(grids.times(process, np.linspace(1, 0, steps + 1) ** power))
    noise = lambda i: tuple(random.normal(size=x.shape) for _ in range(solver.draws))
    return quantile_error(contract.run(solver, LINE, x, rows, noise)[-1][0, :, 0])


@pytest.mark.paper("Efficient Integrators for Diffusion Generative Models")
@pytest.mark.paper("Generative Diffusions in Augmented Spaces: A Complete Recipe")
def test_splitting_against_euler_at_equal_calls():
    process = phase.psld()
    calls = 60
    error = {repr(s): phase_error(process, s, calls // s.calls) for s in SOLVERS if not s.draws}
    euler = error[repr(phase.euler_maruyama(eta=0))]
    assert error[repr(phase.symplectic(reduced=True))] < 0.5 * euler
    assert error[repr(phase.symplectic(reduced=True))] < error[repr(phase.symplectic())]
    assert error[repr(phase.sscs(eta=0))] < 0.5 * euler
    assert error[repr(phase.exponential(order=2))] < 0.5 * euler


# --- training and likelihood --------------------------------------------------------------------------------------


def test_hybrid_score_matching_is_denoising_of_the_statistic():
    process, time, rate = PROCESSES["three"], np.float64(0.4), 1e-5
    schedule, random = process.schedule, np.random.default_rng(8)
    mean, covariance = schedule.moments(time)
    x0, estimate = random.normal(size=2)
    u = mean * x0 + np.linalg.cholesky(covariance) @ random.normal(size=3)
    score = np.linalg.solve(covariance, mean * estimate - u)
    conditional = np.linalg.solve(covariance, mean * x0 - u)
    off = score - conditional
    exact = schedule.rate(time) * off @ schedule.diffusion @ off
    np.testing.assert_allclose(schedule.information(time)[2] * (x0 - estimate) ** 2, exact, rtol=1e-9)
    snr = lambda t: np.exp(2 * schedule.half_log_snr(np.float64(t)))
    numerical = (snr(time - rate) - snr(time + rate)) / (2 * rate)
    np.testing.assert_allclose(schedule.information(time)[2], numerical, rtol=1e-6)


def test_noised_states_have_the_law_of_the_state_and_of_the_statistic():
    process, time = PROCESSES["psld"], np.float64(0.3)
    level = process.level(time)
    x0, eps = np.full(200_000, 1.3), np.random.default_rng(9).normal(size=(200_000, 2))
    mean, covariance = process.schedule.moments(time)
    u = phase.noised(process, x0, eps.T, time)
    np.testing.assert_allclose(u.mean(1), 1.3 * mean, atol=0.01)
    np.testing.assert_allclose(np.cov(u), covariance, rtol=0.02, atol=2e-3)
    y = statistic(process.schedule, level) @ u
    np.testing.assert_allclose([y.mean(), y.std()], [1.3 * level.alpha, level.sigma], atol=0.01)


TOY = oracles.mixture([0.4, 0.6], [[1.0, 0.5], [-0.8, -0.4]], [0.09, 0.04])


@pytest.mark.paper(
    "Where to Diffuse, How to Diffuse, and How to Get Back: Automated Learning for Multivariate Diffusions"
)
def test_bound_is_below_the_log_likelihood_and_learned_matrices_raise_it():
    keys = jax.random.split(jax.random.key(1), 32)
    x0 = jax.vmap(TOY.sample)(keys)
    exact = float(jnp.mean(jax.vmap(lambda x: TOY.log_density(x, CLEAN))(x0)))

    def made(free):
        """Two auxiliary variables, D from a factor and a skew Q."""
        factor, turn = free
        return phase.recipe(factor @ factor.T / 3 + 1e-3 * jnp.eye(3), turn - turn.T, beta_min=1.0)

    def mean_bound(free, keys):
        process = made(free)
        return jnp.mean(
            jax.vmap(lambda k, x: phase.bound(k, TOY, process, x, first=1e-4, draws=4, strata=24))(keys, x0)
        )

    ascent = jax.jit(jax.value_and_grad(mean_bound))
    free = (jnp.eye(3), jnp.zeros((3, 3)).at[0, 1].set(0.3).at[1, 2].set(0.3))
    bounds = []
    for _ in range(10):
        found, slope = ascent(free, jax.random.split(jax.random.key(2), 32))
        bounds.append(float(found))
        free = jax.tree.map(lambda p, g: p + 0.4 * g, free, slope)
    assert bounds[0] < exact
    assert bounds[-1] < exact + 0.03  # the draws that it is estimated from
    assert bounds[-1] > bounds[0] + 0.3


# --- bridges ------------------------------------------------------------------------------------------------------

BRIDGE = phase.bridge(1.3, 1.0, 0.8, 0.2)


@pytest.mark.paper("Generative Modeling with Phase Stochastic Bridges")
def test_bridge_moments_and_simulation():
    schedule, left = BRIDGE.schedule, np.float64(0.3)

    def rate(time, y):
        t, a, s = 1 - time, y[:2], y[2:].reshape(2, 2)
        drift = np.array([[0, 1], [-4 / t**2, -4 / t]])
        spread = drift @ s + s @ drift.T + np.diag([0, 1.3**2])
        return np.concatenate([drift @ a + [0, 4 / t**2], spread.reshape(-1)])

    start = np.concatenate([[0, 0], [1.0, 0.16, 0.16, 0.64]])
    end = solve_ivp(rate, (0, 1 - left), start, method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    mean, covariance = schedule.moments(left)
    np.testing.assert_allclose(mean, end[:2], rtol=1e-9)
    np.testing.assert_allclose(covariance.reshape(-1), end[2:], rtol=1e-9)
    gain, noise = schedule.kernel(np.float64(0.8), left)
    np.testing.assert_allclose(gain @ schedule.moments(np.float64(0.8))[1] @ gain.T + noise, covariance, atol=1e-13)
    random, paths, steps, point = np.random.default_rng(0), 20_000, 400, 0.9
    x, v = np.linalg.cholesky([[1.0, 0.16], [0.16, 0.64]]) @ random.normal(size=(2, paths))
    for i in range(steps):
        h, t = 0.7 / steps, 1 - 0.7 * i / steps
        force = 4 / t * ((point - x) / t - v)
        x, v = x + h * v, v + h * force + 1.3 * np.sqrt(h) * random.normal(size=paths)
    np.testing.assert_allclose([x.mean(), v.mean()], point * mean, atol=0.03)
    np.testing.assert_allclose(np.cov(x, v), covariance, atol=0.05)
    step, snr = 1e-5, lambda t: np.exp(2 * schedule.half_log_snr(np.float64(t)))
    np.testing.assert_allclose(
        schedule.information(left)[2], (snr(left - step) - snr(left + step)) / 2 / step, rtol=1e-6
    )


@pytest.mark.paper("Generative Modeling with Phase Stochastic Bridges")
def test_bridge_sde_and_ode_have_the_same_marginals():
    for solver in (s for s in SOLVERS if "exponential" in repr(s) or "euler_maruyama" in repr(s)):
        errors = [law_error(solver, BRIDGE, steps) for steps in (96, 192)]
        order = solver.weak_order if solver.draws else solver.order
        assert np.log2(errors[0] / errors[1]) > order - 0.12 and errors[1] < 0.13
    start = np.array([[0.3], [-0.8]])
    for eta in (0, 1):  # exact for a point, in one step to the data
        solver = phase.exponential(eta=eta)
        rows, noise = solver.plan(grids.times(BRIDGE, [1.0, 0.0])), (start,) * eta
        end = contract.run(solver, lambda y, level: 0.7 + 0 * y, start, rows, lambda i, noise=noise: noise)[-1]
        np.testing.assert_allclose(end[0], 0.7, atol=1e-7)
    with pytest.raises(ValueError, match="linear SDE"):
        phase.sscs().plan(grids.times(BRIDGE, [1.0, 0.5]))
    with pytest.raises(ValueError, match="stationary"):
        phase.bound(jax.random.key(0), TOY, BRIDGE, jnp.zeros(2))


@pytest.mark.paper("Generative Modeling with Phase Stochastic Bridges")
def test_velocity_tells_the_data_early():
    """The estimate of the data from position and velocity against that from the position alone, on a mixture."""
    random = np.random.default_rng(11)
    which = random.random(20_000) < 0.4
    x1 = np.where(which, 1.0 + 0.2 * random.normal(size=which.size), -0.8 + 0.3 * random.normal(size=which.size))
    for left, factor in ((0.6, 0.8), (0.3, 0.5)):
        mean, covariance = BRIDGE.schedule.moments(np.float64(left))
        u = phase.noised(BRIDGE, x1, random.normal(size=(2, x1.size)), np.float64(left))
        level = BRIDGE.level(left)
        both = LINE((statistic(BRIDGE.schedule, level) @ u)[:, None], level)[:, 0]
        sigma = np.sqrt(covariance[0, 0])
        alone = LINE(u[0][:, None], level._replace(alpha=mean[0], sigma=sigma))[:, 0]
        assert np.mean((both - x1) ** 2) < factor * np.mean((alone - x1) ** 2)
