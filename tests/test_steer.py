"""The particle driver: unbiased evidence, exact twists, bookkeeping, devices and what is refused."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import grids, oracles, processes, smc, solvers, steer
from diffjax.levels import Level, value
from diffjax.samplers.sequential import normal_noise

VP = processes.vp()
SLOPE, SEEN, NOISE = np.array([1.0, -0.5]), 1.2, 0.3
WEIGHTS, MEANS = np.array([0.4, 0.6]), np.array([[1.0, 0.5], [-0.5, -1.0]])
COVARIANCES = np.array([[[0.3, 0.1], [0.1, 0.2]], [[0.2, 0.0], [0.0, 0.4]]])
PRIOR = oracles.mixture(WEIGHTS, MEANS, COVARIANCES)
GRID = grids.log_snr(VP, 16)
ANCESTRAL: Any = solvers.ancestral()


@pytest.fixture(autouse=True)
def double(x64):
    """All tests here run in float64."""


def log_likelihood(x0):
    """Of one linear measurement."""
    return -0.5 * jnp.log(2 * jnp.pi * NOISE) - 0.5 * (SEEN - x0 @ SLOPE) ** 2 / NOISE


def _posterior():
    variances = np.einsum("i,kij,j->k", SLOPE, COVARIANCES, SLOPE) + NOISE
    gains = COVARIANCES @ SLOPE / variances[:, None]
    missed = SEEN - MEANS @ SLOPE
    logs = np.log(WEIGHTS) - 0.5 * np.log(2 * np.pi * variances) - 0.5 * missed**2 / variances
    means = MEANS + gains * missed[:, None]
    covariances = COVARIANCES - np.einsum("ki,j,kjl->kil", gains, SLOPE, COVARIANCES)
    return oracles.mixture(np.exp(logs), means, covariances), np.log(np.sum(np.exp(logs)))


POSTERIOR, LOG_Z = _posterior()


@value
class Exact:
    """p(y | x_t) of the mixture: the ratio of posterior and prior at every level."""

    def __call__(self, denoise, x, level):
        clean = jnp.asarray(level.sigma) == 0
        safe = Level(*(jnp.where(clean, other, leaf) for leaf, other in zip(level, (1.0, 0.5, 0.5, 0.0), strict=True)))
        ratio = POSTERIOR.log_density(x, safe) - PRIOR.log_density(x, safe) + LOG_Z
        return jnp.where(clean, log_likelihood(x / level.alpha), ratio), denoise(x, level)


@value
class Calibrated:
    """The likelihood at the clean estimate, widened by what is not known of it: data of variance 0.8."""

    def __call__(self, denoise, x, level):
        x0 = denoise(x, level)
        unknown = 0.8 * level.sigma**2 / (level.sigma**2 + 0.8 * level.alpha**2)
        variance = NOISE + SLOPE @ SLOPE * unknown
        return -0.5 * jnp.log(2 * jnp.pi * variance) - 0.5 * (SEEN - x0 @ SLOPE) ** 2 / variance, x0


NAIVE = smc.reward(log_likelihood)
KEYS = jax.random.split(jax.random.key(7), 4000)


def _populations(particles, keys=KEYS, thresholds=(np.inf, 0.6, 0.0), **options):
    """Many populations for every threshold: leading axes (thresholds, keys)."""

    def run(threshold, key):
        options.setdefault("twist", NAIVE)
        plan = dict(particles=particles, threshold=threshold, dtype=jnp.float64)
        return steer(key, PRIOR, ANCESTRAL, GRID, (2,), **plan, **options)

    return jax.jit(jax.vmap(lambda threshold: jax.vmap(lambda key: run(threshold, key))(keys)))(np.array(thresholds))


@pytest.fixture(scope="module")
def evidence():
    """E[h(x_0)] of the discretised chain, by plain sampling, its standard error, and the mean of x_0 under h."""
    with jax.enable_x64(True):
        run = lambda key: diffjax.sample(key, PRIOR, ANCESTRAL, GRID, shape=(2,), dtype=jnp.float64).x
        x = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(5), 100_000)))
        h = np.exp(np.asarray(log_likelihood(x)))
    return h.mean(), h.std() / np.sqrt(h.size), h @ x / h.sum()


def _agree(log_z, mean, error):
    z = np.exp(np.asarray(log_z))
    assert abs(z.mean() - mean) < 4 * np.hypot(z.std() / np.sqrt(z.size), error), (z.mean(), mean)


@pytest.mark.paper("Practical and Asymptotically Exact Conditional Sampling in Diffusion Models")
@pytest.mark.parametrize("particles", [2, 4])
def test_evidence_is_unbiased_on_the_natural_scale(particles, evidence):
    """With forced, with adaptive and without resampling, whatever the twist and the scale of the tilt."""
    found = _populations(particles, scale=0.7)
    for log_z in found.log_z:
        _agree(log_z, *evidence[:2])
    assert found.resampled[0].all() and not found.resampled[2].any()
    assert 0 < found.resampled[1].mean() < 1


@pytest.mark.paper("Practical and Asymptotically Exact Conditional Sampling in Diffusion Models")
def test_exact_twist_has_weights_of_vanishing_variance():
    """Constant but for the discretisation: first order in the step, and nothing is ever resampled."""
    spread = []
    for steps in (32, 128):
        grid = grids.log_snr(VP, steps, stop=0.02 * 4.0 / steps**0.5)
        run = lambda key, grid=grid: steer(
            key, PRIOR, solvers.ddim(1.0), grid, (2,), particles=256, twist=Exact(), dtype=jnp.float64
        )
        found = jax.vmap(run)(KEYS[:8])
        assert not found.resampled.any()
        spread.append(float(found.log_weights.var(axis=1).mean()))
        assert abs(found.log_z.mean() - LOG_Z) < 3.0 / steps, (found.log_z, LOG_Z)
    order = np.log(spread[0] / spread[1]) / np.log(4)
    assert 0.7 < order < 2.2, (spread, order)


@pytest.mark.paper("Practical and Asymptotically Exact Conditional Sampling in Diffusion Models")
def test_error_shrinks_with_particles_where_guidance_stays_biased(evidence):
    """The mean given y of the discretised chain: guidance alone is off, weights mend it, by 1 / sqrt(particles)."""
    exact = evidence[2]
    found = _populations(64, KEYS[:256], (0.0, 0.5), twist=Calibrated())
    spread = []
    for count in (4, 64):  # the first ones of a population that is never resampled are a population
        weights = jax.vmap(smc.normalised)(found.log_weights[0, :, :count])
        spread.append(np.linalg.norm(np.std(np.einsum("pn,pnd->pd", weights, found.x[0, :, :count]), axis=0)))
    assert 2.5 < spread[0] / spread[1] < 5, spread
    for i in range(2):
        means = np.einsum("pn,pnd->pd", jax.vmap(smc.normalised)(found.log_weights[i]), found.x[i])
        # a ratio of averages of 64 is off by 1 / 64 of its variance, some 0.01
        assert (np.abs(means.mean(0) - exact) < 4 * means.std(0) / 16 + 0.02).all(), (means.mean(0), exact)
    assert np.linalg.norm(np.asarray(found.x[0]).mean((0, 1)) - exact) > 0.1


@value
class Remembering:
    """A denoiser whose estimate depends on all states it has seen."""

    denoise: Any

    def init(self, x):
        return jnp.zeros_like(x)

    def apply(self, x, level, memory):
        return self.denoise(x, level) + 0.05 * memory, 0.5 * memory + x


class Replay(NamedTuple):
    memory: Any
    denoiser: Any

    def __call__(self, x, level):
        x0, _ = self.denoiser.apply(x, level, self.memory)
        return x0


def test_memories_go_where_the_particle_goes():
    """Every survivor's path, replayed alone by its ancestry and the noise of its places, ends where it did."""
    solver, denoise, grid, key = solvers.sa_solver(), Remembering(PRIOR), GRID[:6], jax.random.key(3)
    found = steer(
        key, denoise, solver, grid, (2,), particles=5, twist=NAIVE, proposal="base", threshold=np.inf, dtype=jnp.float64
    )
    assert found.resampled.all() and len(np.unique(smc.lineage(found.ancestry)[0])) < 5
    prior_key, noise_key = jax.random.split(key)
    rows, path = solver.plan(grid), np.asarray(smc.lineage(found.ancestry))

    @jax.jit
    def replay(slots):
        first = VP.level(VP.end)
        x = VP.prior(jax.random.fold_in(prior_key, slots[0]), (2,), jnp.float64, first)
        memory, seen = solver.init(x), denoise.init(x)
        for i in range(len(grid)):
            row = jax.tree.map(lambda leaf, i=i: leaf[i], rows)
            draw = normal_noise(jax.random.fold_in(noise_key, slots[i + 1]), jnp.int32(i), x, solver.draws)
            after = denoise.apply(x, row.t, seen)[1]
            x, memory, _ = solver.step(draw, Replay(seen, denoise), x, memory, row)
            seen = after
        return x

    for k in range(2):
        np.testing.assert_allclose(found.x[k], replay(path[:, k]), rtol=1e-9)


