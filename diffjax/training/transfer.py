"""Noise levels as tasks that may hinder each other: intervals of them, and gradients put together with care."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from diffjax.levels import Array, as_value, dot, static, value


def intervals(cost: np.ndarray, count: int) -> np.ndarray:
    """The edges (count + 1,) that cut N items in order into ``count`` runs of the least total cost, exactly.

    ``cost[i, j]``, i <= j, is that of the run of items i to j, both included; run k is items ``edges[k]`` to
    ``edges[k + 1] - 1``.  Dynamic programming, O(count N^2).

    Addressing Negative Transfer in Diffusion Models, arXiv:2306.00354.

    Raises ValueError unless cost is square and 1 <= count <= N.

    >>> intervals(spread(np.array([0.0, 0.1, 5.0, 5.1, 5.2])), 2)
    array([0, 2, 5])
    """
    size = len(cost)
    if np.shape(cost) != (size, size) or not 1 <= count <= size:
        raise ValueError(f"cost must be (N, N) and 1 <= count <= N, got {np.shape(cost)} and {count!r}")
    best = np.full((count + 1, size + 1), np.inf)
    start = np.zeros((count + 1, size + 1), int)
    best[0, 0] = 0.0
    for k in range(1, count + 1):
        for j in range(k, size + 1):
            totals = best[k - 1, k - 1 : j] + cost[k - 1 : j, j - 1]
            start[k, j] = k - 1 + np.argmin(totals)
            best[k, j] = np.min(totals)
    edges = [size]
    for k in range(count, 0, -1):
        edges.append(start[k, edges[-1]])
    return np.array(edges[::-1])


def spread(places: np.ndarray) -> np.ndarray:
    """The cost (N, N) of runs of items at ``places`` (N,): the distances to the run's middle item, added up.

    For intervals of noise levels the places are their times or their log-SNRs.
    """
    places = np.asarray(places, np.float64)
    first, last = np.meshgrid(np.arange(len(places)), np.arange(len(places)), indexing="ij")
    cost = np.zeros(first.shape)
    for i, j in zip(*np.where(first <= last), strict=True):
        cost[i, j] = np.abs(places[i : j + 1] - places[(i + j) // 2]).sum()
    return cost


def apart(affinity: np.ndarray) -> np.ndarray:
    """The cost (N, N) of runs from the affinities (N, N) of items, such as gradients' cosines: minus those in a run.

    Each item counts its mean affinity to the run that it is in, so that long runs are not dear for their length.
    """
    sums = np.pad(np.cumsum(np.cumsum(affinity, 0), 1), ((1, 0), (1, 0)))
    i, j = np.meshgrid(np.arange(len(affinity)), np.arange(1, len(affinity) + 1), indexing="ij")
    block = sums[j, j] - sums[i, j] - sums[j, i] + sums[i, i]
    return np.where(j > i, -block / np.maximum(j - i, 1), 0.0)


def surgery(loss: Any, edges: Any, method: str | Callable = "pcgrad") -> Surgery:
    """A loss whose gradient is put together from those of intervals of its law by a multi-task method.

    Each of the K intervals between ``edges`` has 1/K of the batch and its own gradient g_k, weighted by how much of
    the law it is, so that the sum is the plain gradient.  Then

        "sum"     sum g_k
        "pcgrad"  sum of g_k less its part along every g_j that it conflicts with (g_k . g_j < 0), in random order
        "nash"    sum a_k g_k with G a = 1 / a, G the inner products: the Nash bargaining solution, of norm sqrt(K)

    or a function ``(key, gradients) -> gradient`` of trees with a leading axis K.  The value is the plain loss.
    Uncertainty weighting of intervals is `weightings.uncertainty`.

    Args:
        loss: from `denoising` (one without a memory).
        edges: (K + 1,) quantiles of its law, from 0 to 1, rising: `intervals` over N equal parts, divided by N.
        method: as above.

    Addressing Negative Transfer in Diffusion Models, arXiv:2306.00354; Gradient Surgery for Multi-Task
    Learning, arXiv:2001.06782; Multi-Task Learning as a Bargaining Game, arXiv:2202.01017.

    Raises ValueError for other edges or methods; when called, for a batch that K does not divide.
    """
    edges = np.asarray(edges, np.float64)
    if edges.ndim != 1 or len(edges) < 2 or edges[0] != 0 or edges[-1] != 1 or not np.all(np.diff(edges) > 0):
        raise ValueError(f"edges must rise from 0 to 1, got {edges!r}")
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"method must be among {tuple(METHODS)} or a function, got {method!r}")
        method = METHODS[method]
    return Surgery(loss, tuple(edges.tolist()), as_value(method))


@value
class Surgery:
    loss: Any
    edges: tuple = static()
    method: Any = dataclasses.field()
    factory = "surgery"

    def gradients(self, params: PyTree, key: PRNGKeyArray, *batch: Any) -> tuple[PyTree, Array]:
        """``(gradients, losses)``: of the intervals, with a leading axis K, and of the samples, (K, B / K)."""
        edges = jnp.asarray(self.edges)
        count = len(self.edges) - 1
        size = jax.tree.leaves(batch)[0].shape[0]
        if size % count:
            raise ValueError(f"a batch of {size} cannot be shared among {count} intervals")
        parts = jax.tree.map(lambda leaf: leaf.reshape(-1, count, *leaf.shape[1:]).swapaxes(0, 1), batch)

        def one(item: tuple) -> tuple[PyTree, Array]:
            key, low, high, part = item
            items = self.loss.draw(key, *part)
            # the level moves into the interval, the law stays: weights `on_bound` divide by its density
            items = items._replace(u=low + (high - low) * items.u)

            def share(params: PyTree) -> tuple[Array, Array]:
                losses = self.loss.each(params, items)
                return (high - low) * jnp.mean(losses), losses

            return jax.grad(share, has_aux=True)(params)

        return jax.lax.map(one, (jax.random.split(key, count), edges[:-1], edges[1:], parts))

    def __call__(self, params: PyTree, key: PRNGKeyArray, *batch: Any) -> Array:
        """The losses of a batch, (B,), whose mean has the gradient of the method."""
        frozen = jax.lax.stop_gradient(params)
        own, others = jax.random.split(key)
        gradients, losses = self.gradients(frozen, own, *batch)
        gradient = jax.lax.stop_gradient(self.method(others, gradients))
        widths = jnp.diff(jnp.asarray(self.edges))[:, None] * len(losses)
        # a plane through the value with the wanted slope
        plane = dot(gradient, jax.tree.map(jnp.subtract, params, frozen))
        return (widths * losses).T.reshape(-1) + plane


def products(gradients: PyTree) -> Array:
    """The inner products (K, K) of trees with a leading axis K."""
    flat = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(gradients)]
    return sum(leaf @ leaf.T for leaf in flat)  # pyright: ignore[reportReturnType]


def cosines(gradients: PyTree) -> Array:
    """The cosines (K, K) between trees with a leading axis K: the affinity of tasks."""
    inner = products(gradients)
    size = jnp.sqrt(jnp.diag(inner))
    return inner / jnp.where(size > 0, size, 1.0)[:, None] / jnp.where(size > 0, size, 1.0)


def _weighted(weights: Array, gradients: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1).astype(leaf.dtype), gradients)


def plain(key: PRNGKeyArray, gradients: PyTree) -> PyTree:
    """The sum."""
    del key
    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), gradients)


def pcgrad(key: PRNGKeyArray, gradients: PyTree) -> PyTree:
    """The sum after every gradient has lost its part along those that it conflicts with.

    Everything stays in the span of the gradients, so it is done on their coefficients, with their inner products.
    """
    inner = products(gradients)
    count = len(inner)

    def task(key: PRNGKeyArray, index: Array) -> Array:
        def project(own: Array, other: Array) -> tuple[Array, None]:
            along = own @ inner[other]
            size = inner[other, other]
            cut = jnp.where((along < 0) & (other != index), along / jnp.where(size > 0, size, 1.0), 0.0)
            return own.at[other].add(-cut), None

        start = jnp.zeros(count, inner.dtype).at[index].set(1.0)
        return jax.lax.scan(project, start, jax.random.permutation(key, count))[0]

    weights = jax.vmap(task)(jax.random.split(key, count), jnp.arange(count))
    return _weighted(jnp.sum(weights, axis=0), gradients)


def nash(key: PRNGKeyArray, gradients: PyTree) -> PyTree:
    """``sum a_k g_k`` with ``G a = 1 / a``: the least of ``a^T G a / 2 - sum log a``, by Newton's method."""
    del key
    return _weighted(bargain(products(gradients)), gradients)


def bargain(inner: Array, rounds: int = 40) -> Array:
    """The positive a (K,) with ``inner a = 1 / a``, for a positive semi-definite (K, K)."""
    size = jnp.sqrt(jnp.maximum(jnp.diag(inner), jnp.finfo(inner.dtype).tiny))
    matrix = inner / size[:, None] / size + 1e-6 * jnp.eye(len(inner), dtype=inner.dtype)

    def newton(_: Array, a: Array) -> Array:
        slope = matrix @ a - 1 / a
        step = jnp.linalg.solve(matrix + jnp.diag(a**-2), slope)
        # the barrier is self-concordant: this damping never leaves a > 0, and dies out near the solution
        decrement = jnp.sqrt(jnp.maximum(slope @ step, 0.0))
        return a - step / (1 + decrement)

    return jax.lax.fori_loop(0, rounds, newton, jnp.ones(len(inner), inner.dtype)) / size


METHODS: dict[str, Callable] = {"sum": plain, "pcgrad": pcgrad, "nash": nash}
