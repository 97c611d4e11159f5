"""Filters of `diffjax.inverse` in `diffjax.steer`: unbiased evidence, exact posteriors, exact measurements."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, guidance, inverse, oracles, processes, sample, smc, solvers, steer
from diffjax.levels import value

VP = processes.vp()
MEAN, COVARIANCE = np.array([0.3, -0.2]), np.array([[1.0, 0.4], [0.4, 0.8]])
PRIOR = oracles.gaussian(MEAN, COVARIANCE)
ROW, Y = np.array([1.0, -0.5]), 1.2
ANCESTRAL: Any = solvers.ancestral()
GRID = grids.log_snr(VP, 6, stop=0.3)
NOISES = np.array([1.0, 0.15, 0.0])
KEYS = jax.random.split(jax.random.key(11), 20_000)


@pytest.fixture(autouse=True)
def double(x64):
    """All tests here run in float64."""


def seen_with(std, row=ROW, y=Y):
    return inverse.measurement(inverse.matrix(row[None]), np.array([y]), std)


FILTERS = {
    "conjugate": lambda seen, key: inverse.conjugate(seen),
    "calibrated": lambda seen, key: inverse.conjugate(seen, 0.9),
    "mcgdiff": lambda seen, key: inverse.mcgdiff(seen),
    "fps": lambda seen, key: inverse.fps(seen, key),
    "fps, published": lambda seen, key: inverse.fps(seen, key, once=False),
}
UNBIASED = ["conjugate", "calibrated", "mcgdiff", "fps"]


def populations(name, particles, stds, keys, prior=PRIOR, grid=GRID, **options):
    """Leading axes (noises, keys)."""

    def run(std, key):
        proposal = FILTERS[name](seen_with(std), jax.random.fold_in(key, 1))
        return steer(
            key, prior, ANCESTRAL, grid, (2,), particles=particles, proposal=proposal, dtype=jnp.float64, **options
        )

    return jax.jit(jax.vmap(lambda std: jax.vmap(lambda key: run(std, key))(keys)))(stds)


@pytest.fixture(scope="module")
def chain():
    """Mean and covariance of the discretised chain at the end of every row, in NumPy, by probing the affine steps."""
    with jax.enable_x64(True):
        rows, found = ANCESTRAL.plan(GRID), []
        mean, covariance = np.zeros(2), np.eye(2) * float(rows.t.sigma[0]) ** 2
        for i in range(len(GRID)):
            row = jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), rows)
            step = lambda x, row=row: np.asarray(ANCESTRAL.kernel(x, PRIOR(x, row.t), row)[0])
            shift, std = step(jnp.zeros(2)), float(ANCESTRAL.kernel(jnp.zeros(2), jnp.zeros(2), row)[1])
            slope = np.stack([step(e) - shift for e in jnp.eye(2)], 1)
            mean, covariance = slope @ mean + shift, slope @ covariance @ slope.T + std**2 * np.eye(2)
            found.append((float((rows.s.sigma[i] / rows.s.alpha[i]) ** 2), float(rows.s.alpha[i]), mean, covariance))
    return found


def evidence_of_chain(chain, std, widened_last=None):
    """N(y; A m, A C A^T + what is left of the noise) at the first level that is no noisier than y, or at the last."""
    b2 = std**2 / (ROW @ ROW)
    r2, alpha, mean, covariance = next((level for level in chain if level[0] <= b2), chain[-1])
    if widened_last is not None:  # the exact y in a last step that is noiseless
        covariance = covariance + widened_last * np.eye(2)
    variance = ROW @ covariance @ ROW / alpha**2 + (b2 - r2) * (ROW @ ROW)
    return np.exp(-0.5 * (Y - ROW @ mean / alpha) ** 2 / variance) / np.sqrt(2 * np.pi * variance)


@pytest.mark.parametrize("particles", [2, 4])
@pytest.mark.parametrize("name", UNBIASED)
def test_evidence_is_unbiased_on_the_natural_scale(name, particles, chain):
    """Against the discretised chain, whatever the noise: y is taken in at one level, at the end by `conjugate`."""
    leads_on = name in ("conjugate", "calibrated")
    stds = NOISES[:2] if leads_on else NOISES
    found = populations(name, particles, stds, KEYS if name == "fps" else KEYS[:8000])
    at_the_end = chain[-1:]
    rows = ANCESTRAL.plan(GRID)
    last = float(rows.t.sigma[-1] / rows.t.alpha[-1]) ** 2
    for std, z in zip(stds, np.exp(np.asarray(found.log_z)), strict=True):
        exact = evidence_of_chain(at_the_end if leads_on else chain, std, last if std == 0 else None)
        error = z.std() / np.sqrt(z.size)
        assert error < 0.05 * exact, (error, exact)
        assert abs(z.mean() - exact) < 4 * error, (std, z.mean(), error, exact)
    assert (found.nfe == particles * len(GRID)).all() and (found.failed_at == -1).all()


@pytest.mark.paper("Practical and Asymptotically Exact Conditional Sampling in Diffusion Models")
@pytest.mark.parametrize("particles", [2, 4])
def test_inpainting_twist_is_unbiased_and_meets_y(particles, chain):
    """An exact y through TDS: met to rounding, E[Z] the density of the chain whose last step is widened where seen."""
    seen = seen_with(0.0)

    def run(key):
        twist = inverse.inpainting(seen)
        options: Any = dict(particles=particles, twist=twist, dtype=jnp.float64)
        return steer(key, PRIOR, ANCESTRAL, GRID, (2,), **options)

    found = jax.jit(jax.vmap(run))(KEYS[:8000])
    rows, z = ANCESTRAL.plan(GRID), np.exp(np.asarray(found.log_z))
    exact = evidence_of_chain(chain[-1:], 0.0, float(rows.t.sigma[-1] / rows.t.alpha[-1]) ** 2)
    error = z.std() / np.sqrt(z.size)
    assert error < 0.05 * exact and abs(z.mean() - exact) < 4 * error, (z.mean(), error, exact)
    np.testing.assert_allclose(found.x @ ROW, Y, rtol=1e-9)
    assert (found.nfe == particles * len(GRID)).all() and (found.failed_at == -1).all()


@pytest.mark.paper("Practical and Asymptotically Exact Conditional Sampling in Diffusion Models")
def test_inpainting_where_replacement_is_biased():
    """The hidden entry given the other, of a strongly correlated pair: TDS has its mean, replacement is off."""
    prior = oracles.gaussian(np.zeros(2), np.array([[1.0, 0.9], [0.9, 1.0]]))
    seen = inverse.measurement(inverse.mask(np.array([True, False])), np.array([1.5]), 0.0)
    mean, variance, grid = 0.9 * 1.5, 1 - 0.9**2, grids.log_snr(VP, 60)
    options: Any = dict(particles=512, twist=inverse.inpainting(seen), dtype=jnp.float64)
    found = steer(KEYS[0], prior, ANCESTRAL, grid, (2,), **options)
    w = np.asarray(smc.normalised(found.log_weights))
    got = w @ np.asarray(found.x)[:, 1]
    assert abs(got - mean) < 4 * np.sqrt(variance * (w**2).sum()) + 0.03
    np.testing.assert_allclose(found.log_z, -0.5 * (1.5**2 + np.log(2 * np.pi)), atol=0.1)
    replaced = lambda key: (
        sample(key, inverse.replacement(prior, seen, key), ANCESTRAL, grid, shape=(2,), dtype=jnp.float64).x
    )
    x = np.asarray(jax.jit(jax.vmap(replaced))(KEYS[:2000]))
    assert abs(x[:, 1].mean() - mean) > 4 * x[:, 1].std() / 2000**0.5 + 0.05


MIXTURE = oracles.mixture(np.array([0.4, 0.6]), np.array([[1.0, 0.8], [-0.4, -1.0]]), np.array([0.3, 0.5]))


def weighted(name, std, prior, populations_=32):
    """Means and variances along the measured direction and across, of every population, and their weights."""
    grid = grids.log_snr(VP, 100, start=VP.level(half_log_snr=-3.0).time)
    found = populations(name, 128, np.array([std]), KEYS[:populations_], prior, grid)
    found = jax.tree.map(lambda leaf: np.asarray(leaf[0]), found)
    along = ROW / np.linalg.norm(ROW)
    x = found.x @ np.stack([along, [-along[1], along[0]]], 1)
    w = np.asarray(jax.vmap(smc.normalised)(found.log_weights))
    return np.einsum("pn,pnd->pd", w, x), np.einsum("pn,pnd->pd", w, x**2), found


@pytest.mark.parametrize("name", UNBIASED)
def test_posterior_of_a_mixture(name):
    """First and second moments of the exact posterior, within error bars over populations and a step's bias."""
    after = inverse.posterior(MIXTURE, seen_with(0.5))
    along = ROW / np.linalg.norm(ROW)
    basis = np.stack([along, [-along[1], along[0]]], 1)
    covariances = np.einsum("kde,ke,kfe->kdf", after.vectors, after.variances, after.vectors)
    means = after.means @ basis
    seconds = np.einsum("kdf,di,fi->ki", covariances, basis, basis) + means**2
    first, second, found = weighted(name, 0.5, MIXTURE)
    share = np.exp(found.log_z - found.log_z.max()) if name == "fps" else np.ones(len(first))
    share = share / share.sum()
    for got, exact in ((first, after.weights @ means), (second, after.weights @ seconds)):
        error = np.sqrt(share**2 @ (got - share @ got) ** 2)
        assert (error < 0.12).all(), error
        assert (np.abs(share @ got - exact) < 4 * error + 0.03).all(), (share @ got, exact, error)


