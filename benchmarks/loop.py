"""What the sampling loop costs beside the network: a 100-step `sample` of the digits U-Net against the network alone.

The network alone is scanned 100 times on the same batch, its output fed back, so that no call can be skipped.
Gradients of the U-Net, by its input and by its parameters, are taken ten times in a scan and once outside, with the
library's convolution and with JAX's.
`python -m benchmarks.loop`
"""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import diffjax
from benchmarks.timing import interleaved, save
from diffjax.networks import MLP, UNet, convolution, count, functional, label

STEPS = 100
PROCESS = diffjax.processes.flow()
GRID = diffjax.grids.uniform(PROCESS, STEPS)


def network_alone(apply, params, condition, x):
    """The batched network, called as often as the sampler calls it."""
    times = jnp.linspace(1.0, 1.0 / STEPS, STEPS)

    def body(x, t):
        output = jax.vmap(apply, (None, 0, None, 0))(params, x, t, condition)
        return 0.5 * (x + output), None

    return jax.lax.scan(body, x, times)[0]


def network_and_noise(apply, params, condition, x, keys):
    """The same with the normal draws that a stochastic sampler makes."""
    times = jnp.linspace(1.0, 1.0 / STEPS, STEPS)

    def body(x, step):
        index, t = step
        output = jax.vmap(apply, (None, 0, None, 0))(params, x, t, condition)
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), x.shape[1:]))(keys)
        return 0.5 * (x + output) + 0.1 * noise, None

    return jax.lax.scan(body, x, (jnp.arange(STEPS), times))[0]


def sampled(apply, params, condition, keys, solver, shape):
    """A batch of samples."""
    prediction = diffjax.predictions.flow(PROCESS)

    def draw(key, condition):
        return diffjax.sample(key, prediction.decode(apply, params, condition), solver, GRID, shape=shape).x

    return jax.vmap(draw)(keys, condition)


def cases():
    """Networks, batches and state shapes."""
    rngs = nnx.Rngs(0)
    yield "digits U-Net, batch 64", UNet((8, 8, 1), condition=label(10), rngs=rngs), 64, (8, 8, 1)
    yield "MLP 3 x 256, D = 64, batch 256", MLP(64, width=256, depth=3, condition=label(10), rngs=rngs), 256, (64,)


def gradients(seconds: float) -> dict:
    """Milliseconds of one gradient of the digits U-Net, in a loop and outside, and how much longer the former takes."""
    found = {}
    for name, convolve in {"diffjax": convolution, "jax": jax.lax.conv_general_dilated}.items():
        module = UNet((8, 8, 1), condition=label(10), rngs=nnx.Rngs(0))
        for _, node in nnx.iter_modules(module):
            if isinstance(node, nnx.Conv):
                node.conv_general_dilated = convolve
        apply, params = functional(module)
        params = jax.tree.map(lambda leaf: leaf + 0.01, params)  # at the start the output, and its gradient, is zero
        x = jax.random.normal(jax.random.key(1), (64, 8, 8, 1))

        def loss(params, x, apply: Any = apply):
            return jnp.mean(jax.vmap(apply, (None, 0, None))(params, x, 0.5) ** 2)

        given = {
            "input": (lambda x, p=params, f=loss: f(p, x), x),
            "parameters": (lambda p, x=x, f=loss: f(p, x), params),
        }
        for kind, (value, start) in given.items():
            down = lambda at, f=value: jax.tree.map(lambda a, g: a - 1e-3 * g, at, jax.grad(f)(at))
            looped = lambda at, f=down: jax.lax.scan(lambda at, _: (f(at), None), at, None, length=10)[0]
            for place, run in (("outside", jax.jit(down)), ("in a loop", jax.jit(looped))):
                found[f"{name}, {kind}, {place}"] = lambda f=run, a=start: f(a)
    times = interleaved(found, seconds=seconds)
    times = {name: time / (10 if "loop" in name else 1) for name, time in times.items()}
    return {
        "milliseconds": {name: round(1e3 * time, 2) for name, time in times.items()},
        "in a loop over outside": {
            name: round(time / times[name.replace("in a loop", "outside")], 2)
            for name, time in times.items()
            if "loop" in name
        },
    }


def main(seconds: float = 40.0) -> dict:
    """Measure, save and print."""
    measured: dict = {"steps": STEPS, "gradients of the digits U-Net, batch 64": gradients(seconds)}
    for name, module, batch, shape in cases():
        apply, params = functional(module)
        keys = jax.random.split(jax.random.key(0), batch)
        x = jax.random.normal(jax.random.key(1), (batch, *shape))
        condition = jnp.arange(batch) % 10
        solvers = {name: getattr(diffjax.solvers, name)() for name in ("ddim", "dpmpp", "ancestral")}
        compiled = {
            solver: jax.jit(lambda p, c, k, s=value, a=apply, h=shape: sampled(a, p, c, k, s, h))
            for solver, value in solvers.items()
        }
        alone = jax.jit(lambda p, c, x, a=apply: network_alone(a, p, c, x))
        noisy = jax.jit(lambda p, c, x, k, a=apply: network_and_noise(a, p, c, x, k))
        contestants = {
            "network alone": lambda f=alone, a=(params, condition, x): f(*a),
            "network and noise": lambda f=noisy, a=(params, condition, x, keys): f(*a),
        } | {solver: (lambda f=f, a=(params, condition, keys): f(*a)) for solver, f in compiled.items()}
        found = interleaved(contestants, seconds=seconds)
        measured[name] = {
            "parameters": count(params),
            "milliseconds": {key: round(1e3 * value, 2) for key, value in found.items()},
            "over the network alone": {
                key: round(found[key] / found["network alone"], 3) for key in ("ddim", "dpmpp", "ancestral")
            },
            "ancestral over network and noise": round(found["ancestral"] / found["network and noise"], 3),
        }
    return save("loop", measured)


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
