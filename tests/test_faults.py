"""What can go wrong beside a training: full disks, folders that cannot be written, slow disks, other configurations."""

import ast
import errno
import os
import resource
import threading
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import diffjax
from diffjax import training
from diffjax.data import toy
from diffjax.training import checkpoint
from tests import killed_run

QUIET = {"progress": False, "save_every": 2}


def batches(size=8):
    return toy.stream(toy.moons, jax.random.key(1), size)


@pytest.fixture(scope="module")
def step():
    prediction = diffjax.predictions.flow(diffjax.processes.flow())
    return training.train_step(training.denoising(prediction, killed_run.apply), killed_run.OPTIMISER)


@pytest.fixture(scope="module")
def whole(step):
    """The parameters after eight undisturbed steps."""
    return training.fit(killed_run.start(), step, batches(), steps=8, progress=False).params


def large(number, size=100_000):
    """A state of incompressible arrays."""
    params = {"noise": jax.random.normal(jax.random.key(number), (size,))}
    state = training.init(jax.random.key(0), params, optax.sgd(0.1))
    return state._replace(step=state.step + number)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@contextmanager
def full_disk(size):
    """No file may grow beyond a size: what the system says is not ENOSPC, but it says it in the same places."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_error_that_says_what_is_left(tmp_path):
    checkpoint.save(tmp_path, large(1))
    with (
        full_disk(50_000),
        pytest.raises(OSError, match=r"00000002 could not be written, the newest is that of step 1"),
    ):
        checkpoint.save(tmp_path, large(2))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000001"]  # no rest takes up space
    same(checkpoint.restore(tmp_path, large(5)).state.params, large(1).params)
    checkpoint.save(tmp_path, large(2))
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_a_disk_that_fills_up_stops_the_run_which_can_be_resumed(tmp_path, step, whole, monkeypatch):
    commit = checkpoint._commit

    def fails(draft, path, record):
        if record["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        commit(draft, path, record)

    monkeypatch.setattr(checkpoint, "_commit", fails)
    with pytest.raises(OSError, match=r"00000004 could not be written.* step 2: .*No space left"):
        training.fit(killed_run.start(), step, batches(), steps=8, folder=tmp_path, **QUIET)
    assert checkpoint.steps(tmp_path) == [0, 2]
    monkeypatch.undo()
    ended = training.fit(killed_run.start(), step, batches(), steps=8, folder=tmp_path, resume=True, **QUIET)
    same(ended.params, whole)


def test_a_disk_that_fails_at_the_very_end_is_not_passed_over(tmp_path, step, monkeypatch):
    commit = checkpoint._commit

    def fails(draft, path, record):
        if record["step"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        commit(draft, path, record)

    monkeypatch.setattr(checkpoint, "_commit", fails)
    with pytest.raises(OSError, match="00000001 could not be written, the newest is that of step 0"):
        training.fit(killed_run.start(), step, batches(), steps=1, folder=tmp_path, **QUIET)


@contextmanager
def nobody():
    """The superuser may write anywhere: be somebody else."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_folder_that_cannot_be_written_is_an_error_before_the_work(tmp_path, step):
    def never(state, batch):
        raise AssertionError("a step was made")

    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        training.fit(killed_run.start(), never, batches(), steps=2, folder=tmp_path / "file", **QUIET)
    (tmp_path / "closed").mkdir(mode=0o555)
    with nobody(), pytest.raises(PermissionError, match="closed"):
        training.fit(killed_run.start(), never, batches(), steps=2, folder=tmp_path / "closed" / "run", **QUIET)


def test_one_checkpoint_is_written_at_a_time_and_of_the_state_as_it_was(tmp_path, step, monkeypatch):
    """A slow disk: training goes on, the second checkpoint waits for the first, and both are of their own step."""
    released, commit = threading.Event(), checkpoint._commit

    def slow(draft, path, record):
        assert released.wait(60)
        commit(draft, path, record)

    monkeypatch.setattr(checkpoint, "_commit", slow)
    state, feed = killed_run.start(), batches()
    with checkpoint.Writer(tmp_path) as writer:
        expected = [jax.device_get(state.params)]
        writer.save(state)
        for _ in range(3):
            state, _ = step(state, next(feed))  # reuses the memory of what is being written
        assert checkpoint.steps(tmp_path) == []
        expected.append(jax.device_get(state.params))
        second = threading.Thread(target=writer.save, args=(state,))
        second.start()
        second.join(0.3)
        assert second.is_alive()
        released.set()
        second.join(60)
        state, _ = step(state, next(feed))
    assert checkpoint.steps(tmp_path) == [0, 3]
    for number, params in zip((0, 3), expected, strict=True):
        same(checkpoint.restore(tmp_path, killed_run.start(), step=number).state.params, params)


def test_what_a_resumed_run_must_not_change_is_refused_and_the_rest_goes_on(tmp_path, step, whole):
    options = {"folder": tmp_path, "fixed": ("seed",), **QUIET}
    training.fit(killed_run.start(), step, batches(), steps=4, config={"seed": 0, "note": "a"}, **options)
    again = {"steps": 8, "resume": True, **options}
    with pytest.raises(ValueError, match="another configuration: expected seed=1, found 0"):
        training.fit(killed_run.start(), step, batches(), config={"seed": 1, "note": "a"}, **again)
    with pytest.raises(ValueError, match=r"batch is not that of the checkpoint.*expected \[\['float32', 8, 2\].*16, 2"):
        training.fit(killed_run.start(), step, batches(16), config={"seed": 0, "note": "b"}, **again)
    ended = training.fit(killed_run.start(), step, batches(), config={"seed": 0, "note": "b"}, **again)
    same(ended.params, whole)


def test_nothing_that_is_loaded_can_execute_code():
    """No module reads pickles or evaluates text, and NumPy is told not to."""
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"}
    for file in Path(diffjax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not forbidden & {name.partition(".")[0] for name in names}, file
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load"), file
                if called in ("np.load", "numpy.load", "jnp.load"):
                    assert "allow_pickle=False" in ast.unparse(node), file
