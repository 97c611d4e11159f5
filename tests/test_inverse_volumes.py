"""Volumes from priors of slices: ADMM against a bounded least-squares solution, steps by hand, a small phantom."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import lsq_linear

from diffjax import grids, inverse, oracles, processes, sample, solvers
from diffjax.levels import value

PROCESS = processes.flow()
RNG = np.random.default_rng(2)
DEPTH, WIDTH, SEEN = 5, 3, 4
A = RNG.normal(size=(SEEN, WIDTH))
FULL = np.kron(np.eye(DEPTH), A)
D = np.kron(np.diff(np.eye(DEPTH), axis=0), np.eye(WIDTH))
VOLUME = np.cumsum(RNG.normal(size=(DEPTH, WIDTH)), axis=0)
Y = VOLUME @ A.T + 0.3 * RNG.normal(size=(DEPTH, SEEN))
STACK = inverse.slicewise(inverse.matrix(A), DEPTH)
SEEN_BY = inverse.measurement(STACK, Y, 0.3)


def test_admm_tends_to_the_convex_optimum(x64):
    """The dual, least squares in a box, by SciPy: min |L^-1 (A^T y - D^T p)|^2 with |p| <= strength, A^T A = L L^T."""
    strength = 1.2
    gram, right = FULL.T @ FULL, FULL.T @ Y.reshape(-1)
    low = np.linalg.cholesky(gram)
    bounded = lsq_linear(
        np.linalg.solve(low, D.T), np.linalg.solve(low, right), (-strength, strength), method="bvls", tol=1e-14
    )
    expected = np.linalg.solve(gram, right - D.T @ bounded.x).reshape(DEPTH, WIDTH)
    steps = np.abs(np.diff(expected, axis=0))
    assert np.any(steps < 1e-9) and np.any(steps > 0.1)  # some neighbours are the same, some are not
    run = jax.jit(lambda x, rho: inverse.admm_tv(x, inverse.split(x), SEEN_BY, strength, rho, 1500, DEPTH * WIDTH))
    for rho, start in ((1.0, jnp.zeros((DEPTH, WIDTH))), (3.0, 5 * jnp.asarray(VOLUME))):
        found, (z, w) = run(start, rho)
        np.testing.assert_allclose(found, expected, atol=1e-8)
        np.testing.assert_allclose(z, np.diff(expected, axis=0), atol=1e-8)
        np.testing.assert_allclose(rho * np.reshape(w, -1), bounded.x, atol=1e-7)  # the dual of D x = z


def admm_by_hand(x, z, w, strength, rho, inner):
    """One iteration in NumPy, with matrices; conjugate gradients by minimising over the Krylov space."""
    system = FULL.T @ FULL + rho * D.T @ D
    right = FULL.T @ Y.reshape(-1) + rho * D.T @ (z - w)
    residual = right - system @ x
    krylov = np.stack([np.linalg.matrix_power(system, k) @ residual for k in range(inner)], axis=1)
    x = x + krylov @ np.linalg.solve(krylov.T @ system @ krylov, krylov.T @ residual)
    moved = D @ x + w
    z = np.clip(np.abs(moved) - strength / rho, 0, None) * np.sign(moved)
    return x, z, moved - z


PRIOR = oracles.gaussian(np.array([0.5, -1.0, 0.2]), np.array([0.4, 1.7, 3.0]))


@pytest.mark.parametrize("on", ["state", "estimate"])
def test_steps_by_hand(on, x64):
    """Three steps, z and w carried: the solver's own step, and ADMM on x / alpha or on the clean estimate."""
    strength, rho, inner = 0.4, 2.0, 2
    grid = grids.times(PROCESS, [0.9, 0.6, 0.3, 0.0])
    base = solvers.ddim(eta=1.0)
    start = RNG.normal(size=(DEPTH, WIDTH))
    noise = jnp.asarray(RNG.normal(size=(3, DEPTH, WIDTH)))
    source = lambda key, index, row, x, draws: (noise[index],)
    solver = inverse.diffusion_mbir(base, SEEN_BY, strength, rho, inner=inner, on=on)
    out = sample(jax.random.key(0), inverse.slices(PRIOR), solver, grid, x=start, noise=source)
    rows, x, z, w = base.plan(grid), start, np.zeros(D.shape[0]), np.zeros(D.shape[0])
    for i in range(3):
        row = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], rows)
        t, s = row.t, row.s
        x0 = PRIOR.mean + (t.alpha * PRIOR.variances / (t.alpha**2 * PRIOR.variances + t.sigma**2)) * (
            x - t.alpha * PRIOR.mean
        )
        if on == "estimate":
            flat, z, w = admm_by_hand(x0.reshape(-1), z, w, strength, rho, inner)
            x0 = flat.reshape(x.shape)
        # the posterior of a forward step, whose variance is sigma_s^2 (1 - (alpha_t sigma_s / (alpha_s sigma_t))^2)
        std = s.sigma * np.sqrt(1 - (t.alpha * s.sigma / (s.alpha * t.sigma)) ** 2)
        eps = (x - t.alpha * x0) / t.sigma
        x = s.alpha * x0 + np.sqrt(s.sigma**2 - std**2) * eps + std * np.asarray(noise[i])
        if on == "state":
            flat, z, w = admm_by_hand(x.reshape(-1) / s.alpha, z, w, strength, rho, inner)
            x = s.alpha * flat.reshape(x.shape)
    np.testing.assert_allclose(out.x, x, rtol=1e-9, atol=1e-10)
    assert int(out.nfe) == 3


