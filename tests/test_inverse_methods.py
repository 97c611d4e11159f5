"""Methods for inverse problems against the exact posterior, closed forms and re-derivations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm

from diffjax import grids, guidance, inverse, oracles, processes, sample, solvers
from diffjax.inverse.splitting import likelihood_draw
from diffjax.inverse.steps import oscillator
from diffjax.inverse.systems import conjugate_gradients, dense_solution, lanczos_log_determinant
from diffjax.levels import value

PROCESS = processes.flow()
RNG = np.random.default_rng(5)
A = RNG.normal(size=(2, 3))
SEEN = inverse.measurement(inverse.matrix(A), np.array([0.8, -0.5]), 0.4)
X = np.array([0.6, -0.2, 1.1])
ROOT = RNG.normal(size=(3, 3))
PRIORS = {
    "isotropic": oracles.gaussian(np.array([0.5, -1.0, 0.2]), 1.7 * np.eye(3)),
    "diagonal": oracles.gaussian(np.array([0.5, -1.0, 0.2]), np.diag([0.4, 1.7, 3.0])),
    "full": oracles.gaussian(np.array([0.5, -1.0, 0.2]), ROOT @ ROOT.T),
}
TWISTS = {
    "pigdm": inverse.pigdm(SEEN, 1.7),
    "pigdm of a tree": inverse.pigdm(SEEN, np.full(3, 1.7), solver="dense"),
    "tmpd": inverse.tmpd(SEEN),
    "mmps": inverse.mmps(SEEN),
    "mmps by cg": inverse.mmps(SEEN, solver="cg"),
    "mmps by gmres": inverse.mmps(SEEN, solver="gmres"),
}
EXACT_FOR = {
    "isotropic": set(TWISTS),
    "diagonal": {n for n in TWISTS if "pigdm" not in n},
    "full": set(list(TWISTS)[3:]),
}


@jax.jit
def all_estimates(prior, after, exact, x, level):
    """``(log h, tilted estimate)`` of every twist, the likelihood's estimate, the exact log h and estimate."""
    found = {n: (twist(prior, x, level)[0], guidance.tilted(prior, twist)(x, level)) for n, twist in TWISTS.items()}
    plain = guidance.tilted(prior, inverse.likelihood(SEEN))(x, level)
    return found, plain, exact(prior, x, level)[0], after(x, level)


@pytest.mark.paper("Learning Diffusion Priors from Observations by Expectation Maximization")
@pytest.mark.parametrize("kind", PRIORS)
def test_gaussian_twists_are_exact_where_they_say(kind, x64):
    """The tilted estimate to 1e-10, and log h of the dense ones, at all levels; where C is wrong they are not."""
    prior = PRIORS[kind]
    after, exact = inverse.posterior(prior, SEEN), inverse.exact(prior, SEEN)
    x = jnp.asarray(X)
    everything = lambda level: all_estimates(prior, after, exact, x, level)
    for time in (0.05, 0.5, 0.95):
        found, plain, log_h, clean = everything(jax.tree.map(jnp.asarray, PROCESS.level(time)))
        for name, (log_value, estimate) in found.items():
            good = name in EXACT_FOR[kind]
            assert (np.max(np.abs(estimate - clean)) < 1e-10 * (1e5 if "gmres" in name else 1)) == good, (name, time)
            if good and " by " not in name:
                np.testing.assert_allclose(log_value, log_h, atol=1e-10)
        assert time < 0.5 or np.max(np.abs(plain - clean)) > 0.05
    ends = everything(jax.tree.map(jnp.asarray, PROCESS.level(0.0)))[0]
    for log_value, _ in ends.values():
        np.testing.assert_allclose(log_value, SEEN.log_likelihood(x), rtol=1e-12)


