"""Measurements of digits, in forms that many problems share one program.

Linear operators become matrices of one shape, with the largest singular value 1 and rows of zeros at the end, and
nonlinear ones a value that holds a number: so a method is compiled once for all of them and runs on all at once.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import inverse
from diffjax.levels import Array, static, value

SIZE, SHAPE = 8, (8, 8, 1)
FLAT = SIZE * SIZE
PADDED = 4 * FLAT  # entries of the widest nonlinear measurement
RATE = 20.0  # counts for a white pixel


class Problem(NamedTuple):
    """Measurements of several images by one operator."""

    seen: Any  # a measurement whose leaves have a leading axis of images
    firm: Any  # the same, of the operator without singular values below the noise
    shown: np.ndarray  # (N, 8, 8) the measurement as a picture


def linear_operators(seed: int) -> dict[str, np.ndarray]:
    """Matrices (M, 64) with the largest singular value 1."""
    rng = np.random.default_rng(seed)
    box = np.ones(SHAPE, bool)
    box[2:6, 2:6] = False
    kept = np.zeros((SIZE, SIZE), bool)
    kept[0], kept[:, 0] = True, True  # the lowest frequencies along both axes, and some others
    kept |= rng.random((SIZE, SIZE)) < 0.1
    image = (SIZE, SIZE)
    found = {
        "random pixels": inverse.mask(rng.permutation(np.arange(FLAT) < 20).reshape(SHAPE)),
        "without a box": inverse.mask(box),
        "blur": inverse.blur(inverse.gaussian_kernel(5, 1.0), image),
        "downsampling": inverse.downsample(2, image),
        "three projections": inverse.radon(np.pi * np.array([0.0, 1.0, 2.0]) / 3, image),
        "Fourier": inverse.fourier(kept),
        "compressed sensing": inverse.compressed_sensing(jax.random.key(seed), 16, image),
    }
    entries = {name: np.asarray(inverse.decomposed(operator).entries) for name, operator in found.items()}
    return {name: a / np.linalg.norm(a, 2) for name, a in entries.items()}


def linear_problem(a: np.ndarray, images: np.ndarray, std: float, seed: int) -> Problem:
    """Noisy measurements ``a x + std z``."""
    rng = np.random.default_rng(seed)
    flat = images.reshape(len(images), FLAT).astype(np.float64)
    y = flat @ a.T + std * rng.normal(size=(len(images), len(a)))
    pictures = y @ a  # the back-projection, in the units of the image where a pixel is seen
    weight = np.abs(a.T @ (a @ np.ones(FLAT)))
    pictures = np.where(weight > 1e-3, pictures / np.maximum(weight, 1e-3), np.nan)
    return Problem(_measured(a, y, std, 0.0), _measured(a, y, std, std), pictures.reshape(-1, SIZE, SIZE))


def _measured(a: np.ndarray, y: np.ndarray, std: float, cutoff: float) -> Any:
    """The measurement of every image, by the same matrix with rows of zeros, stacked."""
    if len(a) > FLAT:  # more rows than entries tell no more than a square matrix
        q, a = np.linalg.qr(a)
        y = y @ q
    rows = np.zeros((FLAT, FLAT))
    rows[: len(a)] = a
    operator = inverse.matrix(rows, SHAPE, cutoff)
    padded = np.zeros((len(y), FLAT))
    padded[:, : len(a)] = y
    return stacked([inverse.measurement(operator, one, std) for one in padded])


def stacked(trees: list[Any]) -> Any:
    """One tree with a leading axis, in float32."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf, np.float32) for leaf in leaves]), *trees)


@value
class Nonlinear:
    """One of several nonlinear operators, by a number that may be traced; outputs are padded with zeros."""

    which: Array
    input_shape: tuple = static()
    output_shape: tuple = static()

    def __call__(self, x: Array) -> Array:
        image = (SIZE, SIZE)
        parts = (inverse.phase_retrieval(image), inverse.hdr(image, 3.0), inverse.jpeg(image, 0.25))
        padded = lambda y: jnp.pad(y.reshape(-1), (0, PADDED - y.size))
        branches = [lambda x, part=part: padded(part(x[..., 0])) for part in parts]
        return jax.lax.switch(jnp.asarray(self.which, jnp.int32), branches, x)


NONLINEAR = ("phase retrieval", "saturation", "JPEG-like")


def nonlinear_problem(name: str, images: np.ndarray, std: float, seed: int) -> Problem:
    """Noisy measurements by a nonlinear operator."""
    operator = Nonlinear(np.float32(NONLINEAR.index(name)), SHAPE, (PADDED,))
    clean = np.asarray(jax.vmap(operator)(jnp.asarray(images, jnp.float32)))
    used = FLAT * (4 if name == NONLINEAR[0] else 1)
    noise = std * np.random.default_rng(seed).normal(size=clean.shape)
    y = clean + np.where(np.arange(PADDED) < used, noise, 0.0)
    seen = stacked([inverse.measurement(operator, one, std) for one in y])
    side = round(math.sqrt(used))
    shown = y[:, :used].reshape(-1, side, side)
    if name == NONLINEAR[0]:  # magnitudes, low frequencies in the middle, in eight by eight pixels
        shown = np.log(np.abs(np.fft.fftshift(shown, axes=(1, 2))[:, 4:12, 4:12]) + 0.1)
        low, high = shown.min(), shown.max()
        shown = 2 * (shown - low) / (high - low) - 1
    return Problem(seen, seen, shown)


@value
class Light:
    """Blurred light, at least 0: what a Poisson detector counts."""

    operator: Any
    input_shape: tuple = static()
    output_shape: tuple = static()

    def __call__(self, x: Array) -> Array:
        return self.operator(0.5 * (x[..., 0] + 1))


def poisson_problem(images: np.ndarray, seed: int) -> Problem:
    """Counts of a blurred image."""
    kernel = inverse.gaussian_kernel(3, 0.6)
    operator = Light(inverse.blur(kernel, (SIZE, SIZE)), SHAPE, (SIZE, SIZE))
    light = np.asarray(jax.vmap(operator)(jnp.asarray(images, jnp.float32)))
    y = np.random.default_rng(seed).poisson(RATE * np.maximum(light, 1e-3)).astype(np.float32)
    seen = stacked([inverse.measurement(operator, one, inverse.poisson_noise(RATE)) for one in y])
    return Problem(seen, seen, 2 * y / RATE - 1)


def problems(images: np.ndarray, std: float, seed: int) -> dict[str, dict[str, Problem]]:
    """All measurements, in groups of one form."""
    linear = linear_operators(seed)
    return {
        "linear": {name: linear_problem(a, images, std, seed + 1) for name, a in linear.items()},
        "nonlinear": {name: nonlinear_problem(name, images, std, seed + 2) for name in NONLINEAR},
        "counts": {"Poisson": poisson_problem(images, seed + 3)},
    }
