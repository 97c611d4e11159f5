"""Draw the marginals of every process, forwards and in reverse; train digits on four of them.

    python -m experiments.processes                       # both
    python -m experiments.processes --parts marginals     # the page alone

marginals.png has a panel for every public process: shaded the exact marginals of the forward process over its time,
as lines five quantiles of samples of the reverse process, which starts where the forward one ends.  marginals.csv has
the largest distance between their distribution functions (Kolmogorov's) over all times, beside what as many exact draws
would have.  Data are a mixture of two Gaussians (or counts, or points of a simplex).

digits.png and digits.json are of one small U-Net, trained class-conditionally on a variance-preserving, a flow, a
blurring and a phase-space process, sampled in as many network evaluations and judged as in `experiments.digits`.  In
phase space the network is given the statistic of position and momentum that says all of the data (see `diffjax.phase`).

Run time: 6 min on 2 CPU cores.
Expect: distances up to 0.07, where 0.05 is chance.  Accuracy and Frechet distance over its floor: vp 0.98 and 1.8, flow
0.98 and 1.4, blur 0.93 and 2.6, phase 0.95 and 3.2, with a quarter of the parameters of `experiments.digits`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from matplotlib.lines import Line2D

import diffjax
from diffjax import coordinates, data, grids, networks, phase, predictions, processes, solvers, training
from diffjax.levels import Array, Grid, Process, Solver
from experiments import _classifier, _plots, _run
from experiments._marginals import Marginals, Panel, gaussian_panels
from experiments._other_marginals import other_panels, warps
from experiments.digits import CLASSES, IMAGE, Judge, Labelled, labelled, table, unit

PARTS = ("marginals", "digits")
TINY = (
    *("--panels", "flow", "linear", "--paths", "60", "--processes", "phase", "--steps", "2", "--batch", "8"),
    *("--channels", "8", "--samples", "20", "--sampling-steps", "2", "--classifier-steps", "2"),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Draw the marginals of every process and train digits on four of them."""

    parts: tuple[str, ...] = PARTS
    """What to do: marginals, digits."""
    paths: int = 1000
    """Sample paths of every panel."""
    panels: tuple[str, ...] = ()
    """Panels of the page, by name; default: all."""
    steps: int = 1000
    """Training steps of every process."""
    batch: int = 64
    """Images per training step."""
    learning_rate: float = 4e-3
    """Peak learning rate of Adam: warm-up over 100 steps, then a cosine down to 0."""
    channels: tuple[int, ...] = (16, 32)
    """Features of the U-Net at each resolution."""
    processes: tuple[str, ...] = ()
    """Of vp, flow, blur and phase, those to train; default: all."""
    sampling_steps: int = 20
    """Steps of the samplers, one network evaluation each."""
    samples: int | None = None
    """Images to generate and to compare with; default: as many as are held out (297)."""
    classifier_steps: int = 400
    """Training steps of the classifier that judges."""
    seed: int = 0
    """Seed of everything that is random."""
    out: Path = Path("runs/processes")
    """Output folder."""


# --- the page of marginals ----------------------------------------------------------------------------------------

COLOURS = {
    "scalar": "C0",
    "coordinates": "C2",
    "modes": "C4",
    "entries": "C5",
    "phase": "C3",
    "interpolants": "C9",
    "not Gaussian": "C1",
}
QUANTILES = np.array([0.02, 0.16, 0.5, 0.84, 0.98])


def marginals(run: _run.Run[Options]) -> dict[str, float]:
    """Draw the page; returns the distance of every panel."""
    options = run.options
    panels = [*gaussian_panels(), *other_panels()]
    unknown = set(options.panels) - {panel.name for panel in panels}
    if unknown:
        raise ValueError(f"panels must be among {[panel.name for panel in panels]}, got {sorted(unknown)}.")
    key = jax.random.key(options.seed + 2)
    chosen = [(i, panel) for i, panel in enumerate(panels) if not options.panels or panel.name in options.panels]
    found = {}
    for i, panel in run.over(chosen, "marginals"):
        make = lambda i=i, panel=panel: drawable(panel.make(jax.random.fold_in(key, i), options.paths))
        found[panel] = run.part(f"marginals {panel.name}", make)
    lines = ["panel,group,distance"]
    lines += [f"{panel.name},{panel.group},{drawing['distance']:.4f}" for panel, drawing in found.items()]
    (options.out / "marginals.csv").write_text("\n".join(lines) + "\n")
    plot_marginals(options, found)
    distances = {panel.name: drawing["distance"] for panel, drawing in found.items()}
    worst = max(distances, key=lambda name: distances[name])
    print(f"{len(found)} panels, largest distance {distances[worst]:.3f} ({worst}).", end=" ")
    print(f"Of exact draws one set in a hundred is beyond {1.63 / options.paths**0.5:.3f} at any one time.")
    return distances


