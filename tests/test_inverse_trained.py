"""Prompt tuning, forward models in the denoiser, predicted starts and compact priors against linear algebra."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
import scipy.stats

from diffjax import grids, guidance, inverse, oracles, predictions, processes, sample, solvers, training
from tests import tiny

PROCESS = processes.flow()
RNG = np.random.default_rng(12)
KEY = jax.random.key(3)

# --- P2L ----------------------------------------------------------------------------------------------------------

VARIANCE = 0.3  # of z_0 given the condition c, whose mean is B c
B = RNG.normal(size=(3, 2))
DECODER = RNG.normal(size=(4, 3))
ENCODER = np.linalg.pinv(DECODER)
A = RNG.normal(size=(3, 4))
Y = np.array([0.8, -0.5, 0.3])
NOISE = 0.4
SEEN = inverse.measurement(inverse.matrix(A), Y, NOISE)


def conditional(params, z, t, c):
    """The posterior mean of N(B c, VARIANCE I) in the flow process, as a network that predicts the data."""
    alpha, spread = 1 - t, (1 - t) ** 2 * VARIANCE + t**2
    mean = params @ c
    return mean + alpha * VARIANCE / spread * (z - alpha * mean)


def denoiser(dtype=jnp.float32):
    matrix, start = jnp.asarray(B, dtype), jnp.array([0.2, -0.1], dtype)
    return predictions.data(PROCESS).decode(conditional, matrix, start)


def tuned(**settings):
    settings = {"iterations": 2, "every": 2, "variance": 0.5, "optimiser": inverse.adam(0.1)} | settings
    decode, encode = (lambda z: jnp.asarray(DECODER, z.dtype) @ z), (lambda x: jnp.asarray(ENCODER, x.dtype) @ x)
    return inverse.p2l(denoiser(jnp.result_type(float)), SEEN, decode=decode, encode=encode, **settings)


def by_hand(z, grid, c, optimise, every, variance, scale):
    """The whole of P2L with DDIM's steps in NumPy, every line of it affine; the conditions on the way too."""
    seen, conditions = A @ DECODER, []
    for i, (t, s) in enumerate(zip(grid.t.time, grid.s.time, strict=True)):
        alpha = 1 - t
        gain = alpha * VARIANCE / (alpha**2 * VARIANCE + t**2)
        estimate = lambda c, z=z, alpha=alpha, gain=gain: B @ c + gain * (z - alpha * (B @ c))
        slope = (1 - gain * alpha) * seen @ B  # of A decode(z0) in c
        c = optimise(c, lambda c, slope=slope, estimate=estimate: slope.T @ (seen @ estimate(c) - Y))
        conditions.append(c)
        plain = z0 = estimate(c)
        if every and (i + 1) % every == 0:
            x = DECODER @ z0
            system = A.T @ A / NOISE**2 + np.eye(4) / variance
            z0 = ENCODER @ np.linalg.solve(system, A.T @ Y / NOISE**2 + x / variance)
        if alpha > 0:
            z0 = z0 + scale * t**2 / alpha * gain * seen.T @ (Y - seen @ plain) / NOISE**2
        z = s / t * z + ((1 - s) - alpha * s / t) * z0
    return z, np.array(conditions)


def adam_by_hand(iterations, rate=0.1, first=0.9, second=0.99):
    def optimise(c, gradient):
        m, v = np.zeros_like(c), np.zeros_like(c)
        for k in range(1, iterations + 1):
            g = gradient(c)
            m, v = first * m + (1 - first) * g, second * v + (1 - second) * g**2
            c = c - rate * (m / (1 - first**k)) / (np.sqrt(v / (1 - second**k)) + 1e-8)
        return c

    return optimise


@pytest.mark.paper("Prompt-tuning latent diffusion models for inverse problems")
def test_p2l_is_its_three_lines(x64):
    """A run with Adam, the proximal projection of every second call, and Tweedie's shift, against NumPy."""
    grid, z = grids.uniform(PROCESS, 6), RNG.normal(size=3)
    out = sample(KEY, tuned(scale=0.3), solvers.ddim(), grid, x=jnp.asarray(z))
    expected, conditions = by_hand(z, grid, np.array([0.2, -0.1]), adam_by_hand(2), 2, 0.5, 0.3)
    np.testing.assert_allclose(out.x, expected, rtol=1e-9)
    assert int(out.nfe) == 6 * 3 and not np.allclose(conditions[0], conditions[-1])


