"""Bulk sampling: what it writes does not depend on chunks, devices or interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, oracles, processes, sample, sample_many, solvers
from diffjax.levels import is_traced
from diffjax.samplers import many

KEY = jax.random.key(7)
ORACLE = oracles.gaussian(np.array([0.5, -0.3]), 0.6)
GRID = grids.uniform(processes.vp(), 3, stop=0.1)


def draw(key):
    return sample(key, ORACLE, solvers.ddim(1.0), GRID, shape=(2,))


def normal(key, shift):
    return {"x": jax.random.normal(key, (3,)) + shift, "key": jax.random.key_data(key)}


@pytest.mark.parametrize(("chunk", "count"), [(1, 1), (5, 13), (100, 13), (8, 16)])
def test_chunks_and_devices_change_nothing(chunk, count, tmp_path):
    """Sample i is the draw of fold_in(key, i), on one device or eight, in memory or on disk."""
    one = sample_many(KEY, draw, count, chunk=chunk, devices=jax.devices()[:1])
    eight = sample_many(KEY, draw, count, chunk=chunk, path=tmp_path)
    alone = [draw(jax.random.fold_in(KEY, i)).x for i in range(min(count, 3))]
    assert one.x.shape == (count, 2) and one.nfe == eight.nfe == 3 * count and len(one.failed) == 0
    np.testing.assert_allclose(one.x, eight.x, rtol=1e-6)
    np.testing.assert_allclose(one.x[: len(alone)], alone, rtol=1e-6)
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npy"), eight.x)


def test_conditions_trees_and_failures():
    """Sample i sees condition i; a tree of arrays comes back; samples that are not finite are named."""
    shift = np.arange(11.0, dtype=np.float32)
    shift[[2, 9]] = np.nan
    found = sample_many(KEY, normal, 11, shift, chunk=4)
    np.testing.assert_array_equal(found.failed, [2, 9])
    own = normal(jax.random.fold_in(KEY, 5), shift[5])
    np.testing.assert_allclose(found.x["x"][5], own["x"], rtol=1e-6)
    np.testing.assert_array_equal(found.x["key"][5], own["key"])


class Stop(Exception):
    """An interruption."""


def test_resume_after_an_exception(tmp_path, monkeypatch):
    """What was complete is not drawn again, also with another chunk, and the result is that of an undisturbed run."""
    inner, drawn = many._draw_chunk, []

    def interrupted(draw, keys, condition):
        if len(drawn) == 2:
            raise Stop
        return counted(draw, keys, condition)

    def counted(draw, keys, condition):
        if not is_traced(keys):  # a traced call only looks at the shapes
            drawn.append(keys.shape[0])
        return inner(draw, keys, condition)

    with monkeypatch.context() as patch:
        patch.setattr(many, "_draw_chunk", interrupted)
        with pytest.raises(Stop):
            sample_many(KEY, draw, 40, chunk=8, path=tmp_path)
    assert json.loads((tmp_path / "journal.json").read_text())["done"] == [[0, 8], [8, 16]]
    drawn.clear()
    monkeypatch.setattr(many, "_draw_chunk", counted)
    resumed = sample_many(KEY, draw, 40, chunk=16, path=tmp_path)
    assert drawn == [16, 16]
    whole = sample_many(KEY, draw, 40, chunk=8)
    np.testing.assert_allclose(resumed.x, whole.x, rtol=1e-6)
    assert resumed.nfe == whole.nfe == 120
    drawn.clear()
    again = sample_many(KEY, draw, 40, chunk=8, path=tmp_path)
    assert not drawn and again.nfe == 120
    # a hole in the middle, which a chunk that covers it must not miss
    journal = json.loads((tmp_path / "journal.json").read_text())
    (tmp_path / "journal.json").write_text(json.dumps({**journal, "done": [[0, 8], [16, 40]]}))
    np.lib.format.open_memmap(tmp_path / "samples.npy", mode="r+")[8:16] = 0
    np.testing.assert_allclose(sample_many(KEY, draw, 40, chunk=40, path=tmp_path).x, whole.x, rtol=1e-6)


SCRIPT = """
import sys, time, jax, numpy as np
from diffjax import sample_many

