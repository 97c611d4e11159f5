"""Problems whose denoiser and probability flow are known exactly, and how solvers are run on them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax.levels import Array, Grid, Level, Process, Solver
from diffjax.oracles.mixture import Mixture


def data() -> Mixture:
    """Three correlated components of unequal weight: no symmetry that could hide an error."""
    covariances = [[[0.10, 0.07], [0.07, 0.08]], [[0.04, -0.03], [-0.03, 0.12]], [[0.15, 0.0], [0.0, 0.02]]]
    return diffjax.oracles.mixture([0.5, 0.3, 0.2], [[-1.0, -0.6], [0.9, 0.8], [0.6, -1.1]], covariances)


def exact_flow(denoise: Mixture, process: Process, grid: Grid, x: Array, steps: int = 4096) -> Array:
    """The probability flow from the grid's first to its last level, for starts (N, D); for the last level in float64.

    With u = alpha / sigma the flow is ``d(x / sigma) / du = x0(x, u)``, regular from u = 0 on.  Runge-Kutta of order
    four in log(1 + u); where the grid ends at sigma = 0, the flow ends at sigma = 1e-6 alpha with one clean estimate.
    """
    to_data = bool(grid.s.sigma[-1] == 0)
    first = np.exp(grid.start.half_log_snr)
    last = 1e6 if to_data else np.exp(grid.s.half_log_snr[-1])
    w = np.linspace(np.log1p(first), np.log1p(last), steps + 1)

    def slope(y: Array, w: Array) -> Array:
        level = process.level(half_log_snr=jnp.log(jnp.expm1(w)))
        return jnp.exp(w) * denoise(level.sigma * y, level)

    def step(y: Array, ends: tuple[Array, Array]) -> tuple[Array, None]:
        w, h = ends[0], ends[1] - ends[0]
        a = slope(y, w)
        b = slope(y + 0.5 * h * a, w + 0.5 * h)
        c = slope(y + 0.5 * h * b, w + 0.5 * h)
        d = slope(y + h * c, w + h)
        return y + h / 6 * (a + 2 * b + 2 * c + d), None

    def one(x: Array) -> Array:
        y, _ = jax.lax.scan(step, x / grid.start.sigma, (jnp.asarray(w[:-1]), jnp.asarray(w[1:])))
        level = process.level(half_log_snr=np.log(last))
        return denoise(level.sigma * y, level) if to_data else level.sigma * y

    return jax.jit(jax.vmap(one))(x)


def distance(key: Array, samples: np.ndarray, reference: np.ndarray) -> float:
    """Sliced 1-Wasserstein distance: the chance numbers of the components weigh less in it than in its square."""
    return diffjax.metrics.sliced_wasserstein(key, samples, reference, projections=128, order=1)


def run(key: Array, denoise: Callable[[Array, Level], Array], solver: Solver, grid: Grid, x: Array) -> Array:
    """The solver from every start (N, D)."""
    keys = jax.random.split(key, len(x))
    return jax.vmap(lambda key, x: diffjax.sample(key, denoise, solver, grid, x=x).x)(keys, x)


def moments(solver: Solver, grid: Grid, mean: np.ndarray, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of a solver's last state on data N(mean, covariance), exactly, from the exact marginal.

    There every step is affine in the state, the memory and the noise: its matrix is read off a basis, whose vectors are
    the leading axis of the states, so that a step is called once.
    """
    size, eye = len(mean), np.eye(len(mean))

    def denoise(x: Array, level: Level) -> Array:
        gain = np.linalg.solve(level.alpha**2 * covariance + level.sigma**2 * eye, level.alpha * covariance)
        return mean + (x - level.alpha * mean) @ gain

    rows = solver.plan(grid)
    held, structure = jax.tree.flatten(solver.init(np.zeros((1, size))))
    inputs = size * (1 + len(held))
    total = inputs + size * solver.draws
    basis = np.concatenate([np.zeros((1, total)), np.eye(total)])  # the offset, then every input
    x, *parts = np.split(basis, total // size, axis=1)
    memory, noise = structure.unflatten(parts[: len(held)]), tuple(parts[len(held) :])
    start = grid.start
    m = np.concatenate([start.alpha * mean, np.zeros(inputs - size)])
    c = np.pad(start.alpha**2 * covariance + start.sigma**2 * eye, (0, inputs - size))
    for i in range(len(rows.t.time)):
        out, after, _ = solver.step(noise, denoise, x, memory, jax.tree.map(lambda leaf, i=i: leaf[i], rows))
        columns = np.concatenate([np.asarray(leaf) for leaf in (out, *jax.tree.leaves(after))], axis=1)
        matrix = (columns[1:] - columns[0]).T
        keep, fresh = matrix[:, :inputs], matrix[:, inputs:]
        m, c = columns[0] + keep @ m, keep @ c @ keep.T + fresh @ fresh.T
    return m[:size], c[:size, :size]
