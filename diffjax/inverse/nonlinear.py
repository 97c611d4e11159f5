"""Nonlinear forward operators: they have a shape and a call, and no adjoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.inverse.operators import Shapes, shapes, shapes_of
from diffjax.levels import Array, Tree, as_value, static, value
from diffjax.solvers.arguments import positive


def nonlinear(function: Callable[[Tree], Tree], shape: Any) -> Nonlinear:
    """Any function of a sample as an operator; ``shape`` is that of one sample, or a tree of shapes.

    Raises ValueError if ``shape`` is not one.
    """
    inside = shapes(shape)
    outside = jax.eval_shape(function, inside.zeros(jnp.float32))
    return Nonlinear(as_value(function), inside, shapes_of(outside))


@value
class Nonlinear:
    function: Any
    inside: Shapes = static()
    outside: Shapes = static()
    factory = "nonlinear"

    @property
    def input_shape(self) -> Any:
        return self.inside.tree

    @property
    def output_shape(self) -> Any:
        return self.outside.tree

    def __call__(self, x: Tree) -> Tree:
        return self.function(x)


def phase_retrieval(shape: tuple[int, ...], oversample: float = 2.0) -> Nonlinear:
    """``y = |F pad(x)|``: magnitudes of the unitary Fourier transform over all axes, zero-padded by ``oversample``.

    A sample, its negative, its shifts within the padding and its mirror image measure the same.

    Raises ValueError unless oversample >= 1.
    """
    if not oversample >= 1:
        raise ValueError(f"oversample must be at least 1, got {oversample!r}.")
    sizes = tuple(math.ceil(n * oversample) for n in shape)
    return nonlinear(PhaseRetrieval(sizes), shape)


@value
class PhaseRetrieval:
    sizes: tuple = static()

    def __call__(self, x: Array) -> Array:
        spectrum = jnp.fft.fftn(x, self.sizes, norm="ortho")
        power = spectrum.real**2 + spectrum.imag**2
        positive = power > 0  # the magnitude has no derivative at 0, where it is given the value 0
        return jnp.where(positive, jnp.sqrt(jnp.where(positive, power, 1.0)), 0.0).astype(x.dtype)


def hdr(shape: Any, factor: Array = 2.0) -> Nonlinear:
    """``y = clip(factor x, -1, 1)``: a high dynamic range seen by a sensor that saturates.

    Raises ValueError unless factor > 0.
    """
    positive("factor", factor)
    return nonlinear(HDR(factor), shape)


@value
class HDR:
    scale: Array

    def __call__(self, x: Tree) -> Tree:
        return jax.tree.map(lambda leaf: jnp.clip(self.scale * leaf, -1, 1).astype(leaf.dtype), x)


def saturation(shape: Any, gain: Array = 1.0) -> Nonlinear:
    """``y = tanh(gain x) / gain``: a soft saturation, invertible but ill-conditioned at its ends.

    Raises ValueError unless gain > 0.
    """
    positive("gain", gain)
    return nonlinear(Saturation(gain), shape)


@value
class Saturation:
    gain: Array

    def __call__(self, x: Tree) -> Tree:
        return jax.tree.map(lambda leaf: (jnp.tanh(self.gain * leaf) / self.gain).astype(leaf.dtype), x)


def jpeg(shape: tuple[int, ...], step: Array = 0.2, block: int = 8) -> Nonlinear:
    """Rounding in a block cosine basis, as JPEG does it: ``y = C^T step q round(C x / (step q)) ``.

    The step grows with the frequency, ``q = 1 + i + j`` for frequencies i and j of a block.  Rounding has derivative
    1 (straight-through), so that gradients pass.  Images (H, W) or (H, W, channels).

    Raises ValueError unless step > 0 and block divides the first two axes.
    """
    positive("step", step)
    if len(shape) < 2 or block < 1 or any(n % block for n in shape[:2]):
        raise ValueError(f"block must divide the first two axes of {shape}, got {block!r}.")
    return nonlinear(JPEG(step, block), shape)


@value
class JPEG:
    step: Array
    block: int = static()

    def __call__(self, x: Array) -> Array:
        n = self.block
        k, i = np.arange(n)[:, None], np.arange(n)
        cosine = np.sqrt(2 / n) * np.cos(np.pi * (i + 0.5) * k / n)
        cosine[0] /= np.sqrt(2)
        basis = jnp.asarray(cosine, x.dtype)
        blocks = x.reshape(x.shape[0] // n, n, x.shape[1] // n, n, -1)
        coefficients = jnp.einsum("ki,aibjc,lj->akblc", basis, blocks, basis)
        steps = self.step * (1 + k + i)[None, :, None, :, None]
        rounded = steps * jnp.round(coefficients / steps)
        passed = coefficients + jax.lax.stop_gradient(rounded - coefficients)
        return jnp.einsum("ki,akblc,lj->aibjc", basis, passed, basis).reshape(x.shape).astype(x.dtype)
