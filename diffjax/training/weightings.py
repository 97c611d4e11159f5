"""Weights of the squared error, level by level.

A weighting says of which error it is the weight:

* a plain function ``(level) -> number``: of the prediction's own target;
* `on_data` and all that is made from it: of ``|x0 - D|^2``, whatever the network predicts.  The loss divides by
  `Prediction.weight`, so noise, velocity, flow and data networks of one denoiser have one loss;
* `on_bound`: of ``|eps - eps_hat|^2 / 2`` per unit of log-SNR, ``1/2 int w(lambda) |eps - eps_hat|^2 d lambda``.  The
  loss divides by the density of its law, so that it has one mean under every law that covers the same levels:
  ``w = 1`` is the variational bound.

With SNR = alpha^2 / sigma^2 the classics, as weights of |x0 - D|^2:

    noise error 1: SNR     v error 1: SNR + 1     x0 error 1: 1     EDM: SNR + 1 / data_std^2     flow: see `flow`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, Level, as_value, is_traced, narrowed, value
from diffjax.predictions import Prediction
from diffjax.training.times import log_snr_rate


def unweighted(level: Level) -> Array:
    """Weight one: the plain squared error of the prediction's own target."""
    return jnp.ones_like(level.time)


def on_data(weight: Callable[[Level], Array]) -> OnData:
    """The weighting ``weight(level)`` of the squared error of the clean estimate, for a network of any prediction."""
    return OnData(as_value(weight))


@value
class OnData:
    weight: Any
    factory = "on_data"

    def __call__(self, level: Level) -> Array:
        return self.weight(level)


def on_bound(weight: Callable[[Array], Array] | None = None) -> OnBound:
    """The weighted bound ``1/2 int w(lambda) |eps - eps_hat|^2 d lambda`` over the log-SNR, per entry; default w = 1.

    Under every law of levels the mean is the same (over the log-SNRs that it covers), so the law is free to be one of
    small variance.  With w that rises with the noise level it is a bound on data with noise added to them.

    Understanding Diffusion Objectives as the ELBO with Simple Data Augmentation, arXiv:2303.00848.
    """
    return OnBound(as_value(jnp.ones_like if weight is None else weight))


@value
class OnBound:
    weight: Any
    factory = "on_bound"

    def __call__(self, log_snr: Array) -> Array:
        return self.weight(log_snr)


def factor(weighting: Any, prediction: Prediction, law: Any, u: Array, level: Level) -> Array:
    """What the squared error of the prediction's own target is multiplied by, at the quantile u of the law."""
    if isinstance(weighting, Uncertainty):
        weighting = weighting.weighting
    if isinstance(weighting, OnBound):
        on_noise = 0.5 * weighting(2 * level.half_log_snr) * log_snr_rate(law, prediction.process, u)
        return on_noise * snr(level) / prediction.weight(level)
    if isinstance(weighting, OnData):
        return weighting(level) / prediction.weight(level)
    return weighting(level)


# --- weights of |x0 - D|^2 ------------------------------------------------------------------------------------------


def snr(level: Level) -> Array:
    """alpha^2 / sigma^2."""
    return jnp.exp(2 * level.half_log_snr)


@value
class SNR:
    def __call__(self, level: Level) -> Array:
        return snr(level)


def signal_to_noise() -> OnData:
    """SNR: the plain error of the noise, DDPM's L_simple, for any prediction."""
    return OnData(SNR())


def min_snr(limit: float | int = 5.0) -> OnData:
    """``min(SNR, limit)``: levels with little noise do not outvote the others.

    Efficient Diffusion Training via Min-SNR Weighting Strategy, arXiv:2303.09556, section 3.4.

    Raises ValueError unless limit > 0.
    """
    return OnData(MinSNR(_positive(limit=limit)))


@value
class MinSNR:
    limit: Any
    factory = "min_snr"

    def __call__(self, level: Level) -> Array:
        return jnp.minimum(snr(level), self.limit)


def soft_min_snr(limit: float | int = 5.0) -> OnData:
    """``SNR limit / (SNR + limit)``: `min_snr` without its corner.

    Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion Transformers, arXiv:2401.11605.

    Raises ValueError unless limit > 0.
    """
    return OnData(SoftMinSNR(_positive(limit=limit)))


