"""Mixtures in the plane annealed, multiplied and tilted by particles, beside the exact laws: for `steering`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import diffjax
from diffjax import grids, metrics, oracles, smc, solvers
from diffjax.levels import CLEAN, Array, Level, value
from experiments import _plots

FIRST = oracles.mixture([0.5, 0.3, 0.2], np.array([[-1.0, -0.4], [0.9, 0.7], [0.6, -1.1]]), [0.06, 0.1, 0.05])
SECOND = oracles.mixture([0.4, 0.6], np.array([[-0.7, 0.1], [0.8, 0.2]]), [0.12, 0.2])
SLOPE, CURVATURE = np.array([2.0, -1.0]), 1.0


def quadratic(y: Array) -> Array:
    """The reward of the tilt, ``<b, y> - a |y|^2 / 2``."""
    return jnp.asarray(SLOPE, y.dtype) @ y - 0.5 * CURVATURE * jnp.sum(y**2)


def tilted_mixture(law: Any, slope: np.ndarray, curvature: float) -> tuple[Any, float]:
    """``law e^{<b, y> - a |y|^2 / 2}``, a mixture again, and the logarithm of its integral."""
    variance = law.variances[:, 0]
    new = 1 / (1 / variance + curvature)
    mean = new[:, None] * (law.means / variance[:, None] + slope)
    gains = np.log(new / variance) + 0.5 * (np.sum(mean**2, 1) / new - np.sum(law.means**2, 1) / variance)
    weights = law.weights * np.exp(gains)
    return oracles.mixture(weights, mean, new), float(np.log(weights.sum()))


def multiplied(first: Any, second: Any) -> tuple[Any, float]:
    """The product of two mixtures, a mixture again, and the logarithm of its integral."""
    parts = []
    for weight, mean, variance in zip(second.weights, second.means, second.variances[:, 0], strict=True):
        law, log_z = tilted_mixture(first, mean / variance, 1 / variance)
        scale = weight * np.exp(log_z - 0.5 * mean @ mean / variance) / (2 * np.pi * variance)
        parts.append((law.weights * scale, law.means, law.variances[:, 0]))
    weights, means, variances = (np.concatenate(each) for each in zip(*parts, strict=True))
    return oracles.mixture(weights, means, variances), float(np.log(weights.sum()))


@value
class ExactTwist:
    """``log E[e^r | x_t]``: the ratio of the diffused tilted law and the diffused law."""

    law: Any
    tilted: Any
    log_z: Array

    def __call__(self, denoise: Any, x: Array, level: Level) -> tuple[Array, Array]:
        # at sigma = 0 the ratio is e^r itself
        inside = jnp.asarray(level.sigma > 0)
        safe = jax.tree.map(lambda leaf, other: jnp.where(inside, leaf, other), level, SAFE)
        ratio = self.log_z + self.tilted.log_density(x, safe) - self.law.log_density(x, safe)
        return jnp.where(inside, ratio, quadratic(x / level.alpha)), denoise(x, level)


SAFE = diffjax.processes.vp().level(0.5)
EDGES = np.linspace(-2.6, 2.6, 521)
CENTRES = 0.5 * (EDGES[1:] + EDGES[:-1])


def density(panel: str) -> tuple[np.ndarray, float]:
    """The target's probability in every cell of the plane (x, y), and the logarithm of its integral."""
    points = jnp.asarray(np.stack(np.meshgrid(CENTRES, CENTRES, indexing="ij"), -1).reshape(-1, 2), jnp.float32)
    of = lambda law: np.asarray(jax.jit(jax.vmap(lambda y: law.log_density(y, CLEAN)))(points), np.float64)
    if panel == "annealed":
        logs = 2 * of(FIRST)
    else:
        law, log_z = multiplied(FIRST, SECOND) if panel == "product" else tilted_mixture(FIRST, SLOPE, CURVATURE)
        logs = of(law) + log_z
    total = np.exp(logs).sum() * (CENTRES[1] - CENTRES[0]) ** 2
    return (np.exp(logs) / np.exp(logs).sum()).reshape(len(CENTRES), -1), float(np.log(total))


def exact_draws(cells: np.ndarray, seed: int, count: int) -> np.ndarray:
    """Samples of a density in cells, uniform within a cell."""
    generator = np.random.default_rng(seed)
    index = np.unravel_index(generator.choice(cells.size, count, p=cells.ravel()), cells.shape)
    jitter = (CENTRES[1] - CENTRES[0]) * (generator.random((count, 2)) - 0.5)
    return CENTRES[np.stack(index, 1)] + jitter


def growing(level: Level) -> Array:
    """The strength of the tilt: 1 where the state is clean."""
    return level.alpha**2 / (level.alpha**2 + level.sigma**2)


