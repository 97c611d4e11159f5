"""docs/posterior.md and its figure, from the results alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.inverse import methods
from benchmarks.inverse.problems import BLIND, EXACT_Y, KINDS, noises, problems

DOCS = Path(__file__).parents[2] / "docs"
GROUPS = {
    "mixture 8": ["mixture 8, 1 seen", "mixture 8, 2 seen", "mixture 8, 4 seen"],
    "mixture 80": ["mixture 80, 1 seen", "mixture 80, 2 seen", "mixture 80, 4 seen"],
    "mixture 800": ["mixture 800, 1 seen", "mixture 800, 2 seen", "mixture 800, 4 seen"],
    "Gaussian": ["gaussian 8"],
    "jumps": ["laplace jumps", "student jumps"],
    "images": ["inpainting", "deblurring", "super-resolution", "tomography"],
}
SPECIAL = {"exact y": [EXACT_Y], "blind": [BLIND]}

TEXT = """# How far inverse methods are from the posterior

Made by `python -m benchmarks.posterior --page` from benchmarks/results/posterior.json; the same command without
`--page` runs the cells that are missing there.

Every method draws 1,000 samples for measurements whose posterior is known: of a Gaussian with a full covariance (6
measurements); of 25 unit Gaussians on a grid of spacing 8 in 8, 80 and 800 dimensions, seen through 1, 2 or 4 random
projections (12, 6 and 2 of each, for the time they take); of signals with Laplace and Student increments (as finite
scale mixtures, 2 each; the posterior by a Gibbs sampler); and of 8 x 8 images, a mixture of ten Gaussians fitted to
digits (4 for every operator). All methods get the same ones. Noise is 0.1 ("low") or 0.5 ("high") of the largest
singular value. All denoisers are exact, so what is measured is the method. The blur and the tomography are without
their singular values of at most 0.03 of the largest, as DDRM's code has it (`cutoff`): replacement, RePaint, MCG,
LanPaint and null_space divide the noise by singular values, and RED-diff starts from what comes of it. {missing}

**Distance** is the sliced Wasserstein distance (500 directions) to 1,000 exact draws, divided by that of another 1,000
exact draws (the floor): 1 is indistinguishable; the median over measurements and problems of a group, and in the next
table its mean. **C2ST** is the accuracy of the nearest neighbour in telling the two sets apart, 0.5 at best.
**Coverage** is the posterior's probability of the central 90 % intervals of the samples, entry by entry: 0.9 is
calibrated, less is too narrow or elsewhere. **Calls** are denoiser evaluations a sample, **seconds** those of 1,000
samples of one measurement on two busy CPU cores, compilation included: an order of magnitude. A dash is a cell that
has not been run or that the method cannot do, a star a group of which not all problems have been.
Rule of the settings: {rule}

"""


ASKING = """
## Exact and blind measurements

Median, and mean in brackets. **Exact y**: half of the pixels of the images, known without noise, for methods that
need none; TDS by its `inpainting`. **Blind**: images blurred by one of eight kernels, which is part of the state
(`inverse.blind`, `joint`), so that the posterior is known kernel by kernel; for methods that take nonlinear operators.
`dps` there is BlindDPS without its penalty. Two denoisers are called at a time.

"""
LEFT_OUT = """
Without a row: `p2l`, `dds2m`, `deep_prior` and `d_flow` optimise a prompt, a network or a source for every measurement
and give one estimate, no law; the posterior of the prior of `diffusion_mbir` and `admm_tv`, of planes and a total
variation, is not known.
"""
RATE = """
## Error by the number of particles

TDS with MMPS on the mixture in 8 dimensions, 1 seen, low noise, 12 measurements and 4 keys: four times the particles
are to halve the error of the log-evidence, down to that of the 200 steps. The estimate over the evidence is 1 in the
mean for any number of particles.