@pytest.mark.paper("Prompt-tuning latent diffusion models for inverse problems")
def test_p2l_fits_the_likeliest_condition_and_then_samples_its_posterior(x64):
    """At noise the tuned condition maximises p(y | c); with it and an exact twist what is left is the posterior."""
    turn = np.linalg.qr(RNG.normal(size=(3, 3)))[0]  # p(y | c) = N(turn B c, (V + noise^2) I)
    seen = inverse.measurement(inverse.matrix(turn), Y, NOISE)
    start, level = jnp.asarray(RNG.normal(size=3)), PROCESS.level(1.0)
    rates = np.linalg.svd(B)[1] ** 2
    fit = inverse.p2l(denoiser(jnp.float64), seen, iterations=200, optimiser=optax.sgd(2 / rates.sum()), every=0)
    c = fit.tune(start, level, fit.condition)
    np.testing.assert_allclose(c, np.linalg.lstsq(turn @ B, Y, rcond=None)[0], atol=1e-8)
    prior = oracles.gaussian(B @ np.asarray(c), VARIANCE)
    told, level = guidance.conditioned(denoiser(jnp.float64), c), PROCESS.level(0.4)
    after = inverse.p2l(told, seen, iterations=0, every=0, twist=inverse.exact(prior, seen))
    found, memory = after.apply(start, level, after.init(start))
    np.testing.assert_allclose(found, inverse.posterior(prior, seen)(start, level), rtol=1e-9)
    np.testing.assert_array_equal(memory.condition, c)


@pytest.mark.paper("Prompt-tuning latent diffusion models for inverse problems")
def test_p2l_inpaints_better_than_the_null_condition():
    """Signals N(B c, 0.05 I) with one entry hidden: tuning tells c from the others, and so the hidden one's mean."""
    hidden, count, truth = 2, 64, np.array([1.5, -1.0])
    features = np.array([[1.0, 0.2], [-0.3, 1.0], [1.0, -1.0]])
    x = features @ truth + np.sqrt(0.05) * RNG.normal(size=(count, 3))
    kept = np.arange(3) != hidden
    matrix, null = jnp.asarray(features, jnp.float32), jnp.zeros(2)

    def network(params, z, t, c):
        spread = (1 - t) ** 2 * 0.05 + t**2
        return params @ c + (1 - t) * 0.05 / spread * (z - (1 - t) * (params @ c))

    model = predictions.data(PROCESS).decode(network, matrix, null)
    grid = grids.uniform(PROCESS, 12)

    def error(iterations, condition):
        def one(key, y):
            seen = inverse.measurement(inverse.mask(kept), y, 0.1)
            told = guidance.conditioned(model, condition)
            settings = {"iterations": iterations, "optimiser": inverse.adam(0.1)}
            guided = inverse.p2l(told, seen, every=4, variance=0.05, **settings)
            return sample(key, guided, solvers.ddim(), grid, shape=(3,)).x

        keys, y = jax.random.split(KEY, count), jnp.asarray(x[:, kept], jnp.float32)
        return float(np.mean((np.asarray(jax.jit(jax.vmap(one))(keys, y))[:, hidden] - x[:, hidden]) ** 2))

    without, tuned, told = error(0, null), error(10, null), error(0, jnp.asarray(truth, jnp.float32))
    noise = 0.05 + 4 * 0.05 * np.sqrt(2 / count)  # of the hidden entry, which nothing tells
    assert without > 3.0 and tuned < 0.1 * without, (without, tuned, told)
    assert told < 2 * noise, (without, tuned, told)


