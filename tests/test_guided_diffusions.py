"""Guided diffusions: exact for linear processes, unbiased for others, against matrices of transition densities."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from diffjax import guidance, inverse, oracles, processes, smc, smoothing
from diffjax.levels import value
from diffjax.smoothing import diffusion, euler, linear_sde, point
from diffjax.smoothing.composition import at
from diffjax.smoothing.diffusion import guided_step, transition
from diffjax.smoothing.gaussian import pulled

POINTS = np.linspace(-4, 4, 501)
LOG_ROOT = 0.5 * np.log(2 * np.pi)
WIDTH = POINTS[1] - POINTS[0]


@pytest.fixture(autouse=True)
def double(x64):
    """All tests here run in float64."""


@value
class Well:
    """A double well, pushed back and forth."""

    strength: float = 1.5

    def __call__(self, x, t):
        return self.strength * (x - x**3) + 0.5 * jnp.sin(3 * t)


def wavy(x, t):
    """A scale that depends on the state."""
    return (0.7 + 0.25 * jnp.sin(2 * x))[:, None]


def _step(drift, scale, t, d):
    """The density of an Euler step between the points, (from, to)."""
    x = POINTS[:, None]
    mean = x + d * np.asarray(jax.vmap(drift, (0, None))(x, t))
    std = np.sqrt(d) * np.asarray(jax.vmap(scale, (0, None))(x, t))[:, :, 0]
    return np.exp(-0.5 * ((POINTS - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))


def _pulled(drift, scale, times, values):
    """The functions of the points before every step, and after the last, in the Euler chain."""
    every = [values]
    for t, d in zip(times[-2::-1], np.diff(times)[::-1], strict=True):
        every.append(_step(drift, scale, t, d) @ every[-1] * WIDTH)
    return every[::-1]


def _at(values, x):
    return np.interp(x, POINTS, values)


def _unbiased(log_weights, exact, within=0.03, extra=0.0):
    """The mean weight is the likelihood, within four standard errors that are small themselves."""
    z = np.exp(np.asarray(log_weights))
    error = z.std() / np.sqrt(z.size)
    assert abs(z.mean() - exact) < 4 * error + extra * exact, (z.mean(), exact, error)
    assert 4 * error < within * exact


def _runs(kernel, h, x, count, seed=0):
    run = lambda keys, kernel, h: jax.vmap(lambda key: smoothing.smooth(key, kernel, h, x))(keys)
    return jax.jit(run)(jax.random.split(jax.random.key(seed), count), kernel, h)


# --- linear processes -------------------------------------------------------------------------------------------------

MATRIX, SHIFT = np.array([[-0.8, 1.1], [-0.6, -0.3]]), np.array([0.4, -0.2])
SCALE = np.array([[0.6, 0.0], [0.2, 0.5]])
TIMES = np.linspace(0.0, 1.2, 49)
START, END = np.array([0.5, -0.5]), np.array([1.0, 0.3])


def _moments(x, time):
    """Mean and covariance of the Ornstein-Uhlenbeck process, by Van Loan's matrix exponential."""
    block = np.zeros((5, 5))
    block[:2, :2], block[:2, 2:4], block[2:4, 2:4] = -MATRIX, SCALE @ SCALE.T, MATRIX.T
    power = scipy.linalg.expm(time * block)
    flow = power[2:4, 2:4].T
    mean = flow @ x + np.linalg.solve(MATRIX, (flow - np.eye(2)) @ SHIFT)
    return mean, flow, flow @ power[:2, 2:4]


def _log_normal(x, mean, cover):
    offset = x - mean
    return -0.5 * (offset @ np.linalg.solve(cover, offset) + np.linalg.slogdet(2 * np.pi * cover)[1])


