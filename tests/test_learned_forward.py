"""Forward processes that are learned: identities, the fixed process as a special case, and what learning gains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from diffjax import interpolants, likelihood, oracles, processes
from diffjax.levels import value

VP = processes.vp()
DATA = oracles.mixture([0.35, 0.65], np.array([-1.0, 1.0]), np.array([0.05, 0.1]))
MEAN, VARIANCE = 0.3, 0.35 * 0.05 + 0.65 * 0.1 + 1 - 0.3**2
FIT = oracles.gaussian(MEAN, VARIANCE)  # the affine denoiser that is best for the fixed process


def network(params, x, t):
    """The shift and the log-scale of a bend: one hidden layer, entry by entry."""
    hidden = jnp.tanh(jnp.tensordot(params["w"], jnp.stack([x, t + 0 * x, x * t]), 1).T + params["b"])
    return tuple((hidden @ params["out"]).T)


def parameters(key, scale=0.0):
    keys = jax.random.split(key, 3)
    out = scale * jax.random.normal(keys[2], (16, 2))
    return {"w": jax.random.normal(keys[0], (16, 3)), "b": jax.random.normal(keys[1], (16,)), "out": out}


@value
class Sheared:
    """F that is not affine in eps: two entries, ``z = alpha x + sigma (A(t) sinh(eps))``, with its inverse."""

    process: object
    start = 1.0
    stop = 1e-3

    def _matrix(self, t, x):
        return jnp.array([[1.0, 0.3 * t], [0.0, 1.0]]) * (1 + 0.2 * jnp.sin(x))[:, None]

    def __call__(self, eps, t, x):
        level = self.process.level(t)
        return level.alpha * x + level.sigma * (self._matrix(t, x) @ jnp.sinh(eps))

    def inverse(self, z, t, x):
        level = self.process.level(t)
        return jnp.arcsinh(jnp.linalg.solve(self._matrix(t, x), (z - level.alpha * x) / level.sigma))

    def rate(self, t):
        return 1.0 + 0 * t


# --- identities ---------------------------------------------------------------------------------------------------


@pytest.mark.paper("Neural Flow Diffusion Models: Learnable Forward Process for Improved Diffusion Modelling")
@pytest.mark.parametrize("kind", ["affine", "general"])
def test_the_conditional_law_satisfies_the_continuity_equation(kind, x64):
    """The jvp velocity moves the law whose score the inverse gives: d log q / dt + div f + f . s = 0."""
    params = parameters(jax.random.key(0), 0.3)
    forward = interpolants.affine_forward(VP, network, params) if kind == "affine" else Sheared(VP)
    x, eps, t = jnp.array([0.4, -0.9]), jnp.array([0.7, -0.2]), 0.4
    z = forward(eps, t, x)
    np.testing.assert_allclose(forward.inverse(z, t, x), eps, rtol=1e-12)

    def log_law(z, t):
        matrix = jax.jacfwd(lambda v: forward.inverse(v, t, x))(z)
        return jnp.linalg.slogdet(matrix)[1] - 0.5 * jnp.sum(forward.inverse(z, t, x) ** 2)

    def residuals(z):
        velocity = lambda y: interpolants.conditional_velocity(forward, y, t, x)
        score = interpolants.conditional_score(forward, z, t, x)
        rate = jax.grad(log_law, 1)(z, t) + jnp.trace(jax.jacfwd(velocity)(z)) + velocity(z) @ score
        return rate, score - jax.grad(log_law)(z, t), velocity(z)

    rate, gap, velocity = jax.jit(residuals)(z)
    np.testing.assert_allclose(rate, 0, atol=1e-11)
    np.testing.assert_allclose(gap, 0, atol=1e-11)
    h = 1e-5
    np.testing.assert_allclose(velocity, (forward(eps, t + h, x) - forward(eps, t - h, x)) / (2 * h), atol=1e-8)


@pytest.mark.paper("Neural Flow Diffusion Models: Learnable Forward Process for Improved Diffusion Modelling")
def test_without_a_bend_it_is_the_process_and_its_bound(x64):
    """Fields of the library's process; the bound's rate is -SNR' |x0 - D|^2 / 2."""
    forward = interpolants.affine_forward(VP, network, parameters(jax.random.key(0)))
    fields = interpolants.generative(forward, DATA)
    for z, t in ((0.3, 0.2), (-1.1, 0.8)):
        z, level = jnp.asarray(z), VP.level(t)
        np.testing.assert_allclose(fields.velocity(z, t), VP.probability_flow(DATA)(z, t), rtol=1e-11)
        np.testing.assert_allclose(fields.score(z, t), DATA.score(z, level), rtol=1e-11)
        h = 1e-3
        found = interpolants.sde_step(z, fields.velocity, fields.score, z, t, t - h, fields.epsilon, "euler")
        sde = VP.reverse_sde(DATA)
        np.testing.assert_allclose(found, z - h * sde.drift(z, t) + np.sqrt(h) * sde.diffusion(z, t) * z, rtol=1e-11)
        x0, eps = jnp.asarray(0.9), jnp.asarray(0.4)
        term = interpolants.neural_flow_term(forward, DATA, x0, eps, t)
        clean = DATA(level.alpha * x0 + level.sigma * eps, level)
        snr = jax.grad(lambda u: (VP.schedule.alpha(u) / VP.schedule.sigma(u)) ** 2)(jnp.asarray(t))
        np.testing.assert_allclose(term, -0.5 * snr * (x0 - clean) ** 2, rtol=1e-11)
    x0 = jnp.asarray(0.9)
    found = interpolants.neural_flow_bound(jax.random.key(0), x0, forward, DATA)
    usual = likelihood.continuous_bound(jax.random.key(0), x0, DATA, VP, draws=1)
    np.testing.assert_allclose(found.prior, usual.prior, rtol=1e-12)
    np.testing.assert_allclose(found.reconstruction, usual.reconstruction - np.log(VP.level(1e-3).alpha), rtol=1e-12)
    np.testing.assert_allclose(found.total, found.prior + found.diffusion + found.reconstruction)


