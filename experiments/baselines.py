"""DDPM and DDIM, on the linear and the cosine schedule, with guidance, on pixels and on latents: the baseline grid.

    python -m experiments.baselines

For each schedule and each space a class-conditional network is trained to predict the noise, and sampled by ancestral
DDPM and by DDIM at several guidance scales and numbers of steps.  The latents are the principal components of the
training images, divided by the standard deviation of the first (a linear autoencoder: the decoder is the same matrix),
so what the space can show at best is known: "decoded" is the floor of training digits that went through it.  The
pixels have a U-Net, the latents a perceptron.  The judge, the held-out digits and the floor are those of
`experiments.digits`; seconds are for all images, without compilation.

Writes baselines.png, baselines.csv and baselines.md.
Expect: DDIM with guidance 1.5 on cosine latents is best (Frechet 1.6 at 30 steps, floor 1.07); on pixels, whose U-Net
is trained for a minute only, DDPM is.  Every curve has its minimum between scales 1.5 and 2.
Run time: 5 min on 2 CPU cores.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import diffjax
from diffjax import data, networks, training
from diffjax.levels import Array, Process
from experiments import _classifier, _plots, _run, digits

SAMPLERS = {"DDPM": diffjax.solvers.ancestral(), "DDIM": diffjax.solvers.ddim()}


TINY = (
    *("--steps", "3", "--batch", "16", "--width", "16", "--samples", "20", "--classifier-steps", "3"),
    *("--scales", "1.0", "2.0", "--sampling-steps", "2", "3", "--spaces", "latent", "--schedules", "cosine"),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Baselines: sampler, schedule, guidance scale and space."""

    steps: int = 1000
    """Training steps of each of the four networks."""
    batch: int = 128
    """Images per training step."""
    learning_rate: float = 3e-3
    """Peak learning rate of Adam: warm-up over 100 steps, then a cosine down to 0."""
    channels: tuple[int, ...] = (16, 32)
    """Features of the pixels' U-Net at each resolution."""
    width: int = 192
    """Features of the latents' perceptron."""
    components: int = 32
    """Principal components that the latents are."""
    scales: tuple[float, ...] = (1.0, 1.5, 2.0, 4.0)
    """Guidance scales; 1 is the conditional model."""
    sampling_steps: tuple[int, ...] = (10, 30)
    """Steps of the samplers, a call of the network each (two under guidance)."""
    spaces: tuple[str, ...] = ("pixel", "latent")
    """Which of them."""
    schedules: tuple[str, ...] = ("linear", "cosine")
    """Which of them."""
    samples: int | None = None
    """Images to generate and to compare with; default: as many as are held out (297)."""
    classifier_steps: int = 600
    """Training steps of the classifier that judges."""
    seed: int = 0
    """Seed of everything that is random."""
    out: Path = Path("runs/baselines")
    """Output folder."""


class Space(NamedTuple):
    """Where a model lives: the shape of its states, and the way there and back for images (N, 8, 8, 1)."""

    shape: tuple[int, ...]
    encode: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]


class Result(NamedTuple):
    """One cell of the grid; metrics as `experiments.digits.Judge` gives them."""

    space: str
    schedule: str
    sampler: str
    steps: int
    scale: float
    nfe: int
    seconds: float
    metrics: dict[str, float]


def spaces(options: Options, images: np.ndarray) -> dict[str, Space]:
    """Pixels as they are, and principal components of the training images."""
    flat = images.reshape(len(images), -1)
    mean = flat.mean(0)
    _, spread, axes = np.linalg.svd(flat - mean, full_matrices=False)
    axes = axes[: options.components]
    # one factor for all: the latents keep the proportions of the data, and the largest has variance 1
    scale = spread[0] / np.sqrt(len(flat))

    def encode(images: np.ndarray) -> np.ndarray:
        return ((images.reshape(len(images), -1) - mean) @ axes.T / scale).astype(np.float32)

    def decode(latents: np.ndarray) -> np.ndarray:
        return (latents * scale @ axes + mean).reshape(-1, *digits.IMAGE)

    same = lambda images: images
    return {"pixel": Space(digits.IMAGE, same, same), "latent": Space((len(axes),), encode, decode)}


