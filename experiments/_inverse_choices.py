"""Choices: which pixels to measure, the noise that a digit is made from, and how wide an interval must be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import diffjax
from diffjax import guidance, inverse, metrics
from diffjax.levels import Array
from experiments import _inverse_digits, _inverse_methods, _inverse_problems, _photographs, _plots, _run, digits
from experiments._inverse_pictures import half, sheet

if TYPE_CHECKING:
    from experiments.inverse import Options

HIDDEN = np.ones(_inverse_problems.SHAPE, bool)
HIDDEN[3:7, 1:7] = False  # for the inpainting by the noise


def chosen_pixels(
    options: Options, model: digits.Model, truth: np.ndarray, variances: np.ndarray, s: Any, key: Array
) -> dict[str, Any]:
    """Orders of pixels by `active`, by variance and by chance, and what the first ones of each tell."""
    most, keys = max(options.pixels), jax.random.split(key, len(truth))
    grid, solver = s.grid, _inverse_methods.SDE
    twist = lambda seen: inverse.pigdm(seen, s.variance)
    std = options.std
    at = tuple(int(i) for i in np.linspace(0, 0.6 * len(grid), most, endpoint=False)) if most <= 0.6 * len(grid) else ()
    at = at or tuple(range(min(most, len(grid))))

    def acquire(params: Any, image: Array, key: Array) -> Array:
        first, second = jax.random.split(key)

        def reveal(index: Array) -> Array:  # the same noise whenever a pixel is measured
            return image.reshape(-1)[index] + std * jax.random.normal(jax.random.fold_in(second, index))

        denoise = _inverse_digits.prior(model, params)
        found = inverse.active(
            first, denoise, solver, grid, reveal, s.shape, std=std, at=at, particles=8, spread=0.2, twist=twist
        )
        return found.order

    orders = {
        "active": np.asarray(jax.jit(jax.vmap(acquire, (None, 0, 0)))(model.params, jnp.asarray(truth), keys)),
        "variance": np.tile(np.argsort(-variances.reshape(-1))[:most], (len(truth), 1)),
        "random": np.stack(
            [
                np.random.default_rng(options.seed + i).permutation(_inverse_problems.FLAT)[:most]
                for i in range(len(truth))
            ]
        ),
    }

    def draw(params: Any, weights: Array, image: Array, key: Array) -> Array:
        first, second = jax.random.split(key)
        y = weights * (image + std * jax.random.normal(second, image.shape))
        seen = inverse.measurement(inverse.diagonal(weights), y, std)
        denoise = guidance.tilted(_inverse_digits.prior(model, params), twist(seen))
        return jax.vmap(lambda k: diffjax.sample(k, denoise, solver, grid, shape=s.shape).x)(
            jax.random.split(first, options.draws)
        )

    weights = np.zeros((len(orders), len(options.pixels), len(truth), _inverse_problems.FLAT), np.float32)
    for i, order in enumerate(orders.values()):
        for j, count in enumerate(options.pixels):
            np.put_along_axis(weights[i, j], order[:, :count], 1.0, axis=1)
    weights = weights.reshape(-1, len(truth), *_inverse_problems.SHAPE)
    program = jax.jit(jax.vmap(jax.vmap(draw, (None, 0, 0, 0)), (None, 0, None, None)))
    samples = np.asarray(program(model.params, jnp.asarray(weights), jnp.asarray(truth), keys))
    samples = samples.reshape(len(orders), len(options.pixels), *samples.shape[1:])
    return {"orders": orders, "samples": samples}


def inpainted_by_noise(options: Options, model: digits.Model, truth: np.ndarray, s: Any, key: Array) -> dict[str, Any]:
    """`d_flow` and `pigdm` where a part of the digit is hidden."""
    seen = _inverse_problems.stacked(
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
    for name, method in _inverse_methods.NOISE.items():
        each = lambda params, seen, m=method: m.each(key, _inverse_digits.prior(model, params), seen, s)
        samples, calls = jax.jit(each)(model.params, seen)
        found[name] = {"samples": np.asarray(samples), "calls": float(np.mean(np.asarray(calls)))}
    return found


def intervals(options: Options, model: digits.Model, held_out: np.ndarray, s: Any, key: Array) -> dict[str, Any]:
    """Intervals of downsampled digits' pixels, calibrated on some digits and judged on others."""
    first, second, third = options.calibration
    images = held_out[: first + second + third]
    operator = _inverse_problems.linear_operators(options.seed)["downsampling"]
    problem = _inverse_problems.linear_problem(operator, images, options.std, options.seed + 4)
    found = _inverse_digits.solved(_inverse_methods.LINEAR["ddrm"], {"": problem}, model, s, key)
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