def test_measuring_anew_at_every_level_is_too_sure():
    """As published, every level below the noise is one more measurement of the same y; counted once it is one."""
    exact = inverse.posterior(oracles.gaussian(np.zeros(2), np.eye(2)), seen_with(1.0))
    along = ROW / np.linalg.norm(ROW)
    wide = float(along @ (exact.vectors * exact.variances) @ exact.vectors.T @ along)
    spread = {}
    for name in ("fps", "fps, published"):
        first, second, _ = weighted(name, 1.0, oracles.gaussian(np.zeros(2), np.eye(2)))
        spread[name] = second[:, 0].mean() - first[:, 0].mean() ** 2
    assert abs(spread["fps"] / wide - 1) < 0.25 and spread["fps, published"] < 0.3 * wide, (spread, wide)


def test_weights_are_constant_where_the_data_are_as_assumed():
    """Data N(0, v I): only the steps' error is left, nothing is resampled, and log Z is the evidence."""
    prior, grid = oracles.gaussian(np.zeros(2), 0.9 * np.eye(2)), grids.log_snr(VP, 100)
    found = populations("calibrated", 128, np.array([0.3]), KEYS[:4], prior, grid)
    assert not found.resampled.any() and found.ess[..., -1].min() > 110
    np.testing.assert_allclose(found.log_z, inverse.evidence(prior, seen_with(0.3)), atol=0.1)


