"""The one door between Flax NNX modules and the rest of the library.

Everything outside this folder sees a network as a pure function `apply(params, x, t, condition)`
of one unbatched sample. `functional` splits a module into that function and its parameters:

    apply, params = functional(UNet((8, 8, 1), condition=label(10), rngs=nnx.Rngs(0)))
    raw = apply(params, x, t, 3)                                          # one sample
    raws = jax.vmap(apply, (None, 0, 0, 0))(params, xs, ts, labels)       # a batch

`apply` is a value: two modules built with the same arguments give equal `apply` with equal
hashes, so that code compiled for one serves the other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

Params: TypeAlias = dict[str, Any]
# A scalar; integers are the table indices of discrete-time processes.
Time: TypeAlias = Float[Array, ""] | Int[Array, ""] | np.number | np.ndarray | float | int


class Architecture(NamedTuple):
    """The call that built a network, as plain values: `name(**dict(arguments))`."""

    name: str
    arguments: tuple[tuple[str, Any], ...]

    def json(self) -> dict[str, Any]:
        """The architecture as a JSON object `{"name": ..., argument: value, ...}`."""
        return {"name": self.name, **{key: _plain(value) for key, value in self.arguments}}


def described(name: str, **arguments: Any) -> Architecture:
    """The architecture record of a module, from the arguments it was built with."""
    return Architecture(name, tuple(arguments.items()))


def _plain(value: Any) -> Any:
    """Tuples become lists, as they do in JSON, so that a record equals its own round trip; parts are records too."""
    if isinstance(value, Architecture):
        return value.json()
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


@dataclass(frozen=True)
class Apply:
    """A network as a pure function `(params, x, t, condition=None) -> output` of one sample.

    Compared and hashed by its graph definition: static for `jax.jit`, never a reason to retrace. Keywords are hooks of
    the network: `features=True` returns `(output, features)`, its hidden states block after block, and `perturb` of
    shape `attention_heads(apply)` turns attention maps towards the identity (`layers.Attention`).
    """

    graph: nnx.GraphDef
    architecture: Architecture | None = None

    @cached_property
    def _hash(self) -> int:
        return hash(self.graph)  # a walk over the whole network

    def __hash__(self) -> int:
        return self._hash

    def __call__(
        self,
        params: PyTree,
        x: Float[Array, "..."],
        t: Time,
        condition: PyTree = None,
        **hooks: Any,
    ) -> Float[Array, "..."] | tuple[Float[Array, "..."], PyTree]:
        return nnx.merge(self.graph, _indexed(params))(x, t, condition, **hooks)


def functional(module: nnx.Module) -> tuple[Apply, Params]:
    """Split an NNX module into `(apply, params)`.

    Args:
        module: called as `module(x, t, condition)` on one sample; its only state is `nnx.Param`.

    Returns:
        `apply(params, x, t, condition=None)`, pure and hashable, and `params`, nested dictionaries
        with string keys and array leaves.

    Raises:
        ValueError: the module carries state other than parameters (batch statistics, random
            streams), which a pure function of its parameters cannot hold.
    """
    graph, state, rest = nnx.split(module, nnx.Param, ...)
    others = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(rest)]
    if others:
        raise ValueError(
            f"module {type(module).__name__} holds state that is not an nnx.Param: {others}; only "
            "parameters are allowed (no batch statistics, dropout streams or caches)"
        )
    return Apply(graph, getattr(module, "architecture", None)), _named(nnx.to_pure_dict(state))


def architecture(apply: Callable) -> dict[str, Any] | None:
    """The JSON description of one of this library's networks; None for any other function."""
    found = getattr(apply, "architecture", None)
    return found.json() if isinstance(found, Architecture) else None


def attention_heads(apply: Callable) -> tuple[int, int]:
    """`(layers, heads)` of self-attention, in order of execution: the shape of the hook `perturb`.

    Raises:
        ValueError: `apply` is none of this library's networks with attention.
    """
    found = architecture(apply) or {}
    if found.get("name") == "dit":
        return found["depth"], found["heads"]
    if found.get("name") == "unet":
        heights = [found["shape"][0] >> level for level in range(len(found["channels"]))]
        attending = sum(height in found["attention"] for height in heights)
        return 2 * found["blocks"] * attending + 1, found["heads"]
    raise ValueError(f"apply must be a DiT or a UNet of diffjax.networks, got {found.get('name', apply)!r}")


def attention_rows(perturb: Array | None, shape: tuple[int, int]) -> list[Array | None]:
    """The hook `perturb`, one row for each layer; ValueError unless it is None, (layers, heads) or (layers,)."""
    if perturb is None:
        return [None] * shape[0]
    if perturb.shape not in (shape, shape[:1]):
        raise ValueError(f"perturb must have the shape {shape} (layers, heads) or {shape[:1]}, got {perturb.shape}")
    return list(jnp.broadcast_to(perturb.reshape(shape[0], -1), shape))


def count(params: PyTree) -> int:
    """The number of scalar parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _named(tree: Any) -> Any:
    """NNX numbers the entries of a list; strings survive JSON, safetensors and Orbax unchanged."""
    return {str(k): _named(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _indexed(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdigit() else k: _indexed(v) for k, v in tree.items()}