def test_the_noised_measurement_is_exact_for_a_flat_prior(x64):
    """log h up to terms in the inverse of the prior's variance, its gradient, and the ends."""
    flat, twist, x = oracles.gaussian(np.zeros(3), 1e8), inverse.noised(SEEN), jnp.asarray(X)
    exact = inverse.exact(flat, SEEN)
    both = jax.jit(lambda level: (twist.gradient(flat, x, level), exact(flat, x, level)[0]))
    for time in (0.05, 0.6):
        (log_h, _, slope), expected = both(jax.tree.map(jnp.asarray, PROCESS.level(time)))
        np.testing.assert_allclose(log_h, expected, rtol=1e-6)
        level = PROCESS.level(time)
        covariance = 0.16 * np.eye(2) + (level.sigma / level.alpha) ** 2 * A @ A.T
        hand = A.T @ np.linalg.solve(covariance, SEEN.y - A @ X / level.alpha) / level.alpha
        np.testing.assert_allclose(slope, hand, rtol=1e-9)
    (log_h, _, _), _ = both(jax.tree.map(jnp.asarray, PROCESS.level(0.0)))
    np.testing.assert_allclose(log_h, SEEN.log_likelihood(x), rtol=1e-12)


@pytest.mark.parametrize("method", ["dense", "cg"])
def test_a_covariance_that_is_none_cannot_explode(x64, method):
    """A denoiser whose Jacobian is neither symmetric nor positive, as a network's: K by hand without the negative part.

    Along the negative direction S + Q is 1e-3 of S, so that plain solving gives a thousand times |r| / S.
    """
    rng = np.random.default_rng(3)
    basis = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    noise, level = 0.25, PROCESS.level(0.5)
    spread = basis @ np.diag([2.0, 0.7, 0.1, -0.999 * noise]) @ basis.T
    skew = 0.02 * rng.normal(size=(4, 4))
    factor = level.sigma**2 / level.alpha
    jacobian = jnp.asarray((spread + skew - skew.T) / factor).T  # C = sigma^2 / alpha J^T
    denoise = lambda x, level: jacobian @ x
    x, y = jnp.asarray(rng.normal(size=4)), rng.normal(size=4)
    seen = inverse.measurement(inverse.matrix(np.eye(4)), y, np.sqrt(noise))
    log_h, x0, slope = inverse.mmps(seen, method, 4).gradient(denoise, x, level)
    residual = y - np.asarray(x0)
    solved = np.linalg.solve(np.asarray(jacobian).T, np.asarray(slope))
    assert np.linalg.norm(solved) <= np.linalg.norm(residual) / noise
    assert np.linalg.norm(np.linalg.solve(noise * np.eye(4) + spread, residual)) > 50 * np.linalg.norm(residual) / noise
    assert np.isfinite(log_h)
    whole = noise * np.eye(4) + basis @ np.diag([2.0, 0.7, 0.1, 0.0]) @ basis.T
    # of the fit, dense has all; and cg not less, as its last direction counts with the noise alone
    fit = -2 * log_h - np.linalg.slogdet(2 * np.pi * whole)[1]
    assert fit >= 0.999 * residual @ np.linalg.solve(whole, residual) and np.linalg.norm(solved) > 0
    if method == "dense":
        np.testing.assert_allclose(solved, np.linalg.solve(whole, residual), rtol=1e-9)
        gaussian = -0.5 * (residual @ solved + np.linalg.slogdet(2 * np.pi * whole)[1])
        np.testing.assert_allclose(log_h, gaussian, rtol=1e-10)


def test_an_exact_measurement_of_what_the_network_says_is_negative(x64):
    """Without noise nothing is left of such a direction: it has no say, and log det is that of the others."""
    values, basis = np.array([1.0, 0.3, -0.1]), np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]
    right = np.array([1.0, -2.0, 0.5])
    found, log_det = dense_solution(jnp.asarray(basis @ np.diag(values) @ basis.T), jnp.zeros(3), jnp.asarray(right))
    hand = basis[:, :2] @ ((basis[:, :2].T @ right) / values[:2])
    np.testing.assert_allclose(found, hand, rtol=1e-10)
    np.testing.assert_allclose(log_det, np.log(0.3), rtol=1e-10)


