"""Digits restored by every inverse method, beside the exact posterior of a Gaussian prior: samples and scores."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import inverse, metrics, oracles
from diffjax.levels import Array
from experiments import _classifier, _inverse_methods, _inverse_pictures, _inverse_problems, _photographs, _run, digits

if TYPE_CHECKING:
    from experiments.inverse import Options

COLUMNS = ("psnr", "psnr_of_one", "ssim", "features", "coverage", "failed")
LEVEL = 1 / 16  # half a grey level of the digits, in [-1, 1]
VARIED = 0.1  # pixels of a smaller deviation over the digits are paper, and no matter of coverage
ORDER = np.array([3, 8, 5, 2, 9, 0, 6, 4, 7, 1])  # of classes: the first few are the hard ones


@dataclasses.dataclass(frozen=True)
class Given:
    """What all parts on digits share."""

    model: digits.Model
    classifier: _classifier.Classifier
    training: np.ndarray
    held_out: digits.Labelled

    @property
    def variance(self) -> float:
        return float(np.mean(self.training.var(0)))

    @property
    def varied(self) -> np.ndarray:
        return self.training.std(0) > VARIED

    def some(self, count: int, skip: int = 0) -> np.ndarray:
        """Held-out digits of all classes in turn, after the first ``skip`` of each class."""
        labels = self.held_out.labels
        index = [np.flatnonzero(labels == ORDER[k % 10])[skip + k // 10] for k in range(count)]
        return self.held_out.images[index]

    def setting(self, options: Options) -> _inverse_methods.Setting:
        return _inverse_methods.setting(digits.PROCESS, options.levels, self.variance, options.draws)


def prior(model: digits.Model, params: Any) -> Any:
    """The unconditional denoiser of digits."""
    return digits.denoiser(model._replace(params=params), jnp.asarray(digits.CLASSES))


def solved(method: _inverse_methods.Method, problems: Any, model: digits.Model, s: Any, key: Array) -> dict[str, Any]:
    """Samples (problems, images, draws, 8, 8, 1) of a method, and its calls a sample; all in one batch."""
    seen = _inverse_problems.stacked([each.firm if method.divides else each.seen for each in problems.values()])

    def each(params: Any, seen: Any) -> tuple[Array, Array]:
        return method.each(key, prior(model, params), seen, s)

    samples, calls = jax.jit(jax.vmap(each, (None, 0)))(model.params, seen)
    return {"samples": np.asarray(samples), "calls": float(np.mean(np.asarray(calls)))}


def gaussian(law: Any, problems: Any, draws: int, key: Array) -> dict[str, Any]:
    """The baseline: draws of the exact posterior of a Gaussian prior, in the form of `solved`."""
    found = []
    for problem in problems.values():
        one = lambda i, problem=problem: jax.tree.map(lambda leaf: np.asarray(leaf[i], np.float64), problem.seen)
        posteriors = [inverse.posterior(law, one(i)) for i in range(len(problem.shown))]
        keys = jax.random.split(key, draws)
        found.append(np.stack([np.asarray(jax.vmap(exact.sample)(keys)) for exact in posteriors]))
    return {"samples": np.stack(found), "calls": 0.0}


# --- scores -------------------------------------------------------------------------------------------------------


def scores(samples: np.ndarray, truth: np.ndarray, judge: _classifier.Classifier, varied: np.ndarray) -> dict[str, Any]:
    """What samples (N, S, 8, 8, 1) are worth: the share that is not finite, and what the others are worth.

    ``each`` is the PSNR of the mean of every image, None where all samples failed.
    """
    finite = np.min(np.isfinite(samples), axis=(2, 3, 4))
    failed, unit = 1 - float(np.mean(finite)), _photographs.as_unit
    found: list[dict[str, Any]] = []
    each: list[float | None] = [None] * len(truth)
    for i in np.flatnonzero(finite.sum(1)):  # images of which there is a sample
        kept, true = np.clip(samples[i, finite[i]], -1, 1), truth[i : i + 1]
        mean, trues = kept.mean(0, keepdims=True), np.repeat(true, len(kept), 0)
        want, seen = judge(true)[1], judge(kept)[1]
        inside = ((kept.min(0) - LEVEL <= true) & (true <= kept.max(0) + LEVEL))[0]
        each[i] = float(np.mean(metrics.psnr(unit(mean), unit(true))))
        found.append(
            {
                "psnr": each[i],
                "psnr_of_one": np.mean(metrics.psnr(unit(kept), unit(trues))),
                "ssim": np.mean(metrics.ssim(unit(mean), unit(true), window=5, std=1.5)),
                "features": np.mean(np.linalg.norm(seen - want, axis=-1)) / np.linalg.norm(want),
                "coverage": np.mean(inside[varied]),
            }
        )
    means = {name: float(np.mean([row[name] for row in found])) if found else None for name in COLUMNS[:-1]}
    return means | ({"coverage": None} if samples.shape[1] == 1 else {}) | {"failed": failed, "each": each}


def average(rows: dict[str, dict[str, Any]], column: str) -> float | None:
    """Over the problems of which it is known."""
    known = [row[column] for row in rows.values() if row[column] is not None]
    return float(np.mean(known)) if known else None


def gain(rows: dict[str, dict[str, Any]], baseline: dict[str, dict[str, Any]]) -> float | None:
    """Of the mean PSNR over a baseline's, where it is known of all problems."""
    psnr, base = ([row["psnr"] for row in table.values()] for table in (rows, baseline))
    return None if None in psnr or None in base else float(np.mean(psnr) - np.mean(base))


