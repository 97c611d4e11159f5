"""Guidance by a twist: a positive function of the state that stands for what is wanted of the clean sample.

A *twist* h(x_t, level) approximates p(y | x_t), or E[exp(reward(x_0)) | x_t].  It is a value that is called as
``twist(denoise, x, level) -> (log_h, x0)``: a scalar and the plain clean estimate that was made on the way.  At
sigma = 0 it is the exact log p(y | x_0) or reward(x_0).  Where the method prescribes another gradient than that of
log h (a covariance held constant, the solution of a linear system) it has
``gradient(denoise, x, level) -> (log_h, x0, grad_x log h)``; otherwise the gradient is autodiff's.  Optional:
``check(t)`` of the levels of a plan, ``evaluations(denoise, level)`` where a call is not one of the denoiser's.

The same twist guides every solver (`tilted`) and weighs the particles of sequential Monte Carlo.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffjax.corrections.transform import check_within, condition_within, evaluations
from diffjax.guidance.schedules import as_scale, scale_at
from diffjax.levels import Array, Level, Tree, as_value, remembers, value


def tilted(denoise: Any, twist: Any, scale: Any = 1.0) -> Tilted:
    """The denoiser of the tilted law, ``x0 + scale sigma^2 / alpha grad_x log h(x, level)`` (Tweedie's formula).

    With the exact twist p(y | x_t) and scale 1 this is E[x_0 | x_t, y]; scale 0 is the plain denoiser.  At alpha = 0
    and at sigma = 0 the plain estimate is returned: there the state tells nothing, or everything.

    Args:
        denoise: a denoiser that does not remember.
        twist: see the module; `diffjax.inverse` has those of measurements and rewards.
        scale: the strength, finite; a number or a function of the level (`diffjax.guidance.sine`).

    Network evaluations: those of the twist, which are the denoiser's own unless it says otherwise; its derivatives
    are not counted.

    Raises ValueError for a denoiser that remembers and a concrete scale that is not finite.

    >>> import diffjax, jax.numpy as jnp
    >>> plain, level = diffjax.oracles.gaussian(0.0, 1.0), diffjax.processes.flow().level(0.5)
    >>> seen = diffjax.inverse.measurement(diffjax.inverse.identity(()), 2.0, 1.0)
    >>> float(tilted(plain, diffjax.inverse.exact(plain, seen))(jnp.array(0.0), level))
    0.6666...
    """
    if remembers(denoise):
        raise ValueError(f"tilted cannot wrap a denoiser that remembers, got {denoise!r}.")
    return Tilted(as_value(denoise), as_value(twist), as_scale("scale", scale))


def twist_gradient(denoise: Any, twist: Any, x: Tree, level: Level) -> tuple[Array, Tree, Tree]:
    """``(log_h, x0, grad_x log h)``: the twist's own gradient where it prescribes one, else autodiff's."""
    if hasattr(twist, "gradient"):
        return twist.gradient(denoise, x, level)
    (log_h, x0), gradient = jax.value_and_grad(lambda x: twist(denoise, x, level), has_aux=True)(x)
    return log_h, x0, gradient


@value
class Tilted:
    denoise: Any
    twist: Any
    scale: Any
    factory = "tilted"

    def __call__(self, x: Tree, level: Level) -> Tree:
        _, x0, gradient = twist_gradient(self.denoise, self.twist, x, level)
        return shifted_estimate(x0, gradient, level, scale_at(self.scale, level))

    condition = property(condition_within)

    def check(self, t: Level) -> None:
        check_within(self, t)
        if hasattr(self.twist, "check"):
            self.twist.check(t)

    def evaluations(self, level: Level) -> Array:
        own = getattr(self.twist, "evaluations", None)
        return evaluations(self.denoise, level) if own is None else own(self.denoise, level)


def shifted_estimate(x0: Tree, gradient: Tree, level: Level, scale: Array = 1.0) -> Tree:
    """``x0 + scale sigma^2 / alpha gradient``, and x0 at both ends."""
    inside = jnp.asarray((level.alpha > 0) & (level.sigma > 0))
    factor = scale * level.sigma**2 / jnp.where(inside, level.alpha, 1.0)
    return jax.tree.map(lambda clean, g: (clean + jnp.where(inside, factor * g, 0.0)).astype(clean.dtype), x0, gradient)
