"""Filters: proposals of `diffjax.steer` that join a solver's Gaussian step with a measurement of the noisy state.

A step N(m, std^2 I) of the solver and a potential ``g_s(x_s) = N(y; A x_s / alpha_s, A V A^T)``, V a function of A^T A,
have the conjugate law, in every singular direction of A and with u the anchor, A^+ y for a path that is not noised,

    K = w / (w + V),  w = std^2 / alpha_s^2:     x_s / alpha_s ~ N(m / alpha_s + K (u - m / alpha_s), K V)

and the normaliser N(u; m / alpha_s, w + V), a function of x_t alone.  So particles are weighted by it *before* they are
resampled and moved, no weight depends on the draw, and the network is not differentiated.  The filters differ in V, in
what of g is the target (the rest leads the way and is given back in the next row) and in the anchor:

| filter | V at a level, b^2 = S / d^2, r = sigma / alpha | target |
|---|---|---|
| `conjugate` | b^2 + r^2 | p(y given x_0), at the end |
| `mcgdiff` | r^2 - p^2 + (b^2 - p^2), p the first level with p <= b | the last g of each direction, at p |
| `fps` | 0 down to p, b^2 - p^2 there, around y noised like the state | all g |

Where nothing is seen, d = 0, steps are the solver's.  An exact y is met exactly by `mcgdiff` and `fps`: in the last
step, where solvers add no noise, the seen part is then drawn as if with std = sigma_t alpha_s / alpha_t.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.inverse.measurement import Measurement
from diffjax.inverse.operators import pseudo_inverse, shapes, squared_values
from diffjax.inverse.systems import needs_spectrum, noise_variance, normal_like, one_level, safe
from diffjax.levels import Array, Level, Row, Tree, dot, is_traced, root, static, value


def conjugate(measurement: Measurement, variance: Array = np.inf) -> Conjugate:
    """The filter with the potential of `noised`, ``N(y; A x_t / alpha, S + (sigma / alpha)^2 A A^T)``, or `pigdm`'s.

    The target is the chain's p(x_0) p(y | x_0), for any noise above 0, as with a twist.  Without a derivative of the
    network; no paper's.

    Args:
        measurement: of an operator with a spectrum and isotropic noise above 0.
        variance: v of the data, taken as N(0, v I): then ``x_0 | x_t ~ N(k x_t / alpha, k r^2)``, k = v / (v + r^2),
            and g is exact for such data.  Infinite, k = 1, is what the other filters assume, and makes high levels
            follow y more closely than x_0 does.

    Raises ValueError for an operator without a spectrum, noise that is not isotropic, or that is 0, and v not above 0.

    >>> import diffjax, jax
    >>> from diffjax import grids, oracles, processes, solvers
    >>> seen = diffjax.inverse.measurement(diffjax.inverse.identity(()), 1.0, 0.5)
    >>> grid, prior = grids.log_snr(processes.vp(), 20), oracles.gaussian(0.0, 1.0)
    >>> options = dict(particles=64, proposal=diffjax.inverse.conjugate(seen, variance=1.0))
    >>> found = diffjax.steer(jax.random.key(0), prior, solvers.ancestral(), grid, (), **options)
    >>> abs(found.log_z - diffjax.inverse.evidence(prior, seen)) < 0.2  # five standard deviations
    Array(True, dtype=bool)
    """
    needs_spectrum("conjugate", measurement)
    std = measurement.noise.std
    if not is_traced(std) and any(np.any(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(std)):
        raise ValueError("conjugate needs noise above 0, since no step of a solver meets y exactly: use mcgdiff.")
    if not is_traced(variance) and not (np.ndim(variance) == 0 and variance > 0):
        raise ValueError(f"variance must be a number above 0, got {variance!r}.")
    return Conjugate(measurement, variance)


def mcgdiff(measurement: Measurement) -> MCGDiff:
    """MCGdiff: y is a noiseless measurement of that state of the path that is as noisy as y.

    A direction of A with singular value d shows x_0 with noise b = std / d; so does the state at sigma / alpha = b,
    which y is then taken for.  Above that level particles are led by its noised law, there they are weighed by it,
    below it they follow the solver.  Exact as steps vanish; between levels the next cleaner one is taken, whose law is
    widened by what is missing to b.  Noise of 0: the published noiseless algorithm; b below all levels: the same.

    Differs from the released code, which gives the last potential back and weighs by p(y | x_0) besides (so that
    states below that level have seen y twice).

    Monte Carlo guided Diffusion for Bayesian linear inverse problems, arXiv:2308.07983.

    Raises ValueError for an operator without a spectrum or noise that is not isotropic.
    """
    needs_spectrum("mcgdiff", measurement)
    return MCGDiff(measurement)


def fps(measurement: Measurement, key: Array, once: bool = True) -> FilteringPosterior:
    """Filtering posterior sampling: y is noised along a random path, ``y_t = alpha_t y + sigma_t A z_t``, and filtered.

    Given the path, every y_t is a measurement of x_t, and particles follow p(x_0 | all y_t); over paths that is
    p(x_0 | y): a population has one path, and `jax.vmap` over keys (of `diffjax.steer` and of this) mixes them, each
    with the weight ``exp(log_z)``.  That is unbiased, since the path's own density has been taken out.

    Published is ``y_t - A x_t ~ N(0, alpha_t^2 S)``, anew at every level (``once=False``).  But y_t and x_t are noised
    alike, so that all of them miss by the same n = y - A x_0: noise above 0 is averaged away, and what comes is too
    close to y, the more so the more levels lie below the noise.  With ``once`` a direction is seen without noise down
    to the level that is as noisy as y, from where y is noised, there with what is missing, and not below.  For exact y
    both are the same.

    Diffusion Posterior Sampling for Linear Inverse Problem Solving: A Filtering Perspective (Dou and Song, ICLR 2024),
    FPS-SMC.

    Args:
        measurement: of an operator with a spectrum and isotropic noise, 0 allowed.
        key: of the path.
        once: whether y counts once.

    Raises ValueError for an operator without a spectrum or noise that is not isotropic.
    """
    needs_spectrum("fps", measurement)
    return FilteringPosterior(measurement, key, bool(once))


# --- what they have in common -------------------------------------------------------------------------------------


class Potential(NamedTuple):
    """g at a level, as functions of the squared singular values q > 0."""

    variance: Any  # V
    active: Any  # whether there is one
    leads: Any  # whether it is given back in the next row


def _check(self: Any, t: Level) -> None:
    one_level("a filter", t)
    if not is_traced(t) and np.any(np.diff(np.asarray(t.half_log_snr, np.float64)) < 0):
        raise ValueError("a filter follows a path of falling noise: the grid must not go back in time.")


def minus_constant(self: Any, x: Tree) -> Array:
    """Minus what takes densities of A^+ y to those of y: the change of volume, and what of y no x can explain."""
    a, seen = self.measurement.operator, self.measurement
    squared = squared_values(a, x)
    y = seen.observed(x)
    rest = jax.tree.map(jnp.subtract, y, a(pseudo_inverse(a, y)))
    noise = noise_variance(seen, x)
    missing = shapes(a.output_shape).entries - jnp.sum(squared > 0)
    known = safe(noise)
    outside = jnp.where(noise > 0, -0.5 * (dot(rest, rest) / known + missing * jnp.log(2 * jnp.pi * known)), 0.0)
    return 0.5 * jnp.sum(jnp.where(squared > 0, jnp.log(safe(squared)), 0.0)) - outside


def _plan(self: Any, x: Tree, rows: Row) -> tuple[Any, Any]:
    """``(u and the levels from the lowest, whether a row is the last)``."""
    anchor = pseudo_inverse(self.measurement.operator, self.measurement.observed(x))
    last = jnp.arange(rows.s.alpha.shape[0]) == rows.s.alpha.shape[0] - 1
    return (anchor, noise_to_signal(rows.s)[::-1]), last


def _ahead(self: Any, mean: Tree, std: Array, row: Row, own: Any) -> Array:
    """``log N(u; m / alpha_s, w + V)`` over the seen directions."""
    potential, anchor, given = self.at(mean, row, own)
    return log_normal(self.measurement.operator, _gap(anchor, mean, row), *_totals(potential, std, row)) - given


def _draw(self: Any, noise: Tree, mean: Tree, std: Array, row: Row, own: Any) -> tuple[Tree, Array]:
    """A draw of N(mean, std^2 I) g / Z, and log of the part of g that leads."""
    potential, anchor, _ = self.at(mean, row, own)
    a, alpha = self.measurement.operator, row.s.alpha

    def gain(q: Array) -> Array:
        on, w, v = _seen(potential, std, row, q)
        return jnp.where(on, w / jnp.where(w + v > 0, w + v, 1.0), 0.0)

    def spread(q: Array) -> Array:
        on, _, v = _seen(potential, std, row, q)
        return jnp.where(on, alpha * root(gain(q) * v), std)

    moved = a.spectral(lambda q: alpha * gain(q), _gap(anchor, mean, row))
    added = a.spectral(spread, noise)
    new = jax.tree.map(lambda m, d, z: (m + d + z).astype(m.dtype), mean, moved, added)
    leading = lambda q: _active(potential, q) & potential.leads(safe(q))
    return new, log_normal(a, _gap(anchor, new, row), leading, lambda q: potential.variance(safe(q)))


def noise_to_signal(level: Level) -> Array:
    """``(sigma / alpha)^2``, infinite at alpha = 0."""
    positive = level.alpha > 0
    return jnp.where(positive, (level.sigma / jnp.where(positive, level.alpha, 1.0)) ** 2, jnp.inf)


def _active(potential: Potential, q: Array) -> Array:
    return (q > 0) & potential.active(safe(q))


def _seen(potential: Potential, std: Array, row: Row, q: Array) -> tuple[Array, Array, Array]:
    """Where the potential is, w and V; where neither the solver nor the potential has any width, w is r_t^2."""
    v = potential.variance(safe(q))
    w = jnp.broadcast_to((std / row.s.alpha) ** 2, v.shape)
    return _active(potential, q), jnp.where((w == 0) & (v == 0), noise_to_signal(row.t), w), v


def _totals(potential: Potential, std: Array, row: Row) -> tuple[Any, Any]:
    return lambda q: _active(potential, q), lambda q: sum(_seen(potential, std, row, q)[1:])


def log_normal(operator: Any, gap: Tree, active: Any, variance: Any) -> Array:
    """log N(gap; 0, variance) over the directions that are active."""
    inverse = lambda q: jnp.where(active(q), 1 / jnp.where(active(q) & (variance(q) > 0), variance(q), 1.0), 0.0)
    squared = squared_values(operator, gap)
    logs = jnp.where(active(squared), jnp.log(2 * jnp.pi * jnp.where(active(squared), variance(squared), 1.0)), 0.0)
    return -0.5 * (dot(gap, operator.spectral(inverse, gap)) + jnp.sum(logs))


def _gap(anchor: Tree, x: Tree, row: Row) -> Tree:
    return jax.tree.map(lambda u, leaf: u - leaf / row.s.alpha, anchor, x)


def _always(q: Array) -> Array:
    return jnp.ones(jnp.shape(q), bool)


# --- the filters --------------------------------------------------------------------------------------------------


@value
class Conjugate:
    measurement: Any
    variance: Array
    factory = "conjugate"
    check, start, plan, ahead, draw = _check, minus_constant, _plan, _ahead, _draw

    def at(self, x: Tree, row: Row, own: Any) -> tuple[Potential, Tree, Array]:
        """The potential, its anchor, and the log-density of what was drawn of y."""
        (anchor, _), last = own
        noise, here = noise_variance(self.measurement, x), noise_to_signal(row.s)
        wide = jnp.where(last, 1.0, 1.0 + here / self.variance)  # 1 / k; at the last level g is the target
        anchor = jax.tree.map(lambda leaf: (wide * leaf).astype(leaf.dtype), anchor)
        total = lambda q: wide**2 * (noise / q + here / wide)
        return Potential(total, _always, lambda q: jnp.broadcast_to(~last, jnp.shape(q))), anchor, jnp.zeros(())


@value
class MCGDiff:
    measurement: Any
    factory = "mcgdiff"
    check, start, plan, ahead, draw = _check, minus_constant, _plan, _ahead, _draw

    def at(self, x: Tree, row: Row, own: Any) -> tuple[Potential, Tree, Array]:
        """As `Conjugate.at`."""
        (anchor, levels), _ = own
        noise, here = noise_variance(self.measurement, x), noise_to_signal(row.s)
        place = lambda q: _place(levels, noise / q)

        def variance(q: Array) -> Array:
            return jnp.maximum(here - place(q), 0.0) + jnp.maximum(noise / q - place(q), 0.0)

        return Potential(variance, lambda q: here >= place(q), lambda q: here > place(q)), anchor, jnp.zeros(())


def _place(levels: Array, noise: Array) -> Array:
    """p^2: the highest level that is no noisier than y, or else the lowest there is."""
    return levels[jnp.maximum(jnp.searchsorted(levels, noise, side="right") - 1, 0)]


@value
class FilteringPosterior:
    measurement: Any
    key: Array
    once: bool = static()
    factory = "fps"
    check, start, ahead, draw = _check, minus_constant, _ahead, _draw

    def plan(self, x: Tree, rows: Row) -> tuple[Any, Any]:
        """``(the levels from the lowest, (the noised A^+ y, the log-density of its step) of every row)``."""
        a, noise = self.measurement.operator, noise_variance(self.measurement, x)
        anchor = pseudo_inverse(a, self.measurement.observed(x))
        levels = noise_to_signal(rows.s)[::-1]

        def step(before: Array, after: Array, lowest: Array, key: Array) -> tuple[Tree, Array]:
            """What y gains from one level to the next, and the log-density of it."""
            first = lambda q: jnp.where(lowest, after, jnp.maximum(before, noise / q))  # y is as noisy as that
            variance = lambda q: jnp.maximum(after - (first(safe(q)) if self.once else before), 0.0) + 0.0 * q
            active = lambda q: (q > 0) & (variance(q) > 0)
            gained = a.spectral(lambda q: jnp.where(active(q), root(variance(q)), 0.0), normal_like(key, x))
            # noise that is left at the lowest level is part of the target
            return gained, jnp.where(lowest, 0.0, log_normal(a, gained, active, variance))

        keys = jax.random.split(self.key, levels.size)
        before, lowest = jnp.concatenate([jnp.zeros(1), levels[:-1]]), jnp.arange(levels.size) == 0
        gained, given = jax.vmap(step)(before, levels, lowest, keys)
        path = jax.tree.map(lambda u, leaf: u + jnp.cumsum(leaf, axis=0), anchor, gained)
        return levels, jax.tree.map(lambda leaf: leaf[::-1], (path, given))

    def at(self, x: Tree, row: Row, own: Any) -> tuple[Potential, Tree, Array]:
        """As `Conjugate.at`."""
        levels, (anchor, given) = own
        noise, here = noise_variance(self.measurement, x), noise_to_signal(row.s)
        if not self.once:
            return Potential(lambda q: noise / q, _always, lambda q: ~_always(q)), anchor, given
        place = lambda q: _place(levels, noise / q)
        variance = lambda q: jnp.where(here == place(q), jnp.maximum(noise / q - here, 0.0), 0.0)
        return Potential(variance, lambda q: here >= place(q), lambda q: ~_always(q)), anchor, given
