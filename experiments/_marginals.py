"""The marginals of Gaussian processes on a mixture: exact ones forwards, samples of the reverse process.

Every process is ``x_t = m_t + B (alpha z_0 + sigma eps)`` in some coordinates, so with mixture data an entry of x_t is
a mixture of Gaussians whose numbers are found by entering and leaving those coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.stats import norm

import diffjax
from diffjax import coordinates, grids, phase, processes, solvers
from diffjax.levels import CLEAN, Array, Grid, Level, Process, Tree, value

STEPS = 64
SHARES = np.array([0.4, 0.6])


class Marginals(NamedTuple):
    """What a panel shows: S times, at each the exact law of one entry and P samples of the reverse process."""

    times: np.ndarray  # (S,), 0 is data
    cdf: Callable[[np.ndarray], np.ndarray]  # (S, X) places -> (S, X)
    samples: np.ndarray  # (S, P)
    pdf: Callable[[np.ndarray], np.ndarray]  # (X,) -> (S, X), for shading
    known: np.ndarray | None = None  # (S,), where the state is a number
    discrete: bool = False

    def distance(self) -> float:
        """The largest distance of distribution functions over the times at which the state is random."""
        x = np.sort(self.samples, axis=1)
        exact, count = self.cdf(x), x.shape[1]
        # of equal samples the last one is at the height of the jump
        found = np.stack([np.searchsorted(row, row, side="right") for row in x]) / count
        error = np.abs(exact - found)
        if not self.discrete:
            error = np.maximum(error, np.abs(exact - np.arange(count) / count))
        return float(error.max(1)[slice(None) if self.known is None else ~self.known].max())


class Panel(NamedTuple):
    """A part of the page: the factory that it shows, what the title adds, and what computes it."""

    shows: str
    group: str
    make: Callable[[Array, int], Marginals]  # key, paths
    part: str = ""

    @property
    def name(self) -> str:
        return f"{self.shows} {self.part}".strip()


def law(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Means (2, size) and covariances (2, size, size) of the data: neighbours are alike."""
    lag = np.abs(np.arange(size)[:, None] - np.arange(size))
    return np.outer([1.0, -0.8], np.ones(size)), np.array([0.2, 0.3])[:, None, None] ** 2 * np.exp(-lag / 2)


def draw_data(key: Array, count: int, size: int) -> Array:
    """Draws (count, size) of the mixture."""
    means, covariances = law(size)
    roots = np.linalg.cholesky(covariances)
    which, noise = jax.random.split(key)
    index = jax.random.choice(which, 2, (count,), p=jnp.asarray(SHARES))
    z = jax.random.normal(noise, (count, size))
    return jnp.asarray(means, jnp.float32)[index] + jnp.einsum("nij,nj->ni", jnp.asarray(roots, jnp.float32)[index], z)


def normal_mixture(times: np.ndarray, means: np.ndarray, stds: np.ndarray, samples: np.ndarray) -> Marginals:
    """Marginals of means and standard deviations (S, 2)."""
    known = stds.max(1) < 1e-6
    stds = np.maximum(stds, 1e-3)  # a state that is known has no density

    def cdf(x: np.ndarray) -> np.ndarray:
        return (SHARES * norm.cdf((x[..., None] - means[:, None]) / stds[:, None])).sum(-1)

    def pdf(x: np.ndarray) -> np.ndarray:
        return (SHARES * norm.pdf(x[None, :, None], means[:, None], stds[:, None])).sum(-1)

    return Marginals(times, cdf, samples, pdf, known)


@value
class Posterior:
    """E[z_0 | z_t] of a mixture in standard coordinates, with a level for every entry."""

    means: Array
    covariances: Array

    def __call__(self, z: Array, level: Level) -> Array:
        alpha = jnp.broadcast_to(level.alpha, z.shape).astype(z.dtype)
        noise = jnp.broadcast_to(level.sigma, z.shape).astype(z.dtype) ** 2
        moved = alpha[:, None] * jnp.asarray(self.covariances, z.dtype) * alpha
        # where nothing is noise the state says nothing that is asked for
        total = moved + jnp.diag(jnp.where(noise == 0, 1e-6, noise))
        return posterior(self.means, jnp.asarray(self.covariances, z.dtype) * alpha, alpha * self.means, total, z)


