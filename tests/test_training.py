"""Training: the loss on exact denoisers, laws of levels, dropout, averages, the step, the loop."""

import json
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from diffjax import data, networks, predictions, processes, training
from diffjax.data import toy


def network(seed=0, classes=2):
    """A tiny network for points in the plane, moved off its zero output."""
    module = networks.MLP(2, width=8, depth=1, condition=networks.label(classes), rngs=nnx.Rngs(seed))
    apply, params = networks.functional(module)
    return apply, jax.tree.map(lambda leaf: leaf + 0.05, params)


def run(steps=None, **options):
    """(state, step) of a small run on the moons."""
    apply, params = network()
    loss = training.denoising(predictions.flow(processes.flow()), apply, dropout=0.2, null=2)
    optimiser = training.adam(1e-2, warmup=2)
    state = training.init(jax.random.key(1), params, optimiser, mesh=options.get("mesh"))
    return state, training.train_step(loss, optimiser, **options)


def stream(size=16):
    return toy.stream(toy.moons, jax.random.key(2), size)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(_data, a), jax.tree.map(_data, b))


def _data(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


# --- the loss ---------------------------------------------------------------------------------------------------


SPREAD = 1.7  # standard deviation of one-dimensional Gaussian data


@pytest.mark.parametrize("kind", ["noise", "data", "velocity", "flow"])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_of_the_exact_denoiser_is_the_posterior_variance(kind, weighted):
    # x0 ~ N(0, s^2): Var(x0 | x_t) = s^2 sigma^2 / (alpha^2 s^2 + sigma^2), and a target
    # a x0 + b eps with eps = (x - alpha x0) / sigma has variance (a - b alpha / sigma)^2 Var(x0 | x_t).
    process = processes.flow()
    prediction = getattr(predictions, kind)(process)

    def exact(params, x, t, condition):
        alpha, sigma = 1 - t, t
        total = alpha**2 * SPREAD**2 + sigma**2
        x0, eps = alpha * SPREAD**2 * x / total, sigma * x / total
        return {"noise": eps, "data": x0, "velocity": alpha * eps - sigma * x0, "flow": eps - x0}[kind]

    weighting = (lambda level: 1 + level.sigma) if weighted else training.unweighted
    loss = training.denoising(prediction, exact, weighting=weighting)
    x0 = SPREAD * jax.random.normal(jax.random.key(0), (1 << 16, 1))
    found = np.asarray(jax.jit(loss)({}, jax.random.key(1), x0))
    assert found.shape == (1 << 16,)

    t = (np.arange(100000) + 0.5) / 100000
    a, b = {"noise": (0, 1), "data": (1, 0), "velocity": (-t, 1 - t), "flow": (-1, 1)}[kind]
    variance = (SPREAD * t) ** 2 / ((1 - t) ** 2 * SPREAD**2 + t**2)
    expected = np.mean((1 + t if weighted else 1) * (a - b * (1 - t) / t) ** 2 * variance)
    error = found.std() / len(found) ** 0.5
    assert error < 0.02 * expected
    assert abs(found.mean() - expected) < 4 * error


def test_any_other_network_has_a_larger_loss():
    # The loss of (1 + c) times the exact noise estimate is the exact one plus c^2 E[eps_hat^2].
    process = processes.flow()
    x0 = SPREAD * jax.random.normal(jax.random.key(0), (1 << 14, 1))

    def mean(factor):
        def scaled(params, x, t, condition):
            return factor * t * x / ((1 - t) ** 2 * SPREAD**2 + t**2)

        loss = training.denoising(predictions.noise(process), scaled)
        return float(jnp.mean(jax.jit(loss)({}, jax.random.key(1), x0)))

    t = (np.arange(100000) + 0.5) / 100000
    power = np.mean(t**2 / ((1 - t) ** 2 * SPREAD**2 + t**2))
    below, exact, above = mean(0.8), mean(1.0), mean(1.2)
    np.testing.assert_allclose((below + above) / 2 - exact, 0.04 * power, rtol=0.02)
    assert exact < below and exact < above


def test_edm_sees_inputs_of_unit_variance_and_targets_of_unit_variance():
    seen = []

    def zero(params, x, t, condition):
        seen.append(x)
        return jnp.zeros_like(x)

    prediction = predictions.edm(processes.edm(), sigma_data=SPREAD)
    loss = training.denoising(prediction, zero, law=training.log_normal(0.0, 1.0))
    x0 = SPREAD * jax.random.normal(jax.random.key(0), (1 << 14, 1))
    np.testing.assert_allclose(jnp.mean(jax.jit(loss)({}, jax.random.key(1), x0)), 1.0, atol=0.03)


def test_loss_of_a_sample_does_not_depend_on_the_others():
    apply, params = network()
    loss = training.denoising(predictions.flow(processes.flow()), apply, stratified=False)
    loss = jax.jit(loss)
    x0 = jax.random.normal(jax.random.key(0), (8, 2))
    labels = jnp.zeros(8, int)
    whole = loss(params, jax.random.key(1), x0, labels)
    half = loss(params, jax.random.key(1), x0[:4], labels[:4])
    np.testing.assert_allclose(whole[:4], half, rtol=1e-6)
    changed = loss(params, jax.random.key(1), x0.at[1].add(1), labels)
    np.testing.assert_array_equal(np.asarray(whole != changed), np.arange(8) == 1)


# --- laws of levels ---------------------------------------------------------------------------------------------


def levels(law, process, count=1 << 14):
    u = (jnp.arange(count) + 0.5) / count
    return jax.vmap(lambda one: law(process, one))(u)


def test_laws_have_the_quantiles_they_state():
    process = processes.flow()
    t = levels(training.uniform(0.2, 0.6), process).time
    np.testing.assert_allclose(np.quantile(t, [0, 0.5, 1]), [0.2, 0.4, 0.6], atol=1e-4)
    t = np.asarray(levels(training.logit_normal(0.5, 2.0), process).time, np.float64)
    logit = np.log(t / (1 - t))
    np.testing.assert_allclose([logit.mean(), logit.std()], [0.5, 2.0], rtol=2e-3)
    level = levels(training.log_normal(-1.2, 1.2), processes.edm())
    noise = np.log(np.asarray(level.sigma / level.alpha, np.float64))
    np.testing.assert_allclose([noise.mean(), noise.std()], [-1.2, 1.2], rtol=2e-3)


@pytest.mark.parametrize("law", [training.uniform(), training.logit_normal(), training.log_normal()])
@pytest.mark.parametrize("process", [processes.flow(), processes.vp(), processes.cosine(), processes.ve()])
def test_levels_are_finite_and_inside_the_process(law, process):
    u = jnp.array([training.losses.MARGIN, 0.5, 1 - training.losses.MARGIN])
    found = jax.vmap(lambda one: law(process, one))(u)
    assert np.all(np.isfinite(found.alpha)) and np.all(np.isfinite(found.sigma))
    assert np.all((found.time >= 0) & (found.time <= process.end))
    assert np.all(np.diff(found.time) > 0)


@pytest.mark.parametrize("stratified", [True, False])
def test_stratified_levels_fall_one_into_each_stratum(stratified):
    def output(params, x, t, condition):
        return jnp.full_like(x, t)

    # Data and noise drop out: the target of `data` is x0 = 0, so the loss is t^2.
    loss = training.denoising(predictions.data(processes.flow()), output, stratified=stratified)
    t = jnp.sqrt(jax.jit(loss)({}, jax.random.key(0), jnp.zeros((64, 1))))
    counts = np.bincount(np.floor(np.asarray(t) * 64).astype(int), minlength=64)
    assert np.all(counts == 1) == stratified
    assert not np.all(np.diff(t) > 0)  # which sample gets which stratum is drawn as well


# --- dropout of the condition -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_dropout_replaces_the_condition_at_its_rate(rate):
    def output(params, x, t, condition):
        return jnp.where(condition["label"] == 7, 1.0, 0.0) * jnp.all(condition["vector"] == 9) * jnp.ones_like(x)

    null = {"label": 7, "vector": np.full(3, 9.0)}
    loss = training.denoising(predictions.data(processes.flow()), output, dropout=rate, null=null)
    count = 20000
    told = {"label": jnp.zeros(count, int), "vector": jnp.zeros((count, 3))}
    dropped = np.asarray(jax.jit(loss)({}, jax.random.key(0), jnp.zeros((count, 1)), told))
    assert set(np.unique(dropped)) <= {0.0, 1.0}  # all parts of a condition go together
    assert abs(dropped.mean() - rate) <= 4 * (rate * (1 - rate) / count) ** 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.5, "null": 0}, "dropout must be in"),
        ({"dropout": 0.1}, "needs null"),
    ],
)
def test_bad_losses_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        training.denoising(predictions.flow(processes.flow()), network()[0], **options)


