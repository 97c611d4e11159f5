"""Changes of a denoiser's clean estimate, for plain denoisers and for those that remember."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffjax.levels import Array, Level, Tree, as_value, remembers, value


def transformed(denoise: Any, change: Callable[[Tree, Tree, Level], Tree]) -> Plain | Remembering:
    """The denoiser ``change(x, denoise(x, level), level)``; ``change`` is best a value, so that it is an argument."""
    kind = Remembering if remembers(denoise) else Plain
    return kind(as_value(denoise), as_value(change))


# --- what a correction forwards: class bodies take these as their own -------------------------------------------------


def condition_within(self: Any) -> Tree:
    """The condition of the denoiser that is corrected, or None."""
    return getattr(self.denoise, "condition", None)


def check_within(self: Any, t: Level) -> None:
    """That denoiser's own check of the levels of a plan, where it has one."""
    check(self.denoise, t)


def evaluations_within(self: Any, level: Level) -> Array:
    """Network evaluations of a call at ``level``."""
    return evaluations(self.denoise, level)


@value
class Plain:
    denoise: Any
    change: Any

    def __repr__(self) -> str:
        return f"{self.change!r} of {self.denoise!r}"

    def __call__(self, x: Tree, level: Level) -> Tree:
        return self.change(x, self.denoise(x, level), level)

    @property
    def with_variance(self) -> Callable[[Tree, Level], tuple[Tree, Tree]]:
        """``(x, level) -> (x0, share)``, the share of the variance unchanged; only where the denoiser has one."""
        inner = self.denoise.with_variance

        def both(x: Tree, level: Level) -> tuple[Tree, Tree]:
            x0, share = inner(x, level)
            return self.change(x, x0, level), share

        return both

    condition = property(condition_within)
    check = check_within
    evaluations = evaluations_within


@value
class Remembering:
    denoise: Any
    change: Any

    def __repr__(self) -> str:
        return f"{self.change!r} of {self.denoise!r}"

    def init(self, x: Tree) -> Tree:
        return self.denoise.init(x)

    def apply(self, x: Tree, level: Level, memory: Tree) -> tuple[Tree, Tree]:
        x0, memory = self.denoise.apply(x, level, memory)
        return self.change(x, x0, level), memory

    condition = property(condition_within)
    check = check_within
    evaluations = evaluations_within

    def spent(self, level: Level, memory: Tree) -> Array:
        return spent(self.denoise, level, memory)


def check(denoise: Any, t: Level) -> None:
    """A denoiser's own check of the levels of a plan, where it has one."""
    if hasattr(denoise, "check"):
        denoise.check(t)


def evaluations(denoise: Any, level: Level) -> Array:
    """Network evaluations of a call."""
    own = getattr(denoise, "evaluations", None)
    return 1 if own is None else own(level)


def spent(denoise: Any, level: Level, memory: Tree) -> Array:
    """Network evaluations of the call at ``level`` that left ``memory``.

    A denoiser that remembers and makes fewer calls sometimes has a ``spent(level, memory)`` that tells how many.
    """
    own = getattr(denoise, "spent", None)
    return evaluations(denoise, level) if own is None else own(level, memory)


def noise_estimate(x: Array, x0: Array, level: Level) -> Array:
    """``eps = (x - alpha x0) / sigma``, for sigma > 0."""
    return (x - level.alpha * x0) / level.sigma