def posterior(means: Array, cross: Array, centres: Array, total: Array, x: Array) -> Array:
    """The posterior mean of a mixture with Cov(x_0, x) and Cov(x) for every component."""
    off = x - jnp.asarray(centres, x.dtype)
    solved = jnp.linalg.solve(total, off[..., None])[..., 0]
    logits = jnp.log(jnp.asarray(SHARES, x.dtype)) - 0.5 * (off * solved).sum(-1)
    weights = jax.nn.softmax(logits - 0.5 * jnp.linalg.slogdet(total)[1])
    return weights @ (jnp.asarray(means, x.dtype) + jnp.einsum("kij,kj->ki", cross, solved))


def gaussian(
    process: Process, size: int = 1, entry: int = 0, power: float = 1.0, like: Tree = None, grid: Grid | None = None
) -> Callable[[Array, int], Marginals]:
    """The panel of one entry of a process on ``size`` entries, sampled by the ancestral solver."""
    like = np.zeros(size) if like is None else like
    walk = grids.times(process, float(process.end) * np.linspace(1, 0, STEPS + 1) ** power) if grid is None else grid

    def make(key: Array, paths: int) -> Marginals:
        unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), like))[1]
        flat = lambda tree: ravel_pytree(tree)[0]
        means, covariances = law(size)
        basis = np.asarray(jax.vmap(lambda e: flat(process.leave(e)))(jnp.eye(size)), np.float64).T
        enter = np.linalg.inv(basis)
        standard = np.stack([flat(process.enter(unravel(jnp.asarray(m, jnp.float32)), CLEAN)) for m in means])
        denoise = Posterior(standard, enter @ covariances @ enter.T)
        key_data, key_noise, key_walk = jax.random.split(key, 3)
        x0, eps = draw_data(key_data, paths, size), jax.random.normal(key_noise, (paths, size))
        start = jax.tree.map(jnp.asarray, walk.start)

        def one(key: Array, x0: Array, eps: Array) -> tuple[Array, Any]:
            x = process.noised(unravel(x0), eps, start)
            saved = diffjax.sample(key, denoise, solvers.ancestral(), walk, x=x, save="states").saved
            return jax.vmap(flat)(saved.states), saved.states_level

        states, levels = jax.jit(jax.vmap(one))(jax.random.split(key_walk, paths), x0, eps)
        levels = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), levels)
        centres, stds = [], []
        for i in range(len(levels.time)):
            level = jax.tree.map(lambda leaf, i=i: leaf[i], levels)
            row = basis[entry] * np.broadcast_to(level.alpha, (size,))
            centre = float(np.asarray(flat(process.leave(jnp.zeros(size), level)))[entry])
            noise = np.sum((basis[entry] * np.broadcast_to(level.sigma, (size,))) ** 2)
            centres.append(centre + standard @ row)
            stds.append(np.sqrt(np.einsum("i,kij,j->k", row, denoise.covariances, row) + noise))
        samples = np.asarray(states[:, :, entry], np.float64).T
        times = np.linspace(1, 0, len(centres)) if grid is not None else levels.time / float(process.end)
        return normal_mixture(times, np.array(centres), np.array(stds), samples)

    return make