def test_bad_laws_averages_and_optimisers_are_refused():
    for build in [
        lambda: training.uniform(0.5, 0.5),
        lambda: training.uniform(0, 1.1),
        lambda: training.log_normal(std=0.0),
        lambda: training.logit_normal(std=-1.0),
        lambda: training.ema.warmed(1.0),
        lambda: training.ema.constant(-0.1),
        lambda: training.adam(-1.0),
        lambda: training.adam(warmup=10, steps=10),
        lambda: training.adam(clip=0.0),
        lambda: training.adam(weight_decay=-1.0),
    ]:
        with pytest.raises(ValueError, match="must"):
            build()
    apply, params = network()
    loss = training.denoising(predictions.flow(processes.flow()), apply, dropout=0.1, null=2)
    with pytest.raises(ValueError, match="with a condition, got None"):
        loss(params, jax.random.key(0), jnp.zeros((4, 2)), None)


# --- averages and optimiser ---------------------------------------------------------------------------------------


def test_average_has_its_closed_form():
    average = {"w": jnp.array([5.0, -1.0])}
    values = np.random.default_rng(0).normal(size=(30, 2))
    decay = training.ema.warmed(0.6)
    expected_decay = [min(0.6, (1 + k) / (10 + k)) for k in range(30)]
    for k, now in enumerate(values):
        average = training.ema.update(average, {"w": jnp.asarray(now, jnp.float32)}, decay(jnp.int32(k)))
    # average_n = sum_k (1 - d_k) prod_{j > k} d_j value_k + prod_j d_j start
    tail = np.append(np.cumprod(expected_decay[::-1])[::-1], 1.0)
    weights = (1 - np.array(expected_decay)) * tail[1:]
    np.testing.assert_allclose(average["w"], weights @ values + tail[0] * np.array([5.0, -1.0]), rtol=1e-5)
    assert 0.6 in [round(float(decay(k)), 6) for k in range(30)] and float(decay(0)) == pytest.approx(0.1)
    assert float(training.ema.constant(0.9)(jnp.int32(3))) == pytest.approx(0.9)


