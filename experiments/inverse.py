"""Restore digits and photographs from measurements by every inverse method: pictures, errors and calibration.

    python -m experiments.inverse
    python -m experiments.inverse --digits runs/digits   # the model of experiments.digits instead of training one

Digits: an unconditional model is the prior; held-out digits are measured by seven linear operators, three nonlinear
ones and a counter of photons.  Estimates are means of posterior samples.  Beside PSNR and SSIM stand the distance of
single samples to the truth in the features of a classifier of digits, and how often the interval of all samples of a
pixel holds the truth, widened by the half grey level to which the truth is rounded (of nine samples, 0.8 is right).
The baseline is the exact posterior of a Gaussian prior with the data's covariance.

Photographs: two that scikit-learn ships.  Patches of one part are learned by a mixture of Gaussians and by a network;
crops of the other part are restored with the mean over overlapping patches' estimates as the denoiser, against a
classical method each.

Choices: which pixels to measure (`active` against random ones and those of the largest variance), inpainting by the
noise (`d_flow`), and intervals with a guarantee (`rcps`, `k_rcps`).

Writes digits.png (measurement, reconstruction, samples, deviation), methods.png (every method's reconstructions),
calibration.png, photographs.png, choices.png, metrics.json.

Run time: 12 min on 2 CPU cores.
Expect (three digits and two crops: differences below about 1 dB mean nothing; that time is of the processors, trained
digits given).  PSNR of the mean and coverage, linear: the baseline 16.7 dB and .85; mmps 20.4 and .92, tmpd and pigdm
19.9 and .92, mcg 19.3 and .85, dps 18.4 and .93; ddrm, diffpir, repaint and lanpaint 17.9; tds with no more particles
than samples 17.5 and .61, its particles being alike.  No better than the baseline: ddnm 16.5, replacement 16.5,
daps 15.9, red_diff 15.3 and, one estimate that it is, d_flow 17.0.  ddnm divides the blur's noise by small singular
values (15.8 dB there; 20.7 without those below the noise); daps is as bad with a spread of 0.3 (16.1).  Nonlinear:
enkg 20.5 but .59, flowchef 18.3, dps 17.2; all samples of lgd fail in phase retrieval and JPEG.  Counts: pnp_dm 17.6.
Photographs, best learned against classical: deblurring 26.9 (ddrm, network) and 23.4 dB, inpainting 25.1 (mmps) and
24.4 (ddrm and diffpir are worse, 21.8 to 23.6), super-resolution 26.4 and 26.7: a cubic spline wins, if not by SSIM
(.84 and .82).  Coverage .31 to .55 where .6 is right: all are too sure.
16 pixels chosen by `active` 20.4 dB, of the largest variance 17.9, by chance 16.1; of 8 14.8, 15.3 and 13.6.  `d_flow`
fills in the hidden part to 19.9 dB, the mean of `pigdm` to 18.3, at 150 and 24 calls.  Intervals miss .30 of the pixels
before they are calibrated; for a risk of at most .1, `rcps` misses .048 at length .90, `k_rcps` .045 at length .88.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import diffjax
from diffjax import guidance, inverse, metrics, oracles, solvers
from diffjax.levels import Array
from experiments import _classifier, _inverse, _photographs, _plots, _run, digits

PARTS = ("digits", "photographs", "pixels", "noise", "intervals")
TINY = (
    *("--steps", "2", "--batch", "8", "--channels", "8", "--classifier-steps", "2", "--images", "1", "--draws", "2"),
    *("--levels", "4", "--methods", "ddrm", "--tasks", "inpainting", "--patch-methods", "ddrm", "--components", "2"),
    *("--patches", "60", "--patch-steps", "2", "--patch-channels", "8", "--crop", "24", "--crop-draws", "2"),
    *("--calibration", "10", "25", "5", "--parts", "digits", "photographs", "intervals"),
)
COLUMNS = ("psnr", "psnr_of_one", "ssim", "features", "coverage", "failed")
LEVEL = 1 / 16  # half a grey level of the digits, in [-1, 1]
SHOWN = ("gaussian", "pigdm", "tds, mmps", "pnp_dm", "daps")  # linear problems, digits.png
HIDDEN = np.ones(_inverse.SHAPE, bool)
HIDDEN[3:7, 1:7] = False  # for the inpainting by the noise


@dataclasses.dataclass(frozen=True)
class Options:
    """Restore digits and photographs."""

    digits: Path | None = None
    """Folder of a run of experiments.digits whose model is the prior; none: one is trained here."""
    steps: int = 1000
    """Training steps of that model, where it is trained here."""
    batch: int = 128
    """Images per training step."""
    channels: tuple[int, ...] = (32, 64)
    """Features of the U-Net at each resolution."""
    classifier_steps: int = 300
    """Training steps of the classifier whose features are compared."""
    images: int = 3
    """Digits that are restored."""
    draws: int = 9
    """Posterior samples of each."""
    levels: int = 24
    """Steps of the samplers."""
    std: float = 0.05
    """Of the measurements' noise, in units of the largest singular value."""
    methods: tuple[str, ...] = ()
    """Methods on digits; none named: all."""
    tasks: tuple[str, ...] = ("deblurring", "2x super-resolution", "inpainting")
    """What is restored in photographs."""
    patch_methods: tuple[str, ...] = ("mmps", "ddrm", "diffpir")
    """Methods on photographs; those without derivatives also with the network."""
    components: int = 24
    """Gaussians in the mixture of patches."""
    patches: int = 6000
    """Patches that it is fitted to."""
    patch_steps: int = 400
    """Training steps of the network of patches."""
    patch_channels: tuple[int, ...] = (16, 32)
    """Features of that network."""
    crop: int = 48
    """Pixels along each side of the crops that are restored."""
    crop_draws: int = 4
    """Posterior samples of each crop."""
    pixels: tuple[int, ...] = (4, 8, 16)
    """How many pixels are measured, where they are chosen."""
    pixel_images: int = 6
    """Digits of which pixels are chosen."""
    noise_images: int = 4
    """Digits that are inpainted by the noise."""
    calibration: tuple[int, int, int] = (60, 100, 100)
    """Digits that choose margins, that calibrate them, and that judge them."""
    parts: tuple[str, ...] = PARTS
    """What is done."""
    seed: int = 0
    """Seed of everything that is random."""
    out: Path = Path("runs/inverse")
    """Output folder."""


