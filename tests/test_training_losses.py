"""Weightings, couplings, states and conditions of the denoising loss, against closed forms."""

import dataclasses

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from diffjax import coordinates, predictions, processes, training
from diffjax.training import couplings, weightings

FLOW, VP, COSINE = processes.flow(), processes.vp(), processes.cosine()
SPREAD = 1.7
KINDS = ("noise", "data", "velocity", "flow", "edm")


def _network(prediction, bias=0.3):
    """The exact denoiser of N(0, SPREAD^2) plus a bias, told in the terms of a prediction."""

    def apply(params, x, t, condition):
        level = params if params else prediction.process.level(t)
        x = x / scale(level)
        x0 = level.alpha * SPREAD**2 / (level.alpha**2 * SPREAD**2 + level.sigma**2) * x + bias
        return prediction.from_x0(x0, x, level)

    def scale(level):
        factor = prediction.target.inputs(prediction.process, level)[0]
        return 1.0 if factor is None else factor

    return apply


# weight of |x0 - D|^2 at a signal-to-noise ratio, as the papers state it for the noise's error times the SNR
WEIGHTINGS = {
    "signal_to_noise": (weightings.signal_to_noise(), lambda snr: snr),
    "min_snr": (weightings.min_snr(5.0), lambda snr: snr * np.minimum(snr, 5) / snr),
    "soft_min_snr": (weightings.soft_min_snr(4.0), lambda snr: 1 / (1 / snr + 1 / 4)),
    "truncated_snr": (weightings.truncated_snr(), lambda snr: np.maximum(snr, 1)),
    "p2": (weightings.p2(0.7, 2.0), lambda snr: snr / (2 + snr) ** 0.7),
    "edm": (weightings.edm(0.5), lambda snr: (1 / snr + 0.25) / (0.25 / snr)),
    "flow": (weightings.flow(), lambda snr: (1 + np.sqrt(snr)) ** 2),
}


@pytest.mark.paper("Scaling Rectified Flow Transformers for High-Resolution Image Synthesis")
@pytest.mark.parametrize("process", [FLOW, COSINE], ids=repr)
def test_losses_do_not_depend_on_the_prediction(process, x64):
    """Noise, data, v, flow and EDM networks of one denoiser: the same loss of every sample, under every weighting.

    And it is the weight times the squared error of the clean estimate.
    """
    x0 = SPREAD * jax.random.normal(jax.random.key(0), (24, 2))
    law = training.restricted(training.uniform(), 0.02, 0.98)

    def losses(weighting, kind):
        prediction = getattr(predictions, kind)(process)
        if kind == "edm":
            prediction = predictions.edm(process, 0.5, conditioning="time")
        loss = training.denoising(prediction, _network(prediction), weighting=weighting, law=law)
        return loss({}, jax.random.key(1), x0), loss

    for name, (weighting, weight) in WEIGHTINGS.items():
        found = {kind: losses(weighting, kind)[0] for kind in (KINDS if name == "min_snr" else KINDS[:1])}
        loss = losses(weighting, "noise")[1]
        items = loss.draw(jax.random.key(1), x0)
        level = jax.vmap(lambda u: law(process, u))(items.u)
        alpha, sigma = np.asarray(level.alpha), np.asarray(level.sigma)
        x = alpha[:, None] * items.x0 + sigma[:, None] * items.eps
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        squares = np.mean((items.x0 - gain[:, None] * x - 0.3) ** 2, axis=1)
        for kind, one in found.items():
            np.testing.assert_allclose(one, weight((alpha / sigma) ** 2) * squares, rtol=1e-8, err_msg=f"{name} {kind}")


def test_classic_weights_are_those_of_the_targets(x64):
    """A plain error of the noise is SNR, of v SNR + 1, of rectified flow 1 / t^2; EDM's target has EDM's weight."""
    t = np.linspace(0.05, 0.95, 7)
    cases = [
        (predictions.noise(COSINE), weightings.signal_to_noise()),
        (predictions.velocity(COSINE), weightings.edm(1.0)),
        (predictions.flow(FLOW), weightings.flow()),
        (predictions.edm(FLOW, 0.7), weightings.edm(0.7)),
    ]
    for prediction, weighting in cases:
        level = prediction.process.level(t)
        np.testing.assert_allclose(weighting(level), prediction.weight(level), rtol=1e-10)