def test_optimiser_warms_up_clips_and_cools_down():
    # Adam's first update has the size of the learning rate; a constant gradient keeps it there.
    def sizes(count, **options):
        optimiser = training.adam(0.1, **options)
        params = jnp.zeros(1)
        state = optimiser.init(params)
        found = []
        for _ in range(count):
            change, state = optimiser.update(jnp.ones(1), state, params)
            found.append(float(-change[0]))
        return found

    np.testing.assert_allclose(sizes(6, warmup=4), [0.025, 0.05, 0.075, 0.1, 0.1, 0.1], rtol=1e-4)
    cooled = sizes(9, warmup=4, steps=8, final=0.5)
    expected = [0.1 * (0.5 + 0.25 * (1 + np.cos(np.pi * k / 4))) for k in range(5)]
    np.testing.assert_allclose(cooled[4:], expected, rtol=1e-4)
    # Gradients of norm 1000 and 1, clipped to 1, are alike to Adam; unclipped, the first drowns the second.
    for clip, ratio in ((1.0, 1.0), (None, 1 / 500)):
        optimiser = training.adam(0.1, warmup=0, clip=clip)
        state = optimiser.init(jnp.zeros(1))
        _, state = optimiser.update(jnp.full(1, 1000.0), state, jnp.zeros(1))
        change, _ = optimiser.update(jnp.ones(1), state, jnp.zeros(1))
        assert (abs(float(change[0])) > 0.099) == (clip is not None), ratio


# --- the step ---------------------------------------------------------------------------------------------------


