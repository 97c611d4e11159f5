"""The exponential-integrator adjoint: order, agreement with the scan, memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import grids, noises, oracles, processes, solvers

KEY = jax.random.key(0)
MIXTURE = oracles.mixture([0.4, 0.6], [[-1.0, 0.3], [1.2, -0.5]], [[0.1, 0.3], [0.05, 0.2]])
START = np.array([0.9, -0.4])
WEIGHTS = np.array([1.0, 2.0])


def _gradients(run):
    """With respect to the start and to the mixture's means."""

    def loss(x, means):
        return jnp.sum(run(dataclasses.replace(MIXTURE, means=means), x) * WEIGHTS)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(START), jnp.asarray(MIXTURE.means))


def _error(found, true):
    return np.array([np.abs(a - b).max() for a, b in zip(found, true, strict=True)])


@pytest.mark.paper("AdjointDEIS: Efficient Gradients for Diffusion Models")
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    ("process", "prediction", "start"),
    [(processes.cosine(), "noise", 0.95), (processes.vp(), "data", 1.0), (processes.flow(), "data", 1.0)],
    ids=["cosine-noise", "vp-data", "flow-data"],
)
def test_the_gradient_has_the_stated_order(process, prediction, start, order, x64):
    # the last step goes to sigma = 0 and stays, so that its (first-order) error is not seen
    grid = lambda n: grids.times(process, np.append(np.linspace(start, 0.1, n), 0.0))
    scan = lambda n, solver: _gradients(lambda d, x: diffjax.sample(KEY, d, solver, grid(n), x=x).x)
    adjoint = lambda n: _gradients(
        lambda d, x: diffjax.adjoint(KEY, d, solvers.dpmpp(), grid(n), x=x, order=order, prediction=prediction).x
    )
    true = scan(600, solvers.dpm_pair(3))
    errors = np.array([_error(adjoint(n), true) for n in (80, 320)])
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]) / 2, order, atol=0.3)
    # and it agrees with automatic differentiation of the same solver on the same grid, to that order
    apart = np.array([_error(adjoint(n), scan(n, solvers.dpmpp())) for n in (80, 320)])
    slopes = np.log2(apart[0] / apart[1]) / 2
    assert np.all(slopes > order - 0.35), slopes
    assert np.all(apart[0] > 1e-7)  # it is not the same computation


@pytest.mark.paper("AdjointDEIS: Efficient Gradients for Diffusion Models")
def test_a_step_is_the_papers(x64):
    # one step to a level above the data: a_t = alpha_s / alpha_t a_s + sigma_t (alpha_s / alpha_t)^2 (e^h - 1) J^T a_s
    process = processes.vp()
    grid = grids.times(process, np.array([0.5, 0.4]))
    t, s = (jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), level) for level in (grid.t, grid.s))
    eps = lambda x: (x - s.alpha * MIXTURE(x, s)) / s.sigma
    h = t.half_log_snr - s.half_log_snr
    a = jnp.asarray(WEIGHTS)
    for rate, solver in ((1.0, solvers.ddim()), (2.0, solvers.ddim(eta=1.0))):
        key = jax.random.split(KEY)[1]  # of the run inside
        out = diffjax.sample(key, MIXTURE, solver, grid, x=jnp.asarray(START)).x
        jacobian = jax.jacobian(eps)(out)
        expected = s.alpha / t.alpha * a + rate * t.sigma * (s.alpha / t.alpha) ** 2 * jnp.expm1(h) * (jacobian.T @ a)
        found = _gradients(
            lambda d, x, solver=solver: diffjax.adjoint(KEY, d, solver, grid, x=x, order=1, prediction="noise").x
        )[0]
        np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.paper("AdjointDEIS: Efficient Gradients for Diffusion Models")
@pytest.mark.parametrize("solver", [solvers.ddim(eta=1.0), solvers.euler_maruyama()], ids=repr)
def test_the_sde_with_its_own_noise(solver, x64):
    # on one Brownian path, against automatic differentiation on a fine grid; strong order 1
    process, finest = processes.cosine(), 640
    grid = lambda n: grids.times(process, np.linspace(0.9, 0.2, n + 1))
    z = np.random.default_rng(0).normal(size=(finest, 2))
    fine = grid(finest)
    h = (fine.s.half_log_snr - fine.t.half_log_snr)[:, None]

    def path(n):  # the increments of the coarse grid on the same path, exact for the time-reversed SDE
        parts = (np.sqrt(-np.expm1(-2 * h)) * z).reshape(n, -1, 2)
        left = np.exp(np.cumsum(h.reshape(n, -1, 1), axis=1) - h.reshape(n, -1, 1).sum(1, keepdims=True))
        return noises.stored(((left * parts).sum(1) / np.sqrt(-np.expm1(-2 * h.reshape(n, -1).sum(1)))[:, None],))

    run = lambda n: _gradients(lambda d, x: diffjax.adjoint(KEY, d, solver, grid(n), x=x, noise=path(n)).x)
    true = _gradients(lambda d, x: diffjax.sample(KEY, d, solvers.ddim(1.0), fine, x=x, noise=path(finest)).x)
    errors = np.array([_error(run(n), true) for n in (20, 160)])
    assert np.all(errors[1] < 0.25 * errors[0]), errors


