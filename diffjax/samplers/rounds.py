"""The loop of the parallel sampler: sweep the window, see what is final, slide past it.

Whatever a method, a damping or a mixing makes of the states ahead, the leading states that did not change and the one
after them take the plain value of the sweep: that one was evaluated at a final state, so every round makes at least one
state exact, and there are never more rounds than rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

from diffjax.levels import Array, Level, Row, Tree, rise
from diffjax.samplers import anderson
from diffjax.samplers.damping import damped
from diffjax.samplers.flat import Flat
from diffjax.samplers.guesses import entering
from diffjax.samplers.sequential import drawn_noise, normal_noise, size
from diffjax.samplers.window import fixed_linear_part, solve, sweep

SCALES = ("state", "noise")
# Up to this many entries a sample (1 MB) the noise of all rows is held through the loop.
_EARLY = 2**18


class Options(NamedTuple):
    """What is static: the method's name, sizes, and what is kept."""

    method: str
    window: int
    scale: str
    max_rounds: int
    guess: str
    mixing: int
    save: tuple[str, ...]
    mesh: Mesh | None = None
    axis: str = "time"


class Values(NamedTuple):
    """What the sample depends on, and gradients reach."""

    denoise: Any
    solver: Any
    x: Tree
    rows: Row
    noise: Any


class Settings(NamedTuple):
    """What decides how the fixed point is found, and which noise it has."""

    key: Array
    tol: Array
    variance: Array
    damping: Array | None
    path: Array | None  # the caller's guess (rows + 1, D)


class Result(NamedTuple):
    """Flat: the last state (D,); where asked for the states (rows + 1, D), their clean estimates and the trace."""

    x: Array
    nfe: Array
    sweeps: Array
    failed_at: Array
    states: Array | None
    x0: Array | None
    residuals: Array | None
    final: Array | None


class Carry(NamedTuple):
    """``begin`` rows are final, ``states`` (window + 1, D) start at the state after them."""

    begin: Array
    states: Array
    memory: Tree  # the solver's, before row ``begin``
    history: anderson.History | None
    nfe: Array
    sweeps: Array
    failed_at: Array
    path: Array | None
    x0: Array | None
    residuals: Array | None
    final: Array | None


