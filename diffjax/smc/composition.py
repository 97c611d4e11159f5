"""Energy composition: products, mixtures and negations of densities that are known up to a factor at every level.

The score of a product of diffused densities is the sum of their scores, but that product is not what the forward
process makes of the product of the clean densities: a sampler that only follows the score ends elsewhere.  Two cures:
Markov chains at each level that leave the composed density invariant (`annealed_mcmc`), and particles weighted by the
ratio of the composed densities of successive levels (`energy_smc`), which is exact for any number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, Grid, Level, Row, Solver, Tree, all_finite, as_value, dot, is_traced, static, value
from diffjax.samplers.sequential import normal_noise, prepare
from diffjax.samplers.shared import inline, integer
from diffjax.smc.particles import (
    collapsed,
    drawn,
    effective_sizes,
    estimate,
    placed,
    resample,
    start,
    threshold_checked,
)
from diffjax.smc.resampling import systematic
from diffjax.smc.steering import Steered, gained, improper, unbounded

KINDS = ("product", "mixture")


def composed(log_densities: tuple, weights: tuple | None = None, kind: str = "product") -> Composed:
    """``log p = sum_i w_i log q_i`` (product) or ``log sum_i w_i q_i`` (mixture), at every level.

    Args:
        log_densities: functions ``(x, level) -> number``, up to constants, as an oracle's ``log_density`` or a network
            distilled by `distillation_loss`.
        weights: default 1.  In a product a negative one negates (they must sum to more than 0), and 1 / temperature
            tempers a single density; in a mixture they are positive.
        kind: "product" or "mixture".

    Reduce, Reuse, Recycle: Compositional Generation with Energy-Based Diffusion Models and MCMC, arXiv:2302.11552.

    Returns a value ``(x, level) -> log p`` with ``denoiser()``, for any sampler.

    Raises ValueError for other weights or kinds.
    """
    weights = (1.0,) * len(log_densities) if weights is None else tuple(weights)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}.")
    if not log_densities or len(weights) != len(log_densities):
        raise ValueError(f"weights must be one for each density, got {weights!r} for {len(log_densities)}.")
    if not is_traced(weights) and (not sum(weights) > 0 or (kind == "mixture" and min(weights) < 0)):
        raise ValueError(f"weights must sum to more than 0, and be positive in a mixture, got {weights!r}.")
    return Composed(tuple(map(as_value, log_densities)), weights, kind)


@value
class Composed:
    log_densities: tuple
    weights: tuple
    kind: str = static()
    factory = "composed"

    def __call__(self, x: Tree, level: Level) -> Array:
        logs = jnp.stack([log(x, level) for log in self.log_densities])
        weights = jnp.stack([jnp.asarray(w, logs.dtype) for w in self.weights])
        return logs @ weights if self.kind == "product" else jax.nn.logsumexp(logs, b=weights)

    @property
    def total(self) -> Array:
        """Of the weights of a product: far from the data it is a Gaussian of variance sigma^2 / total."""
        return sum(self.weights) if self.kind == "product" else 1.0

    def denoiser(self) -> Denoiser:
        """The clean estimate ``(x + sigma^2 grad log p) / alpha`` that belongs to the composed score."""
        return Denoiser(self)


@value
class Denoiser:
    log_density: Any

    def __call__(self, x: Tree, level: Level) -> Tree:
        slope = jax.grad(self.log_density)(x, level)
        return jax.tree.map(lambda leaf, g: (leaf + level.sigma**2 * g) / level.alpha, x, slope)


def distillation_loss(log_density: Callable[[Tree, Level], Array], denoise: Any, x: Tree, level: Level) -> Array:
    """``sigma^2 |grad_x log p(x) - s(x)|^2 / D`` with s = (alpha denoise(x) - x) / sigma^2: an energy from a denoiser.

    Its minimiser over all energies is the projection of the denoiser's field on the gradients, so that a field that is
    none, as a network's, becomes one.  To be averaged over noised data and levels; one denoiser call.

    Composition and Control with Distilled Energy Diffusion Models and Sequential Monte Carlo, arXiv:2502.12786.
    """
    slope = jax.grad(log_density)(x, level)
    x0 = jax.lax.stop_gradient(denoise(x, level))
    off = jax.tree.map(
        lambda g, clean, leaf: level.sigma * g - (level.alpha * clean - leaf) / level.sigma, slope, x0, x
    )
    return dot(off, off) / sum(np.size(leaf) for leaf in jax.tree.leaves(x))


class Annealed(NamedTuple):
    """One sample and what its chains did.

    ``acceptance`` (rows,) their mean acceptance probability at each level, ``nfe`` evaluations of the composed density
    (each of all its parts), ``failed_at`` the first row that left a state that is not finite.
    """

    x: Tree
    acceptance: Array
    nfe: Array
    failed_at: Array


def annealed_mcmc(
    key: Array,
    log_density: Composed,
    solver: Solver,
    grid: Grid,
    shape: tuple[int, ...] | None = None,
    *,
    kernel: Any,
    steps: int,
    x: Tree | None = None,
    dtype: Any = jnp.float32,
) -> Annealed:
    """Sample a composed density: after every row of the solver ``steps`` moves of a Markov chain at the new level.

    Args:
        key, solver, grid, shape, x, dtype: as for `diffjax.sample`; the prior is narrowed to sigma^2 / sum of weights.
        log_density: of `composed`.
        kernel: `diffjax.smc.ula`, `mala`, `uhmc`, `hmc`, with steps in units of the level: a variance
            ``sigma^2 / (alpha^2 + sigma^2)`` (times alpha^2 + sigma^2 in x).
        steps: at every level above sigma = 0; 0 is the solver alone.

    Reduce, Reuse, Recycle: Compositional Generation with Energy-Based Diffusion Models and MCMC, arXiv:2302.11552.

    Raises ValueError as `diffjax.sample`, and for steps < 0.
    """
    integer("steps", steps, 0)
    denoise = log_density.denoiser()
    key, x, rows, solver = prepare(key, denoise, solver, grid, shape, x, None, dtype, None)
    if shape is not None:
        x = jax.tree.map(lambda leaf: (leaf / jnp.sqrt(log_density.total)).astype(leaf.dtype), x)
    run = _anneal if inline((log_density,), key, x, rows) else _compiled_anneal
    return run(key, x, log_density, solver, rows, kernel, steps)


def _anneal(key: Array, x: Tree, log_density: Any, solver: Any, rows: Row, kernel: Any, steps: int) -> Annealed:
    denoise = log_density.denoiser()
    zero = jnp.zeros((), jnp.int32)

    def body(carry: tuple, item: tuple) -> tuple[tuple, Array]:
        x, memory, failed_at = carry
        index, row = item
        row_key = jax.random.fold_in(key, index)
        x, memory, _ = solver.step(normal_noise(key, index, x, solver.draws), denoise, x, memory, row)
        clean = row.s.sigma == 0
        safe = jax.tree.map(lambda t, s: jnp.where(clean, t, s), row.t, row.s)
        density = lambda x: jax.value_and_grad(log_density)(x, safe)
        move = kernel.scaled(safe.sigma**2)

        def once(x: Tree, i: Array) -> tuple[Tree, Array]:
            moved = move(jax.random.fold_in(jax.random.fold_in(row_key, 1), i), x, density)
            return jax.tree.map(lambda a, b: jnp.where(clean, a, b), x, moved.x), moved.acceptance

        x, acceptance = jax.lax.scan(once, x, jnp.arange(steps, dtype=jnp.int32))
        failed_at = jnp.where((failed_at < 0) & ~all_finite(x), index, failed_at)
        return (x, memory, failed_at), jnp.mean(acceptance) if steps else jnp.ones(())

    count = rows.t.time.shape[0]
    indices = jnp.arange(count, dtype=jnp.int32)
    (x, _, failed_at), acceptance = jax.lax.scan(body, (x, solver.init(x), zero - 1), (indices, rows))
    moves = jnp.sum(jnp.asarray(rows.s.sigma) > 0, dtype=jnp.int32) * steps * kernel.gradients
    return Annealed(x, acceptance, (count * solver.calls + moves).astype(jnp.int32), failed_at)


_compiled_anneal = jax.jit(_anneal, static_argnames="steps")


def energy_smc(
    key: Array,
    log_density: Composed,
    solver: Solver,
    grid: Grid,
    shape: tuple[int, ...],
    *,
    particles: int,
    resampler: Any = None,
    threshold: Array = 0.5,
    dtype: Any = jnp.float32,
) -> Steered:
    """Particles along the composed densities of the levels: exact weights for any number of steps.

    ``w <- w p_s(x_s) F(x_t | x_s) / (p_t(x_t) K(x_s | x_t))`` with K the solver's kernel for the composed score and F
    the forward transition N(alpha_t / alpha_s x_s, ..): then the mean weight is an unbiased estimate of the integral
    of p at the last noisy level, and the weighted particles a consistent one of p.  A last row to sigma = 0 is made
    without weights: what is denoised there is the law at the level before.

    The densities are above 0 at all levels, as diffused ones are.  One that is 0 somewhere loses the paths of F that
    pass there, and has no score: ``failed_at`` says where one was met.

    Args:
        key, solver, grid, shape, dtype: as for `diffjax.sample`; the solver with a kernel whose noise is not too narrow
            for the weights: `ancestral` with variance 1.
        log_density: of `composed`.
        particles, resampler, threshold: as for `diffjax.steer`.

    Composition and Control with Distilled Energy Diffusion Models and Sequential Monte Carlo, arXiv:2502.12786.

    Returns a `diffjax.smc.Steered`.  Two evaluations of the density a row and particle.

    Raises ValueError for a solver without a kernel, a grid with gaps or that starts at alpha = 0.
    """
    place = placed(particles, None, None)
    threshold_checked(threshold)
    if not hasattr(solver, "kernel") or not isinstance(grid, Grid) or grid.gaps:
        raise ValueError(f"energy_smc needs a stochastic solver with a kernel and no gaps, got {solver!r} on {grid!r}.")
    if not is_traced(grid) and np.any(np.asarray(grid.t.alpha) == 0):
        raise ValueError("energy_smc needs a grid that starts where alpha > 0.")
    denoise = log_density.denoiser()
    prior_key, key = jax.random.split(key)
    one = lambda key: prepare(key, denoise, solver, grid, shape, None, None, dtype, None)[1]
    x = jax.vmap(lambda slot: one(jax.random.fold_in(prior_key, slot)))(jnp.arange(particles))
    rows = prepare(key, denoise, solver, grid, shape, None, None, dtype, None)[2]
    x = x / jnp.sqrt(log_density.total).astype(x.dtype)
    resampler = systematic() if resampler is None else resampler
    run = _smc if inline((log_density, resampler), key, x, rows) else _compiled_smc
    return run(place, log_density, resampler, solver, key, x, rows, threshold)


def _smc(place, log_density, resampler, solver, key, x, rows, threshold) -> Steered:
    count, kind = rows.t.time.shape[0], x.dtype
    denoise = log_density.denoiser()
    normal = lambda off, variance: -0.5 * jnp.sum(off**2 / variance + jnp.log(2 * jnp.pi * variance) + 0 * off)
    first = jax.tree.map(lambda leaf: leaf[0], rows.t)
    logs = jax.vmap(lambda x: log_density(x, first))(x)
    prior = jax.vmap(lambda x: normal(x, first.sigma**2 / log_density.total))(x)
    weighted = gained(place, start(place, kind), logs - prior)

    def body(carry: tuple, item: tuple) -> tuple[tuple, Any]:
        x, logs, weighted, failed_at = carry
        index, row = item
        (x, logs), weighted, choice = resample(
            key, index, place, resampler, threshold, jnp.asarray(True), weighted, (x, logs)
        )
        (noise,) = drawn(key, index, place.slots, x, 1)
        clean = row.s.sigma == 0
        keep = row.t.alpha / row.s.alpha
        forward = jnp.where(clean, 1.0, row.t.sigma**2 - (keep * row.s.sigma) ** 2)
        safe = jax.tree.map(lambda t, s: jnp.where(clean, t, s), row.t, row.s)

        def one(x: Array, before: Array, z: Array) -> tuple[Array, Array, Array]:
            mean, std = solver.kernel(x, denoise(x, row.t), row)
            new = (mean + std * z).astype(x.dtype)
            after = log_density(new, safe)
            variance = jnp.where(clean, 1.0, std**2)
            gain = after + normal(x - keep * new, forward) - before - normal(new - mean, variance)
            return new, jnp.where(clean, before, after), jnp.where(clean, 0.0, gain)

        x, logs, gain = jax.vmap(one)(x, logs, noise)
        weighted = gained(place, weighted, gain)
        wrong = improper(place, x, weighted) | unbounded(place, logs)
        failed_at = jnp.where((failed_at < 0) & wrong, index, failed_at)
        return (x, logs, weighted, failed_at), choice

    indices = jnp.arange(count, dtype=jnp.int32)
    state = (x, logs, weighted, jnp.where(unbounded(place, logs), 0, -1).astype(jnp.int32))
    (x, _, weighted, failed_at), choices = jax.lax.scan(body, state, (indices, rows))
    ess = effective_sizes(choices, weighted)
    return Steered(
        x,
        weighted.log_weights,
        estimate(weighted),
        ess,
        choices.resampled,
        choices.ancestors,
        jnp.asarray((2 * count + 1) * place.count, jnp.int32),
        failed_at,
        collapsed(ess),
    )


_compiled_smc = jax.jit(_smc, static_argnums=0)
