"""Networks: shapes, gradients, conditioning, vmap, precision, values and errors."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffjax import networks
from diffjax.networks import layers

IMAGE = (8, 8, 2)


@cache
def unet(seed=0, **changes):
    options = {"channels": (8, 16), "groups": 4, "heads": 2, "condition": networks.label(3)}
    return networks.functional(networks.UNet(IMAGE, **(options | changes), rngs=nnx.Rngs(seed)))


@cache
def dit(seed=0, **changes):
    options = {"width": 16, "depth": 2, "heads": 2, "condition": networks.label(3)}
    return networks.functional(networks.DiT(IMAGE, **(options | changes), rngs=nnx.Rngs(seed)))


@cache
def mlp(seed=0, **changes):
    options = {"width": 16, "depth": 2, "condition": networks.label(3)}
    return networks.functional(networks.MLP(5, **(options | changes), rngs=nnx.Rngs(seed)))


def call(apply, *arguments):
    """Compiled once for each shape: operation by operation, a U-Net takes seconds."""
    return jax.jit(apply)(*arguments)


CASES = {"unet": (unet, IMAGE), "dit": (dit, IMAGE), "mlp": (mlp, (5,))}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def shaken(params, seed=1, size=0.1):
    """Parameters moved off their zeros, as after some training."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        tree,
        [p + size * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)],
    )


def test_output_is_zero_at_initialisation(case):
    make, shape = case
    apply, params = make()
    out = call(apply, params, jnp.ones(shape), 0.3, 1)
    assert out.shape == shape and out.dtype == jnp.float32
    assert np.all(out == 0)
    assert np.any(call(apply, shaken(params), jnp.ones(shape), 0.3, 1) != 0)


@pytest.mark.parametrize("name", [*CASES, "rich"])
def test_gradient_reaches_every_parameter(name):
    if name == "rich":
        spec = (networks.label(3), networks.vector(4), networks.tokens(6))
        apply, params = dit(condition=spec)
        shape = IMAGE
        told = [(jnp.int32(i), jnp.ones(4) * i, jnp.ones((2, 6)) + jnp.eye(2, 6)) for i in range(4)]
    else:
        make, shape = CASES[name]
        apply, params = make()
        told = [jnp.int32(i) for i in range(4)]
    x = jax.random.normal(jax.random.key(0), shape)

    # Every class is visited, the null class (3) too, so that every row of the table has its turn.
    def loss(p):
        return sum(jnp.sum(jnp.sin(call(apply, p, x, 0.1 + 0.2 * i, c))) for i, c in enumerate(told))

    gradient = jax.jit(jax.grad(loss))(shaken(params))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        reached = np.any(np.asarray(leaf) != 0, axis=tuple(range(1, leaf.ndim)))
        # A key bias moves all scores of a query alike: softmax cannot see the first half of it.
        expected = np.asarray(leaf) if leaf.ndim == 1 else reached
        assert np.any(expected != 0), f"no gradient reaches {jax.tree_util.keystr(path)}"
        if "tables" in str(path) and leaf.ndim == 2:
            assert np.all(reached), f"a row of {jax.tree_util.keystr(path)} gets no gradient"


def test_vmap_equals_loop(case):
    make, shape = case
    apply, params = make()
    params = shaken(params)
    x = jax.random.normal(jax.random.key(2), (3, *shape))
    t, c = jnp.array([0.0, 0.4, 1.0]), jnp.array([0, 2, 3])
    batched = jax.jit(jax.vmap(apply, (None, 0, 0, 0)))(params, x, t, c)
    looped = jnp.stack([call(apply, params, *one) for one in zip(x, t, c, strict=True)])
    np.testing.assert_allclose(batched, looped, rtol=2e-5, atol=2e-5)


def test_vmap_compiles_to_one_batched_convolution_each():
    apply, params = unet()
    x, t, c = jnp.ones((6, *IMAGE)), jnp.ones(6), jnp.zeros(6, int)
    text = jax.jit(jax.vmap(apply, (None, 0, 0, 0))).lower(params, x, t, c).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    kernels = [p for p in jax.tree.leaves(params) if p.ndim == 4]
    assert len(lines) == len(kernels)
    assert all("feature_group_count = 1" in line for line in lines)
    assert all("batch_group_count = 1" in line for line in lines)
    # Each convolves all six images at once with the very kernel of one image.
    assert all("(tensor<6x" in line for line in lines)

    one = jax.jit(apply).lower(params, x[0], t[0], c[0]).compile().cost_analysis()["flops"]
    six = jax.jit(jax.vmap(apply, (None, 0, 0, 0))).lower(params, x, t, c).compile()
    assert six.cost_analysis()["flops"] < 6.1 * one