def in_phase(process: Process, entry: int) -> Callable[[Array, int], Marginals]:
    """The panel of one variable of a phase-space process, sampled by its exponential integrator.

    It ends before the data, where the momentum is what the data's uncertainty over the time that is left says.
    """

    def make(key: Array, paths: int) -> Marginals:
        schedule, (means, covariances) = process.schedule, law(1)
        times = float(process.end) * np.linspace(1, 0.15, STEPS + 1) ** 2
        key_data, key_noise, key_walk = jax.random.split(key, 3)
        x0 = draw_data(key_data, paths, 1)
        eps = jax.random.normal(key_noise, (paths, schedule.variables, 1))
        start = jax.vmap(lambda x, e: phase.noised(process, x, e, np.float64(process.end)))(x0, eps)
        solver, grid = phase.exponential(order=2, eta=1), grids.times(process, times)
        denoise = Posterior(means, covariances)
        run = lambda k, u: diffjax.sample(k, denoise, solver, grid, x=u, save="states").saved.states
        states = jax.jit(jax.vmap(run))(jax.random.split(key_walk, paths), start)
        found = [schedule.moments(t) for t in times]
        a, spread = (np.array([part[i] for part in found]) for i in (0, 1))
        stds = np.sqrt(a[:, entry, None] ** 2 * covariances[:, 0, 0] + spread[:, entry, entry, None])
        samples = np.asarray(states[:, :, entry, 0], np.float64).T
        return normal_mixture(times / float(process.end), a[:, entry, None] * means[:, 0], stds, samples)

    return make


@value
class Mixed:
    """E[x_0 | x_t] of the mixture under a process that mixes entries, from what its solvers tell."""

    schedule: Any

    def __call__(self, y: Array, level: Level) -> Array:
        means, covariances = law(y.shape[0])
        moved, spread = self.schedule.moments(level.time)
        x = jnp.linalg.solve(self.schedule.statistic(level), y)
        cross = jnp.asarray(covariances, y.dtype) @ moved.T
        return posterior(means, cross, jnp.asarray(means, y.dtype) @ moved.T, moved @ cross + spread, x)


def mixed(process: Process, entry: int) -> Callable[[Array, int], Marginals]:
    """The panel of one entry of a process that mixes them."""

    def make(key: Array, paths: int) -> Marginals:
        schedule, times = process.schedule, float(process.end) * np.linspace(1, 0, STEPS + 1) ** 2
        size = schedule.variables
        means, covariances = law(size)
        key_data, key_noise, key_walk = jax.random.split(key, 3)
        x0, eps = draw_data(key_data, paths, size), jax.random.normal(key_noise, (paths, size))
        start = jax.vmap(lambda x, e: phase.metric_noised(process, x, e, np.float64(process.end))[0])(x0, eps)
        grid, solver = grids.times(process, times), phase.exponential(eta=1)
        run = lambda k, u: diffjax.sample(k, Mixed(schedule), solver, grid, x=u, save="states").saved.states
        states = jax.jit(jax.vmap(run))(jax.random.split(key_walk, paths), start)
        found = [schedule.moments(t) for t in times]
        centres = np.array([means @ moved[entry] for moved, _ in found])
        variances = [
            np.einsum("i,kij,j->k", moved[entry], covariances, moved[entry]) + spread[entry, entry]
            for moved, spread in found
        ]
        samples = np.asarray(states[:, :, entry], np.float64).T
        return normal_mixture(times / float(process.end), centres, np.sqrt(variances), samples)

    return make


def _square(time: Array) -> Array:
    return jnp.cos(0.5 * jnp.pi * time) ** 2


def _rest(time: Array) -> Array:
    return jnp.sin(0.5 * jnp.pi * time) ** 2


