"""Kernels with Gamma increments, and the tilted Beta laws of their bridges."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffjax.levels import Array, as_value, value
from diffjax.smoothing.potentials import Guided, Message, Point, floats
from diffjax.solvers.arguments import positive


@value
class Increment:
    """``h(x) = Gamma(target - x; shape, rate)``, and 0 from the target on."""

    target: Array
    shape: Array
    rate: Array
    log_scale: Array

    def __call__(self, x: Array) -> Array:
        return self.log_scale + _log_gamma(self.target - x, self.shape, self.rate)


def gamma(shape: Array, rate: Any, surrogate: Array | None = None) -> Gamma:
    """The kernel ``x -> x + g``, g ~ Gamma(shape, rate(x)), of a number: a process with Gamma increments over a step.

    A known state v after steps of shapes a_1 .. a_n pulls back to h(x) = Gamma(v - x; a_1 + .. + a_n, rate l).  Guided,
    ``y = x + (v - x) b`` with b of the tilted Beta law, and with a weight that does not depend on the draw,

        p(b) = b^(a - 1) (1 - b)^(c - 1) e^(-t b) / (B(a, c) M),     weight = (rate(x) / l)^a M,
        t = (rate(x) - l) (v - x),     M = 1F1(a; a + c; -t),     c = what is left of the shapes:

    the kernel's own draw given h, and ``(k h)(x) / (l h)(x)``; 1 where the rate is l.  Draws are quantiles: not
    differentiable, but weights are.  Their series has about as many terms as t.

    Args:
        shape: above 0; of a process, its rate of jumps times the time of the step.
        rate: above 0, or a function of x.
        surrogate: the rate l of the backward map, the same for all steps; default ``rate``, if that is a number.

    Automatic Backward Filtering Forward Guiding for Markov processes and graphical models, arXiv:2010.03509.

    Raises ValueError for other numbers, and for a rate that is a function without a surrogate.
    """
    if surrogate is None and callable(rate):
        raise ValueError("a rate that is a function needs a surrogate, the rate of the backward map.")
    surrogate = rate if surrogate is None else surrogate
    for name, given in (("shape", shape), ("surrogate", surrogate), *(() if callable(rate) else (("rate", rate),))):
        positive(name, given)
    return Gamma(floats(shape), as_value(rate) if callable(rate) else floats(rate), floats(surrogate))


@value
class Gamma:
    shape: Array
    rate: Any
    surrogate: Array
    factory = "gamma"
    parts = 1

    def noise(self, key: Array, index: Array = 0) -> Array:
        return jax.random.normal(jax.random.fold_in(key, index), (2,), self.shape.dtype)

    def backward(self, h: Any) -> tuple[Message, Increment]:
        if isinstance(h, Point):
            kind = self.shape.dtype
            source = Increment(h.x.astype(kind), self.shape, self.surrogate, h.log_scale.astype(kind))
        elif isinstance(h, Increment):
            source = Increment(h.target, h.shape + self.shape, h.rate, h.log_scale)
        else:
            raise ValueError(f"a gamma kernel pulls back a point or an Increment, got {h!r}.")
        return Message(h, source), source

    def forward(self, message: Message, x: Array, noise: Array) -> Guided:
        h, a = message.target, self.shape
        rate = self.rate(x) if callable(self.rate) else self.rate
        excess, gap = rate - self.surrogate, message.source.target - x
        log_ratio = a * jnp.log(rate / self.surrogate)
        if isinstance(h, Point):
            y, log_weight = h.x.astype(a.dtype), log_ratio - excess * gap
        else:
            tilt = excess * jnp.maximum(gap, 0.0)
            y = x + gap * tilted_beta(noise, a, h.shape, tilt)
            log_weight = log_ratio + log_tilt(a, h.shape, tilt)
        return Guided(y, jnp.where(gap > 0, log_weight, -jnp.inf), y)


# --- the tilted Beta law ----------------------------------------------------------------------------------------------
#
# For e^{|t| s}, s = b or 1 - b, it is a mixture of the laws Beta(first + n, second) of s, n = 0, 1, .., with the
# weights |t|^n / n! (first)_n / (first + second)_n, all positive: their sum is 1F1(first; first + second; |t|).


def log_tilt(a: Array, c: Array, t: Array) -> Array:
    """``log E[exp(-t b)]`` for b ~ Beta(a, c): log 1F1(a; a + c; -t)."""
    first = jnp.where(t > 0, c, a)
    return log_kummer(first, a + c, jnp.abs(t)) - jnp.maximum(t, 0.0)


def tilted_beta(noise: Array, a: Array, c: Array, t: Array) -> Array:
    """A draw of the law of b, of two standard normal numbers: one for n and one for the Beta law."""
    turned, size = t > 0, jnp.abs(t)
    first, second = jnp.where(turned, c, a), jnp.where(turned, a, c)
    n = _term(jax.scipy.stats.norm.cdf(noise[0]), first, a + c, size)
    u = jax.scipy.stats.norm.cdf(noise[1])
    s = _beta_quantile(jnp.where(turned, 1 - u, u), first + n, second)
    kind = jnp.finfo(s.dtype)
    return jnp.clip(jnp.where(turned, 1 - s, s), 0.0, 1 - kind.epsneg)


@jax.custom_jvp
def log_kummer(a: Array, b: Array, x: Array) -> Array:
    """log 1F1(a; b; x) for 0 < a <= b and x >= 0, by its series; with derivatives."""
    return _series(a, b, x)[0]


@log_kummer.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    value_, slopes = _series(*primals)
    return value_, sum(slope * tangent for slope, tangent in zip(slopes, tangents, strict=True))


def _series(a: Array, b: Array, x: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    """The logarithm and its derivatives: means of those of a term's logarithm."""
    a, b, x = jnp.broadcast_arrays(*(jnp.asarray(leaf, jnp.result_type(a, b, x)) for leaf in (a, b, x)))
    zero = jnp.zeros_like(x)
    safe = jnp.where(x > 0, x, 1.0)

    def more(carry: tuple) -> Array:
        n, log_term, log_sum, *_ = carry
        return jnp.any((n < x) | (log_term > log_sum + jnp.log(jnp.finfo(x.dtype).eps) - 2)) & jnp.any(x > 0)

    def body(carry: tuple) -> tuple:
        n, log_term, log_sum, da, db, *means = carry
        log_term = log_term + jnp.log((a + n) / ((b + n) * (n + 1))) + jnp.log(safe)
        da, db, n = da + 1 / (a + n), db - 1 / (b + n), n + 1
        total = jnp.logaddexp(log_sum, log_term)
        share = jnp.exp(log_term - total)
        means = [m + share * (now - m) for m, now in zip(means, (da, db, n / safe), strict=True)]
        return n, log_term, total, da, db, *means

    _, _, total, _, _, *means = jax.lax.while_loop(more, body, (zero,) * 8)
    none = x == 0
    slopes = jnp.where(none, 0.0, means[0]), jnp.where(none, 0.0, means[1]), jnp.where(none, a / b, means[2])
    return jnp.where(none, 0.0, total), slopes


