"""What a training step costs beside the network, how it divides over devices, and what memory it needs.

* The step of `training.train_step` (noise, loss, gradient, clipping, Adam, moving average) against forward and backward
  of the bare network on the same batch: the ratio of medians of turns within one run.
* The same global batch on 1, 2, 4 and 8 virtual devices of one machine: what the division costs, since no device is
  added.  Efficiency is the time on one device over that on n.
* The bytes that the compiled step needs on each device, as XLA plans them: with the state's memory given back and kept
  (donation), with the blocks' activations kept and computed again, with the state whole and divided over eight devices.

`python -m benchmarks.training`, 2 minutes; `--tiny` in seconds, not saved.  The accelerator's part is
`benchmarks/training_gpu.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import diffjax
from benchmarks.timing import interleaved, save
from diffjax import devices, training
from diffjax.networks import DiT, UNet, count, functional, label

PROCESS = diffjax.processes.flow()
PREDICTION = diffjax.predictions.flow(PROCESS)
CLASSES = 10


class Case(NamedTuple):
    """A network and the batch that it is trained on."""

    apply: Any
    params: Any
    batch: tuple[jax.Array, jax.Array]


def case(name: str, tiny: bool, remat: str | None = None) -> Case:
    """The digits' U-Net at batch 128, or a small transformer on images of 16 x 16 at batch 32."""
    rngs, size, side = nnx.Rngs(0), 8 if tiny else 128, 8
    if name == "unet":
        module = UNet((8, 8, 1), channels=(8,) if tiny else (32, 64), condition=label(CLASSES), rngs=rngs)
    else:
        size, side = (8, 8) if tiny else (32, 16)
        shape = {"width": 16, "depth": 2, "heads": 2} if tiny else {"width": 192, "depth": 6, "heads": 3}
        module = DiT((side, side, 1), condition=label(CLASSES), scan=True, remat=remat, rngs=rngs, **shape)
    apply, params = functional(module)
    x0 = jax.random.normal(jax.random.key(1), (size, side, side, 1))
    return Case(apply, params, (x0, jnp.arange(size) % CLASSES))


def step_of(given: Case, **options: Any) -> Any:
    """The step that `experiments.digits` trains with."""
    loss = training.denoising(PREDICTION, given.apply, dropout=0.1, null=CLASSES)
    return training.train_step(loss, training.adam(1e-3, warmup=10, steps=1000), **options)


def bare(given: Case) -> Any:
    """Forward and backward of the network alone: ``f(params, x, t, condition, target) -> (loss, gradient)``."""

    def loss(params: Any, x: jax.Array, t: jax.Array, condition: jax.Array, target: jax.Array) -> jax.Array:
        output = jax.vmap(given.apply, (None, 0, 0, 0))(params, x, t, condition)
        return jnp.mean(jnp.square(output - target))

    return jax.jit(jax.value_and_grad(loss))


def overhead(tiny: bool, seconds: float) -> dict[str, Any]:
    """Milliseconds of the step and of the bare network, and their ratio."""
    found = {}
    for name in ("unet", "dit"):
        given = case(name, tiny)
        step, alone = step_of(given), bare(given)
        x0, condition = given.batch
        t, target = jnp.linspace(0.0, 1.0, len(x0)), jnp.ones_like(x0)
        held = [training.init(jax.random.key(0), given.params, training.adam(1e-3, warmup=10, steps=1000))]

        def trained(held=held, step=step, batch=given.batch) -> Any:
            held[0], metrics = step(held[0], batch)
            return metrics.loss, held[0].params

        contestants = {
            "step": trained,
            "forward and backward": lambda f=alone, a=(given.params, x0, t, condition, target): f(*a),
        }
        spent = interleaved(contestants, seconds=seconds, rounds=3 if tiny else 15)
        found[name] = {
            "parameters": count(given.params),
            "batch": len(x0),
            "milliseconds": {key: round(1e3 * value, 2) for key, value in spent.items()},
            "ratio": round(spent["step"] / spent["forward and backward"], 3),
        }
    return found


def scaling(tiny: bool, seconds: float) -> dict[str, Any]:
    """Milliseconds of the step on 1, 2, 4 and 8 devices for one global batch, in turns."""
    given, contestants = case("unet", tiny), {}
    for number in (1, 2, 4, 8):
        mesh = devices.mesh("data=-1", jax.devices()[:number])
        step = step_of(given, mesh=mesh)
        state = training.init(jax.random.key(0), given.params, training.adam(1e-3, warmup=10, steps=1000), mesh=mesh)
        held = [state]

        def trained(held=held, step=step) -> Any:
            held[0], metrics = step(held[0], given.batch)
            return metrics.loss, held[0].params

        contestants[str(number)] = trained
    spent = interleaved(contestants, seconds=seconds, rounds=3 if tiny else 9)
    return {
        "devices": {number: round(1e3 * value, 2) for number, value in spent.items()},
        "efficiency": {number: round(spent["1"] / value, 3) for number, value in spent.items()},
    }


def memory(tiny: bool) -> dict[str, Any]:
    """Bytes on each device, by what is planned."""
    optimiser, key = training.adam(1e-3, warmup=10, steps=1000), jax.random.key(0)

    def planned(given: Case, mesh: Any = None, rule: Any = None, donate: bool = True) -> dict[str, int]:
        state = training.init(key, given.params, optimiser, mesh=mesh, rule=rule)
        step = step_of(given, mesh=mesh)
        found = devices.memory(step if donate else jax.jit(step.pure), state, given.batch)
        return {} if found is None else found._asdict()

    kept = case("dit", tiny)
    mesh = devices.mesh("fsdp=8")
    return {
        "parameters": count(kept.params),
        "donated": planned(kept),
        "not donated": planned(kept, donate=False),
        **{f"remat {kind}": planned(case("dit", tiny, kind)) for kind in ("dots", "full")},
        "8 devices, whole state": planned(kept, mesh, devices.replicated),
        "8 devices, FSDP": planned(kept, mesh, devices.fsdp()),
    }


def elsewhere(part: str, tiny: bool, seconds: float) -> dict[str, Any]:
    """A part in a process of its own with eight virtual devices."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "benchmarks.training", "--part", part, "--seconds", str(seconds)]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(command + ["--tiny"] * tiny, env=environment, check=True, capture_output=True, text=True)
    return json.loads(found.stdout)


def main(tiny: bool = False, seconds: float = 40.0) -> dict[str, Any]:
    """Measure, save after every part (unless tiny) and return."""
    parts = {
        "over forward and backward": lambda: overhead(tiny, seconds),
        "one batch on virtual devices": lambda: elsewhere("scaling", tiny, seconds),
        "bytes": lambda: elsewhere("memory", tiny, seconds),
    }
    measured: dict[str, Any] = {}
    for name, part in parts.items():
        measured[name] = part()
        if not tiny:
            save("training", measured)
    return measured


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="everything in seconds; nothing is saved")
    parser.add_argument("--seconds", type=float, default=40.0, help="of every timing")
    parser.add_argument("--part", choices=("scaling", "memory"), help="only this, on the devices that there are")
    options = parser.parse_args()
    if options.part == "scaling":
        print(json.dumps(scaling(options.tiny, options.seconds)))
    elif options.part == "memory":
        print(json.dumps(memory(options.tiny)))
    else:
        print(json.dumps(main(options.tiny, options.seconds), indent=1))
