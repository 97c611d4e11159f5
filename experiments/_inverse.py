"""Measurements of small images and the methods that invert them, in forms that many problems share one program.

Linear operators become matrices of one shape, with the largest singular value 1 and rows of zeros at the end, and
nonlinear ones a value that holds a number: so a method is compiled once for all of them and runs on all at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import grids, guidance, inverse, processes, smc, solvers
from diffjax.levels import Array, static, value

SIZE, SHAPE = 8, (8, 8, 1)
FLAT = SIZE * SIZE
PADDED = 4 * FLAT  # entries of the widest nonlinear measurement
RATE = 20.0  # counts for a white pixel
ANCESTRAL = solvers.ancestral()


# --- what is measured ---------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """Measurements of several images by one operator."""

    seen: Any  # a measurement whose leaves have a leading axis of images
    firm: Any  # the same without what is below the noise, for methods that take y as exact
    shown: np.ndarray  # (N, 8, 8) the measurement as a picture


def linear_operators(seed: int) -> dict[str, np.ndarray]:
    """Matrices (M, 64) with the largest singular value 1."""
    rng = np.random.default_rng(seed)
    box = np.ones(SHAPE, bool)
    box[2:6, 2:6] = False
    kept = np.zeros((SIZE, SIZE), bool)
    kept[0], kept[:, 0] = True, True  # the lowest frequencies along both axes, and some others
    kept |= rng.random((SIZE, SIZE)) < 0.1
    image = (SIZE, SIZE)
    found = {
        "random pixels": inverse.mask(rng.permutation(np.arange(FLAT) < 20).reshape(SHAPE)),
        "without a box": inverse.mask(box),
        "blur": inverse.blur(inverse.gaussian_kernel(5, 1.0), image),
        "downsampling": inverse.downsample(2, image),
        "three projections": inverse.radon(np.pi * np.array([0.0, 1.0, 2.0]) / 3, image),
        "Fourier": inverse.fourier(kept),
        "compressed sensing": inverse.compressed_sensing(jax.random.key(seed), 16, image),
    }
    entries = {name: np.asarray(inverse.decomposed(operator).entries) for name, operator in found.items()}
    return {name: a / np.linalg.norm(a, 2) for name, a in entries.items()}


def linear_problem(a: np.ndarray, images: np.ndarray, std: float, seed: int) -> Problem:
    """Noisy measurements ``a x + std z``."""
    rng = np.random.default_rng(seed)
    flat = images.reshape(len(images), FLAT).astype(np.float64)
    y = flat @ a.T + std * rng.normal(size=(len(images), len(a)))
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    kept = s > std
    firm = (u[:, kept] * s[kept]) @ vt[kept]
    pictures = y @ a  # the back-projection, in the units of the image where a pixel is seen
    weight = np.abs(a.T @ (a @ np.ones(FLAT)))
    pictures = np.where(weight > 1e-3, pictures / np.maximum(weight, 1e-3), np.nan)
    exact = y @ u[:, kept] @ u[:, kept].T
    return Problem(_measured(a, y, std), _measured(firm, exact, std), pictures.reshape(-1, SIZE, SIZE))


def _measured(a: np.ndarray, y: np.ndarray, std: float) -> Any:
    """The measurement of every image, by the same matrix with rows of zeros, stacked."""
    rows = np.zeros((FLAT, FLAT))
    count = min(len(a), FLAT)
    if len(a) > FLAT:  # more rows than entries tell no more than a square matrix
        q, rows[:] = np.linalg.qr(a)
        y = y @ q
    else:
        rows[:count] = a
    operator = inverse.matrix(rows, SHAPE)
    padded = np.zeros((len(y), FLAT))
    padded[:, : y.shape[1]] = y
    each = [inverse.measurement(operator, one, std) for one in padded]
    return stacked(each)


def stacked(trees: list[Any]) -> Any:
    """One tree with a leading axis, in float32."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf, np.float32) for leaf in leaves]), *trees)


