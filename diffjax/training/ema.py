"""Moving averages of parameters.

After update k (counted from 0), `average <- d_k average + (1 - d_k) params`, where the decay d_k is
a function of k. With a constant decay d the average looks back over about 1 / (1 - d) updates; with `power` over a
share of the run that stays the same. `several` keeps more than one, and `reconstruct` makes of what was kept along the
way the average of any other width, after the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from diffjax.levels import value

Decay: TypeAlias = Callable[[Any], Any]


@value
class Warmed:
    limit: Any
    factory = "warmed"

    def __call__(self, step: Any) -> Any:
        return jnp.minimum(self.limit, (1.0 + step) / (10.0 + step))


def warmed(limit: float | int = 0.999) -> Warmed:
    """The decay `min(limit, (1 + k) / (10 + k))`: the random initial parameters are soon forgotten.

    Raises:
        ValueError: limit outside [0, 1).
    """
    return Warmed(_checked(limit))


@value
class Constant:
    limit: Any
    factory = "constant"

    def __call__(self, step: Any) -> Any:
        return jnp.full_like(jnp.asarray(step, jnp.float32), self.limit)


def constant(limit: float | int = 0.999) -> Constant:
    """The same decay at every step.

    Raises:
        ValueError: limit outside [0, 1).
    """
    return Constant(_checked(limit))


def power(std: float | int = 0.05) -> Power:
    """The decay ``(1 - 1/t)^(gamma + 1)`` of update t = k + 1: parameters weigh a power of when they were made.

    At every t those of update tau have a weight in proportion to ``(tau / t)^gamma``. ``std`` is the standard deviation
    of that profile in units of t, the *width* of the average: 0.05 looks back over about a sixth of the run, however
    long it is, and the initial parameters are forgotten at once.

    Analyzing and Improving the Training Dynamics of Diffusion Models, arXiv:2312.02696, section 3.1.

    Raises:
        ValueError: std outside (0, 0.288], where gamma > 0.
    """
    return Power(exponent(std))


@value
class Power:
    gamma: Any
    factory = "power"

    def __call__(self, step: Any) -> Any:
        t = jnp.asarray(step, jnp.float32) + 1
        # log1p keeps the digits at large t
        return jnp.where(t > 1, jnp.exp((self.gamma + 1) * jnp.log1p(-1 / jnp.maximum(t, 1.5))), 0.0)


def exponent(std: float | int) -> float:
    """gamma of the profile ``(tau / t)^gamma`` of standard deviation ``std``, in units of t.

    The positive root of ``(gamma + 1) = std^2 (gamma + 2)^2 (gamma + 3)``.

    Raises:
        ValueError: std outside (0, 12^(-1/2)): a profile that is flat has std 12^(-1/2).
    """
    if not 0 < std < 12**-0.5:
        raise ValueError(f"std must be above 0 and below 0.288, that of a flat profile, got {std}")
    inverse = float(std) ** -2
    return float(np.max(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real))


def width(gamma: float | int) -> float:
    """The inverse of `exponent`: ``std = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3))``."""
    return float((gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5))


def several(*decays: Decay) -> Several:
    """As many averages side by side: `state.ema` is a tuple, in the order of the decays.

    Two `power` averages, kept with some checkpoints, are what `reconstruct` makes those of other widths of.

    Raises:
        ValueError: no decay.
    """
    if not decays:
        raise ValueError("several needs at least one decay, got none")
    return Several(tuple(decays))


@value
class Several:
    decays: tuple
    factory = "several"

    def init(self, params: PyTree) -> tuple:
        return (params,) * len(self.decays)

    def update(self, average: tuple, params: PyTree, step: Any) -> tuple:
        return tuple(update(old, params, decay(step)) for old, decay in zip(average, self.decays, strict=True))


def reconstruct(
    averages: Sequence[PyTree], steps: Sequence[int], stds: Sequence[float], std: float | int, step: int | None = None
) -> PyTree:
    """The `power` average of width ``std`` at ``step``, from averages of other widths kept at other steps.

    A weighted sum of them, whose profile is the nearest to the wanted one in least squares; the more are kept, the
    nearer. Two widths, 0.05 and 0.1, every 1/64 of a run give any width between 0.03 and 0.25 to about a percent.

    Args:
        averages: N trees of parameters, as `state.ema` was after `steps` updates.
        steps: (N,) how many updates each had seen (`state.step`), at least 1.
        stds: (N,) the width of each, as given to `power`.
        std: the width wanted, in (0, 0.288).
        step: at which; default the last of `steps`.

    Raises:
        ValueError: as many steps and widths as averages are needed, and none after `step`.

    Analyzing and Improving the Training Dynamics of Diffusion Models, arXiv:2312.02696, section 3.2.
    """
    if not len(averages) == len(steps) == len(stds) > 0:
        raise ValueError(
            f"needs a step and a std for every average, got {len(averages)} averages, {len(steps)} steps and"
            f" {len(stds)} stds"
        )
    step = max(steps) if step is None else step
    if min(steps) < 1 or max(steps) > step:
        raise ValueError(f"steps must be between 1 and step={step}, got {list(steps)}")
    weights = profile_weights(steps, stds, std, step)

    def leaf(*leaves: Any) -> Any:
        total = sum(weight * np.asarray(one, np.float64) for weight, one in zip(weights, leaves, strict=True))
        return np.asarray(total, np.asarray(leaves[0]).dtype)

    return jax.tree.map(leaf, *averages)


def profile_weights(steps: Sequence[int], stds: Sequence[float], std: float | int, step: int) -> np.ndarray:
    """The weights (N,) of kept averages whose weighted profile is the nearest to that of ``std`` at ``step``.

    With ``p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)`` on (0, t], the inner product of two profiles is

        (gamma + 1)(gamma' + 1) / (gamma + gamma' + 1)  (t / t')^(gamma') / t'     for t <= t'.
    """
    t = np.append(np.asarray(steps, np.float64), float(step))
    gamma = np.array([exponent(one) for one in (*stds, std)])
    later = t[:, None] > t[None, :]
    ratio = np.where(later, t[None, :] / t[:, None], t[:, None] / t[None, :])
    rate = np.where(later, gamma[:, None], gamma[None, :])  # of the profile that ends later
    scale = (gamma[:, None] + 1) * (gamma[None, :] + 1) / (gamma[:, None] + gamma[None, :] + 1)
    products = scale * ratio**rate / np.maximum(t[:, None], t[None, :])
    # in units of each profile's length, and by least squares: neighbours are nearly alike
    length = np.sqrt(np.diag(products))
    matrix = products / length[:, None] / length[None, :]
    found = np.linalg.lstsq(matrix[:-1, :-1], matrix[:-1, -1], rcond=1e-14)[0]
    return found * length[-1] / length[:-1]


def update(average: PyTree, params: PyTree, decay: Any) -> PyTree:
    """`decay * average + (1 - decay) * params`, leaf by leaf, in the dtype of the average."""
    return jax.tree.map(lambda a, p: (a + (1 - decay) * (p - a)).astype(a.dtype), average, params)


def _checked(limit: Any) -> Any:
    if not 0 <= limit < 1:
        raise ValueError(f"limit must be at least 0 and less than 1, got {limit}")
    return limit
