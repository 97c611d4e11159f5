"""Intervals around reconstructions with a guarantee: calibrated quantiles and risk-controlling prediction sets.

All is on arrays of the host, in float64: samples of a posterior by any method go in, interval ends come out.  With the
0-1 loss of an image, the share of its entries outside their intervals, a calibration set of n independent images gives

    P( risk of the intervals <= eps ) >= 1 - delta,

whatever the sampler and the law of the images, as long as those of the calibration are like those to come.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import betaincinv

from diffjax.levels import Array


class Intervals(NamedTuple):
    """``[lower - margin, upper + margin]`` is the interval of an entry."""

    margin: Array  # a number, or an array of one sample's shape
    bound: float  # on the risk, with confidence 1 - delta


def calibrated_quantiles(samples: Array, alpha: float = 0.1) -> tuple[Array, Array]:
    """Lower and upper ends, entry by entry, that a further draw is between with probability at least 1 - alpha.

    The order statistics of ranks ``floor((m + 1) alpha / 2)`` and ``ceil((m + 1) (1 - alpha / 2))`` of m draws;
    infinite ends where m is below ``2 / alpha - 1``.

    Args:
        samples: (m, ...) draws of one posterior.
        alpha: above 0 and below 1.

    Returns two arrays of one sample's shape.  No denoiser calls.

    How to Trust Your Diffusion Model: A Convex Optimization Approach to Conformal Risk Control, arXiv:2302.03791.

    Raises ValueError for an alpha out of range.

    >>> [float(end) for end in calibrated_quantiles(np.arange(19.0), 0.2)]
    [1.0, 17.0]
    """
    _fraction("alpha", alpha)
    ordered = np.sort(np.asarray(samples, np.float64), axis=0)
    count = len(ordered)
    # the products are of numbers such as 0.1: a rank that is an integer must not fall beside it
    low = int(np.floor((count + 1) * alpha / 2 + 1e-9))
    lower = ordered[low - 1] if low >= 1 else np.full(ordered.shape[1:], -np.inf)
    upper = ordered[count - low] if low >= 1 else np.full(ordered.shape[1:], np.inf)
    return lower, upper


def hoeffding_bentkus(risk: Array, count: int, delta: float) -> Array:
    """The upper confidence bound of a mean from the mean of ``count`` independent values in [0, 1].

    The true mean is above it with probability at most delta: the smaller of the bounds that solve

        exp(-n h(min(r, R), R)) = delta,     h(a, b) = a log(a / b) + (1 - a) log((1 - a) / (1 - b)),
        e P(Binomial(n, R) <= ceil(n r)) = delta.

    Args:
        risk: r, any array of numbers in [0, 1].
        count: n, at least 1.
        delta: above 0 and below 1.

    How to Trust Your Diffusion Model: A Convex Optimization Approach to Conformal Risk Control, arXiv:2302.03791,
    with the ceiling that Bentkus's inequality needs.

    Raises ValueError for arguments out of range.

    >>> float(hoeffding_bentkus(0.0, 100, 0.1))  # 1 - delta^(1/n), of both
    0.0227...
    """
    _fraction("delta", delta)
    risk = np.asarray(risk, np.float64)
    if count < 1 or not np.all((risk >= 0) & (risk <= 1)):
        raise ValueError(f"need count >= 1 and risks from 0 to 1, got {count!r} and {risk!r}.")
    hits = np.ceil(count * risk - 1e-9)  # risks are multiples of 1 / (n d), up to rounding
    inside = hits < count
    bentkus = np.where(inside, betaincinv(hits + 1, np.where(inside, count - hits, 1.0), 1 - delta / np.e), 1.0)
    low, high = risk, np.ones_like(risk)
    for _ in range(60):
        middle = 0.5 * (low + high)
        beyond = count * _divergence(risk, middle) > -np.log(delta)
        low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
    return np.minimum(high, bentkus)


def rcps(
    lower: Array, upper: Array, truth: Array, eps: float = 0.1, delta: float = 0.1, offset: Array = 0.0
) -> Intervals:
    """The smallest margin, one for all entries, whose risk is at most eps with confidence 1 - delta.

        margin = offset + min { b : bound(mean_ij 1[x_ij outside [l - offset - b, u + offset + b]]) <= eps }

    The risk is a step function of b, so that the minimum is an order statistic, and there is no step size.

    Args:
        lower, upper, truth: (n, ...) interval ends and true values of the calibration set.
        eps, delta: above 0 and below 1.
        offset: margins to start from, chosen on other data: a number or an array of one sample's shape.

    Returns `Intervals`; a margin may be negative.

    How to Trust Your Diffusion Model: A Convex Optimization Approach to Conformal Risk Control, arXiv:2302.03791.

    Raises ValueError for shapes that differ, and for a calibration set so small that no margin will do.
    """
    lower, upper, truth = _checked(lower, upper, truth, eps, delta)
    count, offset = len(truth), np.asarray(offset, np.float64)
    beyond = np.sort((np.maximum(lower - truth, truth - upper) - offset).reshape(-1))[::-1]
    if hoeffding_bentkus(0.0, count, delta) > eps:
        raise ValueError(f"{count} calibration samples are too few for eps={eps!r} and delta={delta!r}.")
    low, high = 0, beyond.size  # how many entries may be outside: low may, high may not (their bound is 1)
    while high - low > 1:
        middle = (low + high) // 2
        good = hoeffding_bentkus(middle / beyond.size, count, delta) <= eps
        low, high = (middle, high) if good else (low, middle)
    bound = hoeffding_bentkus(np.mean(beyond > beyond[low]), count, delta)
    return Intervals(offset + beyond[low], float(bound))


def k_rcps(
    lower: Array,
    upper: Array,
    truth: Array,
    groups: Array,
    eps: float = 0.1,
    delta: float = 0.1,
    *,
    optimised: int,
    gamma: Array = (0.1, 0.3, 0.5, 0.7),
) -> Intervals:
    """A margin for every group of entries, of the least mean length, and then calibrated as `rcps`.

        argmin_m sum_k n_k m_k   subject to   mean_ij [ (1 + q) 2 |x_ij - c_ij| / (u - l + 2 m)_ij - q ]_+ <= eps,

    c the middle of an interval, q = gamma / (1 - gamma): a convex bound of the 0-1 loss.  Its dual falls apart into one
    equation for every group, so that bisection solves it.  The gamma of the shortest calibrated intervals on the
    samples of the optimisation is taken; the others only calibrate, which keeps the guarantee.

    Args:
        lower, upper, truth: (n, ...) interval ends and true values.
        groups: of one sample's shape: the number 0 .. K - 1 of every entry's group (see `error_groups`), which must not
            depend on the calibration's part of the data.
        optimised: how many of the n, the first ones, choose the margins; the rest calibrates.
        gamma: the candidates, from 0 to below 1.

    Returns `Intervals`, the margin an array of one sample's shape.

    How to Trust Your Diffusion Model: A Convex Optimization Approach to Conformal Risk Control, arXiv:2302.03791.

    Raises ValueError for arguments that do not fit.
    """
    lower, upper, truth = _checked(lower, upper, truth, eps, delta)
    groups = np.asarray(groups)
    if groups.shape != truth.shape[1:] or not np.issubdtype(groups.dtype, np.integer) or groups.min() < 0:
        raise ValueError(f"groups must be integers >= 0 of shape {truth.shape[1:]}, got {groups!r}.")
    if not 1 <= optimised < len(truth):
        raise ValueError(f"optimised must be from 1 to {len(truth) - 1}, got {optimised!r}.")
    gammas = np.atleast_1d(np.asarray(gamma, np.float64))
    if not np.all((gammas >= 0) & (gammas < 1)):
        raise ValueError(f"gamma must be from 0 to below 1, got {gamma!r}.")
    low, high, true = lower[:optimised], upper[:optimised], truth[:optimised]
    offsets = [convex_margins(low, high, true, groups, eps, q / (1 - q)) for q in gammas]
    beyond = np.maximum(low - true, true - high)
    # the margin that the empirical risk of the optimisation's own samples would need
    lengths = [np.mean(o) + np.sort((beyond - o).reshape(-1))[::-1][int(eps * beyond.size)] for o in offsets]
    best = offsets[int(np.argmin(lengths))]
    return rcps(lower[optimised:], upper[optimised:], truth[optimised:], eps, delta, offset=best)


def error_groups(lower: Array, upper: Array, truth: Array, count: int) -> Array:
    """Groups 0 .. count - 1 of equally many entries, by the mean distance of the truth from the middle of its interval.

    Arguments as for `k_rcps`, whose samples of the calibration must not be among these.
    """
    distance = np.mean(np.abs(np.asarray(truth) - 0.5 * (np.asarray(lower) + np.asarray(upper))), axis=0)
    ranks = np.argsort(np.argsort(distance.reshape(-1), kind="stable"), kind="stable")
    return (ranks * count // distance.size).reshape(distance.shape)


def convex_margins(lower: Array, upper: Array, truth: Array, groups: Array, eps: float, q: float) -> Array:
    """The minimiser of `k_rcps`, an array of one sample's shape; margins are at least minus half the least width."""
    names = np.unique(groups)
    far = [2 * (1 + q) * np.abs(truth - 0.5 * (lower + upper))[:, groups == k] for k in names]
    width = [(upper - lower)[:, groups == k] for k in names]
    sizes = np.array([np.sum(groups == k) for k in names])

    def slopes(margin: Array) -> Array:  # of the groups' sums of losses
        spans = [w + 2 * m for w, m in zip(width, margin, strict=True)]
        return np.array([-np.sum(np.where(f > q * s, 2 * f / s**2, 0.0)) for f, s in zip(far, spans, strict=True)])

    def risk(margin: Array) -> float:
        spans = [w + 2 * m for w, m in zip(width, margin, strict=True)]
        return sum(np.sum(np.maximum(f / s - q, 0.0)) for f, s in zip(far, spans, strict=True)) / truth.size

    least = np.array([-0.5 * np.min(w) for w in width])
    # without a q the loss is below eps only where the width is far / eps
    most = least + np.array([np.max(f) for f in far]) / max(q, eps) + 1e-12

    def best(price: float) -> Array:  # sizes + price slopes = 0
        low, high = least, most
        for _ in range(40):
            middle = 0.5 * (low + high)
            more = sizes + price * slopes(middle) < 0
            low, high = np.where(more, middle, low), np.where(more, high, middle)
        return high

    low, high = -20.0, 20.0  # the logarithm of the price of risk
    for _ in range(36):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if risk(best(np.exp(middle))) > eps else (low, middle)
    margin = np.zeros(groups.shape)
    for name, m in zip(names, best(np.exp(high)), strict=True):
        margin[groups == name] = m
    return margin


def _divergence(a: Array, b: Array) -> Array:
    """The divergence of Bernoulli laws, b > a; 0 log 0 = 0."""
    safe = lambda top, bottom: np.where(top > 0, top * np.log(np.where(top > 0, top, 1.0) / bottom), 0.0)
    return safe(a, np.maximum(b, 1e-300)) + safe(1 - a, np.maximum(1 - b, 1e-300))


def _fraction(name: str, number: float) -> None:
    if not 0 < number < 1:
        raise ValueError(f"{name} must be above 0 and below 1, got {number!r}.")


def _checked(lower: Array, upper: Array, truth: Array, eps: float, delta: float) -> tuple[Array, Array, Array]:
    _fraction("eps", eps)
    _fraction("delta", delta)
    lower, upper, truth = (np.asarray(part, np.float64) for part in (lower, upper, truth))
    if not lower.shape == upper.shape == truth.shape or truth.ndim < 1:
        raise ValueError(
            f"lower, upper and truth must have one shape, got {lower.shape}, {upper.shape}, {truth.shape}."
        )
    if not np.all(lower <= upper):
        raise ValueError("lower must not be above upper.")
    return lower, upper, truth
