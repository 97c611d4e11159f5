"""Hooks of networks, and guidance away from perturbed attention, where the guided law has a closed form."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffjax import grids, guidance, networks, predictions, processes, sample, solvers
from diffjax.guidance.hooks import with_features
from diffjax.networks import layers

IMAGE = (4, 4, 1)
DIT = {"width": 8, "depth": 2, "heads": 2, "condition": networks.label(3)}
PROCESS = processes.flow()
LEVEL = PROCESS.level(0.4)
TOKENS, SHARED, OWN = 6, 2.0, 0.25  # x_i = m + n_i: variances of what all tokens share and of what is their own


def shaken(params):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([p + 0.1 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)])


@pytest.fixture(scope="module")
def nets():
    rngs = nnx.Rngs(0)
    made = {
        "dit": networks.DiT(IMAGE, **DIT, rngs=rngs),
        "unet": networks.UNet(IMAGE, channels=(4, 8), groups=2, heads=2, attention=(4,), rngs=rngs),
        "mlp": networks.MLP(3, width=8, depth=2, rngs=rngs),
    }
    return {name: (apply, shaken(params)) for name, (apply, params) in
            ((name, networks.functional(net)) for name, net in made.items())}  # fmt: skip


def test_the_map_of_each_head_is_mixed_with_the_identity():
    """Against attention maps that are formed, mixed and multiplied in NumPy."""
    module = layers.Attention(8, 2, rngs=nnx.Rngs(0), dtype=jnp.float32)
    x = np.asarray(jax.random.normal(jax.random.key(0), (5, 8)))
    u = np.array([0.0, 0.7], np.float32)
    read = lambda linear: x @ np.asarray(linear.kernel[...]) + np.asarray(linear.bias[...])
    query, (key, value) = read(module.query), np.split(read(module.key_value), 2, -1)
    heads = []
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        scores = np.exp(query[:, part] @ key[:, part].T / 2)
        mapped = (1 - u[h]) * scores / scores.sum(-1, keepdims=True) + u[h] * np.eye(5)
        heads.append(mapped @ value[:, part])
    expected = np.concatenate(heads, -1) @ np.asarray(module.out.kernel[...]) + np.asarray(module.out.bias[...])
    np.testing.assert_allclose(module(jnp.asarray(x), perturb=jnp.asarray(u)), expected, rtol=1e-4, atol=1e-5)


def test_hooks_of_networks(nets):
    """u = 0 changes nothing, each layer and head counts, and hidden states come with the same output."""
    shapes = {"dit": (2, 2), "unet": (3, 2)}
    x = jax.random.normal(jax.random.key(0), IMAGE)
    for name, (apply, params) in nets.items():
        state = x if name != "mlp" else x.reshape(-1)[:3]
        condition = jnp.int32(1) if name == "dit" else None
        call = jax.jit(lambda u, apply=apply, params=params, x=state, c=condition: apply(
            params, x, 0.3, c, features=True, **({} if u is None else {"perturb": u})))  # fmt: skip
        plain, features = call(None)
        count = {"dit": (2, 4, 8), "mlp": (2, 8)}
        if name == "unet":
            assert [f.shape for f in features] == [(4, 4, 4), (2, 2, 8), (2, 2, 8), (2, 2, 8), (2, 2, 8), (4, 4, 4)]
        else:
            assert features.shape == count[name]
        if name == "mlp":
            np.testing.assert_allclose(plain, apply(params, state, 0.3), atol=1e-6)
            continue
        assert networks.attention_heads(apply) == shapes[name]
        zero = jnp.zeros(shapes[name])
        np.testing.assert_allclose(call(zero)[0], plain, atol=1e-6)
        one_by_one = [np.abs(call(zero.at[i, j].set(1.0))[0] - plain).max() for i, j in np.ndindex(*shapes[name])]
        assert np.min(one_by_one) > 1e-6
        with pytest.raises(ValueError, match="layers, heads"):
            apply(params, state, 0.3, condition, perturb=jnp.zeros((7, 2)))
    apply, params = nets["dit"]
    looped = networks.functional(networks.DiT(IMAGE, **DIT, scan=True, rngs=nnx.Rngs(0)))[0]
    u = jnp.array([[0.0, 1.0], [0.4, 0.0]])
    both = [jax.jit(lambda f=f, p=p: f(p, x, 0.3, jnp.int32(1), perturb=u, features=True))()
            for f, p in ((apply, params), (looped, networks.stacked(params)))]  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *both)
    with pytest.raises(ValueError, match="DiT or a UNet"):
        networks.attention_heads(nets["mlp"][0])
    denoise = predictions.flow(PROCESS).decode(*nets["mlp"])
    x0, features = with_features(denoise, x.reshape(-1)[:3], LEVEL)
    np.testing.assert_allclose(x0, denoise(x.reshape(-1)[:3], LEVEL), atol=1e-6)
    assert features.shape == (2, 8)


def test_perturbed_attention_of_a_transformer(nets):
    """Scale 1 is the model, scales are affine, layers are rows, and classifier-free guidance is a third branch."""
    prediction = predictions.flow(PROCESS)
    denoise = prediction.decode(*nets["dit"], condition=jnp.int32(1))
    x = jax.random.normal(jax.random.key(3), IMAGE)
    heads = jnp.array([[0.0, 1.0], [0.3, 0.0]])

    @jax.jit
    def run(heads, scale, w):
        guided = guidance.perturbed_attention(denoise, heads, scale)
        both = guidance.perturbed_attention(denoise, heads, scale, null=3, condition_scale=w)
        free = guidance.classifier_free(denoise, 3, w)
        bad = guidance.perturbed(denoise, heads)
        return guided(x, LEVEL), both(x, LEVEL), free(x, LEVEL), denoise(x, LEVEL), bad(x, LEVEL)

    *_, plain, bad = run(heads, 2.0, 1.0)
    assert np.abs(bad - plain).max() > 1e-4
    np.testing.assert_allclose(run(heads, 1.0, 1.0)[0], plain, atol=1e-6)
    one, both, free, *_ = run(heads, 3.5, 2.0)
    np.testing.assert_allclose(one, bad + 3.5 * (plain - bad), atol=1e-5)
    np.testing.assert_allclose(both, free + 2.5 * (plain - bad), atol=1e-5)
    np.testing.assert_allclose(run(0 * heads, 3.5, 2.0)[1], free, atol=1e-5)
    rows = jax.jit(lambda u: guidance.perturbed_attention(denoise, u, 2.0)(x, LEVEL))(jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(rows, run(jnp.array([[1.0, 1.0], [0.0, 0.0]]), 2.0, 1.0)[0], atol=1e-6)
    counts = [guidance.perturbed_attention(denoise, heads, 2.0, null=n).evaluations(LEVEL) for n in (None, 3)]
    assert counts == [2, 3]


def coherent(params, x, t, condition=None, perturb=None):
    """The exact x_0 of tokens with a shared mean, as attention of weights ``params`` (layers, heads) that sum to 1."""
    alpha, sigma = 1 - t, t
    gain = lambda c: alpha * c / (alpha**2 * c + sigma**2)
    own, all = gain(OWN), gain(OWN + TOKENS * SHARED)
    u = jnp.zeros_like(params) if perturb is None else perturb
    mixed = jnp.sum(params * (1 - u)) * x.mean() + jnp.sum(params * u) * x  # (1 - u) A V + u V, A uniform
    return own * x + (all - own) * mixed


def gains(scale, u, times):
    """What 20 DDIM steps multiply the shared and a token's own part of the start with, in float64."""
    shared = own = 1.0
    for t, s in itertools.pairwise(times):
        gain = lambda c, a=1 - t, b=t: a * c / (a**2 * c + b**2)
        low, high = gain(OWN), gain(OWN + TOKENS * SHARED)
        bad = low + (high - low) * u
        step = lambda d, t=t, s=s: s / t + ((1 - s) - (1 - t) * s / t) * d
        shared, own = shared * step(high), own * step(bad + scale * (low - bad))
    return shared, own


