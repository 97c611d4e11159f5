"""Predictions: every target decodes to what it encodes, at every level that determines it, and is refused elsewhere."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import grids, predictions, processes


@pytest.fixture(autouse=True)
def double(x64):
    """All tests here run in float64."""


PROCESSES = {
    "vp": processes.vp(),
    "sub_vp": processes.sub_vp(),
    "cosine": processes.cosine(),
    "flow": processes.flow(),
    "edm": processes.edm(10.0),
    "ve": processes.ve(),
    "ddpm": processes.ddpm(),
}
TARGETS = ("noise", "data", "velocity", "flow", "score", "edm")
X0, EPS = np.array([0.7, -1.3, 0.2]), np.array([-0.4, 0.9, 1.8])

# What an output and the state determine, from the formulas with pencil and paper: at sigma = 0 the state is x_0 (times
# alpha) and eps is lost unless the output holds it; at alpha = 0 the state is eps and x_0 is lost unless the output
# holds it. The score is infinite at sigma = 0, and so is the flow where sigma' is.
HOLDS_EPS_AT_DATA = {"noise", "velocity", "flow", "edm"}
HOLDS_X0_AT_NOISE = {"data", "velocity", "flow", "edm"}


def make(target, process):
    return getattr(predictions, target)(process)


def levels(process):
    """Inside levels, the data end, and the noise end."""
    return [process.level(float(process.end) * u) for u in (0.0, 0.003, 0.3, 0.77, 1.0)]


def exists(target, process, level):
    """Whether the training target is finite at a level."""
    if level.sigma > 0:
        return True
    steep = np.isinf(process.schedule.sigma_rate(level.time))
    return target != "score" and not (target == "flow" and steep)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("target", TARGETS)
def test_round_trip(target, name):
    """encode, then to_x0 and to_eps, at every level that determines them; a ValueError elsewhere."""
    process = PROCESSES[name]
    prediction = make(target, process)
    for level in levels(process):
        x = level.alpha * X0 + level.sigma * EPS
        if not exists(target, process, level):
            with pytest.raises(ValueError, match=target):
                prediction.encode(X0, EPS, level)
            if level.alpha > 0:  # the state alone is the answer
                np.testing.assert_allclose(prediction.to_x0(0 * x, x, level), X0, rtol=1e-12)
            continue
        output = prediction.encode(X0, EPS, level)
        assert np.all(np.isfinite(output))
        if level.alpha == 0 and target not in HOLDS_X0_AT_NOISE:
            with pytest.raises(ValueError, match="x_0"):
                prediction.to_x0(output, x, level)
        else:
            np.testing.assert_allclose(prediction.to_x0(output, x, level), X0, rtol=1e-9, atol=1e-9)
        if level.sigma == 0 and target not in HOLDS_EPS_AT_DATA:
            with pytest.raises(ValueError, match="eps"):
                prediction.to_eps(output, x, level)
        else:
            np.testing.assert_allclose(prediction.to_eps(output, x, level), EPS, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PROCESSES)
def test_conversions(name):
    """Every output becomes every other target wherever it determines it, is refused elsewhere."""
    process = PROCESSES[name]
    for one, other in itertools.product(TARGETS, TARGETS):
        mine, yours = make(one, process), make(other, process)
        for level in levels(process):
            if not exists(one, process, level):
                continue
            x = level.alpha * X0 + level.sigma * EPS
            output = mine.encode(X0, EPS, level)
            knows_x0 = level.alpha > 0 or one in HOLDS_X0_AT_NOISE
            knows_eps = level.sigma > 0 or one in HOLDS_EPS_AT_DATA
            with_x0, with_eps = needs(other, process, level)
            possible = exists(other, process, level) and (knows_x0 or not with_x0) and (knows_eps or not with_eps)
            if possible:
                expected = yours.encode(X0, EPS, level)
                found = mine.convert(output, x, level, yours)
                np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9, err_msg=f"{one}->{other} {level}")
            else:
                with pytest.raises(ValueError, match="does not determine"):
                    mine.convert(output, x, level, yours)


def needs(target, process, level):
    """Whether a target contains x_0 and eps at a level."""
    schedule = process.schedule
    contains = {
        "noise": (False, True),
        "data": (True, False),
        "velocity": (level.sigma != 0, level.alpha != 0),
        "flow": (schedule.alpha_rate(level.time) != 0, schedule.sigma_rate(level.time) != 0),
        "score": (False, True),
        "edm": (level.sigma != 0, level.alpha != 0),
    }
    return contains[target]


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("target", TARGETS)
def test_from_x0(target, name):
    """from_x0 undoes to_x0; where the clean estimate does not determine the output it is refused."""
    process = PROCESSES[name]
    prediction = make(target, process)
    for level in levels(process):
        x = level.alpha * X0 + level.sigma * EPS
        _, with_eps = needs(target, process, level)
        if exists(target, process, level) and (level.sigma > 0 or not with_eps):
            np.testing.assert_allclose(
                prediction.from_x0(X0, x, level), prediction.encode(X0, EPS, level), rtol=1e-9, atol=1e-9
            )
        else:
            with pytest.raises(ValueError, match="is not determined"):
                prediction.from_x0(X0, x, level)


@pytest.mark.parametrize("target", TARGETS)
def test_weight(target):
    """The squared error of the target is weight times that of x_0, at a fixed state."""
    for process in (processes.vp(), processes.flow(), processes.edm()):
        prediction = make(target, process)
        for u in (0.05, 0.5, 0.9):
            level = process.level(u * process.end)
            x = level.alpha * X0 + level.sigma * EPS
            off = X0 + np.array([0.3, -0.1, 0.2])
            outputs = [prediction.encode(x0, (x - level.alpha * x0) / level.sigma, level) for x0 in (X0, off)]
            ratio = np.sum((outputs[1] - outputs[0]) ** 2) / np.sum((off - X0) ** 2)
            np.testing.assert_allclose(prediction.weight(level), ratio, rtol=1e-8)


def test_velocity_formulas():
    """v = alpha eps - sigma x_0, x_0 = alpha x - sigma v and eps = sigma x + alpha v for variance preserving."""
    prediction = predictions.velocity(processes.cosine())
    for t in (0.0, 0.2, 0.8, 1.0):
        a, s = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
        level = processes.cosine().level(t)
        x, v = a * X0 + s * EPS, a * EPS - s * X0
        np.testing.assert_allclose(prediction.encode(X0, EPS, level), v, atol=1e-13)
        np.testing.assert_allclose(prediction.to_x0(v, x, level), a * x - s * v, atol=1e-13)
        np.testing.assert_allclose(prediction.to_eps(v, x, level), s * x + a * v, atol=1e-13)
        assert prediction.weight(processes.cosine().level(0.5)) == pytest.approx(2.0)  # 1 + SNR


def test_flow_is_the_derivative():
    """The flow target is the time derivative of alpha x_0 + sigma eps; for rectified flow it is eps - x_0."""
    np.testing.assert_allclose(
        predictions.flow(processes.flow()).encode(X0, EPS, processes.flow().level(0.3)), EPS - X0
    )
    for process in PROCESSES.values():
        t, h = 0.41307 * float(process.end), 1e-6 * float(process.end)
        low, high = process.level(t - h), process.level(t + h)
        slope = ((high.alpha - low.alpha) * X0 + (high.sigma - low.sigma) * EPS) / (2 * h)
        np.testing.assert_allclose(predictions.flow(process).encode(X0, EPS, process.level(t)), slope, rtol=1e-6)


def test_score_is_minus_eps_over_sigma():
    process = processes.vp()
    level = process.level(0.4)
    np.testing.assert_allclose(predictions.score(process).encode(X0, EPS, level), -EPS / level.sigma)


@pytest.mark.parametrize("sigma", [0.002, 0.5, 3.0, 80.0])
def test_edm_table(sigma):
    """c_skip, c_out, c_in, c_noise, and the loss weight 1 / c_out^2, as in table 1 of the paper."""
    sd = 0.7
    process = processes.edm()
    prediction = predictions.edm(process, sigma_data=sd)
    level = process.level(sigma)
    skip = sd**2 / (sigma**2 + sd**2)
    out = sigma * sd / math.sqrt(sigma**2 + sd**2)
    seen = []

    def apply(params, x, t, condition):
        seen.append((x, t))
        return params * np.tanh(x)

    x = X0 + sigma * EPS
    denoised = prediction.decode(apply, 1.5)(x, level)
    ((scaled, noise_label),) = seen
    np.testing.assert_allclose(scaled, x / math.sqrt(sigma**2 + sd**2), rtol=1e-12)
    np.testing.assert_allclose(noise_label, math.log(sigma) / 4, rtol=1e-12)
    np.testing.assert_allclose(denoised, skip * x + out * 1.5 * np.tanh(scaled), rtol=1e-12)
    np.testing.assert_allclose(prediction.weight(level), (sigma**2 + sd**2) / (sigma * sd) ** 2, rtol=1e-12)
    np.testing.assert_allclose(prediction.encode(X0, EPS, level), (X0 - skip * x) / out, rtol=1e-9)


def test_edm_target_has_unit_variance():
    """For data of variance sigma_data^2 the target and the input have variance 1 in every process."""
    for process in PROCESSES.values():
        level = process.level(0.37 * float(process.end))
        prediction = predictions.edm(process, sigma_data=0.5)
        on_x0, on_eps = (prediction.encode(*pair, level) for pair in ((0.5, 0.0), (0.0, 1.0)))
        assert float(on_x0) ** 2 + float(on_eps) ** 2 == pytest.approx(1.0)
        scale, _ = prediction.target.inputs(process, level)
        assert float(scale) ** 2 * (level.alpha**2 * 0.25 + level.sigma**2) == pytest.approx(1.0)


@pytest.mark.parametrize("target", TARGETS)
def test_per_element_levels(target):
    """A level per frame is the levels one by one."""
    process = processes.cosine()
    prediction = make(target, process)
    times = np.array([0.1, 0.5, 0.9])
    x0, eps = (np.random.default_rng(k).normal(size=(3, 2, 2)) for k in (0, 1))
    level = process.level(times, trailing=2)
    x = level.alpha * x0 + level.sigma * eps
    output = prediction.encode(x0, eps, level)
    asked = []

    def apply(params, x, t, condition):
        asked.append(np.shape(t))
        return output

    np.testing.assert_allclose(prediction.decode(apply, None)(x, level), x0, rtol=1e-9)
    assert asked == [(3,)]
    for k, t in enumerate(times):
        np.testing.assert_allclose(output[k], prediction.encode(x0[k], eps[k], process.level(t)), rtol=1e-12)


def test_network_is_conditioned_on_time_or_index():
    seen = []

    def apply(params, x, t, condition):
        seen.append(float(t))
        return x

    for process, t, expected in ((processes.flow(), 0.25, 0.25), (processes.ddpm(), 37.0, 36.0)):
        predictions.noise(process).decode(apply, None)(X0, process.level(t))
        assert seen.pop() == expected
    predictions.edm(processes.flow(), conditioning="time").decode(apply, None)(X0, processes.flow().level(0.25))
    assert seen.pop() == 0.25


REFUSED = {"noise-flow", "score-cosine", "edm-flow"}
ACCEPTED = {"data-flow", "velocity-cosine", "flow-flow", "noise-vp", "edm-vp"}


@pytest.mark.parametrize("pair", sorted(REFUSED | ACCEPTED))
def test_refused_when_the_grid_is_built(pair):
    """A prediction that does not determine x_0 at the first level is refused by the sampler."""
    target, _, name = pair.partition("-")
    process = PROCESSES[name]
    denoise = make(target, process).decode(lambda params, x, t, condition: x, None)
    call = lambda: diffjax.sample(
        jax.random.key(0), denoise, diffjax.solvers.ddim(), grids.uniform(process, 3), shape=(2,)
    )
    if pair in REFUSED:
        with pytest.raises(ValueError, match=f"prediction {target}"):
            call()
    else:
        assert jnp.all(jnp.isfinite(call().x))


def test_output_shape_is_checked():
    process = processes.flow()
    denoise = predictions.data(process).decode(lambda params, x, t, condition: x[None], None)
    with pytest.raises(ValueError, match=r"shape \(1, 3\).*\(3,\)"):
        denoise(jnp.asarray(X0), process.level(0.5))


def test_float32_in_float32_out():
    for process in PROCESSES.values():
        level = jax.tree.map(jnp.float32, process.level(0.5 * float(process.end)))
        for target in TARGETS:
            prediction = make(target, process)
            x0, eps = jnp.asarray(X0, jnp.float32), jnp.asarray(EPS, jnp.float32)
            assert prediction.to_x0(prediction.encode(x0, eps, level), x0, level).dtype == jnp.float32


def test_a_decoded_edm_network_is_an_argument_of_a_compiled_function():
    """Its scale is traced while the grid's levels are concrete: the check must not make an array of it."""
    grid = grids.uniform(processes.flow(), 2)
    denoise = predictions.edm(processes.flow(), 0.7, conditioning="time").decode(lambda p, x, t, c: p * x, 1.0)
    jax.jit(lambda denoise: denoise.check(grid.t))(denoise)