@pytest.mark.paper("A General Framework for Inference-time Scaling and Steering of Diffusion Models")
@pytest.mark.parametrize("potential", [smc.difference(), smc.maximum(), smc.total()], ids=repr)
def test_potentials_have_one_target(potential, evidence):
    """Without gradients, judged in some of the rows; never resampled, the weights are h(x_0) whatever the potential."""
    found = _populations(4, KEYS, (np.inf, 0.0), potential=potential, proposal="base", every=5)
    assert (np.asarray(found.resampled[0]).sum(1) == 4).all()
    _agree(found.log_z[0], *evidence[:2])
    plain = jax.tree.map(lambda leaf: leaf[1], found)
    logs = jax.vmap(jax.vmap(log_likelihood))(plain.x)
    np.testing.assert_allclose(plain.log_weights, logs, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(plain.log_z, np.log(np.mean(np.exp(logs), axis=1)), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(plain.ess[:, -1], jax.vmap(smc.effective_size)(logs), rtol=1e-9)
    assert (plain.nfe == 4 * len(GRID)).all() and (plain.failed_at == -1).all() and (plain.collapsed_at == -1).all()


def test_the_tilted_denoiser_is_the_default_proposal():
    """As a proposal of its own it costs a call more and gives the same particles; by a measurement."""
    seen = diffjax.inverse.measurement(diffjax.inverse.matrix(SLOPE[None]), np.array([SEEN]), NOISE)
    twist = diffjax.inverse.pigdm(seen, 0.8)
    options: Any = dict(particles=8, twist=twist, dtype=jnp.float64)
    one = steer(KEYS[0], PRIOR, ANCESTRAL, GRID, (2,), **options)
    guided = diffjax.guidance.tilted(PRIOR, twist)
    other = steer(KEYS[0], PRIOR, ANCESTRAL, GRID, (2,), proposal=guided, **options)
    assert other.nfe == 2 * one.nfe
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), one._replace(nfe=0), other._replace(nfe=0))