def run(options: Options, values: Values, settings: Settings) -> Result:
    """Sweep until all rows are final, a state is not finite, or ``max_rounds`` are used up."""
    values = values._replace(rows=jax.tree.map(jnp.asarray, values.rows))
    denoise, solver, x, rows, _ = values
    key, size, count = settings.key, options.window, rows.t.time.shape[0]
    flat = Flat(solver, x)
    call = flat.caller(denoise)
    linear = fixed_linear_part(options.method, solver, rows, x, settings.variance, flat)
    reference = noise_scale(rows).reshape(count, -1).mean(axis=1)
    draw = drawn(values, flat, key)
    guesses = entering(options.guess, flat, normals(values, key), rows, settings.path)
    offsets = jnp.arange(size, dtype=jnp.int32)

    def body(carry: Carry) -> Carry:
        inside = carry.begin + offsets < count
        index = jnp.minimum(carry.begin + offsets, count - 1)
        part = jax.tree.map(lambda leaf: leaf[index], rows)
        old = carry.states
        probe = jax.random.fold_in(jax.random.fold_in(key, count), carry.sweeps)
        now = denoise.at(carry.sweeps) if hasattr(denoise, "at") else denoise
        call = flat.caller(now)
        f, slope, memories, x0 = sweep(options.method, flat, call, old[:-1], carry.memory, draw(index), part, probe)
        slope = jnp.asarray(slope if linear is None else linear[index])
        mask = inside.reshape(-1, 1)
        residual = jnp.where(mask, f - old[1:], 0.0)
        slope = jnp.where(mask if slope.ndim == 2 else mask[..., None], slope, 0.0)
        plain = jnp.where(mask, f + _follow(slope, solve(slope, residual)), old[1:])
        # a guess far ahead may blow up; the frontier, which is exact, may not
        failed_at = jnp.where(jnp.all(jnp.isfinite(f[0])), -1, carry.begin)
        finite = jnp.all(jnp.isfinite(plain), axis=1)
        moved, scale = rms(plain - old[1:]), scales(options.scale, plain, reference[index])
        settled = finite & (moved <= settings.tol * scale)
        # rows whose result did not change are final, and so is the next one, evaluated at a final state; where that one
        # is not finite it is the frontier of the next round, which fails
        final = jnp.sum(jnp.cumprod(settled | ~inside, dtype=jnp.int32), dtype=jnp.int32)
        stride = final + finite[jnp.minimum(final, size - 1)]
        stride = jnp.clip(stride, 1, jnp.minimum(size, count - carry.begin))
        stride = jnp.where(carry.sweeps < changing(denoise), 0, stride)  # another denoiser's states are not final
        ahead, history = _ahead(settings.damping, carry.history, old[1:], plain, slope, residual, f)
        usable = (offsets > final)[:, None] & jnp.all(jnp.isfinite(ahead), axis=1, keepdims=True)
        new = jnp.where(usable, ahead, jnp.where(finite[:, None], plain, f[:1]))
        states = jnp.concatenate([old[:1], new])
        source = jnp.arange(size + 1) + stride
        here = jax.tree.map(lambda leaf: leaf[-1], part.t)
        guess = guesses(carry.begin + source, here, old[-2], x0[-1], new[-1])
        return Carry(
            carry.begin + stride,
            jnp.where((source > size)[:, None], guess, states[jnp.minimum(source, size)]),
            jax.tree.map(lambda old, new: jnp.where(stride > 0, new[stride - 1], old), carry.memory, memories)
            if jax.tree.leaves(carry.memory)
            else carry.memory,
            None if history is None else anderson.slid(history, stride),
            carry.nfe + evaluations(now, part.t, inside, solver.calls),
            carry.sweeps + 1,
            failed_at,
            _written(carry.path, states, carry.begin),
            _written(carry.x0, x0, carry.begin),
            _written(carry.residuals, jnp.where(inside, moved / scale, jnp.nan)[None], carry.sweeps),
            _written(carry.final, (carry.begin + stride)[None], carry.sweeps),
        )

    def unfinished(carry: Carry) -> Array:
        return (carry.begin < count) & (carry.sweeps < options.max_rounds) & (carry.failed_at < 0)

    end = jax.lax.while_loop(unfinished, body, _start(options, values, settings, flat, call, draw, guesses))
    # the last state: the first of the window once all rows are final, else the window's best guess
    result = end.states[jnp.minimum(count - end.begin, size)]
    result = jnp.where(end.failed_at < 0, result, jnp.nan)[: flat.size]
    states = None if end.path is None else end.path[: count + 1]
    x0 = None if end.x0 is None else end.x0[:count]
    return Result(result, end.nfe, end.sweeps, end.failed_at, states, x0, end.residuals, end.final)


def _start(
    options: Options, values: Values, settings: Settings, flat: Flat, call: Callable, draw: Callable, guesses: Callable
) -> Carry:
    """Copies, the caller's path, or what one exact step from the first state lets one guess."""
    rows, size, count = values.rows, options.window, values.rows.t.time.shape[0]
    first, memory, zero = flat.start, flat.init(), jnp.zeros((), jnp.int32)
    begin = nfe = sweeps = zero
    stored = jnp.zeros((count + size + 1, first.size), first.dtype) if "states" in options.save else None
    clean = jnp.zeros((count + size, flat.size), first.dtype) if "x0" in options.save else None
    trace = jnp.full((options.max_rounds, size), jnp.nan, first.dtype) if "residuals" in options.save else None
    final = jnp.full(options.max_rounds, -1, jnp.int32) if "residuals" in options.save else None
    if options.guess in ("copies", "path"):
        states = jnp.broadcast_to(first, (size + 1, first.size))
        if settings.path is not None:
            states = settings.path[jnp.minimum(jnp.arange(size + 1), count)].at[0].set(first)
    else:
        row = jax.tree.map(lambda leaf: jnp.asarray(leaf[:1]), rows)
        f, _, memories, x0 = sweep("picard", flat, call, first[None], memory, draw(zero[None]), row, settings.key)
        here = jax.tree.map(lambda leaf: leaf[0], row.t)
        states = guesses(1 + jnp.arange(size + 1), here, first, x0[0], f[0]).at[0].set(f[0])
        begin, sweeps = zero + 1, zero + 1
        nfe = evaluations(values.denoise, row.t, jnp.ones(1, bool), values.solver.calls)
        memory = jax.tree.map(lambda leaf: leaf[0], memories) if jax.tree.leaves(memory) else memory
        moved = rms(f - first)[0] / rms(f)[0]
        stored, clean = _written(stored, jnp.stack([first, f[0]]), zero), _written(clean, x0, zero)
        if trace is not None:
            trace, final = trace.at[0, 0].set(moved), _written(final, begin[None], zero)
    history = anderson.empty(options.mixing, states[1:]) if options.mixing else None
    return Carry(begin, states, memory, history, nfe, sweeps, zero - 1, stored, clean, trace, final)