def test_p2l_without_its_parts_is_the_tilted_denoiser():
    """Trees, guidance inside, jit and vmap; 0 iterations and no projection leave the twist."""
    seen = inverse.measurement(
        inverse.mask({"a": np.array([True, False]), "b": np.array(True)}), {"a": np.ones(1), "b": np.ones(1)}, 0.3
    )
    network = lambda params, x, t, c: jax.tree.map(lambda leaf: params * c * jnp.cos(leaf + t), x)
    model = predictions.data(PROCESS).decode(network, 0.7, jnp.array(0.9))
    guided = guidance.classifier_free(model, jnp.array(0.0), 1.5)
    x = {"a": jnp.array([0.3, -0.2]), "b": jnp.array(0.4)}
    grid = grids.uniform(PROCESS, 3)
    plain = inverse.p2l(guided, seen, iterations=0, every=0)
    run = lambda denoise: sample(KEY, denoise, solvers.ddim(), grid, x=x)
    expected = run(guidance.tilted(guided, inverse.likelihood(seen)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), run(plain).x, expected.x)
    assert int(run(plain).nfe) == int(expected.nfe) == 6

    def end(y, x):
        told = inverse.measurement(seen.operator, y, 0.3)
        out = sample(KEY, inverse.p2l(guided, told, every=2), solvers.heun(), grid, x=x)
        return sum(leaf.sum() for leaf in jax.tree.leaves(out.x)), out.nfe

    two = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), x)
    slopes, nfe = jax.jit(jax.vmap(jax.grad(end, has_aux=True), (None, 0)))(seen.y, two)
    assert nfe.tolist() == [2 * 4 * 6] * 2 and all(np.all(np.isfinite(g)) for g in jax.tree.leaves(slopes))
    assert max(np.max(np.abs(g)) for g in jax.tree.leaves(slopes)) > 1e-3


# --- forward models -----------------------------------------------------------------------------------------------

COVARIANCE = np.array([[1.0, 0.5, -0.3], [0.5, 1.2, 0.2], [-0.3, 0.2, 0.8]])
MEAN = np.array([0.4, -0.2, 0.1])


def sigma_points(mean, covariance):
    """Points of equal weight with this mean and covariance: a quadratic loss cannot tell them from the Gaussian."""
    size = len(mean)
    root = np.linalg.cholesky(covariance) * np.sqrt(size)
    return np.concatenate([mean + root.T, mean - root.T])


def conditional_mean(mean, covariance, told):
    """``(W, b)`` of E[first entries | the last ``told``] = W last + b."""
    cross, inner = covariance[:-told, -told:], covariance[-told:, -told:]
    gain = np.linalg.solve(inner, cross.T).T
    return gain, mean[:-told] - gain @ mean[-told:]


@pytest.mark.paper("Diffusion with Forward Models: Solving Stochastic Inverse Problems Without Direct Supervision")
def test_the_rendered_loss_is_least_at_the_signals_posterior_mean(x64):
    """Signals in R^3 of which each datum has three numbers: the context, the target and one novel view.

    The loss of a linear network at one level is least at E[s | o_t, context], though no s was given to it; without
    novel views its minimisers agree only in what the target's view shows.
    """
    context_view, target_view = np.array([1.0, 0.5, 0.0]), np.array([0.0, 1.0, -1.0])
    t = 0.6
    eps_part = np.zeros((4, 4))
    eps_part[:3, :3], eps_part[3, 3] = COVARIANCE, 1.0
    points = sigma_points(np.append(MEAN, 0.0), eps_part)  # of (s, eps)
    s, eps = points[:, :3], points[:, 3:]

    def apply(params, x, t, condition):
        return params["gain"] @ jnp.concatenate([x, condition[0]]) + params["offset"]

    def render(signal, view):
        return {name: rows @ signal for name, rows in view.items()}

    def loss_of(names):
        network = inverse.through(apply, render, seen=lambda x: x["target"])
        made = training.denoising(predictions.data(PROCESS), network, law=lambda process, u: process.level(t + 0 * u))
        rows = [{"target": target_view[None], "novel": np.eye(3)[[i % 3]]} for i in range(3)]

        def loss(flat):
            params, total = {"gain": flat[:, :2], "offset": flat[:, 2]}, 0.0
            for view in rows:
                view = {name: jnp.asarray(view[name]) for name in names}
                x0 = {name: s @ row.T for name, row in view.items()}
                noise = {name: eps if name == "target" else jnp.zeros_like(eps) for name in names}
                told = s @ context_view[:, None], {name: jnp.broadcast_to(r, (8, 1, 3)) for name, r in view.items()}
                items = made.draw(KEY, x0, told)._replace(eps=noise)
                total = total + made.each(params, items).mean()
            return total

        return loss

    mixing = np.zeros((5, 4))
    mixing[:3, :3], mixing[3], mixing[4, :3] = np.eye(3), np.append((1 - t) * target_view, t), context_view
    gain, offset = conditional_mean(mixing[:, :3] @ MEAN, mixing @ eps_part @ mixing.T, 2)
    exact = np.concatenate([gain, offset[:, None]], axis=1)
    start = jnp.asarray(RNG.normal(size=(3, 3)))
    found = tiny.minimum(loss_of(("target", "novel")), start)
    np.testing.assert_allclose(found, exact, atol=1e-9)
    loose = np.asarray(tiny.minimum(loss_of(("target",)), start))
    np.testing.assert_allclose(target_view @ loose, target_view @ exact, atol=1e-9)
    assert np.max(np.abs(loose - exact)) > 0.1


