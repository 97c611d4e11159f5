"""Multimodal diffusion transformer: image and text tokens with weights of their own and one attention.

The block of Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, arXiv:2403.03206, figure 2. Each
of the two streams s has its own modulation by the embedding e of time and pooled conditions, projections and
perceptron; only the attention sees both:

    q_s, k_s, v_s = project_s(norm(h_s) (1 + scale1_s(e)) + shift1_s(e)),     q, k normalised by their root mean square
    a = attention(q, k, v) over the tokens of both
    h_s <- h_s + gate1_s(e) out_s(a_s)
    h_s <- h_s + gate2_s(e) mlp_s(norm(h_s) (1 + scale2_s(e)) + shift2_s(e))

In the last block the text is attended to but not updated, since nothing reads it any more.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from numpy.typing import DTypeLike

from diffjax.networks import layers
from diffjax.networks.dit import joined, patches, positions
from diffjax.networks.functional import Time, described


class Stream(nnx.Module):
    """The weights of one kind of token in a block; `silent` ones are attended to and not updated."""

    def __init__(self, width: int, heads: int, ratio: float | int, silent: bool, **options: Any):
        self.heads, self.silent = heads, silent
        self.modulate = nnx.Linear(width, (2 if silent else 6) * width, **(options | layers.ZERO))
        self.qkv = nnx.Linear(width, 3 * width, **options)
        self.query_scale = nnx.Param(jnp.ones(width // heads))
        self.key_scale = nnx.Param(jnp.ones(width // heads))
        if not silent:
            inner = int(width * ratio)
            self.out = nnx.Linear(width, width, **options)
            self.mlp_in = nnx.Linear(width, inner, **options)
            self.mlp_out = nnx.Linear(inner, width, **options)

    def project(
        self, h: Float[Array, "n d"], embedding: Float[Array, " d"]
    ) -> tuple[list[Float[Array, "n heads k"]], list[Float[Array, " d"]]]:
        """Query, key and value, (N, heads, width / heads) each, and the rest of the modulation."""
        shift, scale, *rest = jnp.split(self.modulate(embedding), 2 if self.silent else 6)
        parts = jnp.split(self.qkv(layers.layer_norm(h) * (1 + scale) + shift), 3, -1)
        query, key, value = (part.reshape(part.shape[0], self.heads, -1) for part in parts)
        return [_normalised(query, self.query_scale), _normalised(key, self.key_scale), value], rest

    def finish(
        self, h: Float[Array, "n d"], attended: Float[Array, "n d"], rest: list[Float[Array, " d"]]
    ) -> Float[Array, "n d"]:
        """The tokens after the block."""
        if self.silent:
            return h
        gate1, shift2, scale2, gate2 = rest
        h = h + gate1 * self.out(attended)
        inner = self.mlp_in(layers.layer_norm(h) * (1 + scale2) + shift2)
        return h + gate2 * self.mlp_out(nnx.gelu(inner))


def _normalised(x: Float[Array, "n heads k"], scale: Any) -> Float[Array, "n heads k"]:
    wide = x.astype(jnp.float32)
    unit = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)
    return (unit * scale[...]).astype(x.dtype)


class JointBlock(nnx.Module):
    """Two streams of tokens through one attention."""

    def __init__(self, width: int, heads: int, ratio: float | int, last: bool, **options: Any):
        self.image = Stream(width, heads, ratio, False, **options)
        self.text = Stream(width, heads, ratio, last, **options)

    def __call__(
        self, h: Float[Array, "n d"], text: Float[Array, "m d"], embedding: Float[Array, " d"]
    ) -> tuple[Float[Array, "n d"], Float[Array, "m d"]]:
        image_parts, image_rest = self.image.project(h, embedding)
        text_parts, text_rest = self.text.project(text, embedding)
        joint = [jnp.concatenate(pair) for pair in zip(image_parts, text_parts, strict=True)]
        attended = jax.nn.dot_product_attention(*joint).reshape(-1, h.shape[1])
        count = h.shape[0]
        return (
            self.image.finish(h, attended[:count], image_rest),
            self.text.finish(text, attended[count:], text_rest),
        )


class MMDiT(nnx.Module):
    """Multimodal diffusion transformer; called as `mmdit(x, t, condition=None)` on one sample (H, W, C).

    Args:
        shape: (H, W, C) of one image; a network runs at this size only.
        patch: side of the square patches that become tokens; must divide H and W.
        width: features of a token, divisible by 4 (its position has four kinds of waves).
        depth: number of blocks.
        heads: attention heads; must divide `width`.
        ratio: hidden features of the perceptrons, in units of `width`.
        condition: `tokens(size)` or a tuple with exactly one of them: the text, which is a stream of its own and is
            not told its positions; `label(classes)` and `vector(size)` beside it are added to the time embedding.
        output: output channels, default C.
        time_scale: multiplies t before its sinusoidal features; 1000 suits times in [0, 1].
        dtype: type of the computation; parameters and output are float32.

    At initialisation the output is zero.

    Raises:
        ValueError: sizes that do not fit, named; a condition without exactly one token sequence.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        condition: Any,
        patch: int = 2,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        ratio: float | int = 4.0,
        output: int | None = None,
        time_scale: float | int = 1000.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape, specs = tuple(shape), layers.conditions(condition)
        if len(shape) != 3:
            raise ValueError(f"shape must be (H, W, C), got {shape}")
        layers.divides("patch", patch, "H", shape[0])
        layers.divides("patch", patch, "W", shape[1])
        layers.divides("heads", heads, "width", width)
        layers.positive("depth", depth)
        if width % 4:
            raise ValueError(f"width must be divisible by 4, got {width}")
        sizes = [spec.size for spec in specs if spec.kind == "tokens"]
        if len(sizes) != 1:
            raise ValueError(f"condition must have exactly one networks.tokens(size), got {condition!r}")
        dtype = jnp.dtype(dtype)
        self.architecture = described(
            "mmdit",
            shape=shape,
            patch=patch,
            width=width,
            depth=depth,
            heads=heads,
            ratio=ratio,
            condition=tuple(tuple(spec) for spec in specs),
            output=output,
            time_scale=time_scale,
            dtype=dtype.name,
        )
        self.shape, self.patch, self.width, self.dtype = shape, patch, width, dtype
        self.output = output or shape[2]
        options = layers.linear_options(dtype, rngs)
        self.embed = layers.Embedding(width, specs, time_scale=time_scale, **options)
        self.stem = nnx.Linear(patch * patch * shape[2], width, **options)
        self.text = nnx.Linear(sizes[0], width, **options)
        self.blocks = nnx.List(JointBlock(width, heads, ratio, i == depth - 1, **options) for i in range(depth))
        self.modulate = nnx.Linear(width, 2 * width, **(options | layers.ZERO))
        self.out = nnx.Linear(width, patch * patch * self.output, **(options | layers.ZERO))

    def __call__(self, x: Float[Array, "..."], t: Time, condition: Any = None) -> Float[Array, "h w out"]:
        layers.one_image(x, self.shape)
        embedding, (sequence,) = self.embed(jnp.asarray(t), condition)
        h = self.stem(patches(x.astype(self.dtype), self.patch))
        height, width = (side // self.patch for side in x.shape[:2])
        h = h + positions(height, width, self.width).astype(h.dtype)
        text = self.text(sequence.astype(self.dtype))
        for block in self.blocks:
            h, text = block(h, text, embedding)
        shift, scale = jnp.split(self.modulate(embedding), 2)
        h = self.out(layers.layer_norm(h) * (1 + scale) + shift).astype(jnp.float32)
        return joined(h, (*x.shape[:2], self.output), self.patch)
