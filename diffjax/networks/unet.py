r"""U-Net: residual blocks with adaptive group normalisation, attention at chosen resolutions.

The architecture of "Diffusion Models Beat GANs on Image Synthesis" (arXiv:2105.05233), sized by
arguments. A residual block, with embedding e of time and condition, is

    h = conv(silu(norm(x)))
    h = norm(h) * (1 + scale(e)) + shift(e)                adaptive group normalisation
    y = skip(x) + conv(silu(h))                            the second convolution starts at zero

A resolution halves by a 2 x 2 patch projection and doubles by its transpose, which costs a
sixteenth of a 3 x 3 convolution at the higher resolution; every block of the way down is
concatenated to its mirror image on the way up. At initialisation the output is zero.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from numpy.typing import DTypeLike

from diffjax.networks import layers
from diffjax.networks.convolutions import Conv
from diffjax.networks.functional import Time, attention_rows, described


class Block(nnx.Module):
    """Residual block (H, W, c_in) -> (H, W, c_out) with adaptive group norm and attention."""

    def __init__(self, size: tuple[int, int], embedding: int, heads: int | None, groups: int, **options: Any):
        c_in, c_out = size
        self.groups = groups
        self.first = Conv(c_in, c_out, (3, 3), **options)
        self.modulate = nnx.Linear(embedding, 2 * c_out, **options)
        self.second = Conv(c_out, c_out, (3, 3), **(options | layers.ZERO))
        self.skip = None if c_in == c_out else nnx.Linear(c_in, c_out, **options)
        self.attention = None if heads is None else layers.Attention(c_out, heads, zero=True, **options)

    def __call__(
        self, x: Float[Array, "h w a"], embedding: Float[Array, " e"], perturb: Float[Array, " heads"] | None = None
    ) -> Float[Array, "h w b"]:
        scale, shift = jnp.split(self.modulate(embedding), 2)
        h = self.first(nnx.silu(layers.group_norm(x, self.groups)))
        h = layers.group_norm(h, self.groups) * (1 + scale) + shift
        x = (x if self.skip is None else self.skip(x)) + self.second(nnx.silu(h))
        if self.attention is None:
            return x
        pixels = layers.group_norm(x, self.groups).reshape(-1, x.shape[-1])
        return x + self.attention(pixels, perturb=perturb).reshape(x.shape)


class UNet(nnx.Module):
    """U-Net for images; called as `unet(x, t, condition=None)` on one sample (H, W, C).

    Args:
        shape: (H, W, C) of one image. Other sizes run too, where they divide by two often enough.
        channels: features at each resolution, from the full one down; each halving must divide
            H and W. The default, with 8 x 8 x 1 digits, has 0.7 million parameters.
        blocks: residual blocks at each resolution, on the way down and on the way up.
        attention: the heights (in pixels) at which every block attends, besides the one attention
            in the middle of the network; (16, 8) is usual for 64 x 64 images.
        heads: attention heads; must divide the features wherever there is attention.
        groups: groups of the normalisation; must divide every entry of `channels`.
        embedding: width of the time and condition embedding; default `4 * channels[-1]`.
        condition: `label(classes)`, `vector(size)`, a tuple of them, or None.
        output: output channels, default C.
        time_scale: multiplies t before its sinusoidal features; 1000 suits times in [0, 1].
        dtype: type of the computation; parameters and output are float32.
        remat: what the backward pass computes again instead of keeping it, block by block: None nothing, "dots" all
            but matrix products, "full" everything. It changes no number and is no part of the recorded architecture.

    Hooks of the call: `perturb` (attending blocks, heads) turns the attention maps of each head towards the identity
    (`layers.Attention`), and with `features=True` it returns `(output, features)`, a tuple of the (h, w, c) after each
    block; both in order of execution.

    Raises:
        ValueError: sizes that do not fit, named.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        channels: Sequence[int] = (32, 64),
        blocks: int = 1,
        attention: Sequence[int] = (),
        heads: int = 4,
        groups: int = 8,
        embedding: int | None = None,
        condition: Any = None,
        output: int | None = None,
        time_scale: float | int = 1000.0,
        dtype: DTypeLike = jnp.float32,
        remat: str | None = None,
        rngs: nnx.Rngs,
    ):
        layers.policy(remat)  # refuses an unknown name
        self.remat = remat
        shape, channels = tuple(shape), tuple(channels)
        specs = layers.conditions(condition)
        heights = _validate(shape, channels, attention, groups, specs)
        # Parameters in the embedding cost nothing per pixel, so it can be generous.
        embedding = 4 * channels[-1] if embedding is None else embedding
        layers.positive("blocks", blocks)
        dtype = jnp.dtype(dtype)
        self.architecture = described(
            "unet",
            shape=shape,
            channels=channels,
            blocks=blocks,
            attention=tuple(attention),
            heads=heads,
            groups=groups,
            embedding=embedding,
            condition=tuple(tuple(spec) for spec in specs),
            output=output,
            time_scale=time_scale,
            dtype=dtype.name,
        )
        self.channels, self.shape, self.dtype, self.groups = channels, shape, dtype, groups
        options = layers.linear_options(dtype, rngs)
        attends = [heads if height in attention else None for height in heights]
        self.heads, self.attending = heads, 2 * blocks * sum(attend is not None for attend in attends) + 1

        def block(c_in: int, level: int, attend: int | None) -> Block:
            return Block((c_in, channels[level]), embedding, attend, groups, **options)

        self.embed = layers.Embedding(embedding, specs, features=2 * channels[0], time_scale=time_scale, **options)
        self.stem = Conv(shape[2], channels[0], (3, 3), **options)
        down, shrink, up, grow = [], [], [], []
        for level, width in enumerate(channels):
            down.append(nnx.List(block(width, level, attends[level]) for _ in range(blocks)))
            up.append(nnx.List(block(2 * width, level, attends[level]) for _ in range(blocks)))
            if level + 1 < len(channels):
                # Patch projections: four neighbouring pixels to one, and one to four.
                shrink.append(nnx.Linear(4 * width, channels[level + 1], **options))
                grow.append(nnx.Linear(channels[level + 1], 4 * width, **options))
        self.down, self.shrink = nnx.List(down), nnx.List(shrink)
        self.up, self.grow = nnx.List(up), nnx.List(grow)
        last = len(channels) - 1
        self.middle = nnx.List(block(channels[last], last, attend) for attend in (heads, None))
        self.out = Conv(channels[0], output or shape[2], (3, 3), **(options | layers.ZERO))

    def __call__(
        self,
        x: Float[Array, "..."],
        t: Time,
        condition: Any = None,
        perturb: Float[Array, "layers ..."] | None = None,
        features: bool = False,
    ) -> Any:
        factor = 2 ** (len(self.channels) - 1)
        if x.ndim != 3 or x.shape[2] != self.shape[2] or x.shape[0] % factor or x.shape[1] % factor:
            raise ValueError(
                f"x must be one image (H, W, {self.shape[2]}) with H and W divisible by {factor} "
                f"(batches go through jax.vmap), got shape {x.shape}"
            )
        embedding, _ = self.embed(jnp.asarray(t), condition)
        rows = iter(attention_rows(perturb, (self.attending, self.heads)))
        hidden = []

        def run(block: Block, h: Float[Array, "h w a"]) -> Float[Array, "h w b"]:
            row = None if block.attention is None else next(rows)
            hidden.append(layers.called(block, self.remat)(h, embedding, row))
            return hidden[-1]

        h = self.stem(x.astype(self.dtype))
        skips = []
        for level, blocks in enumerate(self.down):
            for block in blocks:
                h = run(block, h)
                skips.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](_fold(h))
        for block in self.middle:
            h = run(block, h)
        for level in reversed(range(len(self.up))):
            if level < len(self.grow):
                h = _unfold(self.grow[level](h))
            for block in self.up[level]:
                h = run(block, jnp.concatenate([h, skips.pop()], -1))
        output = self.out(nnx.silu(layers.group_norm(h, self.groups))).astype(jnp.float32)
        return (output, tuple(hidden)) if features else output


