"""Error against network evaluations for every public solver, on a two-dimensional mixture with its exact denoiser.

    python -m experiments.mixture

Nothing is trained, so that what is seen is the solvers' own error.  Deterministic solvers: root-mean-square distance
from the exact probability flow, over trajectories from one set of starts, in float64.  Stochastic solvers: sliced
1-Wasserstein distance between their samples and exact ones; its floor is the same between two exact sets.

Writes mixture.png, mixture.csv and mixture.md.
Run time: 30 s on 2 CPU cores, and half a second for every solver.
Expect: from one NFE to its double the errors of a solver of order p fall by 2^p, until the last step of the grid,
which is of first order and short, sets the floor near 1e-5; stochastic solvers reach the floor at 32 to 128.
"""

from __future__ import annotations

import csv
import dataclasses
import time
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.axes import Axes

import diffjax
from diffjax.levels import Solver
from experiments import _plots, _solvers
from experiments._problems import data, distance, exact_flow, run


@dataclasses.dataclass(frozen=True)
class Options:
    """Error against network evaluations on an exact mixture."""

    solvers: tuple[str, ...] = ()
    """Public solvers to run; none named: all that run with their defaults."""
    nfe: tuple[int, ...] = (8, 16, 32, 64, 128)
    """Network evaluations per sample; a solver with several calls a step takes fewer steps."""
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
    nfe: list[int]  # as they came out: steps times calls
    errors: list[float]


def measure(options: Options, deterministic: bool) -> tuple[dict[str, Curve], float]:
    """The curves of the deterministic or of the stochastic solvers, and the floor of their errors."""
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

    curves = {}
    for name, solver in _solvers.public(options.solvers).items():
        if (solver.draws == 0) == deterministic:
            curves[name] = Curve(solver, [], [])
            grids = [spacing(process, n // solver.calls) for n in options.nfe if n // solver.calls >= 3]
            plans = [len(solver.plan(grid).t.time) for grid in grids]
            program = _solvers.padded(solver, max(plans, default=1))
            for grid, rows in zip(grids, plans, strict=True):
                found = run(keys[4], denoise, program, grid, x)
                curves[name].nfe.append(rows * solver.calls)
                curves[name].errors.append(error(np.asarray(found)))
    return curves, floor


def write_table(options: Options, curves: dict[str, Curve]) -> str:
    """One row a solver, as CSV and as a Markdown table, which is returned."""
    header = ["solver", "family", "kind", "order", "calls", *(f"NFE {n}" for n in options.nfe)]
    rows = []
    for name, curve in curves.items():
        # a point belongs to the column that asked for it, also where start-up took more evaluations
        kept = [n for n in options.nfe if n // curve.solver.calls >= 3]
        errors = {n: f"{error:.2e}" for n, error in zip(kept, curve.errors, strict=True)}
        kind = "deterministic (RMS)" if curve.solver.draws == 0 else "stochastic (SW)"
        columns = [name, _solvers.family(name), kind, curve.solver.order, curve.solver.calls]
        rows.append([*columns, *(errors.get(n, "") for n in options.nfe)])
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
        _plots.curves(left, {name: curve[1:] for name, curve in deterministic.items()})
        left.set(title="deterministic: distance from the exact flow", ylabel="root-mean-square error")
        _guides(left, deterministic)
        _plots.curves(right, {name: curve[1:] for name, curve in stochastic.items()})
        low, high = right.get_ylim()
        right.set_ylim(low, min(high, 3.0))  # an SDE scheme that explodes at few steps would hide the others
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


def _guides(axes: Axes, curves: dict[str, Curve]) -> None:
    """Thin lines of slope 1, 2, 3 through the upper left corner, inside the range of the data."""
    points = [(n, e) for curve in curves.values() for n, e in zip(curve.nfe, curve.errors, strict=True) if e > 0]
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


def main(arguments: list[str] | None = None) -> None:
    """Run with command-line arguments (default: those of the process)."""
    options = tyro.cli(Options, args=arguments, prog="python -m experiments.mixture", description=__doc__)
    _plots.headless()
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    with jax.enable_x64(True):  # errors of 1e-7 are to be seen
        deterministic, _ = measure(options, True)
        stochastic, floor = measure(options, False)
    print(write_table(options, deterministic | stochastic))
    plot(options, deterministic, stochastic, floor)
    print(
        f"floor of the sliced Wasserstein distance {floor:.2e}; {time.perf_counter() - begin:.0f} s; see {options.out}/"
    )


if __name__ == "__main__":
    main()
