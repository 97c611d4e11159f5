"""Brownian motion on the rotations of space, SO(3): its heat kernel, in closed form at every variance."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, root, value
from diffjax.quantiles import bisected

IMAGES, DEGREES = (1, 2), 9  # for variances below and above 1: both sums have then ended, to rounding


def rotations() -> Rotations:
    """Rotation matrices (3, 3) with determinant 1; a tangent vector v (3,) at x is the velocity of ``x exp([v])``.

    So geodesics are turns about an axis in the frame of x, the distance of two rotations is the angle between them, and
    with respect to volume, of which there is 8 pi^2, the heat kernel is

        H = sum_l (2 l + 1) exp(-l (l + 1) variance / 2) sin((l + 1/2) angle) / sin(angle / 2) / (8 pi^2),

    the isotropic Gaussian IGSO(3).  Below variance 1 it is summed as Gaussians wrapped around the circle of turns,
    ``(-1)^k (angle - 2 pi k) / sin(angle / 2) exp(-(angle - 2 pi k)^2 / (2 variance))``, the same by Poisson's formula:
    log H and its gradient are right to rounding at every variance and angle.
    """
    return Rotations()


@value
class Rotations:
    factory = "rotations"

    def uniform(self, key: Array, dtype: Any = jnp.float32) -> Array:
        """A uniform rotation."""
        q = jax.random.normal(key, (4,), dtype)
        return _of_quaternion(q / jnp.linalg.norm(q))

    def holds(self, points: np.ndarray) -> bool:
        """Whether all (K, 3, 3) are rotations, to the rounding of float32."""
        if points.shape[1:] != (3, 3):
            return False
        close = np.allclose(points @ np.swapaxes(points, 1, 2), np.eye(3), rtol=0, atol=1e-5)
        return close and bool(np.all(np.linalg.det(points) > 0))

    def tangent(self, x: Array, slope: Array) -> Array:
        """The gradient (3,) at x, from the derivatives (3, 3) in the entries of the matrix."""
        return _axial(x.T @ slope)

    def noise(self, key: Array, x: Array) -> Array:
        """A standard normal tangent vector at x."""
        return jax.random.normal(key, (3,), x.dtype)

    def exp(self, x: Array, v: Array) -> Array:
        """``x exp([v])``: x turned by |v| about v, an axis in its own frame."""
        square = v @ v
        moved = square > 0
        half = 0.5 * jnp.sqrt(jnp.where(moved, square, 1.0))
        vector = jnp.where(moved, jnp.sin(half) / (2 * half), 0.5) * v
        y = x @ _of_quaternion(jnp.concatenate([jnp.where(moved, jnp.cos(half), 1.0)[None], vector]))
        return 0.5 * y @ (3 * jnp.eye(3, dtype=y.dtype) - y.T @ y)  # rounding does not add up

    def log(self, x: Array, y: Array) -> Array:
        """The v of the shortest ``exp(x, v) = y``: |v| is the angle between them, at most pi."""
        q = _quaternion(x.T @ y)
        square = q[1:] @ q[1:]
        moved = square > 0
        size = jnp.sqrt(jnp.where(moved, square, 1.0))
        return jnp.where(moved, 2 * jnp.arctan2(size, q[0]) / size, 2.0) * q[1:]

    def log_heat(self, x: Array, centre: Array, variance: Array) -> Array:
        """log H: of Brownian motion from the centre."""
        turn = centre.T @ x
        cosine, axis = 0.5 * (jnp.trace(turn) - 1), 0.5 * _axial(turn)
        return log_kernel(root(axis @ axis), cosine, variance) - math.log(8 * math.pi**2)

    def noised(self, key: Array, x: Array, variance: Array) -> Array:
        """A draw of the heat kernel around x: about a uniform axis, by an angle of its law."""
        first, second = jax.random.split(key)
        axis = jax.random.normal(first, (3,), x.dtype)
        angle = angle_quantile(jax.random.uniform(second, (), x.dtype), variance)
        return self.exp(x, angle * axis / jnp.linalg.norm(axis))


def log_kernel(sine: Array, cosine: Array, variance: Array) -> Array:
    """log of the heat kernel's density with respect to the uniform law, at an angle in [0, pi]."""
    narrow = variance < 1
    # the branch that is not taken gets a variance at which nothing overflows
    small = _log_wrapped(jnp.arctan2(sine, cosine), jnp.where(narrow, variance, 1.0))
    return jnp.where(narrow, small, jnp.log(_series(cosine, jnp.where(narrow, 1.0, variance))))


