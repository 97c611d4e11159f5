"""Sequential Monte Carlo over any stochastic solver: particles that follow a sampler and are weighted and resampled.

The solver's rows are a Markov chain p(x_s | x_t); the target is its law times h(x_0).  Row by row, with G the
potential, q the proposal and w the weights since the last resampling,

    w <- w G(x_t);   if few are effective: resample, Z <- Z mean(w), w <- 1;   x_s ~ q, w <- w p(x_s|x_t) / q(x_s|x_t)

and at the end ``w <- w h(x_0) / (the product of all G)``, so that ``Z mean(w)`` is an unbiased estimate of E[h(x_0)],
the particles with their weights are a consistent one of p(x_0) h(x_0) / Z, and neither is clamped or centred.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

from diffjax.corrections import transform
from diffjax.guidance.tilted import shifted_estimate, twist_gradient
from diffjax.levels import (
    CLEAN,
    UNSAVED,
    Array,
    Grid,
    Level,
    Row,
    Sample,
    Solver,
    Tree,
    all_finite,
    as_value,
    dot,
    is_traced,
    remembers,
    value,
)
from diffjax.samplers.sequential import (
    Counter,
    check_arguments,
    entered,
    initial_evaluations,
    left,
    planned,
    refuse_of_data,
    size,
)
from diffjax.samplers.shared import cast, inline, integer
from diffjax.smc.particles import (
    EARLY,
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
from diffjax.smc.resampling import systematic
from diffjax.smc.twists import Difference, difference, owed
from diffjax.solvers.arguments import choice

PROPOSALS = ("tilted", "base")
INITIALS = ("prior", "twisted")


class Steered(NamedTuple):
    """N weighted particles.

    ``log_weights`` (N,) since the last resampling, unnormalised: averages over the particles are to be weighted by
    them (`diffjax.smc.normalised`), or the particles resampled once more.  ``log_z``: of the estimate of E[h(x_0)].
    ``ess`` (rows + 1,) effective sizes before resampling in each row, and at the end; ``resampled`` (rows,);
    ``ancestry`` (rows, N), whose place each took (`diffjax.smc.lineage`).  ``nfe`` network evaluations of all particles
    together; ``failed_at`` the first row that left a state or weight that is not a number, ``collapsed_at`` the first
    at which all weights were zero, or -1; the number of rows: after the last.
    """

    x: Tree
    log_weights: Array
    log_z: Array
    ess: Array
    resampled: Array
    ancestry: Array
    nfe: Array
    failed_at: Array
    collapsed_at: Array


def steer(
    key: Array,
    denoise: Any,
    solver: Solver,
    grid: Grid,
    shape: tuple[int, ...] | None = None,
    *,
    particles: int,
    x: Tree | None = None,
    dtype: Any = jnp.float32,
    twist: Any = None,
    potential: Any = None,
    proposal: Any = "tilted",
    scale: Array = 1.0,
    resampler: Any = None,
    threshold: Array = 0.5,
    every: int = 1,
    initial: str = "prior",
    final_denoise: bool = False,
    mesh: Mesh | None = None,
    axis: str | None = None,
) -> Steered:
    """Steer ``particles`` samples of a stochastic solver towards ``p(x_0) h(x_0)``, with exact weights.

    One row is ``w <- w G(x_t)``, resampling if ``(sum w)^2 / sum w^2 < threshold N``, ``x_s ~ q`` and
    ``w <- w p(x_s | x_t) / q(x_s | x_t)``; see the module.  Independent populations come from `jax.vmap` over keys.

    Args:
        key, denoise, solver, grid, shape, dtype: as for `diffjax.sample`; denoisers that remember are fine, their
            memory, and the solver's, goes where the particle goes.
        particles: N, at least 1.
        x: replaces the prior: N states, along a leading axis, at the grid's first level.
        twist: ``(denoise, x, level) -> (log_h, x0)``, see `diffjax.smc.twists`; None is h = 1.
        potential: `diffjax.smc.difference` (default), `maximum`, `total`.
        proposal: "tilted": the solver's step with the clean estimate ``x0 + scale sigma^2 / alpha grad_x log h``
            (where alpha = 0: x0); "base": the solver's own step, which needs no gradient; another denoiser, as a
            guided one; or a *filter*, which draws the next state from the solver's Gaussian times a potential of its
            own (`diffjax.inverse.conjugate`, ``mcgdiff``, ``fps``; see `looked_ahead`).  Where a step adds no noise, as
            the last one, it is always the solver's own.
        scale: of the tilt.  It changes the variance of the weights only.
        resampler: `diffjax.smc.systematic` (default), `multinomial`, `stratified`, `residual`, `ssp`; with gradients
            `scored`, `transported`.
        threshold: of the effective size over N below which particles are resampled: 0 never (importance sampling),
            np.inf in every row.
        every: rows from one time that particles may be resampled to the next.  With "base" the twist is looked at in
            these rows only.
        initial: "prior", or "twisted" if the given ``x`` follow the prior times h already: then
            ``log_z`` is relative to that law's.
        final_denoise: replace the result by the clean estimate there, for grids that end at sigma > 0; else the target
            is the law at the last level times h there.
        mesh, axis: spread the particles over the devices along an axis of a mesh.  They are resampled across devices;
            for that all of them are on every device for a moment.  The result does not depend on it, but for rounding.

    Practical and Asymptotically Exact Conditional Sampling in Diffusion Models, arXiv:2306.17775, is this
    with a twist ``p(y | x0(x_t))``.

    Returns a `Steered`.  Denoiser calls: one a row and particle (none to sigma = 0), one more with a proposal of its
    own; solvers of several calls make theirs beside the twist's.

    Raises ValueError for a deterministic solver (the copies of a particle would never part), a proposal for a solver
    without a ``kernel``, and arguments that do not fit.
    """
    place = placed(particles, mesh, axis)
    one = None if x is None else jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], _counted(x, particles))
    check_arguments(denoise, solver, grid, shape, one, None, dtype)
    potential = difference() if potential is None else potential
    resampler = systematic() if resampler is None else resampler
    threshold_checked(threshold)
    integer("every", every, 1)
    choice("initial", initial, INITIALS)
    if initial == "twisted" and (x is None or twist is None or not potential.telescopes):
        raise ValueError(f"initial='twisted' needs x, a twist and difference(), got x={x!r}, {twist!r}, {potential!r}.")
    if isinstance(proposal, str):
        choice("proposal", proposal, PROPOSALS)
    filter_: Any = proposal if hasattr(proposal, "ahead") else None
    other = None if isinstance(proposal, str) or filter_ is not None else proposal
    tilt = twist is not None and isinstance(proposal, str) and proposal == "tilted"
    plan = planned(denoise, solver, grid, None, None)
    _check(denoise, plan.solver, other, tilt, twist, resampler, potential, filter_)
    refuse_of_data(grid.process, twist, other, filter_)
    denoise, twist, other = as_value(denoise), as_value(twist), as_value(other)
    for part in (other, twist, filter_):
        if part is not None and hasattr(part, "check"):
            part.check(plan.rows.t)
    prior_key, key = jax.random.split(key)
    keys = jax.vmap(lambda slot: jax.random.fold_in(prior_key, slot))(jnp.arange(particles))
    states = jax.vmap(lambda key, x: entered(key, plan, shape, x, dtype))(keys, x)
    rows = cast(plan.rows, states)
    last = jax.tree.map(lambda leaf: leaf[-1], rows.s)
    ends = not is_traced(last.sigma) and bool(np.all(np.asarray(last.sigma) == 0))
    models = Models(denoise, twist, potential, other, scale, resampler, plan.solver, filter_)
    options = Options(place, every, tilt, initial == "twisted", final_denoise and not ends, ends, mesh)
    run = _run if inline((models,), key, states, rows, models) else _compiled
    found = run(options, models, key, states, rows, threshold)
    if grid.process.coordinates is None:
        return found
    level, zero = CLEAN if options.denoised else last, jnp.zeros((), jnp.int32)
    leave = lambda x: left(Sample(x, zero, zero, zero, UNSAVED), grid.process, level).x
    return found._replace(x=jax.vmap(leave)(found.x))


class Options(NamedTuple):
    """The static arguments of the loop."""

    place: Place
    every: int
    tilt: bool
    twisted: bool  # the particles start from the prior times h
    denoised: bool
    ends: bool  # at sigma = 0, known before the loop
    mesh: Mesh | None


@value
class Models:
    denoise: Any
    twist: Any
    potential: Any
    proposal: Any
    scale: Array
    resampler: Any
    solver: Any
    filter: Any


class Seen(NamedTuple):
    """What a look at one particle tells."""

    log_h: Array
    x0: Tree  # the model's own clean estimate
    proposed: Tree  # the proposal's, or ()


class Particle(NamedTuple):
    """What goes where a particle goes."""

    x: Tree
    solver: Tree
    denoiser: Tree
    proposal: Tree
    paid: Array  # the logarithm of the product of the potentials so far
    potential: Array


class Carry(NamedTuple):
    particles: Particle  # leading axis: those here
    weighted: Weighted
    nfe: Array
    failed_at: Array


def called(denoise: Any, x: Tree, level: Level, memory: Tree) -> tuple[Tree, Tree]:
    """``(x0, memory)`` of any denoiser, in the dtype of the state."""
    x0, memory = denoise.apply(x, level, memory) if remembers(denoise) else (denoise(x, level), memory)
    expected, found = (jax.tree.map(jnp.shape, tree) for tree in (x, x0))
    if expected != found:
        raise ValueError(f"denoise returned shape {found} for a state of shape {expected}; they must be equal.")
    return jax.tree.map(lambda leaf, like: jnp.asarray(leaf, jnp.result_type(like)), x0, x), memory


def costs(denoise: Any, level: Level, memory: Tree, count: int) -> Array:
    """Network evaluations of one call for each of ``count`` particles, together; ``memory`` is what the calls left."""
    if not remembers(denoise):
        return count * jnp.asarray(transform.evaluations(denoise, level), jnp.int32)
    one = lambda memory: jnp.asarray(transform.spent(denoise, level, memory), jnp.int32)
    return jnp.sum(jax.vmap(one, axis_size=count)(memory), dtype=jnp.int32)


def look(models: Models, tilt: bool, x: Tree, level: Level, memory: Tree, proposal: Tree) -> tuple[Seen, Tree, Tree]:
    """The twist, the clean estimates and the memories after the calls, of one particle."""
    kind = jnp.result_type(*jax.tree.leaves(x))
    plain = lambda x, level: called(models.denoise, x, level, memory)[0]
    after = called(models.denoise, x, level, memory)[1] if remembers(models.denoise) else memory
    proposed = ()
    if models.twist is None:
        log_h, x0 = jnp.zeros((), kind), plain(x, level)
    elif not tilt:
        log_h, x0 = models.twist(plain, x, level)
    else:
        log_h, x0, slope = twist_gradient(plain, models.twist, x, level)
        proposed = shifted_estimate(x0, slope, level, models.scale)
    if models.proposal is not None:
        proposed, proposal = called(models.proposal, x, level, proposal)
    return Seen(jnp.asarray(log_h, kind), x0, proposed), after, proposal


def _run(options: Options, models: Models, key: Array, x: Tree, rows: Row, threshold: Array) -> Steered:
    outs = Steered(jax.tree.map(lambda _: True, x), *[False] * 8)
    body = lambda x, rest: _population(options, x, *rest)
    return spread(body, options.mesh, options.place, x, (models, key, rows, threshold), outs)


_compiled = jax.jit(_run, static_argnums=0)


def _population(options: Options, x: Tree, models: Models, key: Array, rows: Row, threshold: Array) -> Steered:
    place, solver, potential = options.place, models.solver, models.potential
    slots, count = place.slots, rows.t.time.shape[0]
    kind = jnp.result_type(*jax.tree.leaves(x))
    nothing, zero = jnp.zeros(place.local, kind), jnp.zeros((), jnp.int32)
    filtered = models.filter is not None
    proposes = options.tilt or models.proposal is not None
    one_call = proposes or filtered or hasattr(solver, "update")
    memory = lambda denoise: jax.vmap(denoise.init)(x) if remembers(denoise) else ()
    fixed, plan, paid = (), (), nothing
    if filtered:
        one = jax.tree.map(lambda leaf: leaf[0], x)
        fixed, plan = models.filter.plan(one, rows)
        paid = jnp.full_like(nothing, models.filter.start(one))
    particles = Particle(
        x, jax.vmap(solver.init)(x), memory(models.denoise), memory(models.proposal), paid, potential.init(nothing)
    )
    indices = jnp.arange(count, dtype=jnp.int32)
    early = count * solver.draws * size(x) <= EARLY
    noises = jax.vmap(lambda index: drawn(key, index, slots, x, solver.draws))(indices) if early else None
    looks = models.twist is not None or one_call

    def see(particles: Particle, level: Level) -> tuple[Particle, Seen]:
        seen, after, proposal = jax.vmap(lambda *parts: look(models, options.tilt, parts[0], level, *parts[1:]))(
            particles.x, particles.denoiser, particles.proposal
        )
        seen = seen if one_call else seen._replace(x0=())
        return particles._replace(denoiser=after, proposal=proposal), seen

    def judge(particles: Particle, index: Array, level: Level) -> tuple[Particle, Seen, Array, Array]:
        """The look at all particles, and the potential: what their weights gain, and the evaluations of all here."""
        if not looks:
            return particles, Seen(nothing, (), ()), nothing, zero
        particles, seen = see(particles, level)
        gain, memory = potential.step(seen.log_h, particles.paid, particles.potential)
        if options.twisted:
            gain = jnp.where(index == 0, 0.0, gain)
            paid = jnp.where(index == 0, seen.log_h, particles.paid + gain)
        else:
            paid = particles.paid + gain
        own = getattr(models.twist, "evaluations", None)
        if own is None:
            cost = costs(models.denoise, level, particles.denoiser, place.local)
        else:
            cost = place.local * jnp.asarray(own(models.denoise, level), jnp.int32)
        if models.proposal is not None:
            cost = cost + costs(models.proposal, level, particles.proposal, place.local)
        return particles._replace(paid=paid, potential=memory), seen, gain, cost

    def pass_by(particles: Particle, index: Array, level: Level) -> tuple[Particle, Seen, Array, Array]:
        """A row in which particles are not judged."""
        if not one_call:
            return particles, Seen(nothing, (), ()), nothing, zero
        x0, after = jax.vmap(lambda x, memory: called(models.denoise, x, level, memory))(
            particles.x, particles.denoiser
        )
        seen = Seen(nothing, x0, ())
        cost = costs(models.denoise, level, after, place.local)
        return particles._replace(denoiser=after), seen, nothing, cost

    def advance(particles: Particle, seen: Seen, noise: tuple[Tree, ...], row: Row) -> tuple[Particle, Array, Array]:
        if proposes:
            x, gain = jax.vmap(lambda z, x, seen: proposed(solver, z[0], x, seen, row))(noise, particles.x, seen)
            return particles._replace(x=x), gain, zero
        if one_call:
            x, memory = jax.vmap(lambda *parts: solver.update(*parts, row))(
                noise, particles.x, seen.x0, particles.solver
            )
            return particles._replace(x=x, solver=memory), nothing, zero

        def step(noise: Tree, x: Tree, memory: Tree, denoiser: Tree) -> tuple[Tree, Tree, Tree, Array]:
            counter = Counter(models.denoise, denoiser, zero)
            x, memory, _ = solver.step(noise, counter, x, memory, row)
            return x, memory, counter.memory, counter.nfe

        x, memory, denoiser, nfe = jax.vmap(step)(noise, particles.x, particles.solver, particles.denoiser)
        return particles._replace(x=x, solver=memory, denoiser=denoiser), nothing, jnp.sum(nfe, dtype=jnp.int32)

    def body(carry: Carry, indexed: tuple[Array, Row, Tree, Tree]) -> tuple[Carry, Choice]:
        index, row, noise, own = indexed
        scheduled = index % options.every == 0
        if filtered:
            particles, seen, _, cost = pass_by(carry.particles, index, row.t)
            particles, gain = looked_ahead(models, particles, seen, row, (fixed, own))
        elif options.every == 1 or proposes or not looks:
            particles, seen, gain, cost = judge(carry.particles, index, row.t)
        else:
            particles, seen, gain, cost = jax.lax.cond(scheduled, judge, pass_by, carry.particles, index, row.t)
        weighted = gained(place, carry.weighted, gain)

        def transport(resampler: Any, log_weights: Array, both: tuple[Particle, Seen]) -> tuple[Any, Array]:
            moved, ancestors = transported_states(place, resampler, log_weights, both[0])
            moved, seen = see(moved, row.t)
            return (moved._replace(paid=seen.log_h), seen), ancestors

        (particles, seen), weighted, choice = resample(
            key, index, place, models.resampler, threshold, scheduled, weighted, (particles, seen), transport
        )
        if hasattr(models.resampler, "matrix"):
            cost = cost + jnp.where(choice.resampled, costs(models.denoise, row.t, (), place.local), 0)
        noise = drawn(key, index, slots, particles.x, solver.draws) if noise is None else noise
        if filtered:
            particles, gain, more = filtered_step(models, particles, seen, noise, row, (fixed, own)), nothing, zero
        else:
            particles, gain, more = advance(particles, seen, noise, row)
        weighted = gained(place, weighted, gain) if proposes else weighted
        wrong = improper(place, particles.x, weighted)
        failed_at = jnp.where((carry.failed_at < 0) & wrong, index, carry.failed_at)
        return Carry(particles, weighted, carry.nfe + cost + more, failed_at), choice

    carry = Carry(particles, start(place, kind), zero, zero - 1)
    end, choices = jax.lax.scan(body, carry, (indices, rows, noises, plan))
    last = jax.tree.map(lambda leaf: leaf[-1], rows.s)
    before = last if options.denoised else jax.tree.map(lambda leaf: leaf[-1], rows.t)
    result, log_h, cost = _finish(options, models, end.particles, last, before)
    weighted = gained(place, end.weighted, owed(log_h, end.particles.paid))
    failed_at = jnp.where((end.failed_at < 0) & improper(place, result, weighted), count, end.failed_at)
    first = 0 if not remembers(models.denoise) else initial_evaluations(models.denoise)
    ess = effective_sizes(choices, weighted)
    return Steered(
        result,
        weighted.log_weights,
        estimate(weighted),
        ess,
        choices.resampled,
        choices.ancestors,
        place.total(end.nfe + cost + place.local * first),
        failed_at,
        collapsed(ess),
    )


def _finish(
    options: Options, models: Models, particles: Particle, last: Level, before: Level
) -> tuple[Tree, Array, Array]:
    """The particles as they are returned, log h there and the evaluations of all here."""
    local = particles.paid.shape[0]
    x, cost = particles.x, jnp.zeros((), jnp.int32)
    if options.denoised:
        x, after = jax.vmap(lambda x, memory: called(models.denoise, x, last, memory))(x, particles.denoiser)
        cost, last = costs(models.denoise, last, after, local), jax.tree.map(jnp.asarray, CLEAN)
    if models.twist is None:
        return x, jnp.zeros_like(particles.paid), cost
    if options.denoised or options.ends:  # x0 = x / alpha is known without a call
        if hasattr(models.twist, "settle"):  # the estimates that were made at the level before, and what is known
            clean = jax.tree.map(lambda leaf: leaf / last.alpha, x)
            filled, log_h = jax.vmap(lambda x: models.twist.settle(x, before))(clean)
            x = jax.tree.map(lambda new, old: (last.alpha * new).astype(old.dtype), filled, x)
            return x, log_h.astype(particles.paid.dtype), cost
        known = lambda x, level: jax.tree.map(lambda leaf: (leaf / level.alpha).astype(leaf.dtype), x)
        log_h = jax.vmap(lambda x: models.twist(known, x, last)[0])(x)
        return x, log_h.astype(particles.paid.dtype), cost
    models = dataclasses.replace(models, proposal=None)
    seen, after, _ = jax.vmap(lambda x, memory: look(models, False, x, last, memory, ()))(x, particles.denoiser)
    return x, seen.log_h, costs(models.denoise, last, after, local)


def proposed(solver: Any, noise: Tree, x: Tree, seen: Seen, row: Row) -> tuple[Tree, Array]:
    """A step drawn around the proposal's mean, and ``log p / q`` of it: ``-<d, z> - |d|^2 / 2``, d = shift / std."""
    mean, std = solver.kernel(x, seen.x0, row)
    centre, _ = solver.kernel(x, seen.proposed, row)
    silent = std == 0  # there the solver's own step is taken
    shift = jax.tree.map(lambda c, m: jnp.where(silent, 0.0, (c - m) / jnp.where(silent, 1.0, std)), centre, mean)
    new = jax.tree.map(lambda c, m, z: (jnp.where(silent, m, c) + std * z).astype(m.dtype), centre, mean, noise)
    return new, -dot(shift, noise) - 0.5 * dot(shift, shift)


