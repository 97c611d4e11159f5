"""PSNR and SSIM against their definitions, written anew with SciPy's filters, and against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from diffjax import metrics

GENERATOR = np.random.default_rng(3)
IMAGES, TRUTH = GENERATOR.uniform(size=(2, 3, 17, 14))


def scipy_ssim(x, y, span):
    """The published definition as scikit-image computes it: Gaussian filter, then the border of a half window off."""
    local = lambda z: scipy.ndimage.gaussian_filter(z, 1.5, truncate=3.5, mode="reflect")[5:-5, 5:-5]
    mx, my = local(x), local(y)
    vx, vy, cov = local(x * x) - mx**2, local(y * y) - my**2, local(x * y) - mx * my
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    return np.mean((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))


def test_ssim_is_the_published_one():
    for span in (1.0, 255.0):
        expected = [scipy_ssim(span * x, span * y, span) for x, y in zip(IMAGES, TRUTH, strict=True)]
        np.testing.assert_allclose(metrics.ssim(span * IMAGES, span * TRUTH, span), expected, rtol=1e-12)


def test_channels_are_averaged():
    pair = np.stack([IMAGES, TRUTH], -1), np.stack([TRUTH, TRUTH], -1)
    np.testing.assert_allclose(metrics.ssim(*pair), 0.5 * (metrics.ssim(IMAGES, TRUTH) + 1), rtol=1e-12)


def test_ssim_of_constant_images():
    a, b = 0.3, 0.8  # no variance: luminance alone
    flat = lambda level: np.full((1, 12, 12), level)
    expected = (2 * a * b + 1e-4) / (a**2 + b**2 + 1e-4)
    np.testing.assert_allclose(metrics.ssim(flat(a), flat(b)), expected, rtol=1e-12)
    for level in (0.0, 0.3):
        np.testing.assert_allclose(metrics.ssim(flat(level), flat(level)), 1.0, rtol=1e-12)


def test_ssim_keeps_its_accuracy_for_bright_images():
    shifted = 1e6 + TRUTH[:1], 1e6 + IMAGES[:1]
    found = metrics.ssim(*(x.astype(np.float64) for x in shifted))
    # the means agree to 1e-6: what is left is the structure
    local = lambda z: scipy.ndimage.gaussian_filter(z, 1.5, truncate=3.5)[5:-5, 5:-5]
    x, y = TRUTH[0], IMAGES[0]
    both = 2 * (local(x * y) - local(x) * local(y)) + 9e-4
    expected = np.mean(both / (local(x * x) - local(x) ** 2 + local(y * y) - local(y) ** 2 + 9e-4))
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_psnr():
    noise = GENERATOR.normal(size=TRUTH.shape)
    noise *= 0.1 / np.sqrt(np.mean(noise**2, axis=(1, 2), keepdims=True))
    np.testing.assert_allclose(metrics.psnr(TRUTH + noise, TRUTH), 20.0, rtol=1e-12)
    np.testing.assert_allclose(metrics.psnr(TRUTH + noise, TRUTH, 2.0), 20 + 20 * np.log10(2), rtol=1e-12)
    assert np.all(metrics.psnr(TRUTH, TRUTH) == np.inf)


def test_traced_and_differentiated(x64):
    both = lambda x: (metrics.psnr(x, TRUTH), metrics.ssim(x, TRUTH))
    for found, expected in zip(jax.jit(both)(jnp.asarray(IMAGES)), both(IMAGES), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    slope = jax.grad(lambda x: metrics.ssim(x, jnp.asarray(TRUTH)).sum())(jnp.asarray(TRUTH))
    np.testing.assert_allclose(slope, 0, atol=1e-12)  # the truth is the maximum


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.psnr(IMAGES, TRUTH[:2]), "one shape"),
        (lambda: metrics.psnr(IMAGES, TRUTH, 0.0), "span"),
        (lambda: metrics.ssim(IMAGES[:, :8], TRUTH[:, :8]), "window"),
        (lambda: metrics.ssim(IMAGES, TRUTH, window=4), "window"),
        (lambda: metrics.ssim(IMAGES, TRUTH, std=0.0), "std"),
        (lambda: metrics.ssim(IMAGES[0], TRUTH[0]), "shape"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
