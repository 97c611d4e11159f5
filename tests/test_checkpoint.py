"""Checkpoints: exact resumption, kills at any moment, damage, other architectures."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from diffjax import data, networks, predictions, processes, training
from diffjax.training import checkpoint

HERE = Path(__file__).parent


def same(a, b):
    def raw(leaf):
        typed = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if typed else leaf)

    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(raw(x), raw(y)), a, b)


def linear(params, x, t, condition):
    return params["scale"] * x + t * params["bias"]


def small(step=0, size=3, optimiser=None, mesh=None):
    optimiser = optimiser or training.adam(1e-2)
    params = {"scale": jnp.full((), 0.5), "bias": jnp.arange(size, dtype=jnp.float32)}
    state = training.init(jax.random.key(7), params, optimiser, mesh=mesh)
    return state._replace(step=state.step + step, ema=jax.tree.map(lambda leaf: leaf + 1, state.ema))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The parts of a run on the digits: (fresh state, step, fresh batches, architecture)."""
    images = data.load("digits", "train", folder=tmp_path_factory.mktemp("digits"))
    module = networks.UNet((8, 8, 1), channels=(8,), groups=4, heads=2, condition=networks.label(10), rngs=nnx.Rngs(0))
    apply, params = networks.functional(module)
    loss = training.denoising(predictions.velocity(processes.cosine()), apply, dropout=0.1, null=10)
    optimiser = training.adam(1e-3, warmup=3)
    step = training.train_step(loss, optimiser)

    def flip(generator, image):
        return image[:, :: generator.choice([-1, 1])]

    def start(seed=0):
        key = jax.random.key(seed)
        return training.init(key, params, optimiser), data.batches(images, 32, augment=flip)

    return start, step, networks.architecture(apply)


def test_resuming_is_exact_to_the_bit(tmp_path, digits):
    start, step, architecture = digits
    quiet = {"progress": False, "log_every": 7}
    # 96 steps of 32 are more than two epochs of 1500: the order of a later epoch is met as well.
    state, batches = start()
    whole = training.fit(state, step, batches, steps=96, **quiet)

    kept = {"folder": tmp_path, "architecture": architecture, "save_every": 20}
    state, batches = start()
    half = training.fit(state, step, batches, steps=48, **kept, **quiet)
    assert int(half.step) == 48
    state, batches = start(seed=1)  # neither state nor place: all comes from the checkpoint
    resumed = training.fit(state, step, batches, steps=96, resume=True, **kept, **quiet)
    same(whole, resumed)

    found = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found == [*range(7, 48, 7), 48, *range(49, 96, 7), 96]


def test_resuming_from_the_middle_drops_later_lines(tmp_path, digits):
    start, step, _ = digits
    options = {"folder": tmp_path, "log_every": 2, "progress": False}
    state, batches = start()
    training.fit(state, step, batches, steps=8, save_every=4, **options)
    shutil.rmtree(tmp_path / "checkpoints" / "00000008")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # as a kill leaves it
    state, batches = start()
    training.fit(state, step, batches, steps=6, resume=True, **options)
    found = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found == [2, 4, 6]


def test_everything_comes_back(tmp_path):
    state = small(step=5)
    config = {"width": 3, "names": ["a", "b"]}
    checkpoint.save(tmp_path, state, iterator={"next_index": 12}, config=config, architecture={"name": "x"})
    found = checkpoint.restore(tmp_path, small())
    same(state, found.state)
    assert found.iterator == {"next_index": 12} and found.config == config
    assert found.architecture == {"name": "x"}
    # The key draws what it would have drawn.
    assert jax.random.uniform(found.state.key) == jax.random.uniform(state.key)
    same(checkpoint.weights(tmp_path, state.params), state.ema)
    same(checkpoint.weights(tmp_path, state.params, ema=False), state.params)
    assert checkpoint.describe(tmp_path)["step"] == 5


def test_network_is_rebuilt_from_its_checkpoint(tmp_path):
    module = networks.MLP(2, width=8, depth=1, condition=networks.label(3), rngs=nnx.Rngs(0))
    apply, params = networks.functional(module)
    state = training.init(jax.random.key(0), params, optax.sgd(0.1))
    checkpoint.save(tmp_path, state, architecture=networks.architecture(apply))
    built = networks.build(checkpoint.describe(tmp_path)["architecture"], nnx.Rngs(5))
    again, others = networks.functional(built)
    assert again == apply
    same(checkpoint.weights(tmp_path, others), params)


@pytest.mark.parametrize("optimiser", [optax.sgd(0.1), optax.adam(0.1), optax.adafactor(0.1)])
def test_any_optimiser_state_comes_back(tmp_path, optimiser):
    state = small(optimiser=optimiser)
    checkpoint.save(tmp_path, state)
    same(state, checkpoint.restore(tmp_path, small(optimiser=optimiser)).state)


