"""Solvers changed by a measurement: what the published samplers do to the state around a solver's step.

`ddnm` goes around any solver with a Gaussian step (``kernel``), `lanpaint` around any.  `ddrm` is a solver of its own.
Those that follow a gradient are in `diffjax.inverse.gradient_steps`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.inverse.measurement import Measurement
from diffjax.inverse.operators import pseudo_inverse
from diffjax.inverse.systems import needs_spectrum, noise_variance, one_level
from diffjax.levels import Array, Grid, Info, Level, Row, Solver, Tree, root, static, value
from diffjax.solvers.arguments import number

# --- what they forward --------------------------------------------------------------------------------------------


def _inner(name: str, default: Any = None) -> Any:
    """A property that is the inner solver's."""
    return property(lambda self: getattr(self.inner, name) if default is None else getattr(self.inner, name, default))


def _plan(self: Any, grid: Grid) -> Row:
    return self.inner.plan(grid)


def _init(self: Any, x: Tree) -> Tree:
    return self.inner.init(x)


# --- in the basis of the operator ----------------------------------------------------------------------------------


def ddnm(solver: Solver, measurement: Measurement, eta: Array = 0.0) -> NullSpaceStep:
    """DDNM+ around any solver with a kernel: the range of A^T from y, with the noise of y counted as the step's.

    For a singular value d of A, where the step is N(.. + a x0, std^2),

        x0 <- x0 + l (A^+ y - x0),   l = 1 and variance std^2 - (a noise / d)^2     if std >= a noise / d,
                                     l = sqrt(1 - eta^2) std d / (a noise) and variance eta^2 std^2     otherwise,

    so that the noise which y brings into the state and the noise that is added are std^2 together.  Without noise in y
    every estimate measures y.  A deterministic step brings in nothing of a noisy y.  No derivatives; no further calls.

    In the second case that is right of one step alone: the noise of y is the same in all of them.  With eta below 1 it
    adds up, and grows without bound with the number of steps: of data N(0, 1) and a small d, ``ancestral()`` at eta = 0
    brings in 3.3 standard deviations of the data in 24 steps and 7.3 in 96, the same in all draws; at 0.85, the
    authors' value, 1.7 and 3.9.  With eta = 1 such d are left to the prior, as by an operator with a `cutoff`.

    Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model, arXiv:2212.00490, equations 17 to 19.

    Raises ValueError for a solver without ``kernel``, eta outside [0, 1], an operator without a spectrum, noise that
    is not isotropic, and levels per entry.
    """
    needs_spectrum("ddnm", measurement)
    if not hasattr(solver, "kernel"):
        raise ValueError(f"ddnm needs a solver with a Gaussian step (kernel), got {solver!r}.")
    number("eta", eta, 0.0, 1.0)
    return NullSpaceStep(solver, measurement, eta)