def prior(model: digits.Model, params: Any) -> Any:
    """The unconditional denoiser of digits."""
    return digits.denoiser(model._replace(params=params), jnp.asarray(digits.CLASSES))


# --- digits -------------------------------------------------------------------------------------------------------


def problems(options: Options, images: np.ndarray) -> dict[str, dict[str, _inverse.Problem]]:
    """All measurements, in groups of one form."""
    seed, std = options.seed, options.std
    linear = _inverse.linear_operators(seed)
    return {
        "linear": {name: _inverse.linear_problem(a, images, std, seed + 1) for name, a in linear.items()},
        "nonlinear": {name: _inverse.nonlinear_problem(name, images, std, seed + 2) for name in _inverse.NONLINEAR},
        "counts": {"Poisson": _inverse.poisson_problem(images, seed + 3)},
    }


def solved(
    method: _inverse.Method, group: dict[str, _inverse.Problem], model: digits.Model, s: Any, key: Array
) -> dict[str, Any]:
    """Samples (problems, images, draws, 8, 8, 1) of a method, and its calls a sample."""
    seen = _inverse.stacked([each.firm if method.firm else each.seen for each in group.values()])
    count = len(next(iter(group.values())).shown)

    def one(params: Any, seen: Any, key: Array) -> tuple[Array, Array]:
        return method.draw(key, prior(model, params), seen, s)

    program = jax.jit(jax.vmap(jax.vmap(one, (None, 0, 0)), (None, 0, None)))
    samples, calls = program(model.params, seen, jax.random.split(key, count))
    return {"samples": np.asarray(samples), "calls": float(np.mean(np.asarray(calls)))}


def scores(samples: np.ndarray, truth: np.ndarray, judge: _classifier.Classifier, varied: np.ndarray) -> dict[str, Any]:
    """What samples (N, S, 8, 8, 1) are worth: the share that is not finite, and what the others are worth."""
    finite = np.min(np.isfinite(samples), axis=(2, 3, 4))
    failed = 1 - float(np.mean(finite))
    left = np.flatnonzero(finite.sum(1))  # images of which there is a sample
    if not len(left):
        return dict.fromkeys(COLUMNS) | {"failed": failed}
    unit, found = _photographs.as_unit, []
    for i in left:
        each, true = np.clip(samples[i, finite[i]], -1, 1), truth[i : i + 1]
        mean, trues = each.mean(0, keepdims=True), np.repeat(true, len(each), 0)
        want, seen = judge(true)[1], judge(each)[1]
        inside = ((each.min(0) - LEVEL <= true) & (true <= each.max(0) + LEVEL))[0]
        found.append(
            {
                "psnr": np.mean(metrics.psnr(unit(mean), unit(true))),
                "psnr_of_one": np.mean(metrics.psnr(unit(each), unit(trues))),
                "ssim": np.mean(metrics.ssim(unit(mean), unit(true), window=5, std=1.5)),
                "features": np.mean(np.linalg.norm(seen - want, axis=-1)) / np.linalg.norm(want),
                "coverage": np.mean(inside[varied]),
            }
        )
    means: dict[str, Any] = {name: float(np.mean([row[name] for row in found])) for name in found[0]}
    return means | ({"coverage": None} if samples.shape[1] == 1 else {}) | {"failed": failed}


