"""Inpainting steered by a tractable model: its exact law given the noisy state and what was measured.

A model whose law of x_0 given evidence on each entry is exact (a mixture, a hidden Markov chain) knows early
what a measurement means far from where it was made, which projections and gradients of a denoiser do not.  Late, where
details are decided, the denoiser knows better.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.corrections.transform import Plain, Remembering, transformed
from diffjax.inverse.exact import posterior
from diffjax.inverse.measurement import GaussianNoise, Measurement
from diffjax.inverse.operators import Diagonal, Mask
from diffjax.levels import Array, Level, is_traced, static, value
from diffjax.oracles.gaussian import Gaussian
from diffjax.oracles.hidden_markov import HiddenMarkov, Marginals, noised_evidence
from diffjax.oracles.mixture import Mixture
from diffjax.solvers.arguments import number_or_function, positive


def tractable_steering(
    denoise: Any,
    prior: Any,
    measurement: Measurement | None,
    share: Any = 0.5,
    *,
    variance: Array = 1.0,
    until: Array = 0.0,
) -> Plain | Remembering:
    """The denoiser's estimate mixed, at noisy levels, with the exact conditional law of a tractable prior.

        p(x_i) ~ N(x_i; x0_i, r^2)^a p_prior(x_i | x_t, y)^(1 - a),     x0' = its mean,   entry by entry,

    with a = ``share`` and ``r^2 = sigma^2 v / (sigma^2 + alpha^2 v)``.  a = 0 is the prior's exact E[x_0 | x_t, y],
    a = 1 the denoiser.  The prior's law of an entry is a mixture of Gaussians or values, whose power is taken component
    by component: exact for a Gaussian and for values, and where components are apart.

    Args:
        denoise: best one that knows of the measurement too (`replacement`, `tilted`), for the levels after ``until``.
        prior: `oracles.mixture` or `gaussian`, concrete, for any linear operator; or `oracles.hidden_markov`, for a
            `mask` or `diagonal` (whose weights and y may be traced).
        measurement: with Gaussian noise; 0 is allowed; under a process with coordinates, prior and measurement are of
            the standard state.  None: the prior is conditioned already (`posterior`).
        share: a in [0, 1], a number or a function of the level.
        variance: v, the variance of the data that makes the denoiser's r^2; above 0, or an array like a sample.
        until: the half-log-SNR up to which the prior is asked; from there on the estimate is the denoiser's, at its
            cost.  inf: always.

    No further denoiser calls.

    Image Inpainting via Tractable Steering of Diffusion Models, arXiv:2401.03349.  (Theirs is a probabilistic circuit
    over pixel values; the law r^2 of the denoiser's estimate is a choice made here.)

    Raises ValueError for another prior, operator or noise, and for a share or variance out of range.
    """
    positive("variance", variance)
    share = number_or_function("share", share, 0.0, 1.0)
    if not is_traced(until) and (np.ndim(until) != 0 or np.isnan(until)):
        raise ValueError(f"until must be a half-log-SNR, got {until!r}.")
    if isinstance(prior, Mixture | Gaussian):
        prior, seen = prior if measurement is None else posterior(prior, measurement), None
    elif isinstance(prior, HiddenMarkov):
        if measurement is not None and not isinstance(measurement.operator, Mask | Diagonal):
            raise ValueError(f"hidden_markov needs a mask or diagonal, got {measurement.operator!r}.")
        if measurement is not None and not isinstance(measurement.noise, GaussianNoise):
            raise ValueError(f"needs Gaussian noise, got {measurement.noise!r}.")
        seen = measurement
    else:
        raise ValueError(f"prior must be a mixture, a gaussian or a hidden_markov, got {prior!r}.")
    of_data = measurement is not None and measurement.of_data
    return transformed(denoise, Steering(prior, seen, share, variance, until, of_data))


@value
class Steering:
    prior: Any
    seen: Any
    share: Any
    variance: Array
    until: Array
    of_data: bool = static()
    factory = "tractable_steering"

    def __call__(self, x: Array, x0: Array, level: Level) -> Array:
        early = jnp.all(level.half_log_snr < self.until) & jnp.all(jnp.asarray(level.sigma) > 0)

        def mixed() -> Array:
            v = jnp.asarray(self.variance, x.dtype)
            spread = level.sigma**2 * v / (level.sigma**2 + level.alpha**2 * v)
            law = marginals(self.prior, x, level, self.seen)
            return geometric_mean(law, x0, spread, self.share(level)).astype(x0.dtype)

        return jax.lax.cond(early, mixed, lambda: x0)


def marginals(prior: Any, x: Array, level: Level, seen: Measurement | None = None) -> Marginals:
    """The exact law of every entry of x_0 given x_t (and y), for sigma > 0; arguments as for `tractable_steering`."""
    if isinstance(prior, HiddenMarkov):
        observed, precision = noised_evidence(x, level)
        if seen is not None:
            observed, precision = _both(observed, precision, *_measured(seen, x))
        return prior.given(observed, precision)
    if isinstance(prior, Gaussian):
        vectors = None if prior.vectors is None else prior.vectors[None]
        prior = Mixture(np.ones(1), prior.mean[None], prior.variances[None], vectors)
    means, z, v, c = prior._parts(x, level)
    modes, spread = level.alpha * v / c * z, level.sigma**2 * v / c
    if prior.vectors is not None:
        vectors = jnp.asarray(prior.vectors, x.dtype)
        modes, spread = jnp.einsum("kde,ke->kd", vectors, modes), jnp.einsum("kde,ke->kd", vectors**2, spread)
    shape = (len(prior.weights), *x.shape)
    logs = jax.nn.log_softmax(prior._log_weights(z, c)).reshape(-1, *(1,) * x.ndim)
    return Marginals(jnp.broadcast_to(logs, shape), (means + modes).reshape(shape), spread.reshape(shape))


def geometric_mean(law: Marginals, x0: Array, variance: Array, share: Array) -> Array:
    """The mean of ``N(x0, variance)^share law^(1 - share)``, normalised, entry by entry (see `tractable_steering`)."""
    only = jnp.asarray(share) == 1
    a = jnp.where(only, 0.0, share)
    b = 1 - a
    weight = b + a * law.variances / variance  # the product's precision times the law's variance
    scale = jnp.where(law.variances > 0, law.variances, 1.0) ** (0.5 * a)
    logs = b * law.log_weights + jnp.log(scale) - 0.5 * jnp.log(weight)
    logs = logs - 0.5 * a * b / (variance * weight) * (law.means - x0) ** 2
    centres = (b * law.means + a * law.variances / variance * x0) / weight
    return jnp.where(only, x0, jnp.sum(jax.nn.softmax(logs, axis=0) * centres, axis=0))


def _measured(seen: Measurement, x: Array) -> tuple[Array, Array]:
    """What was measured of every entry by itself, and its precision: 0 where nothing was."""
    operator = seen.operator
    y, variance = seen.observed(x), seen.variance(x)
    weight = operator.adjoint(jnp.ones_like(y)).astype(x.dtype)
    known = weight != 0
    safe = jnp.where(known, weight, 1.0)
    noise = operator.adjoint(variance) / safe**3  # of y / weight
    precision = jnp.where(known, jnp.where(noise > 0, 1 / jnp.where(noise > 0, noise, 1.0), jnp.inf), 0.0)
    return jnp.where(known, operator.adjoint(y) / safe**2, 0.0), precision


def _both(first: Array, p: Array, second: Array, q: Array) -> tuple[Array, Array]:
    """Two independent observations as one."""
    exact = jnp.isinf(q)
    total = jnp.where(exact, 1.0, p + q)
    mean = (p * first + jnp.where(exact, 0.0, q) * second) / jnp.where(total > 0, total, 1.0)
    return jnp.where(exact, second, mean), jnp.where(exact, jnp.inf, total)
