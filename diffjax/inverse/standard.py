"""Measurements of data as measurements of the standard state of a process with coordinates.

Operators act on data, but denoisers, twists and solvers see ``z`` with ``x_t = m_t + B z_t`` (`diffjax.coordinates`).
At sigma = 0 that is x_0 = m_0 + B z_0, so that y = A x_0 + n is ``y - A m_0 = (A B) z_0 + n``: another measurement of
the same noise, with another operator, and every method is what it was.  `Measurement.under` makes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.inverse.operators import Shapes, shapes, shapes_of
from diffjax.levels import CLEAN, Array, Process, Tree, is_traced, static, value


@value
class Standard:
    """A B for a linear A; its spectrum is A's where B keeps lengths, for then f(B^T A^T A B) = B^T f(A^T A) B."""

    operator: Any
    coordinates: Any
    inside: Shapes = static()
    isometric: bool = static()
    factory = "standard"

    @property
    def input_shape(self) -> Any:
        return self.inside.tree

    @property
    def output_shape(self) -> Any:
        return self.operator.output_shape

    def __call__(self, z: Tree) -> Tree:
        return self.operator(self.coordinates.leave(z))

    def adjoint(self, y: Tree) -> Tree:
        like = self.inside.zeros(jnp.result_type(*jax.tree.leaves(y)))
        (z,) = jax.linear_transpose(self.coordinates.leave, like)(self.operator.adjoint(y))
        return z

    @property
    def spectral(self) -> Callable[[Callable, Tree], Tree]:
        """``f(B^T A^T A B) z``; only isometries have it: `hasattr` tells."""
        if not self.isometric or not hasattr(self.operator, "spectral"):
            raise AttributeError(f"{self!r} has no spectrum: `decomposed` makes one of a small operator.")
        return self._spectral

    def _spectral(self, f: Callable, z: Tree) -> Tree:
        return self.coordinates.enter(self.operator.spectral(f, self.coordinates.leave(z)))

    @property
    def squared(self) -> Array:
        """The squared singular values, where there is a spectrum."""
        return self.operator.squared


@value
class StandardFunction:
    """``A(m_0 + B z)`` for a function A that is not linear, or noise that a shift of y would change."""

    operator: Any
    coordinates: Any
    inside: Shapes = static()
    factory = "standard"

    @property
    def input_shape(self) -> Any:
        return self.inside.tree

    @property
    def output_shape(self) -> Any:
        return self.operator.output_shape

    def __call__(self, z: Tree) -> Tree:
        return self.operator(self.coordinates.leave(z, CLEAN))


def standardised(operator: Any, y: Tree, process: Process, shiftable: bool) -> tuple[Any, Tree]:
    """The operator and y of the standard state; ``shiftable`` if the law of the noise does not depend on A x."""
    coordinates, given = process.coordinates, shapes(operator.input_shape)
    if coordinates is None:
        return operator, y
    inside = _shapes_inside(coordinates, given)
    if not hasattr(operator, "adjoint"):
        return StandardFunction(operator, coordinates, inside), y
    seen = lambda dtype: operator(coordinates.leave(inside.zeros(dtype), CLEAN))
    if is_traced(operator, coordinates):
        offset = seen(jnp.float32)
    else:
        with jax.enable_x64(True), jax.ensure_compile_time_eval():
            offset = jax.tree.map(np.asarray, seen(jnp.float64))
    moved = is_traced(offset) or any(np.any(leaf != 0) for leaf in jax.tree.leaves(offset))
    if moved and not shiftable:
        return StandardFunction(operator, coordinates, inside), y
    if moved:
        y = jax.tree.map(lambda leaf, c: leaf - c if is_traced(leaf, c) else np.asarray(leaf) - c, y, offset)
    return Standard(operator, coordinates, inside, _isometric(coordinates, inside)), y


def _shapes_inside(coordinates: Any, given: Shapes) -> Shapes:
    try:
        return shapes_of(jax.eval_shape(coordinates.enter, given.zeros(jnp.float32)))
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(f"the operator acts on {given.tree}, which {coordinates!r} does not: {error}") from None


def _isometric(coordinates: Any, inside: Shapes) -> bool:
    """Whether B^T B = I: asked of a random vector in float64, where nothing is traced."""
    if is_traced(coordinates):
        return False
    rng = np.random.default_rng(0)
    z = jax.tree.unflatten(inside.structure, [rng.normal(size=size) for size in inside.sizes])
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        z = jax.tree.map(jnp.asarray, z)
        (back,) = jax.linear_transpose(coordinates.leave, z)(coordinates.leave(z))
        errors = jax.tree.map(lambda a, b: np.max(np.abs(np.asarray(a - b)), initial=0.0), back, z)
    return bool(max(jax.tree.leaves(errors)) < 1e-5 * math.sqrt(max(inside.entries, 1)))
