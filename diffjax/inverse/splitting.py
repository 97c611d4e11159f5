"""Samplers that take turns between the prior and the measurement: PnP-DM and DAPS.

Both alternate a draw that knows the prior, a short run of any solver from a noisy state, with a draw that knows the
measurement, of N(x; centre, std^2 I) p(y | x): exact where the operator is linear and the noise Gaussian, by Langevin
steps otherwise.  The network is not differentiated, and the operator may be any function.  Under a process with
coordinates both draws are of the standard state: what is given and returned is data, and widths are of that state.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.grids.times import times
from diffjax.inverse.measurement import GaussianNoise, Measurement
from diffjax.inverse.systems import normal_like, proximal
from diffjax.levels import (
    CLEAN,
    UNSAVED,
    Array,
    Grid,
    Level,
    Process,
    Row,
    Sample,
    Solver,
    Tree,
    all_finite,
    as_value,
    dot,
)
from diffjax.samplers.sequential import Options, _run, planned
from diffjax.solvers.arguments import number
from diffjax.solvers.ddim import ddim
from diffjax.solvers.stochastic_adams import sde_dpmpp


def pnp_dm(
    key: Array,
    denoise: Any,
    measurement: Measurement,
    process: Process,
    shape: Any,
    *,
    stds: Array,
    solver: Solver | None = None,
    steps: int = 20,
    langevin: int = 50,
    rate: Array = 0.5,
    dtype: Any = jnp.float32,
) -> Sample:
    """Split Gibbs sampling, ``z ~ p(y | z) N(z; x, rho^2 I)`` and then ``x ~ p(x) N(z; x, rho^2 I)``.

    The second is a denoising posterior: it is drawn by the solver from the state alpha z at the level sigma / alpha =
    rho.  For an exact denoiser and exact draws the chain at a fixed rho has the law ``p(x) p(y | z) N(z; x, rho^2 I)``,
    which tends to the posterior as rho -> 0, while it mixes more slowly: hence rho falls along the chain.

    Args:
        measurement: of any operator and noise.
        process: whose end is at sigma / alpha of at least the first rho.
        shape: of one sample, or a tree of shapes; the chain starts from N(0, rho_1^2 I).
        stds: (K,) the rho of each round, above 0, concrete: their number is that of the draws of each kind.
        solver: stochastic, or the second draw has not its law; default ``sde_dpmpp()``, of weak order 2 (ancestral
            steps make the draw too narrow: by a seventh with 60 steps where rho is a quarter of the data's scale).
        steps: of the solver a round, on half-log-SNRs evenly spaced down to a hundredth of the noise, and then to 0.
        langevin, rate: of the first draw, where it is not exact: the steps, and their size over the smallest scale.

    Returns a `diffjax.Sample`; ``K steps`` denoiser calls.

    Principled Probabilistic Imaging using Diffusion Models as Plug-and-Play Priors, arXiv:2405.18782.

    Raises ValueError for stds out of the process's range, and arguments that do not fit.
    """
    solver = sde_dpmpp() if solver is None else solver
    stds = np.atleast_1d(np.asarray(stds, np.float64))
    starts = [_level_at(process, std) for std in stds]
    grids = [inner_grid(process, start, steps) for start in starts]
    return _alternate(key, denoise, measurement, solver, grids, shape, stds, langevin, rate, dtype, renoise=False)


def daps(
    key: Array,
    denoise: Any,
    measurement: Measurement,
    grid: Grid,
    shape: Any,
    *,
    solver: Solver | None = None,
    steps: int = 5,
    spread: Array = 1.0,
    langevin: int = 50,
    rate: Array = 0.5,
    dtype: Any = jnp.float32,
) -> Sample:
    """Decoupled annealing: ``x0 = ODE(x_t)``, ``z ~ p(y | z) N(z; x0, r_t^2 I)``, ``x_s = alpha_s z + sigma_s eps``.

    So the next state is not near the last one, and errors are not handed on.  r_t = spread sigma_t / alpha_t.  The
    ODE's end stands for a draw of x_0 given x_t, which it is not: no exact denoiser makes this the posterior, but
    it is near where that is narrow.

    Args:
        measurement: of any operator and noise.
        grid: of annealing levels; its steps' starts are used.  It starts at alpha > 0.
        solver: of the ODE, one-step methods in ``steps`` steps; default ``ddim()``.
        langevin, rate: as for `pnp_dm`.

    Returns a `diffjax.Sample`, x the last z; ``len(grid) steps`` denoiser calls.

    Improving Diffusion Inverse Problem Solving with Decoupled Noise Annealing, arXiv:2407.01521.

    Raises ValueError for a grid from alpha = 0 and arguments that do not fit.
    """
    number("spread", spread, 1e-9)
    solver = ddim() if solver is None else solver
    alpha, sigma = np.asarray(grid.t.alpha, np.float64), np.asarray(grid.t.sigma, np.float64)
    if alpha.ndim != 1 or not np.all(alpha > 0):
        raise ValueError(f"grid must have one level a step, at alpha > 0, got alpha={grid.t.alpha!r}.")
    starts = [jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], grid.t) for i in range(len(grid))]
    grids = [inner_grid(grid.process, start, steps) for start in starts]
    stds = spread * sigma / alpha
    return _alternate(key, denoise, measurement, solver, grids, shape, stds, langevin, rate, dtype, renoise=True)


def likelihood_draw(
    key: Array, measurement: Measurement, centre: Tree, std: Array, steps: int = 50, rate: Array = 0.5
) -> Tree:
    """A draw of ``N(z; centre, std^2 I) p(y | z)``, by perturbing and optimising where that is exact, else by Langevin.

    With a linear operator and Gaussian noise: the proximal point of ``centre + std eps`` for ``y + noise``, exactly.
    Otherwise ``steps`` of the unadjusted Langevin algorithm from the centre, of size ``rate / (1 / std^2 + L)`` with L
    the largest curvature of the likelihood at the centre (in Gauss-Newton's approximation, by power iteration).
    """
    first, second = jax.random.split(key)
    if hasattr(measurement.operator, "adjoint") and isinstance(measurement.noise, GaussianNoise):
        moved = jax.tree.map(lambda c, z: (c + std * z).astype(c.dtype), centre, normal_like(first, centre))
        seen = Measurement(
            measurement.operator, measurement.noise.draw(second, measurement.observed(centre)), measurement.noise
        )
        return proximal(seen, moved, std**2)
    size = rate / (1 / std**2 + curvature(second, measurement, centre))

    def potential(z: Tree) -> Array:
        gap = jax.tree.map(jnp.subtract, z, centre)
        return measurement.log_likelihood(z) - 0.5 * dot(gap, gap) / std**2

    def body(z: Tree, key: Array) -> tuple[Tree, None]:
        slope, eps = jax.grad(potential)(z), normal_like(key, z)
        step = lambda a, g, e: (a + size * g + jnp.sqrt(2 * size) * e).astype(a.dtype)
        return jax.tree.map(step, z, slope, eps), None

    return jax.lax.scan(body, centre, jax.random.split(first, steps))[0]


def curvature(key: Array, measurement: Measurement, x: Tree, iterations: int = 8) -> Array:
    """The largest eigenvalue of ``J^T S^-1 J``, J = dA/dx, by power iteration."""
    variance = measurement.variance(x)
    _, push = jax.linearize(measurement.operator, x)
    _, pull = jax.vjp(measurement.operator, x)

    def body(carry: tuple, _: None) -> tuple:
        v, _ = carry
        scale = jnp.sqrt(dot(v, v))
        v = jax.tree.map(lambda leaf: leaf / jnp.where(scale > 0, scale, 1.0), v)
        weighed = jax.tree.map(lambda leaf, s: leaf / jnp.where(s > 0, s, 1.0), push(v), variance)
        (after,) = pull(weighed)
        return (after, dot(v, after)), None

    start = normal_like(key, x), jnp.zeros((), jnp.result_type(*jax.tree.leaves(x)))
    return jax.lax.scan(body, start, None, length=iterations)[0][1]


# --- the common loop ------------------------------------------------------------------------------------------------


def _alternate(
    key: Array,
    denoise: Any,
    measurement: Measurement,
    solver: Solver,
    grids: list[Grid],
    shape: Any,
    stds: Array,
    langevin: int,
    rate: Array,
    dtype: Any,
    renoise: bool,
) -> Sample:
    number("rate", rate, 1e-9)
    process = grids[0].process
    measurement = measurement.under(process)
    denoise = as_value(denoise)
    plans = [planned(denoise, solver, grid, None, None) for grid in grids]
    rows = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves), dtype), *[plan.rows for plan in plans])
    start_key, key = jax.random.split(key)
    x = process.standard_prior(start_key, shape, dtype, grids[0].start)
    solver = plans[0].solver
    keys = jax.random.split(key, len(grids))
    stds = jnp.asarray(stds, dtype)
    later = jax.tree.map(lambda leaf: jnp.concatenate([leaf[1:, 0], leaf[-1:, 0]]), rows.t)
    options = Options((), 1, False, False, False)

    def reverse(key: Array, x: Tree, rows: Row) -> Sample:
        return _run(key, x, denoise, solver, rows, None, options)

    def body(carry: tuple, given: tuple) -> tuple:
        x, nfe, failed = carry
        index, key, rows, std, level = given
        walk, draw, noise = jax.random.split(key, 3)
        if not renoise:  # z, then x: the round ends with a draw that knows the prior
            clean = jax.tree.map(lambda leaf: leaf / rows.t.alpha[0], x)
            z = likelihood_draw(draw, measurement, clean, std, langevin, rate)
            x = jax.tree.map(lambda leaf: (rows.t.alpha[0] * leaf).astype(leaf.dtype), z)
        out = reverse(walk, x, rows)
        if renoise:
            z = likelihood_draw(draw, measurement, out.x, std, langevin, rate)
            eps = normal_like(noise, z)
            after = jax.tree.map(lambda a, e: (level.alpha * a + level.sigma * e).astype(a.dtype), z, eps)
            result = z
        else:
            after = jax.tree.map(lambda leaf: (level.alpha * leaf).astype(leaf.dtype), out.x)
            result = out.x
        failed = jnp.where((failed < 0) & ~all_finite(result), index, failed)
        return (after, nfe + out.nfe, failed), result

    zero = jnp.zeros((), jnp.int32)
    given = jnp.arange(len(grids), dtype=jnp.int32), keys, rows, stds, later
    (_, nfe, failed), results = jax.lax.scan(body, (x, zero, zero - 1), given)
    result = process.leave(jax.tree.map(lambda leaf: leaf[-1], results), CLEAN)
    return Sample(result, nfe, nfe, failed, UNSAVED)


def _level_at(process: Process, std: float) -> Level:
    if getattr(process.schedule, "trailing", 0):
        raise ValueError(f"a round starts at one noise level, and {process!r} has many at one time.")
    noisiest = np.exp(-np.asarray(process.level(process.end).half_log_snr, np.float64))
    if not 0 < std <= noisiest * (1 + 1e-9):
        raise ValueError(f"stds must be above 0 and at most the process's {noisiest}, got {std!r}.")
    return process.level(half_log_snr=np.asarray(-np.log(std)))


def inner_grid(process: Process, start: Level, steps: int) -> Grid:
    """From a level to 0: half-log-SNRs evenly spaced to a hundredth of the noise, and then the data."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps!r}.")
    first = np.asarray(start.half_log_snr, np.float64)
    spaced = first + np.linspace(0.0, np.log(100.0), steps + 1)[:-1] if steps > 1 else np.array([first])
    inside = np.asarray(process.level(half_log_snr=spaced).time, np.float64)
    inside[0] = np.asarray(start.time, np.float64)
    return times(process, np.concatenate([inside, [0.0]]))
