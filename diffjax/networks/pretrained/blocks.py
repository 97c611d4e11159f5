"""The parts that published networks are made of, under the names that their weights have on disk.

An attribute is called what diffusers calls the module, so that the path of a parameter here is the name of the tensor
in a file (`files.py` changes only the layout of the last two axes).  All parts act on one sample: images (H, W, C),
token sequences (N, D).  A convolution with a 1 x 1 kernel is a linear layer.  Parameters are float32, `dtype` is the
type of the computation except for statistics and softmax.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from diffjax.networks import layers
from diffjax.networks.convolutions import Conv

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
}


class Style(NamedTuple):
    """What the blocks of a network have in common."""

    groups: int  # of the normalisations
    eps: float
    act: str = "silu"
    shift: str = "default"  # the embedding is added, or (scale_shift) scales and shifts
    factor: float = 1.0  # outputs of the residual blocks are divided by it
    skip_time_act: bool = False
    dtype: Any = jnp.float32

    def linear(self, size: int, out: int, rngs: nnx.Rngs, bias: bool = True) -> nnx.Linear:
        return nnx.Linear(size, out, use_bias=bias, dtype=self.dtype, kernel_init=layers.uniform, rngs=rngs)

    def conv(self, size: int, out: int, rngs: nnx.Rngs, kernel: int = 3, stride: int = 1, pad: Any = None) -> nnx.Conv:
        pad = ((kernel // 2,) * 2,) * 2 if pad is None else pad
        options: Any = {"padding": pad, "dtype": self.dtype, "kernel_init": layers.uniform}
        return Conv(size, out, (kernel, kernel), stride, rngs=rngs, **options)

    def norm(self, size: int) -> "Norm":
        if not isinstance(self.groups, int):
            raise ValueError(f"norm_num_groups must be a positive integer, got {self.groups!r}")
        return Norm(size, self.groups, self.eps)


class Nothing(nnx.Module):
    """A place in a list for a module that has no parameters and does nothing here (dropout)."""


class Norm(nnx.Module):
    """Group normalisation of an image, or layer normalisation (`groups=None`), with scale and bias where `affine`."""

    def __init__(self, size: int, groups: int | None, eps: float | int, affine: bool = True):
        if groups is not None and (groups < 1 or size % groups):
            raise ValueError(f"norm_num_groups={groups} must divide the channels {size}")
        self.groups, self.eps = groups, eps
        self.scale = nnx.Param(jnp.ones(size)) if affine else None
        self.bias = nnx.Param(jnp.zeros(size)) if affine else None

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        wide = x.astype(jnp.float32)
        split = wide if self.groups is None else wide.reshape(-1, self.groups, x.shape[-1] // self.groups)
        axes = (-1,) if self.groups is None else (0, 2)
        centred = split - split.mean(axes, keepdims=True)
        variance = jnp.square(centred).mean(axes, keepdims=True)
        normal = (centred * jax.lax.rsqrt(variance + self.eps)).reshape(x.shape)
        if self.scale is not None and self.bias is not None:
            normal = normal * self.scale[...] + self.bias[...]
        return normal.astype(x.dtype)


class TimeEmbedding(nnx.Module):
    """Two linear layers that make the embedding of time features (or of a projected class or vector)."""

    def __init__(
        self,
        size: int,
        out: int,
        style: Style,
        rngs: nnx.Rngs,
        act: str = "silu",
        post: str | None = None,
        cond: int = 0,
    ):
        self.act, self.post = act, post
        self.linear_1, self.linear_2 = style.linear(size, out, rngs), style.linear(out, out, rngs)
        self.cond_proj = style.linear(cond, size, rngs, bias=False) if cond else None

    def __call__(self, features: Float[Array, " f"], cond: Float[Array, " g"] | None = None) -> Float[Array, " e"]:
        if cond is not None and self.cond_proj is not None:
            features = features + self.cond_proj(cond)
        out = self.linear_2(ACTIVATIONS[self.act](self.linear_1(features)))
        return out if self.post is None else ACTIVATIONS[self.post](out)


def time_features(t: Array, size: int, flip: bool, shift: float | int) -> Float[Array, " size"]:
    """`sin` and `cos` (`flip`: `cos` and `sin`) of `t 10000^(-k / (size/2 - shift))`."""
    half = size // 2
    angles = jnp.asarray(t, jnp.float32) * jnp.exp(
        -np.log(10000.0) * np.arange(half, dtype=np.float32) / (half - shift)
    )
    waves = (jnp.cos(angles), jnp.sin(angles)) if flip else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate([*waves, jnp.zeros(size % 2)])


def halved(x: Float[Array, "h w c"]) -> Float[Array, "h//2 w//2 c"]:
    """Means of 2 x 2 pixels."""
    height, width, channels = x.shape
    return x.reshape(height // 2, 2, width // 2, 2, channels).mean((1, 3))


def doubled(x: Float[Array, "h w c"]) -> Float[Array, "2*h 2*w c"]:
    """Every pixel four times."""
    return jnp.repeat(jnp.repeat(x, 2, 0), 2, 1)


class Resnet(nnx.Module):
    """Residual block (H, W, a) -> (H, W, b), on the embedding; `resample` changes the resolution on both branches."""

    def __init__(
        self,
        size: int,
        out: int,
        embedding: int | None,
        style: Style,
        rngs: nnx.Rngs,
        resample: Callable[[Array], Array] | None = None,
    ):
        self.style, self.resample = style, resample
        self.norm1, self.conv1 = style.norm(size), style.conv(size, out, rngs)
        wide = 2 * out if style.shift == "scale_shift" else out
        self.time_emb_proj = None if embedding is None else style.linear(embedding, wide, rngs)
        self.norm2, self.conv2 = style.norm(out), style.conv(out, out, rngs)
        self.conv_shortcut = None if size == out else style.linear(size, out, rngs)

    def __call__(self, x: Float[Array, "h w a"], embedding: Float[Array, " e"] | None) -> Float[Array, "k l b"]:
        act = ACTIVATIONS[self.style.act]
        h = act(self.norm1(x))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.conv1(h)
        told = None
        if self.time_emb_proj is not None and embedding is not None:
            told = self.time_emb_proj(embedding if self.style.skip_time_act else act(embedding))
        if told is not None and self.style.shift == "scale_shift":
            scale, shift = jnp.split(told, 2)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h if told is None else h + told)
        h = self.conv2(act(h))
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return (x + h) / self.style.factor


class Attention(nnx.Module):
    """Multi-head attention of N tokens to themselves or, where it is built for one, to a context."""

    def __init__(
        self,
        size: int,
        heads: int,
        width: int,
        style: Style,
        rngs: nnx.Rngs,
        context: int | None = None,
        bias: bool = False,
    ):
        self.heads, inner = heads, heads * width
        self.to_q = style.linear(size, inner, rngs, bias)
        self.to_k = style.linear(context or size, inner, rngs, bias)
        self.to_v = style.linear(context or size, inner, rngs, bias)
        self.to_out = nnx.List([style.linear(inner, size, rngs)])

    def __call__(self, x: Float[Array, "n d"], context: Float[Array, "m c"] | None = None) -> Float[Array, "n d"]:
        return _attend(self, x, x if context is None else context.astype(x.dtype))


class PixelAttention(nnx.Module):
    """Self-attention of the pixels of an image, with its own normalisation and residual connection."""

    def __init__(self, size: int, width: int, style: Style, rngs: nnx.Rngs, groups: int | None):
        if size % width:
            raise ValueError(f"attention_head_dim={width} must divide the channels {size}")
        self.heads, self.factor = size // width, style.factor
        self.group_norm = None if groups is None else Norm(size, groups, style.eps)
        self.to_q, self.to_k, self.to_v = (style.linear(size, size, rngs) for _ in range(3))
        self.to_out = nnx.List([style.linear(size, size, rngs)])

    def __call__(self, x: Float[Array, "h w c"], context: Any = None) -> Float[Array, "h w c"]:
        h = (x if self.group_norm is None else self.group_norm(x)).reshape(-1, x.shape[-1])
        return (_attend(self, h, h).reshape(x.shape) + x) / self.factor


def _attend(module: Any, x: Float[Array, "n d"], seen: Float[Array, "m c"]) -> Float[Array, "n d"]:
    parts = [
        part.reshape(len(part), module.heads, -1) for part in (module.to_q(x), module.to_k(seen), module.to_v(seen))
    ]
    return module.to_out[0](jax.nn.dot_product_attention(*parts).reshape(len(x), -1))


class Feed(nnx.Module):
    """The first layer of a transformer block's perceptron; gated, half of its output multiplies the other."""

    def __init__(self, size: int, out: int, kind: str, style: Style, rngs: nnx.Rngs):
        self.kind = kind
        self.proj = style.linear(size, 2 * out if kind == "geglu" else out, rngs)

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n e"]:
        h = self.proj(x)
        if self.kind == "geglu":
            h, gate = jnp.split(h, 2, -1)
            return h * jax.nn.gelu(gate, approximate=False)
        return jax.nn.gelu(h, approximate=self.kind == "gelu-approximate")


