"""Progressive distillation: two steps in one, exactly, and guided students of ever fewer steps."""

from __future__ import annotations

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


def test_refused():
    with pytest.raises(ValueError, match="even"):
        training.halved(grids.uniform(FLOW, 3))
    with pytest.raises(ValueError, match="halved"):
        nothing = lambda *_: None
        flow = predictions.data(FLOW)
        training.halvings(None, None, nothing, grids.uniform(FLOW, 4), flow, nothing, nothing, 3)
    with pytest.raises(ValueError, match="scales"):
        training.progressive_distillation(flow, nothing, nothing, grids.uniform(FLOW, 4), scales=(2.0, 1.0))
