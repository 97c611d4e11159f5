"""Linear operators as values, with adjoint and, where it is cheap, the spectrum of A^T A.

An operator has ``input_shape`` and ``output_shape`` (of one sample: a shape, or a tree of shapes), is called as
``operator(x) -> y`` and has ``adjoint(y) -> x``.  Where the singular value decomposition A = U diag(s) V^T is cheap it
has ``spectral(f, x) = V f(s^2) V^T x``, a function of A^T A applied to x, and ``squared``, the squared singular values
(any number of zeros among them).  That is all that methods need of the decomposition, because isotropic noise stays
isotropic in any basis, and on the side of the measurement

    f(A A^T) y = f(0) y + A g(A^T A) A^T y,     g(q) = (f(q) - f(0)) / q.

Which singular values are 0 follows one rule, `resolved`: those whose square is at most four roundings of the largest
square, in the arithmetic of the sample.  A^T A is all that is ever applied, and holds nothing finer: what is divided by
a smaller square is the rounding of the larger ones.  So singular values count from 7e-4 of the largest in float32 and
from 3e-8 in float64, and A A^+ A = A within that.  Noise in y is divided by what counts; `matrix`, `blur` and
`decomposed` take out more with ``cutoff``, of the operator itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from diffjax.levels import Array, Tree, as_value, is_shape, is_traced, static, value


class Shapes(NamedTuple):
    """A tree of shapes in a form that is hashable, so that it can be part of a type."""

    structure: Any
    sizes: tuple[tuple[int, ...], ...]

    @property
    def tree(self) -> Any:
        return jax.tree.unflatten(self.structure, self.sizes)

    @property
    def entries(self) -> int:
        return sum(math.prod(size) for size in self.sizes)

    def zeros(self, dtype: Any) -> Tree:
        return jax.tree.unflatten(self.structure, [jnp.zeros(size, dtype) for size in self.sizes])


def shapes(tree: Any) -> Shapes:
    """The `Shapes` of a tree of shapes; ValueError if it is not one."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_shape)
    if not all(is_shape(leaf) for leaf in leaves):
        raise ValueError(f"a shape is a tuple of integers, or a tree of them, got {tree!r}.")
    return Shapes(structure, tuple(tuple(int(n) for n in leaf) for leaf in leaves))


def shapes_of(tree: Tree) -> Shapes:
    """The `Shapes` of a tree of arrays."""
    leaves, structure = jax.tree.flatten(tree)
    return Shapes(structure, tuple(np.shape(leaf) for leaf in leaves))


# --- which singular values count ----------------------------------------------------------------------------------

ROUNDINGS = 4


def resolved(squared: Array) -> Array:
    """Squared singular values, 0 where they are at most four roundings of the largest, in their own arithmetic."""
    xp: Any = np if isinstance(squared, np.ndarray) else jnp
    least = ROUNDINGS * float(jnp.finfo(squared.dtype).eps) * xp.max(squared, initial=0.0)
    return xp.where(squared > least, squared, xp.zeros_like(squared))


def squared_values(operator: Any, like: Tree) -> Array:
    """``operator.squared`` as ``operator.spectral`` counts it for a sample with the arithmetic of ``like``."""
    return resolved(jnp.asarray(operator.squared, jnp.result_type(*jax.tree.leaves(like))))


def check_cutoff(cutoff: float) -> None:
    """Raise ValueError unless 0 <= cutoff < 1."""
    if not 0 <= cutoff < 1:
        raise ValueError(f"cutoff must be at least 0 and below 1, of the largest singular value, got {cutoff!r}.")


# --- any linear function ------------------------------------------------------------------------------------------


def linear(function: Callable[[Tree], Tree], shape: Any) -> LinearFunction:
    """Any linear function of a sample as an operator; the adjoint is autodiff's transpose.

    ``shape`` is that of one sample, or a tree of shapes.

    Raises ValueError if ``shape`` is not one.

    >>> import jax.numpy as jnp
    >>> linear(lambda x: x[1:] - x[:-1], (3,)).adjoint(jnp.array([1.0, 0.0]))
    Array([-1.,  1.,  0.], dtype=float32)
    """
    inside = shapes(shape)
    outside = jax.eval_shape(function, inside.zeros(jnp.float32))
    return LinearFunction(as_value(function), inside, shapes_of(outside))


