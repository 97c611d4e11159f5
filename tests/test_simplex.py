"""Jacobi processes on the simplex, against moment equations, SciPy's polynomials and all Sudokus of size 4."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from scipy.integrate import solve_ivp

from diffjax import nongaussian

A, B, SPEED = 1.5, 2.5, 0.8
PROCESS = nongaussian.jacobi(A, B, SPEED)
NODES, GAUSS = np.polynomial.legendre.leggauss(400)
V = 0.5 - 0.5 * np.cos(0.5 * np.pi * (NODES + 1))  # nodes that are dense at both ends
GAUSS = 0.25 * np.pi * GAUSS * np.sin(0.5 * np.pi * (NODES + 1))


def density(v0, time):
    return np.asarray(PROCESS.ratio(jnp.asarray(V), v0, time)) * scipy.stats.beta.pdf(V, A, B)


def test_polynomials_are_those_of_jacobi(x64):
    v = np.array([0.0, 0.1, 0.6, 1.0])
    found = PROCESS.polynomials(jnp.asarray(v))
    weights = GAUSS * scipy.stats.beta.pdf(V, A, B)
    for n in (0, 1, 2, 7):
        norm = np.sqrt(weights @ scipy.special.eval_jacobi(n, B - 1, A - 1, 2 * V - 1) ** 2)
        expected = scipy.special.eval_jacobi(n, B - 1, A - 1, 2 * v - 1) / norm
        np.testing.assert_allclose(found[n], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("v0", [0.0, 0.3, 1.0])
def test_transition_has_the_moments_of_the_sde(v0, x64):
    """Mass, mean and second moment by quadrature, against their equations; stationary in the end."""
    slope = lambda t, m: [
        0.5 * SPEED * (A - (A + B) * m[0]),
        SPEED * (A * m[0] - (A + B) * m[1]) + SPEED * (m[0] - m[1]),
    ]
    for time in (0.1, 0.7):
        p = GAUSS * density(v0, time)
        moments = solve_ivp(slope, (0, time), [v0, v0**2], rtol=1e-11, atol=1e-13).y[:, -1]
        np.testing.assert_allclose([p.sum(), p @ V, p @ V**2], [1.0, *moments], atol=2e-6)
        np.testing.assert_allclose(PROCESS.mean(np.array(v0), time), moments[0], rtol=1e-9)
    np.testing.assert_allclose(density(v0, 60.0), scipy.stats.beta.pdf(V, A, B), rtol=1e-9)


def test_steps_compose(x64):
    """Chapman and Kolmogorov."""
    ahead = np.asarray(PROCESS.ratio(0.35, jnp.asarray(V), 0.2)) * scipy.stats.beta.pdf(0.35, A, B)
    expected = np.asarray(PROCESS.log_density(jnp.asarray(0.35), jnp.asarray(0.8), 0.5))
    np.testing.assert_allclose(np.log((GAUSS * density(0.8, 0.3)) @ ahead), expected, rtol=1e-5)


@pytest.mark.paper("Dirichlet Diffusion Score Model for Biological Sequence Generation")
def test_score_is_the_slope_of_the_density(x64):
    v, step = jnp.array([0.05, 0.4, 0.93]), 1e-6
    for v0 in (0.0, 0.6, 1.0):
        start = jnp.full(3, v0)
        low, high = (PROCESS.log_density(v + d, start, 0.3) for d in (-step, step))
        np.testing.assert_allclose(PROCESS.score(v, start, 0.3), (high - low) / (2 * step), rtol=1e-6, atol=1e-6)


def test_sticks():
    x = np.random.default_rng(0).dirichlet(np.ones(4), size=5)
    np.testing.assert_allclose(nongaussian.joined(nongaussian.broken(x)), x, atol=1e-6)
    np.testing.assert_array_equal(nongaussian.broken(np.eye(3)), [[1.0, np.nan], [0.0, 1.0], [0.0, 0.0]])
    # the stationary law is uniform on the simplex
    process = nongaussian.sticks(4)
    x = np.asarray(nongaussian.joined(process.prior(jax.random.key(0), (4000, 3))))
    for i in range(4):
        assert scipy.stats.kstest(x[:, i], scipy.stats.beta(1, 3).cdf).pvalue > 1e-3


def reverse(process, points, shape, count, times, given=None):
    one = lambda key: nongaussian.reverse_jacobi(key, process, points, times, shape, given, jnp.float64)
    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), count))


TIMES = np.geomspace(4.0, 0.04, 161)


def test_reverse_process_has_the_law(x64):
    """Three classes, unevenly likely,: samples are on the simplex and as frequent."""
    weights = np.array([0.5, 0.3, 0.2])
    process = nongaussian.sticks(3)
    points = nongaussian.simplex_points(process, nongaussian.broken(np.eye(3)), weights)
    result = reverse(process, points, (2,), 2000, TIMES)
    x = np.asarray(nongaussian.joined(result.x))
    assert np.all(np.asarray(result.failed_at) == -1)
    assert x.min() >= 0 and np.allclose(x.sum(1), 1, atol=1e-12)
    assert np.mean(x.max(1) > 0.8) > 0.85
    found = np.bincount(x.argmax(1), minlength=3) / len(x)
    assert np.all(np.abs(found - weights) < 4 * np.sqrt(0.25 / len(x))), found


def sudokus():
    """All 288 squares of size 4 with every digit once in rows, columns and blocks."""
    rows = list(itertools.permutations(range(4)))
    good = lambda lines: all(len(set(line)) == len(line) for line in lines)
    found = []
    for top in itertools.product(rows, repeat=2):
        if not good([*zip(*top, strict=True), top[0][:2] + top[1][:2], top[0][2:] + top[1][2:]]):
            continue
        for low in itertools.product(rows, repeat=2):
            if good([*zip(*top, *low, strict=True), low[0][:2] + low[1][:2], low[0][2:] + low[1][2:]]):
                found.append(top + low)
    return np.array(found)


@pytest.mark.paper("Dirichlet Diffusion Score Model for Biological Sequence Generation")
def test_sudoku(x64):
    """Squares drawn from the exact score are valid; with five cells clamped most are the one answer of the puzzle."""
    squares = sudokus()
    assert len(squares) == 288
    process = nongaussian.sticks(4, order=48)
    points = nongaussian.simplex_points(process, nongaussian.broken(np.eye(4)[squares]))
    valid = {square.tobytes() for square in squares}

    puzzle = np.full((4, 4), -1)
    for cell in ((0, 0), (0, 2), (1, 1), (3, 3), (2, 1)):
        puzzle[cell] = squares[100][cell]
    (answer,) = [s for s in squares if np.all((puzzle < 0) | (s == puzzle))]
    given = np.where((puzzle >= 0)[..., None], nongaussian.broken(np.eye(4)[np.maximum(puzzle, 0)]), np.nan)

    free = reverse(process, points, (4, 4, 3), 24, TIMES)
    digits = np.asarray(nongaussian.joined(free.x)).argmax(-1)
    assert np.mean([square.astype(squares.dtype).tobytes() in valid for square in digits]) > 0.9
    assert len({square.tobytes() for square in digits}) > 12

    # clamping is not conditioning: what is given says less early on, when some samples have decided already
    solved = reverse(process, points, (4, 4, 3), 24, TIMES, given)
    digits = np.asarray(nongaussian.joined(solved.x)).argmax(-1)
    assert np.all(digits[:, puzzle >= 0] == puzzle[puzzle >= 0])
    assert np.mean([np.array_equal(square, answer) for square in digits]) > 0.5


def test_bad_arguments():
    with pytest.raises(ValueError, match="above 0"):
        nongaussian.jacobi(0.0, 1.0)
    with pytest.raises(ValueError, match="speed must"):
        nongaussian.jacobi(1.0, 1.0, -1.0)
    with pytest.raises(ValueError, match="order must"):
        nongaussian.jacobi(1.0, 1.0, order=0)
    with pytest.raises(ValueError, match="classes must"):
        nongaussian.sticks(1)
    with pytest.raises(ValueError, match="fractions in"):
        nongaussian.simplex_points(PROCESS, np.array([[1.5]]))
    with pytest.raises(ValueError, match="times must decrease"):
        nongaussian.reverse_jacobi(jax.random.key(0), PROCESS, lambda v, t: v, np.array([1.0, 0.0]), (1,))


def test_the_state_decides_the_type(x64):
    """A float32 state beside tables made in float64: nothing that is made of it is float64."""
    process, v = nongaussian.sticks(3), jnp.full(2, 0.3, jnp.float32)
    for found in (process.drift(v), process.squared_diffusion(v), process.ratio(v, v, jnp.float32(0.5))):
        assert found.dtype == jnp.float32
    wide = process.ratio(v.astype(float), v.astype(float), 0.5)
    assert wide.dtype == jnp.float64
    np.testing.assert_allclose(process.ratio(v, v, jnp.float32(0.5)), wide, rtol=1e-4)
