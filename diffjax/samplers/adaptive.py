"""The adaptive sampler: steps in half-log-SNR as long as an embedded pair's error estimate allows.

With x' the result of a step, e its error estimate, and x_ the last lower order result, an attempt is accepted if

    E = RMS( e / max(atol, rtol max(|x' - e|, |x_|)) ) <= 1,

and the next step is ``h safety E^(-(integral + proportional) / order) E_before^(proportional / order)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
    concrete,
    has_functions,
    is_traced,
    remembers,
)
from diffjax.noises import Stored, brownian
from diffjax.samplers.sequential import Counter, initial_evaluations, left
from diffjax.solvers.coefficients import exponential


def adaptive(
    key: Array,
    denoise: Any,
    solver: Solver,
    process: Process,
    shape: tuple[int, ...] | None = None,
    *,
    x: Tree | None = None,
    start: Array | None = None,
    stop: Array | None = None,
    to_data: bool = True,
    rtol: Array = 0.05,
    atol: Array = 0.0078,
    first_step: Array = 0.05,
    safety: Array = 0.9,
    integral: Array = 1.0,
    proportional: Array = 0.0,
    max_steps: int = 1000,
    differentiable: bool = False,
    dtype: Any = jnp.float32,
    noise: Callable[[Array, Array, Row, Tree, int], tuple[Tree, ...]] | None = None,
) -> Sample:
    """Draw one sample with steps chosen while sampling; under `jax.vmap` every sample has its own.

    Args:
        key: one PRNG key; it fixes the sample.
        denoise: as in `sample`.
        solver: a one-step solver with an error estimate: `dpm_pair`, `heun_pair`, `bogacki_shampine`, `gotta_go_fast`
            (with ``integral=1.8`` for the paper's exponent 0.9), or anything in `modifiers.doubled`.
        process: the noising.
        shape, x, dtype: one of ``shape`` (a draw from the prior) and ``x``, the state at ``start``.
        start: a time, default the process's end; from alpha = 0 one first-order step to 0.999 of it is made before.
        stop: the time where steps end, default 1e-3 of the end, or 0 for processes that keep noise there.
        to_data: from ``stop`` make the first-order step to time 0 (a final call).
        rtol, atol: tolerances of the error estimate; the defaults are DPM-Solver's for images in [-1, 1].
        first_step: in half-log-SNR.
        safety, integral, proportional: of the controller; proportional = 0 is the elementary one.
        max_steps: attempts at most.
        differentiable: a scan over ``max_steps`` attempts, each recomputed in the backward pass, in the place of a loop
            that ends: gradients go through the accepted steps, with their sizes held fixed.
        noise: for stochastic solvers, default `diffjax.noises.brownian` with the rate of the solver's SDE: a rejected
            step is tried again along the same path, so that a rejection does not choose the noise. What remains is
            the steps' own error, and for samples of few entries that the error estimate, a root mean square over
            them, is one of this state and this noise: large states are allowed large steps and keep their errors.
            At rtol = atol = 0.3 the variance of data with 0.25 comes out 0.32 for one entry, 0.23 for 16. Not
            `diffjax.noises.stored`: the number of attempts is not known beforehand.

    Returns a `Sample` with ``accepted`` and ``rejected``; ``failed_at`` is the attempt at which steps became too small
    to go on or ``max_steps`` were used up, or -1.  A non-finite attempt is rejected.

    DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps, arXiv:2206.00927,
    appendix C; Gotta Go Fast When Generating Data with Score-Based Models, arXiv:2105.14080, algorithm 1.

    Raises ValueError for a solver without an error estimate or with a memory, and for arguments that do not fit.

    >>> import diffjax, jax
    >>> denoise, process = diffjax.oracles.gaussian(0.0, 1.0), diffjax.processes.vp()
    >>> out = adaptive(jax.random.key(0), denoise, diffjax.solvers.dpm_pair(2), process, shape=())
    >>> int(out.nfe) == 2 * int(out.accepted + out.rejected) + 1
    True
    """
    _check(solver, shape, x, dtype, max_steps, rtol=rtol, atol=atol, first_step=first_step, safety=safety)
    if isinstance(noise, Stored):
        raise ValueError(f"noise must be a source for any number of attempts, got {noise!r}, which has so many rows.")
    whole = process
    process = dataclasses.replace(process, coordinates=None)
    process = process if is_traced(process) else concrete(process)
    first, last, opening = _ends(process, start, stop)
    entry = first if opening is None else opening
    if hasattr(denoise, "check"):
        denoise.check(jax.tree.map(lambda *leaves: jnp.stack(leaves), entry, last) if is_traced(entry, last) else
                      jax.tree.map(lambda *leaves: np.stack(leaves), entry, last))  # fmt: skip
    prior_key, noise_key = jax.random.split(key)
    if shape is not None:
        x = whole.standard_prior(prior_key, shape, dtype, entry)
    else:
        x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf, jnp.float32)), x)
        x = whole.enter(x, entry)
    kind = jnp.finfo(jnp.result_type(*jax.tree.leaves(x))).dtype
    control = Control(*(jnp.asarray(v, kind) for v in (rtol, atol, first_step, safety, integral, proportional)))
    first, last, opening = jax.tree.map(lambda leaf: jnp.asarray(leaf, kind), (first, last, opening))
    if noise is None:  # the path of the solver's own SDE
        noise = brownian(getattr(getattr(solver, "method", None), "noise_rate", 1.0))
    denoise, noise = as_value(denoise), as_value(noise)
    options = (bool(to_data) and not _keeps_noise(process), int(max_steps), bool(differentiable))
    run = _run if has_functions(denoise, noise) and is_traced(key, x) else _compiled
    result = run(noise_key, x, denoise, solver, process, (first, last, opening), control, noise, options)
    return left(result, whole, CLEAN if options[0] else last)


class Control(NamedTuple):
    """The numbers of the controller."""

    rtol: Array
    atol: Array
    first_step: Array
    safety: Array
    integral: Array
    proportional: Array


class Carry(NamedTuple):
    """What the loop carries."""

    x: Tree
    lower: Tree  # the lower order result of the last accepted step
    memory: Tree  # the denoiser's
    half_log_snr: Array
    h: Array
    error: Array  # E of the last accepted step
    nfe: Array
    accepted: Array
    rejected: Array
    failed_at: Array


def _run(key, x, denoise, solver, process, ends, control, noise, options) -> Sample:
    to_data, max_steps, differentiable = options
    first, last, opening = ends
    stop = last.half_log_snr
    zero = jnp.zeros((), jnp.int32)
    memory = denoise.init(x) if remembers(denoise) else None
    counter = Counter(denoise, memory, zero + initial_evaluations(denoise))
    rounds = zero
    if opening is not None:
        keep, weight = exponential(opening, first)
        x0 = counter(x, opening)
        x = jax.tree.map(lambda a, b: (keep * a + weight * b).astype(a.dtype), x, x0)
        rounds = rounds + 1
    one = jnp.ones_like(stop)
    carry = Carry(x, x, counter.memory, first.half_log_snr, control.first_step, one, counter.nfe, zero, zero, zero - 1)
    body = partial(_attempt, key, denoise, solver, process, stop, control, noise)

    def active(carry: Carry) -> Array:
        tried = carry.accepted + carry.rejected
        return (carry.half_log_snr < stop) & (tried < max_steps) & (carry.failed_at < 0)

    if differentiable:

        def masked(carry: Carry, _: None) -> tuple[Carry, None]:
            on = active(carry)
            return jax.tree.map(lambda a, b: jnp.where(on, a, b), body(carry), carry), None

        end, _ = jax.lax.scan(jax.checkpoint(masked), carry, None, length=max_steps)
    else:
        end = jax.lax.while_loop(active, body, carry)
    tried = end.accepted + end.rejected
    failed_at = jnp.where((end.failed_at < 0) & (end.half_log_snr < stop), tried, end.failed_at)
    result, nfe, rounds = end.x, end.nfe, rounds + solver.calls * tried
    if to_data:
        counter = Counter(denoise, end.memory, nfe)
        result = counter(result, last)
        nfe, rounds = counter.nfe, rounds + 1
    nothing = UNSAVED
    return Sample(result, nfe, rounds, failed_at, nothing, end.accepted, end.rejected)


_compiled = jax.jit(_run, static_argnames="options")


def _attempt(key, denoise, solver, process, stop, control, noise, carry: Carry) -> Carry:
    """One step, accepted or not."""
    left = stop - carry.half_log_snr
    # a last sliver would be lost in rounding: go to the end if almost there
    ends = carry.h >= 0.999 * left
    h = jnp.where(ends, left, carry.h)
    now, then = carry.half_log_snr, jnp.where(ends, stop, carry.half_log_snr + carry.h)
    t, s = (process.level(half_log_snr=value[None])._replace(half_log_snr=value[None]) for value in (now, then))
    row = jax.tree.map(lambda leaf: leaf[0], solver.plan(Grid(process, jax.tree.map(lambda leaf: leaf[0], t), t, s)))
    counter = Counter(denoise, carry.memory, carry.nfe)
    index = carry.accepted + carry.rejected
    draws = noise(key, index, row, carry.x, solver.draws) if solver.draws else ()
    x, _, info = solver.step(draws, counter, carry.x, solver.init(carry.x), row)
    lower = jax.tree.map(jnp.subtract, x, info.error)
    error = jax.lax.stop_gradient(_size(info.error, lower, carry.lower, control))
    finite = all_finite(x) & jnp.isfinite(error)
    accept = finite & (error <= 1)
    order = solver.order
    safe = jnp.maximum(jnp.where(finite, error, 1.0), 1e-8)
    factor = safe ** (-(control.integral + control.proportional) / order) * carry.error ** (
        control.proportional / order
    )
    factor = jnp.clip(control.safety * factor, 0.1, 10.0)
    factor = jnp.where(finite, jnp.where(accept, factor, jnp.minimum(factor, 0.9)), 0.1)
    size = h * factor
    smallest = 64 * jnp.finfo(size.dtype).eps * (1 + jnp.abs(now))
    chosen = lambda new, old: jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)
    return Carry(
        chosen(x, carry.x),
        chosen(lower, carry.lower),
        chosen(counter.memory, carry.memory),
        jnp.where(accept, then, now),
        size,
        jnp.where(accept, safe, carry.error),
        counter.nfe,
        carry.accepted + accept,
        carry.rejected + ~accept,
        jnp.where(~accept & (size < smallest), index, carry.failed_at),
    )


def _size(error: Tree, lower: Tree, before: Tree, control: Control) -> Array:
    """The root mean square of the error in units of the tolerance."""

    def leaf(e: Array, a: Array, b: Array) -> tuple[Array, int]:
        scale = jnp.maximum(control.atol, control.rtol * jnp.maximum(jnp.abs(a), jnp.abs(b)))
        return jnp.sum((e / scale) ** 2), e.size

    parts = [leaf(*three) for three in zip(*map(jax.tree.leaves, (error, lower, before)), strict=True)]
    return jnp.sqrt(sum(p for p, _ in parts) / sum(n for _, n in parts))


def _ends(process: Process, start: Array | None, stop: Array | None) -> tuple[Level, Level, Level | None]:
    """First and last level of the controlled steps, and the level before the first if that is at alpha = 0."""
    begin: Array = process.end if start is None else start
    end: Array = (0.0 if _keeps_noise(process) else 1e-3 * process.end) if stop is None else stop
    if not is_traced(process, begin, end) and not 0 <= end < begin <= process.end * (1 + 1e-9):
        raise ValueError(f"need 0 <= stop < start <= {float(process.end)}, got start={begin!r}, stop={end!r}.")
    first, last = process.level(begin), process.level(end)
    if not is_traced(last) and np.isinf(last.half_log_snr):
        raise ValueError(f"stop must be a time with finite log-SNR, got {end!r}.")
    if not is_traced(first) and first.alpha == 0:
        return process.level((1 - 1e-3) * begin), last, first
    return first, last, None


def _keeps_noise(process: Process) -> bool:
    level = process.level(0.0 * process.end)
    return not is_traced(level) and bool(level.sigma > 0)


def _check(solver, shape, x, dtype, max_steps, **positive) -> None:
    if not isinstance(solver, Solver) or not solver.embedded:
        raise ValueError(f"solver must have an error estimate (dpm_pair, doubled, ...), got {solver!r}.")
    if jax.tree.leaves(solver.init(np.zeros(1))):
        raise ValueError(f"solver must be a one-step method, but {solver!r} remembers.")
    if (shape is None) == (x is None):
        raise ValueError(f"give exactly one of shape={shape!r} (a draw from the prior) and x.")
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 32:
        raise ValueError(f"dtype must be float32 or wider (networks may cast inside), got {dtype!r}.")
    if not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(f"max_steps must be an integer of at least 1, got {max_steps!r}.")
    for name, number in positive.items():
        if not is_traced(number) and not (np.isfinite(number) and number > 0):
            raise ValueError(f"{name} must be finite and above 0, got {number!r}.")
