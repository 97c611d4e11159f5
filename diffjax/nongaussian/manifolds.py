"""Diffusion on manifolds: Brownian motion on tori, the sphere and (`rotations`) SO(3), reversed by geodesic steps.

Data noised to variance t have the density of a heat kernel averaged over them.  The reversal from variance t to s is
a random walk, one tangent vector a step,

    x_s = exp_x(v),    v ~ N((t - s) grad log p_t(x), s (t - s) / t I)  in the tangent space at x,

and the clean estimate is the end of the geodesic, ``exp_x(t grad log p_t(x))``.  A walk is a chain of the kind that
`diffjax.smc.steer_chain` takes, and so is a twisted one, whose tangent vectors are drawn around another mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, as_value, is_traced, static, value


def torus(dimensions: int = 1) -> Torus:
    """Angles (D,) in [-pi, pi): a circle, or a product of circles; heat kernels are wrapped normal laws.

    Raises ValueError for dimensions below 1.
    """
    if not isinstance(dimensions, int) or dimensions < 1:
        raise ValueError(f"dimensions must be an integer of at least 1, got {dimensions!r}.")
    return Torus(dimensions)


@value
class Torus:
    dimensions: int = static()
    factory = "torus"

    def uniform(self, key: Array, dtype: Any = jnp.float32) -> Array:
        """A uniform point."""
        return jax.random.uniform(key, (self.dimensions,), dtype, -math.pi, math.pi)

    def holds(self, points: np.ndarray) -> bool:
        """Whether all (K, D) are points."""
        return points.shape[1:] == (self.dimensions,)

    def tangent(self, x: Array, v: Array) -> Array:
        """The part of a vector that is tangent at x."""
        del x
        return v

    def noise(self, key: Array, x: Array) -> Array:
        """A standard normal tangent vector at x."""
        return jax.random.normal(key, x.shape, x.dtype)

    def exp(self, x: Array, v: Array) -> Array:
        """The end of the geodesic of velocity v."""
        return jnp.mod(x + v + math.pi, 2 * math.pi) - math.pi

    def log(self, x: Array, y: Array) -> Array:
        """The v of the shortest ``exp(x, v) = y``."""
        return jnp.mod(y - x + math.pi, 2 * math.pi) - math.pi

    def log_heat(self, x: Array, centre: Array, variance: Array) -> Array:
        """log H: of Brownian motion from the centre; variance up to about 25, where it is flat to 1e-5."""
        turns = 2 * math.pi * jnp.arange(-8, 9)
        gaps = jnp.mod(x - centre + math.pi, 2 * math.pi) - math.pi + turns[:, None]
        logs = -0.5 * (gaps**2 / variance + jnp.log(2 * math.pi * variance))
        return jnp.sum(jax.nn.logsumexp(logs, axis=0))


def sphere(order: int = 40) -> Sphere:
    """Unit vectors (3,); heat kernels are series of ``order`` Legendre polynomials.

    ``H = sum_l (2 l + 1) / (4 pi) exp(-l (l + 1) variance / 2) P_l(<x, centre>)``: accurate to 1e-6 of its
    largest value where ``variance order^2 > 28``; farther out than that, as in float32, log H and its gradient are
    those of rounding.

    Raises ValueError for an order below 1.
    """
    if not isinstance(order, int) or order < 1:
        raise ValueError(f"order must be an integer of at least 1, got {order!r}.")
    return Sphere(order)


@value
class Sphere:
    order: int = static()
    factory = "sphere"

    def uniform(self, key: Array, dtype: Any = jnp.float32) -> Array:
        """A uniform point."""
        z = jax.random.normal(key, (3,), dtype)
        return z / jnp.linalg.norm(z)

    def holds(self, points: np.ndarray) -> bool:
        """Whether all (K, D) are points, to the rounding of float32."""
        return points.shape[1:] == (3,) and np.allclose(np.sum(points**2, axis=1), 1.0, rtol=0, atol=1e-5)

    def tangent(self, x: Array, v: Array) -> Array:
        """The part of a vector that is tangent at x."""
        return v - (x @ v) * x

    def noise(self, key: Array, x: Array) -> Array:
        """A standard normal tangent vector at x."""
        return self.tangent(x, jax.random.normal(key, x.shape, x.dtype))

    def exp(self, x: Array, v: Array) -> Array:
        """The end of the great circle of velocity v."""
        square = v @ v
        size = jnp.sqrt(jnp.where(square > 0, square, 1.0))
        rate = jnp.where(square > 0, jnp.sin(size) / size, 1.0)
        y = jnp.where(square > 0, jnp.cos(size), 1.0) * x + rate * v
        return y / jnp.linalg.norm(y)

    def log(self, x: Array, y: Array) -> Array:
        """The v of the shortest ``exp(x, v) = y``; its length is the angle.  To -x all are as short: one of them."""
        v = self.tangent(x, y)
        square = v @ v
        size = jnp.sqrt(jnp.where(square > 0, square, 1.0))
        near = jnp.where(square > 0, jnp.arctan2(size, x @ y) / size, 1.0) * v
        axis = self.tangent(x, jnp.zeros_like(x).at[jnp.argmin(jnp.abs(x))].set(1.0))  # not along x, at least .8 long
        opposite = (x @ y < 0) & (square <= (4 * jnp.finfo(v.dtype).eps) ** 2)  # where v is rounding
        return jnp.where(opposite, math.pi * axis / jnp.linalg.norm(axis), near)

    def log_heat(self, x: Array, centre: Array, variance: Array) -> Array:
        """log H: of Brownian motion from the centre."""
        c = jnp.clip(x @ centre, -1.0, 1.0)

        def term(carry: tuple, degree: Array) -> tuple[tuple, None]:
            before, now, total = carry
            total = total + (2 * degree + 1) * jnp.exp(-0.5 * degree * (degree + 1) * variance) * now
            return (now, ((2 * degree + 1) * c * now - degree * before) / (degree + 1), total), None

        degrees = jnp.arange(1, self.order + 1, dtype=c.dtype)
        (_, _, total), _ = jax.lax.scan(term, (jnp.ones_like(c), c, jnp.ones_like(c)), degrees)
        floor = jnp.finfo(total.dtype).tiny
        return jnp.log(jnp.maximum(total, floor) / (4 * math.pi))


def heat_mixture(manifold: Any, centres: Array, variances: Array, weights: Array | None = None) -> HeatMixture:
    """Data that are a mixture of heat kernels: noised to any variance they are one again, so that all is exact.

    Args:
        manifold: `torus`, `sphere` or `rotations`.
        centres: K points along a leading axis; variances: above 0, a number or (K,); weights: (K,), default even.

    Raises ValueError for arguments that do not fit.
    """
    centres = np.asarray(centres)
    if centres.ndim < 2:
        raise ValueError(f"centres must be points along a leading axis, got shape {centres.shape}.")
    if not manifold.holds(centres):
        raise ValueError(f"centres must be points of {manifold!r}, got {centres!r}.")
    if not is_traced(variances) and not np.all(np.asarray(variances) > 0):
        raise ValueError(f"variances must be above 0, got {variances!r}.")
    weights = np.full(len(centres), 1 / len(centres)) if weights is None else np.asarray(weights)
    if weights.shape != (len(centres),) or np.any(weights < 0) or not weights.sum() > 0:
        raise ValueError(f"weights must be {len(centres)} numbers, not negative, got {weights!r}.")
    return HeatMixture(manifold, centres, jnp.broadcast_to(variances, len(centres)), weights / weights.sum())


@value
class HeatMixture:
    manifold: Any
    centres: Array
    variances: Array
    weights: Array
    factory = "heat_mixture"

    def log_density(self, x: Array, variance: Array = 0.0) -> Array:
        """Of data noised to a variance, with respect to length, area or volume."""
        cast = lambda leaf: jnp.asarray(leaf, x.dtype)
        one = lambda centre, own: self.manifold.log_heat(x, centre, own + variance)
        logs = jax.vmap(one)(cast(self.centres), cast(self.variances))
        return jax.nn.logsumexp(logs, b=cast(self.weights))

    def score(self, x: Array, variance: Array) -> Array:
        """The tangent gradient of `log_density`."""
        return self.manifold.tangent(x, jax.grad(self.log_density)(x, variance))


def geodesic_walk(manifold: Any, score: Callable[[Array, Array], Array], variances: Array) -> Walk:
    """The reversal of Brownian motion, from a uniform point: ``step(key, x, depth) -> x`` of ``len(variances)`` steps.

    Args:
        manifold: `torus`, `sphere` or `rotations`.
        score: ``(x, variance) -> tangent vector``, as ``heat_mixture(...).score`` or a network's; of `rotations` (3,).
        variances: falling, the first so large that data noised to it are uniform, the last 0.  Depth 0 is the root,
            any point; depth 1 the uniform draw; depth i + 1 has variance i.

    The first call makes the uniform draw, so that the chain has ``len(variances)`` steps, of which all but one call
    the score.

    Riemannian Score-Based Generative Modelling, arXiv:2202.02763, algorithm 1, with the variance of ancestral sampling.

    Raises ValueError unless variances fall to 0.
    """
    steps = np.asarray(variances, np.float64)
    if steps.ndim != 1 or len(steps) < 2 or np.any(np.diff(steps) >= 0) or steps[-1] != 0:
        raise ValueError(f"variances must fall to 0, at least two of them, got {variances!r}.")
    return Walk(manifold, as_value(score), steps)


@value
class Walk:
    manifold: Any
    score: Any
    variances: Array
    factory = "geodesic_walk"

    def __call__(self, key: Array, x: Array, depth: Array) -> Array:
        mean, std, z = self._parts(key, x, depth)
        return self._moved(key, x, mean + std * z, depth)

    def clean(self, x: Array, depth: Array) -> Array:
        """The clean estimate ``exp_x(t score)`` of the state at a depth; the state itself at the end."""
        t, _ = self._levels(depth)
        ends = self.manifold.exp(x, jnp.where(t > 0, t, 0.0) * self.score(x, jnp.where(t > 0, t, 1.0)))
        return jnp.where(t > 0, ends, x)

    def variance(self, depth: Array) -> Array:
        """That of the state at a depth."""
        return self._levels(depth)[0]

    def twisted(self, value: Callable[[Array, Array], Array], scale: Array = 1.0) -> TwistedWalk:
        """The step whose tangent vectors have the mean ``(t - s) (score + scale grad value(x, depth))``.

        With its log p / q, between the two normal laws of one tangent space, as `diffjax.smc.steer_chain` takes it with
        ``weighed=True``; ``value`` is best the one that it is steered by.

        Practical and Asymptotically Exact Conditional Sampling in Diffusion Models, arXiv:2306.17775, section 3.3
        (Riemannian diffusion).
        """
        return TwistedWalk(self, as_value(value), scale)

    def _levels(self, depth: Array) -> tuple[Array, Array]:
        """The variances before and after the step that is made at a depth."""
        all_ = jnp.asarray(self.variances, jnp.result_type(float))
        last = len(self.variances) - 1
        return all_[jnp.clip(depth - 1, 0, last)], all_[jnp.clip(depth, 0, last)]

    def _parts(self, key: Array, x: Array, depth: Array) -> tuple[Array, Array, Array]:
        t, s = (leaf.astype(x.dtype) for leaf in self._levels(depth))
        safe = jnp.where(t > 0, t, 1.0)
        z = self.manifold.noise(key, x)
        return (t - s) * self.score(x, safe), jnp.sqrt(s * (t - s) / safe), z

    def _moved(self, key: Array, x: Array, v: Array, depth: Array) -> Array:
        return jnp.where(depth == 0, self.manifold.uniform(key, x.dtype), self.manifold.exp(x, v))


@value
class TwistedWalk:
    walk: Any
    value: Any
    scale: Array

    def __call__(self, key: Array, x: Array, depth: Array) -> tuple[Array, Array]:
        mean, std, z = self.walk._parts(key, x, depth)
        t, s = (leaf.astype(x.dtype) for leaf in self.walk._levels(depth))
        slope = self.walk.manifold.tangent(x, jax.grad(self.value)(x, depth))
        quiet = (std == 0) | (depth == 0)  # there the step is the walk's own
        shift = jnp.where(quiet, 0.0, self.scale * (t - s) * slope)
        d = shift / jnp.where(quiet, 1.0, std)
        ratio = jnp.where(quiet, 0.0, -(d @ z) - 0.5 * (d @ d))
        return self.walk._moved(key, x, mean + shift + std * z, depth), ratio
