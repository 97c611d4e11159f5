"""Kernels with Gamma increments, and the tilted Beta laws of their bridges."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffjax.levels import Array, as_value, value
from diffjax.quantiles import bisected
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
    differentiable, but weights are.  Their series has some 15 sqrt(t) terms.

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
            tilt = excess * jnp.where(gap >= 0, gap, 0.0)
            # a small rest may round to none on the way, which is no reason to lose the draw: a start at the target has
            # h = 0 all the same
            y = jnp.minimum(x + gap * tilted_beta(noise, a, h.shape, tilt), message.source.target)
            log_weight = log_ratio + log_tilt(a, h.shape, tilt)
        return Guided(y, jnp.where(gap >= 0, log_weight, -jnp.inf), y)


# --- the tilted Beta law ----------------------------------------------------------------------------------------------
#
# For e^{|t| s}, s = b or 1 - b, it is a mixture of the laws Beta(first + n, second) of s, n = 0, 1, .., with the
# weights |t|^n / n! (first)_n / (first + second)_n, all positive: their sum is 1F1(first; first + second; |t|).
#
# Sums go from the largest term to both sides until nothing is left, in multiples of it; its own logarithm is that of a
# Poisson law times a power.  Term 0 is apart: small ``first`` can make it large beside small ones.


def log_tilt(a: Array, c: Array, t: Array) -> Array:
    """``log E[exp(-t b)]`` for b ~ Beta(a, c): log 1F1(a; a + c; -t)."""
    turned = t > 0
    size = jnp.where(turned, t, -t)  # abs has no derivative at 0
    return _log_scaled(jnp.where(turned, c, a), a + c, size) + jnp.where(turned, 0.0, size)


def tilted_beta(noise: Array, a: Array, c: Array, t: Array) -> Array:
    """A draw of the law of b, of two standard normal numbers: one for n and one for the Beta law."""
    turned, size = t > 0, jnp.abs(t)
    first, second = jnp.where(turned, c, a), jnp.where(turned, a, c)
    n = _term(jax.scipy.stats.norm.cdf(noise[0]), first, a + c, size)
    u = jax.scipy.stats.norm.cdf(noise[1])
    s = _beta_quantile(jnp.where(turned, 1 - u, u), first + n, second)
    kind = jnp.finfo(s.dtype)
    return jnp.clip(jnp.where(turned, 1 - s, s), 0.0, 1 - kind.epsneg)


def log_kummer(a: Array, b: Array, x: Array) -> Array:
    """log 1F1(a; b; x) for 0 < a <= b and x >= 0, by its series; with derivatives."""
    return _log_scaled(a, b, x) + x


@jax.custom_jvp
def _log_scaled(a: Array, b: Array, x: Array) -> Array:
    """``log 1F1(a; b; x) - x``, which does not grow as x does."""
    return _series(a, b, x)[0]


@_log_scaled.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    value_, slopes = _series(*primals)
    return value_, sum(slope * tangent for slope, tangent in zip(slopes, tangents, strict=True))


def _series(a: Array, b: Array, x: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    """The logarithm and its derivatives: means of those of a term's logarithm."""
    a, b, given = _alike(a, b, x)
    small = given < jnp.finfo(given.dtype).eps  # of first order, and term 1 may be too small for a number
    x = jnp.where(small, 1.0, given)
    mode = _mode(a, b, x)
    log_mode = _log_term(mode, a, b, x)
    down, up = (_walk(sign, mode, a, b, x)[2] for sign in (-1, 1))
    total, *offsets = [below + above for below, above in zip(down, up, strict=True)]
    rest = log_mode + jnp.log1p(total)  # all but term 0
    log_sum = jnp.logaddexp(rest, -x)
    share = jnp.exp(rest - log_sum)
    da, db, dn = (offset / (1 + total) for offset in offsets)
    psi = jax.scipy.special.digamma
    da = share * (psi(a + mode) - psi(a) + da)
    db = share * (psi(b) - psi(b + mode) + db)
    dx = share * (mode - x + dn) / x - (1 - share)
    at_zero = a / b - 1
    return jnp.where(small, at_zero * given, log_sum), (
        jnp.where(small, given / b, da),
        jnp.where(small, -given * a / b**2, db),
        jnp.where(small, at_zero, dx),
    )


def _term(u: Array, a: Array, b: Array, x: Array) -> Array:
    """The u-quantile of n, whose probabilities are the terms of 1F1(a; b; x)."""
    u, a, b, x = (jax.lax.stop_gradient(leaf) for leaf in _alike(u, a, b, x))
    none = x < jnp.finfo(x.dtype).eps
    x = jnp.where(none, 1.0, x)
    log_sum, mode = _series(a, b, x)[0], _mode(a, b, x)
    n, term, _ = _walk(-1, mode, a, b, x)  # from where there is anything
    none = none | (u <= jnp.exp(-x - log_sum))
    term = term * jnp.exp(_log_term(mode, a, b, x) - log_sum)
    left = u - jnp.exp(-x - log_sum) - term
    least = jnp.finfo(x.dtype).eps ** 1.5

    def more(carry: tuple) -> Array:
        n, term, left = carry
        return ~none & (left > 0) & ((n <= mode) | (term > least))  # beyond it there is nothing but rounding

    def body(carry: tuple) -> tuple:
        n, term, left = carry
        moving = more(carry)
        term = jnp.where(moving, term * _ratio(n, a, b, x), term)
        return n + moving, term, left - jnp.where(moving, term, 0.0)

    n, _, _ = jax.lax.while_loop(lambda carry: jnp.any(more(carry)), body, (n, term, left))
    return jnp.where(none, 0.0, n)


