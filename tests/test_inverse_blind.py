"""Image and kernel together, against the enumeration of a discrete set of kernels and components."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, guidance, inverse, oracles, processes, sample, smc, solvers, steer
from diffjax.levels import value

PROCESS = processes.flow()
RNG = np.random.default_rng(0)
# --- a small problem of which everything is known: Gaussian signals, three kernels ------------------------------
SIZE, TAPS, NOISE = 4, 3, 0.8
KERNELS = np.array([[0.0, 1.0, 0.0], [0.6, 0.0, 0.4], [0.3, -0.5, 1.0]])
ODDS = np.array([0.5, 0.2, 0.3])
MEAN = RNG.normal(size=SIZE)
ROOT = RNG.normal(size=(SIZE, SIZE))
COVARIANCE = ROOT @ ROOT.T / SIZE + 0.1 * np.eye(SIZE)
PRIOR = inverse.joint({"image": oracles.gaussian(MEAN, COVARIANCE), "kernel": oracles.points(KERNELS, ODDS)})
BLUR = inverse.blind_blur((SIZE,), (TAPS,))
MATRICES = np.stack([inverse.decomposed(inverse.blur(kernel, (SIZE,))).entries for kernel in KERNELS])
Y = MATRICES[1] @ (MEAN + ROOT @ RNG.normal(size=SIZE) / 2) + NOISE * RNG.normal(size=SIZE)
SEEN = inverse.measurement(BLUR, Y, NOISE)


def test_the_operator_is_the_blur_of_its_kernel(x64):
    for shape, size in (((5,), (3,)), ((4, 6), (3, 2)), ((4, 4, 2), (3, 3))):
        x, kernel = jnp.asarray(RNG.normal(size=shape)), RNG.normal(size=size)
        found = inverse.blind_blur(shape, size)({"image": x, "kernel": jnp.asarray(kernel)})
        np.testing.assert_allclose(found, inverse.blur(kernel, shape)(x), atol=1e-12)
        unit = inverse.blind_blur(shape, size, normalised=True)({"image": x, "kernel": jnp.asarray(kernel)})
        np.testing.assert_allclose(unit * kernel.sum(), found, atol=1e-11)
    gains = inverse.blind(lambda k: inverse.diagonal(jnp.exp(k)), (3,), (3,))
    np.testing.assert_allclose(gains({"image": jnp.arange(3.0), "kernel": jnp.log(jnp.arange(1.0, 4.0))}), [0, 2, 6])


def enumerated(x, level):
    """``(log p(y | x_t), E[x_0 | x_t, y], E[k_0 | x_t, y])`` in NumPy: every kernel with Gaussian conditioning."""
    alpha, sigma = float(level.alpha), float(level.sigma)
    gain = alpha * COVARIANCE @ np.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * np.eye(SIZE))
    mean, covariance = MEAN + gain @ (x["image"] - alpha * MEAN), COVARIANCE - alpha * gain @ COVARIANCE
    prior = np.log(ODDS) - np.sum((x["kernel"] - alpha * KERNELS) ** 2, axis=1) / (2 * sigma**2)
    logs, means = [], []
    for a in MATRICES:
        total = a @ covariance @ a.T + NOISE**2 * np.eye(SIZE)
        gap = Y - a @ mean
        logs.append(-0.5 * (gap @ np.linalg.solve(total, gap) + np.linalg.slogdet(2 * np.pi * total)[1]))
        means.append(mean + covariance @ a.T @ np.linalg.solve(total, gap))
    both = prior + np.array(logs)
    weights = np.exp(both - both.max())
    log_h = np.log(weights.sum()) + both.max() - np.log(np.sum(np.exp(prior - prior.max()))) - prior.max()
    weights /= weights.sum()
    return log_h, weights @ np.stack(means), weights @ KERNELS


@value
class Enumerated:
    """The exact twist: the kernel is one of a set, and given it the measurement is linear."""

    mean: Any
    covariance: Any

    def __call__(self, denoise, x, level):
        x0, image = denoise(x, level), denoise.parts["image"]
        jacobian = jax.jacfwd(lambda v: image(v, level))(x["image"])
        spread = level.sigma**2 / level.alpha * jacobian
        prior = jnp.log(ODDS) - jnp.sum((x["kernel"] - level.alpha * KERNELS) ** 2, axis=1) / (2 * level.sigma**2)

        def one(a):
            total = a @ spread @ a.T + NOISE**2 * jnp.eye(SIZE)
            return jax.scipy.stats.multivariate_normal.logpdf(jnp.asarray(Y), a @ x0["image"], total)

        return jax.nn.logsumexp(jax.nn.log_softmax(prior) + jax.vmap(one)(jnp.asarray(MATRICES))), x0


def test_the_tilted_pair_of_denoisers_is_the_joint_posterior_mean(x64):
    """With the exact twist of the joint operator, guidance of `joint` is E[image, kernel | x_t, y], to 1e-9."""
    twist = Enumerated(MEAN, COVARIANCE)
    x = {"image": jnp.asarray(RNG.normal(size=SIZE)), "kernel": jnp.asarray(RNG.normal(size=TAPS))}
    tilted = guidance.tilted(PRIOR, twist)
    both = jax.jit(lambda level: (twist(PRIOR, x, level)[0], tilted(x, level)))
    for time in (0.4, 0.8):
        level = jax.tree.map(jnp.asarray, PROCESS.level(time))
        log_h, found = both(level)
        expected = enumerated(jax.tree.map(np.asarray, x), level)
        np.testing.assert_allclose(log_h, expected[0], atol=1e-9)
        np.testing.assert_allclose(found["image"], expected[1], atol=1e-9)
        np.testing.assert_allclose(found["kernel"], expected[2], atol=1e-9)
    assert int(PRIOR.evaluations(level)) == 2


def test_particles_find_the_posterior_of_the_kernel(x64):
    """`steer` with the likelihood of the joint operator as twist: each kernel's probability and log p(y), exactly.

    What the usual twists do for linear operators they do for the pair: the evidence of each kernel is an average over
    populations, within four standard errors of enumeration.
    """
    # ancestral steps would be biased by more than the error bars: their law has too little variance
    grid, solver, particles, populations = grids.uniform(PROCESS, 40), solvers.sde_dpmpp(), 32, 200
    twist = inverse.likelihood(SEEN)

    def run(key):
        first, second, third = jax.random.split(key, 3)
        x = {
            "image": jax.random.normal(first, (particles, SIZE)),
            "kernel": jax.random.normal(second, (particles, TAPS)),
        }
        out = steer(third, PRIOR, solver, grid, particles=particles, x=x, twist=twist, proposal="base")
        which = jnp.argmin(jnp.sum((out.x["kernel"][:, None] - KERNELS) ** 2, axis=-1), axis=1)
        share = smc.normalised(out.log_weights) @ jax.nn.one_hot(which, len(KERNELS))
        return jnp.exp(out.log_z) * share

    found = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(4), populations)))
    totals = MATRICES @ COVARIANCE @ MATRICES.transpose(0, 2, 1) + NOISE**2 * np.eye(SIZE)
    gaps = Y - MATRICES @ MEAN
    density = np.exp(-0.5 * np.einsum("ki,ki->k", gaps, np.linalg.solve(totals, gaps[..., None])[..., 0]))
    expected = ODDS * density / np.sqrt(np.linalg.det(2 * np.pi * totals))
    error = found.std(0, ddof=1) / np.sqrt(populations)
    assert np.all(np.abs(found.mean(0) - expected) < 4 * error)
    assert np.all(error < 0.1 * expected.sum())


def test_a_blind_step_by_hand(x64):
    """Gaussian parts, so that the Jacobians are numbers: DDIM, minus the gradient of misfit and sparsity."""
    kernel_mean, kernel_variance, step, weight = KERNELS[2], 0.4, 0.7, 0.3
    prior = inverse.joint(
        {"image": oracles.gaussian(MEAN, 1.5), "kernel": oracles.gaussian(kernel_mean, kernel_variance)}
    )
    x = {"image": RNG.normal(size=SIZE), "kernel": RNG.normal(size=TAPS)}
    grid = grids.times(PROCESS, [0.6, 0.35])
    for sparsity in (0.0, {"image": 0.0, "kernel": weight}, weight):
        solver = inverse.blind_dps(solvers.ddim(), SEEN, step, sparsity)
        found = sample(jax.random.key(0), prior, solver, grid, x=jax.tree.map(jnp.asarray, x))
        gains = {
            "image": 0.4 * 1.5 / (0.16 * 1.5 + 0.36),
            "kernel": 0.4 * kernel_variance / (0.16 * kernel_variance + 0.36),
        }
        means = {"image": MEAN, "kernel": kernel_mean}
        x0 = {name: means[name] + gains[name] * (x[name] - 0.4 * means[name]) for name in x}
        # y_i = sum_j k_{1+j} x_{i-j}: the misfit is bilinear
        shifts = np.stack([np.roll(x0["image"], j) for j in (-1, 0, 1)], axis=1)
        residual = Y - shifts @ x0["kernel"]
        unit = residual / np.linalg.norm(residual)
        by_kernel = -shifts.T @ unit
        by_image = -sum(x0["kernel"][j + 1] * np.roll(unit, -j) for j in (-1, 0, 1))
        weights = sparsity if isinstance(sparsity, dict) else {"image": sparsity, "kernel": sparsity}
        slopes = {"image": by_image, "kernel": by_kernel}
        for name in x:
            eps = (x[name] - 0.4 * x0[name]) / 0.6
            plain = 0.65 * x0[name] + 0.35 * eps
            expected = plain - step * gains[name] * (slopes[name] + weights[name] * np.sign(x0[name]))
            np.testing.assert_allclose(found.x[name], expected, rtol=1e-9, atol=1e-12)
        assert int(found.nfe) == 2


# --- signals of four shapes, four kernels -----------------------------------------------------------------------


def known(length=16, kinds=4, problems=96, noise=0.1, variance=0.05):
    rng = np.random.default_rng(1)
    shapes = rng.normal(size=(kinds, length))
    shapes = np.sign(shapes + np.roll(shapes, 1, axis=1) + np.roll(shapes, -1, axis=1))
    kernels = np.array([[0, 0, 1, 0, 0], [0.2, 0.2, 0.2, 0.2, 0.2], [0, 0.5, 0, 0.5, 0], [0.6, 0.4, 0, 0, 0]])
    image, kernel = rng.integers(0, kinds, problems), rng.integers(0, len(kernels), problems)
    x = shapes[image] + np.sqrt(variance) * rng.normal(size=(problems, length))
    blurs = np.stack([inverse.decomposed(inverse.blur(k, (length,))).entries for k in kernels])
    y = np.einsum("nij,nj->ni", blurs[kernel], x) + noise * rng.normal(size=x.shape)
    return shapes, kernels, blurs, kernel, x, y


@pytest.mark.paper("Parallel Diffusion Models of Operator and Image for Blind Inverse Problems")
def test_blind_deblurring_finds_kernel_and_image():
    """Against the enumerated posterior, the same sampler with the kernel known, and with the mean kernel.

    Enumeration is certain of every kernel.  Blind DPS, which does not sample the posterior, ends at another one in one
    run of twenty; the mean error is that of these.
    """
    noise, variance, step = 0.1, 0.05, 0.3
    shapes, kernels, blurs, which, x, y = known(noise=noise, variance=variance)
    length, problems = x.shape[1], len(x)
    total = variance * blurs @ blurs.transpose(0, 2, 1) + noise**2 * np.eye(length)  # (K, M, M)
    gaps = y[:, None, None] - np.einsum("kij,sj->ksi", blurs, shapes)[None]  # (N, K, S, M)
    logs = -0.5 * np.einsum("nksi,kij,nksj->nks", gaps, np.linalg.inv(total), gaps)
    logs = logs - 0.5 * np.linalg.slogdet(total)[1][:, None]
    weights = np.exp(logs - logs.max((1, 2), keepdims=True))
    weights /= weights.sum((1, 2), keepdims=True)
    certain = weights.sum(2)[np.arange(problems), which]
    assert certain.min() > 0.9  # y determines the kernel: what is drawn can be compared with the true one

    prior = oracles.mixture(np.full(len(shapes), 1.0), shapes, np.full(len(shapes), variance))
    both = inverse.joint({"image": prior, "kernel": oracles.points(kernels)})
    operator, grid = inverse.blind_blur((length,), (5,)), grids.uniform(PROCESS, 100, start=0.99)

    def blind(key, start, y):
        solver = inverse.blind_dps(solvers.ddim(eta=1.0), inverse.measurement(operator, y, noise), step)
        return sample(key, both, solver, grid, x=start).x

    def informed(key, start, y, kernel):
        seen = inverse.measurement(inverse.blur(kernel, (length,)), y, noise)
        return sample(key, prior, inverse.dps(solvers.ddim(eta=1.0), seen, step), grid, x=start["image"]).x

    keys = jax.random.split(jax.random.key(3), problems)
    rng = np.random.default_rng(2)
    start = {"image": rng.normal(size=x.shape), "kernel": rng.normal(size=(problems, 5))}
    start, seen = jax.tree.map(functools.partial(jnp.asarray, dtype=jnp.float32), (start, y))
    found = jax.jit(jax.vmap(blind))(keys, start, seen)
    given = jnp.asarray(np.stack([kernels[which], np.broadcast_to(kernels.mean(0), (problems, 5))]), jnp.float32)
    others = jax.jit(jax.vmap(jax.vmap(informed), (None, None, None, 0)))(keys, start, seen, given)
    psnr = lambda image: 10 * np.log10(4 / np.mean((np.asarray(image) - x) ** 2, axis=-1))
    best, mean_kernel, own = psnr(others[0]), psnr(others[1]), psnr(found["image"])
    error = np.linalg.norm(np.asarray(found["kernel"]) - kernels[which], axis=1)
    blank = np.linalg.norm(kernels[:, None] - kernels[which], axis=-1).mean(0)  # of a kernel drawn from the prior
    for gap in ((error < 0.05) - 0.5, blank / 2 - error, own - mean_kernel, 2 * own - mean_kernel - best):
        assert gap.mean() > 4 * gap.std(ddof=1) / np.sqrt(problems)


class Remembering:
    def init(self, x):
        return x

    def apply(self, x, level, memory):
        return x, memory


@pytest.mark.parametrize(
    "wrong, name",
    [
        (lambda: inverse.joint({}), "parts"),
        (lambda: inverse.joint({"image": Remembering()}), "remembers"),
        (lambda: inverse.blind_dps(solvers.heun(), SEEN), "update"),
        (lambda: inverse.blind_dps(solvers.ddim(), SEEN, -1.0), "step"),
        (lambda: inverse.blind_dps(solvers.ddim(), SEEN, sparsity={"image": 0.0, "kernel": -1.0}), "sparsity"),
        (lambda: inverse.blind_blur((3,), (4,)), "kernel must fit"),
    ],
)
def test_refusals(wrong, name):
    with pytest.raises(ValueError, match=name):
        wrong()