@pytest.mark.paper("Automatic Backward Filtering Forward Guiding for Markov processes and graphical models")
def test_an_ornstein_uhlenbeck_bridge_has_weight_one_and_the_exact_density():
    linear = lambda x, t: MATRIX @ x + SHIFT
    auxiliary = linear_sde(MATRIX, SHIFT, SCALE)
    bridge = diffusion(linear, SCALE, TIMES, auxiliary)
    guided = _runs(bridge, point(END), START, 2000)
    mean, _, cover = _moments(START, 1.2)
    np.testing.assert_allclose(guided.log_weight, _log_normal(END, mean, cover), atol=1e-7)
    assert np.all(guided.x == END) and guided.path.shape == (2000, 48, 2)
    # half way: Gaussian, by Bayes' formula; the walk is of order 1 in the step
    half, _, first = _moments(START, 0.6)
    _, flow, second = _moments(START, 0.6)
    gain = first @ flow.T @ np.linalg.inv(flow @ first @ flow.T + second)
    middle = half + gain @ (END - mean)
    found = np.asarray(guided.path)[:, 23]
    error = np.sqrt(np.diag(first - gain @ flow @ first) / 2000)
    assert np.all(abs(found.mean(axis=0) - middle) < 4 * error + 0.02)
    # towards a Gaussian potential, flat ones included
    for precision in (np.array([[2.0, 0.5], [0.5, 1.0]]), np.zeros((2, 2))):
        h = smoothing.quadratic(precision, precision @ END, 0.3)
        message, source = bridge.backward(h)
        spread = np.eye(2) + cover @ precision
        off = precision @ (END - mean)
        exact = 0.3 - 0.5 * mean @ precision @ mean + mean @ precision @ END
        exact = exact + 0.5 * off @ np.linalg.solve(spread, cover @ off) - 0.5 * np.linalg.slogdet(spread)[1]
        np.testing.assert_allclose(source(START), exact, atol=1e-7)
        log_weight = bridge.forward(message, START, bridge.noise(jax.random.key(1))).log_weight
        np.testing.assert_allclose(log_weight, 0.0, atol=1e-12)
    # the Euler chain of a linear process is a linear-Gaussian chain: weight one, with any number of steps
    steps = euler(linear, SCALE, TIMES[::8], auxiliary)
    logs = _runs(steps, point(END), START, 8).log_weight
    assert np.ptp(logs) < 1e-10
    cover, mean = np.zeros((2, 2)), START
    for d in np.diff(TIMES[::8]):
        grow = np.eye(2) + d * MATRIX
        mean, cover = grow @ mean + d * SHIFT, grow @ cover @ grow.T + d * SCALE @ SCALE.T
    np.testing.assert_allclose(logs[0], _log_normal(END, mean, cover), rtol=1e-10)


# --- nonlinear processes ----------------------------------------------------------------------------------------------


@pytest.mark.paper("Automatic Backward Filtering Forward Guiding for Markov processes and graphical models")
def test_weights_of_a_nonlinear_bridge_are_unbiased_for_the_transition_density():
    times, end = np.linspace(0.0, 1.0, 13), 0.9
    auxiliary = linear_sde(np.array([[-1.0]]), np.array([0.8]), np.array([[0.9]]))
    spread = np.array([[0.9]])
    chain = euler(Well(), spread, times, auxiliary)
    guided = _runs(chain, point(np.array([end])), np.array([-0.6]), 20_000)
    last = _step(Well(), lambda x, t: spread, times[-2], times[-1] - times[-2])
    column = np.array([np.interp(end, POINTS, row) for row in last])
    exact = _at(_pulled(Well(), lambda x, t: spread, times[:-1], column)[0], -0.6)
    _unbiased(guided.log_weight, exact)
    # the scale of the state in the walk and in the weight; another one in the auxiliary process but at the end
    touching = linear_sde(np.array([[-1.0]]), np.array([0.8]), wavy(np.array([end]), 0.0))
    chain = euler(Well(), wavy, times, touching)
    guided = _runs(chain, point(np.array([end])), np.array([-0.6]), 20_000)
    last = _step(Well(), wavy, times[-2], times[-1] - times[-2])
    column = np.array([np.interp(end, POINTS, row) for row in last])
    exact = _at(_pulled(Well(), wavy, times[:-1], column)[0], -0.6)
    _unbiased(guided.log_weight, exact, within=0.08)