def _alike(*arrays: Array) -> list[Array]:
    return jnp.broadcast_arrays(*(jnp.asarray(leaf, jnp.result_type(*arrays)) for leaf in arrays))


def _ratio(n: Array, a: Array, b: Array, x: Array) -> Array:
    """Term n + 1 over term n."""
    return (a + n) / (b + n) * (x / (n + 1))


def _mode(a: Array, b: Array, x: Array) -> Array:
    """The largest of the terms from 1 on, or one next to it: where the ratio is 1."""
    half = 0.5 * (x - b - 1)
    return jax.lax.stop_gradient(jnp.maximum(jnp.floor(half + jnp.sqrt(jnp.maximum(half**2 + a * x - b, 0.0))), 1.0))


def _walk(sign: int, mode: Array, a: Array, b: Array, x: Array) -> tuple[Array, Array, list[Array]]:
    """From the mode up or down, not to 0: the last n, its term over that of the mode, and the sums of those terms.

    Then the same times how their logarithms' derivatives in a, b and (times x) in x differ from the mode's.
    """
    least = jnp.finfo(x.dtype).eps ** 1.5

    def more(n: Array, term: Array) -> Array:
        return (term > least) & (n + sign >= 1)

    def body(carry: tuple) -> tuple:
        n, term, da, db, sums = carry
        lower = n if sign > 0 else n - 1
        moving = more(n, term)
        lower = jnp.where(moving, lower, 1.0)
        term = jnp.where(moving, term * _ratio(lower, a, b, x) ** sign, term)
        da, db = da + sign / (a + lower), db - sign / (b + lower)
        n = jnp.where(moving, n + sign, n)
        kept = jnp.where(moving, term, 0.0)
        return n, term, da, db, [s + kept * now for s, now in zip(sums, (1.0, da, db, n - mode), strict=True)]

    zero = jnp.zeros_like(x)
    start = mode, zero + 1, zero, zero, [zero] * 4
    n, term, _, _, sums = jax.lax.while_loop(lambda carry: jnp.any(more(*carry[:2])), body, start)
    return n, term, sums


def _log_term(n: Array, a: Array, b: Array, x: Array) -> Array:
    """``log(e^-x x^n / n! (a)_n / (b)_n)`` for n >= 1, large logarithms of factorials cancelled by hand."""
    far = jnp.abs(n - x) > 0.1 * (n + x)
    ratio = jnp.where(far, 0.0, (n - x) / (n + x))
    odd = ratio**3 * sum(ratio ** (2 * k) / (2 * k + 3) for k in range(7))
    deviance = jnp.where(far, n * jnp.log(n / x) + x - n, (n - x) * ratio + 2 * n * odd)  # n log(n / x) + x - n
    poisson = -deviance - 0.5 * jnp.log(2 * jnp.pi * n) - _stirling(n)
    power = (a + n - 0.5) * _log_quotient(a + n, b + n, b - a) - (a - 0.5) * _log_quotient(a, b, b - a)
    rest = _stirling(a + n) - _stirling(b + n) - _stirling(a) + _stirling(b)
    return poisson + power - (b - a) * jnp.log1p(n / b) + rest


def _log_quotient(p: Array, q: Array, difference: Array) -> Array:
    """``log(p / q)``, of near numbers by their difference q - p."""
    near = difference < 0.5 * q
    return jnp.where(near, jnp.log1p(-jnp.where(near, difference / q, 0.0)), jnp.log(p / q))


def _stirling(z: Array) -> Array:
    """``log Gamma(z) - (z - 1/2) log z + z - log(2 pi) / 2``."""
    large = z > 16
    inverse = 1 / jnp.where(large, z, 16.0)
    series = 0.0
    for coefficient in (-691 / 360360, 1 / 1188, -1 / 1680, 1 / 1260, -1 / 360, 1 / 12):
        series = coefficient + series * inverse**2
    z = jnp.where(large, 16.0, z)
    direct = jax.scipy.special.gammaln(z) - (z - 0.5) * jnp.log(z) + z - 0.5 * jnp.log(2 * jnp.pi)
    return jnp.where(large, series * inverse, direct)


def _log_gamma(x: Array, shape: Array, rate: Array) -> Array:
    inside = x > 0
    x = jnp.where(inside, x, 1.0)
    logs = shape * jnp.log(rate) - jax.scipy.special.gammaln(shape) + (shape - 1) * jnp.log(x) - rate * x
    return jnp.where(inside, logs, -jnp.inf)


def _beta_quantile(u: Array, a: Array, b: Array) -> Array:
    """The u-quantile of Beta(a, b), by bisection."""
    below, kind = lambda x: jax.scipy.special.betainc(a, b, x), jnp.finfo(u.dtype)
    found = bisected(below, u, jnp.zeros_like(u), jnp.ones_like(u), kind.nmant + 8)
    return jnp.clip(found, 0.0, 1 - kind.epsneg)
