"""Guidance of digits that trains something small beside the frozen model, or changes the noise that it starts from.

A probe of its hidden states (LaCon), a classifier of clean digits, calibrated (Elucidating ...), a map of the initial
noise that stands in for guidance (NoiseRefine), and initial noise that is moved towards a class (noise-level guidance).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from scipy.fft import dctn

import diffjax
from diffjax import guidance, levels, networks, training
from diffjax.levels import Array, Grid, Level, value
from experiments import _classifier, digits

NULL = digits.CLASSES
PREDICTION = diffjax.predictions.flow(digits.PROCESS)


def denoiser(model: digits.Model, label: Array) -> Any:
    """The model's denoiser of a class, or with `NULL` of all."""
    return PREDICTION.decode(model.apply, model.params, label)


def fitted(loss: Any, params: Any, key: Array, steps: int, rate: float = 3e-3) -> Any:
    """Adam on ``loss(params, key) -> number``, with a rate that falls to 0."""
    optimiser = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry: tuple, key: Array) -> tuple:
        params, state = carry
        changes, state = optimiser.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, changes), state), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, optimiser.init(p)), jax.random.split(key, steps))[0][0])(params)


def drawn(model: digits.Model, grid: Grid, keys: Array, build: Any, *arguments: Array) -> Any:
    """``scale -> images`` of denoisers ``build(model, scale, argument, ...)``, an argument a sample, in one program."""

    def one(params: Any, key: Array, scale: Array, *arguments: Array) -> Array:
        denoise = build(model._replace(params=params), scale, *arguments)
        return diffjax.sample(key, denoise, diffjax.solvers.dpmpp(), grid, shape=digits.IMAGE).x

    program = jax.jit(jax.vmap(one, (None, 0, None, *(0 for _ in arguments))))
    return lambda scale: np.clip(np.asarray(program(model.params, keys, jnp.float32(scale), *arguments)), -1.0, 1.0)


# --- a probe of the hidden states ---------------------------------------------------------------------------------


def edges(image: Array) -> Array:
    """How steep an image (8, 8, 1) in [-1, 1] is at every pixel."""
    ink = jnp.pad(image[..., 0], 1, mode="edge") / 2
    across, down = ink[1:-1, 2:] - ink[1:-1, :-2], ink[2:, 1:-1] - ink[:-2, 1:-1]
    return jnp.sqrt(across**2 + down**2 + 1e-4)


def read(params: Any, features: Any, time: Array) -> Array:
    """The probe: at every pixel a small network of all hidden states there, each normalised."""
    height, width, _ = digits.IMAGE
    grown = [jnp.repeat(jnp.repeat(h, height // h.shape[0], 0), width // h.shape[1], 1) for h in features]
    level = [h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6) for h in grown]
    told = jnp.broadcast_to(jnp.asarray(time), (height, width, 1))
    hidden = jax.nn.silu(jnp.concatenate([*level, told], -1) @ params["first"] + params["bias"])
    return (hidden @ params["second"])[..., 0] + params["offset"]


def probed(model: digits.Model, grid: Grid, judge: digits.Judge, steps: int, count: int, key: Array) -> dict[str, Any]:
    """Errors of the edges that were asked for at increasing scales, without a class; the probe's own error by level."""
    keys = jax.random.split(key, 4)
    plain = denoiser(model, jnp.int32(NULL))
    images = jnp.asarray(judge.training.images)
    x = jnp.zeros(digits.IMAGE)
    shapes = jax.eval_shape(lambda: guidance.with_features(plain, x, digits.PROCESS.level(jnp.float32(0.5))))[1]
    width = 1 + sum(h.shape[-1] for h in shapes)
    start = {
        "first": jax.random.normal(keys[0], (width, 48)) / np.sqrt(width),
        "bias": jnp.zeros(48),
        "second": jnp.zeros((48, 1)),
        "offset": jnp.zeros(()),
    }
    loss = guidance.probe_loss(plain, read)
    targets = jax.vmap(edges)(images)

    def batch(params: Any, key: Array) -> Array:
        index = jax.random.randint(key, (64,), 0, len(images))
        return loss(params, key, images[index], targets[index]).mean()

    params = fitted(batch, start, keys[1], steps)
    held_out = jnp.asarray(judge.held_out.images[:count])
    wanted = jax.vmap(edges)(held_out)

    def error(time: Array) -> Array:
        level = digits.PROCESS.level(time)
        states = level.alpha * held_out + level.sigma * jax.random.normal(keys[2], held_out.shape)
        found = jax.vmap(lambda x: read(params, guidance.with_features(plain, x, level)[1], level.time))(states)
        return jnp.sqrt(jnp.mean((found - wanted) ** 2))

    times, scales = jnp.linspace(0.05, 0.95, 7), (0.0, 0.3, 1.0, 3.0, 10.0)
    build = lambda model, scale, target: guidance.tilted(
        denoiser(model, jnp.int32(NULL)), guidance.probe(read, params, target), scale
    )
    draw = drawn(model, grid, jax.random.split(keys[3], count), build, wanted)
    samples = [draw(scale) for scale in scales]
    found = [np.asarray(jax.vmap(edges)(images)) for images in samples]
    labels = judge.held_out.labels[:count]
    return {
        "scales": list(scales),
        "errors": [float(np.sqrt(np.mean((e - wanted) ** 2))) for e in found],
        "accuracy": [float(np.mean(judge.classifier(images)[0].argmax(1) == labels)) for images in samples],
        "times": np.asarray(times),
        "probe": np.asarray(jax.jit(jax.vmap(error))(times)),
        "spread": float(jnp.std(wanted - wanted.mean(0))),  # of a guess that is the mean map
        "wanted": np.asarray(wanted[:10]),
        "source": np.asarray(held_out[:10]),
        "shown": np.stack([images[:10] for images in samples]),
    }


# --- a classifier of clean digits ---------------------------------------------------------------------------------


@value
class Clean:
    """A classifier's logits, of a clean image or, naively, of a noisy state."""

    params: Any
    graph: Any = levels.static()

    def __call__(self, x: Array, level: Level | None = None) -> Array:
        return _classifier._apply(self.graph, self.params, x[None])[0][0]


def calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = 10) -> float:
    """The expected calibration error: |accuracy - confidence| in bins of the confidence, weighted by their sizes."""
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(np.sum(right[place == b]) - np.sum(confidence[place == b])) for b in range(bins)]
    return float(np.sum(gaps) / len(labels))


