"""Motifs whose place and rotation are not known, against mixtures of exact posteriors, one for each placement."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import coordinates, grids, guidance, inverse, oracles, processes, sample, smc, solvers, steer

SHAPE, NOISE = (4, 2), 0.3
RANDOM = np.random.default_rng(0)
_root = RANDOM.standard_normal((8, 8)) / 2.5
COVARIANCE = _root @ _root.T + 0.3 * np.eye(8)
PRIOR = oracles.gaussian(RANDOM.standard_normal(SHAPE) / 2, COVARIANCE)
CENTRE = np.ravel(PRIOR.mean)
Y = np.array([[0.9, -0.4], [-0.5, 1.0]])
PLACES = inverse.segments((1, 1), 4)[:4]
ANGLES = np.array([0.0, 2.0])
TURNS = np.stack([[[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]] for a in ANGLES])
SHARES = np.array([0.1, 0.4, 0.2, 0.3])
VP = processes.vp()


@pytest.fixture(autouse=True)
def double(x64):
    """All tests here run in float64."""


def exact(turns=TURNS, prior=CENTRE, cover=COVARIANCE):
    """The posterior as a mixture, log p(y), and the probabilities of all placements and rotations."""
    logs, means, covariances = [], [], []
    for rows, share in zip(PLACES, SHARES, strict=True):
        for turn in turns:
            a = np.eye(8).reshape(4, 2, 8)[rows].reshape(-1, 8)
            noisy = a @ cover @ a.T + NOISE**2 * np.eye(len(a))
            offset = (Y @ turn.T).ravel() - a @ prior
            gain = np.linalg.solve(noisy, a @ cover).T
            fit = -0.5 * (offset @ np.linalg.solve(noisy, offset) + np.linalg.slogdet(2 * np.pi * noisy)[1])
            logs.append(fit + np.log(share / len(turns)))
            means.append((prior + gain @ offset).reshape(SHAPE))
            covariances.append(cover - gain @ a @ cover)
    log_z = np.logaddexp.reduce(logs)
    chances = np.exp(logs - log_z)
    return oracles.mixture(chances, np.stack(means), np.stack(covariances)), log_z, chances


@pytest.mark.paper("Practical and Asymptotically Exact Conditional Sampling in Diffusion Models")
def test_the_marginal_twist_of_gaussian_data_is_exact():
    """Guided by it, the prior's denoiser is E[x_0 | x_t, y] of the mixture over placements and rotations."""
    posterior, log_z, chances = exact()
    twist = inverse.motif(Y, PLACES, SHAPE, NOISE, rotations=TURNS, weights=SHARES)
    guided, x = guidance.tilted(PRIOR, twist), jnp.asarray(RANDOM.standard_normal(SHAPE))
    both = jax.jit(lambda level: (guided(x, level), posterior(x, level), twist(PRIOR, x, level)))
    for time in (0.2, 0.9):
        level = VP.level(time)
        found, expected, (log_h, x0) = both(level)
        np.testing.assert_allclose(found, expected, atol=1e-8)
        np.testing.assert_allclose(x0, PRIOR(x, level), atol=1e-12)
        # p(y | x_t) = p(y) p(x_t | y) / p(x_t)
        ratio = posterior.log_density(x, level) - PRIOR.log_density(x, level)
        np.testing.assert_allclose(log_h, log_z + ratio, rtol=1e-8)
    flat = VP.level(VP.end)
    almost = twist.probabilities(PRIOR, x, flat)
    assert np.abs(almost - chances).max() < 0.05  # noise tells little more


