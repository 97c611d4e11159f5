"""The exact posterior of Gaussian and mixture priors given a linear measurement with Gaussian noise.

Component k of the prior, N(m_k, C_k) with weight w_k, has under y = A x + n, n ~ N(0, S),

    evidence  N(y; A m_k, A C_k A^T + S)     gain  G_k = C_k A^T (A C_k A^T + S)^-1
    mean      m_k + G_k (y - A m_k)          covariance  C_k - G_k A C_k

The posterior is again a mixture, and x_t given y is that mixture noised: so its denoiser is E[x_0 | x_t, y] at every
level, exactly.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.inverse.measurement import Measurement
from diffjax.inverse.operators import as_matrix
from diffjax.levels import Array, Level, is_traced, static, value
from diffjax.oracles.gaussian import Gaussian, gaussian
from diffjax.oracles.mixture import Mixture, mixture


def posterior(prior: Any, measurement: Measurement) -> Any:
    """The law of x_0 given y as an oracle of the prior's kind, in float64.

    Its call is E[x_0 | x_t, y] at every level; it has ``score``, ``log_density`` and ``sample`` of x_t given y.

    Args:
        prior: `diffjax.oracles.gaussian` or `mixture`, concrete.
        measurement: of a linear operator, with Gaussian noise (zero is allowed), concrete.

    Raises ValueError for another prior, a nonlinear operator, other noise, or shapes that do not fit.
    """
    a, y, noise = _linear_gaussian(prior, measurement)
    weights, means, covariances = _components(prior)
    logs, after_means, after_covariances = [], [], []
    for mean, covariance in zip(means, covariances, strict=True):
        log_density, gain = _conditioning(mean, covariance, a, y, noise)
        logs.append(log_density)
        after_means.append(mean + gain @ (y - a @ mean))
        rest = np.eye(len(mean)) - gain @ a
        after = rest @ covariance @ rest.T + gain @ noise @ gain.T  # Joseph's form: symmetric, never negative
        after_covariances.append(0.5 * (after + after.T))
    shape = np.shape(prior.mean) if isinstance(prior, Gaussian) else np.shape(prior.means)[1:]
    if isinstance(prior, Gaussian):
        return gaussian(after_means[0].reshape(shape), _full(after_covariances[0], shape))
    logs = np.asarray(logs) + np.log(weights, where=weights > 0, out=np.full_like(weights, -np.inf))
    return mixture(
        np.exp(logs - logs.max()),
        np.stack(after_means).reshape(-1, *shape),
        np.stack([_full(c, shape) for c in after_covariances]),
    )


def evidence(prior: Any, measurement: Measurement) -> float:
    """log p(y) in nats, in float64; arguments and errors are those of `posterior`."""
    a, y, noise = _linear_gaussian(prior, measurement)
    weights, means, covariances = _components(prior)
    logs = np.array([_conditioning(m, c, a, y, noise)[0] for m, c in zip(means, covariances, strict=True)])
    return float(np.log(np.sum(weights * np.exp(logs - logs.max()))) + logs.max())


def exact(prior: Any, measurement: Measurement) -> Exact:
    """The exact twist p(y | x_t), as `diffjax.guidance.tilted` and sequential Monte Carlo take it.

    ``log h = log sum_k r_k(x_t) N(y; A m_k(x_t), A C_k(x_t) A^T + S)`` with the responsibilities, posterior means and
    covariances of the prior's components given x_t.  The tilted denoiser of the exact prior is then that of
    `posterior`.  Arguments and errors are those of `posterior`.

    Under a process with coordinates prior and measurement are of the standard state: ``measurement.under(process)``.
    """
    a, y, noise = _linear_gaussian(prior, measurement)
    if isinstance(prior, Gaussian):
        vectors = None if prior.vectors is None else prior.vectors[None]
        prior = Mixture(np.ones(1), prior.mean[None], prior.variances[None], vectors)
    seen = np.broadcast_to(a, (len(prior.weights), *a.shape)) if prior.vectors is None else a @ prior.vectors
    return Exact(prior, a, np.array(seen), y, noise, measurement.of_data)


@value
class Exact:
    prior: Any
    matrix: Array  # (M, D)
    seen: Array  # (K, M, D), the matrix in the eigenbasis of each component
    y: Array  # (M,)
    noise: Array  # (M, M)
    of_data: bool = static()
    factory = "exact"

    def __call__(self, denoise: Any, x: Array, level: Level) -> tuple[Array, Array]:
        return self.log_value(x, level), denoise(x, level)

    def log_value(self, x: Array, level: Level) -> Array:
        """log p(y | x_t = x)."""
        cast = lambda array: jnp.asarray(array, x.dtype)
        means, z, v, c = self.prior._parts(x, level)
        clean = jnp.asarray(level.sigma == 0)
        c = jnp.where(clean, 1.0, c)
        log_r = jax.nn.log_softmax(self.prior._log_weights(jnp.where(clean, 0.0, z), c))
        # where nothing is noisy all components agree that x_0 = x / alpha
        gain = jnp.where(clean, 1 / jnp.where(clean, level.alpha, 1.0), level.alpha * v / c)
        rest = jnp.where(clean, 0.0, level.sigma**2 * v / c)
        seen = cast(self.seen)
        predicted = means @ cast(self.matrix).T + jnp.einsum("kmd,kd->km", seen, gain * z)
        covariance = jnp.einsum("kmd,kd,knd->kmn", seen, rest, seen) + cast(self.noise)
        offset = cast(self.y) - predicted
        factor = jnp.linalg.cholesky(covariance)
        white = jax.scipy.linalg.solve_triangular(factor, offset[..., None], lower=True)[..., 0]
        half = jnp.sum(jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1)), axis=-1)
        logs = -0.5 * jnp.sum(white**2, axis=-1) - half - 0.5 * len(self.y) * jnp.log(2 * jnp.pi)
        return jax.nn.logsumexp(log_r + logs)


# --- on the host ------------------------------------------------------------------------------------------------------


def _components(prior: Any) -> tuple[Array, Array, Array]:
    """Weights (K,), means (K, D) and covariances (K, D, D)."""
    if isinstance(prior, Gaussian):
        weights, means, variances = np.ones(1), np.asarray(prior.mean).reshape(1, -1), prior.variances[None]
        vectors = None if prior.vectors is None else prior.vectors[None]
    else:
        weights, variances, vectors = prior.weights, prior.variances, prior.vectors
        means = np.asarray(prior.means).reshape(len(weights), -1)
    if vectors is None:
        return weights, means, np.stack([np.diag(v) for v in variances])
    return weights, means, np.einsum("kde,ke,kfe->kdf", vectors, variances, vectors)


def _linear_gaussian(prior: Any, measurement: Measurement) -> tuple[Array, Array, Array]:
    """The matrix (M, D), y (M,) and the noise covariance (M, M), or the reasons why there are none."""
    if not isinstance(prior, Gaussian | Mixture):
        raise ValueError(f"prior must be oracles.gaussian or oracles.mixture, got {prior!r}.")
    if is_traced(prior, measurement):
        raise ValueError("the exact posterior is made in float64 on the host: prior and measurement must be concrete.")
    if not hasattr(measurement.operator, "adjoint"):
        raise ValueError(f"the exact posterior needs a linear operator, got {measurement.operator!r}.")
    if not hasattr(measurement.noise, "std"):
        raise ValueError(f"the exact posterior needs Gaussian noise, got {measurement.noise!r}.")
    shape = np.shape(prior.mean) if isinstance(prior, Gaussian) else np.shape(prior.means)[1:]
    if measurement.operator.input_shape != shape:
        raise ValueError(f"the operator acts on {measurement.operator.input_shape}, the prior's samples are {shape}.")
    flat = lambda tree: np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])
    with jax.enable_x64(True):
        variance = measurement.variance(jnp.zeros((), jnp.float64))
    return np.asarray(as_matrix(measurement.operator), np.float64), flat(measurement.y), np.diag(flat(variance))


def _conditioning(mean: Array, covariance: Array, a: Array, y: Array, noise: Array) -> tuple[float, Array]:
    """log N(y; A m, A C A^T + S) and the gain."""
    cross = covariance @ a.T
    seen = a @ cross + noise
    offset = y - a @ mean
    inverse = np.linalg.pinv(seen, rcond=1e-13, hermitian=True)
    values = np.linalg.eigvalsh(seen)
    values = values[values > 1e-13 * max(values.max(initial=0.0), 1e-300)]  # what is known anyway has no density
    log_density = -0.5 * (offset @ inverse @ offset + np.sum(np.log(2 * np.pi * values)))
    return float(log_density), cross @ inverse


def _full(covariance: Array, shape: tuple[int, ...]) -> Array:
    """A matrix that an oracle takes for one: a scalar sample has a variance."""
    return covariance.reshape(()) if shape == () else covariance