# --- photographs --------------------------------------------------------------------------------------------------

DIVIDE = ("ddrm", "ddnm", "replacement", "repaint", "lanpaint", "mcg")  # by singular values
WITHOUT_DERIVATIVES = ("ddrm", "ddnm", "diffpir", "replacement", "daps", "pnp_dm")


def restored(
    options: Options, name: str, make: Any, given: Any, task: Any, truth: np.ndarray, key: Array
) -> dict[str, Any]:
    """Samples of crops (N, S, H, W, 1) by a method, and their scores; ``make(given)`` is the denoiser."""
    seen = _photographs.measured(task, truth, options.seed, firm=name in DIVIDE)
    variance = float(np.var(np.concatenate([image.reshape(-1) for image in _photographs.photographs()])))
    s = _inverse.setting(_photographs.PROCESS, options.levels, variance, options.crop_draws, truth.shape[1:])
    method = _inverse.LINEAR[name]

    def one(given: Any, seen: Any, key: Array) -> Array:
        return method.draw(key, make(given), seen, s)[0]

    program = jax.jit(jax.vmap(one, (None, 0, 0)))
    return {"samples": np.asarray(program(given, seen, jax.random.split(key, len(truth))))}


def crop_scores(samples: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """What restored crops (N, S, H, W, 1) are worth."""
    samples, unit = np.clip(samples, -1, 1), _photographs.as_unit
    mean = samples.mean(1)
    inside = (samples.min(1) <= truth) & (truth <= samples.max(1))
    return {
        "psnr": float(np.mean(metrics.psnr(unit(mean), unit(truth)))),
        "ssim": float(np.mean(metrics.ssim(unit(mean), unit(truth)))),
        "edges": float(np.mean(_photographs.edge_error(mean, truth))),
        "edges_of_one": float(np.mean([_photographs.edge_error(x, truth) for x in samples.swapaxes(0, 1)])),
        "coverage": float(np.mean(inside)) if samples.shape[1] > 1 else None,
    }


# --- choices ------------------------------------------------------------------------------------------------------


def chosen_pixels(
    options: Options, model: digits.Model, truth: np.ndarray, variances: np.ndarray, s: Any, key: Array
) -> dict[str, Any]:
    """Orders of pixels by `active`, by variance and by chance, and what the first ones of each tell."""
    most, keys = max(options.pixels), jax.random.split(key, len(truth))
    grid, solver = s.grid, solvers.ancestral()
    twist = lambda seen: inverse.pigdm(seen, s.variance)
    std = options.std
    at = tuple(int(i) for i in np.linspace(0, 0.6 * len(grid), most, endpoint=False)) if most <= 0.6 * len(grid) else ()
    at = at or tuple(range(min(most, len(grid))))

    def acquire(params: Any, image: Array, key: Array) -> Array:
        first, second = jax.random.split(key)

        def reveal(index: Array) -> Array:  # the same noise whenever a pixel is measured
            return image.reshape(-1)[index] + std * jax.random.normal(jax.random.fold_in(second, index))

        denoise = prior(model, params)
        found = inverse.active(
            first, denoise, solver, grid, reveal, s.shape, std=std, at=at, particles=8, spread=0.2, twist=twist
        )
        return found.order

    orders = {
        "active": np.asarray(jax.jit(jax.vmap(acquire, (None, 0, 0)))(model.params, jnp.asarray(truth), keys)),
        "variance": np.tile(np.argsort(-variances.reshape(-1))[:most], (len(truth), 1)),
        "random": np.stack(
            [np.random.default_rng(options.seed + i).permutation(_inverse.FLAT)[:most] for i in range(len(truth))]
        ),
    }

    def draw(params: Any, weights: Array, image: Array, key: Array) -> Array:
        first, second = jax.random.split(key)
        y = weights * (image + std * jax.random.normal(second, image.shape))
        seen = inverse.measurement(inverse.diagonal(weights), y, std)
        denoise = guidance.tilted(prior(model, params), twist(seen))
        return jax.vmap(lambda k: diffjax.sample(k, denoise, solver, grid, shape=s.shape).x)(
            jax.random.split(first, options.draws)
        )

    weights = np.zeros((len(orders), len(options.pixels), len(truth), _inverse.FLAT), np.float32)
    for i, order in enumerate(orders.values()):
        for j, count in enumerate(options.pixels):
            np.put_along_axis(weights[i, j], order[:, :count], 1.0, axis=1)
    weights = weights.reshape(-1, len(truth), *_inverse.SHAPE)
    program = jax.jit(jax.vmap(jax.vmap(draw, (None, 0, 0, 0)), (None, 0, None, None)))
    samples = np.asarray(program(model.params, jnp.asarray(weights), jnp.asarray(truth), keys))
    samples = samples.reshape(len(orders), len(options.pixels), *samples.shape[1:])
    return {"orders": orders, "samples": samples}


def inpainted_by_noise(options: Options, model: digits.Model, truth: np.ndarray, s: Any, key: Array) -> dict[str, Any]:
    """`d_flow` and `pigdm` where a part of the digit is hidden."""
    seen = _inverse.stacked(
        [
            inverse.measurement(
                inverse.diagonal(HIDDEN.astype(np.float32)),
                np.where(HIDDEN, image, 0.0).astype(np.float32),
                options.std,
            )
            for image in truth
        ]
    )
    found = {}
    for name in ("d_flow", "pigdm"):
        method = _inverse.LINEAR[name]

        def one(params: Any, seen: Any, key: Array, method: Any = method) -> tuple[Array, Array]:
            return method.draw(key, prior(model, params), seen, s)

        program = jax.jit(jax.vmap(one, (None, 0, 0)))
        samples, calls = program(model.params, seen, jax.random.split(key, len(truth)))
        found[name] = {"samples": np.asarray(samples), "calls": float(np.mean(np.asarray(calls)))}
    return found


def intervals(options: Options, model: digits.Model, held_out: np.ndarray, s: Any, key: Array) -> dict[str, Any]:
    """Intervals of downsampled digits' pixels, calibrated on some digits and judged on others."""
    first, second, third = options.calibration
    images = held_out[: first + second + third]
    problem = _inverse.linear_problem(
        _inverse.linear_operators(options.seed)["downsampling"], images, options.std, options.seed + 4
    )
    found = solved(_inverse.LINEAR["ddrm"], {"": problem}, model, s, key)
    samples = np.clip(found["samples"][0], -1, 1).swapaxes(0, 1)  # (S, N, ...)
    lower, upper = inverse.calibrated_quantiles(samples, 2 / (len(samples) + 1))
    end = first + second
    groups = inverse.error_groups(lower[:first], upper[:first], images[:first], 4)
    plain = inverse.rcps(lower[first:end], upper[first:end], images[first:end], eps=0.1, delta=0.1)
    part = lower[:end], upper[:end], images[:end]
    grouped = inverse.k_rcps(*part, groups, eps=0.1, delta=0.1, optimised=first)
    low, high, true = lower[end:], upper[end:], images[end:]
    result: dict[str, Any] = {
        "eps": 0.1,
        "delta": 0.1,
        "uncalibrated risk": float(np.mean((true < low) | (true > high))),
    }
    for name, margin in (("rcps", plain.margin), ("k_rcps", grouped.margin)):
        margin = np.broadcast_to(margin, true.shape[1:])
        result[f"{name} risk"] = float(np.mean((true < low - margin) | (true > high + margin)))
        result[f"{name} length"] = float(np.mean(np.maximum(high - low + 2 * margin, 0)))
        result[f"{name} margin"] = np.asarray(margin)
    return result | {"uncalibrated length": float(np.mean(high - low)), "low": low[:4], "high": high[:4]}


# --- pictures -----------------------------------------------------------------------------------------------------


def sheet(axes: Any, rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], names: Sequence[str]) -> None:
    """Images in [0, 1] as one sheet, ink on white; NaN is a pixel of which nothing is known, in blue."""
    filled = np.stack([np.stack([np.asarray(image) for image in row]) for row in rows])
    coloured = np.repeat((1 - np.clip(filled, 0, 1))[..., None], 3, axis=-1)
    coloured[np.isnan(filled)] = (0.75, 0.85, 1.0)
    padded = np.pad(coloured, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.0)
    count, columns, height, width, _ = padded.shape
    axes.imshow(padded.transpose(0, 2, 1, 3, 4).reshape(count * height, columns * width, 3), interpolation="nearest")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(columns) * width + (width - 1) / 2, titles, rotation=90, fontsize=8)
    axes.xaxis.tick_top()
    axes.set_yticks(np.arange(count) * height + (height - 1) / 2, names, fontsize=8)
    axes.tick_params(length=0)


