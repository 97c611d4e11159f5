"""`UNet2DModel` and `UNet2DConditionModel` of diffusers as one network of one sample.

The two differ in what their configurations say by the same words (`attention_head_dim` is the width of a head in one
and the number of heads in the other) and in what the network is told beside the time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from diffjax.networks.functional import Time
from diffjax.networks.pretrained import blocks
from diffjax.networks.pretrained.blocks import ACTIVATIONS, Style
from diffjax.networks.pretrained.config import Field, architecture, each, free, only, read

ACT = tuple(ACTIVATIONS)
SHARED = {
    **free(sample_size=None, center_input_sample=False, flip_sin_to_cos=True, freq_shift=0, dropout=0.0),
    **free(layers_per_block=2, mid_block_scale_factor=1.0, norm_num_groups=32, norm_eps=1e-5),
    **free(time_embedding_dim=None, num_class_embeds=None),
    **only(act_fn=ACT, resnet_time_scale_shift=("default", "scale_shift"), downsample_padding=(1, 0)),
}
UNCONDITIONAL = SHARED | {
    **free(in_channels=3, out_channels=3, block_out_channels=(224, 448, 672, 896), attention_head_dim=8),
    **free(down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * 3), attn_norm_num_groups=None, add_attention=True),
    **free(up_block_types=(*["AttnUpBlock2D"] * 3, "UpBlock2D"), num_train_timesteps=None),
    **only(mid_block_type=("UNetMidBlock2D", None), class_embed_type=(None, "timestep", "identity")),
    **only(time_embedding_type=("positional", "fourier", "learned")),
    **only(downsample_type=("conv", "resnet"), upsample_type=("conv", "resnet")),
}
CONDITIONAL = SHARED | {
    **free(in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8),
    **free(down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"), cross_attention_dim=1280),
    **free(up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3), transformer_layers_per_block=1),
    **free(only_cross_attention=False, mid_block_only_cross_attention=None, use_linear_projection=False),
    **free(encoder_hid_dim=None, addition_time_embed_dim=None, projection_class_embeddings_input_dim=None),
    **free(time_cond_proj_dim=None, conv_in_kernel=3, conv_out_kernel=3, class_embeddings_concat=False),
    **free(addition_embed_type_num_heads=64, upcast_attention=False),
    **only(mid_block_type=("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None), addition_embed_type=(None, "text_time")),
    **only(class_embed_type=(None, "timestep", "identity", "projection", "simple_projection")),
    **only(
        time_embedding_act_fn=(None, *ACT), timestep_post_act=(None, *ACT), encoder_hid_dim_type=(None, "text_proj")
    ),
    # these change the result, and no network that is widely used has other values
    **only(time_embedding_type="positional", dual_cross_attention=False, attention_type="default"),
    **only(resnet_skip_time_act=False, resnet_out_scale_factor=1.0, cross_attention_norm=None),
    **only(reverse_transformer_layers_per_block=None, num_attention_heads=None),
}
FIELDS: dict[str, dict[str, Field]] = {"UNet2DModel": UNCONDITIONAL, "UNet2DConditionModel": CONDITIONAL}
DOWN = {
    "UNet2DModel": ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "UNet2DConditionModel": ("DownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
}


class PublishedUNet(nnx.Module):
    """A published U-Net; called as `unet(x, t, condition)` on one sample (H, W, C).

    The condition is one value or a tuple in the order of `inputs`: "tokens" (L, cross_attention_dim), "label" (an
    integer) or "class" (a vector, or a number for `class_embed_type="timestep"`), "guidance" (the embedded guidance
    scale of distilled networks), and "text" and "sizes" (pooled text embedding and size numbers of SDXL).

    Args:
        config: `config.json` of a `UNet2DModel` or `UNet2DConditionModel`.
        dtype: type of the computation; parameters and output are float32.

    Raises:
        ValueError: a field or a block that is not supported, sizes that do not fit.
    """

    def __init__(self, config: Mapping[str, Any], *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.architecture = architecture(config)
        kind = str(config["_class_name"])
        fields = read(config, FIELDS[kind])
        widths = list(fields["block_out_channels"])
        style = Style(
            fields["norm_num_groups"],
            fields["norm_eps"],
            fields["act_fn"],
            fields["resnet_time_scale_shift"],
            dtype=jnp.dtype(dtype),
        )
        self.channels, self.levels, self.dtype = fields["in_channels"], len(widths), style.dtype
        self.centre = fields["center_input_sample"]
        # outside of the residual blocks an unconditional network knows silu alone
        self.act = style.act if kind == "UNet2DConditionModel" else "silu"
        self.conv_in = style.conv(self.channels, widths[0], rngs, fields.get("conv_in_kernel", 3))
        size = self._embeddings(fields, widths[0], style, rngs)
        plan = _Plan(kind, fields, widths, size, style, rngs)
        self.down_blocks = nnx.List(plan.down(level) for level in range(len(widths)))
        self.mid_block = plan.middle()
        self.up_blocks = nnx.List(plan.up(level) for level in reversed(range(len(widths))))
        self.conv_norm_out = style.norm(widths[0])
        self.conv_out = style.conv(widths[0], fields["out_channels"], rngs, fields.get("conv_out_kernel", 3))

    def _embeddings(self, fields: dict[str, Any], width: int, style: Style, rngs: nnx.Rngs) -> int:
        """Time, classes and what else is pooled; returns the size of the embedding that the blocks see."""
        size = fields["time_embedding_dim"] or 4 * width
        self.time_kind, self.time_width = fields["time_embedding_type"], width
        self.flip, self.shift = fields["flip_sin_to_cos"], fields["freq_shift"]
        features = 2 * width if self.time_kind == "fourier" else width
        self.time_proj = (
            Fourier(width)
            if self.time_kind == "fourier"
            else nnx.Embed(fields["num_train_timesteps"], width, dtype=style.dtype, rngs=rngs)
            if self.time_kind == "learned"
            else None
        )
        cond, post = fields.get("time_cond_proj_dim") or 0, fields.get("timestep_post_act")
        self.time_embedding = blocks.TimeEmbedding(features, size, style, rngs, self.act, post, cond)
        projected: Any = fields.get("projection_class_embeddings_input_dim")
        self.class_kind, self.class_embedding = _classes(fields, features, size, style, rngs, self.act)
        hidden, cross = fields.get("encoder_hid_dim"), fields.get("cross_attention_dim")
        self.encoder_hid_proj = None if hidden is None else style.linear(hidden, fields["cross_attention_dim"], rngs)
        self.sizes_width: Any = fields.get("addition_time_embed_dim")
        pooled = fields.get("addition_embed_type") is not None
        self.add_embedding = blocks.TimeEmbedding(projected, size, style, rngs) if pooled else None
        self.concat, self.last_act = fields.get("class_embeddings_concat", False), fields.get("time_embedding_act_fn")
        told = {
            "tokens": cross is not None,
            "label": self.class_kind == "label",
            "class": self.class_kind not in (None, "label"),
            "guidance": bool(cond),
            **dict.fromkeys(("text", "sizes"), self.add_embedding is not None),
        }
        self.inputs = tuple(name for name, present in told.items() if present)
        return 2 * size if self.concat else size

    def embed(self, t: Array, told: dict[str, Array]) -> Float[Array, " e"]:
        """The embedding of the time and of everything that is pooled."""
        out = self.time_embedding(self._features(t), told.get("guidance"))
        if self.class_kind is not None:
            value = told["label"] if self.class_kind == "label" else told["class"]
            value = self._features(value) if self.class_kind == "timestep" else value
            pooled = value if self.class_embedding is None else self.class_embedding(value)
            out = jnp.concatenate([out, pooled]) if self.concat else out + pooled
        if self.add_embedding is not None:
            waves = [blocks.time_features(size, self.sizes_width, self.flip, self.shift) for size in told["sizes"]]
            out = out + self.add_embedding(jnp.concatenate([told["text"], *waves]))
        return out if self.last_act is None else ACTIVATIONS[self.last_act](out)

    def _features(self, t: Array) -> Float[Array, " f"]:
        if self.time_proj is not None:
            return self.time_proj(jnp.asarray(t))
        return blocks.time_features(t, self.time_width, self.flip, self.shift).astype(self.dtype)

    def __call__(self, x: Float[Array, "..."], t: Time, condition: Any = None) -> Float[Array, "h w out"]:
        factor = 2 ** (self.levels - 1)
        if x.ndim != 3 or x.shape[2] != self.channels or x.shape[0] % factor or x.shape[1] % factor:
            raise ValueError(
                f"x must be one image (H, W, {self.channels}) with H and W divisible by {factor} "
                f"(batches go through jax.vmap), got shape {x.shape}"
            )
        told = named(self.inputs, condition)
        t = jnp.asarray(t)
        embedding = self.embed(t, told)
        context = told.get("tokens")
        if context is not None and self.encoder_hid_proj is not None:
            context = self.encoder_hid_proj(context)
        h = self.conv_in((2 * x - 1 if self.centre else x).astype(self.dtype))
        skips = [h]
        for block in self.down_blocks:
            h = block(h, embedding, context, skips)
        if self.mid_block is not None:
            h = self.mid_block(h, embedding, context)
        for block in self.up_blocks:
            h = block(h, embedding, context, skips)
        h = self.conv_out(ACTIVATIONS[self.act](self.conv_norm_out(h))).astype(jnp.float32)
        return h / t if self.time_kind == "fourier" else h


def _classes(
    fields: dict[str, Any], features: int, size: int, style: Style, rngs: nnx.Rngs, act: str
) -> tuple[str | None, nnx.Module | None]:
    """How the class is told, and what embeds it."""
    kind = fields["class_embed_type"]
    projected: Any = fields.get("projection_class_embeddings_input_dim")
    if kind is None and fields["num_class_embeds"] is not None:
        return "label", nnx.Embed(fields["num_class_embeds"], size, dtype=style.dtype, rngs=rngs)
    if kind == "timestep":
        return kind, blocks.TimeEmbedding(features, size, style, rngs, act)
    if kind == "projection":
        return kind, blocks.TimeEmbedding(projected, size, style, rngs)
    return kind, style.linear(projected, size, rngs) if kind == "simple_projection" else None


class Fourier(nnx.Module):
    """`sin` and `cos` of the log of the time times random frequencies that are stored with the weights."""

    def __init__(self, size: int):
        self.weight = nnx.Param(jnp.zeros(size))

    def __call__(self, t: Array) -> Float[Array, " f"]:
        angles = jnp.log(t.astype(jnp.float32)) * self.weight[...] * (2 * np.pi)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


class _Plan:
    """The blocks of every resolution, from the configuration."""

    def __init__(
        self, kind: str, fields: dict[str, Any], widths: list[int], embedding: int, style: Style, rngs: nnx.Rngs
    ):
        count = len(widths)
        self.fields, self.widths, self.embedding, self.style, self.rngs = fields, widths, embedding, style, rngs
        self.types = [list(fields[name]) for name in ("down_block_types", "up_block_types")]
        for name, types in zip(("down_block_types", "up_block_types"), self.types, strict=True):
            known = [entry.replace("Down", "Up") if name[0] == "u" else entry for entry in DOWN[kind]]
            if len(types) != count or not set(types) <= set(known):
                raise ValueError(f"{name} of {kind} must be {count} of {known}, got {types}")
        self.types[1].reverse()  # by resolution, as everything else here
        heads = each("attention_head_dim", fields["attention_head_dim"], count)
        self.head_widths = [head or width for head, width in zip(heads, widths, strict=True)]
        self.heads = heads
        self.layers = each("layers_per_block", fields["layers_per_block"], count)
        self.context = each("cross_attention_dim", fields.get("cross_attention_dim"), count)
        self.depths = each("transformer_layers_per_block", fields.get("transformer_layers_per_block", 1), count)
        self.only_cross = each("only_cross_attention", fields.get("only_cross_attention", False), count)

    def resnet(self, size: int, out: int, style: Style | None = None, resample: Any = None) -> blocks.Resnet:
        return blocks.Resnet(size, out, self.embedding, style or self.style, self.rngs, resample)

    def attention(self, level: int, kind: str) -> Any:
        """The attention of a block type, or None."""
        width = self.widths[level]
        if kind.startswith("Cross"):
            return self.cross(level, self.only_cross[level])
        if kind.startswith("Attn"):
            return blocks.PixelAttention(width, self.head_widths[level], self.style, self.rngs, self.style.groups)
        return None

    def cross(self, level: int, only_cross: bool) -> blocks.Transformer:
        width, heads = self.widths[level], self.heads[level]
        return blocks.Transformer(
            width, heads, self.depths[level], self.context[level], self.style, self.rngs, only_cross
        )

    def _by_resnet(self, kind: str, field: str) -> bool:
        """Whether a residual block changes the resolution; the field speaks of blocks with attention only."""
        return kind.startswith("Resnet") or (kind.startswith("Attn") and self.fields[field] == "resnet")

    def down(self, level: int) -> blocks.Stage:
        kind, width = self.types[0][level], self.widths[level]
        sizes = [self.widths[max(level - 1, 0)], *[width] * (self.layers[level] - 1)]
        resamplers = []
        if level + 1 < len(self.widths):
            by_resnet = self._by_resnet(kind, "downsample_type")
            padding = self.fields["downsample_padding"]
            resamplers = [
                self.resnet(width, width, resample=blocks.halved)
                if by_resnet
                else blocks.Downsample(width, padding, self.style, self.rngs)
            ]
        return self._stage([self.resnet(size, width) for size in sizes], level, kind, resamplers, up=False)

    def up(self, level: int) -> blocks.Stage:
        kind, width, last = self.types[1][level], self.widths[level], len(self.widths) - 1
        before, below, count = self.widths[min(level + 1, last)], self.widths[max(level - 1, 0)], self.layers[level] + 1
        skips = [*[width] * (count - 1), below]
        sizes = [skip + (width if number else before) for number, skip in enumerate(skips)]
        resamplers = []
        if level > 0:
            by_resnet = self._by_resnet(kind, "upsample_type")
            resamplers = [
                self.resnet(width, width, resample=blocks.doubled)
                if by_resnet
                else blocks.Upsample(width, self.style, self.rngs)
            ]
        return self._stage([self.resnet(size, width) for size in sizes], level, kind, resamplers, up=True)

    def _stage(self, resnets: list, level: int, kind: str, resamplers: list, up: bool) -> blocks.Stage:
        attentions = [self.attention(level, kind) for _ in resnets]
        return blocks.Stage(resnets, [a for a in attentions if a is not None], resamplers, up)

    def middle(self) -> blocks.Middle | None:
        kind, width = self.fields["mid_block_type"], self.widths[-1]
        if kind is None:
            return None
        style = self.style._replace(factor=self.fields["mid_block_scale_factor"])
        if kind == "UNetMidBlock2DCrossAttn":
            attentions = [self.cross(len(self.widths) - 1, False)]
        elif "cross_attention_dim" in self.fields:  # a mid block without attention has one residual block only
            return blocks.Middle([self.resnet(width, width, style)], [])
        elif self.fields["add_attention"]:
            groups = self.fields["attn_norm_num_groups"] or (style.groups if style.shift == "default" else None)
            attentions = [blocks.PixelAttention(width, self.head_widths[-1], style, self.rngs, groups)]
        else:
            attentions = []
        return blocks.Middle([self.resnet(width, width, style) for _ in range(2)], attentions)


def named(inputs: Sequence[str], condition: Any) -> dict[str, Array]:
    """The parts of a condition by name.

    Raises ValueError if there are not as many as the network was trained with: a published network has no null value.
    """
    values = () if condition is None else condition if isinstance(condition, (tuple, list)) else (condition,)
    if len(values) != len(inputs) or any(value is None for value in values):
        found = [None if value is None else jnp.shape(value) for value in values]
        raise ValueError(
            f"the network needs the condition {tuple(inputs)}, got {len(values)} value(s) of shapes {found}; what "
            "stands for 'not told' is a value like any other (the embedding of an empty text, the null label)"
        )
    told = {name: jnp.asarray(value) for name, value in zip(inputs, values, strict=True)}
    for name, value in told.items():
        expected = {"tokens": 2, "label": 0, "text": 1, "sizes": 1, "guidance": 1}.get(name)
        if expected is not None and value.ndim != expected:
            raise ValueError(
                f"condition {name} must have {expected} axes for one sample (batches go through jax.vmap), "
                f"got shape {value.shape}"
            )
    return told
