"""Published weights: folders that diffusers wrote, as diffjax networks, processes, predictions and grids.

    found = networks.pretrained.pipeline("path/to/stable-diffusion", steps=20)
    denoise = found.prediction.decode(found.apply, found.params, condition=text)
    latent = diffjax.sample(key, denoise, diffjax.solvers.dpmpp(), found.grid, shape=found.shape).x
    image = found.autoencoder.decode(found.autoencoder_params, latent)

Read are `UNet2DModel`, `UNet2DConditionModel`, `DiTTransformer2DModel` and `AutoencoderKL`, from `config.json` and
safetensors; text encoders are not.  A network is the pure function `apply(params, x, t, condition)` of one sample, as
all networks here are, with the parameters in nested dictionaries: it can be trained further and checkpointed.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PyTree

from diffjax.interop import diffusers
from diffjax.levels import Grid, Process
from diffjax.networks.functional import Apply, Params, Time, _named
from diffjax.networks.pretrained import files
from diffjax.networks.pretrained.autoencoder import Autoencoder, PublishedAutoencoder
from diffjax.networks.pretrained.autoencoder import autoencoder as _autoencoder
from diffjax.networks.pretrained.transformer import PublishedDiT
from diffjax.networks.pretrained.unet import PublishedUNet
from diffjax.predictions import Prediction

__all__ = ["Autoencoder", "Network", "Pipeline", "autoencoder", "module", "network", "pipeline"]

NETWORKS: dict[str, Any] = {
    "UNet2DModel": PublishedUNet,
    "UNet2DConditionModel": PublishedUNet,
    "DiTTransformer2DModel": PublishedDiT,
    "Transformer2DModel": PublishedDiT,  # what older files of the diffusion transformer say
}


class Network(NamedTuple):
    """A published network."""

    apply: Apply
    params: Params
    config: dict[str, Any]
    inputs: tuple[str, ...]  # what its condition is made of, in order


class Pipeline(NamedTuple):
    """A published model: everything that sampling needs.

    `apply` gives the channels that the prediction is of; `network` all of them (a learned variance comes after).
    """

    apply: Any
    params: Params
    process: Process
    prediction: Prediction
    grid: Grid
    shape: tuple[int, int, int] | None  # of a sample, where the configuration says it
    network: Network
    autoencoder: Autoencoder | None
    autoencoder_params: Params | None


def module(config: Mapping[str, Any] | str, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> nnx.Module:
    """The network of a `config.json` (or its text) with random parameters.

    Raises ValueError if it is none of those that are read.
    """
    fields: Mapping[str, Any] = json.loads(config) if isinstance(config, str) else config
    kinds = {**NETWORKS, "AutoencoderKL": PublishedAutoencoder}
    kind = fields.get("_class_name")
    if kind not in kinds:
        raise ValueError(f"config['_class_name'] must be one of {list(kinds)}, got {kind!r}")
    return kinds[kind](fields, dtype=dtype, rngs=rngs)


def network(source: str | os.PathLike, subfolder: str = "", dtype: Any = jnp.float32) -> Network:
    """A U-Net or diffusion transformer from a folder with `config.json` and safetensors.

    Args:
        source: a folder, or "owner/name" on the Hub if `huggingface_hub` is installed.
        subfolder: of it, as "unet".
        dtype: type of the computation; parameters and output are float32.

    The function of `x` (H, W, C), a scalar time as the network was trained with it (`pipeline` sees to that) and the
    condition: one value or a tuple in the order of `inputs`, which a published network always needs.

    Raises:
        FileNotFoundError: no such folder, no `config.json`, no weights, a shard that is missing.
        ValueError: a class or field that is not supported; tensors that are missing, left over or of another shape;
            weights that are pickled.
    """
    path = files.folder(source, subfolder)
    config = files.configuration(path, "config.json", tuple(NETWORKS))
    graph, params, found = _filled(path, config, dtype)
    return Network(Apply(graph, found.architecture), params, config, found.inputs)


def autoencoder(source: str | os.PathLike, subfolder: str = "", dtype: Any = jnp.float32) -> tuple[Autoencoder, Params]:
    """An `AutoencoderKL`, and its parameters, from a folder; arguments and what is raised as for `network`."""
    path = files.folder(source, subfolder)
    config = files.configuration(path, "config.json", ("AutoencoderKL",))
    graph, params, _ = _filled(path, config, dtype)
    return _autoencoder(graph, params, config)


def pipeline(source: str | os.PathLike, steps: int, *, mu: float | None = None, dtype: Any = jnp.float32) -> Pipeline:
    """A whole published model: the network in `unet` or `transformer`, `scheduler`, and `vae` where there is one.

    Args:
        source: the folder, or "owner/name" on the Hub if `huggingface_hub` is installed.
        steps: of the grid, which is the scheduler's (`diffjax.interop.diffusers`).
        mu: the shift's exponent where the scheduler asks for dynamic shifting.
        dtype: type of the networks' computation.

    Raises:
        FileNotFoundError, ValueError: as for `network` and `diffjax.interop.diffusers`.
    """
    path = files.folder(source)
    names = [name for name in ("unet", "transformer") if (path / name).is_dir()]
    if len(names) != 1:
        found = sorted(entry.name for entry in path.iterdir())
        raise FileNotFoundError(f"expected a folder unet or transformer in {path.absolute()}, found {found}")
    model = network(path, names[0], dtype)
    setting = diffusers(files.configuration(path / "scheduler", "scheduler_config.json"), steps, mu)
    latents = autoencoder(path, "vae", dtype) if (path / "vae").is_dir() else (None, None)
    size, channels = model.config.get("sample_size"), model.config.get("in_channels", 3)
    output = model.config.get("out_channels") or channels
    apply: Any = model.apply
    if output == 2 * channels:
        apply = Leading(model.apply, channels)
    elif output > channels:
        raise ValueError(f"out_channels must be in_channels={channels} or twice that, got {output}")
    side: Any = size if isinstance(size, (list, tuple)) else (size, size)
    shape = None if size is None else (*side, channels)
    return Pipeline(apply, model.params, setting.process, setting.prediction, setting.grid, shape, model, *latents)


@dataclasses.dataclass(frozen=True)
class Leading:
    """The first channels of a network's output: the rest is a learned variance."""

    apply: Apply
    channels: int

    def __call__(self, params: PyTree, x: Array, t: Time, condition: PyTree = None) -> Array:
        output: Any = self.apply(params, x, t, condition)
        return output[..., : self.channels]


def _filled(path: Any, config: dict[str, Any], dtype: Any) -> tuple[nnx.GraphDef, Params, Any]:
    """Graph, parameters from the folder, and the module that they belong to, without values."""
    try:
        abstract = nnx.eval_shape(lambda: module(config, nnx.Rngs(0), dtype))
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from None
    graph, state = nnx.split(abstract)
    return graph, files.filled(path, _named(nnx.to_pure_dict(state))), abstract
