"""Optimisation of the initial noise before anything is sampled, held near the law that the sampler expects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.levels import Array, Tree, is_shape, is_traced


class OptimisedNoise(NamedTuple):
    """A start for `sample`, and what is known of it.

    ``x`` = mean + std z; ``loss`` of it; ``divergence``, the KL divergence of N(mean, std^2) from N(0, I) divided by
    the number of entries; ``valid``, whether the loss is below the threshold; ``rounds`` that were used.
    """

    x: Tree
    loss: Array
    divergence: Array
    valid: Array
    rounds: Array


def optimised_noise(
    key: Array,
    loss: Callable[[Tree], Array],
    shape: Any,
    *,
    threshold: Array,
    divergence: Array = 1e-3,
    steps: int = 50,
    rounds: int = 5,
    learning_rate: Array = 1e-2,
    dtype: Any = jnp.float32,
) -> OptimisedNoise:
    """Initial noise ``mean + std z`` with a small loss and a small KL divergence from N(0, I).

    z is drawn and stays; Adam moves mean (from 0) and log-variance (from 0) down the loss until that is below the
    threshold or the steps are over.  After each step ``mean <- s mean, log std^2 <- s log std^2`` with the largest
    s <= 1 at which the divergence is within its bound.  (The paper takes Adam steps down the divergence until it is;
    the bound is the same.)  If the threshold was not reached a new z is tried, and after all rounds the best of their
    ends is kept.

    Args:
        key: one PRNG key.
        loss: ``loss(x) -> scalar`` of a standard normal start, for example of the clean estimate or of attention maps
            at the first level: ``loss = lambda x: -log_p(denoise(x, grid.start))``.  Where the process's prior has
            another size multiply by it, ``lambda x: ... (sigma * x)``.
        shape: of a sample, or a tree of shapes.
        threshold: a loss below it is accepted.
        divergence: the bound, in nats for each entry.  The default, the paper's, is for images: it lets the mean be of
            norm sqrt(2 * 1e-3 * entries), which is little in two dimensions.
        steps, rounds: at most so many; all are run under `jax.vmap`, and what is accepted does not move on.

    Evaluations of the loss with its gradient: ``steps`` a round.

    InitNO: Boosting Text-to-Image Diffusion Models via Initial Noise Optimization, arXiv:2404.04650.

    Raises ValueError unless steps and rounds are positive and concrete bounds are above 0.
    """
    for name, number in (("steps", steps), ("rounds", rounds)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a positive integer, got {number!r}.")
    for name, number in (("divergence", divergence), ("learning_rate", learning_rate)):
        if not is_traced(number) and not number > 0:
            raise ValueError(f"{name} must be above 0, got {number!r}.")

    def attempt(key: Array) -> tuple[Tree, Array, Array]:
        z = _normal(key, shape, dtype)
        start = jax.tree.map(jnp.zeros_like, (z, z))
        first = (start, start, start, jnp.zeros((), dtype), jnp.zeros((), bool))
        place = lambda moments: jax.tree.map(lambda m, v, e: m + jnp.exp(0.5 * v) * e, *moments, z)

        def one(carry: tuple, _: None) -> tuple[tuple, None]:
            moments, first_moment, second_moment, count, done = carry
            found, slope = jax.value_and_grad(lambda moments: loss(place(moments)))(moments)
            done = done | (found < threshold)
            count = count + 1
            first_new = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first_moment, slope)
            second_new = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second_moment, slope)
            moved = jax.tree.map(
                lambda p, m, v: p - learning_rate * (m / (1 - 0.9**count)) / (jnp.sqrt(v / (1 - 0.999**count)) + 1e-8),
                moments,
                first_new,
                second_new,
            )
            new = (_within(moved, divergence), first_new, second_new, count)
            kept = jax.tree.map(lambda a, b: jnp.where(done, a, b), carry[:4], new)
            return (*kept, done), None

        (moments, *_), _ = jax.lax.scan(one, first, None, length=steps)
        x = place(moments)
        return x, loss(x), _divergence(moments)

    def body(carry: tuple) -> tuple:
        index, _, best = carry
        new = attempt(jax.random.fold_in(key, index))
        better = new[1] < best[1]
        return index + 1, index + 1, jax.tree.map(lambda a, b: jnp.where(better, a, b), new, best)

    first = attempt(jax.random.fold_in(key, 0))
    going = lambda carry: (carry[0] < rounds) & ~(carry[2][1] < threshold)
    one = jnp.ones((), jnp.int32)
    _, used, (x, found, divergent) = jax.lax.while_loop(going, body, (one, one, first))
    return OptimisedNoise(x, found, divergent, found < threshold, used)


def _divergence(moments: tuple[Tree, Tree], scale: Array = 1.0) -> Array:
    """KL(N(m, exp v) | N(0, 1)), the mean over all entries, of moments times ``scale``."""
    terms = jax.tree.map(lambda m, v: 0.5 * ((scale * m) ** 2 + jnp.expm1(scale * v) - scale * v), *moments)
    leaves = jax.tree.leaves(terms)
    return sum(leaf.sum() for leaf in leaves) / sum(leaf.size for leaf in leaves)


def _within(moments: tuple[Tree, Tree], bound: Array) -> tuple[Tree, Tree]:
    """The moments, shrunk to the bound where they are beyond it; the divergence rises with the scale."""

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        inside = _divergence(moments, middle) <= bound
        return jnp.where(inside, middle, low), jnp.where(inside, high, middle)

    low, _ = jax.lax.fori_loop(0, 24, halve, (jnp.zeros(()), jnp.ones(())))
    scale = jnp.where(_divergence(moments) <= bound, 1.0, low)
    return jax.tree.map(lambda leaf: (scale * leaf).astype(leaf.dtype), moments)


def _normal(key: Array, shape: Any, dtype: Any) -> Tree:
    shapes, structure = jax.tree.flatten(shape, is_leaf=is_shape)
    keys = jax.random.split(key, len(shapes))
    return structure.unflatten([jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)])
