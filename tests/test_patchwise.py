"""Patches of an image, denoised one by one and put together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import corrections, grids, oracles, processes, solvers

PROCESS = processes.edm(10.0)
LEVEL = PROCESS.level(0.7)
GENERATOR = np.random.default_rng(0)
PATCH = oracles.mixture([0.3, 0.7], GENERATOR.normal(size=(2, 3, 3, 2)), [0.3, 0.6])


def test_overlapping_estimates_are_averaged(x64):
    """Against a loop over patches; 7 = 3 + 2 + 2 and 8 = 3 + 2 + 2 + 1, so that the last column's patch is moved."""
    x = GENERATOR.normal(size=(7, 8, 2))
    total, count = np.zeros(x.shape), np.zeros(x.shape)
    single = jax.jit(lambda part: PATCH(part, LEVEL))
    for i in (0, 2, 4):
        for j in (0, 2, 4, 5):
            at = np.s_[i : i + 3, j : j + 3]
            total[at] += np.asarray(single(jnp.asarray(x[at])))
            count[at] += 1
    found = jax.jit(corrections.patchwise(PATCH, 3, 2))(jnp.asarray(x), LEVEL)
    np.testing.assert_allclose(found, total / count, rtol=1e-12)


def test_patches_that_do_not_overlap_are_independent_samples(x64):
    """Then the whole image has an exact law: a sampler's image is that of its patches' own runs."""
    grid = grids.log_snr(PROCESS, 4, stop=0.05)
    start = jnp.asarray(10.0 * GENERATOR.normal(size=(6, 3, 2)))
    run = lambda denoise, x: diffjax.sample(jax.random.key(0), denoise, solvers.ddim(), grid, x=x)
    whole = run(corrections.patchwise(PATCH, 3, 3), start)
    parts = jax.vmap(lambda x: run(PATCH, x))(start.reshape(2, 3, 3, 2))
    np.testing.assert_allclose(whole.x, parts.x.reshape(6, 3, 2), rtol=1e-10)
    assert whole.nfe == 4


def test_a_patch_as_large_as_the_image_is_the_denoiser_itself():
    x = jnp.asarray(GENERATOR.normal(size=(3, 3, 2)), jnp.float32)
    np.testing.assert_array_equal(corrections.patchwise(PATCH, 3, 1)(x, LEVEL), PATCH(x, LEVEL))


def test_bad_input():
    for patch, stride in ((0, 1), (3, 0), (3, 4)):
        with pytest.raises(ValueError, match="stride"):
            corrections.patchwise(PATCH, patch, stride)
    with pytest.raises(ValueError, match="remember"):
        corrections.patchwise(corrections.dualfast(PATCH), 3, 1)
    with pytest.raises(ValueError, match="at least 3 pixels"):
        corrections.patchwise(PATCH, 3, 1)(jnp.zeros((2, 5, 2)), LEVEL)
    with pytest.raises(ValueError, match="one noise level"):
        corrections.patchwise(PATCH, 3, 1).check(PROCESS.level(np.ones((4, 3, 1, 1))))
