"""Runs of experiments: configuration, logs and resumption, for every experiment that is found in the folder."""

import ast
import dataclasses
import importlib
import inspect
import itertools
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from experiments import __main__ as listing
from experiments import _results, _run

EXPERIMENTS = [entry.name for entry in listing.entries()]


class Killed(BaseException):
    """What a kill looks like from inside."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Three numbers."""

    steps: int = 3
    """How many."""
    seed: int = 0
    """Seed."""
    out: Path = Path("runs/toy")
    """Output folder."""


def toy(arguments, kill=None, made=None, die=lambda: None):
    """An experiment of ``steps`` parts, killed in the one with number ``kill``."""
    with _run.start(Options, arguments, may_change=("steps",)) as run:
        key = jax.random.key(run.options.seed)

        def part(i):
            if i == kill:
                run.log(0, lost=1.0)
                die()
            run.log(i, value=i)
            if made is not None:
                made.append(i)
            return {"x": jax.random.normal(jax.random.fold_in(key, i), (2,)), "i": (i, float("nan"))}

        found = [run.part(f"part {i}", lambda i=i: part(i)) for i in run.over(range(run.options.steps), "parts")]
        (run.out / "result.txt").write_text(repr(found))
        return found


def events(folder):
    """The scalars in TensorBoard files: a record is its length, a checksum, the event and its checksum."""
    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        raw, start = file.read_bytes(), 0
        while start < len(raw):
            (size,) = struct.unpack("<Q", raw[start : start + 8])
            event = Event.FromString(raw[start + 12 : start + 12 + size])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            start += 16 + size
    return found


def test_results_come_back_as_they_were(tmp_path):
    file, config = tmp_path / "parts" / "a.json", {"seed": 1}
    result = {
        "a": [1, 2.5, None, "x", True, (1, (2,))],
        2.0: {1: "one"},
        "$array": float("inf"),
        "arrays": {"x": jnp.arange(3.0), "y": np.eye(2, dtype=np.int8), "z": np.float32(0.1)},
    }
    _results.write(file, result, config, {"seconds": 1.0})
    for found in (_results.read(file, config)[0], _results.plain(result)):
        assert found["a"] == result["a"] and found[2.0] == {1: "one"} and found["$array"] == float("inf")
        assert found["arrays"]["x"].dtype == np.float32 and found["arrays"]["y"].dtype == np.int8
        np.testing.assert_array_equal(found["arrays"]["x"], [0, 1, 2])
        assert found["arrays"]["z"] == float(np.float32(0.1))
    assert _results.read(file, {"seed": 2}) is None  # of another configuration
    file.with_suffix(".npz").unlink()
    assert _results.read(file, config) is None


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, np.array([object()]), jnp.ones(2, jnp.bfloat16), _run.Clock(), Options(), struct.Struct("<Q")],
)
def test_results_that_would_not_come_back_are_refused(tmp_path, value):
    with pytest.raises(TypeError, match=r"a part's result"):
        _results.write(tmp_path / "a.json", {"a": value}, {}, {})
    assert not list(tmp_path.iterdir())


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path, capsys):
    def die():
        raise Killed

    made, killed, whole = [], tmp_path / "killed", tmp_path / "whole"
    for kill in (0, 1, 2, 2):
        with pytest.raises(Killed):
            toy(["--out", str(killed), "--resume"], kill, made, die)
        assert not (killed / "result.txt").exists()
    with (killed / "log.jsonl").open("a") as file:
        file.write('{"part": "part 2", "st')  # the kill came in the middle of a line
    assert made == [0, 1]  # each once
    found = toy(["--out", str(killed), "--resume"], made=made)
    assert made == [0, 1, 2]
    assert repr(found) == repr(toy(["--out", str(whole)]))
    for name in ("result.txt", "config.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    lines = [json.loads(line) for line in (killed / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["finished"]
    values = {(line["part"], line["step"]): line["value"] for line in lines if "value" in line}
    assert values == {(f"part {i}", i): i for i in range(3)}
    scalars = events(killed)
    assert len(scalars) == len(set(scalars))
    expected = {(f"part_{i}/value", i, i) for i in range(3)}  # TensorBoard has no blanks in tags
    assert {scalar for scalar in scalars if "value" in scalar[0]} == expected == set(events(whole))
    output = capsys.readouterr()
    assert "steps: 3" in output.out and "seed: 0" in output.out and "3/3" in output.err


def test_sigkill_leaves_what_was_finished(tmp_path):
    """The real signal, in a process of its own, with arrays half written when it comes."""
    program = (
        "import os, signal, numpy as np; from experiments import _results; from tests import test_runs as t\n"
        "save = np.savez\n"
        "def cut(stream, **arrays):\n"
        "    save(stream, **arrays)\n"
        "    if stream.name.count('part-1'): stream.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        f"np.savez = cut; t.toy(['--out', {str(tmp_path)!r}])"
    )
    root = Path(_run.__file__).parents[1]
    status = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True).returncode
    assert status == -signal.SIGKILL
    made = []
    found = toy(["--out", str(tmp_path), "--resume"], made=made)
    assert made == [1, 2] and len(found) == 3
    assert not list((tmp_path / "parts").glob("*.tmp*"))


