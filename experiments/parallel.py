"""When parallel-in-time sampling pays: rounds, evaluations and time against the sequential sampler and fewer steps.

    python -m experiments.parallel          # with the model of `python -m experiments.digits`, if there is one

Two problems: the trained digits (flow process, uniform grid; without a checkpoint the exact denoiser of the training
images stands in for the network) and a mixture of ten components in 64 dimensions (variance preserving, uniform in
time).  Solvers: DDIM, ancestral DDPM, DPM-Solver++ (2M) and Heun, each with the same keys in sequence and in parallel.

Writes one page, parallel.png, with all numbers in parallel.json: error against round; error against rounds where the
tolerance decides; the window; the number of steps; the batch; and what else the same time buys, above all fewer steps.

Run time: 4 min on 2 CPU cores.
Expect: rounds grow slowly with the number of steps (DDIM 12 to 19 of 250), evaluations are 2 to 6 times the sequential
ones, and on a CPU, where a call on p states takes nearly p times as long, nothing is gained in time.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import data, training
from diffjax.levels import Array
from diffjax.samplers.advice import thinned
from experiments import _classifier, _parallel_page, _run, digits
from experiments._sweeps import Problem, Program, Run, error, last_error, trace

SOLVERS = {
    "ddim": diffjax.solvers.ddim(),
    "ancestral": diffjax.solvers.ancestral(),
    "dpmpp": diffjax.solvers.dpmpp(),
    "heun": diffjax.solvers.heun(),
}
SWEEPS: dict[str, dict[str, Any]] = {
    "picard": {},
    "exponential": {"method": "exponential"},
    "gaussian": {"method": "gaussian"},
    "diagonal": {"method": "diagonal"},
    "picard, mixed": {"mixing": 2},
    "gaussian, mixed": {"method": "gaussian", "mixing": 2},
}
ONE_SWEEP = ("picard", "exponential", "gaussian")  # that are the same whatever was before
KINDS = (("ddim", "picard"), ("ancestral", "picard"), ("ancestral", "gaussian"))
TOLERANCES = (1.0, 0.1, 1e-2, 1e-3)


TINY = ("--quick", "--digits", "runs/none")


@dataclasses.dataclass(frozen=True)
class Options:
    """When parallel-in-time sampling pays."""

    digits: Path = Path("runs/digits")
    """Folder of a run of `experiments.digits`; without a checkpoint its exact denoiser is used."""
    steps: int = 250
    """Steps where something else is varied."""
    grids: tuple[int, ...] = (25, 100, 250, 1000)
    """Numbers of steps."""
    windows: tuple[int, ...] = (8, 16, 32, 64, 250)
    """Windows."""
    batches: tuple[int, ...] = (1, 4, 16, 64)
    """Samples that are drawn together."""
    keys: int = 2
    """Samples that rounds and errors are averaged over."""
    solvers: tuple[str, ...] = ("ddim", "ancestral", "dpmpp", "heun")
    """Solvers whose error is followed from round to round, and, of the first two, all else."""
    sweeps: tuple[str, ...] = ("picard", "exponential", "gaussian", "diagonal", "picard, mixed", "gaussian, mixed")
    """Rules of a sweep; mixed: with Anderson mixing of the last two."""
    tol: float = 1e-2
    """The tolerance where it is not varied."""
    samples: int = 100
    """Digits that the quality is measured on; 0 leaves it out."""
    classifier_steps: int = 600
    """Training steps of the classifier that judges it."""
    quick: bool = False
    """Few of everything, to see that it runs."""
    seed: int = 0
    """Seed of the starts and the noise."""
    out: Path = Path("runs/parallel")
    """Output folder."""


QUICK: dict[str, Any] = {
    **{"steps": 12, "grids": (6, 12), "windows": (4, 12), "batches": (1, 2), "keys": 1, "samples": 0},
    **{"solvers": ("ddim",), "sweeps": ("picard",)},
}


# --- the problems -------------------------------------------------------------------------------------------------


def digits_problem(options: Options) -> Problem:
    """The trained network, class after class, or the exact denoiser of the images it would learn from."""
    grid = lambda steps: diffjax.grids.uniform(digits.PROCESS, steps)
    images = data.load("digits", "train").arrays().x0
    variance = float(np.mean(np.var(images, axis=0)))
    labels = np.arange(max(64, options.keys)) % digits.CLASSES
    if not training.checkpoint.steps(options.digits):
        print(f"digits: no checkpoint in {options.digits}; the exact denoiser of the training images stands in")
        images = images[:100] if options.quick else images
        exact = diffjax.oracles.points(images)
        title = "digits (exact denoiser)"
        return Problem("digits", title, None, lambda _, label: exact, labels, grid, digits.IMAGE, variance)
    model = digits.load(options.digits)
    denoise = lambda params, label: digits.denoiser(digits.Model(model.apply, params), label)
    return Problem("digits", "digits U-Net", model.params, denoise, labels, grid, digits.IMAGE, variance)


def mixture_problem(options: Options) -> Problem:
    """Ten components around points of unit scale in 64 dimensions."""
    means = np.random.default_rng(options.seed).normal(size=(10, 64))
    mixture = diffjax.oracles.mixture(np.ones(10), means, np.full(10, 0.05))
    process = diffjax.processes.vp()
    grid = lambda steps: diffjax.grids.uniform(process, steps, stop=1e-3)
    labels = np.zeros(max(64, options.keys), int)
    variance = float(np.mean(np.var(means, axis=0)) + 0.05)
    return Problem("mixture", "mixture, D = 64", None, lambda _, label: mixture, labels, grid, (64,), variance)


# --- what is measured ---------------------------------------------------------------------------------------------


class Bench:
    """All sweeps over one problem; sequential runs are made once."""

    def __init__(self, options: Options, problem: Problem):
        self.options, self.problem = options, problem
        self.keys = jax.random.split(jax.random.key(options.seed), options.keys)
        self.known: dict[tuple[str, int], Run] = {}

    def exact(self, name: str, steps: int) -> Run:
        """The sequential run."""
        if (name, steps) not in self.known:
            program = Program(self.problem, diffjax.sample, SOLVERS[name], steps, save="states")
            self.known[name, steps] = program(self.keys)
        return self.known[name, steps]

    def program(self, name: str, steps: int, window: int | None, sweep: str = "picard", **options: Any) -> Program:
        """A parallel run."""
        clipped = None if window is None or window >= steps else window
        settings = {"window": clipped, "variance": self.problem.variance, "save": "states"} | SWEEPS[sweep] | options
        return Program(self.problem, diffjax.parallel, SOLVERS[name], steps, **settings)

    def point(self, name: str, steps: int, window: int | None, sweep: str, run: Run, tol: float) -> dict[str, Any]:
        """What is kept of a run."""
        exact = self.exact(name, steps)
        return {
            **{"solver": name, "steps": steps, "window": window, "sweep": sweep, "tol": tol},
            **{"rounds": run.rounds, "nfe": run.nfe, "inflation": run.nfe / exact.nfe},
            **{"error": error(run, exact), "last": last_error(run, exact)},
            **{"seconds": run.seconds, "speedup": exact.seconds / run.seconds},
        }

    def traces(self, names: Sequence[str], steps: int) -> list[dict[str, Any]]:
        """Error against round, the whole path at once."""
        keys, found = self.keys[:2], []
        for name in names:
            exact = self.exact(name, steps)
            exact = exact._replace(states=exact.states[: len(keys)])
            for sweep in self.options.sweeps:
                if sweep not in ONE_SWEEP:
                    continue
                errors = trace(self.problem, SOLVERS[name], steps, keys, exact, sweep, min(40, steps))
                found.append({"solver": name, "steps": steps, "sweep": sweep, "errors": errors})
        return found

    def tolerances(self, name: str, window: int) -> list[dict[str, Any]]:
        """What rounds buy at every tolerance: methods are compared at equal error, not at equal tolerance."""
        steps, found = self.options.steps, []
        for sweep in self.options.sweeps:
            program = self.program(name, steps, window, sweep)
            for tol in TOLERANCES[:: 3 if self.options.quick else 1]:
                run = program(self.keys, tol=jnp.float32(tol))
                found.append(self.point(name, steps, window, sweep, run, tol))
        return found

    def windows(self, name: str, sweep: str) -> list[dict[str, Any]]:
        """Rounds, evaluations and time against the window."""
        steps, tol = self.options.steps, self.options.tol
        sizes = [window for window in self.options.windows if window <= steps]
        runs = ((window, self.program(name, steps, window, sweep)(self.keys, tol=tol)) for window in sizes)
        return [self.point(name, steps, window, sweep, run, tol) for window, run in runs]

    def grids(self, name: str, window: int | None, sweep: str) -> list[dict[str, Any]]:
        """The same against the number of steps."""
        tol, found = self.options.tol, []
        for steps in self.options.grids:
            run = self.program(name, steps, window, sweep)(self.keys, tol=tol)
            found.append(self.point(name, steps, window, sweep, run, tol))
        return found

    def batches(self, name: str, windows: Sequence[int]) -> list[dict[str, Any]]:
        """Speed-up against the batch, and what the batch's slowest sample needs."""
        steps, tol, found = min(100, self.options.steps), self.options.tol, []
        sequential = Program(self.problem, diffjax.sample, SOLVERS[name], steps)
        programs = {window: self.program(name, steps, window, save=()) for window in windows}
        for batch in self.options.batches:
            keys = jax.random.split(jax.random.key(self.options.seed), batch)
            once, _ = sequential.batched(keys)
            for window, program in programs.items():
                spent, rounds = program.batched(keys, tol=tol)
                entry = {"solver": name, "window": window, "batch": batch, "rounds": rounds}
                found.append({**entry, "speedup": once / spent})
        return found

    def fewer(self, counts: Sequence[int] = (5, 10, 20, 50)) -> list[dict[str, Any]]:
        """DPM-Solver++ with fewer steps: how far its samples are from those of DDIM on the whole grid."""
        exact, found = self.exact("ddim", self.options.steps), []
        for count in counts:
            if count >= self.options.steps:
                continue
            short = self.problem._replace(grid=lambda _, n=count: thinned(self.problem.grid(self.options.steps), n))
            run = Program(short, diffjax.sample, SOLVERS["dpmpp"], count)(self.keys)
            found.append({"steps": count, "rounds": run.rounds, "last": last_error(run, exact), "seconds": run.seconds})
        return found

    def others(self) -> list[dict[str, Any]]:
        """What is no sweep: parareal (exact in the end), and staggered or reusing samplers (approximate)."""
        exact, found = self.exact("ddim", self.options.steps), []

        def program(sampler: Callable, **options: Any) -> Program:
            return Program(self.problem, sampler, SOLVERS["ddim"], self.options.steps, **options)

        def keep(name: str, program: Program, **traced: Any) -> None:
            run = program(self.keys, **traced)
            last = last_error(run, exact)
            found.append({"name": name, "rounds": run.rounds, "nfe": run.nfe, "last": last, "seconds": run.seconds})

        parareal = program(diffjax.parareal)
        for tol in (1e-4,) if self.options.quick else (0.3, 1e-2, 1e-4):
            keep("parareal", parareal, tol=tol)
        for cores in () if self.options.quick else (8, 6, 4):
            keep("CHORDS, 8, 6 and 4 cores", program(diffjax.chords, cores=cores))
        for stride in () if self.options.quick else (8, 4, 2):
            keep("reuse then predict, stride 8, 4, 2", program(diffjax.reuse_then_predict, stride=stride))
        return found

    def speculations(self) -> list[dict[str, Any]]:
        """Drafts that are accepted or not: the law of DDPM, not its sample."""
        steps, found = self.options.steps, []
        for window in [window for window in self.options.windows if window <= steps]:
            run = Program(self.problem, diffjax.speculative, SOLVERS["ancestral"], steps, window=window)(self.keys)
            found.append({"window": window, "rounds": run.rounds, "inflation": run.nfe / steps})
        return found