def drawable(found: Marginals) -> dict[str, Any]:
    """What a panel draws: quantiles of the samples, and the density as a share of its largest value at each time."""
    order = np.argsort(found.times)
    quantiles = np.quantile(found.samples[order], QUANTILES, axis=1)
    low, high = np.min(quantiles), np.max(quantiles)
    pad = 0.12 * (high - low)
    places = np.arange(0.0, high + 2) if found.discrete else np.linspace(low - pad, high + pad, 160)
    density = found.pdf(places)[order]
    density = density / np.maximum(density.max(axis=1, keepdims=True), 1e-12)
    result = {"times": found.times[order], "quantiles": quantiles, "places": places, "density": density}
    return result | {"distance": found.distance()}


def plot_marginals(options: Options, found: dict[Panel, dict[str, Any]], columns: int = 8) -> None:
    """One page: a panel each, and warps, which have no density, as a strip of images."""
    rows = -(-(len(found) + 1) // columns)
    with plt.rc_context(_plots.STYLE | {"axes.grid": False, "axes.titlesize": 7.5, "font.size": 7}):
        figure, axes = plt.subplots(rows, columns, figsize=(1.75 * columns, 1.45 * rows + 0.5), squeeze=False)
        for axis, (panel, drawing) in zip(axes.flat, found.items(), strict=False):
            draw_panel(axis, panel, drawing)
        strip = axes.flat[len(found)]
        forward, back = warps(np.linspace(0, 1, 5))
        _plots.image_grid(strip, np.stack([forward, back]))
        strip.set_title("restored: warps to, fro", color=COLOURS["not Gaussian"], pad=2)
        for axis in axes.flat[len(found) + 1 :]:
            axis.set_axis_off()
        figure.suptitle(
            "Exact marginals of the forward process (shaded) and quantiles of samples of the reverse one (lines: 2, 16,"
            " 50, 84, 98 %); time runs from data, at the left, to noise",
            fontsize=9,
        )
        handles = [Line2D([], [], color=colour, label=group) for group, colour in COLOURS.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(COLOURS), fontsize=8)
        _plots.save(figure, options.out / "marginals.png")


def draw_panel(axis: Any, panel: Panel, drawing: dict[str, Any]) -> None:
    """One process."""
    times, places = drawing["times"], drawing["places"]
    shade = {"cmap": "Greys", "vmin": 0, "vmax": 1.4, "shading": "nearest", "rasterized": True}
    axis.pcolormesh(times, places, np.sqrt(drawing["density"].T), **shade)
    style = {"color": COLOURS[panel.group], "linewidth": 0.8, "marker": "." if len(times) < 10 else None}
    axis.plot(times, drawing["quantiles"].T, **style)
    axis.set_title(panel.name, color=COLOURS[panel.group], pad=2)
    axis.set(xlim=(times[0], times[-1]), ylim=(places[0], places[-1]))
    axis.set_xticks([])
    axis.tick_params(length=2, pad=1, labelsize=6)


# --- digits ---------------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """A process to be trained on, what the network predicts, and how it is sampled."""

    process: Process
    prediction: Any
    solver: Solver
    power: float  # of the grid's times, linspace(1, 0) ** power

    def grid(self, steps: int) -> Grid:
        return grids.times(self.process, float(self.process.end) * np.linspace(1, 0, steps + 1) ** self.power)


def settings() -> dict[str, Setting]:
    """The four processes; velocities are predicted, which are defined at both ends of all of them."""
    cosines = coordinates.dct()
    blur = processes.blurred(processes.cosine(), cosines.frequencies(IMAGE), blur=3.0)
    return {
        "vp": _setting(processes.vp(), predictions.velocity, solvers.dpmpp(), 2.0),
        "flow": _setting(processes.flow(), predictions.flow, solvers.dpmpp(), 1.0),
        "blur": _setting(processes.changed(blur, cosines), predictions.velocity, solvers.dpmpp(), 1.0),
        "phase": _setting(phase.cld(), predictions.velocity, phase.exponential(order=2), 2.0),
    }


def _setting(process: Process, predict: Any, solver: Solver, power: float) -> Setting:
    return Setting(process, predict(process), solver, power)


def train(run: _run.Run[Options], name: str, setting: Setting, images: data.Images) -> tuple[Any, Any]:
    """The network and its averaged parameters.

    On a phase-space process the denoising loss is that of the statistic: hybrid score matching.
    """
    options = run.options
    network = networks.UNet(
        IMAGE, channels=options.channels, condition=networks.label(CLASSES), rngs=nnx.Rngs(options.seed)
    )
    apply, params = networks.functional(network)
    loss = training.denoising(setting.prediction, apply, law=training.logit_normal())
    optimiser = training.adam(options.learning_rate, warmup=min(100, options.steps - 1), steps=options.steps)
    step = training.train_step(loss, optimiser, training.ema.warmed(0.99))
    batches = data.batches(images, options.batch, seed=options.seed)
    state = training.init(jax.random.key(options.seed), params, optimiser)
    kept: dict[str, Any] = {"folder": run.folder(f"training/{name}"), "resume": run.resume, "report": run.log}
    return apply, training.fit(state, step, batches, steps=options.steps, save_every=options.steps, **kept).ema


def generate(setting: Setting, model: tuple[Any, Any], labels: np.ndarray, steps: int, key: Array) -> np.ndarray:
    """One image of each label."""
    grid, (apply, params) = setting.grid(steps), model
    variables = getattr(setting.process.schedule, "variables", None)
    shape = IMAGE if variables is None else (variables, *IMAGE)

    def draw(key: Array, label: Array) -> Array:
        denoise = setting.prediction.decode(apply, params, condition=label)
        x = diffjax.sample(key, denoise, setting.solver, grid, shape=shape).x
        return x if variables is None else x[0]  # the rest is momentum

    drawn = jax.vmap(draw)(jax.random.split(key, len(labels)), np.asarray(labels))
    return np.clip(np.asarray(drawn), -1.0, 1.0)


def digits(run: _run.Run[Options]) -> dict[str, Any]:
    """Train, sample and judge; returns what digits.json holds."""
    options = run.options
    keys = jax.random.split(jax.random.key(options.seed + 1), 3)
    splits = {name: data.load("digits", name) for name in ("train", "test")}
    real, held_out = (labelled(images) for images in splits.values())
    count = len(held_out.labels) if options.samples is None else options.samples
    index = np.linspace(0, len(held_out.labels) - 1, count).round().astype(int)
    held_out = Labelled(held_out.images[index], held_out.labels[index])
    with run.clock("judge"):
        classifier = _classifier.train(keys[0], splits["train"], options.classifier_steps, run=run)
        judge = Judge(classifier, real, held_out, classifier(held_out.images)[1], keys[1])
        columns, drawn, size = {}, {"held-out digits": held_out.images}, 0

    def trained(name: str, setting: Setting) -> dict[str, Any]:
        model = train(run, name, setting, splits["train"])
        images = generate(setting, model, held_out.labels, options.sampling_steps, keys[2])
        return {"images": images, "metrics": judge(images, held_out.labels), "size": networks.count(model[1])}

    for name in options.processes or tuple(settings()):
        with run.clock(name):
            found = run.part(name, lambda name=name: trained(name, settings()[name]))
        drawn[name], columns[name], size = found["images"], found["metrics"], found["size"]
    columns["floor"] = run.part("floor", judge.floor)
    plot_digits(options, held_out.labels, drawn)
    floor = columns["floor"]["frechet_distance"]
    ratios = {name: column["frechet_distance"] / floor for name, column in columns.items() if name != "floor"}
    print(table(columns))
    print("Frechet distance over its floor: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    return {"metrics": columns, "frechet_ratio": ratios, "parameters": size, "samples": count}


def plot_digits(options: Options, labels: np.ndarray, drawn: dict[str, np.ndarray], columns: int = 8) -> None:
    """Sheets of images, a class a row, one sheet a process."""
    with plt.rc_context(_plots.STYLE):
        figure, axes = plt.subplots(1, len(drawn), figsize=(2.9 * len(drawn), 4.1), squeeze=False)
        for panel, (title, images) in zip(axes[0], drawn.items(), strict=True):
            sheet = np.zeros((CLASSES, columns, 8, 8))
            for label in range(CLASSES):
                chosen = unit(images[labels == label][:columns])
                sheet[label, : len(chosen)] = chosen
            _plots.image_grid(panel, sheet)
            panel.set_title(title)
            panel.set_yticks(np.arange(CLASSES) * 10 + 4.5, [str(label) for label in range(CLASSES)])
        _plots.save(figure, options.out / "digits.png")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run with command-line arguments (default: those of the process); returns what the files hold."""
    with _run.start(Options, arguments) as run:
        options, result = run.options, {}
        unknown = set(options.parts) - set(PARTS) | set(options.processes) - set(settings())
        if unknown:
            known = f"parts must be among {PARTS} and processes among {tuple(settings())}"
            raise ValueError(f"{known}, got {sorted(unknown)}.")
        if "marginals" in options.parts:
            with run.clock("marginals"):
                result["marginals"] = marginals(run)
        if "digits" in options.parts:
            result["digits"] = digits(run)
            stored = result["digits"] | {"seconds": run.clock.seconds, "options": dataclasses.asdict(options)}
            (options.out / "digits.json").write_text(json.dumps(stored, indent=2, default=str) + "\n")
        print(f"{run.clock}\neverything is in {options.out}/")
    return result


if __name__ == "__main__":
    main()
