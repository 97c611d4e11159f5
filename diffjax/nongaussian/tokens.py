"""Sequences of tokens with absorbing noise: entries are masked one by one, and unmasked in random order.

A *conditional* is the denoiser: ``conditional(x) -> (L, V)`` log-probabilities of every entry given those of x that are
not masked.  Time plays no part, since what is masked tells how noisy x is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.levels import Array
from diffjax.samplers.shared import integer


class Unmasked(NamedTuple):
    """The sequence (L,), and all states from the masked one on, (L + 1, L); masked entries are V."""

    x: Array
    states: Array


def unmasked(
    key: Array,
    conditional: Callable[[Array], Array],
    length: int,
    vocabulary: int,
    potential: Callable[[Array], Array] | None = None,
    turn: Array | int | None = None,
) -> Unmasked:
    """A sequence, unmasked entry by entry in random order, guided by a potential of partly masked states.

        i ~ uniform over the masked,     p(x_i = v) ~ p(v | x) exp(F(x with x_i = v))

    With ``F(x) = log E[exp(eta r(x_0)) | x]`` the law is p(x_0) exp(eta r) / Z, exactly, with a conditional that is.

    Args:
        conditional: ``(L,) int -> (L, V)`` log-probabilities, up to a constant for each entry.
        length, vocabulary: L and V.
        potential: ``F((L,) int) -> number``, None for 0; V evaluations an entry.
        turn: the number of entries after which the potential is left out, default never.

    L calls of the conditional.  Raises ValueError for sizes below 1.

    >>> unmasked(jax.random.key(0), lambda x: jnp.array([[0.0, -jnp.inf]] * 3), 3, 2).x
    Array([0, 0, 0], dtype=int32)
    """
    integer("length", length, 1)
    integer("vocabulary", vocabulary, 1)
    which, walk = jax.random.split(key)
    order = jax.random.permutation(which, length)
    turn = length if turn is None else turn
    values = jnp.arange(vocabulary, dtype=jnp.int32)

    def one(x: Array, given: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        key, place, index = given
        logs = guided_logits(conditional, potential, x, place, vocabulary, index < turn)
        x = x.at[place].set(values[jax.random.categorical(key, logs)])
        return x, x

    start = jnp.full(length, vocabulary, jnp.int32)
    x, states = jax.lax.scan(one, start, (jax.random.split(walk, length), order, jnp.arange(length)))
    return Unmasked(x, jnp.concatenate([start[None], states]))


def guided_logits(
    conditional: Any, potential: Any, x: Array, place: Array, vocabulary: int, guided: Array | bool = True
) -> Array:
    """``log p(v | x) + F(x with x_place = v)`` for every v, unnormalised."""
    logs = conditional(x)[place]
    if potential is None:
        return logs
    tilts = jax.vmap(lambda v: potential(x.at[place].set(v)))(jnp.arange(vocabulary, dtype=x.dtype))
    return logs + jnp.where(guided, tilts, 0.0)
