"""Whether the input pipeline keeps ahead of the digits' training, on the cores that there are.

Batches of 128 digits, shuffled, augmented, scaled: how many a second the pipeline makes alone (also of latents, and
with nothing kept in memory, every image read from its array_record file), how many the training takes, and what a
training step costs with fresh batches beside one that is given the same batch again and again.  They take turns.

`python -m benchmarks.data`
"""

from __future__ import annotations

import tempfile
import time

import jax
import numpy as np
from flax import nnx

import diffjax
from benchmarks.timing import interleaved, save
from diffjax import data, networks, training

BATCH = 128


def rate(batches, seconds: float = 3.0) -> float:
    """Batches a second, after the first ones."""
    for _ in range(10):
        next(batches)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        next(batches)
        count += 1
    return count / (time.perf_counter() - begin)


def pipelines(images: data.Images) -> dict:
    """By name, iterators over batches."""
    moved = data.augment.chain(data.augment.shift(1), data.augment.dequantize())
    bare = data.load("digits", "train")
    bare._cache = None  # as for a data set that is too large to be kept: every image is read and decoded
    halve = lambda x0: np.asarray(x0).reshape(len(x0), 4, 2, 4, 2, 1).mean((2, 4))
    latents = data.encoded(images, halve, tempfile.mkdtemp(), progress=False)
    return {
        "plain": data.batches(images, BATCH),
        "augmented": data.batches(images, BATCH, augment=moved),
        "from disk": data.batches(bare, BATCH),
        "latents": data.batches(latents, BATCH),
    }


def stepper(batches):
    """One step of the digits' training, of a state that it keeps."""
    module = networks.UNet((8, 8, 1), channels=(32, 64), blocks=1, condition=networks.label(10), rngs=nnx.Rngs(0))
    apply, params = networks.functional(module)
    prediction = diffjax.predictions.flow(diffjax.processes.flow())
    loss = training.denoising(prediction, apply, law=training.logit_normal(), dropout=0.1, null=10)
    optimiser = training.adam(1e-3)
    step = training.train_step(loss, optimiser)
    state = training.init(jax.random.key(0), params, optimiser)

    def run():
        nonlocal state
        state, found = step(state, next(batches))
        return found.loss

    return run


def main() -> dict:
    """Measure, save and print."""
    images = data.load("digits", "train")
    images.arrays()  # into memory, as after the first epoch
    alone = {name: rate(batches) for name, batches in pipelines(images).items()}
    fixed = next(data.batches(images, BATCH))

    def same():
        while True:
            yield fixed

    contestants = {"same batch": stepper(same())}
    for name in ("plain", "augmented"):
        contestants[name] = stepper(pipelines(images)[name])
    seconds = interleaved(contestants, seconds=45.0, rounds=9)
    needed = 1 / seconds["same batch"]
    record = save(
        "data",
        {
            "batch": BATCH,
            "batches_per_second": {name: round(value, 1) for name, value in alone.items()},
            "steps_per_second": round(needed, 2),
            "ahead": {name: round(value / needed, 1) for name, value in alone.items()},
            "step_seconds": {name: round(value, 4) for name, value in seconds.items()},
            "step_with_pipeline_over_same_batch": {
                name: round(seconds[name] / seconds["same batch"], 3) for name in ("plain", "augmented")
            },
        },
    )
    for name, value in record.items():
        print(f"{name}: {value}")
    return record


if __name__ == "__main__":
    main()