def classified(
    model: digits.Model, classifier: _classifier.Classifier, grid: Grid, judge: digits.Judge, key: Array
) -> dict[str, Any]:
    """The calibration error over time, and metrics of an unconditional model under a classifier of clean digits."""
    logits = Clean(classifier.params, classifier.graph)
    keys = jax.random.split(key, 3)
    plain = denoiser(model, jnp.int32(NULL))

    @jax.jit
    def seen(images: Array, time: Array, key: Array) -> tuple[Array, Array]:
        level = digits.PROCESS.level(time)
        states = level.alpha * images + level.sigma * jax.random.normal(key, images.shape)
        return jax.vmap(logits)(states), jax.vmap(lambda x: logits(plain(x, level)))(states)

    times = np.linspace(0.1, 0.9, 9)
    known = digits.Labelled(judge.training.images[:320], judge.training.labels[:320])
    over = [seen(jnp.asarray(known.images), jnp.float32(t), keys[0])[1] for t in times]
    temperature = guidance.fitted_temperature(np.concatenate(over), np.tile(known.labels, len(times)))
    errors: dict[str, list[float]] = {"state": [], "estimate": [], "estimate, calibrated": []}
    for time in times:
        state, estimate = (np.asarray(f) for f in seen(jnp.asarray(judge.held_out.images), jnp.float32(time), keys[1]))
        for name, f in zip(errors, (state, estimate, temperature * estimate), strict=True):
            errors[name].append(calibration_error(f, judge.held_out.labels))
    labels = jnp.asarray(judge.held_out.labels)
    settings: dict[str, Any] = {
        "on the state": {},
        "on the estimate": {"on": "estimate"},
        "calibrated": {"on": "estimate", "joint": temperature, "marginal": temperature},
        "calibrated, marginal 0.7, sine": {"on": "estimate", "joint": temperature, "marginal": 0.7 * temperature},
    }
    ways: dict[str, Any] = {}
    for name, setting in settings.items():

        def build(model: digits.Model, scale: Array, label: Array, name=name, setting=setting) -> Any:
            strength = guidance.sine(0.0, 1.57 * scale) if "sine" in name else scale
            return guidance.classifier(denoiser(model, jnp.int32(NULL)), logits, label, strength, **setting)

        draw = drawn(model, grid, jax.random.split(keys[2], len(labels)), build, labels)
        ways[name] = {}
        for scale in (1.0, 3.0):
            images = draw(scale)
            images = np.where(np.isfinite(images), images, 0.0)
            metrics = judge(images, judge.held_out.labels)
            ways[name][f"{scale:g}"] = {m: metrics[m] for m in ("accuracy", "frechet_distance", "recall")}
            ways[name][f"{scale:g}"]["shown"] = images[:10]
    return {"times": times, "errors": errors, "temperature": temperature, "ways": ways}


