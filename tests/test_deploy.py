"""Artefacts run where there is only jax; precision is emulated exactly."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import diffjax
from diffjax import deploy

PROCESS = diffjax.processes.flow()
GRID = diffjax.grids.uniform(PROCESS, 4)
PREDICTION = diffjax.predictions.flow(PROCESS)


def apply(params, x, t, condition=None):
    """A network of one layer; its parameters' names are not in alphabetical order of their use."""
    told = jnp.concatenate([x, jnp.stack([t, condition.astype(x.dtype)])])
    return jnp.tanh(told @ params["z"]["kernel"] + params["a"]) @ params["b"]


def draw(params, key, condition):
    denoise = PREDICTION.decode(apply, params, condition=condition)
    return diffjax.sample(key, denoise, diffjax.solvers.ancestral(), GRID, shape=(3,))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = {"a": (8,), "b": (8, 3)}
    found = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    return {"z": {"kernel": jnp.asarray(rng.normal(size=(5, 8)), jnp.float32)}, **found}


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(7), 5)


@pytest.fixture(scope="module")
def expected(params, keys):
    return jax.vmap(draw, (None, 0, 0))(params, keys, jnp.arange(5)).x


@pytest.fixture(scope="module")
def made(params):
    return deploy.artefact(draw, params, 0, platforms=("cpu", "cuda", "tpu"))


PROGRAM = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffjax", "flax", "optax", "orbax", "jaxtyping", "chex"):
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Blocked())
import jax, jax.export, numpy as np
folder = sys.argv[1]
with open(folder + "/sampler.jax", "rb") as file:
    sampler = jax.export.deserialize(bytearray(file.read()))
params = dict(np.load(folder + "/params.npz"))
keys = jax.random.key_data(jax.random.split(jax.random.key(7), 5))
np.save(folder + "/found.npy", sampler.call(params, keys, np.arange(5))["x"])
try:
    import diffjax
except ImportError:
    print("only jax")
