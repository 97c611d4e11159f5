"""`DiTTransformer2DModel` of diffusers as a network of one sample.

The architecture of `diffjax.networks.DiT` with the details of the published weights: every block embeds time and class
by itself, positions count columns first, and what is told about the time has 256 features.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from diffjax.networks import layers
from diffjax.networks.dit import joined
from diffjax.networks.functional import Time
from diffjax.networks.pretrained import blocks
from diffjax.networks.pretrained.blocks import Attention, FeedForward, Norm, Style, TimeEmbedding
from diffjax.networks.pretrained.config import architecture, free, only, read
from diffjax.networks.pretrained.unet import named

FIELDS = {
    **free(num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=None, num_layers=28),
    **free(sample_size=32, patch_size=2, num_embeds_ada_norm=1000, norm_eps=1e-5, attention_bias=True),
    **free(dropout=0.0, norm_num_groups=32, upcast_attention=False),
    **only(activation_fn=("gelu-approximate", "gelu", "geglu"), norm_type="ada_norm_zero"),
    **only(norm_elementwise_affine=False),
    # fields that the class has lost and old files still have
    **only(cross_attention_dim=None, num_vector_embeds=None, use_linear_projection=False, only_cross_attention=False),
    **only(double_self_attention=False, attention_type="default", caption_channels=None),
}


class Embedder(nnx.Module):
    """Time and class as one vector; the last row of the table is the null class."""

    def __init__(self, size: int, classes: int, style: Style, rngs: nnx.Rngs):
        self.timestep_embedder = TimeEmbedding(256, size, style, rngs)
        self.class_embedder = Table(classes + 1, size, style, rngs)

    def __call__(self, t: Array, label: Array) -> Float[Array, " d"]:
        return self.timestep_embedder(blocks.time_features(t, 256, True, 1)) + self.class_embedder(label)


class Table(nnx.Module):
    """A vector for every class."""

    def __init__(self, classes: int, size: int, style: Style, rngs: nnx.Rngs):
        self.embedding_table = nnx.Embed(classes, size, dtype=style.dtype, rngs=rngs)

    def __call__(self, label: Array) -> Float[Array, " d"]:
        return self.embedding_table(label)


class Modulation(nnx.Module):
    """Six vectors of the time and class."""

    def __init__(self, size: int, classes: int, style: Style, rngs: nnx.Rngs):
        self.emb, self.linear = Embedder(size, classes, style, rngs), style.linear(size, 6 * size, rngs)

    def __call__(self, t: Array, label: Array) -> list[Array]:
        return jnp.split(self.linear(jax.nn.silu(self.emb(t, label))), 6)


class Block(nnx.Module):
    """Attention and perceptron, each normalised, scaled, shifted and gated by the embedding."""

    def __init__(self, heads: int, width: int, fields: dict[str, Any], style: Style, rngs: nnx.Rngs):
        size = heads * width
        self.norm1 = Modulation(size, fields["num_embeds_ada_norm"], style, rngs)
        self.attn1 = Attention(size, heads, width, style, rngs, bias=fields["attention_bias"])
        self.ff = FeedForward(size, fields["activation_fn"], style, rngs)
        self.first, self.second = (
            Norm(size, None, 1e-6, affine=False),
            Norm(size, None, fields["norm_eps"], affine=False),
        )

    def __call__(self, h: Float[Array, "n d"], t: Array, label: Array) -> Float[Array, "n d"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.norm1(t, label)
        h = h + gate1 * self.attn1(self.first(h) * (1 + scale1) + shift1)
        return h + gate2 * self.ff(self.second(h) * (1 + scale2) + shift2)


class Patches(nnx.Module):
    """Square patches as tokens."""

    def __init__(self, patch: int, channels: int, size: int, style: Style, rngs: nnx.Rngs):
        self.proj = style.conv(channels, size, rngs, kernel=patch, stride=patch, pad="VALID")

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "n d"]:
        h = self.proj(x)
        return h.reshape(-1, h.shape[-1])


class PublishedDiT(nnx.Module):
    """A published diffusion transformer; called as `dit(x, t, label)` on one sample (S, S, C).

    The label is in 0 .. classes - 1, or `classes` for none.  The output may have twice the channels of x: see
    `pretrained.pipeline`.

    Args:
        config: `config.json` of a `DiTTransformer2DModel`.
        dtype: type of the computation; parameters and output are float32.

    Raises:
        ValueError: a field that is not supported, sizes that do not fit.
    """

    def __init__(self, config: Mapping[str, Any], *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.architecture = architecture(config)
        fields = read(config, FIELDS)
        heads, width = fields["num_attention_heads"], fields["attention_head_dim"]
        style, size = Style(0, 0.0, dtype=jnp.dtype(dtype)), heads * width
        if size % 4:
            raise ValueError(f"num_attention_heads={heads} times attention_head_dim={width} must be divisible by 4")
        if fields["sample_size"] % fields["patch_size"]:
            raise ValueError(f"patch_size={fields['patch_size']} must divide sample_size={fields['sample_size']}")
        self.patch, self.dtype, self.inputs = fields["patch_size"], style.dtype, ("label",)
        self.shape = (fields["sample_size"],) * 2 + (fields["in_channels"],)
        self.output = fields["out_channels"] or fields["in_channels"]
        self.pos_embed = Patches(self.patch, fields["in_channels"], size, style, rngs)
        self.transformer_blocks = nnx.List(
            Block(heads, width, fields, style, rngs) for _ in range(fields["num_layers"])
        )
        self.norm_out = Norm(size, None, 1e-6, affine=False)
        self.proj_out_1 = style.linear(size, 2 * size, rngs)
        self.proj_out_2 = style.linear(size, self.patch**2 * self.output, rngs)

    def __call__(self, x: Float[Array, "..."], t: Time, condition: Any = None) -> Float[Array, "h w out"]:
        layers.one_image(x, self.shape)
        t, label = jnp.asarray(t), named(self.inputs, condition)["label"]
        h = self.pos_embed(x.astype(self.dtype))
        h = h + positions(x.shape[0] // self.patch, h.shape[-1]).astype(h.dtype)
        for block in self.transformer_blocks:
            h = block(h, t, label)
        embedding = self.transformer_blocks[0].norm1.emb(t, label)
        shift, scale = jnp.split(self.proj_out_1(jax.nn.silu(embedding)), 2)
        h = self.proj_out_2(self.norm_out(h) * (1 + scale) + shift).astype(jnp.float32)
        return joined(h, (*x.shape[:2], self.output), self.patch)


def positions(side: int, size: int) -> Float[Array, "{side}*{side} {size}"]:
    """Fixed sine and cosine features of a token's column (first half) and row (second half)."""
    rates = 10000.0 ** (-np.arange(size // 4) / (size // 4))
    rows, columns = np.divmod(np.arange(side * side), side)
    angles = [index[:, None] * rates for index in (columns, rows)]
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return jnp.asarray(np.concatenate(waves, axis=1), jnp.float32)
