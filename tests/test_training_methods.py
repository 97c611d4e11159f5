"""States, self-conditioning, hybrid loss, guided loss, learned couplings, negative transfer: against closed forms."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.stats import norm

import diffjax
from diffjax import grids, likelihood, predictions, processes, solvers, training
from diffjax.training import adaptive, transfer

FLOW, COSINE = processes.flow(), processes.cosine()
DATA = predictions.data(FLOW)
COUNT = 4000


def _affine(params, x, t, condition):
    return params[0] * x + params[1] * condition


def _drawn(count=512, scale=1.0, seed=0):
    return scale * jax.random.normal(jax.random.key(seed), (count, 1))


# --- states ---------------------------------------------------------------------------------------------------------


def test_perturbed_states_have_more_noise_and_the_same_target(x64):
    """The best linear noise estimate at one level has the gain sigma / (alpha^2 v + sigma^2 (1 + strength^2))."""
    at = lambda process, u: process.level(0.4 + 0 * u)
    loss = training.denoising(predictions.noise(FLOW), _affine, law=at, states=training.perturbed(0.5))
    x0 = _drawn(20_000, 1.3)
    gain = 0.4 / (0.36 * 1.69 + 0.16 * 1.25)
    slopes = jax.vmap(jax.grad(loss.one), (None, 0))(
        jnp.array([gain, 0.0]), loss.draw(jax.random.key(1), x0, jnp.zeros((20_000, 1)))
    )[:, 0]
    assert abs(slopes.mean()) < 4 * slopes.std() / 20_000**0.5 < 0.05


def test_rolled_states_are_those_of_the_network(x64):
    """DDIM from the noised data to the level, an ancestral step, a clean estimate noised anew; the target fits x0."""
    params, x0, told = jnp.array([0.3, 0.2]), _drawn(COUNT, 1.3), _drawn(COUNT, 1.0, 1)

    def seen(states):
        loss = training.denoising(DATA, _affine, states=states)
        items = loss.draw(jax.random.key(1), x0, told)
        items = items._replace(u=jnp.full(COUNT, 0.5))
        x, eps = jax.vmap(lambda item: loss.seen(params, item, FLOW.level(item.u)))(items)
        np.testing.assert_allclose(0.5 * x0 + 0.5 * eps, x, rtol=1e-9, atol=1e-9)
        return np.asarray(x), np.asarray(items.x0), np.asarray(items.eps)

    c, (a, b) = np.asarray(told), np.asarray(params)
    x, clean, eps = seen(training.scheduled_sampling(2, share=1.0, span=0.4, noise=0.0))
    expected = 0.3 * clean + 0.7 * eps
    for t, s in ((0.7, 0.6), (0.6, 0.5)):
        estimate = a * expected + b * c
        expected = (1 - s) * estimate + s / t * (expected - (1 - t) * estimate)
    np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-7)
    x, clean, eps = seen(training.scheduled_sampling(1, share=1.0, span=0.4, noise=1.0))
    before = 0.3 * clean + 0.7 * eps
    estimate = a * before + b * c
    std = 0.5 * (1 - (0.3 * 0.5 / (0.7 * 0.5)) ** 2) ** 0.5  # of q(x_s | x_t, x_0)
    mean = 0.5 * estimate + (0.25 - std**2) ** 0.5 / 0.7 * (before - 0.3 * estimate)
    z = (x - mean) / std
    assert abs(z.mean()) < 4 / COUNT**0.5 and abs(z.var() - 1) < 4 * (2 / COUNT) ** 0.5
    x, clean, eps = seen(training.unrolled(1, share=1.0))
    z = (x - 0.5 * (a * (0.5 * clean + 0.5 * eps) + b * c)) / 0.5
    assert abs(z.mean()) < 4 / COUNT**0.5 and abs(z.var() - 1) < 4 * (2 / COUNT) ** 0.5
    assert abs(np.mean(z * eps)) < 4 / COUNT**0.5
    x, clean, eps = seen(training.scheduled_sampling(1, share=0.25, noise=0.0))
    same = np.isclose(x, 0.5 * clean + 0.5 * eps, rtol=1e-12).mean()
    assert abs(same - 0.75) < 4 * (0.25 * 0.75 / COUNT) ** 0.5


def _fitted(states, steps=400):
    """Constant gains of a network of state and condition c = x0 + 0.5 noise, by gradient descent on fresh data."""
    loss = training.denoising(DATA, _affine, states=states)

    def body(params, key):
        keys = jax.random.split(key, 3)
        x0 = jax.random.normal(keys[0], (256, 1))
        told = x0 + 0.5 * jax.random.normal(keys[1], (256, 1))
        slope = jax.grad(lambda p: jnp.mean(loss(p, keys[2], x0, told)))(params)
        return params - 0.2 * slope, params

    keys = jax.random.split(jax.random.key(0), steps)
    return np.asarray(jax.jit(lambda p, k: jax.lax.scan(body, p, k)[1])(jnp.zeros(2), keys)[steps // 2 :]).mean(0)


def _sample_error(gains, steps):
    """E |sample - x0|^2 of DDIM, exactly: sample = p x0 + q eta / 2 + r noise."""
    a, b = gains
    state = np.array([0.0, 0.0, 1.0])
    told = np.array([1.0, 0.5, 0.0])
    for t, s in itertools.pairwise(np.linspace(1, 0, steps + 1)):
        estimate = a * state + b * told
        state = (1 - s) * estimate + s / t * (state - (1 - t) * estimate)
    return np.sum((state - [1, 0, 0]) ** 2)


@pytest.mark.paper("Markup-to-Image Diffusion Models with Scheduled Sampling")
def test_scheduled_sampling_lowers_the_error_of_samples_of_a_condition():
    """A small conditional network (gains that do not know the time), sampled in few steps.

    Rolled from pure noise the states know nothing of x0 but c, so the optimum is E[x0 | c] = 0.8 c, whose error is the
    least that there is, 1/5. Teacher forcing relies on states that sampling does not have.
    """
    plain = _fitted(None)
    rolled = _fitted(training.scheduled_sampling(2, share=1.0, span=1.0, noise=0.0))
    np.testing.assert_allclose(rolled, [0.0, 0.8], atol=0.02)
    assert plain[0] > 0.15
    for steps in (2, 4, 8):
        forced, own = _sample_error(plain, steps), _sample_error(rolled, steps)
        assert abs(own - 0.2) < 1e-3 and forced > own + 0.005, (steps, forced, own)


# --- self-conditioning ------------------------------------------------------------------------------------------------


def _of_two(params, x, t, condition):
    """A network of the stacked state and estimate, (2,)."""
    return params[0] * x[:1] + params[1] * x[1:] + params[2]


def test_self_conditioning_tells_the_network_its_own_estimate(x64):
    """In a share of the samples; no gradient through what it is told; sampling threads the last estimate."""
    network, params, x0 = training.stacked(_of_two), jnp.array([0.4, 0.3, 0.1]), _drawn(2000, 1.3)
    loss = training.denoising(DATA, network, self_conditioning=0.5)
    items = loss.draw(jax.random.key(1), x0)
    t = np.asarray(items.u)[:, None]
    x, clean = (1 - t) * items.x0 + t * items.eps, items.x0
    estimate = 0.4 * x + 0.1
    without, told = np.square(0.4 * x + 0.1 - clean)[:, 0], np.square(0.4 * x + 0.3 * estimate + 0.1 - clean)[:, 0]
    found = np.asarray(loss.each(params, items))
    which = np.isclose(found, told, rtol=1e-9)
    assert np.all(which | np.isclose(found, without, rtol=1e-9))
    assert abs(which.mean() - 0.5) < 4 * 0.5 / 2000**0.5
    slopes = jax.vmap(jax.grad(loss.one), (None, 0))(params, items)
    error = np.where(which[:, None], 0.4 * x + 0.3 * estimate + 0.1 - clean, estimate - clean)
    inputs = np.concatenate([x, np.where(which[:, None], estimate, 0.0), np.ones_like(x)], axis=1)
    np.testing.assert_allclose(slopes, 2 * error * inputs, rtol=1e-6, atol=1e-9)

    grid = grids.uniform(FLOW, 4)
    denoise = training.self_conditioned(DATA, network, params)
    start = jnp.array([0.7])
    found = diffjax.sample(jax.random.key(0), denoise, solvers.ddim(), grid, x=start)
    state, last = np.array([0.7]), np.zeros(1)
    for t, s in itertools.pairwise(np.linspace(1, 0, 5)):
        last = 0.4 * state + 0.3 * last + 0.1
        state = (1 - s) * last + s / t * (state - (1 - t) * last)
    np.testing.assert_allclose(found.x, state, rtol=1e-12)
    assert int(found.nfe) == 4

    def told_too(params, x, t, condition):  # as if the class were one more channel
        return _of_two(params, x, t, None) + condition

    # guided: both branches are told the guided estimate, so that the class counts as scale times itself
    twice = training.self_conditioned(DATA, training.stacked(told_too), params, jnp.ones(1), jnp.zeros(1), 2.5)
    once = training.self_conditioned(DATA, training.stacked(told_too), params, jnp.full(1, 2.5))
    ends = [diffjax.sample(jax.random.key(0), one, solvers.ddim(), grid, x=start) for one in (twice, once)]
    np.testing.assert_allclose(ends[0].x, ends[1].x, rtol=1e-12)
    assert int(ends[0].nfe) == 8
    with pytest.raises(ValueError, match="both null and scale"):
        training.self_conditioned(DATA, network, params, null=0)


# --- the hybrid loss ------------------------------------------------------------------------------------------------

STEPS, VARIANCE = 8, 0.3
CHAIN = grids.times(COSINE, np.linspace(0.95, 0.0, STEPS + 1))


def _table(params, x, t, condition):
    """Noise estimates by a gain, and where the variance lies, by a table over the steps."""
    index = jnp.argmin(jnp.abs(jnp.asarray(CHAIN.t.time) - t))
    return params["gain"][index] * x, jnp.broadcast_to(params["v"][index], x.shape)


def _exact_gains():
    t = CHAIN.t
    return t.sigma / (t.alpha**2 * VARIANCE + t.sigma**2)


@pytest.mark.paper("Improved Denoising Diffusion Probabilistic Models")
def test_hybrid_loss(x64):
    """Its value, derived anew, sample by sample; the bound's gradient reaches the variance alone."""
    rng = np.random.default_rng(0)
    params = {"gain": jnp.asarray(_exact_gains() * 0.9), "v": jnp.asarray(rng.uniform(-0.9, 0.9, STEPS))}
    decoder = likelihood.normal_decoder()
    loss = training.hybrid(predictions.noise(COSINE), _table, CHAIN, weight=0.01, decoder=decoder)
    x0 = jnp.asarray(rng.normal(size=(64, 2)) * VARIANCE**0.5)
    items = loss.draw(jax.random.key(0), x0)
    index = STEPS - 1 - np.floor(np.asarray(items.u) * STEPS).astype(int)
    assert np.all(np.bincount(index, minlength=STEPS) == 8)
    alpha, sigma = (np.asarray(part)[index][:, None] for part in CHAIN.t[1:3])
    after_alpha, after = (np.asarray(part)[index][:, None] for part in CHAIN.s[1:3])
    x = alpha * items.x0 + sigma * items.eps
    eps = np.asarray(params["gain"])[index][:, None] * x
    clean = (x - sigma * eps) / alpha
    last = index == STEPS - 1
    r = alpha / after_alpha  # x_t = r x_s + beta^(1/2) noise
    beta = sigma**2 - r**2 * after**2
    small = beta * after**2 / sigma**2
    share = 0.5 * (np.asarray(params["v"])[index][:, None] + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.exp(share * np.log(beta / r**2) + (1 - share) * np.log(small))
        variance = np.where(last[:, None], 1.0, np.exp(share * 2 * np.log(sigma / after)) * small)
        gap = after_alpha * beta / sigma**2 * (items.x0 - clean)
        divergence = np.sum(0.5 * (small / variance - 1 + np.log(variance / small) + gap**2 / variance), axis=1)
    decoded = -np.sum(norm.logpdf(items.x0, clean, sigma), axis=1)
    bits = STEPS * np.where(last, decoded, divergence) / (2 * np.log(2))
    expected = np.mean((eps - items.eps) ** 2, axis=1) + 0.01 * bits
    np.testing.assert_allclose(loss.each(params, items), expected, rtol=1e-8)

    slope = jax.grad(lambda p, w: jnp.mean(dataclasses.replace(loss, weight=w).each(p, items)))
    heavy, none = slope(params, 1.0), slope(params, 0.0)
    np.testing.assert_allclose(heavy["gain"], none["gain"], rtol=1e-9)
    assert np.all(none["v"] == 0) and np.all(heavy["v"][:-1] != 0)


@pytest.mark.paper("Improved Denoising Diffusion Probabilistic Models")
def test_hybrid_loss_learns_the_variance_of_the_reverse_step():
    """By Adam, with steps drawn by importance: the shares come to the closed form of Gaussian data."""
    t, s = (jax.tree.map(lambda leaf: np.asarray(leaf)[:-1], level) for level in (CHAIN.t, CHAIN.s))
    gone = 1 - (t.alpha * s.sigma / (s.alpha * t.sigma)) ** 2
    small, weight = s.sigma**2 * gone, s.alpha * gone
    posterior = VARIANCE * t.sigma**2 / (t.alpha**2 * VARIANCE + t.sigma**2)
    best = np.log1p(weight**2 * posterior / small) / (2 * np.log(t.sigma / s.sigma))
    loss = training.hybrid(predictions.noise(COSINE), _table, CHAIN, weight=1.0, resampled=True)
    assert isinstance(loss, adaptive.Learning)
    optimiser = optax.adam(optax.linear_schedule(0.03, 0.0, 600))
    gains = jnp.asarray(_exact_gains(), jnp.float32)

    def body(carry, key):
        v, memory, state = carry
        x0 = VARIANCE**0.5 * jax.random.normal(key, (64, 8))

        def value(v):
            losses, after = loss.apply({"gain": gains, "v": v}, memory, key, x0)
            return jnp.mean(losses), after

        slope, memory_after = jax.grad(value, has_aux=True)(v)
        change, state = optimiser.update(slope, state, v)
        return (v + change, memory_after, state), None

    v = jnp.zeros(STEPS)
    start = (v, loss.init(), optimiser.init(v))
    (v, memory, _), _ = jax.jit(lambda c, k: jax.lax.scan(body, c, k))(start, jax.random.split(jax.random.key(0), 600))
    np.testing.assert_allclose(0.5 * (np.asarray(v)[:-1] + 1), best, atol=0.03)
    assert np.all(memory.law.seen > 10)


# --- the guided loss --------------------------------------------------------------------------------------------------


@pytest.mark.paper(
    "Bridging the Gap: Addressing Discrepancies in Diffusion Model Training for Classifier-Free Guidance"
)
def test_the_guided_loss_has_a_calibrated_optimum(x64):
    """Linear-Gaussian: the closed form leaves no gradient; guidance of the trained scale is the plain model."""
    scale, spread, told_spread, at = 3.0, 0.6, 1.1, 0.4

    def network(params, x, t, told):
        known = params["known"][0] * x + params["known"][1] * told
        return jnp.where(told == 1e3, params["null"] * x, known)

    loss = training.denoising(
        predictions.noise(FLOW),
        training.guided(network, jnp.full(1, 1e3), scale),
        law=lambda process, u: process.level(at + 0 * u),
        dropout=0.3,
        null=jnp.full(1, 1e3),
    )
    # E[eps | x, c] = sigma (x - alpha c) / (alpha^2 s^2 + sigma^2), and E[eps | x] the same with c = 0 and all of s
    inner = at / ((1 - at) ** 2 * spread**2 + at**2)
    outer = at / ((1 - at) ** 2 * (spread**2 + told_spread**2) + at**2)
    plain = np.array([inner, -(1 - at) * inner])
    known = np.array([outer, 0.0]) + (plain - [outer, 0.0]) / scale
    params = {"known": jnp.asarray(known), "null": jnp.asarray(outer)}
    told = _drawn(20_000, told_spread, 1)
    items = loss.draw(jax.random.key(3), told + _drawn(20_000, spread, 2), told)
    slopes = jax.vmap(jax.grad(loss.one), (None, 0))(params, items)
    for leaf in jax.tree.leaves(slopes):
        leaf = np.asarray(leaf).reshape(20_000, -1)
        assert np.all(np.abs(leaf.mean(0)) < 4 * leaf.std(0) / 20_000**0.5)
    wrong = {"known": jnp.asarray(plain), "null": jnp.asarray(outer)}  # the optimum of the loss without guidance
    slopes = np.asarray(jax.vmap(jax.grad(loss.one), (None, 0))(wrong, items)["known"])
    assert np.max(np.abs(slopes.mean(0)) / slopes.std(0)) > 10 / 20_000**0.5
    # guidance of scale s with the trained network is guidance of s / scale with the plain ones
    null = np.array([outer, 0.0])
    for guidance in (1.0, 3.0, 6.0):
        np.testing.assert_allclose(null + guidance * (known - null), null + guidance / scale * (plain - null))


# --- learned couplings ------------------------------------------------------------------------------------------------


def _moments(a, b, t, spread=2.0):
    """Of z = a x + b xi: Var(z - x), Cov(z - x, x_t), Var(x_t) of the straight path."""
    toward, along = (a - 1) * spread, (1 - t + t * a) * spread
    return toward**2 + b**2, toward * along + t * b**2, along**2 + (t * b) ** 2


def _curvature(a, b):
    """E int |z - x - v|^2 dt with the exact linear v."""

    def left(t):
        total, shared, own = _moments(a, b, t)
        return total - shared**2 / own

    return quad(left, 0, 1)[0]


def _objective(ab, beta):
    a, log_b = ab
    return _curvature(a, np.exp(log_b)) + beta * (0.5 * (4 * a**2 + np.expm1(2 * log_b)) - log_b)


@pytest.mark.paper("Minimizing Trajectory Curvature of ODE-based Generative Models")
def test_learned_couplings_straighten_the_paths(x64):
    """Value and encoder's gradient are of the closed form; with less beta paths bend less, and Euler errs less."""
    a, log_b, beta = 0.3, np.log(0.8), 0.5

    def velocity(params, x, t, condition):
        _, shared, own = _moments(params[0], jnp.exp(params[1]), t)
        return shared / own * x

    encode = lambda params, x0: (params[0] * x0, jnp.full_like(x0, params[1]))
    base = training.denoising(predictions.flow(FLOW), velocity)
    loss = training.learned_coupling(base, encode, beta)
    place = jnp.array([a, log_b])
    x0 = _drawn(1 << 15, 2.0)
    items = loss.draw(jax.random.key(1), x0)
    value = lambda encoder, item: loss.one({"network": place, "encoder": encoder}, item)
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(value), (None, 0)))(place, items)
    exact = _objective((a, log_b), beta)
    # the network is at its optimum, so that the gradient of the least loss is that of the loss (envelope)
    h = 1e-5
    sides = [[_objective(np.asarray(place) + side * d, beta) for side in (1, -1)] for d in np.eye(2) * h]
    slope = [(up - down) / (2 * h) for up, down in sides]
    for found, true in ((values[:, None], [exact]), (slopes, slope)):
        assert np.all(np.abs(found.mean(0) - np.array(true)) < 4 * np.asarray(found).std(0) / len(found) ** 0.5)

    def euler(a, b, steps=4):
        """Errors of the spread of samples from N(0, 1), of which 2 is right: in all, and of Euler alone."""
        x = 1.0
        for t, s in itertools.pairwise(np.linspace(1, 0, steps + 1)):
            _, shared, own = _moments(a, b, t)
            x = x + (s - t) * shared / own * x
        return abs(x - 2), abs(x - 2 / (4 * a**2 + b**2) ** 0.5)

    bends, errors = [_curvature(0.0, 1.0)], [euler(0.0, 1.0)]
    for beta in (10.0, 2.0, 0.5):
        a, log_b = minimize(_objective, [0.0, 0.0], args=(beta,)).x
        assert a > 0
        bends.append(_curvature(a, np.exp(log_b)))
        errors.append(euler(a, np.exp(log_b)))
    assert np.all(np.diff(bends) < 0) and bends[-1] < 0.7 * bends[0], bends
    off, way = np.array(errors).T
    assert np.all(np.diff(way) < 0) and way[-1] < 0.5 * way[0], way
    # what the encoder's noise is off the normal law counts as well: beta is to be neither too large nor too small
    assert off[1] < 0.6 * off[0] < off[3], off


