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
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

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


def _output(x: Any, kernel: Any, precision: Any, padding: Any = "SAME") -> Any:
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=NUMBERS, precision=precision)


def _shape(a: Any, b: Any, form: str, window: tuple[int, int]) -> tuple[int, ...]:
    return (
        (*window, a.shape[3], b.shape[3]) if form == "kernel" else (*a.shape[:3], b.shape[3 if form == "output" else 2])
    )


def _of_jax(a: Any, b: Any, *, form: str, window: tuple[int, int], precision: Any) -> Any:
    """A form, as JAX makes it."""
    if form == "output":
        return _output(a, b, precision)
    forward = (lambda x: _output(x, b, precision)) if form == "input" else (lambda k: _output(a, k, precision))
    slope = a if form == "input" else b
    return jax.linear_transpose(forward, jax.ShapeDtypeStruct(_shape(a, b, form, window), slope.dtype))(slope)[0]


def _in_order(a: Any, b: Any, *, form: str, window: tuple[int, int], precision: Any) -> Any:
    """The same in the order of axes that CPUs have fast code for."""
    if form == "output":
        return _output(a, b, precision)
    if form == "input":
        return _output(a, jnp.flip(b, (0, 1)).swapaxes(2, 3), precision)
    x, y = a.transpose(3, 1, 2, 0), b.transpose(1, 2, 0, 3)
    padding = [(size // 2, size // 2) for size in window]
    return _output(x, y, precision, padding).transpose(1, 2, 0, 3)


def _kind(a: Any, b: Any, *, form: str, window: tuple[int, int], precision: Any) -> Any:
    del precision
    return a.update(shape=_shape(a, b, form, window), weak_type=False)


def _slope(index: int, g: Any, a: Any, b: Any, *, form: str, **settings: Any) -> Any:
    name, *operands = SLOPES[form][index](g, a, b)
    return PRIMITIVE.bind(*operands, form=name, **settings)


def _batched(operands: Sequence[Any], axes: Sequence[Any], **settings: Any) -> tuple[Any, int]:
    a, b = operands
    if axes[1] is not None or settings["form"] == "kernel":  # a kernel each: groups of channels, and none of these
        return jax.vmap(partial(_of_jax, **settings), tuple(axes))(a, b), 0
    a = jnp.moveaxis(a, axes[0], 0)
    out = PRIMITIVE.bind(a.reshape(-1, *a.shape[2:]), b, **settings)
    return out.reshape(*a.shape[:2], *out.shape[1:]), 0


PRIMITIVE = Primitive("convolution")
PRIMITIVE.def_impl(jax.jit(PRIMITIVE.bind, static_argnames=("form", "window", "precision")))
PRIMITIVE.def_abstract_eval(_kind)
ad.defbilinear(PRIMITIVE, partial(_slope, 0), partial(_slope, 1))
batching.primitive_batchers[PRIMITIVE] = _batched
mlir.register_lowering(PRIMITIVE, mlir.lower_fun(_of_jax, multiple_results=False))
mlir.register_lowering(PRIMITIVE, mlir.lower_fun(_in_order, multiple_results=False), platform="cpu")


def convolution(x: Any, kernel: Any, strides: Sequence[int], padding: Any, **options: Any) -> Any:
    """`jax.lax.conv_general_dilated` as Flax calls it; in the way above where it is one of every pixel of images.

    That is, x is (N, H, W, A) and the kernel (h, w, A, B) with h and w odd, the window moves by one, zeros around leave
    the size as it is, and there is no dilation nor group. JAX is given any other as it is.

    Args:
        x: images, or what JAX convolves.
        kernel: the same of every image.
        strides: of the window, one an axis.
        padding: "SAME", or the numbers of zeros before and after, a pair an axis.
        **options: those of `jax.lax.conv_general_dilated`.

    Returns:
        What `jax.lax.conv_general_dilated` returns.
    """
    window = kernel.shape[:-2]
    around = padding == "SAME" or [tuple(pair) for pair in padding] == [(size // 2,) * 2 for size in window]
    ones = {*strides, *(options.get("lhs_dilation") or ()), *(options.get("rhs_dilation") or ())} == {1}
    numbers = options.get("dimension_numbers")
    order = lax.conv_dimension_numbers(x.shape, kernel.shape, numbers)
    ours = lax.conv_dimension_numbers(x.shape, kernel.shape, NUMBERS) if kernel.ndim == 4 else None
    plain = all(options.get(name, value) == value for name, value in PLAIN.items())
    if order == ours and around and ones and plain and all(size % 2 for size in window) and x.dtype == kernel.dtype:
        # as JAX does, what is not said is what is in force now, and so is it in the derivatives
        precision = options.get("precision") or getattr(jax.config, IN_FORCE)
        return PRIMITIVE.bind(x, kernel, form="output", window=tuple(window), precision=precision)
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)


Conv = partial(nnx.Conv, conv_general_dilated=convolution)
"""The layer of Flax with this convolution."""
