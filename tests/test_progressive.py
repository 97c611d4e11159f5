"""Progressive distillation: two steps in one, exactly, and guided students of ever fewer steps."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, guidance, oracles, predictions, processes, sample, solvers, training
from tests import tiny

FLOW = processes.flow()


@pytest.mark.paper("Progressive Distillation for Fast Sampling of Diffusion Models")
def test_one_step_ends_where_two_end(x64):
    """DDIM with the target, against DDIM of the teacher, for a mixture: on a flow and a cosine grid, down to data."""
    data = oracles.mixture([0.4, 0.6], np.array([[-1.0, 0.0], [1.0, 0.5]]), np.array([0.1, 0.3]))
    x = jnp.array([0.7, -0.4])
    for grid in (grids.uniform(FLOW, 4), grids.uniform(processes.vp(), 4)):
        whole = sample(jax.random.key(0), data, solvers.ddim(), grid, x=x)
        at = lambda level, i: jax.tree.map(lambda leaf: leaf[i], level)

        def student(x, level, grid=grid, at=at):
            both = [training.two_steps(data, x, at(grid.t, i), at(grid.s, i), at(grid.s, i + 1)) for i in (0, 2)]
            return jnp.where(jnp.isclose(level.time, grid.t.time[0]), both[0], both[1])

        half = training.halved(grid)
        assert len(half) == 2 and half.t.time.tolist() == grid.t.time[::2].tolist()
        found = sample(jax.random.key(0), student, solvers.ddim(), half, x=x)
        np.testing.assert_allclose(found.x, whole.x, rtol=1e-9)


@pytest.mark.paper("On Distillation of Guided Diffusion Models")
def test_guided_students_of_four_two_and_one_step(x64):
    """Gaussians, where the guided step is a polynomial in the scale: eight guided steps in one, for every scale."""
    told, null, teacher_steps = (0.8, 0.3), (0.0, 1.2), 8
    prediction, grid = predictions.data(FLOW), grids.uniform(FLOW, teacher_steps)

    def gaussian(params, x, t, condition):
        mean, variance = condition
        alpha = 1 - t
        return mean + alpha * variance / (alpha**2 * variance + t**2) * (x - alpha * mean)

    def student(params, x, t, condition):
        """At each time of the teacher's an affine map with coefficients that are polynomials in the scale."""
        _, scale = condition
        powers = (scale - 2.0) ** jnp.arange(9)
        own = params[jnp.round(t * teacher_steps).astype(int) - 1]
        return (own[0] @ powers) * x + own[1] @ powers

    guided = lambda condition: guidance.classifier_free(
        prediction.decode(gaussian, None, condition[0]), null, condition[1]
    )
    count = 512
    x0 = jax.random.normal(jax.random.key(0), (count,))
    condition = tuple(jnp.full(count, value) for value in told)

    @jax.jit
    def distilled():
        def fit(key, params, loss):
            return tiny.minimum(lambda p: loss(p, key, x0, condition).mean(), params)

        return training.halvings(
            jax.random.key(1), jnp.zeros((teacher_steps, 2, 9)), guided, grid, prediction, student, fit, 3,
            scales=(1.0, 3.0),
        )  # fmt: skip

    stages = distilled()
    x = jnp.array(0.9)
    for stage, steps in zip(stages, (4, 2, 1), strict=True):
        assert len(stage.grid) == steps
        for scale in (1.0, 1.7, 3.0):
            go = lambda denoise, grid: sample(jax.random.key(2), denoise, solvers.ddim(), grid, x=x)
            short = grids.uniform(FLOW, steps)
            one = go(prediction.decode(student, stage.params, (told, scale)), short)
            all_steps = go(guided((told, scale)), grid)
            np.testing.assert_allclose(one.x, all_steps.x, rtol=2e-3)
            assert int(one.nfe) == steps and int(all_steps.nfe) == 16


