"""Networks that are told of earlier images and of what was said of them.

An image encoder makes tokens V_k of the k-th image, an embedding makes tokens E_k of the feedback on it, a context
transformer joins them and the network attends to what comes out:

    M  = (V_1, E_1, ..., V_K, E_K),     M' = context transformer(M, t),     output = network(x, t, (condition, M'))

after Reflect-DiT: Inference-Time Scaling for Text-to-Image Diffusion Transformers via In-Context Reflection,
arXiv:2503.12271 (there V_k is of a published vision model, E_k of a text encoder).  A network can be told that reads
its token condition by cross-attention: `DiT`, or one of a user's own.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from numpy.typing import DTypeLike

from diffjax.networks import layers
from diffjax.networks.dit import Block, patches, positions
from diffjax.networks.functional import Time, described


class ImageEncoder(nnx.Module):
    """A token for each patch of a clean image; called as `encoder(x)`, (H, W, C) -> (N, width).

    Patches, a linear layer, the position of the patch, then transformer blocks with learned gates (zero at first).

    Args:
        shape: (H, W, C) of one image.
        patch: side of the square patches; must divide H and W.
        width: features of a token, divisible by 4 (its position has four kinds of waves).
        depth: number of blocks, may be 0.
        heads: attention heads; must divide `width`.
        ratio: hidden features of the block's perceptron, in units of `width`.
        dtype: type of the computation.

    Raises:
        ValueError: sizes that do not fit, named.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        patch: int = 4,
        width: int = 64,
        depth: int = 1,
        heads: int = 4,
        ratio: float | int = 2.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = tuple(shape)
        if len(shape) != 3:
            raise ValueError(f"shape must be (H, W, C), got {shape}")
        layers.divides("patch", patch, "H", shape[0])
        layers.divides("patch", patch, "W", shape[1])
        layers.divides("heads", heads, "width", width)
        if width % 4:
            raise ValueError(f"width must be divisible by 4, got {width}")
        options = layers.linear_options(jnp.dtype(dtype), rngs)
        self.shape, self.patch, self.width, self.dtype = shape, patch, width, jnp.dtype(dtype)
        self.stem = nnx.Linear(patch * patch * shape[2], width, **options)
        self.blocks = nnx.List(Block(width, heads, ratio, [], **options) for _ in range(depth))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "n d"]:
        layers.one_image(x, self.shape)
        h = self.stem(patches(x.astype(self.dtype), self.patch))
        height, width = (side // self.patch for side in x.shape[:2])
        h = h + positions(height, width, self.width).astype(h.dtype)
        for block in self.blocks:
            h = block(h, jnp.zeros(self.width, h.dtype), [])  # the modulation is the layer's bias
        return h


class ContextTransformer(nnx.Module):
    """Tokens of a history of images and feedback; called as `context(history, t)`, -> (K (N + L), size).

    A history is (images (K, H, W, C), feedback (K, L) or (K, L, F), present (K,)), as `diffjax.smc.History` is.  Blocks
    modulated by the time attend in turn within an entry (an image and what was said of it) and to all entries that are
    present.  Tokens of absent entries are zero, whatever stands in the arrays, which is what networks are given when
    they are told nothing: with none present a network that reads tokens by cross-attention is the one without history.

    The zero tokens do take part in that attention: an entry alone and the same entry beside absent ones are not the
    same to the network.  So train and sample with one K.

    Args:
        shape: (H, W, C) of the images; ``patch`` and ``encoder_depth`` of the `ImageEncoder`.
        feedback: `label(V)` for words of a vocabulary of V, integers (K, L), or `tokens(F)` for features (K, L, F).
        length: L, the words or features that are said of an image, each in its own place.
        size: features of the tokens that are returned: those of the network's token condition.
        width, depth, heads, ratio, time_scale, dtype: of the transformer, as for `DiT`; ``depth`` may be 0.
        ordered: tell the age of an entry (the last is the newest).  Without it what the network makes of the history
            does not depend on the order of the entries.

    Raises:
        ValueError: sizes that do not fit, named.
    """

    def __init__(
        self,
        shape: Sequence[int],
        feedback: Any,
        length: int,
        size: int,
        *,
        patch: int = 4,
        width: int = 64,
        depth: int = 2,
        encoder_depth: int = 1,
        heads: int = 4,
        ratio: float | int = 2.0,
        ordered: bool = True,
        time_scale: float | int = 1000.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        (spec,) = layers.conditions(feedback) or (None,)
        if spec is None or spec.kind == "vector":
            raise ValueError(f"feedback must be networks.label(words) or networks.tokens(features), got {feedback!r}")
        self.length, self.size = layers.positive("length", length), layers.positive("size", size)
        self.spec, self.ordered, self.width, self.dtype = spec, ordered, width, jnp.dtype(dtype)
        self.architecture = described(
            "context",
            shape=tuple(shape),
            feedback=(tuple(spec),),
            length=length,
            size=size,
            patch=patch,
            width=width,
            depth=depth,
            encoder_depth=encoder_depth,
            heads=heads,
            ratio=ratio,
            ordered=ordered,
            time_scale=time_scale,
            dtype=self.dtype.name,
        )
        options = layers.linear_options(self.dtype, rngs)
        self.encoder = ImageEncoder(
            shape, patch=patch, width=width, depth=encoder_depth, heads=heads, ratio=ratio, dtype=dtype, rngs=rngs
        )
        table = {"dtype": self.dtype, "rngs": rngs}
        words = spec.kind == "label"
        self.words = nnx.Embed(spec.size, width, **table) if words else nnx.Linear(spec.size, width, **options)
        self.places = nnx.Embed(length, width, **table)
        self.embed = layers.Embedding(width, (), time_scale=time_scale, **options)
        self.blocks = nnx.List(Block(width, heads, ratio, [], **options) for _ in range(depth))
        self.out = nnx.Linear(width, size, **options)

    def __call__(self, history: Any, t: Time) -> Float[Array, "n d"]:
        images, feedback, present = self._checked(history)
        count = len(images)
        said = self.words(feedback) + self.places(jnp.arange(self.length))
        h = jnp.concatenate([jax.vmap(self.encoder)(images), said], axis=1)  # (K, N + L, width)
        if self.ordered:
            age = jnp.arange(count - 1.0, -1.0, -1.0)
            h = h + jax.vmap(lambda n: layers.time_features(n, self.width, 1.0))(age)[:, None].astype(h.dtype)
        embedding, _ = self.embed(jnp.asarray(t), None)
        flat = lambda h: h.reshape(-1, self.width)
        seen = jnp.repeat(present, h.shape[1])
        # a token attends to itself too, so that no row of the mask is empty
        mask = seen[None, :] | jnp.eye(len(seen), dtype=bool)
        for index, block in enumerate(self.blocks):
            if index % 2 == 0:
                h = jax.vmap(lambda entry, block=block: block(entry, embedding, []))(h)
            else:
                h = block(flat(h), embedding, [], mask=mask).reshape(h.shape)
        return jnp.where(seen[:, None], self.out(layers.layer_norm(flat(h))), 0)

    def _checked(self, history: Any) -> tuple[Array, Array, Array]:
        images, feedback, present = (jnp.asarray(part) for part in history)
        wanted = (len(images), self.length) + ((self.spec.size,) if self.spec.kind == "tokens" else ())
        if feedback.shape != wanted or present.shape != wanted[:1]:
            raise ValueError(
                f"a history of {len(images)} images must have feedback {wanted} and present {wanted[:1]}, got "
                f"{feedback.shape} and {present.shape}"
            )
        if self.spec.kind == "label" and not jnp.issubdtype(feedback.dtype, jnp.integer):
            raise ValueError(f"feedback in words must be integers, got {feedback.dtype}")
        present = present > 0
        shown = lambda leaf: jnp.where(present.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0)  # 0 NaN is NaN
        return shown(images), shown(feedback), present


class InContext(nnx.Module):
    """A network that is told of a history; called as `module(x, t, condition)` on one sample.

    The condition is a tuple, the network's own conditions and a history last: ``(label, history)``, or ``(history,)``
    where it has none.  A history of None, or a condition of None, tells nothing.  Hooks go to the network.

    Its cross-attention starts silent in a `DiT`, so with the parameters of a trained one (`grafted`) it begins as that
    one, and learns to listen: `diffjax.smc.reflections` makes the data, `diffjax.smc.reflect` samples.

    Args:
        network: whose last condition is `tokens(size)`, read by cross-attention as by `DiT`.  In the joint attention of
            `MMDiT` each zero token takes attention from the image: with none present it is not the network without.
        context: a `ContextTransformer` of the same size.

    Raises:
        ValueError: the network's last condition is another; an `MMDiT`.

    Reflect-DiT: Inference-Time Scaling for Text-to-Image Diffusion Transformers via In-Context Reflection,
    arXiv:2503.12271, figure 2.  (There all blocks attend to the whole history, with rotary positions along it.)
    """

    def __init__(self, network: Any, context: ContextTransformer):
        arguments = dict(network.architecture.arguments)
        told = layers.conditions(arguments.get("condition"))[-1:]
        if told != (layers.tokens(context.size),):
            raise ValueError(f"the network's last condition must be networks.tokens({context.size}), got {told}")
        if network.architecture.name == "mmdit":
            raise ValueError(
                "the network must read its tokens by cross-attention, as DiT; MMDiT attends jointly to them"
            )
        self.others = len(layers.conditions(arguments["condition"])) - 1
        self.network, self.context = network, context
        self.architecture = described("in_context", network=network.architecture, context=context.architecture)

    def __call__(self, x: Float[Array, "..."], t: Time, condition: Any = None, **hooks: Any) -> Any:
        condition = (None,) * (self.others + 1) if condition is None else condition
        *own, history = condition
        told = None if history is None else self.context(history, t)
        return self.network(x, t, (*own, told), **hooks)


def grafted(params: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """``params`` with those leaves that ``trained`` has too, nested dictionaries: what else there is stays new.

    For an `InContext` that begins as a trained network: ``grafted(params, {"network": trained})``.

    Raises:
        ValueError: a leaf of ``trained`` that is not in ``params``, or has another shape there.

    >>> grafted({"a": 0.0, "b": {"c": 0.0, "d": 0.0}}, {"b": {"c": 1.0}})
    {'a': 0.0, 'b': {'c': 1.0, 'd': 0.0}}
    """
    found = dict(params)
    for name, value in trained.items():
        known = params.get(name)
        if isinstance(value, dict) and isinstance(known, dict):
            found[name] = grafted(known, value)
        elif (
            known is None or isinstance(value, dict) or isinstance(known, dict) or jnp.shape(value) != jnp.shape(known)
        ):
            raise ValueError(f"parameter {name} does not fit: {_extent(value)} into {_extent(known)}")
        else:
            found[name] = value
    return found


def _extent(value: Any) -> str:
    return "nothing" if value is None else f"{sorted(value)}" if isinstance(value, dict) else f"{jnp.shape(value)}"
