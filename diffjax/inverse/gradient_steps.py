"""Solvers that are followed by a gradient: `dps` and `mcg` through the network, `flowchef` without its Jacobian.

`dps` and `mcg` need the clean estimate before the step (``update``), `flowchef` nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.inverse.measurement import Measurement
from diffjax.inverse.operators import pseudo_inverse
from diffjax.inverse.steps import _in_range, _init, _inner, _plan
from diffjax.inverse.systems import misfit, needs_spectrum, one_level
from diffjax.levels import Array, Grid, Info, Level, Row, Solver, Tree, as_value, dot, static, value
from diffjax.solvers.arguments import number


def dps(solver: Solver, measurement: Measurement, step: Array = 1.0) -> GradientStep:
    """Diffusion posterior sampling: after each step ``x <- x - step grad_{x_t} |y - A x0(x_t)|``.

    The norm is weighted by 1 / variance for noise that differs from entry to entry, up to a common factor; any
    operator.  Published with ancestral sampling and 1000 steps; the paper's zeta is half the step, its code's scale is
    the step.  Not a sampler of the posterior: the step is not a likelihood's, nothing tells it the noise, and it
    depends on the grid.  As a twist, with the likelihood's own step: `likelihood`.  One denoiser call and one
    vector-Jacobian product a step.

    Diffusion Posterior Sampling for General Noisy Inverse Problems, arXiv:2209.14687, algorithms 1 and 2.

    Raises ValueError for a solver without ``update``, or a step below 0.
    """
    return _gradient_step("dps", solver, measurement, step, project=False)


def mcg(solver: Solver, measurement: Measurement, step: Array = 1.0) -> GradientStep:
    """Manifold constrained gradients: `dps`, and then ``x_s <- x_s + A^+ (A (alpha_s A^+ y + sigma_s z) - A x_s)``.

    The gradient keeps the state near the data, the projection makes it agree with noised measurements (and, at the
    end, with y itself: noise of y is kept).  One denoiser call, one vector-Jacobian product and one more draw a step.

    Improving Diffusion Models for Inverse Problems using Manifold Constraints, arXiv:2206.00941.

    Raises ValueError for a solver without ``update``, a step below 0, or an operator without a spectrum.
    """
    needs_spectrum("mcg", measurement)
    return _gradient_step("mcg", solver, measurement, step, project=True)


def _gradient_step(name: str, solver: Solver, measurement: Measurement, step: Array, project: bool) -> GradientStep:
    if not hasattr(solver, "update"):
        raise ValueError(f"{name} needs a solver of one call a step with an update, got {solver!r}.")
    number("step", step)
    return GradientStep(solver, measurement, step, None, project)


@value
class GradientStep:
    inner: Any
    measurement: Any
    size: Array
    penalty: Any  # of the clean estimate, beside the misfit, or None
    project: bool = static()

    def __repr__(self) -> str:
        return f"{'mcg' if self.project else 'dps'}({self.inner!r}, {self.measurement!r}, step={self.size!r})"

    order = 0  # a displacement of a fixed size a step, however many steps there are
    weak_order = 0
    embedded = False
    calls = 1
    renoises = _inner("renoises", False)
    init = _init

    def plan(self, grid: Grid) -> Row:
        if self.project:
            one_level("mcg", grid.t, self.measurement.operator)
        return self.inner.plan(grid)

    @property
    def draws(self) -> int:
        return self.inner.draws + self.project

    def step(
        self, noise: tuple[Tree, ...], denoise: Callable[[Tree, Level], Tree], x: Tree, memory: Tree, row: Row
    ) -> tuple[Tree, Tree, Info]:
        if getattr(denoise, "memory", None) is not None:
            raise ValueError("a gradient through the denoiser needs one that does not remember.")
        x0, pull = jax.vjp(lambda x: denoise(x, row.t), x)
        (slope,) = pull(jax.grad(self._cost)(x0))
        after, memory = self.inner.update(noise[self.project :], x, x0, memory, row)
        still = row.t.half_log_snr == row.s.half_log_snr
        after = jax.tree.map(
            lambda leaf, g: (leaf - jnp.where(still, 0.0, self.size * g)).astype(leaf.dtype), after, slope
        )
        if self.project:
            after = jax.tree.map(lambda new, old: jnp.where(still, old, new), self._projected(after, noise[0], row), x)
        return after, memory, Info(x0)

    def _cost(self, x0: Tree) -> Array:
        cost = misfit(self.measurement, x0)
        return cost if self.penalty is None else cost + self.penalty(x0)

    def _projected(self, x: Tree, z: Tree, row: Row) -> Tree:
        known = pseudo_inverse(self.measurement.operator, self.measurement.observed(x))
        noised = jax.tree.map(lambda k, z, leaf: row.s.alpha * k + row.s.sigma * z - leaf, known, z, x)
        return jax.tree.map(lambda leaf, c: (leaf + c).astype(leaf.dtype), x, _in_range(self.measurement, noised))


def flowchef(solver: Solver, cost: Any, step: Array = 1.0) -> FlowChef:
    """After each step ``x <- x - step grad L(x0)``, the gradient at the clean estimate applied to the state as it is.

    So nothing is differentiated through the network, and nothing inverted.  Published for Euler steps of rectified
    flow.  It holds where d x0 / d x_t is near a multiple of the identity; the step is not a likelihood's.

    Args:
        cost: ``x0 -> number``, or a measurement, for ``|y - A x0|^2 / 2``.
        step: at least 0.

    Steering Rectified Flow Models in the Vector Field for Controlled Image Generation, arXiv:2412.00100.

    Raises ValueError for a cost that is neither, or a step below 0.
    """
    if not callable(cost) and not isinstance(cost, Measurement):
        raise ValueError(f"cost must be a function of x0 or a measurement, got {cost!r}.")
    number("step", step)
    return FlowChef(solver, as_value(cost), step)


@value
class FlowChef:
    inner: Any
    cost: Any
    size: Array
    factory = "flowchef"

    order = 0
    weak_order = 0
    embedded = False
    calls, draws, renoises = _inner("calls"), _inner("draws"), _inner("renoises", False)
    plan, init = _plan, _init

    def step(
        self, noise: tuple[Tree, ...], denoise: Callable[[Tree, Level], Tree], x: Tree, memory: Tree, row: Row
    ) -> tuple[Tree, Tree, Info]:
        after, memory, info = self.inner.step(noise, denoise, x, memory, row)
        slope = jax.grad(self._value)(info.x0)
        still = row.t.half_log_snr == row.s.half_log_snr
        moved = jax.tree.map(
            lambda leaf, g: (leaf - jnp.where(still, 0.0, self.size * g)).astype(leaf.dtype), after, slope
        )
        return moved, memory, info

    def _value(self, x0: Tree) -> Array:
        if isinstance(self.cost, Measurement):
            residual = self.cost.residual(x0)
            return 0.5 * dot(residual, residual)
        return self.cost(x0)
