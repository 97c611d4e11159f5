"""What a log-density of the digits U-Net costs, in denoiser calls: exact divergence, Hutchinson, and 64 plain products.

One stage of the flow is timed for a batch; a likelihood of N digits by S steps of a method of k stages is N S k times
the cost of a digit's stage.  `python -m benchmarks.likelihood --batch 32`
"""

from __future__ import annotations

import argparse
import json
import os

import jax
import jax.numpy as jnp
from flax import nnx
from jax.flatten_util import ravel_pytree

import diffjax
from benchmarks.timing import interleaved, save
from diffjax import likelihood
from diffjax.networks import UNet, count, functional, label

SHAPE = (8, 8, 1)
SIZE = 64
PROCESS = diffjax.processes.flow()
DIGITS, STEPS, STAGES = 1000, 32, 4  # of the likelihood whose cost is reported: rk4 on 32 steps


def fields(apply, level):
    """The denoiser on flat states, as a function of the parameters and one digit's condition."""
    prediction = diffjax.predictions.flow(PROCESS)

    def make(params, condition):
        denoise = prediction.decode(apply, params, condition)
        return lambda x: ravel_pytree(denoise(x.reshape(SHAPE), level))[0]

    return make


def plain_products(field, x):
    """The trace by D separate products, one after the other."""
    one = lambda i: jax.jvp(field, (x,), (jnp.zeros_like(x).at[i].set(1.0),))[1][i]
    return field(x), jnp.sum(jax.lax.map(one, jnp.arange(x.size)))


def main(seconds: float = 40.0, batch: int = 32, chunk: int | None = 4) -> dict:
    """Measure, save and print."""
    apply, params = functional(UNet(SHAPE, condition=label(10), rngs=nnx.Rngs(0)))
    level = jax.tree.map(jnp.float32, PROCESS.level(0.5))
    make = fields(apply, level)
    x = jax.random.normal(jax.random.key(0), (batch, SIZE))
    condition = jnp.arange(batch) % 10
    key = jax.random.key(1)

    def estimated(estimator):
        def one(field, x):
            return estimator(field, x, estimator.probes(key, x.size, x.dtype))

        return one

    runs = {
        "denoiser": lambda field, x: field(x),
        "exact divergence": estimated(likelihood.exact(chunk)),
        "exact, all at once": estimated(likelihood.exact(None)),
        "64 plain products": plain_products,
        "Hutchinson, 1 probe": estimated(likelihood.hutchinson(1)),
        "Hutchinson, 8 probes": estimated(likelihood.hutchinson(8)),
        "Hutch++, 9 products": estimated(likelihood.hutch_plus_plus(9)),
    }
    compiled = {
        name: jax.jit(lambda p, c, x, run=run: jax.vmap(lambda c, x: run(make(p, c), x))(c, x))
        for name, run in runs.items()
    }
    before = os.getloadavg()[0]
    contestants = {name: (lambda f=f: f(params, condition, x)) for name, f in compiled.items()}
    found = interleaved(contestants, seconds=seconds, rounds=9)
    calls = {name: value / found["denoiser"] for name, value in found.items()}
    per_digit = {name: STEPS * STAGES * value / batch for name, value in found.items()}
    measured = {
        "network": f"digits U-Net, {count(params)} parameters, {SIZE} dimensions, batch {batch}",
        "products at once": chunk or f"all {SIZE}",
        "load average before and after": [round(before, 1), round(os.getloadavg()[0], 1)],
        "milliseconds of a stage": {name: round(1e3 * value, 2) for name, value in found.items()},
        "denoiser calls of a stage": {name: round(value, 2) for name, value in calls.items()},
        "exact over 64 plain products": round(found["exact divergence"] / found["64 plain products"], 3),
        f"{DIGITS} digits by {STEPS} steps of rk4, extrapolated from a stage of a batch": {
            name: {"denoiser calls a digit": round(STEPS * STAGES * calls[name]), "seconds": round(DIGITS * value, 1)}
            for name, value in per_digit.items()
            if name not in ("denoiser", "64 plain products", "exact, all at once")
        },
    }
    return save("likelihood", measured)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--chunk", type=int, default=4, help="products at once, to bound the memory")
    options = parser.parse_args()
    print(json.dumps(main(options.seconds, options.batch, options.chunk), indent=1))
