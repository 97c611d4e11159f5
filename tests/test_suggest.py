"""The rule that turns data statistics into noise levels."""

import numpy as np
import pytest

import diffjax


def test_the_constants_of_edm_at_its_own_data():
    rng = np.random.default_rng(0)
    images = rng.choice([-0.5, 0.5], size=(64, 3072))
    found = diffjax.suggest(diffjax.processes.edm(1e4), images)
    np.testing.assert_allclose(found.sigma_data, 0.5, rtol=0.02)
    np.testing.assert_allclose(found.sigma_max, 80.0, rtol=0.01)
    np.testing.assert_allclose(found.sigma_min, 0.002, rtol=0.02)
    np.testing.assert_allclose(found.p_mean, -1.2, atol=0.02)
    assert (found.rho, found.p_std) == (7.0, 1.2)
    np.testing.assert_allclose([found.start, found.stop], [found.sigma_max, found.sigma_min])


def test_scale_and_tolerance():
    data = np.random.default_rng(1).normal(size=(500, 4, 3)) + 0.3
    process = diffjax.processes.edm(1e6)
    one, three = diffjax.suggest(process, data), diffjax.suggest(process, 3 * data)
    for name in ("sigma_data", "sigma_min", "sigma_max", "start", "stop"):
        np.testing.assert_allclose(getattr(three, name), 3 * getattr(one, name), rtol=1e-9)
    np.testing.assert_allclose(three.p_mean - one.p_mean, np.log(3))
    np.testing.assert_allclose(diffjax.suggest(process, data, 0.24).sigma_max, one.sigma_max / 2)


def test_the_prior_is_within_the_tolerance_for_gaussian_data():
    # KL(N(m, v + s^2) || N(0, s^2)) in closed form, at sigma_max
    rng = np.random.default_rng(2)
    mean, variance = np.array([0.5, -1.0, 2.0]), np.array([0.2, 1.5, 4.0])
    data = mean + np.sqrt(variance) * rng.normal(size=(20000, 3))
    for tolerance in (0.02, 0.2):
        s2 = diffjax.suggest(diffjax.processes.edm(1e6), data, tolerance).sigma_max ** 2
        ratio = (variance + s2) / s2
        divergence = 0.5 * np.sum(ratio - 1 - np.log(ratio) + mean**2 / s2)
        assert divergence < tolerance
    assert divergence > 0.1 * tolerance  # not wildly pessimistic


def test_the_range_of_the_process_is_kept_and_grids_take_the_result():
    data = np.random.default_rng(3).normal(size=(100, 50))
    for process in (diffjax.processes.vp(), diffjax.processes.flow(), diffjax.processes.ve(0.01, 5.0)):
        found = diffjax.suggest(process, data)
        assert 0 <= found.stop < found.start <= process.end
        np.testing.assert_allclose(np.exp(-process.level(found.start).half_log_snr), found.sigma_max, rtol=1e-6)
        grid = diffjax.grids.karras(process, 10, found.rho, found.sigma_max, found.sigma_min)
        assert len(grid) == 10
    assert diffjax.suggest(diffjax.processes.ve(0.01, 5.0), data).sigma_max == pytest.approx(5.0)


@pytest.mark.parametrize("data", [np.zeros((1, 3)), np.ones((5, 3)), np.full((5, 3), np.nan), np.array(1.0)])
def test_refusals(data):
    with pytest.raises(ValueError, match="data"):
        diffjax.suggest(diffjax.processes.vp(), data)
    with pytest.raises(ValueError, match="tolerance"):
        diffjax.suggest(diffjax.processes.vp(), np.eye(3), tolerance=0.0)