@value
class SoftMinSNR:
    limit: Any
    factory = "soft_min_snr"

    def __call__(self, level: Level) -> Array:
        return self.limit * jax.nn.sigmoid(2 * level.half_log_snr - jnp.log(self.limit))


def truncated_snr(least: float | int = 1.0) -> OnData:
    """``max(SNR, least)``: no level is forgotten, not even pure noise.

    Progressive Distillation for Fast Sampling of Diffusion Models, arXiv:2202.00512, section 4.

    Raises ValueError unless least > 0.
    """
    return OnData(Truncated(_positive(least=least)))


@value
class Truncated:
    least: Any
    factory = "truncated_snr"

    def __call__(self, level: Level) -> Array:
        return jnp.maximum(snr(level), self.least)


def p2(gamma: float | int = 1.0, offset: float | int = 1.0) -> OnData:
    """``SNR / (offset + SNR)^gamma``: less for levels whose noise is imperceptible; gamma = 0 is `signal_to_noise`.

    Perception Prioritized Training of Diffusion Models, arXiv:2204.00227.

    Raises ValueError unless gamma >= 0 and offset > 0.
    """
    if not is_traced(gamma) and not gamma >= 0:
        raise ValueError(f"gamma must be at least 0, got {gamma!r}")
    return OnData(P2(gamma, _positive(offset=offset)))


@value
class P2:
    gamma: Any
    offset: Any
    factory = "p2"

    def __call__(self, level: Level) -> Array:
        log_snr = 2 * level.half_log_snr
        return jnp.exp(log_snr - self.gamma * jnp.logaddexp(log_snr, jnp.log(self.offset)))


def edm(data_std: float | int = 0.5) -> OnData:
    """``SNR + 1 / data_std^2``: EDM's, under which its preconditioned targets have weight one; data_std = 1: v error.

    Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364, table 1.

    Raises ValueError unless data_std > 0.
    """
    return OnData(Edm(_positive(data_std=data_std)))


@value
class Edm:
    data_std: Any
    factory = "edm"

    def __call__(self, level: Level) -> Array:
        return snr(level) + 1 / jnp.square(self.data_std)


def flow() -> OnData:
    """``(1 + sqrt(SNR))^2``: the error of rectified flow's velocity eps - x0, of any process's level of that SNR.

    For ``alpha + sigma = 1`` it is ``1 / sigma^2``.
    """
    return OnData(Flow())


@value
class Flow:
    factory = "flow"

    def __call__(self, level: Level) -> Array:
        return jnp.square(1 + jnp.exp(level.half_log_snr))


def sigmoid(bias: float | int = 1.0) -> OnBound:
    """``w(lambda) = sigmoid(bias - lambda)`` of the log-SNR in `on_bound`: a monotone weighting.

    Simpler Diffusion (SiD2): 1.5 FID on ImageNet512 with pixel-space diffusion, arXiv:2410.19324;
    Understanding Diffusion Objectives as the ELBO with Simple Data Augmentation, arXiv:2303.00848.
    """
    return OnBound(Sigmoid(bias))


@value
class Sigmoid:
    bias: Any
    factory = "sigmoid"

    def __call__(self, log_snr: Array) -> Array:
        return jax.nn.sigmoid(self.bias - log_snr)


# --- learned --------------------------------------------------------------------------------------------------------


def uncertainty(weighting: Any = unweighted, features: int = 64, bandwidth: float | int = 1.0) -> Uncertainty:
    """The loss ``exp(-u(level)) L + u(level)`` with a learned u of the log-SNR, whose optimum is ``log E[L | level]``.

    So every level contributes 1 to the gradient, whatever its loss.  u is linear in ``features`` random cosines of
    half_log_snr / 2 and starts at 0.  `denoising` then takes ``{"network": ..., "uncertainty": weighting.init()}`` as
    parameters; sampling needs the first.

    Analyzing and Improving the Training Dynamics of Diffusion Models, arXiv:2312.02696;
    Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics, arXiv:1705.07115.

    Args:
        weighting: of L, as in `denoising`.
        features: of u, at least 1; bandwidth of their frequencies, above 0.

    Raises ValueError for numbers outside these ranges.
    """
    if not isinstance(features, int) or features < 1:
        raise ValueError(f"features must be a positive integer, got {features!r}")
    drawn = np.random.default_rng(0)  # one set for all: what differs between runs is learned
    waves = drawn.normal(size=features) * _positive(bandwidth=bandwidth) * 2 * np.pi
    phases = drawn.uniform(0, 2 * np.pi, features)
    return Uncertainty(as_value(weighting), waves.astype(np.float32), phases.astype(np.float32))