def steerings(options: Any, panel: str) -> dict[str, Callable[[Array], smc.Steered]]:
    """Every way to a target."""
    process = diffjax.processes.vp()
    start = float(process.schedule.time(-np.log(12.0)))  # noise twelve times the data
    grid = grids.log_snr(process, options.rows, start=start, stop=2e-4)
    targets = {
        "annealed": lambda: smc.annealed(FIRST, 2.0),
        "product": lambda: smc.product(FIRST, SECOND),
        "tilted": lambda: smc.tilted(FIRST, quadratic, growing),
    }
    target, shape = targets[panel](), (2,)
    plan: dict[str, Any] = {"particles": options.particles}
    fields = {"tilted": ("models", "reward")}.get(panel, ("models",))

    def weighted(**more: Any) -> Callable[[Array], smc.Steered]:
        return lambda key: smc.weighted_sde(key, target, grid, shape, **plan, **more)

    found = {
        "no weights": weighted(threshold=0.0),
        "weighted SDE": weighted(),
        "DriftLite (VCG)": weighted(control=smc.variance_controlled(fields)),
    }
    if panel == "tilted":
        tilted, log_z = tilted_mixture(FIRST, SLOPE, CURVATURE)
        twists = {
            "twisted SMC, reward at x0": smc.reward(quadratic),
            "twisted SMC, exact twist": ExactTwist(FIRST, tilted, log_z),
        }
        found["DriftLite (ECG)"] = weighted(control=smc.energy_controlled(("reward",)))
        for name, twist in twists.items():
            found[name] = lambda key, twist=twist: smc.steer(
                key, FIRST, solvers.ancestral(), grid, shape, twist=twist, **plan
            )
    return {name: run for name, run in found.items() if name in (options.ways or found)}


def judged(options: Any, panel: str, name: str, run: Callable[[Array], smc.Steered], key: Array) -> dict:
    """Error of log Z, effective size and distance to the exact law, in units of that of two exact sets.

    Averages over four populations; without weights the particles count alike.
    """
    populations = 4
    found = jax.jit(jax.vmap(run))(jax.random.split(key, populations))
    cells, log_z = density(panel)
    reference = exact_draws(cells, options.seed, 8 * options.particles)
    other = exact_draws(cells, options.seed + 1, options.particles)
    directions = jax.random.key(options.seed)
    distance = lambda x: float(metrics.sliced_wasserstein(directions, jnp.asarray(x), jnp.asarray(reference)))
    floor = distance(other)
    even = np.zeros(options.particles)
    distances, shown = [], []
    for i in range(populations):
        logs = even if name == "no weights" else np.asarray(found.log_weights[i], np.float64)
        weights = np.exp(logs - logs.max()) / np.exp(logs - logs.max()).sum()
        index = smc.systematic()(jax.random.fold_in(key, i), jnp.log(jnp.asarray(weights, jnp.float32)))
        shown.append(np.asarray(found.x[i])[np.asarray(index)])
        distances.append(distance(shown[-1]) / floor)
    errors = np.asarray(found.log_z, np.float64) - log_z
    return {
        "distance": float(np.mean(distances)),
        "log_z_error": None if name == "no weights" else float(np.sqrt(np.mean(errors**2))),
        "ess": float(np.mean(np.asarray(found.ess)[:, -1]) / options.particles),
        "shown": shown[0],
    }


def plot_mixtures(options: Any, found: dict[str, dict[str, Any]]) -> None:
    """Particles over the contours of the exact density, a row a target."""
    columns = max(map(len, found.values()))
    with plt.rc_context(_plots.STYLE):
        figure, axes = plt.subplots(len(found), columns, figsize=(2.5 * columns, 2.7 * len(found)), squeeze=False)
        for row, (panel, each) in zip(axes, found.items(), strict=True):
            cells, _ = density(panel)
            order = np.sort(cells.ravel())[::-1]
            heights = [order[np.searchsorted(np.cumsum(order), share)] for share in (0.99, 0.9, 0.5)]
            for axis in row[len(each) :]:
                axis.set_visible(False)
            for axis, (name, result) in zip(row, each.items(), strict=False):
                axis.contour(CENTRES, CENTRES, cells.T, heights, colors="tab:red", linewidths=0.8)
                axis.scatter(*result["shown"].T, s=2, color="0.25", alpha=0.6, zorder=0)
                axis.set(title=f"{name}\n{result['distance']:.1f} x floor", xlim=(-2, 2), ylim=(-2, 2), aspect="equal")
                axis.title.set_fontsize(8)
                axis.set_xticks([])
                axis.set_yticks([])
            row[0].set_ylabel(panel)
        _plots.save(figure, options.out / "mixture.png")
