"""Where the standard normal draws of stochastic solvers come from: the ``noise=`` option of `sample`.

A source of noise is ``(key, row index, row, x, draws) -> draws standard normal trees``.  The default of the samplers
draws independently for every row, whatever the row's levels.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, Row, Tree, is_traced, static, value

_REACH = 24.0  # half-log-SNRs beyond +-24 have alpha or sigma below float32's precision
_DEPTH = 20  # bisections of [-24, 24]: cells of 5e-5, shorter than any step of 1000


def brownian(rate: float = 1.0, depth: int = _DEPTH) -> Brownian:
    """One Brownian path for all grids: with the same key, 20 and 40 steps see the same noise.

    The path is the stationary Ornstein-Uhlenbeck process V over the half-log-SNR with correlation
    ``exp(-rate |difference|)``, and a row from level t to level s, ``h`` apart, is given

        z = (V(s) - exp(-rate h) V(t)) / sqrt(1 - exp(-2 rate h)),

    which is standard normal and independent of the other rows of a grid.  Steps join up:
    ``sqrt(1 - exp(-2 (h + h'))) z(t, s) = exp(-h') sqrt(1 - exp(-2 h)) z(t, m) + sqrt(1 - exp(-2 h')) z(m, s)``
    (rate 1).  That is how the noise of ``ddim(eta=1)`` and of every solver of the time-reversed SDE adds up, so
    they converge to one path; solvers of the SDE with eta times its noise need ``rate = eta^2``.  The path is
    evaluated by bisection with bridges, ``depth`` normal draws an end of a row, and nothing is stored; steps shorter
    than the last cells, ``48 / 2^depth``, are not independent.

    Score-Based Generative Modeling through Stochastic Differential Equations, arXiv:2011.13456 (the SDE); Scalable
    Gradients for Stochastic Differential Equations, arXiv:2001.01328, section 4 (the virtual Brownian tree).

    Raises ValueError unless rate > 0 and depth >= 1; when sampling, for a solver that adds noise between its rows
    (churn, grids with gaps), whose path would be walked twice, and for levels per frame or pixel.
    """
    if not is_traced(rate) and not (np.isfinite(rate) and rate > 0):
        raise ValueError(f"rate must be finite and above 0, got {rate!r}.")
    if not isinstance(depth, int) or depth < 1:
        raise ValueError(f"depth must be an integer of at least 1, got {depth!r}.")
    return Brownian(rate, depth)


@value
class Brownian:
    rate: Array
    depth: int = static()
    factory = "brownian"

    def check(self, solver: Any, rows: Row) -> None:
        if np.ndim(rows.t.half_log_snr) != 1:
            raise ValueError(f"brownian noise needs one level a row, got levels of shape {rows.t.alpha.shape[1:]}.")
        if not is_traced(rows) and np.any(rows.t.half_log_snr[1:] < rows.s.half_log_snr[:-1] - 1e-9):
            raise ValueError(
                f"brownian noise needs rows that only go towards the data, which those of {solver!r} do not."
            )

    def __call__(self, key: Array, index: Array, row: Row, x: Tree, draws: int) -> tuple[Tree, ...]:
        del index
        return tuple(self.increment(jax.random.fold_in(key, i), row.t, row.s, x) for i in range(draws))

    def increment(self, key: Array, t: Any, s: Any, x: Tree) -> Tree:
        """The standard normal tree of a step from level ``t`` to level ``s``."""
        low, high = (jnp.clip(level.half_log_snr, -_REACH, _REACH) for level in (t, s))
        # from alpha = 0 the whole path is fresh
        kept = jnp.where(jnp.isneginf(t.half_log_snr), 0.0, jnp.exp(-self.rate * (high - low)))
        std = jnp.sqrt(jnp.where(kept > 0, -jnp.expm1(-2 * self.rate * (high - low)), 1.0))
        still = std == 0
        before, after = self.path(key, low, x), self.path(key, high, x)
        return jax.tree.map(
            lambda a, b: jnp.where(still, 0.0, (b - kept * a) / jnp.where(still, 1.0, std)), before, after
        )

    def path(self, key: Array, half_log_snr: Array, x: Tree) -> Tree:
        """V at a half-log-SNR within +-24, shaped like ``x``."""
        leaves, structure = jax.tree.flatten(x)
        keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
        return structure.unflatten([self._leaf(k, half_log_snr, leaf) for k, leaf in zip(keys, leaves, strict=True)])

    def _leaf(self, key: Array, where: Array, like: Array) -> Array:
        draw = lambda k: jax.random.normal(k, jnp.shape(like), like.dtype)
        low_key, high_key, key = jax.random.split(key, 3)
        kept = np.exp(-2 * _REACH * self.rate) if not is_traced(self.rate) else jnp.exp(-2 * _REACH * self.rate)
        left = draw(low_key)
        right = kept * left + jnp.sqrt(1 - kept**2) * draw(high_key)

        def halve(depth: Array, state: tuple) -> tuple:
            key, index, left, right, a = state
            # cells are counted by integers, so that a point belongs to the same cells in every query
            width = 2 * _REACH * 0.5 ** (depth + 1.0)
            d = self.rate * width
            key_here = jax.random.fold_in(jax.random.fold_in(key, depth), index)
            middle = (left + right) / (2 * jnp.cosh(d)) + jnp.sqrt(jnp.tanh(d)) * draw(key_here)
            above = where >= a + width
            return (
                key,
                2 * index + above.astype(index.dtype),
                jnp.where(above, middle, left),
                jnp.where(above, right, middle),
                jnp.where(above, a + width, a),
            )

        start = (key, jnp.zeros((), jnp.uint32), left, right, -_REACH + 0.0 * where)
        key, index, left, right, a = jax.lax.fori_loop(0, self.depth, halve, start)
        width = 2 * _REACH * 0.5**self.depth
        return self._between(
            jax.random.fold_in(jax.random.fold_in(key, self.depth), index),
            left,
            right,
            where - a,
            a + width - where,
            draw,
        )

    def _between(self, key: Array, left: Array, right: Array, before: Array, after: Array, draw: Any) -> Array:
        """The bridge inside the last cell."""
        before, after = jnp.maximum(before, 0.0) * self.rate, jnp.maximum(after, 0.0) * self.rate
        whole = jnp.sinh(before + after)
        mean = (jnp.sinh(after) * left + jnp.sinh(before) * right) / whole
        return mean + jnp.sqrt(2 * jnp.sinh(before) * jnp.sinh(after) / whole) * draw(key)


def stored(noise: tuple[Tree, ...]) -> Stored:
    """Noise that is given: ``draws`` trees with a leading axis over the rows, as from an inverted SDE."""
    return Stored(noise)


@value
class Stored:
    noise: tuple[Tree, ...]
    factory = "stored"

    def check(self, solver: Any, rows: Row) -> None:
        count = rows.t.time.shape[0]
        found = [np.shape(leaf)[:1] for leaf in jax.tree.leaves(self.noise)]
        if len(self.noise) != solver.draws or any(shape != (count,) for shape in found):
            raise ValueError(f"stored noise must be {solver.draws} trees over {count} rows, got leading axes {found}.")

    def __call__(self, key: Array, index: Array, row: Row, x: Tree, draws: int) -> tuple[Tree, ...]:
        del key, row, draws
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], self.noise)
