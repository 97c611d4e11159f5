"""Every method for inverse problems against the exact posterior: how far its samples are, how calibrated, at what cost.

`python -m benchmarks.posterior [--quick] [--problems "A;B"] [--methods "A;B"] [--minutes M] [--page | --rate]`.  A
finished cell (problem, noise, method) is kept in benchmarks/results/posterior.json and not run again; so the run may be
cut off and continued.  ``--page`` only writes docs/posterior.md and its figure, ``--rate``
measures how errors fall with particles.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.spatial.distance import cdist

from benchmarks.inverse import methods, page
from benchmarks.inverse.problems import DRAWS, Problem, noises, problems
from diffjax.metrics import sliced_wasserstein

RESULTS = Path(__file__).parent / "results" / "posterior.json"
PROJECTIONS = 500


def nearest_accuracy(a: np.ndarray, b: np.ndarray) -> float:
    """The leave-one-out accuracy of the nearest neighbour that tells two sets apart: 1/2 where they are one law."""
    both = np.concatenate([a, b])
    distance = cdist(both, both, "sqeuclidean")
    np.fill_diagonal(distance, np.inf)
    labels = np.repeat([0, 1], [len(a), len(b)])
    return float(np.mean(labels[distance.argmin(1)] == labels))


def coverage(samples: np.ndarray, exact: np.ndarray) -> float:
    """The posterior's probability of the central 90 % interval of the samples, averaged over the entries."""
    low, high = np.quantile(samples, [0.05, 0.95], axis=0)
    return float(np.mean((exact >= low) & (exact <= high)))


def scores(samples: np.ndarray, exact: np.ndarray, distinct: np.ndarray | None = None) -> dict[str, float]:
    """Distances of one set of samples to the posterior; ``distinct``, without copies, for the nearest neighbours."""
    a, b = samples.reshape(len(samples), -1), exact.reshape(len(exact), -1)
    a = np.where(np.isfinite(a), a, 0.0)  # what diverged to no number counts as 0
    c = a if distinct is None else distinct.reshape(len(distinct), -1)
    return {
        "sw": sliced_wasserstein(jax.random.key(0), a, b[:DRAWS], PROJECTIONS),
        "c2st": nearest_accuracy(c, b[: len(c)]),
        "coverage": coverage(a, b),
    }


def floor(problem: Problem) -> dict[str, list[float]]:
    """The scores of the exact posterior's own draws."""
    return _lists([scores(exact[DRAWS:], exact) for exact in problem.exact])