@value
class Nonlinear:
    """One of several nonlinear operators, by a number that may be traced; outputs are padded with zeros."""

    which: Array
    input_shape: tuple = static()
    output_shape: tuple = static()

    def __call__(self, x: Array) -> Array:
        image = (SIZE, SIZE)
        parts = (inverse.phase_retrieval(image), inverse.hdr(image, 3.0), inverse.jpeg(image, 0.25))
        padded = lambda y: jnp.pad(y.reshape(-1), (0, PADDED - y.size))
        branches = [lambda x, part=part: padded(part(x[..., 0])) for part in parts]
        return jax.lax.switch(jnp.asarray(self.which, jnp.int32), branches, x)


NONLINEAR = ("phase retrieval", "saturation", "JPEG-like")


def nonlinear_problem(name: str, images: np.ndarray, std: float, seed: int) -> Problem:
    """Noisy measurements by a nonlinear operator."""
    operator = Nonlinear(np.float32(NONLINEAR.index(name)), SHAPE, (PADDED,))
    clean = np.asarray(jax.vmap(operator)(jnp.asarray(images, jnp.float32)))
    used = FLAT * (4 if name == NONLINEAR[0] else 1)
    noise = std * np.random.default_rng(seed).normal(size=clean.shape)
    y = clean + np.where(np.arange(PADDED) < used, noise, 0.0)
    seen = stacked([inverse.measurement(operator, one, std) for one in y])
    side = round(math.sqrt(used))
    shown = y[:, :used].reshape(-1, side, side)
    if name == NONLINEAR[0]:  # magnitudes, low frequencies in the middle, in eight by eight pixels
        shown = np.log(np.abs(np.fft.fftshift(shown, axes=(1, 2))[:, 4:12, 4:12]) + 0.1)
        low, high = shown.min(), shown.max()
        shown = 2 * (shown - low) / (high - low) - 1
    return Problem(seen, seen, shown)


@value
class Light:
    """Blurred light, at least 0: what a Poisson detector counts."""

    operator: Any
    input_shape: tuple = static()
    output_shape: tuple = static()

    def __call__(self, x: Array) -> Array:
        return self.operator(0.5 * (x[..., 0] + 1))


def poisson_problem(images: np.ndarray, seed: int) -> Problem:
    """Counts of a blurred image."""
    kernel = inverse.gaussian_kernel(3, 0.6)
    operator = Light(inverse.blur(kernel, (SIZE, SIZE)), SHAPE, (SIZE, SIZE))
    light = np.asarray(jax.vmap(operator)(jnp.asarray(images, jnp.float32)))
    y = np.random.default_rng(seed).poisson(RATE * np.maximum(light, 1e-3)).astype(np.float32)
    seen = stacked([inverse.measurement(operator, one, inverse.poisson_noise(RATE)) for one in y])
    return Problem(seen, seen, 2 * y / RATE - 1)


# --- methods ------------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """What a method may use beside prior and measurement."""

    grid: diffjax.Grid
    variance: float  # of the data, per entry
    draws: int
    shape: tuple[int, ...] = SHAPE


def setting(process: Any, steps: int, variance: float, draws: int, shape: tuple[int, ...] = SHAPE) -> Setting:
    """Levels even in log-SNR from 25 to 0.02 standard deviations of the data, and then the data."""
    scale = math.sqrt(variance)
    time = lambda ratio: float(process.schedule.time(-np.log(ratio * scale)))
    grid = grids.log_snr(process, steps, start=time(25.0), stop=time(0.02))
    return Setting(grid, variance, draws, shape)


class Method(NamedTuple):
    """``draw(key, denoise, seen, setting) -> (samples (S, ...), calls a sample)``."""

    draw: Callable[..., tuple[Array, Array]]
    firm: bool = False  # takes y as exact
    point: bool = False  # one estimate, no draws


