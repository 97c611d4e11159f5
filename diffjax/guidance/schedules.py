"""Scales of guidance that change with the level: values that are called as ``scale(level)``.

They are told the level alone.  Where a schedule is exactly 1 the conditional estimate is all that is needed, and
`diffjax.guidance.classifier_free` and its relatives do not make the other call: the level is the same for all samples
of a `jax.vmap` over keys, so that the choice stays a choice in the compiled loop.

The *share of noise* ``u = sigma / (alpha + sigma)`` is 1 at noise and 0 at data in every process; in a flow it is time.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, Level, as_value, is_traced, namespace, static, value

SHAPES = ("power", "cosine")


def interval(scale: Array = 2.0, low: Array = 0.0, high: Array = np.inf) -> Interval:
    """``scale`` where ``low < sigma / alpha <= high``, and 1, with half the network evaluations, elsewhere.

    Guidance hurts at high noise, where it removes modes, and is not needed at low noise, where the condition no longer
    matters.

    Args:
        scale: inside; 1 is the conditional model.
        low, high: noise-to-signal ratios (of EDM: sigma), ``0 <= low <= high``.

    Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models,
    arXiv:2404.07724.

    Raises ValueError for a scale that is not finite, or unless 0 <= low <= high.

    >>> import diffjax
    >>> levels = diffjax.processes.edm().level(np.array([5.0, 1.0, 0.1]))
    >>> interval(3.0, 0.5, 2.0)(levels)
    array([1., 3., 1.])
    """
    _finite("scale", scale)
    if not is_traced(low, high) and not 0 <= low <= high:
        raise ValueError(f"need 0 <= low <= high, got low={low!r}, high={high!r}.")
    return Interval(scale, low, high)


@value
class Interval:
    scale: Array
    low: Array
    high: Array
    factory = "interval"

    def __call__(self, level: Level) -> Array:
        xp = namespace(self, level)
        inside = (level.sigma > self.low * level.alpha) & (
            xp.isinf(self.high) | (level.sigma <= xp.where(xp.isinf(self.high), 1.0, self.high) * level.alpha)
        )
        return xp.where(inside, self.scale, 1.0)


def ramp(scale: Array = 2.0, first: Array = 1.0, power: Array = 1.0, shape: str = "power") -> Ramp:
    """From ``first`` at noise to ``scale`` at data: ``first + (scale - first) r``, r a function of the noise share u.

    ``shape="power"``: ``r = (1 - u)^power``, linear by default; ``"cosine"``: ``r = (1 - cos(pi (1 - u)^power)) / 2``.
    With first above scale it falls.  Increasing schedules were found to be the better ones.

    Analysis of Classifier-Free Guidance Weight Schedulers, arXiv:2404.13040 (with time in place of the share of
    noise, and normalised so that the mean of the scale is kept; here the ends are given).

    Raises ValueError for a scale or first that is not finite, power <= 0, or another shape.

    >>> import diffjax
    >>> ramp(3.0)(diffjax.processes.flow().level(np.array([1.0, 0.5, 0.0])))
    array([1., 2., 3.])
    """
    _finite("scale", scale)
    _finite("first", first)
    if not is_traced(power) and not power > 0:
        raise ValueError(f"power must be above 0, got {power!r}.")
    if shape not in SHAPES:
        raise ValueError(f"shape must be among {SHAPES}, got {shape!r}.")
    return Ramp(scale, first, power, shape)


@value
class Ramp:
    scale: Array
    first: Array
    power: Array
    shape: str = static()
    factory = "ramp"

    def __call__(self, level: Level) -> Array:
        xp = namespace(self, level)
        risen = (level.alpha / (level.alpha + level.sigma)) ** self.power
        if self.shape == "cosine":
            risen = 0.5 * (1 - xp.cos(xp.pi * risen))
        return self.first + (self.scale - self.first) * risen


def sine(scale: Array = 1.0, height: Array = 1.0) -> Sine:
    """``scale + height sin(pi u)``: strongest in the middle of the share of noise u.

    Elucidating The Design Space of Classifier-Guided Diffusion Generation, arXiv:2310.11311 (in the share of noise
    instead of the index of a step).

    Raises ValueError for numbers that are not finite.

    >>> import diffjax
    >>> float(sine(1.0, 2.0)(diffjax.processes.flow().level(0.5)))
    3.0
    """
    _finite("scale", scale)
    _finite("height", height)
    return Sine(scale, height)


@value
class Sine:
    scale: Array
    height: Array
    factory = "sine"

    def __call__(self, level: Level) -> Array:
        xp = namespace(self, level)
        return self.scale + self.height * xp.sin(xp.pi * noise_share(level))


def noise_share(level: Level) -> Array:
    """``u = sigma / (alpha + sigma)``."""
    return level.sigma / (level.alpha + level.sigma)


# --- what the methods that take a scale share -----------------------------------------------------------------------


def as_scale(name: str, scale: Any) -> Any:
    """A number, checked, or a schedule as a value; ValueError for a concrete number that is not finite."""
    if callable(scale):
        return as_value(scale)
    _finite(name, scale)
    return scale


def scale_at(scale: Any, level: Level) -> Array:
    """The scale at a level."""
    return scale(level) if callable(scale) else scale


def neutral(scale: Any, level: Level, number: float = 1.0) -> Array:
    """Whether a schedule is ``number`` for the whole state, so that calls can be left out; False for plain numbers."""
    return jnp.all(jnp.asarray(scale(level)) == number) if callable(scale) else jnp.asarray(False)


def _finite(name: str, number: Any) -> None:
    if not is_traced(number) and not np.all(np.isfinite(number)):
        raise ValueError(f"{name} must be finite, got {number!r}.")
