"""Guide a model of handwritten digits by every method of the package that applies, at increasing scales.

    python -m experiments.guidance
    python -m experiments.guidance --digits runs/digits   # the model of experiments.digits instead of training one

What is compared is found in `diffjax.guidance`: every denoiser -> denoiser with a scale whose other arguments a
class-conditional network can fill in (a null condition, a weaker model, attention heads, the first level), and
classifier-free guidance with every rule and schedule.  All see the same initial noise.  As many digits are drawn as are
held out, of the same classes, and judged by a classifier that was trained on the training split alone: accuracy (is it
the digit that was asked for?), Frechet distance of features in units of its floor (training images), and recall (is
every kind of it drawn?).  Two more parts need no condition: perturbed attention on the unconditional model, with a
greedy choice of the heads that are perturbed, and the gradient of the likeness to a reference image.

Beside the model: a probe of its hidden states, which asks for edges; a classifier of clean digits, on the noisy state,
on the estimate, and calibrated; initial noise that stands in for guidance at half the evaluations, learned or moved;
and two exact classes in the plane, where guidance leaves the boundary and a flow brings its samples back to the data.

Writes curves.png (metrics against the scale), samples.png (one scale, method after method), scales.png (one noise at
increasing scales), unconditional.png (perturbed attention), reference.png, probe.png, classifier.png, noise.png,
fractal.png, metrics.json.

Run time: 5 min on 2 CPU cores.
Expect: accuracy 0.99, a Frechet distance of 1.3 times its floor and recall 0.82 at scale 1.  Plain guidance has
accuracy 1.00 from 2 on, and pays with Frechet distance (1.7, 2.8, 4.2 times the floor at 2, 4, 7) and recall (0.64,
0.57, 0.51); `apg` pays less (1.6, 2.6, 3.9; 0.66, 0.60, 0.52), schedules less still (`ramp` 1.4, 1.8, 2.3; 0.76, 0.72,
0.72), `adaptive` makes 14 to 16 evaluations instead of 20 (1.6, 2.5, 3.5; 0.67, 0.51, 0.38).  `perturbed_attention`
and `autoguidance` do not ask for the class and keep recall (0.85 and more), the latter with accuracy 0.93 at 7.
`onetime_negative` is for starts that hold an image: from noise its reference is the mean digit, from which everything
is extrapolated at all levels (accuracy 0.90, 6.7 times the floor at 2; unreadable at 4).

Beside the model: errors of the edges fall from 0.45 to 0.38, 0.28, 0.17 at scales 1, 3, 10, and 0.88 of the samples
are of the digit whose edges they are.  A classifier of clean digits reaches accuracy 0.26 and 0.47 at scales 1 and 3 on
the noisy state, 0.59 and 0.87 on the estimate; calibrated 0.54 and 0.81, at scale 1 nearer to the data (Frechet 1.8 and
1.7 times the floor for 2.1 and 1.6).  One temperature for all times is a compromise: the calibration error falls from
0.68 to 0.50 at time 0.9 and rises from 0.07 to 0.18 at 0.1.  Refined noise comes a third of the way to guidance
(distance 0.27 to 0.18), for the log-probability of the class most of it (-0.059 to -0.025, guided -0.018), in 6
evaluations for 12, by corrections of which 50 % are in the lowest quarter of the frequencies; noise-level guidance
("moved") has -0.017.  Fractal: W2 0.64 at scale 3, 0.16 after the flow, floor 0.14.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import diffjax
from diffjax import guidance, networks
from diffjax.catalogue import catalogue
from diffjax.levels import Array, Sample
from experiments import _classifier, _fractal, _guided_digits, _plots, _run, digits

TINY = (
    *("--steps", "3", "--weak-steps", "3", "--batch", "16", "--channels", "8", "--samples", "16", "--scales", "1", "4"),
    *("--sampling-steps", "2", "--classifier-steps", "3", "--methods", "classifier_free", "perturbed_attention"),
    *("--probe-steps", "2", "--refine-steps", "2", "--branches", "1", "--points", "24"),
)
NULL = digits.CLASSES
denoiser = _guided_digits.denoiser
# they guide something else than a class, or need a solver of their own
OTHERS = ("predictor_corrector", "self_minority")
SETTINGS = {"characteristic": {"iterations": 2, "history": 1}}  # each iteration costs as much as guidance does


@dataclasses.dataclass(frozen=True)
class Options:
    """Guide a model of digits by every method that applies."""

    digits: Path | None = None
    """Folder of a run of experiments.digits whose model is guided; none: one is trained here."""
    steps: int = 1200
    """Training steps of the model, where it is trained here."""
    weak_steps: int = 200
    """Training steps of the weak model of autoguidance, which has half the features."""
    batch: int = 128
    """Images per training step."""
    channels: tuple[int, ...] = (32, 64)
    """Features of the U-Net at each resolution."""
    scales: tuple[float, ...] = (1.0, 2.0, 4.0, 7.0)
    """Scales, the first of them 1, which is the conditional model whatever the method."""
    sampling_steps: int = 10
    """Steps of DPM-Solver++."""
    samples: int | None = 160
    """Images to draw and compare with."""
    classifier_steps: int = 400
    """Training steps of the classifier that judges."""
    probe_steps: int = 400
    """Training steps of the probe of hidden states."""
    refine_steps: int = 300
    """Training steps of the map of the initial noise."""
    branches: int = 3
    """Depth of the fractal's trees."""
    points: int = 400
    """Samples in the fractal."""
    methods: tuple[str, ...] = ()
    """Methods, rules and schedules; none named: all that apply."""
    seed: int = 0
    """Seed of everything that is random."""
    out: Path = Path("runs/guidance")
    """Output folder."""