def _log_wrapped(angle: Array, t: Array) -> Array:
    rest = jnp.ones_like(angle)
    for k in IMAGES:  # pairs of images, relative to the one at k = 0
        near = jnp.exp(-2 * math.pi * k * (math.pi * k - angle) / t)
        far = jnp.exp(-2 * math.pi * k * (math.pi * k + angle) / t)
        u = 4 * math.pi * k * angle / t
        safe = jnp.where(u > 0, u, 1.0)
        slope = near * (4 * math.pi * k / t) * jnp.where(u > 0, -jnp.expm1(-safe) / safe, 1.0)  # (near - far) / angle
        rest = rest + (-1) ** k * (near + far - 2 * math.pi * k * slope)
    shape = math.log(2) - jnp.log(jnp.sinc(angle / (2 * math.pi)))  # angle / sin(angle / 2)
    scale = t / 8 + 0.5 * math.log(2 * math.pi) - 1.5 * jnp.log(t)
    return scale - 0.5 * angle**2 / t + shape + jnp.log(rest)


def _series(cosine: Array, t: Array) -> Array:
    """``sum_l (2 l + 1) exp(-l (l + 1) t / 2) (1 + 2 sum_{k <= l} T_k(cosine))``, T_k Chebyshev's polynomials."""
    before, now, character = jnp.ones_like(cosine), cosine, jnp.ones_like(cosine)
    total = jnp.ones_like(cosine)
    for degree in range(1, DEGREES):
        character = character + 2 * now
        total = total + (2 * degree + 1) * jnp.exp(-0.5 * degree * (degree + 1) * t) * character
        before, now = now, 2 * cosine * now - before
    return total


NODES, SHARES = np.polynomial.legendre.leggauss(32)


def angle_quantile(u: Array, variance: Array) -> Array:
    """The u-quantile of the angle of a draw, whose density is ``(1 - cos angle) / pi`` times `log_kernel`'s.

    By bisection of an integral of 32 nodes; of angles up to ten standard deviations, within which it is smooth.
    """
    kind = jnp.result_type(u)
    variance = jnp.asarray(variance, kind)
    end = jnp.minimum(math.pi, 10 * jnp.sqrt(variance))
    nodes, shares = jnp.asarray(0.5 * (NODES + 1), kind), jnp.asarray(0.5 * SHARES, kind)

    def below(angle: Array) -> Array:
        at = angle * nodes
        density = 2 * jnp.sin(0.5 * at) ** 2 / math.pi
        return angle * jnp.sum(shares * density * jnp.exp(log_kernel(jnp.sin(at), jnp.cos(at), variance)))

    return bisected(below, u, jnp.zeros_like(end), end, jnp.finfo(kind).nmant)


def _axial(a: Array) -> Array:
    """``<a, [e_k]>`` for the turns [e_k] about the three axes."""
    return jnp.stack([a[2, 1] - a[1, 2], a[0, 2] - a[2, 0], a[1, 0] - a[0, 1]])


def _of_quaternion(q: Array) -> Array:
    """The rotation of a unit quaternion, its real part first."""
    w, x, y, z = q
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return jnp.stack([jnp.stack(row) for row in rows])


def _quaternion(r: Array) -> Array:
    """Of a rotation, with a real part that is not negative: the longest row of 4 q q^T, which never vanishes."""
    v = _axial(r)
    outer = r + r.T - (jnp.trace(r) - 1) * jnp.eye(3, dtype=r.dtype)  # 4 x y off the diagonal, 4 x^2 on it
    top = jnp.concatenate([(1 + jnp.trace(r))[None], v])
    rows = jnp.concatenate([top[None], jnp.concatenate([v[:, None], outer], axis=1)])
    sizes = jnp.diagonal(rows)
    q = rows[jnp.argmax(sizes)]
    q = q / jnp.sqrt(q @ q)
    return jnp.where(q[0] < 0, -q, q)