def looked_ahead(models: Models, particles: Particle, seen: Seen, row: Row, own: Tree) -> tuple[Particle, Array]:
    """What the weights gain before a filter's step, so that who is going to do well is known before resampling.

    A filter replaces a step N(mean, std^2 I) of the solver by the conjugate ``N(mean, std^2 I) g(x_s) / Z`` with a
    potential g of its own.  ``plan(x, rows)`` is what it knows of all rows, and of each; ``start(x)`` is minus the
    log-weight that all particles begin with; ``ahead(mean, std, row, own)`` is log Z, a function of x_t alone; and
    ``draw(noise, mean, std, row, own) -> (x_s, owed)`` makes the step, ``owed`` the logarithm of as much of g(x_s) as
    only leads the way and is given back in the next row.  What is never given back is the target.
    """

    def one(x: Tree, x0: Tree) -> Array:
        return models.filter.ahead(*models.solver.kernel(x, x0, row), row, own)

    gain = owed(jax.vmap(one)(particles.x, seen.x0), particles.paid)
    return particles._replace(paid=jnp.zeros_like(particles.paid)), gain.astype(particles.paid.dtype)


def filtered_step(
    models: Models, particles: Particle, seen: Seen, noise: tuple[Tree, ...], row: Row, own: Tree
) -> Particle:
    """The step of a filter."""

    def one(noise: Tree, x: Tree, x0: Tree) -> tuple[Tree, Array]:
        return models.filter.draw(noise, *models.solver.kernel(x, x0, row), row, own)

    x, later = jax.vmap(one)(noise[0], particles.x, seen.x0)
    return particles._replace(x=x, paid=later.astype(particles.paid.dtype))


