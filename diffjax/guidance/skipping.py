"""Guidance that leaves calls out: the network is really not called, in the compiled loop.

What is remembered decides, or the level, through `jax.lax.cond`.  That is a choice for one sample and for any batch
whose samples decide alike (levels and call numbers are the same for all samples of a `jax.vmap` over keys).  Where
samples decide for themselves, as `adaptive` does, `jax.vmap` makes both calls and selects: then `Sample.nfe` counts
what each sample needed, not what the device did.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.corrections.transform import check_within, condition_within, evaluations
from diffjax.guidance.classifier_free import branches, fitting
from diffjax.guidance.rules import extrapolated, in_target
from diffjax.guidance.schedules import as_scale, noise_share, scale_at
from diffjax.levels import Array, Level, Tree, as_value, dot, is_traced, remembers, root, static, value


def zero_init(denoise: Any, share: Array = 0.04) -> ZeroInit:
    """No motion in the first steps: ``x0 = x / (alpha + sigma)`` where ``sigma / (alpha + sigma) > 1 - share``.

    There the velocity eps - x0 of the flow is 0, and the network is not called: early in training its first steps lead
    away, and no step is better.  share 0 is ``denoise`` itself; with uniform steps of a flow it is the share of steps.

    CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models, arXiv:2503.18886 (zero-init, of
    the first 4 % of steps); the other half is `zero_star`.

    Raises ValueError for a denoiser that remembers, and a concrete share outside [0, 1].
    """
    if remembers(denoise):
        raise ValueError(f"zero_init cannot wrap a denoiser that remembers, got {denoise!r}.")
    if not is_traced(share) and not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share!r}.")
    return ZeroInit(as_value(denoise), share)


@value
class ZeroInit:
    denoise: Any
    share: Array
    factory = "zero_init"

    def __call__(self, x: Tree, level: Level) -> Tree:
        still = lambda: jax.tree.map(lambda leaf: (leaf / (level.alpha + level.sigma)).astype(leaf.dtype), x)

        def moving() -> Tree:
            x0 = self.denoise(x, level)
            return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), x0, x)

        return jax.lax.cond(self._still(level), still, moving)

    def _still(self, level: Level) -> Array:
        return jnp.all(jnp.asarray(noise_share(level) > 1 - jnp.asarray(self.share)))

    condition = property(condition_within)
    check = check_within

    def evaluations(self, level: Level) -> Array:
        """Network evaluations of a call at ``level``."""
        return jnp.where(self._still(level), 0, evaluations(self.denoise, level))


def adaptive(denoise: Any, null: Tree, scale: Any = 1.0, threshold: Array = 0.99, of: str = "data") -> Adaptive:
    """Classifier-free guidance until the two estimates agree, from then on the conditional estimate alone.

    They agree when the cosine between them is above ``threshold``: at 1 that never happens, and it is
    `classifier_free`.  A denoiser that remembers whether they have agreed.  Two network evaluations before, one after;
    see the module for what `jax.vmap` makes of that.

    Args:
        denoise, null, scale: as in `classifier_free`.
        threshold: at most 1.
        of: "data", "velocity" or "flow" (`diffjax.guidance.rules`).  The paper compares noise estimates, which at high
            noise agree whatever the condition; clean estimates begin to agree at low noise in every process.

    Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models, arXiv:2312.12487.

    Raises ValueError as `classifier_free`, for a threshold above 1, and another ``of``.
    """
    null = fitting(denoise, null, "adaptive")
    if not is_traced(threshold) and not threshold <= 1:
        raise ValueError(f"threshold must be at most 1, got {threshold!r}.")
    if of not in ("data", "velocity", "flow"):
        raise ValueError(f"of must be data, velocity or flow, got {of!r}.")
    return Adaptive(denoise, null, as_scale("scale", scale), threshold, of)


@value
class Adaptive:
    denoise: Any
    null: Tree
    scale: Any
    threshold: Array
    of: str = static()
    factory = "adaptive"

    def init(self, x: Tree) -> tuple[Array, Array]:
        """Whether the estimates have agreed, and whether the last call was a single one."""
        del x
        return jnp.asarray(False), jnp.asarray(False)

    def apply(self, x: Tree, level: Level, memory: tuple[Array, Array]) -> tuple[Tree, tuple[Array, Array]]:
        agreed, _ = memory

        def alone() -> tuple[Tree, Array]:
            return self.denoise(x, level), jnp.asarray(True)

        def both() -> tuple[Tree, Array]:
            strong, weak = branches(self, lambda denoise: denoise(x, level))
            a, b = (in_target(self.of, tree, x, level) for tree in (strong, weak))
            long = root(dot(a, a)) * root(dot(b, b))
            cosine = jnp.minimum(dot(a, b) / jnp.where(long > 0, long, 1.0), 1.0)
            return extrapolated(strong, weak, scale_at(self.scale, level)), (long > 0) & (cosine > self.threshold)

        x0, now = jax.lax.cond(agreed, alone, both)
        return x0, (now, agreed)

    condition = property(condition_within)
    check = check_within

    def evaluations(self, level: Level) -> Array:
        """Network evaluations of a call before the estimates agree."""
        return 2 * evaluations(self.denoise, level)

    def spent(self, level: Level, memory: tuple[Array, Array]) -> Array:
        """Network evaluations of the call that left this memory."""
        return evaluations(self.denoise, level) * jnp.where(memory[1], 1, 2)


def linear_guidance(denoise: Any, null: Tree, weights: Array, skip: Array, scale: Any = 1.0) -> LinearGuidance:
    """Classifier-free guidance whose unconditional estimate is, in some calls, a linear function of earlier estimates.

    In call i with ``skip[i]``, in the velocity v = eps - x0 of the flow,

        v_null ~ sum_{j <= i} weights[i, 0, j] v_condition[j] + sum_{j < i} weights[i, 1, j] v_null[j].

    `fitted_weights` fits them to recorded estimates.  A denoiser that remembers its N calls: for solvers of one call a
    row.  Two network evaluations in the other calls, one where it skips, under `jax.vmap` over keys too.

    Args:
        denoise, null, scale: as in `classifier_free`.
        weights: (N, 2, N).
        skip: (N,) of truth values.

    Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models, arXiv:2312.12487
    (LinearAG).

    Raises ValueError as `classifier_free`, and for weights and skip that do not fit each other.
    """
    null = fitting(denoise, null, "linear_guidance")
    count = np.shape(skip)[0] if np.ndim(skip) == 1 else -1
    if np.shape(weights) != (count, 2, count):
        raise ValueError(f"weights must be (N, 2, N) and skip (N,), got {np.shape(weights)} and {np.shape(skip)}.")
    return LinearGuidance(denoise, null, weights, jnp.asarray(skip, bool), as_scale("scale", scale))


@value
class LinearGuidance:
    denoise: Any
    null: Tree
    weights: Array
    skip: Array
    scale: Any
    factory = "linear_guidance"

    def init(self, x: Tree) -> tuple[Array, Tree, Tree]:
        """The number of calls made, and the velocities of both kinds."""
        empty = jax.tree.map(lambda leaf: jnp.zeros((len(self.skip), *leaf.shape), leaf.dtype), x)
        return jnp.zeros((), jnp.int32), empty, empty

    def apply(self, x: Tree, level: Level, memory: tuple[Array, Tree, Tree]) -> tuple[Tree, tuple]:
        index, conditional, unconditional = memory

        def both() -> tuple[Tree, Tree, Tree]:
            clean, weak = branches(self, lambda denoise: denoise(x, level))
            return clean, *(in_target("flow", tree, x, level) for tree in (clean, weak))

        def alone() -> tuple[Tree, Tree, Tree]:
            clean = self.denoise(x, level)
            v = in_target("flow", clean, x, level)
            own, other = jnp.asarray(self.weights)[index]
            seen = jax.tree.map(lambda kept, new: kept.at[index].set(new), conditional, v)
            predict = lambda a, b: (jnp.tensordot(own, a, 1) + jnp.tensordot(other, b, 1)).astype(a.dtype)
            return clean, v, jax.tree.map(predict, seen, unconditional)

        clean, strong, weak = jax.lax.cond(jnp.asarray(self.skip)[index], alone, both)
        further = (scale_at(self.scale, level) - 1) * noise_share(level)  # x0 = (x - sigma v) / (alpha + sigma)
        x0 = jax.tree.map(lambda c, s, w: (c - further * (s - w)).astype(c.dtype), clean, strong, weak)
        write = lambda kept, new: kept.at[index].set(new.astype(kept.dtype))
        kept = (jax.tree.map(write, conditional, strong), jax.tree.map(write, unconditional, weak))
        return x0, (index + 1, *kept)

    condition = property(condition_within)
    check = check_within

    def evaluations(self, level: Level) -> Array:
        """Network evaluations of a call that does not skip."""
        return 2 * evaluations(self.denoise, level)

    def spent(self, level: Level, memory: tuple[Array, Tree, Tree]) -> Array:
        """Network evaluations of the call that left this memory."""
        return evaluations(self.denoise, level) * jnp.where(jnp.asarray(self.skip)[memory[0] - 1], 1, 2)


def fitted_weights(conditional: Array, unconditional: Array, ridge: Array = 1e-6) -> Array:
    """The weights of `linear_guidance`: ridge regression of the unconditional on the earlier estimates, call by call.

    Args:
        conditional, unconditional: velocities eps - x0 of N calls, (samples, N, ...); all entries of a state share the
            weights.
        ridge: relative to the mean square of the regressors, above 0.

    Returns weights (N, 2, N), in NumPy.

    Raises ValueError for shapes that differ, or a ridge that is not above 0.
    """
    conditional, unconditional = (np.asarray(a, np.float64) for a in (conditional, unconditional))
    if conditional.shape != unconditional.shape or conditional.ndim < 2:
        raise ValueError(
            f"conditional and unconditional must both be (samples, N, ...), got {conditional.shape} and"
            f" {unconditional.shape}."
        )
    if not ridge > 0:
        raise ValueError(f"ridge must be above 0, got {ridge!r}.")
    count = conditional.shape[1]
    a, b = (np.moveaxis(v, 1, 0).reshape(count, -1) for v in (conditional, unconditional))
    weights = np.zeros((count, 2, count))
    for i in range(count):
        regressors = np.concatenate([a[: i + 1], b[:i]])
        gram = regressors @ regressors.T
        gram += ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
        solution = np.linalg.solve(gram, regressors @ b[i])
        weights[i, 0, : i + 1], weights[i, 1, :i] = solution[: i + 1], solution[i + 1 :]
    return weights