def test_a_motif_of_many_rows():
    """More measurements than "auto" solves densely, of which the log-determinants decide: the exact shares."""
    size, rows = 39, 36
    rng = np.random.default_rng(3)
    stds = np.linspace(0.2, 1.2, size)
    correlated = np.eye(size) + 0.5 * (np.eye(size, k=1) + np.eye(size, k=-1))
    cover = stds[:, None] * correlated * stds
    prior, x, y = oracles.gaussian(np.zeros((size, 1)), cover), rng.standard_normal((size, 1)), np.zeros((rows, 1))
    level, places = VP.level(0.3), inverse.segments((rows,), size)
    twist = inverse.motif(y, places, (size, 1), NOISE)
    alpha, sigma = float(level.alpha), float(level.sigma)
    gain = np.linalg.solve(alpha**2 * cover + sigma**2 * np.eye(size), alpha * cover).T
    mean, inside = gain @ x[:, 0], cover - alpha * gain @ cover
    logs = []
    for place in places:
        noisy, offset = inside[np.ix_(place, place)] + NOISE**2 * np.eye(rows), y[:, 0] - mean[place]
        logs.append(-0.5 * (offset @ np.linalg.solve(noisy, offset) + np.linalg.slogdet(2 * np.pi * noisy)[1]))
    shares = np.exp(logs - np.logaddexp.reduce(logs))
    np.testing.assert_allclose(twist.probabilities(prior, jnp.asarray(x), level), shares, rtol=1e-8)
    bare = lambda **how: inverse.motif(y, places, (size, 1), NOISE, twist=lambda seen: inverse.mmps(seen, **how))
    for how in ({}, {"solver": "cg"}, {"solver": "gmres"}):
        with pytest.raises(ValueError, match="probes=0"):
            bare(probes=0, **how)
    assert len(bare(probes=0, solver="dense").log_weights) == len(places)
    few = [inverse.measurement(inverse.identity((3,)), np.full(3, start), 0.1) for start in (0.0, 1.0)]
    inverse.one_of([inverse.mmps(seen, probes=0) for seen in few])  # solved densely


def test_one_placement_is_the_inpainting_twist():
    seen = np.zeros(SHAPE, bool)
    seen[[1, 3]] = True
    known = inverse.measurement(inverse.mask(seen), Y.ravel(), NOISE)
    x, level = jnp.asarray(RANDOM.standard_normal(SHAPE)), VP.level(0.4)
    for make in (lambda seen: inverse.pigdm(seen, 0.7), inverse.inpainting):
        one = inverse.motif(Y, np.array([[1, 3]]), SHAPE, NOISE, twist=make)
        both = jax.jit(lambda twist: (guidance.tilted(PRIOR, twist)(x, level), twist(PRIOR, x, level)))
        found, expected = both(one), both(make(known))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), found, expected)


def chain_law(solver, grid):
    """Mean and covariance of x_0 of the discretised chain, whose affine steps are probed and put together in NumPy."""
    rows = jax.tree.map(jnp.asarray, solver.plan(grid))
    step = lambda row, x: solver.kernel(x, PRIOR(x, row.t), row)
    probes = jnp.concatenate([jnp.zeros((1, 8)), jnp.eye(8)]).reshape(9, *SHAPE)
    means, stds = jax.jit(jax.vmap(jax.vmap(step, (None, 0)), (0, None)))(rows, probes)
    mean, cover = np.zeros(8), np.eye(8) * float(rows.t.sigma[0]) ** 2
    for probe, std in zip(np.asarray(means).reshape(-1, 9, 8), np.asarray(stds)[:, 0], strict=True):
        slope = (probe[1:] - probe[0]).T
        mean, cover = slope @ mean + probe[0], slope @ cover @ slope.T + std**2 * np.eye(8)
    return mean, cover


@pytest.mark.paper("Practical and Asymptotically Exact Conditional Sampling in Diffusion Models")
@pytest.mark.slow
def test_particles_approach_the_posterior_over_placements():
    """TDS with an approximate twist: unbiased evidence, the posterior mean, errors falling as 1 / sqrt N."""
    grid, solver = grids.log_snr(VP, 20), solvers.ddim(eta=1.0)
    posterior, log_z, _ = exact(np.eye(2)[None], *chain_law(solver, grid))
    twist = inverse.motif(Y, PLACES, SHAPE, NOISE, weights=SHARES, twist=lambda seen: inverse.pigdm(seen, 0.6))
    options: Any = dict(twist=twist, dtype=jnp.float64)
    mean = np.einsum("k,krd->rd", np.asarray(posterior.weights), np.asarray(posterior.means))
    errors = {}
    for particles, runs in ((8, 120), (128, 24)):
        run = lambda key, particles=particles: steer(key, PRIOR, solver, grid, SHAPE, particles=particles, **options)
        out = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(particles), runs))
        assert (out.failed_at == -1).all() and (out.nfe == particles * len(grid)).all()
        z = np.exp(np.asarray(out.log_z) - log_z)
        w = np.asarray(jax.vmap(smc.normalised)(out.log_weights))
        got = np.einsum("pn,pnrd->prd", w, np.asarray(out.x))
        errors[particles] = np.sqrt(np.mean((got - mean) ** 2)), np.sqrt(np.mean((z - 1) ** 2))
        assert abs(z.mean() - 1) < 4 * z.std() / np.sqrt(runs), z.mean()
        pooled = z[:, None, None] * got / z.mean()
        assert (np.abs(pooled.mean(0) - mean) < 4 * pooled.std(0) / np.sqrt(runs)).all()
    for small, large in zip(errors[8], errors[128], strict=True):
        assert 2.0 < small / large < 8.0, errors  # sixteen times the particles: 4


