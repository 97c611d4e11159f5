"""What guidance costs beside the network: one call of the digits U-Net, guided, against the network at twice the batch.

Classifier-free guidance is to be one batched call: its time over that of the network alone on 2 B samples.  Beside it
stand the rules, which only add a few vector operations, and what is saved by an interval, inside and outside of it.
All are calls on a batch of B, by turns in one process, and medians are compared.  `python -m benchmarks.guidance`
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
from flax import nnx

import diffjax
from benchmarks.timing import interleaved, save
from diffjax import guidance
from diffjax.networks import UNet, count, functional, label

PROCESS = diffjax.processes.flow()
SHAPE = (8, 8, 1)
NULL = 10
BATCH = 32


def guided(apply, params, condition, x, time, scale, rule):
    """A call of classifier-free guidance on a batch, at one level."""
    level = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), PROCESS.level(time))

    def call(x, condition):
        denoise = diffjax.predictions.flow(PROCESS).decode(apply, params, condition)
        return guidance.classifier_free(denoise, NULL, scale, rule)(x, level)

    return jax.vmap(call)(x, condition)


def alone(apply, params, condition, x, time):
    """The network as a denoiser, on a batch."""
    level = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), PROCESS.level(time))
    call = lambda x, c: diffjax.predictions.flow(PROCESS).decode(apply, params, c)(x, level)
    return jax.vmap(call)(x, condition)


def main(seconds: float = 60.0, batch: int = BATCH) -> dict:
    """Measure, save and print."""
    module = UNet(SHAPE, condition=label(NULL + 1), rngs=nnx.Rngs(0))
    apply, params = functional(module)
    x = jax.random.normal(jax.random.key(1), (2 * batch, *SHAPE))
    condition = jnp.arange(2 * batch) % 10
    time = jnp.float32(0.5)
    network = jax.jit(lambda p, c, x, t: alone(apply, p, c, x, t))
    contestants = {
        "network at B": lambda: network(params, condition[:batch], x[:batch], time),
        "network at 2 B": lambda: network(params, condition, x, time),
    }
    inside, outside = guidance.interval(3.0, 0.5, 2.0), guidance.interval(3.0, 2.0, 4.0)
    variants = {
        "classifier-free": (3.0, None),
        "rescale": (3.0, guidance.rescale()),
        "apg": (3.0, guidance.apg(norm=2.5)),
        "zero_star": (3.0, guidance.zero_star()),
        "interval, inside": (inside, None),
        "interval, outside": (outside, None),
    }
    for name, (scale, rule) in variants.items():
        run = jax.jit(lambda p, c, x, t, s, r: guided(apply, p, c, x, t, s, r))
        contestants[name] = lambda f=run, s=scale, r=rule: f(params, condition[:batch], x[:batch], time, s, r)
    found = interleaved(contestants, seconds=seconds, rounds=15)
    return save(
        "guidance",
        {
            "network": f"digits U-Net, {count(params)} parameters, B = {batch}",
            "milliseconds": {name: round(1e3 * value, 2) for name, value in found.items()},
            "over the network at 2 B": {
                name: round(value / found["network at 2 B"], 3) for name, value in found.items()
            },
        },
    )


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