class FeedForward(nnx.Module):
    """A transformer block's perceptron, four times as wide inside."""

    def __init__(self, size: int, kind: str, style: Style, rngs: nnx.Rngs):
        last = style.linear(4 * size, size, rngs)
        self.net = nnx.List([Feed(size, 4 * size, kind, style, rngs), Nothing(), last])

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        return self.net[2](self.net[0](x))


class TransformerBlock(nnx.Module):
    """Self-attention (or, `only_cross`, attention to the context), attention to the context, perceptron."""

    def __init__(
        self,
        size: int,
        heads: int,
        context: int,
        style: Style,
        rngs: nnx.Rngs,
        only_cross: bool = False,
        kind: str = "geglu",
    ):
        width = size // heads
        self.only_cross = only_cross
        self.norm1, self.norm2, self.norm3 = (Norm(size, None, 1e-5) for _ in range(3))
        self.attn1 = Attention(size, heads, width, style, rngs, context if only_cross else None)
        self.attn2 = Attention(size, heads, width, style, rngs, context)
        self.ff = FeedForward(size, "geglu", style, rngs)

    def __call__(self, x: Float[Array, "n d"], context: Float[Array, "m c"]) -> Float[Array, "n d"]:
        x = x + self.attn1(self.norm1(x), context if self.only_cross else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nnx.Module):
    """Transformer blocks on the pixels of an image, which attend to a context."""

    def __init__(
        self, size: int, heads: int, depth: int, context: int, style: Style, rngs: nnx.Rngs, only_cross: bool = False
    ):
        if size % heads:
            raise ValueError(f"attention_head_dim={heads} (the number of heads) must divide the channels {size}")
        self.norm = Norm(size, style.groups, 1e-6)
        self.proj_in, self.proj_out = style.linear(size, size, rngs), style.linear(size, size, rngs)
        self.transformer_blocks = nnx.List(
            TransformerBlock(size, heads, context, style, rngs, only_cross) for _ in range(depth)
        )

    def __call__(self, x: Float[Array, "h w c"], context: Float[Array, "m e"]) -> Float[Array, "h w c"]:
        h = self.proj_in(self.norm(x).reshape(-1, x.shape[-1]))
        for block in self.transformer_blocks:
            h = block(h, context)
        return self.proj_out(h).reshape(x.shape) + x


