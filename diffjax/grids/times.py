"""Grids from explicit times."""

from __future__ import annotations

import operator

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, Grid, Process, arrays, concrete, is_traced


def times(process: Process, times: Array, trailing: int = 0) -> Grid:
    """The grid through N + 1 times, decreasing (sampling) or increasing (inversion), shape (N + 1, ...).

    Further axes are one time per frame or token; ``trailing`` singleton axes are then appended to the noise levels
    so that they broadcast against the state.

    Raises ValueError if there are fewer than two times, if they leave [0, process.end], or are not monotone.

    >>> import diffjax
    >>> times(diffjax.processes.flow(), [1.0, 0.5, 0.0])
    Grid(flow(), steps=2, gaps=False)
    """
    process, times = concrete(process), arrays(_as_array(times))[1]
    check_times(process, times)
    level = process.level(times, trailing=trailing)
    return Grid(process, *(jax.tree.map(operator.itemgetter(part), level) for part in (0, slice(-1), slice(1, None))))


def pairs(process: Process, t: Array, s: Array, inflation: Array = 1.0, trailing: int = 0) -> Grid:
    """The grid of N steps from ``t[i]`` to ``s[i]``; where ``t[i + 1]`` is noisier than ``s[i]`` noise is added.

    Restart and time travel are such grids.  ``inflation`` multiplies the added noise.

    Raises ValueError if the shapes differ, times leave [0, process.end], or some ``t[i + 1]`` is cleaner than
    ``s[i]`` (a state cannot be denoised for free).
    """
    process = concrete(process)
    _, t, s = (process, arrays(_as_array(t))[1], arrays(_as_array(s))[1])
    if t.shape != s.shape or t.ndim < 1 or len(t) < 1:
        raise ValueError(f"t and s must have the same shape (N, ...) with N >= 1, got {t.shape} and {s.shape}.")
    for name, value in (("t", t), ("s", s)):
        _check_range(process, name, value)
    if not is_traced(t, s):
        if np.any(s > t):
            raise ValueError(f"every s must be at or below its t (time runs towards 0), got t={t!r}, s={s!r}.")
        if np.any(t[1:] < s[:-1]):
            raise ValueError(
                f"t[i + 1] must be at or above s[i]: only noise can be added between steps, got {t!r}, {s!r}."
            )
    noisy, clean = (process.level(v, trailing=trailing) for v in (t, s))
    start = jax.tree.map(operator.itemgetter(0), noisy)
    gaps = True if is_traced(t, s) else bool(np.any(t[1:] != s[:-1]))
    return Grid(process, start, noisy, clean, inflation, gaps)


def check_times(process: Process, times: Array) -> None:
    """Raise ValueError unless the (concrete) times are at least two, in range, and monotone."""
    if times.ndim < 1 or len(times) < 2:
        raise ValueError(f"times must have at least two entries along their first axis, got shape {times.shape}.")
    _check_range(process, "times", times)
    if not is_traced(times):
        steps = np.diff(times, axis=0)
        if not (np.all(steps <= 0) or np.all(steps >= 0)) or np.all(steps == 0):
            raise ValueError(f"times must be decreasing (sampling) or increasing (inversion), got {times!r}.")


def _check_range(process: Process, name: str, value: Array) -> None:
    if is_traced(value, process.end):
        return
    # a rounding error beyond the end is not a mistake
    slack = 1e-9 * np.max(process.end)
    if not np.all((value >= 0) & (value <= process.end + slack)):
        raise ValueError(f"{name} must lie in [0, {float(process.end)}] for {process!r}, got {value!r}.")


def _as_array(value: Array) -> Array:
    return jnp.asarray(value) if is_traced(value) else np.asarray(value, np.float64)
