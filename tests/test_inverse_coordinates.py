"""Inverse problems under processes with coordinates: Gaussian data, whose posterior is linear algebra in NumPy."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import coordinates, grids, guidance, inverse, processes, sample, solvers
from diffjax.levels import CLEAN, value

KEY = jax.random.key(3)
RNG = np.random.default_rng(5)
SIZE = 4
_root = RNG.normal(size=(SIZE, SIZE))
MEAN, COVARIANCE = RNG.normal(size=SIZE), _root @ _root.T / SIZE + 0.2 * np.eye(SIZE)
CENTRE = RNG.normal(size=SIZE)
ORTHOGONAL = np.linalg.qr(_root)[0]
MATRIX, Y, STD = RNG.normal(size=(2, SIZE)), np.array([0.7, -0.3]), 0.4
VP = processes.vp()
MODAL = processes.modal((VP, processes.cosine(), processes.vp(beta_min=0.3)), np.array([0, 1, 1, 2]))


def reverting(level):
    return 1 - level.alpha


ANCESTRAL: Any = solvers.ancestral()
CASES = {
    "shifted": processes.changed(VP, coordinates.shifted(CENTRE)),
    "moving": processes.changed(VP, coordinates.shifted(CENTRE, reverting)),
    "scaled": processes.changed(VP, coordinates.scaled(np.exp(0.5 * CENTRE))),
    "coloured": processes.changed(VP, coordinates.coloured(COVARIANCE + 0.3 * np.eye(SIZE))),
    "orthogonal": processes.changed(VP, coordinates.orthogonal(ORTHOGONAL)),
    "chain": processes.changed(VP, coordinates.chain(coordinates.shifted(CENTRE), coordinates.haar(1, (0,)))),
    "modal": processes.changed(MODAL, coordinates.orthogonal(ORTHOGONAL)),
    "blurred": processes.changed(
        processes.blurred(VP, np.arange(4.0) ** 2, 1.0), coordinates.coloured(COVARIANCE + 0.3 * np.eye(SIZE))
    ),
}
KEEPS_LENGTHS = {"shifted", "moving", "orthogonal", "chain", "modal"}


def basis(process):
    """B and m_0, column by column."""
    with jax.enable_x64(True):
        b = np.stack([np.asarray(process.leave(e)) for e in jnp.eye(SIZE, dtype=jnp.float64)], 1)
        return b, np.asarray(process.leave(jnp.zeros(SIZE, jnp.float64), CLEAN))


@value
class Prior:
    """E[z_0 | z_t] of N(mean, covariance) at levels per entry."""

    mean: Any
    covariance: Any

    def __call__(self, z, level):
        alpha, sigma = (jnp.broadcast_to(leaf, z.shape) for leaf in (level.alpha, level.sigma))
        cross = self.covariance * alpha
        total = alpha[:, None] * cross + jnp.diag(sigma**2)
        return self.mean + cross @ jnp.linalg.solve(total, z - alpha * self.mean)


def standard(process):
    """The law of z_0 for data N(MEAN, COVARIANCE)."""
    b, m = basis(process)
    inverse_ = np.linalg.inv(b)
    return Prior(inverse_ @ (MEAN - m), inverse_ @ COVARIANCE @ inverse_.T)


def seen_with(std=STD, operator=None):
    return inverse.measurement(inverse.matrix(MATRIX) if operator is None else operator, Y, std)


def given_both(process, z, level):
    """E[x_0 | z_t, y] in NumPy: y measures data, z_t the standard state."""
    b, m = basis(process)
    inside = np.linalg.inv(b)
    alpha, sigma = (np.broadcast_to(np.asarray(leaf, float), (SIZE,)) for leaf in (level.alpha, level.sigma))
    rows = np.concatenate([MATRIX, alpha[:, None] * inside])
    known = np.concatenate([Y, np.asarray(z) + alpha * (inside @ m)])
    noise = np.diag(np.concatenate([[STD**2] * 2, sigma**2]))
    gain = COVARIANCE @ rows.T @ np.linalg.inv(rows @ COVARIANCE @ rows.T + noise)
    return MEAN + gain @ (known - rows @ MEAN)


@pytest.mark.parametrize("name", CASES)
def test_tilted_by_mmps_is_the_posterior(name, x64):
    """E[x_0 | x_t, y], exactly, whatever the coordinates and the levels; at sigma = 0 log h is that of the data."""
    process, z = CASES[name], jnp.asarray(RNG.normal(size=SIZE))
    seen = seen_with()
    under = seen.under(process)
    twist = inverse.mmps(under)
    for time in (0.3, 0.8):
        level = jax.tree.map(jnp.asarray, process.level(time))
        x0 = process.leave(guidance.tilted(standard(process), twist)(z, level), CLEAN)
        np.testing.assert_allclose(x0, given_both(process, z, level), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(under.log_likelihood(z), seen.log_likelihood(process.leave(z, CLEAN)), rtol=1e-12)
    y = jnp.array([0.3, -1.2])
    np.testing.assert_allclose(under.operator.adjoint(y) @ z, y @ (under.operator(z)), rtol=1e-12)
    assert hasattr(under.operator, "spectral") == (name in KEEPS_LENGTHS)
    dense = inverse.decomposed(under.operator)
    if hasattr(under.operator, "spectral"):
        f = lambda q: 1 / (1 + q)
        np.testing.assert_allclose(under.operator.spectral(f, z), dense.spectral(f, z), atol=1e-12)
    with pytest.raises(ValueError, match="already"):
        under.under(process)


@pytest.fixture(scope="module")
def plain():
    """The problem of the shifted case in its own coordinates."""
    with jax.enable_x64(True):
        moved = standard(CASES["shifted"])
        return moved, inverse.measurement(inverse.matrix(MATRIX), Y - MATRIX @ CENTRE, STD)


@pytest.mark.parametrize("name", ["ddrm", "ddnm", "null_space", "mcgdiff", "dps", "daps", "pnp_dm", "red_diff"])
def test_methods_under_a_shift_are_those_of_shifted_data(name, plain, x64):
    """The same draws as of x - centre, for every kind of method, given and returning data."""
    process, seen = CASES["shifted"], seen_with()
    grid = grids.log_snr(VP, 4, start=0.9)
    moved = dataclasses.replace(grid, process=process)

    def draw(prior, measured, grid, x):
        ancestral, inside = ANCESTRAL, measured.under(grid.process)
        if name == "daps":
            return inverse.daps(KEY, prior, measured, grid, (SIZE,), steps=3, dtype=jnp.float64).x
        if name == "pnp_dm":
            stds = np.array([1.0, 0.3])
            return inverse.pnp_dm(KEY, prior, measured, grid.process, (SIZE,), stds=stds, steps=3, dtype=jnp.float64).x
        if name == "red_diff":
            return inverse.red_diff(KEY, prior, measured, grid[:3], x).x
        if name == "mcgdiff":
            proposal = inverse.mcgdiff(inside)
            both = jnp.stack([x, x + 1])
            return diffjax.steer(KEY, prior, ancestral, grid, x=both, particles=2, proposal=proposal).x
        if name == "null_space":
            return sample(KEY, inverse.null_space(prior, inside), ancestral, grid, x=x).x
        solver = {"ddrm": inverse.ddrm, "ddnm": lambda m: inverse.ddnm(ancestral, m)}.get(
            name, lambda m: inverse.dps(ancestral, m, 0.2)
        )(inside)
        return sample(KEY, prior, solver, grid, x=x).x

    prior, own = plain
    x = jnp.asarray(RNG.normal(size=SIZE))
    np.testing.assert_allclose(draw(prior, seen, moved, x + CENTRE), draw(prior, own, grid, x) + CENTRE, rtol=1e-9)


def test_samples_are_of_the_posterior(x64):
    """`steer`, and `pnp_dm` at a fixed rho, under coloured coordinates: mean and covariance of data, to error bars.

    Split Gibbs at rho has p(x) N(y; A x, S + rho^2 A B B^T A^T): its coupling is in the standard state.
    """
    process, seen, rho, count = CASES["coloured"], seen_with(), 0.7, 4000
    prior, b = standard(process), basis(process)[0]
    grid = grids.log_snr(process, 100, start=0.9)
    options: Any = dict(particles=count, twist=inverse.mmps(seen.under(process)), dtype=jnp.float64)
    found = diffjax.steer(KEY, prior, ANCESTRAL, grid, (SIZE,), **options)
    options = dict(stds=np.full(12, rho), steps=12, dtype=jnp.float64)
    run = lambda key: inverse.pnp_dm(key, prior, seen, process, (SIZE,), **options).x
    split = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(KEY, count)))
    uniform = np.full(count, 1 / count)
    weights = np.asarray(diffjax.smc.normalised(found.log_weights))
    for x, w, wider in ((np.asarray(found.x), weights, 0.0), (split, uniform, rho)):
        noise = STD**2 * np.eye(2) + wider**2 * MATRIX @ b @ b.T @ MATRIX.T
        gain = COVARIANCE @ MATRIX.T @ np.linalg.inv(MATRIX @ COVARIANCE @ MATRIX.T + noise)
        mean, covariance = MEAN + gain @ (Y - MATRIX @ MEAN), COVARIANCE - gain @ MATRIX @ COVARIANCE
        stds, effective, got = np.sqrt(np.diag(covariance)), 1 / (w**2).sum(), w @ x
        assert effective > 2000
        assert (np.abs(got - mean) < (4 / effective**0.5 + 0.03) * stds).all(), (got - mean) / stds
        spread = (x - got).T @ (w[:, None] * (x - got)) / np.outer(stds, stds)
        correlations = covariance / np.outer(stds, stds)
        assert (np.abs(spread - correlations) < 4 * (2 / effective) ** 0.5 + 0.05).all(), spread - correlations


def test_what_is_not_linear_or_not_gaussian(x64):
    """Functions see the data; counts, whose law a shift of y would change, are seen through a function."""
    z = jnp.asarray(RNG.normal(size=SIZE))
    for operator, noise in ((inverse.hdr((SIZE,)), 0.2), (inverse.matrix(np.abs(MATRIX)), inverse.poisson_noise(2.0))):
        shape = operator.output_shape
        seen = inverse.measurement(operator, np.ones(shape), noise)
        under = seen.under(CASES["shifted"])
        x = CASES["shifted"].leave(z, CLEAN)
        np.testing.assert_allclose(under.log_likelihood(z), seen.log_likelihood(x), rtol=1e-12)
        assert not hasattr(under.operator, "adjoint") and not under.of_data


def test_refusals():
    process, prior, seen = CASES["orthogonal"], standard(CASES["orthogonal"]), seen_with()
    grid = grids.log_snr(process, 4, start=0.9)
    modal = grids.uniform(CASES["modal"], 4, start=0.9)
    go: Any = lambda denoise, solver=ANCESTRAL, grid=grid: sample(KEY, denoise, solver, grid, shape=(SIZE,))
    under = seen.under(CASES["modal"])
    for match, call in {
        "give measurement.under": lambda: go(guidance.tilted(prior, inverse.mmps(seen))),
        "standard state of": lambda: go(prior, inverse.ddrm(seen)),
        "is of data": lambda: diffjax.steer(
            KEY, prior, ANCESTRAL, grid, (SIZE,), particles=2, twist=inverse.mmps(seen)
        ),
        "of data, but": lambda: diffjax.steer(
            KEY, prior, ANCESTRAL, grid, (SIZE,), particles=2, proposal=inverse.mcgdiff(seen)
        ),
        "spectrum": lambda: inverse.ddrm(seen.under(CASES["coloured"])),
        "ddrm needs one noise level": lambda: go(prior, inverse.ddrm(under), modal),
        "replacement needs one": lambda: go(inverse.replacement(prior, under, KEY), grid=modal),
        "lanpaint needs one": lambda: go(prior, inverse.lanpaint(ANCESTRAL, under), modal),
        "mcg needs one": lambda: go(prior, inverse.mcg(ANCESTRAL, under, 0.1), modal),
        "which .* does not": lambda: inverse.measurement(inverse.identity((3,)), np.zeros(3)).under(process),
        "one level a step": lambda: inverse.daps(KEY, prior, seen, modal, (SIZE,)),
        "has many at one time": lambda: inverse.pnp_dm(KEY, prior, seen, CASES["modal"], (SIZE,), stds=[0.5]),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


def test_diagonal_operators_keep_levels_of_their_own():
    """An entry seen by itself may have a level of its own: replacement by the mask of a modal process."""
    seen = inverse.measurement(inverse.mask(np.array([True, False, True, False])), Y, 0.0)
    replaced = inverse.replacement(Prior(MEAN, COVARIANCE), seen, KEY)
    out = sample(KEY, replaced, solvers.ddim(), grids.uniform(MODAL, 4), shape=(SIZE,))
    np.testing.assert_allclose(seen.operator(out.x), Y, atol=1e-5)