def test_step_is_adam_on_the_mean_loss_by_hand():
    apply, params = network()
    loss = training.denoising(predictions.flow(processes.flow()), apply)
    optimiser = optax.sgd(0.5)
    state = training.init(jax.random.key(3), params, optimiser)
    batch = next(stream())
    step = training.train_step(loss, optimiser, training.ema.constant(0.75))
    state, metrics = step(state, batch)
    key = jax.random.fold_in(jax.random.key(3), 0)
    value, gradient = jax.jit(jax.value_and_grad(lambda p: jnp.mean(loss(p, key, *batch))))(params)
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-5)
    np.testing.assert_allclose(metrics.gradient_norm, optax.tree.norm(gradient), rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, expected)
    average = jax.tree.map(lambda p, q: 0.75 * p + 0.25 * q, params, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.ema, average)
    assert int(state.step) == 1


def test_step_draws_new_noise_every_time_and_leaves_the_users_arrays_alone():
    apply, params = network()
    batch = jax.tree.map(np.asarray, next(stream()))
    frozen = training.init(jax.random.key(1), params, optax.sgd(0.0))
    still = training.train_step(training.denoising(predictions.flow(processes.flow()), apply), optax.sgd(0.0))
    frozen, first = still(frozen, batch)
    frozen, second = still(frozen, batch)
    assert float(first.loss) != float(second.loss)
    same(frozen.params, params)  # still readable: the state held copies


@pytest.mark.parametrize("devices", [2, 8])
def test_data_parallel_step_equals_one_device(devices):
    mesh = training.data_mesh(jax.devices()[:devices])
    one, step_one = run()
    many, step_many = run(mesh=mesh)
    feed_one, feed_many = stream(), stream()
    for _ in range(3):
        one, metrics_one = step_one(one, next(feed_one))
        many, metrics_many = step_many(many, jax.tree.map(np.asarray, next(feed_many)))
        np.testing.assert_allclose(metrics_one.loss, metrics_many.loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one.params, many.params)
    leaf = jax.tree.leaves(many.params)[0]
    assert len(leaf.sharding.device_set) == devices and leaf.is_fully_replicated


def test_data_parallel_step_divides_the_work():
    mesh = training.data_mesh()
    apply, params = network()
    loss = training.denoising(predictions.flow(processes.flow()), apply)
    pure = training.update(loss, optax.sgd(0.1))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batch = jax.device_put(tuple(next(stream(512))), sharding)
    state = training.init(jax.random.key(0), params, optax.sgd(0.1), mesh=mesh)
    many = jax.jit(pure).lower(state, batch).compile()
    assert "all-reduce" in many.as_text()
    alone = training.init(jax.random.key(0), params, optax.sgd(0.1))
    one = jax.jit(pure).lower(alone, jax.device_put(tuple(next(stream(512))))).compile()
    assert many.cost_analysis()["flops"] < one.cost_analysis()["flops"] / 4


def test_pure_step_runs_under_pmap():
    apply, params = network()
    loss = training.denoising(predictions.flow(processes.flow()), apply)
    pure = training.update(loss, optax.sgd(0.1))
    state = training.init(jax.random.key(0), params, optax.sgd(0.1))
    batch = next(stream())
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    batches = jax.tree.map(lambda leaf: leaf.reshape(2, 8, *leaf.shape[1:]), tuple(batch))
    _, metrics = jax.pmap(pure)(states, batches)
    half = jax.tree.map(lambda leaf: leaf[8:], tuple(batch))
    np.testing.assert_allclose(metrics.loss[1], jax.jit(pure)(state, half)[1].loss, rtol=1e-5)


def test_bad_meshes_and_batches_are_refused():
    mesh = training.data_mesh()
    with pytest.raises(ValueError, match="'model' is not in the mesh"):
        run(mesh=mesh, axis="model")
    state, step = run(mesh=mesh)
    with pytest.raises(ValueError, match="global batch of 12 cannot be divided over the 8 devices"):
        step(state, next(stream(12)))


