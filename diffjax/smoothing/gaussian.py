"""Gaussian kernels: linear ones, whose backward map is exact, and any others, which a linear one stands in for.

For ``k(x, .) = N(m, Q)``, Q = L L^T, and ``log h(y) = c + F . y - y . H y / 2``, with r = F - H m and S = I + L^T H L,

    log (k h)(x) = log h(m) + |S^{-1/2} L^T r|^2 / 2 - log det S / 2
    y given h:     m + L z,  z ~ N(S^-1 L^T r, S^-1)

so that Q need not be invertible, nor H.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.levels import Array, as_value, static, value
from diffjax.smoothing.potentials import Guided, Message, Normal, Point, Quadratic, floats


def linear_gaussian(matrix: Array, shift: Array, scale: Array) -> LinearGaussian:
    """The kernel ``x -> matrix x + shift + scale z`` from vectors of D entries to vectors of E.

    Its backward map takes quadratic potentials to quadratic ones, and so does a `point`, which makes it an
    observation; its guided draws have weight 1.  ``push`` takes a `Normal` measure, guided, through it.

    Args:
        matrix: shape (E, D).  With D = 0 it is a prior (`normal_prior`).
        shift: shape (E,).
        scale: shape (E, M), of any rank; (E, 0) is a deterministic kernel.

    Automatic Backward Filtering Forward Guiding for Markov processes and graphical models, arXiv:2010.03509.

    Raises ValueError for shapes that do not fit.

    >>> import diffjax
    >>> walk = linear_gaussian(jnp.eye(1), jnp.zeros(1), jnp.eye(1))
    >>> _, before = walk.backward(diffjax.smoothing.point(jnp.array([1.0])))  # log N(1; 0, 1)
    >>> before(jnp.zeros(1))
    Array(-1.4189..., dtype=float32)
    """
    matrix, shift, scale = floats(matrix), floats(shift), floats(scale)
    if matrix.ndim != 2 or scale.ndim != 2 or shift.shape != matrix.shape[:1] or scale.shape[:1] != shift.shape:
        shapes = f"{matrix.shape}, {shift.shape} and {scale.shape}"
        raise ValueError(f"matrix must be (E, D), shift (E,) and scale (E, M), got {shapes}.")
    return LinearGaussian(matrix, shift, scale)


def normal_prior(mean: Array, scale: Array) -> LinearGaussian:
    """The law N(mean, scale scale^T) as a kernel from vectors of no entries: what is pulled back to them is log Z."""
    mean = floats(mean)
    return linear_gaussian(jnp.zeros((mean.shape[0], 0), mean.dtype), mean, scale)


def gaussian(mean: Callable, scale: Any, surrogate: Any) -> Gaussian:
    """The kernel ``x -> mean(x) + scale(x) z``, with the pull-back of a linear one instead of its own.

    Guided draws are exact draws of this kernel given h after it, and their weight is ``(k h)(x) / (l h)(x)`` with l the
    surrogate: whatever that is, products of weights along a path correct for it.

    Args:
        mean: ``x -> (E,)``; a function or a value.
        scale: an array (E, M), or ``x -> (E, M)``.
        surrogate: a `linear_gaussian` between the same spaces; the nearer, the less the weights vary.

    Automatic Backward Filtering Forward Guiding for Markov processes and graphical models, arXiv:2010.03509.

    Raises ValueError where mean and surrogate disagree in shape.
    """
    if not isinstance(surrogate, LinearGaussian):
        raise ValueError(f"surrogate must be a linear_gaussian kernel, got {surrogate!r}.")
    size, source = surrogate.matrix.shape[-2:]
    x = jax.ShapeDtypeStruct((source,), surrogate.matrix.dtype)
    found = jax.eval_shape(mean, x).shape
    if found != (size,):
        raise ValueError(f"mean must return shape {(size,)} like the surrogate, got {found}.")
    shape = jax.eval_shape(scale, x).shape if callable(scale) else jnp.shape(scale)
    if len(shape) != 2 or shape[0] != size:
        raise ValueError(f"scale must have shape ({size}, M), got {shape}.")
    return Gaussian(as_value(mean), as_value(scale) if callable(scale) else floats(scale), surrogate, shape[1])


# --- the formulas -----------------------------------------------------------------------------------------------------


def conditioned(h: Quadratic | Point, mean: Array, scale: Array) -> tuple[Array, Callable[[Array], Array]]:
    """``(log (k h), z -> the draw of k given h)`` for k = N(mean, scale scale^T)."""
    if isinstance(h, Point):
        return h.log_scale + _log_normal(h.x - mean, scale @ scale.T), lambda z: h.x
    factor = jnp.linalg.cholesky(jnp.eye(scale.shape[1], dtype=scale.dtype) + scale.T @ h.precision @ scale)
    pull = jax.scipy.linalg.solve_triangular(factor, scale.T @ h.gradient(mean), lower=True)
    log_mass = h(mean) + 0.5 * pull @ pull - jnp.sum(jnp.log(jnp.diag(factor)))
    back = lambda z: jax.scipy.linalg.solve_triangular(factor, pull + z, lower=True, trans=1)
    return log_mass, lambda z: mean + scale @ back(z)


def pulled(h: Quadratic | Point, matrix: Array, shift: Array, covariance: Array) -> Quadratic:
    """The pull-back of h by ``N(matrix x + shift, covariance)``."""
    if isinstance(h, Point):
        inverse = jnp.linalg.inv(covariance)
        weighted = matrix.T @ inverse
        return Quadratic(
            _symmetric(weighted @ matrix),
            weighted @ (h.x - shift),
            h.log_scale + _log_normal(h.x - shift, covariance),
        )
    # (I + H Q)^-1 H = H - H (I + Q H)^-1 Q H, without the difference of two large numbers
    spread = jnp.eye(len(shift), dtype=covariance.dtype) + h.precision @ covariance
    pull = h.gradient(shift)
    kept = jnp.linalg.solve(spread, jnp.concatenate([h.precision, pull[:, None]], axis=1))
    log_scale = h(shift) + 0.5 * pull @ (covariance @ kept[:, -1]) - 0.5 * jnp.linalg.slogdet(spread)[1]
    return Quadratic(_symmetric(matrix.T @ kept[:, :-1] @ matrix), matrix.T @ kept[:, -1], log_scale)


def guided_affine(h: Quadratic, matrix: Array, shift: Array, covariance: Array) -> tuple[Array, Array, Array]:
    """The kernel ``N(matrix x + shift, covariance)`` given h after it, in the same form."""
    spread = jnp.eye(len(shift), dtype=covariance.dtype) + covariance @ h.precision
    columns = [matrix, (shift + covariance @ h.shift)[:, None], covariance]
    solved = jnp.linalg.solve(spread, jnp.concatenate(columns, axis=1))
    source = matrix.shape[1]
    return solved[:, :source], solved[:, source], _symmetric(solved[:, source + 1 :])


def _log_normal(offset: Array, covariance: Array) -> Array:
    factor = jnp.linalg.cholesky(covariance)
    white = jax.scipy.linalg.solve_triangular(factor, offset, lower=True)
    return -0.5 * white @ white - jnp.sum(jnp.log(jnp.diag(factor))) - 0.5 * len(offset) * jnp.log(2 * jnp.pi)


def _symmetric(matrix: Array) -> Array:
    return 0.5 * (matrix + matrix.T)


# --- the kernels ------------------------------------------------------------------------------------------------------


class Affine(NamedTuple):
    """``exp(weight(x)) N(y; matrix x + shift, covariance)``: closed under composition, for associative scans."""

    matrix: Array
    shift: Array
    covariance: Array
    weight: Quadratic

    def pull(self, h: Quadratic) -> Quadratic:
        return self.weight.times(pulled(h, self.matrix, self.shift, self.covariance))

    def then(self, other: Affine) -> Affine:
        """First this, then the other."""
        matrix, shift, covariance = guided_affine(other.weight, self.matrix, self.shift, self.covariance)
        return Affine(
            other.matrix @ matrix,
            other.matrix @ shift + other.shift,
            other.matrix @ covariance @ other.matrix.T + other.covariance,
            self.pull(other.weight),
        )


class Moved(NamedTuple):
    """``N(y; matrix x + shift, covariance)``, what a guided linear-Gaussian kernel is: measures go forward by these."""

    matrix: Array
    shift: Array
    covariance: Array

    def then(self, other: Moved) -> Moved:
        """First this, then the other."""
        after = other.push(Normal(self.shift, self.covariance, jnp.zeros(())))
        return Moved(other.matrix @ self.matrix, after.mean, after.covariance)

    def push(self, measure: Normal) -> Normal:
        covariance = self.matrix @ measure.covariance @ self.matrix.T + self.covariance
        return Normal(self.matrix @ measure.mean + self.shift, covariance, measure.log_mass)


@value
class LinearGaussian:
    matrix: Array  # (E, D)
    shift: Array  # (E,)
    scale: Array  # (E, M)
    factory = "linear_gaussian"
    parts = 1

    def noise(self, key: Array, index: Array = 0) -> Array:
        return jax.random.normal(jax.random.fold_in(key, index), self.scale.shape[1:], self.scale.dtype)

    def backward(self, h: Quadratic | Point) -> tuple[Message, Quadratic]:
        source = pulled(h, self.matrix, self.shift, self.scale @ self.scale.T)
        return Message(h, source), source

    def forward(self, message: Message, x: Array, noise: Array) -> Guided:
        mean = self.matrix @ x + self.shift
        if isinstance(message.target, Point):
            y = message.target.x
        else:
            y = conditioned(message.target, mean, self.scale)[1](noise)
        return Guided(y, jnp.zeros((), mean.dtype), y)

    def push(self, message: Message, measure: Normal) -> Normal:
        """The guided measure after the kernel."""
        return self.guided(message).push(measure)

    def guided(self, message: Message) -> Moved:
        covariance = self.scale @ self.scale.T
        if isinstance(message.target, Point):
            return Moved(0.0 * self.matrix, message.target.x.astype(self.shift.dtype), 0.0 * covariance)
        return Moved(*guided_affine(message.target, self.matrix, self.shift, covariance))

    def element(self) -> Affine:
        source = self.matrix.shape[1]
        kind = self.matrix.dtype
        none = Quadratic(jnp.zeros((source, source), kind), jnp.zeros(source, kind), jnp.zeros((), kind))
        return Affine(self.matrix, self.shift, self.scale @ self.scale.T, none)


@value
class Gaussian:
    mean: Any
    scale: Any
    surrogate: LinearGaussian
    draws: int = static()
    factory = "gaussian"
    parts = 1

    def noise(self, key: Array, index: Array = 0) -> Array:
        return jax.random.normal(jax.random.fold_in(key, index), (self.draws,), self.surrogate.shift.dtype)

    def backward(self, h: Quadratic | Point) -> tuple[Message, Quadratic]:
        return self.surrogate.backward(h)

    def forward(self, message: Message, x: Array, noise: Array) -> Guided:
        scale = self.scale(x) if callable(self.scale) else self.scale
        log_mass, draw = conditioned(message.target, self.mean(x), scale)
        y = draw(noise)
        return Guided(y, log_mass - message.source(x), y)
