"""Diffusion on the circle, the torus and the sphere, and its steering, against quadrature."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import nongaussian, smc
from diffjax.levels import value

CIRCLE, SPHERE = nongaussian.torus(), nongaussian.sphere(20)
ANGLES = np.array([[-2.0], [0.5], [2.4]])
_points = np.array([[1.0, 0.2, 0.1], [-0.3, 1.0, 0.4], [-0.5, -0.6, -0.8]])
LAWS = {
    "circle": nongaussian.heat_mixture(CIRCLE, ANGLES, np.array([0.1, 0.2, 0.15]), np.array([0.5, 0.3, 0.2])),
    "sphere": nongaussian.heat_mixture(
        SPHERE, _points / np.linalg.norm(_points, axis=1)[:, None], 0.15, np.array([0.5, 0.3, 0.2])
    ),
}
VARIANCES = {  # falling by the same factor, and to 0
    "circle": np.concatenate([np.geomspace(20.0, 0.02, 30), [0.0]]),
    "sphere": np.concatenate([np.geomspace(6.0, 0.02, 30), [0.0]]),
}
DIRECTION = np.array([0.0, 0.6, 0.8])
CONCENTRATION = 3.0


@pytest.fixture(autouse=True)
def double(x64):
    """All tests here run in float64."""


def nodes(name):
    """Points and their share of length or area: the midpoint rule, exact for smooth periodic functions; Gauss."""
    if name == "circle":
        angles = -np.pi + 2 * np.pi * (np.arange(400) + 0.5) / 400
        return angles[:, None], np.full(400, 2 * np.pi / 400)
    z, w = np.polynomial.legendre.leggauss(60)
    phi = 2 * np.pi * np.arange(120) / 120
    r = np.sqrt(1 - z**2)[:, None]
    points = np.stack([r * np.cos(phi), r * np.sin(phi), np.broadcast_to(z[:, None], (60, 120))], -1).reshape(-1, 3)
    return points, np.repeat(w, 120) * 2 * np.pi / 120


def seen(x):
    """The height that is measured: a coordinate of the point in the plane or in space."""
    return jnp.cos(x[0] - 1.0) if x.shape[-1] == 1 else x @ jnp.asarray(DIRECTION, x.dtype)


@value
class Twist:
    """``log p(y | clean estimate)``, softened by what is not known at a variance; the exact one at the end."""

    walk: Any

    def __call__(self, x, depth):
        x0, t = self.walk.clean(x, depth), self.walk.variance(depth)
        inside = (depth > 0).astype(x.dtype)  # the root is no draw yet
        return inside * CONCENTRATION / (1 + 2.0 * t) * seen(x0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_logarithm_of_the_opposite_point(dtype):
    """Any of the shortest ways: tangent, of length pi, and there; with finite derivatives, also close by."""
    points = np.concatenate([np.eye(3), -np.eye(3), _points / np.linalg.norm(_points, axis=1)[:, None]]).astype(dtype)
    ways = jax.jit(jax.vmap(lambda x, y: (SPHERE.log(x, y), jax.jacobian(SPHERE.log, 1)(x, y))))
    rounding = 8 * np.finfo(dtype).eps
    for angle in (0.0, 0.5 * rounding, 1e-3):
        side = np.cross(points, np.roll(points, 1, axis=1) + DIRECTION.astype(dtype))
        side = side / np.linalg.norm(side, axis=1)[:, None]
        y = (-np.cos(angle) * points + np.sin(angle) * side).astype(dtype)
        v, slopes = ways(points, y)
        np.testing.assert_allclose(np.linalg.norm(v, axis=1), np.pi - angle, atol=4 * rounding)
        np.testing.assert_allclose(jax.vmap(SPHERE.exp)(points, v), y, atol=4 * rounding)
        np.testing.assert_allclose(
            np.sum(points * v, axis=1), 0.0, atol=rounding if angle == 0 else np.pi * rounding / angle
        )
        assert np.isfinite(slopes).all()


@pytest.mark.parametrize("name", LAWS)
def test_heat_kernels_are_densities_of_brownian_motion(name):
    """They integrate to 1 and obey the heat equation; geodesics stay on the manifold and have their length."""
    points, share = nodes(name)
    law = LAWS[name]
    x = jnp.asarray(points)
    for t in (0.05, 0.7, 8.0):
        density = np.exp(np.asarray(jax.vmap(lambda x, t=t: law.log_density(x, t))(x)))
        np.testing.assert_allclose(density @ share, 1.0, rtol=1e-9)
    a, b = (np.exp(np.asarray(jax.vmap(lambda x, t=t: law.log_density(x, t))(x))) for t in (0.3 - 1e-4, 0.3 + 1e-4))
    rate = (b - a) / 2e-4
    smooth = np.cos(points[:, 0]) if name == "circle" else points @ DIRECTION
    eigenvalue = 0.5 if name == "circle" else 1.0  # of - Laplacian / 2 at the first harmonics
    middle = np.exp(np.asarray(jax.vmap(lambda x: law.log_density(x, 0.3))(x)))
    np.testing.assert_allclose((rate * smooth) @ share, -eigenvalue * (middle * smooth) @ share, rtol=1e-6)
    manifold, start = law.manifold, jnp.asarray(points[7])
    v = manifold.tangent(start, jnp.asarray([0.3, -0.2, 0.4])[: points.shape[1]])
    end = manifold.exp(start, v)
    if name == "sphere":
        np.testing.assert_allclose([end @ end, jnp.arccos(end @ start)], [1.0, jnp.linalg.norm(v)], rtol=1e-9)
    score = law.score(start, 0.3)
    slope = (law.log_density(manifold.exp(start, 1e-5 * v), 0.3) - law.log_density(start, 0.3)) / 1e-5
    np.testing.assert_allclose(score @ v, slope, atol=1e-3)
    assert abs(manifold.tangent(start, score) - score).max() < 1e-12


def exact(name):
    """Z and the posterior means of two functions of x_0, by quadrature; and those of the prior."""
    points, share = nodes(name)
    x = jnp.asarray(points)
    p = np.exp(np.asarray(jax.vmap(lambda x: LAWS[name].log_density(x))(x))) * share
    h = np.exp(CONCENTRATION * np.asarray(jax.vmap(seen)(x)))
    tests = features(points)
    return (p * h).sum(), (p * h) @ tests / (p * h).sum(), p @ tests


def features(points):
    """First and second harmonics of a point."""
    if points.shape[-1] == 1:
        return np.concatenate([np.cos(points), np.sin(points), np.cos(2 * points)], -1)
    return np.concatenate([points, points[..., :1] * points[..., 1:2]], -1)


@pytest.fixture(scope="module", params=list(LAWS))
def runs(request):
    """The plain walk, and populations of twisted and of untwisted particles."""
    name = request.param
    with jax.enable_x64(True):
        walk = nongaussian.geodesic_walk(LAWS[name].manifold, LAWS[name].score, VARIANCES[name])
        twist, size = Twist(walk), 1 if name == "circle" else 3
        root, length = jnp.eye(size)[0] * 1.0, len(VARIANCES[name])
        keys = jax.random.split(jax.random.key(1), 400)

        def run(key, step, particles, weighed):
            return smc.steer_chain(key, step, root, length, twist, particles=particles, weighed=weighed)

        steps = {"plain": (walk, False), "twisted": (walk.twisted(twist), True)}
        found = {
            kind: jax.jit(jax.vmap(lambda key, step=step, weighed=weighed: run(key, step, 16, weighed)))(keys)
            for kind, (step, weighed) in steps.items()
        }
        free = lambda key: smc.steer_chain(key, walk, root, length, lambda x, depth: 0.0, particles=1).x[0]
        x = jax.jit(jax.vmap(free))(jax.random.split(jax.random.key(2), 20_000))
        return name, np.asarray(x), jax.tree.map(np.asarray, found)


def test_the_walk_draws_the_data(runs):
    """Harmonics of the data within 4 standard errors and the error of the steps."""
    name, x, _ = runs
    got = features(x)
    assert (np.abs(got.mean(0) - exact(name)[2]) < 4 * got.std(0) / len(x) ** 0.5 + 0.015).all()


@pytest.mark.paper("Practical and Asymptotically Exact Conditional Sampling in Diffusion Models")
def test_twisted_walks_have_the_posterior(runs):
    """Riemannian TDS: unbiased Z of the walk, the posterior by quadrature, and more effective than without a twist."""
    name, x, found = runs
    z, mean, prior = exact(name)
    h = np.exp(CONCENTRATION * np.asarray(jax.vmap(seen)(jnp.asarray(x))))
    spread = {}
    for kind, populations in found.items():
        assert (populations.failed_at == -1).all()
        each = np.exp(populations.log_z.astype(np.float64))
        assert abs(each.mean() - h.mean()) < 4 * np.hypot(each.std() / 20, h.std() / len(x) ** 0.5)
        w = np.exp(populations.log_weights - populations.log_weights.max(1, keepdims=True))
        w /= w.sum(1, keepdims=True)
        got = each[:, None] * np.einsum("pn,pnd->pd", w, features(populations.x)) / each.mean()
        assert (np.abs(got.mean(0) - mean) < 4 * got.std(0) / 20 + 0.03).all(), (kind, got.mean(0), mean)
        spread[kind] = each.std() / each.mean()
    error = np.hypot(*spread.values()) / np.sqrt(2 * 400)  # of a standard deviation from as many
    assert spread["twisted"] < spread["plain"] - 4 * error, spread
    assert np.abs(mean - prior).max() > 0.2 and abs(h.mean() / z - 1) < 0.05


@pytest.mark.parametrize("name", LAWS)
def test_a_twisted_step_against_densities_of_tangent_vectors(name):
    """The vector that led to the new point, its two normal laws and their ratio, in a basis of the tangent plane."""
    law = LAWS[name]
    walk = nongaussian.geodesic_walk(law.manifold, law.score, VARIANCES[name])
    lead = lambda x, depth: 2.0 * seen(x) + 0.1 * depth
    x, depth = jnp.asarray(nodes(name)[0][1234 % 400 if name == "circle" else 1234]), 24
    t, s = VARIANCES[name][depth - 1 : depth + 1]
    step = jax.jit(jax.vmap(walk.twisted(lead, 0.7), (0, None, None)))
    new, ratio = (np.asarray(leaf) for leaf in step(jax.random.split(jax.random.key(3), 4000), x, depth))
    base = np.asarray(x)
    if name == "circle":
        basis, v = np.ones((1, 1)), np.mod(new - base + np.pi, 2 * np.pi) - np.pi
    else:  # the logarithm map
        basis, angle = np.linalg.svd(base[None])[2][1:], np.arccos(new @ base)
        v = (new - np.outer(new @ base, base)) * (angle / np.sin(angle))[:, None] @ basis.T
    slope = lambda f: np.array([(f(x + 1e-5 * e) - f(x - 1e-5 * e)) / 2e-5 for e in jnp.asarray(basis)])
    mean = (t - s) * slope(lambda x: law.log_density(x, t))
    other = mean + 0.7 * (t - s) * slope(lambda x: lead(x, depth))
    variance = s * (t - s) / t
    expected = (np.sum((v - other) ** 2, 1) - np.sum((v - mean) ** 2, 1)) / (2 * variance)
    np.testing.assert_allclose(ratio, expected, atol=1e-6)
    # they are draws of the second law
    assert (np.abs(v.mean(0) - other) < 4 * np.sqrt(variance / len(v))).all()
    assert (np.abs(v.var(0) / variance - 1) < 4 * np.sqrt(2 / len(v))).all()
    assert abs(np.mean(np.exp(ratio)) - 1) < 4 * np.exp(ratio).std() / np.sqrt(len(v))


def test_a_torus_is_a_product():
    """Densities and scores of two angles are those of each, and a step moves both."""
    two = nongaussian.torus(2)
    x, centre = jnp.array([0.4, -2.9]), jnp.array([-1.0, 3.0])
    parts = [CIRCLE.log_heat(x[i : i + 1], centre[i : i + 1], 0.4) for i in range(2)]
    np.testing.assert_allclose(two.log_heat(x, centre, 0.4), sum(parts), rtol=1e-12)
    np.testing.assert_allclose(two.exp(x, jnp.array([0.1, -0.5])), [0.5, 2 * np.pi - 3.4], rtol=1e-12)


def test_bad_input():
    for match, call in {
        "dimensions": lambda: nongaussian.torus(0),
        "order": lambda: nongaussian.sphere(0),
        "centres": lambda: nongaussian.heat_mixture(CIRCLE, np.zeros(3), 0.1),
        "points of torus": lambda: nongaussian.heat_mixture(nongaussian.torus(2), ANGLES, 0.1),
        "points of sphere": lambda: nongaussian.heat_mixture(SPHERE, 1.1 * _points, 0.1),
        "variances": lambda: nongaussian.heat_mixture(CIRCLE, ANGLES, 0.0),
        "weights": lambda: nongaussian.heat_mixture(CIRCLE, ANGLES, 0.1, np.ones(2)),
        "fall to 0": lambda: nongaussian.geodesic_walk(CIRCLE, LAWS["circle"].score, np.array([1.0, 2.0, 0.0])),
        "to 0, at": lambda: nongaussian.geodesic_walk(CIRCLE, LAWS["circle"].score, np.array([1.0, 0.5])),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
