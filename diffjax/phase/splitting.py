"""Euler-Maruyama and splitting integrators of phase space.

With h = dB > 0 and score ``s = S^-1 (a E[x_0 | u] - u)`` a reverse step of the SDE (eta = 1) or ODE (eta = 0) is

    du = [-F u + (1 + eta^2) / 2 Q s] h + eta G dW.

Euler-Maruyama takes it whole.  Splitting methods take parts of it in turn: SSCS the part whose score is that of the
stationary law, exactly, in two halves around the rest; the symplectic ones the position and the momentum.
"""

from __future__ import annotations

from typing import Any

from diffjax.levels import Array, Grid, namespace, static, value
from diffjax.phase import matrices
from diffjax.phase.solvers import Affine, Phase, Table


def euler_maruyama(eta: int | float = 1) -> Phase:
    """One Euler step of the reverse SDE (``eta = 1``) or of the probability-flow ODE (0) with beta at the step's start.

    One call, order 1.

    Raises ValueError unless eta is 0 or 1.

    >>> euler_maruyama(eta=0).draws
    0
    """
    _check_eta(eta)
    return Phase(EulerMaruyama(int(eta)), order=1, draws=int(eta))


def sscs(eta: int | float = 1) -> Phase:
    """Symmetric splitting: half a step of the stationary reverse dynamics, one of the rest of the score, half a step.

    With the stationary covariance P, ``[-F - (1 + eta^2) / 2 Q P^-1] u h + eta G dW`` is solved exactly and
    ``(1 + eta^2) / 2 Q (s + P^-1 u) h`` by Euler, with the score in the middle of the step.  One call.  Order 1, as the
    score depends on what that part moves.

    Score-Based Generative Modeling with Critically-Damped Langevin Diffusion, arXiv:2112.07068, section 3.3 (SSCS).

    Raises ValueError unless eta is 0 or 1.

    >>> sscs().draws
    2
    """
    _check_eta(eta)
    return Phase(SSCS(int(eta)), order=1, draws=2 * int(eta))


def symplectic(kind: str = "verlet", reduced: bool = False) -> Phase:
    """Position and momentum in turn, by Euler, for the probability-flow ODE of two variables.

    ``kind`` "euler": the position, then the momentum; 2 calls.  "verlet": half of the momentum, the position, half of
    the momentum; 3 calls.  Every part reads the score anew, at the time of the step's start.  ``reduced``: the parts
    before the last read it once, and so does the last of "euler"; that of "verlet" reads it at the step's end (or, for
    a step to t = 0, in its middle); 1 and 2 calls.  Order 1, as the score of a part depends on what the part moves.

    Efficient Integrators for Diffusion Generative Models, arXiv:2310.07894, section 4 (deterministic splitting).

    Raises ValueError for another kind; the plan raises it for other than two variables.

    >>> symplectic(reduced=True).calls
    2
    """
    if kind not in ("euler", "verlet"):
        raise ValueError(f"kind must be 'euler' or 'verlet', got {kind!r}.")
    calls = {"euler": 2, "verlet": 3}[kind] - int(bool(reduced))
    return Phase(Symplectic(kind, bool(reduced)), order=1, calls=calls)


def _check_eta(eta: Any) -> None:
    if eta not in (0, 1):
        raise ValueError(f"eta must be 0 or 1, got {eta!r}.")


def _start(grid: Grid) -> Affine:
    return Affine(matrices.identity(namespace(grid.t), grid.t.time, grid.process.schedule.variables))


def _check_linear(solver: Any, grid: Grid) -> None:
    if not hasattr(grid.process.schedule, "drift"):
        raise ValueError(f"{solver!r} needs a linear SDE, got {grid.process!r}.")


def _step(grid: Grid) -> Array:
    """h of shape (R, 1, 1)."""
    clock = grid.process.schedule.clock
    return (clock(grid.t.time) - clock(grid.s.time))[:, None, None]


@value
class EulerMaruyama:
    eta: int = static()
    factory = "euler_maruyama"

    def table(self, grid: Grid) -> Table:
        state, step = _start(grid), (grid.t.time - grid.s.time)[:, None]
        drift, clean, diffusion = grid.process.schedule.reverse(grid.t.time, self.eta)
        wide = step if clean.ndim == 2 else step[..., None]
        out = state.plus(state.map(step[..., None] * drift)).estimate(0, wide * clean)
        if self.eta:
            out = out.draw(0, matrices.factor(step[..., None] * diffusion))
        return Table(out)


@value
class SSCS:
    eta: int = static()
    factory = "sscs"

    def table(self, grid: Grid) -> Table:
        _check_linear(self, grid)
        schedule, state, step = grid.process.schedule, _start(grid), _step(grid)
        _, drift, diffusion, _ = schedule.parts(grid.t.time)
        keeps = matrices.inverse(schedule.stationary())
        weight = 0.5 * (1 + self.eta)
        moved, spread = matrices.transition(-drift - weight * diffusion @ keeps, diffusion, 0.5 * step[:, 0, 0])
        middle = state.map(moved)
        if self.eta:
            middle = middle.draw(0, matrices.factor(spread))
        at = grid.process.level(0.5 * (grid.t.time + grid.s.time))
        force = middle.score(schedule.moments(at.time), 0).plus(middle.map(keeps + 0 * step))
        out = middle.plus(force.map(weight * step * diffusion)).map(moved)
        if self.eta:
            out = out.draw(1, matrices.factor(spread))
        return Table(out, (middle,), (at,))


@value
class Symplectic:
    kind: str = static()
    reduced: bool = static()
    factory = "symplectic"

    def table(self, grid: Grid) -> Table:
        schedule, state = grid.process.schedule, _start(grid)
        _check_linear(self, grid)
        if schedule.variables != 2:
            raise ValueError(f"{self!r} needs a process of two variables, got {schedule.variables}.")
        xp, drift, diffusion, _ = schedule.parts(grid.t.time)
        step = schedule.rate(grid.t.time)[:, None, None] * (grid.t.time - grid.s.time)[:, None, None]
        now = schedule.moments(grid.t.time)
        position, momentum = (xp.asarray([[1.0, 0.0], [0.0, 0.0]]), xp.asarray([[0.0, 0.0], [0.0, 1.0]]))

        def moved(state: Affine, score: Affine, part: Array) -> Affine:
            change = state.map(-drift + 0 * step).plus(score.map(0.5 * diffusion + 0 * step))
            return state.plus(change.map(step * part))

        first = state.score(now, 0)
        if self.kind == "euler":
            after = moved(state, first, position)
            if self.reduced:
                return Table(moved(after, first, momentum))
            return Table(moved(after, after.score(now, 1), momentum), (None, after), (None, grid.t))
        half = moved(state, first, 0.5 * momentum)
        if self.reduced:
            after = moved(half, first, position)
            time = xp.where(grid.s.time == 0, 0.5 * grid.t.time, grid.s.time)
            last = after.score(schedule.moments(time), 1)
            return Table(moved(after, last, 0.5 * momentum), (None, after), (None, grid.process.level(time)))
        after = moved(half, half.score(now, 1), position)
        last = after.score(now, 2)
        return Table(moved(after, last, 0.5 * momentum), (None, half, after), (None, grid.t, grid.t))
