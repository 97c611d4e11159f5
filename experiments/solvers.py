"""Error against network evaluations for every public solver, on three exact problems and on the trained digits.

    python -m experiments.solvers

The problems: a correlated Gaussian in four dimensions (variance preserving, uniform in log-SNR, ends at noise above 0),
a two-dimensional mixture (variance preserving, quadratic grid) and a mixture in sixteen dimensions (EDM's process and
grid).  Deterministic solvers: root-mean-square distance from the exact probability flow, in float64.  Stochastic
solvers: distance of laws; on the Gaussian the exact 2-Wasserstein distance, mean and covariance propagated through the
affine steps, elsewhere the sliced 1-Wasserstein distance from exact samples.  If there is a checkpoint of
`experiments.digits`, the same on its model, whose flow is followed by many steps of Runge-Kutta.

A solver takes as many steps as fit into the evaluations, start-up included.
Writes a plot for every problem, solvers.csv and solvers.md, where the best solver at each NFE is named.

Run time: 4 min on 2 CPU cores.
Expect: no solver is best everywhere.  On the mixtures, with a last step to the data, ipndm and its relatives lead from
10 to 15 evaluations on and deis or rosenbrock before; on the Gaussian unipc and dpmpp, then rk4 from 20 on.  Of the
stochastic ones er_sde and sde_dpmpp reach the floor first, at about 15.
"""

from __future__ import annotations

import csv
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import diffjax
from diffjax import training
from diffjax.levels import Array, Grid, Process, Solver
from experiments import _plots, _run, _solvers, digits
from experiments._problems import data, distance, exact_flow, moments
from experiments._problems import run as walk

