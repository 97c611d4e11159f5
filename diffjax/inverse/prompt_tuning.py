"""P2L: a latent posterior whose condition is fitted to the measurement on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.corrections.transform import check_within, condition_within, evaluations
from diffjax.guidance.conditions import conditioned
from diffjax.guidance.schedules import as_scale, scale_at
from diffjax.guidance.tilted import shifted_estimate, twist_gradient
from diffjax.inverse.measurement import Measurement
from diffjax.inverse.systems import misfit, needs_linear, proximal
from diffjax.inverse.variational import adam
from diffjax.levels import Array, Level, Tree, as_value, remembers, static, value
from diffjax.solvers.arguments import integer, number


class Tuning(NamedTuple):
    """What `p2l` remembers."""

    condition: Tree
    calls: Array  # of the denoiser so far, in ()


def p2l(
    denoise: Any,
    measurement: Any,
    *,
    decode: Callable[[Tree], Tree] = lambda z: z,
    encode: Callable[[Tree], Tree] = lambda x: x,
    iterations: int = 3,
    optimiser: Any = None,
    twist: Any = None,
    scale: Any = 1.0,
    every: int = 3,
    variance: Array = 1.0,
) -> PromptTuned:
    """Prompt tuning: a latent denoiser D(z, level; c) whose condition c is fitted to y = A decode(z_0) + noise.

    At every call

        c  <- a few steps of an optimiser on |y - A decode(D(z, level; c))|^2 / 2, from the last call's c
        z0 <- D(z, level; c)
        z0 <- encode(argmin_x |y - A x|^2_S / 2 + |x - decode(z0)|^2 / (2 variance)), at some calls
        z0 <- z0 + scale sigma^2 / alpha grad_z log h(z, level; c)

    The first line fits the condition, at high noise by maximum likelihood; nothing holds it to likely conditions, so
    few and small steps are part of the method.  The third keeps latents in the range of the encoder.  The last is
    `tilted` with c held constant (the paper moves the state instead, by a fixed multiple of the gradient of a norm,
    which only its own step length can say).  The optimiser starts afresh at every call.

    Args:
        denoise: of latents, with a condition of floating numbers (as `Prediction.decode` makes it) to start from.
        measurement: of what ``decode`` gives.
        decode, encode: the autoencoder, of one sample; by default the denoiser's own space.
        iterations: of the optimiser a call, at least 0; 0 leaves the condition as it is.
        optimiser: as `red_diff`'s (optax has them); default ``adam(0.01)``, for conditions of size 1.
        twist: of latents, for data consistency; default ``p(y | decode(z0))`` (`likelihood`).
        scale: of the last line, a number or a function of the level; 0 leaves it out.
        every: calls from one projection to the next, the first at the call of that number; 0: never.  Linear operators.
        variance: by which x may be off the decoded estimate, above 0; the paper's lambda is the noise's variance over
            it.

    Returns a denoiser that remembers its condition (`Tuning`); ``tune(x, level, condition)`` is the first line alone.
    Evaluations: ``iterations + 1`` of the denoiser's a call.

    Prompt-tuning latent diffusion models for inverse problems, arXiv:2310.01110.

    Raises ValueError for a denoiser that remembers or has no condition, and numbers out of range.
    """
    if remembers(denoise):
        raise ValueError(f"p2l cannot wrap a denoiser that remembers, got {denoise!r}.")
    if not isinstance(measurement, Measurement):
        raise ValueError(f"p2l needs a measurement (see diffjax.inverse.measurement), got {measurement!r}.")
    conditioned(denoise, None)
    integer("iterations", iterations, 0, 10**6)
    integer("every", every, 0, 10**6)
    number("variance", variance, 1e-12)
    if every:
        needs_linear("p2l's projection (every above 0)", measurement)
    decode, encode = as_value(decode), as_value(encode)
    seen = Decoded(measurement, decode)
    twist = DecodedLikelihood(seen) if twist is None else as_value(twist)
    optimiser = adam(0.01) if optimiser is None else optimiser
    if isinstance(optimiser, tuple):  # optax's, of plain functions
        optimiser = Optimiser(*optimiser)
    return PromptTuned(denoise, seen, encode, optimiser, twist, as_scale("scale", scale), variance, iterations, every)


@value
class Optimiser:
    """A pair of plain functions as a value."""

    init: Callable = static()
    update: Callable = static()


@value
class Decoded:
    """A measurement seen from the latents."""

    measurement: Any
    decode: Any

    def misfit(self, z0: Tree) -> Array:
        return misfit(self.measurement, self.decode(z0))


@value
class DecodedLikelihood:
    """The twist ``log p(y | decode(z0))``."""

    seen: Any

    def __call__(self, denoise: Any, x: Tree, level: Level) -> tuple[Array, Tree]:
        z0 = denoise(x, level)
        return self.seen.measurement.log_likelihood(self.seen.decode(z0)), z0


@value
class PromptTuned:
    denoise: Any
    seen: Any
    encode: Any
    optimiser: Any
    twist: Any
    scale: Any
    variance: Array
    iterations: int = static()
    every: int = static()
    factory = "p2l"

    condition = property(condition_within)
    check = check_within

    def init(self, x: Tree) -> Tuning:
        return Tuning(jax.tree.map(jnp.asarray, _inner_condition(self.denoise)), jnp.zeros((), jnp.int32))

    def apply(self, x: Tree, level: Level, memory: Tuning) -> tuple[Tree, Tuning]:
        tuned, calls = self.tune(x, level, memory.condition), memory.calls + 1
        _, z0, gradient = twist_gradient(conditioned(self.denoise, tuned), self.twist, x, level)
        if self.every:
            z0 = jax.lax.cond(calls % self.every == 0, self.project, lambda z0: z0, z0)
        return shifted_estimate(z0, gradient, level, scale_at(self.scale, level)), Tuning(tuned, calls)

    def tune(self, x: Tree, level: Level, condition: Tree) -> Tree:
        """The condition after ``iterations`` steps of the optimiser at a state."""

        def body(carry: tuple, _: None) -> tuple:
            condition, state = carry
            gradient = jax.grad(lambda c: 0.5 * self.seen.misfit(conditioned(self.denoise, c)(x, level)) ** 2)(
                condition
            )
            change, state = self.optimiser.update(gradient, state, condition)
            moved = jax.tree.map(lambda c, step: (c + step).astype(c.dtype), condition, change)
            return (moved, state), None

        start = condition, self.optimiser.init(condition)
        return jax.lax.scan(body, start, None, length=self.iterations)[0][0]

    def project(self, z0: Tree) -> Tree:
        """``encode(argmin_x ...)``: the second line."""
        found = self.encode(proximal(self.seen.measurement, self.seen.decode(z0), self.variance))
        return jax.tree.map(lambda new, old: new.astype(old.dtype), found, z0)

    def evaluations(self, level: Level) -> Array:
        return (self.iterations + 1) * evaluations(self.denoise, level)


def _inner_condition(denoise: Any) -> Tree:
    """The condition that `conditioned` replaces."""
    return denoise.condition if "condition" in vars(denoise) else _inner_condition(denoise.denoise)