def test_conjugate_gradients_go_on_for_a_covariance_in_single_precision():
    """Q of rank 8 in 64 and little noise: rounding of p^T Q p is above p^T S p, and no direction is negative."""
    rng, noise = np.random.default_rng(7), jnp.full(64, 1e-4)
    solve = jax.jit(lambda q, right: conjugate_gradients(lambda v: noise * v + q @ v, noise, right, 30))
    for _ in range(100):
        root = rng.normal(size=(64, 8))
        q, right = root @ root.T, rng.normal(size=64)
        found, beyond = solve(jnp.asarray(q, jnp.float32), jnp.asarray(right, jnp.float32))
        assert right @ np.asarray(found, np.float64) > 0.9 * right @ np.linalg.solve(q + 1e-4 * np.eye(64), right)
        assert beyond == 0


def test_lanczos_log_determinant(x64):
    """Exact for a diagonal matrix whatever the probe; otherwise an average over signs."""
    diagonal = jnp.array([0.3, 1.0, 2.0, 5.0])
    one = lanczos_log_determinant(lambda v: diagonal * v, diagonal, 4, 1)
    np.testing.assert_allclose(one, np.log(3.0), rtol=1e-10)
    root = np.random.default_rng(0).normal(size=(4, 4))
    full = jnp.asarray(root @ root.T + np.eye(4))
    many = jax.jit(lambda: lanczos_log_determinant(lambda v: full @ v, diagonal, 4, 2000))()
    logm = np.linalg.eigh(full)
    off = logm[1] @ np.diag(np.log(logm[0])) @ logm[1].T
    error = np.sqrt(2 * (np.sum(off**2) - np.sum(np.diag(off) ** 2)) / 2000)  # Hutchinson's variance
    assert abs(float(many) - np.linalg.slogdet(np.asarray(full))[1]) < 4 * error


def test_lanczos_log_determinant_of_a_space_that_is_full():
    """One step spans the Krylov space of a multiple of the identity: nothing is left to divide by."""
    for size, steps in ((4, 3), (32, 10)):
        found = lanczos_log_determinant(lambda v: 0.25 * v, jnp.zeros(size), steps, 1)
        np.testing.assert_allclose(found, size * np.log(0.25), rtol=1e-6)


def test_loss_guided_diffusion_tends_to_the_gaussian_twist(x64):
    """log h of one measurement within four standard errors of the closed form."""
    seen = inverse.measurement(inverse.matrix(A[:1]), np.array([0.8]), 0.4)
    level, prior, x = PROCESS.level(0.5), PRIORS["isotropic"], jnp.asarray(X)
    count = 20000
    loose = inverse.lgd(seen, 1.7, jax.random.key(0), count)(prior, x, level)[0]
    sharp = inverse.pigdm(seen, 1.7)(prior, x, level)[0]
    # Var[p] / E[p]^2 of N(y; m + r |a| z, s^2), with k = (r |a| / s)^2
    r2 = 0.25 * 1.7 / (0.25 + 0.25 * 1.7) * (A[0] @ A[0])
    k, gap2 = r2 / 0.16, (0.8 - A[0] @ np.asarray(prior(x, level))) ** 2
    second = np.exp(-gap2 / (0.16 + 2 * r2)) / (2 * np.pi * 0.16 * np.sqrt(1 + 2 * k))
    first = np.exp(-0.5 * gap2 / (0.16 + r2)) / np.sqrt(2 * np.pi * (0.16 + r2))
    assert abs(loose - sharp) < 4 * np.sqrt((second / first**2 - 1) / count)


# --- gradient steps -------------------------------------------------------------------------------------------------


@value
class Rough:
    """N(0, I), with a derivative that is not a number."""

    def __call__(self, x, level):
        @jax.custom_jvp
        def gain(x):
            return level.alpha * x / (level.alpha**2 + level.sigma**2)

        gain.defjvp(lambda primals, tangents: (gain(*primals), jnp.nan * tangents[0]))
        return gain(x)


def one_step(solver, denoise, x, t=0.6, s=0.4, noise=0.0):
    grid = grids.times(PROCESS, [t, s])
    row = jax.tree.map(lambda leaf: np.asarray(leaf)[0], solver.plan(grid))
    draws = tuple(noise + jnp.zeros_like(x) for _ in range(solver.draws))
    return solver.step(draws, denoise, x, solver.init(x), row)[0]


