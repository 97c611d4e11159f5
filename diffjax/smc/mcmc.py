"""Markov chain Monte Carlo kernels for unnormalised densities of any tree: values ``(key, x, density) -> Moved``.

``density(x) -> (log p, grad log p)``, up to a constant.  Unadjusted kernels read the gradient only, so that a sum of
scores without an energy will do; adjusted ones leave p exactly invariant, whatever their step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax.levels import Array, Tree, dot, static, value
from diffjax.samplers.sequential import normal_noise
from diffjax.samplers.shared import select
from diffjax.solvers.arguments import integer, number


class Moved(NamedTuple):
    """The next state and the probability with which its proposal was accepted."""

    x: Tree
    acceptance: Array


def ula(step: Array = 0.1) -> Langevin:
    """Unadjusted Langevin: ``x <- x + h grad log p + sqrt(2 h) z``.  One gradient; biased by O(h)."""
    number("step", step)
    return Langevin(step, False)


def mala(step: Array = 0.1) -> Langevin:
    """Metropolis-adjusted Langevin: a step of `ula`, accepted with ``p(x') q(x | x') / (p(x) q(x' | x))``.

    ``log q(x' | x) = -|x' - x - h grad log p(x)|^2 / (4 h)``.  Two gradients.
    """
    number("step", step)
    return Langevin(step, True)


def uhmc(step: Array = 0.3, leaps: int = 5) -> Hamiltonian:
    """Unadjusted Hamiltonian Monte Carlo: ``leaps`` leapfrog steps of size ``step`` from a fresh momentum.

    ``leaps + 1`` gradients; biased by O(step^2).
    """
    return _hamiltonian(step, leaps, False)


def hmc(step: Array = 0.3, leaps: int = 5) -> Hamiltonian:
    """Hamiltonian Monte Carlo: `uhmc`, accepted with ``exp(H(x, v) - H(x', v'))``, ``H = |v|^2 / 2 - log p``."""
    return _hamiltonian(step, leaps, True)


def _hamiltonian(step: Array, leaps: int, adjusted: bool) -> Hamiltonian:
    number("step", step)
    integer("leaps", leaps, 1, 10**6)
    return Hamiltonian(step, leaps, adjusted)


def _settled(key: Array, adjusted: bool, log_ratio: Array, new: Tree, old: Tree) -> Moved:
    if not adjusted:
        return Moved(new, jnp.ones_like(log_ratio))
    # a ratio that is not a number is a rejection
    usable = jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio)
    accepted = jnp.log(jax.random.uniform(key, (), log_ratio.dtype)) < usable
    return Moved(select(accepted, new, old), jnp.exp(jnp.minimum(usable, 0.0)))


@value
class Langevin:
    step: Array
    adjusted: bool = static()

    def __repr__(self) -> str:
        return f"{'mala' if self.adjusted else 'ula'}(step={self.step})"

    @property
    def gradients(self) -> int:
        """Evaluations of the density a move."""
        return 2 if self.adjusted else 1

    def scaled(self, variance: Array) -> Langevin:
        """For a density of that scale: h is in units of a variance."""
        return Langevin(self.step * variance, self.adjusted)

    def __call__(self, key: Array, x: Tree, density: Callable[[Tree], tuple[Array, Tree]]) -> Moved:
        h = self.step
        noise_key, coin = jax.random.split(key)
        (z,) = normal_noise(noise_key, jnp.zeros((), jnp.int32), x, 1)
        here, slope = density(x)
        move = lambda leaf, g, z: (leaf + h * g + jnp.sqrt(2 * h) * z).astype(leaf.dtype)
        new = jax.tree.map(move, x, slope, z)
        if not self.adjusted:
            return _settled(coin, False, here, new, x)
        there, back = density(new)
        missed = jax.tree.map(lambda old, new, g: old - new - h * g, x, new, back)
        # the way there has |x' - x - h g|^2 = 2 h |z|^2
        return _settled(coin, True, there - here - dot(missed, missed) / (4 * h) + 0.5 * dot(z, z), new, x)


@value
class Hamiltonian:
    step: Array
    leaps: int = static()
    adjusted: bool = static()

    def __repr__(self) -> str:
        return f"{'hmc' if self.adjusted else 'uhmc'}(step={self.step}, leaps={self.leaps})"

    @property
    def gradients(self) -> int:
        """Evaluations of the density a move."""
        return self.leaps + 1

    def scaled(self, variance: Array) -> Hamiltonian:
        """For a density of that scale: the step is in units of a standard deviation."""
        return Hamiltonian(self.step * jnp.sqrt(variance), self.leaps, self.adjusted)

    def __call__(self, key: Array, x: Tree, density: Callable[[Tree], tuple[Array, Tree]]) -> Moved:
        e = self.step
        noise_key, coin = jax.random.split(key)
        (momentum,) = normal_noise(noise_key, jnp.zeros((), jnp.int32), x, 1)
        add = lambda a, b, weight: jax.tree.map(lambda u, v: (u + weight * v).astype(u.dtype), a, b)
        here, slope = density(x)

        def leap(state: tuple, _: None) -> tuple[tuple, None]:
            x, v, slope, _ = state
            v = add(v, slope, 0.5 * e)
            x = add(x, v, e)
            there, slope = density(x)
            return (x, add(v, slope, 0.5 * e), slope, there), None

        (new, v, _, there), _ = jax.lax.scan(leap, (x, momentum, slope, here), None, length=self.leaps)
        ratio = there - here + 0.5 * dot(momentum, momentum) - 0.5 * dot(v, v)
        return _settled(coin, self.adjusted, ratio, new, x)


def pcnl(step: Array = 0.5) -> Crank:
    """Preconditioned Crank-Nicolson Langevin, for a density ``N(0, s^2 I) e^{f(x)}``.

    ``x' = rho x + sqrt(1 - rho^2) s (z + sqrt(h) / 2 s grad f)``, rho = (1 - h/4) / (1 + h/4), accepted by the
    ratio of the target and the proposal; for f = 0 it is reversible by itself and always accepted, in any dimension.
    Called as ``(key, x, f, s)`` with ``f(x) -> (value, gradient)``.  Two gradients.

    Ψ-Sampler: Initial Particle Sampling for SMC-Based Inference-Time Reward Alignment in Score
    Models, arXiv:2506.01320, equation 13.

    Raises ValueError unless 0 < step <= 4.
    """
    number("step", step, 1e-9, 4.0)
    return Crank(step)


@value
class Crank:
    step: Array
    factory = "pcnl"
    gradients = 2

    def __call__(self, key: Array, x: Tree, tilt: Callable[[Tree], tuple[Array, Tree]], scale: Array = 1.0) -> Moved:
        h, s = self.step, scale
        rho = (1 - h / 4) / (1 + h / 4)
        rest = jnp.sqrt(1 - rho**2)
        noise_key, coin = jax.random.split(key)
        (z,) = normal_noise(noise_key, jnp.zeros((), jnp.int32), x, 1)
        here, slope = tilt(x)
        pull = 0.5 * jnp.sqrt(h) * s
        step = lambda leaf, g, z: (rho * leaf + rest * s * (z + pull * g)).astype(leaf.dtype)
        new = jax.tree.map(step, x, slope, z)
        there, back = tilt(new)
        # the noise that leads back; the prior's part of both laws cancels but for |z|^2 (s = 1)
        undone = jax.tree.map(lambda old, new, g: (old - rho * new) / (rest * s) - pull * g, x, new, back)
        prior = 0.5 * (dot(x, x) - dot(new, new)) / s**2
        return _settled(coin, True, there - here + prior + 0.5 * (dot(z, z) - dot(undone, undone)), new, x)
