"""Stochastic splitting of phase space: an Ornstein-Uhlenbeck part that is exact, position and momentum by Euler.

With the stationary covariance P, h = dB > 0 and shares L = diag(noise, 1) a reverse step

    du = [-F u + (Q + L Q) s / 2] h + (L Q)^{1/2} dW

is the sum of three: ``o`` is ``-L Q P^-1 u h / 2 + (L Q)^{1/2} dW``, which keeps N(0, P) and is solved exactly; ``a``
is the position of what is left, ``[-F + L Q P^-1 / 2] u + (Q + L Q) s / 2``, and ``b`` its momentum.
"""

from __future__ import annotations

from diffjax.levels import Array, Grid, is_traced, static, value
from diffjax.phase import matrices
from diffjax.phase.solvers import Phase, Table
from diffjax.phase.splitting import _check_linear, _start, _step


def oba(parts: str = "oba", reduced: bool = True, noise: Array = 1.0) -> Phase:
    """The parts of the reverse SDE in turn: noise, momentum, position.

        u <- E u + N(0, P - E P E^T)                                       o, E = exp(-L Q P^-1 h / 2)
        u <- u + e_i e_i^T [(-F + L Q P^-1 / 2) u + (Q + L Q) s / 2] h     a and b, the entries i = 0 and 1

    A part that comes k times takes ``h / k``.  Scores are read at the time of the step's start.

    Args:
        parts: an order of "o", "a" and "b", each at least once: "oba", "bao", "obab", ...
        reduced: two parts "a" and "b" that follow each other read the score once (a third one reads it anew), which
            the paper finds to be better as well as cheaper.  False: each part reads it.
        noise: lambda >= 0, the share of the position's noise that is injected.  The weight of its score follows, so
            that every share has the same marginals; 0 leaves the position without noise.

    Calls a step: 1 for "oba" and "bao", 2 for "obab"; one for each "a" and "b" if not reduced.  Weak order 1.

    Efficient Integrators for Diffusion Generative Models, arXiv:2310.07894, section 4 (stochastic splitting, reduced
    OBA).  The paper's lambda_s multiplies the noise alone.

    Raises ValueError for parts other than these and a negative noise; the plan raises it for other than two variables.

    >>> oba().calls, oba(reduced=False).calls, oba("obab").draws
    (1, 2, 1)
    """
    if not isinstance(parts, str) or set(parts) != set("oba"):
        raise ValueError(f"parts must be an order of 'o', 'a' and 'b', each at least once, got {parts!r}.")
    if not is_traced(noise) and not noise >= 0:
        raise ValueError(f"noise must be at least 0, got {noise!r}.")
    method = OBA(parts, bool(reduced), noise)
    return Phase(method, order=1, calls=sum(_reads(parts, bool(reduced))), draws=parts.count("o"))


def _reads(parts: str, reduced: bool) -> list[bool]:
    """Whether each part reads the score."""
    read, shared = [], 0
    for part in parts:
        new = part != "o" and (not reduced or shared % 2 == 0)
        shared = 0 if part == "o" else shared + 1
        read.append(new)
    return read


@value
class OBA:
    parts: str = static()
    reduced: bool = static()
    noise: Array
    factory = "oba"

    def table(self, grid: Grid) -> Table:
        _check_linear(self, grid)
        schedule, state, step = grid.process.schedule, _start(grid), _step(grid)
        if schedule.variables != 2:
            raise ValueError(f"{self!r} needs a process of two variables, got {schedule.variables}.")
        xp, drift, diffusion, _ = schedule.parts(grid.t.time)
        now = schedule.moments(grid.t.time)
        shares = xp.asarray([self.noise, 1.0], diffusion.dtype)
        # the shares act from both sides, so that a noise that is correlated stays a covariance
        injected = xp.sqrt(shares)[:, None] * diffusion * xp.sqrt(shares)
        decay = 0.5 * injected @ matrices.inverse(schedule.stationary())
        stages, draws, score = [], 0, None
        for part, reads in zip(self.parts, _reads(self.parts, self.reduced), strict=True):
            share = step / self.parts.count(part)
            if part == "o":
                moved, spread = matrices.transition(-decay, injected, share[:, 0, 0])
                state = state.map(moved).draw(draws, matrices.factor(spread))
                draws += 1
                continue
            if reads:
                score = state.score(now, len(stages))
                stages.append(state)
            assert score is not None  # the first of the two has read it
            chosen = xp.asarray([[float(part == "a"), 0.0], [0.0, float(part == "b")]], diffusion.dtype)
            change = state.map(decay - drift + 0 * step).plus(score.map(0.5 * (diffusion + injected) + 0 * step))
            state = state.plus(change.map(share * chosen))
        return Table(state, tuple(stages), (grid.t,) * len(stages))