def fitting(image: np.ndarray, side: int = 8) -> np.ndarray:
    """A picture of a measurement as (side, side), by repeating pixels or by what is in the middle."""
    height = len(image)
    return np.kron(image, np.ones((side // height,) * 2)) if height < side else image[:side, :side]


def half(image: np.ndarray) -> np.ndarray:
    """[-1, 1] as [0, 1]."""
    return (image + 1) / 2


def plot_digits(options: Options, found: dict, groups: dict, truth: np.ndarray, which: int = 0, shown: int = 4) -> None:
    """For one digit: measurement, and for some methods mean, deviation and samples."""
    wanted = {"linear": SHOWN, "nonlinear": ("daps", "pnp_dm", "lgd", "dps"), "counts": ("daps", "pnp_dm", "dps")}
    chosen = {group: [name for name in wanted[group] if name in found[group]] for group in groups}
    shown = min(shown, options.draws)
    wide = max(len(names) for names in chosen.values()) or 1
    blank = np.zeros((8, 8))
    rows, names, starts = [], [], []
    for group, each in groups.items():
        starts.append(len(rows))
        rows.append([blank] * (2 + (2 + shown) * wide))  # where the methods' names are
        names.append("")
        for i, (problem, measured) in enumerate(each.items()):
            row = [half(truth[which, ..., 0]), half(fitting(measured.shown[which]))]
            for method in chosen[group]:
                samples = found[group][method]["samples"][i, which, ..., 0]
                deviation = np.clip(samples.std(0), 0, 1) if len(samples) > 1 else blank
                row += [half(samples.mean(0)), deviation, *half(samples[:shown])]
            row += [blank] * ((2 + shown) * (wide - len(chosen[group])))
            rows.append(row)
            names.append(problem)
    titles = ["truth", "seen"] + ["mean", "deviation", *[f"sample {k + 1}" for k in range(shown)]] * wide
    with plt.rc_context(_plots.STYLE):
        figure, axes = plt.subplots(figsize=(0.36 * len(titles) + 1.8, 0.36 * len(rows) + 1.4))
        sheet(axes, rows, titles, names)
        for group, start in zip(groups, starts, strict=True):
            for k, method in enumerate(chosen[group]):
                x, y = 20 + 10 * (2 + shown) * k - 0.5, 10 * start - 0.5
                axes.plot([x, x], [y, y + 10 * (len(groups[group]) + 1)], color="0.6", linewidth=0.7)
                axes.text(x + 1, y + 9, method, color="tab:red", fontsize=8, ha="left", va="bottom")
        _plots.save(figure, options.out / "digits.png")


def plot_methods(options: Options, found: dict, groups: dict, truth: np.ndarray, which: int = 1) -> None:
    """Every method's reconstruction (mean of the samples) of one digit from every measurement it is for."""
    which = min(which, len(truth) - 1)
    measured = [(group, i, name) for group, each in groups.items() for i, name in enumerate(each)]
    rows = [[half(truth[which, ..., 0])] * len(measured)]
    rows.append([half(fitting(groups[group][name].shown[which])) for group, _, name in measured])
    methods = list(dict.fromkeys(name for each in found.values() for name in each))
    blank = np.zeros((8, 8))  # where a method is not for that measurement
    for method in methods:
        known = [(found[group].get(method), i) for group, i, _ in measured]
        rows.append([half(r["samples"][i, which, ..., 0].mean(0)) if r else blank for r, i in known])
    with plt.rc_context(_plots.STYLE):
        figure, axes = plt.subplots(figsize=(0.42 * len(measured) + 1.6, 0.42 * len(rows) + 1.4))
        sheet(axes, rows, [name for *_, name in measured], ["truth", "measurement", *methods])
        _plots.save(figure, options.out / "methods.png")


def plot_calibration(options: Options, table: dict[str, dict[str, dict[str, dict]]]) -> None:
    """PSNR of the mean against coverage, averaged over the problems of a group; a method looks the same in all."""
    palette, names = plt.get_cmap("tab20"), list(dict.fromkeys(name for each in table.values() for name in each))
    with plt.rc_context(_plots.STYLE):
        figure, axes = plt.subplots(1, len(table), figsize=(4 * len(table) + 1.6, 3.9), squeeze=False)
        for axis, (group, each) in zip(axes[0], table.items(), strict=True):
            axis.axvline((options.draws - 1) / (options.draws + 1), color="gray", linewidth=1, linestyle="--")
            for name, rows in each.items():
                i, psnr = names.index(name), average(rows, "psnr")
                style = {"color": palette(2 * i % 20 + 2 * i // 20), "marker": _plots.MARKERS[i % len(_plots.MARKERS)]}
                if psnr is not None:
                    axis.plot(average(rows, "coverage") or 0.0, psnr, label=name, linestyle="", **style)
            axis.set(title=f"digits, {group}", xlabel="coverage (0: one estimate)", xlim=(-0.05, 1.05))
        axes[0, 0].set_ylabel("PSNR of the mean, dB")
        handles = {label: h for axis in axes[0] for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles, loc="outside right center")
        _plots.save(figure, options.out / "calibration.png")


def plot_photographs(options: Options, crops: dict, truth: np.ndarray) -> None:
    """Truth, measurement, classical and learned restorations, a sample, and the deviation of the samples."""
    side = options.crop
    rows, labels = [], []
    for name, task in crops.items():
        for i in range(len(truth)):
            learned = []
            for each in task["found"].values():
                samples = each["samples"][i, ..., 0]
                learned += [half(samples.mean(0)), half(samples[0]), np.clip(4 * samples.std(0), 0, 1)]
            rows.append(
                [half(truth[i, ..., 0]), half(fitting(task["shown"][i], side)), half(task["classical"][i]), *learned]
            )
            labels.append(f"{name}\n({task['name']})")
    titles = ["truth", "measurement", "classical"]
    for method in next(iter(crops.values()))["found"]:
        titles += [f"{method}: mean", "a sample", "4 x deviation"]
    with plt.rc_context(_plots.STYLE):
        size = 1.05
        figure, axes = plt.subplots(figsize=(size * len(titles) + 1.6, size * len(rows) + 1.6))
        # photographs are no ink: light is white, and of the deviation black is certain
        sheet(axes, [[1 - image for image in row] for row in rows], titles, labels)
        _plots.save(figure, options.out / "photographs.png")


def plot_choices(options: Options, pixels: dict, noise: dict, calibrated: dict, truth: np.ndarray) -> None:
    """Which pixels were chosen and what they tell; inpainting by the noise; margins of intervals."""
    with plt.rc_context(_plots.STYLE):
        figure, axes = plt.subplots(1, 4, figsize=(15.5, 3.6), width_ratios=(1.2, 1.3, 1.2, 1.1))
        if pixels:
            for (name, values), marker in zip(pixels["psnr"].items(), "os^", strict=True):
                axes[0].plot(options.pixels, values, marker=marker, label=name)
            axes[0].set(xlabel="pixels measured, of 64", ylabel="PSNR of the mean, dB", title="pixels chosen by")
            axes[0].set_xticks(options.pixels)
            axes[0].legend()
            rows = []
            for k in range(min(4, len(pixels["truth"]))):
                row = [half(pixels["truth"][k, ..., 0])]
                for i, order in enumerate(pixels["orders"].values()):
                    seen = np.full(_inverse.FLAT, np.nan)
                    index = order[k, : max(options.pixels)]
                    seen[index] = half(pixels["truth"][k].reshape(-1)[index])
                    row += [seen.reshape(8, 8), half(pixels["samples"][i, -1, k, ..., 0].mean(0))]
                rows.append(row)
            titles = ["truth"] + [part for name in pixels["orders"] for part in (name, "mean")]
            sheet(axes[1], rows, titles, [""] * len(rows))
        if noise:
            rows = []
            for k in range(len(noise["truth"])):
                hidden = np.where(HIDDEN[..., 0], half(noise["truth"][k, ..., 0]), np.nan)
                both = [noise["d_flow"]["samples"][k, 0], noise["pigdm"]["samples"][k].mean(0)]
                rows.append([half(noise["truth"][k, ..., 0]), hidden] + [half(x[..., 0]) for x in both])
            sheet(axes[2], rows, ["truth", "seen", "d_flow", "pigdm, mean"], [""] * len(rows))
        if calibrated:
            margin = calibrated["k_rcps margin"][..., 0]
            drawn = axes[3].imshow(margin, cmap="viridis")
            figure.colorbar(drawn, ax=axes[3])
            axes[3].grid(False)
            axes[3].set_xticks([])
            axes[3].set_yticks([])
            axes[3].set_title(
                f"margins of k_rcps (rcps: {calibrated['rcps margin'].flat[0]:.2f})\n"
                f"risk {calibrated['k_rcps risk']:.3f}, length {calibrated['k_rcps length']:.2f}"
                f" (rcps {calibrated['rcps risk']:.3f}, {calibrated['rcps length']:.2f})",
                fontsize=8,
            )
        _plots.save(figure, options.out / "choices.png")


# --- the run ------------------------------------------------------------------------------------------------------


def average(rows: dict[str, dict[str, Any]], column: str) -> float | None:
    """Over the problems of which it is known."""
    known = [row[column] for row in rows.values() if row[column] is not None]
    return float(np.mean(known)) if known else None


def report(result: dict[str, Any]) -> str:
    """All numbers."""
    shown = lambda value: f"{'-':>9}" if value is None else f"{value:9.2f}"
    lines = []
    for group, each in result["digits"].items():
        lines.append(f"{group:22}" + "".join(f"{name:>12}" for name in COLUMNS) + "   calls")
        for name, rows in each.items():
            means = [average(rows, column) for column in COLUMNS]
            calls = result["calls"][group].get(name, 0)
            lines.append(f"  {name:20}" + "".join(f"   {shown(value)}" for value in means) + f"  {calls:6.0f}")
    for task, each in result["photographs"].items():
        for name, row in each.items():
            lines.append(f"{task:22} {name:24}" + "".join(f"  {key} {shown(value)}" for key, value in row.items()))
    for name in ("pixels", "noise", "intervals"):
        lines += [f"{name}: {result[name]}"] if result[name] else []
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run with command-line arguments (default: those of the process); returns what metrics.json holds."""
    with _run.start(Options, arguments) as run:
        options, clock = run.options, run.clock
        unknown = set(options.parts) - set(PARTS)
        if unknown:
            raise ValueError(f"parts {sorted(unknown)} are not among {PARTS}.")
        keys = jax.random.split(jax.random.key(options.seed + 1), 8)
        images, real, held_out = digits.held_out_digits(None)
        with clock("training"):
            model = _model(run, images)
            classifier = _classifier.train(keys[0], images, options.classifier_steps, options.batch, run)
        result: dict[str, Any] = {
            "digits": {},
            "calls": {},
            "photographs": {},
            "pixels": {},
            "noise": {},
            "intervals": {},
        }
        data = _Digits(model, classifier, real.images, held_out)
        if "digits" in options.parts:
            with clock("digits"):
                result["digits"], result["calls"] = _digits(run, data, keys[1])
        if "photographs" in options.parts:
            with clock("photographs"):
                result["photographs"] = _photographs_part(run, keys[2])
        with clock("choices"):
            result |= _choices(run, data, keys[3:])
        result["seconds"] = clock.seconds
        (run.out / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
        print(report(result))
        print(f"{clock}; pictures and metrics.json are in {run.out}/")
    return result


@dataclasses.dataclass(frozen=True)
class _Digits:
    """What all parts on digits share."""

    model: digits.Model
    classifier: _classifier.Classifier
    training: np.ndarray
    held_out: digits.Labelled

    @property
    def variance(self) -> float:
        return float(np.mean(self.training.var(0)))

    def some(self, count: int, skip: int = 0) -> np.ndarray:
        """Held-out digits of classes 0, 1, 2, ... in turn, after the first ``skip`` of each class."""
        labels = self.held_out.labels
        index = [np.flatnonzero(labels == k % 10)[skip + k // 10] for k in range(count)]
        return self.held_out.images[index]


def _digits(run: _run.Run[Options], given: _Digits, key: Array) -> tuple[dict, dict]:
    options = run.options
    order = np.array([3, 8, 5, 2, 9, 0, 6, 4, 7, 1])
    truth = given.some(10)[order[: options.images]]
    groups = problems(options, truth)
    s = _inverse.setting(digits.PROCESS, options.levels, given.variance, options.draws)
    known = {"linear": _inverse.LINEAR, "nonlinear": _inverse.ANY, "counts": _inverse.COUNTS}
    known = {group: {n: m for n, m in each.items() if n in (options.methods or each)} for group, each in known.items()}
    law = oracles.wiener(given.training)
    draws = lambda: {
        "samples": np.stack(
            [_inverse.gaussian_draws(law, p, options.draws, options.seed) for p in groups["linear"].values()]
        ),
        "calls": 0.0,
    }
    known = {group: each for group, each in known.items() if each or group == "linear"}
    groups = {group: groups[group] for group in known}
    found: dict[str, dict[str, Any]] = {group: {} for group in groups}
    found["linear"]["gaussian"] = run.part("digits linear gaussian", draws)
    for group, name in run.over([(g, n) for g, each in known.items() for n in each], "methods"):
        make = lambda group=group, name=name: solved(known[group][name], groups[group], given.model, s, key)
        found[group][name] = run.part(f"digits {group} {name}", make)
    varied = given.training.std(0) > 0.1
    table = {
        group: {
            name: {
                problem: scores(result["samples"][i], truth, given.classifier, varied)
                for i, problem in enumerate(groups[group])
            }
            for name, result in each.items()
        }
        for group, each in found.items()
    }
    plot_digits(options, found, groups, truth)
    plot_methods(options, found, groups, truth)
    plot_calibration(options, table)
    return table, {group: {name: r["calls"] for name, r in each.items()} for group, each in found.items()}


def _photographs_part(run: _run.Run[Options], key: Array) -> dict:
    options = run.options
    truth = _photographs.crops(options.crop)
    fitted = run.part(
        "mixture of patches",
        lambda: _photographs.fitted_mixture(8, options.components, options.patches, options.seed),
    )
    apply, params = _photographs.trained(run, 16, options.patch_channels, options.patch_steps, 32, options.seed)
    mixture = _photographs.mixture_prior(fitted, 8, 4)
    priors = {"mixture": (lambda given: given, mixture)}
    priors["network"] = (lambda given: _photographs.network_prior(apply, given, 16, 8), params)
    every = _photographs.restorations(options.crop, options.seed)
    pairs = [
        (prior, method)
        for prior in priors
        for method in options.patch_methods
        if prior == "mixture" or method in WITHOUT_DERIVATIVES
    ]
    crops, table = {}, {}
    for name in run.over(options.tasks, "photographs"):
        task = every[name]
        y = np.asarray(_photographs.measured(task, truth, options.seed).y)
        classical = np.stack([task.classical(one) for one in y])
        found = {}
        for prior_name, method in pairs:
            make, given = priors[prior_name]
            again = lambda m=method, make=make, given=given, task=task: restored(
                options, m, make, given, task, truth, key
            )
            found[f"{method}, {prior_name}"] = run.part(f"photographs {name} {method} {prior_name}", again)
        shown = np.stack([task.shown(one) for one in y])
        crops[name] = {"found": found, "classical": classical, "shown": shown, "name": task.name}
        table[name] = {task.name: crop_scores(classical[:, None, ..., None], truth)}
        table[name] |= {label: crop_scores(each["samples"], truth) for label, each in found.items()}
    plot_photographs(options, crops, truth)
    return table


def _choices(run: _run.Run[Options], given: _Digits, keys: Array) -> dict:
    options, model = run.options, given.model
    s = _inverse.setting(digits.PROCESS, options.levels, given.variance, options.draws)
    pixels: dict[str, Any] = {}
    noise: dict[str, Any] = {}
    calibrated: dict[str, Any] = {}
    if "pixels" in options.parts:
        truth = given.some(options.pixel_images, skip=1)
        variances = given.training.var(0)
        pixels = run.part("pixels", lambda: chosen_pixels(options, model, truth, variances, s, keys[0]))
        unit = _photographs.as_unit
        mean = lambda samples: float(np.mean(metrics.psnr(unit(samples.mean(1)), unit(truth))))
        names = list(pixels["orders"])
        psnr = {name: [mean(samples) for samples in pixels["samples"][i]] for i, name in enumerate(names)}
        pixels = pixels | {"psnr": psnr, "truth": truth}
    if "noise" in options.parts:
        truth = given.some(options.noise_images, skip=2)
        found = run.part("noise", lambda: inpainted_by_noise(options, model, truth, s, keys[1]))
        noise = found | {"truth": truth}
        varied = given.training.std(0) > 0.1
        result = {name: scores(each["samples"], truth, given.classifier, varied) for name, each in found.items()}
        noise["scores"] = {name: row | {"calls": found[name]["calls"]} for name, row in result.items()}
    if "intervals" in options.parts:
        count = sum(options.calibration)
        mixed = np.random.default_rng(options.seed).permutation(len(given.held_out.images))[:count]
        short = _inverse.setting(digits.PROCESS, max(2, options.levels // 2), given.variance, max(2, options.draws))
        make = lambda: intervals(options, model, given.held_out.images[mixed], short, keys[2])
        calibrated = run.part("intervals", make)
    plot_choices(options, pixels, noise, calibrated, given.held_out.images)
    plain = {name: value for name, value in calibrated.items() if isinstance(value, float)}
    return {"pixels": pixels.get("psnr", {}), "noise": noise.get("scores", {}), "intervals": plain}


def _model(run: _run.Run[Options], images: Any) -> digits.Model:
    options = run.options
    if options.digits is not None:
        return digits.load(options.digits)
    wanted = digits.Options(
        steps=options.steps,
        batch=options.batch,
        channels=options.channels,
        seed=options.seed,
        out=run.folder("training/model"),
    )
    return digits.train(wanted, images, run.resume, run.log)


if __name__ == "__main__":
    main()