@value
class NullSpaceStep:
    inner: Any
    measurement: Any
    eta: Array
    factory = "ddnm"

    order = 0
    weak_order = 0
    embedded = False
    calls = draws = 1
    renoises = _inner("renoises", False)
    init = _init

    def plan(self, grid: Grid) -> Row:
        one_level("ddnm", grid.t)
        return self.inner.plan(grid)

    def step(
        self, noise: tuple[Tree, ...], denoise: Callable[[Tree, Level], Tree], x: Tree, memory: Tree, row: Row
    ) -> tuple[Tree, Tree, Info]:
        x0 = denoise(x, row.t)
        x, memory = self.update(noise, x, x0, memory, row)
        return x, memory, Info(x0)

    def update(self, noise: tuple[Tree, ...], x: Tree, x0: Tree, memory: Tree, row: Row) -> tuple[Tree, Tree]:
        a = self.measurement.operator
        ones, zeros = jax.tree.map(jnp.ones_like, x), jax.tree.map(jnp.zeros_like, x)
        unit, none = (jax.tree.leaves(self.inner.kernel(zeros, given, row)[0])[0] for given in (ones, zeros))
        weight = (unit - none).reshape(-1)[0]
        std = jnp.asarray(self.inner.kernel(zeros, zeros, row)[1]).reshape(-1)[0]
        level = weight**2 * noise_variance(self.measurement, x)

        def split(q: Array) -> tuple[Array, Array]:
            """The weight of the measurement over q = d^2, and the standard deviation of what is added."""
            seen = q > 0
            safe = jnp.where(seen, q, 1.0)
            brought = level / safe
            enough = std**2 >= brought
            share = jnp.where(enough, 1.0, jnp.sqrt(1 - self.eta**2) * std / root(jnp.where(enough, 1.0, brought)))
            left = jnp.where(enough, root(std**2 - brought), self.eta * std)
            return jnp.where(seen, share / safe, 0.0), jnp.where(seen, left, std)

        change = a.spectral(lambda q: split(q)[0].astype(q.dtype), a.adjoint(self.measurement.residual(x0)))
        moved = jax.tree.map(lambda clean, c: (clean + c).astype(clean.dtype), x0, change)
        mean, _ = self.inner.kernel(x, moved, row)
        added = a.spectral(lambda q: split(q)[1].astype(q.dtype), noise[0])
        still = row.t.half_log_snr == row.s.half_log_snr
        after = jax.tree.map(lambda m, z, old: jnp.where(still, old, m + z).astype(old.dtype), mean, added, x)
        return after, memory


def ddrm(measurement: Measurement, eta: Array = 0.85, eta_b: Array = 1.0) -> DDRM:
    """Denoising diffusion restoration models: a solver that steps in the singular basis of the operator.

    With r = sigma_s / alpha_s, ybar = A^+ y, eps the noise estimate and b = noise / d for a singular value d,

        d = 0:   x0 + r (sqrt(1 - eta^2) eps + eta z)
        r < b:   x0 + r (sqrt(1 - eta^2) (ybar - x0) / b + eta z)
        else:    (1 - eta_b) x0 + eta_b ybar + sqrt(r^2 - eta_b^2 b^2) z

    entry by entry of the basis, times alpha_s.  It starts from the prior, without a first step from ybar.  No
    derivatives; one denoiser call and one draw a step.  Where r < b the noise of ybar, which is the same in all steps,
    adds up as it does in `ddnm`: an operator with a `cutoff` near the noise has few such d.

    Denoising Diffusion Restoration Models, arXiv:2201.11793.

    Args:
        measurement: of an operator with a spectrum, noise Gaussian of one standard deviation.
        eta, eta_b: in [0, 1].

    Raises ValueError for other operators or noise, numbers out of range, and levels per entry.
    """
    needs_spectrum("ddrm", measurement)
    number("eta", eta, 0.0, 1.0)
    number("eta_b", eta_b, 0.0, 1.0)
    return DDRM(measurement, eta, eta_b)


