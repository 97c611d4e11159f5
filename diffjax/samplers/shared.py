"""What the samplers that call the network on several states at once have in common."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from diffjax.levels import (
    Array,
    Grid,
    Level,
    Row,
    Sample,
    Solver,
    Tree,
    has_functions,
    is_traced,
    namespace,
    remembers,
)
from diffjax.samplers.sequential import Counter

# --- arguments ----------------------------------------------------------------------------------------------------


def integer(name: str, given: Any, low: int, high: int | None = None) -> None:
    """Raise ValueError unless ``given`` is an integer of at least ``low`` and, where there is one, at most ``high``."""
    allowed = f"of at least {low}" if high is None else f"in [{low}, {high}]"
    whole = isinstance(given, int | np.integer) and not isinstance(given, bool)
    if not whole or given < low or (high is not None and given > high):
        raise ValueError(f"{name} must be an integer {allowed}, got {given!r}.")


def tolerance(tol: Any) -> None:
    """Raise ValueError if ``tol`` is concrete and negative or not a number."""
    if not is_traced(tol) and not np.all(np.asarray(tol) >= 0):
        raise ValueError(f"tol must be at least 0, got {tol!r}.")


def memoryless(name: str, denoise: Any) -> None:
    """Raise ValueError for a denoiser that remembers."""
    if remembers(denoise):
        raise ValueError(f"{name} calls the denoiser on many states at once: it must not remember; use sample.")


def has_memory(solver: Solver, x: Tree) -> bool:
    """Whether a solver carries anything from row to row."""
    return bool(jax.tree.leaves(jax.eval_shape(solver.init, x)))


def inline(functions: Any, *arguments: Tree) -> bool:
    """Whether a run must not be cached: a plain function may hold tracers of the caller."""
    return has_functions(functions) and is_traced(*arguments)


# --- trees --------------------------------------------------------------------------------------------------------


def rms(tree: Tree) -> Array:
    """The root mean square over all entries."""
    return jnp.sqrt(jnp.mean(ravel_pytree(tree)[0] ** 2))


def change(new: Tree, old: Tree) -> Array:
    """The root mean square of ``new - old``, divided by that of ``new``."""
    difference = jax.tree.map(jnp.subtract, new, old)
    return rms(difference) / jnp.maximum(rms(new), jnp.finfo(jnp.result_type(*jax.tree.leaves(new))).tiny)


def select(condition: Array, first: Tree, second: Tree) -> Tree:
    """``first`` where the one condition holds, else ``second``."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), first, second)


def take(tree: Tree, index: Array) -> Tree:
    """Entries along the leading axis."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def put(tree: Tree, index: Array, entry: Tree) -> Tree:
    """``tree`` with one entry of the leading axis replaced."""
    return jax.tree.map(lambda leaf, new: leaf.at[index].set(new), tree, entry)


# --- rows ---------------------------------------------------------------------------------------------------------


def cast(rows: Row, x: Tree) -> Row:
    """``rows`` in the dtype of the state, NumPy where they are concrete."""
    kind = jnp.finfo(jnp.result_type(*jax.tree.leaves(x))).dtype
    return jax.tree.map(lambda leaf: (jnp.asarray if is_traced(leaf) else np.asarray)(leaf, kind), rows)


def jumps(grid: Grid, nodes: Level, begin: np.ndarray, end: np.ndarray) -> Grid:
    """The grid of steps ``nodes[begin[i]] -> nodes[end[i]]``, which need not follow each other."""
    t, s = (jax.tree.map(lambda leaf, where=where: leaf[where], nodes) for where in (begin, end))
    return Grid(grid.process, jax.tree.map(lambda leaf: leaf[0], t), t, s)


def ends(rows: Row) -> Level:
    """The level before every row and after the last one, shape (R + 1, ...)."""
    xp = namespace(rows.t, rows.s)
    return jax.tree.map(lambda t, s: xp.concatenate([t, s[-1:]]), rows.t, rows.s)


# --- calls --------------------------------------------------------------------------------------------------------


def call(denoise: Any, x: Tree, level: Level) -> tuple[Tree, Array]:
    """``(x0, network evaluations)``."""
    counter = Counter(denoise, None, jnp.zeros((), jnp.int32))
    x0 = counter(x, level)
    return x0, counter.nfe


def advance(
    denoise: Any, solver: Solver, noise: tuple[Tree, ...], x: Tree, memory: Tree, row: Row
) -> tuple[Tree, Tree, Tree, Array]:
    """One row: ``(x, memory, x0, network evaluations)``."""
    counter = Counter(denoise, None, jnp.zeros((), jnp.int32))
    x, memory, info = solver.step(noise, counter, x, memory, row)
    return x, memory, info.x0, counter.nfe


def finished(denoise: Any, sample: Sample, last: Level, final_denoise: bool) -> Sample:
    """``sample`` as it is returned: NaN where it failed, and denoised once more if that was asked for."""
    x = jax.tree.map(lambda leaf: jnp.where(sample.failed_at < 0, leaf, jnp.nan), sample.x)
    if not final_denoise:
        return sample._replace(x=x)
    x, nfe = call(denoise, x, last)
    return sample._replace(x=x, nfe=sample.nfe + nfe, rounds=sample.rounds + 1)