# --- negative transfer --------------------------------------------------------------------------------------------


@pytest.mark.paper("Addressing Negative Transfer in Diffusion Models")
def test_intervals_are_the_best_of_all():
    rng = np.random.default_rng(0)
    places = np.sort(rng.normal(size=9))
    affinity = np.exp(-np.abs(places[:, None] - places))
    for cost in (transfer.spread(places), transfer.apart(affinity)):
        for count in (1, 2, 4, 9):
            found = transfer.intervals(cost, count)
            total = lambda edges, c=cost: sum(c[i, j - 1] for i, j in itertools.pairwise(edges))
            every = [(0, *inner, 9) for inner in itertools.combinations(range(1, 9), count - 1)]
            assert len(found) == count + 1 and np.all(np.diff(found) > 0)
            np.testing.assert_allclose(total(found), min(map(total, every)), rtol=1e-12)
    np.testing.assert_allclose(transfer.apart(affinity)[2, 5], -affinity[2:6, 2:6].sum() / 4)
    np.testing.assert_allclose(transfer.spread(places)[2, 6], np.abs(places[2:7] - places[4]).sum())


@pytest.mark.paper("Addressing Negative Transfer in Diffusion Models")
def test_gradients_are_put_together_as_their_methods_say(x64):
    """PCGrad of two conflicting gradients by hand, the Nash bargain's equation; neither opposes a task at the end."""
    rng = np.random.default_rng(1)
    tree = lambda rows: {"a": jnp.asarray(rows[:, :2]), "b": jnp.asarray(rows[:, 2:])}
    flat = lambda tree: np.concatenate([tree["a"], tree["b"]])
    g, h = np.array([1.0, 0.0, 1.0, 0.0]), np.array([-1.0, 1.0, 0.0, 2.0])
    inner = g @ h
    found = flat(transfer.pcgrad(jax.random.key(0), tree(np.stack([g, h]))))
    np.testing.assert_allclose(found, g - inner / (h @ h) * h + h - inner / (g @ g) * g)
    friends = np.abs(rng.normal(size=(3, 4)))
    np.testing.assert_allclose(flat(transfer.pcgrad(jax.random.key(0), tree(friends))), friends.sum(0))
    rows = rng.normal(size=(3, 4)) * np.array([[100.0], [1.0], [0.01]])
    weights = transfer.bargain(jnp.asarray(rows @ rows.T))
    assert np.all(weights > 0)
    np.testing.assert_allclose(rows @ rows.T @ weights * weights, 1.0, atol=1e-4)
    update = flat(transfer.nash(jax.random.key(0), tree(rows)))
    np.testing.assert_allclose(update @ update, 3.0, rtol=1e-4)
    assert np.all(rows @ update > 0)