@pytest.mark.paper("Diffusion Posterior Sampling for General Noisy Inverse Problems")
def test_dps_is_its_formula_and_biased(x64):
    """x - step grad |y - A x0(x)| by finite differences, for a matrix, counts and phases; its law is too narrow."""
    prior, x = PRIORS["full"], jnp.asarray(X)
    level = PROCESS.level(0.6)
    counts = inverse.measurement(inverse.identity((3,)), np.array([3.0, 1.0, 4.0]), inverse.poisson_noise(2.0))
    phases = inverse.phase_retrieval((3,))
    for seen in (SEEN, counts, inverse.measurement(phases, np.ones(6), 0.1)):

        def misfit(x, seen=seen):
            variance = np.asarray(seen.variance(x))
            weight = np.mean(variance) / variance
            return np.sqrt(np.sum(weight * np.asarray(seen.residual(prior(x, level))) ** 2))

        moved = one_step(solvers.ddim(), prior, x) - one_step(inverse.dps(solvers.ddim(), seen, 0.3), prior, x)
        h = 1e-5 * np.eye(3)
        slope = [(misfit(x + e) - misfit(x - e)) / 2e-5 for e in h]
        np.testing.assert_allclose(moved, 0.3 * np.array(slope), rtol=1e-6, atol=1e-8)


@pytest.fixture(scope="module")
def correlated():
    """Many samples of methods on N(0, [[1, .9], [.9, 1]]) with x_1 = 1.2 measured exactly; the law is N(1.08, 0.19)."""
    prior = oracles.gaussian(np.zeros(2), np.array([[1.0, 0.9], [0.9, 1.0]]))
    seen = inverse.measurement(inverse.mask(np.array([True, False])), np.array([1.2], np.float32), 0.0)
    grid = grids.uniform(PROCESS, 40, start=0.98)
    keys = jax.random.split(jax.random.key(0), 4000)

    def run(solver, guided=False, grid=grid):
        def one(key):
            denoise = inverse.replacement(prior, seen, jax.random.fold_in(key, 1)) if guided else prior
            return sample(key, denoise, solver, grid, shape=(2,)).x

        return np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)

    return run, seen, grid


def divergence(x):
    """KL(N(mean, var of the hidden entry) || the conditional law)."""
    mean, var = x[:, 1].mean(), x[:, 1].var()
    return 0.5 * (var / 0.19 + (mean - 1.08) ** 2 / 0.19 - 1 - np.log(var / 0.19))


@pytest.mark.paper(
    "LanPaint: Training-Free Diffusion Inpainting with Asymptotically Exact and Fast Conditional Sampling"
)
def test_lanpaint_divergence_falls_with_inner_steps(correlated):
    """From replacement's, through fewer than time travel's calls; and its oscillator is exact."""
    run, seen, grid = correlated
    base = solvers.ddim(eta=1.0)
    replaced = divergence(run(base, guided=True))
    travelled = divergence(run(base, guided=True, grid=grids.time_travel(grid, 5, 4)))
    inner = [divergence(run(inverse.lanpaint(base, seen, n))) for n in (2, 8)]
    assert travelled < 0.5 * replaced
    assert inner[1] < 0.5 * inner[0] < 0.25 * replaced
    assert inner[1] < travelled
    move, spread = oscillator(2.0, 0.3)
    np.testing.assert_allclose(move, expm(0.3 * np.array([[0, 1], [-1, -2.0]])), atol=1e-12)
    np.testing.assert_allclose(spread @ spread.T, np.eye(2) - move @ move.T, atol=1e-12)


@pytest.mark.paper("Improving Diffusion Models for Inverse Problems using Manifold Constraints")
def test_mcg_stays_nearer_the_manifold_than_projection(correlated):
    """Data on a line: the distance to it, with the gradient and with the projection alone."""
    _, seen, grid = correlated
    line = oracles.gaussian(np.zeros(2), np.array([[1.0, 1.0], [1.0, 1.0]]) + 1e-6 * np.eye(2))
    keys = jax.random.split(jax.random.key(0), 500)

    @jax.jit
    def distance(step):
        solver = inverse.mcg(solvers.ddim(eta=1.0), seen, step)
        x = jax.vmap(lambda key: sample(key, line, solver, grid, shape=(2,)).x)(keys)
        return jnp.sqrt(jnp.mean((x[:, 0] - x[:, 1]) ** 2) / 2), x[:, 0]

    (plain, known), (guided, also) = distance(0.0), distance(0.05)
    np.testing.assert_allclose([known, also], 1.2, atol=1e-5)
    assert guided < 0.7 * plain