def quality(run: _run.Run[Options], problem: Problem) -> list[dict[str, Any]]:
    """Accuracy and Frechet distance of sequential and parallel digits for the same keys, and of fewer steps."""
    options = run.options
    train, test = (digits.labelled(data.load("digits", part)) for part in ("train", "test"))
    index = np.linspace(0, len(test.labels) - 1, options.samples).round().astype(int)
    held_out = digits.Labelled(test.images[index], test.labels[index])
    keys = jax.random.split(jax.random.key(options.seed + 1), 3)
    classifier = _classifier.train(keys[0], data.load("digits", "train"), options.classifier_steps, 128, run)
    judge = digits.Judge(classifier, train, held_out, classifier(held_out.images)[1], keys[1])
    draws = jax.random.split(keys[2], options.samples)
    grid, rows, images = problem.grid(options.steps), [], {}
    parallel: dict[str, Any] = {"window": 16, "tol": options.tol, "variance": problem.variance}
    runs: list[tuple[str, str, Any, dict]] = [
        ("DDIM", "ddim", diffjax.sample, {}),
        ("DDIM, parallel", "ddim", diffjax.parallel, parallel),
        ("DDPM", "ancestral", diffjax.sample, {}),
        ("DDPM, parallel", "ancestral", diffjax.parallel, parallel | {"method": "gaussian"}),
        ("DPM-Solver++, 20 steps", "dpmpp", diffjax.sample, {}),
    ]
    for name, solver, sampler, settings in runs:
        walked = thinned(grid, min(20, len(grid))) if solver == "dpmpp" else grid

        def draw(params: Any, key: Array, label: Array, sampler=sampler, solver=solver, walked=walked, more=settings):
            denoise = problem.denoise(params, label)
            return sampler(key, denoise, SOLVERS[solver], walked, problem.shape, **more)

        found = jax.jit(jax.vmap(draw, (None, 0, 0)))(problem.parameters, draws, held_out.labels)
        images[name] = np.clip(np.asarray(found.x), -1, 1)
        measured = judge(images[name], held_out.labels)
        same = images.get(name.partition(",")[0])
        moved = None if same is None else float(np.sqrt(np.mean((images[name] - same) ** 2)))
        rows.append({"name": name, "rounds": float(np.mean(found.rounds)), "moved": moved, **measured})
    return rows