@pytest.mark.parametrize("law", [training.uniform(), training.logit_normal(0.5, 1.5)], ids=repr)
def test_bound_weightings_do_not_depend_on_the_law(law):
    """For Gaussian data 1/2 int w(lambda) E|eps - eps_hat|^2 d lambda has a closed integrand."""
    weighting = weightings.sigmoid(-0.5)
    prediction = predictions.velocity(FLOW)
    loss = training.denoising(prediction, _network(prediction, 0.0), weighting=weighting, law=law)
    x0 = SPREAD * jax.random.normal(jax.random.key(2), (1 << 15, 1))
    found = np.asarray(jax.jit(loss)({}, jax.random.key(3), x0))
    # Var(eps | x) = snr v / (snr v + 1) at log-SNR lambda, over the log-SNRs that the law can reach
    integrand = lambda lam: 0.5 / (1 + np.exp(lam + 0.5)) * (1 - 1 / (1 + np.exp(lam) * SPREAD**2))
    exact = quad(integrand, -30, 30, limit=200)[0]
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean() - exact) < 4 * error and error < 0.03 * exact, (found.mean(), exact, error)


def test_the_unit_bound_is_the_variational_bound(x64):
    """w = 1 weighs |x0 - D|^2 by SNR'/2 as `likelihood.continuous_bound` does, for any process."""
    from diffjax.likelihood.bounds import diffusion_rate

    for process in (VP, COSINE):
        prediction = predictions.data(process)
        for u in (0.1, 0.5, 0.9):
            level = process.level(jnp.asarray(u * process.end))
            found = weightings.factor(weightings.on_bound(), prediction, training.uniform(), jnp.asarray(u), level)
            np.testing.assert_allclose(found, process.end * diffusion_rate(process, u * process.end), rtol=1e-8)


@pytest.mark.paper("Fast Diffusion Model")
def test_the_warm_up_of_the_weight():
    """Weights are cut at a limit that grows with the step, and after the warm-up not at all."""
    warm = weightings.warmed(weightings.edm(0.5), steps=10)
    process = processes.edm()
    loss = training.denoising(
        predictions.edm(process), lambda params, x, t, c: 0 * x, weighting=warm, law=training.log_normal()
    )
    x0 = 0.5 * jax.random.normal(jax.random.key(0), (64, 1))
    memory = loss.init({})
    step = jax.jit(loss.apply)
    for k in range(12):
        if k % 5 != 4 and k != 10:  # the step alone
            memory = step({}, memory, jax.random.key(k), x0)[1]
            continue
        limit = 5 * 100 ** (k / 10) if k < 10 else np.inf
        level = jax.vmap(lambda u: training.log_normal()(process, u))(loss.loss.draw(jax.random.key(k), x0).u)
        weight = np.asarray(weightings.edm(0.5)(level), np.float64)
        losses, memory = step({}, memory, jax.random.key(k), x0)
        full = training.denoising(predictions.edm(process), loss.loss.apply, law=training.log_normal())
        plain = full({}, jax.random.key(k), x0)  # of weight edm(0.5) in x0
        np.testing.assert_allclose(losses, plain * np.minimum(weight, limit) / weight, rtol=2e-4)
    assert int(memory.step) == 12
    with pytest.raises(ValueError, match="one of a level"):
        weightings.warmed(weightings.sigmoid(), 10)