# --- slices -----------------------------------------------------------------------------------------------------------


@value
class Remembering:
    """The sum of all states so far, with two evaluations a call."""

    def init(self, x):
        return 0 * x

    def apply(self, x, level, memory):
        return memory + x, memory + x

    def evaluations(self, level):
        return 2


def test_slices_are_denoised_each_for_itself():
    grid = grids.uniform(PROCESS, 3, start=0.8)
    x = jnp.asarray(RNG.normal(size=(DEPTH, WIDTH)), jnp.float32)
    for plane, calls in ((PRIOR, 3), (Remembering(), 6)):
        whole = sample(jax.random.key(0), inverse.slices(plane), solvers.ddim(), grid, x=x)
        each = jax.vmap(lambda x, plane=plane: sample(jax.random.key(0), plane, solvers.ddim(), grid, x=x).x)(x)
        np.testing.assert_allclose(whole.x, each, rtol=1e-5, atol=1e-6)
        assert int(whole.nfe) == calls


def test_slicewise_operators(x64):
    """A stack is block diagonal: against the Kronecker product, with its adjoint and its spectrum."""
    x, y = jnp.asarray(VOLUME), jnp.asarray(Y)
    np.testing.assert_allclose(STACK(x).reshape(-1), FULL @ VOLUME.reshape(-1))
    np.testing.assert_allclose(STACK.adjoint(y).reshape(-1), FULL.T @ Y.reshape(-1))
    root = STACK.spectral(jnp.sqrt, STACK.spectral(jnp.sqrt, x))
    np.testing.assert_allclose(root.reshape(-1), FULL.T @ FULL @ VOLUME.reshape(-1), rtol=1e-9)
    np.testing.assert_allclose(np.sort(STACK.squared), np.sort(np.linalg.svd(FULL)[1] ** 2))
    assert (STACK.input_shape, STACK.output_shape) == ((DEPTH, WIDTH), (DEPTH, SEEN))
    assert not hasattr(inverse.slicewise(inverse.radon(np.zeros(1), (2, 2)), 3), "spectral")


# --- a phantom --------------------------------------------------------------------------------------------------------

SIDE, LAYERS = 8, 6
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE]


def plane(rng):
    """One or two discs."""
    picture = np.zeros((SIDE, SIDE))
    for _ in range(rng.integers(1, 3)):
        row, column, radius, height = rng.uniform([1.5, 1.5, 1.0, 0.5], [5.5, 5.5, 2.6, 1.0])
        picture = np.maximum(picture, height * ((ROWS - row) ** 2 + (COLUMNS - column) ** 2 < radius**2))
    return picture


def phantom(rng):
    """A body that goes through all slices, and another that begins at one of them."""
    first, cut = plane(rng), rng.integers(2, 5)
    return np.stack([first] * cut + [np.maximum(first, plane(rng))] * (LAYERS - cut))


