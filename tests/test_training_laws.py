"""Laws of the noise level: their densities, and those that learn from the losses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import norm

from diffjax import grids, predictions, processes, training
from diffjax.training import adaptive, times

FLOW = processes.flow()
GRID = np.linspace(0.002, 0.998, 401)


def _quantile(law, process=FLOW, u=GRID):
    """Times and their slope in u."""
    return jax.vmap(jax.value_and_grad(lambda u: law(process, u).time))(jnp.asarray(u))


# the density of t in [0, 1], as the papers state it
DENSITIES = {
    "uniform": (training.uniform(0.2, 0.7), lambda t: np.full_like(t, 2.0)),
    "logit-normal": (
        training.logit_normal(-0.3, 0.8),
        lambda t: norm.pdf((np.log(t / (1 - t)) + 0.3) / 0.8) / 0.8 / (t * (1 - t)),
    ),
    "cosmap": (training.cosmap(), lambda t: 2 / (np.pi * (1 - 2 * t + 2 * t**2))),
    "log-normal": (training.log_normal(-0.4, 0.9), lambda t: norm.pdf(np.log(t / (1 - t)), -0.4, 0.9) / (t * (1 - t))),
    "log-snr": (training.log_snr(-6.0, 4.0), lambda t: 0.1 * 2 / (t * (1 - t))),
    # t = 3 s / (1 + 2 s) of s uniform
    "shifted": (training.shifted(training.uniform(), 3.0), lambda t: 3 / (3 - 2 * t) ** 2),
    "restricted": (training.restricted(training.cosmap(), 0.25, 0.75), lambda t: 4 / (np.pi * (1 - 2 * t + 2 * t**2))),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_densities(name, x64):
    """The slope of the quantile function is one over the density."""
    law, density = DENSITIES[name]
    t, slope = _quantile(law)
    np.testing.assert_allclose(slope * density(np.asarray(t)), 1.0, rtol=1e-9)
    assert np.all(slope > 0)


@pytest.mark.paper("Scaling Rectified Flow Transformers for High-Resolution Image Synthesis")
@pytest.mark.parametrize("scale", [-1.0, 1.29, 1.75])
def test_mode_law(scale, x64):
    """The quantile function of the paper, run from the noise; its density at the ends and in the middle."""
    t, slope = _quantile(training.mode(scale))
    v = 1 - GRID
    np.testing.assert_allclose(t, 1 - v - scale * (np.cos(0.5 * np.pi * v) ** 2 - 1 + v), rtol=1e-12, atol=1e-14)
    assert np.all(slope > -1e-12)
    ends, middle = _quantile(training.mode(scale), u=np.array([1e-9, 1 - 1e-9]))[1], 1 - scale * (np.pi / 2 - 1)
    np.testing.assert_allclose(ends, 1 + scale, atol=1e-7)
    np.testing.assert_allclose(_quantile(training.mode(scale), u=np.array([0.5]))[1], middle, rtol=1e-9)


@pytest.mark.paper("Scaling Rectified Flow Transformers for High-Resolution Image Synthesis")
def test_cosmap_is_the_cosine_schedule_and_shifts_are_those_of_grids(x64):
    """CosMap gives rectified flow the log-SNR of the cosine schedule; a shifted law is a shifted grid."""
    u = jnp.asarray(GRID)
    found = jax.vmap(lambda u: training.cosmap()(FLOW, u).half_log_snr)(u)
    np.testing.assert_allclose(found, np.log(1 / np.tan(0.5 * np.pi * GRID)), rtol=1e-9, atol=1e-12)
    ratio = grids.resolution_shift(64 * 64, 32 * 32)
    assert ratio == 2.0
    grid = grids.shifted(grids.uniform(FLOW, 8), ratio)
    law = training.shifted(training.uniform(), ratio)
    t = jax.vmap(lambda u: law(FLOW, u).time)(jnp.arange(1, 8) / 8)
    np.testing.assert_allclose(t, grid.s.time[:-1][::-1], rtol=1e-12)


def test_log_snr_rate_is_one_over_the_density(x64):
    """For the uniform log-SNR it is the width of its range; a law's probabilities of a range of log-SNR add up."""
    rate = jax.vmap(lambda u: times.log_snr_rate(training.log_snr(-6.0, 4.0), FLOW, u))(jnp.asarray(GRID))
    np.testing.assert_allclose(rate, 10.0, rtol=1e-9)
    rate = jax.vmap(lambda u: times.log_snr_rate(training.logit_normal(), FLOW, u))(jnp.asarray(GRID))
    # lambda = -2 logit(t): normal with standard deviation 2
    np.testing.assert_allclose(rate * norm.pdf(norm.ppf(GRID)) / 2, 1.0, rtol=1e-9)