TINY = (
    *("--trajectories", "8", "--samples", "64", "--nfe", "8", "16", "--digits", "runs/none"),
    *("--solvers", "ddim", "dpmpp", "sde_dpmpp"),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Every solver's error against network evaluations."""

    solvers: tuple[str, ...] = ()
    """Public solvers to run; none named: all that run with their defaults."""
    nfe: tuple[int, ...] = (5, 8, 10, 15, 20, 50, 100)
    """Network evaluations per sample."""
    problems: tuple[str, ...] = ("gaussian", "mixture", "edm", "digits")
    """Which problems."""
    trajectories: int = 64
    """Starts for the deterministic solvers."""
    samples: int = 2048
    """Samples of the stochastic solvers; they are compared with four times as many exact ones."""
    digits: Path = Path("runs/digits")
    """Folder of a run of `experiments.digits`; the digits are skipped if it has no checkpoint."""
    digits_nfe: tuple[int, ...] = (5, 10, 20)
    """Network evaluations for the digits."""
    digits_seconds: float = 120.0
    """Time for the digits; solvers that are not reached are left out, each family's first ones are first."""
    seed: int = 0
    """Seed of the starts, the samples and the directions of the sliced distance."""
    out: Path = Path("runs/solvers")
    """Output folder."""


class Problem(NamedTuple):
    """What the solvers run on."""

    name: str
    title: str
    denoise: Any
    grid: Callable[[int], Grid]  # of a number of steps
    error: Callable[[Solver, Grid, Solver], float]  # of a solver, padded to one program, on a grid
    nfe: tuple[int, ...]
    floor: float = 0.0  # of the stochastic solvers' errors
    law: str = "sliced 1-Wasserstein distance"


class Curve(NamedTuple):
    """What is measured of one solver: asked evaluations to (made evaluations, error)."""

    solver: Solver
    points: dict[int, tuple[int, float]]


# --- the problems -------------------------------------------------------------------------------------------------


def gaussian(options: Options) -> Problem:
    """Four correlated dimensions; variances from 0.01 to 1."""
    vectors = np.linalg.qr(np.random.default_rng(options.seed).normal(size=(4, 4)))[0]
    covariance = vectors @ np.diag([0.01, 0.1, 0.4, 1.0]) @ vectors.T
    mean = np.array([0.8, -0.5, 0.3, 0.0])
    denoise, process = diffjax.oracles.gaussian(mean, covariance), diffjax.processes.vp()
    grid = lambda steps: diffjax.grids.log_snr(process, steps, to_data=False)
    first, last = grid(1).start, jax.tree.map(lambda leaf: leaf[-1], grid(1).s)
    x = _starts(options, process, 4)
    target = np.asarray(jax.vmap(lambda x: denoise.flow(x, first, last))(x))
    exact = last.alpha * mean, last.alpha**2 * covariance + last.sigma**2 * np.eye(4)

    def error(solver: Solver, grid: Grid, padded: Solver) -> float:
        if solver.draws:
            return bures(*moments(solver, grid, mean, covariance), *exact)
        return _rms(walk(jax.random.key(0), denoise, padded, grid, x), target)

    title = "Correlated Gaussian, four dimensions: VP process, log-SNR grid"
    return Problem("gaussian", title, denoise, grid, error, options.nfe, law="2-Wasserstein distance (exact)")


def mixture(options: Options) -> Problem:
    """The two-dimensional mixture of `experiments.mixture`."""
    process = diffjax.processes.vp()
    grid = lambda steps: diffjax.grids.quadratic(process, steps)
    return _exact("mixture", "Mixture in two dimensions: VP process, quadratic grid", options, data(), process, grid)


def edm(options: Options) -> Problem:
    """Eight components in sixteen dimensions, each in a plane of its own."""
    rng = np.random.default_rng(options.seed)
    planes = np.linalg.qr(rng.normal(size=(8, 16, 16)))[0]
    variances = np.concatenate([rng.uniform(0.05, 0.3, (8, 2)), np.full((8, 14), 0.002)], axis=1)
    covariances = np.einsum("kij,kj,klj->kil", planes, variances, planes)
    weights = rng.dirichlet(np.full(8, 5.0))
    denoise = diffjax.oracles.mixture(weights, rng.normal(size=(8, 16)) * 0.5, covariances)
    process = diffjax.processes.edm()
    grid = lambda steps: diffjax.grids.karras(process, steps)
    return _exact("edm", "Mixture in sixteen dimensions: EDM process and grid", options, denoise, process, grid)


def trained(options: Options) -> Problem:
    """The model of `experiments.digits`, class after class, at guidance scale 1."""
    model = digits.load(options.digits)
    process = digits.PROCESS
    grid = lambda steps: diffjax.grids.uniform(process, steps)
    labels = np.arange(64) % digits.CLASSES
    keys = jax.random.split(jax.random.key(options.seed), 2)

    def draw(key: Array, solver: Solver, steps: int) -> np.ndarray:
        return np.asarray(digits.generate(model, solver, grid(steps), labels, key).x)

    # the key fixes the start; the flow of another key's starts is a second set from the same law
    target, other = (draw(key, diffjax.solvers.rk4(), 50) for key in keys)

    def error(solver: Solver, grid: Grid, padded: Solver) -> float:
        found = draw(keys[0], padded, len(grid))  # idle rows call the network, which costs less than compiling again
        return distance(keys[1], found, other) if solver.draws else _rms(found, target)

    floor = distance(keys[1], target, other)
    return Problem("digits", "Trained digits: flow process, uniform grid", None, grid, error, options.digits_nfe, floor)


def _exact(name: str, title: str, options: Options, denoise: Any, process: Process, grid: Callable) -> Problem:
    size = denoise.means.shape[-1]
    x, keys = _starts(options, process, size), jax.random.split(jax.random.key(options.seed + 1), 4)
    target = np.asarray(exact_flow(denoise, process, grid(1), x))
    count = options.samples
    many = jax.vmap(lambda key: process.prior(key, (size,), x.dtype))(jax.random.split(keys[0], count))
    sets = jax.vmap(denoise.sample)(jax.random.split(keys[1], 8 * count)).reshape(2, 4 * count, size)
    reference, others = np.asarray(sets[0]), np.asarray(sets[1]).reshape(4, count, size)
    floor = float(np.mean([distance(keys[2], other, reference) for other in others]))

    def error(solver: Solver, grid: Grid, padded: Solver) -> float:
        if solver.draws:
            return distance(keys[2], np.asarray(walk(keys[3], denoise, padded, grid, many)), reference)
        return _rms(walk(keys[3], denoise, padded, grid, x), target)

    return Problem(name, title, denoise, grid, error, options.nfe, floor)


def _starts(options: Options, process: Process, size: int) -> Array:
    keys = jax.random.split(jax.random.key(options.seed), options.trajectories)
    return jax.vmap(lambda key: process.prior(key, (size,), jnp.result_type(float)))(keys)


def _rms(found: Array, target: np.ndarray) -> float:
    """Root-mean-square over everything, so that problems of different sizes compare."""
    return float(np.sqrt(np.mean((np.asarray(found) - target) ** 2)))


def bures(mean: np.ndarray, covariance: np.ndarray, other: np.ndarray, other_covariance: np.ndarray) -> float:
    """The 2-Wasserstein distance of two Gaussians: ``|m - n|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)`` under a root."""
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ other_covariance @ root)
    trace = np.trace(covariance + other_covariance) - 2 * np.sum(np.sqrt(np.maximum(cross, 0.0)))
    return float(np.sqrt(np.sum((mean - other) ** 2) + max(trace, 0.0)))


