"""The methods of the benchmark, each with one setting for all cells, by the rule that stands beside it.

Rule for all: 100 steps (particles: 200) even in log-SNR from 50 to 0.002 standard deviations of the data, then to 0,
ancestral steps; numbers with units follow from the data's variance v (a thousand samples), the noise and the largest
singular value.
What is published for images is carried over per step and per unit of the data's norm.  Nothing is tuned to a cell.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from benchmarks.inverse.problems import DRAWS, KINDS
from diffjax import grids, guidance, inverse, processes, sample, solvers
from diffjax.inverse.operators import shapes

STEPS = 100


class Setting(NamedTuple):
    """What a method may use beside the prior and the measurement."""

    process: Any
    grid: Any
    variance: float
    shape: tuple
    given: Any  # the exact twist, or the posterior of a Gaussian, where the method needs it
    key: Any  # of the draws inside denoisers
    count: int = DRAWS  # of particles


class Method(NamedTuple):
    """``one(key, prior, seen, setting) -> Sample`` draws a sample, or, of particles, a weighted population."""

    rule: str
    one: Callable
    particles: bool = False
    needs: str = ""  # "twists" or "tractable" of the problem


def setting(variance: float, shape: Any, given: Any, key: Any, steps: int = STEPS) -> Setting:
    """What the rule for all makes of a problem."""
    scale = math.sqrt(variance)
    process = processes.edm(50 * scale)
    return Setting(process, grids.log_snr(process, steps, stop=0.002 * scale), variance, shape, given, key)


ANCESTRAL = solvers.ddim(eta=1.0)


def run(key: Any, denoise: Any, s: Setting, solver: Any = ANCESTRAL, grid: Any = None) -> Any:
    """One sample."""
    return sample(key, denoise, solver, s.grid if grid is None else grid, shape=s.shape)


def twisted(twist: Callable) -> Callable:
    """A twist as guidance."""
    return lambda key, prior, seen, s: run(key, guidance.tilted(prior, twist(seen, s)), s)


def particles(twist: Callable) -> Callable:
    """A twist in sequential Monte Carlo."""

    def one(key: Any, prior: Any, seen: Any, s: Setting) -> Any:
        return diffjax.steer(key, prior, ANCESTRAL, s.grid, s.shape, particles=s.count, twist=twist(seen, s))

    return one


def filtered(made: Callable) -> Callable:
    """A filter in sequential Monte Carlo."""

    def one(key: Any, prior: Any, seen: Any, s: Setting) -> Any:
        return diffjax.steer(key, prior, ANCESTRAL, s.grid, s.shape, particles=s.count, proposal=made(seen, s))

    return one


def fps(once: bool) -> Callable:
    """Populations of 20, the published number, each with a path of its own, as one weighted population."""

    def one(key: Any, prior: Any, seen: Any, s: Setting) -> Any:
        def path(key: Any) -> Any:
            filter_ = inverse.fps(seen, jax.random.fold_in(key, 1), once)
            return diffjax.steer(key, prior, ANCESTRAL, s.grid, s.shape, particles=20, proposal=filter_)

        found = jax.vmap(path)(jax.random.split(key, s.count // 20))
        # the published method leaves paths unweighted: with n counted anew at every level their weights mean nothing
        weights = (found.log_z if once else 0.0 * found.log_z)[:, None]
        logs = weights + jax.nn.log_softmax(found.log_weights, axis=1)
        log_z = jax.nn.logsumexp(found.log_z) - math.log(len(found.log_z))
        resampled = found.resampled.sum(0) / len(found.resampled)
        return found._replace(
            x=found.x.reshape(-1, *s.shape),
            log_weights=logs.ravel(),
            log_z=log_z,
            nfe=found.nfe.sum(),
            resampled=resampled,
        )

    return one


def around(change: Callable) -> Callable:
    """A changed solver."""
    return lambda key, prior, seen, s: run(key, prior, s, change(seen, s))


def top(seen: Any) -> Any:
    """The largest squared singular value."""
    return jnp.max(jnp.asarray(seen.operator.squared))


def gradient_step(s: Setting) -> float:
    """The published displacement a step, in units of the data's norm, for as many steps as are taken here."""
    return 10 * math.sqrt(s.variance * shapes(s.shape).entries) / 222