@value
class Uncertainty:
    weighting: Any
    waves: Any
    phases: Any
    factory = "uncertainty"

    def init(self) -> dict[str, Array]:
        """The parameters of u = 0."""
        return {"slope": jnp.zeros(self.waves.shape), "offset": jnp.zeros(())}

    def log_loss(self, params: dict[str, Array], level: Level) -> Array:
        """u at one level: what the loss there is thought to be, in logarithm."""
        place = narrowed(level)[..., None] / 2
        cosines = jnp.sqrt(2.0) * jnp.cos(jnp.clip(place, -20, 20) * self.waves + self.phases)
        return params["offset"] + cosines @ params["slope"] / jnp.sqrt(1.0 * self.waves.size)

    def loss(self, params: dict[str, Array], level: Level, loss: Array) -> Array:
        """``exp(-u) loss + u``."""
        u = self.log_loss(params, level)
        return jnp.exp(-u) * loss + u

    def __call__(self, level: Level) -> Array:
        return self.weighting(level)


# --- limits on a weight ----------------------------------------------------------------------------------------------


def weight_limit(step: Any, steps: Any, low: float | int = 5.0, high: float | int = 500.0) -> Any:
    """The largest weight of a loss at a training step: ``low (high / low)^(step / steps)``, and none from ``steps`` on.

    Clean levels, whose weights are the largest, come into the loss gradually: ``jnp.minimum(weight, limit)``.
    Fast Diffusion Model, arXiv:2306.06991 (its loss weight warm-up).

    Raises ValueError unless 0 < low <= high and steps is above 0, where they are concrete.

    >>> float(weight_limit(50, 100)), float(weight_limit(100, 100))
    (50.0, inf)
    """
    if not is_traced(low, high, steps) and not (0 < low <= high and steps > 0):
        raise ValueError(f"needs 0 < low <= high and steps > 0, got low={low!r}, high={high!r}, steps={steps!r}.")
    share = jnp.asarray(step, jnp.float32) / steps
    return jnp.where(share < 1, low * (high / low) ** jnp.minimum(share, 1.0), jnp.inf)


def warmed(weighting: Any, steps: int, low: float | int = 5.0, high: float | int = 500.0) -> WarmedUp:
    """``min(weight, limit)`` with the `weight_limit` of the training step: clean levels come into the loss gradually.

    The limit is on the weight of |x0 - D|^2 for weightings `on_data`, else on that of the network's own error.

    Fast Diffusion Model, arXiv:2306.06991.

    Raises ValueError as `weight_limit`, and for an `on_bound` weighting, whose weight is not one of a level.
    """
    weight_limit(0, steps, low, high)
    if isinstance(weighting, OnBound):
        raise ValueError(f"weighting must be one of a level (a function or on_data), got {weighting!r}")
    return WarmedUp(as_value(weighting), steps, low, high)


@value
class WarmedUp:
    weighting: Any
    steps: Any
    low: Any
    high: Any
    factory = "warmed"

    def at(self, step: Array) -> Any:
        """The weighting of that training step."""
        limit = weight_limit(step, jnp.asarray(self.steps), self.low, self.high)
        if isinstance(self.weighting, OnData):
            return OnData(Limited(self.weighting.weight, limit))
        return Limited(self.weighting, limit)

    def __call__(self, level: Level) -> Array:
        """That of the end of the warm-up."""
        return self.weighting(level)


@value
class Limited:
    weight: Any
    limit: Any

    def __call__(self, level: Level) -> Array:
        return jnp.minimum(self.weight(level), self.limit)


def _positive(**numbers: Any) -> Any:
    ((name, number),) = numbers.items()
    if not is_traced(number) and not number > 0:
        raise ValueError(f"{name} must be positive, got {number!r}")
    return number
