"""A residual multi-layer perceptron for vectors: toy data, latents, low-dimensional problems.

With embedding e of time and condition, each block is

    h <- h + W2 silu((1 + scale(e)) * norm(W1 h) + shift(e))

and the output layer starts at zero.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from numpy.typing import DTypeLike

from diffjax.networks import layers
from diffjax.networks.functional import Time, described


class Block(nnx.Module):
    """Residual block on a vector of `width`."""

    def __init__(self, width: int, **options: Any):
        self.first = nnx.Linear(width, width, **options)
        self.modulate = nnx.Linear(width, 2 * width, **options)
        self.second = nnx.Linear(width, width, **options)

    def __call__(self, h: Float[Array, " d"], embedding: Float[Array, " d"]) -> Float[Array, " d"]:
        scale, shift = jnp.split(self.modulate(embedding), 2)
        inner = layers.layer_norm(self.first(h)) * (1 + scale) + shift
        return h + self.second(nnx.silu(inner))


class MLP(nnx.Module):
    """Perceptron for vectors; called as `mlp(x, t, condition=None)` on one sample (D,).

    Args:
        size: D, the length of x.
        width: features of the hidden layers.
        depth: number of residual blocks.
        condition: `label(classes)`, `vector(size)`, a tuple of them, or None.
        output: length of the output, default D.
        time_scale: multiplies t before its sinusoidal features; 1000 suits images and times in
            [0, 1], where smoothness in time matters more (few dimensions) 100 is gentler.
        dtype: type of the computation; parameters and output are float32.

    With `features=True` it returns `(output, features)`, the features (depth, width) being the state after each block.

    Raises:
        ValueError: sizes that do not fit, named.
    """

    def __init__(
        self,
        size: int,
        *,
        width: int = 128,
        depth: int = 3,
        condition: Any = None,
        output: int | None = None,
        time_scale: float | int = 100.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        specs = layers.conditions(condition)
        if any(spec.kind == "tokens" for spec in specs):
            raise ValueError("condition tokens is not supported by MLP; use label, vector or a DiT")
        layers.positive("size", size)
        layers.positive("width", width)
        layers.positive("depth", depth)
        dtype = jnp.dtype(dtype)
        self.architecture = described(
            "mlp",
            size=size,
            width=width,
            depth=depth,
            condition=tuple(tuple(spec) for spec in specs),
            output=output,
            time_scale=time_scale,
            dtype=dtype.name,
        )
        self.size, self.dtype = size, dtype
        options = layers.linear_options(dtype, rngs)
        self.embed = layers.Embedding(width, specs, time_scale=time_scale, **options)
        self.stem = nnx.Linear(size, width, **options)
        self.blocks = nnx.List(Block(width, **options) for _ in range(depth))
        self.out = nnx.Linear(width, output or size, **(options | layers.ZERO))

    def __call__(self, x: Float[Array, "..."], t: Time, condition: Any = None, features: bool = False) -> Any:
        if x.shape != (self.size,):
            raise ValueError(
                f"x must be one vector of shape ({self.size},) (batches go through jax.vmap), got shape {x.shape}"
            )
        embedding, _ = self.embed(jnp.asarray(t), condition)
        h = self.stem(x.astype(self.dtype))
        hidden = []
        for block in self.blocks:
            h = block(h, embedding)
            hidden.append(h)
        output = self.out(nnx.silu(layers.layer_norm(h))).astype(jnp.float32)
        return (output, jnp.stack(hidden)) if features else output