@value
class LinearFunction:
    function: Any
    inside: Shapes = static()
    outside: Shapes = static()
    factory = "linear"

    @property
    def input_shape(self) -> Any:
        return self.inside.tree

    @property
    def output_shape(self) -> Any:
        return self.outside.tree

    def __call__(self, x: Tree) -> Tree:
        return self.function(x)

    def adjoint(self, y: Tree) -> Tree:
        like = self.inside.zeros(jnp.result_type(*jax.tree.leaves(y)))
        (x,) = jax.linear_transpose(self.function, like)(y)
        return x


# --- diagonal -----------------------------------------------------------------------------------------------------


def identity(shape: Any) -> Diagonal:
    """``y = x``: denoising.  ``shape`` is that of one sample, or a tree of shapes.

    Raises ValueError if ``shape`` is not one.
    """
    inside = shapes(shape)
    return diagonal(jax.tree.unflatten(inside.structure, [np.ones(size) for size in inside.sizes]))


def diagonal(weights: Tree) -> Diagonal:
    """``y = weights * x``, entry by entry; weights of 0 and 1 are a mask that may be traced.

    ``weights`` has the structure and shape of one sample.  A hidden entry measures 0 and tells nothing; its noise is
    counted in log p(y) as a constant.  `mask` leaves hidden entries out.
    """
    return Diagonal(jax.tree.map(lambda w: w if is_traced(w) else np.asarray(w), weights))


@value
class Diagonal:
    weights: Tree
    factory = "diagonal"

    @property
    def input_shape(self) -> Any:
        return shapes_of(self.weights).tree

    output_shape = input_shape

    def __call__(self, x: Tree) -> Tree:
        return jax.tree.map(lambda w, leaf: jnp.asarray(w, leaf.dtype) * leaf, self.weights, x)

    adjoint = __call__

    def spectral(self, f: Callable, x: Tree) -> Tree:
        leaves, structure = jax.tree.flatten(x)
        weights = jax.tree.leaves(self.weights)
        squares = [jnp.asarray(w, jnp.result_type(leaf, 1.0)) ** 2 for w, leaf in zip(weights, leaves, strict=True)]
        counted = resolved(jnp.concatenate([jnp.ravel(q) for q in squares]))
        parts = jnp.split(counted, np.cumsum([q.size for q in squares])[:-1])
        shaped = [q.reshape(like.shape).astype(like.dtype) for q, like in zip(parts, squares, strict=True)]
        moved = [f(q) * leaf for q, leaf in zip(shaped, leaves, strict=True)]
        return structure.unflatten(moved)

    @property
    def squared(self) -> Array:
        return jnp.concatenate([jnp.ravel(_real(w)) ** 2 for w in jax.tree.leaves(self.weights)])


def _real(w: Array) -> Array:
    """Weights in float32 or finer, since whole numbers and booleans have no rounding to count by."""
    w = jnp.asarray(w)
    return w.astype(jnp.promote_types(w.dtype, jnp.float32))


# --- operators with A A^T = c I -----------------------------------------------------------------------------------


def tight_spectral(self: Any, f: Callable, x: Tree) -> Tree:
    """``f(A^T A) x = f(0) (x - P x) + f(c) P x`` with the projection P = A^T A / c."""
    c = self.tight
    inside = jax.tree.map(lambda leaf: leaf / c, self.adjoint(self(x)))
    zero, one = f(jnp.zeros(())), f(jnp.asarray(c))
    return jax.tree.map(lambda leaf, p: (zero * (leaf - p) + one * p).astype(leaf.dtype), x, inside)


def tight_squared(self: Any) -> Array:
    """The one squared singular value, as often as there are measurements."""
    return jnp.full(shapes(self.output_shape).entries, self.tight)