def gained(place: Place, weighted: Weighted, gain: Array) -> Weighted:
    """The weights after the particles here have gained this much."""
    return weighted._replace(log_weights=weighted.log_weights + place.everywhere(gain))


def improper(place: Place, x: Tree, weighted: Weighted) -> Array:
    """Whether a state is not finite or a weight not a number."""
    weights = jnp.isnan(weighted.log_weights) | (weighted.log_weights == jnp.inf)
    return (place.total((~all_finite(x)).astype(jnp.int32)) > 0) | jnp.any(weights)


def unbounded(place: Place, values: Array) -> Array:
    """Whether the particles' values, rewards or log-densities, are not all finite."""
    return place.total(jnp.any(~jnp.isfinite(values)).astype(jnp.int32)) > 0


def transported_states(place: Place, resampler: Any, log_weights: Array, particles: Particle) -> tuple[Particle, Array]:
    """The particles moved by a resampler's matrix, state and the solver's memory, and who gave most to each place."""
    flat = jax.vmap(lambda x: ravel_pytree(x)[0])(particles.x)
    matrix = resampler.matrix(log_weights, place.everywhere(flat))
    mine = place.here(matrix)
    mix = lambda leaf: jnp.tensordot(mine, place.everywhere(leaf), 1).astype(leaf.dtype)
    moved = particles._replace(x=jax.tree.map(mix, particles.x), solver=jax.tree.map(mix, particles.solver))
    return moved, jnp.argmax(matrix, axis=1).astype(jnp.int32)