def test_learned_uncertainty_is_the_logarithm_of_the_loss(x64):
    """exp(-u) L + u of every sample; its least mean, by Newton's method, is at the logarithm of the mean loss."""
    prediction = predictions.noise(FLOW)
    weighting = weightings.uncertainty(weightings.min_snr(), features=24, bandwidth=0.05)
    options = {"law": training.logit_normal()}
    loss = training.denoising(prediction, _network(prediction), weighting=weighting, **options)
    plain = training.denoising(prediction, _network(prediction), weighting=weightings.min_snr(), **options)
    params = jax.tree.map(lambda leaf: leaf + 0.3, weighting.init())
    x0 = jax.random.normal(jax.random.key(0), (8, 1))
    items = plain.draw(jax.random.key(1), x0)
    u = jax.vmap(lambda u: weighting.log_loss(params, training.logit_normal()(FLOW, u)))(items.u)
    assert np.std(u) > 0.01
    found, base = loss.each({"network": {}, "uncertainty": params}, items), plain.each({}, items)
    np.testing.assert_allclose(found, np.exp(-u) * base + u, rtol=1e-9)

    t = np.linspace(0.05, 0.95, 64)
    level = FLOW.level(jnp.asarray(t))
    rates = {"slope": jnp.asarray(np.random.default_rng(0).normal(size=24)), "offset": jnp.asarray(-1.0)}
    exact = jnp.exp(weighting.log_loss(rates, level))  # some mean loss that u can express
    flat, build = jax.flatten_util.ravel_pytree(weighting.init() | {"offset": jnp.full((), -6.0)})
    mean = lambda flat: jnp.mean(weighting.loss(build(flat), level, exact))
    slope, curvature = jax.jit(jax.grad(mean)), jax.jit(jax.hessian(mean))
    for _ in range(30):  # from below every step is safe
        flat = flat - jnp.linalg.solve(curvature(flat) + 1e-9 * jnp.eye(flat.size), slope(flat))
    np.testing.assert_allclose(weighting.log_loss(build(flat), level), jnp.log(exact), atol=1e-4)
    np.testing.assert_allclose(mean(flat), 1 + jnp.mean(jnp.log(exact)), rtol=1e-9)


# --- couplings ------------------------------------------------------------------------------------------------------


def test_assignment_is_exact():
    from itertools import permutations

    costs = np.random.default_rng(0).normal(size=(5, 6, 6)).astype(np.float32)
    for cost in costs:
        found = np.asarray(couplings.assignment(jnp.asarray(cost)))
        best = min(permutations(range(6)), key=lambda order, c=cost: sum(c[i, j] for i, j in enumerate(order)))
        np.testing.assert_array_equal(found, best)
    with pytest.raises(ValueError, match="square"):
        couplings.assignment(jnp.zeros((2, 3)))


@pytest.mark.paper("Improved Immiscible Diffusion: Accelerate Diffusion Training by Reducing Its Miscibility")
def test_couplings_and_the_law_of_the_noise():
    """Assignment permutes the batch's noises; the nearest of k draws has an order statistic's law."""
    from scipy.stats import norm

    keys = jax.random.split(jax.random.key(0), 64)
    x0 = {"a": jax.random.normal(jax.random.key(1), (64, 2)), "b": jnp.ones((64, 1))}
    plain, pairs = couplings.independent()(keys, x0), couplings.assigned()(keys, x0)
    rows = lambda tree: np.concatenate([np.asarray(leaf).reshape(64, -1) for leaf in jax.tree.leaves(tree)], 1)
    before, after = rows(plain), rows(pairs)
    np.testing.assert_array_equal(before[np.lexsort(before.T)], after[np.lexsort(after.T)])
    cost = lambda eps: np.sum((rows(x0) - eps) ** 2)
    assert cost(after) < 0.6 * cost(before)
    halves = rows(couplings.assigned(32)(keys, x0))
    for part in (slice(0, 32), slice(32, 64)):
        np.testing.assert_array_equal(np.sort(halves[part], 0), np.sort(before[part], 0))
    assert cost(after) < cost(halves) < cost(before)
    with pytest.raises(ValueError, match="subset=48 must divide"):
        couplings.assigned(48)(keys, x0)
    # the nearest of k in one dimension to x0 = 1
    count, k, at = 20_000, 3, 1.0
    eps = np.asarray(couplings.nearest(k)(jax.random.split(jax.random.key(2), count), jnp.full((count, 1), at)))[:, 0]

    def moment(power):
        inside = lambda e: norm.cdf(at + abs(e - at)) - norm.cdf(at - abs(e - at))
        return quad(lambda e: e**power * k * norm.pdf(e) * (1 - inside(e)) ** (k - 1), -8, 8, points=[at])[0]

    assert abs(moment(0) - 1) < 1e-6
    for power in (1, 2):
        assert abs(np.mean(eps**power) - moment(power)) < 4 * np.std(eps**power) / count**0.5
    assert moment(1) > 0.45  # it leans towards the data: this is no standard normal noise


