"""The multimodal transformer: its block derived anew, and what its two streams share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffjax import networks
from diffjax.networks.mmdit import JointBlock

WIDTH, HEADS = 8, 2


def _shaken(module, seed=0):
    """The module with all parameters random, also those that start at zero or one."""
    graph, params = nnx.split(module)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return nnx.merge(
        graph, tree.unflatten([jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])
    )


def _norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def _linear(layer, x):
    return x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...], np.float64)


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _by_hand(streams, tokens, embedding):
    """The block, token kind by token kind and head by head, in float64."""
    projected, kept = [], []
    for stream, h in zip(streams, tokens, strict=True):
        shift, scale, *rest = np.split(_linear(stream.modulate, embedding), 2 if stream.silent else 6)
        query, key, value = np.split(_linear(stream.qkv, _norm(h) * (1 + scale) + shift), 3, axis=1)
        heads = []
        for head in np.split(np.arange(WIDTH), HEADS):
            q, k = query[:, head], key[:, head]
            q = q / np.sqrt(np.mean(q**2, axis=1, keepdims=True) + 1e-6) * np.asarray(stream.query_scale[...])
            k = k / np.sqrt(np.mean(k**2, axis=1, keepdims=True) + 1e-6) * np.asarray(stream.key_scale[...])
            heads.append((q, k, value[:, head]))
        projected.append(heads)
        kept.append(rest)
    attended = []
    for head in range(HEADS):
        q, k, v = (np.concatenate([heads[head][part] for heads in projected]) for part in range(3))
        scores = np.exp(q @ k.T / np.sqrt(WIDTH / HEADS))
        attended.append(scores / scores.sum(1, keepdims=True) @ v)
    attended = np.split(np.concatenate(attended, axis=1), [len(tokens[0])])
    found = []
    for stream, h, seen, rest in zip(streams, tokens, attended, kept, strict=True):
        if not stream.silent:
            gate1, shift2, scale2, gate2 = rest
            h = h + gate1 * _linear(stream.out, seen)
            h = h + gate2 * _linear(stream.mlp_out, _gelu(_linear(stream.mlp_in, _norm(h) * (1 + scale2) + shift2)))
        found.append(h)
    return found


@pytest.mark.paper("Scaling Rectified Flow Transformers for High-Resolution Image Synthesis")
@pytest.mark.parametrize("last", [False, True])
def test_block_against_its_equations(last):
    block = _shaken(JointBlock(WIDTH, HEADS, 2.0, last, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    image, text, embedding = rng.normal(size=(5, WIDTH)), rng.normal(size=(3, WIDTH)), rng.normal(size=WIDTH)
    found = jax.jit(block)(*(jnp.asarray(part, jnp.float32) for part in (image, text, embedding)))
    expected = _by_hand((block.image, block.text), (image, text), embedding)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)
    if last:
        np.testing.assert_array_equal(found[1], np.asarray(text, np.float32))


@functools.cache
def _network():
    condition = (networks.label(3), networks.tokens(6))
    module = networks.MMDiT((4, 4, 1), width=WIDTH, depth=2, heads=HEADS, condition=condition, rngs=nnx.Rngs(0))
    return networks.functional(module)


@pytest.mark.paper("Scaling Rectified Flow Transformers for High-Resolution Image Synthesis")
def test_network_of_an_image_a_class_and_a_text():
    """Zero at first; then text, class and time matter, the order of the text does not; rebuilt from its record."""
    apply, params = _network()
    rng = np.random.default_rng(2)
    x, words = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((4, 4, 1), (3, 6)))
    run = jax.jit(apply)
    np.testing.assert_array_equal(run(params, x, 0.3, (1, words)), 0.0)
    leaves, tree = jax.tree.flatten(params)
    moved = tree.unflatten([leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])
    base = run(moved, x, 0.3, (1, words))
    assert base.shape == (4, 4, 1) and base.std() > 0.1
    for other in ((moved, x, 0.3, (1, words + 0.5)), (moved, x, 0.3, (2, words)), (moved, x, 0.4, (1, words))):
        assert np.abs(run(*other) - base).max() > 1e-3
    np.testing.assert_allclose(run(moved, x, 0.3, (1, words[::-1])), base, atol=1e-5)
    rebuilt, _ = networks.functional(networks.build(networks.architecture(apply), nnx.Rngs(1)))
    assert rebuilt == apply
    with pytest.raises(ValueError, match="exactly one"):
        networks.MMDiT((4, 4, 1), condition=networks.label(3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"patch=3 must divide H=4"):
        networks.MMDiT((4, 4, 1), patch=3, condition=networks.tokens(6), rngs=nnx.Rngs(0))