@value
class DDRM:
    measurement: Any
    eta: Array
    eta_b: Array
    factory = "ddrm"

    order = 0
    weak_order = 0
    calls = draws = 1
    embedded = False

    def plan(self, grid: Grid) -> Row:
        one_level("ddrm", grid.t)
        return Row(grid.t, grid.s, ())

    def init(self, x: Tree) -> Tree:
        return ()

    def step(
        self, noise: tuple[Tree, ...], denoise: Callable[[Tree, Level], Tree], x: Tree, memory: Tree, row: Row
    ) -> tuple[Tree, Tree, Info]:
        x0 = denoise(x, row.t)
        x, memory = self.update(noise, x, x0, memory, row)
        return x, memory, Info(x0)

    def update(self, noise: tuple[Tree, ...], x: Tree, x0: Tree, memory: Tree, row: Row) -> tuple[Tree, Tree]:
        a, t, s = self.measurement.operator, row.t, row.s
        variance = noise_variance(self.measurement, x)
        ratio = s.sigma / s.alpha
        clean = t.sigma == 0
        eps = jax.tree.map(lambda leaf, e: (leaf - t.alpha * e) / jnp.where(clean, 1.0, t.sigma), x, x0)
        gap = jax.tree.map(
            jnp.subtract, pseudo_inverse(a, self.measurement.observed(x)), _in_range(self.measurement, x0)
        )
        kept = jnp.sqrt(1 - self.eta**2)

        def parts(q: Array) -> tuple[Array, Array, Array]:
            """The weights of eps, of ybar - x0 and of z, over q = d^2."""
            seen = q > 0
            b2 = variance / jnp.where(seen, q, 1.0)
            below = ratio**2 < b2
            first = kept * ratio / root(jnp.where(below, b2, 1.0))
            pulled = jnp.where(below, first, self.eta_b)
            drawn = jnp.where(below, self.eta * ratio, root(ratio**2 - self.eta_b**2 * b2))
            return (
                jnp.where(seen, 0.0, kept * ratio),
                jnp.where(seen, pulled, 0.0),
                jnp.where(seen, drawn, self.eta * ratio),
            )

        terms = (eps, gap, noise[0])
        moves = [a.spectral(lambda q, k=k: parts(q)[k].astype(q.dtype), term) for k, term in enumerate(terms)]
        still = t.half_log_snr == s.half_log_snr

        def leaf(old: Array, clean: Array, *moved: Array) -> Array:
            return jnp.where(still, old, s.alpha * (clean + sum(moved))).astype(old.dtype)

        return jax.tree.map(leaf, x, x0, *moves), memory


# --- Langevin dynamics inside a step --------------------------------------------------------------------------------


def lanpaint(
    solver: Solver,
    measurement: Measurement,
    inner: int = 5,
    strength: Array = 1.0,
    friction: float = 2.0,
    size: float = 0.3,
) -> LanPaint:
    """Before each step, ``inner`` underdamped Langevin steps at its level, towards the law of what is hidden.

    The drift is -(x - c) / sigma^2 with c = alpha x0 for what is hidden, and for what is measured

        c = alpha ((1 + strength) A^+ y - strength x0):   -(1 + strength) (x - alpha A^+ y) + strength (x - alpha x0),

    which lets the measured part hear of the rest.  With x0 held, a step of the Langevin dynamics in u = x / sigma,
    ``du = v, dv = -(u - c / sigma) - friction v + sqrt(2 friction) dW``, is a harmonic oscillator's and made exactly,
    of length ``size``.  Then the solver's step is made with A^+ y for the measured part of x0.  No derivatives.  The
    noise of y is not modelled.  ``inner`` further denoiser calls, 2 inner + 1 further draws a step.

    Differs from the authors' code: that replaces the measured part by noised data first (here it keeps the noise that
    the solver gave it), holds ``strength (x - alpha x0)`` in a step, not x0 alone, carries the velocity over and
    corrects it by the change of the drift, has one more scale for the measured part's step, and other default numbers.

    LanPaint: Training-Free Diffusion Inpainting with Asymptotically Exact and Fast Conditional Sampling,
    arXiv:2502.03491.

    Args:
        measurement: of an operator with a spectrum (a mask: inpainting).
        inner: at least 0; strength: lambda, at least 0; friction and size: above 0, in units of sigma.

    Raises ValueError for an operator without a spectrum and numbers out of range.
    """
    if not isinstance(measurement, Measurement) or not hasattr(measurement.operator, "spectral"):
        raise ValueError(f"lanpaint needs a measurement of an operator with a spectrum, got {measurement!r}.")
    if not isinstance(inner, int) or inner < 0:
        raise ValueError(f"inner must be an integer of at least 0, got {inner!r}.")
    number("strength", strength)
    number("friction", friction, 1e-6)
    number("size", size, 1e-9)
    return LanPaint(solver, measurement, strength, *oscillator(friction, size), inner)