PROBLEMS = {"gaussian": gaussian, "mixture": mixture, "edm": edm, "digits": trained}


# --- measuring ----------------------------------------------------------------------------------------------------


def fitting(solver: Solver, problem: Problem) -> Iterator[tuple[int, Grid, int]]:
    """(asked evaluations, the longest grid that they pay for, rows), where there is one."""
    for asked in problem.nfe:
        for steps in range(asked // solver.calls, 0, -1):
            rows = len(solver.plan(problem.grid(steps)).t.time)
            if rows * solver.calls <= asked:
                yield asked, problem.grid(steps), rows
                break


def measure(run: _run.Run[Options], problem: Problem) -> dict[str, Curve]:
    """The curve of every solver; those that the digits' time does not reach are left out."""
    options, solvers = run.options, _solvers.public(run.options.solvers)
    timed = problem.name == "digits" and not options.solvers

    def points(solver: Solver) -> dict[int, tuple[int, float]]:
        grids = list(fitting(solver, problem))
        program = _solvers.padded(solver, max((rows for *_, rows in grids), default=1))
        found = {asked: (rows * solver.calls, problem.error(solver, grid, program)) for asked, grid, rows in grids}
        for nfe, error in found.values():
            run.log(nfe, error=error)
        return found

    begin, curves = time.perf_counter(), {}
    for name in run.over(digits.families_first(list(solvers)) if timed else list(solvers), problem.name):
        if timed and time.perf_counter() - begin > options.digits_seconds:
            print(f"digits: {len(curves)} of {len(solvers)} solvers; --digits-seconds or --solvers for others")
            break
        solver = solvers[name]
        curves[name] = Curve(solver, run.part(f"{problem.name}, {name}", lambda solver=solver: points(solver)))
    return curves


def best(curves: dict[str, Curve], asked: int, deterministic: bool, count: int = 1) -> list[tuple[str, float]]:
    """The solvers with the smallest errors at a number of evaluations."""
    found = [
        (name, curve.points[asked][1])
        for name, curve in curves.items()
        if (curve.solver.draws == 0) == deterministic and asked in curve.points
    ]
    return sorted((pair for pair in found if np.isfinite(pair[1])), key=lambda pair: pair[1])[:count]


# --- what is written ----------------------------------------------------------------------------------------------


def markdown(options: Options, results: dict[str, tuple[Problem, dict[str, Curve]]]) -> str:
    """For each problem the best solvers and all errors."""
    parts = ["# Error against network evaluations", ""]
    for problem, curves in results.values():
        parts += [f"## {problem.title}", "", "| best | " + " | ".join(f"NFE {n}" for n in problem.nfe) + " |"]
        parts += ["|---" * (1 + len(problem.nfe)) + "|"]
        for kind, deterministic in (("deterministic", True), ("stochastic", False)):
            winners = [best(curves, n, deterministic, 3) for n in problem.nfe]
            for place in range(3):
                floor = 0.0 if deterministic else problem.floor
                cells = [_cell(*w[place], floor) if len(w) > place else "" for w in winners]
                parts.append(f"| {kind}, {place + 1} | " + " | ".join(cells) + " |")
        chance = "" if problem.floor == 0 else " that exact samples have; which solver is lowest below it is chance"
        parts += ["", f"Stochastic solvers: {problem.law}, floor {problem.floor:.1e}{chance}.", ""]
        parts += ["| solver | kind | order | calls | " + " | ".join(f"NFE {n}" for n in problem.nfe) + " |"]
        parts += ["|---" * (4 + len(problem.nfe)) + "|"]
        parts += ["| " + " | ".join(map(str, line)) + " |" for line in _lines(problem, curves)]
        parts.append("")
    return "\n".join(parts)


def _cell(name: str, error: float, floor: float) -> str:
    return f"{name} {error:.1e}" + (" (floor)" if error <= floor else "")


def _lines(problem: Problem, curves: dict[str, Curve]) -> Iterator[list]:
    for name, curve in curves.items():
        kind = "stochastic" if curve.solver.draws else "deterministic"
        errors = [f"{curve.points[n][1]:.2e}" if n in curve.points else "" for n in problem.nfe]
        yield [name, kind, curve.solver.order, curve.solver.calls, *errors]


def write(options: Options, results: dict[str, tuple[Problem, dict[str, Curve]]]) -> str:
    """The tables; returns the Markdown."""
    columns = sorted({n for problem, _ in results.values() for n in problem.nfe})
    with open(options.out / "solvers.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["problem", "solver", "family", "kind", "order", "calls", *(f"NFE {n}" for n in columns)])
        for problem, curves in results.values():
            for name, *rest in _lines(problem, curves):
                errors = dict(zip(problem.nfe, rest[3:], strict=True))
                cells = [errors.get(n, "") for n in columns]
                out.writerow([problem.name, name, _solvers.family(name), *rest[:3], *cells])
    text = markdown(options, results)
    (options.out / "solvers.md").write_text(text)
    return text


def plot(options: Options, problem: Problem, curves: dict[str, Curve]) -> None:
    """Deterministic and stochastic solvers; the best at any number of evaluations in colour, the others gray."""
    with plt.rc_context(_plots.STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(13, 4.8))
        figure.suptitle(problem.title)
        for axes, deterministic in zip(panels, (True, False), strict=True):
            floor = 0.0 if deterministic else problem.floor
            ranked = [pair for asked in problem.nfe for pair in best(curves, asked, deterministic, 2)]
            chosen = [name for name, error in ranked if error > floor]  # below it the order is chance
            lines = {
                name: ([nfe for nfe, _ in curve.points.values()], [error for _, error in curve.points.values()])
                for name, curve in curves.items()
                if (curve.solver.draws == 0) == deterministic and curve.points
            }
            if not lines:
                axes.set_axis_off()
                continue
            known = [name for name in ("ddim", "ancestral") if name in lines]  # what everybody has, to compare with
            _plots.highlighted(axes, lines, list(dict.fromkeys([*chosen, *known])))
            label = "root-mean-square error" if deterministic else problem.law
            axes.set(title="deterministic" if deterministic else "stochastic", ylabel=label)
            if not deterministic and problem.floor > 0:
                axes.axhline(problem.floor, color="gray", linewidth=1, linestyle="--")
                style = {"color": "gray", "fontsize": 8, "va": "bottom"}
                axes.text(0.01, problem.floor, "floor", transform=axes.get_yaxis_transform(), **style)
        _plots.save(figure, options.out / f"{problem.name}.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run with command-line arguments (default: those of the process)."""
    with _run.start(Options, arguments) as run:
        options, results = run.options, {}
        for name in options.problems:
            if name not in PROBLEMS:
                raise ValueError(f"problems must be among {list(PROBLEMS)}, got {name!r}.")
            if name == "digits" and not training.checkpoint.steps(options.digits):
                made = "`python -m experiments.digits` makes one"
                print(f"digits: skipped, there is no checkpoint in {options.digits}; {made}")
                continue
            with jax.enable_x64(name != "digits"), run.clock(name):
                problem = PROBLEMS[name](options)
                results[name] = problem, measure(run, problem)
            plot(options, *results[name])
        print(write(options, results))
        print(f"{run.clock}; see {run.out}/")


if __name__ == "__main__":
    main()
