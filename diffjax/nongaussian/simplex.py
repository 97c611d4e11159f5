"""Diffusion on the simplex: Jacobi processes of the fractions in which a stick is broken.

A Jacobi process on [0, 1],

    dv = (s / 2) [a (1 - v) - b v] dt + sqrt(s v (1 - v)) dW,

forgets its start and ends as Beta(a, b).  Its transition density is ``p_t(v | v0) = Beta(v; a, b) h_t(v, v0)`` with

    h_t(v, v0) = sum_n exp(-s n (n - 1 + a + b) t / 2) P_n(v) P_n(v0),

P_n the polynomials orthonormal under Beta(a, b) (Jacobi's).  A vector x on the simplex with k entries is k - 1
fractions ``v_i = x_i / (1 - x_1 - .. - x_{i-1})``, each with a process of its own; Beta(1, k - i) makes the end
uniform.  The fractions behind a vertex say nothing, and start from their stationary law, where h = 1.

The process is reversible, so backwards its drift is ``f + g^2 grad log h``, f and g being the same as forwards: with h
for the density nothing is infinite at the border, where g = 0, and there is no epsilon.  A step is clipped to [0, 1].

Series in float64: terms of both signs cancel at small times, the sooner the fewer bits (``jax.enable_x64``).  This is
no ``x_t = alpha x_0 + sigma eps``, so it has a sampler of its own, a loop that returns a `Sample`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import UNSAVED, Array, Sample, is_traced, value


def jacobi(a: Array, b: Array, speed: Array | None = None, order: int = 64) -> Jacobi:
    """Independent Jacobi processes, an entry of the state each.

    Args:
        a, b: positive, of the shape of a state or broadcasting against it: the stationary law is Beta(a, b).
        speed: s > 0; default ``2 / (a + b)``, which makes all means relax as exp(-t).
        order: polynomials in the series; accurate once ``exp(-s order^2 t / 2)`` is negligible.

    Dirichlet Diffusion Score Model for Biological Sequence Generation, arXiv:2305.10699, equations 4 to 6.

    Raises ValueError unless a, b and speed are positive and order at least 1.

    >>> jacobi(1.0, 3.0).mean(np.array([1.0]), np.inf)
    array([0.25])
    """
    if not is_traced(a, b) and not (np.all(np.asarray(a) > 0) and np.all(np.asarray(b) > 0)):
        raise ValueError(f"a and b must be above 0, got a={a!r}, b={b!r}.")
    if speed is not None and not is_traced(speed) and not np.all(np.asarray(speed) > 0):
        raise ValueError(f"speed must be above 0, got {speed!r}.")
    if not isinstance(order, int) or order < 1:
        raise ValueError(f"order must be an integer of at least 1, got {order!r}.")
    a, b = np.broadcast_arrays(np.asarray(a, np.float64), np.asarray(b, np.float64))
    return Jacobi(a, b, 2 / (a + b) if speed is None else speed, *_recurrence(a, b, order))


def sticks(classes: int, order: int = 64) -> Jacobi:
    """The processes of the ``classes - 1`` fractions of a simplex that ends uniform: Beta(1, classes - i), i = 1, ..

    Raises ValueError unless classes is an integer of at least 2.
    """
    if not isinstance(classes, int) or classes < 2:
        raise ValueError(f"classes must be an integer of at least 2, got {classes!r}.")
    return jacobi(np.ones(classes - 1), np.arange(classes - 1.0, 0.0, -1.0), order=order)


def joined(fractions: Array) -> Array:
    """The point of the simplex, (..., k), of its fractions, (..., k - 1): ``x_i = v_i prod_{j < i} (1 - v_j)``.

    >>> joined(np.array([0.5, 0.5])).tolist()
    [0.5, 0.25, 0.25]
    """
    fractions = jnp.asarray(fractions)
    rest = jnp.cumprod(1 - fractions, axis=-1)
    one = jnp.ones_like(rest[..., :1])
    return jnp.concatenate([fractions, one], -1) * jnp.concatenate([one, rest], -1)


def broken(x: Array) -> Array:
    """The fractions (..., k - 1) of a point of the simplex (..., k); NaN where nothing is left to be broken."""
    x = np.asarray(x, np.float64)
    rest = 1 - np.cumsum(x, axis=-1)[..., :-1]
    before = np.concatenate([np.ones_like(x[..., :1]), rest[..., :-1]], axis=-1)
    return np.where(before > 1e-12, x[..., :-1] / np.where(before > 1e-12, before, 1.0), np.nan)


@value
class Jacobi:
    a: Array
    b: Array
    speed: Array
    centre: Array  # (order, ...) of the recurrence
    side: Array  # (order + 1, ...)

    def __repr__(self) -> str:
        return f"jacobi(order={len(self.centre)})"

    def _constants(self, v: Array) -> tuple[Array, Array, Array]:
        """a, b and s in the state's type: arrays of float64 beside a float32 state fail after `jax.enable_x64` ends."""
        if not isinstance(v, jax.Array):
            return self.a, self.b, self.speed
        a, b, speed = (jnp.asarray(part, v.dtype) for part in (self.a, self.b, self.speed))
        return a, b, speed

    def drift(self, v: Array) -> Array:
        """f, forwards."""
        a, b, speed = self._constants(v)
        return 0.5 * speed * (a * (1 - v) - b * v)

    def squared_diffusion(self, v: Array) -> Array:
        """g^2."""
        return self._constants(v)[2] * v * (1 - v)

    def mean(self, v0: Array, time: Array) -> Array:
        """E[v_t | v0]."""
        share = self.a / (self.a + self.b)
        xp = np if isinstance(v0, np.ndarray) else jnp
        return share + (v0 - share) * xp.exp(-0.5 * self.speed * (self.a + self.b) * time)

    def polynomials(self, v: Array) -> Array:
        """P_0 to P_order at v, ``(order + 1, ...)``."""
        v = jnp.asarray(v)
        y = 2 * v - 1
        one = jnp.ones(jnp.broadcast_shapes(y.shape, np.shape(self.a)), y.dtype)

        def next_one(pair: tuple[Array, Array], row: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
            before, now = pair
            centre, low, high = row
            after = ((y - centre) * now - low * before) / high
            return (now, after), after

        centre, side = (jnp.asarray(part, y.dtype) for part in (self.centre, self.side))
        _, rest = jax.lax.scan(next_one, (jnp.zeros_like(one), one), (centre, side[:-1], side[1:]))
        return jnp.concatenate([one[None], rest])

    def ratio(self, v: Array, v0: Array, time: Array) -> Array:
        """h_t(v, v0) = p_t(v | v0) / Beta(v; a, b) entry by entry; 1 where v0 is NaN, that is stationary."""
        v, v0, _ = jnp.broadcast_arrays(v, v0, self.a)
        started = ~jnp.isnan(v0)
        n = jnp.arange(len(self.centre) + 1.0, dtype=v.dtype).reshape(-1, *(1,) * v.ndim)
        a, b, speed = self._constants(v)
        decay = jnp.exp(-0.5 * speed * n * (n - 1 + a + b) * time)
        both = self.polynomials(v) * self.polynomials(jnp.where(started, v0, 0.5))
        return jnp.where(started, jnp.sum(decay * both, axis=0), 1.0)

    def log_density(self, v: Array, v0: Array, time: Array) -> Array:
        """log p_t(v | v0) entry by entry, in nats; NaN where it is so small that the series has lost all its digits."""
        return jax.scipy.stats.beta.logpdf(v, self.a, self.b) + jnp.log(self.ratio(v, v0, time))

    def score(self, v: Array, v0: Array, time: Array) -> Array:
        """d log p_t(v | v0) / dv entry by entry, for 0 < v < 1: the target of denoising score matching."""
        return jax.grad(lambda v: jnp.sum(self.log_density(v, v0, time)))(jnp.asarray(v))

    def prior(self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        """A stationary draw."""
        return jax.random.beta(key, jnp.asarray(self.a, dtype), jnp.asarray(self.b, dtype), shape, dtype)


def simplex_points(process: Jacobi, data: Array, weights: Array | None = None) -> SimplexPoints:
    """The exact ``log h_t(v) = log sum_n w_n prod_i h_t(v_i, v_ni)`` of a law on finitely many points.

    Args:
        data: fractions, ``(count, ...)``, NaN where they are stationary (see `broken`).

    Dirichlet Diffusion Score Model for Biological Sequence Generation, arXiv:2305.10699.

    Raises ValueError for fractions outside [0, 1] or weights that do not fit.
    """
    data = np.asarray(data, np.float64)
    if data.ndim < 1 or len(data) < 1 or np.any(data < 0) or np.any(data > 1):
        raise ValueError(f"data must have shape (count, ...) with fractions in [0, 1], got {data!r}.")
    weights = np.full(len(data), 1 / len(data)) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != (len(data),) or np.any(weights < 0) or not np.sum(weights) > 0:
        raise ValueError(f"weights must be ({len(data)},), non-negative with a positive sum, got {weights!r}.")
    starts, inverse = np.unique(data, return_inverse=True)  # few, for vertices: 0, 1 and NaN
    return SimplexPoints(process, starts, inverse.reshape(data.shape), weights / np.sum(weights))


@value
class SimplexPoints:
    process: Jacobi
    starts: Array
    index: Array  # (count, ...), which of the starts
    weights: Array
    factory = "simplex_points"

    def logits(self, v: Array, time: Array) -> Array:
        """log w_n + log h_t(v, v_n), ``(count,)``."""
        smallest = jnp.finfo(v.dtype).tiny  # where the series has lost all its digits
        each = [
            jnp.log(jnp.maximum(self.process.ratio(v, jnp.full(v.shape, s, v.dtype), time), smallest))
            for s in self.starts
        ]
        total = sum(
            jnp.sum(jnp.where(self.index == k, one, 0.0), axis=tuple(range(1, self.index.ndim)))
            for k, one in enumerate(each)
        )
        return jnp.log(jnp.asarray(self.weights, v.dtype)) + total

    def __call__(self, v: Array, time: Array) -> Array:
        """grad log h_t(v)."""
        return jax.grad(lambda v: jax.nn.logsumexp(self.logits(v, time)))(v)


def reverse_jacobi(
    key: Array,
    process: Jacobi,
    gradient: Callable[[Array, Array], Array],
    times: Array,
    shape: tuple[int, ...],
    given: Array | None = None,
    dtype: Any = jnp.float32,
) -> Sample:
    """Draw fractions by Euler-Maruyama on the reversed process, clipped to [0, 1].

        v <- clip(v + [f + g^2 grad log h_t] dt + g sqrt(dt) z)

    Args:
        gradient: ``(v, t) -> grad log h_t(v)``; of a score network it is ``score - grad log Beta(v; a, b)``.
        times: decreasing to the last, above 0, ``(steps + 1,)``.
        given: shaped like the state, fractions that are known, NaN elsewhere: they are clamped at every step, which is
            how a puzzle is solved.  It is not the conditional law (a clean value among noisy ones), so draw a few.

    Returns a `Sample` of fractions (`joined` makes them points); one call of ``gradient`` a step.

    Dirichlet Diffusion Score Model for Biological Sequence Generation, arXiv:2305.10699.

    Raises ValueError unless the times decrease and stay above 0.
    """
    if not is_traced(times):
        t = np.asarray(times, np.float64)
        if t.ndim != 1 or len(t) < 2 or t[-1] <= 0 or np.any(np.diff(t) >= 0):
            raise ValueError(f"times must decrease to a last one above 0, got {times!r}.")
    times = jnp.asarray(times, dtype)
    known = jnp.full(shape, jnp.nan, dtype) if given is None else jnp.asarray(given, dtype)
    clamp = lambda v: jnp.where(jnp.isnan(known), v, known)
    key_prior, key = jax.random.split(key)

    def body(state: tuple[Array, Array], row: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        v, failed_at = state
        index, now, later = row
        g2, dt = process.squared_diffusion(v), now - later
        z = jax.random.normal(jax.random.fold_in(key, index), shape, dtype)
        v = v + (process.drift(v) + g2 * gradient(v, now)) * dt + jnp.sqrt(g2 * dt) * z
        bad = (failed_at < 0) & ~jnp.all(jnp.isfinite(v))
        return (clamp(jnp.clip(v, 0.0, 1.0)).astype(dtype), jnp.where(bad, index, failed_at)), None

    start = clamp(process.prior(key_prior, shape, dtype)), jnp.full((), -1, jnp.int32)
    count = len(times) - 1
    (v, failed_at), _ = jax.lax.scan(body, start, (jnp.arange(count, dtype=jnp.int32), times[:-1], times[1:]))
    calls = jnp.asarray(count, jnp.int32)
    return Sample(v, calls, calls, failed_at, UNSAVED)


def _recurrence(a: Array, b: Array, order: int) -> tuple[Array, Array]:
    """``y P_n = side_{n+1} P_{n+1} + centre_n P_n + side_n P_{n-1}`` in y = 2 v - 1, of the Jacobi matrix."""
    alpha, beta = b - 1, a - 1
    total = alpha + beta
    n = np.arange(1.0, order + 1).reshape(-1, *(1,) * np.ndim(a))
    first = (beta - alpha) / (total + 2)
    centre = (beta**2 - alpha**2) / ((2 * n[:-1] + total) * (2 * n[:-1] + total + 2))
    later = n[1:]
    square = 4 * later * (later + alpha) * (later + beta) * (later + total)
    square = square / ((2 * later + total) ** 2 * (2 * later + total + 1) * (2 * later + total - 1))
    start = 4 * (1 + alpha) * (1 + beta) / ((2 + total) ** 2 * (3 + total))  # n = 1, where total = -1 would be 0 / 0
    side = np.sqrt(np.concatenate([np.zeros((1, *np.shape(a))), np.asarray(start)[None], square]))
    return np.concatenate([np.asarray(first)[None], centre]), side