def cell(name: str, problem: Problem, seed: int = 0) -> dict:
    """One method on all measurements of a problem."""
    method = methods.METHODS[name]
    shape = problem.exact.shape[2:] if problem.shape is None else tuple(problem.shape.items())
    run = methods.compiled(name, shape, problem.variance)
    keys = jax.random.split(jax.random.key(seed), len(problem.exact))
    begun = time.perf_counter()
    # what only some need is an argument; others leave it out, so that they compile the same for all priors
    out = jax.block_until_ready(run(keys, problem.prior, problem.seen, given(method, problem)))
    seconds = time.perf_counter() - begun
    samples, distinct = np.asarray(out.x if problem.shape is None else joined(out.x)), []
    result = {"nfe": float(np.max(out.nfe)) / (DRAWS if method.particles else 1), "seconds": round(seconds, 2)}
    if method.particles:
        rng = np.random.default_rng(seed)
        logs = np.asarray(out.log_weights, np.float64)
        # where a population diverged, its particles (0 in `scores`, if they are no numbers) count alike
        logs = np.where(np.isfinite(logs.max(1, keepdims=True)), logs, 0.0)
        weights = np.exp(logs - logs.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        # copies would be each other's nearest neighbours: those are told apart on a thinned set, w / max w of each kept
        distinct = [x[rng.uniform(size=DRAWS) < w / w.max()] for x, w in zip(samples, weights, strict=True)]
        drawn = [np.searchsorted(np.cumsum(w), (np.arange(DRAWS) + rng.uniform()) / DRAWS * w.sum()) for w in weights]
        samples = np.stack([x[np.minimum(d, DRAWS - 1)] for x, d in zip(samples, drawn, strict=True)])
        result["ess"] = (1 / (weights**2).sum(1)).round(1).tolist()
        result["resampled"] = np.asarray(out.resampled).sum(1).tolist()
        if problem.evidence is not None:
            error = np.asarray(out.log_z, np.float64) - problem.evidence
            result["log_z"] = np.nan_to_num(error, nan=-np.inf, neginf=-1e9).clip(-1e9).round(4).tolist()
    thinned = distinct if method.particles else [None] * len(samples)
    found = [scores(*given) for given in zip(samples, problem.exact, thinned, strict=True)]
    return result | _lists(found)


def given(method: methods.Method, problem: Problem) -> Any:
    """What a method needs of a problem beside the measurement, or None."""
    return getattr(problem, method.needs) if method.needs else None


def joined(tree: Any) -> np.ndarray:
    """The leaves of samples (P, N, ...) behind each other."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves], axis=-1)


def rate(problem: Problem, seeds: int = 4, counts: tuple = (16, 64, 256, 1024)) -> dict:
    """The error of TDS's log-evidence, with MMPS, by the number of particles: over problems and keys."""
    assert problem.evidence is not None
    errors = []
    for count in counts:
        run = methods.compiled("tds, mmps", problem.exact.shape[2:], problem.variance, count)
        keys = jax.random.split(jax.random.key(count), seeds * len(problem.exact)).reshape(seeds, -1)
        logs = [np.asarray(run(k, problem.prior, problem.seen, None).log_z, np.float64) for k in keys]
        errors.append(np.stack(logs) - problem.evidence)
    squares = [float(np.sqrt(np.mean(e**2))) for e in errors]
    natural = [float(np.mean(np.exp(np.minimum(e, 50)))) for e in errors]
    return {"particles": list(counts), "rms": np.round(squares, 4).tolist(), "mean": np.round(natural, 4).tolist()}


def _lists(found: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [round(float(one[name]), 4) for one in found] for name in found[0]}


def load() -> dict:
    """What is on disk."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(results: dict) -> None:
    """Written beside and moved, so that a kill leaves the old or the new file."""
    beside = RESULTS.with_suffix(f".{os.getpid()}.tmp")
    lines = [f"{json.dumps(key)}: {json.dumps(cell)}" for key, cell in sorted((load() | results).items())]
    beside.write_text("{\n" + ",\n".join(lines) + "\n}\n")  # a line a cell
    beside.replace(RESULTS)


def run(quick: bool, wanted: list[str], chosen: list[str], minutes: float) -> dict:
    """All cells that are not on disk yet, problem by problem."""
    results, end = load(), time.monotonic() + 60 * minutes
    for problem_name, build in problems(quick).items():
        if wanted and problem_name not in wanted:
            continue
        for noise in noises(problem_name):
            asked = [m for m in chosen or methods.METHODS if methods.applies(m, problem_name)]
            missing = [m for m in asked if f"{problem_name}|{noise}|{m}" not in results]
            problem = build(noise) if missing else None
            for name in missing:
                if time.monotonic() > end:
                    return results
                assert problem is not None
                if f"{problem_name}|{noise}|floor" not in results:
                    results[f"{problem_name}|{noise}|floor"] = floor(problem)
                if methods.METHODS[name].needs and given(methods.METHODS[name], problem) is None:
                    continue
                results[f"{problem_name}|{noise}|{name}"] = cell(name, problem)
                keep({key: results[key] for key in (f"{problem_name}|{noise}|floor", f"{problem_name}|{noise}|{name}")})
                print(problem_name, noise, name, results[f"{problem_name}|{noise}|{name}"], flush=True)
    return results


def main(arguments: list[str] | None = None) -> dict:
    """Run what is asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--problems", default="")
    parser.add_argument("--methods", default="")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--rate", action="store_true")
    asked = parser.parse_args([] if arguments is None else arguments)
    names = lambda text: [part for part in text.split(";") if part]
    if asked.rate:
        keep({"mixture 8, 1 seen|low|rate": rate(problems(quick=True)["mixture 8, 1 seen"]("low"))})
    results = (
        load()
        if asked.page or asked.rate
        else run(asked.quick, names(asked.problems), names(asked.methods), asked.minutes)
    )
    page.write(results)
    return {"cells": len(results)}


if __name__ == "__main__":
    import sys

    print(main(sys.argv[1:]))