def plot_choices(options: Options, pixels: dict, noise: dict, calibrated: dict) -> None:
    """Which pixels were chosen and what they tell; inpainting by the noise; margins of intervals."""
    with plt.rc_context(_plots.STYLE):
        figure, axes = plt.subplots(1, 4, figsize=(17, 4.2), width_ratios=(1.2, 1.7, 1.0, 1.2))
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
                    seen = np.full(_inverse_problems.FLAT, np.nan)
                    index = order[k, : max(options.pixels)]
                    seen[index] = half(pixels["truth"][k].reshape(-1)[index])
                    row += [seen.reshape(8, 8), half(pixels["samples"][i, -1, k, ..., 0].mean(0))]
                rows.append(row)
            titles = ["truth"] + [part for name in pixels["orders"] for part in (name, "mean")]
            sheet(axes[1], rows, titles, [""] * len(rows))
            axes[1].set_xlabel(f"the first {max(options.pixels)} pixels, and what they tell")
        if noise:
            rows = []
            for k in range(len(noise["truth"])):
                hidden = np.where(HIDDEN[..., 0], half(noise["truth"][k, ..., 0]), np.nan)
                both = [noise["d_flow"]["samples"][k, 0], noise["pigdm"]["samples"][k].mean(0)]
                rows.append([half(noise["truth"][k, ..., 0]), hidden] + [half(x[..., 0]) for x in both])
            sheet(axes[2], rows, ["truth", "seen", "d_flow", "pigdm, mean"], [""] * len(rows))
            axes[2].set_xlabel("inpainting by the noise")
        if calibrated:
            drawn = axes[3].imshow(calibrated["k_rcps margin"][..., 0], cmap="viridis")
            figure.colorbar(drawn, ax=axes[3], label="added to each side; pixels are in [-1, 1]")
            axes[3].grid(False)
            axes[3].set(xticks=[], yticks=[], title=f"margins: k_rcps (rcps: {calibrated['rcps margin'].flat[0]:.2f})")
            kinds = ("k_rcps", "rcps")
            said = [f"{n}: risk {calibrated[f'{n} risk']:.3f}, length {calibrated[f'{n} length']:.2f}" for n in kinds]
            axes[3].set_xlabel("\n".join(said))
        for axis, given in zip(axes, (pixels, pixels, noise, calibrated), strict=True):
            axis.set_visible(bool(given))
        _plots.save(figure, options.out / "choices.png")


# --- the part ---


def part(run: _run.Run[Options], given: _inverse_digits.Given, keys: Array) -> dict:
    """What was asked for of pixels, noise and intervals, in numbers; draws choices."""
    options, model, s = run.options, given.model, given.setting(run.options)
    pixels: dict[str, Any] = {}
    noise: dict[str, Any] = {}
    calibrated: dict[str, Any] = {}
    if "pixels" in options.parts:
        truth, variances = given.some(options.pixel_images, skip=1), given.training.var(0)
        pixels = run.part("pixels", lambda: chosen_pixels(options, model, truth, variances, s, keys[0]))
        unit = _photographs.as_unit
        mean = lambda samples: float(np.mean(metrics.psnr(unit(samples.mean(1)), unit(truth))))
        psnr = {n: [mean(x) for x in pixels["samples"][i]] for i, n in enumerate(pixels["orders"])}
        pixels = pixels | {"psnr": psnr, "truth": truth}
    if "noise" in options.parts:
        hidden = given.some(options.noise_images, skip=2)
        found = run.part("noise", lambda: inpainted_by_noise(options, model, hidden, s, keys[1]))
        noise = found | {"truth": hidden}
        judged = lambda each: _inverse_digits.scores(each["samples"], hidden, given.classifier, given.varied)
        noise["scores"] = {name: judged(each) | {"calls": each["calls"]} for name, each in found.items()}
    if "intervals" in options.parts:
        count = sum(options.calibration)
        mixed = np.random.default_rng(options.seed).permutation(len(given.held_out.images))[:count]
        make = lambda: intervals(options, model, given.held_out.images[mixed], s, keys[2])
        calibrated = run.part("intervals", make)
    plot_choices(options, pixels, noise, calibrated)
    plain = {name: value for name, value in calibrated.items() if isinstance(value, float)}
    return {"pixels": pixels.get("psnr", {}), "noise": noise.get("scores", {}), "intervals": plain}