# --- laws that learn ------------------------------------------------------------------------------------------------


def test_binned_quantiles_have_the_density_of_the_bins(x64):
    chances = jnp.array([0.1, 0.0, 0.6, 0.3])
    v = (jnp.arange(4000) + 0.5) / 4000
    u, index = jax.vmap(lambda v: adaptive.quantile(chances, v))(v)
    np.testing.assert_allclose(np.bincount(index, minlength=4) / 4000, chances, atol=2.6e-4)
    np.testing.assert_array_equal(index, np.floor(np.asarray(u) * 4))
    assert np.all(np.diff(u) > 0)
    inside = np.asarray(u)[np.asarray(index) == 2] * 4 - 2
    np.testing.assert_allclose(inside, (np.arange(2400) + 0.5) / 2400, atol=1e-9)


def _linear(params, x, t, condition):
    return params * x


def _losses(law, stratified=False, **options):
    return training.denoising(predictions.noise(FLOW), _linear, law=law, stratified=stratified, **options)


@pytest.mark.paper("Improved Denoising Diffusion Probabilistic Models")
def test_importance_sampling_keeps_the_gradient_and_lowers_its_variance():
    """Against the closed form; the losses of a network that is far off at clean levels are of very different size."""
    weight = lambda level: 1 / (0.02 + level.time) ** 2
    law, memory = training.importance(bins=16, history=8), None
    loss, plain = _losses(law, weighting=weight), _losses(None, weighting=weight)
    memory = loss.init({})
    x0 = 1.3 * jax.random.normal(jax.random.key(0), (512, 1))
    params = jnp.asarray(0.4)
    step = jax.jit(loss.apply)
    for k in range(4):
        _, memory = step(params, memory, jax.random.key(k), x0)
    chances = memory.law.probabilities()
    assert np.all(memory.law.seen >= 8) and int(memory.step) == 4
    # E[(c x - eps)^2] = c^2 (1-t)^2 v + (c t - 1)^2, over t
    t = (np.arange(200_000) + 0.5) / 200_000
    weights = 1 / (0.02 + t) ** 2
    v = float(jnp.mean(x0**2))
    exact = np.mean(weights * (2 * 0.4 * (1 - t) ** 2 * v + 2 * (0.4 * t - 1) * t))
    grads = jax.jit(
        jax.vmap(
            lambda k: (
                jax.grad(lambda p: jnp.mean(loss.apply(p, memory, k, x0)[0]))(params),
                jax.grad(lambda p: jnp.mean(plain(p, k, x0)))(params),
            )
        )
    )
    learned, uniform = (np.asarray(g) for g in grads(jax.random.split(jax.random.key(9), 200)))
    for found in (learned, uniform):
        assert abs(found.mean() - exact) < 4 * found.std() / len(found) ** 0.5
    assert learned.var() < 0.25 * uniform.var(), (learned.var(), uniform.var())
    assert chances[0] > 10 * chances[-1]


def test_warping_makes_the_loss_the_same_everywhere():
    """Loss 1 + 8 u: the law becomes proportional to it, so every stretch of the new quantile has the same share."""
    law = training.warped(bins=8, decay=0.9, share=1e-3)
    memory = law.init()
    np.testing.assert_allclose(law.probabilities(memory), 1 / 8)
    centres = (np.arange(8) + 0.5) / 8

    def body(memory, key):
        v = (jnp.arange(64) + jax.random.uniform(key, (64,))) / 64
        u, weights = jax.vmap(lambda v: law.place(memory, v))(v)
        return law.update(memory, u, 1 + 8 * u), jnp.sum(weights)

    memory, weights = jax.jit(lambda m, k: jax.lax.scan(body, m, k))(memory, jax.random.split(jax.random.key(0), 60))
    np.testing.assert_allclose(weights, 64.0)
    expected = (1 + 8 * centres) / np.sum(1 + 8 * centres)
    np.testing.assert_allclose(law.probabilities(memory), expected, rtol=0.05)
    half = dataclasses.replace(law, power=0.5).probabilities(memory)
    np.testing.assert_allclose(half, expected**0.5 / np.sum(expected**0.5), rtol=0.03)