@pytest.mark.paper("Neural Flow Diffusion Models: Learnable Forward Process for Improved Diffusion Modelling")
def test_estimates_of_the_bound_are_unbiased(x64):
    """The mean over keys of the diffusion part is the integral of the term by quadrature."""
    forward, x0 = interpolants.affine_forward(VP, network, parameters(jax.random.key(0), 0.2)), jnp.asarray(0.9)
    expected = quadrature(forward, FIT, np.array([0.9]), np.ones(1))
    run = jax.jit(jax.vmap(lambda key: interpolants.neural_flow_bound(key, x0, forward, FIT, draws=8).total))
    found = np.asarray(run(jax.random.split(jax.random.key(1), 40000)))
    assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(40000) and found.std() / np.sqrt(40000) < 0.02


@pytest.mark.paper("Neural Flow Diffusion Models: Learnable Forward Process for Improved Diffusion Modelling")
def test_the_bend_is_the_acceleration_of_the_flow(x64):
    """Second differences along a finely integrated path; 0 for a single point and a straight process."""
    forward = interpolants.affine_forward(VP, network, parameters(jax.random.key(0), 0.3))
    x0, eps, t, h = jnp.asarray(0.9), jnp.asarray(-0.3), 0.5, 1e-3
    z, velocity = forward(eps, t, x0), interpolants.generative(forward, FIT).velocity
    after, before = (interpolants.ode(velocity, np.linspace(t, t + d, 9), z).x for d in (h, -h))
    acceleration = (after - 2 * z + before) / h**2
    np.testing.assert_allclose(interpolants.bend(forward, FIT, x0, eps, t), acceleration**2, rtol=1e-4)
    straight = interpolants.affine_forward(processes.flow(), lambda p, x, t: (0.0, 0.0), None, rate=lambda t: 1 + 0 * t)
    np.testing.assert_allclose(interpolants.bend(straight, lambda z, level: 0 * z + 0.7, x0, eps, t), 0, atol=1e-20)


# --- what learning gains ------------------------------------------------------------------------------------------


def models(params):
    """The forward process and an affine denoiser, a learned change of the one that is best for the fixed process."""

    def denoise(z, level):
        hidden = jnp.tanh(jnp.linspace(-3.0, 3.0, 8) + 0.5 * jnp.log(level.time))
        slope, offset = params["denoiser"] @ hidden
        return FIT(z, level) + level.sigma * (slope * z + offset)

    return interpolants.affine_forward(VP, network, params["forward"]), denoise