@pytest.mark.paper("Steering Rectified Flow Models in the Vector Field for Controlled Image Generation")
def test_flowchef_skips_the_jacobian(x64):
    """The state moves by - step A^T (A x0 - y), on a network without a derivative, towards the posterior mean."""
    x = jnp.asarray(X)
    step = 0.3
    plain, moved = (
        one_step(solvers.ddim(), Rough(), x),
        one_step(inverse.flowchef(solvers.ddim(), SEEN, step), Rough(), x),
    )
    x0 = 0.4 * X / (0.16 + 0.36)
    np.testing.assert_allclose(moved - plain, -step * A.T @ (A @ x0 - [0.8, -0.5]), rtol=1e-10)
    assert np.all(np.isnan(one_step(inverse.dps(solvers.ddim(), SEEN, step), Rough(), x)))
    prior = oracles.gaussian(np.zeros(3), 1.0)
    goal = inverse.posterior(prior, SEEN).mean
    grid = grids.uniform(PROCESS, 20, start=0.98)
    ends = [
        sample(jax.random.key(1), prior, solver, grid, x=x).x
        for solver in (solvers.ddim(), inverse.flowchef(solvers.ddim(), SEEN, step))
    ]
    misfit = [np.linalg.norm(A @ end - SEEN.y) for end in ends]
    assert misfit[1] < 0.3 * misfit[0] and np.linalg.norm(ends[1] - goal) < np.linalg.norm(ends[0] - goal)


# --- steps in the basis of the operator ------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.01, 2.0])
def test_ddnm_and_ddrm_are_their_formulas(noise, x64):
    """One step of y = d x + noise, by the papers' scalar formulas, in both regimes; and of an entry that is hidden."""
    d, y, eta = 0.5, 0.7, 0.6
    seen = inverse.measurement(inverse.matrix(np.array([[d, 0.0]])), np.array([y]), noise)
    prior, x, z = oracles.gaussian(np.zeros(2), 1.0), jnp.array([0.3, -0.9]), 0.8
    t, s = PROCESS.level(0.6), PROCESS.level(0.4)
    x0 = np.asarray(prior(x, t))
    eps = (np.asarray(x) - t.alpha * x0) / t.sigma
    r, b = s.sigma / s.alpha, noise / d
    if r < b:
        seen_part = x0[0] + r * (np.sqrt(1 - eta**2) * (y / d - x0[0]) / b + eta * z)
    else:
        seen_part = 0.2 * x0[0] + 0.8 * y / d + np.sqrt(r**2 - 0.64 * b**2) * z
    hidden = x0[1] + r * (np.sqrt(1 - eta**2) * eps[1] + eta * z)
    found = one_step(inverse.ddrm(seen, eta, 0.8), prior, x, noise=z)
    np.testing.assert_allclose(found, s.alpha * np.array([seen_part, hidden]), rtol=1e-10)
    # the ancestral step: mean k x + a x0, standard deviation std
    h = s.half_log_snr - t.half_log_snr
    std = s.sigma * np.sqrt(1 - np.exp(-2 * h))
    k = np.sqrt(s.sigma**2 - std**2) / t.sigma
    a = s.alpha - t.alpha * k
    if std >= a * noise / d:
        share, left = 1.0, np.sqrt(std**2 - (a * noise / d) ** 2)
    else:
        share, left = np.sqrt(1 - eta**2) * std * d / (a * noise), eta * std
    expected = k * np.asarray(x) + a * np.array([x0[0] + share * (y / d - x0[0]), x0[1]]) + np.array([left, std]) * z
    found = one_step(inverse.ddnm(solvers.ddim(eta=1.0), seen, eta), prior, x, noise=z)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.85, 1.0])