def red_diff(key: Any, prior: Any, seen: Any, s: Setting) -> Any:
    """From the pseudo-inverse of y."""
    optimiser = inverse.adam(0.1 * math.sqrt(s.variance))
    x = inverse.pseudo_inverse(seen.operator, jnp.asarray(seen.y, jnp.float32))
    return inverse.red_diff(key, prior, seen, s.grid, x, strength=1 / s.variance, optimiser=optimiser)


def pnp_dm(key: Any, prior: Any, seen: Any, s: Setting) -> Any:
    """With rho falling from a wide to a narrow coupling."""
    stds = math.sqrt(s.variance) * np.geomspace(3.0, 0.05, 40)
    return inverse.pnp_dm(key, prior, seen, s.process, s.shape, stds=stds, steps=10)


def daps(key: Any, prior: Any, seen: Any, s: Setting) -> Any:
    """At every other level of the common grid."""
    return inverse.daps(key, prior, seen, s.grid[::2], s.shape, steps=5)


def repaint(key: Any, prior: Any, seen: Any, s: Setting) -> Any:
    """Replacement on a grid that travels in time."""
    return run(key, inverse.replacement(prior, seen, key), s, grid=grids.time_travel(s.grid, 10, 5))


TWISTS = {
    "exact": lambda seen, s: s.given,
    "likelihood": lambda seen, s: inverse.likelihood(seen),
    "pigdm, v = 1": lambda seen, s: inverse.pigdm(seen, 1.0),
    "pigdm, data's v": lambda seen, s: inverse.pigdm(seen, s.variance),
    "tmpd": lambda seen, s: inverse.tmpd(seen, solver="dense"),
    "mmps": lambda seen, s: inverse.mmps(seen, solver="dense" if seen.y.size <= 8 else "cg", iterations=10),
    "noised": lambda seen, s: inverse.noised(seen),
    "lgd": lambda seen, s: inverse.lgd(seen, s.variance, s.key, samples=16),
}
RULES = {
    "exact": "none",
    "likelihood": "none; the likelihood's own step",
    "pigdm, v = 1": "unit variance, as usual",
    "pigdm, data's v": "v",
    "tmpd": "none",
    "mmps": "none; dense systems to 8 measurements, then 10 of conjugate gradients",
    "noised": "none",
    "lgd": "v, 16 draws",
}
NEEDS = {"exact": "twists"}


def tractable(key: Any, prior: Any, seen: Any, s: Setting) -> Any:
    """A Gaussian model leads down to noise of sqrt(v), guidance by MMPS from there."""
    denoise = guidance.tilted(prior, TWISTS["mmps"](seen, s))
    until = -0.5 * math.log(s.variance)
    return run(key, inverse.tractable_steering(denoise, s.given, None, 0.5, variance=s.variance, until=until), s)


