"""The convolution of the networks: that of `jax.lax`, as fast to differentiate in a loop as outside of one.

XLA on a CPU has fast code for convolutions in one order of the axes, images (N, H, W, A) and kernels (h, w, A, B), and
brings others into it, but not in the body of a loop. Gradients by input and by kernel are convolutions in other orders:
in a `lax.scan`, those of a U-Net of digits take 4.6 and 26 times as long as outside of one (`benchmarks/loop.py`).
Here, on a CPU, they are written in that order; on other platforms the program is the one of JAX. This is a primitive
because only that has derivatives, forward and reverse, of any order, and `vmap`. With y = x * k its three forms are
each other's transpositions:

    output(x, k) = y,   input(y, k) = the slope of <y, x * k> by x,   kernel(x, y) = the slope of <y, x * k> by k
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

# Operands are untyped here: they are abstract values and, in a transposition, unknown ones, too.
NUMBERS = ("NHWC", "HWIO", "NHWC")
PLAIN = {"feature_group_count": 1, "batch_group_count": 1, "out_sharding": None, "preferred_element_type": None}
IN_FORCE = "jax_default_matmul_precision"
# For each form, the forms and operands of its slopes by its first and its second operand, g the slope of its result.
SLOPES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "output": (lambda g, x, k: ("input", g, k), lambda g, x, k: ("kernel", x, g)),
    "input": (lambda g, y, k: ("output", g, k), lambda g, y, k: ("kernel", g, y)),
    "kernel": (lambda g, x, y: ("input", y, g), lambda g, x, y: ("output", x, g)),
}


class Settings(NamedTuple):
    """What a convolution has beside its operands."""

    size: tuple[int, ...]  # of the images x
    window: tuple[int, ...]  # of the kernel
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    precision: Any


def _output(x: Any, kernel: Any, given: Settings) -> Any:
    return lax.conv_general_dilated(
        x, kernel, given.strides, given.padding, dimension_numbers=NUMBERS, precision=given.precision
    )


def _of_jax(a: Any, b: Any, form: str, given: Settings) -> Any:
    """A form, as JAX makes it."""
    if form == "output":
        return _output(a, b, given)
    if form == "input":
        x = jax.ShapeDtypeStruct((a.shape[0], *given.size, b.shape[2]), a.dtype)
        return jax.linear_transpose(lambda x: _output(x, b, given), x)(a)[0]
    kernel = jax.ShapeDtypeStruct((*given.window, a.shape[3], b.shape[3]), b.dtype)
    return jax.linear_transpose(lambda kernel: _output(a, kernel, given), kernel)(b)[0]


def _in_order(a: Any, b: Any, form: str, given: Settings) -> Any:
    """The same in the order of axes that CPUs have fast code for.

    With n entries x[i] behind z zeros, a window of w and the stride s, y[p] = sum_j x[s p + j - z] k[j]: both slopes
    are convolutions of y with s - 1 zeros between its entries, the last of which is then the m-th after the first.
    """
    if form == "output":
        return _output(a, b, given)
    y = a if form == "input" else b
    last = [s * (count - 1) for s, count in zip(given.strides, y.shape[1:3], strict=True)]  # m
    axes = list(zip(given.size, given.window, (before for before, _ in given.padding), last, strict=True))
    options: Any = {"dimension_numbers": NUMBERS, "precision": given.precision}
    if form == "input":
        padding = [(w - 1 - z, n - 1 - m + z) for n, w, z, m in axes]
        turned = jnp.flip(b, (0, 1)).swapaxes(2, 3)
        return lax.conv_general_dilated(y, turned, (1, 1), padding, lhs_dilation=given.strides, **options)
    padding = [(z, m + w - n - z) for n, w, z, m in axes]
    x, y = a.transpose(3, 1, 2, 0), y.transpose(1, 2, 0, 3)
    slope = lax.conv_general_dilated(x, y, (1, 1), padding, rhs_dilation=given.strides, **options)
    return slope.transpose(1, 2, 0, 3)


def _kind(a: Any, b: Any, form: str, given: Settings) -> Any:
    shape = {
        "output": (a.shape[0], *_counts(given), b.shape[3]),
        "input": (a.shape[0], *given.size, b.shape[2]),
        "kernel": (*given.window, a.shape[3], b.shape[3]),
    }[form]
    return a.update(shape=shape, weak_type=False)


def _counts(given: Settings) -> list[int]:
    """The places of the window, an axis each."""
    axes = zip(given.size, given.window, given.strides, given.padding, strict=True)
    return [(n + sum(zeros) - w) // s + 1 for n, w, s, zeros in axes]


def _slope(index: int, g: Any, a: Any, b: Any, form: str, given: Settings) -> Any:
    name, *operands = SLOPES[form][index](g, a, b)
    return PRIMITIVE.bind(*operands, form=name, given=given)


def _batched(operands: Sequence[Any], axes: Sequence[Any], form: str, given: Settings) -> tuple[Any, int]:
    a, b = operands
    if axes[1] is not None or form == "kernel":  # a kernel each: groups of channels, and none of these
        return jax.vmap(partial(_of_jax, form=form, given=given), tuple(axes))(a, b), 0
    a = jnp.moveaxis(a, axes[0], 0)
    out = PRIMITIVE.bind(a.reshape(-1, *a.shape[2:]), b, form=form, given=given)
    return out.reshape(*a.shape[:2], *out.shape[1:]), 0


PRIMITIVE = Primitive("convolution")
PRIMITIVE.def_impl(jax.jit(PRIMITIVE.bind, static_argnames=("form", "given")))
PRIMITIVE.def_abstract_eval(_kind)
ad.defbilinear(PRIMITIVE, partial(_slope, 0), partial(_slope, 1))
batching.primitive_batchers[PRIMITIVE] = _batched
mlir.register_lowering(PRIMITIVE, mlir.lower_fun(_of_jax, multiple_results=False))
mlir.register_lowering(PRIMITIVE, mlir.lower_fun(_in_order, multiple_results=False), platform="cpu")


def convolution(x: Any, kernel: Any, strides: Sequence[int], padding: Any, **options: Any) -> Any:
    """`jax.lax.conv_general_dilated` as Flax calls it; in the way above where it is one of images.

    That is, x is (N, H, W, A) and the kernel (h, w, A, B), and there is no dilation and no group. JAX keeps any other,
    and what `shard_map` or a mesh with explicit axes divides, where types say how.

    Args:
        x: images, or what JAX convolves.
        kernel: the same of every image.
        strides: of the window, one an axis.
        padding: "SAME", "VALID", or the numbers of zeros before and after, a pair an axis.
        **options: those of `jax.lax.conv_general_dilated`.

    Returns:
        What `jax.lax.conv_general_dilated` returns.
    """
    dilations = (options.get(name) or (1,) for name in ("lhs_dilation", "rhs_dilation"))
    plain = {*chain(*dilations)} == {1} and all(options.get(name, value) == value for name, value in PLAIN.items())
    plain = plain and x.ndim == kernel.ndim == 4 and x.dtype == kernel.dtype and _ordered(x, kernel, options)
    if not plain or _divided(x, kernel):
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)
    size, window = tuple(x.shape[1:3]), tuple(kernel.shape[:2])
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(size, window, strides, padding)
    zeros = tuple((int(before), int(after)) for before, after in padding)
    # as JAX does, what is not said is what is in force now, and so is it in the derivatives
    precision = options.get("precision") or getattr(jax.config, IN_FORCE)
    return PRIMITIVE.bind(x, kernel, form="output", given=Settings(size, window, tuple(strides), zeros, precision))


def _ordered(x: Any, kernel: Any, options: dict[str, Any]) -> bool:
    order = lambda numbers: lax.conv_dimension_numbers(x.shape, kernel.shape, numbers)
    return order(options.get("dimension_numbers")) == order(NUMBERS)


def _divided(x: Any, kernel: Any) -> bool:
    meshes = (jax.sharding.get_abstract_mesh(), *(jax.typeof(leaf).sharding.mesh for leaf in (x, kernel)))
    return any(kind is not AxisType.Auto for mesh in meshes for kind in mesh.axis_types)


Conv = partial(nnx.Conv, conv_general_dilated=convolution)
"""The layer of Flax with this convolution."""
