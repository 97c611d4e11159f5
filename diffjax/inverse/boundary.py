"""One good starting noise for all inputs of a conditional model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, Tree, as_value


class Boundary(NamedTuple):
    """What `best_boundary` gives back."""

    x: Tree  # the best candidate, a state at the first level
    index: Array  # which it is
    costs: Array  # (K,) the mean distance of each candidate's samples to the references


def best_boundary(
    run: Callable[[Tree, Tree], Tree],
    candidates: Tree,
    conditions: Tree,
    references: Tree,
    *,
    distance: Callable[[Tree, Tree], Array] | None = None,
    batch: int | None = None,
) -> Boundary:
    """The noise of K candidates whose samples are nearest to what they should be, on R pairs; for all inputs to come.

        x_T* = argmin_k mean_i distance(run(x_T[k], y_i), x_i)

    A deterministic sampler makes a sample of a conditional model from the noise x_T and the input y; what x_T makes of
    it is much the same for all y, so one that is good for the pairs is good for others.  For the squared error that is
    the noise whose samples are nearest to the posterior mean, which no sample of the posterior is: for a Gaussian
    posterior and steps ``x = offset(y) + M x_T``, the cost is ``mean_i |offset_i + M x_T - x_i|^2``, least at
    ``M^+ mean_i (x_i - offset_i)``, near 0 and not a typical draw.  In D dimensions a draw is at distance sqrt(D), so
    what random search gains falls as D grows.

    Args:
        run: ``(x_T, y) -> x_0`` without randomness, for instance
            ``lambda x, y: sample(key, model(y), ddim(), grid, x=x).x``.
        candidates: K states at the grid's first level along the leading axis of every leaf: draws of the prior.
        conditions, references: the inputs y and the clean samples, R along the leading axis.
        distance: ``(sample, reference) -> number``; default the mean squared error over all entries.
        batch: how many candidates run at once, each on all references; default all.

    Returns `Boundary`; K R runs of the sampler.

    Solving Diffusion ODEs with Optimal Boundary Conditions for Better Image Super-Resolution, arXiv:2305.15357.

    Raises ValueError if leading axes differ or are empty, or for a batch below 1.

    >>> import jax.numpy as jnp
    >>> best_boundary(lambda x, y: x + y, jnp.array([2.0, 0.1]), jnp.arange(3.0), jnp.arange(3.0)).index
    Array(1, dtype=int32)
    """
    count, pairs = _leading("candidates", candidates), _leading("conditions", conditions)
    if (found := _leading("references", references)) != pairs:
        raise ValueError(f"references must be as many as conditions, {pairs}, got {found}.")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch!r}.")
    run, apart = as_value(run), as_value(mean_squared_error if distance is None else distance)

    def cost(x: Tree) -> Array:
        return jnp.mean(jax.vmap(lambda y, clean: apart(run(x, y), clean))(conditions, references))

    if batch is None or batch >= count:
        costs = jax.vmap(cost)(candidates)
    else:
        costs = jax.lax.map(cost, candidates, batch_size=batch)
    index = jnp.argmin(costs).astype(jnp.int32)
    return Boundary(jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], candidates), index, costs)


def mean_squared_error(x: Tree, reference: Tree) -> Array:
    """The mean over all entries of all leaves of the squared difference."""
    squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), x, reference)
    return sum(jax.tree.leaves(squares)) / sum(np.size(leaf) for leaf in jax.tree.leaves(reference))


def _leading(name: str, tree: Any) -> int:
    sizes = {np.shape(leaf)[0] if np.ndim(leaf) else 0 for leaf in jax.tree.leaves(tree)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"{name} need one leading axis that is not empty, got shapes {jax.tree.map(np.shape, tree)}.")
    return sizes.pop()