def test_ddnm_adds_up_the_one_noise_of_y(eta, x64):
    """Of N(0, 1) and a singular value far below the noise: what y's noise does to the end, by the scalar recursion."""
    d, noise, prior, ends = 1e-3, 0.1, oracles.gaussian(np.zeros(1), 1.0), {}
    for steps in (12, 48):
        grid, brought = grids.log_snr(PROCESS, steps, start=0.96, stop=0.02), 0.0
        for i in range(steps - 1):
            t, s = (PROCESS.level(float(np.asarray(levels.time)[i])) for levels in (grid.t, grid.s))
            std = s.sigma * np.sqrt(1 - np.exp(2 * (t.half_log_snr - s.half_log_snr)))
            k = np.sqrt(s.sigma**2 - std**2) / t.sigma
            a = s.alpha - t.alpha * k
            share = np.sqrt(1 - eta**2) * std * d / (a * noise)
            kept = k + a * (1 - share) * t.alpha / (t.alpha**2 + t.sigma**2)
            brought = kept * brought + a * share * noise / d
        last = grid.t.alpha[-1] / (grid.t.alpha[-1] ** 2 + grid.t.sigma[-1] ** 2)  # to the data

        def end(y, grid=grid):
            seen = inverse.measurement(inverse.matrix(np.array([[d]])), y[None], noise)
            solver = inverse.ddnm(solvers.ancestral(), seen, eta)
            return sample(jax.random.key(0), prior, solver, grid, shape=(1,), dtype=float).x[0]

        found = jnp.diff(jax.vmap(end)(jnp.array([0.0, noise])))[0]
        np.testing.assert_allclose(found, last * brought, rtol=1e-9, atol=1e-12)
        ends[steps] = float(found)
    assert ends[48] > 1.8 * ends[12] > 1.8 if eta < 1 else ends == {12: 0.0, 48: 0.0}


def test_proximal_estimates_are_their_closed_forms(x64):
    """DiffPIR's by a dense solve, with noise per entry (conjugate gradients) and without; damping of the null space."""
    level, x = PROCESS.level(0.4), jnp.asarray(X)
    prior = PRIORS["full"]
    x0 = np.asarray(prior(x, level))
    for noise in (0.4, np.array([0.2, 0.7])):
        seen = inverse.measurement(inverse.matrix(A), SEEN.y, noise)
        weight = np.diag(np.broadcast_to(1 / np.asarray(noise) ** 2, 2))
        hold = 8.0 / (0.4 / 0.6) ** 2
        expected = np.linalg.solve(A.T @ weight @ A + hold * np.eye(3), A.T @ weight @ SEEN.y + hold * x0)
        np.testing.assert_allclose(inverse.diffpir(prior, seen)(x, level), expected, rtol=1e-5)
    loud = inverse.measurement(inverse.matrix(A), SEEN.y, 2.0)
    change = inverse.null_space(prior, loud)(x, level) - x0
    np.testing.assert_allclose(change, 0.4 / 1.2 * np.linalg.pinv(A) @ (SEEN.y - A @ x0), rtol=1e-9)


# --- samplers ---------------------------------------------------------------------------------------------------------


@value
class Descent:
    rate: float

    def init(self, x):
        return ()

    def update(self, gradient, state, x):
        return -self.rate * gradient, state


@pytest.mark.paper("A Variational Perspective on Solving Inverse Problems with Diffusion Models")
def test_red_diff_finds_the_minimiser_of_its_objective(x64):
    """At one level the steps' mean is the solution of a linear system, which is not the posterior mean."""
    prior, strength = PRIORS["diagonal"], 0.5
    level = PROCESS.level(0.5)
    grid = grids.times(PROCESS, np.linspace(0.5, 0.4999, 3001))
    run = lambda key: inverse.red_diff(key, prior, SEEN, grid, jnp.zeros(3), strength=strength, optimiser=Descent(0.02))
    found = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 200)).x)
    variances = np.array([0.4, 1.7, 3.0])
    hold = np.diag(strength * level.sigma**2 / (level.alpha**2 * variances + level.sigma**2))
    data = A.T @ A / 0.16
    expected = np.linalg.solve(data + hold, A.T @ SEEN.y / 0.16 + hold @ prior.mean)
    error = found.std(0) / np.sqrt(200)
    assert np.all(np.abs(found.mean(0) - expected) < 4 * error + 2e-3)
    assert np.max(np.abs(found.mean(0) - inverse.posterior(prior, SEEN).mean)) > 10 * np.max(error)


