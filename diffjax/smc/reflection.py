"""Refinement in context: samples that are told what came before, and what was wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.guidance.conditions import conditioned
from diffjax.levels import Array, Grid, Solver, Tree
from diffjax.samplers.sequential import sample
from diffjax.samplers.shared import integer


class History(NamedTuple):
    """The last K samples and what was said of them, the newest last; zeros where ``present`` is 0."""

    x: Array  # (K, ...)
    feedback: Array  # (K, ...)
    present: Array  # (K,)


class Refined(NamedTuple):
    """The sample of the highest reward, and all ``rounds`` of them in order."""

    x: Array
    reward: Array
    samples: Array  # (N, ...)
    feedback: Array  # (N, ...)
    rewards: Array  # (N,)
    nfe: Array
    failed_at: Array  # the first round that left a sample that is not finite, or -1


def reflect(
    key: Array,
    denoise: Any,
    solver: Solver,
    grid: Grid,
    shape: tuple[int, ...],
    *,
    judge: Callable[[Array], tuple[Array, Array]],
    rounds: int,
    context: int,
    tell: Callable[[History], Tree] | None = None,
) -> Refined:
    """``rounds`` samples, each told of the last ``context`` ones and of what a judge said of them.

        x_n ~ p(x | history),     history <- the newest of (history, (x_n, feedback(x_n)))

    With a denoiser that does not listen it is best-of-n: `diffjax.smc.best_of_n` with any solver.

    Args:
        key, solver, grid, shape: as for `diffjax.sample`, one array.
        denoise: a conditional denoiser (with a field ``condition``, also inside guidance), trained on `reflections`.
        judge: ``x0 -> (feedback, reward)``, feedback an array of fixed shape and reward a number.
        rounds: N, at least 1; ``context`` K, at least 1: how many samples are remembered.
        tell: ``history -> condition``, where the condition is more than the history (a prompt and the history), or is
            made from it (`history_vector`, `history_tokens`); default the history itself.

    Returns a `Refined`; denoiser calls: N times those of a sample.

    Reflect-DiT: Inference-Time Scaling for Text-to-Image Diffusion Transformers via In-Context Reflection,
    arXiv:2503.12271.  (There feedback is text of a vision-language model, and the newest are kept.)

    Raises ValueError for sizes below 1 and a denoiser without a condition.
    """
    integer("rounds", rounds, 1)
    integer("context", context, 1)
    tell = (lambda history: history) if tell is None else tell
    said, _ = jax.eval_shape(judge, jax.ShapeDtypeStruct(shape, jnp.float32))
    blank = History(jnp.zeros((context, *shape)), jnp.zeros((context, *said.shape), said.dtype), jnp.zeros((context,)))

    def one(carry: tuple, key: Array) -> tuple:
        history, nfe, failed, index = carry
        found = sample(key, conditioned(denoise, tell(history)), solver, grid, shape=shape)
        feedback, reward = judge(found.x)
        push = lambda old, new: jnp.concatenate([old[1:], jnp.asarray(new, old.dtype)[None]])
        history = History(*map(push, history, (found.x, feedback, 1.0)))
        failed = jnp.where((failed < 0) & (found.failed_at >= 0), index, failed)
        return (history, nfe + found.nfe, failed, index + 1), (found.x, feedback, reward)

    zero = jnp.zeros((), jnp.int32)
    start = blank, zero, zero - 1, zero
    (_, nfe, failed, _), (x, feedback, rewards) = jax.lax.scan(one, start, jax.random.split(key, rounds))
    best = jnp.argmax(rewards)
    return Refined(x[best], rewards[best], x, feedback, rewards, nfe, failed)


def reflections(key: Array, x: Array, feedback: Array, rewards: Array, context: int) -> tuple[Array, History]:
    """Training data for `reflect` from G samples of one task: ``(x0, history)``, a good one and some worse ones.

    x0 is one of the samples with the highest reward; the history holds n of those with a lower one, n uniform in
    0 .. ``context`` (as many as there are), in random order.  Train on them by `diffjax.training.denoising` with the
    history in the condition: samples without a history are then what the base model's best are, and later ones are
    what was good where the samples in the history were bad.

    Args:
        x: (G, ...) of one task; ``feedback`` (G, ...) and ``rewards`` (G,) of them.  `jax.vmap` for many tasks.

    Reflect-DiT: Inference-Time Scaling for Text-to-Image Diffusion Transformers via In-Context Reflection,
    arXiv:2503.12271 (training data).

    Raises ValueError for a context below 1 or not below G.
    """
    integer("context", context, 1)
    if context >= len(x):
        raise ValueError(f"context must be below the number of samples {len(x)}, got {context!r}.")
    first, second, third = jax.random.split(key, 3)
    good = rewards == jnp.max(rewards)
    target = jax.random.categorical(first, jnp.where(good, 0.0, -jnp.inf))
    order = jnp.argsort(jnp.where(good, -1.0, jax.random.uniform(second, rewards.shape)))[-context:]
    count = jax.random.randint(third, (), 0, context + 1)
    present = (jnp.arange(context) >= context - count) & ~good[order]
    kept = lambda leaf: jnp.where(present.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf[order], 0)
    return x[target], History(kept(x), kept(feedback), present.astype(jnp.float32))


def history_tokens(history: History) -> Array:
    """A token for each remembered sample, (K, D + F + 1): sample, feedback, present; for networks that attend."""
    flat = [jnp.reshape(leaf, (len(leaf), -1)) for leaf in history]
    return jnp.concatenate([leaf.astype(flat[0].dtype) for leaf in flat], axis=1)


def history_vector(history: History) -> Array:
    """The tokens in one vector, (K (D + F + 1),)."""
    return history_tokens(history).reshape(-1)