def train(
    run: _run.Run[Options], name: str, schedule: str, space: Space, process: Process, images: data.Images
) -> digits.Model:
    """A network that predicts the noise, and its averaged parameters."""
    options = run.options
    key, condition = jax.random.key(options.seed), networks.label(digits.CLASSES)
    rngs = nnx.Rngs(key)
    if name == "pixel":
        network = networks.UNet(space.shape, channels=options.channels, blocks=1, condition=condition, rngs=rngs)
    else:
        network = networks.MLP(space.shape[0], width=options.width, condition=condition, time_scale=1.0, rngs=rngs)
    apply, params = networks.functional(network)
    prediction = diffjax.predictions.noise(process)
    loss = training.denoising(prediction, apply, dropout=0.1, null=digits.CLASSES)
    warmup = min(100, options.steps - 1)
    optimiser = training.adam(options.learning_rate, warmup=warmup, steps=options.steps)
    step = training.train_step(loss, optimiser, training.ema.warmed(0.995))

    state = training.fit(
        training.init(key, params, optimiser),
        lambda state, batch: step(state, data.Batch(space.encode(np.asarray(batch.x0)), batch.condition)),
        data.batches(images, options.batch, seed=options.seed),
        steps=options.steps,
        folder=run.folder(f"training/{name}-{schedule}"),
        resume=run.resume,
        report=lambda step, line: run.log(step, {f"{name}, {schedule}/{tag}": value for tag, value in line.items()}),
    )
    return digits.Model(apply, jax.device_get(state.ema))


def draw(
    model: digits.Model, process: Process, shape: tuple[int, ...], sampler: str, steps: int, scale: float, labels: Array
) -> Callable[[Array], Any]:
    """A function of a key that draws one state of each label."""
    # not from the end of the cosine schedule, where alpha = 5e-5 makes a clean estimate of any error of the noise
    grid, solver = diffjax.grids.table(process, steps, "leading"), SAMPLERS[sampler]
    prediction = diffjax.predictions.noise(process)

    def one(key: Array, label: Array) -> Any:
        denoise = prediction.decode(model.apply, model.params, condition=label)
        if scale != 1.0:
            denoise = diffjax.guidance.classifier_free(denoise, null=digits.CLASSES, scale=scale)
        return diffjax.sample(key, denoise, solver, grid, shape=shape)

    return lambda key: jax.vmap(one)(jax.random.split(key, len(labels)), labels)