def _each(one: Callable[..., Any], **kind: Any) -> Method:
    """From what draws one `Sample`."""

    def draw(key: Array, denoise: Any, seen: Any, s: Setting) -> tuple[Array, Array]:
        found = jax.vmap(lambda key: one(key, denoise, seen, s))(jax.random.split(key, s.draws))
        return found.x, jnp.mean(found.nfe)

    return Method(draw, **kind)


def run(key: Array, denoise: Any, s: Setting, solver: Any = ANCESTRAL, grid: Any = None) -> Any:
    """One sample."""
    return diffjax.sample(key, denoise, solver, s.grid if grid is None else grid, shape=s.shape)


def _twisted(twist: Callable[..., Any]) -> Method:
    return _each(lambda key, denoise, seen, s: run(key, guidance.tilted(denoise, twist(seen, s)), s))


def _around(change: Callable[..., Any], **kind: Any) -> Method:
    return _each(lambda key, denoise, seen, s: run(key, denoise, s, change(seen, s)), **kind)


def _step(s: Setting) -> float:
    """The published displacement of DPS, per step and per unit of the data's norm (222 for its images)."""
    return 1000 / len(s.grid) * math.sqrt(s.variance * math.prod(s.shape)) / 222


def _population(draw: Callable[..., Any]) -> Method:
    """From what draws weighted particles, resampled to as many draws as are wanted."""

    def drawn(key: Array, denoise: Any, seen: Any, s: Setting) -> tuple[Array, Array]:
        first, last = jax.random.split(key)
        found = draw(first, denoise, seen, s)
        logs = getattr(found, "log_weights", None)
        if logs is None:
            return found.x[: s.draws], found.nfe / s.draws
        index = smc.systematic()(last, logs)
        return found.x[index][: s.draws], found.nfe / s.draws

    return Method(drawn)


def _tds(key: Array, denoise: Any, seen: Any, s: Setting) -> Any:
    twist = inverse.mmps(seen, solver="cg", iterations=3)
    return smc.steer(key, denoise, ANCESTRAL, s.grid, s.shape, particles=s.draws, twist=twist)


def _enkg(key: Array, denoise: Any, seen: Any, s: Setting) -> Any:
    return inverse.enkg(key, denoise, seen, s.grid, s.shape, particles=max(32, s.draws), steps=2)


def _single(one: Callable[..., tuple[Array, Array]]) -> Method:
    def draw(key: Array, denoise: Any, seen: Any, s: Setting) -> tuple[Array, Array]:
        x, nfe = one(key, denoise, seen, s)
        return x[None], nfe

    return Method(draw, point=True)


def _red_diff(key: Array, denoise: Any, seen: Any, s: Setting) -> tuple[Array, Array]:
    """From the middle of the range; one estimate is cheap, so that it may take more steps."""
    scale = math.sqrt(s.variance)
    long = setting(s.grid.process, 4 * len(s.grid), s.variance, 1, s.shape).grid
    inside = long[: len(long) - 1] if float(long.t.sigma[-1]) == 0 else long
    optimiser = inverse.adam(0.1 * scale)
    start = jnp.zeros(s.shape)
    found = inverse.red_diff(key, denoise, seen, inside, start, strength=1 / s.variance, optimiser=optimiser)
    return found.x, found.nfe