def mask(keep: Tree) -> Mask:
    """The kept entries, as a vector (one for every leaf): inpainting, subsampling.

    ``keep`` is a concrete tree of booleans with the shape of one sample.

    Raises ValueError if it is traced, not boolean, or keeps nothing.

    >>> import numpy as np, jax.numpy as jnp
    >>> mask(np.array([True, False, True]))(jnp.array([1.0, 2.0, 3.0]))
    Array([1., 3.], dtype=float32)
    """
    if is_traced(keep):
        raise ValueError("keep must be concrete, since it decides a shape; use diagonal for a traced mask.")
    leaves = jax.tree.leaves(keep)
    if not leaves or any(np.asarray(leaf).dtype != bool for leaf in leaves):
        raise ValueError(f"keep must be boolean, got {keep!r}.")
    if not any(np.any(leaf) for leaf in leaves):
        raise ValueError("keep must keep at least one entry.")
    indices = jax.tree.map(lambda leaf: np.flatnonzero(leaf).astype(np.int32), keep)
    return Mask(indices, shapes_of(keep))


@value
class Mask:
    indices: Tree
    inside: Shapes = static()
    factory = "mask"
    tight = 1.0

    @property
    def input_shape(self) -> Any:
        return self.inside.tree

    @property
    def output_shape(self) -> Any:
        return shapes_of(self.indices).tree

    def __call__(self, x: Tree) -> Tree:
        return jax.tree.map(lambda i, leaf: jnp.ravel(leaf)[i], self.indices, x)

    def adjoint(self, y: Tree) -> Tree:
        zeros = self.inside.zeros(jnp.result_type(*jax.tree.leaves(y)))
        return jax.tree.map(lambda i, z, leaf: jnp.ravel(z).at[i].set(leaf).reshape(z.shape), self.indices, zeros, y)

    spectral = tight_spectral
    squared = property(tight_squared)


# --- matrices -----------------------------------------------------------------------------------------------------


def matrix(entries: Array, shape: tuple[int, ...] | None = None, cutoff: float = 0.0) -> Matrix:
    """``y = A x`` with a dense matrix (M, D); ``shape`` of one sample, with D entries, by default (D,).

    The decomposition is made here, in float64 where the matrix is concrete.  Singular values up to ``cutoff`` of the
    largest are taken out of A.

    Raises ValueError unless it has two axes and fits the shape, and for a cutoff outside [0, 1).

    >>> import numpy as np, jax.numpy as jnp
    >>> matrix(np.diag([1.0, 0.01]), cutoff=0.03)(jnp.ones(2))
    Array([1., 0.], dtype=float32)
    """
    check_cutoff(cutoff)
    if np.ndim(entries) != 2:
        raise ValueError(f"entries must be a matrix (M, D), got shape {np.shape(entries)}.")
    shape = (np.shape(entries)[1],) if shape is None else tuple(shape)
    if math.prod(shape) != np.shape(entries)[1]:
        raise ValueError(f"a matrix of shape {np.shape(entries)} does not act on samples of shape {shape}.")
    xp = jnp if is_traced(entries) else np
    entries = entries if is_traced(entries) else np.asarray(entries, np.float64)
    u, s, vt = xp.linalg.svd(entries, full_matrices=False)
    if cutoff > 0:
        s = xp.where(s > cutoff * xp.max(s, initial=0.0), s, 0.0)
        entries = (u * s) @ vt
    return Matrix(entries, resolved(s**2), vt, shape)


@value
class Matrix:
    entries: Array  # (M, D)
    squared: Array  # (r,)
    vt: Array  # (r, D)
    input_shape: tuple = static()
    factory = "matrix"

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (np.shape(self.entries)[0],)

    def __call__(self, x: Array) -> Array:
        return jnp.asarray(self.entries, x.dtype) @ x.reshape(-1)

    def adjoint(self, y: Array) -> Array:
        return (jnp.asarray(self.entries, y.dtype).T @ y).reshape(self.input_shape)

    def spectral(self, f: Callable, x: Array) -> Array:
        vt = jnp.asarray(self.vt, x.dtype)
        zero = f(jnp.zeros((), x.dtype))
        weights = f(squared_values(self, x)) - zero
        return zero * x + (vt.T @ (weights * (vt @ x.reshape(-1)))).reshape(x.shape)