def test_checkpoint_moves_between_meshes(tmp_path):
    wide, narrow = training.data_mesh(), training.data_mesh(jax.devices()[:2])
    checkpoint.save(tmp_path, small(mesh=wide))
    for mesh in (narrow, None):
        like = small(mesh=mesh)
        found = checkpoint.restore(tmp_path, like).state
        same(like, found)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_only_the_newest_are_kept_and_rests_are_swept(tmp_path):
    for step, left in ((1, [1]), (2, [1, 2]), (10, [2, 10]), (11, [10, 11]), (3, [3])):
        (tmp_path / "checkpoints" / f"{step:08d}.orbax-checkpoint-tmp-1").mkdir(parents=True)
        checkpoint.save(tmp_path, small(step=step), keep=2)
        assert checkpoint.steps(tmp_path) == left  # saving step 3 leaves the future of 10 and 11
        names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
        assert sorted(names) == [f"{number:08d}" for number in left]


def test_what_others_put_beside_the_checkpoints_stays(tmp_path):
    saved = checkpoint.save(tmp_path, small(step=1))
    for name in ("best", "00000001 before the change"):
        shutil.copytree(saved, saved.with_name(name))
    (saved.parent / "writing-00000002").mkdir()
    checkpoint.save(tmp_path, small(step=3), keep=1)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["00000001 before the change", "00000003", "best"]


# --- damage -----------------------------------------------------------------------------------------------------


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def test_every_kind_of_damage_falls_back_to_the_checkpoint_before(tmp_path):
    """Each file in turn is removed or cut in half."""
    checkpoint.save(tmp_path, small(step=1))
    whole = small(step=2)
    newest = checkpoint.save(tmp_path, whole)
    backup = shutil.copytree(newest, tmp_path / "backup")
    for file in files(backup):
        target = newest / file.relative_to(backup)
        for damage in (
            lambda path: path.unlink(),
            lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        ):
            damage(target)
            with pytest.warns(UserWarning, match=r"00000002 is damaged.*going back to step 1"):
                assert checkpoint.describe(tmp_path)["step"] == 1
            target.write_bytes(file.read_bytes())
    target = newest / "params" / "manifest.ocdbt"
    target.write_bytes(target.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"params/manifest.ocdbt has \d+ bytes of \d+; going back"):
        same(checkpoint.restore(tmp_path, small()).state, small(step=1))
    target.write_bytes((backup / "params" / "manifest.ocdbt").read_bytes())
    same(checkpoint.restore(tmp_path, small()).state, whole)


@pytest.mark.parametrize("place", ["ema", "record.json"])
def test_a_flipped_bit_is_seen(tmp_path, place):
    newest = checkpoint.save(tmp_path, small(step=2))
    target = newest / place
    target = target if target.is_file() else max(files(target), key=lambda file: file.stat().st_size)
    content = bytearray(target.read_bytes())
    if place == "record.json":
        content = bytearray(content.replace(b'"step": 2', b'"step": 3'))
    else:
        content[len(content) // 2] ^= 1
    target.write_bytes(content)
    with pytest.raises(ValueError, match="is not what was written"):
        checkpoint.restore(tmp_path, small())


def test_damage_without_a_fallback_is_a_clear_error(tmp_path):
    checkpoint.save(tmp_path, small(step=1))
    newest = checkpoint.save(tmp_path, small(step=2))
    shutil.rmtree(newest / "optimiser")
    with pytest.raises(ValueError, match="00000002 is damaged"):
        checkpoint.restore(tmp_path, small(), step=2)  # asked for by name: no other will do
    shutil.rmtree(newest.with_name("00000001"))
    with pytest.raises(ValueError, match=r"no checkpoint can be read.*00000002 is damaged.*lacks optimiser/"):
        checkpoint.restore(tmp_path, small())


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, digits):
    start, step, _ = digits
    options = {"folder": tmp_path, "progress": False, "save_every": 2}
    state, batches = start()
    whole = training.fit(state, step, batches, steps=4, **options)
    next((tmp_path / "checkpoints" / "00000004" / "params").rglob("manifest.ocdbt")).unlink()
    good = (tmp_path / "checkpoints" / "00000002").stat().st_ino
    state, batches = start()
    with pytest.warns(UserWarning, match="going back to step 2"):
        training.fit(state, step, batches, steps=3, resume=True, **(options | {"keep": 2}))
    assert checkpoint.steps(tmp_path) == [2, 3]
    assert (tmp_path / "checkpoints" / "00000002").stat().st_ino == good  # never written again
    state, batches = start()
    again = training.fit(state, step, batches, steps=4, resume=True, **options)
    same(whole, again)
    same(checkpoint.restore(tmp_path, start()[0]).state, whole)


