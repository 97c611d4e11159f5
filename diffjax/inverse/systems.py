"""Linear systems on the side of the measurement and on that of the sample, dense or by Krylov iterations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import cg, gmres

from diffjax.inverse.measurement import Measurement
from diffjax.inverse.operators import Diagonal, Mask, resolved
from diffjax.levels import Array, Level, Tree, dot, root, static, value

DENSE = 32  # measurements up to which "auto" makes the matrix


@value
class Solve:
    """How ``K u = r`` is solved, K = S + Q with a variance S of each entry and Q = A C A^T.

    Q is a covariance, but a trained network's only nearly: where Q is negative it would cancel S, and the solution
    explode.  "dense" takes the symmetric part of Q, negative eigenvalues as 0, so that ``|u| <= |r| / min S``; "cg"
    stops before a direction p of which Q says that it is negative, near that bound, and r^T K^-1 r has the part of p
    for Q = 0 there.  Nothing changes for a covariance.  Where S = 0 too, "dense" leaves out what Q does not hold.
    """

    method: str = static()
    iterations: int = static()
    probes: int = static()

    def __call__(self, noise: Tree, through: Callable[[Tree], Tree], right: Tree) -> tuple[Tree, Array, Array]:
        """``(K^-1 r, r^T K^-1 r, log det K)`` for the linear function ``through`` = Q and r = ``right``."""
        flat, unravel = ravel_pytree(right)
        own = ravel_pytree(noise)[0]
        on_vectors = lambda v: ravel_pytree(through(unravel(v)))[0].astype(v.dtype)
        if self.dense(flat.size):
            matrix = jax.vmap(on_vectors)(jnp.eye(flat.size, dtype=flat.dtype))
            found, log_det = dense_solution(matrix, own, flat)
            return unravel(found), flat @ found, log_det
        whole, beyond = lambda v: own * v + on_vectors(v), 0.0
        if self.method == "gmres":
            found, _ = gmres(whole, flat, tol=1e-6, restart=self.iterations, maxiter=1, solve_method="incremental")
        else:
            iterate = lambda apply, right: conjugate_gradients(apply, own, right, self.iterations)
            found, beyond = jax.lax.custom_linear_solve(whole, flat, iterate, symmetric=True, has_aux=True)
        log_det = lanczos_log_determinant(whole, flat, self.iterations, self.probes, jnp.min(own))
        return unravel(found), flat @ found + beyond, log_det

    def dense(self, entries: int) -> bool:
        """Whether the matrix is made for so many measurements."""
        return self.method == "dense" or (self.method == "auto" and entries <= DENSE)


def dense_solution(matrix: Array, noise: Array, right: Array) -> tuple[Array, Array]:
    """``(K^-1 right, log det K)``, K = S + Q with the symmetric part of ``matrix``, negative eigenvalues as 0, for Q.

    Directions in which neither S nor Q has anything are left out of both.  For derivatives the changes are constants.
    """
    symmetric = 0.5 * (matrix + matrix.T)
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(symmetric))
    eps, top = jnp.finfo(values.dtype).eps, jnp.max(values, initial=0.0)
    own = jax.lax.stop_gradient(noise) @ vectors**2
    empty = (resolved(jnp.maximum(values, 0.0)) == 0) & (own <= eps**2 * top)
    fill = jnp.where(top > 0, top, 1.0)
    change = (vectors * jnp.where(empty, fill - values, jnp.maximum(-values, 0.0))) @ vectors.T
    whole = jnp.diag(noise) + symmetric + change
    held = right - vectors @ jnp.where(empty, right @ vectors, 0.0)
    return jnp.linalg.solve(whole, held), jnp.linalg.slogdet(whole)[1] - jnp.sum(empty) * jnp.log(fill)


def conjugate_gradients(
    apply: Callable[[Array], Array], noise: Array, right: Array, iterations: int
) -> tuple[Array, Array]:
    """``K^-1 right`` from 0, K = S + Q, up to the first direction p with ``p^T K p`` below ``p^T S p``.

    Beside it what ``right^T K^-1 right`` would gain from that direction with p^T S p, which is 0 if there was none.
    Ends where the residual is 1e-6 of ``right``.  A thousandth and eight roundings of the largest p^T K p / p^T p are
    left to rounding.
    """
    enough, eps = 1e-12 * (right @ right), jnp.finfo(right.dtype).eps

    def more(carry: tuple) -> Array:
        index, *_, square, going, _ = carry
        return (index < iterations) & going & (square > enough)

    def step(carry: tuple) -> tuple:
        index, found, residual, direction, top, square, _, _ = carry
        image = apply(direction)
        curvature, length2 = direction @ image, direction @ direction
        top = jnp.maximum(top, curvature / jnp.where(length2 > 0, length2, 1.0))
        own = direction @ (noise * direction)
        going = (curvature > 0) & (curvature >= 0.999 * own - 8 * eps * top * length2)
        beyond = jnp.where(going | (own <= 0), 0.0, square**2 / jnp.where(own > 0, own, 1.0))
        length = jnp.where(going, square / jnp.where(going, curvature, 1.0), 0.0)
        found, residual = found + length * direction, residual - length * image
        after = residual @ residual
        direction = residual + after / jnp.where(square > 0, square, 1.0) * direction
        return index + 1, found, residual, direction, top, after, going, beyond

    zero, square = jnp.zeros((), right.dtype), right @ right
    start = jnp.zeros((), jnp.int32), jnp.zeros_like(right), right, right, zero, square, jnp.asarray(True), zero
    _, found, *_, beyond = jax.lax.while_loop(more, step, start)
    return found, beyond


def lanczos_log_determinant(
    apply: Callable[[Array], Array], like: Array, iterations: int, probes: int, least: Array = 0.0
) -> Array:
    """Stochastic Lanczos quadrature: the mean over Rademacher probes z of ``z^T log(K) z``; 0 without probes.

    Exact in expectation over the probes once the Krylov spaces are full; the probes are fixed.  No eigenvalue of K
    counts as less than ``least``.
    """
    if not probes:
        return jnp.zeros((), like.dtype)
    size = like.size
    steps = min(iterations, size)

    def one(key: Array) -> Array:
        z = jax.random.rademacher(key, (size,), like.dtype)
        first = z / jnp.sqrt(jnp.asarray(size, like.dtype))

        def step(carry: tuple, index: Array) -> tuple:
            basis, q, before, beta = carry
            basis = basis.at[index].set(q)
            w = apply(q) - beta * before
            alpha = w @ q
            w = w - alpha * q
            w = w - basis.T @ (basis @ w)  # against the loss of orthogonality
            norm = jnp.sqrt(w @ w)
            small = norm <= 1e-6 * jnp.abs(alpha)  # the space is full: equal where nothing is left at all
            later = jnp.where(small, 0.0, w / jnp.where(small, 1.0, norm))
            return (basis, later, q, jnp.where(small, 0.0, norm)), (alpha, jnp.where(small, 0.0, norm))

        start = jnp.zeros((steps, size), like.dtype), first, jnp.zeros_like(first), jnp.zeros((), like.dtype)
        _, (alphas, betas) = jax.lax.scan(step, start, jnp.arange(steps))
        tridiagonal = jnp.diag(alphas) + jnp.diag(betas[:-1], 1) + jnp.diag(betas[:-1], -1)
        nodes, vectors = jnp.linalg.eigh(tridiagonal)
        empty = vectors[0] ** 2 <= 1e-12
        nodes = jnp.maximum(nodes, least)
        logs = jnp.log(jnp.where(empty | (nodes <= 0), 1.0, nodes))
        return size * jnp.sum(jnp.where(empty, 0.0, vectors[0] ** 2 * logs))

    keys = jax.random.split(jax.random.key(0), probes)
    return jnp.mean(jax.vmap(one)(keys))


def proximal(measurement: Measurement, centre: Tree, variance: Array, iterations: int = 50) -> Tree:
    """``argmin_x |y - A x|^2_S / 2 + |x - centre|^2 / (2 variance)``: the mean of N(centre, variance) given y.

    ``centre + variance A^T (S + variance A A^T)^-1 (y - A centre)``, through the operator's spectrum where it has one
    and the noise is isotropic, else by ``iterations`` of conjugate gradients.
    """
    a, residual = measurement.operator, measurement.residual(centre)
    if measurement.isotropic and hasattr(a, "spectral"):
        noise = noise_variance(measurement, centre)
        weight = lambda q: jnp.where(noise + variance * q > 0, variance / safe(noise + variance * q), 0.0)
        change = a.spectral(weight, a.adjoint(residual))
    else:
        noise = measurement.variance(centre)
        apply = lambda v: jax.tree.map(lambda s, u, k: s * u + variance * k, noise, v, a(a.adjoint(v)))
        found, _ = cg(apply, residual, tol=1e-6, maxiter=iterations)
        change = jax.tree.map(lambda leaf: variance * leaf, a.adjoint(found))
    return jax.tree.map(lambda c, d: (c + d).astype(c.dtype), centre, change)


def ends(level: Level) -> tuple[Array, Array]:
    """Whether the level is that of clean data, and whether it is that of pure noise."""
    return jnp.all(jnp.asarray(level.sigma) == 0), jnp.all(jnp.asarray(level.alpha) == 0)


def norm(tree: Tree) -> Array:
    """The Euclidean norm, whose derivative at 0 is 0."""
    return root(dot(tree, tree))


def level_key(key: Array, level: Level) -> Array:
    """One key a level: folded with the bits of its time, so that what draws is a function of the state."""
    bits = jax.lax.bitcast_convert_type(jnp.asarray(level.time, jnp.float32), jnp.uint32)
    return jax.random.fold_in(key, jnp.sum(bits, dtype=jnp.uint32))


def normal_like(key: Array, tree: Tree) -> Tree:
    """Standard normal draws shaped like ``tree``."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(
        [jax.random.normal(k, jnp.shape(leaf), leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    )


def misfit(measurement: Measurement, x0: Tree) -> Array:
    """``|y - A x0|``, weighted by mean variance / variance where the noise differs from entry to entry."""
    variance = measurement.variance(x0)
    mean = sum(jnp.mean(v) for v in jax.tree.leaves(variance)) / len(jax.tree.leaves(variance))
    weight = lambda v: jnp.where(mean > 0, jnp.sqrt(mean / jnp.where(v > 0, v, 1.0)), 1.0)
    return norm(jax.tree.map(lambda r, v: weight(v) * r, measurement.residual(x0), variance))


def needs_linear(name: str, measurement: Any) -> None:
    """Raise ValueError unless the measurement is one, of a linear operator."""
    if not isinstance(measurement, Measurement):
        raise ValueError(f"{name} needs a measurement (see diffjax.inverse.measurement), got {measurement!r}.")
    if not hasattr(measurement.operator, "adjoint"):
        raise ValueError(f"{name} needs a linear operator, got {measurement.operator!r}.")


def needs_spectrum(name: str, measurement: Any) -> None:
    """Raise ValueError unless the operator has a spectrum and the noise one Gaussian standard deviation."""
    needs_linear(name, measurement)
    if not hasattr(measurement.operator, "spectral"):
        raise ValueError(f"{name} needs an operator with a spectrum (decomposed), got {measurement.operator!r}.")
    if not measurement.isotropic:
        raise ValueError(f"{name} needs Gaussian noise of one standard deviation, got {measurement.noise!r}.")


def one_level(name: str, t: Level, operator: Any = None) -> None:
    """Raise ValueError for levels per entry, but where the operator looks at every entry by itself."""
    if np.ndim(t.alpha) > 1 and not isinstance(operator, Diagonal | Mask):
        raise ValueError(f"{name} needs one noise level for the whole state, got {np.shape(t.alpha)[1:]}.")


def noise_variance(measurement: Measurement, like: Tree) -> Array:
    """The one variance of isotropic noise."""
    return jax.tree.leaves(measurement.variance(like))[0].reshape(-1)[0]


def safe(number: Array) -> Array:
    """1 where a number is not above 0, to divide by or take the logarithm of."""
    return jnp.where(number > 0, number, 1.0)
