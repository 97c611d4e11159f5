"""Networks in Flax NNX, seen by the rest of the library as pure functions of one sample.

    apply, params = functional(UNet((8, 8, 1), condition=label(10), rngs=nnx.Rngs(0)))

Any other `apply(params, x, t, condition)` works as well.
"""

from typing import Any

from flax import nnx

from diffjax.networks import pretrained
from diffjax.networks.context import ContextTransformer, ImageEncoder, InContext, grafted
from diffjax.networks.convolutions import convolution
from diffjax.networks.dit import DiT, stacked, unstacked
from diffjax.networks.functional import Apply, architecture, attention_heads, count, functional
from diffjax.networks.layers import label, tokens, vector
from diffjax.networks.mlp import MLP
from diffjax.networks.mmdit import MMDiT
from diffjax.networks.unet import UNet

__all__ = [
    "MLP",
    "Apply",
    "ContextTransformer",
    "DiT",
    "ImageEncoder",
    "InContext",
    "MMDiT",
    "UNet",
    "architecture",
    "attention_heads",
    "build",
    "convolution",
    "count",
    "functional",
    "grafted",
    "label",
    "pretrained",
    "stacked",
    "tokens",
    "unstacked",
    "vector",
]


def build(description: dict[str, Any], rngs: nnx.Rngs) -> nnx.Module:
    """The network that `architecture` describes, for example as stored with a checkpoint.

    Raises:
        ValueError: the name is none of this library's networks.
    """
    kinds = {"mlp": MLP, "unet": UNet, "dit": DiT, "mmdit": MMDiT, "published": pretrained.module}
    name = description.get("name")
    if name == "in_context":
        context = {key: value for key, value in description["context"].items() if key != "name"}
        return InContext(build(description["network"], rngs), ContextTransformer(**context, rngs=rngs))
    if name not in kinds:
        raise ValueError(f"network name {name!r} is not known; known are {sorted([*kinds, 'in_context'])}")
    arguments = {key: value for key, value in description.items() if key != "name"}
    return kinds[name](**arguments, rngs=rngs)
