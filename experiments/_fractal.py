"""Two classes that branch through each other in the plane, and what guidance does near their boundary.

Every class is a tree of Gaussians, so that its denoiser, the classifier and the boundary are exact.  A flow from guided
samples to data, made of one set of them, is applied to another set: the post-processor of the classifier-centric view.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import linear_sum_assignment

import diffjax
from diffjax import guidance, interpolants, oracles
from diffjax.levels import Array
from experiments import _plots


def tree(depth: int, angle: float, seed: int, beads: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, means (K, 2) and variances (K,) along a branching tree that grows from the origin."""
    generator = np.random.default_rng(seed)
    means, variances, weights = [], [], []

    def grow(start: np.ndarray, angle: float, length: float, left: int) -> None:
        end = start + length * np.array([np.cos(angle), np.sin(angle)])
        for share in (np.arange(beads) + 0.5) / beads:
            means.append(start + share * (end - start))
            variances.append((0.09 * length) ** 2)
            weights.append(length)
        if left:
            for side in (-1.0, 1.0):
                grow(end, angle + side * generator.uniform(0.35, 0.7), 0.68 * length, left - 1)

    grow(np.zeros(2), angle, 1.0, depth)
    return np.array(weights), np.array(means), np.array(variances)


def fractal(depth: int, count: int, rows: int, scale: float, key: Array, blur: float = 0.04) -> dict[str, Any]:
    """W2 to the data and distances to the boundary: of plain, guided and post-processed samples."""
    keys = jax.random.split(key, 5)
    one, other = tree(depth, 0.45, 1), tree(depth, -0.45, 2)
    wanted, rest = oracles.mixture(*one), oracles.mixture(*other)
    everything = oracles.mixture(*(np.concatenate(pair) for pair in zip(one, other, strict=True)))
    grid = diffjax.grids.log_snr(diffjax.processes.vp(), rows, stop=0.002)

    @jax.jit
    def draw(keys: Array, scale: Array) -> Array:
        guided = guidance.autoguidance(wanted, everything, scale)  # the difference is the exact classifier's gradient
        return jax.vmap(lambda key: diffjax.sample(key, guided, diffjax.solvers.dpmpp(), grid, shape=(2,)).x)(keys)

    data = [np.asarray(jax.vmap(wanted.sample)(jax.random.split(k, count))) for k in jax.random.split(keys[0], 6)]
    seen, fresh, plain = (
        np.asarray(draw(jax.random.split(k, count), jnp.float32(s)))
        for k, s in zip(keys[2:], (scale, scale, 1.0), strict=True)
    )
    # the flow of optimally paired sets, each pair a little Gaussian that is moved: exact, nothing is trained
    _, goals = interpolants.optimal(seen, data[0])
    ends = (oracles.mixture(np.ones(count), np.asarray(x), np.full(count, blur**2)) for x in (seen, goals))
    field = interpolants.exact(interpolants.linear(), *ends, cross=np.full((count, 1, 1), blur**2) * np.eye(2))
    after = jax.jit(jax.vmap(lambda x: interpolants.ode(field.velocity, np.linspace(0.0, 1.0, 9), x).x))(fresh)
    smooth = diffjax.processes.vp().level(0.01)  # on the clean law itself the log-odds are steep and rough
    margin = lambda x: wanted.log_density(x, smooth) - rest.log_density(x, smooth)
    sets = {"data": data[2], "scale 1": plain, f"scale {scale:g}": fresh, "after the flow": after}
    far = jax.jit(jax.vmap(lambda x: guidance.boundary_distance(margin, x)))
    # the mean over sets of data, whose branches have more or fewer samples by chance
    w2 = {name: float(np.mean([wasserstein(np.asarray(x), other) for other in data[3:]])) for name, x in sets.items()}
    return {
        "sets": {name: np.asarray(x) for name, x in sets.items()},
        "other": np.asarray(jax.vmap(rest.sample)(jax.random.split(keys[1], count))),
        "w2": w2,
        "boundary": {name: np.asarray(far(x)) for name, x in sets.items()},
    }


def wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """The 2-Wasserstein distance of two sets of the same size."""
    cost = ((a[:, None] - b[None]) ** 2).sum(-1)
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))


def plot(path: Any, found: dict[str, Any]) -> None:
    """The sets over the data of both classes, and their distances to the boundary."""
    with plt.rc_context(_plots.STYLE):
        figure, axes = plt.subplots(1, 4, figsize=(17, 4))
        names = list(found["sets"])
        for axis, name in zip(axes, names[1:], strict=False):
            for points, colour in ((found["other"], "tab:orange"), (found["sets"]["data"], "0.7")):
                axis.scatter(*points.T, s=3, color=colour, alpha=0.5, linewidths=0)
            axis.scatter(*found["sets"][name].T, s=4, color="tab:blue", linewidths=0)
            axis.set_title(f"{name}: W2 to the data {found['w2'][name]:.3f} (floor {found['w2']['data']:.3f})")
            axis.set_aspect("equal")
        low, high = np.quantile(np.concatenate(list(found["boundary"].values())), [0.01, 0.99])
        edges = np.linspace(low, high, 30)
        for name in names:
            style = {"histtype": "step", "linewidth": 2.5 if name == "data" else 1.3}
            axes[3].hist(found["boundary"][name], edges, label=name, density=True, **style)
        axes[3].set(title="distance to the decision boundary, to first order")
        axes[3].legend()
        _plots.save(figure, path)
