"""Denoisers of networks with hooks: a perturbed attention, hidden states."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from diffjax.levels import Array, Level, Tree


def perturbed(denoise: Any, heads: Array) -> Any:
    """The denoiser with perturbed attention: each head's map A becomes ``(1 - u) A + u I``, u its entry of ``heads``.

    ``heads`` is (layers, heads) as `diffjax.networks.attention_heads` says; u = 0 changes nothing.  ``denoise`` is a
    network's (as `Prediction.decode` makes it) or a transformation of one; the innermost is perturbed.

    Raises ValueError if there is no network inside.
    """
    if _is_network(denoise):
        return dataclasses.replace(denoise, params=(denoise.params, heads), apply=Perturbed(denoise.apply))
    inner = getattr(denoise, "denoise", None)
    if inner is None or not dataclasses.is_dataclass(denoise):
        raise ValueError(f"denoise must be a network's denoiser (Prediction.decode) or hold one, got {denoise!r}.")
    return dataclasses.replace(denoise, denoise=perturbed(inner, heads))


def with_features(denoise: Any, x: Tree, level: Level) -> tuple[Tree, Tree]:
    """``(x0, features)`` of a network's denoiser: its clean estimate and its hidden states, in one call.

    ``features`` are what the network returns for ``apply(params, x, t, condition, features=True)``.

    Raises ValueError if ``denoise`` is not a network's (as `Prediction.decode` makes it).
    """
    if not _is_network(denoise):
        raise ValueError(f"denoise must be a network's denoiser (Prediction.decode), got {denoise!r}.")
    found = []

    def apply(params: Tree, x: Tree, t: Array, condition: Tree) -> Tree:
        output, features = denoise.apply(params, x, t, condition, features=True)
        found.append(features)
        return output

    output = denoise.prediction.network(apply, denoise.params, x, level, denoise.condition)
    return denoise.prediction.to_x0(output, x, level), found[0]


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
