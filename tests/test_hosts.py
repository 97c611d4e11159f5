"""Two processes of four devices each train as one of eight; what both saved one process takes up, on any mesh."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from diffjax import data, devices, training
from experiments import digits

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
STEPS = 150
OPTIONS = digits.Options(
    steps=STEPS, batch=16, learning_rate=1e-3, channels=(8,), save_every=1000, log_every=1, mesh="data=8"
)


class Runs(NamedTuple):
    folder: Path  # of two processes, of which the second was told to stop
    codes: list[int]
    output: list[str]
    losses: dict[int, float]  # of one process, by the step


def launch(folder, process, port, output):
    """One of two processes, with the options above."""
    flags = ["--steps", STEPS, "--batch", 16, "--learning-rate", 1e-3, "--channels", 8, "--save-every", 1000]
    flags += ["--log-every", 1, "--mesh", "data=4,fsdp=2", "--out", folder]
    flags += ["--coordinator", f"localhost:{port}", "--processes", 2, "--process", process]
    four = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "experiments.digits", *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | four, stdout=output, stderr=subprocess.STDOUT)


def lines(folder):
    file = folder / "metrics.jsonl"
    whole = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in whole if line.endswith("\n")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("hosts")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    outputs = [(place / f"{process}.txt").open("w+") for process in range(2)]
    processes = [launch(place / "two", process, port, outputs[process]) for process in range(2)]
    try:
        end = time.time() + 900
        while len(lines(place / "two")) < 12 and all(process.poll() is None for process in processes):
            assert time.time() < end, "the processes did not get anywhere"
            time.sleep(0.02)
        processes[1].send_signal(signal.SIGTERM)  # to one of them
        codes = [process.wait(timeout=400) for process in processes]
    finally:
        for process, output in zip(processes, outputs, strict=True):
            process.kill()
            process.wait()
            output.close()
    found = [Path(output.name).read_text() for output in outputs]
    return Runs(place / "two", codes, found, trained(place / "one"))


def trained(folder, resume=False):
    """The losses of the run in this process, by the step."""
    losses = {}
    report = lambda step, line: losses.update({step: line["loss"]})
    digits.train(dataclasses.replace(OPTIONS, out=folder), data.load("digits", "train"), resume, report)
    return losses


def test_preemption_of_one_process_saves_in_all_and_exits_cleanly(runs):
    assert runs.codes == [0, 0], "\n".join(runs.output)
    found = training.checkpoint.steps(runs.folder)
    assert found[0] == 0 and 12 <= found[-1] < STEPS and len(found) == 2
    assert all(f"SIGTERM: saved step {found[-1]}" in output for output in runs.output)


def test_the_losses_are_those_of_one_process_and_written_once(runs):
    found = lines(runs.folder)
    assert [line["step"] for line in found] == list(range(1, training.checkpoint.steps(runs.folder)[-1] + 1))
    expected = [runs.losses[line["step"]] for line in found]
    np.testing.assert_allclose([line["loss"] for line in found][:12], expected[:12], rtol=1e-5)


def test_one_process_takes_up_what_two_have_saved(runs):
    """On one device and on two meshes the same arrays; and the run ends as the undisturbed one of one process."""
    like = digits.load(runs.folder).params  # whole, on one device
    for description in ("data=8", "fsdp=8", "data=2,fsdp=4"):
        mesh = devices.mesh(description)
        spread = devices.put(like, mesh, devices.fsdp(64))
        found = training.checkpoint.weights(runs.folder, spread)
        assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(found)) == ("fsdp" in description)
        jax.tree.map(np.testing.assert_array_equal, devices.gathered(found), like)
    saved = training.checkpoint.steps(runs.folder)[-1]
    losses = trained(runs.folder, resume=True)
    assert list(losses) == list(range(saved + 1, STEPS + 1))
    # Parameters are not compared: those without effect, such as biases of keys, follow the rounding of their gradient.
    np.testing.assert_allclose(list(losses.values())[:12], [runs.losses[step] for step in losses][:12], rtol=1e-5)
    np.testing.assert_allclose(losses[STEPS], runs.losses[STEPS], rtol=1e-3)
    assert training.checkpoint.steps(runs.folder)[-1] == STEPS


def test_a_run_of_another_configuration_is_not_taken_up(runs):
    options = dataclasses.replace(OPTIONS, batch=8, out=runs.folder)
    with pytest.raises(ValueError, match="another configuration: expected batch=8, found 16"):
        digits.train(options, data.load("digits", "train"), resume=True)