def oscillator(friction: float, size: float) -> tuple[np.ndarray, np.ndarray]:
    """``(E, L)``: the step ``(u, v) <- E (u, v) + L z`` of ``du = v, dv = -u - friction v + sqrt(2 friction) dW``.

    E = exp(B size) and L L^T = I - E E^T, since the stationary law is standard normal.
    """
    drift = np.array([[0.0, 1.0], [-1.0, -friction]])
    power, exponential = np.eye(2), np.eye(2)
    scale = 2.0 ** -max(0, int(np.ceil(np.log2(size * (1 + friction)))) + 4)
    for k in range(1, 12):  # Taylor on a short step, then squaring
        power = power @ (drift * size * scale) / k
        exponential = exponential + power
    for _ in range(round(-np.log2(scale))):
        exponential = exponential @ exponential
    rest = np.eye(2) - exponential @ exponential.T
    first = np.sqrt(max(rest[0, 0], 0.0))
    second = rest[1, 0] / first if first > 0 else 0.0
    return exponential, np.array([[first, 0.0], [second, np.sqrt(max(rest[1, 1] - second**2, 0.0))]])


@value
class LanPaint:
    inner: Any
    measurement: Any
    strength: Array
    move: Array  # (2, 2)
    spread: Array  # (2, 2)
    count: int = static()
    factory = "lanpaint"

    order = 0
    weak_order = 0
    embedded = False
    renoises = _inner("renoises", False)
    init = _init

    def plan(self, grid: Grid) -> Row:
        one_level("lanpaint", grid.t, self.measurement.operator)
        return self.inner.plan(grid)

    @property
    def calls(self) -> int:
        return self.inner.calls + self.count

    @property
    def draws(self) -> int:
        return self.inner.draws + (2 * self.count + 1 if self.count else 0)

    def step(
        self, noise: tuple[Tree, ...], denoise: Callable[[Tree, Level], Tree], x: Tree, memory: Tree, row: Row
    ) -> tuple[Tree, Tree, Info]:
        level, used = row.t, (2 * self.count + 1 if self.count else 0)
        known = pseudo_inverse(self.measurement.operator, self.measurement.observed(x))
        still = (level.sigma == 0) | (level.half_log_snr == row.s.half_log_snr)
        scale = jnp.where(still, 1.0, level.sigma)
        (e, f), (g, h) = (jnp.asarray(line) for line in self.move)
        (p, _), (q, r) = (jnp.asarray(line) for line in self.spread)
        v = noise[0] if self.count else None
        for k in range(self.count):
            x0 = denoise(x, level)
            away = _in_range(self.measurement, jax.tree.map(jnp.subtract, known, x0))
            centre = jax.tree.map(lambda a, b: level.alpha * (a + (1 + self.strength) * b) / scale, x0, away)
            u = jax.tree.map(lambda leaf, c: leaf / scale - c, x, centre)
            z, w = noise[2 * k + 1], noise[2 * k + 2]
            u, v = (
                jax.tree.map(lambda a, b, z: e * a + f * b + p * z, u, v, z),
                jax.tree.map(lambda a, b, z, w: g * a + h * b + q * z + r * w, u, v, z, w),
            )
            moved = jax.tree.map(lambda a, c: scale * (a + c), u, centre)
            x = jax.tree.map(lambda new, old: jnp.where(still, old, new).astype(old.dtype), moved, x)

        def filled(x: Tree, level: Level) -> Tree:
            x0 = denoise(x, level)
            away = _in_range(self.measurement, jax.tree.map(jnp.subtract, known, x0))
            return jax.tree.map(lambda a, b: (a + b).astype(a.dtype), x0, away)

        return self.inner.step(noise[used:], filled, x, memory, row)


# --- shared ---------------------------------------------------------------------------------------------------------


def _in_range(measurement: Measurement, x: Tree) -> Tree:
    """``A^+ A x``."""
    return measurement.operator.spectral(lambda q: jnp.where(q > 0, 1.0, 0.0).astype(q.dtype), x)
