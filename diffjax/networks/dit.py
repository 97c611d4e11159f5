"""Diffusion transformer: patches as tokens, conditioned by adaLN-zero.

The architecture of "Scalable Diffusion Models with Transformers" (arXiv:2212.09748). The embedding
e of time and pooled conditions gives each block six vectors (shift, scale, gate, twice):

    h <- h + gate1(e) * attention(norm(h) * (1 + scale1(e)) + shift1(e))
    h <- h + cross_attention(norm(h), tokens)              only with a token condition
    h <- h + gate2(e) * mlp(norm(h) * (1 + scale2(e)) + shift2(e))

The gates start at zero, so that every block starts as the identity, and so does the output layer:
at initialisation the output is zero.

With `scan=True` the blocks are one `lax.scan` over parameters with a leading axis of length `depth`, so that compile
time does not grow with the depth; `stacked` and `unstacked` carry parameters from one form to the other.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float
from numpy.typing import DTypeLike

from diffjax.networks import layers
from diffjax.networks.functional import Time, attention_rows, described


class Block(nnx.Module):
    """Transformer block on (N, width) tokens, modulated by the embedding."""

    def __init__(self, width: int, heads: int, ratio: float | int, context: list[int], **options: Any):
        self.modulate = nnx.Linear(width, 6 * width, **(options | layers.ZERO))
        self.attention = layers.Attention(width, heads, **options)
        # One cross-attention for each token condition; zero output, so it starts silent too.
        self.cross = nnx.List(layers.Attention(width, heads, context=size, zero=True, **options) for size in context)
        inner = int(width * ratio)
        self.mlp_in = nnx.Linear(width, inner, **options)
        self.mlp_out = nnx.Linear(inner, width, **options)

    def __call__(
        self,
        h: Float[Array, "n d"],
        embedding: Float[Array, " d"],
        sequences: list[Float[Array, "length c"]],
        perturb: Float[Array, " heads"] | None = None,
        mask: Bool[Array, "n n"] | None = None,
    ) -> Float[Array, "n d"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulate(embedding), 6)
        h = h + gate1 * self.attention(layers.layer_norm(h) * (1 + scale1) + shift1, perturb=perturb, mask=mask)
        for attention, sequence in zip(self.cross, sequences, strict=True):
            h = h + attention(layers.layer_norm(h), sequence.astype(h.dtype))
        inner = self.mlp_in(layers.layer_norm(h) * (1 + scale2) + shift2)
        return h + gate2 * self.mlp_out(nnx.gelu(inner))


class DiT(nnx.Module):
    """Diffusion transformer; called as `dit(x, t, condition=None)` on one sample (H, W, C).

    Args:
        shape: (H, W, C) of one image; a network runs at this size only.
        patch: side of the square patches that become tokens; must divide H and W.
        width: features of a token, divisible by 4 (its position has four kinds of waves).
        depth: number of blocks.
        heads: attention heads; must divide `width`.
        ratio: hidden features of the block's perceptron, in units of `width`.
        condition: `label(classes)`, `vector(size)`, `tokens(size)`, a tuple of them, or None.
            Labels and vectors are added to the time embedding, token sequences are attended to.
        output: output channels, default C.
        time_scale: multiplies t before its sinusoidal features; 1000 suits times in [0, 1].
        dtype: type of the computation; parameters and output are float32.
        scan: the blocks as one loop over stacked parameters, for fast compilation.
        remat: what the backward pass computes again instead of keeping it: None keeps everything, "dots" keeps the
            outputs of matrix products alone, "full" keeps the input of each block alone. It changes no number and is
            no part of the recorded architecture.

    Hooks of the call: `perturb` (depth, heads) turns the attention maps of each head towards the identity
    (`layers.Attention`), and with `features=True` it returns `(output, features)`, the features (depth, tokens, width)
    being the tokens after each block.

    Raises:
        ValueError: sizes that do not fit, named.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        patch: int = 2,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        ratio: float | int = 4.0,
        condition: Any = None,
        output: int | None = None,
        time_scale: float | int = 1000.0,
        dtype: DTypeLike = jnp.float32,
        scan: bool = False,
        remat: str | None = None,
        rngs: nnx.Rngs,
    ):
        shape = tuple(shape)
        layers.policy(remat)  # refuses an unknown name
        specs = layers.conditions(condition)
        if len(shape) != 3:
            raise ValueError(f"shape must be (H, W, C), got {shape}")
        layers.divides("patch", patch, "H", shape[0])
        layers.divides("patch", patch, "W", shape[1])
        layers.divides("heads", heads, "width", width)
        layers.positive("depth", depth)
        if width % 4:
            raise ValueError(f"width must be divisible by 4, got {width}")
        dtype = jnp.dtype(dtype)
        self.architecture = described(
            "dit",
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
            **({"scan": True} if scan else {}),
        )
        self.scan, self.remat = scan, remat
        self.shape, self.patch, self.width, self.heads, self.dtype = shape, patch, width, heads, dtype
        self.depth = depth
        self.output = output or shape[2]
        options = layers.linear_options(dtype, rngs)
        self.embed = layers.Embedding(width, specs, time_scale=time_scale, **options)
        self.stem = nnx.Linear(patch * patch * shape[2], width, **options)
        context = [spec.size for spec in specs if spec.kind == "tokens"]
        blocks = [Block(width, heads, ratio, context, **options) for _ in range(depth)]
        self.blocks: Any = _one(blocks) if scan else nnx.List(blocks)
        self.modulate = nnx.Linear(width, 2 * width, **(options | layers.ZERO))
        self.out = nnx.Linear(width, patch * patch * self.output, **(options | layers.ZERO))

    def __call__(
        self,
        x: Float[Array, "..."],
        t: Time,
        condition: Any = None,
        perturb: Float[Array, "layers ..."] | None = None,
        features: bool = False,
    ) -> Any:
        layers.one_image(x, self.shape)
        embedding, sequences = self.embed(jnp.asarray(t), condition)
        h = self.stem(patches(x.astype(self.dtype), self.patch))
        height, width = (side // self.patch for side in x.shape[:2])
        h = h + positions(height, width, self.width).astype(h.dtype)
        rows = attention_rows(perturb, (self.depth, self.heads))
        h, hidden = self.through(h, embedding, sequences, rows, features)
        shift, scale = jnp.split(self.modulate(embedding), 2)
        h = self.out(layers.layer_norm(h) * (1 + scale) + shift).astype(jnp.float32)
        output = joined(h, (*x.shape[:2], self.output), self.patch)
        return (output, hidden) if features else output

    def through(
        self, h: Array, embedding: Array, sequences: list[Array], rows: list[Array | None], features: bool
    ) -> tuple[Array, Array | None]:
        """The tokens after all blocks and, with `features`, after each."""
        if not self.scan:
            hidden = []
            for block, row in zip(self.blocks, rows, strict=True):
                h = layers.called(block, self.remat)(h, embedding, sequences, row)
                hidden.append(h)
            return h, jnp.stack(hidden) if features else None
        graph, params = nnx.split(self.blocks)

        def body(h: Array, part: Any) -> tuple[Array, Array | None]:
            params, row = part
            h = layers.called(nnx.merge(graph, params), self.remat)(h, embedding, sequences, row)
            return h, h if features else None

        return jax.lax.scan(
            body, h, (params, None if rows[0] is None else jnp.stack([row for row in rows if row is not None]))
        )


def _one(blocks: list[Block]) -> Block:
    """A block whose parameters have those of all blocks along a new leading axis."""
    parts = [nnx.split(block) for block in blocks]
    return nnx.merge(parts[0][0], _stack([params for _, params in parts]))


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def stacked(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a `DiT` as the same network with `scan=True` has them: one tree of blocks with a leading axis."""
    blocks = params["blocks"]
    return params | {"blocks": _stack([blocks[str(i)] for i in range(len(blocks))])}


def unstacked(params: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `stacked`: a tree for each block."""
    leaves, tree = jax.tree.flatten(params["blocks"])
    blocks = {str(i): tree.unflatten([leaf[i] for leaf in leaves]) for i in range(leaves[0].shape[0])}
    return params | {"blocks": blocks}


def patches(x: Float[Array, "h w c"], patch: int) -> Float[Array, "n d"]:
    """The square patches of an image, row by row, each as one vector."""
    height, width = x.shape[0] // patch, x.shape[1] // patch
    split = x.reshape(height, patch, width, patch, -1)
    return split.transpose(0, 2, 1, 3, 4).reshape(height * width, -1)


def joined(h: Float[Array, "n d"], shape: tuple[int, ...], patch: int) -> Float[Array, "h w c"]:
    """The image of ``shape`` that has these patches: the inverse of `patches`."""
    height, width = shape[0] // patch, shape[1] // patch
    split = h.reshape(height, width, patch, patch, shape[2])
    return split.transpose(0, 2, 1, 3, 4).reshape(shape)


def positions(height: int, width: int, size: int) -> Float[Array, "{height}*{width} {size}"]:
    """Fixed sine and cosine features of a token's row (first half) and column (second half)."""
    rates = 10000.0 ** (-np.arange(size // 4) / (size // 4))

    def waves(index: np.ndarray) -> np.ndarray:
        angles = index[:, None] * rates
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    rows, columns = np.divmod(np.arange(height * width), width)
    return jnp.asarray(np.concatenate([waves(rows), waves(columns)], axis=1), jnp.float32)