def test_time_and_condition_change_the_output(case):
    make, shape = case
    apply, params = make()
    params = shaken(params)
    x = jax.random.normal(jax.random.key(3), shape)
    outs = [call(apply, params, x, 0.5, c) for c in (0, 1, 2, 3)] + [call(apply, params, x, 0.6, 0)]
    for i, a in enumerate(outs):
        for b in outs[:i]:
            assert np.max(np.abs(a - b)) > 1e-3
    np.testing.assert_array_equal(call(apply, params, x, 0.5, None), outs[3])


def test_null_of_vector_and_tokens_is_zeros():
    apply, params = dit(condition=(networks.vector(4), networks.tokens(6)))
    params = shaken(params)
    x = jax.random.normal(jax.random.key(3), IMAGE)
    untold = call(apply, params, x, 0.5, None)
    zeros = call(apply, params, x, 0.5, (jnp.zeros(4), jnp.zeros((7, 6))))
    np.testing.assert_allclose(untold, zeros, rtol=1e-5, atol=1e-6)
    for told in [(jnp.ones(4), None), (None, jnp.ones((7, 6)))]:
        assert np.max(np.abs(untold - call(apply, params, x, 0.5, told))) > 1e-3


def test_dit_does_not_care_for_the_order_of_tokens():
    apply, params = dit(condition=networks.tokens(6))
    params = shaken(params)
    x, words = jnp.ones(IMAGE), jax.random.normal(jax.random.key(5), (5, 6))
    a, b = call(apply, params, x, 0.5, words), call(apply, params, x, 0.5, words[::-1])
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_dit_patches_go_back_where_they_came_from():
    # With silent blocks, a patch's output depends on its own pixels alone.
    apply, params = dit()
    head = {"modulate": params["modulate"], "out": shaken(params["out"])}
    params = params | head
    jacobian = jax.jacobian(lambda x: call(apply, params, x, 0.5, 0))(jax.random.normal(jax.random.key(0), IMAGE))
    reach = np.abs(jacobian).sum((2, 5)) > 1e-7
    rows, columns = np.divmod(np.arange(64), 8)
    same = (rows[:, None] // 2 == rows // 2) & (columns[:, None] // 2 == columns // 2)
    np.testing.assert_array_equal(reach.reshape(64, 64), same)


def test_unet_folding_is_undone_exactly():
    from diffjax.networks.unet import _fold, _unfold

    x = jax.random.normal(jax.random.key(0), (4, 6, 3))
    np.testing.assert_array_equal(_unfold(_fold(x)), x)
    np.testing.assert_array_equal(_fold(x)[1, 2].reshape(2, 2, 3), x[2:4, 4:6])


def test_group_norm_matches_numpy_in_float64():
    x = jax.random.normal(jax.random.key(0), (3, 5, 6)) * 4 + 7
    wide = np.asarray(x, np.float64).reshape(15, 2, 3)
    centred = wide - wide.mean((0, 2), keepdims=True)
    expected = centred / np.sqrt((centred**2).mean((0, 2), keepdims=True) + 1e-5)
    np.testing.assert_allclose(layers.group_norm(x, 2), expected.reshape(x.shape), atol=2e-6)


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(case):
    make, shape = case
    wide, params = make()
    narrow, same = make(dtype="bfloat16")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(same))
    jax.tree.map(np.testing.assert_array_equal, params, same)
    x = jax.random.normal(jax.random.key(0), shape)
    params = shaken(params)
    a, b = call(wide, params, x, 0.5, 1), call(narrow, params, x, 0.5, 1)
    assert b.dtype == jnp.float32
    difference = np.linalg.norm(a - b) / np.linalg.norm(a)
    assert 1e-4 < difference < 0.1
    text = jax.jit(narrow).lower(params, x, 0.5, 1).as_text()
    products = [s for s in text.splitlines() if "dot_general" in s or "stablehlo.convolution" in s]
    assert products and all("bf16" in line for line in products)


