"""Digits by two models that are not a denoiser of images alone: with their labels in one latent, and by restoration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import diffjax
from diffjax import grids, guidance, networks, nongaussian, predictions, processes, solvers, training
from diffjax.levels import Array, Tree

CLASSES, SIDE = 10, 8
PROCESS = processes.flow()
SHARE = 0.5  # of the label's code in the latent
CODES = np.random.default_rng(0).choice([-1.0, 1.0], (CLASSES, SIDE, SIDE, 1)).astype(np.float32)

BLOCKS = (1, 2, 4, 8)  # averaged over at severity 1, 2, 3, 4; at 0 nothing is lost
NOISE = np.array([0.0, 0.2, 0.3, 0.5, 1.0], np.float32)
SEVERITIES = np.arange(len(NOISE) - 1.0, -1.0, -1.0)


def fitted(loss: Callable, params: Tree, draw: Callable[[Array], tuple], steps: int, rate: float) -> Tree:
    """The averaged parameters after ``steps`` of Adam on batches ``draw(key)``."""
    optimiser = training.adam(rate, warmup=min(50, steps - 1), steps=steps)
    step = training.train_step(loss, optimiser, training.ema.warmed(0.99))
    state = training.init(jax.random.key(0), params, optimiser)
    batches = map(jax.jit(draw), jax.random.split(jax.random.key(1), steps))
    return training.fit(state, step, batches, steps=steps, progress=False).ema


# --- images and labels in one latent --------------------------------------------------------------------------------


def joint_model(images: Array, labels: Array, channels: Sequence[int], steps: int, batch: int) -> tuple[Any, Tree]:
    """A trunk with two heads, ``apply(params, z, t) -> (velocity, logits)``, on ``image + SHARE code(label)``.

    The second channel that the U-Net makes goes to the logits through one linear layer.
    """
    trunk, params = networks.functional(networks.UNet((SIDE, SIDE, 2), channels=tuple(channels), rngs=nnx.Rngs(0)))
    params = {"trunk": params, "head": 0.1 * jax.random.normal(jax.random.key(2), (SIDE * SIDE, CLASSES))}

    def apply(p: Tree, z: Array, t: Array) -> tuple[Array, Array]:
        both: Any = trunk(p["trunk"], jnp.concatenate([z, jnp.zeros_like(z)], -1), t)
        return both[..., :1], both[..., 1].reshape(-1) @ p["head"]

    encode = lambda p, x: training.aggregated([x["image"], jnp.asarray(CODES)[x["label"]]], [1.0, SHARE])
    terms = lambda logits, x, level: (-jax.nn.log_softmax(logits)[x["label"]],)
    loss = training.multitask(predictions.flow(PROCESS), apply, encode, terms, training.logit_normal(), [0.1])
    images, labels = jnp.asarray(images), jnp.asarray(labels)

    def draw(key: Array) -> tuple:
        index = jax.random.randint(key, (batch,), 0, len(images))
        return ({"image": images[index], "label": labels[index]},)

    return apply, fitted(loss, params, draw, steps, 4e-3)


def joint_samples(key: Array, model: tuple[Any, Tree], asked: Array, steps: int) -> dict[str, np.ndarray]:
    """As many joint samples as labels, and one of each label asked for, by the label's own head.

    What a latent says: the head's label at little noise, and the image that is left without its code.
    """
    apply, params = model
    denoise = predictions.flow(PROCESS).decode(lambda p, z, t, condition: apply(p, z, t)[0], params)
    grid = grids.uniform(PROCESS, steps)

    def twist(label: Array) -> Any:
        said = lambda z, level: jax.nn.log_softmax(apply(params, z, level.time)[1])[label]
        return training.head_twist(said)

    def one(key: Array, label: Array | None) -> tuple[Array, Array]:
        model = denoise if label is None else guidance.tilted(denoise, twist(label))
        z = diffjax.sample(key, model, solvers.dpmpp(), grid, shape=(SIDE, SIDE, 1)).x
        said = jnp.argmax(apply(params, z, jnp.float32(0.02))[1])
        return z - SHARE * jnp.asarray(CODES)[said], said

    keys = jax.random.split(key, (2, len(asked)))
    joint = jax.jit(jax.vmap(lambda key: one(key, None)))(keys[0])
    given = jax.jit(jax.vmap(one))(keys[1], jnp.asarray(asked))
    names = ("images", "labels", "images given labels", "labels of these")
    return dict(zip(names, (np.asarray(part) for part in (*joint, *given)), strict=True))


# --- restoration ----------------------------------------------------------------------------------------------------


def averaged(x: Array, severity: Array) -> Array:
    """Block averages of images (8, 8, 1), coarser at each severity."""
    index = jnp.round(severity).astype(int)
    return jnp.stack([x, *(nongaussian.block_averages(x, block) for block in BLOCKS)])[index]


def degradation() -> Any:
    """Four scales, down to the mean of the image in noise of standard deviation 1."""
    return nongaussian.degradation(averaged, lambda s: jnp.asarray(NOISE)[jnp.round(s).astype(int)])


def restorer(images: Array, steps: int, batch: int, prior: bool) -> Callable[[Array, Array, Array], Array]:
    """``(y, severity, z) -> x``, trained to fit and to be data, or (``prior=False``) to the mean by squares."""
    width = {"width": 256, "depth": 2, "time_scale": 10.0}
    size = SIDE * SIDE
    network, params = networks.functional(networks.MLP(2 * size, output=size, rngs=nnx.Rngs(0), **width))
    degrade, images = degradation(), jnp.asarray(images)

    def restored(p: Tree) -> Callable[[Array, Array, Array], Array]:
        flat = lambda y, z: jnp.concatenate([y.reshape(-1), (z if prior else 0 * z).reshape(-1)])
        return lambda y, s, z: jnp.reshape(jnp.asarray(network(p, flat(y, z), s)), y.shape)

    def loss(p: Tree, key: Array, x0: Array) -> Array:
        which, key = jax.random.split(key)
        severity = jax.random.randint(which, (), 1, len(NOISE)).astype(jnp.float32)
        if prior:
            found = nongaussian.map_loss(key, degrade, restored(p), x0, severity, severity - 1, fidelity=0.1)
            return jnp.full(len(x0), found)
        y = jax.vmap(degrade, (0, 0, None))(jax.random.split(key, len(x0)), x0, severity)
        made = jax.vmap(restored(p), (0, None, 0))(y, severity, y)
        return jnp.mean((made - x0) ** 2, (1, 2, 3))

    draw = lambda key: (images[jax.random.randint(key, (batch,), 0, len(images))],)
    return restored(fitted(loss, params, draw, steps, 2e-3))


def restored_samples(key: Array, restore: Callable, images: Array, real: Array) -> dict[str, np.ndarray]:
    """As many digits from noise, in four restorations, as ``real`` has, and these from averages over 2 x 2 pixels.

    The start is the mean of a training image, in noise; the averages have the noise of their severity.
    """
    degrade, count = degradation(), len(real)
    start, run, noise, draw = jax.random.split(key, 4)
    each = lambda key: jax.random.split(key, count)
    index = jax.random.randint(start, (count,), 0, len(images))
    first = jax.vmap(degrade, (0, 0, None))(each(start), jnp.asarray(images)[index], SEVERITIES[0])
    made = jax.jit(jax.vmap(lambda k, y: nongaussian.regenerated(k, degrade, restore, y, SEVERITIES).x))
    seen = jax.vmap(degrade, (0, 0, None))(each(noise), jnp.asarray(real), 2.0)
    again = jax.jit(jax.vmap(lambda k, y: nongaussian.regenerated(k, degrade, restore, y, SEVERITIES[-3:]).x))
    found = again(each(draw), seen)
    # of a true image this is chi-square over its degrees of freedom: 1
    off = jax.vmap(lambda x, y: averaged(x - y, SEVERITIES[-3]))(found, seen) / NOISE[2]
    consistency = jnp.mean(off**2) * BLOCKS[1] ** 2
    samples = {"made": made(each(run), first), "seen": seen, "restored": found, "consistency": consistency}
    return {name: np.asarray(part) for name, part in samples.items()}
