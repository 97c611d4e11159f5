"""Networks and noise that are made for the loss: the guided network, the learned coupling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from diffjax.levels import Array, Tree, is_traced, static, value


def guided(apply: Callable, null: Tree, scale: float | int = 3.0) -> Guided:
    """The network that is trained as it will be sampled: ``f(null) + scale (f(condition) - f(null))``.

    In `denoising` in the place of ``apply``, for any prediction, with ``dropout`` so that f(null) is taught as well.
    Scale = 1 + w in the paper's terms; 1 is the plain loss.  Two evaluations.

    At the optimum f(null) is the unconditional and ``f(condition) = f(null) + (c - f(null)) / scale`` of the
    conditional model c.  So classifier-free guidance of scale s with f is that of ``s / scale`` with the plain
    models: s = scale samples the conditional law itself, and the loss calibrates guidance rather than sharpening.

    Bridging the Gap: Addressing Discrepancies in Diffusion Model Training for Classifier-Free Guidance,
    arXiv:2311.00938.

    Raises ValueError for scale 0, which says nothing of the condition.
    """
    if not is_traced(scale) and scale == 0:
        raise ValueError(f"scale must not be 0, got {scale!r}")
    return Guided(null, scale, apply)


@value
class Guided:
    null: Tree
    scale: Any
    apply: Callable = static()
    factory = "guided"

    def __hash__(self) -> int:
        return hash((self.apply, self.scale))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Guided) or (self.apply, self.scale) != (other.apply, other.scale):
            return False
        return jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), self.null, other.null))

    def __call__(self, params: Tree, x: Tree, t: Array, condition: Tree) -> Tree:
        null = jax.tree.map(lambda n, c: jnp.asarray(n, jnp.result_type(c)), self.null, condition)
        without, told = (self.apply(params, x, t, c) for c in (null, condition))
        return jax.tree.map(lambda a, b: a + self.scale * (b - a), without, told)


def learned_coupling(loss: Any, encode: Callable, beta: float | int = 1.0) -> LearnedCoupling:
    """Noise that is a learned function of the data, ``eps = mean(x0) + std(x0) xi``, for paths that bend less.

        loss' = loss + beta KL(N(mean, std^2) | N(0, I)) / D

    and the gradient of the loss goes through the state and the target to the encoder too.  For rectified flow the
    least loss is the curvature of the paths, ``E int |x_1 - x_0 - v|^2 dt``; beta to infinity is the independent
    coupling, and the smaller beta the straighter the paths and the further the noise from the standard normal law
    that sampling starts from.

    Args:
        loss: from `denoising` (one without a memory).
        encode: ``encode(params, x0) -> (mean, log_std)``, both in the structure of x0.
        beta: above 0.

    Parameters are ``{"network": ..., "encoder": ...}``.

    Minimizing Trajectory Curvature of ODE-based Generative Models, arXiv:2301.12003.

    Raises ValueError unless beta > 0.
    """
    if not is_traced(beta) and not beta > 0:
        raise ValueError(f"beta must be positive, got {beta!r}")
    return LearnedCoupling(loss, beta, encode)


@value
class LearnedCoupling:
    loss: Any
    beta: Any
    encode: Callable = static()
    factory = "learned_coupling"

    def draw(self, key: PRNGKeyArray, x0: PyTree, condition: PyTree = None) -> Any:
        return self.loss.draw(key, x0, condition)

    def one(self, params: PyTree, item: Any) -> Array:
        """The loss of one sample."""
        mean, log_std = self.encode(params["encoder"], item.x0)
        eps = jax.tree.map(lambda m, s, xi: m + jnp.exp(s) * xi, mean, log_std, item.eps)
        apart = jax.tree.map(lambda m, s: jnp.sum(0.5 * (m**2 + jnp.expm1(2 * s)) - s), mean, log_std)
        size = sum(leaf.size for leaf in jax.tree.leaves(mean))
        divergence = sum(jax.tree.leaves(apart)) / size
        return self.loss.one(params["network"], item._replace(eps=eps)) + self.beta * divergence

    def each(self, params: PyTree, items: Any) -> Array:
        """The losses of all, or of any part, of what `draw` returned."""
        return jax.vmap(self.one, (None, 0))(params, items)

    def __call__(self, params: PyTree, key: PRNGKeyArray, x0: PyTree, condition: PyTree = None) -> Array:
        """The losses of a batch, one for each sample; arrays have a leading axis of length B."""
        return self.each(params, self.draw(key, x0, condition))
