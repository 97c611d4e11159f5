"""Linear operators of imaging: blur, downsampling, colourisation, the Radon transform, Fourier undersampling."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.inverse.operators import check_cutoff, resolved, tight_spectral, tight_squared
from diffjax.levels import Array, is_traced, static, value


def blur(kernel: Array, shape: tuple[int, ...], cutoff: float = 0.0) -> Blur:
    """Circular convolution over the first axes: ``y[i] = sum_j kernel[c + j] x[i - j]``, c the kernel's centre.

    Args:
        kernel: of as many axes as are blurred (1 for signals, 2 for images), no longer than the sample; the centre
            of n entries is entry ``n // 2``.
        shape: of one sample; axes beyond the kernel's (channels) are blurred alike.
        cutoff: frequencies that pass with at most this share of the best are taken out, of A itself.  Methods that
            divide noisy measurements by singular values (`replacement`, `mcg`, `null_space`, `lanpaint`) need one: the
            codes of DDRM and DDNM have 0.03.

    Diagonal in the Fourier basis, which is its spectrum.

    Raises ValueError if the kernel does not fit the shape, and for a cutoff outside [0, 1).
    """
    check_cutoff(cutoff)
    axes = np.ndim(kernel)
    if not 1 <= axes <= len(shape) or any(n > m for n, m in zip(np.shape(kernel), shape, strict=False)):
        raise ValueError(f"kernel must fit the first axes of {shape}, got shape {np.shape(kernel)}.")
    xp = jnp if is_traced(kernel) else np
    padded = xp.pad(xp.asarray(kernel), [(0, m - n) for n, m in zip(np.shape(kernel), shape, strict=False)])
    rolled = xp.roll(padded, [-(n // 2) for n in np.shape(kernel)], axis=tuple(range(axes)))
    transfer = xp.fft.fftn(rolled)
    if cutoff > 0:
        passed = xp.abs(transfer)
        transfer = xp.where(passed > cutoff * xp.max(passed), transfer, 0.0)
    return Blur(xp.real(transfer), xp.imag(transfer), tuple(shape))


@value
class Blur:
    real: Array
    imaginary: Array
    input_shape: tuple = static()
    factory = "blur"

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.input_shape

    def _filtered(self, weights: Array, x: Array) -> Array:
        axes = tuple(range(np.ndim(self.real)))
        wide = weights.reshape(weights.shape + (1,) * (x.ndim - weights.ndim))
        return jnp.real(jnp.fft.ifftn(wide * jnp.fft.fftn(x, axes=axes), axes=axes)).astype(x.dtype)

    def _transfer(self, like: Array, sign: float) -> Array:
        return jnp.asarray(self.real, like.dtype) + sign * 1j * jnp.asarray(self.imaginary, like.dtype)

    def __call__(self, x: Array) -> Array:
        return self._filtered(self._transfer(x, 1.0), x)

    def adjoint(self, y: Array) -> Array:
        return self._filtered(self._transfer(y, -1.0), y)

    def spectral(self, f: Callable, x: Array) -> Array:
        power = jnp.asarray(self.real, x.dtype) ** 2 + jnp.asarray(self.imaginary, x.dtype) ** 2
        return self._filtered(f(resolved(power)), x)

    @property
    def squared(self) -> Array:
        power = jnp.asarray(self.real) ** 2 + jnp.asarray(self.imaginary) ** 2
        channels = math.prod(self.input_shape) // power.size
        return jnp.tile(resolved(power).reshape(-1), channels)


def gaussian_kernel(size: int, std: float, axes: int = 2) -> np.ndarray:
    """A Gaussian blur kernel of sum 1, ``size`` entries along each of ``axes`` axes, std in entries.

    Raises ValueError unless size >= 1, std > 0 and axes >= 1.
    """
    if size < 1 or not std > 0 or axes < 1:
        raise ValueError(f"need size >= 1, std > 0 and axes >= 1, got {size!r}, {std!r}, {axes!r}.")
    line = np.exp(-0.5 * ((np.arange(size) - size // 2) / std) ** 2)
    kernel = line
    for _ in range(axes - 1):
        kernel = kernel[..., None] * line
    return kernel / kernel.sum()


def downsample(factor: int, shape: tuple[int, ...], axes: int = 2) -> Downsample:
    """Means of blocks of ``factor`` entries along each of the first ``axes`` axes: super-resolution by averaging.

    Raises ValueError unless factor divides those axes of ``shape``.

    >>> import jax.numpy as jnp
    >>> downsample(2, (4,), axes=1)(jnp.arange(4.0))
    Array([0.5, 2.5], dtype=float32)
    """
    if factor < 1 or not 1 <= axes <= len(shape) or any(n % factor for n in shape[:axes]):
        raise ValueError(f"factor must divide the first {axes} axes of {shape}, got {factor!r}.")
    return Downsample(factor, axes, tuple(shape))


@value
class Downsample:
    rate: int = static()
    axes: int = static()
    input_shape: tuple = static()
    factory = "downsample"

    @property
    def output_shape(self) -> tuple[int, ...]:
        return tuple(n // self.rate if k < self.axes else n for k, n in enumerate(self.input_shape))

    @property
    def tight(self) -> float:
        return 1.0 / self.rate**self.axes

    def __call__(self, x: Array) -> Array:
        split = [m for k, n in enumerate(self.output_shape) for m in ((n, self.rate) if k < self.axes else (n,))]
        return x.reshape(split).mean(axis=tuple(2 * k + 1 for k in range(self.axes)))

    def adjoint(self, y: Array) -> Array:
        for axis in range(self.axes):
            y = jnp.repeat(y, self.rate, axis=axis)
        return y * self.tight

    spectral = tight_spectral
    squared = property(tight_squared)


def colourisation(shape: tuple[int, ...], weights: Array | None = None) -> Colourisation:
    """``y = sum_c weights[c] x[..., c]``: a grey image of one with channels last; weights 1 / C by default.

    Raises ValueError if there is no last axis, or weights do not fit it.
    """
    if not shape:
        raise ValueError("colourisation needs a sample with channels along its last axis, got shape ().")
    weights = np.full(shape[-1], 1 / shape[-1]) if weights is None else weights
    assert weights is not None  # for type checkers
    if np.shape(weights) != shape[-1:]:
        raise ValueError(f"weights must have shape {shape[-1:]}, got {np.shape(weights)}.")
    return Colourisation(weights, tuple(shape))


@value
class Colourisation:
    weights: Array
    input_shape: tuple = static()
    factory = "colourisation"

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.input_shape[:-1]

    @property
    def tight(self) -> Array:
        return jnp.sum(jnp.asarray(self.weights) ** 2)

    def __call__(self, x: Array) -> Array:
        return x @ jnp.asarray(self.weights, x.dtype)

    def adjoint(self, y: Array) -> Array:
        return y[..., None] * jnp.asarray(self.weights, y.dtype)

    spectral = tight_spectral
    squared = property(tight_squared)


def radon(angles: Array, shape: tuple[int, int], detectors: int | None = None) -> Radon:
    """Parallel-beam projections of an image (H, W): ``y[k, d]`` is the mass that falls on detector d under angle k.

    Every pixel's mass is shared linearly between the two detectors next to the projection of its centre, detectors one
    pixel apart, so that each projection keeps the image's total.

    Args:
        angles: (K,), concrete, in radians.
        detectors: their number; by default enough for the diagonal.

    It has no cheap spectrum; `decomposed` gives small ones a dense one.

    Raises ValueError unless shape has two axes, angles one, and detectors is positive.
    """
    if len(shape) != 2 or np.ndim(angles) != 1:
        raise ValueError(f"need an image shape (H, W) and angles (K,), got {shape} and {np.shape(angles)}.")
    detectors = math.ceil(math.hypot(*shape)) + 2 if detectors is None else detectors
    if detectors < 1:
        raise ValueError(f"detectors must be at least 1, got {detectors!r}.")
    rows, columns = (np.arange(n) - (n - 1) / 2 for n in shape)
    across = np.cos(angles)[:, None, None] * columns + np.sin(angles)[:, None, None] * rows[:, None]
    position = across.reshape(len(angles), -1) + (detectors - 1) / 2  # (K, HW), in detectors
    lower = np.floor(position)
    return Radon(lower.astype(np.int32), position - lower, detectors, tuple(shape))


@value
class Radon:
    lower: Array  # (K, HW) the detector below each pixel's projection
    share: Array  # (K, HW) what the next one gets
    detectors: int = static()
    input_shape: tuple = static()
    factory = "radon"

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (np.shape(self.lower)[0], self.detectors)

    def __call__(self, x: Array) -> Array:
        flat = x.reshape(-1)

        def project(lower: Array, share: Array) -> Array:
            share = jnp.asarray(share, flat.dtype)
            empty = jnp.zeros(self.detectors + 2, flat.dtype)  # a bin on both sides for what misses
            first = jnp.clip(lower + 1, 0, self.detectors + 1)
            second = jnp.clip(lower + 2, 0, self.detectors + 1)
            return empty.at[first].add((1 - share) * flat).at[second].add(share * flat)[1:-1]

        return jax.vmap(project)(jnp.asarray(self.lower), jnp.asarray(self.share))

    def adjoint(self, y: Array) -> Array:
        def spread(lower: Array, share: Array, row: Array) -> Array:
            share = jnp.asarray(share, row.dtype)
            padded = jnp.pad(row, 1)
            first = jnp.clip(lower + 1, 0, self.detectors + 1)
            second = jnp.clip(lower + 2, 0, self.detectors + 1)
            return (1 - share) * padded[first] + share * padded[second]

        back = jax.vmap(spread)(jnp.asarray(self.lower), jnp.asarray(self.share), y)
        return back.sum(0).reshape(self.input_shape)


def fourier(keep: Array, shape: tuple[int, ...] | None = None) -> Fourier:
    """The kept coefficients of the unitary Fourier transform over the first axes, as real and imaginary parts.

    Args:
        keep: boolean, concrete, over the frequencies in the order of ``numpy.fft`` (the mean first).
        shape: of one sample, by default that of ``keep``; axes beyond it (coils, channels) are transformed alike.

    ``y`` has shape (2, kept, channels...).  A real sample has the same information at a frequency and at its negative.

    Raises ValueError unless keep is boolean, concrete, fits the shape and keeps something.
    """
    if is_traced(keep) or np.asarray(keep).dtype != bool or not np.any(keep):
        raise ValueError(f"keep must be a concrete boolean array that keeps something, got {keep!r}.")
    shape = np.shape(keep) if shape is None else tuple(shape)
    if shape[: np.ndim(keep)] != np.shape(keep):
        raise ValueError(f"keep of shape {np.shape(keep)} must have the first axes of {shape}.")
    negative = np.asarray(keep)
    for axis in range(np.ndim(keep)):
        negative = np.roll(np.flip(negative, axis), 1, axis)
    power = 0.5 * (np.asarray(keep) + 1.0 * negative)
    return Fourier(np.flatnonzero(keep).astype(np.int32), power, tuple(shape))


@value
class Fourier:
    indices: Array
    power: Array  # the squared singular values: 1, or 1/2 where the negative frequency is not kept
    input_shape: tuple = static()
    factory = "fourier"

    @property
    def axes(self) -> tuple[int, ...]:
        return tuple(range(np.ndim(self.power)))

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (2, np.shape(self.indices)[0], *self.input_shape[np.ndim(self.power) :])

    def __call__(self, x: Array) -> Array:
        rest = self.input_shape[np.ndim(self.power) :]
        kept = jnp.fft.fftn(x, axes=self.axes, norm="ortho").reshape(-1, *rest)[self.indices]
        return jnp.stack([kept.real, kept.imag])

    def adjoint(self, y: Array) -> Array:
        rest = self.input_shape[np.ndim(self.power) :]
        empty = jnp.zeros((np.size(self.power), *rest), jnp.result_type(y.dtype, jnp.complex64))
        full = empty.at[self.indices].set(y[0] + 1j * y[1]).reshape(self.input_shape)
        return jnp.real(jnp.fft.ifftn(full, axes=self.axes, norm="ortho")).astype(y.dtype)

    def spectral(self, f: Callable, x: Array) -> Array:
        weights = f(jnp.asarray(self.power, x.dtype))
        wide = weights.reshape(weights.shape + (1,) * (x.ndim - weights.ndim))
        return jnp.real(jnp.fft.ifftn(wide * jnp.fft.fftn(x, axes=self.axes), axes=self.axes)).astype(x.dtype)

    @property
    def squared(self) -> Array:
        channels = math.prod(self.input_shape) // np.size(self.power)
        return jnp.tile(jnp.asarray(self.power).reshape(-1), channels)