# --- the noise that a sampler starts from -------------------------------------------------------------------------


def spectrum(x: np.ndarray) -> np.ndarray:
    """The share of a set of images (N, 8, 8, 1) in every cosine frequency, (8, 8), of sum 1."""
    waves = np.asarray(dctn(np.asarray(x, np.float64)[..., 0], axes=(1, 2), norm="ortho"))
    power = np.mean(waves**2, axis=0)
    return power / power.sum()


def started(
    model: digits.Model, judge: digits.Judge, steps: int, sampling_steps: int, count: int, scale: float, key: Array
) -> dict[str, Any]:
    """NoiseRefine: how far unguided samples are from guided ones, before and after; and noise-level guidance."""
    keys = jax.random.split(key, 4)
    grid, solver = diffjax.grids.uniform(digits.PROCESS, sampling_steps), diffjax.solvers.dpmpp()
    network = networks.UNet(digits.IMAGE, channels=(16, 32), condition=networks.label(digits.CLASSES), rngs=nnx.Rngs(0))
    apply, start = networks.functional(network)
    guided = lambda label: guidance.classifier_free(denoiser(model, label), NULL, scale)

    def refined(params: Any, x: Array, label: Array) -> Array:
        return x + apply(params, x, jnp.float32(1.0), label)

    def batch(params: Any, key: Array) -> Array:
        x = jax.random.normal(key, (32, *digits.IMAGE))
        labels = jax.random.randint(jax.random.fold_in(key, 1), (32,), 0, digits.CLASSES)

        def one(x: Array, label: Array) -> Array:
            loss = training.noise_refinement(
                denoiser(model, label), guided(label), solver, grid, lambda p, x: refined(p, x, label)
            )
            return loss(params, key, x[None])[0]

        return jax.vmap(one)(x, labels).mean()

    params = fitted(batch, start, keys[0], steps, 2e-3)
    labels = jnp.asarray(judge.held_out.labels[:count])
    x = jax.random.normal(keys[1], (len(labels), *digits.IMAGE))
    level = grid.start

    def moved(x: Array, label: Array) -> Array:
        strong, weak = denoiser(model, label), denoiser(model, jnp.int32(NULL))
        return guidance.refined_noise(x, guidance.noise_direction(strong, weak, level), 5, 0.3)

    go = lambda denoise, x: diffjax.sample(keys[2], denoise, solver, grid, x=x)

    @jax.jit
    def run(x: Array, labels: Array) -> dict[str, Any]:
        better = {"refined": jax.vmap(refined, (None, 0, 0))(params, x, labels), "moved": jax.vmap(moved)(x, labels)}
        plain, full = (lambda x, label: go(denoiser(model, label), x)), (lambda x, label: go(guided(label), x))
        ends = {"plain": jax.vmap(plain)(x, labels), "guided": jax.vmap(full)(x, labels)}
        ends |= {name: jax.vmap(plain)(start, labels) for name, start in better.items()}
        ends["moved, guided"] = jax.vmap(full)(better["moved"], labels)
        return {"ends": ends, "starts": better}

    found = run(x, labels)
    ends = {name: np.clip(np.asarray(sample.x), -1, 1) for name, sample in found["ends"].items()}
    away = lambda name: float(np.sqrt(np.mean((ends[name] - ends["guided"]) ** 2)))
    log_p = lambda images: jax.nn.log_softmax(judge.classifier(images)[0])[np.arange(len(labels)), labels].mean()
    norms = lambda start: np.sqrt(np.sum(np.asarray(start) ** 2, axis=(1, 2, 3)))
    starts = found["starts"]
    return {
        "distance": {name: away(name) for name in ends},
        "log_probability": {name: float(log_p(images)) for name, images in ends.items()},
        "accuracy": {n: float(np.mean(judge.classifier(i)[0].argmax(1) == labels)) for n, i in ends.items()},
        "evaluations": {name: float(np.mean(sample.nfe)) for name, sample in found["ends"].items()},
        "norm": {name: float(np.max(np.abs(norms(start) / norms(x) - 1))) for name, start in starts.items()},
        "spectra": {name: spectrum(np.asarray(start - x)) for name, start in starts.items()},
        "low": {name: float(spectrum(np.asarray(start - x))[:4, :4].sum()) for name, start in starts.items()},
        "shown": {name: images[:10] for name, images in ends.items()},
    }
