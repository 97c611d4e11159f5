"""Diffusion on SO(3) and its steering, against series, quadrature over Euler angles and SciPy's rotations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from scipy.spatial.transform import Rotation

from diffjax import nongaussian, smc
from diffjax.levels import value
from diffjax.nongaussian.rotations import angle_quantile, log_kernel

SO3 = nongaussian.rotations()
CENTRES = Rotation.from_rotvec([[0.2, -0.1, 0.4], [-1.5, 1.0, 0.3], [0.5, 2.0, -1.8]]).as_matrix()
LAW = nongaussian.heat_mixture(SO3, CENTRES, np.array([0.25, 0.4, 0.3]), np.array([0.5, 0.3, 0.2]))
VARIANCES = np.concatenate([np.geomspace(8.0, 0.04, 20), [0.0]])
TOWARDS = Rotation.from_rotvec([0.4, 0.8, -0.2]).as_matrix()
CONCENTRATION = 1.2


@pytest.fixture(autouse=True)
def double(x64):
    """All tests here run in float64."""


def nodes(n=16):
    """Rotations and their shares of the volume 8 pi^2: Euler's angles, by the midpoint rule and Gauss's."""
    a = 2 * np.pi * np.arange(n) / n
    c, w = np.polynomial.legendre.leggauss(n // 2 + 2)
    first, middle, last = np.meshgrid(a, np.arccos(c), a, indexing="ij")
    share = np.broadcast_to(w[:, None], (n, len(w), n)).ravel() * (2 * np.pi / n) ** 2
    return Rotation.from_euler("ZYZ", np.stack([first, middle, last], -1).reshape(-1, 3)).as_matrix(), share


POINTS, SHARE = nodes()


def seen(x):
    """How well a rotation agrees with one: the trace, 1 + 2 cos of the angle between them."""
    return jnp.sum(x * jnp.asarray(TOWARDS, x.dtype))


def by_series(angle, t):
    """The kernel with respect to the uniform law, 400 terms in float64."""
    degree = np.arange(400)[:, None]
    terms = (2 * degree + 1) * np.exp(-degree * (degree + 1) * t / 2)
    return np.sum(terms * np.sin((degree + 0.5) * angle) / np.sin(angle / 2), axis=0)


@pytest.fixture(scope="module")
def kernel():
    """log density and its derivative in the angle."""
    log = lambda angle, t: log_kernel(jnp.sin(angle), jnp.cos(angle), t)
    return jax.jit(jax.vmap(jax.value_and_grad(log), (0, None)))


@pytest.mark.parametrize("t", [0.02, 0.999999, 1.000001, 4.0])
def test_the_kernel_is_the_series_and_the_wrapped_sum_is_it_too(kernel, t):
    angle = np.linspace(0.01, np.pi, 50)
    log, slope = (np.asarray(leaf) for leaf in kernel(angle, t))
    exact = by_series(angle, t)
    np.testing.assert_allclose(np.exp(log), exact, rtol=1e-11, atol=1e-12 * exact.max())
    known = exact > 1e-6 * exact.max()
    step = 1e-5
    rates = (by_series(angle + step, t) - by_series(angle - step, t)) / (2 * step) / exact
    np.testing.assert_allclose(slope[known], rates[known], atol=1e-6, rtol=1e-5)
    # far out the series is rounding; the image that is nearest is not
    assert np.isfinite(log).all() and (np.diff(log) < 0).all()


def test_limits(kernel):
    """Small variances: a Gaussian of the tangent space, by its expansion; large: the uniform law."""
    t, angle = 1e-4, np.array([1e-3, 0.01, 0.03, 2.0])
    log, slope = kernel(angle, t)
    flat = -0.5 * angle**2 / t - 1.5 * np.log(2 * np.pi * t) + np.log(8 * np.pi**2)
    np.testing.assert_allclose(log, flat + t / 8 - np.log(np.sinc(angle / (2 * np.pi))), rtol=1e-12)
    np.testing.assert_allclose(slope, -angle / t + 1 / angle - 0.5 / np.tan(angle / 2), rtol=1e-9)
    log, slope = kernel(angle, 60.0)
    np.testing.assert_allclose([log, slope], 0.0, atol=1e-12)


def test_densities_of_brownian_motion():
    """They integrate to 1 and obey the heat equation, in the whole and by the Laplacian at a point; exp and log."""
    x = jnp.asarray(POINTS)
    log_density = jax.jit(jax.vmap(LAW.log_density, (0, None)))
    density = lambda t: jnp.exp(log_density(x, t))
    for t in (0.1, 8.0):
        np.testing.assert_allclose(np.asarray(density(t)) @ SHARE, 1.0, rtol=2e-5)
    # entries of the matrix have the eigenvalue 2 of minus the Laplacian
    moment = lambda t: (np.asarray(density(t)) * SHARE) @ POINTS.reshape(-1, 9)
    np.testing.assert_allclose(moment(0.8), np.exp(-0.5) * moment(0.3), atol=1e-6)

    start, v = x[77], jnp.array([0.3, -0.2, 0.4])
    end = jax.jit(SO3.exp)(start, v)
    turned = Rotation.from_matrix(POINTS[77]) * Rotation.from_rotvec([0.3, -0.2, 0.4])
    np.testing.assert_allclose(end, turned.as_matrix(), atol=1e-12)
    # (d / dt - Laplacian / 2) of the density at a point: turns about three axes are normal coordinates
    size, time = 1e-3, 1e-5
    turns = Rotation.from_rotvec(size * np.concatenate([np.zeros((1, 3)), np.eye(3), -np.eye(3)]))
    near = (Rotation.from_matrix(POINTS[77]) * turns).as_matrix()
    p, early, late = (np.asarray(jnp.exp(log_density(near, t))) for t in (0.6, 0.6 - time, 0.6 + time))
    laplacian = (p[1:].sum() - 6 * p[0]) / size**2
    np.testing.assert_allclose((late - early)[0] / (2 * time), 0.5 * laplacian, rtol=1e-5)
    slope = (p[1:4] - p[4:]) / (2 * size * p[0])
    np.testing.assert_allclose(jax.jit(LAW.score)(start, 0.6), slope, rtol=1e-5)


def test_logarithms_at_all_angles():
    axes = np.array([[1.0, 2.0, -2.0], [0.0, 0.0, 3.0], [-2.0, 1.0, 2.0]]) / 3
    v = np.concatenate([angle * axes for angle in (0.0, 1e-8, 1e-3, 1.0, 3.0, np.pi - 1e-9)])
    x = jnp.asarray(POINTS[5])
    back = jax.jit(jax.vmap(lambda v: SO3.log(x, SO3.exp(x, v))))(v)
    np.testing.assert_allclose(back, v, atol=1e-9)
    slope = jax.jit(jax.vmap(jax.jacobian(lambda v: SO3.log(x, SO3.exp(x, v)))))(v[:12])
    np.testing.assert_allclose(slope, np.broadcast_to(np.eye(3), (12, 3, 3)), atol=1e-6)
    assert np.isfinite(jax.grad(lambda y: LAW.log_density(y, 0.3))(jnp.asarray(CENTRES[0]))).all()
    for manifold, a, b in [
        (nongaussian.torus(), jnp.array([3.0]), jnp.array([-3.0])),
        (nongaussian.sphere(), jnp.array([0.6, 0.8, 0.0]), jnp.array([0.0, 0.0, -1.0])),
    ]:
        np.testing.assert_allclose(manifold.exp(a, manifold.log(a, b)), b, atol=1e-12)
        np.testing.assert_allclose(manifold.log(a, a), 0 * a, atol=1e-12)


@pytest.mark.parametrize("t", [0.001, 0.3, 5.0])
def test_draws_have_the_angles_and_axes_of_the_kernel(t):
    u = np.array([0.01, 0.3, 0.9, 0.999])
    angle = np.asarray(jax.vmap(lambda u: angle_quantile(u, t))(u))
    density = lambda a: (1 - np.cos(a)) / np.pi * by_series(np.array([a]), t)[0]
    for share, end in zip(u, angle, strict=True):
        np.testing.assert_allclose(scipy.integrate.quad(density, 1e-12, end, limit=200)[0], share, atol=1e-7)
    if t == 0.3:
        draw = jax.jit(jax.vmap(lambda key: SO3.log(TOWARDS, SO3.noised(key, jnp.asarray(TOWARDS), t))))
        v = np.asarray(draw(jax.random.split(jax.random.key(0), 1000)))
        size = np.linalg.norm(v, axis=1)
        grid = np.linspace(1e-9, np.pi, 2000)
        law = scipy.integrate.cumulative_trapezoid((1 - np.cos(grid)) / np.pi * by_series(grid, t), grid, initial=0)
        assert scipy.stats.kstest(size, lambda a: np.interp(a, grid, law)).pvalue > 1e-4
        for height in (v / size[:, None]).T:  # uniform axes: uniform heights
            assert scipy.stats.kstest(height, scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-4
        # an entry's mean falls as exp(-t): uniform draws have none
        cosines = 1 + 2 * np.cos(size)
        assert abs(cosines.mean() - 3 * np.exp(-t)) < 4 * cosines.std() / 1000**0.5
        free = np.asarray(jax.vmap(lambda key: SO3.uniform(key, float))(jax.random.split(jax.random.key(1), 1000)))
        assert (np.abs(free.mean(0)) < 4 * np.sqrt(1 / 3 / 1000)).all()


@value
class Twist:
    """The agreement of the clean estimate, softened by what is not known; the exact one at the end."""

    walk: Any

    def __call__(self, x, depth):
        x0, t = self.walk.clean(x, depth), self.walk.variance(depth)
        return (depth > 0).astype(x.dtype) * CONCENTRATION / (1 + 2.0 * t) * seen(x0)


@pytest.mark.paper("Practical and Asymptotically Exact Conditional Sampling in Diffusion Models")
@pytest.mark.slow
def test_twisted_walks_have_the_posterior():
    """Riemannian TDS on SO(3): evidence and mean rotation by quadrature, and more effective than without a twist."""
    density = np.asarray(jax.jit(jax.vmap(LAW.log_density))(jnp.asarray(POINTS)))
    p = np.exp(density) * SHARE
    h = np.exp(CONCENTRATION * np.asarray(jax.vmap(seen)(jnp.asarray(POINTS))))
    z, flat = (p * h).sum(), POINTS.reshape(-1, 9)
    mean, prior = (p * h) @ flat / z, p @ flat
    walk = nongaussian.geodesic_walk(SO3, LAW.score, VARIANCES)
    twist, keys = Twist(walk), jax.random.split(jax.random.key(1), 100)
    options: Any = dict(particles=8, weighed=True)
    run = lambda key, scale: smc.steer_chain(
        key, walk.twisted(twist, scale), jnp.eye(3), len(VARIANCES), twist, **options
    )
    runs, spread = jax.jit(jax.vmap(run, (0, None))), {}
    for kind, scale in (("plain", 0.0), ("twisted", 1.0)):
        found = jax.tree.map(np.asarray, runs(keys, scale))
        assert (found.failed_at == -1).all()
        each = np.exp(found.log_z)
        w = np.exp(found.log_weights - found.log_weights.max(1, keepdims=True))
        w /= w.sum(1, keepdims=True)
        got = each[:, None] * np.einsum("pn,pnd->pd", w, found.x.reshape(100, 8, 9)) / each.mean()
        # 3 % for 20 steps: the walk is one of finite steps
        assert abs(each.mean() / z - 1) < 4 * each.std() / each.mean() / 100**0.5 + 0.03
        assert (np.abs(got.mean(0) - mean) < 4 * got.std(0) / 100**0.5 + 0.03).all(), (kind, got.mean(0), mean)
        np.testing.assert_allclose((found.x @ np.swapaxes(found.x, -1, -2)) - np.eye(3), 0.0, atol=1e-9)
        spread[kind] = each.std() / each.mean()
    assert spread["twisted"] < 0.75 * spread["plain"], spread
    assert np.abs(mean - prior).max() > 0.15


def test_a_twisted_step_against_densities_of_tangent_vectors():
    walk = nongaussian.geodesic_walk(SO3, LAW.score, VARIANCES)
    lead = lambda x, depth: 2.0 * seen(x) + 0.1 * depth
    x, depth = jnp.asarray(POINTS[123]), 15
    t, s = VARIANCES[depth - 1 : depth + 1]
    step = jax.jit(jax.vmap(walk.twisted(lead, 0.7), (0, None, None)))
    new, ratio = (np.asarray(leaf) for leaf in step(jax.random.split(jax.random.key(3), 600), x, depth))
    v = (Rotation.from_matrix(POINTS[123]).inv() * Rotation.from_matrix(new)).as_rotvec()
    turn = lambda e: (Rotation.from_matrix(POINTS[123]) * Rotation.from_rotvec(1e-5 * e)).as_matrix()
    slope = lambda f: np.array([(f(jnp.asarray(turn(e))) - f(jnp.asarray(turn(-e)))) / 2e-5 for e in np.eye(3)])
    mean = (t - s) * slope(lambda x: LAW.log_density(x, t))
    other = mean + 0.7 * (t - s) * slope(lambda x: lead(x, depth))
    variance = s * (t - s) / t
    expected = (np.sum((v - other) ** 2, 1) - np.sum((v - mean) ** 2, 1)) / (2 * variance)
    np.testing.assert_allclose(ratio, expected, atol=1e-6)
    assert (np.abs(v.mean(0) - other) < 4 * np.sqrt(variance / len(v))).all()
    assert (np.abs(v.var(0) / variance - 1) < 4 * np.sqrt(2 / len(v))).all()


def test_bad_input():
    for match, centres in {
        "points of rotations": -CENTRES,
        "leading axis": np.zeros(3),
        "got array": CENTRES[:, :2],
    }.items():
        with pytest.raises(ValueError, match=match):
            nongaussian.heat_mixture(SO3, centres, 0.1)
