"""Targets made of diffused densities: ``prod_i q_i(y)^{w_i} e^{beta r(y)}`` at every noise level, y = x / alpha.

A target's score is a sum of the models' scores, but the target is not what the forward process makes of its own clean
density: followed alone, that score leads elsewhere.  `diffjax.smc.weighted_sde` follows it and weights what comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, Level, Tree, as_value, dot, is_traced, remembers, static, value
from diffjax.smc.rates import divergence, product_rate, tilt_rate
from diffjax.solvers.arguments import integer, number, number_or_function


def annealed(denoise: Any, gamma: Array) -> Target:
    """``q^gamma``: above 1 colder, below 1 hotter.  One denoiser call a row.

    Feynman-Kac Correctors in Diffusion: Annealing, Guidance, and Product of Experts, arXiv:2503.02819,
    proposition 3.2.

    Raises ValueError unless gamma > 0.
    """
    number("gamma", gamma, 1e-6)
    return target((denoise,), (gamma,))


def guided(conditional: Any, unconditional: Any, scale: Array) -> Target:
    """``q(. | c)^scale q^(1 - scale)``, what classifier-free guidance means to sample.  Two denoiser calls a row.

    Scale 1 is the conditional model.  The drift is that of `diffjax.guidance.classifier_free`.

    Feynman-Kac Correctors in Diffusion: Annealing, Guidance, and Product of Experts, arXiv:2503.02819,
    proposition 3.1.

    Raises ValueError unless scale is finite.
    """
    number("scale", scale, -1e6, 1e6)
    return target((conditional, unconditional), (scale, 1 - scale))


def product(*denoisers: Any) -> Target:
    """``q_1 q_2 ..``: a product of experts.  As many denoiser calls a row.

    Feynman-Kac Correctors in Diffusion: Annealing, Guidance, and Product of Experts, arXiv:2503.02819,
    proposition 3.3.
    """
    return target(denoisers, (1.0,) * len(denoisers))


def tilted(
    denoise: Any, reward: Callable[[Tree], Array], strength: Any = 1.0, guidance: Array = 1.0, probes: int = 0
) -> Target:
    """``q e^{beta r(y)}``: the reward of the noisy state as if it were clean, with the strength beta of the level.

    Args:
        denoise: the model.
        reward: ``y -> number``, twice differentiable where guidance is not 1.
        strength: beta, a number or a function of the level, 1 at sigma = 0 for the target q e^r.
        guidance: 1: the drift has half of ``beta grad r`` and the weights need no Laplacian; 0: all of it.
        probes: of Hutchinson's estimate of the Laplacian; 0 is exact.

    With a log-likelihood, strength 1 and guidance 0 this is AFDPS, Solving Inverse Problems via Diffusion-Based
    Priors: An Approximation-Free Ensemble Sampling Approach, arXiv:2506.03979; with half guidance and a strength that
    grows from 0, Feynman-Kac Correctors in Diffusion: Annealing, Guidance, and Product of Experts, arXiv:2503.02819,
    proposition 3.4.

    Raises ValueError unless 0 <= guidance <= 1.
    """
    return target((denoise,), (1.0,), reward, strength, guidance, probes)


def posterior(denoise: Any, log_likelihood: Callable[[Tree], Array], probes: int = 0) -> Target:
    """``q(y) p(measurement | y)`` at every level, with full guidance.  One denoiser call a row.

    The drift is ``s + grad log p``, the weights ``(|grad mu|^2 - laplacian mu) / 2 - <s, grad mu>`` a unit of -u, with
    mu = -log p.

    Solving Inverse Problems via Diffusion-Based Priors: An Approximation-Free Ensemble Sampling Approach,
    arXiv:2506.03979; weights derived here, as `diffjax.smc.rates` says.
    """
    return tilted(denoise, log_likelihood, 1.0, 0.0, probes)


def target(
    denoisers: tuple,
    weights: tuple,
    reward: Any = None,
    strength: Any = 1.0,
    guidance: Array = 1.0,
    probes: int = 0,
) -> Target:
    """The general ``prod_i q_i^{w_i} e^{beta r}``; see `tilted` for the arguments of the reward.

    Raises ValueError unless there is a weight a denoiser, the weights' sum is above 0 (else the target has no start),
    and the denoisers have no memory.
    """
    if len(denoisers) != len(weights) or not denoisers:
        raise ValueError(f"weights must be one for each denoiser, got {weights!r} for {len(denoisers)}.")
    if any(remembers(d) or not callable(d) for d in denoisers):
        raise ValueError(f"denoisers must be callable and without memory, got {denoisers!r}.")
    if not is_traced(weights) and not sum(weights) > 0:
        raise ValueError(f"weights must have a sum above 0, got {weights!r}.")
    if reward is not None and not callable(reward):
        raise ValueError(f"reward must be callable, got {reward!r}.")
    number("guidance", guidance, 0.0, 1.0)
    integer("probes", probes, 0, 10**6)
    half = not is_traced(guidance) and bool(np.all(guidance == 1))
    strength = number_or_function("strength", strength, -1e6, 1e6)
    models = tuple(map(as_value, denoisers))
    return Target(models, tuple(weights), as_value(reward), strength, guidance, probes, half)


class Local(NamedTuple):
    """A target at one state, scaled so that it is finite at both ends: ``rho^2 g``, ``rho S`` and ``rho c``."""

    rate: Array
    reward: Array
    score: Tree
    drift: Tree  # rho c


@value
class Target:
    denoisers: tuple
    weights: tuple
    reward: Any
    strength: Any
    guidance: Array
    probes: int = static()
    half: bool = static()
    factory = "target"

    def estimates(self, y: Tree, level: Level) -> tuple[Tree, ...]:
        """The models' clean estimates at ``y = x / alpha``."""
        x = jax.tree.map(lambda leaf: level.alpha * leaf, y)
        return tuple(denoise(x, level) for denoise in self.denoisers)

    def scaled(self, y: Tree, level: Level) -> tuple[Tree, ...]:
        """``rho s_i = (x0_i - y) / rho`` of the models."""
        rho = level.sigma / level.alpha
        difference = lambda clean, leaf: (clean - leaf) / rho
        return tuple(jax.tree.map(difference, clean, y) for clean in self.estimates(y, level))

    def __call__(self, y: Tree, level: Level, key: Array) -> Local:
        rho = level.sigma / level.alpha
        scores = self.scaled(y, level)
        score = jax.tree.map(lambda *parts: sum(w * s for w, s in zip(self.weights, parts, strict=True)), *scores)
        rate = product_rate(self.weights, scores)
        if self.reward is None:
            nothing = jnp.zeros((), rate.dtype)
            return Local(rate, nothing, score, jax.tree.map(jnp.zeros_like, score))
        beta = self.strength(level)
        found, gradient = jax.value_and_grad(self.reward)(y)
        slope = jax.tree.map(lambda g: rho * beta * g, gradient)
        curvature = None
        if not self.half:
            curvature = rho**2 * beta * divergence(jax.grad(self.reward), y, *self.probing(key))
        rate = rate + tilt_rate(slope, curvature, score, self.guidance)
        drift = jax.tree.map(lambda b: -0.5 * self.guidance * b, slope)
        return Local(rate, found, jax.tree.map(jnp.add, score, slope), drift)

    def probing(self, key: Array) -> tuple:
        """What `divergence` is to be called with."""
        return (key, self.probes) if self.probes else ()

    def check(self, t: Level) -> None:
        for denoise in self.denoisers:
            if hasattr(denoise, "check"):
                denoise.check(t)

    def evaluations(self, level: Level) -> Array:
        """Network evaluations a row and particle."""
        return sum(getattr(d, "evaluations", lambda _: 1)(level) for d in self.denoisers)


