"""Sequential Monte Carlo: 100 steps on the 2-D mixture against PyTorch, and what resampling costs beside a network.

`python -m benchmarks.steering`; with `--peers PYTHON`, a Python that has torch, the same operations there
(`benchmarks/peers/steering.py`), on one thread each and in turns with ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import diffjax
from benchmarks.problem import COVARIANCES, MEANS, WEIGHTS
from benchmarks.timing import interleaved, save
from diffjax import smc
from diffjax.networks import UNet, functional, label

STEPS, TURNS = 100, 5


def log_likelihood(x0):
    """Of a measurement of the first entry."""
    return -0.5 * (0.5 - x0[0]) ** 2 / 0.2


def ours(particles: int, grid: diffjax.Grid):
    """A call that steers and waits."""
    law = diffjax.oracles.mixture(WEIGHTS, MEANS, COVARIANCES)
    twist, solver = smc.reward(log_likelihood), diffjax.solvers.ancestral()
    run = jax.jit(
        lambda key: diffjax.steer(key, law, solver, grid, (2,), particles=particles, twist=twist, proposal="base")
    )
    key = jax.random.key(0)  # made once, as the peer seeds its generator once
    return lambda: jax.block_until_ready(run(key))


def theirs(python: str, particles: int, grid: diffjax.Grid, runs: int) -> dict:
    """The peer's median, on the same levels and coefficients."""
    rows = diffjax.solvers.ancestral().plan(grid)
    numbers = np.stack([rows.t.alpha, rows.t.sigma, *rows.coefficients.out], axis=1)
    script = Path(__file__).parent / "peers" / "steering.py"
    output = subprocess.run(
        [python, str(script), str(particles), str(runs)],
        input=json.dumps(numbers.tolist()),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(output.stdout.splitlines()[-1])


def resampling(particles: int = 64) -> dict:
    """The digits U-Net for all particles, and resampling them: weights, ancestors, and the states that move."""
    apply, params = functional(UNet((8, 8, 1), condition=label(10), rngs=nnx.Rngs(0)))
    process = diffjax.processes.flow()
    denoise = diffjax.predictions.flow(process).decode(apply, params, jnp.int32(3))
    level = jax.tree.map(jnp.float32, process.level(0.5))
    x = jax.random.normal(jax.random.key(0), (particles, 8, 8, 1))
    logs = jax.random.normal(jax.random.key(1), (particles,))
    call = jax.jit(jax.vmap(lambda x: denoise(x, level)))

    @jax.jit
    def resample(key, x, logs):
        ancestors = smc.systematic()(key, logs)
        moved = x[ancestors], x[ancestors], logs[ancestors]  # states, clean estimates, what has been paid
        return moved, smc.effective_size(logs), smc.log_mean(logs)

    seconds = interleaved({"step": lambda: call(x), "resampling": lambda: resample(jax.random.key(0), x, logs)})
    return {"particles": particles, "share": round(seconds["resampling"] / seconds["step"], 4)}


def main(peers: str | None = None) -> dict:
    """Measure, save and print."""
    grid = diffjax.grids.log_snr(diffjax.processes.vp(), STEPS)
    measured: dict = {"resampling beside the digits U-Net": resampling()}
    for particles in (4, 4096):
        run = ours(particles, grid)
        run()
        calls, mine, other = (400, [], []) if particles == 4 else (20, [], [])
        for _ in range(TURNS):  # in turns, so that a slow spell hits both
            start = time.perf_counter()
            for _ in range(calls):
                run()
            mine.append((time.perf_counter() - start) / calls)
            if peers is not None:
                other.append(theirs(peers, particles, grid, 10)["seconds"])
        row = {"diffjax ms": round(1e3 * statistics.median(mine), 3)}
        if peers is not None:
            row["PyTorch ms"] = round(1e3 * statistics.median(other), 2)
            row["ratio"] = round(statistics.median(b / a for a, b in zip(mine, other, strict=True)), 2)
        measured[f"{particles} particles"] = row
    return save("steering", measured)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", help="a Python with torch")
    print(json.dumps(main(parser.parse_args().peers), indent=1))
