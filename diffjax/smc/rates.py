"""The one identity under weighted samplers: the log-weight rate of any motion towards any path of densities.

Let p_tau(y) be positive functions with finite integrals Z_tau, and let particles move by ``dy = v dtau + eta dW``.  If
they start from p at the start, and gain log-weight at the rate

    g = d/dtau log p + div v + <v, grad log p> - eta^2 / 2 (laplacian log p + |grad log p|^2),

then with their weights they are p_tau at every tau, whatever v and eta, and the mean weight is Z_tau over Z at the
start.  (It is the residual of the Fokker-Planck equation at p, divided by p.)  Correctors, annealing, guidance,
products, tilts and controls are what p and v are; each of their weights is a value of `log_weight_rate`.

For targets made of diffused densities, in ``y = x / alpha`` over ``u = (sigma / alpha)^2`` where a density of the
forward process obeys ``d/du log q = (laplacian log q + |s|^2) / 2``, let

    log p = sum_i w_i log q_i + beta r,   S = grad log p = sum_i w_i s_i + beta grad r,   v = (1 + eta^2) / 2 S + c

for a clock that runs with -u and noise eta.  The identity becomes, for any eta, with no Laplacian of a q,

    g = (|S|^2 - sum_i w_i |s_i|^2 + beta laplacian r) / 2 + beta' r + div c + <c, S>.

c = -guidance beta grad r / 2 is guidance by half at 1, where the laplacian of r cancels, and in full at 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from diffjax.levels import Array, Tree, dot


class Path(NamedTuple):
    """A path of densities at a point: ``d/dtau log p``, ``grad log p`` and ``laplacian log p``."""

    rate: Array
    score: Tree
    laplacian: Array


class Motion(NamedTuple):
    """A motion at a point: the drift v, its divergence, and the square of the noise eta."""

    drift: Tree
    divergence: Array
    squared_noise: Array


def log_weight_rate(path: Path, motion: Motion) -> Array:
    """``g = d/dtau log p + div v + <v, grad log p> - eta^2 / 2 (laplacian log p + |grad log p|^2)``; see the module.

    >>> still = Motion(jnp.zeros(2), 0.0, 0.0)
    >>> log_weight_rate(Path(0.5, jnp.ones(2), 0.0), still)  # particles that stay gain what the density gains
    Array(0.5, dtype=float32)
    """
    curved = path.laplacian + dot(path.score, path.score)
    return path.rate + motion.divergence + dot(motion.drift, path.score) - 0.5 * motion.squared_noise * curved


def path_of(log_density: Callable[[Tree, Array], Array], y: Tree, tau: Array) -> Path:
    """The path of ``log_density(y, tau)`` by automatic differentiation: D second derivatives."""
    rate = jax.grad(lambda tau: log_density(y, tau))(tau)
    score = jax.grad(log_density)(y, tau)
    return Path(rate, score, divergence(lambda y: jax.grad(log_density)(y, tau), y))


def motion_of(drift: Callable[[Tree], Tree], y: Tree, squared_noise: Array) -> Motion:
    """The motion of ``drift(y)`` by automatic differentiation: D first derivatives."""
    return Motion(drift(y), divergence(drift, y), squared_noise)


def divergence(field: Callable[[Tree], Tree], y: Tree, key: Array | None = None, probes: int = 1) -> Array:
    """``div field`` at y: exactly, by D products, or by Hutchinson's estimate ``<z, J z>`` with signs z."""
    flat, unravel = ravel_pytree(y)

    def product(z: Array) -> Array:
        return dot(unravel(z), jax.jvp(field, (y,), (unravel(z),))[1])

    if key is None:
        return jnp.sum(jax.vmap(product)(jnp.eye(flat.size, dtype=flat.dtype)))
    return jnp.mean(jax.vmap(product)(jax.random.rademacher(key, (probes, flat.size), flat.dtype)))


def product_rate(weights: Array, scores: tuple[Tree, ...]) -> Array:
    """``(|sum_i w_i s_i|^2 - sum_i w_i |s_i|^2) / 2``: the rate of ``prod_i q_i^{w_i}`` a unit of -u, whatever eta.

    Annealing of one density to gamma is ``gamma (gamma - 1) |s|^2 / 2``, classifier-free guidance with a scale
    ``scale (scale - 1) |s_1 - s_2|^2 / 2``, a product of two ``<s_1, s_2>``.

    Feynman-Kac Correctors in Diffusion: Annealing, Guidance, and Product of Experts, arXiv:2503.02819,
    propositions 3.1 to 3.3.
    """
    mixed = jax.tree.map(lambda *parts: sum(w * s for w, s in zip(weights, parts, strict=True)), *scores)
    return 0.5 * (dot(mixed, mixed) - sum(w * dot(s, s) for w, s in zip(weights, scores, strict=True)))


def tilt_rate(slope: Tree, curvature: Array, mixed: Tree, guidance: Array) -> Array:
    """What a factor ``e^{beta r}`` adds to `product_rate`, beside ``beta' r``, with a share of the guidance left out.

    ``<b, m> + |b|^2 / 2 + l / 2 - guidance / 2 (<b, m + b> + l)`` with b = beta grad r (``slope``), l = beta
    laplacian r (``curvature``, not needed at guidance = 1) and m the mixed score of the product: 1 is half guidance,
    with the drift ``m + b / 2`` at eta = 1; 0 is full guidance, that of AFDPS.

    Solving Inverse Problems via Diffusion-Based Priors: An Approximation-Free Ensemble Sampling Approach,
    arXiv:2506.03979; derived here.
    """
    along, square = dot(slope, mixed), dot(slope, slope)
    # l is left out, not multiplied by 0, where it is not known
    rest = 0.0 if curvature is None else (1 - guidance) * curvature
    return along + 0.5 * square - 0.5 * guidance * (along + square) + 0.5 * rest


def control_rate(divergence: Array, control: Tree, score: Tree) -> Array:
    """``div c + <c, S>``: what a control c beside the drift adds.

    DriftLite: Lightweight Drift Control for Inference-Time Scaling of Diffusion Models, arXiv:2509.21655.
    """
    return divergence + dot(control, score)