def exact_signals(centres, std, context_row):
    """E[s | o_t, context] of a mixture of Gaussians in the plane seen without noise, as the network of `through`."""

    def apply(params, x, t, condition):
        told, row = condition  # the context's value; the target's direction
        rows = jnp.stack([context_row, (1 - t) * row])
        variances = std**2 * rows @ rows.T + jnp.diag(jnp.stack([0.0, t]) ** 2)
        residuals = jnp.concatenate([told, x]) - centres @ rows.T
        solved = jnp.linalg.solve(variances, residuals.T).T
        weights = jax.nn.softmax(-0.5 * jnp.sum(residuals * solved, axis=1))
        return weights @ (centres + std**2 * solved @ rows)

    return apply


@pytest.mark.paper("Diffusion with Forward Models: Solving Stochastic Inverse Problems Without Direct Supervision")
def test_signals_are_drawn_from_their_law_given_a_partial_observation():
    """A mixture in the plane, one coordinate known, the other seen through a slanted view that is diffused."""
    centres, std, told = np.array([[-1.0, 0.0], [0.2, 1.5], [0.6, -1.5]]), 0.3, 0.3
    row = np.array([0.6, 0.8])
    apply = exact_signals(jnp.asarray(centres, jnp.float32), std, jnp.array([1.0, 0.0]))
    network = inverse.through(apply, lambda s, row: (row @ s)[None])
    model = predictions.data(PROCESS).decode(network, None, (jnp.array([told]), jnp.asarray(row, jnp.float32)))
    grid, count = grids.uniform(PROCESS, 40), 2000
    run = jax.jit(jax.vmap(lambda key: inverse.draw_signal(key, model, solvers.dpmpp(), grid, (1,))))
    signals, out = run(jax.random.split(KEY, count))
    np.testing.assert_allclose(signals[:, 0], told, atol=1e-4)
    np.testing.assert_allclose(out.x[:, 0], np.asarray(signals) @ row, atol=1e-5)
    assert set(out.nfe.tolist()) == {40} and set(out.failed_at.tolist()) == {-1}
    short, key = grids.uniform(PROCESS, 3), jax.random.key(8)
    plain = sample(key, model, solvers.ddim(), short, (1,))  # its last step is the jump to the clean estimate
    jump = inverse.draw_signal(key, model, solvers.ddim(), short, (1,))[1]
    np.testing.assert_allclose(jump.x, plain.x, rtol=1e-5)
    assert (int(jump.nfe), int(jump.rounds)) == (int(plain.nfe), int(plain.rounds)) == (3, 3)
    logs = -0.5 * (told - centres[:, 0]) ** 2 / std**2
    weights = np.exp(logs - logs.max()) / np.exp(logs - logs.max()).sum()
    law = lambda x: weights @ scipy.stats.norm.cdf((x - centres[:, 1:]) / std)
    found = np.sort(np.asarray(signals[:, 1]))
    gap = np.max(np.abs(law(found[None]) - (np.arange(count) + 0.5) / count))
    assert gap < 2.0 / np.sqrt(count) + 0.01, gap  # Kolmogorov: exceeded once in 1,500 even without the steps' error


# --- predicted starts ---------------------------------------------------------------------------------------------

LOSSY = np.array([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])  # two entries seen as their mean
DATA = oracles.gaussian(MEAN, COVARIANCE)