def test_under_coordinates_and_under_jit_of_vmap():
    """The twist of a standard state, and samples for keys and motifs."""
    centre = np.full(SHAPE, 0.7)
    shifted = processes.changed(VP, coordinates.shifted(centre))
    inner = oracles.gaussian(PRIOR.mean - 0.7, COVARIANCE)
    keys, grid = jax.random.split(jax.random.key(0), 2), grids.log_snr(VP, 4)
    moved = grids.log_snr(shifted, 4)

    @jax.jit
    def runs(ys):
        def one(key, y):
            plain = inverse.motif(y, PLACES, SHAPE, NOISE, rotations=TURNS)
            under = inverse.motif(y, PLACES, SHAPE, NOISE, rotations=TURNS, process=shifted)
            x = jax.random.normal(key, SHAPE, y.dtype)
            return (
                sample(key, guidance.tilted(PRIOR, plain), solvers.ddim(), grid, x=x),
                under(inner, x - 0.7, VP.level(0.0))[0],
                plain(PRIOR, x, VP.level(0.0))[0],
                under(inner, x, shifted.level(0.3))[0],
                plain.log_weights,
            )

        return jax.vmap(one)(keys, ys)

    out, under, plain, noisy, _ = runs(jnp.stack([jnp.asarray(Y), 2 * jnp.asarray(Y)]))
    np.testing.assert_allclose(under, plain, rtol=1e-10)  # p(y | x_0) is the same number
    assert out.x.shape == (2, *SHAPE) and out.nfe.tolist() == [4, 4] and np.isfinite(noisy).all()
    assert np.abs(out.x[0] - out.x[1]).max() > 1e-3
    with pytest.raises(ValueError, match="under"):
        twist = inverse.motif(Y, PLACES, SHAPE, NOISE)
        sample(keys[0], guidance.tilted(inner, twist), solvers.ddim(), moved, shape=SHAPE)


def test_placements_of_segments():
    assert inverse.segments((2, 1), 4).tolist() == [[0, 1, 2], [0, 1, 3], [1, 2, 3]]
    assert inverse.segments((3,), 5).tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert len(inverse.segments((2, 3, 1), 10)) == 35  # 4 free rows in 4 gaps


def test_bad_input():
    seen = inverse.measurement(inverse.identity((3,)), np.zeros(3), 0.1)
    for match, call in {
        "placements must be rows": lambda: inverse.motif(Y, np.array([[0, 1, 2]]), SHAPE),
        "integers from 0": lambda: inverse.motif(Y, np.array([[0, 4]]), SHAPE),
        "distinct": lambda: inverse.motif(Y, np.array([[1, 1]]), SHAPE),
        "rows of shape": lambda: inverse.motif(Y, PLACES, (4, 3)),
        "noise": lambda: inverse.motif(Y, PLACES, SHAPE, 0.0),
        "orthogonal": lambda: inverse.motif(Y, PLACES, SHAPE, rotations=2 * TURNS),
        "rotations must be": lambda: inverse.motif(Y, PLACES, SHAPE, rotations=np.eye(2)),
        "weights": lambda: inverse.motif(Y, PLACES, SHAPE, weights=np.ones(3)),
        "one kind": lambda: inverse.one_of([inverse.mmps(seen), inverse.tmpd(seen)]),
        "lengths": lambda: inverse.segments((3, 2), 4),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
