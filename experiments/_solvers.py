"""The public solvers as experiments need them: found, not listed, and in one compiled program for all step counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import diffjax
from diffjax.catalogue import catalogue
from diffjax.levels import Grid, Info, Level, Row, Solver, Tree, namespace, static, value


def public(names: Sequence[str] = ()) -> dict[str, Solver]:
    """The solvers of ``diffjax.solvers`` (or the named ones) that their factories build with defaults.

    Raises ValueError for a name that is no public solver, or is one that has no defaults.
    """
    known = list(catalogue(diffjax.solvers))
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"solvers {unknown} are not public; there are {known}.")
    found = {}
    for name in names or known:
        try:
            solver = getattr(diffjax.solvers, name)()
        except TypeError as error:  # a factory that needs an argument
            if names:
                raise ValueError(f"solver {name!r} cannot be built with defaults: {error}.") from error
            continue
        if isinstance(solver, Solver):
            found[name] = solver
    return found


def family(name: str) -> str:
    """The file that a public solver comes from."""
    return getattr(diffjax.solvers, name).__module__.rsplit(".", 1)[-1]


def grids(solver: Solver, spacing: Callable[[int], Grid], nfe: Sequence[int], least: int = 2) -> dict[int, Grid]:
    """For each number of network evaluations the longest grid that a solver walks within it, if it has ``least`` steps.

    ``spacing(steps)`` makes a grid.  A step may take several evaluations, and a plan more rows than the grid has steps.
    """
    found = {}
    for budget in nfe:
        for steps in range(budget // solver.calls, least - 1, -1):
            grid = spacing(steps)
            if evaluations(solver, grid) <= budget:
                found[budget] = grid
                break
    return found


def evaluations(solver: Solver, grid: Grid) -> int:
    """Network evaluations of one sample."""
    return solver.calls * len(solver.plan(grid).t.time)


def padded(solver: Solver, rows: int) -> Padded:
    """``solver`` with plans of always ``rows`` rows, of which those past its own do nothing.

    Runs with different numbers of steps then share one compiled program.  For cheap denoisers only: the idle rows
    call it, too.
    """
    return Padded(solver, rows)


@value
class Padded:
    """See `padded`."""

    inner: Any
    rows: int = static()

    @property
    def order(self) -> int:
        return self.inner.order

    @property
    def calls(self) -> int:
        return self.inner.calls

    @property
    def draws(self) -> int:
        return self.inner.draws

    @property
    def embedded(self) -> bool:
        return self.inner.embedded

    def plan(self, grid: Grid) -> Row:
        plan = self.inner.plan(grid)
        xp, count = namespace(plan.t), len(plan.t.time)
        if count > self.rows:
            raise ValueError(f"rows must be at least the {count} rows of {self.inner!r} here, got {self.rows}.")
        index = xp.minimum(xp.arange(self.rows), count - 1)
        taken = jax.tree.map(lambda leaf: leaf[index], plan)
        return Row(taken.t, taken.s, (xp.arange(self.rows) < count, taken.coefficients))

    def init(self, x: Tree) -> Tree:
        return self.inner.init(x)

    def step(
        self, noise: tuple[Tree, ...], denoise: Callable[[Tree, Level], Tree], x: Tree, memory: Tree, row: Row
    ) -> tuple[Tree, Tree, Info]:
        active, coefficients = row.coefficients
        after, memory, info = self.inner.step(noise, denoise, x, memory, row._replace(coefficients=coefficients))
        x = jax.tree.map(lambda new, old: jnp.where(active > 0, new, old), after, x)
        return x, memory, info
