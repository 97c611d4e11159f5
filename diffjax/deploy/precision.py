"""The precision of matrix products and convolutions, and what it costs.

    fast = deploy.with_precision(draw, "tf32")
    deploy.precision_error(draw, params, key, precision="tf32")

Accelerators multiply float32 matrices with shortened factors where they are allowed to: TF32 keeps 10 bits of the
mantissa, bfloat16 7, of 23; sums stay float32.  The loop of a sampler, its coefficients and noise, are not matrix
products and stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core as core
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, Tree

# names as users know them: the setting of JAX, and the bits of the mantissa that a factor keeps
PRECISIONS: dict[str, tuple[str, int]] = {
    "highest": ("highest", 23),
    "tf32": ("tensorfloat32", 10),
    "bf16": ("bfloat16", 7),
}

# primitives that multiply, the last in networks of this library
PRODUCTS = ("dot_general", "conv_general_dilated", "convolution")


class PrecisionError(NamedTuple):
    """How far results are from those at the highest precision, over all entries of all arrays."""

    relative: float  # root mean square of the difference over that of the result
    largest: float  # largest difference of an entry
    emulated: bool


def with_precision(function: Callable[..., Any], precision: str) -> Callable[..., Any]:
    """``function`` with its matrix products at "highest", "tf32" or "bf16" precision, where the device has them.

    CPUs have none but the highest: there the switch does nothing (see `precision_error` for what it would do). JAX says
    "high" for "tf32" and "default" for "bf16", and a device takes its own nearest: NVIDIA GPUs TF32 for either of them,
    TPUs three products of bfloat16 for the first. An error measured on a device is that of what it did.

    Raises ValueError for another name.
    """
    name, _ = _known(precision)

    @functools.wraps(function)
    def switched(*arguments: Any, **options: Any) -> Any:
        with jax.default_matmul_precision(name):
            return function(*arguments, **options)

    return switched


def rounded(function: Callable[..., Any], precision: str) -> Callable[..., Any]:
    """``function`` as it is at that precision, computed on any device: float32 factors of matrix products are rounded.

    Every factor of a ``dot_general`` or convolution, in loops and branches too, passes through `lax.reduce_precision`.
    Products and sums are float32, as in the hardware's accumulators; their order there may differ.  The derivative is
    not that of the hardware, whose backward products are rounded as well.

    Raises ValueError for another name.
    """
    _, bits = _known(precision)

    @functools.wraps(function)
    def emulated(*arguments: Any) -> Any:
        jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        leaves = core.jaxpr_as_fun(_closed(jaxpr, bits))(*jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shape), leaves)

    return emulated


def precision_error(
    function: Callable[..., Tree], *arguments: Any, precision: str = "tf32", emulate: bool | None = None
) -> PrecisionError:
    """The error of ``function(*arguments)`` at a precision, against the highest: a whole sampler, or one network call.

    Args:
        function: pure, returns any tree of arrays; only inexact ones are compared.
        precision: "tf32" or "bf16".
        emulate: round the factors by `rounded` instead of switching the device; default: where that is a CPU.

    Raises ValueError for another name of a precision, or if there is nothing to compare.
    """
    _known(precision)
    emulate = jax.default_backend() == "cpu" if emulate is None else emulate
    exact = jax.jit(with_precision(function, "highest"))(*arguments)
    fast = rounded(with_precision(function, "highest"), precision) if emulate else with_precision(function, precision)
    found = jax.jit(fast)(*arguments)
    pairs = [
        (np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel())
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
        if jnp.issubdtype(jnp.result_type(b), jnp.floating)
    ]
    if not pairs:
        raise ValueError("function must return an array of floating point numbers, got none.")
    found, exact = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    scale = np.sqrt(np.mean(exact**2))
    relative = float(np.sqrt(np.mean((found - exact) ** 2)) / scale) if scale > 0 else float(np.max(np.abs(found)) > 0)
    return PrecisionError(relative, float(np.max(np.abs(found - exact))), emulate)


def _known(precision: str) -> tuple[str, int]:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {list(PRECISIONS)}, got {precision!r}.")
    return PRECISIONS[precision]


def _closed(closed: core.ClosedJaxpr, bits: int) -> core.ClosedJaxpr:
    return core.ClosedJaxpr(_program(closed.jaxpr, bits), closed.consts)


def _program(jaxpr: core.Jaxpr, bits: int) -> core.Jaxpr:
    """The same program with every float32 factor of a product rounded first, and the same in the programs inside."""
    equations = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in PRODUCTS:
            factors = []
            for factor in equation.invars:
                short, kind = factor, factor.aval
                if getattr(kind, "dtype", None) == jnp.float32:
                    rounding = _rounding(getattr(kind, "shape", ()), bits).jaxpr.eqns[0]
                    short = core.Var(kind)
                    equations.append(rounding.replace(invars=[factor], outvars=[short]))
                factors.append(short)
            equations.append(equation.replace(invars=factors))
        else:
            inner = {name: _inner(part, bits) for name, part in equation.params.items()}
            equations.append(equation.replace(params=inner))
    return jaxpr.replace(eqns=equations)


def _inner(part: Any, bits: int) -> Any:
    if isinstance(part, core.ClosedJaxpr):
        return _closed(part, bits)
    if isinstance(part, core.Jaxpr):
        return _program(part, bits)
    if isinstance(part, tuple) and part and all(isinstance(one, core.ClosedJaxpr) for one in part):
        return tuple(_closed(one, bits) for one in part)
    return part


@functools.cache
def _rounding(shape: tuple[int, ...], bits: int) -> core.ClosedJaxpr:
    reduce: Callable[[Array], Array] = lambda x: jax.lax.reduce_precision(x, 8, bits)
    return jax.make_jaxpr(reduce)(jax.ShapeDtypeStruct(shape, jnp.float32))