# --- controls -----------------------------------------------------------------------------------------------------


def variance_controlled(fields: tuple = ("models",), ridge: Array = 1e-6) -> Control:
    """DriftLite's VCG: the control ``sum_k theta_k b_k`` that minimises the variance of the weights' rate.

    With ``h_k = div b_k + <b_k, S>``, theta solves ``cov(h_i, h_j) theta_j = -cov(h_i, g)`` over the weighted
    particles, in every row.  It costs the divergences of the fields (of a model: by products with its Jacobian, or by
    the target's ``probes``).

    Args:
        fields: "models" (the score of each), "reward" (its gradient), or functions ``(y, level) -> b``.
        ridge: relative to the mean of the matrix's diagonal.

    DriftLite: Lightweight Drift Control for Inference-Time Scaling of Diffusion Models, arXiv:2509.21655.

    Raises ValueError for other fields, or none.
    """
    return _control(fields, ridge, False)


def energy_controlled(potentials: tuple = ("reward",), ridge: Array = 1e-6) -> Control:
    """DriftLite's ECG: the control ``grad sum_k theta_k A_k`` nearest to the one that makes the weights constant.

    That one solves ``div(p grad A) = -p (g - E g)``; in the span of the potentials, ``E<grad A_i, grad A_j> theta_j =
    E[(g - E g) A_i]`` over the weighted particles.

    Args:
        potentials: "reward", or functions ``(y, level) -> number``; log-densities, where they are known.
        ridge: relative to the mean of the matrix's diagonal.

    DriftLite: Lightweight Drift Control for Inference-Time Scaling of Diffusion Models, arXiv:2509.21655.

    Raises ValueError for other potentials, or none.
    """
    return _control(potentials, ridge, True)


