"""The networks' convolution is JAX's: values, derivatives of every kind, batches, precision, programs."""

import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diffjax import deploy
from diffjax.networks import UNet, convolution, functional
from diffjax.networks.pretrained.blocks import Style
from tests.programs import equations

NUMBERS = ("NHWC", "HWIO", "NHWC")
KINDS = ("value", "forward", "reverse", "reverse of reverse", "forward of reverse", "reverse of forward")


def draws(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def jax_and_ours(strides=(1, 1), padding="SAME", **options):
    """The two convolutions, as functions of images and kernel."""
    options = {"dimension_numbers": NUMBERS} | options
    return [lambda x, k, f=f: f(x, k, strides, padding, **options) for f in (lax.conv_general_dilated, convolution)]


def single():
    """Images and kernel in float32."""
    return [draw.astype(jnp.float32) for draw in draws((1, 8, 8, 4), (3, 3, 4, 4))]


def names(f, operands):
    """Of the convolutions in it."""
    found = {equation.primitive.name for equation in equations(jax.make_jaxpr(f)(*operands).jaxpr)}
    return found & {"convolution", "conv_general_dilated"}


def derivative(kind, f, operands, tangents):
    """A derivative of the sum of sines of f, by both operands, which is linear in neither."""
    total = lambda *given: jnp.sum(jnp.sin(f(*given)))
    along = lambda g: lambda *given: jax.jvp(g, given, tangents)[1]
    both = partial(jax.grad, argnums=(0, 1))
    slope = lambda *given: sum(jnp.vdot(jnp.cos(t), g) for t, g in zip(tangents, both(total)(*given), strict=True))
    functions = {
        "value": f,
        "forward": along(f),
        "reverse": both(total),
        "reverse of reverse": both(slope),
        "forward of reverse": along(both(total)),
        "reverse of forward": both(along(total)),
    }
    return jax.jit(functions[kind])(*operands)


def same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_those_of_jax(x64, kind):
    shapes = (2, 6, 5, 3), (3, 5, 3, 4)
    operands, tangents = draws(*shapes), tuple(draws(*shapes, seed=1))
    expected, found = (derivative(kind, f, operands, tangents) for f in jax_and_ours())
    same(found, expected)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("kind", ["value", "forward", "reverse", "reverse of reverse"])
@pytest.mark.parametrize("axes", [(0, None), (2, None), (None, 1), (1, 0)])
def test_batches_are_those_of_jax(x64, kind, axes):
    """Of images, of kernels and of both, along any axis."""
    shapes = (2, 4, 5, 2), (3, 3, 2, 3)
    shapes = [s if axis is None else (*s[:axis], 3, *s[axis:]) for s, axis in zip(shapes, axes, strict=True)]
    operands, tangents = draws(*shapes), tuple(draws(*shapes, seed=1))
    expected, found = (derivative(kind, jax.vmap(f, axes), operands, tangents) for f in jax_and_ours())
    same(found, expected)


WINDOWS = {
    "zeros by number": ((1, 1), ((1, 1), (1, 1)), (3, 3)),
    "two at a time": ((2, 2), "SAME", (3, 3)),
    "two at a time, zeros after": ((2, 2), ((0, 1), (0, 1)), (3, 3)),
    "a row and three columns at a time": ((1, 3), "SAME", (3, 2)),
    "patches": ((2, 2), "VALID", (2, 2)),
    "some left over": ((3, 2), "VALID", (2, 1)),
    "no zeros around": ((1, 1), "VALID", (3, 2)),
    "zeros here and there": ((2, 1), ((3, 1), (0, 2)), (2, 3)),
    "fewer than none": ((1, 1), ((-1, 0), (1, -2)), (2, 2)),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_windows_and_zeros_of_any_kind(x64, case):
    strides, padding, window = WINDOWS[case]
    shapes = (2, 7, 6, 3), (*window, 3, 4)
    operands, tangents = draws(*shapes), tuple(draws(*shapes, seed=1))
    functions = jax_and_ours(strides, padding)
    for kind in ("value", "reverse", "reverse of reverse"):
        expected, found = (derivative(kind, f, operands, tangents) for f in functions)
        same(found, expected)
    assert names(functions[1], operands) == {"convolution"}


OTHERS = {
    "dilated": ({"rhs_dilation": (2, 1)}, (3, 3, 4, 2)),
    "dilated images": ({"lhs_dilation": (1, 2)}, (3, 3, 4, 2)),
    "groups": ({"feature_group_count": 2}, (3, 3, 2, 2)),
    "channels first": ({"dimension_numbers": ("NCHW", "OIHW", "NCHW")}, (2, 5, 3, 3)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_every_other_convolution_is_left_to_jax(x64, case):
    more, shape = OTHERS[case]
    operands = draws((1, 5, 4, 4), shape)
    functions = jax_and_ours(padding=((1, 1), (1, 1)), **more)
    expected, found = (jax.jit(f)(*operands) for f in functions)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert names(functions[1], operands) == {"conv_general_dilated"}


def test_one_axis_is_left_to_jax():
    x, kernel = draws((2, 7, 3), (3, 3, 2))
    expected, found = (f(x, kernel) for f in jax_and_ours((1,), dimension_numbers=("NWC", "WIO", "NWC")))
    np.testing.assert_array_equal(found, expected)


def gradient_loop(f, kernel, x):
    """Steps down the slopes by kernel and input, three in a loop."""
    value = lambda both: jnp.sum(jnp.sin(f(both[1], both[0])))
    down = lambda both: jax.tree.map(jnp.subtract, both, jax.grad(value)(both))
    return lax.scan(lambda both, _: (down(both), None), (kernel, x), None, length=3)[0]


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_a_cpu_is_given_one_order_of_axes(strides):
    """The one that it has fast code for in loops; if JAX's own gradients were, all this would be of no use."""
    x, kernel = single()
    orders = []
    for f in jax_and_ours(strides):
        text = jax.jit(partial(gradient_loop, f)).lower(kernel, x).compile().as_text() or ""
        orders.append(set(re.findall(r" convolution\(.*dim_labels=([^,]*),", text)))
    assert orders[1] == {"b01f_01io->b01f"} and len(orders[0]) == 3


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_elsewhere_the_program_is_the_one_of_jax(platform, strides):
    x, kernel = single()
    counts = []
    for f in jax_and_ours(strides):
        looped = jax.jit(partial(gradient_loop, f))
        text = looped.trace(kernel, x).lower(lowering_platforms=(platform,)).as_text()
        counts.append(Counter(re.findall(r"stablehlo\.(convolution|reverse|transpose)\b", text)))
    assert counts[0] == counts[1] and counts[0]["convolution"] == 3 and counts[0]["reverse"] == 1


@pytest.mark.parametrize("precision", ["tensorfloat32", "highest"])
def test_precision_in_force_is_kept_in_derivatives(precision):
    x, kernel = single()
    with jax.default_matmul_precision(precision):
        gradients = jax.make_jaxpr(partial(gradient_loop, jax_and_ours()[1]))(kernel, x)
    text = jax.jit(jaxpr_as_fun(gradients)).lower(kernel, x).as_text()
    level = {"tensorfloat32": "HIGH", "highest": "HIGHEST"}[precision]
    assert text.count(f"precision = [{level}, {level}]") + text.count(f"#stablehlo<precision {level}>") >= 3


def test_precision_is_emulated_in_it():
    x, kernel = single()
    functions = jax_and_ours()
    expected, found = (deploy.rounded(f, "bf16")(x, kernel) for f in functions)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert np.max(np.abs(found - functions[1](x, kernel))) > 1e-3


def loss(kernel, x):
    return jnp.sum(jnp.sin(jax_and_ours()[1](x, kernel)))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_images_are_divided_over_devices(kind):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=jax.devices()[:4])
    x, kernel = (draw.astype(jnp.float32) for draw in draws((4, 5, 5, 2), (3, 3, 2, 3)))
    expected = jax.grad(loss, (0, 1))(kernel, x)
    with jax.set_mesh(mesh):
        divided = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        found = jax.jit(jax.grad(loss, (0, 1)))(jax.device_put(kernel, NamedSharding(mesh, PartitionSpec())), divided)
    assert found[1].sharding.is_equivalent_to(divided.sharding, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_in_a_map_over_devices_gradients_are_summed():
    """The kernel is the same on all, so its gradient is the sum of theirs, which types alone tell JAX."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    x, kernel = (draw.astype(jnp.float32) for draw in draws((4, 5, 5, 2), (3, 3, 2, 3)))
    specs = (PartitionSpec(), PartitionSpec("data"))
    found = jax.jit(jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=specs, out_specs=PartitionSpec()))(kernel, x)
    np.testing.assert_allclose(found, jax.grad(loss)(kernel, x), rtol=1e-5, atol=1e-5)


def test_networks_have_no_other():
    """The stem, blocks and output of the U-Net, and the layer of published networks, of any stride."""
    apply, params = functional(UNet((4, 4, 1), channels=(4, 4), groups=2, blocks=1, rngs=nnx.Rngs(0)))
    assert names(apply, (params, jnp.zeros((4, 4, 1)), 0.5)) == {"convolution"}
    for stride in (1, 2):
        layer = Style(2, 1e-5).conv(2, 3, nnx.Rngs(0), stride=stride)
        assert names(layer, (jnp.zeros((4, 4, 2)),)) == {"convolution"}
