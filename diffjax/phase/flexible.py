"""Diffusions that mix the entries of the data: a drift and a noise that are matrices over a leading axis of data.

The state has a leading axis of length n, all of it data.  With a clock B(t), D positive definite and Q antisymmetric

    dx = -(D + Q) x dB + sqrt(2 D) dW_B,      x_t | x_0 ~ N(E x_0, 1 - E E^T),   E = exp(-(D + Q) B),

which keeps N(0, 1).  In the coordinates of ``y = alpha E^-1 x_t = alpha x_0 + alpha E^-1 noise``, alpha^n = det E, it
is noise around alpha x_0 whose covariance is no multiple of 1, and turns in time unless D and Q commute.  That y is
what denoisers are told, with the level (alpha, sqrt(1 - alpha^2)), so for D = 1 / 2 they are those of the scalar
process; the score is ``(1 - E E^T)^-1 (E E[x_0 | x_t] - x_t)``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, Level, Process, arrays, is_traced, value
from diffjax.phase import matrices
from diffjax.phase.linear_sde import LinearSDE, _coloured
from diffjax.phase.processes import _numbers
from diffjax.processes.checks import positive


def flexible(
    symmetric: Array, skew: Array, beta_min: Array = 1.0, beta_max: Array | None = None, end: Array = 1.0
) -> Process:
    """``dx = -beta (D + Q) x dt + sqrt(2 beta D) dW`` over a leading axis of data: it keeps N(0, 1).

    D is the inverse R^-1 of a metric, Q = omega turns the data on the way.  `exponential` of order 1,
    `euler_maruyama` and `sscs` of `diffjax.phase` run it; `metric_noised` and `metric_bound` train it, D and Q too.

    Args:
        symmetric: D, (n, n), positive definite.
        skew: Q, (n, n), antisymmetric.
        beta_min: beta at t = 0.
        beta_max: beta at the end, linear in between; default ``beta_min``.
        end: the last time.

    A Flexible Diffusion Model, arXiv:2206.10365, section 3 (constant R and omega).

    Raises ValueError if shapes do not fit, D is not symmetric positive definite or Q not antisymmetric.

    >>> float(flexible([[0.5, 0], [0, 2.0]], [[0, -1.0], [1.0, 0]], 2.0).level(1.0).alpha.round(4))
    0.0821
    """
    _, half, turn = _numbers(symmetric, skew)
    size = half.shape[0] if half.ndim == 2 else 0
    if size < 1 or half.shape != (size, size) or turn.shape != (size, size):
        raise ValueError(f"symmetric and skew must be (n, n), got {half.shape} and {turn.shape}.")
    if not is_traced(half, turn):
        if not np.allclose(half, half.T) or np.any(np.linalg.eigvalsh(half) <= 0):
            raise ValueError(f"symmetric must be symmetric and positive definite, got {half!r}.")
        if not np.allclose(turn, -turn.T):
            raise ValueError(f"skew must be antisymmetric, got {turn!r}.")
    beta_max = beta_min if beta_max is None else beta_max
    positive(beta_min=beta_min, beta_max=beta_max, end=end)
    return Process(Flexible(-(half + turn), 2 * half, 0 * half, beta_min, beta_max, end), end)


@value
class Flexible:
    """The law of the state, and the schedule that the denoiser is told: alpha = exp(-B tr D / n)."""

    drift: Array  # F = -(D + Q)
    diffusion: Array  # 2 D
    start: Array  # 0
    beta_min: Array
    beta_max: Array
    end: Array
    factory = "flexible"

    variables, rate, clock, parts = LinearSDE.variables, LinearSDE.rate, LinearSDE.clock, LinearSDE.parts
    kernel, forward, stationary, coloured = LinearSDE.kernel, LinearSDE.forward, LinearSDE.stationary, _coloured

    def moments(self, time: Array) -> tuple[Array, Array]:
        """``(E, S)`` of ``x_t | x_0 ~ N(E x_0, S)``, shapes (..., n, n)."""
        _, drift, diffusion, _ = self.parts(time)
        return matrices.transition(drift, diffusion, self.clock(time))

    def reverse(self, time: Array, eta: int) -> tuple[Array, Array, Array]:
        """``(A, b, Q)`` of the reverse SDE (eta = 1) or ODE (0), ``-dx/dt = A x + b D`` and noise of rate Q."""
        _, drift, diffusion, _ = self.parts(time)
        mean, covariance = self.moments(time)
        rate = self.rate(time)[..., None, None]
        weight = 0.5 * (1 + eta**2) * rate * diffusion @ matrices.inverse(covariance)
        return -rate * drift - weight, weight @ mean, rate * diffusion

    def statistic(self, level: Level) -> Array:
        """r = alpha E^-1 with ``y = r x_t``."""
        _, drift, diffusion, _ = self.parts(level.time)
        back, _ = matrices.transition(-drift, diffusion, self.clock(level.time))
        return level.alpha[..., None, None] * back

    # --- the schedule that the denoiser is told ---

    def _decay(self, time: Array) -> tuple[Any, Array, Array]:
        """The namespace, -log alpha and its rate."""
        xp, drift, _, _ = self.parts(time)
        mean = -xp.trace(drift) / self.drift.shape[0]
        return xp, mean * self.clock(time), mean * self.rate(time)

    def alpha(self, time: Array) -> Array:
        xp, decay, _ = self._decay(time)
        return xp.exp(-decay)

    def sigma(self, time: Array) -> Array:
        xp, decay, _ = self._decay(time)
        return xp.sqrt(-xp.expm1(-2 * decay))

    def half_log_snr(self, time: Array) -> Array:
        xp, decay, _ = self._decay(time)
        return xp.where(decay > 0, -0.5 * xp.log(xp.expm1(2 * xp.where(decay > 0, decay, 1.0))), xp.inf)

    def time(self, half_log_snr: Array) -> Array:
        xp, given, low, high, end, drift = arrays(half_log_snr, self.beta_min, self.beta_max, self.end, self.drift)
        clock = 0.5 * xp.logaddexp(0.0, -2 * given) * self.drift.shape[0] / -xp.trace(drift)
        slope = (high - low) / end  # B = low t + slope t^2 / 2, solved without a difference
        return 2 * clock / (low + xp.sqrt(low**2 + 2 * slope * clock))

    def alpha_rate(self, time: Array) -> Array:
        return -self._decay(time)[2] * self.alpha(time)

    def variance_rate(self, time: Array) -> Array:
        return self._decay(time)[2] * self.alpha(time) ** 2

    def sigma_rate(self, time: Array) -> Array:
        xp, rate, sigma = arrays(self.variance_rate(time), self.sigma(time))
        return xp.where(sigma > 0, rate / xp.where(sigma > 0, sigma, 1.0), xp.inf)


def metric_noised(process: Process, x0: Array, eps: Array, time: Array) -> tuple[Array, Array]:
    """``(x_t, y)``: the state ``E x_0 + (1 - E E^T)^{1/2} eps`` at a time, and what a denoiser is told of it.

    ``x0`` and ``eps`` have the leading axis n; traced times are above 0.

    >>> process = flexible(np.eye(2), np.zeros((2, 2)))
    >>> [part.shape for part in metric_noised(process, jnp.ones((2, 3)), jnp.zeros((2, 3)), jnp.asarray(0.5))]
    [(2, 3), (2, 3)]
    """
    schedule, size = process.schedule, x0.shape[0]
    mean, covariance = schedule.moments(time)
    # eigenvectors have no derivative where eigenvalues are equal, as those of D = 1/2 are
    root = jnp.linalg.cholesky(covariance) if is_traced(process, time) else matrices.factor(covariance)
    flat = mean @ x0.reshape(size, -1) + root @ eps.reshape(size, -1)
    told = schedule.statistic(process.level(time)) @ flat
    return flat.reshape(x0.shape), told.reshape(x0.shape)


def metric_bound(
    key: Array, denoise: Any, process: Process, x0: Array, first: float = 1e-3, draws: int = 16, strata: int = 32
) -> Array:
    """A lower bound in nats of log p(x_0) for one sample, differentiable in the denoiser and in D and Q.

    With J = E^T S^-1 E, what x_t tells about x_0, and x_0 given the state at a small time read as Gaussian,

        log p(x_0) >= log det(J_first / 2 pi e) / 2 - KL(q(x_end | x_0) || N(0, 1)) - 1/2 int |x_0 - D|^2_{-dJ/dt} dt,
        -dJ/dt = beta E^T S^-1 2 D S^-1 E.

    Args:
        key: one PRNG key; the mean over keys is the bound.
        denoise: ``(y, level) -> E[x_0 | x_t]``.
        process: of `flexible`.
        x0: one sample, (n, ...).
        first: the time, in units of the end, at which the state is decoded.
        draws: noises a time.
        strata: times, one in each of as many intervals of equal ratio.

    A Flexible Diffusion Model, arXiv:2206.10365, section 4 (joint training by the evidence lower bound).
    ``draws * strata`` denoiser calls.

    Raises ValueError for another process.
    """
    if not isinstance(process.schedule, Flexible):
        raise ValueError(f"process must be a flexible one, got {process!r}.")
    schedule, size = process.schedule, x0.shape[0]
    columns = jnp.size(x0) // size
    dtype = jnp.result_type(x0, jnp.float32)
    time_key, noise_key = jax.random.split(key)
    edges = jnp.asarray(first ** np.linspace(1, 0, strata + 1), dtype) * process.end
    width = jnp.diff(edges)
    times = edges[:-1] + width * jax.random.uniform(time_key, (strata,), dtype)

    def squared(key: Array, time: Array) -> Array:
        eps = jax.random.normal(key, jnp.shape(x0), dtype)
        _, told = metric_noised(process, x0, eps, time)
        off = (x0 - denoise(told, process.level(time))).reshape(size, columns)
        mean, covariance = schedule.moments(time)
        pulled = matrices.inverse(covariance) @ mean @ off
        return schedule.rate(time) * jnp.sum(pulled * (jnp.asarray(schedule.diffusion, dtype) @ pulled))

    keys = jax.random.split(noise_key, (strata, draws))
    path = 0.5 * jnp.sum(width * jax.vmap(jax.vmap(squared, (0, None)))(keys, times).mean(1))
    mean, covariance = schedule.moments(edges[0])
    told = mean.T @ matrices.inverse(covariance) @ mean
    decoded = 0.5 * columns * (jnp.linalg.slogdet(told)[1] - size * jnp.log(2 * jnp.pi * jnp.e))
    mean, covariance = schedule.moments(edges[-1])
    spread = jnp.trace(covariance) - size - jnp.linalg.slogdet(covariance)[1]
    prior = 0.5 * (columns * spread + jnp.sum((mean @ x0.reshape(size, columns)) ** 2))
    return decoded - prior - path