def _ahead(
    damping: Array | None,
    history: anderson.History | None,
    old: Array,
    plain: Array,
    slope: Array,
    residual: Array,
    f: Array,
) -> tuple[Array, anderson.History | None]:
    """The states of a sweep that is damped, mixed, both or neither."""
    if damping is not None:
        plain = f + _follow(slope, damped(slope, residual, damping))
    if history is None:
        return plain, None
    return anderson.mixed(history, old, plain - old)


def _follow(slope: Array, change: Array) -> Array:
    """What the change of the states does to the results of the rows after them."""
    before = jnp.concatenate([jnp.zeros_like(change[:1]), change[:-1]])
    return jnp.einsum("pij,pj->pi", slope, before) if slope.ndim == 3 else slope * before


def draws(values: Values, flat: Flat, key: Array) -> Callable[[Array], tuple[Array, ...]]:
    """``indices (p,) -> draws (p, D)`` of these rows."""

    def draw(index: Array) -> tuple[Array, ...]:
        row = jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], values.rows)
        trees = drawn_noise(values.noise, key, index, row, values.x, values.solver.draws)
        return flat.noise(trees)

    return jax.vmap(draw) if values.solver.draws else lambda index: ()


def drawn(values: Values, flat: Flat, key: Array) -> Callable[[Array], tuple[Array, ...]]:
    """`draws`, made once for all rows where they are few enough: the same numbers, and none drawn again in a round."""
    draw, count = draws(values, flat, key), values.rows.t.time.shape[0]
    if count * values.solver.draws * size(values.x) > _EARLY:
        return draw
    all_draws = draw(jnp.arange(count, dtype=jnp.int32))
    return lambda index: jax.tree.map(lambda leaf: leaf[index], all_draws)


def normals(values: Values, key: Array) -> Callable[[Array], Tree]:
    """The noise that belongs to a state: the first draw of the row before it, or one of its own."""
    own = jax.random.fold_in(key, values.rows.t.time.shape[0] + 1)

    def normal(index: Array) -> Tree:
        if not values.solver.draws:
            return normal_noise(own, index, values.x, 1)[0]
        row = jax.tree.map(lambda leaf: jnp.asarray(leaf)[index - 1], values.rows)
        return drawn_noise(values.noise, key, index - 1, row, values.x, values.solver.draws)[0]

    return normal


def evaluations(denoise: Any, levels: Level, inside: Array, calls: int) -> Array:
    """Network evaluations of ``calls`` at each of the levels that are ``inside``."""
    count = getattr(denoise, "evaluations", None)
    each = 1 if count is None else jax.vmap(lambda t: jnp.asarray(count(t)))(levels)
    return (calls * jnp.sum(jnp.where(inside, each, 0))).astype(jnp.int32)


def changing(denoise: Any) -> int:
    """Sweeps in which a denoiser is not yet itself: one with ``at(sweep)`` says how many as ``sweeps``."""
    return denoise.sweeps if hasattr(denoise, "at") else 0


def _written(buffer: Array | None, entries: Array, begin: Array) -> Array | None:
    return None if buffer is None else jax.lax.dynamic_update_slice_in_dim(buffer, entries, begin, 0)


def rms(rows: Array) -> Array:
    """The root mean square of every row."""
    return jnp.sqrt(jnp.mean(rows**2, axis=1))


def scales(scale: str, new: Array, reference: Array) -> Array:
    """What the changes of the states ``new`` are measured by."""
    return reference if scale == "noise" else jnp.maximum(rms(new), jnp.finfo(new.dtype).tiny)


def noise_scale(rows: Row) -> Array:
    """The standard deviation of q(x_s | x_t, x_0), floored: the last step's is 0 and would never be met."""
    std = rows.s.sigma * jnp.sqrt(-jnp.expm1(-2 * jnp.maximum(rise(rows.t, rows.s), 0.0)))
    return jnp.maximum(std, 1e-3 * jnp.max(std))


def flattened(tree: Tree) -> Array:
    """A tree of paths (rows, ...) as (rows, D)."""
    return jax.vmap(lambda leaf: ravel_pytree(leaf)[0])(tree)
