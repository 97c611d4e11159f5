"""Train a class-conditional flow-matching U-Net on handwritten digits, sample it, measure it against held-out digits.

    python -m experiments.digits            # or: make demo
    python -m experiments.digits --resume   # go on after an interruption, or with more --steps
    python -m experiments.digits --mesh data=4,fsdp=2 --precision bfloat16
    python -m experiments.digits --coordinator host:1234 --processes 2 --process 0   # and 1 elsewhere; or "auto"

The 1,797 digits (8 x 8) come with scikit-learn: 1,500 to train on, 297 held out.  As many are generated as are held
out, of the same classes.  The judge is a classifier that is trained on the training split alone.  Every metric stands
beside its floor: the same metric between equally many training and held-out images.

Writes samples.png, denoising.png (a trajectory), solvers.png (quality against network evaluations), metrics.json,
metrics.jsonl (the training's) and checkpoints.  Uses all devices: batches and samples are divided among them.  Several
processes train together and stop there; --resume in one process, on any mesh, samples and measures.

Run time: 4 min on 2 CPU cores.
Expect: accuracy 0.98 and a Frechet distance of 1.0 to 1.3 times its floor at guidance scale 1, accuracy 1.00 at 2.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import diffjax
from diffjax import data, metrics, networks, training
from diffjax.levels import Array, Grid, Sample, Solver
from experiments import _classifier, _plots, _run, _solvers, _switches

CLASSES, IMAGE = 10, (8, 8, 1)
PROCESS = diffjax.processes.flow()
SCALES = (1.0, 2.0)
TINY = (
    *("--steps", "4", "--batch", "16", "--channels", "8", "--save-every", "2", "--samples", "16"),
    *("--sampling-steps", "3", "--classifier-steps", "3", "--solvers", "ddim", "--nfe", "2", "4"),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Train, sample and measure a diffusion model of handwritten digits."""

    steps: int = 2000
    """Training steps."""
    batch: int = 128
    """Images per training step, over all devices."""
    learning_rate: float = 4e-3
    """Peak learning rate of Adam: warm-up over 100 steps, then a cosine down to 0."""
    channels: tuple[int, ...] = (32, 64)
    """Features of the U-Net at each resolution."""
    blocks: int = 1
    """Residual blocks of the U-Net at each resolution."""
    dropout: float = 0.1
    """Probability of hiding the class in training, for classifier-free guidance."""
    ema: float = 0.995
    """Decay of the moving average of the parameters, which is what is sampled."""
    ema_width: float | None = None
    """Width of a power-function average, in units of the run (0.05 to 0.1, say), instead of one with that decay."""
    law: _switches.Law = "logit-normal"
    """Which noise levels are trained on: most in the middle of the path, where the digit takes its shape."""
    weighting: _switches.Weighting = "target"
    """Weight of the squared error of a level."""
    coupling: _switches.Coupling = "independent"
    """Which noise goes with which image of a batch."""
    states: _switches.States = "noised"
    """Which states the network sees in training."""
    self_conditioning: float = 0.0
    """Probability that the network is told its own estimate; above 0 it is built with a channel for it."""
    save_every: int = 500
    """Training steps between checkpoints."""
    log_every: int = 50
    """Training steps between lines of metrics."""
    solver: str = "dpmpp"
    """Public solver of the samples that are measured."""
    sampling_steps: int = 20
    """Steps of that solver."""
    samples: int | None = None
    """Images to generate and to compare with; default: as many as are held out (297)."""
    classifier_steps: int = 600
    """Training steps of the classifier that judges."""
    solvers: tuple[str, ...] = ()
    """Public solvers in solvers.png; none named: all that run with their defaults, as far as the time goes."""
    nfe: tuple[int, ...] = (4, 8, 16, 32)
    """Network evaluations per sample in solvers.png, at most."""
    solver_seconds: float = 40.0
    """Time for solvers.png; solvers that are not reached are left out, each family's first ones are first."""
    mesh: str = "data=-1"
    """The devices as axes data, fsdp and time; -1 is what is left."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the network's computation; parameters stay float32."""
    accumulate: int = 1
    """Parts of a batch that go through the network one after the other."""
    coordinator: str | None = None
    """Address host:port of process 0 where several processes train together, or "auto" (SLURM, TPU pods, ...)."""
    processes: int | None = None
    """How many processes there are, where the coordinator is an address."""
    process: int | None = None
    """Which of them this is."""
    measure: bool = True
    """Sample and measure after the training."""
    seed: int = 0
    """Seed of everything that is random."""
    out: Path = Path("runs/digits")
    """Output folder."""