METHODS = {name: Method(RULES[name], twisted(twist), needs=NEEDS.get(name, "")) for name, twist in TWISTS.items()} | {
    "dps": Method(
        "step 1 at 1000 steps for images of norm 222, to scale",
        around(lambda seen, s: inverse.dps(ANCESTRAL, seen, gradient_step(s))),
    ),
    "mcg": Method("as dps", around(lambda seen, s: inverse.mcg(ANCESTRAL, seen, gradient_step(s)))),
    "null_space": Method("none", lambda key, prior, seen, s: run(key, inverse.null_space(prior, seen), s)),
    "ddnm": Method("eta 0", around(lambda seen, s: inverse.ddnm(ANCESTRAL, seen))),
    "ddrm": Method("eta 0.85, eta_b 1", around(lambda seen, s: inverse.ddrm(seen))),
    "diffpir": Method(
        "lambda 8, zeta 1",
        lambda key, prior, seen, s: run(key, inverse.diffpir(prior, seen), s, solvers.flow_cps(1.0)),
    ),
    "replacement": Method("none", lambda key, prior, seen, s: run(key, inverse.replacement(prior, seen, key), s)),
    "repaint": Method("jumps of 10, 5 times", repaint),
    "lanpaint": Method(
        "5 inner steps, lambda 1, friction 2, size 0.3", around(lambda seen, s: inverse.lanpaint(ANCESTRAL, seen))
    ),
    "flowchef": Method(
        "half the step that is stable", around(lambda seen, s: inverse.flowchef(ANCESTRAL, seen, 0.5 / top(seen)))
    ),
    "red_diff": Method("lambda 1 / v, Adam of rate sqrt(v) / 10", red_diff),
    "daps": Method("50 levels, 5 ODE steps", daps),
    "pnp_dm": Method("40 rounds, rho from 3 to 0.05 sqrt(v), 10 steps", pnp_dm),
    "tractable_steering": Method(
        "a Gaussian of the data's moments, share 0.5, down to noise of sqrt(v); then mmps", tractable, needs="tractable"
    ),
}
for _name in ("exact", "likelihood", "pigdm, v = 1", "pigdm, data's v", "tmpd", "mmps", "noised"):
    METHODS[f"tds, {_name}"] = Method(
        f"{DRAWS} particles, 200 steps", particles(TWISTS[_name]), particles=True, needs=NEEDS.get(_name, "")
    )
METHODS["tds, inpainting"] = Method(
    f"{DRAWS} particles, 200 steps, mmps",
    particles(lambda seen, s: inverse.inpainting(seen, TWISTS["mmps"](seen, s))),
    particles=True,
)
METHODS |= {
    "conjugate": Method(
        f"{DRAWS} particles, 200 steps", filtered(lambda seen, s: inverse.conjugate(seen)), particles=True
    ),
    "conjugate, data's v": Method(
        f"{DRAWS} particles, 200 steps, v",
        filtered(lambda seen, s: inverse.conjugate(seen, s.variance)),
        particles=True,
    ),
    "mcgdiff": Method(f"{DRAWS} particles, 200 steps", filtered(lambda seen, s: inverse.mcgdiff(seen)), particles=True),
    "fps": Method(f"{DRAWS // 20} paths of 20 particles, 200 steps", fps(True), particles=True),
    "fps, published": Method(
        f"{DRAWS // 20} paths of 20 particles, 200 steps, paths unweighted", fps(False), particles=True
    ),
}


# what a method is given where a problem asks more than a linear measurement with noise
ASKED = {
    "exact y": [
        *["exact", "pigdm, v = 1", "pigdm, data's v", "tmpd", "mmps", "noised", "dps", "mcg", "null_space", "ddnm"],
        *["ddrm", "diffpir", "replacement", "repaint", "lanpaint", "flowchef", "tractable_steering"],
        *["tds, inpainting", "mcgdiff", "fps"],
    ],
    "blind": ["likelihood", "lgd", "dps", "daps", "pnp_dm", "tds, likelihood"],
}


def applies(name: str, problem: str) -> bool:
    """Whether a method is for a problem."""
    kind = KINDS.get(problem, "noisy")
    return name in ASKED[kind] if kind in ASKED else name != "tds, inpainting"


@functools.cache
def compiled(name: str, shape: Any, variance: float, count: int = DRAWS) -> Callable:
    """``(keys, prior, seen, given) -> results`` over problems, jitted once for all noises of a problem."""
    method, shape = METHODS[name], dict(shape) if shape and isinstance(shape[0], tuple) else shape

    def population(key: Any, prior: Any, seen: Any, given: Any) -> Any:
        s = setting(variance, shape, given, key, 2 * STEPS if method.particles else STEPS)
        s = s._replace(count=count)
        if method.particles:
            return method.one(key, prior, seen, s)
        return jax.vmap(lambda k: method.one(k, prior, seen, s))(jax.random.split(key, DRAWS))

    return jax.jit(
        lambda keys, prior, seen, given: jax.lax.map(
            lambda one: population(one[0], prior, one[1], one[2]), (keys, seen, given)
        )
    )
