"""Brownian paths shared by grids, and stored noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax.levels import Row
from diffjax.noises import brownian, stored

COUNT = 20000


def _rows(half_log_snr):
    points = np.asarray(half_log_snr, np.float64)
    level = diffjax.Level(-points, np.ones_like(points), np.exp(-points), points)
    t, s = (diffjax.Level(*(leaf[part] for leaf in level)) for part in (slice(-1), slice(1, None)))
    return Row(t, s, None)


def _increments(key, half_log_snr, rate=1.0, count=COUNT):
    """z of every row, shape (rows, count), from one path per column."""
    rows, x = _rows(half_log_snr), jnp.zeros(count)
    noise = brownian(rate)
    return np.stack([
        noise(key, 0, jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), rows), x, 1)[0]
        for i in range(len(half_log_snr) - 1)
    ])  # fmt: skip


@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_increments_are_standard_normal_and_independent(rate):
    points = [-6.0, -2.3, -2.2, 0.0, 0.11, 1.7, 7.5]
    z = _increments(jax.random.key(3), points, rate)
    # 4.5 standard errors of 20,000 draws
    np.testing.assert_allclose(z.mean(1), 0, atol=4.5 / np.sqrt(COUNT))
    np.testing.assert_allclose(np.cov(z), np.eye(len(points) - 1), atol=4.5 * np.sqrt(2 / COUNT))


@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_a_coarse_increment_is_the_weighted_sum_of_the_fine_ones(rate, x64):
    points = np.array([-4.0, -3.1, -0.4, 0.3, 2.9])
    fine = _increments(jax.random.key(0), points, rate, 50)
    (coarse,) = _increments(jax.random.key(0), points[[0, -1]], rate, 50)
    h = np.diff(points)
    left = np.exp(-rate * (points[-1] - points[1:]))  # how much of each increment is left at the end
    total = (left * np.sqrt(-np.expm1(-2 * rate * h))) @ fine
    np.testing.assert_allclose(coarse * np.sqrt(-np.expm1(-2 * rate * h.sum())), total, rtol=1e-10, atol=1e-12)
    # the formula is not that of Brownian motion in half-log-SNR or in sigma
    assert np.abs(coarse - np.sqrt(h) @ fine / np.sqrt(h.sum())).max() > 0.1


def test_from_pure_noise_the_increment_is_the_whole_path():
    infinite = _increments(jax.random.key(1), [-np.inf, 0.7])[0]
    far = _increments(jax.random.key(1), [-23.0, 0.7])[0]
    np.testing.assert_allclose(infinite, far, atol=1e-5)
    still = _increments(jax.random.key(1), [0.7, 0.7])[0]
    np.testing.assert_array_equal(still, 0.0)


def test_grids_of_any_length_share_the_path(x64):
    # for a constant clean estimate ddim(eta=1) is exact, so that states at common levels are equal
    process = diffjax.processes.flow()
    point = diffjax.oracles.gaussian(np.array([0.4, -1.0]), np.zeros(2))
    solver = diffjax.solvers.ddim(eta=1.0)
    at = lambda steps: diffjax.sample(
        jax.random.key(5), point, solver, diffjax.grids.times(process, np.linspace(1.0, 0.2, steps + 1)), (2,),
        dtype=jnp.float64, noise=brownian(),
    ).x  # fmt: skip
    np.testing.assert_allclose(at(20), at(40), rtol=1e-9)
    independent = lambda steps: (
        diffjax.sample(
            jax.random.key(5), point, solver, diffjax.grids.times(process, np.linspace(1.0, 0.2, steps + 1)), (2,)
        ).x
    )
    assert np.abs(independent(20) - independent(40)).max() > 0.01


def test_strong_convergence_along_the_shared_path(x64):
    process = diffjax.processes.vp()
    denoise = diffjax.oracles.mixture([0.4, 0.6], [[-1.0], [1.2]], [0.1, 0.05])
    keys = jax.random.split(jax.random.key(0), 16)

    def at(steps):
        grid = diffjax.grids.times(process, process.level(half_log_snr=np.linspace(-2.0, 2.0, steps + 1)).time)
        solver = diffjax.solvers.ddim(eta=1.0)
        draw = lambda k: diffjax.sample(k, denoise, solver, grid, (1,), dtype=jnp.float64, noise=brownian()).x
        return jax.vmap(draw)(keys)

    fine = at(256)
    errors = [float(jnp.sqrt(jnp.mean((at(n) - fine) ** 2))) for n in (8, 32)]
    slopes = np.log2(np.array(errors[:-1]) / errors[1:]) / 2
    assert np.all(slopes > 0.8), (errors, slopes)  # additive noise: strong order 1


def test_refusals():
    process, denoise = diffjax.processes.vp(), diffjax.oracles.gaussian(0.0, 1.0)
    grid = diffjax.grids.uniform(process, 4)
    with pytest.raises(ValueError, match="rate"):
        brownian(0.0)
    with pytest.raises(ValueError, match="towards the data"):
        churned = diffjax.modifiers.churned(diffjax.solvers.heun())
        diffjax.sample(jax.random.key(0), denoise, churned, grid, (), noise=brownian())
    with pytest.raises(ValueError, match="stored noise"):
        diffjax.sample(jax.random.key(0), denoise, diffjax.solvers.ddim(1.0), grid, (), noise=stored((np.zeros(3),)))


def test_stored_noise_is_used(x64):
    process, denoise = diffjax.processes.vp(), diffjax.oracles.gaussian(0.3, 0.2)
    grid = diffjax.grids.uniform(process, 6)
    given = np.random.default_rng(0).normal(size=6)
    solver = diffjax.solvers.ddim(eta=1.0)
    out = diffjax.sample(jax.random.key(0), denoise, solver, grid, x=np.full((), 0.5), noise=stored((given,)))
    x, rows = 0.5, solver.plan(grid)
    for i in range(6):
        level = jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), rows.t)
        a, b, c = (column[i] for column in rows.coefficients.out)
        x = a * x + b * denoise(jnp.asarray(x), level) + c * given[i]
    np.testing.assert_allclose(out.x, x, rtol=1e-12)
    # gradients reach the noise
    slope = jax.grad(lambda z: diffjax.sample(jax.random.key(0), denoise, solver, grid, x=0.5, noise=stored((z,))).x)
    assert np.all(np.abs(slope(jnp.asarray(given))[:-1]) > 0)
