"""Trajectories of Lorenz' system with noise of observation, their exact denoiser, and events that they may be.

The law is that of a large set of trajectories, each blurred by a Gaussian: a mixture.  An event's probability and the
law given the event are known from rejection sampling, so that all that is measured is the error of a method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, Level, value

_SMALLEST = 1e-8


def trajectories(count: int, times: int = 16, interval: float = 0.1, substeps: int = 10) -> np.ndarray:
    """``count`` pieces (times, 3) of one path on the attractor (sigma 10, rho 28, beta 8/3), in units of its spread."""
    step = interval / substeps

    def slope(u: np.ndarray) -> np.ndarray:
        x, y, z = u
        return np.stack([10.0 * (y - x), x * (28.0 - z) - y, x * y - 8.0 / 3.0 * z])

    u = np.random.default_rng(0).normal(size=(3, count)) * 5.0 + np.array([[0.0], [0.0], [25.0]])
    saved = []
    for i in range(substeps * (times + 60)):  # the first 6 units of time bring all of them to the attractor
        if i >= 60 * substeps and i % substeps == 0:
            saved.append(u.T)
        a = slope(u)
        b = slope(u + 0.5 * step * a)
        c = slope(u + 0.5 * step * b)
        u = u + step / 6 * (a + 2 * b + 2 * c + slope(u + step * c))
    paths = np.stack(saved, axis=1)
    return ((paths - paths.mean((0, 1))) / paths.std((0, 1))).astype(np.float32)


@value
class Trajectories:
    """The exact denoiser of equally likely arrays (N, ...) with noise of a std ``blur`` on top: matrix products."""

    data: Array
    blur: Array
    factory = "Trajectories"

    def __call__(self, x: Array, level: Level) -> Array:
        data, flat = self.data.reshape(len(self.data), -1), x.reshape(-1)
        total = jnp.maximum(level.sigma**2 + level.alpha**2 * self.blur**2, _SMALLEST)
        overlap = level.alpha * (data @ flat) - 0.5 * level.alpha**2 * jnp.square(data).sum(1)
        mean = jax.nn.softmax(overlap / total) @ data
        return ((level.sigma**2 * mean + level.alpha * self.blur**2 * flat) / total).reshape(x.shape)


# --- events -------------------------------------------------------------------------------------------------------


def lobe(path: Array) -> Array:
    """The mean of the first coordinate: a whole piece on one wing.  Linear."""
    return path[:, 0].mean()


def peak(path: Array) -> Array:
    """A smooth maximum of the third coordinate: an extreme excursion."""
    return jax.nn.logsumexp(8.0 * path[:, 2]) / 8.0


def calm(path: Array) -> Array:
    """Minus the mean amplitude of the first coordinate's Fourier coefficients: small oscillations."""
    found = jnp.fft.rfft(path[:, 0] - path[:, 0].mean())[1:]
    return -jnp.sqrt(found.real**2 + found.imag**2 + 1e-6).mean() / len(path)


EVENTS: dict[str, tuple[Callable[[Array], Array], float]] = {
    "lobe": (lobe, 0.1),
    "peak": (peak, 0.02),
    "calm": (calm, 0.1),
}


def rejected(
    constraint: Any, share: float, paths: np.ndarray, blur: float, copies: int = 8
) -> tuple[float, np.ndarray]:
    """The threshold that a share of the law exceeds, and draws of the law that do: rejection sampling."""
    noise = np.random.default_rng(1).normal(size=(copies, *paths.shape))
    draws = (paths + blur * noise).reshape(-1, *paths.shape[1:]).astype(np.float32)
    found = np.asarray(jax.jit(jax.vmap(constraint))(jnp.asarray(draws)))
    limit = float(np.quantile(found, 1 - share))
    return limit, draws[found > limit]