# --- the loop ---------------------------------------------------------------------------------------------------


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_lowers_the_loss_and_writes_metrics(tmp_path):
    state, step = run()
    state = training.fit(state, step, stream(64), steps=200, folder=tmp_path, log_every=50, progress=False)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [50, 100, 150, 200]
    assert found[-1]["loss"] < 0.8 * found[0]["loss"]
    assert all(line["steps_per_second"] > 0 and line["gradient_norm"] > 0 for line in found)
    assert int(state.step) == 200
    assert training.checkpoint.steps(tmp_path) == [0, 200]


def test_progress_shows_the_time_left(tmp_path, capsys):
    state, step = run()
    training.fit(state, step, stream(), steps=3, log_every=2)
    shown = capsys.readouterr().err
    assert "3/3" in shown and "loss=" in shown and "<00:00" in shown


@pytest.mark.parametrize(("poisoned", "last"), [(7, 5), (9, 5), (10, 10)])
def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(tmp_path, poisoned, last):
    state, step = run()

    def spoiled():
        for number, batch in enumerate(stream()):
            yield batch._replace(x0=batch.x0 * np.nan) if number == poisoned else batch

    message = rf"at step {poisoned}; the last good checkpoint is step {last}"
    with pytest.raises(FloatingPointError, match=message):
        training.fit(state, step, spoiled(), steps=20, folder=tmp_path, save_every=5, progress=False)
    kept = training.checkpoint.restore(tmp_path, run()[0]).state
    assert int(kept.step) == last
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(kept.params))


def test_sigterm_saves_and_exits_cleanly(tmp_path):
    state, step = run()
    calls = 0

    def interrupted(state, batch):
        nonlocal calls
        calls += 1
        if calls == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, batch)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        training.fit(state, interrupted, stream(), steps=50, folder=tmp_path, progress=False)
    assert stopped.value.code == 0
    assert training.checkpoint.steps(tmp_path) == [0, 7]
    assert signal.getsignal(signal.SIGTERM) is before


def test_loop_runs_outside_the_main_thread():
    state, step = run()
    found = []
    thread = threading.Thread(target=lambda: found.append(training.fit(state, step, stream(), steps=2, progress=False)))
    thread.start()
    thread.join()
    assert int(found[0].step) == 2


def test_resuming_an_empty_folder_starts_and_a_plain_iterator_is_told(tmp_path):
    plain = map(lambda batch: batch, stream())
    options = {"folder": tmp_path, "resume": True, "progress": False}
    state, step = run()
    training.fit(state, step, plain, steps=2, **options)
    with pytest.warns(UserWarning, match="no set_state"):
        training.fit(run()[0], step, plain, steps=3, **options)
    assert training.checkpoint.steps(tmp_path) == [0, 2, 3]


def test_bad_loops_are_refused(tmp_path):
    state, step = run()
    for options in ({"steps": 0}, {"steps": 2, "save_every": 0}, {"steps": 2, "log_every": -1}):
        with pytest.raises(ValueError, match="must be at least 1"):
            training.fit(state, step, stream(), **options)
    with pytest.raises(ValueError, match="needs the folder"):
        training.fit(state, step, stream(), steps=2, resume=True)
    with pytest.raises(FileNotFoundError, match="no run folder"):
        training.fit(state, step, stream(), steps=2, resume=True, folder=tmp_path / "typo")
    with pytest.raises(ValueError, match="batches ended after 1 of steps=2"):
        training.fit(state, step, [next(stream())], steps=2, progress=False)


def test_digits_train_through_the_whole_pipeline(tmp_path):
    images = data.load("digits", "train", folder=tmp_path)
    module = networks.UNet(
        (8, 8, 1), channels=(8, 8), groups=4, heads=2, condition=networks.label(10), rngs=nnx.Rngs(0)
    )
    apply, params = networks.functional(module)
    loss = training.denoising(predictions.flow(processes.flow()), apply, dropout=0.1, null=10)
    optimiser = training.adam(3e-3, warmup=5)
    state = training.init(jax.random.key(0), params, optimiser)
    fixed = jax.jit(lambda p: jnp.mean(loss(p, jax.random.key(9), *images.arrays())))
    before = float(fixed(state.params))
    state = training.fit(
        state, training.train_step(loss, optimiser), data.batches(images, 32), steps=40, progress=False
    )
    assert float(fixed(state.params)) < 0.75 * before
