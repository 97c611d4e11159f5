"""The common contract for the functions of `diffjax.inverse` that the contract test cannot make by itself.

They are of more than one sample, measurement or kind of denoiser: each has its run here.  Under a process with
coordinates those that draw are compared with the same problem put into standard coordinates by hand.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import coordinates, grids, guidance, inverse, oracles, predictions, processes, sample, solvers
from diffjax.levels import CLEAN
from tests.test_inverse_contract import DRIVERS, PRIOR, SHAPE, Y

FLOW, STEPS = processes.flow(), 3
GRID = grids.uniform(FLOW, STEPS, start=0.9)
SEEN = {"a": np.array([True, False, True]), "b": np.array(True)}
START = {"a": jnp.array([0.3, -1.0, 0.8]), "b": jnp.array(0.5)}
ON_THE_HOST = {"expectation_maximisation", "fit_gaussian"}  # a loop of compiled rounds, and NumPy: tested by themselves
PLAIN = oracles.gaussian(np.zeros(3), np.array([1.0, 2.0, 0.5]))


def seen(y):
    return inverse.measurement(inverse.mask(SEEN), y, 0.3)


def active(y, key):
    reveal = lambda index: jnp.concatenate([y["a"], y["b"], y["a"][:1]])[index]
    out = inverse.active(key, PRIOR, solvers.ddim(), GRID, reveal, SHAPE, std=0.3, at=(0, 1), particles=2)
    assert jax.tree.structure(out.seen) == jax.tree.structure(SHAPE, is_leaf=lambda s: isinstance(s, tuple))
    return out.x, out.nfe, 2 * (STEPS + 2), out.failed_at


def enkg(y, key):
    out = inverse.enkg(key, PRIOR, seen(y), GRID, SHAPE, particles=4, steps=2)
    return out.x, out.nfe, 4 * STEPS * (1 + 2), out.failed_at


def d_flow(y, key):
    x = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(key, leaf.shape), START)
    cost = lambda x: -seen(y).log_likelihood(x)
    out = inverse.d_flow(PRIOR, solvers.ddim(), GRID, x, cost, iterations=1)
    return out.x, out.nfe, STEPS * (2 * 1 + 1), jnp.where(jnp.isfinite(out.costs).all(), -1, 0)


def mixed_observation(y, key):
    told = {"a": jnp.concatenate([y["a"], y["a"][:1]]), "b": y["b"][0]}
    weights = {"a": np.array([1.0, 1.0, 0.0]), "b": np.array(1.0)}
    mixed = inverse.mixed_observation(
        PRIOR, inverse.measurement(inverse.diagonal(weights), told, 0.3), lambda level: 0.4
    )
    return sampled(key, mixed, START, STEPS)


def tractable_steering(y, key):
    law = oracles.hidden_markov(np.ones(2) / 2, np.full((2, 2), 0.5), np.array([-1.0, 1.0]), np.array([0.3, 0.3]), 3)
    told = inverse.measurement(inverse.mask(SEEN["a"]), y["a"], 0.3)
    return sampled(key, inverse.tractable_steering(PLAIN, law, told), START["a"], STEPS)


def p2l(y, key):
    network = lambda params, z, t, c: jax.tree.map(lambda leaf: 0.5 * leaf + c, z)
    denoise = predictions.data(FLOW).decode(network, None, jnp.array(0.1))
    return sampled(key, inverse.p2l(denoise, seen(y), iterations=2, every=2), START, STEPS * 3)


def thompson(y, key):
    def draw(key, told):
        told = guidance.tilted(PLAIN, inverse.mmps(told))
        return sample(key, told, solvers.ddim(), GRID, (3,)).x

    out = inverse.thompson(key, draw, lambda key, arm: y["a"][arm % 2], 3, 2, std=0.5)
    return out.rewards, jnp.asarray(out.arms.shape[0]), 2, jnp.asarray(-1)  # a draw a round


def draw_signal(y, key):
    network = inverse.through(lambda params, x, t, c: {"s": x * (1 - t) + c[0]}, lambda s, view: s["s"] * view)
    denoise = predictions.data(FLOW).decode(network, None, (y["b"][0], jnp.array(2.0)))
    found, out = inverse.draw_signal(key, denoise, solvers.ddim(), GRID, x=START["a"])
    again = inverse.signal(denoise, START["a"], jax.tree.map(lambda leaf: leaf[0], GRID.t))
    return (found, out.x, again), out.nfe, STEPS, out.failed_at


def sampled(key, denoise, x, expected):
    out = sample(key, denoise, solvers.ddim(), GRID, x=x)
    return out.x, out.nfe, expected, out.failed_at


RUNS = [active, enkg, d_flow, mixed_observation, tractable_steering, p2l, thompson, draw_signal]


def test_every_driver_has_a_run():
    assert {run.__name__ for run in RUNS} | ON_THE_HOST | {"signal"} == DRIVERS  # signal is in draw_signal's


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_contract(run):
    """Trees, jit of vmap over keys and measurements, calls counted, and y is heeded."""
    keys, ys = jax.random.split(jax.random.key(1), 2), jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 0.7]), Y)
    same = jnp.stack([keys[0], keys[0]])
    expected = []

    def one(y, key):
        x, nfe, calls, failed = run(y, key)
        expected.append(calls)
        return x, nfe, failed

    x, nfe, failed = jax.jit(jax.vmap(one))(ys, same)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(x))
    assert nfe.tolist() == [expected[0]] * 2 and failed.tolist() == [-1, -1]
    assert max(float(np.max(np.abs(leaf[0] - leaf[1]))) for leaf in jax.tree.leaves(x)) > 1e-4


# --- coordinates ------------------------------------------------------------------------------------------------------

CENTRE = np.array([0.5, -1.0, 2.0])
BASIS = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
A, SIGHT = np.array([[1.0, 0.3, -0.4], [0.0, 1.0, 0.5]]), np.array([1.0, -0.5])


def test_enkg_under_coordinates_is_the_problem_in_standard_ones(x64):
    """Turned and shifted data: A (c + Q z) = y by hand, with the same keys, to rounding."""
    process = processes.changed(FLOW, coordinates.chain(coordinates.shifted(CENTRE), coordinates.orthogonal(BASIS)))
    options: Any = dict(particles=6, steps=2, dtype=jnp.float64)
    with_, by_hand = (grids.uniform(p, STEPS, start=0.9) for p in (process, FLOW))
    leave = lambda z: process.leave(z, CLEAN)
    slope = np.stack([np.asarray(leave(e) - leave(jnp.zeros(3))) for e in jnp.eye(3)], 1)
    inside = inverse.measurement(inverse.matrix(A @ slope), SIGHT - A @ np.asarray(leave(jnp.zeros(3))), 0.3)
    out = inverse.enkg(
        jax.random.key(2), PLAIN, inverse.measurement(inverse.matrix(A), SIGHT, 0.3), with_, (3,), **options
    )
    plain = inverse.enkg(jax.random.key(2), PLAIN, inside, by_hand, (3,), **options)
    np.testing.assert_allclose(out.x, np.asarray(plain.x) @ slope.T + np.asarray(leave(jnp.zeros(3))), atol=1e-10)
    assert np.abs(slope - np.eye(3)).max() > 0.1 and int(out.nfe) == int(plain.nfe)


def test_active_under_coordinates_is_the_problem_in_standard_ones(x64):
    """Entries of data in other units and with another origin: the same choices, and particles to rounding."""
    size, truth = 2.5, np.array([1.4, 0.2, 3.0])
    process = processes.changed(FLOW, coordinates.chain(coordinates.shifted(CENTRE), coordinates.scaled(size)))
    leave = lambda z: process.leave(z, CLEAN)
    zero = np.asarray(leave(jnp.zeros(3)))
    assert np.allclose(leave(jnp.ones(3)) - zero, size)
    options: Any = dict(at=(0, 1), particles=4, dtype=jnp.float64)
    with_, by_hand = (grids.uniform(p, STEPS, start=0.9) for p in (process, FLOW))
    solver, key = solvers.ddim(eta=1.0), jax.random.key(3)
    reveal = lambda index: jnp.asarray(truth)[index]
    inside = lambda index: jnp.asarray((truth - zero) / size)[index]
    out = inverse.active(key, PLAIN, solver, with_, reveal, (3,), std=0.4, **options)
    plain = inverse.active(key, PLAIN, solver, by_hand, inside, (3,), std=0.4 / size, **options)
    np.testing.assert_allclose(out.x, size * np.asarray(plain.x) + zero, atol=1e-9)
    assert out.order.tolist() == plain.order.tolist() and out.seen.tolist() == plain.seen.tolist()


def test_exact_twists_of_data_are_refused_under_coordinates(x64):
    """As measurements of data are; those of the standard state give the posterior there."""
    process = processes.changed(FLOW, coordinates.chain(coordinates.shifted(CENTRE), coordinates.orthogonal(BASIS)))
    grid, told = grids.uniform(process, STEPS, start=0.9), inverse.measurement(inverse.matrix(A), SIGHT, 0.3)
    run = lambda denoise: sample(jax.random.key(0), denoise, solvers.ddim(), grid, (3,), dtype=jnp.float64)
    for wrong in (
        guidance.tilted(PLAIN, inverse.exact(PLAIN, told)),
        inverse.tractable_steering(PLAIN, PLAIN, told),
        guidance.tilted(PLAIN, inverse.mmps(told)),
    ):
        with pytest.raises(ValueError, match="under"):
            run(wrong)
    under = told.under(process)
    found = run(guidance.tilted(PLAIN, inverse.exact(PLAIN, under)))
    np.testing.assert_allclose(found.x, run(inverse.posterior(PLAIN, under)).x, atol=1e-8)
