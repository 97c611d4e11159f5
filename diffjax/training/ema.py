"""Exponential moving averages of parameters.

After update k (counted from 0), `average <- d_k average + (1 - d_k) params`, where the decay d_k is
a function of k. With a constant decay d the average looks back over about 1 / (1 - d) updates.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
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


def update(average: PyTree, params: PyTree, decay: Any) -> PyTree:
    """`decay * average + (1 - decay) * params`, leaf by leaf, in the dtype of the average."""
    return jax.tree.map(lambda a, p: (a + (1 - decay) * (p - a)).astype(a.dtype), average, params)


def _checked(limit: Any) -> Any:
    if not 0 <= limit < 1:
        raise ValueError(f"limit must be at least 0 and less than 1, got {limit}")
    return limit
