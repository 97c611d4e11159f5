"""A network in a narrow floating-point type, with parameters, averages, losses and gradients in float32.

The networks of `diffjax.networks` have `dtype=` for it, which also keeps their statistics and softmax in float32;
`mixed` is for any other network.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from numpy.typing import DTypeLike


@dataclass(frozen=True)
class Mixed:
    """A network whose arguments are cast; see `mixed`."""

    apply: Callable
    dtype: str

    @property
    def architecture(self) -> Any:
        """That of the network: the cast changes no parameter."""
        return getattr(self.apply, "architecture", None)

    def __call__(self, params: PyTree, x: PyTree, t: Any, condition: PyTree = None) -> PyTree:
        out = self.apply(cast(params, self.dtype), cast(x, self.dtype), t, cast(condition, self.dtype))
        return cast(out, jnp.float32)


def mixed(apply: Callable, dtype: DTypeLike = jnp.bfloat16) -> Mixed:
    """The network ``apply(params, x, t, condition)`` computed in ``dtype``, and its output in float32.

    Parameters, state and condition are cast inside, so the parameters that are trained (the master weights), their
    gradient and their average stay float32. The time is not cast, as its features need all of its digits: the network
    computes in the type of its state, to which it casts what it makes of the time.

    Raises ValueError for a type that is not floating.
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating type, got {dtype.name}")
    return Mixed(apply, dtype.name)


def cast(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """A tree with its floating leaves in another type."""

    def one(leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, tree)
