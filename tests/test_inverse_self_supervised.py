"""DDS2M: the untrained network, its fits by hand, and cubes of low rank against a deep prior and DDRM alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, inverse, oracles, processes, sample, solvers
from diffjax.inverse.self_supervised import total_variation

PROCESS = processes.flow()
RNG = np.random.default_rng(0)
SIDE, BANDS, RANK = 8, 8, 2
NETWORK = inverse.spatio_spectral((SIDE, SIDE, BANDS), RANK, jax.random.key(0), widths=(8, 8), hidden=(16,))


def test_the_network_makes_cubes_of_its_rank():
    """Two singular values and no more, and other cubes for other keys."""
    params = NETWORK.init(jax.random.key(1))
    cube, other = jax.jit(lambda p, q: (NETWORK(p), NETWORK(q)))(params, NETWORK.init(jax.random.key(2)))
    values = np.linalg.svd(np.asarray(cube).reshape(-1, BANDS).astype(np.float64))[1]
    assert values[1] > 1e-3 * values[0] and values[2] < 1e-5 * values[0]
    assert np.max(np.abs(cube - other)) > 1e-2


# --- fits by hand -----------------------------------------------------------------------------------------------------

PATTERN = RNG.normal(size=(4, 2))


def lines(params):
    """A linear network: its fits are gradient descent on least squares."""
    return jnp.asarray(PATTERN, params.dtype) @ params


class Descent:
    """Gradient descent, with the interface of an optimiser."""

    def init(self, params):
        return ()

    def update(self, gradient, state, params):
        return -0.3 * gradient, state


def by_hand(x, alpha, theta, mean, count, average, variation=0.0):
    for _ in range(count):
        f = PATTERN @ theta
        mean = average * mean + (1 - average) * f
        rough = np.zeros(4)
        signs = np.sign(np.diff(f)) / 3
        rough[1:] += signs
        rough[:-1] -= signs
        gradient = -2 * alpha * (x - alpha * f) / 4 + variation * rough
        theta = theta - 0.3 * PATTERN.T @ gradient
    return theta, mean


def test_fits_by_hand(x64):
    """Two steps of DDIM with parameters and average carried, clipped where asked; the deep prior alike."""
    theta, x = RNG.normal(size=2), RNG.normal(size=4)
    grid = grids.times(PROCESS, [0.8, 0.5, 0.0])
    for limits, variation in ((None, 0.0), ((-0.2, 0.3), 0.4)):
        denoise = inverse.dds2m(lines, theta, 5, Descent(), 0.7, variation, limits)
        out = sample(jax.random.key(0), denoise, solvers.ddim(), grid, x=jnp.asarray(x))
        own, mean, state = theta, PATTERN @ theta, x
        for t, s in ((0.8, 0.5), (0.5, 0.0)):
            own, mean = by_hand(state, 1 - t, own, mean, 5, 0.7, variation)
            x0 = mean if limits is None else np.clip(mean, *limits)
            state = (1 - s) * x0 + s * (state - (1 - t) * x0) / t
        np.testing.assert_allclose(out.x, state, rtol=1e-10, atol=1e-12)
        assert int(out.nfe) == 10  # the network's evaluations
    seen = inverse.measurement(inverse.mask(np.array([True, True, False, True])), x[[0, 1, 3]], 0.1)
    found = inverse.deep_prior(lines, theta, seen, 3, Descent(), 0.6)
    own, mean = theta, PATTERN @ theta
    for _ in range(3):
        f = PATTERN @ own
        mean = 0.6 * mean + 0.4 * f
        own = own - 0.3 * PATTERN[[0, 1, 3]].T @ (-2 * (x - f)[[0, 1, 3]] / 3)
    np.testing.assert_allclose(found, mean, rtol=1e-12)
    np.testing.assert_allclose(total_variation(jnp.array([[1.0, 3.0], [0.0, 3.0]])), 0.5 + 2.5)


# --- cubes ------------------------------------------------------------------------------------------------------------


def cubes(rng, count):
    """Two blobs with two smooth spectra, from 0 to 1."""
    rows, columns = np.mgrid[:SIDE, :SIDE] / SIDE
    found = []
    for _ in range(count):
        centres, widths, phases = rng.uniform(0.2, 0.8, (2, 2)), rng.uniform(0.05, 0.12, 2), rng.uniform(0, np.pi, 2)
        pairs = zip(centres, widths, strict=True)
        blobs = np.stack([np.exp(-((rows - a) ** 2 + (columns - b) ** 2) / width) for (a, b), width in pairs])
        spectra = 0.5 + 0.5 * np.sin(np.linspace(0, 3, BANDS) + phases[:, None])
        cube = np.einsum("rhw,rb->hwb", blobs, spectra)
        found.append(cube / cube.max())
    return np.stack(found)


@pytest.mark.paper(
    "DDS2M: Self-Supervised Denoising Diffusion Spatio-Spectral Model for Hyperspectral Image Restoration"
)
def test_completion_and_denoising_without_training_data():
    """Half of the entries, noise 0.1; all of them, noise 0.3: better than the same network without the diffusion.

    The deep prior has as many evaluations of the network, by which it has fitted the noise.  DDRM alone has a Gaussian
    of independent entries as its prior, with the data's mean and variance.
    """
    count, steps, fits = 24, 20, 10
    rng = np.random.default_rng(5)
    clean = np.tile(cubes(rng, count), (2, 1, 1, 1))
    weights = np.concatenate([rng.random(clean[:count].shape) < 0.5, np.ones(clean[:count].shape)])
    stds = np.repeat([0.1, 0.3], count)
    y = weights * (clean + stds[:, None, None, None] * rng.normal(size=clean.shape))
    given = [jnp.asarray(part, jnp.float32) for part in (weights, stds, y)]
    keys = jax.random.split(jax.random.key(1), 2 * count)
    flat = oracles.gaussian(np.full(clean.shape[1:], clean.mean()), clean.var())
    grid = grids.uniform(PROCESS, steps, start=0.7)

    def alone(key, w, std, y):
        solver = inverse.ddrm(inverse.measurement(inverse.diagonal(w), y, std), 1.0, 1.0)
        return sample(key, flat, solver, grid, x=y, start=0.7).x

    def dds2m(key, w, std, y):
        solver = inverse.ddrm(inverse.measurement(inverse.diagonal(w), y, std), 1.0, 1.0)
        denoise = inverse.dds2m(NETWORK, NETWORK.init(key), fits, limits=(0.0, 1.0))
        return sample(key, denoise, solver, grid, x=y, start=0.7).x

    def deep_prior(key, w, std, y):
        seen = inverse.measurement(inverse.diagonal(w), y, std)
        return inverse.deep_prior(NETWORK, NETWORK.init(key), seen, steps * fits)

    psnr = lambda x: -10 * np.log10(np.mean((np.asarray(x) - clean) ** 2, axis=(1, 2, 3))).reshape(2, count)
    found, untrained, basic = (psnr(jax.jit(jax.vmap(f))(keys, *given)) for f in (dds2m, deep_prior, alone))
    for other in (untrained, basic):
        gap = found - other
        assert np.all(gap.mean(1) > 4 * gap.std(1, ddof=1) / np.sqrt(count)), (found, other)


@pytest.mark.parametrize(
    "wrong, name",
    [
        (lambda: inverse.spatio_spectral((6, 8, 3), 2, jax.random.key(0)), "multiples of 4"),
        (lambda: inverse.spatio_spectral((8, 8, 3), 0, jax.random.key(0)), "rank"),
        (lambda: inverse.spatio_spectral((8, 8, 3), 2, jax.random.key(0), hidden=()), "hidden"),
        (lambda: inverse.dds2m(lines, np.zeros(2), 0), "iterations"),
        (lambda: inverse.dds2m(lines, np.zeros(2), average=1.5), "average"),
        (lambda: inverse.dds2m(lines, np.zeros(2), variation=-1.0), "variation"),
        (lambda: inverse.dds2m(lines, np.zeros(2), limits=(1.0, 0.0)), "limits"),
        (lambda: inverse.deep_prior(lines, np.zeros(2), None, iterations=0), "iterations"),
    ],
)
def test_refusals(wrong, name):
    with pytest.raises(ValueError, match=name):
        wrong()
