"""Inverse methods that train something, on digits (8 x 8, as vectors of 64 in [-1, 1]) and in the plane.

    python -m experiments.inverse --parts trained

Every function takes a key and arrays, trains perceptrons (tens of seconds on 2 cores) and returns numbers:

    prompt_tuning(key, train, labels, held_out, truth)     P2L against the null condition and the true one
    predicted_starts(key, train, held_out)                 InvSR against SDEdit, 1 to 5 steps
    compact_priors(key, train, held_out)                   DiffIR jointly, separately, and a restorer alone
    forward_models(key)                                    signals in the plane seen through random directions

``arrays()`` gives the digits, ``part`` runs all four.

Expect (seed 0): the null condition 14.0 and 14.7 dB (half images, 4 x 4 means), tuned at rate 0.01 14.2, 14.9, at 0.1
13.5 and 13.2, the true class 15.6 and 15.8.  Predicted starts 18.5 dB in one step and 16.6 in five, SDEdit 12.1 and
11.5.  A restorer alone 16.1 dB, separate 15.9, joint 16.2, told by the clean image 18.4.  Signals 0.11 from the law of
the moons, a floor of 0.04, a normal law 0.27.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from diffjax import data, grids, guidance, inverse, metrics, networks, predictions, processes, sample, solvers, training
from diffjax.data.sets import stack
from diffjax.levels import Array, Tree
from experiments import _run

PROCESS, SIDE, CLASSES = processes.flow(), 8, 10
PIXELS = SIDE**2


def part(run: _run.Run, key: Array) -> dict[str, Any]:
    """What all four return."""
    train, labels, held_out, truth = arrays()
    keys = jax.random.split(key, 4)
    makes: dict[str, Callable[[], Any]] = {
        "prompts": lambda: prompt_tuning(keys[0], train, labels, held_out, truth),
        "starts": lambda: predicted_starts(keys[1], train, held_out),
        "compact priors": lambda: compact_priors(keys[2], train, held_out),
        "forward models": lambda: forward_models(keys[3]),
    }
    return {name: run.part(f"trained {name}", make) for name, make in makes.items()}


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``(train, labels, held_out, labels)`` of scikit-learn's digits."""
    splits = [data.load("digits", name) for name in ("train", "test")]
    first, second = (stack(images, images.__getitems__(range(len(images)))) for images in splits)
    train, held_out = (np.asarray(batch.x0).reshape(-1, PIXELS) for batch in (first, second))
    return train, np.asarray(first.condition), held_out, np.asarray(second.condition)


def psnr(found: Array, truth: Array) -> float:
    """In dB, of images in [-1, 1] together."""
    return float(metrics.psnr(np.reshape(found, (1, -1)), np.reshape(truth, (1, -1)), span=2.0)[0])


def distance(samples: Array, reference: Array) -> Any:
    """The sliced Wasserstein distance, along the same directions for all."""
    return metrics.sliced_wasserstein(jax.random.key(0), samples, reference)


def fit(
    key: Array, loss: Callable, params: Tree, arrays: tuple, steps: int, batch: int = 128, rate: float = 3e-3
) -> Any:
    """Parameters after ``steps`` of Adam on batches of ``arrays``: ``loss(params, key, *batch) -> (B,)``."""
    optimiser = training.adam(rate, steps=steps)
    arrays = tuple(jnp.asarray(a) for a in arrays)

    def one(carry: tuple, key: Array) -> tuple:
        params, state = carry
        pick = jax.random.randint(key, (batch,), 0, len(arrays[0]))
        mean = lambda params: loss(params, jax.random.fold_in(key, 1), *(a[pick] for a in arrays)).mean()
        changes, state = optimiser.update(jax.grad(mean)(params), state, params)
        return (optax.apply_updates(params, changes), state), None

    run = jax.jit(
        lambda params: jax.lax.scan(one, (params, optimiser.init(params)), jax.random.split(key, steps))[0][0]
    )
    return run(params)


def perceptron(seed: int, size: int, told: int | None = None, output: int | None = None, width: int = 192) -> Any:
    """``(apply, params)`` of an MLP told a vector."""
    condition = None if told is None else networks.vector(told)
    module = networks.MLP(size, width=width, depth=2, condition=condition, output=output, rngs=nnx.Rngs(seed))
    return networks.functional(module)