@pytest.mark.paper("On Distillation of Guided Diffusion Models")
def test_stochastic_students_of_four_and_two_steps(x64):
    """A Gaussian: the law of what students of 4 and 2 steps draw is that of the teacher's steps and noise, in float64.

    The teacher's are DDIM's of the first student's levels, a quarter of the time each; a student's step is as many of
    them as its length, and noise goes back half a step by the forward transition; the last step is half as long.
    """
    mean, variance, teacher_steps = 0.8, 0.3, 8
    prediction, grid = predictions.data(FLOW), grids.uniform(FLOW, teacher_steps)
    data = oracles.gaussian(np.array(mean), variance)
    student = lambda params, x, t, condition: params[jnp.round(t * teacher_steps).astype(int) - 1] @ jnp.stack([x, 1.0])
    x0 = jax.random.normal(jax.random.key(0), (64,))

    @jax.jit
    def distilled():
        fit = lambda key, params, loss: tiny.minimum(lambda p: loss(p, key, x0).mean(), params)
        start, key, teacher = jnp.zeros((teacher_steps, 2)), jax.random.key(1), lambda condition: data
        return training.halvings(key, start, teacher, grid, prediction, student, fit, 2, stochastic=True)

    def down(moments, first, last):  # eighths of the time
        for i in range(first, last, -2):
            (m, v), t, s = moments, i / 8, (i - 2) / 8
            gain = (1 - t) * variance / ((1 - t) ** 2 * variance + t**2)
            slope = s / t + ((1 - s) - s / t * (1 - t)) * gain
            moments = slope * m + ((1 - s) - s / t * (1 - t)) * mean * (1 - gain * (1 - t)), slope**2 * v
        return moments

    def back(moments, s, t):
        (m, v), keep = moments, (1 - t / 8) / (1 - s / 8)
        return keep * m, keep**2 * v + (t / 8) ** 2 - keep**2 * (s / 8) ** 2

    count = 20_000
    keys = jax.random.split(jax.random.key(2), count)
    for stage, stride in zip(distilled(), (2, 4), strict=True):
        wanted, levels = (0.0, 1.0), range(8, stride, -stride)
        for t in levels:
            wanted = back(down(wanted, t, t - 2 * stride), t - 2 * stride, t - stride)
        wanted = down(wanted, stride, 0)
        denoise = prediction.decode(student, stage.params)
        go = functools.partial(sample, denoise=denoise, solver=solvers.ddim(), grid=stage.grid, shape=())
        out = jax.jit(jax.vmap(go))(keys)
        assert abs(out.x.mean() - wanted[0]) < 4 * np.sqrt(wanted[1] / count) + 1e-4
        assert abs(out.x.var() / wanted[1] - 1) < 4 * np.sqrt(2 / count) + 1e-3
        assert out.nfe[0] == 8 // stride
        # each step alone, to all digits: it is affine
        for t, s in zip((8 * stage.grid.t.time).round(), (8 * stage.grid.s.time).round(), strict=True):
            gain, offset = np.asarray(stage.params)[int(t) - 1]
            weight = (1 - s / 8) - s / t * (1 - t / 8)
            step = lambda x, t=t, s=s, gain=gain, offset=offset, weight=weight: s / t * x + weight * (gain * x + offset)
            for x in (0.0, 1.0):
                np.testing.assert_allclose(step(x), down((x, 0.0), int(t), int(s))[0], rtol=1e-6)


def test_half_back_goes_two_down_and_one_up():
    """A grid of N steps again, down to the same level; one step is itself; students of stochastic steps agree on it."""
    grid = grids.uniform(processes.vp(), 5)
    out = grids.half_back(grid)
    assert out.gaps and len(out) == 5
    np.testing.assert_array_equal(out.t.time, grid.t.time)
    np.testing.assert_array_equal(out.s.time, [*grid.s.time[1:], grid.s.time[-1]])
    assert not grids.half_back(grids.uniform(FLOW, 1)).gaps
    with pytest.raises(ValueError, match="gaps"):
        grids.half_back(out)


def test_refused():
    with pytest.raises(ValueError, match="even"):
        training.halved(grids.uniform(FLOW, 3))
    with pytest.raises(ValueError, match="halved"):
        nothing = lambda *_: None
        flow = predictions.data(FLOW)
        training.halvings(None, None, nothing, grids.uniform(FLOW, 4), flow, nothing, nothing, 3)
    with pytest.raises(ValueError, match="scales"):
        training.progressive_distillation(flow, nothing, nothing, grids.uniform(FLOW, 4), scales=(2.0, 1.0))