def _features(params, x, t, condition):
    """A noise estimate that is linear in features of state and time."""
    return x * sum(params[k] * jnp.cos(k * jnp.pi * t) for k in range(3))


@pytest.mark.paper("Addressing Negative Transfer in Diffusion Models")
def test_surgery_of_the_loss():
    """The value and, for "sum", the gradient of the plain loss; else the method's; tasks far apart in time conflict."""
    base = training.denoising(predictions.noise(FLOW), _features)
    x0 = _drawn(4096, 0.3)
    edges = np.array([0, 0.1, 0.5, 1.0])
    params = jnp.array([0.5, -0.2, 0.1])

    def evaluated(method):
        loss = training.surgery(base, edges, method)
        return jax.jit(jax.value_and_grad(lambda p: jnp.mean(loss(p, jax.random.key(1), x0[:3072]))))(params)

    value, slope = evaluated("sum")
    t = (np.arange(20_000) + 0.5) / 20_000
    waves = np.cos(np.pi * np.arange(3)[:, None] * t)
    gain = np.asarray(params) @ waves
    total = (1 - t) ** 2 * 0.09 + t**2
    exact = np.mean(gain**2 * total - 2 * gain * t + 1)
    closed = np.mean(2 * waves * (gain * total - t), axis=1)
    np.testing.assert_allclose(value, exact, rtol=0.05)
    np.testing.assert_allclose(slope, closed, atol=0.1 * np.abs(closed).max())
    parts, _ = jax.jit(training.surgery(base, edges).gradients)(
        params, jax.random.split(jax.random.key(1))[0], x0[:3072]
    )
    np.testing.assert_allclose(parts.sum(0), slope, rtol=1e-4)
    value_too, nash = evaluated("nash")
    np.testing.assert_allclose(value_too, value, rtol=1e-5)
    np.testing.assert_allclose(nash, transfer.nash(jax.random.key(0), parts), rtol=1e-3, atol=1e-4)
    # the affinity of times falls with their distance
    eight, _ = jax.jit(training.surgery(base, np.arange(9) / 8).gradients)(params, jax.random.key(2), x0)
    cosines = np.asarray(transfer.cosines(eight))
    near, far = np.diag(cosines, 1).mean(), np.diag(cosines, 6).mean()
    assert near > 0.6 and far < near - 0.5, cosines


