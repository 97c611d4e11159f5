"""Training on an accelerator: steps per second and model FLOP utilisation of a U-Net and of DiT-S/2 in bfloat16.

Images of 32 x 32 x 3 (U-Net) and latents of 32 x 32 x 4 (DiT-S/2: width 384, depth 12, 6 heads), on one device, the
whole step of `training.train_step`.  The FLOPs of a step are those of forward and backward of the network as XLA
counts them, without anything computed twice; utilisation is their rate over the device's peak in bfloat16, dense.
The same networks in PyTorch, compiled: `benchmarks/peers/training.py`.

`python -m benchmarks.training_gpu` on a machine with an accelerator, 3 minutes; `--tiny` runs everything on any machine
with small networks, and is not saved.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import diffjax
from benchmarks.timing import save
from benchmarks.training import Case, bare, step_of
from diffjax import training
from diffjax.networks import DiT, UNet, count, functional, label

CLASSES = 10
# teraFLOPs a second in bfloat16 without sparsity, from the data sheets, by a part of the device's name
PEAKS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "V100": 125}
PEAKS |= {"TPU v4": 275, "TPU v5 lite": 197, "TPU v5p": 459, "TPU v6 lite": 918}
SIZES: dict[str, dict[str, Any]] = {
    "unet": {"channels": (128, 256, 256), "blocks": 2, "attention": (16,), "heads": 4, "groups": 32, "batch": 256},
    "dit": {"width": 384, "depth": 12, "heads": 6, "batch": 256},
}
TINY: dict[str, dict[str, Any]] = {
    "unet": {"channels": (8, 16), "blocks": 1, "attention": (), "heads": 2, "groups": 4, "batch": 2},
    "dit": {"width": 16, "depth": 2, "heads": 2, "batch": 2},
}


def case(name: str, tiny: bool) -> Case:
    """A network in bfloat16 and a batch for it."""
    arguments = dict((TINY if tiny else SIZES)[name])
    batch, side = arguments.pop("batch"), 8 if tiny else 32
    shared: dict[str, Any] = {"condition": label(CLASSES), "dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    shape = (side, side, 3 if name == "unet" else 4)
    module = UNet(shape, **arguments, **shared) if name == "unet" else DiT(shape, patch=2, **arguments, **shared)
    apply, params = functional(module)
    x0 = jax.random.normal(jax.random.key(1), (batch, *shape))
    return Case(apply, params, (x0, jnp.arange(batch) % CLASSES))


def flops(given: Case) -> float:
    """Of forward and backward of the bare network on the batch."""
    x0, condition = given.batch
    lowered = bare(given).lower(given.params, x0, jnp.ones(len(x0)), condition, x0)
    found: Any = lowered.compile().cost_analysis()
    return float((found[0] if isinstance(found, list) else found)["flops"])


def measure(name: str, tiny: bool) -> dict[str, Any]:
    """Steps per second, the median of ten spells, and what they make of the device."""
    given = case(name, tiny)
    step, optimiser = step_of(given), training.adam(1e-3, warmup=10, steps=1000)
    state = training.init(jax.random.key(0), given.params, optimiser)
    begin = time.perf_counter()
    state, metrics = step(state, given.batch)
    first = float(metrics.loss)
    compiled, spells, spell = time.perf_counter() - begin, [], 1 if tiny else 20
    for _ in range(3 if tiny else 10):
        begin = time.perf_counter()
        for _ in range(spell):
            state, metrics = step(state, given.batch)
        jax.block_until_ready(metrics.loss)
        spells.append((time.perf_counter() - begin) / spell)
    seconds, work, kind = statistics.median(spells), flops(given), jax.devices()[0].device_kind
    peak = next((1e12 * value for part, value in PEAKS.items() if part in kind), None)
    return {
        "parameters": count(given.params),
        "batch": len(given.batch[0]),
        "losses": [first, float(metrics.loss)],
        "seconds to compile": round(compiled, 1),
        "steps per second": round(1 / seconds, 2),
        "gigaflops a step": round(work / 1e9, 2),
        "utilisation": None if peak is None else round(work / seconds / peak, 3),
    }


def main(tiny: bool = False) -> dict[str, Any]:
    """Measure, save (unless tiny) and return."""
    if jax.default_backend() == "cpu" and not tiny:
        return {"skipped": "this takes an accelerator; --tiny runs it in small on any machine"}
    measured = {"diffjax": diffjax.__version__, **{name: measure(name, tiny) for name in SIZES}}
    return measured if tiny else save("training_gpu", measured)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small networks; nothing is saved")
    print(json.dumps(main(parser.parse_args().tiny), indent=1))
