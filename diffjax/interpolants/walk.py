"""The flow and the SDEs of a velocity b and a score s, in either direction.

    dx = b dt,        dx = (b + epsilon s) dt + sqrt(2 epsilon) dW        (t rises)
                      dx = (b - epsilon s) dt + sqrt(2 epsilon) dW        (t falls)

have the same marginals for every epsilon(t) >= 0, so one step from t to u is, in both directions,

    x + (u - t) b + |u - t| epsilon s + sqrt(2 epsilon |u - t|) z.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.interpolants.interpolant import mix
from diffjax.levels import UNSAVED, Array, Level, Sample, Tree, all_finite, is_traced, root
from diffjax.samplers.sequential import normal_noise
from diffjax.solvers.runge_kutta import TABLEAUS

Field = Callable[[Tree, Array], Tree]
FLOWS = TABLEAUS
METHODS = ("euler", "heun", "noise_first")


def ode(velocity: Field, times: Array, x: Tree, *, method: str = "rk4", save: str | tuple[str, ...] = ()) -> Sample:
    """The flow ``dx/dt = velocity(x, t)`` from ``times[0]`` to ``times[-1]``, of one sample.

    Args:
        velocity: ``(x, t) -> dx/dt``.
        times: (N + 1,), rising or falling.
        x: the state at ``times[0]``.
        method: "euler" (order 1), "heun", "midpoint", "ralston" (2), "kutta3", "heun3", "ralston3", "wray3", "ssp3"
            (3) or "rk4" (4).
        save: "states", or nothing.

    Returns a `Sample`; ``saved.states_level`` has times only.  Calls of the velocity: stages times N.

    Stochastic Interpolants: A Unifying Framework for Flows and Diffusions, arXiv:2303.08797.

    Raises ValueError for another method and times that neither rise nor fall.

    >>> round(float(ode(lambda x, t: x, np.linspace(0.0, 1.0, 9), jnp.asarray(1.0)).x), 3)
    2.718
    """
    if method not in FLOWS:
        raise ValueError(f"method must be among {tuple(FLOWS)}, got {method!r}.")

    def step(index: Array, x: Tree, t: Array, s: Array) -> Tree:
        del index
        return flow_step(velocity, x, t, s, method)

    return _walk(step, times, x, len(FLOWS[method][1]) + 1, 1, save)


def sde(
    key: Array,
    velocity: Field,
    score: Field,
    times: Array,
    x: Tree,
    epsilon: Array | Callable[[Array], Array] = 1.0,
    *,
    method: str = "heun",
    save: str | tuple[str, ...] = (),
) -> Sample:
    """The SDE of any ``epsilon(t) >= 0`` with the marginals of the flow, of one sample, in either direction.

    Args:
        key: of the noise, which is drawn for each step by its index.
        velocity, score: ``(x, t) -> b`` and ``(x, t) -> s``.
        times: (N + 1,), rising or falling.  Scores that are divided by gamma end where gamma > 0.
        x: the state at ``times[0]``.
        epsilon: a number, or a function of time in jax.numpy; 0 is the flow.
        method: "euler" (Euler-Maruyama, weak order 1, one call of each field a step), "heun" (weak order 2, two
            calls), or "noise_first" (noise, then Heun's step of the drift: weak order 1, the flow's 2 at epsilon 0).
        save: "states", or nothing.

    Returns a `Sample`; ``nfe`` counts calls of both fields.

    Stochastic Interpolants: A Unifying Framework for Flows and Diffusions, arXiv:2303.08797.

    Raises ValueError for another method, a negative epsilon, and times that neither rise nor fall.

    >>> standing = lambda x, t: jnp.zeros_like(x)  # of N(0, 1), which the SDE leaves as it is
    >>> draw = lambda key: sde(key, standing, lambda x, t: -x, np.linspace(0.0, 2.0, 21), jnp.zeros(())).x
    >>> bool(jnp.abs(jnp.std(jax.vmap(draw)(jax.random.split(jax.random.key(0), 500))) - 1) < 0.1)
    True
    """
    if method not in METHODS:
        raise ValueError(f"method must be among {METHODS}, got {method!r}.")
    if not callable(epsilon) and not is_traced(epsilon) and not (np.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"epsilon must be finite and at least 0, got {epsilon!r}.")

    def step(index: Array, x: Tree, t: Array, s: Array) -> Tree:
        (noise,) = normal_noise(key, index, x, 1)
        return sde_step(noise, velocity, score, x, t, s, epsilon, method)

    return _walk(step, times, x, 1 if method == "euler" else 2, 2, save)


def flow_step(velocity: Field, x: Tree, t: Array, s: Array, method: str = "rk4") -> Tree:
    """One Runge-Kutta step from time t to time s."""
    _, nodes, rows, weights = FLOWS[method]
    h, slopes = s - t, []
    for node, row in zip((0.0, *nodes), ((), *rows), strict=True):
        at = mix((1.0, *(h * a for a in row)), (x, *slopes))
        slopes.append(velocity(at, t + node * h))
    return mix((1.0, *(h * b for b in weights)), (x, *slopes))


def sde_step(
    noise: Tree,
    velocity: Field,
    score: Field,
    x: Tree,
    t: Array,
    s: Array,
    epsilon: Array | Callable[[Array], Array] = 1.0,
    method: str = "heun",
) -> Tree:
    """One step of `sde` from time t to time s with a given standard normal draw.

    "heun": ``y = x + drift(x, t) + w``, ``x' = x + (drift(x, t) + drift(y, s)) / 2 + w`` with w of the variance
    ``2 |s - t| epsilon`` at the middle of the step.
    """
    h = s - t
    at: Callable[[Array], Array] = epsilon if callable(epsilon) else lambda _: jnp.asarray(epsilon)
    drift = lambda y, u: mix((h, jnp.abs(h) * at(u)), (velocity(y, u), score(y, u)))
    kick = root(2 * jnp.abs(h) * at(t if method == "euler" else t + 0.5 * h))
    if method == "noise_first":
        x = mix((1.0, kick), (x, noise))
        first = drift(x, t)
        return mix((1.0, 0.5, 0.5), (x, first, drift(mix((1.0, 1.0), (x, first)), s)))
    first = drift(x, t)
    end = mix((1.0, 1.0, kick), (x, first, noise))
    if method == "euler":
        return end
    return mix((1.0, 0.5, 0.5, kick), (x, first, drift(end, s), noise))


def _walk(step: Callable, times: Array, x: Tree, stages: int, fields: int, save: str | tuple[str, ...]) -> Sample:
    save = (save,) if isinstance(save, str) else tuple(save)
    if not set(save) <= {"states"}:
        raise ValueError(f"save must be 'states' or nothing, got {save!r}.")
    check_times(times)
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf, jnp.float32)), x)
    times = jnp.asarray(times, jnp.finfo(jnp.result_type(*jax.tree.leaves(x))).dtype)

    def body(carry: tuple[Tree, Array], row: tuple[Array, Array, Array]) -> tuple[tuple[Tree, Array], Any]:
        (x, failed_at), (index, t, s) = carry, row
        x = step(index, x, t, s)
        finite = all_finite(x)
        return (x, jnp.where((failed_at < 0) & ~finite, index, failed_at)), x if save else None

    count = times.shape[0] - 1
    start = (x, -jnp.ones((), jnp.int32))
    (end, failed_at), path = jax.lax.scan(body, start, (jnp.arange(count, dtype=jnp.int32), times[:-1], times[1:]))
    saved = UNSAVED
    if save:
        states = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), x, path)
        saved = saved._replace(states=states, states_level=Level(times, None, None, None))
    rounds = jnp.asarray(count * stages, jnp.int32)
    return Sample(end, fields * rounds, rounds, failed_at, saved)


def check_times(times: Array) -> None:
    """ValueError unless times are (N + 1,), N >= 1, and rise or fall throughout."""
    if np.ndim(times) != 1 or np.shape(times)[0] < 2:
        raise ValueError(f"times must be of shape (N + 1,) with N >= 1, got shape {np.shape(times)}.")
    steps = np.ones(1) if is_traced(times) else np.diff(np.asarray(times, np.float64))
    if not (np.all(steps > 0) or np.all(steps < 0)):
        raise ValueError(f"times must all rise or all fall, got {times!r}.")