@pytest.mark.paper("Automatic Backward Filtering Forward Guiding for Markov processes and graphical models")
def test_the_rate_of_the_log_weight_is_the_generators_difference():
    """(d/dt + L) h / h by automatic differentiation in two dimensions, as (d/dt + L~) h = 0; nothing is drawn."""
    drift = lambda x, t: jnp.array([jnp.sin(x[1]) - x[0] ** 3, t * x[0]])
    scale = lambda x, t: jnp.array([[0.7 + 0.2 * jnp.cos(x[0]), 0.1 * x[1]], [0.3, 0.5 + 0.1 * t]])
    auxiliary = linear_sde(lambda t: MATRIX + t * np.eye(2), lambda t: (1 + t) * SHIFT, lambda t: (1.2 - t) * SCALE)
    end = smoothing.quadratic(np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([1.0, -0.5]), 0.3)
    segment = diffusion(drift, scale, np.array([0.3, 0.35]), auxiliary)
    x, t = jnp.array([0.4, -0.7]), jnp.asarray(0.3)

    @jax.jit
    def rates(x, t):
        back = lambda t: pulled(end, *transition(auxiliary, t, 0.35 - t))
        log_h = lambda x, t: back(t)(x)
        slope, spread = jax.grad(log_h)(x, t), scale(x, t)
        curvature = jax.hessian(log_h)(x, t) + jnp.outer(slope, slope)
        found = guided_step(segment, back(t), x, t, jnp.asarray(0.01), jnp.ones(2))[1] / 0.01
        return found, jax.grad(log_h, 1)(x, t) + drift(x, t) @ slope + 0.5 * jnp.trace(spread @ spread.T @ curvature)

    found, wanted = rates(x, t)
    assert abs(wanted) > 0.3
    np.testing.assert_allclose(found, wanted, rtol=1e-4)  # the moments are those of one Runge-Kutta step


@pytest.mark.paper("Automatic Backward Filtering Forward Guiding for Markov processes and graphical models")
def test_the_integral_of_the_generators_difference_is_the_log_weight():
    """In continuous time: against chains of 96 and 192 steps, extrapolated; drift and scale are not the surrogate's.

    The error of the walk is of order 1 in the step: 24 and 48 steps extrapolate.
    """
    x, fine = np.array([-0.6]), np.linspace(0.0, 1.0, 193)
    auxiliary = linear_sde(lambda t: jnp.array([[-1.0 - 0.5 * t]]), np.array([0.8]), np.array([[0.8]]))
    h = smoothing.quadratic(np.array([[4.0]]), np.array([3.6]), -1.0)
    values = np.exp(-1.0 + 3.6 * POINTS - 2.0 * POINTS**2)
    exact = _at(_pulled(Well(), wavy, fine, values)[0], -0.6)
    coarse = _at(_pulled(Well(), wavy, fine[::2], values)[0], -0.6)
    exact = 2 * exact - coarse
    means, errors = [], []
    for steps in (24, 48):
        segment = diffusion(Well(), wavy, np.linspace(0.0, 1.0, steps + 1), auxiliary)
        z = np.exp(_runs(segment, h, x, 20_000, seed=steps).log_weight)
        means.append(z.mean())
        errors.append(z.std() / np.sqrt(z.size))
    error = np.hypot(2 * errors[1], errors[0])
    assert abs(2 * means[1] - means[0] - exact) < 4 * error + 0.003 * exact, (means, exact, error)
    assert 4 * error < 0.1 * exact
    assert abs(means[1] - exact) < 4 * errors[1] + 0.02 * exact


