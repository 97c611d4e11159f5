"""Weighted stochastic differential equations: particles that follow a target's score, weighted by the one identity."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffjax.levels import UNSAVED, Array, Grid, Row, Sample, Tree, is_traced, root
from diffjax.samplers.sequential import check_arguments, entered, left, planned
from diffjax.samplers.shared import cast, inline, integer
from diffjax.smc.particles import (
    Choice,
    Place,
    Weighted,
    collapsed,
    drawn,
    effective_sizes,
    estimate,
    placed,
    resample,
    spread,
    start,
    threshold_checked,
)
from diffjax.smc.resampling import normalised, systematic
from diffjax.smc.steering import Steered, gained, improper, unbounded
from diffjax.smc.targets import Control, Local, Target
from diffjax.solvers.arguments import number
from diffjax.solvers.ddim import ddim


def weighted_sde(
    key: Array,
    target: Any,
    grid: Grid,
    shape: tuple[int, ...] | None = None,
    *,
    particles: int,
    x: Tree | None = None,
    dtype: Any = jnp.float32,
    eta: Array = 1.0,
    control: Control | None = None,
    resampler: Any = None,
    threshold: Array = 0.5,
    every: int = 1,
    mesh: Mesh | None = None,
    axis: str | None = None,
) -> Steered:
    """Particles with the drift ``(1 + eta^2) / 2 grad log p + c`` towards a `target`, and their weights.

    In ``y = x / alpha`` over ``u = (sigma / alpha)^2``: the mean of ``ddim(eta)`` for the clean estimate ``y + u (S + 2
    c / (1 + eta^2))`` with noise of variance ``eta^2 (u_t - u_s) rho_s / rho_t``, and ``d log w = g d(-u) + r d beta``
    by the trapezoidal rule in log u (in the last row, by its start), with g of `diffjax.smc.rates`.  Errors are of
    first order in the step.  Far above the data, products and annealing with weights that do not sum to 1 gain variance
    with every halving of sigma, the less so the larger eta: start no higher than need be.  Errors of order 1 / N come
    with a control, which is solved from the particles that it moves.

    A reward is finite and differentiable everywhere.  One of -inf ends the density at an edge, for which the identity
    has no term: particles that cross it would be lost, the more the smaller the steps (0.02 of 0.5 for y > 0).  So
    ``failed_at`` says where one was met; what is to be excluded is a potential or twist of `diffjax.steer`.

    Args:
        key, grid, shape, dtype, particles, resampler, threshold, every, mesh, axis: as for `diffjax.steer`.
        target: `annealed`, `guided`, `product`, `tilted`, `posterior`, or any `diffjax.smc.target`.
        x: replaces the start N(0, sigma^2 / sum_i w_i), which supposes that sigma / alpha is far above the data: N
            states from the target at the grid's first level; then ``log_z`` is relative to the target's integral there.
        eta: noise in units of the reverse SDE's, in (0, 1].  The weights' rate does not depend on it.
        control: `variance_controlled`, `energy_controlled`, or None.

    Feynman-Kac Correctors in Diffusion: Annealing, Guidance, and Product of Experts, arXiv:2503.02819;
    DriftLite: Lightweight Drift Control for Inference-Time Scaling of Diffusion Models, arXiv:2509.21655.

    Returns a `Steered`; ``log_z`` estimates the logarithm of ``integral prod_i q_i^{w_i} e^{beta r}`` at the end.
    Network evaluations: those of the target's models, a row and particle.

    Raises ValueError for a grid that starts at alpha = 0, eta outside (0, 1], and arguments that do not fit.
    """
    place = placed(particles, mesh, axis)
    if not isinstance(target, Target):
        raise ValueError(f"target must be one of diffjax.smc (annealed, guided, product, tilted, ..), got {target!r}.")
    number("eta", eta, 1e-6, 1.0)
    threshold_checked(threshold)
    integer("every", every, 1)
    solver = ddim(eta)
    one = None if x is None else jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], x)
    check_arguments(lambda x, level: x, solver, grid, shape, one, None, dtype)
    if grid.gaps or (not is_traced(grid.t) and np.any(np.asarray(grid.t.alpha[0]) == 0)):
        raise ValueError("weighted_sde needs a grid without gaps that starts where alpha > 0: end it before that.")
    plan = planned(target, solver, grid, None, None)
    prior_key, key = jax.random.split(key)
    keys = jax.vmap(lambda slot: jax.random.fold_in(prior_key, slot))(jnp.arange(particles))
    states = jax.vmap(lambda key, x: entered(key, plan, shape, x, dtype))(keys, x)
    rows = cast(plan.rows, states)
    if x is None:
        total = sum(target.weights)
        states = jax.tree.map(lambda leaf: (leaf / jnp.sqrt(total)).astype(leaf.dtype), states)
    resampler = systematic() if resampler is None else resampler
    if not callable(resampler):
        raise ValueError(f"resampler must choose ancestors (systematic(), ..), got {resampler!r}.")
    run = _run if inline((target, control, resampler), key, states, rows, target) else _compiled
    options = Options(place, every, x is None, mesh)
    found = run(options, target, control, resampler, solver, key, states, rows, threshold, eta)
    if grid.process.coordinates is None:
        return found
    last, zero = jax.tree.map(lambda leaf: leaf[-1], rows.s), jnp.zeros((), jnp.int32)
    leave = lambda x: left(Sample(x, zero, zero, zero, UNSAVED), grid.process, last).x
    return found._replace(x=jax.vmap(leave)(found.x))


class Options(NamedTuple):
    """The static arguments of the loop."""

    place: Place
    every: int
    prior: bool
    mesh: Mesh | None


class Look(NamedTuple):
    """One particle at the entry of a row: the target there, and the control's fields."""

    local: Local
    moves: Tree
    gains: Array
    gram: Array
    values: Array