def test_what_is_not_seen_and_constants_of_y():
    """A rank-deficient operator: log Z is that of the measurement, with what no x explains."""
    rows = np.stack([ROW, 2 * ROW])  # one direction, seen twice
    seen = inverse.measurement(inverse.matrix(rows), np.array([Y, 2 * Y + 0.1]), 0.3)
    prior, grid = oracles.gaussian(np.zeros(2), 0.9 * np.eye(2)), grids.log_snr(VP, 100)
    found = steer(
        KEYS[0], prior, ANCESTRAL, grid, (2,), particles=512, proposal=inverse.conjugate(seen, 0.9), dtype=jnp.float64
    )
    np.testing.assert_allclose(found.log_z, inverse.evidence(prior, seen), atol=0.1)


# --- one row ------------------------------------------------------------------------------------------------------

SINGULAR = np.array([2.0, 0.5, 0.0])
LEFT, RIGHT = (np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0] for seed in (3, 4))
MATRIX = LEFT @ np.diag(SINGULAR) @ RIGHT.T
DENSE = inverse.matrix(MATRIX)
STATE, SHOWN = np.array([0.7, -1.1, 0.4]), np.array([0.9, -0.3, 1.4])


def potential_of(name, std, levels, i):
    """``(V, whether there is one, whether it leads, what u is multiplied by)`` in row i of what is seen: the table."""
    b2, r2, last = (std / SINGULAR[:2]) ** 2, levels[i], i == len(levels) - 1
    below = [[level for level in levels if level <= b] for b in b2]
    p2 = np.array([max(each, default=levels[-1]) for each in below])
    if name in ("conjugate", "calibrated"):
        # of data N(0, v I): x_0 | x_t ~ N(k x_t / alpha, k r^2), and u = A^+ y ~ N(x_0, b^2)
        k = 1.0 if last or name == "conjugate" else 0.9 / (0.9 + r2)
        return (b2 + (0.0 if last else k * r2)) / k**2, np.ones(2, bool), np.full(2, not last), 1 / k
    if name == "fps, published":
        return b2, np.ones(2, bool), np.zeros(2, bool), 1.0
    missing = np.maximum(b2 - p2, 0.0)
    if name == "mcgdiff":
        return np.maximum(r2 - p2, 0.0) + missing, r2 >= p2, r2 > p2, 1.0
    return np.where(r2 == p2, missing, 0.0), r2 >= p2, np.zeros(2, bool), 1.0


def conditioned(mean, std, alpha, wide, active, u, ratio):
    """``N(mean, std^2 I) N(y; A x / alpha, A V A^T)`` by Gaussian conditioning: mean, covariance, log of the integral.

    With u = A^+ y and y's density in the coordinates U^T y; an exact y in a noiseless step: as if std^2 were alpha^2
    times ``ratio`` in what is seen.
    """
    see = (LEFT.T @ MATRIX)[:2][active] / alpha
    noise, target = SINGULAR[:2][active] ** 2 * wide[active], (LEFT.T @ MATRIX @ u)[:2][active]
    before = std**2 * np.eye(3)
    if std == 0:
        exact = RIGHT[:, :2][:, active & (wide == 0)]
        before = before + alpha**2 * ratio * exact @ exact.T
    total, cross, gap = see @ before @ see.T + np.diag(noise), before @ see.T, target - see @ mean
    integral = -0.5 * (gap @ np.linalg.solve(total, gap) + np.linalg.slogdet(2 * np.pi * total)[1])
    return mean + cross @ np.linalg.solve(total, gap), before - cross @ np.linalg.solve(total, cross.T), integral


