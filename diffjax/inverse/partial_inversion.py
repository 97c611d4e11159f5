"""InvSR: sampling that starts between the data and noise, from a degraded image and a predicted noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from diffjax.inverse.systems import normal_like
from diffjax.levels import Array, Level, Process, Tree


class NormalNoise(NamedTuple):
    """What a noise predictor gives that is to be drawn from: eps = mean + std z, trees of the state's structure."""

    mean: Tree
    std: Tree


def predicted_start(
    process: Process, predict: Callable, params: Tree, y: Tree, level: Level, key: Array | None = None
) -> Tree:
    """The state ``alpha y + sigma eps(y, t)`` at a level, for a sampler that starts there.

    ``sample(key, denoise, solver, grid, x=predicted_start(process, predict, params, y, grid.start))`` with
    ``grid = diffjax.grids.uniform(process, steps, start=t)`` restores y in 1 to 5 steps.  A random eps in its place is
    SDEdit, ``sample(..., x=y, start=t)``.

    Args:
        predict: ``predict(params, y, t) -> eps``, or `NormalNoise`, trained by `diffjax.training.noise_predictor`.
        y: degraded, and brought to the shape of the data (upsampled).
        level: of that process, one for the whole state; theirs has a signal-to-noise ratio above 1.44.
        key: for `NormalNoise`; None takes its mean.

    Returns the state, in the data's coordinates.  No denoiser calls.

    Arbitrary-steps Image Super-resolution via Diffusion Inversion, arXiv:2412.09013.
    """
    eps = predict(params, y, level.time)
    if isinstance(eps, NormalNoise):
        drawn = normal_like(key, eps.mean) if key is not None else None
        eps = eps.mean if drawn is None else jax.tree.map(lambda m, s, z: m + s * z, eps.mean, eps.std, drawn)
    state: Any = process.noised(y, eps, level)
    return state