def measure(
    run: _run.Run[Options], images: data.Images, judge: digits.Judge
) -> tuple[list[Result], dict[str, np.ndarray]]:
    """The whole grid, and some images of every space, sampler and schedule at the middle scale."""
    options, results, pictures = run.options, [], {}
    known = spaces(options, judge.training.images)
    shown = options.scales[len(options.scales) // 2], options.sampling_steps[-1]
    models = list(itertools.product(options.spaces, options.schedules))
    for name, schedule in run.over(models, "models"):
        space, process = known[name], diffjax.processes.ddpm(schedule=schedule)
        with run.clock(f"training, {name}, {schedule}"):
            model = train(run, name, schedule, space, process, images)
        cells = list(itertools.product(SAMPLERS, options.sampling_steps, options.scales))
        compiled: set[tuple] = set()
        for sampler, steps, scale in run.over(cells, f"{name}, {schedule}"):
            setting = (options, judge, model, process, space, (sampler, steps, scale), compiled)
            title = f"{name}, {schedule}, {sampler}"
            nfe, seconds, found, drawn = run.part(
                f"{title}, {steps} steps, scale {scale:g}", functools.partial(measured, *setting)
            )
            results.append(Result(name, schedule, sampler, steps, scale, nfe, seconds, found))
            if (scale, steps) == shown:
                pictures[title] = drawn
    return results, pictures


def measured(
    options: Options,
    judge: digits.Judge,
    model: digits.Model,
    process: Process,
    space: Space,
    cell: tuple[str, int, float],
    compiled: set[tuple],
) -> tuple[int, float, dict[str, float], np.ndarray]:
    """Evaluations, seconds, metrics and images of one cell; ``compiled`` remembers which programs there are."""
    sampler, steps, scale = cell
    key, labels = jax.random.key(options.seed + 2), jnp.asarray(judge.held_out.labels)
    drawn = draw(model, process, space.shape, sampler, steps, scale, labels)
    program = sampler, steps, scale == 1.0  # other scales are other numbers
    if program not in compiled:
        jax.block_until_ready(drawn(key).x)
        compiled.add(program)
    begin = time.perf_counter()
    sample = jax.block_until_ready(drawn(key))
    seconds = time.perf_counter() - begin
    found = np.clip(space.decode(np.asarray(sample.x)), -1.0, 1.0).astype(np.float32)
    return int(sample.nfe[0]), seconds, judge(found, judge.held_out.labels), found


COLUMNS = ("accuracy", "frechet_distance", "mmd", "precision", "recall")


def write(options: Options, results: Sequence[Result], floors: dict[str, dict[str, float]]) -> str:
    """The table as CSV and as Markdown, best first within a number of steps; returns the Markdown."""
    header = ["space", "schedule", "sampler", "steps", "scale", "nfe", "seconds", *COLUMNS]
    ranked = sorted(results, key=lambda result: (result.steps, result.metrics["frechet_distance"]))
    lines = [
        [r.space, r.schedule, r.sampler, r.steps, f"{r.scale:g}", r.nfe, f"{r.seconds:.2f}"]
        + [f"{r.metrics[name]:.4f}" for name in COLUMNS]
        for r in ranked
    ]
    lines += [[name, *[""] * 6, *(f"{floor[key]:.4f}" for key in COLUMNS)] for name, floor in floors.items()]
    with open(options.out / "baselines.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *lines])
    rows = [header, ["---"] * len(header), *lines]
    text = "# Baselines\n\n" + "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows) + "\n"
    (options.out / "baselines.md").write_text(text)
    return text


def plot(
    options: Options,
    results: Sequence[Result],
    floors: dict[str, dict[str, float]],
    pictures: dict[str, np.ndarray],
    labels: np.ndarray,
) -> None:
    """Frechet distance against the guidance scale, a panel a space and number of steps; below, what it looks like."""
    colours = {"DDPM": "tab:blue", "DDIM": "tab:orange"}
    with plt.rc_context(_plots.STYLE):
        figure, panels = plt.subplots(
            1 + len(options.sampling_steps),
            len(options.spaces),
            figsize=(10, 3.1 * len(options.sampling_steps) + 2.6),
            squeeze=False,
        )
        for row, steps in enumerate(options.sampling_steps):
            for column, space in enumerate(options.spaces):
                axes = panels[row, column]
                for schedule, dashes in zip(options.schedules, ("--", "-"), strict=False):
                    for sampler, colour in colours.items():
                        cells = [
                            r
                            for r in results
                            if (r.space, r.schedule, r.sampler, r.steps) == (space, schedule, sampler, steps)
                        ]
                        values = [r.metrics["frechet_distance"] for r in cells]
                        style = {"color": colour, "linestyle": dashes, "marker": "o"}
                        axes.plot([r.scale for r in cells], values, label=f"{sampler}, {schedule}", **style)
                floor = floors["floor" if space == "pixel" else "decoded"]["frechet_distance"]
                axes.axhline(floor, color="gray", linewidth=1, linestyle=":")
                axes.set(yscale="log", title=f"{space}, {steps} steps", xlabel="guidance scale")
                axes.set_ylabel("Frechet distance")
        panels[0, 0].legend()
        for column, space in enumerate(options.spaces):
            axes, chosen = panels[-1, column], {k: v for k, v in pictures.items() if k.startswith(space)}
            first = [int(np.argmax(labels == label)) for label in range(digits.CLASSES)]
            sheet = np.stack([digits.unit(images[first]) for images in chosen.values()])
            _plots.image_grid(axes, sheet)
            names = [name.partition(", ")[2] for name in chosen]
            axes.set_yticks(np.arange(len(names)) * 10 + 4.5, names)
            scale = options.scales[len(options.scales) // 2]
            axes.set_title(f"{space}, {options.sampling_steps[-1]} steps, scale {scale:g}")
        _plots.save(figure, options.out / "baselines.png")


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Run with command-line arguments (default: those of the process); returns the grid."""
    with _run.start(Options, arguments) as run:
        options = run.options
        images, real, held_out = digits.held_out_digits(options.samples)
        keys = jax.random.split(jax.random.key(options.seed + 1), 2)
        with run.clock("floors"):
            classifier = _classifier.train(keys[0], images, options.classifier_steps, options.batch, run)
            judge = digits.Judge(classifier, real, held_out, classifier(held_out.images)[1], keys[1])
            floors = run.part("floors", lambda: {"floor": judge.floor(), "decoded": _decoded(options, judge)})
        with run.clock("all models"):
            results, pictures = measure(run, images, judge)
        plot(options, results, floors, pictures, held_out.labels)
        print(write(options, results, floors))
        print(f"{run.clock}; baselines.png, .csv and .md are in {run.out}/")
    return results


def _decoded(options: Options, judge: digits.Judge) -> dict[str, float]:
    """The floor of images that went through the latents."""
    latent = spaces(options, judge.training.images)["latent"]
    through = lambda images: np.clip(latent.decode(latent.encode(images)), -1, 1).astype(np.float32)
    sets = [judge(through(part.images), part.labels) for part in digits.matching(judge.training, judge.held_out.labels)]
    return {name: float(np.mean([found[name] for found in sets])) for name in sets[0]}


if __name__ == "__main__":
    main()