def _d_flow(key: Array, denoise: Any, seen: Any, s: Setting) -> tuple[Array, Array]:
    """With the prior of the noise, so that it is the mode of the noise given y."""
    short = setting(s.grid.process, max(2, len(s.grid) // 4), s.variance, 1, s.shape).grid
    start = s.grid.process.standard_prior(key, s.shape, jnp.float32, short.start)
    cost = lambda x: -seen.log_likelihood(x)
    found = inverse.d_flow(denoise, solvers.ddim(), short, start, cost, iterations=12, penalty=1.0)
    return found.x, found.nfe


def _pnp_dm(key: Array, denoise: Any, seen: Any, s: Setting) -> Any:
    stds = math.sqrt(s.variance) * np.geomspace(3.0, 0.05, max(2, len(s.grid) // 2))
    return inverse.pnp_dm(key, denoise, seen, s.grid.process, s.shape, stds=stds, steps=5)


def _repaint(key: Array, denoise: Any, seen: Any, s: Setting) -> Any:
    travelled = grids.time_travel(s.grid, max(1, len(s.grid) // 6), 3)
    return run(key, inverse.replacement(denoise, seen, key), s, grid=travelled)


def _cg(seen: Any) -> Any:
    return inverse.mmps(seen, solver="cg", iterations=3)


LINEAR: dict[str, Method] = {
    "pigdm": _twisted(lambda seen, s: inverse.pigdm(seen, s.variance)),
    "tmpd": _twisted(lambda seen, s: inverse.tmpd(seen, solver="cg", iterations=8)),
    "mmps": _twisted(lambda seen, s: _cg(seen)),
    "tds, mmps": _population(_tds),
    "dps": _around(lambda seen, s: inverse.dps(ANCESTRAL, seen, _step(s))),
    "mcg": _around(lambda seen, s: inverse.mcg(ANCESTRAL, seen, _step(s)), firm=True),
    "ddrm": _around(lambda seen, s: inverse.ddrm(seen)),
    "ddnm": _around(lambda seen, s: inverse.ddnm(ANCESTRAL, seen)),
    "diffpir": _each(lambda key, d, seen, s: run(key, inverse.diffpir(d, seen), s, solvers.flow_cps(1.0))),
    "replacement": _each(lambda key, d, seen, s: run(key, inverse.replacement(d, seen, key), s), firm=True),
    "repaint": _each(_repaint, firm=True),
    "lanpaint": _around(lambda seen, s: inverse.lanpaint(ANCESTRAL, seen, 2), firm=True),
    "flowchef": _around(lambda seen, s: inverse.flowchef(ANCESTRAL, seen, 0.5)),
    "daps": _each(lambda key, d, seen, s: inverse.daps(key, d, seen, s.grid[::2], s.shape, steps=3)),
    "pnp_dm": _each(_pnp_dm),
    "red_diff": _single(_red_diff),
    "d_flow": _single(_d_flow),
}
ANY: dict[str, Method] = {  # of any operator and noise; d_flow, which is too, is slow
    "lgd": _each(
        lambda key, d, seen, s: run(key, guidance.tilted(d, inverse.lgd(seen, s.variance, key, samples=16)), s)
    ),
    "dps": LINEAR["dps"],
    "flowchef": LINEAR["flowchef"],
    "daps": LINEAR["daps"],
    "pnp_dm": LINEAR["pnp_dm"],
    "enkg": _population(_enkg),
    "red_diff": LINEAR["red_diff"],
}
COUNTS: dict[str, Method] = {name: ANY[name] for name in ("dps", "daps", "pnp_dm", "red_diff")}


def gaussian_draws(law: Any, problem: Problem, draws: int, seed: int) -> np.ndarray:
    """The classical baseline: exact posterior draws (N, S, ...) of a Gaussian prior with the data's covariance."""
    rng, found = np.random.default_rng(seed), []
    for i in range(len(problem.seen.y)):
        a, y = (np.asarray(leaf[i], np.float64) for leaf in (problem.seen.operator.entries, problem.seen.y))
        std = float(problem.seen.noise.std[i])
        covariance = (law.vectors * law.variances) @ law.vectors.T
        gain = covariance @ a.T @ np.linalg.inv(a @ covariance @ a.T + std**2 * np.eye(len(a)))
        mean = law.mean.reshape(-1) + gain @ (y - a @ law.mean.reshape(-1))
        left, scale, _ = np.linalg.svd(covariance - gain @ a @ covariance)
        noise = rng.normal(size=(draws, FLAT)) * np.sqrt(np.maximum(scale, 0.0))
        found.append((mean + noise @ left.T).reshape(draws, *SHAPE))
    return np.stack(found)


FLOW = processes.flow()