def test_rebuilt_network_is_the_same_value_and_compiles_nothing(case):
    make, shape = case
    traces = 0

    def run(apply, params, x):
        nonlocal traces
        traces += 1
        return apply(params, x, 0.5, 0)

    run = jax.jit(run, static_argnums=0)
    first, params = make(seed=0)
    second, others = make(seed=1)
    assert first == second and hash(first) == hash(second)
    run(first, params, jnp.ones(shape))
    run(second, others, jnp.ones(shape))
    assert traces == 1
    assert make(condition=networks.label(4))[0] != first


def test_build_repeats_a_network_from_its_description(case):
    import json

    make, _ = case
    apply, params = make()
    description = json.loads(json.dumps(networks.architecture(apply)))
    assert description == networks.architecture(apply)
    again, others = networks.functional(networks.build(description, nnx.Rngs(0)))
    assert again == apply
    jax.tree.map(np.testing.assert_array_equal, params, others)
    assert networks.architecture(lambda p, x, t, c: x) is None


def test_digits_unet_has_the_size_of_the_main_experiment():
    model = networks.UNet((8, 8, 1), condition=networks.label(10), rngs=nnx.Rngs(0))
    assert 0.6e6 < networks.count(networks.functional(model)[1]) < 0.8e6


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda r: networks.UNet((8, 8), rngs=r), r"shape must be \(H, W, C\)"),
        (lambda r: networks.UNet((6, 6, 1), channels=(8, 8, 8), rngs=r), "divide by 4"),
        (lambda r: networks.UNet((8, 8, 1), channels=(12, 16), rngs=r), "groups=8 must divide"),
        (lambda r: networks.UNet((8, 8, 1), heads=5, rngs=r), "heads=5 must divide"),
        (lambda r: networks.UNet((8, 8, 1), attention=(5,), rngs=r), r"heights \[8, 4\]"),
        (lambda r: networks.UNet((8, 8, 1), channels=(), rngs=r), "at least one"),
        (lambda r: networks.UNet((8, 8, 1), blocks=0, rngs=r), "blocks must be a positive"),
        (lambda r: networks.UNet((8, 8, 1), condition=10, rngs=r), "condition 10 is not known"),
        (lambda r: networks.UNet((8, 8, 1), condition=(("word", 3),), rngs=r), "not known"),
        (lambda r: networks.DiT((8, 8, 1), patch=3, rngs=r), "patch=3 must divide H=8"),
        (lambda r: networks.DiT((8, 8, 1), width=18, heads=6, rngs=r), "divisible by 4"),
        (lambda r: networks.DiT((8, 8, 1), heads=3, rngs=r), "heads=3 must divide width=128"),
        (lambda r: networks.MLP(0, rngs=r), "size must be a positive integer"),
        (lambda r: networks.build({"name": "resnet"}, r), "'resnet' is not known"),
        (lambda r: networks.functional(nnx.BatchNorm(3, rngs=r)), "not an nnx.Param"),
    ],
)
def test_bad_sizes_are_refused_at_build(build, message):
    with pytest.raises(ValueError, match=message):
        build(nnx.Rngs(0))


def test_bad_inputs_are_refused_at_trace(case):
    make, shape = case
    apply, params = make()
    with pytest.raises(ValueError, match=r"jax\.vmap"):
        apply(params, jnp.ones((2, *shape)), 0.5, 0)
    with pytest.raises(ValueError, match="integer scalar"):
        apply(params, jnp.ones(shape), 0.5, 1.5)
    with pytest.raises(ValueError, match="integer scalar"):
        apply(params, jnp.ones(shape), 0.5, jnp.array([1, 2]))
    with pytest.raises(ValueError, match="was given 2"):
        apply(params, jnp.ones(shape), 0.5, (1, 2))


def test_kernels_start_with_the_variance_of_one_over_fan_in():
    kernel = layers.uniform(jax.random.key(0), (3, 3, 40, 50))
    assert kernel.shape == (3, 3, 40, 50)
    np.testing.assert_allclose(np.var(kernel) * 360, 1.0, rtol=0.03)
    jitted = jax.jit(layers.uniform, static_argnums=1)(jax.random.key(0), (3, 3, 40, 50))
    np.testing.assert_allclose(kernel, jitted, rtol=1e-6)
