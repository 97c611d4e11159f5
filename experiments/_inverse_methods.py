"""Every inverse method, with what it needs beside prior and measurement set by a rule.

Twists make a denoiser of the posterior, which `sde_dpmpp` samples: of weak order 2, with 24 steps its draws are as wide
as the posterior where that is known (of Gaussian data, by `mmps`: 1.02 times), those of `ancestral` too narrow (0.87
times); with 16 steps a few of `pigdm`'s run away.  What moves the state between steps goes around `ancestral`, as
published: a history of estimates is not of the state that was moved.  Methods that divide by singular values are told
the operator without those below the noise (`Problem.firm`), as their authors' codes are.  Other numbers are the
authors': eta of `ddrm`, DAPS's setting for 100 evaluations, RED-diff's weight; but eta = 1 in `ddnm`, which says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import diffjax
from diffjax import grids, guidance, inverse, smc, solvers
from diffjax.inverse.twists import conditional_variance
from diffjax.levels import Array, Level
from experiments._inverse_problems import SHAPE

SDE, ANCESTRAL = solvers.sde_dpmpp(), solvers.ancestral()


class Setting(NamedTuple):
    """What a method may use beside prior and measurement."""

    grid: diffjax.Grid
    variance: float  # of the data, per entry
    draws: int
    shape: tuple[int, ...] = SHAPE

    def levels(self, steps: int, stop: float = 0.02) -> diffjax.Grid:
        """Even in log-SNR from 25 standard deviations of the data to ``stop`` of them, and then the data."""
        return _grid(self.grid.process, steps, self.variance, stop)


def setting(process: Any, steps: int, variance: float, draws: int, shape: tuple[int, ...] = SHAPE) -> Setting:
    """`Setting.levels` for the samplers."""
    return Setting(_grid(process, steps, variance), variance, draws, shape)


def _grid(process: Any, steps: int, variance: float, stop: float = 0.02) -> diffjax.Grid:
    time = lambda ratio: float(process.schedule.time(-np.log(ratio * math.sqrt(variance))))
    return grids.log_snr(process, steps, start=time(25.0), stop=time(stop))


class Method(NamedTuple):
    """``draw(key, denoise, seen, setting) -> (samples (S, ...), calls a sample)``."""

    draw: Callable[..., tuple[Array, Array]]
    divides: bool = False  # by singular values

    def each(self, key: Array, denoise: Any, seen: Any, s: Setting) -> tuple[Array, Array]:
        """The same for measurements with a leading axis, a key each."""
        keys = jax.random.split(key, len(jax.tree.leaves(seen)[0]))
        return jax.vmap(lambda seen, key: self.draw(key, denoise, seen, s))(seen, keys)


# --- what draws one sample ----------------------------------------------------------------------------------------


def _each(one: Callable[..., Any], divides: bool = False) -> Method:
    """From what draws one `Sample`."""

    def draw(key: Array, denoise: Any, seen: Any, s: Setting) -> tuple[Array, Array]:
        found = jax.vmap(lambda key: one(key, denoise, seen, s))(jax.random.split(key, s.draws))
        return found.x, jnp.mean(found.nfe)

    return Method(draw, divides)


def run(key: Array, denoise: Any, s: Setting, solver: Any = ANCESTRAL, grid: Any = None) -> Any:
    """One sample."""
    return diffjax.sample(key, denoise, solver, s.grid if grid is None else grid, shape=s.shape)


def _twisted(twist: Callable[..., Any]) -> Method:
    return _each(lambda key, denoise, seen, s: run(key, guidance.tilted(denoise, twist(seen, s)), s, SDE))


def _around(change: Callable[..., Any], divides: bool = False) -> Method:
    return _each(lambda key, denoise, seen, s: run(key, denoise, s, change(seen, s)), divides)


def _step(s: Setting) -> float:
    """The published displacement of DPS, per step and per unit of the data's norm (222 for its images)."""
    return 1000 / len(s.grid) * math.sqrt(s.variance * math.prod(s.shape)) / 222