@functools.cache
def trained(steps=200):
    """Two models of one training, without and with the penalty: compiled together."""

    def loss(params, key, penalty):
        forward, denoise = models(params)

        def one(key):
            data, noise, time, other = jax.random.split(key, 4)
            x0 = DATA.sample(data)
            total = interpolants.neural_flow_bound(noise, x0, forward, denoise, draws=8).total
            t = jax.random.uniform(time, minval=1e-3)
            return total + penalty * interpolants.bend(forward, denoise, x0, jax.random.normal(other), t)

        return jnp.mean(jax.vmap(one)(jax.random.split(key, 128)))

    optimiser = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    params = {"forward": parameters(jax.random.key(0)), "denoiser": jnp.zeros((2, 8))}

    def run(penalty):
        def step(carry, key):
            params, state = carry
            updates, state = optimiser.update(jax.grad(loss)(params, key, penalty), state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(1), steps)
        return jax.lax.scan(step, (params, optimiser.init(params)), keys)[0][0]

    found = jax.jit(jax.vmap(run))(jnp.array([0.0, 0.003]))
    return [models(jax.tree.map(lambda leaf, k=k: leaf[k], found)) for k in range(2)]


def quadrature(forward, denoise, points=None, weights=None):
    """The mean bound of the data: Gauss-Hermite over data and noise, midpoints in log t."""
    nodes, shares = np.polynomial.hermite_e.hermegauss(24)
    shares = shares / shares.sum()
    if points is None:
        points = np.concatenate([m + np.sqrt(v) * nodes for m, v in zip(DATA.means, DATA.variances[:, 0], strict=True)])
        weights = np.concatenate([share * shares for share in DATA.weights])
    times = 1e-3 * 1e3 ** ((np.arange(128) + 0.5) / 128)
    at = lambda x, t, e: t * interpolants.neural_flow_term(forward, denoise, x, e, t)
    grid = jax.vmap(jax.vmap(jax.vmap(at, (None, None, 0)), (None, 0, None)), (0, None, None))
    terms = np.asarray(jax.jit(grid)(jnp.asarray(points), jnp.asarray(times), jnp.asarray(nodes)), np.float64)
    diffusion = np.log(1e3) * np.einsum("xte,x,e->", terms, weights, shares) / len(times)
    first, last = VP.level(np.asarray(1.0)), VP.level(np.asarray(1e-3))
    prior = 0.5 * np.sum(weights * (first.alpha / first.sigma * points) ** 2)
    return diffusion + prior + 0.5 * (1 + np.log(2 * np.pi)) + np.log(last.sigma / last.alpha)


def entropy():
    law = lambda x: 0.35 * norm(-1, np.sqrt(0.05)).pdf(x) + 0.65 * norm(1, np.sqrt(0.1)).pdf(x)
    return quad(lambda x: -law(x) * np.log(law(x)), -4, 4, limit=200)[0]


@pytest.mark.paper("Neural Flow Diffusion Models: Learnable Forward Process for Improved Diffusion Modelling")
def test_a_learned_forward_process_has_the_lower_bound():
    """With affine denoisers the fixed process is a Gaussian model, whatever its training; the learned one is not."""
    fixed = quadrature(interpolants.affine_forward(VP, network, parameters(jax.random.key(0))), FIT)
    np.testing.assert_allclose(fixed, 0.5 * np.log(2 * np.pi * np.e * VARIANCE), atol=2e-3)
    learned = quadrature(*trained()[0])
    assert entropy() < learned < fixed - 0.25, (entropy(), learned, fixed)


def euler_error(forward, denoise, steps=4):
    """Root mean square over quantiles of the prior of what few Euler steps miss."""
    velocity = interpolants.generative(forward, denoise).velocity
    z = jnp.asarray(norm.ppf((np.arange(64) + 0.5) / 64), jnp.float32)
    walk = lambda n, method: jax.vmap(
        lambda z: interpolants.ode(velocity, np.linspace(1.0, 1e-3, n + 1), z, method=method).x
    )(z)
    return float(jnp.sqrt(jnp.mean((walk(steps, "euler") - walk(200, "rk4")) ** 2)))


@pytest.mark.paper("Neural Flow Diffusion Models: Learnable Forward Process for Improved Diffusion Modelling")
def test_a_penalty_on_the_bend_lowers_the_error_of_few_steps():
    """By far, also below that of the fixed process with the exact denoiser, at a bound still below the fixed one's."""
    bent, straight = trained()
    fixed = interpolants.affine_forward(VP, network, parameters(jax.random.key(0)))
    errors = [euler_error(*model) for model in (bent, (fixed, DATA), straight)]
    assert errors[2] < 0.5 * min(errors[:2]), errors
    assert quadrature(*straight) < quadrature(fixed, FIT) - 0.04


def test_bad_arguments():
    with pytest.raises(ValueError, match="stop"):
        interpolants.affine_forward(VP, network, None, stop=0.0)
    with pytest.raises(ValueError, match="draws"):
        interpolants.neural_flow_bound(jax.random.key(0), jnp.zeros(()), Sheared(VP), FIT, draws=0)