def compressed_sensing(key: Array, measurements: int, shape: tuple[int, ...]) -> Matrix:
    """Random projections: a matrix of independent N(0, 1 / M) entries, M ``measurements`` of a sample of ``shape``.

    Raises ValueError unless measurements is at least 1.
    """
    if measurements < 1:
        raise ValueError(f"measurements must be at least 1, got {measurements!r}.")
    entries = jax.random.normal(key, (measurements, math.prod(shape))) / math.sqrt(measurements)
    return matrix(entries if is_traced(entries) else np.asarray(entries), shape)


def as_matrix(operator: Any, dtype: Any = None) -> Array:
    """The matrix (M, D) of a linear operator, M entries of y by D entries of x, by applying it to a basis.

    In float64 where nothing is traced, whatever the precision of the session.
    """
    if isinstance(operator, Matrix):
        return operator.entries
    inside, outside = shapes(operator.input_shape), shapes(operator.output_shape)

    def column(flat: Array, apply: Callable, given: Shapes) -> Array:
        ends = np.cumsum([0, *(math.prod(size) for size in given.sizes)])
        parts = [flat[a:b].reshape(size) for a, b, size in zip(ends, ends[1:], given.sizes, strict=False)]
        out = apply(jax.tree.unflatten(given.structure, parts))
        return ravel_pytree(out)[0]

    def build(dtype: Any) -> Array:
        if outside.entries < inside.entries:  # rows by the adjoint
            return jax.vmap(lambda e: column(e, operator.adjoint, outside))(jnp.eye(outside.entries, dtype=dtype))
        return jax.vmap(lambda e: column(e, operator, inside))(jnp.eye(inside.entries, dtype=dtype)).T

    if is_traced(operator):
        return build(dtype or jnp.float32)
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        return np.asarray(build(dtype or jnp.float64))


def decomposed(operator: Any, cutoff: float = 0.0) -> Matrix:
    """A linear operator on one array as a dense `matrix`, which has a spectrum; for small ones, such as a Radon's.

    The measurement becomes a vector.  ``cutoff`` as in `matrix`.

    Raises ValueError for an operator on a tree, and a cutoff outside [0, 1).
    """
    if not is_shape(operator.input_shape):
        raise ValueError(f"decomposed needs an operator on one array, got {operator!r}.")
    return matrix(as_matrix(operator), operator.input_shape, cutoff)


# --- functions of A A^T -------------------------------------------------------------------------------------------


def cospectral(operator: Any, f: Callable, y: Tree) -> Tree:
    """``f(A A^T) y`` for an operator with a spectrum."""

    def g(q: Array) -> Array:
        positive = q > 0
        return jnp.where(positive, (f(q) - f(jnp.zeros_like(q))) / jnp.where(positive, q, 1.0), 0.0)

    image = operator(operator.spectral(g, operator.adjoint(y)))
    zero = f(jnp.zeros(()))
    return jax.tree.map(lambda leaf, other: (zero * leaf + other).astype(leaf.dtype), y, image)


def log_determinant(operator: Any, f: Callable, like: Tree) -> Array:
    """``log det f(A A^T)`` for an operator with a spectrum; factors that are 0 are left out.

    Singular values count as they do in ``spectral`` for a sample with the arithmetic of ``like``.
    """
    squared = squared_values(operator, like)
    missing = shapes(operator.output_shape).entries - squared.size
    logs = lambda q: jnp.where(f(q) > 0, jnp.log(jnp.where(f(q) > 0, f(q), 1.0)), 0.0)
    return jnp.sum(logs(squared)) + missing * logs(jnp.zeros((), squared.dtype))


def pseudo_inverse(operator: Any, y: Tree) -> Tree:
    """``A^+ y`` for an operator with a spectrum; singular values of 0 stay 0, and so do those that do not count.

    ``(A^T A)^+ A^T y``: a direction with the share s of the largest singular value has a relative error of 1 / s^2
    roundings.  The noise of y is divided by s; an operator with a ``cutoff`` bounds that.
    """
    positive = lambda q: jnp.where(q > 0, 1 / jnp.where(q > 0, q, 1.0), 0.0)
    return operator.spectral(positive, operator.adjoint(y))
