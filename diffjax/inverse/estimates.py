"""Clean estimates made consistent with a measurement: denoiser -> denoiser, without derivatives of the network.

They work with every process, solver and grid.  None draws from the posterior: what they change is the mean of each
step, as if the rest of the estimate did not depend on what was measured.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffjax.corrections.transform import Plain, Remembering, check_within, condition_within, evaluations, transformed
from diffjax.inverse.measurement import Measurement
from diffjax.inverse.operators import pseudo_inverse
from diffjax.inverse.systems import (
    level_key,
    needs_linear,
    needs_spectrum,
    noise_variance,
    normal_like,
    one_level,
    proximal,
)
from diffjax.levels import Array, Level, Tree, as_value, remembers, static, value
from diffjax.solvers.arguments import number


def null_space(denoise: Any, measurement: Measurement) -> Plain | Remembering:
    """``x0 <- x0 + k A^+ (y - A x0)``: the range of A^T from y, its null space from the model.

    ``k = min(1, sigma / (alpha std))`` for noise of standard deviation std.  Without noise k = 1 and every estimate
    measures y exactly.  The paper's k compares with the step's own noise and weight of x0, and takes the noise of y out
    of the step: that is `ddnm`, for solvers with a kernel; here the level stands for the step.  A^+ by the operator's
    spectrum.  No further denoiser calls.

    Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model, arXiv:2212.00490, equations 13 and 17.

    Raises ValueError for an operator without a spectrum or noise that is not isotropic.
    """
    needs_spectrum("null_space", measurement)
    return transformed(denoise, NullSpace(measurement))


@value
class NullSpace:
    measurement: Any
    factory = "null_space"

    def __call__(self, x: Tree, x0: Tree, level: Level) -> Tree:
        seen = self.measurement
        std = jnp.sqrt(noise_variance(seen, x0))
        noise = level.alpha * std
        damped = jnp.where(level.sigma < noise, level.sigma / jnp.where(noise > 0, noise, 1.0), 1.0)
        change = pseudo_inverse(seen.operator, seen.residual(x0))
        return jax.tree.map(lambda clean, c: (clean + damped * c).astype(clean.dtype), x0, change)


def diffpir(denoise: Any, measurement: Measurement, strength: Array = 8.0, iterations: int = 50) -> Plain | Remembering:
    """``x0 <- argmin_z |y - A z|^2_S / 2 + strength |z - x0|^2 / (2 (sigma / alpha)^2)``: a proximal step.

    That is the posterior mean if x_0 given x_t were N(x0, (sigma / alpha)^2 / strength).  With ``flow_cps(eta)`` as
    the solver, which renews a share of the noise, it is DiffPIR: their zeta is ``sin(eta pi / 2)^2``.  No further
    denoiser calls; exact through the operator's spectrum, else by conjugate gradients.

    Denoising Diffusion Models for Plug-and-Play Image Restoration, arXiv:2305.08995.

    Args:
        measurement: of a linear operator.
        strength: lambda, above 0; theirs is 1 to 25.

    Raises ValueError for a nonlinear operator or a strength that is not above 0.
    """
    needs_linear("diffpir", measurement)
    number("strength", strength, 1e-12)
    return transformed(denoise, Proximal(measurement, strength, iterations))


@value
class Proximal:
    measurement: Any
    strength: Array
    iterations: int = static()
    factory = "diffpir"

    def __call__(self, x: Tree, x0: Tree, level: Level) -> Tree:
        inside = jnp.asarray(level.alpha) > 0
        # at alpha = 0 nothing holds the estimate: a large variance, which leaves the null space alone
        ratio = jnp.where(inside, level.sigma / jnp.where(inside, level.alpha, 1.0), 1e3)
        moved = proximal(self.measurement, x0, ratio**2 / self.strength, self.iterations)
        clean = jnp.asarray(level.sigma) == 0
        return jax.tree.map(lambda new, old: jnp.where(clean, old, new), moved, x0)


def replacement(denoise: Any, measurement: Measurement, key: Array) -> Replaced:
    """The measured part of the state replaced by noised data, ``P x <- alpha A^+ y + sigma P z``, P = A^+ A.

    and that of the estimate by A^+ y.  Inpainting by replacement; on a `diffjax.grids.time_travel` grid, with an
    ancestral solver, it is RePaint.  The draws are fixed by the key and the level.  Not the conditional law even for an
    exact denoiser, since the rest of the state never hears of the noise in front of it again; time travel lets it.
    The noise of y is not modelled: what was measured is kept as it is.  No further denoiser calls.

    RePaint: Inpainting using Denoising Diffusion Probabilistic Models, arXiv:2201.09865, algorithm 1.

    Raises ValueError for a denoiser that remembers, or an operator without a spectrum.
    """
    needs_linear("replacement", measurement)
    if not hasattr(measurement.operator, "spectral"):
        raise ValueError(f"replacement needs an operator with a spectrum, got {measurement.operator!r}.")
    return Replaced(_plain("replacement", denoise), Range(measurement.operator), measurement, key)


def ilvr(denoise: Any, operator: Any, reference: Tree, key: Array) -> Replaced:
    """Iterative latent variable refinement: ``x <- x + phi(alpha reference + sigma z) - phi(x)`` before every call.

    and ``x0 <- x0 + phi(reference) - phi(x0)`` after it, with phi = A^+ A of the operator (`downsample`, or a low-pass
    `blur`): samples share the low frequencies of the reference and nothing else.  The draws are fixed by the key and
    the level.  No further denoiser calls.

    ILVR: Conditioning Method for Denoising Diffusion Probabilistic Models, arXiv:2108.02938.

    Raises ValueError for a denoiser that remembers, or an operator without a spectrum.
    """
    if not hasattr(operator, "spectral"):
        raise ValueError(f"ilvr needs an operator with a spectrum, got {operator!r}.")
    seen = Measurement(operator, operator(reference), None)
    return Replaced(_plain("ilvr", denoise), Range(operator), seen, key)


@value
class Range:
    """The projection A^+ A."""

    operator: Any

    def __call__(self, x: Tree) -> Tree:
        return self.operator.spectral(lambda q: jnp.where(q > 0, 1.0, 0.0).astype(q.dtype), x)


@value
class Replaced:
    denoise: Any
    project: Any
    measurement: Any
    key: Array
    factory = "replacement"

    def __call__(self, x: Tree, level: Level) -> Tree:
        seen = self.measurement
        y = jax.tree.map(lambda leaf, like: jnp.asarray(leaf, jnp.result_type(*jax.tree.leaves(x))), seen.y, seen.y)
        known = pseudo_inverse(seen.operator, y)
        z = normal_like(level_key(self.key, level), x)
        noised = jax.tree.map(lambda clean, z: level.alpha * clean + level.sigma * z, known, z)
        x = jax.tree.map(lambda leaf, change: (leaf + change).astype(leaf.dtype), x, self._difference(noised, x))
        x0 = self.denoise(x, level)
        return jax.tree.map(lambda leaf, change: (leaf + change).astype(leaf.dtype), x0, self._difference(known, x0))

    def _difference(self, new: Tree, old: Tree) -> Tree:
        return self.project(jax.tree.map(jnp.subtract, new, old))

    condition = property(condition_within)

    def check(self, t: Level) -> None:
        one_level("replacement", t, self.measurement.operator)
        check_within(self, t)

    def evaluations(self, level: Level) -> Array:
        return evaluations(self.denoise, level)


def _plain(name: str, denoise: Any) -> Any:
    if remembers(denoise):
        raise ValueError(f"{name} cannot wrap a denoiser that remembers, got {denoise!r}.")
    return as_value(denoise)