def test_surgery_keeps_a_weight_that_divides_by_the_density_of_the_law(x64):
    """The bound 1/2 int w(lambda) E|eps - eps_hat|^2 dlambda in closed form, over intervals of unequal width."""
    weighting = training.weightings.on_bound(lambda log_snr: jnp.exp(-log_snr))
    law = training.uniform(0.2, 0.8)
    base = training.denoising(predictions.noise(FLOW), lambda p, x, t, c: 0 * x + p, law=law, weighting=weighting)
    x0, edges = _drawn(30_000), [0.0, 0.1, 1.0]
    value, slope = jax.value_and_grad(
        lambda p: jnp.mean(training.surgery(base, edges, "sum")(p, jax.random.key(1), x0))
    )(jnp.asarray(0.3))
    # E[(0.3 - eps)^2] = 1.09; 1/2 int (sigma / alpha)^2 dlambda over [0.2, 0.8], lambda = 2 log(alpha / sigma)
    weight = quad(lambda t: t / (1 - t) ** 3, 0.2, 0.8)[0]
    np.testing.assert_allclose([value, slope], [1.09 * weight, 0.6 * weight], rtol=0.05)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: training.guided(_affine, 0, 0.0), "scale must not be 0"),
        (lambda: training.learned_coupling(None, _affine, 0.0), "beta must be positive"),
        (lambda: transfer.intervals(np.zeros((3, 3)), 4), "count <= N"),
        (lambda: training.surgery(None, [0.0, 0.5]), "edges must rise"),
        (lambda: training.surgery(None, [0.0, 1.0], "best"), "method must be among"),
        (lambda: training.hybrid(predictions.noise(COSINE), _table, CHAIN, weight=-1.0), "weight must be"),
    ],
)
def test_bad_methods_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
