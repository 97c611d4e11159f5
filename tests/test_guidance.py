"""Classifier-free guidance: its formula, its one batched call, and what it counts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, guidance, predictions, processes, sample, solvers

PROCESS = processes.flow()
LEVEL = PROCESS.level(0.4)
X = jnp.array([0.3, -1.2])
TRACES = []


def network(params, x, t, condition):
    TRACES.append(x.shape)
    return jnp.tanh(params * x + condition["shift"] * t) + condition["table"][0]


CONDITION = {"shift": jnp.array(0.7), "table": jnp.array([0.2, 0.0])}
NULL = {"shift": 0.0, "table": np.zeros(2)}


def denoiser(condition=None):
    return predictions.velocity(PROCESS).decode(network, jnp.array(1.3), CONDITION if condition is None else condition)


def test_scales():
    """Scale 1 is the conditional model, 0 the unconditional one, and the result is affine in the scale."""
    guided = lambda scale: guidance.classifier_free(denoiser(), NULL, scale)(X, LEVEL)
    null = jax.tree.map(jnp.asarray, NULL)
    np.testing.assert_allclose(guided(1.0), denoiser()(X, LEVEL), rtol=1e-6)
    np.testing.assert_allclose(guided(0.0), denoiser(null)(X, LEVEL), rtol=1e-6)
    expected = denoiser(null)(X, LEVEL) + 3.5 * (denoiser()(X, LEVEL) - denoiser(null)(X, LEVEL))
    np.testing.assert_allclose(guided(3.5), expected, rtol=1e-5)
    assert np.max(np.abs(guided(3.5) - guided(1.0))) > 0.1


def test_one_batched_call_counts_two():
    """The network is traced once a step, on both conditions at once, and nfe is doubled."""
    guided = guidance.classifier_free(denoiser(), NULL, 2.0)
    TRACES.clear()
    jaxpr = jax.make_jaxpr(lambda x: guided(x, LEVEL))(X)
    assert TRACES == [(2,)]
    assert sum(e.primitive.name == "tanh" and e.outvars[0].aval.shape == (2, 2) for e in jaxpr.jaxpr.eqns) == 1
    result = sample(jax.random.key(0), guided, solvers.heun(), grids.uniform(PROCESS, 3), shape=(2,))
    assert (int(result.nfe), int(result.rounds)) == (12, 6)


def test_scale_and_conditions_are_arguments():
    """Another scale or condition compiles nothing, and both are differentiable."""
    run = lambda scale, shift: (
        sample(
            jax.random.key(0),
            guidance.classifier_free(denoiser({**CONDITION, "shift": jnp.asarray(shift)}), NULL, scale),
            solvers.ddim(),
            grids.uniform(PROCESS, 3),
            shape=(2,),
        ).x
    )
    first = run(2.0, 0.5)
    TRACES.clear()
    assert np.max(np.abs(run(4.0, 0.1) - first)) > 1e-3
    assert not TRACES
    slopes = jax.grad(lambda scale, shift: run(scale, shift).sum(), argnums=(0, 1))(2.0, 0.5)
    for k, slope in enumerate(slopes):
        moved = [[2.0, 0.5], [2.0, 0.5]]
        moved[0][k] += 1e-2
        moved[1][k] -= 1e-2
        np.testing.assert_allclose(slope, (run(*moved[0]).sum() - run(*moved[1]).sum()) / 2e-2, rtol=2e-2)


def test_under_vmap_over_conditions():
    shifts = jnp.array([0.1, 0.9])
    one = lambda shift: guidance.classifier_free(denoiser({**CONDITION, "shift": shift}), NULL, 2.0)(X, LEVEL)
    np.testing.assert_allclose(jax.vmap(one)(shifts), jnp.stack([one(s) for s in shifts]), rtol=1e-6)


def test_refused():
    with pytest.raises(ValueError, match="condition"):
        guidance.classifier_free(lambda x, level: x, 0.0)
    with pytest.raises(ValueError, match="null"):
        guidance.classifier_free(denoiser(), {"shift": 0.0})
    with pytest.raises(ValueError, match="null"):
        guidance.classifier_free(denoiser(), {"shift": np.zeros(3), "table": np.zeros(2)})
    with pytest.raises(ValueError, match="scale"):
        guidance.classifier_free(denoiser(), NULL, np.inf)
    with pytest.raises(ValueError, match="condition"):
        guidance.classifier_free(guidance.classifier_free(denoiser(), NULL), NULL)
