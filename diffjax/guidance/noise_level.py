"""Guidance of the noise that a sampler starts from, before it starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.guidance.rules import in_target
from diffjax.levels import Array, Level, Tree, dot, is_traced, root


def refined_noise(
    x: Tree, direction: Callable[[Tree], Tree], steps: int = 5, rate: Array = 0.1, limit: Array = np.inf
) -> Tree:
    """``x <- x + rate d(x)``, brought back to the norm that x had: noise from which the condition is more likely.

    Forward calls only.  With ``d = x0(c) - x0(null)`` (`noise_direction`), which is sigma^2 / alpha grad log p(c | x),
    the likelihood of the class given the noise rises; the norm of noise stays typical, sqrt(D) sigma at first.  Any
    sampler starts from the result (``x=``), guided or not.

    Args:
        x: a state at the first level, a draw of the prior.
        direction: a function of the state; any difference of two estimates.
        steps: at least 0; 0 is x itself.
        rate: of a step.  The paper takes the difference of noise estimates, whose size is alpha / sigma of this one.
        limit: entries of the direction are clipped to [-limit, limit].

    Returns the refined state.  Calls of the direction: ``steps``.

    Noise-Level Diffusion Guidance: Well Begun is Half Done, arXiv:2509.13936.

    Raises ValueError unless steps is an integer of at least 0, rate finite and limit above 0.
    """
    if not isinstance(steps, int | np.integer) or steps < 0:
        raise ValueError(f"steps must be an integer of at least 0, got {steps!r}.")
    if not is_traced(rate) and not np.isfinite(rate):
        raise ValueError(f"rate must be finite, got {rate!r}.")
    if not is_traced(limit) and not limit > 0:
        raise ValueError(f"limit must be above 0, got {limit!r}.")
    long = root(dot(x, x))

    def body(x: Tree, _: None) -> tuple[Tree, None]:
        moved = jax.tree.map(lambda leaf, d: leaf + rate * jnp.clip(d, -limit, limit), x, direction(x))
        now = root(dot(moved, moved))
        factor = long / jnp.where(now > 0, now, 1.0)
        return jax.tree.map(lambda leaf, like: (factor * leaf).astype(like.dtype), moved, x), None

    return jax.lax.scan(body, x, None, length=int(steps))[0] if steps else x


def noise_direction(strong: Any, weak: Any, level: Level, of: str = "data") -> Callable[[Tree], Tree]:
    """``x -> y_strong - y_weak`` at a level, for `refined_noise`: of the clean estimates, or with "flow" -(eps - x0).

    ``strong`` and ``weak`` are a conditional and an unconditional denoiser (`conditioned` with the null), or a strong
    and a weak one.
    """
    sign = 1.0 if of == "data" else -1.0

    def direction(x: Tree) -> Tree:
        a, b = (in_target(of, model(x, level), x, level) for model in (strong, weak))
        return jax.tree.map(lambda u, v: sign * (u - v), a, b)

    return direction
