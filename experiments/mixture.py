"""Error against network evaluations for every public solver, on a two-dimensional mixture with its exact denoiser.

    python -m experiments.mixture

Nothing is trained, so that what is seen is the solvers' own error.  Deterministic solvers: root-mean-square distance
from the exact probability flow, over trajectories from one set of starts, in float64.  Stochastic solvers: sliced
1-Wasserstein distance between their samples and exact ones; its floor is the same between two exact sets.

Writes mixture.png, mixture.csv and mixture.md.
Run time: 15 s on 2 CPU cores with ten solvers, under a minute with sixty.
Expect: a solver of order p loses a factor of 2^p from one number of evaluations to its double, up to order 4, which
the first-order last step of the grid allows; at 128 evaluations ddim 1e-2, dpmpp 4e-4, midpoint 3e-4.  Stochastic
solvers come near the floor, 0.013, at 64 to 128.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

import diffjax
from diffjax.levels import Solver
from experiments import _plots, _run, _solvers
from experiments._problems import data, distance, exact_flow
from experiments._problems import run as walk

TINY = (
    *("--trajectories", "16", "--samples", "200", "--nfe", "16", "32", "64"),
    *("--solvers", "ddim", "dpmpp", "ancestral"),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Error against network evaluations on an exact mixture."""

    solvers: tuple[str, ...] = ()
    """Public solvers to run; none named: all that run with their defaults."""
    nfe: tuple[int, ...] = (8, 16, 32, 64, 128)
    """Network evaluations per sample, at most; a solver with several calls a step takes fewer steps."""
    process: Literal["flow", "cosine", "vp", "sub_vp", "ve", "edm"] = "flow"
    """Forward process."""
    grid: Literal["quadratic", "cosine", "uniform", "log_snr", "karras"] = "quadratic"
    """Spacing of the noise levels."""
    trajectories: int = 256
    """Starts for the deterministic solvers."""
    samples: int = 4096
    """Samples of the stochastic solvers; they are compared with four times as many exact ones."""
    seed: int = 0
    """Seed of the starts, the samples and the directions of the sliced distance."""
    out: Path = Path("runs/mixture")
    """Output folder."""


class Curve(NamedTuple):
    """What is measured of one solver."""

    solver: Solver
    nfe: dict[int, int]  # as it came out, for what was asked for
    errors: dict[int, float]