@pytest.mark.paper("Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance")
def test_perturbed_attention_adds_structure_without_a_condition():
    """Tokens that share a mean: going away from identity attention makes them agree, by the closed form of its law."""
    denoise = predictions.data(PROCESS).decode(coherent, jnp.ones((1, 1)))
    times = np.linspace(1, 0, 21)
    grid = grids.times(PROCESS, times)
    z = jax.random.normal(jax.random.key(0), (TOKENS,))
    run = jax.jit(lambda scale, u: sample(
        jax.random.key(1), guidance.perturbed_attention(denoise, u * jnp.ones((1, 1)), scale), solvers.ddim(), grid, x=z
    ))  # fmt: skip
    own = []
    for scale, u in ((1.0, 1.0), (1.5, 1.0), (3.0, 1.0), (3.0, 0.4), (3.0, 0.0)):
        found = run(scale, u)
        shared, alone = gains(scale, u, times)
        np.testing.assert_allclose(found.x, shared * z.mean() + alone * (z - z.mean()), rtol=2e-4, atol=1e-5)
        assert int(found.nfe) == 40
        own.append(alone)
    # less of a token's own the larger the scale or u, nothing changed at scale 1 or u = 0
    assert own[0] > own[1] > own[2] and own[3] > own[2] and own[4] == own[0]
    np.testing.assert_allclose(own[0], np.sqrt(OWN), rtol=0.1)  # that of the data, to the error of 20 steps