@pytest.mark.paper("Denoising Task Difficulty-based Curriculum for Training Diffusion Models")
def test_curriculum_goes_from_noise_to_data_when_the_loss_stops_falling():
    law = training.curriculum(clusters=4, patience=3, decay=0.0)
    memory = law.init()
    v = jnp.linspace(0.001, 0.999, 50)
    stages = []
    falling = [5.0, 4.0, 3.0, 3.0, 3.0, 3.5]  # the third without a minimum is the last one
    for value in [*falling, 9.0, 8.0, 8.0, 8.0, 8.5, 7.0, *[6.0] * 7]:
        u, weight = jax.vmap(lambda v, m=memory: law.place(m, v))(v)
        stage = int(memory.stage)
        stages.append(stage)
        low = 1 - (stage + 1) / 4
        np.testing.assert_allclose([u.min(), u.max()], [low + 0.001 * (1 - low), 1 - 0.001 * (1 - low)], atol=1e-6)
        np.testing.assert_array_equal(weight, 1.0)
        memory = law.update(memory, u, jnp.full(50, value))
    assert stages == [0] * 6 + [1] * 5 + [2] * 5 + [3] * 3
    one = training.curriculum(clusters=1)
    np.testing.assert_allclose(jax.vmap(lambda v: one.place(one.init(), v)[0])(v), v, atol=1e-7)


@pytest.mark.paper("Denoising Task Difficulty-based Curriculum for Training Diffusion Models")
def test_clean_levels_are_the_harder_tasks(x64):
    """KL(p_{t-1} || p_t) between consecutive marginals falls with t, on the DDPM table, for data of fine detail.

    (Where the data's own variance is above sigma^2 it rises first: of N(0, 0.3) the second of 20 clusters has most.)
    """
    process = processes.ddpm()
    level = process.level(np.arange(1, 1001) / 1000 * process.end)
    for variance in (0.0, 1e-5):
        total = level.alpha**2 * variance + level.sigma**2
        ratio = total[:-1] / total[1:]
        divergence = 0.5 * (ratio - 1 - np.log(ratio))
        clusters = divergence[:980].reshape(20, 49).mean(1)
        assert np.all(np.diff(clusters) < 0) and clusters[0] > 10 * clusters[9]


def test_a_curriculum_trains_in_the_loop():
    """What the loss remembers is threaded by the loss alone: pure, under jit, deterministic."""
    loss = _losses(training.curriculum(clusters=3, patience=2), weighting=training.weightings.min_snr())
    x0 = jnp.ones((16, 2))
    params = jnp.asarray(0.1)

    def body(memory, key):
        losses, memory = loss.apply(params, memory, key, x0)
        return memory, (jnp.mean(losses), memory.law.stage)

    keys = jax.random.split(jax.random.key(1), 30)
    memory, (_, stages) = jax.jit(lambda m: jax.lax.scan(body, m, keys))(loss.init(params))
    assert int(memory.step) == 30 and stages[-1] == 2 and np.all(np.diff(stages) >= 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "accumulate"),
    [
        (training.curriculum(clusters=4, patience=2, decay=0.0), 1),
        (training.importance(bins=4, history=2), 2),
        (training.warped(), 1),
    ],
    ids=["curriculum", "importance", "warped"],
)
def test_what_is_learned_under_pmap_is_that_of_one_device(law, accumulate):
    """Stages, rings and means are alike on all devices: they learn from the losses of the whole batch."""
    loss = _losses(law, stratified=True)
    pure = training.update(loss, optax.sgd(0.05), accumulate=accumulate)
    spread = jax.pmap(
        training.update(loss, optax.sgd(0.05), accumulate=accumulate, axis_name="data"),
        axis_name="data",
        devices=jax.devices()[:2],
    )
    one = training.init(jax.random.key(0), jnp.asarray(0.1), optax.sgd(0.05), loss=loss)
    two, pure = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), one), jax.jit(pure)
    for k in range(12):
        x0 = jax.random.normal(jax.random.key(k), (16, 1))
        one, _ = pure(one, (x0,))
        two, _ = spread(two, (x0.reshape(2, 8, 1),))
    for device in range(2):
        jax.tree.map(
            lambda a, b, device=device: np.testing.assert_allclose(a, b[device], rtol=2e-5, atol=1e-6),
            (one.params, one.loss_state),
            (two.params, two.loss_state),
        )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: training.mode(2.0), "scale must be"),
        (lambda: training.log_snr(1.0, 1.0), "must be below"),
        (lambda: training.shifted(training.uniform(), 0.0), "shift must be positive"),
        (lambda: training.restricted(training.uniform(), 0.5, 0.4), "must satisfy"),
        (lambda: training.importance(bins=0), "count must be a positive integer"),
        (lambda: training.warped(decay=1.0), "decay must be in"),
        (lambda: training.curriculum(patience=0), "patience must be"),
        (lambda: training.curriculum(tolerance=1.0), "tolerance"),
    ],
)
def test_bad_laws_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
