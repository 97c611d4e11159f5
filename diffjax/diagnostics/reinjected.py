"""Detection of artifacts by the dynamics of the score, and new noise for the places where it jumps.

On its way a sample's clean estimate changes little from step to step, place by place.  Where a model goes wrong in
some region it jumps there and nowhere else, in the middle of the way, and later steps only polish the artifact.  So
jumps are found while sampling, and the state is rebuilt there from the clean estimate before the jump, with new noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from diffjax.levels import Array, Grid, Info, Level, Row, Solver, Tree, is_traced, value


def score_jump(change: Array) -> Array:
    """How many robust standard deviations ``|change|`` is above the median of all its entries, entry by entry.

    The deviation is 1.4826 times the median of the absolute distances from the median; 0 everywhere if that is 0.
    """
    size = jnp.abs(change)
    centre = jnp.median(size)
    spread = 1.4826 * jnp.median(jnp.abs(size - centre))
    return jnp.where(spread > 0, (size - centre) / jnp.where(spread > 0, spread, 1.0), 0.0)


def reinjected(solver: Solver, threshold: Array = 8.0, low: Array = -2.0, high: Array = 3.0) -> Reinjected:
    """Each step of ``solver``, and places whose score jumps are noised anew from the clean estimate before the jump.

        score_jump(x0_t - x0_before) > threshold  and  low <= half_log_snr(t) <= high:
            x_s <- alpha_s x0_before + sigma_s z,        x0_before stays there;

    elsewhere the step is the solver's and x0_t is the one before.  (The noise estimate changes by alpha / sigma times
    as much in a deterministic step, at all places alike, which does not change the jump.)  With threshold = inf it is
    ``solver``.  One more normal draw a row, no further denoiser calls.  The state must be one array, whose entries are
    compared with each other, so there must be many.  A multistep solver's history is left as it is.

    Args:
        solver: whose rows tell a clean estimate made at their own state.
        threshold: in robust standard deviations of the changes of all entries.
        low, high: the half-log-SNR between which jumps count, the middle of the way: artifacts arise there.  Where an
            entry still decides what it will be, at a lower one, that is a jump too and would be undone.

    Temporal Score Analysis for Understanding and Correcting Diffusion Artifacts, arXiv:2503.16218 (ASCED: abnormal
    score dynamics of a region, and new noise there on the fly; this rule is derived from that description).

    Raises ValueError unless threshold is above 0 and low < high.
    """
    if not is_traced(threshold) and not threshold > 0:
        raise ValueError(f"threshold must be above 0, got {threshold!r}.")
    if not is_traced(low, high) and not low < high:
        raise ValueError(f"low must be below high, got low={low!r}, high={high!r}.")
    return Reinjected(solver, threshold, low, high)


class Before(NamedTuple):
    """The clean estimate before any jump, place by place, and whether there has been one."""

    x0: Array
    made: Array


@value
class Reinjected:
    inner: Any
    threshold: Array
    low: Array
    high: Array

    def __repr__(self) -> str:
        return f"reinjected({self.inner!r}, threshold={self.threshold!r}, low={self.low!r}, high={self.high!r})"

    @property
    def renoises(self) -> bool:
        return getattr(self.inner, "renoises", False)

    @property
    def order(self) -> int:
        return self.inner.order

    @property
    def calls(self) -> int:
        return self.inner.calls

    @property
    def draws(self) -> int:
        return self.inner.draws + 1

    @property
    def embedded(self) -> bool:
        return self.inner.embedded

    def plan(self, grid: Grid) -> Row:
        return self.inner.plan(grid)

    def init(self, x: Array) -> tuple[Tree, Before]:
        if not hasattr(x, "shape"):
            raise ValueError(f"reinjected needs a state that is one array, got {x!r}.")
        return self.inner.init(x), Before(jnp.zeros_like(x), jnp.zeros((), bool))

    def step(
        self, noise: tuple[Array, ...], denoise: Callable[[Tree, Level], Tree], x: Array, memory: Tree, row: Row
    ) -> tuple[Array, Tree, Info]:
        inner, before = memory
        new, inner, info = self.inner.step(noise[:-1], denoise, x, inner, row)
        jump = score_jump(info.x0 - before.x0)
        inside = (row.t.half_log_snr >= self.low) & (row.t.half_log_snr <= self.high)
        jumped = before.made & inside & (jump > self.threshold)
        again = (row.s.alpha * before.x0 + row.s.sigma * noise[-1]).astype(new.dtype)
        kept = jnp.where(jumped, before.x0, info.x0)
        return jnp.where(jumped, again, new), (inner, Before(kept, jnp.ones((), bool))), info
