"""What the drivers of particles have in common: where the particles are, and when and how they are resampled."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from diffjax.levels import Array, Tree, is_traced
from diffjax.samplers.sequential import normal_noise
from diffjax.samplers.sharded import automatic
from diffjax.smc.resampling import effective_size, log_mean, normalised

EARLY = 1 << 20  # up to this many entries all noise is drawn in one operation before the loop


class Place(NamedTuple):
    """N particles on one device, or N / d on each of the d devices along an axis."""

    count: int
    devices: int = 1
    axis: str | None = None

    @property
    def local(self) -> int:
        """Particles here."""
        return self.count // self.devices

    @property
    def slots(self) -> Array:
        """The numbers of the particles here."""
        first = 0 if self.axis is None else jax.lax.axis_index(self.axis) * self.local
        return first + jnp.arange(self.local, dtype=jnp.int32)

    def everywhere(self, tree: Tree) -> Tree:
        """What all devices hold, along the leading axis."""
        if self.axis is None:
            return tree
        return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, self.axis, tiled=True), tree)

    def here(self, tree: Tree) -> Tree:
        """The part of these particles."""
        return tree if self.axis is None else jax.tree.map(lambda leaf: leaf[self.slots], tree)

    def total(self, tree: Tree) -> Tree:
        """Sums over the devices."""
        return tree if self.axis is None else jax.tree.map(lambda leaf: jax.lax.psum(leaf, self.axis), tree)


def placed(particles: int, mesh: Mesh | None, axis: str | None) -> Place:
    """Where ``particles`` are; ValueError for a number that does not spread evenly, or an axis that is not there."""
    if isinstance(particles, bool) or not isinstance(particles, int | np.integer) or particles < 1:
        raise ValueError(f"particles must be an integer of at least 1, got {particles!r}.")
    if mesh is None:
        return Place(int(particles))
    axis = mesh.axis_names[0] if axis is None else axis
    if axis not in mesh.axis_names:
        raise ValueError(f"axis must be one of the mesh's {mesh.axis_names}, got {axis!r}.")
    if particles % mesh.shape[axis]:
        raise ValueError(f"particles must be a multiple of the {mesh.shape[axis]} devices, got {particles!r}.")
    return Place(int(particles), mesh.shape[axis], axis)


def spread(run: Any, mesh: Mesh | None, place: Place, here: Tree, replicated: Tree, outs: Any) -> Any:
    """``run(here, replicated)`` by the devices of the mesh, each with its share of the leading axes of ``here``.

    ``outs`` is a tree of booleans: which results are spread too.
    """
    if mesh is None:
        return run(here, replicated)
    specs = jax.tree.map(lambda split: P(place.axis) if split else P(), outs)
    body = jax.shard_map(run, mesh=automatic(mesh), in_specs=(P(place.axis), P()), out_specs=specs, check_vma=False)
    return body(here, replicated)


def threshold_checked(threshold: Array) -> None:
    """Raise ValueError for a threshold that is negative or not a number."""
    if not is_traced(threshold) and not np.all(np.asarray(threshold) >= 0):
        raise ValueError(f"threshold must be at least 0 (never resample; inf is always), got {threshold!r}.")


def drawn(key: Array, index: Array, slots: Array, x: Tree, draws: int) -> tuple[Tree, ...]:
    """The noise of a row: for each particle by its slot's key, whatever the devices."""
    one = lambda slot, x: normal_noise(jax.random.fold_in(key, slot), index, x, draws)
    return jax.vmap(one)(slots, x)


class Weighted(NamedTuple):
    """Log-weights since the last resampling, and the logarithm of what the resamplings before have taken out."""

    log_weights: Array  # (N,) on every device
    log_z: Array


class Choice(NamedTuple):
    """What was decided at a row."""

    ess: Array
    ancestors: Array  # (N,)
    resampled: Array


def start(place: Place, kind: Any) -> Weighted:
    """Weights of 1."""
    return Weighted(jnp.zeros(place.count, kind), jnp.zeros((), kind))


def estimate(weighted: Weighted) -> Array:
    """The logarithm of the estimate of Z that is unbiased on the natural scale."""
    return weighted.log_z + log_mean(weighted.log_weights)


def effective_sizes(choices: Choice, weighted: Weighted) -> Array:
    """Before resampling in each row, and at the end: (rows + 1,)."""
    return jnp.concatenate([choices.ess, effective_size(weighted.log_weights)[None]])


def collapsed(ess: Array) -> Array:
    """The first row at which all weights were zero, which only then have an effective size of 0; or -1."""
    lost = ess == 0
    return jnp.where(jnp.any(lost), jnp.argmax(lost), -1).astype(jnp.int32)


def resample(
    key: Array,
    index: Array,
    place: Place,
    resampler: Any,
    threshold: Array,
    allowed: Array,
    weighted: Weighted,
    particles: Tree,
    move: Any = None,
) -> tuple[Tree, Weighted, Choice]:
    """Resample if ``allowed`` and the effective size is below ``threshold`` N; only then are the weights cleared.

    ``particles`` are those here, ``move(matrix, particles)`` what a resampler that transports needs.  Where all
    weights are zero nothing is done but to report it.
    """
    log_weights, count = weighted.log_weights, place.count
    ess = effective_size(log_weights)
    alive = jnp.max(log_weights) > -jnp.inf
    due = allowed & alive & (ess < threshold * count)
    own = np.arange(count, dtype=np.int32)  # a constant: not made anew in every row

    def choose(particles: Tree) -> tuple[Tree, Array, Array, Array]:
        log_z = estimate(weighted)
        if hasattr(resampler, "matrix"):
            particles, ancestors = move(resampler, log_weights, particles)
            return particles, jnp.zeros_like(log_weights), log_z, ancestors
        ancestors = resampler(jax.random.fold_in(key, index), log_weights)
        mine = place.here(ancestors)
        particles = jax.tree.map(lambda leaf: leaf[mine], place.everywhere(particles))
        after = jnp.zeros_like(log_weights)
        if getattr(resampler, "scored", False):
            chosen = jnp.log(normalised(log_weights)[ancestors])
            after = chosen - jax.lax.stop_gradient(chosen)
        return particles, after, log_z, ancestors

    def keep(particles: Tree) -> tuple[Tree, Array, Array, Array]:
        return particles, log_weights, weighted.log_z, jnp.asarray(own)

    particles, after, log_z, ancestors = jax.lax.cond(due, choose, keep, particles)
    return particles, Weighted(after, log_z), Choice(ess, ancestors, due)


def lineage(ancestry: Array) -> Array:
    """Whose descendant each particle is: (rows + 1, N), the slots at the entry of every row, the last the identity.

    ``lineage[i, k]`` is where particle k of the end was at row i, so ``lineage[0]`` says how many of the first
    particles have descendants.

    >>> lineage(jnp.array([[0, 0], [1, 1]]))
    Array([[0, 0],
           [1, 1],
           [0, 1]], dtype=int32)
    """
    last = jnp.arange(ancestry.shape[1], dtype=jnp.int32)

    def back(slots: Array, ancestors: Array) -> tuple[Array, Array]:
        before = ancestors.astype(jnp.int32)[slots]
        return before, before

    _, path = jax.lax.scan(back, last, ancestry, reverse=True)
    return jnp.concatenate([path, last[None]])