def _counted(x: Tree, particles: int) -> Tree:
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(x)}
    if sizes != {(particles,)}:
        raise ValueError(f"x must hold {particles} particles along a leading axis, got leading axes {sizes}.")
    return x


def _check(
    denoise: Any,
    solver: Any,
    other: Any,
    tilt: bool,
    twist: Any,
    resampler: Any,
    potential: Any,
    filter_: Any,
) -> None:
    if not solver.draws:
        raise ValueError(
            f"steer needs a stochastic solver, as ancestral() or ddim(eta=1.0): copies of a particle under {solver!r}"
            " would never part."
        )
    if twist is not None and not callable(twist):
        raise ValueError(f"twist must be callable as twist(denoise, x, level) -> (log_h, x0), got {twist!r}.")
    if other is not None and not callable(other) and not remembers(other):
        raise ValueError(f"proposal must be one of {PROPOSALS} or a denoiser, got {other!r}.")
    if not callable(resampler) and not hasattr(resampler, "matrix"):
        raise ValueError(f"resampler must be one of diffjax.smc (systematic(), ...), got {resampler!r}.")
    if not hasattr(potential, "step") or not hasattr(potential, "init"):
        raise ValueError(f"potential must be difference(), maximum() or total(), got {potential!r}.")
    if hasattr(resampler, "matrix") and (remembers(denoise) or remembers(other) or not potential.telescopes):
        raise ValueError("transported moves states: it needs denoisers without memory and a potential that telescopes.")
    if filter_ is not None and (twist is not None or not isinstance(potential, Difference)):
        raise ValueError(f"the filter {filter_!r} brings its own potential: leave twist and potential out.")
    if filter_ is not None and hasattr(resampler, "matrix"):
        raise ValueError(f"transported moves states, whose weights the filter {filter_!r} has counted already.")
    if (other is not None or tilt or filter_ is not None) and not hasattr(solver, "kernel"):
        raise ValueError(
            "a proposal needs a solver with a kernel, of one call, one draw and no history, as ancestral() or"
            f" ddim(eta=1.0), got {solver!r}: use one, or proposal='base'."
        )