@pytest.mark.paper("Automatic Backward Filtering Forward Guiding for Markov processes and graphical models")
def test_crank_nicolson_moves_of_the_noise_draw_nonlinear_bridges():
    times, end, x = np.linspace(0.0, 1.0, 9), 0.9, np.array([-0.6])
    spread = np.array([[0.9]])
    scale = lambda x, t: spread
    chain = euler(Well(), spread, times, linear_sde(np.array([[0.0]]), np.array([0.0]), spread))
    last = _step(Well(), scale, times[-2], times[-1] - times[-2])
    column = np.array([np.interp(end, POINTS, row) for row in last])
    later = _pulled(Well(), scale, times[:-1], column)[4]
    law = _step(Well(), scale, 0.0, times[1])[np.argmin(abs(POINTS + 0.6))]
    for t, d in zip(times[1:4], np.diff(times)[1:4], strict=True):
        law = law @ _step(Well(), scale, t, d) * WIDTH
    law = law * later / np.sum(law * later)
    mean, square = np.sum(law * POINTS), np.sum(law * POINTS**2)

    def run(keys, gradients):
        move = lambda key: smoothing.guided_mcmc(key, chain, point(np.array([end])), x, 600, 1.0, gradients=gradients)
        return jax.vmap(move)(keys)

    keys, compiled = jax.random.split(jax.random.key(0), 64), jax.jit(run, static_argnums=1)
    for gradients in (False, True):
        walked = compiled(keys, gradients)
        middle = np.asarray(walked.draws.path)[:, 100:, 3, 0]
        assert 0.2 < walked.acceptance.mean() < 1.0
        for power, exact in ((1, mean), (2, square)):
            means = (middle**power).mean(axis=1)
            assert abs(means.mean() - exact) < 4 * means.std() / 8, (gradients, power, means.mean(), exact)


def test_a_particle_filter_looks_ahead_through_guided_segments():
    """Four observations of the well, each after a segment of six steps, against the filter on the points."""
    count, steps = 4, 6
    times = np.linspace(0.0, 2.0, count * steps + 1)
    spans = np.stack([times[i * steps : (i + 1) * steps + 1] for i in range(count)])
    seen = np.array([-0.8, 0.2, 0.9, 0.7])
    spread, std = np.array([[0.9]]), 0.3
    auxiliary = linear_sde(np.array([[-0.5]]), np.array([0.0]), spread)
    see = smoothing.linear_gaussian(np.eye(1), np.zeros(1), np.array([[std]]))

    def link(span, y):
        leaf = see.backward(point(y[None]))[1]
        return smoothing.sequential(euler(Well(), spread, span, auxiliary), smoothing.observed(leaf))

    kernel = smoothing.chain(jax.vmap(link)(spans, seen))
    prior = smoothing.normal_prior(np.array([-0.5]), np.array([[0.4]]))
    values = np.ones_like(POINTS)
    for span, y in zip(spans[::-1], seen[::-1], strict=True):
        values = values * np.exp(-0.5 * ((POINTS - y) / std) ** 2) / (std * np.sqrt(2 * np.pi))
        values = _pulled(Well(), lambda x, t: spread, span, values)[0]
    exact = np.sum(values * np.exp(-0.5 * ((POINTS + 0.5) / 0.4) ** 2) / (0.4 * np.sqrt(2 * np.pi))) * WIDTH
    whole = smoothing.sequential(prior, kernel)

    def run(key, threshold):
        return smoothing.particle_filter(key, whole, smoothing.flat(1), jnp.zeros(0), particles=16, threshold=threshold)

    compiled = jax.jit(jax.vmap(run, (0, None)))
    for threshold in (0.0, 0.7, np.inf):
        found = compiled(jax.random.split(jax.random.key(1), 500), threshold)
        _unbiased(found.log_z, exact, within=0.2)
        assert np.all(found.collapsed_at == -1) and found.ess.shape == (500, count + 1)
        resampled = np.any(np.asarray(found.ancestry) != np.arange(16), axis=-1)
        assert resampled.any() == (threshold > 0)
    with pytest.raises(ValueError, match="kernel must be a chain"):
        smoothing.particle_filter(jax.random.key(0), prior, smoothing.flat(1), jnp.zeros(0), particles=4)
    with pytest.raises(ValueError, match="must choose"):
        smoothing.particle_filter(
            jax.random.key(0), whole, smoothing.flat(1), jnp.zeros(0), particles=4, resampler=smc.transported()
        )