@pytest.mark.paper("Improved Immiscible Diffusion: Accelerate Diffusion Training by Reducing Its Miscibility")
def test_couplings_lower_what_is_left_unknown():
    """The posterior variance of x0 given x_t falls: a linear denoiser of Gaussian data, fitted to pairs, has less left.

    The noise of the assigned pairs is standard normal, of the nearest it is not.
    """
    count, size = 4096, 64
    x0 = 2 * jax.random.normal(jax.random.key(0), (count // size, size, 2))
    keys = jax.random.split(jax.random.key(1), (count // size, size))
    left, mean_square = {}, {}
    for name, coupling in (
        ("independent", couplings.independent()),
        ("assigned", couplings.assigned()),
        ("nearest", couplings.nearest(8)),
    ):
        eps = np.asarray(jax.jit(jax.vmap(coupling))(keys, x0)).reshape(-1, 2).astype(np.float64)
        clean = np.asarray(x0, np.float64).reshape(-1, 2)
        x = 0.3 * clean + 0.7 * eps
        gain = np.sum(x * clean) / np.sum(x * x)
        left[name] = np.mean((clean - gain * x) ** 2)
        mean_square[name] = np.mean(eps**2)
    exact = 4 * 0.49 / (0.09 * 4 + 0.49)  # of independent pairs
    np.testing.assert_allclose(left["independent"], exact, rtol=4 * (2 / 8192) ** 0.5)
    assert left["assigned"] < 0.2 * exact and left["nearest"] < 0.6 * exact, left
    np.testing.assert_allclose(mean_square["assigned"], mean_square["independent"], rtol=1e-5)
    assert abs(mean_square["nearest"] - 1) > 6 * (2 / 8192) ** 0.5


def test_data_may_be_scaled_to_mix_less():
    """Scaled data are coordinates of the process, in which the loss is that of the scaled data themselves."""
    process = dataclasses.replace(FLOW, coordinates=coordinates.scaled(0.5))
    x0 = SPREAD * jax.random.normal(jax.random.key(0), (64, 1))
    network = lambda params, x, t, condition: 0.3 * x
    found = training.denoising(predictions.data(process), network)({}, jax.random.key(1), x0)
    doubled = training.denoising(predictions.data(FLOW), network)({}, jax.random.key(1), 2 * x0)
    np.testing.assert_allclose(found, doubled, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: weightings.min_snr(0.0), "limit must be positive"),
        (lambda: weightings.p2(-1.0), "gamma"),
        (lambda: weightings.edm(-1.0), "data_std"),
        (lambda: weightings.uncertainty(features=0), "features"),
        (lambda: weightings.warmed(weightings.edm(), 0), "steps > 0"),
        (lambda: couplings.assigned(0), "subset"),
        (lambda: couplings.nearest(0), "candidates"),
        (lambda: training.perturbed(-0.1), "strength"),
        (lambda: training.scheduled_sampling(0), "rolls"),
        (lambda: training.scheduled_sampling(1, share=1.5), "share"),
        (lambda: training.scheduled_sampling(1, span=0.0), "span"),
        (lambda: training.unrolled(0), "rolls"),
        (
            lambda: training.denoising(predictions.flow(FLOW), lambda *a: None, self_conditioning=2.0),
            "self_conditioning must be",
        ),
    ],
)
def test_bad_switches_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
