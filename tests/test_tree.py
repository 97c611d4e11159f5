"""Tree sampling against the exact soft values and law of a small chain, and on a Gaussian."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, oracles, processes, smc, solvers

# three states, three steps; the best end is rare, and rare from most states
MOVES = np.array(
    [
        [[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]],
        [[0.8, 0.15, 0.05], [0.3, 0.6, 0.1], [0.1, 0.3, 0.6]],
        [[0.9, 0.08, 0.02], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]],
    ]
)
REWARD = np.array([0.0, 1.0, 3.0])


def step(key, x, depth):
    return jax.random.categorical(key, jnp.log(jnp.asarray(MOVES, jnp.float32))[depth, x]).astype(jnp.int32)


def reward(x):
    return jnp.asarray(REWARD, jnp.float32)[x]


def _exact(temperature=1.0):
    """Soft values at every depth and state, by the Bellman recursion; the law of the end."""
    values = [REWARD / temperature]
    for move in MOVES[::-1]:
        values.append(np.log(move @ np.exp(values[-1])))
    ends = MOVES[0][0] @ MOVES[1] @ MOVES[2] * np.exp(REWARD / temperature)
    return values[::-1], ends / ends.sum()


@pytest.fixture(scope="module")
def tree():
    return _grown(3, 1500, batch=50)


def _grown(seed, rollouts, **options):
    return smc.grow_tree(jax.random.key(seed), step, jnp.int32(0), 3, reward, rollouts=rollouts, **options)


def _estimates(seeds, **options):
    """Z of many trees, and of each the law of its leaves times Z."""
    trees = [_grown(seed, 60, batch=20, **options) for seed in range(seeds)]
    z = np.exp([tree.values[0] for tree in trees])
    leaves = [smc.draw_leaves(jax.random.key(seed), tree, 20) for seed, tree in enumerate(trees)]
    laws = [np.bincount(tree.states[own], minlength=3) / 20 for tree, own in zip(trees, leaves, strict=True)]
    return z, z[:, None] * np.array(laws)


@pytest.mark.paper("Diffusion Tree Sampling: Scalable inference-time alignment of diffusion models")
def test_soft_values_and_the_tilted_law_of_a_finite_chain():
    """Unbiased where the tree's shape tells nothing: four standard errors over many trees.  As published Z is low."""
    values, law = _exact()
    true = np.exp(values[0][0])
    z, ends = _estimates(250, uniform=1.0)
    error = 4 / np.sqrt(z.size)
    assert abs(z.mean() - true) < error * z.std()
    assert (np.abs(ends.mean(0) - true * law) < error * ends.std(0)).all()
    published, _ = _estimates(100)
    assert published.mean() < true - 4 * published.std() / 10
    # width without end is importance sampling
    wide, _ = _estimates(100, power=1.0)
    assert abs(wide.mean() - true) < 4 * wide.std() / 10


@pytest.mark.paper("Diffusion Tree Sampling: Scalable inference-time alignment of diffusion models")
def test_a_larger_tree_is_nearer_to_the_tilted_law(tree):
    """The published choice of children: nearer than a small tree, and that nearer than the chain."""
    _, law = _exact()
    leaves = lambda tree: np.bincount(tree.states[smc.draw_leaves(jax.random.key(5), tree, 500)], minlength=3) / 500
    off = lambda found: np.abs(found - law).sum()
    small = np.mean([off(leaves(_grown(seed, 12))) for seed in range(8)])
    assert off(leaves(tree)) < small < off(MOVES[0][0] @ MOVES[1] @ MOVES[2])