def degraded_points():
    """Sigma points of (x0, y, eps): y is ``LOSSY x0`` and noise of standard deviation 0.1."""
    joint = np.zeros((9, 9))
    joint[:3, :3], joint[:3, 3:6], joint[3:6, :3] = COVARIANCE, COVARIANCE @ LOSSY.T, LOSSY @ COVARIANCE
    joint[3:6, 3:6], joint[6:, 6:] = LOSSY @ COVARIANCE @ LOSSY.T + 0.01 * np.eye(3), np.eye(3)
    mean = np.concatenate([MEAN, LOSSY @ MEAN, np.zeros(3)])
    return np.split(sigma_points(mean, joint), 3, axis=1), mean[:6], joint[:6, :6]


def affine(params, y, t):
    return params[:, :3] @ y + params[:, 3]


def wasserstein(points):
    """W2 of a Gaussian with these points' moments to the data."""
    c, d = np.cov(points.T, bias=True), points.mean(axis=0) - MEAN
    root = np.real(scipy.linalg.sqrtm(COVARIANCE))
    cross = np.trace(np.real(scipy.linalg.sqrtm(root @ c @ root)))
    return np.sqrt(d @ d + np.trace(c) + np.trace(COVARIANCE) - 2 * cross)


@pytest.mark.paper("Arbitrary-steps Image Super-resolution via Diffusion Inversion")
def test_the_best_predicted_start_makes_one_step_the_posterior_mean(x64):
    """Through the frozen denoiser, and against random noise (SDEdit) at 1 to 5 steps; all expectations are exact."""
    (x0, y, eps), mean, joint = degraded_points()
    time = 0.45
    made = training.noise_predictor(DATA, PROCESS, affine, lambda process, u: process.level(time + 0 * u))
    found = tiny.minimum(lambda params: made(params, KEY, x0, y).mean(), jnp.asarray(RNG.normal(size=(3, 4))))
    gain, offset = conditional_mean(mean, joint, 3)
    denoising = COVARIANCE @ np.linalg.inv((1 - time) ** 2 * COVARIANCE + time**2 * np.eye(3)) * (1 - time)
    inverse_of = np.linalg.inv(denoising)  # D(x) = MEAN + denoising (x - (1 - time) MEAN) = gain y + offset
    noise = (inverse_of @ gain - (1 - time) * np.eye(3)) / time
    rest = (inverse_of @ (offset - MEAN) + (1 - time) * MEAN) / time
    np.testing.assert_allclose(found, np.concatenate([noise, rest[:, None]], axis=1), atol=1e-7)

    errors, distances = [], []
    for steps in range(1, 6):
        grid = grids.uniform(PROCESS, steps, start=time)

        def end(y, eps, grid=grid):
            start = inverse.predicted_start(PROCESS, affine, found, y, grid.start)
            random = PROCESS.noised(y, eps, grid.start)
            draw = lambda x: sample(KEY, DATA, solvers.ddim(), grid, x=x).x
            return jax.vmap(draw)(jnp.stack([start, random]))

        ends = np.asarray(jax.vmap(end)(jnp.asarray(y), jnp.asarray(eps)))
        errors.append(np.mean((ends - x0[:, None]) ** 2, axis=(0, 2)))
        distances.append([wasserstein(ends[:, k]) for k in (0, 1)])
    errors, distances = np.array(errors), np.array(distances)
    least = np.trace(joint[:3, :3] - gain @ joint[3:, :3]) / 3
    np.testing.assert_allclose(errors[0, 0], least, rtol=1e-7)
    assert np.all(errors[:, 0] < 0.33 * errors[:, 1])  # 5 dB
    assert np.all(np.diff(errors[:, 0]) > 0)
    assert np.all(distances[:, 0] > distances[:, 1])  # means are not draws: what the error alone does not buy


