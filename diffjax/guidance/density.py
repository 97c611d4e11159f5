"""Density guidance: the log-density of a sample is prescribed along its path, and at its end.

Along a path with velocity v, ``d log p_t(x_t) / dt = -div u + score . (v - u)`` with u the probability flow.  So

    v = u + (div u + b) / |score|^2 score      makes      d log p_t(x_t) = b dt      exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from diffjax.corrections.transform import check_within, condition_within, evaluations_within
from diffjax.guidance.schedules import as_scale, scale_at
from diffjax.levels import (
    Array,
    Level,
    Process,
    Row,
    Tree,
    as_value,
    dot,
    is_traced,
    key_at,
    remembers,
    squared_diffusion,
    value,
)


def density(
    denoise: Any, process: Process, rate: Any, scale: Any = 1.0, eta: Array = 0.0, key: Array | None = None
) -> Density:
    """A probability flow along which the log-density of the state moves at ``rate`` nats per unit of time.

    ``x0 + scale k score`` with ``k (alpha' - alpha sigma' / sigma) = (div u + rate) / |score|^2``: of all changes of
    the velocity that do it the smallest.  Log-densities are those of the standard coordinates, p_t(x_t).  From a start
    x_T, ``rate = (log p_T(x_T) - wanted) / (T - t_end)`` ends at the wanted value up to the solver's error, because
    time runs down while sampling; a value above the largest log-density is not reached.

    Args:
        denoise: a denoiser that does not remember, near the exact one.
        process: the grid's.
        rate: b, a number or a function of the level.
        scale: 0 is ``denoise``.
        eta: of a stochastic solver of the reverse SDE with eta times its noise (`solvers.euler_maruyama`), with the
            noise of `tangential`: then k has Ito's terms as well.
        key: None takes the divergence from D Jacobian-vector products; with a key, from one (Hutchinson).

    Network evaluations: those of ``denoise`` (products are not counted).  At sigma = 0, and where the score is 0, the
    plain estimate.

    Devil is in the Details: Density Guidance for Detail-Aware Generation with Flow Models, arXiv:2502.05807.

    Raises ValueError for a denoiser that remembers, numbers that are not finite and, when sampling, for a noise level
    per frame or pixel.
    """
    if not is_traced(eta) and not (np.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta must be finite and at least 0, got {eta!r}.")
    if remembers(denoise):
        raise ValueError(f"density cannot wrap a denoiser that remembers, got {denoise!r}.")
    return Density(as_value(denoise), process, as_scale("rate", rate), as_scale("scale", scale), eta, key)


@value
class Density:
    denoise: Any
    process: Process
    rate: Any
    scale: Any
    eta: Array
    key: Array | None
    factory = "density"

    def __call__(self, x: Tree, level: Level) -> Tree:
        flat, unflatten = ravel_pytree(x)
        field = lambda y: ravel_pytree(self.denoise(unflatten(y), level))[0]
        still = jnp.asarray(level.sigma == 0)
        variance = jnp.where(still, 1.0, level.sigma**2)
        x0, push = jax.linearize(field, flat)
        score = (level.alpha * x0 - flat) / variance
        square = score @ score
        usable = (square > 0) & ~still
        safe = jnp.where(usable, square, 1.0)

        # the probability flow is linear x + onto x0, and the reverse SDE of strength eta has (1 + eta^2) onto
        linear, onto = self._rates(level)
        trace = self._trace(push, flat, level)
        wanted = flat.size * linear + onto * trace + scale_at(self.rate, level)
        curved = (level.alpha * jnp.stack([trace, score @ push(score) / safe]) - jnp.array([flat.size, 1.0])) / variance
        start = jnp.asarray(level.alpha == 0)  # where g is infinite, and no reverse SDE begins
        time = jnp.where(start, 0.5 * self.process.end, level.time)
        noise = jnp.where(start, 0.0, 0.5 * self.eta**2 * squared_diffusion(self.process.schedule, time))
        ito = noise * (1 + (curved[0] - curved[1]) / safe)
        slope = jnp.where(usable, onto * (1 + self.eta**2), 1.0)
        k = jnp.where(usable, (wanted / safe + jnp.where(noise > 0, ito, 0.0)) / slope, 0.0)
        return unflatten((x0 + scale_at(self.scale, level) * k * score).astype(flat.dtype))

    def _rates(self, level: Level) -> tuple[Array, Array]:
        schedule = self.process.schedule
        still = jnp.asarray(level.sigma == 0)
        time = jnp.where(still, self.process.end, level.time)
        linear = schedule.variance_rate(time) / jnp.where(still, 1.0, level.sigma**2)  # sigma' / sigma
        return linear, schedule.alpha_rate(time) - level.alpha * linear

    def _trace(self, push: Callable[[Array], Array], flat: Array, level: Level) -> Array:
        if self.key is None:
            return jnp.trace(jax.vmap(push)(jnp.eye(flat.size, dtype=flat.dtype)))
        probe = jax.random.rademacher(key_at(self.key, level), flat.shape, flat.dtype)
        return probe @ push(probe)

    condition = property(condition_within)
    evaluations = evaluations_within

    def check(self, t: Level) -> None:
        check_within(self, t)
        if np.ndim(t.time) > 1 or np.ndim(t.alpha) > 1:
            raise ValueError(f"density needs one level for the whole state, got alpha of shape {np.shape(t.alpha)}.")


def tangential(model: Any) -> Tangential:
    """Noise that leaves the log-density alone: standard normal draws without their part along the score.

    For the option ``noise`` of `diffjax.sample`, with `density` of the same eta as the solver.  One further call a row
    of ``model``, the denoiser, which `Sample.nfe` does not count.

    Devil is in the Details: Density Guidance for Detail-Aware Generation with Flow Models, arXiv:2502.05807.

    Raises ValueError for a denoiser that remembers.
    """
    if remembers(model):
        raise ValueError(f"tangential needs a denoiser that does not remember, got {model!r}.")
    return Tangential(as_value(model))


@value
class Tangential:
    model: Any
    factory = "tangential"

    def __call__(self, key: Array, index: Array, row: Row, x: Tree, draws: int) -> tuple[Tree, ...]:
        key = jax.random.fold_in(key, index)
        leaves, structure = jax.tree.flatten(x)
        keys = jax.random.split(key, draws * len(leaves)).reshape(draws, len(leaves))
        score = jax.tree.map(lambda clean, leaf: row.t.alpha * clean - leaf, self.model(x, row.t), x)
        square = dot(score, score)

        def draw(keys: Array) -> Tree:
            z = structure.unflatten(
                [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
            )
            along = jnp.where(square > 0, dot(z, score) / jnp.where(square > 0, square, 1.0), 0.0)
            return jax.tree.map(lambda a, s: (a - along * s).astype(a.dtype), z, score)

        return tuple(draw(keys[k]) for k in range(draws))


def score_alignment(flow: Callable[[Tree], Tree], start: Callable[[Tree], Tree], end: Callable[[Tree], Tree]) -> Any:
    """``x -> s_end(flow(x)) . d flow / dx s_start(x)``: whether scaling the noise scales the density of the sample.

    Where it is positive, a step along the score of the noise (towards 0, for a Gaussian prior) raises the log-density
    of the sample, which is why samples from noise of a smaller norm are smoother.

    Args:
        flow: from a state of noise to the sample, differentiable (`diffjax.sample` with an ODE solver).
        start, end: the scores of the two laws.

    Returns a function of the state of noise, to a scalar.

    Devil is in the Details: Density Guidance for Detail-Aware Generation with Flow Models, arXiv:2502.05807.
    """

    def alignment(x: Tree) -> Array:
        sample, moved = jax.jvp(flow, (x,), (start(x),))
        return dot(end(sample), moved)

    return alignment