def test_values_are_the_recursion_of_the_tree(tree):
    """Every backed-up value is the logarithm of the mean over the children, and nodes are counted."""
    for node in np.flatnonzero(tree.depths < 3)[:300]:
        own = np.flatnonzero(tree.parents == node)
        np.testing.assert_allclose(np.exp(tree.values[node]), np.mean(np.exp(tree.values[own])), rtol=1e-12)
        assert tree.depths[own].tolist() == [tree.depths[node] + 1] * len(own)
    ends = tree.depths == 3
    np.testing.assert_array_equal(tree.values[ends], REWARD[tree.states[ends]])
    assert tree.visits[0] == 1500 and np.isnan(tree.rewards[~ends]).all()
    assert tree.steps.tolist() == [(tree.depths == depth).sum() for depth in (1, 2, 3)]


VP = processes.vp()
GRID = grids.log_snr(VP, 8)
LAW = oracles.gaussian(np.zeros(2), np.ones(2))


def first(x0):
    return 1.5 * x0[0]


@pytest.mark.paper("Diffusion Tree Sampling: Scalable inference-time alignment of diffusion models")
def test_a_tilted_gaussian_and_the_search():
    """Mean and log Z of the tilt of the discretised chain; the greedy tree finds more than as many plain samples."""
    options = dict(reward=first, batch=20)
    ancestral = solvers.ancestral()
    draw = lambda seed: smc.tree_sampling(
        jax.random.key(seed), LAW, ancestral, GRID, (2,), rollouts=60, samples=50, uniform=1.0, **options
    )
    found = [draw(seed) for seed in range(60)]
    assert all(each.nfe == each.tree.steps[1:].sum() < 60 * 8 for each in found)  # what is known is not made again
    # the chain is Gaussian: its variance, by the kernels' linear recursion in float64
    rows, variance = jax.tree.map(np.asarray, ancestral.plan(GRID)), float(GRID.start.sigma) ** 2
    for i in range(8):
        row = jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i], jnp.float32), rows)
        apply = lambda x, row=row: ancestral.kernel(x, LAW(x, row.t), row)
        mean, std = apply(jnp.array([1.0, 0.0]))
        variance = float(mean[0]) ** 2 * variance + float(np.mean(std)) ** 2
    z = np.exp([each.log_z for each in found])
    true = np.exp(1.5**2 * variance / 2)
    means = z[:, None] * np.array([each.x.mean(0) for each in found])
    assert abs(z.mean() - true) < 4 * z.std() / np.sqrt(60)
    expected = true * np.array([1.5 * variance, 0.0])
    assert (np.abs(means.mean(0) - expected) < 4 * means.std(0) / np.sqrt(60)).all()
    best = smc.tree_search(jax.random.key(2), LAW, ancestral, GRID, (2,), rollouts=400, exploration=0.5, **options)
    assert best.reward == best.rewards.max()
    # the largest of 400 standard normals is 2.97 in the mean, with standard deviation 0.35
    assert float(best.reward) / 1.5 > (2.97 + 0.35) * np.sqrt(variance)


def test_rewards_of_minus_infinity_are_reported():
    """A branch without hope is left, not a NaN; where all are, log Z says so."""
    grown = lambda only: smc.grow_tree(
        jax.random.key(0), step, jnp.int32(0), 3, lambda x: jnp.where(x == only, 0.0, -jnp.inf), rollouts=40, batch=8
    )
    some, none = grown(2), grown(7)
    assert np.isfinite(some.values[0]) and not np.isnan(some.values).any()
    assert (some.states[smc.draw_leaves(jax.random.key(1), some, 50)] == 2).all()
    assert (none.values == -np.inf).all()
    assert (none.depths[smc.draw_leaves(jax.random.key(1), none, 20)] == 3).all()


def test_bad_input():
    plan = dict(reward=first, samples=1, rollouts=2)
    with pytest.raises(ValueError, match="draws noise"):
        smc.tree_sampling(jax.random.key(0), LAW, solvers.ddim(), GRID, (2,), **plan)
    with pytest.raises(ValueError, match="power"):
        smc.grow_tree(jax.random.key(0), step, jnp.int32(0), 3, reward, rollouts=2, power=1.5)