class Carry(NamedTuple):
    x: Tree
    before: tuple[Array, Array]  # rho^2 g with the control, and r, at the entry of the row before
    theta: Array
    weighted: Weighted
    failed_at: Array


def _run(options: Options, *arguments: Any) -> Steered:
    target, control, resampler, solver, key, x, rows, threshold, eta = arguments
    outs = Steered(jax.tree.map(lambda _: True, x), *[False] * 8)
    body = lambda x, rest: _population(options, x, *rest)
    rest = (target, control, resampler, solver, key, rows, threshold, eta)
    return spread(body, options.mesh, options.place, x, rest, outs)


_compiled = jax.jit(_run, static_argnums=0)


def _population(options, x, target, control, resampler, solver, key, rows, threshold, eta) -> Steered:
    place, count = options.place, rows.t.time.shape[0]
    slots, kind = place.slots, jnp.result_type(*jax.tree.leaves(x))
    probes = jax.random.fold_in(key, place.count)

    def see(x: Tree, row: Row, index: Array) -> Look:
        def one(slot: Array, x: Tree) -> Look:
            probe = jax.random.fold_in(jax.random.fold_in(probes, index), slot)
            y = jax.tree.map(lambda leaf: leaf / row.t.alpha, x)
            local = target(y, row.t, probe)
            nothing = jnp.zeros((0,), kind)
            extra = ((), nothing, nothing, nothing)
            return Look(local, *(extra if control is None else control.read(target, y, row.t, local.score, probe)))

        return jax.vmap(one)(slots, x)

    def noise_of(row: Row) -> Array:
        """Of variance eta^2 (u_t - u_s) rho_s / rho_t, in x: half way from known data (ddim) to wide ones (Euler)."""
        wide = row.s.alpha * row.t.sigma / row.t.alpha
        return eta * root((wide**2 - row.s.sigma**2) * row.s.sigma / wide)

    def advance(x: Tree, look: Look, theta: Array, noise: Tree, row: Row) -> Tree:
        std = noise_of(row)

        def one(x: Tree, look: Look, z: Tree) -> Tree:
            extra = 2 / (1 + eta**2)
            pull = lambda leaf, s, c: (leaf + row.t.sigma * (s + extra * c)) / row.t.alpha
            x0 = jax.tree.map(pull, x, look.local.score, look.local.drift)
            for k, move in enumerate(look.moves):
                x0 = jax.tree.map(lambda leaf, b, k=k: leaf + extra * theta[k] * b, x0, move)
            mean, _ = solver.kernel(x, x0, row)
            return jax.tree.map(lambda m, z: (m + std * z).astype(m.dtype), mean, z)

        return jax.vmap(one)(x, look, noise)

    def body(carry: Carry, indexed: tuple[Array, Row, Array, Array, Array]) -> tuple[Carry, Choice]:
        index, row, h, change, growth = indexed
        look = see(carry.x, row, index)
        rate = look.local.rate + look.gains @ carry.theta
        # the row before, by the trapezoidal rule; at the start what the target has beside the prior
        passed = h * (carry.before[0] + rate) + 0.5 * change * (carry.before[1] + look.local.reward)
        begun = change * look.local.reward if options.prior else jnp.zeros_like(passed)
        gain = jnp.where(index == 0, begun, passed)
        weighted = gained(place, carry.weighted, gain)
        ended = unbounded(place, look.local.reward)
        theta = carry.theta
        if control is not None:
            whole = look.local.rate + growth * look.local.reward  # the rate with beta' r, which the loop adds apart
            everyone = place.everywhere((whole, look.gains, look.gram, look.values))
            theta = control.solve(normalised(weighted.log_weights), *everyone)
        (x, look), weighted, choice = resample(
            key, index, place, resampler, threshold, index % options.every == 0, weighted, (carry.x, look)
        )
        (noise,) = drawn(key, index, slots, x, 1)
        x = advance(x, look, theta, noise, row)
        wrong = improper(place, x, weighted) | ended
        failed_at = jnp.where((carry.failed_at < 0) & wrong, index, carry.failed_at)
        before = (look.local.rate + look.gains @ theta, look.local.reward)
        return Carry(x, before, theta, weighted, failed_at), choice

    zero, nothing = jnp.zeros((), jnp.int32), jnp.zeros(place.local, kind)
    width = jax.eval_shape(lambda: see(x, jax.tree.map(lambda leaf: leaf[0], rows), zero).gains).shape[-1]
    carry = Carry(x, (nothing, nothing), jnp.zeros(width, kind), start(place, kind), zero - 1)
    # of the row before: its length in half-log-SNR, and the change of beta, from 0 at the start
    lengths = jnp.concatenate([jnp.zeros(1, kind), jnp.asarray(rows.s.half_log_snr - rows.t.half_log_snr, kind)[:-1]])
    strength = jax.vmap(lambda level: jnp.asarray(target.strength(level), kind))
    betas = strength(jax.tree.map(jnp.asarray, rows.t))
    changes = jnp.diff(betas, prepend=0.0)
    last = jax.tree.map(lambda leaf: leaf[-1], rows)
    final = strength(jax.tree.map(lambda leaf: leaf[None], jax.tree.map(jnp.asarray, last.s)))
    share = 1 - ((last.s.sigma / last.s.alpha) / (last.t.sigma / last.t.alpha)) ** 2
    # rho^2 beta' over the row to come: what the change of beta is to a gain, divided by what rho^2 g is to it
    spans = jnp.append(2 * lengths[1:], share)
    growths = jnp.diff(betas, append=final) / jnp.where(spans > 0, spans, jnp.inf)
    indices = jnp.arange(count, dtype=jnp.int32)
    end, choices = jax.lax.scan(body, carry, (indices, rows, lengths, changes, growths))
    gain, ended = share * end.before[0], jnp.asarray(False)
    if target.reward is not None:
        reward = jax.vmap(lambda x: target.reward(jax.tree.map(lambda leaf: leaf / last.s.alpha, x)))(end.x)
        gain = gain + 0.5 * (final[0] - betas[-1]) * (end.before[1] + reward)
        ended = unbounded(place, reward)
    weighted = gained(place, end.weighted, gain)
    wrong = improper(place, end.x, weighted) | ended
    failed_at = jnp.where((end.failed_at < 0) & wrong, count, end.failed_at)
    ess = effective_sizes(choices, weighted)
    log_z = estimate(weighted) + (_start_integral(target, x, rows) if options.prior else 0.0)
    each = jax.vmap(lambda level: jnp.asarray(target.evaluations(level), jnp.int32))(jax.tree.map(jnp.asarray, rows.t))
    nfe = place.count * jnp.sum(jnp.broadcast_to(each, (count,)))
    return Steered(
        end.x, weighted.log_weights, log_z, ess, choices.resampled, choices.ancestors, nfe, failed_at, collapsed(ess)
    )


def _start_integral(target: Target, x: Tree, rows: Row) -> Array:
    """The logarithm of the integral of ``prod_i N(y; 0, u)^{w_i}``, over all entries of one state."""
    total = sum(target.weights)
    u = (rows.t.sigma[0] / rows.t.alpha[0]) ** 2
    each = lambda leaf: jnp.sum(
        jnp.broadcast_to(0.5 * ((1 - total) * jnp.log(2 * jnp.pi * u) - jnp.log(total)), leaf.shape[1:])
    )
    return sum(each(leaf) for leaf in jax.tree.leaves(x))
