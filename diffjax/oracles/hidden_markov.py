"""Sequences of a hidden Markov chain: exact denoiser, score and density, by the forward-backward recursion.

State k of the chain emits ``x_i ~ N(mean_k, std_k^2)``; std 0 emits a value.  Noise on x_i is *soft evidence*: whatever
is known of each entry by itself (its noised value, a measurement) changes only how likely each state is there, so that
the law given all of it takes L K^2 operations, not K^L.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, Level, static, value


class Marginals(NamedTuple):
    """The law of every entry by itself: a mixture of K Gaussians (a value where its variance is 0); (K, ...) each."""

    log_weights: Array  # normalised
    means: Array
    variances: Array

    @property
    def mean(self) -> Array:
        """The mean of every entry."""
        return jnp.sum(jnp.exp(self.log_weights) * self.means, axis=0)


def hidden_markov(start: Array, transition: Array, means: Array, stds: Array = 0.0, length: int = 2) -> HiddenMarkov:
    """The exact denoiser of sequences (length,) emitted by a Markov chain of K hidden states.

    ``start`` (K,) and ``transition`` (K, K), from row to column, are normalised here; ``means`` (K,); ``stds`` (K,) or
    a number, 0 for a chain of K values.

    Raises ValueError if shapes do not fit, a probability or a std is negative, or a row has no probability.

    >>> chain = hidden_markov([0.5, 0.5], [[0.9, 0.1], [0.1, 0.9]], [-1.0, 1.0], length=3)
    >>> import diffjax
    >>> level = diffjax.processes.flow().level(0.5)
    >>> bool(chain(jnp.array([0.9, 0.0, 0.9]), level)[1] > 0.5)  # its neighbours tell
    True
    """
    start, transition, means, stds = (np.asarray(a, np.float64) for a in (start, transition, means, stds))
    count = start.size
    if start.shape != (count,) or transition.shape != (count, count) or means.shape != (count,):
        raise ValueError(
            f"start (K,), transition (K, K), means (K,) do not fit: {start.shape}, {transition.shape}, {means.shape}."
        )
    for name, rows in {"start": start, "transition": transition}.items():
        if np.any(rows < 0) or not np.all(rows.sum(axis=-1) > 0):
            raise ValueError(f"{name} must be non-negative with positive sums, got {rows!r}.")
    if stds.shape not in ((), (count,)) or np.any(stds < 0):
        raise ValueError(f"stds must be a number or ({count},), not negative, got {stds!r}.")
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"length must be an integer of at least 1, got {length!r}.")
    with np.errstate(divide="ignore"):
        logs = np.log(start / start.sum()), np.log(transition / transition.sum(axis=1, keepdims=True))
    return HiddenMarkov(*logs, means, np.broadcast_to(stds, (count,)).copy(), length)


@value
class HiddenMarkov:
    log_start: Array  # (K,)
    log_transition: Array  # (K, K)
    means: Array  # (K,)
    stds: Array  # (K,)
    length: int = static()
    factory = "hidden_markov"

    def __call__(self, x: Array, level: Level) -> Array:
        clean = jnp.asarray(level.sigma == 0)
        noisy = self.given(*noised_evidence(x, level)).mean
        return jnp.where(clean, x / jnp.where(clean, level.alpha, 1.0), noisy).astype(x.dtype)

    def given(self, observed: Array, precision: Array) -> Marginals:
        """The law of every entry given ``observed_i = x_i + z / sqrt(precision_i)`` for all i together.

        Precision 0 tells nothing; infinite tells x_i (where stds are 0: the nearest value).  Both (L,).
        """
        exact = jnp.isinf(precision)
        safe = jnp.where(exact, 1.0, precision)
        means, variances = (jnp.asarray(a, observed.dtype)[:, None] for a in (self.means, self.stds**2))
        gap = observed - means  # (K, L)
        # times a factor that no state knows of: N(o; mean, variance + 1 / precision)
        soft = -0.5 * (jnp.log1p(variances * safe) + safe * gap**2 / (1 + variances * safe))
        spread = jnp.where(variances > 0, variances, 1.0)
        hard = jnp.where(variances > 0, -0.5 * (jnp.log(spread) + gap**2 / spread), -jnp.inf)
        values = jnp.all(variances == 0)
        nearest = jnp.abs(gap) <= jnp.min(jnp.abs(gap), axis=0)
        hard = jnp.where(values & nearest, 0.0, hard)
        gain = jnp.where(exact, jnp.where(variances > 0, 1.0, 0.0), variances * safe / (1 + variances * safe))
        weights = self.smoothed(jnp.where(exact, hard, soft).T).T
        return Marginals(weights, means + gain * gap, (1 - gain) * variances)

    def smoothed(self, logs: Array) -> Array:
        """The log-probability of the state at each position, given log-likelihoods (L, K) of each by itself."""
        forward, start, transition = self._forward(logs)

        def back(after: Array, log: Array) -> tuple[Array, Array]:
            before = jax.nn.logsumexp(transition + (log + after), axis=1)
            return before, before

        last = jnp.zeros_like(start)
        _, backward = jax.lax.scan(back, last, logs[1:], reverse=True)
        return jax.nn.log_softmax(forward + jnp.concatenate([backward, last[None]]), axis=-1)

    def _forward(self, logs: Array) -> tuple[Array, Array, Array]:
        start, transition = (jnp.asarray(a, logs.dtype) for a in (self.log_start, self.log_transition))

        def on(before: Array, log: Array) -> tuple[Array, Array]:
            after = log + jax.nn.logsumexp(before[:, None] + transition, axis=0)
            return after, after

        _, rest = jax.lax.scan(on, start + logs[0], logs[1:])
        return jnp.concatenate([(start + logs[0])[None], rest]), start, transition

    def log_density(self, x: Array, level: Level) -> Array:
        """log p_t(x) in nats, where alpha std or sigma is above 0."""
        means, stds = (jnp.asarray(a, x.dtype) for a in (self.means, self.stds))
        variance = level.alpha**2 * stds**2 + level.sigma**2
        gap = x[:, None] - level.alpha * means
        logs = -0.5 * (gap**2 / variance + jnp.log(2 * jnp.pi * variance))
        return jax.nn.logsumexp(self._forward(logs)[0][-1])

    def score(self, x: Array, level: Level) -> Array:
        """grad log p_t(x), for sigma > 0."""
        return (level.alpha * self(x, level) - x) / level.sigma**2

    def sample(self, key: Array, level: Level | None = None, dtype=jnp.float32) -> Array:
        """A draw of the data, or of x_t at a level."""
        chain, noise = jax.random.split(key)
        keys = jax.random.split(chain, self.length)
        start, transition = (jnp.asarray(a, dtype) for a in (self.log_start, self.log_transition))

        def on(logs: Array, key: Array) -> tuple[Array, Array]:
            state = jax.random.categorical(key, logs)
            return transition[state], state

        _, states = jax.lax.scan(on, start, keys)
        alpha, sigma = (1.0, 0.0) if level is None else (level.alpha, level.sigma)
        means, stds = (jnp.asarray(a, dtype)[states] for a in (self.means, self.stds))
        spread = jnp.sqrt(alpha**2 * stds**2 + sigma**2)
        return alpha * means + spread * jax.random.normal(noise, states.shape, dtype)


def noised_evidence(x: Array, level: Level) -> tuple[Array, Array]:
    """``(x / alpha, alpha^2 / sigma^2)``: what x_t tells of x_0 by itself; precision 0 at alpha = 0."""
    inside = jnp.asarray(level.alpha) > 0
    sigma = jnp.where(jnp.asarray(level.sigma) > 0, level.sigma, 1.0)
    observed = jnp.where(inside, x / jnp.where(inside, level.alpha, 1.0), 0.0)
    precision = jnp.where(jnp.asarray(level.sigma) > 0, (level.alpha / sigma) ** 2, jnp.inf)
    return observed, jnp.broadcast_to(jnp.asarray(precision, x.dtype), x.shape)
