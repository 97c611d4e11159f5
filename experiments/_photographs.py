"""Photographs that scikit-learn ships, priors of their patches, and what is to be restored in them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.interpolate
import scipy.ndimage
from flax import nnx
from sklearn.datasets import load_sample_image
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

import diffjax
from diffjax import data, inverse, networks, oracles, training
from diffjax.corrections import patchwise
from diffjax.levels import Array
from experiments import _run

PROCESS = diffjax.processes.flow()
NAMES = ("china.jpg", "flower.jpg")
SPLIT, GAP = 200, 8  # columns to learn from, and columns between these and the others
NOISE = 0.02  # of what is measured; the largest singular values are about 1
CORNERS = ((96, 268), (72, 208))  # of the crops to restore, in the other columns: where there is most to see


def photographs() -> list[np.ndarray]:
    """Grey, at half the size (213, 320), in [-1, 1]."""
    found = []
    for name in NAMES:
        grey = load_sample_image(name).astype(np.float64) @ [0.299, 0.587, 0.114] / 127.5 - 1
        height, width = (n // 2 for n in grey.shape)
        found.append(grey[: 2 * height, : 2 * width].reshape(height, 2, width, 2).mean((1, 3)))
    return found


def crops(side: int) -> np.ndarray:
    """One square (side, side, 1) of each photograph, from columns that no prior has seen."""
    found = [
        image[row : row + side, column : column + side, None]
        for image, (row, column) in zip(photographs(), CORNERS, strict=True)
    ]
    assert all(column >= SPLIT + GAP for _, column in CORNERS)
    return np.stack(found)


class Patches:
    """Patches of the columns to learn from, by number: what `data.batches` reads."""

    name, split = "patches", "train"

    def __init__(self, side: int):
        self.classes: int | None = None
        self.shape: tuple[int, ...] | None = (side, side, 1)
        self.images = [image[:, :SPLIT].astype(np.float32) for image in photographs()]
        self.side = side
        height, width = self.images[0].shape
        self.across = width - side + 1
        self.each = (height - side + 1) * self.across

    def __len__(self) -> int:
        return self.each * len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int | None]]:
        found: list[tuple[Any, int | None]] = []
        for index in indices:
            which, place = divmod(int(index), self.each)
            row, column = divmod(place, self.across)
            found.append((self.images[which][row : row + self.side, column : column + self.side, None], None))
        return found

    def scale(self, image: np.ndarray) -> np.ndarray:
        """As they are."""
        return np.asarray(image, np.float32)

    def some(self, count: int, seed: int) -> np.ndarray:
        """A random set (count, side, side, 1), a half of them mirrored."""
        rng = np.random.default_rng(seed)
        found = np.stack([patch for patch, _ in self.__getitems__(rng.choice(len(self), count).tolist())])
        return np.where(rng.random((count, 1, 1, 1)) < 0.5, found, found[:, :, ::-1])


def fitted_mixture(side: int, components: int, count: int, seed: int) -> dict[str, Any]:
    """Weights, means and covariances of a mixture of Gaussians of patches, by expectation maximisation."""
    flat = Patches(side).some(count, seed).reshape(count, -1).astype(np.float64)
    law = GaussianMixture(components, reg_covar=1e-4, max_iter=25, tol=1e-2, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # as good as it gets in so many iterations
        law.fit(flat)
    return {"weights": law.weights_, "means": law.means_, "covariances": law.covariances_}


def mixture(fitted: dict[str, np.ndarray], side: int) -> Any:
    """The law of patches (side, side, 1)."""
    law = oracles.mixture(fitted["weights"], fitted["means"].reshape(-1, side, side, 1), fitted["covariances"])
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), law)


def trained(run: _run.Run, side: int, channels: tuple[int, ...], steps: int, batch: int, seed: int) -> tuple[Any, Any]:
    """``(apply, parameters)`` of a flow-matching U-Net of patches."""
    key = jax.random.key(seed)
    network = networks.UNet((side, side, 1), channels=channels, blocks=1, rngs=nnx.Rngs(key))
    apply, params = networks.functional(network)
    loss = training.denoising(diffjax.predictions.flow(PROCESS), apply)
    optimiser = training.adam(3e-3, warmup=min(50, steps - 1), steps=steps)
    step = training.train_step(loss, optimiser, training.ema.warmed(0.99))
    kept: dict[str, Any] = {"folder": run.folder("training/patches"), "resume": run.resume, "report": run.log}
    batches = data.batches(Patches(side), batch, seed=seed)
    state = training.fit(
        training.init(key, params, optimiser), step, batches, steps=steps, save_every=steps, progress=False, **kept
    )
    return apply, state.ema


def network_prior(apply: Any, params: Any, side: int, stride: int) -> Any:
    """The denoiser of images whose patches the network knows."""
    return patchwise(diffjax.predictions.flow(PROCESS).decode(apply, params), side, stride)


# --- what is to be restored ---------------------------------------------------------------------------------------


class Restoration(NamedTuple):
    """An operator, its noise, a picture of what is measured, and what is done without a prior that is learned."""

    operator: Any
    firm: Any  # without singular values below the noise, for methods that divide by them
    std: float
    shown: Callable[[np.ndarray], np.ndarray]  # y -> (H, W), NaN where nothing is known
    classical: Callable[[np.ndarray], np.ndarray]  # y -> (H, W)
    name: str  # of that


def restorations(side: int, seed: int) -> dict[str, Restoration]:
    """Deblurring, super-resolution by two, inpainting of seven pixels out of ten."""
    shape = (side, side, 1)
    kernel = inverse.gaussian_kernel(9, 1.5)
    keep = np.random.default_rng(seed).random(shape) < 0.3
    rows, columns = np.nonzero(keep[..., 0])
    inside = np.stack([rows, columns], 1)
    grid = tuple(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"))

    def tikhonov(y: np.ndarray) -> np.ndarray:
        """``argmin |y - A x|^2 + w |L x|^2`` with the Laplacian L, by Fourier transforms."""
        padded = np.zeros((side, side))
        padded[: len(kernel), : len(kernel)] = kernel
        transfer = np.fft.fft2(np.roll(padded, -(len(kernel) // 2), (0, 1)))
        waves = 2 - 2 * np.cos(2 * np.pi * np.fft.fftfreq(side))
        laplacian = waves[:, None] + waves
        # the curvature of these photographs has a standard deviation of about a tenth of their range
        weight = (NOISE / 0.2) ** 2
        filtered = np.conj(transfer) * np.fft.fft2(y[..., 0]) / (np.abs(transfer) ** 2 + weight * laplacian**2)
        return np.fft.ifft2(filtered).real

    def interpolated(y: np.ndarray) -> np.ndarray:
        linear = scipy.interpolate.griddata(inside, y, grid, "cubic")
        return np.where(np.isnan(linear), scipy.interpolate.griddata(inside, y, grid, "nearest"), linear)

    def scattered(y: np.ndarray) -> np.ndarray:
        found = np.full((side, side), np.nan)
        found[rows, columns] = y
        return found

    blur, firm = (inverse.blur(kernel, shape, cutoff) for cutoff in (0.0, NOISE))
    downsample, mask = inverse.downsample(2, shape), inverse.mask(keep)
    cubic = lambda y: np.asarray(scipy.ndimage.zoom(y[..., 0], 2, order=3, mode="nearest", grid_mode=True))
    plain = lambda y: y[..., 0]
    return {
        "deblurring": Restoration(blur, firm, NOISE, plain, tikhonov, "Tikhonov"),
        "2x super-resolution": Restoration(downsample, downsample, NOISE, plain, cubic, "cubic spline"),
        "inpainting": Restoration(mask, mask, NOISE, scattered, interpolated, "cubic interpolation"),
    }


def measured(task: Restoration, images: np.ndarray, seed: int, firm: bool = False) -> Any:
    """The measurement of every image, stacked; as that of the operator without small singular values if ``firm``."""
    clean = np.asarray(jax.vmap(task.operator)(jnp.asarray(images, jnp.float32)))
    y = clean + task.std * np.random.default_rng(seed).normal(size=clean.shape).astype(np.float32)
    told = task.firm if firm else task.operator
    each = [inverse.measurement(told, one, task.std) for one in y]
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *each)


def edge_error(images: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The relative error of the images' slopes, (N,): what is too smooth, or invented, is seen in these."""
    slopes = lambda x: np.stack(np.gradient(x[..., 0], axis=(1, 2)))
    wrong = np.sum((slopes(images) - slopes(truth)) ** 2, axis=(0, 2, 3))
    return np.sqrt(wrong / np.sum(slopes(truth) ** 2, axis=(0, 2, 3)))


def as_unit(images: Array) -> np.ndarray:
    """[-1, 1] as [0, 1]."""
    return np.clip((np.asarray(images) + 1) / 2, 0, 1)
