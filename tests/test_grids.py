"""Grids: ends, counts and spacings from their formulas, gaps, and what every spacing must refuse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, processes
from diffjax.levels import joins, restarts

PROCESSES = {
    "vp": processes.vp(),
    "cosine": processes.cosine(),
    "flow": processes.flow(),
    "edm": processes.edm(),
    "ve": processes.ve(),
    "ddpm": processes.ddpm(),
}
SPACINGS = ("uniform", "quadratic", "cosine", "log_snr", "karras")


def times(grid):
    """All N + 1 times of a grid without gaps."""
    np.testing.assert_array_equal(grid.t.time[1:], grid.s.time[:-1])
    return np.append(grid.t.time, grid.s.time[-1])


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_ends_count_and_monotone(name, spacing, steps):
    """Exactly the asked number of steps, strictly decreasing, from the noisy end to exactly the data."""
    process = PROCESSES[name]
    grid = getattr(grids, spacing)(process, steps)
    assert len(grid) == steps and not grid.gaps
    found = times(grid)
    assert np.all(np.diff(found) < 0)
    starts_late = spacing == "karras" and process.level(process.end).alpha == 0
    assert found[0] == pytest.approx(float(process.end) * (0.999 if starts_late else 1.0), rel=1e-9)
    # the last level of a process that keeps noise is its cleanest
    assert found[-1] == pytest.approx(0.0, abs=1e-12)
    if name != "ve":
        assert grid.s.sigma[-1] == 0.0 and grid.s.half_log_snr[-1] == np.inf
    for level in (grid.t, grid.s):
        for found_leaf, leaf in zip(level, process.level(level.time), strict=True):
            np.testing.assert_array_equal(found_leaf, leaf)


def test_uniform_quadratic_cosine():
    process = processes.flow()
    np.testing.assert_allclose(times(grids.uniform(process, 4)), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(times(grids.quadratic(process, 4)), np.array([1, 0.75, 0.5, 0.25, 0]) ** 2)
    expected = [1 - np.cos(np.pi * u / 2) for u in (1, 0.75, 0.5, 0.25, 0)]
    np.testing.assert_allclose(times(grids.cosine(process, 4)), expected)
    part = times(grids.uniform(process, 2, start=0.8, stop=0.2))
    np.testing.assert_allclose(part, [0.8, 0.5, 0.2])
    assert part[0] == 0.8 and part[-1] == 0.2
    np.testing.assert_allclose(
        np.sqrt(times(grids.quadratic(process, 3, start=0.9, stop=0.4)))[1], (2 * 0.9**0.5 + 0.4**0.5) / 3
    )


@pytest.mark.parametrize("name", PROCESSES)
def test_log_snr_is_uniform(name):
    process = PROCESSES[name]
    grid = grids.log_snr(process, 12)
    regular = np.isfinite(grid.t.half_log_snr) & np.isfinite(grid.s.half_log_snr)
    steps = (grid.s.half_log_snr - grid.t.half_log_snr)[regular]
    assert regular.sum() == 12 - (name != "ve") - (name in ("flow", "cosine"))
    np.testing.assert_allclose(steps, steps[0], rtol=1e-9)
    last = times(grid)[-2 if name != "ve" else -1]
    assert last == pytest.approx(1e-3 * float(process.end) if name != "ve" else 0.0)
    open_end = grids.log_snr(process, 7, start=0.8 * process.end, stop=0.1 * process.end, to_data=False)
    lambdas = process.level(times(open_end)).half_log_snr
    np.testing.assert_allclose(np.diff(lambdas), np.ptp(lambdas) / 7, rtol=1e-9)
    assert times(open_end)[-1] == 0.1 * process.end


def test_karras():
    """Equation 5, sigma_i = (max^(1/rho) + i / (N - 1) (min^(1/rho) - max^(1/rho)))^rho and sigma_N = 0."""
    n, rho = 18, 7.0
    expected = [(80 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho for i in range(n)]
    found = grids.karras(processes.edm(), n)
    np.testing.assert_allclose(found.t.sigma, expected, rtol=1e-9)
    assert found.s.sigma[-1] == 0.0
    vp = grids.karras(processes.vp(), 9, rho=3.0, sigma_max=20.0, sigma_min=0.05)
    roots = (vp.t.sigma / vp.t.alpha) ** (1 / 3)
    np.testing.assert_allclose(np.diff(roots), np.diff(roots)[0], rtol=1e-7)
    np.testing.assert_allclose((roots**3)[[0, -1]], [20.0, 0.05], rtol=1e-7)


def test_table_spacings():
    """The integer steps that samplers of table models take; index k is time k + 1."""
    process = processes.ddpm()
    index = lambda *args: (grids.table(process, *args).t.time - 1).tolist()
    assert index(10, "trailing") == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert index(10, "leading") == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert index(10, "leading", 1) == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert index(10, "linspace") == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert index(3, "trailing") == [999, 666, 332]
    for spacing in ("trailing", "leading", "linspace"):
        assert grids.table(process, 25, spacing).s.sigma[-1] == 0.0
        assert len(grids.table(process, 1000, spacing)) == 1000


def test_times_of_the_user():
    grid = grids.times(processes.vp(), [0.9, 0.4, 0.1])
    np.testing.assert_array_equal(times(grid), [0.9, 0.4, 0.1])
    assert grid.start.time == 0.9
    back = grids.times(processes.vp(), np.array([0.1, 0.4, 0.9]))
    np.testing.assert_array_equal(back.t.time, [0.1, 0.4])
    np.testing.assert_array_equal(grids.times(processes.vp(), jnp.array([0.5, 0.25])).t.time, [0.5])


def test_times_per_frame():
    grid = grids.times(processes.flow(), np.array([[1.0, 0.9], [0.5, 0.9], [0.0, 0.2]]), trailing=2)
    assert grid.t.time.shape == (2, 2) and grid.t.alpha.shape == (2, 2, 1, 1)


def test_a_part_of_a_grid():
    grid = grids.uniform(processes.flow(), 5)[2:4]
    np.testing.assert_allclose(times(grid), [0.6, 0.4, 0.2])
    assert grid.start.time == pytest.approx(0.6)


def test_traced_times():
    """Learned times stay traced, also one among numbers, and levels are differentiable in them."""

    def last_sigma(t):
        return grids.times(processes.vp(), [0.9, t, 0.1]).s.sigma[0]

    slope = jax.jit(jax.grad(last_sigma))(0.4)
    np.testing.assert_allclose(slope, processes.vp().schedule.sigma_rate(0.4), rtol=1e-5)


def test_joins_and_gaps():
    """Between s_i and a noisier t_{i+1} stands the forward transition: it adds up the variances."""
    process = processes.vp()
    grid = grids.pairs(process, [0.9, 0.7, 0.6], [0.5, 0.6, 0.1])
    assert grid.gaps and not grids.pairs(process, [0.9, 0.5], [0.5, 0.1]).gaps
    keep, std = joins(grid)
    a, b = process.level(0.7), process.level(0.5)
    np.testing.assert_allclose(keep, [1.0, a.alpha / b.alpha, 1.0, 1.0], rtol=1e-12)
    np.testing.assert_allclose(std[[0, 2, 3]], 0.0, atol=1e-12)
    assert keep[1] ** 2 * b.sigma**2 + std[1] ** 2 == pytest.approx(a.sigma**2, rel=1e-12)
    np.testing.assert_array_equal(restarts(grid), [True, True, False])
    assert joins(grids.pairs(process, [0.9, 0.7, 0.6], [0.5, 0.6, 0.1], inflation=1.5))[1][1] == pytest.approx(
        1.5 * std[1]
    )


def test_grid_is_a_value():
    leaves, structure = jax.tree.flatten(grids.uniform(processes.vp(), 3))
    assert structure == jax.tree.structure(grids.quadratic(processes.vp(), 3))
    assert all(isinstance(leaf, np.ndarray | np.generic | float) for leaf in leaves)
    assert repr(grids.uniform(processes.vp(), 3)) == "Grid(vp(beta_min=0.1, beta_max=20.0), steps=3, gaps=False)"


def test_an_empty_part_of_a_grid_is_refused():
    with pytest.raises(ValueError, match="at least one step"):
        grids.uniform(processes.flow(), 4)[4:]
