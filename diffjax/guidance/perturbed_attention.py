"""Perturbed-attention guidance: away from the same network with self-attention maps turned towards the identity.

A head's map A becomes (1 - u) A + u I, so that at u = 1 its tokens see themselves only and what is lost is structure;
going away from that estimate adds structure, without a condition and without training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.corrections.transform import check_within, condition_within, evaluations
from diffjax.guidance.conditions import conditioned
from diffjax.guidance.hooks import perturbed
from diffjax.levels import Array, Level, Tree, is_traced, remembers, value


def perturbed_attention(
    network: Any, heads: Array, scale: Array = 1.0, *, null: Tree = None, condition_scale: Array = 1.0
) -> PerturbedAttention:
    """``x0 = x0(c) + (scale - 1) (x0(c) - x0(c, perturbed))``: all branches in one batched network call.

    Scale 1 is the model itself, as everywhere in diffjax; the papers' s (and w) is ``scale - 1``.  With ``null`` the
    guidance is added to classifier-free guidance of ``condition_scale``, and a third branch is in the batch:

        x0 = x0(null) + condition_scale (x0(c) - x0(null)) + (scale - 1) (x0(c) - x0(c, perturbed))

    Counts as two network evaluations, with ``null`` as three.

    Args:
        network: a network's denoiser (`Prediction.decode`) or a transformation of one, that does not remember.
        heads: u in [0, 1], of shape (layers, heads) (`diffjax.networks.attention_heads`) or (layers,) for whole layers:
            0 leaves a head alone, 1 replaces its attention map by the identity.
        scale: 1 is no guidance.
        null: the condition that means "not told"; None for no classifier-free guidance.
        condition_scale: of classifier-free guidance, with ``null``.

    Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance, arXiv:2403.17377 (u = 1).
    Fine-Grained Perturbation Guidance via Attention Head Selection, arXiv:2506.10978, section 4 (SoftPAG: single heads,
    u between 0 and 1).

    Raises ValueError without a network inside, for u outside [0, 1], a scale that is not finite (where concrete), a
    denoiser that remembers, and for a condition_scale without ``null``.
    """
    if remembers(network):
        raise ValueError(f"perturbed_attention cannot wrap a denoiser that remembers, got {network!r}.")
    if not is_traced(heads) and not np.all((np.asarray(heads) >= 0) & (np.asarray(heads) <= 1)):
        raise ValueError(f"heads must be between 0 and 1, got {heads!r}.")
    for name, number in (("scale", scale), ("condition_scale", condition_scale)):
        if not is_traced(number) and not np.all(np.isfinite(number)):
            raise ValueError(f"{name} must be finite, got {number!r}.")
    if null is None and not (is_traced(condition_scale) or np.all(np.asarray(condition_scale) == 1)):
        raise ValueError(f"condition_scale={condition_scale!r} needs null, the condition that means 'not told'.")
    perturbed(network, heads)  # refuses what has no network
    if null is not None:
        if getattr(network, "condition", None) is None:
            raise ValueError(f"null={null!r} needs a denoiser with a condition to replace, got {network!r}.")
        null = jax.tree.map(lambda leaf, like: jnp.asarray(leaf, jnp.result_type(like)), null, network.condition)
    return PerturbedAttention(network, jnp.asarray(heads, jnp.float32), scale, null, condition_scale)


@value
class PerturbedAttention:
    denoise: Any
    heads: Array
    scale: Array
    null: Tree
    condition_scale: Array
    factory = "perturbed_attention"

    def __call__(self, x: Tree, level: Level) -> Tree:
        strengths = jnp.stack([0 * self.heads, self.heads])
        if self.null is None:
            branches = jax.vmap(lambda u: perturbed(self.denoise, u)(x, level))(strengths)
            return jax.tree.map(lambda b: (b[1] + self.scale * (b[0] - b[1])).astype(b.dtype), branches)
        told = jax.tree.map(lambda a, b: jnp.stack([jnp.asarray(a)] * 2 + [b]), self.condition, self.null)
        strengths = jnp.concatenate([strengths, strengths[:1]])
        call = lambda u, c: perturbed(conditioned(self.denoise, c), u)(x, level)
        branches = jax.vmap(call)(strengths, told)

        def leaf(b: Array) -> Array:
            guided = b[2] + self.condition_scale * (b[0] - b[2]) + (self.scale - 1) * (b[0] - b[1])
            return guided.astype(b.dtype)

        return jax.tree.map(leaf, branches)

    condition = property(condition_within)
    check = check_within

    def evaluations(self, level: Level) -> Array:
        """Network evaluations of a call at ``level``."""
        return (2 if self.null is None else 3) * evaluations(self.denoise, level)


class Heads(NamedTuple):
    """What `search_heads` found: the mask (layers, heads), the heads (K, 2) in order of choice, the objectives (K,)."""

    mask: Array
    chosen: Array
    objectives: Array


def search_heads(objective: Callable[[Array], Array], shape: tuple[int, int], rounds: int, each: int = 1) -> Heads:
    """Greedy choice of heads: in every round the ``each`` heads that raise the objective most join the perturbed set.

    ``objective(mask (layers, heads)) -> scalar`` is what is wanted of samples that are guided away from these heads;
    it is traced once, and called ``layers * heads`` times a round, one candidate after the other.  Compare samples of
    the same keys.  A round never takes a head twice.

    Fine-Grained Perturbation Guidance via Attention Head Selection, arXiv:2506.10978, section 4.1 (HeadHunter).

    Raises ValueError unless ``rounds * each`` heads exist.
    """
    layers, heads = shape
    if rounds < 1 or each < 1 or rounds * each > layers * heads:
        raise ValueError(f"needs 1 <= rounds * each <= {layers * heads} heads, got rounds={rounds}, each={each}.")
    candidates = jnp.eye(layers * heads).reshape(-1, layers, heads)

    def one(mask: Array, _: Any) -> tuple[Array, tuple[Array, Array]]:
        found = jax.lax.map(lambda more: objective(jnp.maximum(mask, more)), candidates)
        found = jnp.where(mask.reshape(-1) > 0, -jnp.inf, found)
        _, best = jax.lax.top_k(found, each)
        mask = jnp.maximum(mask, candidates[best].max(0))
        return mask, (best, objective(mask))

    mask, (best, objectives) = jax.lax.scan(one, jnp.zeros(shape), None, length=rounds)
    best = best.reshape(-1)
    return Heads(mask, jnp.stack([best // heads, best % heads], -1), objectives)