def measure(run: _run.Run[Options]) -> dict[str, Any]:
    """Everything on the page, a part each."""
    options, results = run.options, {}
    kinds = [(name, sweep) for name, sweep in KINDS if name in options.solvers and sweep in options.sweeps]
    for problem in (digits_problem(options), mixture_problem(options)):
        measurements = _measurements(run, problem, Bench(options, problem), kinds)
        results[problem.name] = {"title": problem.title}
        for name in run.over(list(measurements), problem.name):
            with run.clock(f"{problem.name}: {name}"):
                results[problem.name][name] = run.part(f"{problem.name}, {name}", measurements[name])
    return {"steps": options.steps, "tol": options.tol, **results}


def _measurements(
    run: _run.Run[Options], problem: Problem, bench: Bench, kinds: Sequence[tuple[str, str]]
) -> dict[str, Callable[[], Any]]:
    """What is to be measured on a problem, by name."""
    options = run.options
    trained, wide = problem.name == "digits", min(50, options.steps)
    names = [name for name in (("ddim", "ancestral") if trained else ("ancestral",)) if name in options.solvers]
    window = wide if trained else None
    found: dict[str, Callable[[], Any]] = {
        "traces": lambda: bench.traces(options.solvers, min(100, options.steps)),
        "tolerances": lambda: [point for name in names for point in bench.tolerances(name, wide)],
        "grids": lambda: [point for kind in kinds for point in bench.grids(kind[0], window, kind[1])],
        "sequential": lambda: [
            {"solver": name, "steps": steps, "seconds": bench.exact(name, steps).seconds}
            for name in dict.fromkeys(name for name, _ in kinds)
            for steps in options.grids
        ],
        "fewer": bench.fewer,
    }
    if trained:
        found["windows"] = lambda: [point for kind in kinds[::2] for point in bench.windows(*kind)]
        found["others"] = bench.others
        found["speculative"] = lambda: bench.speculations() if "ancestral" in options.solvers else []
        found["batches"] = lambda: bench.batches("ddim", (4,) if options.quick else (8, 32))
        if options.samples:
            found["quality"] = lambda: quality(run, problem)
    return found


