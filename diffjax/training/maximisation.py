"""The maximisation step of a learned prior: a network trained on the draws of the expectation step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from diffjax.levels import Array, Tree
from diffjax.training.loop import fit
from diffjax.training.step import init, train_step


def maximisation(
    start: Any,
    loss: Any,
    optimiser: Any,
    *,
    steps: int,
    batch: int = 128,
    ema: Any = None,
) -> Callable[[Array, Any, Tree], Any]:
    """``fit(key, prior, draws) -> prior`` for `diffjax.inverse.expectation_maximisation`: some steps of training.

    Each round goes on from the parameters of the last; the first, whose prior is no network (a Gaussian warm start),
    from those of ``start``.  The optimiser starts anew in every round.  The step is compiled once.

    Args:
        start: the network's denoiser with its first parameters, ``prediction.decode(apply, params)``.
        loss: ``loss(params, key, x0) -> (B,)``, for example `denoising`; the entries of draws that are a tuple, as
            `incomplete` takes, follow the key.
        optimiser: an optax transformation, its schedule (if any) of ``steps``.
        steps, batch: of a round; draws are reshuffled whenever all have been used.
        ema: as for `train_step`; the prior has the averaged parameters, and the next round begins with them.

    Learning Diffusion Priors from Observations by Expectation Maximization, arXiv:2405.13712.

    Raises ValueError for steps or batch below 1, a start without parameters, and fewer draws than a batch.
    """
    if steps < 1 or batch < 1:
        raise ValueError(f"need steps >= 1 and batch >= 1, got {steps!r} and {batch!r}.")
    if not hasattr(start, "params"):
        raise ValueError(f"start must be a network's denoiser, with params, got {start!r}.")
    step = train_step(loss, optimiser, ema)

    def learn(key: Array, prior: Any, draws: Tree) -> Any:
        count = len(jax.tree.leaves(draws)[0])
        if count < batch:
            raise ValueError(f"needs at least batch={batch} draws, got {count}.")
        params = prior.params if type(prior) is type(start) else start.params
        seed, own = jax.random.split(key)
        state = init(own, params, optimiser, loss=loss, ema=ema)
        state = fit(state, step, _batches(seed, draws, count, batch), steps=steps, log_every=steps, progress=False)
        return dataclasses.replace(start, params=state.ema)

    return learn


def _batches(key: Array, draws: Tree, count: int, size: int) -> Iterator[tuple]:
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    draws = jax.tree.map(np.asarray, draws)
    while True:
        order = generator.permutation(count)
        for first in range(0, count - size + 1, size):
            chosen = jax.tree.map(lambda leaf, at=order[first : first + size]: leaf[at], draws)
            yield chosen if isinstance(chosen, tuple) else (chosen,)