class Model(NamedTuple):
    """What is trained: a pure function and its averaged parameters."""

    apply: Any  # of an image, or of an image and an estimate of it
    params: Any


class Labelled(NamedTuple):
    """Images (N, 8, 8, 1) in [-1, 1] and their classes (N,)."""

    images: np.ndarray
    labels: np.ndarray


class Judge(NamedTuple):
    """All that generated images are measured with."""

    classifier: _classifier.Classifier
    training: Labelled
    held_out: Labelled
    features: np.ndarray  # of the held-out images
    key: Array  # fixes the directions of the sliced distance

    def __call__(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Every metric of images (N, 8, 8, 1) that were asked to be of classes (N,)."""
        logits, features = self.classifier(images)
        covered = metrics.precision_recall(features, self.features)
        return {
            "accuracy": metrics.accuracy(logits, labels),
            "frechet_distance": metrics.frechet_distance(features, self.features),
            "mmd": metrics.mmd(images, self.held_out.images),
            "sliced_wasserstein": metrics.sliced_wasserstein(self.key, images, self.held_out.images),
            "precision": covered.precision,
            "recall": covered.recall,
            "nearest_training_distance": float(np.median(metrics.nearest_distance(images, self.training.images))),
        }

    def floor(self) -> dict[str, float]:
        """The metrics of real images: training images of the held-out classes, averaged over disjoint sets of them.

        Accuracy and the distance to the training images are those of the held-out images themselves.
        """
        sets = [self(*part) for part in matching(self.training, self.held_out.labels)]
        floor = {name: float(np.mean([found[name] for found in sets])) for name in sets[0]}
        real = self(*self.held_out)
        return floor | {name: real[name] for name in ("accuracy", "nearest_training_distance")}


def labelled(images: data.Images) -> Labelled:
    """A whole split."""
    batch = images.arrays()
    return Labelled(batch.x0, np.asarray(batch.condition))


def matching(real: Labelled, labels: np.ndarray) -> list[Labelled]:
    """As many disjoint sets as there are with exactly these labels."""
    members = {label: np.flatnonzero(real.labels == label) for label in np.unique(labels)}
    count = min(len(found) // np.sum(labels == label) for label, found in members.items())
    sets = []
    for part in range(count):
        index = np.empty(len(labels), int)
        for label, found in members.items():
            index[labels == label] = found[part::count][: np.sum(labels == label)]
        sets.append(Labelled(real.images[index], real.labels[index]))
    return sets


def train(options: Options, images: data.Images, resume: bool = False, report: Any = None) -> Model:
    """Train, or go on training, on all devices; returns the averaged parameters.  ``report`` as for `training.fit`."""
    key = jax.random.key(options.seed)
    own = options.self_conditioning > 0
    network = networks.UNet(
        (*IMAGE[:2], 2 * IMAGE[2]) if own else IMAGE,
        output=IMAGE[2] if own else None,
        channels=options.channels,
        blocks=options.blocks,
        condition=networks.label(CLASSES),
        dtype=options.precision,
        rngs=nnx.Rngs(key),
    )
    apply, params = networks.functional(network)
    prediction = diffjax.predictions.flow(PROCESS)
    names = ("law", "weighting", "coupling", "states", "self_conditioning")
    switches = _switches.switches(*(getattr(options, name) for name in names))
    seen = training.stacked(apply) if own else apply
    loss = training.denoising(prediction, seen, dropout=options.dropout, null=CLASSES, **switches)
    optimiser = training.adam(options.learning_rate, warmup=min(100, options.steps - 1), steps=options.steps)
    mesh = diffjax.devices.mesh(options.mesh)
    width = options.ema_width
    average = training.ema.warmed(options.ema) if width is None else training.ema.power(width)
    step = training.train_step(loss, optimiser, average, mesh=mesh, accumulate=options.accumulate)
    part, parts = diffjax.devices.host_part(mesh)
    state = training.fit(
        training.init(key, params, optimiser, loss=loss, mesh=mesh),
        step,
        data.batches(images, options.batch, seed=options.seed, shard_index=part, shard_count=parts),
        steps=options.steps,
        folder=options.out,
        resume=resume,
        report=report,
        save_every=options.save_every,
        log_every=options.log_every,
        config=json.loads(json.dumps(dataclasses.asdict(options), default=str)),
        fixed=("batch", "learning_rate", "dropout", "ema", "ema_width", "seed", *names),
        architecture=networks.architecture(apply),
    )
    return Model(seen, diffjax.devices.gathered(state.ema))


def load(folder: Path) -> Model:
    """The model of the newest checkpoint in a run's folder.

    Raises FileNotFoundError if there is none.
    """
    record = training.checkpoint.describe(folder)
    apply, like = networks.functional(networks.build(record["architecture"], nnx.Rngs(0)))
    own = tuple(record["architecture"]["shape"]) != IMAGE
    return Model(training.stacked(apply) if own else apply, jax.device_get(training.checkpoint.weights(folder, like)))


def denoiser(model: Model, label: Array, scale: float = 1.0) -> Any:
    """The model's denoiser of one class; scale 1 is the conditional model itself."""
    prediction = diffjax.predictions.flow(PROCESS)
    if isinstance(model.apply, training.Stacked):
        guidance = {} if scale == 1.0 else {"null": CLASSES, "scale": scale}
        return training.self_conditioned(prediction, model.apply, model.params, label, **guidance)
    denoise = prediction.decode(model.apply, model.params, condition=label)
    return denoise if scale == 1.0 else diffjax.guidance.classifier_free(denoise, null=CLASSES, scale=scale)


def generate(
    model: Model, solver: Solver, grid: Grid, labels: np.ndarray, key: Array, scale: float = 1.0, **options: Any
) -> Sample:
    """One sample of each label, divided among the devices; every sample has a key of its own."""
    devices = training.data_mesh(jax.local_devices())
    count = -(-len(labels) // devices.size) * devices.size  # a multiple: the last label is repeated
    index = np.minimum(np.arange(count), len(labels) - 1)
    sharding = NamedSharding(devices, PartitionSpec("data"))
    keys = jax.device_put(jax.vmap(jax.random.fold_in, (None, 0))(key, index), sharding)

    def draw(key: Array, label: Array) -> Sample:
        return diffjax.sample(key, denoiser(model, label, scale), solver, grid, shape=IMAGE, **options)

    drawn = jax.vmap(draw)(keys, jax.device_put(labels[index], sharding))
    return jax.tree.map(lambda leaf: np.asarray(leaf)[: len(labels)], drawn)


def images_of(sample: Sample) -> np.ndarray:
    """The generated images, within the range that images have."""
    return np.clip(sample.x, -1.0, 1.0)


# the ones that a reader looks for come first in solvers.png; all others are found and follow
FAMILIAR = ("ddim", "dpmpp", "unipc", "deis", "heun", "ancestral", "sde_dpmpp", "sa_solver")


def solver_curves(run: _run.Run[Options], model: Model, judge: Judge, key: Array) -> dict[str, dict[str, list[float]]]:
    """Frechet distance against network evaluations, solver after solver until the time is spent."""
    options = run.options
    solvers = _solvers.public(options.solvers)
    known = [name for name in FAMILIAR if name in solvers]
    rest = [name for name in families_first(list(solvers)) if name not in known]
    order = list(options.solvers) or known + rest
    labels, curves = judge.held_out.labels, {}

    def curve(solver: Solver) -> dict[str, Any]:
        grids = _solvers.grids(solver, lambda steps: diffjax.grids.uniform(PROCESS, steps), options.nfe)
        nfe = [_solvers.evaluations(solver, grid) for grid in grids.values()]
        program = _solvers.padded(solver, max(nfe, default=1) // solver.calls)  # one for all numbers of steps
        drawn = [images_of(generate(model, program, grid, labels, key)) for grid in grids.values()]
        distances = [judge(images, labels)["frechet_distance"] for images in drawn]
        for count, distance in zip(nfe, distances, strict=True):
            run.log(count, frechet_distance=distance)
        return {"nfe": nfe, "frechet_distance": distances}

    begin = time.perf_counter()
    for name in run.over(order, "solvers"):
        if curves and not options.solvers and time.perf_counter() - begin > options.solver_seconds:
            break
        curves[name] = run.part(f"solver {name}", lambda solver=solvers[name]: curve(solver))
    if len(curves) < len(order):
        print(f"solvers.png shows {len(curves)} of {len(order)} solvers; --solver-seconds or --solvers for others")
    return curves


def families_first(names: Sequence[str]) -> list[str]:
    """Solvers in an order that begins with one of each family (file)."""
    seen: dict[str, int] = {}
    ranks = []
    for name in names:
        kind = _solvers.family(name)
        ranks.append((seen.setdefault(kind, 0), name))
        seen[kind] += 1
    return [name for _, name in sorted(ranks, key=lambda pair: pair[0])]


# --- pictures -----------------------------------------------------------------------------------------------------


def unit(images: np.ndarray) -> np.ndarray:
    """Images (..., 8, 8, 1) in [-1, 1] as (..., 8, 8) in [0, 1]."""
    return (images[..., 0] + 1) / 2


def plot_samples(options: Options, held_out: Labelled, generated: dict[float, np.ndarray], columns: int = 8) -> None:
    """Real images beside generated ones at each scale, a class a row."""
    labels = held_out.labels
    panels = {"held-out digits": held_out.images}
    panels |= {f"generated, guidance scale {scale:g}": images for scale, images in generated.items()}
    with plt.rc_context(_plots.STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 4.9))
        for panel, (title, images) in zip(axes, panels.items(), strict=True):
            sheet = np.full((CLASSES, columns, 8, 8), 0.0)
            for label in range(CLASSES):
                chosen = unit(images[labels == label][:columns])
                sheet[label, : len(chosen)] = chosen
            _plots.image_grid(panel, sheet)
            panel.set_title(title)
            panel.set_yticks(np.arange(CLASSES) * 10 + 4.5, [str(label) for label in range(CLASSES)])
        axes[0].set_ylabel("class asked for")
        _plots.save(figure, options.out / "samples.png")


def plot_denoising(
    options: Options, model: Model, key: Array, labels: Sequence[int] = (0, 2, 3, 5, 8), columns: int = 11
) -> None:
    """States and clean estimates on the way from noise to digits."""
    solver = _solvers.public((options.solver,))[options.solver]
    grid = diffjax.grids.uniform(PROCESS, options.sampling_steps)
    saved = generate(model, solver, grid, np.asarray(labels), key, save=("states", "x0")).saved
    assert saved.states_level is not None  # it comes with the states
    states, estimates, times = (np.asarray(part) for part in (saved.states, saved.x0, saved.states_level.time))
    # estimate i is made from state i, and the last state, the sample, is its own estimate
    estimates = np.concatenate([estimates, states[:, -1:]], axis=1)
    shown = np.unique(np.linspace(0, times.shape[1] - 1, columns).round().astype(int))
    pair = np.stack([unit(states[:, shown]), unit(estimates[:, shown])], axis=1)
    sheet = pair.reshape(2 * len(labels), len(shown), 8, 8)
    with plt.rc_context(_plots.STYLE):
        figure, axes = plt.subplots(figsize=(0.78 * len(shown) + 2, 1.5 * len(labels) + 1))
        _plots.image_grid(axes, sheet)
        axes.set_xticks(np.arange(len(shown)) * 10 + 4.5, [f"{time:.2f}" for time in times[0, shown]])
        axes.set_yticks(np.arange(len(sheet)) * 10 + 4.5, ["state", "clean estimate"] * len(labels))
        axes.set_xlabel("time (1 = noise, 0 = data)")
        axes.set_title(f"From noise to digits: {solver!r}, {options.sampling_steps} steps, guidance scale 1")
        _plots.save(figure, options.out / "denoising.png")


def plot_solvers(options: Options, curves: dict[str, dict[str, list[float]]], floor: float) -> None:
    """Quality against network evaluations."""
    with plt.rc_context(_plots.STYLE):
        figure, axes = plt.subplots(figsize=(7.5, max(4.2, 0.19 * min(len(curves), 24))))
        _plots.curves(
            axes, {name: (curve["nfe"], curve["frechet_distance"]) for name, curve in curves.items() if curve["nfe"]}
        )
        axes.axhline(floor, color="gray", linewidth=1, linestyle="--")
        label = {"color": "gray", "fontsize": 8, "va": "bottom", "ha": "right"}
        axes.text(0.99, floor, "floor: training images", transform=axes.get_yaxis_transform(), **label)
        axes.set(
            title="Digits: quality against cost, guidance scale 1", ylabel="Frechet distance of classifier features"
        )
        _plots.save(figure, options.out / "solvers.png")


# --- the run ------------------------------------------------------------------------------------------------------


def table(columns: dict[str, dict[str, float]]) -> str:
    """Metrics as rows, aligned."""
    names = next(iter(columns.values()))
    lines = [" ".join([f"{'':26}", *(f"{title:>10}" for title in columns)])]
    lines += [" ".join([f"{name:26}", *(f"{c[name]:10.4f}" for c in columns.values())]) for name in names]
    return "\n".join(lines)


# of a run that goes on: on other devices, in other company, or for longer
MAY_CHANGE = (
    "steps",
    "save_every",
    "log_every",
    "mesh",
    "accumulate",
    "coordinator",
    "processes",
    "process",
    "measure",
)


def joined(options: Options) -> Options:
    """The options, once this process has joined the others, before it touches a device."""
    diffjax.devices.initialise(options.coordinator, options.processes, options.process)
    return options


def held_out_digits(count: int | None) -> tuple[data.Images, Labelled, Labelled]:
    """The training split as a source, its images, and ``count`` held-out ones, evenly taken (default: all)."""
    splits = {name: data.load("digits", name) for name in ("train", "test")}
    real, held_out = (labelled(images) for images in splits.values())
    count = len(held_out.labels) if count is None else count
    index = np.linspace(0, len(held_out.labels) - 1, count).round().astype(int)
    return splits["train"], real, Labelled(held_out.images[index], held_out.labels[index])


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run with command-line arguments (default: those of the process); returns what metrics.json holds."""
    with _run.start(Options, arguments, may_change=MAY_CHANGE, resolve=joined) as run:
        options, clock = run.options, run.clock
        solver = _solvers.public((options.solver,))[options.solver]
        keys = jax.random.split(jax.random.key(options.seed + 1), 5)
        with clock("data"):
            images, real, held_out = held_out_digits(options.samples)
        with clock("training"):
            model = train(options, images, run.resume, run.log)
        if jax.process_count() > 1 or not options.measure:
            print(f"trained; --resume in one process samples and measures what is in {run.out}/")
            return {}
        grid = diffjax.grids.uniform(PROCESS, options.sampling_steps)
        draw = lambda scale: images_of(generate(model, solver, grid, held_out.labels, keys[0], scale))
        with clock("sampling"):
            drawn = run.part("samples", lambda: {scale: draw(scale) for scale in SCALES})
        with clock("evaluation"):
            classifier = _classifier.train(keys[1], images, options.classifier_steps, options.batch, run)
            judge = Judge(classifier, real, held_out, classifier(held_out.images)[1], keys[2])
            columns = run.part("metrics", lambda: _columns(judge, drawn))
        with clock("solvers"):
            curves = solver_curves(run, model, judge, keys[3])
        with clock("pictures"):
            plot_samples(options, held_out, drawn)
            plot_denoising(options, model, keys[4])
            plot_solvers(options, curves, columns["floor"]["frechet_distance"])
        return _finish(run, model, columns, curves, len(held_out.labels))


def _columns(judge: Judge, drawn: dict[float, np.ndarray]) -> dict[str, dict[str, float]]:
    """All metrics of each scale's images, and their floor."""
    columns = {f"scale {scale:g}": judge(images, judge.held_out.labels) for scale, images in drawn.items()}
    return {**columns, "floor": judge.floor()}


def _finish(
    run: _run.Run[Options], model: Model, columns: dict[str, Any], curves: dict[str, Any], count: int
) -> dict[str, Any]:
    """Write metrics.json and say what came out."""
    ratio = columns["scale 1"]["frechet_distance"] / columns["floor"]["frechet_distance"]
    result = {
        "metrics": columns,
        "frechet_ratio": ratio,
        "samples": count,
        "parameters": networks.count(model.params),
        "devices": f"{jax.device_count()} {jax.default_backend()}",
        "seconds": run.clock.seconds,
        "solvers": curves,
        "options": dataclasses.asdict(run.options),
    }
    (run.out / "metrics.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
    print(table(columns))
    print(f"\n{networks.count(model.params):,} parameters, {count} images;", end=" ")
    print(f"Frechet distance at scale 1: {ratio:.2f} times its floor")
    print(run.clock)
    print(f"pictures and metrics.json are in {run.out}/")
    return result


if __name__ == "__main__":
    main()
