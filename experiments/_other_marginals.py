"""The marginals of interpolants, learned forward processes and noise that is not Gaussian; see `_marginals`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import beta, binom, norm, poisson, t

import diffjax
from diffjax import grids, interpolants, nongaussian, oracles, processes, solvers
from diffjax.levels import Array
from experiments._marginals import SHARES, STEPS, Marginals, Panel, draw_data, law, normal_mixture

END = oracles.mixture(np.array([0.5, 0.5]), np.array([[2.5], [-2.0]]), np.array([0.16, 0.25]))
COUNTS, WEIGHTS = np.array([0.0, 3.0, 12.0]), np.array([0.3, 0.4, 0.3])


def between(interpolant: Any, two_sided: bool = True) -> Callable[[Array, int], Marginals]:
    """The panel of an interpolant, sampled from its end to its start by the SDE of epsilon = 1/2."""
    means, covariances = law(1)
    start = oracles.mixture(SHARES, means, covariances[:, 0, 0])
    field = interpolants.exact(interpolant, start, END if two_sided else None)

    def make(key: Array, paths: int) -> Marginals:
        times = np.linspace(1, 0, STEPS + 1)
        key_end, key_walk = jax.random.split(key)
        ends = jax.vmap(END.sample)(jax.random.split(key_end, paths))
        if not two_sided:
            ends = jax.random.normal(key_end, (paths, 1))

        def one(key: Array, x: Array) -> Array:
            found = interpolants.sde(key, field.velocity, field.score, times, x, 0.5, save="states")
            return found.saved.states

        states = jax.jit(jax.vmap(one))(jax.random.split(key_walk, paths), ends)
        samples = np.asarray(states[:, :, 0], np.float64).T
        weights = [interpolant.at(time) for time in times]
        centres = np.array([w.alpha * field.starts[:, 0] + w.beta * field.ends_[:, 0] for w in weights])
        variances = [
            w.alpha**2 * field.start_covariances[:, 0, 0] + w.beta**2 * field.end_covariances[:, 0, 0] + w.variance
            for w in weights
        ]
        stds = np.sqrt(variances)[:, None]
        shares = np.asarray(field.weights)
        cdf = lambda x: (shares * norm.cdf((x[..., None] - centres[:, None]) / stds)).sum(-1)
        pdf = lambda x: (shares * norm.pdf(x[None, :, None], centres[:, None], stds)).sum(-1)
        return Marginals(times, cdf, samples, pdf)

    return make


def bent(key: Array, paths: int) -> Marginals:
    """A forward process with a network in it, here a constant: a shift and a scale in the middle of the way."""
    process, (means, covariances) = processes.vp(), law(1)
    shift, scale = 2.0, -0.7
    forward = interpolants.affine_forward(process, lambda params, x, time: params, (shift, scale))
    data = oracles.mixture(SHARES, means, covariances[:, 0, 0])

    def middle(time: Array) -> Array:
        share = (time - forward.stop) / (forward.start - forward.stop)
        return 4 * share * (1 - share)

    def denoise(z: Array, level: Any) -> Array:
        h = middle(level.time)
        return data(z - h * shift, level._replace(sigma=level.sigma * jnp.exp(h * scale)))

    fields = interpolants.generative(forward, denoise)
    times = forward.stop + (forward.start - forward.stop) * np.linspace(1, 0, STEPS + 1)
    key_data, key_noise, key_walk = jax.random.split(key, 3)
    level = process.level(forward.start)
    x = level.alpha * draw_data(key_data, paths, 1) + level.sigma * jax.random.normal(key_noise, (paths, 1))

    def one(key: Array, x: Array) -> Array:
        found = interpolants.sde(key, fields.velocity, fields.score, times, x, fields.epsilon, save="states")
        return found.saved.states

    states = jax.jit(jax.vmap(one))(jax.random.split(key_walk, paths), jnp.asarray(x, jnp.float32))
    levels, h = process.level(times), middle(times)
    centres = levels.alpha[:, None] * means[:, 0] + h[:, None] * shift
    stds = np.sqrt(levels.alpha[:, None] ** 2 * covariances[:, 0, 0] + (levels.sigma * np.exp(h * scale))[:, None] ** 2)
    return normal_mixture(times, centres, stds, np.asarray(states[:, :, 0], np.float64).T)


def charges(key: Array, paths: int) -> Marginals:
    """Electrostatic noise of D = 2 around three points, sampled by the ODE under DPM-Solver++."""
    points, process, dimensions = np.array([-1.0, 0.2, 1.5]), processes.edm(5.0), 2.0
    times = 5.0 * np.linspace(1, 0.1, STEPS + 1) ** 2
    denoise = nongaussian.electrostatic_points(points[:, None], dimensions)
    key_data, key_noise = jax.random.split(key)
    x0 = jnp.asarray(points, jnp.float32)[jax.random.randint(key_data, (paths, 1), 0, 3)]
    noise = lambda k: nongaussian.electrostatic_noise(k, (1,), dimensions)
    x = x0 + 5.0 * jax.vmap(noise)(jax.random.split(key_noise, paths))
    grid = grids.times(process, times)
    run = lambda x: diffjax.sample(key, denoise, solvers.dpmpp(), grid, x=x, save="states").saved.states
    samples = np.asarray(jax.jit(jax.vmap(run))(x)[:, :, 0], np.float64).T
    scaled = lambda x: (x[..., None] - points) / times[:, None, None]
    cdf = lambda x: t.cdf(scaled(x), dimensions).mean(-1)
    pdf = lambda x: (t.pdf(scaled(x[None]), dimensions) / times[:, None, None]).mean(-1)
    return Marginals(times / 5.0, cdf, samples, pdf)


def counted(kind: str) -> Callable[[Array, int], Marginals]:
    """Counts that are born again: a pure-death process (blackout) or Poisson counts (thickened)."""
    whole = kind == "blackout"
    values = COUNTS if whole else COUNTS / 3 + 0.5
    scale = None if whole else 3.0

    def masses(n: np.ndarray, share: np.ndarray) -> np.ndarray:
        if whole:
            return (binom.pmf(n[..., None], COUNTS, share[..., None]) * WEIGHTS).sum(-1)
        return (poisson.pmf(n[..., None], share[..., None] * scale * values) * WEIGHTS).sum(-1)

    def make(key: Array, paths: int) -> Marginals:
        denoise = nongaussian.count_points(values[:, None], WEIGHTS, scale)
        shares, ends, samples = np.linspace(0, 1, STEPS + 1) ** (1 if whole else 2), [], []
        for last in (STEPS // 4, STEPS // 2, 3 * STEPS // 4, STEPS):
            part = shares[: last + 1]
            if whole:
                one = lambda k, part=part: nongaussian.blackout(k, denoise, part, (1,)).x
            else:
                one = lambda k, part=part: nongaussian.thickened(k, denoise, part, (1,), scale).x
            ends.append(part[-1])
            samples.append(np.asarray(jax.jit(jax.vmap(one))(jax.random.split(key, paths)))[:, 0])
        ends, places = np.array([0.0, *ends]), np.arange(40)
        samples = np.array([0 * samples[0], *samples], np.float64)
        table = np.cumsum(masses(places[None], ends[:, None]), axis=1)
        cdf = lambda x: np.take_along_axis(table, np.clip(x.astype(int), 0, 39), axis=1)
        pdf = lambda x: masses(np.round(x)[None], ends[:, None])
        return Marginals(1 - ends, cdf, samples, pdf, discrete=True)

    return make


def fractions(key: Array, paths: int) -> Marginals:
    """A Jacobi process of one fraction that starts at three places, by its polynomials, and its reverse."""
    with jax.enable_x64(True):
        process = nongaussian.jacobi(1.5, 2.5, 0.8)
        data, weights = np.array([[0.1], [0.5], [0.9]]), np.array([0.3, 0.4, 0.3])
        points = nongaussian.simplex_points(process, data, weights)
        times = np.geomspace(4.0, 0.05, STEPS + 1)
        ends, samples = [0, STEPS // 4, STEPS // 2, 3 * STEPS // 4, STEPS], []
        for last in ends:
            one = lambda k, part=times[: last + 1]: (
                nongaussian.reverse_jacobi(k, process, points, part, (1,), dtype=jnp.float64).x
            )
            prior = lambda k: process.prior(k, (1,), jnp.float64)
            samples.append(np.asarray(jax.jit(jax.vmap(one if last else prior))(jax.random.split(key, paths)))[:, 0])
        line = np.linspace(0, 1, 401)[1:-1]
        ratio = lambda time: sum(
            w * np.asarray(process.ratio(jnp.asarray(line), jnp.full(line.shape, v), time))
            for w, v in zip(weights, data[:, 0], strict=True)
        )
        density = np.array([beta.pdf(line, 1.5, 2.5) * ratio(times[last]) for last in ends])
    mass = np.cumsum(density, axis=1)
    mass = mass / mass[:, -1:]
    cdf = lambda x: np.stack([np.interp(row, line, m) for row, m in zip(x, mass, strict=True)])
    pdf = lambda x: np.stack([np.interp(x, line, row, 0, 0) for row in density])
    return Marginals(times[ends] / 4.0, cdf, np.array(samples), pdf)


def other_panels() -> list[Panel]:
    """A panel for every public interpolant and for every kind of noise that is not Gaussian."""
    bump = interpolants.interpolant(lambda u: (1 - u) ** 2, lambda u: u**2, lambda u: 4 * u * (1 - u))
    found = {
        "linear": between(interpolants.linear()),
        "trigonometric": between(interpolants.trigonometric(0.5)),
        "brownian_bridge": between(interpolants.brownian_bridge(1.0)),
        "encoding_decoding": between(interpolants.encoding_decoding()),
        "interpolant": between(bump),
        "one_sided": between(interpolants.one_sided(processes.flow()), two_sided=False),
        "affine_forward": bent,
    }
    panels = [
        Panel(name, "interpolants", make, "of two laws" * (name == "brownian_bridge")) for name, make in found.items()
    ]
    return [
        *panels,
        Panel("electrostatic_noise", "not Gaussian", charges),
        Panel("blackout", "not Gaussian", counted("blackout")),
        Panel("thickened", "not Gaussian", counted("thickened")),
        Panel("jacobi", "not Gaussian", fractions),
    ]


def warps(severities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A digit-like image warped more and more, and restored from the last one: two stacks (len(severities), 24, 24)."""
    line = np.linspace(-1, 1, 24)
    image = jnp.asarray(np.abs(np.hypot(line[:, None] * 0.8, line) - 0.55) < 0.16, jnp.float32)
    moving = nongaussian.smooth_field(jax.random.key(3), (24, 24), 4, 3.0)
    degrade = lambda x, s: nongaussian.warped(x, nongaussian.flowed(moving, s))
    restore = lambda x, s: nongaussian.warped(x, nongaussian.flowed(moving, -s))
    forward = [degrade(image, s) for s in severities]
    worst = forward[-1]
    back = [worst]
    for k in range(1, len(severities)):
        back.append(nongaussian.restored(degrade, restore, worst, severities[::-1][: k + 1]).x)
    return np.asarray(forward), np.asarray(back[::-1])
