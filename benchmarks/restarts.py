"""Kill a training run at random moments, fifty times, and compare its end with that of an undisturbed run.

`python -m benchmarks.restarts`. The run saves after every step; every life of it is killed (SIGKILL) within the few
steps after its first new checkpoint, so that most kills hit a save. Children are forked from a process that has
imported everything and touched no device.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.timing import save
from diffjax.training import checkpoint
from tests import killed_run


def life(folder: str, steps: int, output: str) -> None:
    """A run, or what is left of it, in a process of its own."""
    with open(output, "a") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    killed_run.main(folder, steps)


def newest(folder: Path) -> int:
    """The step of the newest complete checkpoint."""
    return max(checkpoint.steps(folder), default=-1)


def main(kills: int = 50, steps: int = 400) -> dict:
    """Kill, finish, compare; saves and returns what happened."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.killed_run"])
    chance, begin, hit = random.Random(0), time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as place:
        killed, whole, output = (Path(place) / name for name in ("killed", "undisturbed", "stderr"))
        for _ in range(kills):
            process = context.Process(target=life, args=(str(killed), steps, str(output)))
            process.start()
            until = newest(killed) + chance.randint(1, 6)
            while newest(killed) < until and process.is_alive():
                time.sleep(0.002)
            time.sleep(chance.uniform(0.0, 0.1))
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL, f"the run ended by itself: {output.read_text()}"
            hit += any(checkpoint.REST.match(path.name) for path in (killed / "checkpoints").iterdir())
        last = newest(killed)
        for folder in (killed, whole):
            process = context.Process(target=life, args=(str(folder), steps, str(output)))
            process.start()
            process.join()
            assert process.exitcode == 0, output.read_text()
        ends = [checkpoint.restore(folder, killed_run.start()) for folder in (killed, whole)]
        lines = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    a, b = (jax.tree.map(np.asarray, end.state._replace(key=jax.random.key_data(end.state.key))) for end in ends)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert ends[0].iterator == ends[1].iterator and lines == list(range(1, steps + 1))
    found = {
        "kills": kills,
        "steps": steps,
        "steps_at_the_last_kill": last,
        "kills_inside_a_save": hit,
        "largest_difference": max(
            jax.tree.leaves(jax.tree.map(lambda x, y: float(np.max(np.abs(x - y))), a.params, b.params))
        ),
        "seconds": round(time.perf_counter() - begin, 1),
    }
    save("restarts", found)
    return found


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
