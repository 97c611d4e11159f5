"""What a structured process costs beside the plain one: `sample` of the digits U-Net, 50 steps of DDIM, one batch.

Coloured noise, and a clock for every mode (`modal`, `blurred`), in the basis where they are diagonal; the last is
also measured with the cosine transforms there and back around each call of the network.
`python -m benchmarks.structured`
"""

from __future__ import annotations

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import diffjax
from benchmarks.timing import interleaved, save
from diffjax import coordinates, processes
from diffjax.networks import UNet, functional, label

STEPS, BATCH, SHAPE = 50, 64, (8, 8, 1)


def contestants() -> dict:
    """Processes by name."""
    base, cosines = processes.cosine(), coordinates.dct()
    blurred = processes.blurred(base, cosines.frequencies(SHAPE), blur=3.0)
    distance = np.abs(np.arange(8)[:, None] - np.arange(8))
    return {
        "plain": base,
        "coloured": processes.coloured(base, np.exp(-0.5 * distance), 0),
        "modal": processes.modal((base, processes.vp()), np.indices(SHAPE).sum(0) % 2),
        "blurred, in its basis": blurred,
        "blurred, with cosine transforms": processes.changed(blurred, cosines),
    }


def main(seconds: float = 30.0) -> dict:
    """Measure, save and print."""
    apply, params = functional(UNet(SHAPE, condition=label(10), rngs=nnx.Rngs(0)))
    keys = jax.random.split(jax.random.key(0), BATCH)
    condition = jnp.arange(BATCH) % 10

    def made(process):
        grid = diffjax.grids.times(process, np.linspace(1, 0, STEPS + 1))
        prediction = diffjax.predictions.velocity(process)

        def draw(params, key, condition):
            denoise = prediction.decode(apply, params, condition)
            return diffjax.sample(key, denoise, diffjax.solvers.ddim(), grid, shape=SHAPE).x

        return jax.jit(lambda p, k, c: jax.vmap(draw, (None, 0, 0))(p, k, c))

    runs = {name: made(process) for name, process in contestants().items()}
    before = os.getloadavg()[0]
    found = interleaved({n: (lambda f=f: f(params, keys, condition)) for n, f in runs.items()}, seconds, rounds=7)
    measured = {
        "steps": STEPS,
        "batch": BATCH,
        "load average before and after": [round(before, 1), round(os.getloadavg()[0], 1)],
        "milliseconds": {name: round(1e3 * value, 2) for name, value in found.items()},
        "over the plain process": {name: round(value / found["plain"], 3) for name, value in found.items()},
    }
    return save("structured", measured)


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