def test_branching_diffusions_compose_with_everything():
    """A diffusion that branches, its branches observed: unbiased, and differentiable in what is observed."""
    spread = np.array([[0.9]])
    auxiliary = linear_sde(np.array([[-0.5]]), np.array([0.0]), spread)
    span = lambda a: euler(Well(), spread, np.linspace(a, a + 0.5, 5), auxiliary)
    tree = smoothing.sequential(
        span(0.0), smoothing.copies(2), smoothing.parallel(span(0.5), smoothing.sequential(span(0.5), span(1.0)))
    )
    leaf = lambda y: smoothing.quadratic(np.array([[4.0]]), jnp.array([4.0 * y]), -2.0 * y**2)
    values = [np.exp(-2.0 * (POINTS - y) ** 2) for y in (0.8, -0.4)]
    back = lambda values, a: _pulled(Well(), lambda x, t: spread, np.linspace(a, a + 0.5, 5), values)[0]
    exact = _at(back(back(values[0], 0.5) * back(back(values[1], 1.0), 0.5), 0.0), 0.1)
    keys = jax.random.split(jax.random.key(0), 8000)

    def total(y):
        run = lambda key: smoothing.smooth(key, tree, (leaf(y), leaf(-0.4)), jnp.array([0.1])).log_weight
        logs = jax.vmap(run)(keys)
        return smc.log_mean(logs), logs

    (_, logs), slope = jax.jit(jax.value_and_grad(total, has_aux=True))(0.8)
    _unbiased(logs, exact, within=0.05)
    values[0] = values[0] * 4.0 * (POINTS - 0.8)  # the derivative of the leaf
    moved = _at(back(back(values[0], 0.5) * back(back(values[1], 1.0), 0.5), 0.0), 0.1)
    np.testing.assert_allclose(slope, moved / exact, atol=0.05)


# --- the library's own diffusions -------------------------------------------------------------------------------------


def test_a_tilted_reverse_process_is_a_guided_diffusion():
    """Of a Gaussian prior the reverse SDE is linear: its h-transform is `guidance.tilted` with the exact twist."""
    process, stop = processes.vp(), 0.05
    prior = oracles.gaussian(np.array([0.5, -0.3]), np.array([[0.8, 0.2], [0.2, 0.5]]))
    measured = inverse.measurement(inverse.matrix(np.array([[1.0, -1.0]])), np.array([0.7]), 0.3)
    twist = inverse.exact(prior, measured)
    drift, scale = smoothing.reversed_dynamics(process, prior)
    begin = process.end - 0.6
    times = np.linspace(begin, process.end - stop, 65)
    auxiliary = smoothing.linearised(drift, scale, np.zeros(2))
    segment = diffusion(drift, scale, times, auxiliary)
    # the twist at the last level, as a potential
    level = process.level(jnp.asarray(stop))
    log_h = lambda x: twist.log_value(x, level)
    zero = jnp.zeros(2)
    curvature, slope, height = jax.jit(lambda x: (jax.hessian(log_h)(x), jax.grad(log_h)(x), log_h(x)))(zero)
    h = smoothing.quadratic(-curvature, slope, height)
    message, _ = jax.jit(lambda h: segment.backward(h))(h)
    x = jnp.array([0.9, -1.4])
    tilted = guidance.tilted(prior, twist)

    @jax.jit
    def compared(here, t):
        level = process.level(process.end - t)
        spread = scale(x, t)
        guided = drift(x, t) + spread @ spread.T @ here.gradient(x)
        reverse = -process.reverse_sde(tilted).drift(x, process.end - t)
        return (here(x), guided), (twist.log_value(x, level), reverse)

    for i in (0, 30, 63):
        ours, theirs = compared(at(message.potentials, i), times[i])
        np.testing.assert_allclose(ours[0], theirs[0], atol=1e-7)
        np.testing.assert_allclose(ours[1], theirs[1], atol=1e-6)
    weights = jax.jit(lambda message, z: segment.forward(message, x, z).log_weight)(message, np.ones((64, 2)))
    np.testing.assert_allclose(weights, 0.0, atol=1e-9)


