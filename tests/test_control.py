"""Stochastic optimal control against closed forms: value functions, weights that do not vary, learned controls."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate

from diffjax import smoothing
from diffjax.levels import value
from diffjax.smoothing import controlled, diffusion, linear_sde

MATRIX, SHIFT, SCALE = np.array([[-0.5, 0.8], [-0.4, 0.2]]), np.array([0.3, 0.1]), np.array([[0.7, 0.1], [0.0, 0.6]])
PRECISION, TARGET = np.array([[2.0, 0.3], [0.3, 1.0]]), np.array([1.0, -0.5])
RUNNING = np.array([[0.8, 0.0], [0.0, 0.3]])
START, END = np.array([-0.4, 0.6]), 1.0


@pytest.fixture(autouse=True)
def double(x64):
    """All tests here run in float64."""


@value
class Linear:
    matrix: np.ndarray
    shift: np.ndarray

    def __call__(self, x, t):
        return self.matrix @ x + self.shift


@value
class Square:
    """The cost (x - target) . P (x - target) / 2."""

    precision: np.ndarray
    target: np.ndarray

    def __call__(self, x, t=None):
        return 0.5 * (x - self.target) @ self.precision @ (x - self.target)


def _value(running):
    """V(0, x) = x.P x / 2 - p.x + q at START by the Riccati equations, in SciPy."""
    noise = SCALE @ SCALE.T

    def rate(_, flat):
        p, q = flat[:4].reshape(2, 2), flat[4:6]
        grown = MATRIX.T @ p
        return np.concatenate(
            [
                -(running + grown + grown.T - p @ noise @ p).ravel(),
                -(MATRIX.T @ q - p @ SHIFT - p @ noise @ q),
                [-(-q @ SHIFT - 0.5 * q @ noise @ q + 0.5 * np.trace(noise @ p))],
            ]
        )

    end = np.concatenate([PRECISION.ravel(), PRECISION @ TARGET, [0.5 * TARGET @ PRECISION @ TARGET]])
    found = scipy.integrate.solve_ivp(rate, (END, 0.0), end, rtol=1e-10, atol=1e-12).y[:, -1]
    p, q, c = found[:4].reshape(2, 2), found[4:6], found[6]
    return 0.5 * START @ p @ START - q @ START + c, SCALE.T @ (q - p @ START)


def _problem(steps, running=None):
    times = np.linspace(0.0, END, steps + 1)
    return controlled(Linear(MATRIX, SHIFT), SCALE, times, Square(PRECISION, TARGET), running)


def _doob(steps):
    """The potential exp(-g) pulled back by the linear process, as a control."""
    segment = diffusion(
        Linear(MATRIX, SHIFT), SCALE, np.linspace(0.0, END, steps + 1), linear_sde(MATRIX, SHIFT, SCALE)
    )
    h = smoothing.quadratic(PRECISION, PRECISION @ TARGET, -0.5 * TARGET @ PRECISION @ TARGET)
    return segment, *_backward(segment, h)


@jax.jit
def _backward(segment, h):
    return segment.backward(h)


def _rolled(problem, control, count=4000, seed=0):
    run = lambda key: problem.rollout(control, START, problem.noise(key, START))
    return jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(seed), count))


@pytest.mark.paper("Automatic Backward Filtering Forward Guiding for Markov processes and graphical models")
def test_the_h_transform_is_the_optimal_control_and_its_weights_do_not_vary():
    exact, best = _value(np.zeros((2, 2)))
    deviations = []
    for steps in (16, 64):
        segment, message, source = _doob(steps)
        np.testing.assert_allclose(-source(START), exact, atol=2e-7)
        control = smoothing.doob_control(segment, message)
        np.testing.assert_allclose(control(jnp.asarray(START), 0.0), best, atol=1e-6)
        problem = _problem(steps)
        rolled = _rolled(problem, control)
        # the controlled path is the guided one
        noise = problem.noise(jax.random.key(9), START)
        path = problem.rollout(control, START, noise).path
        np.testing.assert_allclose(path, segment.forward(message, START, noise).path, atol=1e-12)
        deviations.append(np.std(rolled.log_weight))
        np.testing.assert_allclose(smoothing.value_estimate(rolled.log_weight), exact, atol=0.5 / steps)
        # and its cost is the value
        error = np.std(rolled.cost) / np.sqrt(len(rolled.cost))
        assert abs(np.mean(rolled.cost) - exact) < 4 * error + 0.5 / steps
    # what is left of the variance is the grid's, of first order
    assert deviations[0] < 0.2 and 3 < (deviations[0] / deviations[1]) ** 2 < 5.3


def test_every_control_has_weights_of_the_same_mean_and_a_greater_cost():
    exact, _ = _value(np.zeros((2, 2)))
    segment, message, _ = _doob(64)
    problem = _problem(64)
    best = smoothing.doob_control(segment, message)
    for control in (lambda x, t: jnp.zeros(2), lambda x, t: 0.5 * best(x, t) + 0.3):
        rolled = _rolled(problem, control, 20_000)
        z = np.exp(np.asarray(rolled.log_weight))
        error = z.std() / np.sqrt(z.size)
        assert abs(z.mean() - np.exp(-exact)) < 4 * error + 0.01 * np.exp(-exact)
        assert np.mean(rolled.cost) - 4 * np.std(rolled.cost) / np.sqrt(z.size) > exact
        # KL(controlled | optimal) = J(u) - V is minus the mean log-weight less the value
        np.testing.assert_allclose(
            np.mean(rolled.cost), -np.mean(rolled.log_weight), atol=8 * np.std(rolled.cost) / 141
        )


def test_a_path_has_the_weight_of_the_control_whatever_it_followed():
    """The same path, driven by other noise under the control itself."""
    problem, v = _problem(8, Square(RUNNING, np.zeros(2))), np.array([-0.2, 0.9])
    u, follow = Linear(0.3 * np.eye(2), np.array([0.5, -0.4])), lambda x, t: v

    @jax.jit
    def both(noise):
        followed = problem.rollout(u, START, noise, follow)
        before = jnp.concatenate([START[None], followed.path[:-1]])
        other = noise + np.sqrt(END / 8) * (v - jax.vmap(u, (0, None))(before, 0.0))
        return followed, problem.rollout(u, START, other)

    followed, own = both(problem.noise(jax.random.key(0), START))
    np.testing.assert_allclose(followed.path, own.path, rtol=1e-10)
    np.testing.assert_allclose(followed.log_weight, own.log_weight, rtol=1e-10)


def test_running_costs_are_observations_on_the_way():
    """exp(-f dt) at every step of a chain, against the Riccati equations; first order, extrapolated."""
    exact, _ = _value(RUNNING)
    found = []
    for steps in (64, 128):
        d = END / steps

        def link(_, d=d):
            cost = smoothing.quadratic(d * RUNNING, jnp.zeros(2))
            move = smoothing.linear_gaussian(jnp.eye(2) + d * MATRIX, d * SHIFT, np.sqrt(d) * SCALE)
            return smoothing.sequential(smoothing.observed(cost), move)

        kernel = smoothing.chain(jax.vmap(link)(jnp.arange(steps)))
        h = smoothing.quadratic(PRECISION, PRECISION @ TARGET, -0.5 * TARGET @ PRECISION @ TARGET)
        found.append(-jax.jit(lambda kernel, h: kernel.backward(h)[1](START))(kernel, h))
    # the same chain, by simulation: no error of the grid
    problem = _problem(steps, Square(RUNNING, np.zeros(2)))
    z = np.exp(np.asarray(_rolled(problem, lambda x, t: jnp.zeros(2), 4000).log_weight))
    assert abs(z.mean() - np.exp(-found[-1])) < 4 * z.std() / np.sqrt(z.size)
    assert abs(found[1] - exact) < 0.02
    np.testing.assert_allclose(2 * found[1] - found[0], exact, atol=3e-4)


@pytest.mark.parametrize("kind", ["log_variance", "relative_entropy", "cross_entropy"])
def test_a_learned_control_is_the_closed_form(kind):
    """dX = u + dW towards a Gaussian end: u = (target - x) / (v + 1 - t), of which gain and offset are learned."""
    times, spread, target, variance = np.linspace(0.0, 1.0, 17), np.eye(1), 1.5, 0.5
    problem = controlled(
        Linear(np.zeros((1, 1)), np.zeros(1)), spread, times, Square(np.eye(1) / variance, np.array([target]))
    )
    x, pieces = np.array([-0.2]), 4
    control = smoothing.affine_control(pieces, 1, 1, 1.0)
    rate = optax.cosine_decay_schedule(0.15, 250)
    loss = smoothing.control_loss(kind)
    learn = jax.jit(
        lambda key: smoothing.learn_control(key, problem, control, x, optax.adam(rate), steps=250, batch=64, loss=loss)
    )
    learned = learn(jax.random.key(0))
    optimum = lambda x, t: (target - x) / (variance + 1 - t)
    # compared where paths are, within what a piece of the time varies by
    for t in (0.1, 0.35, 0.6, 0.85):
        mean = x[0] + (target - x[0]) * t / (variance + 1)
        middle = (np.floor(t * pieces) + 0.5) / pieces
        for at in (mean - 0.4, mean + 0.4):
            found = learned.control(jnp.array([at]), t)[0]
            assert abs(found - optimum(at, middle)) < 0.25, (kind, t, at, found, optimum(at, middle))
    # in the units of the problem: the path weights hardly vary, the cost is nearly the value
    exact = 0.5 * np.log((variance + 1) / variance) + 0.5 * (target - x[0]) ** 2 / (variance + 1)
    noise = jax.vmap(lambda k: problem.noise(k, x))(jax.random.split(jax.random.key(5), 4000))
    cost = lambda c: jax.vmap(lambda z: problem.rollout(c, x, z))(noise)
    before, after = cost(control), cost(learned.control)
    assert np.var(after.log_weight) < 0.1 * np.var(before.log_weight)
    assert np.mean(before.cost) - exact > 10 * (np.mean(after.cost) - exact) > 0 - 0.1
    if kind == "log_variance":
        assert np.mean(learned.losses[-20:]) < 0.1 * np.mean(learned.losses[:5])


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="times must have shape"):
        controlled(Linear(MATRIX, SHIFT), SCALE, np.zeros(1), Square(PRECISION, TARGET))
    with pytest.raises(ValueError, match="kind must be"):
        smoothing.control_loss("entropy")
    with pytest.raises(ValueError, match="end must be after"):
        smoothing.affine_control(2, 1, 1, 0.0)
    with pytest.raises(ValueError, match="batch must be"):
        smoothing.learn_control(jax.random.key(0), _problem(4), None, START, optax.adam(0.1), steps=1, batch=1)
