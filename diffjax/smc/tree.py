"""Tree sampling: what earlier rollouts of a chain found out decides where the next one branches off.

A node is a state; its children are independent draws of the chain's next state.  Soft values are backed up,

    v(leaf) = r(x_0) / temperature,    v(node) = log mean_children exp(v(child)),

to approach ``log E[exp(r / temperature) | x_t]``.  A child that is drawn with probability ``exp(v)`` among its siblings
leads, with many children, to p(x_0) exp(r / temperature).  The tree is NumPy on the host; rollouts are jitted batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, Grid, Tree, as_value, value
from diffjax.samplers.sequential import normal_noise, prepare
from diffjax.samplers.shared import has_memory, integer, memoryless, take
from diffjax.smc.search import Searched
from diffjax.solvers.arguments import number


class Grown(NamedTuple):
    """A tree of M nodes, the first of them the root, parents before children.

    ``states`` (M, ...); ``parents``, ``depths``, ``visits``, ``values`` (M,): soft values, that of the root is log Z;
    ``rewards`` (M,), NaN but at the leaves.  ``steps``: how many transitions from each depth were made.
    """

    states: Tree
    parents: np.ndarray
    depths: np.ndarray
    values: np.ndarray
    visits: np.ndarray
    rewards: np.ndarray
    steps: np.ndarray


class TreeSamples(NamedTuple):
    """Samples along a leading axis, log Z = log E[exp(r / temperature)], all network evaluations, and the tree."""

    x: Tree
    log_z: float
    nfe: int
    tree: Grown


def grow_tree(
    key: Array,
    step: Any,
    root: Tree,
    length: int,
    reward: Callable[[Tree], Array],
    *,
    rollouts: int,
    batch: int = 16,
    temperature: float = 1.0,
    width: float = 1.0,
    power: float = 0.5,
    uniform: float = 0.0,
    exploration: float | None = None,
    fixed: tuple[int, ...] = (),
) -> Grown:
    """A tree over any Markov chain ``step(key, x, depth) -> x`` from a root, whose leaves are at depth ``length``.

    A rollout goes down from the root; at a node of n children and N visits it branches off if ``n < width N^power``,
    and else goes on to one of the children; where it branched off the chain itself carries it on, and every state on
    the way is a node.

    Args:
        key, root: a key, and the state of the root.
        reward: of a state at depth ``length``; -inf excludes it.
        rollouts, batch: how many descents, and how many of them are made before values are backed up.
        temperature: above 0.
        width, power: above 0, and in (0, 1]; of nodes without end, power below 1 has values that become exact.
        uniform: in [0, 1], the share of choices among children that are made without regard to v.  At 0, as published,
            a child whose first rollout was poor is hardly seen again: Z is too small, for long.  At 1 the shape of the
            tree tells nothing, and exp of the root's value is an unbiased estimate of Z.
        exploration: None: children with probability exp(v) (DTS); a number c: the child with the largest
            ``v + c sqrt(log N / N_child)``, which searches instead of sampling (DTS*).
        fixed: depths from which the next state is a function of the state: one child is enough.

    Not jitted as a whole: call it outside of transformations.

    Diffusion Tree Sampling: Scalable inference-time alignment of diffusion models, arXiv:2506.20701.

    Raises ValueError for arguments out of range.
    """
    for name, given in (("length", length), ("rollouts", rollouts), ("batch", batch)):
        integer(name, given, 1)
    number("temperature", temperature, 1e-6)
    number("width", width, 1e-6)
    number("power", power, 1e-6, 1.0)
    number("uniform", uniform, 0.0, 1.0)
    if exploration is not None:
        number("exploration", exploration)
    host, roll = np.random.default_rng(np.asarray(jax.random.bits(key, (4,)))), Roll(as_value(step), as_value(reward))
    room = 1 + rollouts * length
    states = jax.tree.map(lambda leaf: np.zeros((room, *np.shape(leaf)), np.asarray(leaf).dtype), root)
    for kept, leaf in zip(jax.tree.leaves(states), jax.tree.leaves(root), strict=True):
        kept[0] = leaf
    parents, depths = np.full(room, -1), np.zeros(room, np.int64)
    visits, values, rewards = np.zeros(room, np.int64), np.zeros(room), np.full(room, np.nan)
    children: list[list[int]] = [[]]
    steps, made = np.zeros(length, np.int64), 0

    def descend(pending: dict[int, int]) -> int:
        """The node to branch off from, or a leaf."""
        node = 0
        while True:
            visits[node] += 1
            own, waiting = children[node], pending.get(node, 0)
            most = 1.0 if depths[node] in fixed else width * visits[node] ** power
            if depths[node] == length or not own or len(own) + waiting < most:
                return node
            found = values[own]
            if exploration is None:
                chances = (1 - uniform) * _softmax(found) + uniform / len(own)
                node = own[host.choice(len(own), p=chances)]
            else:
                bonus = np.sqrt(np.log(visits[node]) / np.maximum(visits[own], 1))
                node = own[int(np.argmax(found + exploration * bonus))]

    # the first rollout is alone: it gives the root a child
    starts = [0, *range(1, rollouts, batch)]
    for begin, end in zip(starts, [*starts[1:], rollouts], strict=True):
        pending: dict[int, int] = {}
        stops = []
        for _ in range(end - begin):
            stops.append(descend(pending))
            pending[stops[-1]] = pending.get(stops[-1], 0) + 1
        padded = np.array(stops + [stops[-1]] * (batch - len(stops)))
        keys = jax.random.split(jax.random.fold_in(key, begin), batch)
        from_ = jax.tree.map(lambda leaf, padded=padded: leaf[padded], states)
        path, found = _roll(length, roll, keys, from_, depths[padded])
        path, found = jax.tree.map(np.asarray, (path, found))
        ends = []
        for b, node in enumerate(stops):
            steps[depths[node] :] += 1
            for depth in range(depths[node], length):
                made += 1
                children[node].append(made)
                children.append([])
                parents[made], depths[made], visits[made] = node, depth + 1, 1
                for kept, leaf in zip(jax.tree.leaves(states), jax.tree.leaves(path), strict=True):
                    kept[made] = leaf[depth, b]
                node = made
            if depths[stops[b]] < length:
                rewards[node], values[node] = found[b], found[b] / temperature
            ends.append(node)
        for node in ends:
            while parents[node] >= 0:
                node = parents[node]
                values[node] = _log_mean(values[children[node]])
    cut = lambda tree: jax.tree.map(lambda leaf: leaf[: made + 1], tree)
    return Grown(cut(states), cut(parents), cut(depths), cut(values), cut(visits), cut(rewards), steps)


def draw_leaves(key: Array, tree: Grown, count: int) -> np.ndarray:
    """``count`` leaves, each by a descent that goes from a node to a child with probability ``exp(v)``."""
    integer("count", count, 1)
    host = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
    children: list[list[int]] = [[] for _ in tree.parents]
    for node, parent in enumerate(tree.parents[1:], 1):
        children[parent].append(node)
    found = []
    for _ in range(count):
        node = 0
        while children[node]:
            node = children[node][host.choice(len(children[node]), p=_softmax(tree.values[children[node]]))]
        found.append(node)
    return np.array(found)


def tree_sampling(
    key: Array,
    denoise: Any,
    solver: Any,
    grid: Grid,
    shape: tuple[int, ...],
    *,
    reward: Callable[[Tree], Array],
    samples: int,
    dtype: Any = jnp.float32,
    **options: Any,
) -> TreeSamples:
    """Diffusion tree sampling: samples of ``p(x_0) exp(r(x_0) / temperature)`` by a tree over a stochastic sampler.

    All samples share one tree, so that they are not independent, but by many rollouts.

    Args:
        key, denoise, solver, grid, shape, dtype: as for `diffjax.sample`; solver and denoiser without memory.
        reward: ``x0 -> number``; no gradient is taken.
        samples: how many to draw from the tree.
        options: of `grow_tree`: rollouts, batch, temperature, width, power.

    Diffusion Tree Sampling: Scalable inference-time alignment of diffusion models, arXiv:2506.20701.

    Raises ValueError for a deterministic solver, memories, and as `grow_tree`.
    """
    grow, last = jax.random.split(key)
    tree, nfe = _diffusion_tree(grow, denoise, solver, grid, shape, reward, dtype, options)
    leaves = draw_leaves(last, tree, samples)
    return TreeSamples(take(tree.states, leaves), float(tree.values[0]), nfe, tree)


def tree_search(
    key: Array,
    denoise: Any,
    solver: Any,
    grid: Grid,
    shape: tuple[int, ...],
    *,
    reward: Callable[[Tree], Array],
    exploration: float = 1.0,
    dtype: Any = jnp.float32,
    **options: Any,
) -> Searched:
    """Diffusion tree search (DTS*): the best leaf of a tree that is grown where its upper confidence bound is largest.

    ``rewards`` are those of the leaves in the order that they were found.  Arguments: `tree_sampling`; ``exploration``
    at least 0, in units of ``reward / temperature``.

    Diffusion Tree Sampling: Scalable inference-time alignment of diffusion models, arXiv:2506.20701.
    """
    options = options | {"exploration": exploration}
    tree, nfe = _diffusion_tree(key, denoise, solver, grid, shape, reward, dtype, options)
    leaves = np.flatnonzero(~np.isnan(tree.rewards))
    best = leaves[np.argmax(tree.rewards[leaves])]
    return Searched(
        take(tree.states, best), jnp.asarray(tree.rewards[best]), tree.rewards[leaves], jnp.asarray(nfe), None
    )


@value
class Roll:
    step: Any
    reward: Any


@value
class Judged:
    reward: Any
    alpha: Array

    def __call__(self, x: Tree) -> Array:
        return self.reward(jax.tree.map(lambda leaf: leaf / self.alpha, x))


@value
class Rows:
    """The chain of a sampler: from the root the prior, then a row a step."""

    denoise: Any
    solver: Any
    rows: Any
    level: Any

    def __call__(self, key: Array, x: Tree, depth: Array) -> Tree:
        row = take(self.rows, jnp.maximum(depth - 1, 0))
        noise = normal_noise(key, jnp.zeros((), jnp.int32), x, self.solver.draws)
        new, _, _ = self.solver.step(noise, self.denoise, x, self.solver.init(x), row)
        (first,) = normal_noise(key, jnp.ones((), jnp.int32), x, 1)
        begin = jax.tree.map(lambda z: (self.level.sigma * z).astype(z.dtype), first)
        return jax.tree.map(lambda a, b: jnp.where(depth == 0, a, b), begin, new)


def _diffusion_tree(key, denoise, solver, grid, shape, reward, dtype, options) -> tuple[Grown, int]:
    memoryless("tree sampling", denoise)
    if not getattr(solver, "draws", 0):
        raise ValueError(f"tree sampling needs a solver that draws noise, got {solver!r}.")
    _, x, rows, solver = prepare(key, denoise, solver, grid, shape, None, None, dtype, None)
    if has_memory(solver, x) or grid.process.coordinates is not None:
        raise ValueError(f"tree sampling needs a solver without memory and no coordinates, got {solver!r}.")
    count = rows.t.time.shape[0]
    fixed = (count,) if np.all(np.asarray(rows.s.sigma[-1]) == 0) else ()
    last, kind = jax.tree.map(lambda leaf: leaf[-1], rows.s), jnp.result_type(*jax.tree.leaves(x))
    judged = Judged(as_value(reward), jnp.asarray(last.alpha, kind))
    start = jax.tree.map(lambda leaf: jnp.asarray(leaf, kind), grid.start)
    chain = Rows(as_value(denoise), solver, jax.tree.map(jnp.asarray, rows), start)
    root = jax.tree.map(jnp.zeros_like, x)
    tree = grow_tree(key, chain, root, count + 1, judged, fixed=fixed, **options)
    each = getattr(denoise, "evaluations", None)
    costs = [solver.calls * (1 if each is None else int(each(take(rows.t, i)))) for i in range(count)]
    return tree, int(np.dot(tree.steps[1:], costs))


def _rolled(length: int, roll: Roll, keys: Array, x: Tree, depths: Array) -> tuple[Tree, Array]:
    """States at depths 1 .. length (where before the start: the start itself), and rewards of the last."""

    def body(x: Tree, index: Array) -> tuple[Tree, Tree]:
        def move(x: Tree) -> Tree:
            one = lambda key, x: roll.step(jax.random.fold_in(key, index), x, index)
            keep = lambda a, b: jnp.where((index >= depths).reshape(-1, *[1] * (a.ndim - 1)), a, b)
            return jax.tree.map(keep, jax.vmap(one)(keys, x), x)

        new = jax.lax.cond(index >= jnp.min(depths), move, lambda x: x, x)
        return new, new

    last, path = jax.lax.scan(body, x, jnp.arange(length))
    return path, jax.vmap(roll.reward)(last)


_roll = jax.jit(_rolled, static_argnums=0)


def _softmax(logs: np.ndarray) -> np.ndarray:
    top = logs.max()
    # where all are without hope none is better
    weights = np.ones_like(logs) if top == -np.inf else np.exp(logs - top)
    return weights / weights.sum()


def _log_mean(logs: np.ndarray) -> float:
    top = logs.max()
    return top if top == -np.inf else float(top + np.log(np.mean(np.exp(logs - top))))
