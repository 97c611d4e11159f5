"""Annealed Langevin dynamics: several Langevin steps at every noise level."""

from __future__ import annotations

import dataclasses

import jax

from diffjax.levels import Array, Grid, namespace, rise, root, static, value
from diffjax.solvers.arguments import integer, number
from diffjax.solvers.coefficients import stochastic_exponential
from diffjax.solvers.linear import Linear, Table, stack


def annealed_langevin(steps: int = 5, step_size: Array = 0.2) -> Linear:
    """Annealed Langevin dynamics, ``steps`` Langevin steps at every level of the grid.

    ``x <- x + d/2 score + sqrt(d) z`` with ``d = step_size sigma^2``.  The state then goes to the next level as it is
    (times alpha_s / alpha_t), so that the levels must be close or the steps many.  In the paper's terms step_size is
    epsilon / sigma_L^2.  A step to sigma = 0 ends in the clean estimate of the last row, one from alpha = 0 in the
    exact step.  At fixed step size the law is that of the unadjusted Langevin chain: where Gaussian data have variance
    c at a level, it has ``c / (1 - step_size sigma^2 / (4 c))``.

    ``steps`` rows, each one denoiser call and one draw, for each step of the grid; of no order in the grid.
    Generative Modeling by Estimating Gradients of the Data Distribution, arXiv:1907.05600, algorithm 1.

    Raises ValueError unless steps >= 1 and 0 < step_size <= 2.

    >>> annealed_langevin(steps=10)
    annealed_langevin(steps=10, step_size=0.2)
    """
    integer("steps", steps, 1, 10**6)
    number("step_size", step_size, 1e-12, 2.0)
    return Linear(AnnealedLangevin(steps, step_size), order=0, draws=1, weak_order=0)


@value
class AnnealedLangevin:
    steps: int = static()
    step_size: Array
    factory = "annealed_langevin"

    def rows(self, grid: Grid) -> Grid:
        """Every level ``steps`` times, the last of which goes on to the next."""
        xp = namespace(grid.t)

        def repeated(t: Array, s: Array) -> Array:
            inner = xp.broadcast_to(t[:, None], (t.shape[0], self.steps - 1, *t.shape[1:]))
            return xp.concatenate([inner, s[:, None]], axis=1).reshape(-1, *t.shape[1:])

        t = jax.tree.map(repeated, grid.t, grid.t)
        return dataclasses.replace(grid, t=t, s=jax.tree.map(repeated, grid.t, grid.s))

    def table(self, grid: Grid) -> Table:
        grid = self.rows(grid)
        t, s = grid.t, grid.s
        xp = namespace(t, self.step_size)
        # an entry that does not move in the grid's own step is left alone
        moves = (rise(t, s) != 0).reshape(-1, self.steps, *t.alpha.shape[1:])[:, -1:]
        moves = xp.broadcast_to(moves, (moves.shape[0], self.steps, *moves.shape[2:])).reshape(t.alpha.shape)
        leaves = rise(t, s) != 0
        singular = leaves & ((t.alpha == 0) | (s.sigma == 0))
        growth = xp.where(leaves & ~singular, s.alpha / xp.where(t.alpha == 0, 1.0, t.alpha), 1.0)
        d = xp.where(moves, self.step_size, 0.0)
        columns = (growth * (1 - 0.5 * d), growth * 0.5 * d * t.alpha, growth * t.sigma * root(d))
        exact = stochastic_exponential(t, s, xp.asarray(1.0))
        return Table(stack(*(xp.where(singular, a, b) for a, b in zip(exact, columns, strict=True))), ends=(t, s))
