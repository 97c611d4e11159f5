"""Compile time must not grow with the number of steps: 10 against 1000. `python -m benchmarks.compiling`."""

from __future__ import annotations

import json
import statistics
import time

import jax
import jax.numpy as jnp

import diffjax
from benchmarks.problem import COVARIANCES, MEANS, WEIGHTS
from benchmarks.timing import save


def compile_seconds(solver, steps: int) -> float:
    """Tracing, lowering and compiling, with nothing cached."""
    jax.clear_caches()
    mixture = diffjax.oracles.mixture(WEIGHTS, MEANS, COVARIANCES)
    grid = diffjax.grids.log_snr(diffjax.processes.vp(), steps)

    def draw(key):
        return diffjax.sample(key, mixture, solver, grid, shape=(2,)).x

    keys = jax.random.split(jax.random.key(0), 16)
    start = time.perf_counter()
    jax.jit(jax.vmap(draw)).lower(keys).compile()
    return time.perf_counter() - start


def main(rounds: int = 7) -> dict:
    """Measure, save and print."""
    jax.config.update("jax_enable_compilation_cache", False)
    jnp.zeros(1).block_until_ready()
    measured = {}
    for name in ("ddim", "dpmpp", "ancestral", "heun"):
        solver = getattr(diffjax.solvers, name)()
        turns = [(compile_seconds(solver, 10), compile_seconds(solver, 1000)) for _ in range(rounds)]
        short, long = (statistics.median(column) for column in zip(*turns, strict=True))
        ratio = statistics.median(b / a for a, b in turns)
        measured[name] = {"seconds at 10": round(short, 3), "seconds at 1000": round(long, 3), "ratio": round(ratio, 3)}
    return save("compiling", measured)


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