def test_a_guided_reverse_process_weighs_the_evidence_of_a_mixture():
    """The reverse SDE of a mixture, guided by that of a Gaussian of its mean and variance: log p(y) from weights."""
    process, stop, std = processes.vp(), 2e-3, 0.4
    weights, means, variances = np.array([0.3, 0.7]), np.array([[-1.0], [0.8]]), np.array([0.1, 0.15])
    prior = oracles.mixture(weights, means, variances)
    mean = weights @ means[:, 0]
    stand_in = oracles.gaussian(np.array([mean]), weights @ (variances + means[:, 0] ** 2) - mean**2)
    drift, scale = smoothing.reversed_dynamics(process, prior)
    auxiliary = smoothing.linearised(smoothing.reversed_dynamics(process, stand_in)[0], scale, np.zeros(1))
    y = 0.1
    h = smoothing.quadratic(np.eye(1) / std**2, np.array([y]) / std**2, -0.5 * (y / std) ** 2 - np.log(std) - LOG_ROOT)

    @jax.jit
    def run(keys, times):
        kernel = smoothing.sequential(
            smoothing.normal_prior(np.zeros(1), np.eye(1)), euler(drift, scale, times, auxiliary)
        )
        return jax.vmap(lambda key: smoothing.smooth(key, kernel, h, jnp.zeros(0)).log_weight)(keys)

    found, errors = [], []
    for steps in (48, 96):
        # steps in proportion to the time that is left
        times = process.end - np.geomspace(1.0 + 0.05, stop + 0.05, steps + 1) + 0.05
        z = np.exp(np.asarray(run(jax.random.split(jax.random.key(steps), 8000), times)))
        found.append(z.mean())
        errors.append(z.std() / np.sqrt(z.size))
    exact = np.sum(weights * np.exp(-0.5 * (y - means[:, 0]) ** 2 / (variances + std**2)) / np.sqrt(variances + std**2))
    exact = exact * np.exp(-LOG_ROOT)
    error = np.hypot(2 * errors[1], errors[0])
    # extrapolated; what is left of the noise at the last level
    assert abs(2 * found[1] - found[0] - exact) < 4 * error + 0.01 * exact, (found, errors, exact)
    assert 4 * error < 0.1 * exact


def test_arguments_that_do_not_fit_are_refused():
    auxiliary = linear_sde(np.eye(1), np.zeros(1), np.eye(1))
    with pytest.raises(ValueError, match="times must increase"):
        diffusion(Well(), np.eye(1), np.array([0.0, 1.0, 0.5]), auxiliary)
    with pytest.raises(ValueError, match="times must have shape"):
        diffusion(Well(), np.eye(1), np.array([0.0]), auxiliary)
    with pytest.raises(ValueError, match="auxiliary must be"):
        diffusion(Well(), np.eye(1), np.array([0.0, 1.0]), Well())
    with pytest.raises(ValueError, match="states of shape"):
        euler(Well(), np.eye(2), np.array([0.0, 1.0]), auxiliary)
