"""Streaming: a sample enters and a sample leaves at every tick, and one batched network call serves all noise levels.

Lane i of N (the rows of the plan) holds the sample that is about to take row i.  A tick puts a new sample into lane 0,
takes row i in every lane i at once, gives out what leaves the last lane and moves the others on by one:

    x_i <- step_i(x_{i-1}),   i = 0 .. N - 1 side by side,       x_{-1}: the new sample,   x_{N-1}: the finished one.

Each sample takes the rows in order with its own key, condition and memories, so it is the one that `sample` draws:
its latency is N ticks, and the throughput is one sample for each batched call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.guidance.conditions import conditioned
from diffjax.levels import (
    UNSAVED,
    Array,
    Grid,
    Row,
    Sample,
    Solver,
    Tree,
    all_finite,
    as_value,
    has_functions,
    is_traced,
    remembers,
    static,
    value,
)
from diffjax.samplers.sequential import (
    Counter,
    Plan,
    check_arguments,
    drawn_noise,
    entered,
    initial_evaluations,
    left,
    planned,
)


class Request(NamedTuple):
    """What enters at a tick: a key, the state or clean data where they are given, the condition; or nothing."""

    key: Array
    x: Tree | None = None
    condition: Tree | None = None
    valid: Array = True


class Lanes(NamedTuple):
    """The samples on their way, one for each lane."""

    x: Tree
    solver: Tree  # the solver's memories
    denoiser: Tree  # the denoiser's memories
    key: Array
    condition: Tree | None
    nfe: Array
    failed_at: Array
    busy: Array


def stream(
    denoise: Any,
    solver: Solver,
    grid: Grid,
    shape: tuple[int, ...] | None = None,
    *,
    start: Array | None = None,
    dtype: Any = jnp.float32,
    noise: Any = None,
) -> Stream:
    """A stream of samples: one enters, all advance by a row in one batched network call, one leaves.

    Pure functions over a state: ``init(request) -> state`` (the request is an example, nothing is computed of it),
    ``tick(state, request) -> (state, sample, valid)`` and ``run(keys, x, condition) -> samples``, which ticks until
    all of them have left.  A request has a key and, where they are wanted, ``x``, a ``condition`` of its own (which
    replaces that of ``denoise``), or ``valid=False``: nothing enters and the lane stays empty.

    Args:
        denoise, solver, grid, dtype, noise: as for `sample`; a denoiser that remembers and any solver with any number
            of calls c a row may stream (a tick makes c batched calls).
        shape: of one sample, for draws from the prior; None where every request brings an ``x``.
        start: a time; the ``x`` of a request is clean data and enters noised to the first level of the grid at or
            below it (image-to-image). A grid shorter by the rows above it has as many lanes less.

    The samples are those of `sample` with the same keys, up to the rounding of the batched call; what leaves at a
    tick entered ``lanes - 1`` ticks before.  Several samples a tick: `jax.vmap` over `tick`.

    StreamDiffusion: A Pipeline-level Solution for Real-time Interactive Generation, arXiv:2312.12491, section 3.1.

    Raises ValueError as `sample` does, and at a tick whose request does not fit the stream.

    >>> import diffjax, jax
    >>> denoise, solver = diffjax.oracles.gaussian(0.0, 1.0), diffjax.solvers.ddim()
    >>> stream(denoise, solver, diffjax.grids.uniform(diffjax.processes.flow(), 8), ()).lanes
    8
    """
    check_arguments(denoise, solver, grid, shape, () if shape is None else None, start, dtype)
    plan = planned(denoise, solver, grid, start, noise)
    shape = None if shape is None else tuple(shape)
    return Stream(as_value(denoise), plan, as_value(noise), shape, np.dtype(dtype).name)


@value
class Stream:
    denoise: Any
    plan: Plan
    noise: Any
    shape: tuple[int, ...] | None = static()
    dtype: str = static()
    factory = "stream"

    @property
    def lanes(self) -> int:
        """The rows of the plan: samples on their way at once, and ticks that each takes."""
        return self.plan.rows.t.time.shape[0]

    def init(self, request: Request) -> Lanes:
        """The empty stream, for requests like this one."""
        self._check(request)
        fresh = jax.tree.map(jnp.asarray, _enter(self, request._replace(valid=False)))
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.lanes - 1, *leaf.shape)), fresh)

    def tick(self, state: Lanes, request: Request) -> tuple[Lanes, Sample, Array]:
        """``(state, sample, valid)``: the sample that leaves, and whether there is one."""
        self._check(request)
        run = _tick if has_functions(self) and is_traced(self, state, request) else _compiled_tick
        return run(self, state, request)

    def run(self, keys: Array, x: Tree | None = None, condition: Tree | None = None) -> Sample:
        """The samples of K requests in their order, leaves (K, ...), by K + lanes - 1 ticks of one `lax.scan`."""
        requests = Request(keys, x, condition, jnp.ones(keys.shape[0], bool))
        lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(requests)}
        if lengths != {(keys.shape[0],)} or not keys.shape[0]:
            raise ValueError(f"keys, x and condition must have one entry a request, got leading axes {lengths}.")
        self._check(jax.tree.map(lambda leaf: leaf[0], requests))
        run = _run if has_functions(self) and is_traced(self, requests) else _compiled_run
        return run(self, requests)

    def _check(self, request: Request) -> None:
        if (request.x is None) == (self.shape is None):
            wanted = "an x, since no shape was given" if self.shape is None else "no x, since a shape was given"
            raise ValueError(f"a request to this stream has {wanted}; got x={request.x!r}.")


def _enter(stream: Stream, request: Request) -> Lanes:
    """A request as what goes into lane 0."""
    prior_key, key = jax.random.split(request.key)
    x = entered(prior_key, stream.plan, stream.shape, request.x, jnp.dtype(stream.dtype))
    denoise = _bound(stream, request.condition)
    return Lanes(
        x,
        stream.plan.solver.init(x),
        denoise.init(x) if remembers(denoise) else None,
        key,
        request.condition,
        jnp.asarray(initial_evaluations(denoise), jnp.int32),
        jnp.asarray(-1, jnp.int32),
        jnp.asarray(request.valid, bool),
    )


def _bound(stream: Stream, condition: Tree | None) -> Any:
    return stream.denoise if condition is None else conditioned(stream.denoise, condition)


def _tick(stream: Stream, state: Lanes, request: Request) -> tuple[Lanes, Sample, Array]:
    fresh = _enter(stream, request)
    _check_fit(state, fresh)
    lanes = jax.tree.map(lambda new, old: jnp.concatenate([jnp.asarray(new, old.dtype)[None], old]), fresh, state)
    kind = jnp.finfo(jnp.result_type(*jax.tree.leaves(lanes.x))).dtype
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf, kind), stream.plan.rows)
    lanes = jax.vmap(lambda *of: _advance(stream, *of))(jnp.arange(stream.lanes, dtype=jnp.int32), rows, lanes)
    state, out = (jax.tree.map(lambda leaf, part=part: leaf[part], lanes) for part in (slice(0, -1), -1))
    rounds = jnp.asarray(stream.lanes * stream.plan.solver.calls, jnp.int32)
    sample = Sample(out.x, out.nfe, rounds, out.failed_at, UNSAVED)
    last = jax.tree.map(lambda leaf: leaf[-1], rows.s)
    return state, left(sample, stream.plan.process, last), out.busy


_compiled_tick = jax.jit(_tick)


def _advance(stream: Stream, index: Array, row: Row, lane: Lanes) -> Lanes:
    """One row of one lane."""
    solver = stream.plan.solver
    counter = Counter(_bound(stream, lane.condition), lane.denoiser, lane.nfe)
    draws = drawn_noise(stream.noise, lane.key, index, row, lane.x, solver.draws)
    x, memory, _ = solver.step(draws, counter, lane.x, lane.solver, row)
    finite = all_finite(x)
    failed_at = jnp.where((lane.failed_at < 0) & ~finite, index, lane.failed_at)
    nfe = jnp.asarray(counter.nfe, jnp.int32)
    return lane._replace(x=x, solver=memory, denoiser=counter.memory, nfe=nfe, failed_at=failed_at)


def _run(stream: Stream, requests: Request) -> Sample:
    count = requests.key.shape[0]

    def body(state: Lanes, index: Array) -> tuple[Lanes, Sample]:
        request = jax.tree.map(lambda leaf: leaf[jnp.minimum(index, count - 1)], requests)
        state, out, _ = _tick(stream, state, request._replace(valid=index < count))
        return state, out

    state = stream.init(jax.tree.map(lambda leaf: leaf[0], requests))
    _, samples = jax.lax.scan(body, state, jnp.arange(count + stream.lanes - 1))
    return jax.tree.map(lambda leaf: leaf[stream.lanes - 1 :], samples)


_compiled_run = jax.jit(_run)


def _check_fit(state: Lanes, fresh: Lanes) -> None:
    expected = [jnp.shape(leaf)[1:] for leaf in jax.tree.leaves(state)]
    found = [jnp.shape(leaf) for leaf in jax.tree.leaves(fresh)]
    if jax.tree.structure(state) != jax.tree.structure(fresh) or expected != found:
        raise ValueError(
            "a request must be like the one that the stream was made for: its lanes have leaves of shapes"
            f" {expected}, got {found}."
        )