"""


def test_an_artefact_runs_in_a_process_with_nothing_but_jax(made, expected, tmp_path):
    made.save(tmp_path)
    program = [
        sys.executable,
        "-c",
        PROGRAM.replace("import jax, numpy", "import jax, jax.export, numpy"),
        str(tmp_path),
    ]
    output = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path)
    assert output.stdout == "only jax\n", output.stderr
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, rtol=1e-5, atol=1e-6)


def test_an_artefact_takes_any_number_of_samples_and_other_parameters(made, params, keys, expected, tmp_path):
    for count in (1, 3):
        found = made(keys[:count], jnp.arange(count))
        np.testing.assert_allclose(found["x"], expected[:count], rtol=1e-5, atol=1e-6)
        assert found["nfe"].shape == (count,) and set(found) <= set(diffjax.Sample._fields)
    other = made._replace(params={name: 0 * array for name, array in made.params.items()})
    silent = jax.vmap(draw, (None, 0, 0))(jax.tree.map(jnp.zeros_like, params), keys[:1], jnp.arange(1)).x
    np.testing.assert_allclose(other(keys[:1], jnp.arange(1))["x"], silent, rtol=1e-5, atol=1e-6)
    loaded = deploy.load(made.save(tmp_path / "a"))
    np.testing.assert_array_equal(loaded(keys[:3], jnp.arange(3))["x"], found["x"])
    assert loaded.record["platforms"] == ["cpu", "cuda", "tpu"] and loaded.record["batch"] == "any"
    assert loaded.record["params"]["z.kernel"] == ["float32", 5, 8]


def test_parameters_may_be_baked_in(params, keys, expected, tmp_path):
    made = deploy.artefact(draw, params, 0, batch=5, baked=True)
    assert made.params is None
    loaded = deploy.load(made.save(tmp_path))
    assert not (tmp_path / "params.npz").exists()
    np.testing.assert_allclose(loaded(keys, jnp.arange(5))["x"], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="2"):  # the batch is that of the export
        loaded(keys[:2], jnp.arange(2))


def test_artefacts_that_cannot_be_are_refused(made, params, tmp_path):
    with pytest.raises(ValueError, match=r"platforms must be among .*got \('gameboy',\)"):
        deploy.artefact(draw, params, 0, platforms=("gameboy",))
    with pytest.raises(ValueError, match="batch must be a positive integer or None, got 0"):
        deploy.artefact(draw, params, 0, batch=0)
    with pytest.raises(ValueError, match=r"or baked=True, got {'a': 'bfloat16'}"):
        deploy.artefact(draw, {**params, "a": jnp.ones(8, jnp.bfloat16)}, 0)
    with pytest.raises(FileNotFoundError, match=r"expected \['sampler.jax', 'record.json'\].*no such folder"):
        deploy.load(tmp_path / "none")
    made.save(tmp_path)
    np.savez(tmp_path / "params.npz", a=np.zeros(7))
    with pytest.raises(ValueError, match=r"is not of this sampler.*'a': \(\['float32', 8\], \['float64', 7\]\)"):
        deploy.load(tmp_path)
    (tmp_path / "sampler.jax").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no exported sampler"):
        deploy.load(tmp_path)
    assert json.loads((tmp_path / "record.json").read_text())["jax"] == jax.__version__


def shortened(x, bits):
    """Round to nearest even, with so many bits of the mantissa, by integers."""
    whole = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    drop = 23 - bits
    half = (np.uint64(1) << np.uint64(drop - 1)) - np.uint64(1) + ((whole >> np.uint64(drop)) & np.uint64(1))
    return (((whole + half) >> np.uint64(drop)) << np.uint64(drop)).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize(("precision", "bits"), [("tf32", 10), ("bf16", 7)])
def test_factors_are_rounded_wherever_a_product_is(precision, bits):
    """In jit, scan, cond, vmap and custom derivatives: against the same loop in NumPy with rounded factors."""
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(6, 6)).astype(np.float32) / 3, rng.normal(size=(4, 6)).astype(np.float32)

    def function(w, x):
        def body(x, i):
            x = jax.vmap(lambda row: lax.cond(i > 0, lambda r: jax.nn.relu(r @ w), lambda r: r @ (2 * w), row))(x)
            return x, None

        return jax.jit(lambda x: lax.scan(body, x, jnp.arange(3))[0])(x)

    expected = x
    for i in range(3):
        factor = w if i else 2 * w
        product = shortened(expected, bits).astype(np.float64) @ shortened(factor, bits).astype(np.float64)
        expected = (np.maximum(product, 0) if i else product).astype(np.float32)
    found = deploy.rounded(function, precision)(w, x)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)
    if bits == 7:
        np.testing.assert_array_equal(shortened(x, 7), np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32))
    exact = function(w, x)
    error = deploy.precision_error(function, w, x, precision=precision)
    assert error.emulated  # the tests are on a CPU
    assert error.relative == pytest.approx(np.sqrt(np.mean((expected - exact) ** 2) / np.mean(exact**2)), rel=1e-2)
    assert 2.0**-bits / 20 < error.relative < 2.0**-bits * 3  # an error of the order of one rounding


def test_the_switch_is_what_jax_is_told(params):
    x = jnp.ones((3, 5))
    program = jax.make_jaxpr(deploy.with_precision(lambda p, x: x @ p["z"]["kernel"], "tf32"))(params, x)
    (equation,) = [e for e in program.eqns if e.primitive.name == "dot_general"]
    assert "high" in str(equation.params["precision"]).lower() or "tensorfloat32" in str(equation.params).lower()
    exact = deploy.precision_error(lambda p, x: x @ p["z"]["kernel"], params, x, precision="bf16", emulate=False)
    assert exact == (0.0, 0.0, False)  # a CPU has no other precision
    sampled = deploy.precision_error(draw, params, jax.random.key(0), jnp.asarray(1), precision="bf16")
    assert 1e-4 < sampled.relative < 0.1
    with pytest.raises(ValueError, match="precision must be one of"):
        deploy.with_precision(draw, "fp8")
    with pytest.raises(ValueError, match="got none"):
        deploy.precision_error(lambda x: x > 0, x)
