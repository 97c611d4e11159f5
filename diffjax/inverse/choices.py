"""What to measure next: active selection by the spread of posterior particles, and bandits by posterior draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from diffjax.corrections.transform import check_within, condition_within, evaluations
from diffjax.guidance.tilted import tilted
from diffjax.inverse.measurement import measurement
from diffjax.inverse.operators import diagonal, shapes
from diffjax.inverse.twists import mmps
from diffjax.levels import CLEAN, Array, Grid, Solver, Tree, all_finite, as_value, value
from diffjax.samplers.sequential import drawn_noise, planned
from diffjax.samplers.shared import advance, take
from diffjax.solvers.arguments import number


def predicted_entropy(predicted: Array, std: Array) -> Array:
    """How much particles disagree about every measurement, in nats up to a constant.

        H_m = - mean_i log mean_j exp(-(y_im - y_jm)^2 / (2 std^2)),

    an approximation of the entropy of the mixture of N(y_i, std^2 / 2); 0 where all agree, log P where all are far.

    Args:
        predicted: (P, ...) of P particles.
        std: above 0; large ones tell far particles apart.

    Active Diffusion Subsampling, arXiv:2406.14388, section 4.

    >>> predicted_entropy(jnp.array([[0.0, 9.0], [0.0, -9.0]]), 1.0)  # log 2
    Array([-0.       ,  0.6931472], dtype=float32)
    """
    number("std", std, 1e-12)
    gaps = predicted[:, None] - predicted[None]
    alike = jax.nn.logsumexp(-0.5 * (gaps / std) ** 2, axis=1) - np.log(len(predicted))
    return -jnp.mean(alike, axis=0)


class Acquired(NamedTuple):
    """What an active run gives back."""

    x: Tree  # (P, ...) posterior particles
    order: Array  # (K,) int32: the entries in the order in which they were measured
    seen: Tree  # of one sample's shape: 1 where measured
    nfe: Array
    failed_at: Array


def active(
    key: Array,
    denoise: Any,
    solver: Solver,
    grid: Grid,
    reveal: Callable[[Array], Array],
    shape: Any,
    *,
    std: Array,
    at: tuple[int, ...],
    particles: int = 8,
    spread: Array | None = None,
    twist: Callable[..., Any] = mmps,
    dtype: Any = jnp.float32,
) -> Acquired:
    """Particles of the posterior that choose, while they are drawn, which entry of x is measured next.

    Before the steps ``at`` the entry of the largest `predicted_entropy` among those not yet measured is; the steps are
    those of the denoiser tilted by what is known so far.  What is measured late moves the particles only as far as
    the noise that is left allows: their law is the posterior's for acquisitions early on the path.

    Args:
        denoise: that does not remember.
        solver, grid: as for `diffjax.sample`; particles start from the prior.
        reveal: ``index -> y``, the noisy value of the entry with this index in the flattened sample (traced).
        shape: of one sample, or a tree of shapes: its entries are numbered as `jax.flatten_util.ravel_pytree` does.
        std: of the measurement's noise, above 0.
        at: the steps of the grid, from 0 and rising: one acquisition each.
        spread: of the entropy's kernel; default std.
        twist: from a `measurement` of `diagonal`, whose unseen entries are 0.

    Returns `Acquired`; the denoiser calls are ``particles (solver.calls N + K)``.

    Under a process with coordinates the entries, as all that is given and returned, are of data; the denoiser is of the
    standard state.

    Active Diffusion Subsampling, arXiv:2406.14388.

    Raises ValueError for steps that do not fit, and more acquisitions than entries.
    """
    number("std", std, 1e-12)
    process, inside = grid.process, shapes(shape)
    rising, size = np.asarray(at, np.int64), inside.entries
    if not 1 <= len(at) <= size or min(at) < 0 or max(at) >= len(grid) or np.any(np.diff(rising) <= 0):
        raise ValueError(f"at must rise, from 0 to below {len(grid)}, with at most {size} steps, got {at!r}.")
    if particles < 2:
        raise ValueError(f"particles must be at least 2, got {particles!r}.")
    spread = std if spread is None else spread
    denoise = as_value(denoise)
    plan = planned(denoise, solver, grid, None, None)
    solver, rows = plan.solver, jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), plan.rows)
    count = rows.t.time.shape[0]
    acquire = np.zeros(count, bool)
    acquire[rising + (count - len(grid))] = True  # rows for starting up stand before the steps
    keys = jax.random.split(key, (particles, 2))
    first = take(rows.t, 0)
    x = jax.vmap(lambda k: process.standard_prior(k, shape, dtype, first))(keys[:, 0])

    unravel = ravel_pytree(inside.zeros(dtype))[1]

    def known(weights: Array, y: Array) -> Any:
        seen = measurement(diagonal(unravel(weights)), unravel(y), std)
        return tilted(denoise, twist(seen.under(process)))

    def choose(x: Tree, weights: Array, y: Array, level: Any) -> tuple[Array, Array, Array]:
        clean = jax.vmap(lambda x: ravel_pytree(process.leave(known(weights, y)(x, level), CLEAN))[0])(x)
        entropy = jnp.where(weights > 0, -jnp.inf, predicted_entropy(clean, spread))
        index = jnp.argmax(entropy).astype(jnp.int32)
        return weights.at[index].set(1.0), y.at[index].set(jnp.asarray(reveal(index), y.dtype)), index

    def body(carry: tuple, given: tuple) -> tuple:
        x, memory, weights, y, failed, nfe = carry
        index, row, now = given
        idle = lambda: (weights, y, jnp.full((), -1, jnp.int32))
        weights, y, chosen = jax.lax.cond(now, lambda: choose(x, weights, y, row.t), idle)
        guided = known(weights, y)

        def step(key: Array, x: Array, memory: Any) -> tuple:
            return advance(guided, solver, drawn_noise(None, key, index, row, x, solver.draws), x, memory, row)

        x, memory, _, spent = jax.vmap(step)(keys[:, 1], x, memory)
        failed = jnp.where((failed < 0) & ~all_finite(x), index, failed)
        nfe = nfe + jnp.sum(spent, dtype=jnp.int32) + particles * now.astype(jnp.int32)
        return (x, memory, weights, y, failed, nfe), chosen

    zero, blank = jnp.zeros((), jnp.int32), jnp.zeros(size, dtype)
    carry = x, jax.vmap(solver.init)(x), blank, blank, zero - 1, zero
    given = jnp.arange(count, dtype=jnp.int32), rows, jnp.asarray(acquire)
    (x, _, weights, _, failed, nfe), chosen = jax.lax.scan(body, carry, given)
    last = take(rows.s, -1)
    x = jax.vmap(lambda x: process.leave(x, last))(x)
    return Acquired(x, chosen[np.flatnonzero(acquire)], unravel(weights), nfe, failed)


class Bandit(NamedTuple):
    """What was pulled, and what came."""

    arms: Array  # (T,) int32
    rewards: Array  # (T,)


def thompson(
    key: Array,
    draw: Callable[[Array, Any], Array],
    pull: Callable[[Array, Array], Array],
    arms: int,
    rounds: int,
    *,
    std: Array,
) -> Bandit:
    """Thompson sampling with a diffusion prior over the arms' mean rewards.

    A round draws means from their posterior given all rewards so far and pulls the arm whose mean is the largest.  What
    n_a rewards of sum r_a tell about the mean of arm a is the measurement ``r_a / n_a`` with noise ``std / sqrt(n_a)``.

    Args:
        draw: ``(key, measurement) -> means`` (arms,): any sampler of posteriors; the measurement is of a `diagonal`,
            with the weight sqrt(n_a) / std and noise 1, so that arms not yet pulled tell nothing.
        pull: ``(key, arm) -> reward``.
        std: of the rewards, above 0.

    Returns `Bandit`; one draw a round.

    Thompson Sampling with Diffusion Generative Prior, arXiv:2301.05182; draws of the posterior are those
    of any method here (the paper's own is `mixed_observation`).

    Raises ValueError for arms or rounds below 1 and std not above 0.
    """
    number("std", std, 1e-12)
    if arms < 1 or rounds < 1:
        raise ValueError(f"need arms >= 1 and rounds >= 1, got {arms!r} and {rounds!r}.")

    def body(carry: tuple, key: Array) -> tuple:
        counts, sums = carry
        first, second = jax.random.split(key)
        root = jnp.sqrt(counts)
        y = jnp.where(counts > 0, sums / (jnp.where(counts > 0, root, 1.0) * std), 0.0)
        means = draw(first, measurement(diagonal(root / std), y, 1.0))
        arm = jnp.argmax(means).astype(jnp.int32)
        reward = jnp.asarray(pull(second, arm), sums.dtype)
        return (counts.at[arm].add(1.0), sums.at[arm].add(reward)), (arm, reward)

    blank = jnp.zeros((arms,))
    return Bandit(*jax.lax.scan(body, (blank, blank), jax.random.split(key, rounds))[1])


def mixed_observation(denoise: Any, seen: Any, variance: Any) -> MixedObservation:
    """The denoiser whose estimate is mixed with direct observations of entries, by their precisions.

        x0' = (x0 / v(level) + w y / s^2) / (1 / v(level) + w^2 / s^2),     y = w x_0 + s z,

    v the variance of the prediction's error, to be measured on the prior's own samples.  Exact where the errors of the
    entries are independent: a prior without correlations; otherwise what is seen of one entry tells nothing about the
    others but through the next steps (`mmps` knows).  One call and no derivative.

    Args:
        denoise: that does not remember.
        seen: a measurement of a `diagonal` with Gaussian noise.
        variance: ``level -> v``, a number or a tree like the sample, above 0 where sigma > 0.

    Thompson Sampling with Diffusion Generative Prior, arXiv:2301.05182, as an estimate of x_0 (the paper
    mixes the next state, with the observation noised by the predicted noise: the same up to the step's own variance).

    Raises ValueError for another operator than `diagonal`.
    """
    if not hasattr(seen.operator, "weights"):
        raise ValueError(f"mixed_observation needs a measurement of a diagonal, got {seen.operator!r}.")
    return MixedObservation(as_value(denoise), seen, as_value(variance))


@value
class MixedObservation:
    denoise: Any
    seen: Any
    variance: Any
    factory = "mixed_observation"
    condition = property(condition_within)
    check = check_within

    def __call__(self, x: Any, level: Any) -> Any:
        x0 = self.denoise(x, level)
        v = self.variance(level)
        residual, noise = self.seen.residual(x0), self.seen.variance(x0)
        if jax.tree.structure(v) != jax.tree.structure(x0):
            v = jax.tree.map(lambda leaf: v, x0)

        def mix(clean: Array, v: Array, w: Array, r: Array, s: Array) -> Array:
            total = s + v * w**2
            return (clean + v * w * r / jnp.where(total > 0, total, 1.0)).astype(clean.dtype)

        return jax.tree.map(mix, x0, v, self.seen.operator.weights, residual, noise)

    def evaluations(self, level: Any) -> Any:
        return evaluations(self.denoise, level)
