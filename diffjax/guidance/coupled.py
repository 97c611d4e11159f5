"""Several models at once: their samples coupled by a cost, and constraints that hold exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.corrections.transform import Plain, Remembering, check, evaluations, transformed
from diffjax.guidance.tilted import Tilted, tilted
from diffjax.levels import Array, Level, Tree, as_value, remembers, static, value

INPUTS = ("state", "estimate")


def coupled(denoise: Any, cost: Callable[[Tree], Array], scale: Any = 1.0, on: str = "state") -> Tilted:
    """``x0 - scale sigma^2 / alpha grad c``: the score of every level less ``scale grad c``.

    With Langevin corrections (`diffjax.modifiers.langevin`) the samples follow ``p(x) exp(-scale c(x))``, the better
    the more they are, since every level has then a law whose score this is (on="state"); without, the law is only near.

    Args:
        denoise: a denoiser that does not remember, mostly several `side_by_side`.
        cost: c, of a state (or an estimate) to a scalar, as ``lambda xy: 0.5 * ((xy[0] - xy[1]) ** 2).sum()``; best a
            value.
        scale: the paper's gamma, a number or a function of the level; 0 is ``denoise``.
        on: "state", c(x_t), or "estimate", c(x0).

    Projected Coupled Diffusion for Test-Time Constrained Joint Generation, arXiv:2508.10531; its projection is
    `constrained`.

    Raises ValueError as `tilted`, or for another ``on``.
    """
    if on not in INPUTS:
        raise ValueError(f"on must be among {INPUTS}, got {on!r}.")
    return tilted(denoise, Cost(as_value(cost), on), scale)


@value
class Cost:
    """The twist ``log h = -c``."""

    cost: Any
    on: str = static()

    def __call__(self, denoise: Any, x: Tree, level: Level) -> tuple[Array, Tree]:
        x0 = denoise(x, level)
        return -self.cost(x if self.on == "state" else x0), x0

    def gradient(self, denoise: Any, x: Tree, level: Level) -> tuple[Array, Tree, Tree]:
        """Autodiff's; on the state the denoiser is not differentiated."""
        if self.on == "state":
            log_h, gradient = jax.value_and_grad(lambda x: -self.cost(x))(x)
            return log_h, denoise(x, level), gradient
        (log_h, x0), gradient = jax.value_and_grad(lambda x: self(denoise, x, level), has_aux=True)(x)
        return log_h, x0, gradient


def side_by_side(*denoisers: Any) -> SideBySide:
    """Independent models as one denoiser of tuples of states; network evaluations add up.

    Raises ValueError for denoisers that remember.

    >>> import diffjax, jax.numpy as jnp
    >>> law = diffjax.oracles.gaussian(0.0, 1.0)
    >>> side_by_side(law, law)((jnp.array(1.0), jnp.array(2.0)), diffjax.processes.vp().level(0.0))
    (Array(1., dtype=float32), Array(2., dtype=float32))
    """
    for denoise in denoisers:
        if remembers(denoise):
            raise ValueError(f"side_by_side cannot hold a denoiser that remembers, got {denoise!r}.")
    return SideBySide(tuple(as_value(denoise) for denoise in denoisers))


@value
class SideBySide:
    denoisers: tuple
    factory = "side_by_side"

    def __call__(self, x: tuple, level: Level) -> tuple:
        return tuple(denoise(part, level) for denoise, part in zip(self.denoisers, x, strict=True))

    def check(self, t: Level) -> None:
        for denoise in self.denoisers:
            check(denoise, t)

    def evaluations(self, level: Level) -> Array:
        """Network evaluations of a call at ``level``."""
        return sum(jnp.asarray(evaluations(denoise, level)) for denoise in self.denoisers)


def constrained(denoise: Any, project: Callable[[Tree], Tree]) -> Plain | Remembering:
    """``x0 <- project(x0)``: the clean estimate brought to the set of what is allowed, in every call.

    The last step of a grid that ends at sigma = 0 is alpha x0 with alpha = 1, so that the samples fulfil the constraint
    exactly, with any one-call solver of the data prediction (`solvers.ddim`).

    Args:
        denoise: any denoiser.
        project: a function of a clean sample, best the Euclidean projection and a value.

    Projected Coupled Diffusion for Test-Time Constrained Joint Generation, arXiv:2508.10531.
    """
    return transformed(denoise, Projection(as_value(project)))


@value
class Projection:
    project: Any
    factory = "constrained"

    def __call__(self, x: Tree, x0: Tree, level: Level) -> Tree:
        return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), self.project(x0), x0)
