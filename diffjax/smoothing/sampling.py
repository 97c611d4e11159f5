"""Guided draws of a kernel, and what corrects them: importance weights, MCMC over the noise, particles."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.levels import Array, Tree
from diffjax.smc.mcmc import pcnl
from diffjax.smc.particles import (
    Place,
    Weighted,
    collapsed,
    effective_sizes,
    estimate,
    placed,
    resample,
    start,
    threshold_checked,
)
from diffjax.smc.resampling import systematic
from diffjax.smoothing.composition import Chain, Sequential
from diffjax.smoothing.potentials import Guided, log_value
from diffjax.solvers.arguments import integer


def smooth(key: Array, kernel: Any, h: Any, x: Tree) -> Guided:
    """One guided draw from x: backward filtering, then forward guiding.

    Returns a `Guided`, whose ``exp(log_weight)`` is an unbiased estimate of ``(K h)(x)``, the likelihood; draws of many
    keys, weighted, follow the path given what comes later.  To draw many, vmap over the keys: the backward pass does
    not depend on them and is made once.

    Automatic Backward Filtering Forward Guiding for Markov processes and graphical models, arXiv:2010.03509.
    """
    message, source = kernel.backward(h)
    guided = kernel.forward(message, x, kernel.noise(key))
    return guided._replace(log_weight=log_value(source, x) + guided.log_weight)


class Walked(NamedTuple):
    """A Markov chain over guided draws: ``draws`` stacked, the acceptance of every move, and the last noise."""

    draws: Guided
    acceptance: Array
    noise: Tree


def guided_mcmc(
    key: Array, kernel: Any, h: Any, x: Tree, moves: int, step: Array = 0.5, noise: Tree = None, gradients: bool = False
) -> Walked:
    """Preconditioned Crank-Nicolson moves of the noise that drives a guided draw: an exact sampler of paths given h.

    ``noise' = rho noise + sqrt(1 - rho^2) z``, rho = (1 - step / 4) / (1 + step / 4), accepted with probability
    ``min(1, w(noise') / w(noise))``: the law of the noise is left as it is by the move, so nothing degenerates with the
    number of steps.  That is `diffjax.smc.pcnl`, by default without its gradients.

    Args:
        kernel, h, x: as for `smooth`.
        moves: how many.
        step: in (0, 4]; at 4 every proposal is an independent draw.
        noise: to begin with, as a run before returned it; default fresh.
        gradients: drift along the gradient of the log-weight in the noise (two backward passes a move).

    Raises ValueError for arguments out of range.
    """
    integer("moves", moves, 1, 10**9)
    move = pcnl(step)
    message, source = kernel.backward(h)
    first, rest = jax.random.split(key)
    noise = kernel.noise(first) if noise is None else noise
    run = lambda noise: kernel.forward(message, x, noise)
    weigh = lambda noise: run(noise).log_weight
    still = lambda noise: (weigh(noise), jax.tree.map(jnp.zeros_like, noise))
    tilt = jax.value_and_grad(weigh) if gradients else still

    def body(noise: Tree, key: Array) -> tuple[Tree, tuple[Guided, Array]]:
        moved = move(key, noise, tilt)
        return moved.x, (run(moved.x), moved.acceptance)

    noise, (draws, acceptance) = jax.lax.scan(body, noise, jax.random.split(rest, moves))
    return Walked(draws._replace(log_weight=draws.log_weight + log_value(source, x)), acceptance, noise)


class Filtered(NamedTuple):
    """N weighted guided paths; ``log_z`` estimates the log-likelihood, its exponential without bias.

    ``x`` (N, ..) and ``log_weights`` (N,) since the last resampling; ``path``, ``ess``, ``ancestry`` by kernel of the
    chain, ``path`` in the places of the time (`diffjax.smc.lineage` has the places of the ancestors);
    ``collapsed_at`` the first kernel before which all weights were zero, or -1.
    """

    x: Tree
    log_weights: Array
    log_z: Array
    path: Tree
    ess: Array
    ancestry: Array
    collapsed_at: Array


def particle_filter(
    key: Array,
    kernel: Any,
    h: Any,
    x: Tree,
    *,
    particles: int,
    resampler: Any = None,
    threshold: Array = 0.5,
) -> Filtered:
    """Guided paths through a chain of kernels, resampled on the way: a particle filter that looks ahead.

    ``w <- w w_i``, the weight of the chain's i-th kernel, resampled before it where few are effective.  The potentials
    on the way are the backward filter's of all observations that are still to come.

    Args:
        kernel: a `chain` (of diffusions, each with an observation, for instance), or `sequential` of one kernel, as a
            prior, and a chain.
        h, x: as for `smooth`.
        particles: N.
        resampler: of `diffjax.smc`, default `systematic`; one that chooses.
        threshold: of the effective size over N below which particles are resampled; 0 never, inf always.

    Raises ValueError for another kernel, a resampler that transports, and arguments out of range.
    """
    before = isinstance(kernel, Sequential)
    if not isinstance(kernel.second if before else kernel, Chain):
        raise ValueError(f"kernel must be a chain, or one kernel and a chain in sequence, got {kernel!r}.")
    resampler = systematic() if resampler is None else resampler
    if hasattr(resampler, "matrix"):
        raise ValueError(f"resampler must choose, not transport, got {resampler!r}.")
    threshold_checked(threshold)
    place = placed(particles, None, None)
    message, source = kernel.backward(h)
    choice_key, noise_key = jax.random.split(key)
    keys = jax.vmap(lambda slot: jax.random.fold_in(noise_key, slot))(place.slots)
    noise = jax.vmap(kernel.noise)(keys)
    many = jax.tree.map(lambda leaf: jnp.broadcast_to(jnp.asarray(leaf), (particles, *jnp.shape(leaf))), x)
    log_weights = jnp.broadcast_to(log_value(source, x), (particles,))
    links = kernel.second if before else kernel
    if before:
        ends = jax.vmap(kernel.first.forward, (None, 0, 0))(message[0], many, noise[0])
        many, log_weights = ends.x, log_weights + ends.log_weight
        message, noise = message[1], noise[1]
    weighted = start(place, log_weights.dtype)._replace(log_weights=log_weights)
    return _filtered(choice_key, links, message, many, noise, weighted, place, resampler, threshold)


def _filtered(
    key: Array,
    links: Chain,
    message: Any,
    many: Tree,
    noise: Tree,
    weighted: Weighted,
    place: Place,
    resampler: Any,
    threshold: Array,
) -> Filtered:
    def body(carry: tuple, inputs: tuple) -> tuple[tuple, tuple]:
        index, many, weighted = carry
        kernel, message, noise = inputs
        many, weighted, choice = resample(key, index, place, resampler, threshold, jnp.asarray(True), weighted, many)
        ends = jax.vmap(kernel.forward, (None, 0, 0))(message, many, noise)
        weighted = weighted._replace(log_weights=weighted.log_weights + ends.log_weight)
        return (index + 1, ends.x, weighted), (ends.path, choice)

    by_link = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), noise)
    carry = (jnp.zeros((), jnp.int32), many, weighted)
    (_, many, weighted), (path, choices) = links.walk(body, carry, message, by_link)
    ess = effective_sizes(choices, weighted)
    return Filtered(many, weighted.log_weights, estimate(weighted), path, ess, choices.ancestors, collapsed(ess))
