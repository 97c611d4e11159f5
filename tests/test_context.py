"""Networks told of a history: silent at first, deaf to what is absent, and to the order where they are to be."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffjax import grids, networks, predictions, processes, smc, solvers
from diffjax.networks import layers

SHAPE, K, WORDS = (4, 8, 1), 3, 5
LENGTH = 2


def plain(condition, **options):
    rngs = nnx.Rngs(0)
    return networks.DiT(SHAPE, width=8, depth=2, heads=2, ratio=1.0, condition=condition, rngs=rngs, **options)


def module(ordered=True, depth=2, feedback=None, **options):
    feedback = networks.label(WORDS) if feedback is None else feedback
    small: dict[str, Any] = dict(patch=4, width=8, heads=2, ratio=1.0, depth=depth, ordered=ordered)
    context = networks.ContextTransformer(SHAPE, feedback, LENGTH, 6, **small, rngs=nnx.Rngs(1))
    return networks.InContext(plain((networks.label(3), networks.tokens(6)), **options), context)


def shaken(params, seed=0):
    """All parameters random, also those that start at zero."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return tree.unflatten([jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


def history(seed=0, present=(1, 1, 1)):
    rng = np.random.default_rng(seed)
    images = jnp.asarray(rng.normal(size=(K, *SHAPE)), jnp.float32)
    said = jnp.asarray(rng.permutation(WORDS)[:K, None] + np.arange(LENGTH), jnp.int32) % WORDS
    return smc.History(images, said, jnp.asarray(present, jnp.float32))


X = jnp.asarray(np.random.default_rng(9).normal(size=SHAPE), jnp.float32)


@functools.cache
def made(ordered=True):
    apply, params = networks.functional(module(ordered))
    return jax.jit(apply), params, shaken(params)


@pytest.mark.paper(
    "Reflect-DiT: Inference-Time Scaling for Text-to-Image Diffusion Transformers via In-Context Reflection"
)
def test_it_begins_as_the_network_that_was_trained():
    """A trained network of the same size, without cross-attention, grafted in: the same numbers, whatever is told."""
    run, params, _ = made()
    base, trained = networks.functional(plain(networks.label(3)))
    trained = shaken(trained, 1)
    begun = networks.grafted(params, {"network": trained})
    wanted = jax.jit(base)(trained, X, 0.3, 1)
    assert np.abs(wanted).max() > 0.1
    for told in (history(), history(1, (0, 0, 1)), history(2, (0, 0, 0))):
        np.testing.assert_allclose(run(begun, X, 0.3, (1, told)), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="kernel does not fit"):
        networks.grafted(params, {"network": {"stem": {"kernel": jnp.zeros((3, 3))}}})
    with pytest.raises(ValueError, match="other does not fit"):
        networks.grafted(params, {"other": jnp.zeros(2)})


@pytest.mark.parametrize("ordered", [True, False])
def test_what_is_absent_is_not_seen(ordered):
    """No entry: the network that is told nothing.  Some absent: their arrays do not matter, those of others do."""
    run, _, params = made(ordered)
    deaf = run(params, X, 0.3, (1, None))
    np.testing.assert_allclose(run(params, X, 0.3, (1, history(0, (0, 0, 0)))), deaf, rtol=1e-5, atol=1e-5)
    two, other = history(0, (0, 1, 1)), history(5)
    hidden = smc.History(two.x.at[0].set(other.x[0]), two.feedback.at[0].set(other.feedback[0]), two.present)
    seen = smc.History(two.x.at[1].set(other.x[1]), two.feedback, two.present)
    told = run(params, X, 0.3, (1, two))
    np.testing.assert_array_equal(run(params, X, 0.3, (1, hidden)), told)
    for different in (run(params, X, 0.3, (1, seen)), deaf, run(params, X, 0.3, (2, two))):
        assert np.abs(different - told).max() > 1e-2


@pytest.mark.paper(
    "Reflect-DiT: Inference-Time Scaling for Text-to-Image Diffusion Transformers via In-Context Reflection"
)
def test_the_order_of_entries_and_what_was_said_of_which():
    """Permuted entries: the same without age, another with it.  Feedback exchanged between entries: another."""
    told, order = history(), np.array([2, 0, 1])
    turned = jax.tree.map(lambda leaf: leaf[order], told)
    exchanged = told._replace(feedback=told.feedback[order])
    for ordered in (True, False):
        run, _, params = made(ordered)
        first, second, third = (run(params, X, 0.3, (1, each)) for each in (told, turned, exchanged))
        assert (np.abs(first - second).max() < 1e-5) == (not ordered)
        assert np.abs(first - third).max() > 1e-3