# --- errors -----------------------------------------------------------------------------------------------------


def test_missing_folders_and_steps_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run folder .*/nothing"):
        checkpoint.restore(tmp_path / "nothing", small())
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        checkpoint.restore(tmp_path, small())
    checkpoint.save(tmp_path, small(step=3))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 4 .* there are \[3\]"):
        checkpoint.restore(tmp_path, small(), step=4)


def test_another_architecture_is_refused_with_both_shapes(tmp_path, digits):
    checkpoint.save(tmp_path, small(size=4))
    message = r"another architecture.*bias: expected \['float32', 3\], found \['float32', 4\]"
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(tmp_path, small(size=3))
    with pytest.raises(ValueError, match=r"bias: expected .*3\], found .*4\]"):
        checkpoint.weights(tmp_path, small(size=3).params)
    with pytest.raises(ValueError, match=r"another optimiser.*expected none, found"):
        checkpoint.restore(tmp_path, small(size=4, optimiser=optax.sgd(0.1)))
    extra = small(size=4)
    extra = extra._replace(params={**extra.params, "more": jnp.ones(1)})
    with pytest.raises(ValueError, match=r"more: expected \['float32', 1\], found none"):
        checkpoint.restore(tmp_path, extra)


def test_equal_shapes_of_another_architecture_are_refused(tmp_path, digits):
    # The number of heads changes no shape: only the recorded architecture can tell.
    start, step, architecture = digits
    options = {"folder": tmp_path, "progress": False}
    state, batches = start()
    training.fit(state, step, batches, steps=1, architecture=architecture, **options)
    other = {**architecture, "heads": 4}
    state, batches = start()
    with pytest.raises(ValueError, match=r"another architecture: expected .*'heads': 4.* found .*'heads': 2"):
        training.fit(state, step, batches, steps=2, architecture=other, resume=True, **options)


def test_a_used_folder_is_not_overwritten(tmp_path, digits):
    start, step, _ = digits
    checkpoint.save(tmp_path, small(step=3))
    state, batches = start()
    with pytest.raises(ValueError, match=r"has checkpoints of steps \[3\]: pass resume=True"):
        training.fit(state, step, batches, steps=5, folder=tmp_path, progress=False)


def test_what_is_not_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be JSON"):
        checkpoint.save(tmp_path, small(), config={"process": processes.flow()})
    with pytest.raises(ValueError, match="keep must be"):
        checkpoint.save(tmp_path, small(), keep=0)
    assert checkpoint.steps(tmp_path) == []


def test_checkpoints_hold_no_pickles(tmp_path):
    newest = checkpoint.save(tmp_path, small(step=2))
    for file in files(newest):
        assert file.suffix not in (".pkl", ".pickle")
        assert not file.read_bytes().startswith(b"\x80"), f"{file} begins like a pickle"


# --- kills --------------------------------------------------------------------------------------------------------


def launch(folder, steps):
    command = [sys.executable, str(HERE / "killed_run.py"), str(folder), str(steps)]
    return subprocess.Popen(command, cwd=HERE.parent, env=os.environ | {"PYTHONPATH": str(HERE.parent)})


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None or process.returncode == 0, f"exit status {process.returncode}"
        assert time.time() < end, "the run did not get anywhere"
        if process.poll() == 0:
            return
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_at_any_moment_the_run_ends_as_if_undisturbed(tmp_path):
    """SIGKILL at random moments, most of them inside a save; then the run is finished and compared."""
    steps, chance = 120, random.Random(0)
    folder = tmp_path / "killed"
    for _ in range(4):
        before = max(checkpoint.steps(folder), default=-1)
        process = launch(folder, steps)
        wait_for(lambda before=before: max(checkpoint.steps(folder), default=-1) > before, process)
        time.sleep(chance.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert checkpoint.steps(folder), "a complete checkpoint must remain"
    assert max(checkpoint.steps(folder)) < steps, "the kills came too late to mean anything"
    assert launch(folder, steps).wait() == 0
    assert launch(tmp_path / "undisturbed", steps).wait() == 0
    like = {"matrix": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    like = training.init(jax.random.key(5), like, training.adam())
    ends = [checkpoint.restore(place, like) for place in (folder, tmp_path / "undisturbed")]
    same(ends[0].state, ends[1].state)
    assert ends[0].iterator == ends[1].iterator == {"next_index": steps}
    assert int(ends[0].state.step) == steps
    lines = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, steps + 1))


@pytest.mark.slow
def test_sigterm_saves_the_step_it_is_at(tmp_path):
    process = launch(tmp_path / "run", 100000)
    wait_for(lambda: max(checkpoint.steps(tmp_path / "run"), default=-1) >= 2, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == max(checkpoint.steps(tmp_path / "run"))