def _term(u: Array, a: Array, b: Array, x: Array) -> Array:
    """The u-quantile of n, whose probabilities are the terms of 1F1(a; b; x)."""
    total = jax.lax.stop_gradient(_series(a, b, x)[0])
    safe = jnp.where(x > 0, x, 1.0)
    last = 4 * x + 200  # beyond it there is nothing but rounding

    def more(carry: tuple) -> Array:
        n, _, below = carry
        return jnp.any((below < u) & (n < last)) & jnp.any(x > 0)

    def body(carry: tuple) -> tuple:
        n, log_term, below = carry
        moving = (below < u) & (n < last)
        log_term = log_term + jnp.where(moving, jnp.log((a + n) / ((b + n) * (n + 1))) + jnp.log(safe), 0.0)
        n = n + moving
        return n, log_term, below + jnp.where(moving, jnp.exp(log_term), 0.0)

    start = jnp.zeros_like(total), -total, jnp.exp(-total)
    n, _, _ = jax.lax.while_loop(more, body, start)
    return jnp.where(x > 0, n, 0.0)


def _log_gamma(x: Array, shape: Array, rate: Array) -> Array:
    inside = x > 0
    x = jnp.where(inside, x, 1.0)
    logs = shape * jnp.log(rate) - jax.scipy.special.gammaln(shape) + (shape - 1) * jnp.log(x) - rate * x
    return jnp.where(inside, logs, -jnp.inf)


def _beta_quantile(u: Array, a: Array, b: Array) -> Array:
    """The u-quantile of Beta(a, b), by bisection."""
    steps = jnp.finfo(u.dtype).nmant + 8

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        below = jax.scipy.special.betainc(a, b, middle) < u
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low, high = jax.lax.fori_loop(0, steps, halve, (jnp.zeros_like(u), jnp.ones_like(u)))
    return jnp.clip(0.5 * (low + high), 0.0, 1 - jnp.finfo(u.dtype).epsneg)