def test_a_predicted_start_may_be_drawn():
    """`NormalNoise`: its mean without a key, its law with one; other trees."""
    process, y = processes.vp(), {"a": jnp.array([0.5, -1.0]), "b": jnp.array(2.0)}
    level = process.level(0.3)
    half = jax.tree.map(lambda leaf: 0.5 * jnp.ones_like(leaf), y)
    predict = lambda params, y, t: inverse.NormalNoise(jax.tree.map(lambda leaf: params * t * leaf, y), half)
    start = lambda key=None: inverse.predicted_start(process, predict, 2.0, y, level, key)
    expected = jax.tree.map(lambda leaf: (level.alpha + level.sigma * 0.6) * leaf, y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), start(), expected)
    draws = jax.vmap(start)(jax.random.split(KEY, 4000))
    for found, mean in zip(jax.tree.leaves(draws), jax.tree.leaves(expected), strict=True):
        spread = 0.5 * float(level.sigma)
        np.testing.assert_allclose(found.mean(axis=0), mean, atol=4 * spread / np.sqrt(4000))
        np.testing.assert_allclose(found.std(axis=0), spread, rtol=4 / np.sqrt(8000))


# --- compact priors -----------------------------------------------------------------------------------------------

SPREAD = 0.6  # y = (k x0, k + SPREAD noise) with k = 1 or -1: a gain that a restorer linear in y cannot undo


def signed(count):
    sign = RNG.choice([-1.0, 1.0], size=count)
    x0 = RNG.choice([-1.0, 1.0], size=count)
    y = np.stack([sign * x0, sign + SPREAD * RNG.normal(size=count)], axis=1)
    return jnp.asarray(x0, jnp.float32)[:, None], jnp.asarray(y, jnp.float32)


def encode(params, x0, y):
    return jnp.sign(x0 * y[:1])


def restore(params, y, z):
    return (params[0] + params[1] * z) * y[:1]


def square(a, b):
    return jnp.mean(jnp.square(a - b))


def unexplained():
    """E[(k - E[k | y])^2] by quadrature: the least error."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    return 1 - weights @ np.tanh((1 + SPREAD * nodes) / SPREAD**2) ** 2 / weights.sum()


@pytest.mark.paper("DiffIR: Efficient Diffusion Model for Image Restoration")
def test_a_jointly_trained_vector_restores_better_than_none_and_than_a_separate_one():
    """No vector: error 1. Separate, exact 4-step draws of k: twice the least.  Jointly: that."""
    grid, data = grids.uniform(PROCESS, 4), predictions.data(PROCESS)
    x0, y = signed(4000)
    first = training.prior_restorer(encode, restore, square)
    stage_one = tiny.minimum(
        lambda restorer: first({"encode": None, "restore": restorer}, KEY, x0, y).mean(), jnp.array([0.3, 0.2])
    )
    np.testing.assert_allclose(stage_one, [0.0, 1.0], atol=1e-5)

    def exact(params, z, t, y):
        return jnp.tanh((1 - t) * z / jnp.maximum(t, 1e-6) ** 2 + y[1:] / SPREAD**2)

    def network(params, z, t, y):
        return tiny.apply(params, jnp.concatenate([z, y[1:]]), t)

    told = lambda params, y: y
    separate = training.prior_sampler(data, exact, told, solvers.ddim(), grid)
    sampler = training.prior_sampler(data, network, told, solvers.ancestral(), grid)
    loss = training.prior_diffusion(sampler, encode, restore, None, 0.1, square)

    def step_loss(params, key):
        pick = jax.random.randint(key, (128,), 0, 2000)
        return loss(params, key, x0[pick], y[pick]).mean()

    start = {"denoise": tiny.init(KEY, 2, 1, width=16), "describe": None, "restore": jnp.array([0.0, 1.0])}
    params, _ = jax.jit(lambda params: tiny.train(step_loss, params, KEY, 200, rate=2e-2))(start)

    def error(sampler, params):
        one = lambda key, y: training.restored(sampler, restore, params, key, y, 1)
        squares = (jax.jit(jax.vmap(one))(jax.random.split(KEY, 2000), y[2000:]) - x0[2000:]) ** 2
        return float(squares.mean()), float(squares.std()) / np.sqrt(2000)

    apart, bar = error(separate, {"denoise": None, "describe": None, "restore": stage_one})
    joint, joint_bar = error(sampler, params)
    least = unexplained()
    assert abs(apart - 2 * least) < 4 * bar + 0.1 * least, (apart, bar, least)
    assert abs(joint - least) < 4 * joint_bar + 0.1 * least, (joint, joint_bar, least)
    assert joint < 0.7 * apart < 0.7 * 0.6, (joint, apart)


def test_what_stage_two_trains():
    """Not the teacher; not the restorer unless jointly; the sampler with the solver's noise left out, or in."""
    grid, data = grids.uniform(PROCESS, 3), predictions.data(PROCESS)
    x0, y = (leaf[:8] for leaf in signed(8))
    network = lambda params, z, t, y: params * (z + y[1:])
    encode = lambda params, x0, y: params * x0
    params = {"denoise": jnp.array(0.7), "describe": jnp.array(1.1), "restore": jnp.array([0.1, 0.9])}

    sampler = training.prior_sampler(data, network, lambda scale, y: scale * y, solvers.ancestral(), grid)

    @jax.jit
    def losses(weight):
        both = training.prior_diffusion(sampler, encode, restore, jnp.array(0.5), weight)
        apart = training.prior_diffusion(sampler, encode, restore, jnp.array(0.5), joint=False)
        return both(params, KEY, x0, y), apart(params, KEY, x0, y)

    (all_of_it, apart), (half, _) = losses(2.0), losses(1.0)
    np.testing.assert_allclose(all_of_it - half, apart, rtol=1e-4, atol=1e-5)
    assert np.all(half > apart)

    def gradient(joint):
        loss = lambda params, teacher: training.prior_diffusion(sampler, encode, restore, teacher, joint=joint)(
            params, KEY, x0, y
        ).mean()
        return jax.jit(jax.grad(loss, (0, 1)))(params, jnp.array(0.5))

    for joint in (True, False):
        slopes, teacher = gradient(joint)
        assert float(teacher) == 0 and float(slopes["denoise"]) != 0 and float(slopes["describe"]) != 0
        assert bool(np.any(slopes["restore"] != 0)) == joint
    quiet, loud = (
        training.prior_sampler(data, network, lambda scale, y: scale * y, solvers.ancestral(), grid, quiet=quiet)
        for quiet in (True, False)
    )
    draws = [[float(s(params, jax.random.key(k), y[0], x0[0])[0]) for k in (0, 1)] for s in (quiet, loud)]
    assert draws[0][0] == draws[0][1] and draws[1][0] != draws[1][1]


