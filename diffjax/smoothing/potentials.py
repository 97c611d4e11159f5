"""Potentials: positive functions h of the state that stand for what comes later, and the measures that they guide.

A potential is a value: called it is log h(x), ``times`` multiplies two.  A pair of states has a tuple of potentials
(their product), no state at all the empty tuple.  Each kind is closed under the backward map of its kernels:

    Quadratic   log h(x) = c + F . x - x . H x / 2, the information form: H = 0, F = 0 is a flat one
    Table       log h(i) of a state i in 0 .. S - 1
    Increment   the density at what is still missing to a known value of a process with Gamma increments
    Population  prod_j h_j^(n_j) of a population with n_j individuals of type j
    Point       the state is known: a point mass
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.levels import Array, Tree, is_traced, value


def quadratic(precision: Array, shift: Array, log_scale: Array = 0.0) -> Quadratic:
    """The potential ``log h(x) = log_scale + shift . x - x . precision x / 2`` of a vector.

    Args:
        precision: symmetric, shape (D, D); it need not be invertible.
        shift: shape (D,).
        log_scale: a number.

    Raises ValueError for shapes that do not fit.

    >>> quadratic(jnp.eye(2), jnp.array([1.0, 0.0]))(jnp.array([2.0, 2.0]))
    Array(-2., dtype=float32)
    """
    precision, shift = floats(precision), floats(shift)
    if shift.ndim != 1 or precision.shape != 2 * shift.shape:
        raise ValueError(f"precision must be (D, D) and shift (D,), got {precision.shape} and {shift.shape}.")
    return Quadratic(precision, shift, jnp.asarray(log_scale, shift.dtype))


def flat(size: int) -> Quadratic:
    """The potential 1 of a vector of ``size`` entries: nothing is known of what comes later."""
    return quadratic(jnp.zeros((size, size)), jnp.zeros(size))


def table(log_values: Array) -> Table:
    """The potential of a state in 0 .. S - 1 with ``log h(i) = log_values[i]``, shape (S,); -inf is impossible."""
    log_values = floats(log_values)
    if log_values.ndim != 1:
        raise ValueError(f"log_values must have shape (S,), got {log_values.shape}.")
    return Table(log_values)


def point(x: Array) -> Point:
    """A state that is known: a vector, an index (an integer) or, of a process with Gamma increments, a number."""
    x = jnp.asarray(x)
    kind = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.result_type(float)
    return Point(x, jnp.zeros((), kind))


@value
class Quadratic:
    precision: Array  # H, (D, D)
    shift: Array  # F, (D,)
    log_scale: Array  # c
    factory = "quadratic"

    def __call__(self, x: Array) -> Array:
        return self.log_scale + x @ self.shift - 0.5 * x @ (self.precision @ x)

    def gradient(self, x: Array) -> Array:
        """``grad log h = F - H x``."""
        return self.shift - self.precision @ x

    def times(self, other: Any) -> Any:
        return other.times(self) if isinstance(other, Point) else jax.tree.map(jnp.add, self, other)


@value
class Table:
    log_values: Array  # (S,)
    factory = "table"

    def __call__(self, x: Array) -> Array:
        return self.log_values[x]

    def times(self, other: Any) -> Any:
        return other.times(self) if isinstance(other, Point) else Table(self.log_values + other.log_values)


@value
class Point:
    x: Array
    log_scale: Array
    factory = "point"

    def __call__(self, x: Array) -> Array:
        """0 or -inf: as a mass at the point, not as a density."""
        return jnp.where(jnp.all(x == self.x), self.log_scale, -jnp.inf)

    def times(self, other: Any) -> Point:
        if isinstance(other, Point):
            raise ValueError("two point masses have no product: observe one of them with noise.")
        return Point(self.x, self.log_scale + other(self.x))


# --- what kernels make of them ----------------------------------------------------------------------------------------


class Message(NamedTuple):
    """What the backward map of a kernel hands to its forward map: h after the kernel, and its pull-back before."""

    target: Any
    source: Any


class Guided(NamedTuple):
    """A guided draw: the state, the log-weight of the way there, and the states on the way."""

    x: Tree
    log_weight: Array
    path: Tree


class Normal(NamedTuple):
    """The measure ``exp(log_mass) N(mean, covariance)``."""

    mean: Array
    covariance: Array
    log_mass: Array


class Masses(NamedTuple):
    """The measure of mass ``exp(log_masses[i])`` at i."""

    log_masses: Array


def product(first: Any, second: Any) -> Any:
    """The product of two potentials of the same state, tuples entry by entry."""
    if isinstance(first, tuple) and isinstance(second, tuple):
        return tuple(product(a, b) for a, b in zip(first, second, strict=True))
    times = getattr(first, "times", None)
    if times is None or not hasattr(second, "times"):
        raise ValueError(f"these potentials have no product in their class: {first!r} and {second!r}.")
    return times(second)


def log_value(potential: Any, x: Tree) -> Array:
    """log h(x), of tuples the sum."""
    if isinstance(potential, tuple):
        return sum((log_value(h, part) for h, part in zip(potential, x, strict=True)), jnp.zeros(()))
    return potential(x)


def is_known(potential: Any) -> bool:
    """Whether there is a point mass in it, which has another type than what it is pulled back to."""
    if isinstance(potential, tuple):
        return any(is_known(part) for part in potential)
    return isinstance(potential, Point)


def less(log_a: Array, log_b: Array) -> Array:
    """``log_a - log_b``, and -inf where a = 0, also over b = 0."""
    none = log_a == -jnp.inf
    return jnp.where(none, -jnp.inf, log_a - jnp.where(none, 0.0, log_b))


def floats(array: Array) -> Array:
    """As a JAX array of floats; ValueError where it is concrete and has a NaN."""
    array = jnp.asarray(array)
    # by its dtype: a Python number under x64 is not to become float32
    array = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    if not is_traced(array) and bool(jnp.any(jnp.isnan(array))):
        raise ValueError(f"parameters must be numbers, got {array!r}.")
    return array
