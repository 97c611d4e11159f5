"""The switches of the training loop together: on a mesh, resumed, and by name from the command line."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import diffjax
from diffjax import data, predictions, processes, solvers, training
from experiments import _switches, digits


def _apply(params, x, t, condition):
    return x * params["a"] * jnp.cos(t) + params["b"]


@pytest.mark.slow
def test_losses_that_learn_and_couple_are_the_same_on_a_mesh():
    """Three steps on 4 devices and on one: parameters and what the loss remembers."""
    options = _switches.switches("importance", "min-snr", "assigned", "perturbed", 0.0)
    loss = training.denoising(predictions.flow(processes.flow()), _apply, **options)
    params = {"a": jnp.ones(()), "b": jnp.zeros((2,))}
    found = []
    for mesh in (None, training.data_mesh(jax.devices()[:4])):
        state = training.init(jax.random.key(1), params, optax.sgd(0.1), loss=loss, mesh=mesh)
        step = training.train_step(loss, optax.sgd(0.1), training.ema.power(0.1), mesh=mesh)
        for k in range(3):
            batch = (np.asarray(jax.random.normal(jax.random.key(k), (32, 2)), np.float32),)
            state, _ = step(state, batch)
        found.append(jax.device_get((state.params, state.ema, state.loss_state)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *found)
    assert int(found[0][2].step) == 3


def test_names_are_methods():
    for kind, table in (("law", _switches.LAWS), ("coupling", _switches.COUPLINGS), ("states", _switches.STATES)):
        assert len({type(make()) for make in table.values()}) >= len(table) - (kind == "states")


@pytest.mark.slow
def test_digits_take_switches_and_a_self_conditioned_run_is_loaded_and_sampled(tmp_path):
    images = data.load("digits", "train")
    fields = {"law": "curriculum", "weighting": "edm", "coupling": "assigned", "states": "scheduled"}
    options = digits.Options(
        steps=2, batch=16, channels=(8,), out=tmp_path, self_conditioning=0.5, ema_width=0.1, **fields
    )
    trained = digits.train(options, images)
    assert training.checkpoint.steps(tmp_path)[-1] == 2
    model = digits.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, trained.params, model.params)
    grid = diffjax.grids.uniform(digits.PROCESS, 2)
    drawn = digits.generate(model, solvers.ddim(), grid, np.array([1, 2]), jax.random.key(0), scale=2.0)
    assert np.all(np.isfinite(drawn.x)) and drawn.x.shape == (2, 8, 8, 1) and np.all(drawn.nfe == 4)
    with pytest.raises(ValueError, match="another architecture"):
        digits.train(digits.Options(steps=3, batch=16, channels=(8,), out=tmp_path), images, resume=True)