def table(results: dict[str, Any]) -> str:
    """What the digits say at the tolerance that is not varied, as Markdown."""
    lines = ["| solver | steps | sweep | window | rounds | evaluations / steps | error | time |", "|---" * 8 + "|"]
    for point in [*results["digits"]["grids"], *results["digits"].get("windows", [])]:
        cells = [point["solver"], point["steps"], point["sweep"], point["window"] or "all", f"{point['rounds']:.1f}"]
        cells += [f"{point['inflation']:.1f}", f"{point['error']:.1e}", f"{1 / point['speedup']:.2f} of sequential"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    for row in results["digits"].get("quality", []):
        numbers = f"accuracy {row['accuracy']:.3f}, Frechet distance {row['frechet_distance']:.3f}"
        moved = "" if row["moved"] is None else f", images moved by {row['moved']:.1e}"
        lines.append(f"\n{row['name']}: {row['rounds']:.1f} rounds, {numbers}{moved}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run with command-line arguments (default: those of the process); returns what parallel.json holds."""
    few = lambda options: dataclasses.replace(options, **QUICK) if options.quick else options
    with _run.start(Options, arguments, resolve=few) as run:
        results = measure(run)
        with run.clock("picture"):
            _parallel_page.draw(results, run.out / "parallel.png")
        results |= {"device": jax.devices()[0].device_kind, "seconds": run.clock.seconds}
        (run.out / "parallel.json").write_text(json.dumps(results, indent=1, default=str) + "\n")
        print(table(results))
        print(f"\n{run.clock}")
        print(f"parallel.png and parallel.json are in {run.out}/")
    return results


if __name__ == "__main__":
    main()