def _control(parts: tuple, ridge: Array, energy: bool) -> Control:
    names = ("reward",) if energy else ("models", "reward")
    if not parts or any(not callable(part) and part not in names for part in parts):
        raise ValueError(f"controls must be among {names} or callable, and at least one, got {parts!r}.")
    number("ridge", ridge)
    parts = tuple(part if isinstance(part, str) else as_value(part) for part in parts)
    named = tuple(part if isinstance(part, str) else "" for part in parts)
    return Control(tuple(part for part in parts if not isinstance(part, str)), ridge, named, energy)


@value
class Control:
    functions: tuple
    ridge: Array
    names: tuple = static()  # "" where it is the next function
    energy: bool = static()

    def potentials(self, target: Target) -> list:
        """``(y, level) -> number`` for each."""
        functions = iter(self.functions)
        return [(lambda y, level: target.reward(y)) if name == "reward" else next(functions) for name in self.names]

    def fields(self, target: Target, level: Level) -> list:
        """Functions ``y -> rho^2 b`` for each, displacements of y."""
        square = (level.sigma / level.alpha) ** 2
        times = lambda field: lambda y: jax.tree.map(lambda leaf: square * leaf, field(y))
        if self.energy:
            return [times(lambda y, a=a: jax.grad(a)(y, level)) for a in self.potentials(target)]
        functions, found = iter(self.functions), []
        for name in self.names:
            if name == "models":
                for i in range(len(target.denoisers)):
                    found.append(lambda y, i=i: jax.tree.map(jnp.subtract, target.estimates(y, level)[i], y))
            elif name == "reward":
                found.append(times(jax.grad(target.reward)))
            else:
                field = next(functions)
                found.append(times(lambda y, field=field: field(y, level)))
        return found

    def read(self, target: Target, y: Tree, level: Level, score: Tree, key: Array) -> tuple[Tree, Array, Array, Array]:
        """The displacements, ``rho^2 h``, and for the energy ``<grad A_i, grad A_j>`` (times rho^2) and A."""
        rho = level.sigma / level.alpha
        fields = self.fields(target, level)
        moves = tuple(field(y) for field in fields)
        gains = [
            divergence(field, y, *target.probing(key)) + dot(b, score) / rho
            for field, b in zip(fields, moves, strict=True)
        ]
        if not self.energy:
            nothing = jnp.zeros((), gains[0].dtype)
            return moves, jnp.stack(gains), nothing, nothing
        gram = jnp.stack([jnp.stack([dot(a, b) for b in moves]) for a in moves]) / rho**2
        return moves, jnp.stack(gains), gram, jnp.stack([a(y, level) for a in self.potentials(target)])

    def solve(self, weights: Array, rate: Array, gains: Array, gram: Array, values: Array) -> Array:
        """theta, from all particles: weights (N,) of sum 1, ``rho^2 g`` (N,), ``rho^2 h`` (N, K) and the rest."""
        off = rate - weights @ rate
        if self.energy:
            matrix, right = jnp.tensordot(weights, gram, 1), values.T @ (weights * off)
        else:
            centred = gains - weights @ gains
            matrix, right = centred.T @ (weights[:, None] * centred), -centred.T @ (weights * off)
        count = right.size
        mean = jnp.trace(matrix) / count
        usable = (mean > 0) & jnp.all(jnp.isfinite(matrix)) & jnp.all(jnp.isfinite(right))
        eye = jnp.eye(count, dtype=matrix.dtype)
        matrix = jnp.where(usable, matrix + self.ridge * mean * eye, eye)
        return jnp.linalg.solve(matrix, jnp.where(usable, right, 0.0))