def test_devices_make_no_difference():
    """Eight devices, resampled across: the particles, weights and ancestry of one."""
    mesh = jax.make_mesh((8,), ("particles",))
    options: Any = dict(particles=16, twist=NAIVE, threshold=0.95, dtype=jnp.float64)
    one = steer(KEYS[0], PRIOR, ANCESTRAL, GRID, (2,), **options)
    many = steer(KEYS[0], PRIOR, ANCESTRAL, GRID, (2,), mesh=mesh, **options)
    assert 1 < one.resampled.sum() < len(GRID)
    assert len(many.x.sharding.device_set) == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), one, many)


@value
class Above:
    limit: Any

    def __call__(self, x0):
        return jnp.where(x0[0] > self.limit, 0.0, -jnp.inf)


def test_all_weights_zero_are_reported():
    """Nothing is resampled, log Z is -inf, and no weight becomes NaN; excluding a half of the space is fine."""

    def run(limit, key):
        twist = smc.reward(Above(limit))
        return steer(key, PRIOR, ANCESTRAL, GRID, (2,), particles=8, twist=twist, proposal="base", threshold=np.inf)

    found = jax.vmap(lambda limit: jax.vmap(lambda key: run(limit, key))(KEYS[:50]))(np.array([np.inf, 0.0]))
    none, half = (jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in (0, 1))
    assert (none.collapsed_at == 0).all() and (none.failed_at == -1).all() and not none.resampled.any()
    assert (none.log_z == -np.inf).all() and (none.log_weights == -np.inf).all() and (none.ess == 0).all()
    assert (half.failed_at == -1).all() and not np.isnan(half.log_weights).any()
    assert (half.x[..., 0][np.exp(half.log_weights) > 0] > 0).all()