# --- refusals -----------------------------------------------------------------------------------------------------


def plain_network(*arguments):
    return arguments[1]


SAMPLER = training.prior_sampler(
    predictions.data(PROCESS), plain_network, plain_network, solvers.ddim(), grids.uniform(PROCESS, 4)
)


@pytest.mark.parametrize(
    "wrong, name",
    [
        (lambda: inverse.p2l(oracles.gaussian(np.zeros(4), 1.0), SEEN), "condition"),
        (lambda: inverse.p2l(denoiser(), SEEN, iterations=-1), "iterations"),
        (lambda: inverse.p2l(denoiser(), SEEN, every=-1), "every"),
        (lambda: inverse.p2l(denoiser(), SEEN, variance=0.0), "variance"),
        (lambda: inverse.p2l(denoiser(), 3), "measurement"),
        (lambda: inverse.p2l(denoiser(), inverse.measurement(inverse.hdr((3,)), np.zeros(3))), "linear"),
        (lambda: inverse.p2l(inverse.p2l(denoiser(), SEEN), SEEN), "remembers"),
        (lambda: inverse.signal(denoiser(), np.zeros(3), PROCESS.level(0.5)), "through"),
        (
            lambda: inverse.signal(
                predictions.flow(PROCESS).decode(inverse.through(plain_network, plain_network), None, (0, 0)),
                np.zeros(3),
                PROCESS.level(0.5),
            ),
            "prediction of the data",
        ),
        (
            lambda: inverse.draw_signal(
                KEY,
                predictions.data(PROCESS).decode(inverse.through(plain_network, plain_network), None, (0, 0)),
                solvers.ddim(),
                grids.uniform(PROCESS, 1),
                (3,),
            ),
            "2 steps",
        ),
        (
            lambda: training.noise_predictor(inverse.p2l(denoiser(), SEEN), PROCESS, affine, training.uniform()),
            "remember",
        ),
        (lambda: training.prior_diffusion(SAMPLER, encode, restore, None, weight=-1.0), "weight"),
    ],
)
def test_bad_input(wrong, name):
    with pytest.raises(ValueError, match=name):
        wrong()