def draw(key):
    jax.debug.callback(lambda: time.sleep(0.02))
    return jax.random.normal(key, (2,))

sample_many(jax.random.key(7), draw, 4000, chunk=8, devices=jax.devices()[:1], path=sys.argv[1])
"""


def test_resume_after_sigkill(tmp_path):
    """Killed at any moment, the folder holds whole chunks that a second run keeps."""
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment)
    journal = tmp_path / "journal.json"
    try:
        for _ in range(600):
            if journal.exists() and len(json.loads(journal.read_text())["done"]) >= 3:
                break
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = json.loads(journal.read_text())["done"]
    assert 3 <= len(done) < 500
    before = np.load(tmp_path / "samples.npy")[: done[-1][1]]
    resumed = sample_many(KEY, lambda key: jax.random.normal(key, (2,)), 4000, chunk=1000, path=tmp_path)
    np.testing.assert_array_equal(resumed.x[: len(before)], before)
    expected = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(KEY, i), (2,)))(jnp.arange(4000))
    np.testing.assert_allclose(resumed.x, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"key": jax.random.key(8)}, "key"),
        ({"count": 11}, "count"),
        ({"draw": lambda key, c: jnp.zeros(4)}, "leaves"),
        ({"condition": np.ones(10, np.float32)}, "condition"),
    ],
    ids=["key", "count", "shape", "condition"],
)
def test_a_folder_of_other_samples_is_refused(tmp_path, other, named):
    call = {"key": KEY, "draw": lambda key, c: jax.random.normal(key, (3,)) + c, "count": 10}
    condition = np.zeros(10, np.float32)
    sample_many(**call, condition=condition, path=tmp_path)
    if "count" in other:
        condition = np.zeros(11, np.float32)
    with pytest.raises(ValueError, match=named):
        sample_many(**{**call, "condition": condition, **other}, path=tmp_path)


def test_a_folder_of_other_parameters_is_refused(tmp_path):
    drawn = lambda scale: jax.tree_util.Partial(lambda scale, key: scale * jax.random.normal(key, (3,)), scale)
    first = sample_many(KEY, drawn(np.float32(1.0)), 4, path=tmp_path)
    np.testing.assert_array_equal(sample_many(KEY, drawn(np.float32(1.0)), 4, path=tmp_path).x, first.x)
    with pytest.raises(ValueError, match="draw"):
        sample_many(KEY, drawn(np.float32(2.0)), 4, path=tmp_path)


def test_returned_samples_are_not_the_files(tmp_path):
    """Changing them in place changes nothing on disk, whether they were just drawn or read."""
    first = sample_many(KEY, draw, 4, path=tmp_path).x
    before = np.array(first)
    first += 1
    again = sample_many(KEY, draw, 4, path=tmp_path).x
    np.testing.assert_array_equal(again, before)
    again *= 2
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npy"), before)


def test_a_dtype_that_the_file_format_does_not_know(tmp_path):
    half = lambda key: jax.random.normal(key, (3,)).astype(jnp.bfloat16)
    first, again = (sample_many(KEY, half, 4, path=tmp_path).x for _ in range(2))
    assert first.dtype == again.dtype == jnp.bfloat16
    np.testing.assert_array_equal(first, again)


def test_files_of_another_origin_are_not_overwritten(tmp_path):
    np.save(tmp_path / "samples.npy", np.arange(3))
    with pytest.raises(ValueError, match="without a journal"):
        sample_many(KEY, draw, 4, path=tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npy"), np.arange(3))


def test_refused():
    for bad, named in (({"count": 0}, "count"), ({"chunk": 0}, "chunk"), ({"condition": np.zeros(4)}, "condition")):
        with pytest.raises(ValueError, match=named):
            sample_many(**{"key": KEY, "draw": draw, "count": 5, **bad})


def test_progress(capsys):
    sample_many(KEY, draw, 20, chunk=8, progress=True)
    assert "3/3" in capsys.readouterr().err