def test_trees_and_gradients():
    """States of any structure, and a derivative of log Z through the choices: the exact one, but for the sampling."""
    laws = {"a": oracles.gaussian(np.zeros(2), np.eye(2)), "b": oracles.gaussian(1.0, 0.5)}

    def denoise(x, level):
        return {name: laws[name](x[name], level) for name in laws}

    def run(shift, key, resampler):
        twist = smc.reward(lambda x0: -((x0["b"] - shift) ** 2) - 0.5 * x0["a"] @ x0["a"])
        x = {"a": jax.random.normal(key, (64, 2)), "b": jax.random.normal(jax.random.fold_in(key, 1), (64,))}
        found = steer(key, denoise, ANCESTRAL, GRID, x=x, particles=64, twist=twist, resampler=resampler, threshold=0.9)
        assert found.x["a"].shape == (64, 2) and found.x["b"].shape == (64,)
        return found.log_z

    # b of the discretised chain is Gaussian: log E exp(-(b - c)^2) = -(mean - c)^2 / (1 + 2 variance) + ..
    rows, mean, variance = ANCESTRAL.plan(GRID), 0.0, 1.0
    for i in range(len(GRID)):
        row = jax.tree.map(lambda leaf, i=i: leaf[i], rows)
        shift, std = ANCESTRAL.kernel(jnp.zeros(()), laws["b"](jnp.zeros(()), row.t), row)
        slope = ANCESTRAL.kernel(jnp.ones(()), laws["b"](jnp.ones(()), row.t), row)[0] - shift
        mean, variance = shift + slope * mean, slope**2 * variance + std**2
    exact = 2 * (mean - 0.3) / (1 + 2 * variance)
    for resampler in (smc.scored(), smc.transported(0.1, 50)):
        slopes = jax.jit(jax.vmap(jax.grad(run), in_axes=(None, 0, None)))(0.3, KEYS[:64], resampler)
        assert abs(slopes.mean() - exact) < 4 * slopes.std() / 8 + 0.02, (slopes.mean(), slopes.std(), exact)


def test_bad_input():
    good: Any = dict(particles=4, twist=NAIVE)
    call = lambda solver=ANCESTRAL, **options: steer(KEYS[0], PRIOR, solver, GRID, (2,), **{**good, **options})
    for match, options in {
        "stochastic solver": dict(solver=solvers.ddim()),
        "kernel": dict(solver=solvers.sa_solver()),
        "particles": dict(particles=0),
        "threshold": dict(threshold=-1.0),
        "every": dict(every=0),
        "proposal": dict(proposal="guided"),
        "twist": dict(twist=3.0),
        "potential": dict(potential=3.0),
        "resampler": dict(resampler="systematic"),
        "telescopes": dict(resampler=smc.transported(), potential=smc.total()),
        "initial": dict(initial="twisted"),
        "multiple of the 8": dict(mesh=jax.make_mesh((8,), ("p",))),
    }.items():
        with pytest.raises(ValueError, match=match):
            call(**options)
    with pytest.raises(ValueError, match="leading axis"):
        steer(KEYS[0], PRIOR, ANCESTRAL, GRID, x=jnp.zeros((3, 2)), **good)
    with pytest.raises(ValueError, match="scale"):
        smc.reward(log_likelihood, np.nan)