@pytest.mark.paper("Solving 3D Inverse Problems using Pre-trained 2D Diffusion Models")
def test_a_volume_from_two_projections_of_each_slice():
    """Two views: better than exact posterior samples of every slice by itself, and than total variation alone.

    The prior of slices is a Gaussian with the moments of pictures, whose exact posterior given a slice's views is
    known: no method that treats slices by themselves draws better samples.  Total variation is at the best strength of
    three, which are a factor of about three apart.
    """
    rng, std, count = np.random.default_rng(6), 0.2, 48
    pictures = np.stack([plane(rng) for _ in range(1500)]).reshape(1500, -1)
    mean, covariance = pictures.mean(0), np.cov(pictures.T) + 1e-3 * np.eye(SIDE**2)
    prior = oracles.gaussian(mean.reshape(SIDE, SIDE), covariance)
    volumes = np.stack([phantom(rng) for _ in range(count)])
    views = inverse.radon(np.array([0.3, 1.9]), (SIDE, SIDE))
    stack = inverse.slicewise(views, LAYERS)
    a = np.asarray(inverse.decomposed(views).entries)
    y = np.einsum("mp,nkp->nkm", a, volumes.reshape(count, LAYERS, -1))
    y = y + std * rng.normal(size=y.shape)
    seen = jnp.asarray(y.reshape(count, LAYERS, *views.output_shape), jnp.float32)
    grid = grids.uniform(PROCESS, 40, start=0.98)

    def draw(key, y):
        measured = inverse.measurement(stack, y, std)
        solver = inverse.diffusion_mbir(solvers.ddim(eta=1.0), measured, 0.3, 1.0, inner=5)
        return sample(key, inverse.slices(prior), solver, grid, shape=(LAYERS, SIDE, SIDE)).x

    def smoothed(y, strength):
        measured, x = inverse.measurement(stack, y, std), jnp.zeros((LAYERS, SIDE, SIDE))
        return inverse.admm_tv(x, inverse.split(x), measured, strength, 1.0, 200, 5)[0]

    psnr = lambda x: -10 * np.log10(np.mean((np.asarray(x) - volumes) ** 2, axis=(1, 2, 3)))
    keys = jax.random.split(jax.random.key(1), count)
    found = psnr(jax.jit(jax.vmap(draw))(keys, seen))
    strengths = jnp.array([0.1, 0.3, 1.0])
    smooth = jax.jit(jax.vmap(jax.vmap(smoothed, (None, 0)), (0, None)))(seen, strengths)
    smooth = np.stack([psnr(smooth[:, k]) for k in range(3)])
    gain = covariance @ a.T @ np.linalg.inv(a @ covariance @ a.T + std**2 * np.eye(len(a)))
    root = np.linalg.cholesky(covariance - gain @ a @ covariance)
    exact = mean + (y - a @ mean) @ gain.T + rng.normal(size=(count, LAYERS, SIDE**2)) @ root.T
    by_slice = psnr(exact.reshape(volumes.shape))
    best = smooth[np.argmax(smooth.mean(1))]
    for other in (by_slice, best):
        gap = found - other
        assert gap.mean() > 4 * gap.std(ddof=1) / np.sqrt(count)


@pytest.mark.parametrize(
    "wrong, name",
    [
        (
            lambda: inverse.diffusion_mbir(
                solvers.ddim(), inverse.measurement(inverse.hdr((3,)), np.zeros(3, np.float32))
            ),
            "linear",
        ),
        (lambda: inverse.diffusion_mbir(solvers.ddim(), SEEN_BY, -1.0), "strength"),
        (lambda: inverse.diffusion_mbir(solvers.ddim(), SEEN_BY, penalty=0.0), "penalty"),
        (lambda: inverse.diffusion_mbir(solvers.ddim(), SEEN_BY, iterations=-1), "iterations"),
        (lambda: inverse.diffusion_mbir(solvers.ddim(), SEEN_BY, inner=0), "inner"),
        (lambda: inverse.diffusion_mbir(solvers.ddim(), SEEN_BY, on="noise"), "on must be"),
        (lambda: inverse.diffusion_mbir(solvers.heun(), SEEN_BY, on="estimate"), "update"),
        (lambda: inverse.slicewise(inverse.hdr((3,)), 2), "linear"),
        (lambda: inverse.slicewise(inverse.identity((3,)), 0), "count"),
        (lambda: inverse.slices(PRIOR).check(PROCESS.level(np.full((2, 3), 0.5))), "one noise level"),
    ],
)
def test_refusals(wrong, name):
    with pytest.raises(ValueError, match=name):
        wrong()