class Downsample(nnx.Module):
    """Half the resolution by a strided convolution; `pad=0` adds one pixel at the far edges only."""

    def __init__(self, size: int, pad: int, style: Style, rngs: nnx.Rngs):
        self.conv = style.conv(size, size, rngs, stride=2, pad=((pad, pad or 1),) * 2)

    def __call__(self, x: Float[Array, "h w c"], embedding: Any = None) -> Float[Array, "k l c"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Twice the resolution, every pixel four times, then a convolution."""

    def __init__(self, size: int, style: Style, rngs: nnx.Rngs):
        self.conv = style.conv(size, size, rngs)

    def __call__(self, x: Float[Array, "h w c"], embedding: Any = None) -> Float[Array, "k l c"]:
        return self.conv(doubled(x))


class Stage(nnx.Module):
    """All blocks of one resolution: residual blocks, attentions between them, and a change of the resolution.

    On the way down every block's output is kept for the way up, where it is concatenated.
    """

    def __init__(self, resnets: list, attentions: list, resamplers: list, up: bool):
        self.resnets, self.up = nnx.List(resnets), up
        self.attentions = nnx.List(attentions) if attentions else None
        name = "upsamplers" if up else "downsamplers"
        self.resampler = name if resamplers else None
        if resamplers:
            setattr(self, name, nnx.List(resamplers))

    def __call__(self, x: Array, embedding: Array | None, context: Array | None, skips: list[Array]) -> Array:
        for number, resnet in enumerate(self.resnets):
            x = resnet(jnp.concatenate([x, skips.pop()], -1) if self.up else x, embedding)
            if self.attentions is not None:
                x = self.attentions[number](x, context)
            if not self.up:
                skips.append(x)
        if self.resampler is not None:
            x = getattr(self, self.resampler)[0](x, embedding)
            if not self.up:
                skips.append(x)
        return x


class Middle(nnx.Module):
    """A residual block, then pairs of an attention and a residual block."""

    def __init__(self, resnets: list, attentions: list):
        self.resnets = nnx.List(resnets)
        self.attentions = nnx.List(attentions) if attentions else None

    def __call__(self, x: Array, embedding: Array | None, context: Array | None = None) -> Array:
        x = self.resnets[0](x, embedding)
        for number in range(1, len(self.resnets)):
            if self.attentions is not None:
                x = self.attentions[number - 1](x, context)
            x = self.resnets[number](x, embedding)
        return x