def gaussian_panels() -> list[Panel]:
    """A panel, or two, for every public process of `diffjax.processes` and `diffjax.phase`."""
    p, y, flow = processes, np.array([2.0]), processes.flow()
    cosines, eight = coordinates.dct((0,)), np.arange(8)
    blurred = p.changed(p.blurred(p.cosine(), cosines.frequencies((8,)), 4.0), cosines)
    relay = p.relay(p.edm(5.0), (8,), 2, 0.5, 4.0, axes=(0,))
    functions = p.functional(1 + 0.5 * eight, 8 / (1.0 + eight**2), end=4.0)
    pyramid = p.decomposable((4,), 1, (0,))
    pair = {"a": np.zeros(1), "b": np.zeros(1)}
    product = p.product({"a": p.vp(), "b": p.ve(0.02, 5.0)}, pair)
    schedules = p.modal((flow, p.vp()), np.array([0, 1]))
    scalar = {
        "vp": gaussian(p.vp(), power=2),
        "sub_vp": gaussian(p.sub_vp(), power=2),
        "ve": gaussian(p.ve(0.02, 5.0)),
        "edm": gaussian(p.edm(5.0), power=3),
        "cosine": gaussian(p.cosine()),
        "flow": gaussian(flow),
        "ddpm": gaussian(p.ddpm(), power=2),
        "table": gaussian(p.table(np.linspace(1e-3, 0.2, 50)), power=2),
        "zero_terminal_snr": gaussian(p.zero_terminal_snr(p.ddpm()), power=2),
        "gaussian": gaussian(p.gaussian(_square, _rest)),
        "damped": gaussian(p.damped(flow, strength=0.2)),
        "learned": gaussian(p.learned(np.array([2.0, 0.0, -1.0, 0.0, 1.0]), 3.0, -4.0)),
        "scaled_time": gaussian(p.scaled_time(flow)),
        "shared_time": gaussian(p.shared_time(p.ddpm()), power=2),
    }
    around = {
        "shifted": gaussian(p.shifted(flow, y)),
        "coloured": gaussian(p.coloured(flow, np.array([[1.0, 0.9], [0.9, 1.0]])), 2, 1),
        "changed": gaussian(p.changed(flow, coordinates.scaled(np.array([2.0]))), 1),
        "ouve": gaussian(p.ouve(y), power=2),
        "brownian_bridge": gaussian(p.brownian_bridge(y)),
        "consecutive_bridges": gaussian(p.consecutive_bridges(y, -y)[1], power=1),
        "residual": gaussian(p.residual(y)),
        "resshift": gaussian(p.resshift(y, kappa=1.0), power=2),
        "resfusion": gaussian(p.resfusion(y, p.vp()), power=2),
        "diffuse_vae": gaussian(p.diffuse_vae(flow, y)),
        "gaussian_prior": gaussian(p.gaussian_prior(flow, np.array([1.0]), np.array([0.4]))),
        "temporal": gaussian(p.temporal(flow, np.array([0.0, 0.1, 0.7])), 3, 1),
        "shared_noise": gaussian(p.shared_noise(flow, np.array([0.0, 0.64, 0.36])), 3, 1),
    }
    modes = {
        "blurred": gaussian(blurred, 8, 0),
        "relay": gaussian(relay, 8, 0, 3),
        "functional": gaussian(functions, 8, 0, 2),
    }
    found = [Panel(name, "scalar", make) for name, make in scalar.items()]
    found += [Panel(name, "coordinates", make) for name, make in around.items()]
    found += [Panel(name, "modes", make) for name, make in modes.items()]
    for k, part in enumerate(("flow", "vp")):
        found.append(Panel("modal", "entries", gaussian(schedules, 2, k, 2), part))
    grid = grids.progressive(pyramid, STEPS // 2)
    found.append(Panel("decomposable", "entries", gaussian(pyramid, 4, 0, grid=grid), "coarse to fine"))
    for k, part in enumerate(("a: vp", "b: ve")):
        found.append(Panel("product", "entries", gaussian(product, 2, k, 2, pair), part))
    for name, process in (("cld", phase.cld()), ("psld", phase.psld()), ("bridge", phase.bridge())):
        found += [Panel(name, "phase", in_phase(process, k), part) for k, part in enumerate(("position", "momentum"))]
    half, turn = np.diag([0.3, 0.5, 1.5]), np.array([[0.0, -1.0, 0.4], [1.0, 0.0, -1.2], [-0.4, 1.2, 0.0]])
    found.append(Panel("recipe", "phase", in_phase(phase.recipe(half, turn, beta_max=6.0), 0), "of three"))
    plain = phase.linear_sde([[0, 1], [-1, -2]], [[0.0], [2.0]], [0.1], 4.0)
    found.append(Panel("linear_sde", "phase", in_phase(plain, 0), "position"))
    metric = phase.flexible([[0.5, 0.2], [0.2, 0.9]], [[0, -2.0], [2.0, 0]], 1.0, 4.0)
    return [*found, Panel("flexible", "phase", mixed(metric, 0), "turned")]
