"""Plots in one style: quality against network evaluations, and sheets of small images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from experiments._solvers import family

STYLE: Any = {
    "figure.dpi": 130,
    "figure.constrained_layout.use": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": "small",
    "lines.markersize": 4.5,
}
MARKERS = "osD^vPX<>*hpd8"


def curves(axes: Axes, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    """One line a solver, log-log: a colour for every family (file), a marker for every member of it.

    ``lines`` maps names to (network evaluations, values).  The legend is sorted by the value at the right.
    """
    families = sorted({family(name) for name in lines})
    palette = plt.get_cmap("tab10" if len(families) <= 10 else "tab20")
    colours = {kind: palette(i % palette.N) for i, kind in enumerate(families)}
    members: dict[str, int] = {}
    handles = {}
    widths = np.linspace(2.6, 1.0, len(lines))  # of two curves that coincide, the first is seen below the second
    for width, (name, (nfe, values)) in zip(widths, lines.items(), strict=True):
        kind = family(name)
        number = members[kind] = members.get(kind, -1) + 1
        dashes = ("-", "--", ":", "-.")[number // len(MARKERS) % 4]
        style = {
            "color": colours[kind],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": dashes,
            "linewidth": width,
        }
        (handles[name],) = axes.plot(nfe, values, **style)
    axes.set(xscale="log", yscale="log", xlabel="network evaluations per sample (NFE)")
    most = max(max(nfe) for nfe, _ in lines.values())
    ticks = [2**k for k in range(1 + int(np.log2(most))) if 2**k >= min(min(nfe) for nfe, _ in lines.values())]
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    if high < 100 * low:  # powers of ten alone would leave the axis bare
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
    order = sorted(lines, key=lambda name: -np.nan_to_num(lines[name][1][-1], nan=np.inf))
    columns = -(-len(order) // 24)
    axes.legend(
        [handles[name] for name in order],
        order,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        ncols=columns,
        fontsize=7.5,
    )


def highlighted(
    axes: Axes, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], chosen: Sequence[str], worst: float = 3.0
) -> None:
    """The chosen lines in colour, sorted in the legend by their value at the right, and all others thin and gray.

    For more lines than colours can tell apart.  Values above ``worst`` are cut off: what explodes would hide the rest.
    """
    for name, (nfe, values) in lines.items():
        if name not in chosen:
            axes.plot(nfe, values, color="0.8", linewidth=0.8, zorder=1)
    several = plt.get_cmap("tab10" if len(chosen) < 10 else "tab20")
    palette = [colour for colour in map(several, range(several.N)) if len(set(colour[:3])) > 1]  # gray is the others'
    order = sorted(chosen, key=lambda name: -np.nan_to_num(lines[name][1][-1], nan=np.inf))
    for i, name in enumerate(order):
        style = {"color": palette[i % len(palette)], "marker": MARKERS[i % len(MARKERS)], "zorder": 3}
        axes.plot(*lines[name], label=name, linewidth=1.6, **style)
    axes.set(xscale="log", yscale="log", xlabel="network evaluations per sample (NFE)")
    finite = [v for _, values in lines.values() for v in values if np.isfinite(v) and v > 0]
    axes.set_ylim(0.7 * min(finite), 1.4 * min(max(finite), worst))
    ticks = sorted({n for nfe, _ in lines.values() for n in nfe} & {5, 8, 10, 15, 20, 50, 100})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    others = len(lines) - len(chosen)
    if others:
        axes.plot([], [], color="0.8", linewidth=0.8, label=f"{others} others")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def image_grid(axes: Axes, images: Any, pad: int = 1) -> None:
    """Images (rows, columns, H, W) in [0, 1] as one sheet, ink on white."""
    images = 1 - np.clip(np.asarray(images), 0, 1)
    padded = np.pad(images, ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=1.0)
    rows, columns, height, width = padded.shape
    sheet = padded.transpose(0, 2, 1, 3).reshape(rows * height, columns * width)
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.tick_params(length=0)


def headless() -> None:
    """Draw to files only: no display is needed."""
    plt.switch_backend("agg")


def save(figure: Figure, path: Path) -> None:
    """Write a figure and forget it."""
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