def test_runs_that_do_not_fit_the_folder_are_refused(tmp_path):
    out = ["--out", str(tmp_path / "run")]
    toy([*out, "--resume"])  # there is nothing yet: from the start
    with pytest.raises(SystemExit, match="a finished run: add --resume"):
        toy(out)
    with pytest.raises(SystemExit, match="seed is 0 there and 1 here"):
        toy([*out, "--seed", "1", "--resume"])
    with pytest.raises(SystemExit, match="exclude"):
        toy([*out, "--restart", "--resume"])
    assert len(toy([*out, "--steps", "4", "--resume"])) == 4  # this may change: the parts are made again
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["options"] == {"steps": 4, "seed": 0} and config["versions"]["jax"] == jax.__version__
    mine = tmp_path / "run" / "notes.txt"
    mine.write_text("not of the run")
    made = []
    toy([*out, "--seed", "1", "--restart"], made=made)
    assert made == [0, 1, 2] and mine.exists()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"experiment": "digits"}))
    with pytest.raises(SystemExit, match=r"experiments.digits, not of experiments.test_runs"):
        toy([*out, "--resume"])
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(SystemExit, match="cannot be read"):
        toy([*out, "--resume"])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="cannot be written"):
        toy(["--out", str(tmp_path / "file" / "run")])


def test_names_of_parts_do_not_meet():
    names = ["a b", "a-b", "a/b", "a b ", "../a", "α", "curve of ddim", "."]
    assert len({_run.slug(name) for name in names}) == len(names)
    assert all(os.sep not in _run.slug(name) and not _run.slug(name).startswith(".") for name in names)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_what_a_run_needs(name, capsys):
    module = importlib.import_module(f"experiments.{name}")
    fields = dataclasses.fields(module.Options)
    assert module.Options.__dataclass_params__.frozen and {"out"} <= {field.name for field in fields}
    assert not {"resume", "restart"} & {field.name for field in fields}  # these come from the run
    assert module.Options().out == Path("runs") / name
    assert isinstance(module.TINY, tuple) and all(isinstance(word, str) for word in module.TINY)
    assert list(inspect.signature(module.main).parameters) == ["arguments"]
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--resume" in text and "--out" in text
    body = ast.parse(inspect.getsource(module.Options)).body[0].body
    silent = [
        field.target.id
        for field, after in itertools.zip_longest(body, body[1:])
        if isinstance(field, ast.AnnAssign) and not (isinstance(after, ast.Expr) and after.value.value)
    ]
    assert not silent  # every option says what it is
