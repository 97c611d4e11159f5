"""Volumes from a prior of their slices: DiffusionMBIR.

A volume is an array (Z, H, W, ...).  `slices` makes a denoiser of it from one of its slices, which knows nothing of how
neighbours belong together; what does is total variation along z, and the measurement, in ADMM after every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.corrections.transform import check_within, condition_within, evaluations_within, spent
from diffjax.inverse.measurement import Measurement
from diffjax.inverse.systems import needs_linear
from diffjax.levels import (
    Array,
    Grid,
    Info,
    Level,
    Row,
    Solver,
    Tree,
    as_value,
    dot,
    is_shape,
    remembers,
    static,
    value,
)
from diffjax.solvers.arguments import choice, integer, number

MOST = 1_000_000


# --- slices -----------------------------------------------------------------------------------------------------------


def slices(plane: Any) -> Slices | RememberingSlices:
    """The denoiser of a volume, slice by slice along the leading axis: ``plane`` under `jax.vmap`.

    Exact for slices that are independent.  One evaluation is one of a batch of slices; a plane that remembers has a
    memory for every slice.

    Raises ValueError, where a sampler checks it, for levels that differ within the volume.
    """
    return RememberingSlices(plane) if remembers(plane) else Slices(as_value(plane))


def _one_level(self: Any, t: Level) -> None:
    if np.ndim(t.alpha) > 1:
        raise ValueError(f"slices need one noise level for the whole volume, got {np.shape(t.alpha)[1:]}.")
    check_within(self, t)


@value
class Slices:
    denoise: Any
    factory = "slices"

    def __call__(self, x: Tree, level: Level) -> Tree:
        return jax.vmap(lambda x: self.denoise(x, level))(x)

    condition = property(condition_within)
    check = _one_level
    evaluations = evaluations_within


@value
class RememberingSlices:
    denoise: Any
    factory = "slices"

    def init(self, x: Tree) -> Tree:
        return jax.vmap(self.denoise.init)(x)

    def apply(self, x: Tree, level: Level, memory: Tree) -> tuple[Tree, Tree]:
        return jax.vmap(lambda x, memory: self.denoise.apply(x, level, memory))(x, memory)

    condition = property(condition_within)
    check = _one_level
    evaluations = evaluations_within

    def spent(self, level: Level, memory: Tree) -> Array:
        return jnp.max(jax.vmap(lambda memory: jnp.asarray(spent(self.denoise, level, memory)))(memory))


def slicewise(operator: Any, count: int) -> Slicewise:
    """A linear operator on each of ``count`` slices: a stack of projections, an undersampled stack.

    It has a spectrum where the operator has one.

    Raises ValueError for an operator without an adjoint, and a count below 1.
    """
    if not hasattr(operator, "adjoint"):
        raise ValueError(f"slicewise needs a linear operator, got {operator!r}.")
    integer("count", count, 1, MOST)
    return Slicewise(operator, count)


@value
class Slicewise:
    operator: Any
    count: int = static()
    factory = "slicewise"

    input_shape = property(lambda self: _stacked(self.operator.input_shape, self.count))
    output_shape = property(lambda self: _stacked(self.operator.output_shape, self.count))

    def __call__(self, x: Tree) -> Tree:
        return jax.vmap(self.operator)(x)

    def adjoint(self, y: Tree) -> Tree:
        return jax.vmap(self.operator.adjoint)(y)

    @property
    def spectral(self) -> Callable[[Callable, Tree], Tree]:
        inner = self.operator.spectral  # only where the operator has one
        return lambda f, x: jax.vmap(lambda x: inner(f, x))(x)

    @property
    def squared(self) -> Array:
        return jnp.tile(jnp.asarray(self.operator.squared), self.count)


def _stacked(shape: Any, count: int) -> Any:
    return jax.tree.map(lambda size: (count, *size), shape, is_leaf=is_shape)


# --- ADMM -------------------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """What ADMM carries: the split variable z = D x and the scaled dual w, differences of a volume."""

    z: Tree
    w: Tree


def differences(x: Tree) -> Tree:
    """D: ``x[k + 1] - x[k]`` along the leading axis of every leaf; none for a number."""
    return jax.tree.map(lambda leaf: leaf[1:] - leaf[:-1] if leaf.ndim else leaf[None][1:], x)


def split(x: Tree) -> Split:
    """z = w = 0 for a volume."""
    zeros = jax.tree.map(jnp.zeros_like, differences(x))
    return Split(zeros, zeros)


def admm_tv(
    x: Tree,
    carried: Split,
    measurement: Measurement,
    strength: Array,
    penalty: Array = 1.0,
    iterations: int = 1,
    inner: int = 1,
) -> tuple[Tree, Split]:
    """Iterations of ADMM towards ``argmin_x |y - A x|^2 / 2 + strength |D x|_1``, D the differences along z.

        x <- CG on (A^T A + rho D^T D) x = A^T y + rho D^T (z - w), ``inner`` iterations from x
        z <- shrink(D x + w, strength / rho)
        w <- w + D x - z

    Any starting point leads there, with enough iterations; few of them move x as far as it takes to agree with y and
    with its neighbours, and leave the rest of it.  The derivative goes through all iterations.

    Args:
        x: (Z, ...), or a tree of such.
        carried: z and w (`split` makes the first ones).
        measurement: of a linear operator; the misfit is not divided by the variance of its noise.
        strength: lambda, at least 0; penalty: rho, above 0, which decides how fast, not where to.

    Returns ``(x, carried)``.
    """
    a, rho = measurement.operator, penalty
    y = measurement.observed(x)
    spread, gather = differences, jax.linear_transpose(differences, x)
    observed = a.adjoint(y)

    def system(v: Tree) -> Tree:
        (rough,) = gather(spread(v))
        return jax.tree.map(lambda p, q: (p + rho * q).astype(p.dtype), a.adjoint(a(v)), rough)

    def body(carry: tuple, _: None) -> tuple:
        x, (z, w) = carry
        (pulled,) = gather(jax.tree.map(jnp.subtract, z, w))
        right = jax.tree.map(lambda b, p, leaf: (b + rho * p).astype(leaf.dtype), observed, pulled, x)
        x = conjugate_gradients(system, right, x, inner)
        moved = jax.tree.map(jnp.add, spread(x), w)
        z = jax.tree.map(lambda m: (jnp.sign(m) * jnp.maximum(jnp.abs(m) - strength / rho, 0.0)).astype(m.dtype), moved)
        return (x, Split(z, jax.tree.map(jnp.subtract, moved, z))), None

    return jax.lax.scan(body, (x, carried), None, length=iterations)[0]


def conjugate_gradients(system: Callable[[Tree], Tree], right: Tree, x: Tree, iterations: int) -> Tree:
    """``iterations`` of conjugate gradients for ``system(x) = right``, from x; differentiable step by step."""

    def body(carry: tuple, _: None) -> tuple:
        x, residual, direction, square = carry
        image = system(direction)
        along = dot(direction, image)
        size = jnp.where(along > 0, square / jnp.where(along > 0, along, 1.0), 0.0)
        x = jax.tree.map(lambda leaf, p: (leaf + size * p).astype(leaf.dtype), x, direction)
        residual = jax.tree.map(lambda leaf, p: (leaf - size * p).astype(leaf.dtype), residual, image)
        after = dot(residual, residual)
        turn = jnp.where(square > 0, after / jnp.where(square > 0, square, 1.0), 0.0)
        direction = jax.tree.map(lambda r, p: (r + turn * p).astype(r.dtype), residual, direction)
        return (x, residual, direction, after), None

    residual = jax.tree.map(lambda b, p: (b - p).astype(b.dtype), right, system(x))
    carry = x, residual, residual, dot(residual, residual)
    return jax.lax.scan(body, carry, None, length=iterations)[0][0]


# --- around a solver --------------------------------------------------------------------------------------------------


def diffusion_mbir(
    solver: Solver,
    measurement: Measurement,
    strength: Array = 0.05,
    penalty: Array = 1.0,
    iterations: int = 1,
    inner: int = 1,
    on: str = "state",
) -> VolumeStep:
    """After each step of a solver `admm_tv` on the state (over alpha): a volume from a prior of its slices.

        x_s <- step(x_t),    x_s <- alpha_s ADMM(x_s / alpha_s; z, w)

    z and w are carried from step to step, so that one iteration a step comes near what many would do.  ``on =
    "estimate"`` does it to the clean estimate within the step instead.  The denoiser is `slices` of one of images.  No
    further denoiser calls, no derivatives.  The state is a volume (Z, ...) or a tree of such.

    Args:
        solver: any; with ``update`` for "estimate".
        measurement: of a linear operator on the volume (`slicewise`), noise of any size.
        strength: lambda, at least 0; penalty: rho, above 0.
        iterations: of ADMM a step, at least 0; inner: of conjugate gradients an iteration, at least 1.
        on: "state" (as published) or "estimate".

    Solving 3D Inverse Problems using Pre-trained 2D Diffusion Models, arXiv:2211.10655.

    Raises ValueError for a nonlinear operator and arguments out of range.
    """
    needs_linear("diffusion_mbir", measurement)
    number("strength", strength)
    number("penalty", penalty, 1e-12)
    integer("iterations", iterations, 0, MOST)
    integer("inner", inner, 1, MOST)
    choice("on", on, ("state", "estimate"))
    if on == "estimate" and not hasattr(solver, "update"):
        raise ValueError(f"on='estimate' needs a solver of one call a step with an update, got {solver!r}.")
    return VolumeStep(solver, measurement, strength, penalty, iterations, inner, on)


@value
class VolumeStep:
    inner: Any
    measurement: Any
    strength: Array
    penalty: Array
    iterations: int = static()
    count: int = static()  # of conjugate gradients
    on: str = static()
    factory = "diffusion_mbir"

    order = 0
    weak_order = 0
    embedded = False

    @property
    def calls(self) -> int:
        return self.inner.calls

    @property
    def draws(self) -> int:
        return self.inner.draws

    @property
    def renoises(self) -> bool:
        return getattr(self.inner, "renoises", False)

    def plan(self, grid: Grid) -> Row:
        return self.inner.plan(grid)

    def init(self, x: Tree) -> Tree:
        return self.inner.init(x), split(x)

    def step(
        self, noise: tuple[Tree, ...], denoise: Callable[[Tree, Level], Tree], x: Tree, memory: Tree, row: Row
    ) -> tuple[Tree, Tree, Info]:
        memory, carried = memory
        if self.on == "estimate":
            x0, moved = self._consistent(denoise(x, row.t), carried)
            after, memory = self.inner.update(noise, x, x0, memory, row)
            info = Info(x0)
        else:
            after, memory, info = self.inner.step(noise, denoise, x, memory, row)
            alpha = jnp.asarray(row.s.alpha)
            blank = alpha == 0
            over = jax.tree.map(lambda leaf: (leaf / jnp.where(blank, 1.0, alpha)).astype(leaf.dtype), after)
            clean, moved = self._consistent(over, carried)
            after = jax.tree.map(lambda c, old: jnp.where(blank, old, alpha * c).astype(old.dtype), clean, after)
        still = jnp.all(jnp.asarray(row.t.half_log_snr == row.s.half_log_snr))
        kept = lambda new, old: jnp.where(still, old, new).astype(old.dtype)
        return jax.tree.map(kept, after, x), (memory, jax.tree.map(kept, moved, carried)), info

    def _consistent(self, x: Tree, carried: Split) -> tuple[Tree, Split]:
        return admm_tv(x, carried, self.measurement, self.strength, self.penalty, self.iterations, self.count)