@pytest.mark.paper("Fine-Grained Perturbation Guidance via Attention Head Selection")
def test_greedy_search_finds_the_heads_that_matter():
    """Heads of different weight: the search perturbs them in order of weight, for samples whose tokens agree most."""
    weights = jnp.array([[0.1, 0.5], [0.0, 0.4]])
    denoise = predictions.data(PROCESS).decode(coherent, weights)
    grid = grids.uniform(PROCESS, 8)
    z = jax.random.normal(jax.random.key(0), (TOKENS,))

    def agreement(mask, u=0.5):
        guided = guidance.perturbed_attention(denoise, u * mask, 2.0)
        return -jnp.var(sample(jax.random.key(1), guided, solvers.ddim(), grid, x=z).x)

    found = jax.jit(lambda: guidance.search_heads(agreement, (2, 2), rounds=3))()
    assert found.chosen.tolist() == [[0, 1], [1, 1], [0, 0]]
    assert found.mask.tolist() == [[1, 1], [0, 1]]
    assert np.all(np.diff(found.objectives) > 0) and found.objectives[0] > agreement(jnp.zeros((2, 2)))
    np.testing.assert_allclose(found.objectives[-1], agreement(found.mask), rtol=1e-4)
    assert agreement(found.mask, 1.0) > found.objectives[-1]  # u = 1 is the full perturbation


def test_refused():
    denoise = predictions.data(PROCESS).decode(coherent, jnp.ones((1, 1)))
    with pytest.raises(ValueError, match="between 0 and 1"):
        guidance.perturbed_attention(denoise, jnp.full((1, 1), 1.5))
    with pytest.raises(ValueError, match="hold one"):
        guidance.perturbed_attention(lambda x, level: x, jnp.ones((1, 1)))
    with pytest.raises(ValueError, match="null"):
        guidance.perturbed_attention(denoise, jnp.ones((1, 1)), 2.0, condition_scale=3.0)
    with pytest.raises(ValueError, match="finite"):
        guidance.perturbed_attention(denoise, jnp.ones((1, 1)), np.nan)
    with pytest.raises(ValueError, match="condition"):
        guidance.perturbed_attention(denoise, jnp.ones((1, 1)), 2.0, null=0)
    with pytest.raises(ValueError, match="heads"):
        guidance.search_heads(lambda mask: mask.sum(), (2, 2), rounds=3, each=2)
