"""The vocabulary: values as pytrees, ratios and rises at the ends, arrays of either namespace."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, oracles, predictions, processes, solvers
from diffjax.levels import Level, arrays, combine, ratio, rise, root, static, value


@value
class Empty:
    """A value without fields."""


@value
class AlsoEmpty:
    """Another one."""


@value
class Pair:
    """A leaf and a static field."""

    leaf: float
    name: str = static(default="a")


def test_classes_without_fields_are_told_apart():
    """jax compares registered dataclasses by their metadata alone; these are not one another's compiled code."""
    assert jax.tree.structure(Empty()) != jax.tree.structure(AlsoEmpty())
    assert jax.tree.structure(Empty()) == jax.tree.structure(Empty())
    process = processes.flow()
    assert jax.tree.structure(predictions.noise(process)) != jax.tree.structure(predictions.data(process))
    assert jax.tree.structure(processes.flow()) != jax.tree.structure(processes.cosine())

    @jax.jit
    def which(empty):
        return 1 if isinstance(empty, Empty) else 2

    assert (int(which(Empty())), int(which(AlsoEmpty()))) == (1, 2)


def test_statics_are_structure_and_leaves_are_not():
    same = jax.tree.structure
    assert same(Pair(1.0)) == same(Pair(2.0)) != same(Pair(1.0, "b"))
    assert jax.tree.leaves(Pair(3.0)) == [3.0]
    assert same(solvers.ddim(0.3)) == same(solvers.ddim(0.9)) != same(solvers.ddim(0.0))
    assert same(solvers.dpmpp(1)) != same(solvers.dpmpp(2))
    path = jax.tree_util.tree_leaves_with_path(Pair(1.0))[0][0]
    assert jax.tree_util.keystr(path) == ".leaf"
    with pytest.raises(AttributeError):
        Pair(1.0).leaf = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    "text",
    [
        "processes.vp(beta_min=0.2, beta_max=15.0)",
        "processes.cosine()",
        "processes.edm(sigma_max=10.0)",
        "solvers.ddim(eta=0.5)",
        "solvers.dpmpp(order=2, form='midpoint')",
        "solvers.runge_kutta('heun', variable='time')",
        "solvers.euler_maruyama(eta=1.0)",
        "solvers.ancestral(variance=0.5)",
    ],
)
def test_repr_is_the_call(text):
    names = {"processes": processes, "solvers": solvers}
    assert repr(eval(text, names)) == text.partition(".")[2]


def test_values_can_be_arguments_of_every_transformation():
    process = processes.vp()
    slopes = jax.grad(lambda p: p.level(jnp.asarray(0.5)).sigma)(process)
    assert np.isfinite(slopes.schedule.beta_max) and slopes.schedule.beta_max != 0
    many = jax.vmap(lambda beta: processes.vp(beta).level(jnp.asarray(0.5)).sigma)(jnp.array([0.1, 0.2]))
    np.testing.assert_allclose(many, [process.level(0.5).sigma, processes.vp(0.2).level(0.5).sigma], rtol=1e-6)
    oracle = oracles.gaussian(np.zeros(2), 1.0)
    assert jax.tree.structure(jax.tree.map(lambda leaf: leaf, oracle)) == jax.tree.structure(oracle)


def test_ratio_and_rise_at_the_ends():
    """0 / 0 and inf - inf between equal levels are 1 and 0; x / 0 is infinite."""
    for xp in (np, jnp):
        a, b = xp.array([0.0, 2.0, 0.0, 3.0]), xp.array([0.0, 4.0, 2.0, 0.0])
        np.testing.assert_array_equal(ratio(a, b), [1.0, 0.5, 0.0, np.inf])
        t, s = (
            Level(None, None, None, xp.array(v))
            for v in ([np.inf, -np.inf, -1.0, -np.inf], [np.inf, -np.inf, 2.0, np.inf])
        )
        np.testing.assert_array_equal(rise(t, s), [0.0, 0.0, 3.0, np.inf])
        assert isinstance(rise(t, s), np.ndarray) == (xp is np)


def test_root_has_no_infinite_derivative():
    np.testing.assert_array_equal(root(np.array([4.0, 0.0, -1e-17])), [2.0, 0.0, 0.0])
    np.testing.assert_array_equal(jax.vmap(jax.grad(root))(jnp.array([4.0, 0.0, -1.0])), [0.25, 0.0, 0.0])


def test_arrays_choose_one_namespace_and_dtype():
    xp, t, p = arrays(0.5, 2)
    assert xp is np and t.dtype == p.dtype == np.float64
    xp, t, p = arrays(jnp.float32(0.5), 2.0)
    assert xp is jnp and t.dtype == p.dtype == jnp.float32
    assert arrays(jnp.bfloat16(0.5))[1].dtype == jnp.float32 and arrays(jnp.int32(3))[1].dtype == jnp.float32
    with jax.enable_x64(True):
        assert arrays(jnp.asarray(0.5))[1].dtype == jnp.float64  # weakly typed
        assert arrays(jnp.float32(0.5), np.float64(2))[2].dtype == jnp.float32


def test_combine():
    """Leaf by leaf, broadcasting, in the dtype of the first tree's leaf."""
    a = {"x": jnp.ones((2, 3), jnp.float32), "y": jnp.ones(3, jnp.float32)}
    b = {"x": 2 * a["x"], "y": 3 * a["y"]}
    out = combine((np.float64(2.0), np.array([1.0, 0.0, -1.0])), (a, b))
    np.testing.assert_allclose(out["x"], [[4, 2, 0], [4, 2, 0]])
    np.testing.assert_allclose(out["y"], [5, 2, -1])
    assert out["x"].dtype == out["y"].dtype == jnp.float32


def test_grid_of_a_traced_process():
    """The whole plan is differentiable in the process's own numbers."""

    def loss(beta):
        process = processes.vp(0.1, beta)
        rows = solvers.ddim().plan(grids.times(process, jnp.array([0.9, 0.5, 0.1])))
        return jnp.sum(rows.coefficients.out[1])

    slope = jax.grad(loss)(15.0)
    np.testing.assert_allclose(slope, (loss(15.1) - loss(14.9)) / 0.2, rtol=1e-2)
