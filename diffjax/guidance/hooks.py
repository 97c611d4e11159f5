"""Denoisers of networks with hooks: a perturbed attention, hidden states."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from diffjax.levels import Array, Level, Tree


def perturbed(network: Any, heads: Array) -> Any:
    """The denoiser with perturbed attention: each head's map A becomes ``(1 - u) A + u I``, u its entry of ``heads``.

    ``heads`` is (layers, heads) as `diffjax.networks.attention_heads` says; u = 0 changes nothing.  ``network`` is a
    network's (as `Prediction.decode` makes it) or a transformation of one; the innermost is perturbed.

    Raises ValueError if there is no network inside.
    """
    if _is_network(network):
        return dataclasses.replace(network, params=(network.params, heads), apply=Perturbed(network.apply))
    inner = getattr(network, "denoise", None)
    if inner is None or not dataclasses.is_dataclass(network) or isinstance(network, type):
        raise ValueError(f"network must be a network's denoiser (Prediction.decode) or hold one, got {network!r}.")
    return dataclasses.replace(network, denoise=perturbed(inner, heads))


def with_features(network: Any, x: Tree, level: Level) -> tuple[Tree, Tree]:
    """``(x0, features)`` of a network's denoiser: its clean estimate and its hidden states, in one call.

    ``features`` are what the network returns for ``apply(params, x, t, condition, features=True)``.

    Raises ValueError if ``network`` is not a network's (as `Prediction.decode` makes it).
    """
    if not _is_network(network):
        raise ValueError(f"network must be a network's denoiser (Prediction.decode), got {network!r}.")
    found = []

    def apply(params: Tree, x: Tree, t: Array, condition: Tree) -> Tree:
        output, features = network.apply(params, x, t, condition, features=True)
        found.append(features)
        return output

    output = network.prediction.network(apply, network.params, x, level, network.condition)
    return network.prediction.to_x0(output, x, level), found[0]


def _is_network(denoise: Any) -> bool:
    names = {f.name for f in dataclasses.fields(denoise)} if dataclasses.is_dataclass(denoise) else set()
    return {"params", "apply", "prediction", "condition"} <= names


@dataclasses.dataclass(frozen=True)
class Perturbed:
    """A network whose parameters are ``(params, perturb)``; hashed like the network, so that it is static."""

    apply: Callable

    def __call__(self, params: Tree, x: Tree, t: Array, condition: Tree = None, **hooks: Any) -> Tree:
        params, heads = params
        return self.apply(params, x, t, condition, perturb=heads, **hooks)