# --- P2L ----------------------------------------------------------------------------------------------------------


def prompt_tuning(
    key: Array,
    train: np.ndarray,
    labels: np.ndarray,
    held_out: np.ndarray,
    truth: np.ndarray,
    *,
    latent: int = 24,
    steps: int = 1500,
    count: int = 64,
    iterations: int = 3,
    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1),
    sampling_steps: int = 40,
) -> dict[str, dict[str, float]]:
    """PSNR of half images and of 4 x 4 means (noise 0.1), by the condition: null, tuned from null, the true class.

    Tuned by Adam at several rates: nothing but few and small steps holds a condition to those that were trained on.

    The autoencoder is the ``latent`` first principal components; the condition a one-hot vector, zeros in 1 of 5.
    """
    mean, basis = train.mean(axis=0), np.linalg.svd(train - train.mean(axis=0), full_matrices=False)[2][:latent]
    scale = float(np.std((train - mean) @ basis.T))
    encode = lambda x: jnp.asarray(basis / scale, x.dtype) @ (x - jnp.asarray(mean, x.dtype))
    decode = lambda z: jnp.asarray(basis.T * scale, z.dtype) @ z + jnp.asarray(mean, z.dtype)
    apply, params = perceptron(0, latent, CLASSES)
    prediction, null = predictions.velocity(PROCESS), jnp.zeros(CLASSES)
    loss = training.denoising(prediction, apply, dropout=0.2, null=null)
    told = np.eye(CLASSES, dtype=np.float32)
    rest = float(np.mean((train - mean - (train - mean) @ basis.T @ basis) ** 2))  # what latents leave out
    latents = (train - mean) @ basis.T / scale
    params = fit(key, loss, params, (latents.astype(np.float32), told[labels]), steps)
    model, grid = prediction.decode(apply, params, null), grids.uniform(PROCESS, sampling_steps)
    half = np.arange(PIXELS) < PIXELS // 2
    blocks = np.kron(np.eye(SIDE // 2), np.ones((1, 2)) / 2)
    operators = {"half": inverse.mask(half), "means": inverse.matrix(np.kron(blocks, blocks))}
    index = np.linspace(0, len(held_out) - 1, count).astype(int)
    x, classes = jnp.asarray(held_out[index], jnp.float32), jnp.asarray(told[truth[index]])
    keys, found = jax.random.split(jax.random.fold_in(key, 1), count), {}
    for name, operator in operators.items():

        def restore(key: Array, x: Array, condition: Array, rate: Array, operator: Any = operator) -> Array:
            noise, draw = jax.random.split(key)
            clean = operator(x)
            seen = inverse.measurement(operator, clean + 0.1 * jax.random.normal(noise, clean.shape), 0.1)
            denoise = inverse.p2l(
                guidance.conditioned(model, condition),
                seen,
                decode=decode,
                encode=encode,
                iterations=iterations,
                optimiser=inverse.adam(rate),
                twist=inverse.pigdm(latent_measurement(seen, basis.T * scale, mean, rest), 1.0),
                variance=0.1,
                every=10,
            )
            return decode(sample(draw, denoise, solvers.ddim(eta=1.0), grid, shape=(latent,)).x)

        run, null = jax.jit(jax.vmap(restore, (0, 0, 0, None))), jnp.zeros_like(classes)
        settings = {
            "null": (null, 1e-9),
            **{f"tuned {rate:g}": (null, rate) for rate in rates},
            "told": (classes, 1e-9),
        }
        found[name] = {kind: psnr(run(keys, x, *setting), x) for kind, setting in settings.items()}
    return found


def latent_measurement(seen: Any, matrix: np.ndarray, mean: np.ndarray, rest: float) -> Any:
    """A measurement of ``matrix z + mean`` and a remainder of variance ``rest`` as one of z, linear: for `pigdm`."""
    a = seen.operator
    shift, linear = a(jnp.asarray(mean, jnp.float32)), lambda z: a(jnp.asarray(matrix, z.dtype) @ z)
    std = (seen.noise.std**2 + rest) ** 0.5
    return inverse.measurement(inverse.linear(linear, (matrix.shape[1],)), seen.y - shift, std)


# --- InvSR --------------------------------------------------------------------------------------------------------


def halved(images: np.ndarray) -> np.ndarray:
    """Means over 2 x 2 pixels, back at the full size."""
    small = images.reshape(-1, SIDE // 2, 2, SIDE // 2, 2).mean(axis=(2, 4))
    return np.repeat(np.repeat(small, 2, axis=1), 2, axis=2).reshape(-1, PIXELS).astype(np.float32)


def predicted_starts(
    key: Array,
    train: np.ndarray,
    held_out: np.ndarray,
    *,
    start: float = 0.5,
    steps: int = 1500,
    most: int = 5,
) -> list[dict[str, float]]:
    """2x super-resolution from the level ``start``: PSNR, sliced Wasserstein distance; predicted and random noise."""
    train, held_out = train.astype(np.float32), held_out.astype(np.float32)
    apply, params = perceptron(1, PIXELS)
    prediction = predictions.velocity(PROCESS)
    model = prediction.decode(apply, fit(key, training.denoising(prediction, apply), params, (train,), steps))
    predictor, params = perceptron(2, PIXELS)
    predict = lambda params, y, t: predictor(params, y, t)
    loss = training.noise_predictor(model, PROCESS, predict, training.uniform(0.5 * start, start + 1e-3))
    params = fit(jax.random.fold_in(key, 1), loss, params, (train, halved(train)), steps)
    keys, y, rows = jax.random.split(jax.random.fold_in(key, 2), len(held_out)), jnp.asarray(halved(held_out)), []
    for count in range(1, most + 1):
        grid = grids.uniform(PROCESS, count, start=start)

        def draw(key: Array, y: Array, predicted: bool, grid: Any = grid) -> Array:
            x = inverse.predicted_start(PROCESS, predict, params, y, grid.start)
            settings = {"x": x} if predicted else {"x": y, "start": start}
            return sample(key, model, solvers.ddim(), grid, **settings).x

        run = jax.jit(jax.vmap(draw, (0, 0, None)), static_argnums=2)
        row = {"steps": float(count)}
        for name, predicted in {"predicted": True, "random": False}.items():
            found = np.asarray(run(keys, y, predicted))
            row[f"{name} psnr"] = psnr(found, held_out)
            row[f"{name} sw"] = float(distance(found, held_out))
        rows.append(row)
    return [{"steps": 0.0, "y psnr": psnr(y, held_out), "y sw": float(distance(y, held_out))}, *rows]


# --- DiffIR -------------------------------------------------------------------------------------------------------


def compact_priors(
    key: Array, train: np.ndarray, held_out: np.ndarray, *, size: int = 4, steps: int = 1000, width: int = 48
) -> dict[str, float]:
    """PSNR of deblurred digits (5 x 5 Gaussian of deviation 1.5, noise 0.1) by a narrow restorer told ``size`` numbers.

    "alone": without a vector; "teacher": with that of the clean image; "separate": drawn in 4 steps by a diffusion
    that was trained on the vectors alone; "joint": trained through the sampler together with the restorer.
    """
    operator = inverse.blur(inverse.gaussian_kernel(5, 1.5), (SIDE, SIDE))
    degrade = lambda x, key: operator(x.reshape(SIDE, SIDE)).reshape(-1) + 0.1 * jax.random.normal(key, (PIXELS,))
    pairs = []
    for index, images in enumerate((train, held_out)):
        keys = jax.random.split(jax.random.fold_in(key, index), len(images))
        pairs.append((jnp.asarray(images, jnp.float32), jax.vmap(degrade)(jnp.asarray(images, jnp.float32), keys)))
    restorer, restoring = perceptron(3, PIXELS, size, width=width)
    encoder, encoding = perceptron(4, 2 * PIXELS, output=size)
    describer, describing = perceptron(5, PIXELS, output=16)
    network, denoising = perceptron(6, size, 16, width=64)
    zero = jnp.zeros(())
    restore = lambda params, y, z: y + restorer(params, y, zero, z)
    encode = lambda params, x0, y: jnp.tanh(encoder(params, jnp.concatenate([x0, y]), zero))
    describe = lambda params, y: describer(params, y, zero)
    square = lambda a, b: jnp.mean((a - b) ** 2)
    keys = jax.random.split(jax.random.fold_in(key, 9), 5)

    alone_loss = training.prior_restorer(lambda params, x0, y: jnp.zeros(size), restore, square)
    start = {"encode": encoding, "restore": restoring}
    alone = fit(keys[0], alone_loss, start, pairs[0], 2 * steps)  # as many steps as both stages
    stage_one = fit(keys[1], training.prior_restorer(encode, restore, square), start, pairs[0], steps)
    prediction = predictions.data(PROCESS)
    sampler = training.prior_sampler(prediction, network, describe, solvers.ancestral(), grids.uniform(PROCESS, 4))
    start = {"denoise": denoising, "describe": describing, "restore": stage_one["restore"]}
    settings = {"weight": 0.1, "distance": square}
    second = training.prior_diffusion(sampler, encode, restore, stage_one["encode"], **settings)
    joint = fit(keys[2], second, start, pairs[0], steps)

    def plain(params: Tree, key: Array, x0: Array, y: Array) -> Array:
        """The usual denoising loss of the vectors, told y."""
        z = jax.lax.stop_gradient(jax.vmap(lambda a, b: encode(stage_one["encode"], a, b))(x0, y))
        told = jax.vmap(lambda y: describe(params["describe"], y))(y)
        return training.denoising(prediction, network)(params["denoise"], key, z, told)

    separate = fit(keys[3], plain, start, pairs[0], steps)
    truth, y = pairs[1]
    draws = jax.random.split(keys[4], len(y))
    drawn = lambda params: jax.jit(jax.vmap(lambda key, y: training.restored(sampler, restore, params, key, y, size)))(
        draws, y
    )
    told = lambda params, x0, y: restore(params["restore"], y, encode(params["encode"], x0, y))
    return {
        "y": psnr(y, truth),
        "alone": psnr(jax.vmap(lambda y: restore(alone["restore"], y, jnp.zeros(size)))(y), truth),
        "teacher": psnr(jax.vmap(lambda x0, y: told(stage_one, x0, y))(truth, y), truth),
        "separate": psnr(drawn(separate), truth),
        "joint": psnr(drawn(joint), truth),
    }


# --- forward models -----------------------------------------------------------------------------------------------


def forward_models(key: Array, *, count: int = 4000, steps: int = 3000, drawn: int = 2000) -> dict[str, float]:
    """Two moons, of which each datum is two projections on random directions: sliced Wasserstein distance to the law.

    "signals": drawn through one pair of directions; "floor": of as many true draws; "misfit": the largest difference
    of an observation and the signal's projection; "gaussian": of a normal law in place of the signals.
    """
    moons = lambda key, count: jax.vmap(lambda key: data.toy.moons(key)[0])(jax.random.split(key, count))
    keys = jax.random.split(key, 8)
    s = moons(keys[0], count)
    angles = jax.random.uniform(keys[1], (count, 2), maxval=jnp.pi)
    views = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)  # (count, 2 views, 2)
    observed = jnp.einsum("nvd,nd->nv", views, s)
    network, params = perceptron(7, 2, 4, width=128)

    def apply(params: Tree, x: Array, t: Array, condition: tuple) -> Array:
        view = condition[1]  # what a signal of unit variance would be on average, and a correction
        gram = (1 - t) ** 2 * view.T @ view + t**2 * jnp.eye(2)
        rough = (1 - t) * jnp.linalg.solve(gram, view.T @ x)
        return rough + network(params, rough, t, gram.reshape(-1))

    model = inverse.through(apply, lambda signal, view: view @ signal)
    loss = training.denoising(predictions.data(PROCESS), model)
    params = fit(
        keys[2], lambda p, key, o, v: loss(p, key, o, (jnp.zeros((len(o), 0)), v)), params, (observed, views), steps
    )
    view = jnp.array([[1.0, 0.0], [0.5, 0.75**0.5]])
    denoise = predictions.data(PROCESS).decode(model, params, (jnp.zeros(0), view))
    grid = grids.uniform(PROCESS, 50)
    run = jax.jit(jax.vmap(lambda key: inverse.draw_signal(key, denoise, solvers.dpmpp(), grid, (2,))))
    signals, out = run(jax.random.split(keys[3], drawn))
    true = moons(keys[4], drawn)
    return {
        "signals": float(distance(signals, true)),
        "floor": float(distance(moons(keys[5], drawn), true)),
        "gaussian": float(distance(jax.random.normal(keys[6], (drawn, 2)), true)),
        "misfit": float(jnp.max(jnp.abs(out.x - signals @ view.T))),
    }
