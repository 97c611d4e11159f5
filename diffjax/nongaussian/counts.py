"""Counts that are thinned away: Blackout diffusion (pure death) and learning to jump (Poisson thinning).

The clock is the share ``keep`` of the counts that is left, 1 at the data and 0 where nothing is: of Blackout diffusion
``keep = exp(-t)``, but any schedule of times is one of shares, and both ends are exact.

*Pure death*: ``n ~ Binomial(n0, keep)``, each unit lives or not.  Backwards units are born: from share p up, given n0,

    n' - n ~ Binomial(n0 - n, (p' - p) / (1 - p)),        at a rate (E[n0 | n] - n) / (1 - p) for every dp,

the second in law of the unconditional process: exactly, with the posterior mean alone.  Generation starts at n = 0.

*Poisson*: ``z ~ Poisson(keep scale x)`` of data x >= 0, and backwards ``z' - z ~ Poisson((p' - p) scale x)`` given x.

Both learn a mean by the relative entropy ``x log(x / y) - x + y``, whose sum over a path is a likelihood.  Counts are
not noised as x_t = alpha x_0 + sigma eps, so these have samplers of their own, loops over an increasing list of shares
that return a `Sample`; a denoiser is ``denoise(counts, keep) -> E[clean | counts]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import UNSAVED, Array, Sample, is_traced, static, value

BIRTHS = ("binomial", "poisson")


def thinned(key: Array, counts: Array, keep: Array) -> Array:
    """Counts of which every unit stays with probability ``keep``: a draw of ``Binomial(counts, keep)``.

    From share p to share p' < p it is ``keep = p' / p``.

    Raises ValueError unless 0 <= keep <= 1.

    >>> thinned(jax.random.key(0), jnp.array([3.0, 5.0]), 1.0)
    Array([3., 5.], dtype=float32)
    """
    if not is_traced(keep) and not (np.all(np.asarray(keep) >= 0) and np.all(np.asarray(keep) <= 1)):
        raise ValueError(f"keep must be in [0, 1], got {keep!r}.")
    counts = jnp.asarray(counts, jnp.result_type(counts, jnp.float32))
    keep = jnp.broadcast_to(jnp.asarray(keep, counts.dtype), counts.shape)
    inside = (keep > 0) & (keep < 1) & (counts > 0)
    draw = jax.random.binomial(key, jnp.where(inside, counts, 1.0), jnp.where(inside, keep, 0.5), dtype=counts.dtype)
    return jnp.where(inside, draw, jnp.where(keep > 0, counts, 0.0))


def bridged(key: Array, counts: Array, clean: Array, keep: Array, later: Array) -> Array:
    """The counts at share ``later`` >= ``keep`` of a pure-death process, given those at ``keep`` and the clean ones.

        n' = n + Binomial(n0 - n, (p' - p) / (1 - p))

    ``clean`` may be fractional, an estimate: then n0 - n is rounded up or down at random, with the right mean.

    Blackout Diffusion: Generative Diffusion Models in Discrete-State Spaces, arXiv:2305.11089, section 3.
    """
    key_round, key_birth = jax.random.split(key)
    missing = jnp.maximum(clean - counts, 0.0)
    whole = jnp.floor(missing + jax.random.uniform(key_round, jnp.shape(missing), missing.dtype))
    return counts + thinned(key_birth, whole, _share(keep, later))


def birth_rate(clean: Array, counts: Array, keep: Array) -> Array:
    """The reverse rate of ``n -> n + 1`` in the time t of ``keep = exp(-t)``: ``(E[n0 | n] - n) p / (1 - p)``.

    Blackout Diffusion: Generative Diffusion Models in Discrete-State Spaces, arXiv:2305.11089, section 3.
    """
    return (clean - counts) * keep / (1 - keep)


def relative_entropy(target: Array, estimate: Array) -> Array:
    """``x log(x / y) - x + y`` entry by entry: a loss of y for x that is least, 0, at y = x, and in the mean at E[x].

    Learning to Jump: Thinning and Thickening Latent Counts for Generative Modeling, arXiv:2305.18375; it is
    ``y - x log y`` but for what does not depend on y.

    >>> float(relative_entropy(2.0, 2.0)), float(relative_entropy(0.0, 3.0))
    (0.0, 3.0)
    """
    x, y = jnp.asarray(target), jnp.asarray(estimate)
    positive = x > 0
    safe = jnp.where(positive, x, 1.0)
    return jnp.where(positive, safe * (jnp.log(safe) - jnp.log(jnp.where(positive, y, 1.0))) - x, 0.0) + y


def blackout_loss(estimate: Array, clean: Array, counts: Array, keep: Array) -> Array:
    """The loss of an estimate of E[n0 | n] at one share: the sum of ``relative_entropy(n0 - n, y - n) / (1 - p)``.

    Its integral over p from 0 to 1, with ``counts = thinned(key, clean, p)``, bounds ``-log P(n0)`` in nats, and is
    equal to it for the exact posterior mean.  In the time of the paper dp is ``exp(-t) dt``.

    Blackout Diffusion: Generative Diffusion Models in Discrete-State Spaces, arXiv:2305.11089, section 4.
    """
    return jnp.sum(relative_entropy(clean - counts, estimate - counts)) / (1 - keep)


def blackout(
    key: Array,
    denoise: Callable[[Array, Array], Array],
    shares: Array,
    shape: tuple[int, ...],
    births: str = "binomial",
    dtype: Any = jnp.float32,
) -> Sample:
    """Draw counts by the reverse of pure death, from nothing.

        n' = n + Binomial(y, (p' - p) / (1 - p))  or  n + Poisson(y (p' - p) / (1 - p)),    y = E[n0 | n] - n

    Args:
        key: one PRNG key; batches come from `jax.vmap`.
        denoise: ``(counts, keep) -> E[n0 | n]``, of the shape of the counts.
        shares: increasing from 0, where counts are zero, to the last (1: the data), ``(steps + 1,)``.
        births: "binomial", which never makes more than y rounded, or "poisson" (tau-leaping).  Both are exact in law as
            the steps become small, and the first also where the posterior is a point.

    Returns a `Sample`; one denoiser call a step.

    Blackout Diffusion: Generative Diffusion Models in Discrete-State Spaces, arXiv:2305.11089, algorithms 2 and 3.

    Raises ValueError unless the shares increase from 0 to at most 1, and for other births.

    >>> shares = np.linspace(0, 1, 5)
    >>> blackout(jax.random.key(0), lambda n, keep: 0 * n + 7.0, shares, (2,)).x
    Array([7., 7.], dtype=float32)
    """
    if births not in BIRTHS:
        raise ValueError(f"births must be one of {BIRTHS}, got {births!r}.")

    def step(key: Array, n: Array, keep: Array, later: Array) -> Array:
        clean = denoise(n, keep)
        if births == "binomial":
            return bridged(key, n, clean, keep, later)
        return n + _poisson(key, jnp.maximum(clean - n, 0.0) * _share(keep, later))

    return _walk(key, step, shares, shape, dtype)


def thickened(
    key: Array,
    denoise: Callable[[Array, Array], Array],
    shares: Array,
    shape: tuple[int, ...],
    scale: Array = 1.0,
    dtype: Any = jnp.float32,
) -> Sample:
    """Draw Poisson counts by thickening, ``z' = z + Poisson((p' - p) scale E[x | z])``, from nothing.

    Args:
        denoise: ``(counts, keep) -> E[x | z]``.
        shares: increasing from 0 to at most 1, ``(steps + 1,)``.
        scale: of the last counts, ``z ~ Poisson(scale x)``: the larger, the closer is ``z / scale`` to x.

    Returns a `Sample` of counts; ``denoise(sample.x, 1.0)`` is the estimate of x.  One denoiser call a step.

    Learning to Jump: Thinning and Thickening Latent Counts for Generative Modeling, arXiv:2305.18375.

    Raises ValueError unless the shares increase from 0 to at most 1.
    """

    def step(key: Array, z: Array, keep: Array, later: Array) -> Array:
        return z + _poisson(key, (later - keep) * scale * denoise(z, keep))

    return _walk(key, step, shares, shape, dtype)


def count_points(data: Array, weights: Array | None = None, scale: Array | None = None) -> CountPoints:
    """The exact denoiser of a law on finitely many vectors of counts, ``(count, ...)``, under thinning.

    Without ``scale`` of a pure-death process, with it of Poisson counts of mean ``keep scale x``, where data need not
    be whole.

    Raises ValueError for negative data or weights, data that are not whole without scale, or shapes that do not fit.

    >>> denoise = count_points(np.array([[0.0], [4.0]]))
    >>> denoise(jnp.array([0.0]), 0.0), denoise(jnp.array([1.0]), 0.5)
    (Array([2.], dtype=float32), Array([4.], dtype=float32))
    """
    data = np.asarray(data, np.float64)
    if data.ndim < 1 or len(data) < 1 or np.any(data < 0) or (scale is None and np.any(data != np.round(data))):
        raise ValueError(f"data must have shape (count, ...) and be counts of at least 0, got {data!r}.")
    weights = np.full(len(data), 1 / len(data)) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != (len(data),) or np.any(weights < 0) or not np.sum(weights) > 0:
        raise ValueError(f"weights must be ({len(data)},), non-negative with a positive sum, got {weights!r}.")
    return CountPoints(data, weights / np.sum(weights), 1.0 if scale is None else scale, scale is None)


@value
class CountPoints:
    data: Array
    weights: Array
    scale: Array
    dies: bool = static()
    factory = "count_points"

    def posterior(self, counts: Array, keep: Array) -> Array:
        """The probability of every vector given the counts at a share, ``(count,)``."""
        data = jnp.asarray(self.data, counts.dtype).reshape(len(self.data), -1)
        n = counts.reshape(-1)
        logs = jax.scipy.special.xlogy, jax.scipy.special.xlog1py, jax.scipy.special.gammaln
        xlogy, xlog1py, gammaln = logs
        if self.dies:
            missing = jnp.maximum(data - n, 0.0)
            each = gammaln(data + 1) - gammaln(missing + 1) + xlog1py(missing, -keep)
            each = jnp.where(data < n, -jnp.inf, each)
        else:
            mean = self.scale * data
            each = xlogy(n, mean) - keep * mean
        return jax.nn.softmax(jnp.log(jnp.asarray(self.weights, counts.dtype)) + jnp.sum(each, axis=1))

    def __call__(self, counts: Array, keep: Array) -> Array:
        """The posterior mean of the clean vector."""
        mean = self.posterior(counts, keep) @ jnp.asarray(self.data, counts.dtype).reshape(len(self.data), -1)
        return mean.reshape(counts.shape)


def _share(keep: Array, later: Array) -> Array:
    """Of the units that are missing at ``keep``, the share that is back at ``later``; all of them at 1."""
    xp = np if isinstance(keep, float) and isinstance(later, float) else jnp
    return xp.where(xp.asarray(later) == 1, 1.0, (later - keep) / xp.where(xp.asarray(keep) == 1, 1.0, 1 - keep))


def _poisson(key: Array, mean: Array) -> Array:
    return jax.random.poisson(key, mean).astype(mean.dtype)


def _walk(key: Array, step: Callable, shares: Array, shape: tuple[int, ...], dtype: Any) -> Sample:
    if not is_traced(shares):
        p = np.asarray(shares, np.float64)
        if p.ndim != 1 or len(p) < 2 or p[0] != 0 or p[-1] > 1 or np.any(np.diff(p) <= 0):
            raise ValueError(f"shares must increase from 0 to at most 1, at least two of them, got {shares!r}.")
    shares = jnp.asarray(shares, dtype)
    count = len(shares) - 1

    def body(state: tuple[Array, Array], row: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        counts, failed_at = state
        index, keep, later = row
        counts = step(jax.random.fold_in(key, index), counts, keep, later).astype(dtype)
        bad = (failed_at < 0) & ~jnp.all(jnp.isfinite(counts))
        return (counts, jnp.where(bad, index, failed_at)), None

    start = jnp.zeros(shape, dtype), jnp.full((), -1, jnp.int32)
    (x, failed_at), _ = jax.lax.scan(body, start, (jnp.arange(count, dtype=jnp.int32), shares[:-1], shares[1:]))
    calls = jnp.asarray(count, jnp.int32)
    return Sample(x, calls, calls, failed_at, UNSAVED)
