"""Sampling where the forward process has a drift that is not linear: restoration and degradation, step by step.

The forward process is ``dx = f(x, t) dt + g(t) dW`` with marginals p_t and scores ``S = grad log p_t``.  Linearised at
the state x at time t (the score and the drift are those of x), a step from t to s < t over an earlier r <= s is

    restore    x_r = x - (t - r) f + (t - r) g^2 S            gradient ascent on log q(x_r | x_t), of step (t - r) g^2
    degrade    z = (x - x_r - (t - r) f) / (g sqrt(t - r))    the noise that leads from x_r back to x
               x_s = x_r + (s - r) f + g sqrt(s - r) z

which moves x by ``-(t - s) f + (v - sqrt(v w)) g^2 S`` with v = t - r and w = s - r: a step of the probability flow
``-(t - s) (f - g^2 S / 2)``, and ``(t - s)^2 / (8 v) g^2 S`` and more.  So r has to stay behind while steps get short.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import SDE, UNSAVED, Array, Level, Sample, Tree, all_finite, is_traced, namespace, root


def restore(sde: SDE, score: Callable[[Tree, Array], Tree], x: Tree, t: Array, r: Array) -> Tree:
    """The state at the earlier time r that the state x at time t suggests: ``x - (t - r) f + (t - r) g^2 score``.

    One step of gradient ascent from x, of length ``(t - r) g^2``, on ``log q(x_r | x_t = x) = log p_r(x_r) +
    log q(x_t = x | x_r) + const.``, where p_r is taken for p_t.
    """
    drift, square, found = sde.drift(x, t), sde.diffusion(x, t) ** 2, score(x, t)
    return jax.tree.map(lambda leaf, f, s: leaf + (t - r) * (square * s - f), x, drift, found)


def degrade(sde: SDE, restored: Tree, x: Tree, t: Array, r: Array, s: Array) -> Tree:
    """The forward process from ``restored`` at time r to time s <= t, with the noise that would lead to x at time t.

    ``x_s = x_r + (s - r) f + sqrt((s - r) / (t - r)) (x - x_r - (t - r) f)``, f the drift at x; for r = t it is x.
    """
    share = namespace(t, r, s).where(t == r, 1.0, root((s - r) / namespace(t, r).where(t == r, 1.0, t - r)))
    drift = sde.drift(x, t)
    return jax.tree.map(lambda leaf, old, f: old + (s - r) * f + share * (leaf - old - (t - r) * f), x, restored, drift)


def nonlinear(
    sde: SDE,
    score: Callable[[Tree, Array], Tree],
    times: Array,
    x: Tree,
    reach: Array | None = None,
    save: str | tuple[str, ...] = (),
) -> Sample:
    """Deterministic sampling of a forward process with any drift, by restoration and degradation.

    Args:
        sde: the forward process, ``diffjax.levels.SDE(drift, diffusion)``; the diffusion is a number at every t.
        score: ``(x, t) -> grad log p_t(x)``.
        times: shape (N + 1,), decreasing, from the time of ``x`` to where the sample is wanted.
        x: one state at ``times[0]``.
        reach: how far back a restoration goes, a time of at least the longest step; default: to time 0, as DDIM does.
        save: "states", or nothing.

    The local error is of second order, the global one of first: the law is that of the data up to O(1 / N).  One score
    call a step.

    Restoration-Degradation Beyond Linear Diffusions: A Non-Asymptotic Analysis For DDIM-Type Samplers,
    arXiv:2303.03384.

    Returns a `Sample`; ``saved.states_level`` has times only, since there is no alpha and no sigma.

    Raises ValueError for times that do not decrease or are below 0, or a reach that is shorter than a step.

    >>> forward = SDE(lambda x, t: -(x**3), lambda x, t: 1.0)
    >>> score = lambda x, t: -2 * x**3  # of data from the stationary law, exp(-x^4 / 2): the flow stands still
    >>> sample = nonlinear(forward, score, np.linspace(1.0, 0.2, 101), jnp.asarray(0.5))
    >>> round(float(sample.x), 2)
    0.5
    """
    save = (save,) if isinstance(save, str) else tuple(save)
    if not set(save) <= {"states"}:
        raise ValueError(f"save must be 'states' or nothing, got {save!r}.")
    _check(times, reach)
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf, jnp.float32)), x)
    times = jnp.asarray(times, jnp.finfo(jnp.result_type(*jax.tree.leaves(x))).dtype)

    def body(carry: tuple[Tree, Array], row: tuple[Array, Array, Array]) -> tuple[tuple[Tree, Array], Any]:
        x, failed_at = carry
        index, t, s = row
        r = jnp.zeros_like(t) if reach is None else t - jnp.asarray(reach, t.dtype)
        x = degrade(sde, restore(sde, score, x, t, r), x, t, r, s)
        finite = all_finite(x)
        return (x, jnp.where((failed_at < 0) & ~finite, index, failed_at)), x if save else None

    count = times.shape[0] - 1
    start = (x, -jnp.ones((), jnp.int32))
    (end, failed_at), path = jax.lax.scan(body, start, (jnp.arange(count, dtype=jnp.int32), times[:-1], times[1:]))
    calls = jnp.asarray(count, jnp.int32)
    saved = UNSAVED
    if save:
        states = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), x, path)
        saved = saved._replace(states=states, states_level=Level(times, None, None, None))
    return Sample(end, calls, calls, failed_at, saved)


def _check(times: Array, reach: Array | None) -> None:
    if np.ndim(times) != 1 or np.shape(times)[0] < 2:
        raise ValueError(f"times must be of shape (N + 1,) with N >= 1, got shape {np.shape(times)}.")
    if is_traced(times, reach):
        return
    steps = -np.diff(np.asarray(times, np.float64))
    if not np.all(steps > 0) or np.min(times) < 0:
        raise ValueError(f"times must decrease and be at least 0, got {times!r}.")
    if reach is not None and not (np.ndim(reach) == 0 and reach >= np.max(steps) * (1 - 1e-6)):
        raise ValueError(f"reach must be a time of at least the longest step {np.max(steps)}, got {reach!r}.")