# --- models and methods -------------------------------------------------------------------------------------------


def models(run: _run.Run[Options], images: Any) -> tuple[digits.Model, digits.Model]:
    """The model that is guided, and a smaller one that was trained for a short time."""
    options = run.options

    def trained(name: str, steps: int, channels: tuple[int, ...]) -> digits.Model:
        wanted = digits.Options(
            steps=steps, batch=options.batch, channels=channels, seed=options.seed, out=run.folder(f"training/{name}")
        )
        return digits.train(wanted, images, run.resume, run.log)

    weak = trained("weak", options.weak_steps, tuple(max(8, width // 2) for width in options.channels))
    if options.digits is not None:
        return digits.load(options.digits), weak
    return trained("model", options.steps, options.channels), weak


Build = Callable[[Any, Any, Array], Any]  # (denoiser, the weak one, scale) -> guided denoiser


def methods(heads: tuple[int, int], grid: diffjax.Grid, names: Sequence[str] = ()) -> dict[str, Build]:
    """Every guidance that applies to a class-conditional network, by name; ValueError for a name that does not."""
    known = {"null": NULL, "heads": jnp.ones(heads), "level": grid.start, "grid": grid}
    free = guidance.classifier_free
    found: dict[str, Build] = {"classifier_free": lambda denoise, weak, scale: free(denoise, NULL, scale)}
    for name, factory in catalogue(guidance).items():
        parameters = inspect.signature(factory).parameters
        first, needed = next(iter(parameters)), [p.name for p in parameters.values() if p.default is p.empty][1:]
        if first in ("denoise", "network") and "scale" in parameters and {*needed} <= {*known, "weak"}:
            fixed = {key: known[key] for key in needed if key != "weak"} | SETTINGS.get(name, {})

            def build(denoise: Any, weak: Any, scale: Array, factory=factory, fixed=fixed, needed=needed) -> Any:
                more = {"weak": weak} if "weak" in needed else {}
                return factory(denoise, **fixed, **more, scale=scale)

            if name not in found and name not in OTHERS:
                found[name] = build
        elif factory.__module__.endswith(".rules") and all(p.default is not p.empty for p in parameters.values()):
            found[name] = lambda denoise, weak, scale, rule=factory: free(denoise, NULL, scale, rule())
        elif factory.__module__.endswith(".schedules") and first == "scale":
            found[name] = lambda denoise, weak, scale, schedule=factory: free(denoise, NULL, schedule(scale))
    found["sine"] = lambda denoise, weak, scale: free(denoise, NULL, guidance.sine(1.0, scale - 1))  # the largest
    # neither in the first nor in the last fifth of the noise
    found["interval"] = lambda denoise, weak, scale: free(denoise, NULL, guidance.interval(scale, 0.25, 4.0))
    unknown = set(names) - set(found)
    if unknown:
        raise ValueError(f"methods {sorted(unknown)} do not apply; those that do are {sorted(found)}.")
    return {name: found[name] for name in (names or found)}


def drawing(
    model: digits.Model, weak: digits.Model, build: Build, grid: diffjax.Grid, labels: np.ndarray, key: Array
) -> Callable[[float], Sample]:
    """``scale -> samples`` of the labels, in one program for all scales; the same noise whatever is called."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(labels)))

    def one(params: Any, weak_params: Any, key: Array, label: Array, scale: Array) -> Sample:
        strong = denoiser(model._replace(params=params), label)
        guided = build(strong, denoiser(weak._replace(params=weak_params), label), scale)
        return diffjax.sample(key, guided, diffjax.solvers.dpmpp(), grid, shape=digits.IMAGE)

    program = jax.jit(jax.vmap(one, (None, None, 0, 0, None)))
    return lambda scale: program(model.params, weak.params, keys, jnp.asarray(labels), jnp.float32(scale))


# --- what is measured ---------------------------------------------------------------------------------------------


def sweep(scales: Sequence[float], draw: Callable[[float], Sample], judge: digits.Judge) -> dict[str, Any]:
    """Metrics at every scale, and the first image of each class."""
    labels, curves = judge.held_out.labels, []
    firsts = [int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels)]
    shown = []
    for scale in scales:
        found = draw(scale)
        images = digits.images_of(jax.tree.map(np.asarray, found))
        curves.append({**judge(images, labels), "nfe": float(np.mean(found.nfe))})
        shown.append(images[firsts])
    return {"metrics": {name: [point[name] for point in curves] for name in curves[0]}, "shown": np.stack(shown)}


def _joined(plain: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The conditional model before what a method makes of it at larger scales."""
    metrics = {name: plain["metrics"][name] + values for name, values in more["metrics"].items()}
    return {"metrics": metrics, "shown": np.concatenate([plain["shown"], more["shown"]])}


def unconditional(
    options: Options, model: digits.Model, grid: diffjax.Grid, judge: digits.Judge, key: Array
) -> dict[str, Any]:
    """Perturbed attention without a condition: all heads, and those that a greedy search for certainty takes."""
    shape = networks.attention_heads(model.apply)
    labels = np.full(len(judge.held_out.labels), NULL)

    def certainty(images: Array) -> Array:
        logits, _ = _classifier._apply(judge.classifier.graph, judge.classifier.params, jnp.clip(images, -1, 1))
        return jax.nn.softmax(logits).max(-1).mean()

    def build(mask: Array) -> Build:
        return lambda denoise, weak, scale: guidance.perturbed_attention(denoise, mask, scale)

    def objective(mask: Array) -> Array:
        few = labels[: min(48, len(labels))]
        return certainty(drawing(model, model, build(mask), grid, few, key)(2.5).x)

    chosen = jax.jit(lambda: guidance.search_heads(objective, shape, rounds=max(1, shape[0] * shape[1] // 2)))()
    result: dict[str, Any] = {"heads": np.asarray(chosen.chosen), "objectives": np.asarray(chosen.objectives)}
    for name, mask in (("all heads", jnp.ones(shape)), ("chosen heads", chosen.mask)):
        draw = drawing(model, model, build(mask), grid, labels, key)
        drawn = [digits.images_of(jax.tree.map(np.asarray, draw(scale))) for scale in options.scales]
        measured = [judge(images, judge.held_out.labels) for images in drawn]
        result[name] = {
            "certainty": [float(certainty(images)) for images in drawn],
            **{metric: [m[metric] for m in measured] for metric in ("frechet_distance", "recall")},
            "shown": np.stack([images[:10] for images in drawn]),
        }
    return result


def resembling(
    options: Options, model: digits.Model, grid: diffjax.Grid, judge: digits.Judge, key: Array, count: int = 32
) -> dict[str, Any]:
    """The gradient of the likeness to a reference image: distances to it, and images, at increasing scales."""
    reference = judge.held_out.images[int(np.flatnonzero(judge.held_out.labels == judge.held_out.labels.max())[0])]
    eps = jax.random.normal(jax.random.fold_in(key, 1), digits.IMAGE)
    like = guidance.likeness(jnp.asarray(reference), eps)
    build = lambda denoise, weak, scale: guidance.gradient(denoise, like, scale)
    draw = drawing(model, model, build, grid, np.full(count, NULL), key)
    scales = (0.0, 0.1, 0.3, 1.0, 3.0)
    drawn = [digits.images_of(jax.tree.map(np.asarray, draw(scale))) for scale in scales]
    distances = [float(np.sqrt(np.mean((images - reference) ** 2, axis=(1, 2, 3))).mean()) for images in drawn]
    shown = np.stack([images[:10] for images in drawn])
    return {"reference": np.asarray(reference), "scales": list(scales), "distances": distances, "shown": shown}


# --- pictures -----------------------------------------------------------------------------------------------------


def plot_curves(options: Options, found: dict[str, dict[str, Any]], floor: dict[str, float]) -> None:
    """Accuracy, Frechet distance and recall against the scale."""
    panels = {"accuracy": "accuracy", "frechet_distance": "Frechet distance / floor", "recall": "recall"}
    palette = plt.get_cmap("tab20")
    with plt.rc_context(_plots.STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(13.5, 4.2))
        for axis, (metric, title) in zip(axes, panels.items(), strict=True):
            unit = floor[metric] if metric == "frechet_distance" else 1.0
            for i, (name, each) in enumerate(found.items()):
                style = {"color": palette(2 * i % 20 + 2 * i // 20), "marker": _plots.MARKERS[i % len(_plots.MARKERS)]}
                axis.plot(options.scales, np.array(each["metrics"][metric]) / unit, label=name, linewidth=1.4, **style)
            axis.axhline(floor[metric] / unit, color="gray", linewidth=1, linestyle="--")
            style = {"color": "gray", "fontsize": 8, "va": "bottom", "ha": "left"}
            axis.text(0.01, floor[metric] / unit, "real digits", transform=axis.get_yaxis_transform(), **style)
            axis.set(title=title, xlabel="scale (1 = conditional model)", xscale="log")
            axis.set_xticks(options.scales, [f"{scale:g}" for scale in options.scales])
            axis.minorticks_off()
        axes[1].set_yscale("log")
        axes[1].yaxis.set_major_formatter("{x:g}")
        axes[1].yaxis.set_minor_formatter("{x:g}")
        axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        _plots.save(figure, options.out / "curves.png")


def plot_sheet(path: Path, rows: dict[str, np.ndarray], title: str) -> None:
    """Rows of images (N, 8, 8, 1) with their names."""
    sheet = np.stack([digits.unit(images) for images in rows.values()])
    with plt.rc_context(_plots.STYLE):
        figure, axis = plt.subplots(figsize=(0.5 * sheet.shape[1] + 2.4, 0.5 * len(rows) + 0.7))
        _plots.image_grid(axis, sheet)
        axis.set_yticks(np.arange(len(rows)) * 10 + 4.5, list(rows))
        axis.set_title(title, fontsize=9)
        _plots.save(figure, path)


def plot_probe(path: Path, found: dict[str, Any]) -> None:
    """What was asked for and what came, and errors against the scale and against time."""
    rows = {
        "source of the edges": digits.unit(found["source"]),
        "edges asked for": found["wanted"] / found["wanted"].max(),
    }
    rows |= {f"scale {s:g}": digits.unit(x) for s, x in zip(found["scales"], found["shown"], strict=True)}
    with plt.rc_context(_plots.STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(14, 4), width_ratios=(1.5, 1, 1))
        _plots.image_grid(axes[0], np.stack(list(rows.values())))
        axes[0].set_yticks(np.arange(len(rows)) * 10 + 4.5, list(rows))
        axes[0].set_title("a probe of hidden states asks for edges, no class")
        axes[1].plot(found["scales"], found["errors"], marker="o", label="error of the edges (rms)")
        axes[1].plot(found["scales"], found["accuracy"], marker="s", label="share of the source's class")
        axes[1].set(xscale="symlog", xlabel="scale", ylim=(0, 1))
        axes[1].set_xticks(found["scales"], [f"{s:g}" for s in found["scales"]])
        axes[1].legend()
        axes[2].plot(found["times"], found["probe"], marker="o", label="probe")
        axes[2].axhline(found["spread"], color="gray", linestyle="--", label="mean edges as guess")
        axes[2].set(xlabel="time (1 = noise)", title="error of the probe on noised digits", ylim=(0, None))
        axes[2].legend()
        _plots.save(figure, path)


def plot_classifier(path: Path, found: dict[str, Any], floor: float) -> None:
    """Calibration over time, quality of every way to use the classifier, and samples."""
    with plt.rc_context(_plots.STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(15, 4), width_ratios=(1, 1, 1.5))
        for (name, errors), marker in zip(found["errors"].items(), _plots.MARKERS, strict=False):
            axes[0].plot(found["times"], errors, marker=marker, label=name)
        axes[0].set(title="expected calibration error", xlabel="time (1 = noise)", ylim=(0, None))
        axes[0].legend()
        sheet = {}
        for (name, scales), marker in zip(found["ways"].items(), _plots.MARKERS, strict=False):
            points = [(m["accuracy"], m["frechet_distance"] / floor) for m in scales.values()]
            axes[1].plot(*zip(*points, strict=True), marker=marker, label=name)
            sheet |= {f"{name}, {scale}": digits.unit(m["shown"]) for scale, m in scales.items()}
        axes[1].set(title=f"scales {', '.join(scales)}", xlabel="accuracy", ylabel="Frechet / floor", yscale="log")
        axes[1].yaxis.set_minor_formatter("{x:g}")
        axes[1].legend()
        _plots.image_grid(axes[2], np.stack(list(sheet.values())))
        axes[2].set_yticks(np.arange(len(sheet)) * 10 + 4.5, list(sheet), fontsize=7.5)
        axes[2].set_title("a classifier of clean digits guides the unconditional model")
        _plots.save(figure, path)


def plot_start(path: Path, found: dict[str, Any]) -> None:
    """Samples from each start, and the cosine spectrum of what was added to the noise."""
    with plt.rc_context(_plots.STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(14, 3.4), width_ratios=(1.6, 1, 1))
        _plots.image_grid(axes[0], np.stack([digits.unit(images) for images in found["shown"].values()]))
        names = [f"{name} ({found['evaluations'][name]:g})" for name in found["shown"]]
        axes[0].set_yticks(np.arange(len(names)) * 10 + 4.5, names)
        axes[0].set_title("the same noise (evaluations)")
        for axis, (name, power) in zip(axes[1:], found["spectra"].items(), strict=True):
            shown = axis.imshow(np.log10(64 * np.asarray(power)), cmap="RdBu_r", vmin=-1.5, vmax=1.5)
            axis.set(title=f"{name}: {found['low'][name]:.0%} in the low quarter", xlabel="frequency")
            axis.grid(False)
        figure.colorbar(shown, ax=axes[2], label="log10 power (0: an even share)")
        _plots.save(figure, path)


def plot_all(
    options: Options, found: dict[str, Any], floor: dict[str, float], free: dict[str, Any], near: dict[str, Any]
) -> None:
    """All pictures."""
    plot_curves(options, found, floor)
    scale = max(1, len(options.scales) - 2)
    rows = {name: each["shown"][scale] for name, each in found.items()}
    first = {"conditional model": next(iter(found.values()))["shown"][0]}
    title = f"the same noise, scale {options.scales[scale]:g}, method after method"
    plot_sheet(options.out / "samples.png", first | rows, title)
    picked = [name for name in ("classifier_free", "interval", "apg", "perturbed_attention") if name in found]
    larger = [(i, s) for i, s in enumerate(options.scales) if i]
    rows = {f"{name}, {s:g}": found[name]["shown"][i] for name in picked for i, s in larger}
    plot_sheet(options.out / "scales.png", first | rows, "the same noise at increasing scales")
    names = ("all heads", "chosen heads")
    rows = {f"{name}, {s:g}": free[name]["shown"][i] for name in names for i, s in larger}
    rows = {"unconditional model": free["all heads"]["shown"][0]} | rows
    plot_sheet(options.out / "unconditional.png", rows, "no condition: perturbed attention at increasing scales")
    rows = {"reference": np.repeat(near["reference"][None], near["shown"].shape[1], 0)}
    rows |= {f"scale {s:g}": images for s, images in zip(near["scales"], near["shown"], strict=True)}
    plot_sheet(options.out / "reference.png", rows, "gradient of the likeness to a reference image")


def table(options: Options, found: dict[str, Any], floor: dict[str, float]) -> str:
    """Accuracy, Frechet distance over its floor and recall at every scale, method after method."""
    lines = [f"{'accuracy / Frechet ratio / recall':34}" + "".join(f"{f'scale {s:g}':>20}" for s in options.scales)]
    for name, each in found.items():
        m = each["metrics"]
        cells = zip(m["accuracy"], m["frechet_distance"], m["recall"], strict=True)
        lines.append(
            f"{name:34}"[:34] + "".join(f"{a:6.3f} {f / floor['frechet_distance']:6.2f} {r:5.2f} " for a, f, r in cells)
            + f" {m['nfe'][-1]:.0f} evaluations"
        )  # fmt: skip
    return "\n".join(lines)


def more(result: dict[str, Any]) -> str:
    """What was found beside the model, in words."""
    probe, clean, noise, plane = (result[name] for name in ("probe", "classifier", "initial_noise", "fractal"))
    unit = result["floor"]["frechet_distance"]
    shown = lambda numbers, digits=3: {name: round(float(number), digits) for name, number in numbers.items()}
    lines = [
        f"probe: error of the edges at {probe['scales']}: {np.round(probe['errors'], 3).tolist()},"
        f" the source's class: {np.round(probe['accuracy'], 2).tolist()}",
        f"classifier: mean calibration error {shown({k: np.mean(v) for k, v in clean['calibration_error'].items()})}",
    ]
    for name, scales in clean["ways"].items():
        cells = (f"{m['accuracy']:.3f} {m['frechet_distance'] / unit:.2f} {m['recall']:.2f}" for m in scales.values())
        lines.append(f"  {name}: accuracy, Frechet ratio, recall at {', '.join(scales)}: " + "; ".join(cells))
    for name in ("distance", "log_probability", "accuracy", "evaluations", "norm", "low"):
        lines.append(f"initial noise, {name}: {shown(noise[name])}")
    return "\n".join([*lines, f"fractal: W2 {shown(plane['w2'])}, mean distance {shown(plane['boundary'])}"])


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run with command-line arguments (default: those of the process); returns what metrics.json holds."""
    with _run.start(Options, arguments) as run:
        options, clock = run.options, run.clock
        keys = jax.random.split(jax.random.key(options.seed + 1), 3)
        images, real, held_out = digits.held_out_digits(options.samples)
        with clock("training"):
            model, weak = models(run, images)
        with clock("judge"):
            classifier = _classifier.train(keys[0], images, options.classifier_steps, options.batch, run)
            judge = digits.Judge(classifier, real, held_out, classifier(held_out.images)[1], keys[1])
            floor = run.part("floor", judge.floor)
        grid = diffjax.grids.uniform(digits.PROCESS, options.sampling_steps)
        builds = methods(networks.attention_heads(model.apply), grid, options.methods)
        found = {}
        with clock("methods"):
            draw = drawing(model, weak, lambda denoise, weak, scale: denoise, grid, held_out.labels, keys[2])
            plain = run.part("conditional model", lambda: sweep((1.0,), draw, judge))
            for name in run.over(builds, "methods"):
                draw = drawing(model, weak, builds[name], grid, held_out.labels, keys[2])
                found[name] = run.part(f"method {name}", lambda draw=draw: sweep(options.scales[1:], draw, judge))
            found = {name: _joined(plain, each) for name, each in found.items()}
        with clock("without a condition"):
            free = run.part("unconditional", lambda: unconditional(options, model, grid, judge, keys[2]))
            near = run.part("reference", lambda: resembling(options, model, grid, judge, keys[2]))
        with clock("beside the model"):
            key = jax.random.fold_in(keys[2], 5)
            count = min(48, len(held_out.labels))
            probe = run.part(
                "probe", lambda: _guided_digits.probed(model, grid, judge, options.probe_steps, count, key)
            )
            other = lambda: _classifier.train(key, images, options.classifier_steps, options.batch)
            clean = run.part("classifier", lambda: _guided_digits.classified(model, other(), grid, judge, key))
            begin = lambda: _guided_digits.started(model, judge, options.refine_steps, 6, 96, 4.0, key)
            noise = run.part("initial noise", begin)
        with clock("fractal"):
            plane = run.part("fractal", lambda: _fractal.fractal(options.branches, options.points, 40, 3.0, key))
        with clock("pictures"):
            plot_probe(options.out / "probe.png", probe)
            plot_classifier(options.out / "classifier.png", clean, floor["frechet_distance"])
            plot_start(options.out / "noise.png", noise)
            _fractal.plot(options.out / "fractal.png", plane)
            plot_all(options, found, floor, free, near)
        result = {
            "scales": options.scales,
            "floor": floor,
            "methods": {name: each["metrics"] for name, each in found.items()},
            "heads": free["heads"].tolist(),
            "certainty": {name: free[name]["certainty"] for name in ("all heads", "chosen heads")},
            "unconditional_frechet": {name: free[name]["frechet_distance"] for name in ("all heads", "chosen heads")},
            "reference": {"scales": near["scales"], "distances": near["distances"]},
            "probe": {name: probe[name] for name in ("scales", "errors", "accuracy")},
            "classifier": {
                "calibration_error": clean["errors"],
                "temperature": clean["temperature"],
                "ways": {
                    name: {scale: {k: v for k, v in m.items() if k != "shown"} for scale, m in scales.items()}
                    for name, scales in clean["ways"].items()
                },
            },
            "initial_noise": {name: values for name, values in noise.items() if name not in ("shown", "spectra")},
            "fractal": {
                "w2": plane["w2"],
                "boundary": {name: float(np.mean(far)) for name, far in plane["boundary"].items()},
            },
            "seconds": clock.seconds,
        }
        (run.out / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
        print(table(options, found, floor))
        print(f"without a condition, certainty of the classifier: {result['certainty']}, heads {result['heads']}")
        print(f"distance to the reference at {near['scales']}: {np.round(near['distances'], 3).tolist()}")
        print(more(result))
        print(f"{clock}; pictures and metrics.json are in {run.out}/")
    return result


if __name__ == "__main__":
    main()
