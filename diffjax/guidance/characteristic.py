"""Characteristic guidance: classifier-free guidance at states from which both models see the same clean sample."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from diffjax.corrections.transform import check_within, condition_within, evaluations
from diffjax.guidance.classifier_free import fitting
from diffjax.guidance.schedules import as_scale, scale_at
from diffjax.levels import Array, Level, Tree, static, value


def characteristic(denoise: Any, null: Tree, scale: Any = 1.0, iterations: int = 4, history: int = 2) -> Characteristic:
    """``x0 = scale x0_c(x + (scale - 1) d) + (1 - scale) x0_null(x + scale d)``, with d where the two estimates agree.

    With w = scale - 1 and x1 = x + w d, x2 = x + (1 + w) d, the paper's ``d = sigma (eps_null(x2) - eps_c(x1))`` says
    ``x0_c(x1) = x0_null(x2)``: the paths of both models through these states come from the same clean sample, and so
    does the guided path, since ``(1 + w) x1 - w x2 = x``.  In this form nothing is divided by alpha or sigma.  The
    result is the denoiser of ``p_c^scale p^(1 - scale)`` at every level for Gaussian laws, and for any law if the
    condition is a linear tilt, p_c ~ p e^(b . x) (d = sigma^2 b / alpha); in general the guided density obeys the
    Fokker-Planck equation as far as the laws are locally Gaussian, and that of plain guidance does not.  Where that
    law has separate modes and the two given ones have not, d may have several solutions.  It is found by Anderson
    acceleration of ``d <- d + alpha (x0_c - x0_null)``; after 0 iterations d = 0, plain classifier-free guidance.  For
    Gaussian laws with a guided one alpha (x0_c - x0_null) falls along every change of d.  Where the mixed iterations
    say that it rises they are left out: extrapolated, they lead to where both estimates saturate, and so agree.

    Args:
        denoise, null, scale: as in `classifier_free`.
        iterations: of the fixed point, at least 0.
        history: earlier iterations that are mixed, at least 0 (0: the plain fixed point, which is slow at high noise).

    ``2 (iterations + 1)`` network evaluations, in iterations + 1 batched calls.

    Characteristic Guidance: Non-linear Correction for Diffusion Model at Large Guidance Scale, arXiv:2312.07586.

    Raises ValueError as `classifier_free`, and unless iterations and history are integers of at least 0.
    """
    null = fitting(denoise, null, "characteristic")
    for name, number in (("iterations", iterations), ("history", history)):
        if not isinstance(number, int | np.integer) or number < 0:
            raise ValueError(f"{name} must be an integer of at least 0, got {number!r}.")
    return Characteristic(denoise, null, as_scale("scale", scale), int(iterations), int(history))


@value
class Characteristic:
    denoise: Any
    null: Tree
    scale: Any
    iterations: int = static()
    history: int = static()
    factory = "characteristic"

    def __call__(self, x: Tree, level: Level) -> Tree:
        flat, unflatten = ravel_pytree(x)
        scale = jnp.asarray(scale_at(self.scale, level), flat.dtype)
        conditions = jax.tree.map(lambda a, b: jnp.stack([jnp.asarray(a), b]), self.denoise.condition, self.null)

        def both(shift: Array) -> Array:
            """The two estimates at their states, (2, D)."""
            states = jnp.stack([flat + (scale - 1) * shift, flat + scale * shift])
            call = lambda state, condition: ravel_pytree(
                dataclasses.replace(self.denoise, condition=condition)(unflatten(state), level)
            )[0]
            return jax.vmap(call)(states, conditions)

        shift = jnp.zeros_like(flat)
        estimates = both(shift)
        if self.iterations:
            shift, estimates = self._solved(both, shift, estimates, jnp.asarray(level.alpha, flat.dtype))
        return unflatten(estimates[0] + (scale - 1) * (estimates[0] - estimates[1]))

    def _solved(self, both: Any, shift: Array, estimates: Array, alpha: Array) -> tuple[Array, Array]:
        """Anderson's iteration for ``alpha (x0_c - x0_null) = 0``."""
        depth = min(self.history, self.iterations - 1)
        nothing = jnp.zeros((depth, shift.size), shift.dtype)

        def body(carry: tuple, index: Array) -> tuple:
            shift, estimates, last_shift, last_residual, shifts, residuals = carry
            residual = alpha * (estimates[0] - estimates[1])
            known = index > 0
            if depth:
                push = lambda kept, new: jnp.concatenate([jnp.where(known, new, 0.0)[None], kept[:-1]])
                shifts = push(shifts, shift - last_shift)
                residuals = push(residuals, residual - last_residual)
            weights = _least_squares(residuals, residual) if depth else jnp.zeros((0,), shift.dtype)
            along, change = weights @ shifts, weights @ residuals
            falls = along @ change <= 0  # else what is mixed leads away from the solution: the plain step
            moved = shift + residual - jnp.where(falls, along + change, 0.0)
            return (moved, both(moved), shift, residual, shifts, residuals), None

        start = (shift, estimates, shift, jnp.zeros_like(shift), nothing, nothing)
        end, _ = jax.lax.scan(body, start, jnp.arange(self.iterations))
        return end[0], end[1]

    condition = property(condition_within)
    check = check_within

    def evaluations(self, level: Level) -> Array:
        """Network evaluations of a call at ``level``."""
        return 2 * (self.iterations + 1) * evaluations(self.denoise, level)


def _least_squares(rows: Array, right: Array) -> Array:
    """``argmin |right - weights @ rows|``, with a ridge at round-off."""
    gram = rows @ rows.T
    floor = 8 * jnp.finfo(rows.dtype).eps * jnp.trace(gram) + jnp.finfo(rows.dtype).tiny
    return jnp.linalg.solve(gram + floor * jnp.eye(len(gram), dtype=rows.dtype), rows @ right)
