"""Which noise is mixed with which data: couplings for the training of a batch.

A coupling is a value ``(keys, x0) -> eps`` of a batch: a key for each sample, data with a leading axis B in standard
coordinates, noise in their structure.  It changes the joint law of data and noise, hence paths and their curvature, and
should leave the noise standard normal: every docstring says whether it does.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from diffjax.levels import Array, static, value


def independent() -> Independent:
    """Noise that knows nothing of the data: the plain loss."""
    return Independent()


@value
class Independent:
    factory = "independent"

    def __call__(self, keys: Any, x0: PyTree) -> PyTree:
        return jax.vmap(normal_like)(keys, x0)


def assigned(subset: int | None = None) -> Assigned:
    """The noises of a batch in the order of the least sum of squared distances to its data, exactly.

    Nothing is drawn but the order changes, so the batch's noises are those that they were: their law stays normal in
    the batch as a whole, and for exchangeable data each one's is.  What pairs up depends on the batch: a larger one
    has straighter paths.  A condition is not looked at, so that *given* a condition the noise is not standard normal.
    Hungarian algorithm, O(B^3), compiled: 4 ms at B = 128 on a CPU core.

    Args:
        subset: assign within groups of so many consecutive samples (B must be a multiple), e.g. a device's own.

    Immiscible Diffusion: Accelerating Diffusion Training with Noise Assignment, arXiv:2406.12303;
    Improved Immiscible Diffusion: Accelerate Diffusion Training by Reducing Its Miscibility, arXiv:2505.18521;
    Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport, arXiv:2302.00482.

    Raises ValueError unless subset is a positive integer that divides the batch.
    """
    if subset is not None and (not isinstance(subset, int) or subset < 1):
        raise ValueError(f"subset must be a positive integer or None, got {subset!r}")
    return Assigned(subset)


@value
class Assigned:
    subset: int | None = static()
    factory = "assigned"

    def __call__(self, keys: Any, x0: PyTree) -> PyTree:
        eps = jax.vmap(normal_like)(keys, x0)
        count = len(keys)
        size = self.subset or count
        if count % size:
            raise ValueError(f"subset={size} must divide the batch of {count}")
        groups = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), (x0, eps))
        order = jax.vmap(lambda a, b: assignment(_distances(a, b)))(*groups)
        chosen = jax.vmap(lambda tree, index: jax.tree.map(lambda leaf: leaf[index], tree))(groups[1], order)
        return jax.tree.map(lambda leaf: leaf.reshape(count, *leaf.shape[2:]), chosen)


def nearest(candidates: int = 4) -> Nearest:
    """The nearest to its data of so many noises drawn for each sample: k-nearest-neighbour noise.

    A sample's noise does not depend on the batch.  Its law is *not* standard normal: given x0 it leans towards x0, by
    about what the nearest of k draws gains, which in D dimensions is of order sqrt(2 log k) of the sqrt(2 D) by which
    squared distances vary.  Sampling from standard normal noise is then a little off.

    Improved Immiscible Diffusion: Accelerate Diffusion Training by Reducing Its Miscibility, arXiv:2505.18521.

    Raises ValueError unless candidates is a positive integer.
    """
    if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
        raise ValueError(f"candidates must be a positive integer, got {candidates!r}")
    return Nearest(candidates)


@value
class Nearest:
    candidates: int = static()
    factory = "nearest"

    def __call__(self, keys: Any, x0: PyTree) -> PyTree:
        def one(key: PRNGKeyArray, x0: PyTree) -> PyTree:
            draws = jax.vmap(normal_like, (0, None))(jax.random.split(key, self.candidates), x0)
            batch = jax.tree.map(lambda leaf: leaf[None], x0)
            best = jnp.argmin(_distances(batch, draws)[0])
            return jax.tree.map(lambda leaf: leaf[best], draws)

        return jax.vmap(one)(keys, x0)


def assignment(cost: Array) -> Array:
    """The order of the columns of ``cost`` (N, N) that has the least ``sum_i cost[i, order[i]]``; exact.

    Raises ValueError unless the matrix is square.
    """
    import optax

    if cost.ndim != 2 or cost.shape[0] != cost.shape[1]:
        raise ValueError(f"cost must be square, got shape {cost.shape}")
    rows, columns = optax.assignment.hungarian_algorithm(cost)
    return jnp.zeros_like(columns).at[rows].set(columns)


def normal_like(key: PRNGKeyArray, x0: PyTree) -> PyTree:
    """Standard normal noise in the structure of one sample."""
    leaves, tree = jax.tree.flatten(x0)
    keys = [key] if len(leaves) == 1 else list(jax.random.split(key, len(leaves)))
    drawn = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def _distances(a: PyTree, b: PyTree) -> Array:
    """``|b|^2 - 2 a . b``, (N, M): squared distances but for ``|a|^2``, which decides nothing."""
    flat = [
        jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(tree)], axis=1) for tree in (a, b)
    ]
    return jnp.sum(flat[1] ** 2, axis=1) - 2 * flat[0] @ flat[1].T
