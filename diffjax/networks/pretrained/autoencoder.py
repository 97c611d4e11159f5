"""`AutoencoderKL` of diffusers: images to latents and back, as pure functions of one sample."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from diffjax.networks.functional import Params, _indexed
from diffjax.networks.pretrained import blocks
from diffjax.networks.pretrained.blocks import ACTIVATIONS, Style
from diffjax.networks.pretrained.config import architecture, each, free, only, read

FIELDS = {
    **free(in_channels=3, out_channels=3, block_out_channels=(64,), layers_per_block=1, latent_channels=4),
    **free(norm_num_groups=32, sample_size=32, scaling_factor=0.18215, shift_factor=None, force_upcast=True),
    **free(down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",)),
    **free(use_quant_conv=True, use_post_quant_conv=True, mid_block_add_attention=True),
    **only(act_fn=tuple(ACTIVATIONS), latents_mean=None, latents_std=None),
}


class Half(nnx.Module):
    """The encoder (`up=False`) or the decoder: one stage of residual blocks a resolution, and the middle."""

    def __init__(self, size: int, out: int, fields: dict[str, Any], up: bool, style: Style, rngs: nnx.Rngs):
        self.up = up
        widths = list(fields["block_out_channels"])
        order = widths[::-1] if up else widths
        self.conv_in = style.conv(size, order[0], rngs)
        stages = []
        for number, width in enumerate(order):
            sizes = [order[max(number - 1, 0)], *[width] * (fields["layers_per_block"] - 1 + up)]
            resamplers = []
            if number + 1 < len(order):
                resamplers = [blocks.Upsample(width, style, rngs) if up else blocks.Downsample(width, 0, style, rngs)]
            resnets = [blocks.Resnet(size, width, None, style, rngs) for size in sizes]
            stages.append(Stage(resnets, resamplers, up))
        attentions, last = [], widths[-1]
        if fields["mid_block_add_attention"]:
            attentions = [blocks.PixelAttention(last, last, style, rngs, style.groups)]
        self.mid_block = blocks.Middle([blocks.Resnet(last, last, None, style, rngs) for _ in range(2)], attentions)
        self.blocks = "up_blocks" if up else "down_blocks"
        setattr(self, self.blocks, nnx.List(stages))
        self.conv_norm_out, self.conv_out = style.norm(order[-1]), style.conv(order[-1], out, rngs)

    def __call__(self, x: Float[Array, "h w a"]) -> Float[Array, "k l b"]:
        h = self.conv_in(x)
        if self.up:
            h = self.mid_block(h, None)
        for stage in getattr(self, self.blocks):
            h = stage(h)
        if not self.up:
            h = self.mid_block(h, None)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(h)))


class Stage(nnx.Module):
    """Residual blocks and a change of the resolution, with no memory of the way down."""

    def __init__(self, resnets: list, resamplers: list, up: bool):
        self.resnets = nnx.List(resnets)
        self.resampler = ("upsamplers" if up else "downsamplers") if resamplers else None
        if self.resampler is not None:
            setattr(self, self.resampler, nnx.List(resamplers))

    def __call__(self, x: Array) -> Array:
        for resnet in self.resnets:
            x = resnet(x, None)
        return x if self.resampler is None else getattr(self, self.resampler)[0](x)


class PublishedAutoencoder(nnx.Module):
    """Both halves, in the units of the network's own latents; see `Autoencoder`."""

    def __init__(self, config: Mapping[str, Any], *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.architecture = architecture(config)
        fields = read(config, FIELDS)
        count = len(fields["block_out_channels"])
        for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if each(name, fields[name], count) != [kind] * count:
                raise ValueError(f"{name} of AutoencoderKL must all be {kind!r}, got {fields[name]}")
        style = Style(fields["norm_num_groups"], 1e-6, fields["act_fn"], dtype=jnp.dtype(dtype))
        latent = fields["latent_channels"]
        self.encoder = Half(fields["in_channels"], 2 * latent, fields, False, style, rngs)
        self.decoder = Half(latent, fields["out_channels"], fields, True, style, rngs)
        self.quant_conv = style.linear(2 * latent, 2 * latent, rngs) if fields["use_quant_conv"] else None
        self.post_quant_conv = style.linear(latent, latent, rngs) if fields["use_post_quant_conv"] else None
        self.channels, self.latent, self.factor = fields["in_channels"], latent, 2 ** (count - 1)
        self.dtype = style.dtype

    def __call__(self, x: Float[Array, "h w c"], half: str) -> Float[Array, "k l d"]:
        """Moments (mean and log variance) of an image's latent, or the image of a latent."""
        channels, factor = (self.channels, self.factor) if half == "encode" else (self.latent, 1)
        if x.ndim != 3 or x.shape[2] != channels or x.shape[0] % factor or x.shape[1] % factor:
            raise ValueError(
                f"x must be one array (H, W, {channels}) with H and W divisible by {factor} to {half} it "
                f"(batches go through jax.vmap), got shape {x.shape}"
            )
        x = x.astype(self.dtype)
        if half == "encode":
            h = self.encoder(x)
            h = h if self.quant_conv is None else self.quant_conv(h)
        else:
            h = self.decoder(x if self.post_quant_conv is None else self.post_quant_conv(x))
        return h.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """An autoencoder as pure functions of its parameters and one sample, in the units that diffusion models see.

    `latent = scale (z - shift)`, with z the network's own latent.  Compared and hashed by its graph definition.
    """

    graph: nnx.GraphDef
    scale: float
    shift: float
    architecture: Any = dataclasses.field(default=None, compare=False)

    @cached_property
    def _hash(self) -> int:
        return hash((self.graph, self.scale, self.shift))

    def __hash__(self) -> int:
        return self._hash

    def posterior(self, params: PyTree, image: Float[Array, "h w c"]) -> tuple[Array, Array]:
        """Mean and standard deviation of the latent of an image in [-1, 1], both (h, w, latent channels)."""
        moments = self._run(params, image, "encode")
        mean, log_variance = jnp.split(moments, 2, -1)
        deviation = jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))
        return self.scale * (mean - self.shift), self.scale * deviation

    def encode(self, params: PyTree, image: Float[Array, "h w c"], key: PRNGKeyArray | None = None) -> Array:
        """The latent of an image in [-1, 1]: the mean, or a draw with `key`."""
        mean, deviation = self.posterior(params, image)
        return mean if key is None else mean + deviation * jax.random.normal(key, mean.shape)

    def decode(self, params: PyTree, latent: Float[Array, "h w c"]) -> Array:
        """The image of a latent, about in [-1, 1]."""
        return self._run(params, latent / self.scale + self.shift, "decode")

    def _run(self, params: PyTree, x: Array, half: str) -> Array:
        return nnx.merge(self.graph, _indexed(params))(x, half)


def autoencoder(graph: nnx.GraphDef, params: Params, config: Mapping[str, Any]) -> tuple[Autoencoder, Params]:
    """The pure functions of a module's graph, with the units of its configuration."""
    fields = read(config, FIELDS)
    scale, shift = float(fields["scaling_factor"]), float(fields["shift_factor"] or 0.0)
    return Autoencoder(graph, scale, shift, architecture(config)), params
