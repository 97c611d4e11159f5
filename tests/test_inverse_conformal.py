"""Conformal intervals: the bounds against SciPy, the margins against brute force, and the guarantee against its law."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import brentq, minimize
from scipy.stats import binom, norm

from diffjax import inverse
from diffjax.inverse.conformal import convex_margins

ZEROS = np.zeros((9, 2))
STDS = np.array([0.3, 0.3, 1.0, 3.0])


@pytest.mark.paper("How to Trust Your Diffusion Model: A Convex Optimization Approach to Conformal Risk Control")
def test_the_bound_solves_both_inequalities():
    """Against roots of the p-values as the inequalities state them."""
    relative = lambda a, b: (a * np.log(a / b) if a else 0.0) + (1 - a) * np.log((1 - a) / (1 - b))
    for count, risk, delta in ((10, 0.2, 0.1), (50, 0.013, 0.05), (200, 0.3, 0.01), (7, 0.0, 0.3)):
        hoeffding = lambda r, n=count, a=risk, d=delta: np.exp(-n * relative(a, r)) - d
        bentkus = lambda r, n=count, a=risk, d=delta: np.e * binom.cdf(np.ceil(round(n * a, 9)), n, r) - d
        roots = [brentq(f, risk + 1e-9, 1 - 1e-9, xtol=1e-13) for f in (hoeffding, bentkus)]
        assert abs(inverse.hoeffding_bentkus(risk, count, delta) - min(roots)) < 1e-9
    assert inverse.hoeffding_bentkus(1.0, 5, 0.1) == 1.0


@pytest.mark.paper("How to Trust Your Diffusion Model: A Convex Optimization Approach to Conformal Risk Control")
def test_quantiles_hold_a_further_draw():
    """The coverage of the ranks is exactly 1 - 2 floor((m + 1) alpha / 2) / (m + 1)."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(24, 20_000))
    lower, upper = inverse.calibrated_quantiles(draws[:-1], 0.25)
    share, expected = np.mean((draws[-1] >= lower) & (draws[-1] <= upper)), 1 - 2 * 3 / 24
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 20_000) and expected >= 1 - 0.25
    assert np.all(np.isinf(inverse.calibrated_quantiles(draws[:5], 0.1)))


def calibration(rng, runs, count):
    """Truths N(0, STDS^2) and intervals [-0.1, 0.1] that are much too short for some entries."""
    truth = STDS * rng.normal(size=(runs, count, 4))
    return np.full_like(truth, -0.1), np.full_like(truth, 0.1), truth


@pytest.mark.paper("How to Trust Your Diffusion Model: A Convex Optimization Approach to Conformal Risk Control")
def test_risk_is_controlled_and_groups_are_shorter():
    """Over 48 calibrations the true risk is above eps at most as often as delta allows, and K margins are shorter."""
    rng, eps, delta = np.random.default_rng(1), 0.2, 0.2
    lower, upper, truth = calibration(rng, 1, 400)
    groups = inverse.error_groups(lower[0], upper[0], truth[0], 2)
    assert groups.tolist() == [0, 0, 1, 1]
    groups, risks, lengths = np.array([0, 0, 1, 2]), [], []
    for lower, upper, truth in zip(*calibration(rng, 48, 100), strict=True):
        one = inverse.rcps(lower[30:], upper[30:], truth[30:], eps, delta)
        many = inverse.k_rcps(lower, upper, truth, groups, eps, delta, optimised=30, gamma=0.3)
        margins = one.margin * np.ones(4), many.margin
        risks.append([np.mean(2 * norm.sf((0.1 + m) / STDS)) for m in margins])
        lengths.append([np.mean(m) for m in margins])
        assert max(one.bound, many.bound) <= eps
    failures = np.mean(np.array(risks) > eps, axis=0)
    assert np.all(failures <= delta + 4 * np.sqrt(delta * (1 - delta) / 48))
    assert np.all(np.mean(risks, axis=0) > 0.5 * eps)  # not by being everywhere
    gap = np.diff(lengths, axis=1)[:, 0]
    assert np.mean(gap) < -4 * np.std(gap) / np.sqrt(48)


@pytest.mark.paper("How to Trust Your Diffusion Model: A Convex Optimization Approach to Conformal Risk Control")
def test_margins_are_the_least():
    """`rcps`: a little less breaks the bound. The convex problem: SciPy finds nothing shorter."""
    rng, eps, q = np.random.default_rng(2), 0.3, 0.5
    lower, upper, truth = (part[0] for part in calibration(rng, 1, 60))
    found = inverse.rcps(lower, upper, truth, eps, 0.1)
    outside = lambda m: np.mean((truth < lower - m) | (truth > upper + m))
    assert inverse.hoeffding_bentkus(outside(found.margin), 60, 0.1) <= eps
    assert inverse.hoeffding_bentkus(outside(found.margin - 1e-9), 60, 0.1) > eps
    groups = np.array([0, 0, 1, 1])
    loss = lambda m: np.mean(np.maximum((1 + q) * 2 * np.abs(truth) / (0.2 + 2 * m[groups]) - q, 0))
    margins = convex_margins(lower, upper, truth, groups, eps, q)
    within = {"type": "ineq", "fun": lambda m: eps - loss(m)}
    best = minimize(lambda m: m.sum(), [3.0, 9.0], constraints=within, bounds=[(0, 30)] * 2, method="SLSQP")
    assert best.success, best
    assert abs(loss(margins[[0, 2]]) - eps) < 1e-6
    np.testing.assert_allclose(margins[[0, 2]].sum(), best.x.sum(), rtol=2e-3)


@pytest.mark.parametrize(
    "wrong, name",
    [
        (lambda: inverse.calibrated_quantiles(np.zeros((3, 2)), 1.0), "alpha"),
        (lambda: inverse.hoeffding_bentkus(1.5, 10, 0.1), "risks"),
        (lambda: inverse.rcps(np.zeros((5, 1)), np.zeros((5, 1)), np.zeros((5, 1))), "too few"),
        (lambda: inverse.rcps(np.zeros((5, 1)), np.zeros((5, 2)), np.zeros((5, 1))), "one shape"),
        (lambda: inverse.rcps(np.ones((5, 1)), np.zeros((5, 1)), np.zeros((5, 1))), "above upper"),
        (lambda: inverse.k_rcps(ZEROS, ZEROS, ZEROS, np.zeros(3, int), optimised=4), "groups"),
        (lambda: inverse.k_rcps(ZEROS, ZEROS, ZEROS, np.zeros(2, int), optimised=9), "optimised"),
        (lambda: inverse.k_rcps(ZEROS, ZEROS, ZEROS, np.zeros(2, int), optimised=4, gamma=1.0), "gamma"),
    ],
)
def test_bad_input(wrong, name):
    with pytest.raises(ValueError, match=name):
        wrong()