@pytest.mark.paper("AdjointDEIS: Efficient Gradients for Diffusion Models")
def test_the_noise_of_the_forward_pass_is_drawn_again(x64):
    grid = grids.times(processes.cosine(), np.linspace(0.9, 0.2, 401))
    key = jax.random.key(3)
    plain = lambda f, k: _gradients(lambda d, x: f(k, d, solvers.ddim(1.0), grid, x=x).x)
    true = plain(diffjax.sample, jax.random.split(key)[1])  # the key of the run inside
    close, wrong = (_error(plain(diffjax.adjoint, k), true) for k in (key, KEY))
    assert np.all(close < 0.2 * wrong), (close, wrong)


@pytest.mark.paper("AdjointDEIS: Efficient Gradients for Diffusion Models")
def test_memory_does_not_grow_with_the_steps():
    process = processes.vp()
    x = jnp.zeros(5000)
    data = oracles.gaussian(np.zeros(5000), np.linspace(0.1, 1.0, 5000))

    def temporary(run, n):
        grid = grids.log_snr(process, n)
        compiled = jax.jit(jax.grad(lambda x: run(KEY, data, solvers.ddim(), grid, x=x).x.sum())).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = (temporary(diffjax.adjoint, n) for n in (16, 128))
    assert many < 1.3 * few
    assert temporary(diffjax.sample, 128) > 3 * many


@pytest.mark.paper("AdjointDEIS: Efficient Gradients for Diffusion Models")
def test_latent_optimisation():
    # find the noise whose sample is as near as possible to a point, by gradient descent through the sampler
    grid, target = grids.log_snr(processes.vp(), 12), jnp.asarray([1.2, -0.5])
    loss = lambda x: jnp.sum((diffjax.adjoint(KEY, MIXTURE, solvers.dpmpp(), grid, x=x).x - target) ** 2)
    step = jax.jit(jax.value_and_grad(loss))
    x = jnp.asarray(START)
    first, _ = step(x)
    for _ in range(60):
        value, slope = step(x)
        x = x - 0.1 * slope
    assert value < 0.5 * first


def test_it_is_sample_forward_and_under_transformations():
    grid = grids.log_snr(processes.vp(), 6)
    x = jnp.asarray(START)
    run = lambda x: diffjax.adjoint(KEY, MIXTURE, solvers.heun(), grid, x=x)
    plain = diffjax.sample(KEY, MIXTURE, solvers.heun(), grid, x=x)
    np.testing.assert_allclose(run(x).x, plain.x, rtol=1e-6)
    assert run(x).nfe == plain.nfe == 12
    slope = jax.grad(lambda x: run(x).x.sum())
    slopes = jax.jit(jax.vmap(slope))(jnp.stack([x, -x]))
    np.testing.assert_allclose(slopes[1], jax.jit(slope)(-x), rtol=1e-4)
    # parameters, conditions and scales of guided networks
    prediction = diffjax.predictions.velocity(processes.vp())
    network = lambda params, x, t, condition: params["w"] * x + condition
    fine = grids.log_snr(processes.vp(), 200)

    def total(f, params, condition, scale):
        denoise = prediction.decode(network, params, condition=condition)
        denoise = diffjax.guidance.classifier_free(denoise, null=0.0, scale=scale)
        return f(KEY, denoise, solvers.dpmpp(), fine, x=x).x.sum()

    where = ({"w": jnp.asarray(0.2)}, jnp.asarray(0.3), jnp.asarray(2.0))
    by = lambda f: jax.jit(jax.grad(lambda *w: total(f, *w), argnums=(0, 1, 2)))(*where)
    for a, b in zip(jax.tree.leaves(by(diffjax.adjoint)), jax.tree.leaves(by(diffjax.sample)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.02)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(order=3), "order"),
        (dict(prediction="velocity"), "prediction"),
        (dict(solver=solvers.ddim(1.0), order=2), "order 1"),
        (dict(solver=solvers.ddim(1.0), prediction="data"), "noise form"),
        (dict(grid=grids.uniform(processes.flow(), 4), prediction="noise"), "alpha = 0"),
        (dict(grid=grids.time_travel(grids.uniform(processes.vp(), 4), 2, 2)), "gaps"),
        (dict(grid=grids.reverse(grids.uniform(processes.vp(), 4, stop=0.1))), "towards"),
        (dict(x=None), "exactly one"),
        (dict(denoise=diffjax.corrections.dualfast(MIXTURE)), "memory"),
    ],
)
def test_refusals(options, match):
    given = dict(denoise=MIXTURE, solver=solvers.ddim(), grid=grids.uniform(processes.vp(), 4), x=START) | options
    denoise, solver, grid = (given.pop(name) for name in ("denoise", "solver", "grid"))
    with pytest.raises(ValueError, match=match):
        diffjax.adjoint(KEY, denoise, solver, grid, **given)