def test_split_gibbs_has_its_law(x64):
    """At a fixed rho the chain's law is Gaussian with precision 1 / v + 1 / (noise^2 + rho^2)."""
    prior, rho, noise, y = oracles.gaussian(np.zeros(1), 2.0), 0.4, 0.3, 1.5
    seen = inverse.measurement(inverse.identity((1,)), np.array([y]), noise)
    run = lambda key: (
        inverse.pnp_dm(key, prior, seen, PROCESS, (1,), stds=np.full(12, rho), steps=40, dtype=jnp.float64).x
    )
    x = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 4000)))[:, 0]
    variance = 1 / (1 / 2.0 + 1 / (noise**2 + rho**2))
    mean = variance * y / (noise**2 + rho**2)
    assert abs(x.mean() - mean) < 4 * np.sqrt(variance / 4000) + 0.01 * mean  # a hundredth for the steps
    assert abs(x.var() / variance - 1) < 4 * np.sqrt(2 / 4000) + 0.02


def test_likelihood_draws(x64):
    """N(z; centre, std^2 I) p(y | z): exact for a matrix; Langevin's law of a nonlinear operator that is linear."""
    centre, std = jnp.asarray(X), 0.5
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = np.asarray(jax.jit(jax.vmap(lambda key: likelihood_draw(key, SEEN, centre, std)))(keys))
    precision = A.T @ A / 0.16 + np.eye(3) / 0.25
    covariance = np.linalg.inv(precision)
    mean = covariance @ (A.T @ SEEN.y / 0.16 + X / 0.25)
    errors = np.sqrt(np.diag(covariance) / 4000)
    assert np.all(np.abs(draws.mean(0) - mean) < 4 * errors)
    outer = np.sqrt((covariance**2 + np.outer(np.diag(covariance), np.diag(covariance))) / 4000)
    assert np.all(np.abs(np.cov(draws.T) - covariance) < 4 * outer)
    seen = inverse.measurement(inverse.nonlinear(lambda x: 2 * x, (1,)), np.array([1.0]), 0.4)
    draws = jax.vmap(lambda key: likelihood_draw(key, seen, jnp.zeros(1), std, steps=40, rate=0.5))
    draws = np.asarray(jax.jit(draws)(keys))
    variance = 1 / (4 + 4 / 0.16)
    assert abs(draws.mean() - variance * 2 / 0.16) < 4 * np.sqrt(variance / 4000)
    unadjusted = variance / (1 - 0.25)  # the stationary variance of steps of half the variance
    assert abs(draws.var() / unadjusted - 1) < 4 * np.sqrt(2 / 4000)


def test_deblurring_with_a_cutoff():
    """Methods that divide y by singular values: noise of 0.1 becomes 21, in data of 1; with a cutoff 1.0."""
    prior, grid = oracles.gaussian(np.zeros((8, 8)), 1.0), grids.log_snr(processes.edm(10.0), 20)
    y = np.asarray(np.random.default_rng(0).normal(size=(8, 8)), np.float32)
    key, step = jax.random.key(0), solvers.ddim(1.0)

    @jax.jit
    def spread(seen):
        run = lambda denoise, solver: sample(key, denoise, solver, grid, shape=(8, 8)).x
        made = {
            "replacement": run(inverse.replacement(prior, seen, key), step),
            "null_space": run(inverse.null_space(prior, seen), step),
            "mcg": run(prior, inverse.mcg(step, seen, 0.1)),
            "lanpaint": run(prior, inverse.lanpaint(step, seen, 1)),
        }
        inverted = inverse.pseudo_inverse(seen.operator, seen.y)
        return {name: jnp.std(x) for name, x in made.items()} | {"inverted": jnp.std(inverted)}

    blurs = {cut: inverse.blur(inverse.gaussian_kernel(5, 1.0), (8, 8), cut) for cut in (0.0, 0.03)}
    before, after = (spread(inverse.measurement(a, 0.1 * y, 0.1)) for a in blurs.values())
    for name, found in after.items():
        assert before[name] > 10, name
        assert found < 2, name