def test_what_is_absent_may_be_anything():
    """NaN in an absent image and words outside of the vocabulary, in the network and in its gradient."""
    run, _, params = made()
    two = history(0, (0, 1, 1))
    broken = smc.History(two.x.at[0].set(jnp.nan), two.feedback.at[0].set(WORDS + 7), two.present)
    both = jax.jit(jax.value_and_grad(lambda params, told: jnp.sum(run(params, X, 0.3, (1, told)))))
    for found, wanted in zip(*(jax.tree.leaves(both(params, told)) for told in (broken, two)), strict=True):
        assert np.isfinite(wanted).all()
        np.testing.assert_array_equal(found, wanted)


def joint():
    """A network that reads tokens and the image in one attention."""
    condition, rngs = (networks.label(3), networks.tokens(6)), nnx.Rngs(0)
    return networks.MMDiT(SHAPE, width=8, depth=1, heads=2, ratio=1.0, condition=condition, rngs=rngs)


def test_a_mask_is_leaving_out():
    """Attention to the tokens of the mask is attention to these tokens alone."""
    options = layers.linear_options(jnp.float32, nnx.Rngs(0))
    attention = layers.Attention(8, 2, **options)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)
    kept = np.array([0, 2, 3])
    mask = jnp.zeros((5, 5), bool).at[:, kept].set(True)
    np.testing.assert_allclose(attention(x, mask=mask)[kept], attention(x[kept]), rtol=1e-5, atol=1e-6)
    assert np.abs(attention(x) - attention(x, mask=mask)).max() > 1e-3


def test_it_is_built_from_its_record():
    """JSON there and back gives an equal network; features as feedback; a network without other conditions."""
    apply, params = networks.functional(module(feedback=networks.tokens(2), depth=1))
    record: Any = networks.architecture(apply)
    again, _ = networks.functional(networks.build(record, nnx.Rngs(3)))
    assert networks.architecture(again) == record and record["context"]["feedback"] == [["tokens", 2]]
    told = history()._replace(feedback=jnp.ones((K, LENGTH, 2)))
    out = jax.eval_shape(lambda p: again(p, X, 0.3, (1, told), features=True), params)
    assert out[0].shape == SHAPE and out[1].shape == (2, 8, 8)
    context = networks.ContextTransformer(SHAPE, networks.label(2), 1, 6, width=8, heads=2, depth=0, rngs=nnx.Rngs(0))
    alone, params = networks.functional(networks.InContext(plain(networks.tokens(6)), context))
    told = smc.History(told.x, jnp.zeros((K, 1), int), told.present)
    assert jax.eval_shape(lambda p: alone(p, X, 0.3, (told,)), params).shape == SHAPE


def test_reflection_runs_with_it():
    """`smc.reflect` makes the histories that it is told: the label in ``tell``; shapes only."""
    apply, params = networks.functional(module())

    def run(key, params):
        denoise = predictions.velocity(processes.flow()).decode(apply, params, (1, history()))
        judge = lambda x: (jnp.array([0, 1]) + jnp.int32(x[0, 0, 0] > 0), -jnp.sum(x**2))
        tell, grid = lambda history: (jnp.int32(1), history), grids.uniform(processes.flow(), 2)
        return smc.reflect(key, denoise, solvers.ddim(), grid, SHAPE, judge=judge, rounds=2, context=K, tell=tell)

    found = jax.eval_shape(run, jax.random.key(0), params)
    assert found.samples.shape == (2, *SHAPE) and found.feedback.shape == (2, LENGTH)


@pytest.mark.parametrize(
    "wrong, match",
    [
        (lambda: module(feedback=networks.vector(3)), "feedback"),
        (lambda: networks.InContext(plain(networks.label(3)), module().context), "tokens"),
        (lambda: networks.InContext(joint(), module().context), "cross-attention"),
        (lambda: networks.ImageEncoder((4, 8), rngs=nnx.Rngs(0)), "shape"),
        (lambda: networks.ImageEncoder((4, 6, 1), patch=4, rngs=nnx.Rngs(0)), "patch"),
        (lambda: networks.ImageEncoder((4, 8, 1), width=6, heads=2, rngs=nnx.Rngs(0)), "width"),
        (lambda: module().context(history()._replace(present=jnp.ones(2)), 0.3), "present"),
        (lambda: module().context(history()._replace(feedback=jnp.ones((K, LENGTH))), 0.3), "integers"),
    ],
)
def test_bad_input(wrong, match):
    with pytest.raises(ValueError, match=match):
        wrong()
