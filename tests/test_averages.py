"""Moving averages: power functions, their widths, and averages of other widths made after the run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from diffjax.training import ema

STEPS = 1536


def _direct(path, std, count):
    """The average by its definition: weights are the increments of (tau / t)^(gamma + 1)."""
    power = ema.exponent(std) + 1
    edges = np.arange(count + 1) / count
    return np.diff(edges**power) @ path[:count]


def _path():
    """Parameters that drift, oscillate and shake."""
    rng = np.random.default_rng(0)
    t = np.arange(1, STEPS + 1)[:, None] / STEPS
    return np.sin(t * rng.uniform(1, 20, 6)) + 3 * np.exp(-6 * t) + 0.3 * rng.normal(size=(STEPS, 6))


def test_width_is_the_standard_deviation_of_the_profile():
    for std in (0.01, 0.05, 0.1, 0.25):
        gamma = ema.exponent(std)
        mean = quad(lambda t, g=gamma: (g + 1) * t ** (g + 1), 0, 1)[0]
        second = quad(lambda t, g=gamma: (g + 1) * t ** (g + 2), 0, 1)[0]
        np.testing.assert_allclose([(second - mean**2) ** 0.5, ema.width(gamma)], std, rtol=1e-7)
    # as published for the two that are kept
    np.testing.assert_allclose([ema.exponent(0.05), ema.exponent(0.10)], [16.97, 6.94], atol=0.01)


def test_products_of_profiles_are_integrals():
    """What least squares solves with: weights of two averages, against quadrature of the squared distance."""
    steps, stds, std, step = [300, 500], [0.05, 0.1], 0.08, 600
    found = ema.profile_weights(steps, stds, std, step)
    profile = lambda tau, std, t: (ema.exponent(std) + 1) * (tau / t) ** ema.exponent(std) / t * (tau <= t)
    parts = [*zip(stds, steps, strict=True), (std, step)]
    tau = (np.arange(600_000) + 0.5) / 1000
    rows = np.array([profile(tau, *part) for part in parts])
    gram = rows @ rows.T / 1000
    np.testing.assert_allclose(found, np.linalg.solve(gram[:2, :2], gram[:2, 2]), rtol=1e-4)


def test_power_averages_in_the_step_and_after_it():
    """The compiled update has the profile's weights; any width is made of two that were kept; nothing is lost."""
    path = _path()
    decay = ema.several(ema.power(0.05), ema.power(0.1))
    every = STEPS // 32

    @jax.jit
    def run(path):
        def body(carry, item):
            average, step = carry
            average = decay.update(average, {"w": item}, step)
            return (average, step + 1), None

        def part(carry, items):
            carry, _ = jax.lax.scan(body, carry, items)
            return carry, carry[0]

        start = decay.init({"w": jnp.full(6, 1e3)})  # the initial parameters, which are to be forgotten
        return jax.lax.scan(part, (start, jnp.zeros((), jnp.int32)), path.reshape(32, every, 6))[1]

    kept = jax.tree.map(np.asarray, run(jnp.asarray(path, jnp.float32)))
    steps = [every * (i + 1) for i in range(32)]
    for std, found in zip((0.05, 0.1), kept, strict=True):
        np.testing.assert_allclose(found["w"][-1], _direct(path, std, STEPS), atol=2e-5)
        np.testing.assert_allclose(found["w"][4], _direct(path, std, steps[4]), atol=2e-5)
    averages = [jax.tree.map(lambda leaf, i=i: leaf[i], one) for i in range(32) for one in kept]
    known = [step for step in steps for _ in range(2)], [0.05, 0.1] * 32
    spread = path.std(0).mean()
    for std, error in (
        (0.03, 2e-3),
        (0.07, 2e-4),
        (0.1, 2e-5),
        (0.15, 3e-4),
        (0.25, 0.03),
    ):  # a flat one has 1 percent of its weight before the first that was kept
        found = ema.reconstruct(averages, *known, std)["w"]
        off = np.abs(found - _direct(path, std, STEPS)).max() / spread
        assert off < error, (std, off)
    # also of a moment inside the run, of a run with one average, and exactly where it was kept
    middle = ema.reconstruct(averages[:40], known[0][:40], known[1][:40], 0.08, steps[19])["w"]
    np.testing.assert_allclose(middle, _direct(path, 0.08, steps[19]), atol=1e-3 * spread)
    single = ema.reconstruct(averages[::2], known[0][::2], known[1][::2], 0.1)["w"]
    np.testing.assert_allclose(single, _direct(path, 0.1, STEPS), atol=0.02 * spread)
    same = ema.reconstruct(averages, *known, 0.05, STEPS)["w"]
    np.testing.assert_allclose(same, averages[-2]["w"], atol=1e-5)


def test_bad_averages_are_refused():
    for build in (
        lambda: ema.power(0.0),
        lambda: ema.power(0.3),
        lambda: ema.several(),
        lambda: ema.reconstruct([], [], [], 0.1),
        lambda: ema.reconstruct([1.0], [5], [0.05], 0.1, 4),
        lambda: ema.reconstruct([1.0], [0], [0.05], 0.1),
    ):
        with pytest.raises(ValueError, match=r"must|needs"):
            build()
