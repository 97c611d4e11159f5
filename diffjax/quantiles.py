"""Quantiles of laws on an interval whose distribution function is known."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.levels import Array


def bisected(below: Callable[[Array], Array], u: Array, low: Array, high: Array, steps: int) -> Array:
    """The x of [low, high] where the rising ``below`` reaches u, by halving the interval ``steps`` times."""

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        less = below(middle) < u
        return jnp.where(less, middle, low), jnp.where(less, high, middle)

    low, high = jax.lax.fori_loop(0, steps, halve, (low, high))
    return 0.5 * (low + high)