def _repaint(key: Array, denoise: Any, seen: Any, s: Setting) -> Any:
    travelled = grids.time_travel(s.grid, max(1, len(s.grid) // 6), 3)
    return run(key, inverse.replacement(denoise, seen, key), s, grid=travelled)


def _lgd(key: Array, denoise: Any, seen: Any, s: Setting) -> Any:
    """Scaled by S / (S + r^2), r^2 the variance of what is averaged over: the likelihood's own step is 1 / S long.

    One of few draws has nearly all the weight, so that nothing but this makes up for r^2, and 1 / S diverges.
    """
    noise = seen.noise.std**2

    def scale(level: Level) -> Array:
        return noise / (noise + conditional_variance(s.variance, level))

    return run(key, guidance.tilted(denoise, inverse.lgd(seen, s.variance, key, samples=16), scale), s, SDE)


def _daps(key: Array, denoise: Any, seen: Any, s: Setting) -> Any:
    return inverse.daps(key, denoise, seen, s.levels(50), s.shape, steps=2)


def _pnp_dm(key: Array, denoise: Any, seen: Any, s: Setting) -> Any:
    stds = math.sqrt(s.variance) * np.geomspace(3.0, 0.05, 20)
    return inverse.pnp_dm(key, denoise, seen, s.grid.process, s.shape, stds=stds, steps=5)


# --- particles and single estimates -------------------------------------------------------------------------------


def _tds(key: Array, denoise: Any, seen: Any, s: Setting) -> tuple[Array, Array]:
    """One particle each of independent populations of four: particles of one population descend from one."""
    twist = inverse.pigdm(seen, s.variance)

    def one(key: Array) -> tuple[Array, Array]:
        first, last = jax.random.split(key)
        found = smc.steer(first, denoise, ANCESTRAL, s.grid, s.shape, particles=4, twist=twist)
        return found.x[jax.random.categorical(last, found.log_weights)], found.nfe

    x, nfe = jax.vmap(one)(jax.random.split(key, s.draws))
    return x, jnp.mean(nfe)


def _enkg(key: Array, denoise: Any, seen: Any, s: Setting) -> tuple[Array, Array]:
    """The first of an ensemble of 32, or of as many as are wanted."""
    found = inverse.enkg(key, denoise, seen, s.levels(24), s.shape, particles=max(32, s.draws), steps=2)
    return found.x[: s.draws], found.nfe / s.draws


def _single(one: Callable[..., tuple[Array, Array]]) -> Method:
    def draw(key: Array, denoise: Any, seen: Any, s: Setting) -> tuple[Array, Array]:
        x, nfe = one(key, denoise, seen, s)
        return x[None], nfe

    return Method(draw)


def _red_diff(key: Array, denoise: Any, seen: Any, s: Setting) -> tuple[Array, Array]:
    """From the middle of the range, with as many calls as the draws of another method: one estimate is all there is.

    The authors' weight is 0.25 of the noise's variance, the rate a tenth of the data's deviation.
    """
    start, levels = jnp.zeros(s.shape), s.levels(s.draws * len(s.grid))
    inside = levels[: len(levels) - 1] if float(levels.t.sigma[-1]) == 0 else levels
    noise = jnp.mean(jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(seen.variance(start))]))
    optimiser = inverse.adam(0.1 * math.sqrt(s.variance))
    found = inverse.red_diff(key, denoise, seen, inside, start, strength=0.25 / noise, optimiser=optimiser)
    return found.x, found.nfe


def _d_flow(key: Array, denoise: Any, seen: Any, s: Setting) -> tuple[Array, Array]:
    """With the prior of the noise, so that it is the mode of the noise given y."""
    short = s.levels(6)
    start = s.grid.process.standard_prior(key, s.shape, jnp.float32, short.start)
    cost = lambda x: -seen.log_likelihood(x)
    found = inverse.d_flow(denoise, solvers.ddim(), short, start, cost, iterations=12, penalty=1.0)
    return found.x, found.nfe


# --- which there are ----------------------------------------------------------------------------------------------

ANY: dict[str, Method] = {  # of any operator and noise
    "dps": _around(lambda seen, s: inverse.dps(ANCESTRAL, seen, _step(s))),
    "flowchef": _around(lambda seen, s: inverse.flowchef(ANCESTRAL, seen, 0.5)),
    "daps": _each(_daps),
    "pnp_dm": _each(_pnp_dm),
    "red_diff": _single(_red_diff),
}
LINEAR: dict[str, Method] = {
    "pigdm": _twisted(lambda seen, s: inverse.pigdm(seen, s.variance)),
    "tmpd": _twisted(lambda seen, s: inverse.tmpd(seen, solver="cg", iterations=8)),
    "mmps": _twisted(lambda seen, s: inverse.mmps(seen, solver="cg", iterations=3)),
    "tds, pigdm": Method(_tds),
    "mcg": _around(lambda seen, s: inverse.mcg(ANCESTRAL, seen, _step(s)), divides=True),
    "ddrm": _around(lambda seen, s: inverse.ddrm(seen), divides=True),
    "ddnm": _around(lambda seen, s: inverse.ddnm(ANCESTRAL, seen, eta=1.0), divides=True),
    "diffpir": _each(lambda key, d, seen, s: run(key, inverse.diffpir(d, seen), s, solvers.flow_cps(1.0))),
    "replacement": _each(lambda key, d, seen, s: run(key, inverse.replacement(d, seen, key), s), divides=True),
    "repaint": _each(_repaint, divides=True),
    "lanpaint": _around(lambda seen, s: inverse.lanpaint(ANCESTRAL, seen, 2), divides=True),
    **ANY,
}
NONLINEAR: dict[str, Method] = {**ANY, "lgd": _each(_lgd), "enkg": Method(_enkg)}
NOISE: dict[str, Method] = {"d_flow": _single(_d_flow), "pigdm": LINEAR["pigdm"]}  # for the inpainting by the noise
COUNTS: dict[str, Method] = {name: ANY[name] for name in ("dps", "daps", "pnp_dm", "red_diff")}