def standard_error(rows: dict[str, dict[str, Any]], baseline: dict[str, dict[str, Any]] | None = None) -> float | None:
    """Of the mean PSNR, over digits; with a baseline, of the mean difference to it on the same digits."""
    table = np.array([row["each"] for row in rows.values()], float)  # None is NaN
    if baseline is not None:
        table = table - np.array([row["each"] for row in baseline.values()], float)
    table = table[:, np.all(np.isfinite(table), axis=0)]
    return float(table.mean(0).std(ddof=1) / np.sqrt(table.shape[1])) if table.shape[1] > 1 else None


# --- the part -----------------------------------------------------------------------------------------------------


def part(run: _run.Run[Options], given: Given, key: Array) -> tuple[dict, dict]:
    """``(scores, calls)`` of every method, by groups of measurements; draws digits, methods and calibration."""
    options, s = run.options, given.setting(run.options)
    truth = given.some(options.images)
    every = _inverse_problems.problems(truth, options.std, options.seed)
    known = {"linear": _inverse_methods.LINEAR, "nonlinear": _inverse_methods.NONLINEAR}
    known["counts"] = _inverse_methods.COUNTS
    known = {group: {n: m for n, m in each.items() if n in (options.methods or each)} for group, each in known.items()}
    groups = {group: every[group] for group, each in known.items() if each or group == "linear"}
    found: dict[str, dict[str, Any]] = {group: {} for group in groups}
    baseline = lambda: gaussian(oracles.wiener(given.training), groups["linear"], options.draws, key)
    found["linear"]["gaussian"] = run.part("digits linear gaussian", baseline)
    for group, name in run.over([(g, n) for g in groups for n in known[g]], "methods"):
        make = lambda group=group, name=name: solved(known[group][name], groups[group], given.model, s, key)
        found[group][name] = run.part(f"digits {group} {name}", make)
    table = {
        group: {
            name: {
                problem: scores(result["samples"][i], truth, given.classifier, given.varied)
                for i, problem in enumerate(groups[group])
            }
            for name, result in each.items()
        }
        for group, each in found.items()
    }
    _inverse_pictures.plot_digits(options, found, groups, truth)
    _inverse_pictures.plot_methods(options, found, groups, truth)
    point = lambda rows: (average(rows, "coverage"), average(rows, "psnr"), standard_error(rows))
    points = {group: {name: point(rows) for name, rows in each.items()} for group, each in table.items()}
    _inverse_pictures.plot_calibration(options, points)
    return table, {group: {name: r["calls"] for name, r in each.items()} for group, each in found.items()}


def report(table: dict[str, Any], calls: dict[str, Any]) -> list[str]:
    """Averages over the measurements; standard errors are over digits, the gain's of differences on the same digits."""
    shown = lambda value, width=9: f"{'-' if value is None else f'{value:.2f}':>{width}}"
    lines = []
    for group, each in table.items():
        base = each.get("gaussian")
        heads = ("psnr", "error", "gain", "error", *COLUMNS[1:], "calls")
        lines.append(f"{group:14}" + "".join(f"{head:>{max(9, len(head) + 2)}}" for head in heads))
        for name, rows in each.items():
            over = (gain(rows, base), standard_error(rows, base)) if base else (None, None)
            others = (average(rows, column) for column in COLUMNS[1:])
            cells = (average(rows, "psnr"), standard_error(rows), *over, *others)
            widths = [max(9, len(head) + 2) for head in heads]
            row = "".join(shown(cell, width) for cell, width in zip(cells, widths[:-1], strict=True))
            lines.append(f"  {name:12}{row}{calls[group][name]:{widths[-1]}.0f}")
    return lines