@pytest.mark.parametrize("name", FILTERS)
def test_a_row_has_the_conjugate_law(name):
    """Mean and covariance of `draw`, which is affine in the noise, and the normaliser, in every row to rounding."""
    rows = ANCESTRAL.plan(grids.log_snr(VP, 6))
    squares = lambda level: (np.asarray(level.sigma) / np.asarray(level.alpha)) ** 2
    levels = squares(rows.s)
    stds = np.sqrt(levels) * np.linspace(0.9, 0.4, 6)  # any numbers; 0 in the last row

    @jax.jit
    def found(noise):
        seen = inverse.measurement(DENSE, SHOWN, noise)
        filter_ = FILTERS[name](seen, jax.random.key(5))
        shared, own = filter_.plan(jnp.asarray(STATE), rows)

        def one(row, own, std):
            draw = lambda z: filter_.draw(z, jnp.asarray(STATE), std, row, (shared, own))
            moved, lead = draw(jnp.zeros(3))
            slope = jax.jacfwd(lambda z: draw(z)[0])(jnp.zeros(3))
            ahead = filter_.ahead(jnp.asarray(STATE), std, row, (shared, own))
            _, u, given = filter_.at(jnp.asarray(STATE), row, (shared, own))
            return moved, slope, ahead + given, lead, u

        return jax.vmap(one)(rows, own, jnp.asarray(stds))

    for noise in (0.25,) if name in ("conjugate", "calibrated") else (0.25, 0.0):
        results = [np.asarray(leaf) for leaf in found(noise)]
        kinds = set()
        for i, (moved, slope, ahead, lead, anchor) in enumerate(zip(*results, strict=True)):
            alpha, ratio = float(rows.s.alpha[i]), float(squares(rows.t)[i])
            wide, active, leads, factor = potential_of(name, noise, levels, i)
            u = anchor if name.startswith("fps") else factor * np.linalg.pinv(MATRIX) @ SHOWN
            mean, covariance, integral = conditioned(STATE, stds[i], alpha, wide, active, u, ratio)
            np.testing.assert_allclose(moved, mean, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(slope @ slope.T, covariance, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(ahead, integral + np.log(SINGULAR[:2][active]).sum(), rtol=1e-9, atol=1e-9)
            gap = (RIGHT.T @ (u - moved / alpha))[:2][leads]
            log_g = -0.5 * np.sum(gap**2 / wide[leads] + np.log(2 * np.pi * wide[leads]))
            np.testing.assert_allclose(lead, log_g, rtol=1e-9, atol=1e-9)  # g at the draw, to be given back
            kinds.add(tuple(active))
        if name in ("mcgdiff", "fps") and noise > 0:
            assert kinds == {(True, True), (True, False), (False, False)}  # of b = 0.125 and 0.5


@value
class Conditioned:
    condition: Any

    def __call__(self, x, level):
        return PRIOR(x, level) + self.condition


@pytest.mark.parametrize("proposal", ["base", "filter"])
def test_calls_left_out_are_not_counted(proposal):
    """Guidance that stops once estimates agree, here from the second call on, counts what it spent as in `sample`."""
    guided = guidance.adaptive(Conditioned(jnp.ones(2)), jnp.zeros(2), 2.0, threshold=-1.5)
    given: Any = inverse.mcgdiff(seen_with(0.3)) if proposal == "filter" else proposal
    found = steer(KEYS[0], guided, ANCESTRAL, GRID, (2,), particles=3, proposal=given, dtype=jnp.float64)
    plain = sample(KEYS[0], guided, ANCESTRAL, GRID, shape=(2,), dtype=jnp.float64)
    assert plain.nfe == len(GRID) + 1 and found.nfe == 3 * plain.nfe


def test_bad_input():
    proposal: Any = inverse.mcgdiff(seen_with(0.3))
    go: Any = lambda grid=GRID, **options: steer(
        KEYS[0], PRIOR, ANCESTRAL, grid, (2,), **{"particles": 2, "proposal": proposal, **options}
    )
    for match, call in {
        "brings its own potential": lambda: go(twist=inverse.mmps(seen_with(0.3))),
        "own potential: leave": lambda: go(potential=smc.total()),
        "transported": lambda: go(resampler=smc.transported()),
        "kernel": lambda: go(grid=grids.time_travel(grids.log_snr(VP, 8), 2, 2)),
        "go back in time": lambda: proposal.check(VP.level(np.array([0.3, 0.5]))),
        "one noise level": lambda: proposal.check(VP.level(np.array([0.3, 0.2]), trailing=1)),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
