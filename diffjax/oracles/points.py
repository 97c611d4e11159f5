"""A finite point set with weights: the softmax denoiser, in chunks of bounded memory.

``p_t(x) = sum_n w_n N(x; alpha x_n, sigma^2 I)`` and ``E[x_0 | x_t] = sum_n softmax_n(log w_n - |x - alpha x_n|^2 /
(2 sigma^2)) x_n``: the ideal denoiser of a training set.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, Level, static, value

_SMALLEST = 1e-30  # a variance by which squared distances up to 1e8 can be divided in float32


def points(data: Array, weights: Array | None = None, chunk: int = 4096) -> Points:
    """The exact denoiser of a point set ``data`` of shape (N, ...), with weights (N,) (default: equal).

    At most ``chunk`` points are compared at once.

    Raises ValueError if there are no points, weights do not fit or are negative, or chunk < 1.
    """
    data = np.asarray(data)
    count = len(data) if data.ndim else 0
    if count < 1:
        raise ValueError(f"data must have shape (N, ...) with N >= 1, got {data.shape}.")
    weights = np.full(count, 1 / count) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != (count,) or np.any(weights < 0) or not np.sum(weights) > 0:
        raise ValueError(f"weights must be ({count},), non-negative with a positive sum, got {weights!r}.")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk!r}.")
    chunk = min(chunk, count)
    padding = -count % chunk
    # padded points have weight 0, that is log weight -inf
    data = np.concatenate([data, np.repeat(data[:1], padding, axis=0)])
    weights = np.concatenate([weights / np.sum(weights), np.zeros(padding)])
    return Points(data, weights, chunk)


@value
class Points:
    data: Array
    weights: Array
    chunk: int = static()
    factory = "points"

    def _reduce(self, x: Array, level: Level) -> tuple[Array, Array]:
        """(log sum_n w_n exp(-|x - alpha x_n|^2 / 2 sigma^2), softmax mean), by a running maximum over chunks."""
        shape = (-1, self.chunk)
        alpha, variance = jnp.asarray(level.alpha, x.dtype), jnp.asarray(level.sigma**2, x.dtype)
        variance = jnp.maximum(variance, _SMALLEST)  # the nearest point at sigma = 0, not 0 / 0
        data = jnp.asarray(self.data, x.dtype).reshape(*shape, x.size)
        log_weights = jnp.log(jnp.asarray(self.weights, x.dtype)).reshape(shape)

        def merge(carry, part):
            top, total, mean = carry
            points_, logs = part
            distance = jnp.sum((x.reshape(-1) - alpha * points_) ** 2, axis=-1)
            logits = logs - 0.5 * distance / variance
            new_top = jnp.maximum(top, jnp.max(logits))
            shift = jnp.exp(top - new_top)
            terms = jnp.exp(logits - new_top)
            return (new_top, shift * total + jnp.sum(terms), shift * mean + terms @ points_), None

        # the lowest finite number, so that the first shift is exp(-large) = 0 and not exp(-inf + inf)
        lowest = jnp.asarray(jnp.finfo(x.dtype).min, x.dtype)
        start = (lowest, jnp.zeros((), x.dtype), jnp.zeros(x.size, x.dtype))
        (top, total, mean), _ = jax.lax.scan(merge, start, (data, log_weights))
        return top + jnp.log(total), (mean / total).reshape(x.shape)

    def __call__(self, x: Array, level: Level) -> Array:
        """The posterior mean E[x_0 | x_t = x]."""
        return self._reduce(x, level)[1]

    def score(self, x: Array, level: Level) -> Array:
        """grad log p_t(x)."""
        return (level.alpha * self(x, level) - x) / level.sigma**2

    def log_density(self, x: Array, level: Level) -> Array:
        """log p_t(x) in nats."""
        return self._reduce(x, level)[0] - 0.5 * x.size * jnp.log(2 * jnp.pi * level.sigma**2)
