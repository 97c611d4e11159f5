"""Several kinds of data in one diffusion: encoded into one latent, noised together, decoded by a head each.

    E(X) = sum_i w_i E_i(x_i),      z_t = alpha E(X) + sigma eps,      p(x_i | z_t) by head i of a shared trunk

A joint sample is a sample of the latent and what the heads say of it.  A part that is known guides the latent by its
own head, so every part may be generated from every other.  The bound on the likelihood of all parts is that of the
latent, `diffjax.likelihood.continuous_bound`, with ``sum_i log p(x_i | z_first)`` for a decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, Level, Tree, as_value, static, value
from diffjax.predictions import Prediction
from diffjax.samplers.sequential import normal_noise


def aggregated(encodings: Sequence[Tree], weights: Sequence[Array] | None = None) -> Tree:
    """``sum_i w_i E_i(x_i)``, a common latent of parts that are encoded alike in shape; weights default to 1.

    Raises ValueError for no parts or another number of weights.

    >>> aggregated([np.ones(2), np.array([0.0, 3.0])], [1.0, 0.5]).tolist()
    [1.0, 2.5]
    """
    weights = (1.0,) * len(encodings) if weights is None else tuple(weights)
    if not encodings or len(weights) != len(encodings):
        raise ValueError(f"needs as many weights as encodings, at least one, got {len(weights)} and {len(encodings)}.")
    return jax.tree.map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *encodings)


def aggregation_share(betas: Array, weights: Array) -> Array:
    """g with ``z_k = sqrt(abar_k) g_k E(X) + sqrt(1 - abar_k) eps`` where step k lets in a share w_k, (K,).

        q(z_k | z_{k-1}, X) = N(sqrt(1 - beta_k) (z_{k-1} + w_k E(X)), beta_k),   z_0 = 0
        g_k = sum_{j <= k} w_j / sqrt(abar_{j-1})

    With w = (1, 0, 0, ...) g is 1: the plain process on the aggregate, which is what the rest of this file does.

    Diffusion Models for Multi-Task Generative Modeling, arXiv:2407.17571 (forward aggregation).

    Raises ValueError unless betas and weights are vectors of one length and betas inside (0, 1).

    >>> aggregation_share(np.full(3, 0.19), np.array([1.0, 0.0, 0.9])).round(4).tolist()
    [1.0, 1.0, 2.1111]
    """
    betas, weights = (np.asarray(part, np.float64) for part in (betas, weights))
    if betas.ndim != 1 or betas.shape != weights.shape or np.any(betas <= 0) or np.any(betas >= 1):
        raise ValueError(f"needs betas in (0, 1) and weights of one length, got {betas!r} and {weights!r}.")
    before = np.concatenate([np.ones(1), np.cumprod(1 - betas)[:-1]])
    return np.cumsum(weights / np.sqrt(before))


@value
class MultiTask:
    prediction: Prediction
    law: Any
    weights: tuple
    encode: Callable = static()
    apply: Callable = static()
    terms: Callable = static()
    factory = "multitask"

    def parts(self, params: Tree, key: Array, u: Array, x: Tree) -> tuple[Array, ...]:
        """The squared error of the noise, and -log p of every part, of one sample at the level that belongs to u."""
        level = self.law(self.prediction.process, u)
        clean = self.encode(params, x)
        (eps,) = normal_noise(key, 0, clean, 1)
        z = jax.tree.map(lambda a, b: level.alpha * a + level.sigma * b, clean, eps)
        heads: list[Any] = []

        def trunk(params: Tree, z: Tree, time: Array, condition: Any) -> Tree:
            output, found = self.apply(params, z, time)
            heads.append(found)
            return output

        output = self.prediction.network(trunk, params, z, level)
        target = self.prediction.encode(clean, eps, level)
        squares = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.square(a - b), output, target))
        error = sum(jnp.sum(leaf) for leaf in squares) / sum(leaf.size for leaf in squares)
        return (error, *self.terms(heads[0], x, level))

    def __call__(self, params: Tree, key: Array, x: Tree, condition: Tree = None) -> Array:
        """The losses of a batch, (B,); levels are stratified."""
        del condition
        count = jax.tree.leaves(x)[0].shape[0]
        key, offset, order = jax.random.split(key, 3)
        u = jax.random.permutation(order, (jnp.arange(count) + jax.random.uniform(offset, (count,))) / count)
        found = jax.vmap(self.parts, (None, 0, 0, 0))(params, jax.random.split(key, count), u, x)
        return found[0] + sum(w * part for w, part in zip(self.weights, found[1:], strict=True))


def multitask(
    prediction: Prediction,
    apply: Callable[[Tree, Tree, Array], tuple[Tree, Any]],
    encode: Callable[[Tree, Tree], Tree],
    terms: Callable[[Any, Tree, Level], Sequence[Array]],
    law: Callable[[Any, Array], Level],
    weights: Sequence[Array],
) -> MultiTask:
    """The multi-task loss ``|noise error|^2 + sum_i w_i (-log p(x_i | z_t))``, ``loss(params, key, x) -> (B,)``.

    Args:
        prediction: what the trunk predicts of the latent; the process has no coordinates.
        apply: trunk and heads, ``apply(params, z, t) -> (output, heads)``.
        encode: ``(params, x) -> E(X)``, see `aggregated`; the encoders may be learned with the rest.
        terms: ``(heads, x, level) -> (-log p(x_1 | z_t), ...)``, one number a part.
        law: of the levels, as of `diffjax.training.denoising`.
        weights: one a part.

    Diffusion Models for Multi-Task Generative Modeling, arXiv:2407.17571 (multi-task loss).

    Raises ValueError for a process with coordinates.
    """
    if prediction.process.coordinates is not None:
        raise ValueError(f"prediction must be of a process without coordinates, got {prediction!r}.")
    return MultiTask(prediction, law, tuple(weights), encode, apply, terms)


def head_twist(log_likelihood: Callable[[Tree, Level], Array]) -> HeadTwist:
    """The twist ``p(x_i | z_t)`` of a head, for `diffjax.guidance.tilted`: the latent given a part that is known.

    With the exact denoiser and head, tilted at scale 1 is the exact posterior mean of the latent given the part.

    Args:
        log_likelihood: ``(z, level) -> log p(x_i | z_t)`` of the head at what is known.

    Diffusion Models for Multi-Task Generative Modeling, arXiv:2407.17571 (conditional generation by a head).

    >>> import diffjax
    >>> twist = head_twist(lambda z, level: -jnp.sum(z**2))
    >>> float(twist(lambda z, level: z, jnp.ones(2), diffjax.processes.flow().level(0.5))[0])
    -2.0
    """
    return HeadTwist(as_value(log_likelihood))


@value
class HeadTwist:
    log_likelihood: Any
    factory = "head_twist"

    def __call__(self, denoise: Any, z: Tree, level: Level) -> tuple[Array, Tree]:
        return self.log_likelihood(z, level), denoise(z, level)