"""


def write(results: dict) -> None:
    """The page and its figure."""
    if not results:
        return
    there = lambda ps: any(f"{p}|{noise}|floor" in results for p in ps for noise in noises(p))
    groups, special = ({name: ps for name, ps in given.items() if there(ps)} for given in (GROUPS, SPECIAL))
    names = [m for m in methods.METHODS if any(key.endswith(f"|{m}") for key in results)]
    rule = " ".join((methods.__doc__ or "").partition("Rule for all: ")[2].split())
    text = TEXT.format(rule=rule, missing=_missing(results))
    text += "## Distance to the posterior over the floor, median\n\n" + _distances(results, groups, names, np.median)
    text += "\n![Distances](posterior.png)\n\n"
    text += "## The same, mean\n\n" + _distances(results, groups, names, np.mean)
    if special:
        both = lambda values: f"{_number(float(np.median(values)))} ({_number(float(np.mean(values)))})"
        text += ASKING + _distances(results, special, names, both)
    text += LEFT_OUT
    text += "\n## Everything else, over all groups\n\n"
    text += "Without exact and blind measurements, but for methods that were only run there.\n\n" + _rest(
        results, names
    )
    text += "\n## Log-evidence of the particle methods\n\n"
    text += "Estimate minus log p(y), in nats: the mean over the measurements, and the worst.\n\n"
    text += _evidence(results, groups | special, names)
    rate = results.get("mixture 8, 1 seen|low|rate")
    if rate:
        text += RATE
        rows = [
            [str(n), f"{e:.3f}", f"{m:.3f}"]
            for n, e, m in zip(rate["particles"], rate["rms"], rate["mean"], strict=True)
        ]
        text += _table(["particles", "root-mean-square error, nats", "mean estimate / evidence"], rows)
    (DOCS / "posterior.md").write_text(text)
    _figure(results, groups | special, names)


def _missing(results: dict) -> str:
    """Which problems no method has been run on, with the noises."""
    found = []
    for problem in problems():
        left = [noise for noise in noises(problem) if f"{problem}|{noise}|floor" not in results]
        if left:
            found.append(problem if len(left) == len(noises(problem)) else f"{problem} at {left[0]} noise")
    return f"Not run so far, for the time it takes: {'; '.join(found)}." if found else ""


def _columns(groups: dict) -> list[tuple[str, str]]:
    return [(group, noise) for group, names in groups.items() for noise in noises(names[0])]


def _head(groups: dict) -> list[str]:
    return ["method"] + [group if noise == "none" else f"{group}, {noise}" for group, noise in _columns(groups)]


def ratios(results: dict, group: list[str], noise: str, method: str) -> list[float]:
    """Distances over the mean floor of their problem, for all measurements of a group."""
    found: list[float] = []
    for problem in group:
        cell = results.get(f"{problem}|{noise}|{method}")
        floor = results.get(f"{problem}|{noise}|floor")
        if cell and floor:
            found += list(np.array(cell["sw"]) / np.mean(floor["sw"]))
    return found


def _partly(results: dict, group: list[str], noise: str, method: str) -> bool:
    """Whether a problem of the group has not been run with this method."""
    return any(f"{problem}|{noise}|{method}" not in results for problem in group)


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return "> 100" if value > 100 else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def _distances(results: dict, groups: dict, names: list[str], average: Any) -> str:
    rows, columns = [], _columns(groups)
    for name in names:
        values = [ratios(results, groups[group], noise, name) for group, noise in columns]
        written = [average(v) if v else math.nan for v in values]
        if any(values):
            partly = [_partly(results, groups[group], noise, name) for group, noise in columns]
            written = [w if isinstance(w, str) else _number(float(w)) for w in written]
            rows.append([name] + [w + "*" * (p and w != "-") for w, p in zip(written, partly, strict=True)])
    return _table(_head(groups), rows)


def _rest(results: dict, names: list[str]) -> str:
    rows = []
    for name in names:
        found = {key: cell for key, cell in results.items() if key.endswith(f"|{name}")}
        cells = [cell for key, cell in found.items() if key.split("|")[0] not in KINDS] or list(found.values())
        flat = lambda what, cells=cells: [x for cell in cells for x in cell[what]]
        seconds = np.median([cell["seconds"] / len(cell["sw"]) for cell in cells])
        particles = methods.METHODS[name].particles
        rows.append(
            [
                name,
                f"{np.mean(flat('c2st')):.2f}",
                f"{np.mean(flat('coverage')):.2f}",
                f"{min(cell['nfe'] for cell in cells):.0f}",
                f"{seconds:.1f}",
                f"{np.mean(flat('ess')):.0f}, {np.mean(flat('resampled')):.1f}" if particles else "",
                methods.METHODS[name].rule,
            ]
        )
    head = ["method", "C2ST", "coverage of 90 %", "calls", "seconds", "ESS at the end, times resampled", "setting"]
    return _table(head, rows)


def _evidence(results: dict, groups: dict, names: list[str]) -> str:
    """The mean error of each group, with the worst one in brackets."""
    columns = _columns(groups)
    rows = []
    for name in names:
        row = []
        for group, noise in columns:
            cells = [results.get(f"{problem}|{noise}|{name}", {}) for problem in groups[group]]
            errors = np.array([error for cell in cells for error in cell.get("log_z", [])])
            row.append(f"{_nats(errors.mean())} ({_nats(errors[np.abs(errors).argmax()])})" if errors.size else "-")
        if any(entry != "-" for entry in row):
            rows.append([name, *row])
    return _table(_head(groups), rows)


def _nats(value: float) -> str:
    return "< -1000" if value < -1000 else f"{value:+.2f}" if abs(value) < 10 else f"{value:+.0f}"


def _figure(results: dict, groups: dict, names: list[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(groups), figsize=(2.0 * len(groups) + 2, 0.27 * len(names) + 1.2), sharey=True)
    for axis, (group, problem_names) in zip(np.atleast_1d(axes), groups.items(), strict=True):
        places = {"low": ("tab:blue", 0.17), "high": ("tab:orange", -0.17), "none": ("tab:green", 0.0)}
        for noise, (colour, shift) in places.items():
            for row, name in enumerate(reversed(names)):
                values = np.clip(ratios(results, problem_names, noise, name), 0.3, 300)
                if len(values):
                    axis.plot(values, np.full(len(values), row + shift), ".", color=colour, alpha=0.35, markersize=4)
                    axis.plot(np.median(values), row + shift, "|", color=colour, markersize=9, markeredgewidth=2)
        axis.axvline(1, color="0.5", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xlim(0.25, 400)
        axis.set_title(group, fontsize=9)
        axis.set_yticks(range(len(names)), list(reversed(names)), fontsize=7)
        axis.set_ylim(-0.7, len(names) - 0.3)
        axis.tick_params(axis="x", labelsize=7)
        axis.grid(axis="y", color="0.92")
    figure.supxlabel(
        "sliced Wasserstein distance over the floor, shown from 0.3 to 300"
        " (bar: median; blue: low noise, orange: high, green: none)",
        fontsize=8,
    )
    figure.tight_layout()
    figure.savefig(DOCS / "posterior.png", dpi=110, metadata={"Software": None})
    plt.close(figure)
