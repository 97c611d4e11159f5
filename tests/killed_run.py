"""A tiny run that saves after every step, to be killed at any moment by its neighbours and benchmarks/restarts.py."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from diffjax import predictions, processes, training
from diffjax.data import toy


def apply(params, x, t, condition):
    del condition
    return params["matrix"] @ x + t * params["bias"]


OPTIMISER = training.adam(1e-2, warmup=2)


def start():
    return training.init(jax.random.key(0), {"matrix": jnp.eye(2), "bias": jnp.zeros(2)}, OPTIMISER)


def main(folder, steps):
    loss = training.denoising(predictions.flow(processes.flow()), apply)
    return training.fit(
        start(),
        training.train_step(loss, OPTIMISER),
        toy.stream(toy.moons, jax.random.key(1), 8),
        steps=steps,
        folder=folder,
        resume=Path(folder).exists(),
        save_every=1,
        log_every=1,
        progress=False,
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
