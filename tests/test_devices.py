"""Devices: meshes from descriptions, what lives where, and the same numbers on any number of them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import diffjax
from diffjax import devices, networks, predictions, processes, training
from diffjax.samplers.sequential import normal_noise

RANDOM = np.random.default_rng(0)
SIZE, WIDTH, BATCH = 4, 64, 32
OPTIMISER = optax.adam(1e-2)
X0 = RANDOM.normal(size=(BATCH, SIZE)).astype(np.float32)


def apply(params, x, t, condition=None):
    return jnp.tanh(x @ params["in"] + (t * params["time"]).astype(x.dtype)) @ params["out"]


def weights():
    random = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(0.3 * random.normal(size=shape), jnp.float32)
    return {"in": draw(SIZE, WIDTH), "time": draw(WIDTH), "out": draw(WIDTH, SIZE)}


LOSS = training.denoising(predictions.flow(processes.flow()), apply)


@dataclass(frozen=True)
class Remembering:
    """Reconstruction without noise, divided by a running mean of itself."""

    def init(self, params):
        return {"mean": jnp.ones(()), "steps": jnp.zeros((), jnp.int32)}

    def advance(self, params, memory, key, x):
        errors = jnp.mean(jnp.square(jax.vmap(lambda x: apply(params, x, 0.5))(x) - x), axis=-1)
        mean = 0.9 * memory["mean"] + 0.1 * jnp.mean(errors)
        return errors / memory["mean"], {"mean": mean, "steps": memory["steps"] + 1}


def start(loss=LOSS, mesh=None):
    return training.init(jax.random.key(5), weights(), OPTIMISER, loss=loss, mesh=mesh, rule=devices.fsdp(100))


def trained(step, state, count=3):
    """The state and the losses after some steps."""
    losses = []
    for _ in range(count):
        state, metrics = step(state, (X0,))
        losses.append(float(np.ravel(metrics.loss)[0]))
    return state, losses


@pytest.fixture(scope="module")
def alone():
    """Three steps on one device: (step, state, losses) of each loss."""
    found = {}
    for loss in (LOSS, Remembering()):
        step = training.train_step(loss, OPTIMISER)
        found[type(loss)] = (step, *trained(step, start(loss)))
    return found


def close(found, expected, tolerance=1e-6):
    for part in ("params", "ema", "optimiser", "loss_state"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max())),
            devices.gathered(getattr(found, part)),
            devices.gathered(getattr(expected, part)),
        )


# --- meshes and rules ---------------------------------------------------------------------------------------------


def test_a_description_becomes_a_mesh():
    assert dict(devices.mesh("data=4,fsdp=2").shape) == {"data": 4, "fsdp": 2}
    assert dict(devices.mesh("fsdp=2, data=-1,time=2").shape) == {"fsdp": 2, "data": 2, "time": 2}
    assert dict(devices.mesh(devices=jax.devices()[:3]).shape) == {"data": 3}
    assert set(devices.mesh("data=8").axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("data=3", "expected 3 devices, found 8"),
        ("data=-1,fsdp=3", "expected 6 devices, found 8"),
        ("data=-1,fsdp=16", "expected 16 devices, found 8"),
        ("model=8", r"each of \('data', 'fsdp', 'time'\).*got 'model=8'"),
        ("data=4,data=2", "at most once"),
        ("data", "must be like"),
        ("data=0", "positive size"),
        ("data=two", "positive size.*got 'two'"),
        ("data=-1,fsdp=-1", "one axis of size -1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(description, message):
    with pytest.raises(ValueError, match=message):
        devices.mesh(description)


def test_rules_divide_the_largest_axis_that_can_be():
    mesh, rule = devices.mesh("data=2,fsdp=4"), devices.fsdp(100)
    assert rule(mesh, (4, 64)) == P(None, "fsdp")
    assert rule(mesh, (3, 3, 32, 32)) == P(None, None, "fsdp")  # the first of equals
    assert rule(mesh, (101, 8)) == P(None, "fsdp")  # the largest does not divide
    assert rule(mesh, (101, 7)) == rule(mesh, (4, 4)) == rule(mesh, ()) == P()  # nothing does; small; a number
    assert rule(devices.mesh("data=8"), (64, 64)) == devices.replicated(mesh, (64, 64)) == P()
    with pytest.raises(ValueError, match="smallest must be"):
        devices.fsdp(-1)


def test_hosts_and_batches_are_divided_over_data_and_fsdp():
    mesh = devices.mesh("data=2,fsdp=2,time=2")
    sharding = devices.batch_sharding(mesh)
    assert devices.batch_parts(sharding) == 4 and devices.host_part(mesh) == (0, 1)
    (placed,) = devices.place_batch((X0,), sharding)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(BATCH // 4, SIZE)}
    np.testing.assert_array_equal(devices.gathered(placed), X0)
    assert devices.place_batch(placed, sharding) is placed
    with pytest.raises(ValueError, match="global batch of 30 cannot be divided over the 4 devices"):
        devices.place_batch(X0[:30], sharding)
    with pytest.raises(ValueError, match="in 3 parts: choose a multiple of 12"):
        devices.place_batch(X0, sharding, parts=3)
    with pytest.raises(ValueError, match="'time' is not in the mesh"):
        devices.batch_sharding(devices.mesh(), "time")


def test_joining_needs_to_know_whom():
    devices.initialise()  # a run of one process
    with pytest.raises(ValueError, match="need the coordinator"):
        devices.initialise(processes=2)
    for process in (None, -1, 2):
        with pytest.raises(ValueError, match="below processes=2"):
            devices.initialise("localhost:1", 2, process)


# --- the same training on any number of devices --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("description", "count", "accumulate"),
    [("data=1", 1, 1), ("data=2", 2, 1), ("data=8", 8, 4), ("data=2,fsdp=4", 8, 1), ("data=2,fsdp=2,time=2", 8, 2)],
)
def test_training_is_that_of_one_device(alone, description, count, accumulate):
    """Parameters, averages and moments, replicated or divided, also with the batch in parts."""
    mesh = devices.mesh(description, jax.devices()[:count])
    step = training.train_step(LOSS, OPTIMISER, mesh=mesh, accumulate=accumulate)
    state, losses = trained(step, start(mesh=mesh))
    _, expected, expected_losses = alone[type(LOSS)]
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    close(state, expected)
    for leaf in (state.params["in"], state.ema["in"], state.optimiser[0].mu["in"]):
        assert leaf.sharding == NamedSharding(mesh, devices.fsdp(100)(mesh, (SIZE, WIDTH)))
        assert leaf.addressable_shards[0].data.shape[1] == WIDTH // mesh.shape.get("fsdp", 1)
    assert len(step.programs) == 1


@pytest.mark.parametrize("loss", [LOSS, Remembering()], ids=["drawn", "remembering"])
def test_training_under_pmap_is_that_of_one_device(alone, loss):
    pure = training.update(loss, OPTIMISER, axis_name="data", accumulate=2 if loss is LOSS else 1)
    compiled = jax.pmap(pure, axis_name="data")
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), start(loss))
    states, losses = trained(lambda state, batch: compiled(state, (batch[0].reshape(8, -1, SIZE),)), states)
    _, expected, expected_losses = alone[type(loss)]
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    for device in (0, 7):
        close(jax.tree.map(lambda leaf, device=device: leaf[device], states), expected)


def test_a_loss_remembers(alone, tmp_path):
    """On a mesh as on one device, through a checkpoint, and as computed by hand."""
    mesh, loss = devices.mesh("data=2,fsdp=4"), Remembering()
    state, losses = trained(training.train_step(loss, OPTIMISER, mesh=mesh), start(loss, mesh))
    _, expected, expected_losses = alone[Remembering]
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    close(state, expected)
    mean = 1.0
    for value in losses:
        mean = 0.9 * mean + 0.1 * value * mean  # the loss is the error divided by the mean before
    np.testing.assert_allclose(state.loss_state["mean"], mean, rtol=1e-6)
    assert int(state.loss_state["steps"]) == 3
    training.checkpoint.save(tmp_path, state)
    found = training.checkpoint.restore(tmp_path, start(loss)).state
    close(found, state, 0.0)
    with pytest.raises(ValueError, match=r"another loss, loss_state differ: .*mean"):
        training.checkpoint.restore(tmp_path, start())


def test_plain_losses_are_accumulated_in_law():
    """One that cannot draw sees other noise in each part; one without noise gives the gradient of the whole batch."""
    quiet = lambda params, key, x: jnp.mean(jnp.square(jax.vmap(lambda x: apply(params, x, 0.5))(x) - x), axis=-1)
    whole, parts = (training.train_step(quiet, optax.sgd(0.1), accumulate=n) for n in (1, 4))
    init = lambda: training.init(jax.random.key(0), weights(), optax.sgd(0.1))
    (a, found), (b, expected) = parts(init(), (X0,)), whole(init(), (X0,))
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-6)
    np.testing.assert_allclose(found.gradient_norm, expected.gradient_norm, rtol=1e-6)
    close(a, b)
    loud = lambda params, key, x: jax.random.normal(key, x.shape[:1])
    metrics = training.train_step(loud, optax.sgd(0.1), accumulate=BATCH)(init(), (X0,))[1]
    assert abs(float(metrics.loss)) < 4 / BATCH**0.5  # the same draw in each part would have variance 1
    with pytest.raises(ValueError, match="accumulate must be"):
        training.update(quiet, optax.sgd(0.1), accumulate=0)
    with pytest.raises(ValueError, match="batch of 32 cannot be accumulated in 5"):
        training.train_step(quiet, optax.sgd(0.1), accumulate=5)(init(), (X0,))


def test_a_state_off_the_mesh_is_refused_and_explicit_axes_are_made_automatic(alone):
    mesh = devices.mesh("data=8")
    with pytest.raises(ValueError, match=r"state must be on the mesh \{'data': 8\}"):
        training.train_step(LOSS, OPTIMISER, mesh=mesh)(start(), (X0,))
    explicit = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2)
    step = training.train_step(LOSS, OPTIMISER, mesh=explicit)
    np.testing.assert_allclose(trained(step, start(mesh=explicit))[1], alone[type(LOSS)][2], rtol=1e-6)


# --- the same noise and the same samples ------------------------------------------------------------------------------


def on(count, description="data=-1"):
    return devices.batch_sharding(devices.mesh(description, jax.devices()[:count]))


def test_the_noise_of_the_loss_is_bitwise_that_of_one_device():
    """With a network that says zero and one-dimensional data at zero, the loss is the square of the noise."""
    silent = training.denoising(predictions.noise(processes.flow()), lambda params, x, t, condition: jnp.zeros_like(x))
    zeros, key = np.zeros((BATCH, 1), np.float32), jax.random.key(3)
    one, *others = (np.asarray(jax.jit(silent)({}, key, jax.device_put(zeros, on(count)))) for count in (1, 2, 8))
    assert np.all(one > 0) and len(set(one.tolist())) == BATCH
    for other in others:
        np.testing.assert_array_equal(other, one)


def test_samples_are_those_of_one_device_and_their_noise_bitwise():
    """By `jit` with sharded keys, on one axis or two, and by `pmap`; the keys alone decide."""
    mixture = diffjax.oracles.mixture(np.ones(5), RANDOM.normal(size=(5, SIZE)), np.full(5, 0.05))
    grid = diffjax.grids.uniform(processes.vp(), 8, stop=1e-3)

    def draw(key):
        noise = normal_noise(key, 3, jnp.zeros(SIZE), 2)
        return diffjax.sample(key, mixture, diffjax.solvers.ancestral(), grid, shape=(SIZE,)).x, noise

    keys, many = jax.random.split(jax.random.key(1), 16), jax.vmap(draw)
    x, noise = jax.jit(many)(keys)
    found = [jax.jit(many)(jax.device_put(keys, on(*where))) for where in ((2,), (8,), (8, "data=2,fsdp=4"))]
    found.append(jax.tree.map(lambda leaf: leaf.reshape(16, SIZE), jax.pmap(many)(keys.reshape(8, 2))))
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit):
        found.append(jax.device_get(jax.jit(many)(jax.device_put(keys, NamedSharding(explicit, P("data"))))))
    for other, drawn in found:
        np.testing.assert_allclose(other, x, rtol=0, atol=1e-5 * np.abs(x).max())
        jax.tree.map(np.testing.assert_array_equal, drawn, noise)


# --- precision, memory, depth ---------------------------------------------------------------------------------------


def test_mixed_precision_keeps_master_weights():
    narrow = training.mixed(apply)
    loss = training.denoising(predictions.flow(processes.flow()), narrow)
    step = training.train_step(loss, optax.sgd(0.1))
    init = lambda: training.init(jax.random.key(5), weights(), optax.sgd(0.1))
    products = [s for s in step.lower(init(), (X0,)).as_text().splitlines() if "dot_general" in s]
    assert products and all("bf16" in line for line in products)
    state, found = step(init(), (X0,))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((state.params, state.ema)))
    expected = training.train_step(LOSS, optax.sgd(0.1))(init(), (X0,))[1]
    error = abs(float(found.loss) / float(expected.loss) - 1)
    assert 0 < error < 2.0**-7  # the rounding of bfloat16, and it is rounded
    assert narrow == training.mixed(apply) and hash(narrow) == hash(training.mixed(apply))
    with pytest.raises(ValueError, match="floating type, got int32"):
        training.mixed(apply, jnp.int32)


def test_donation_and_sharding_save_memory():
    """The state is given back, and a device holds its share of it alone."""
    mesh = devices.mesh("fsdp=8")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(start()._replace(key=())))
    step, spread = training.train_step(LOSS, OPTIMISER), training.train_step(LOSS, OPTIMISER, mesh=mesh)
    one, eight = devices.memory(step, start(), (X0,)), devices.memory(spread, start(mesh=mesh), (X0,))
    kept = devices.memory(jax.jit(step.pure), start(), (X0,))
    assert one.aliased > 0.95 * size and kept.aliased == 0
    assert one.peak < kept.peak - size / 2
    assert eight.arguments < one.arguments / 3 and eight.peak < one.peak
    assert one.peak == one.arguments + one.results + one.temporary - one.aliased


@pytest.fixture(scope="module")
def dit():
    """(apply, params) of a DiT of three blocks with labels and tokens, shaken off its zero output."""
    condition = (networks.label(3), networks.tokens(5))

    def make(depth=3, **options):
        network = networks.DiT(
            (4, 4, 2), width=16, depth=depth, heads=2, condition=condition, rngs=nnx.Rngs(0), **options
        )
        return networks.functional(network)

    return make


def losses_of(apply, x):
    told = (1, jnp.ones((3, 5)))
    return lambda params: jnp.mean(jax.vmap(lambda x: apply(params, x, 0.3, told))(x) ** 2)


def test_scanned_blocks_are_the_same_network(dit):
    """Its parameters are those of the blocks, stacked; values and gradients agree whatever is computed again."""
    (loop, params), (scan, rows) = dit(), dit(scan=True)
    jax.tree.map(np.testing.assert_array_equal, networks.stacked(params), rows)
    jax.tree.map(np.testing.assert_array_equal, networks.unstacked(rows), params)
    assert networks.architecture(scan) == networks.architecture(loop) | {"scan": True}
    again = networks.build(networks.architecture(scan), nnx.Rngs(1))
    assert networks.functional(again)[0] == scan
    params = jax.tree.map(lambda leaf: leaf + 0.05, params)
    rows, x = networks.stacked(params), jnp.asarray(RANDOM.normal(size=(64, 4, 4, 2)), jnp.float32)
    value, gradient = jax.jit(jax.value_and_grad(losses_of(loop, x)))(params)
    used = {}
    for remat in (None, "dots", "full"):
        compiled = jax.jit(jax.value_and_grad(losses_of(dit(scan=True, remat=remat)[0], x))).lower(rows).compile()
        found, slopes = compiled(rows)
        np.testing.assert_allclose(found, value, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(networks.unstacked(slopes)), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * (np.abs(b).max() + 1e-3))
        used[remat] = compiled.memory_analysis().temp_size_in_bytes
    assert used["full"] < used["dots"] < used[None]
    with pytest.raises(ValueError, match=r"remat must be None or among \['dots', 'full'\], got 'some'"):
        dit(remat="some")


def test_the_program_of_scanned_blocks_does_not_grow_with_the_depth(dit):
    def size(depth, scan):
        apply, params = dit(depth, scan=scan)
        return len(str(jax.make_jaxpr(jax.grad(losses_of(apply, jnp.ones((2, 4, 4, 2)))))(params)).splitlines())

    assert size(2, True) == size(7, True)
    assert size(7, False) > 2 * size(2, False)
