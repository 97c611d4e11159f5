"""Pictures of what was restored: sheets of images, and errors against coverage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np

from experiments import _plots

if TYPE_CHECKING:
    from experiments.inverse import Options

SHOWN = {  # in digits.png
    "linear": ("gaussian", "mmps", "pnp_dm", "daps"),
    "nonlinear": ("daps", "pnp_dm", "lgd", "dps"),
    "counts": ("daps", "pnp_dm", "dps"),
}


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
    chosen = {group: [name for name in SHOWN[group] if name in found[group]] for group in groups}
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


def plot_calibration(options: Options, points: dict[str, dict[str, tuple[float | None, ...]]]) -> None:
    """PSNR of the mean with its standard error against coverage, a panel a group; a method looks the same in all."""
    palette, names = plt.get_cmap("tab20"), list(dict.fromkeys(name for each in points.values() for name in each))
    with plt.rc_context(_plots.STYLE):
        figure, axes = plt.subplots(1, len(points), figsize=(4 * len(points) + 1.6, 3.9), squeeze=False)
        for axis, (group, each) in zip(axes[0], points.items(), strict=True):
            axis.axvline((options.draws - 1) / (options.draws + 1), color="gray", linewidth=1, linestyle="--")
            for name, (coverage, psnr, error) in each.items():
                i = names.index(name)
                style = {"color": palette(2 * i % 20 + 2 * i // 20), "marker": _plots.MARKERS[i % len(_plots.MARKERS)]}
                if psnr is not None:
                    where = coverage or 0.0, psnr, error or 0.0
                    axis.errorbar(*where, label=name, linestyle="", elinewidth=0.7, **style)
            axis.set(title=f"digits, {group}", xlabel="coverage (0: one estimate)", xlim=(-0.05, 1.05))
        axes[0, 0].set_ylabel("PSNR of the mean, dB; standard error over digits")
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
    learned = list(next(iter(crops.values()))["found"])
    titles = ["truth", "measurement", "classical"] + ["mean", "a sample", "4 x deviation"] * len(learned)
    with plt.rc_context(_plots.STYLE):
        figure, axes = plt.subplots(figsize=(1.05 * len(titles) + 1.6, 1.05 * len(rows) + 1.6))
        # photographs are no ink: light is white, and of the deviation black is certain
        sheet(axes, [[1 - image for image in row] for row in rows], titles, labels)
        axes.tick_params(labelsize=11)
        for k, name in enumerate(learned):
            x = (side + 2) * (3 + 3 * k) - 0.5
            axes.plot([x, x], [-0.5, (side + 2) * len(rows) - 0.5], color="tab:red", linewidth=1.2)
            axes.annotate(name, (x, 0), (4, 96), textcoords="offset points", color="tab:red", fontsize=12)
        _plots.save(figure, options.out / "photographs.png")