def measure(run: _run.Run[Options], deterministic: bool) -> tuple[dict[str, Curve], float]:
    """The curves of the deterministic or of the stochastic solvers, and the floor of their errors."""
    options = run.options
    denoise, process = data(), getattr(diffjax.processes, options.process)()
    spacing = getattr(diffjax.grids, options.grid)
    keys = jax.random.split(jax.random.key(options.seed), 5)
    count = options.trajectories if deterministic else options.samples
    x = jax.vmap(lambda key: process.prior(key, (2,), jnp.result_type(float)))(jax.random.split(keys[0], count))
    if deterministic:
        target, floor = np.asarray(exact_flow(denoise, process, spacing(process, max(options.nfe)), x)), float("nan")
    else:
        sets = jax.vmap(denoise.sample)(jax.random.split(keys[1], 8 * count)).reshape(2, 4 * count, 2)
        target, others = np.asarray(sets[0]), np.asarray(sets[1]).reshape(4, count, 2)
        floor = float(np.mean([distance(keys[3], other, target) for other in others]))

    def error(found: np.ndarray) -> float:
        if deterministic:
            return float(np.sqrt(np.mean(np.sum((found - target) ** 2, axis=-1))))
        return distance(keys[3], found, target)

    def curve(solver: Solver) -> tuple[dict[int, int], dict[int, float]]:
        grids = _solvers.grids(solver, lambda steps: spacing(process, steps), options.nfe, least=3)
        nfe = {budget: _solvers.evaluations(solver, grid) for budget, grid in grids.items()}
        program = _solvers.padded(solver, max(nfe.values(), default=1) // solver.calls)
        found = {budget: walk(keys[4], denoise, program, grid, x) for budget, grid in grids.items()}
        errors = {budget: error(np.asarray(x)) for budget, x in found.items()}
        for budget, value in errors.items():
            run.log(budget, error=value)
        return nfe, errors

    solvers, curves = _solvers.public(options.solvers), {}
    chosen = [name for name, solver in solvers.items() if (solver.draws == 0) == deterministic]
    for name in run.over(chosen, "deterministic" if deterministic else "stochastic"):
        nfe, errors = run.part(name, lambda solver=solvers[name]: curve(solver))
        curves[name] = Curve(solvers[name], nfe, errors)
    return curves, floor


def write_table(options: Options, curves: dict[str, Curve]) -> str:
    """One row a solver, as CSV and as a Markdown table, which is returned."""
    header = ["solver", "family", "kind", "order", "calls", *(f"NFE {n}" for n in options.nfe)]
    rows = []
    for name, curve in curves.items():
        kind = "deterministic (RMS)" if curve.solver.draws == 0 else "stochastic (SW)"
        columns = [name, _solvers.family(name), kind, curve.solver.order, curve.solver.calls]
        rows.append([*columns, *(f"{curve.errors[n]:.2e}" if n in curve.errors else "" for n in options.nfe)])
    with open(options.out / "mixture.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
    (options.out / "mixture.md").write_text(text)
    return text


def plot(options: Options, deterministic: dict[str, Curve], stochastic: dict[str, Curve], floor: float) -> None:
    """Both panels."""
    most = max(len(deterministic), len(stochastic))
    with plt.rc_context(_plots.STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(13, max(4.6, 0.19 * min(most, 24))))
        figure.suptitle(f"Solvers on an exact two-dimensional mixture: {options.process} process, {options.grid} grid")
        _plots.curves(left, lines(deterministic))
        left.set(title="deterministic: distance from the exact flow", ylabel="root-mean-square error")
        _guides(left, deterministic)
        _plots.curves(right, lines(stochastic))
        low, high = right.get_ylim()
        # the floor is in sight, and an SDE scheme that explodes at few steps does not hide the others
        right.set_ylim(min(low, 0.85 * floor), min(high, 3.0))
        right.axhline(floor, color="gray", linewidth=1, linestyle="--")
        right.text(
            0.01,
            floor,
            "floor: exact samples",
            color="gray",
            fontsize=8,
            va="bottom",
            transform=right.get_yaxis_transform(),
        )
        right.set(title="stochastic: distance from the data", ylabel="sliced 1-Wasserstein distance")
        _plots.save(figure, options.out / "mixture.png")


def lines(curves: dict[str, Curve]) -> dict[str, tuple[list[int], list[float]]]:
    """The points of each curve; a curve without any is left out."""
    return {name: (list(c.nfe.values()), list(c.errors.values())) for name, c in curves.items() if c.nfe}


def _guides(axes: Axes, curves: dict[str, Curve]) -> None:
    """Thin lines of slope 1, 2, 3 through the upper left corner, inside the range of the data."""
    points = [point for nfe, errors in lines(curves).values() for point in zip(nfe, errors, strict=True)]
    if not points:
        return
    low, high = axes.get_ylim()
    nfe = np.array([min(n for n, _ in points), max(n for n, _ in points)], float)
    start = max(e for _, e in points)
    for order in (1, 2, 3):
        axes.plot(nfe, start * (nfe / nfe[0]) ** -order, color="gray", linewidth=0.7, linestyle=":", zorder=0)
        end = min(nfe[1], nfe[0] * (start / (2 * low)) ** (1 / order))
        axes.text(
            end, start * (end / nfe[0]) ** -order, f"slope {order}", color="gray", fontsize=7, ha="right", va="top"
        )
    axes.set_ylim(low, high)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run with command-line arguments (default: those of the process)."""
    with _run.start(Options, arguments) as run:
        options = run.options
        with jax.enable_x64(True), run.clock("solvers"):  # errors of 1e-7 are to be seen
            deterministic, _ = measure(run, True)
            stochastic, floor = measure(run, False)
        print(write_table(options, deterministic | stochastic))
        with run.clock("picture"):
            plot(options, deterministic, stochastic, floor)
        print(f"floor of the sliced Wasserstein distance {floor:.2e}; {run.clock}; see {run.out}/")


if __name__ == "__main__":
    main()
