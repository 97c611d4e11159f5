"""EnKG: an ensemble that is guided by its own covariances, so that nothing is differentiated."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from diffjax.inverse.measurement import Measurement
from diffjax.inverse.splitting import inner_grid
from diffjax.levels import UNSAVED, Array, Grid, Sample, Solver, all_finite, as_value
from diffjax.samplers.sequential import Options, _run, drawn_noise, planned
from diffjax.samplers.shared import advance, take
from diffjax.solvers.arguments import number
from diffjax.solvers.ddim import ddim


def ensemble_update(x: Array, predicted: Array, y: Array, variance: Array, step: Array | None = None) -> Array:
    """Every particle moved towards the measurement by the covariances of the ensemble.

        x_i + C_xy (C_yy + S)^-1 (y - p_i)                                   step None: the Kalman gain
        x_i + step / |W| sum_j W_ij (x_j - mean x),                          else
        W_ij = (y - p_i)^T S^-1 (p_j - mean p) / J

    For a linear prediction p = A x the second is a gradient step, ``C_xx A^T S^-1 (y - A x_i)``, of a length that is
    the same at every level.

    Args:
        x: (J, D) particles.
        predicted: p (J, M), their noiseless measurements.
        y, variance: (M,), the measurement and the variances S of its noise, which count as 1 where they are 0 in W.

    Returns (J, D).
    """
    count = len(x)
    dx, dy = x - jnp.mean(x, axis=0), predicted - jnp.mean(predicted, axis=0)
    if step is None:
        system = dy.T @ dy / count + jnp.diag(variance)
        return x + (y - predicted) @ jnp.linalg.solve(system, dy.T @ dx / count)
    weights = ((y - predicted) / jnp.where(variance > 0, variance, 1.0)) @ dy.T / count
    size = jnp.sqrt(jnp.sum(weights**2))
    return x + step * (weights @ dx) / jnp.where(size > 0, size, 1.0)


def enkg(
    key: Array,
    denoise: Any,
    measurement: Measurement,
    grid: Grid,
    shape: Any,
    *,
    solver: Solver | None = None,
    particles: int = 64,
    step: Array | None = 2.0,
    steps: int = 4,
    dtype: Any = jnp.float32,
) -> Sample:
    """Ensemble Kalman diffusion guidance: before every step of the solver the states are moved by `ensemble_update`.

    The prediction of a particle is A of the end of a short ODE from its state.  Neither the denoiser nor the operator,
    which may be any function, is differentiated.  The particles interact, so they are no independent draws, and stay in
    the affine space that the ensemble spans at each step: it should be larger than what y determines.

    Under a process with coordinates the particles are standard states, as with `daps`: what is given and returned is
    data.  The update commutes with a change of coordinates that is linear.

    Args:
        measurement: of any operator; its noise has a variance.
        grid: that starts at alpha > 0.
        shape: of one sample, or a tree of shapes.
        solver: default ``ddim()``.
        particles: J, at least 2.
        step: of the update; its length does not fall by itself near the measurement.  None is the Kalman gain, which
            counts y anew in every step, so that the ensemble shrinks to a point before it is there.
        steps: of the ODE of the predictions; 1 is the denoiser's estimate.

    Returns a `diffjax.Sample` whose x has the ensemble as leading axis; ``J N (solver.calls + steps)`` denoiser calls.

    Ensemble Kalman Diffusion Guidance: A Derivative-free Method for Inverse Problems, arXiv:2409.20175.

    Raises ValueError for fewer than 2 particles, and a grid from alpha = 0.
    """
    if step is not None:
        number("step", step)
    if particles < 2:
        raise ValueError(f"particles must be at least 2, got {particles!r}.")
    alpha = np.asarray(grid.t.alpha, np.float64)
    if alpha.ndim != 1 or not np.all(alpha > 0):
        raise ValueError(f"grid must have one level a step, at alpha > 0, got {grid.t.alpha!r}.")
    measurement = measurement.under(grid.process)
    denoise = as_value(denoise)
    plan = planned(denoise, ddim() if solver is None else solver, grid, None, None)
    solver, rows = plan.solver, jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), plan.rows)
    count = rows.t.time.shape[0]
    starts = [jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], plan.rows.t) for i in range(count)]
    plans = [planned(denoise, ddim(), inner_grid(grid.process, start, steps), None, None) for start in starts]
    inner = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves), dtype), *[p.rows for p in plans])
    options = Options((), 1, False, False, False)
    keys = jax.random.split(key, (particles, 2))
    first = take(rows.t, 0)
    x = jax.vmap(lambda k: grid.process.standard_prior(k, shape, dtype, first))(keys[:, 0])
    one = take(x, 0)
    unravel = ravel_pytree(one)[1]
    y = ravel_pytree(measurement.observed(one))[0]
    variance = ravel_pytree(measurement.variance(one))[0]

    def body(carry: tuple, given: tuple) -> tuple:
        x, memory, failed, nfe = carry
        index, row, ahead = given
        ends = jax.vmap(lambda x: _run(key, x, denoise, plans[0].solver, ahead, None, options))(x)
        predicted = jax.vmap(lambda x: ravel_pytree(measurement.operator(x))[0])(ends.x)
        moved = ensemble_update(jax.vmap(lambda x: ravel_pytree(x)[0])(x), predicted, y, variance, step)
        x = jax.vmap(unravel)(moved.astype(dtype))

        def forward(key: Array, x: Array, memory: Any) -> tuple:
            return advance(denoise, solver, drawn_noise(None, key, index, row, x, solver.draws), x, memory, row)

        x, memory, _, spent = jax.vmap(forward)(keys[:, 1], x, memory)
        failed = jnp.where((failed < 0) & ~all_finite(x), index, failed)
        return (x, memory, failed, nfe + jnp.sum(spent, dtype=jnp.int32) + jnp.sum(ends.nfe, dtype=jnp.int32)), None

    zero = jnp.zeros((), jnp.int32)
    given = jnp.arange(count, dtype=jnp.int32), rows, inner
    (x, _, failed, nfe), _ = jax.lax.scan(body, (x, jax.vmap(solver.init)(x), zero - 1, zero), given)
    last = take(rows.s, -1)
    x = jax.vmap(lambda x: grid.process.leave(x, last))(x)
    return Sample(x, nfe, jnp.asarray(count * (solver.calls + steps), jnp.int32), failed, UNSAVED)