def _fold(x: Float[Array, "h w c"]) -> Float[Array, "h//2 w//2 4*c"]:
    height, width, channels = x.shape
    split = x.reshape(height // 2, 2, width // 2, 2, channels)
    return split.transpose(0, 2, 1, 3, 4).reshape(height // 2, width // 2, 4 * channels)


def _unfold(x: Float[Array, "h w c4"]) -> Float[Array, "2*h 2*w c4//4"]:
    height, width, channels = x.shape
    split = x.reshape(height, width, 2, 2, channels // 4).transpose(0, 2, 1, 3, 4)
    return split.reshape(2 * height, 2 * width, channels // 4)


def _validate(
    shape: tuple[int, ...],
    channels: tuple[int, ...],
    attention: Sequence[int],
    groups: int,
    specs: tuple[layers.Condition, ...],
) -> list[int]:
    """The height at each level, once everything fits."""
    if len(shape) != 3:
        raise ValueError(f"shape must be (H, W, C), got {shape}")
    for size in (*shape, *channels):
        layers.positive("each entry of shape and channels", size)
    if not channels:
        raise ValueError("channels must name at least one resolution, got ()")
    factor = 2 ** (len(channels) - 1)
    if shape[0] % factor or shape[1] % factor:
        raise ValueError(f"shape={shape} must divide by {factor} in H and W for {len(channels)} resolutions")
    for width in channels:
        layers.divides("groups", groups, "channels", width)
    heights = [shape[0] >> level for level in range(len(channels))]
    unknown = [height for height in attention if height not in heights]
    if unknown:
        raise ValueError(f"attention={tuple(attention)} must be among the heights {heights}")
    if any(spec.kind == "tokens" for spec in specs):
        raise ValueError("condition tokens is not supported by UNet; use label or vector, or a DiT")
    return heights
