"""Rules that make one estimate of two: how guidance goes from the weak to the strong clean estimate and beyond.

A rule is a value with

    combine(strong, weak, scale, x, level, memory) -> (x0, memory)

and, where it remembers, ``init(x) -> memory``.  Without a rule, ``x0 = strong + (scale - 1) (strong - weak)``.  At
scale 1 every rule gives the strong estimate exactly.

``of`` says of which quantity the numbers of a rule are taken: "data" (x0), "velocity" (v = alpha eps - sigma x0),
"flow" (eps - x0; in a flow the velocity), where ``eps = (x - alpha x0) / sigma``.  At sigma = 0, where there is no
noise to estimate, the last two give the strong estimate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import Array, Level, Tree, dot, is_traced, root, static, value

TARGETS = ("data", "velocity", "flow")


def combined(rule: Any, strong: Tree, weak: Tree, scale: Array, x: Tree, level: Level, memory: Tree) -> tuple:
    """``rule.combine``, or plain extrapolation where the rule is None; in the dtype of the estimates."""
    if rule is None:
        return extrapolated(strong, weak, scale), memory
    x0, memory = rule.combine(strong, weak, scale, x, level, memory)
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), x0, strong), memory


def extrapolated(strong: Tree, weak: Tree, scale: Array) -> Tree:
    """``strong + (scale - 1) (strong - weak)``: exactly strong at scale 1."""
    return jax.tree.map(lambda s, w: (s + (scale - 1) * (s - w)).astype(s.dtype), strong, weak)


def rescale(share: Array = 0.7, of: str = "velocity") -> Rescale:
    """Guidance that keeps the standard deviation of the strong estimate: against over-exposure at large scales.

    ``y <- y (1 + share (std(y_strong) / std(y) - 1))`` with y the extrapolated quantity ``of`` and std over all
    entries of the sample.  share 0 is plain guidance.

    The paper writes it for outputs of a network that predicts v, so that of = "velocity" is what it does.
    Common Diffusion Noise Schedules and Sample Steps are Flawed, arXiv:2305.08891, section 3.4.

    Raises ValueError for another ``of`` and a concrete share outside [0, 1].
    """
    _among(of)
    if not is_traced(share) and not (np.all(np.asarray(share) >= 0) and np.all(np.asarray(share) <= 1)):
        raise ValueError(f"share must be in [0, 1], got {share!r}.")
    return Rescale(share, of)


@value
class Rescale:
    share: Array
    of: str = static()
    factory = "rescale"

    def combine(self, strong: Tree, weak: Tree, scale: Array, x: Tree, level: Level, memory: Tree) -> tuple:
        def change(a: Tree, b: Tree) -> Tree:
            y = extrapolated(a, b, scale)
            wide = _std(y)
            factor = 1 + self.share * (jnp.where(wide > 0, _std(a) / jnp.where(wide > 0, wide, 1.0), 1.0) - 1)
            return jax.tree.map(lambda leaf: factor * leaf, y)

        return changed_in(self.of, strong, weak, x, level, change), memory


def apg(parallel: Array = 0.0, norm: Array = np.inf, momentum: Array = 0.0) -> Projected | ProjectedMomentum:
    """Adaptive projected guidance: of the difference of the estimates, mostly what is orthogonal to the strong one.

        d <- strong - weak + momentum d,    d <- d min(1, norm / |d|),
        x0 = strong + (scale - 1) (d_orthogonal + parallel d_parallel),

    where d_parallel is the part along the strong estimate, the part that saturates at large scales.  With parallel 1,
    norm inf and momentum 0 it is plain guidance.  It remembers d where momentum is not 0.

    Args:
        parallel: the share that is kept of the parallel part (the paper's eta), mostly 0.
        norm: the largest norm of d over the sample (the paper's r), above 0.
        momentum: of d from call to call (the paper's beta), mostly negative: -0.5 reduces what is repeated.

    Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models, arXiv:2410.02416, algorithm 1.

    Raises ValueError unless parallel and momentum are finite and norm > 0.
    """
    for name, number in (("parallel", parallel), ("momentum", momentum)):
        if not is_traced(number) and not np.all(np.isfinite(number)):
            raise ValueError(f"{name} must be finite, got {number!r}.")
    if not is_traced(norm) and not np.all(np.asarray(norm) > 0):
        raise ValueError(f"norm must be above 0, got {norm!r}.")
    if not is_traced(momentum) and momentum == 0:
        return Projected(parallel, norm)
    return ProjectedMomentum(parallel, norm, momentum)


@value
class Projected:
    parallel: Array
    norm: Array
    factory = "apg"

    def combine(self, strong: Tree, weak: Tree, scale: Array, x: Tree, level: Level, memory: Tree) -> tuple:
        difference = jax.tree.map(jnp.subtract, strong, weak)
        return _projected(strong, difference, scale, self.parallel, self.norm), memory


@value
class ProjectedMomentum:
    parallel: Array
    norm: Array
    momentum: Array
    factory = "apg"

    def init(self, x: Tree) -> Tree:
        """No difference yet."""
        return jax.tree.map(jnp.zeros_like, x)

    def combine(self, strong: Tree, weak: Tree, scale: Array, x: Tree, level: Level, memory: Tree) -> tuple:
        running = jax.tree.map(lambda s, w, m: (s - w + self.momentum * m).astype(m.dtype), strong, weak, memory)
        return _projected(strong, running, scale, self.parallel, self.norm), running


def _projected(strong: Tree, difference: Tree, scale: Array, parallel: Array, norm: Array) -> Tree:
    long = root(dot(difference, difference))
    over = long > norm
    limit = jnp.where(over, jnp.where(over, norm, 1.0) / jnp.where(over, long, 1.0), 1.0)  # norm may be infinite
    square = dot(strong, strong)
    along = jnp.where(square > 0, dot(difference, strong) / jnp.where(square > 0, square, 1.0), 0.0)
    # d_orthogonal + parallel d_parallel = d - (1 - parallel) d_parallel
    return jax.tree.map(lambda s, d: s + (scale - 1) * limit * (d - (1 - parallel) * along * s), strong, difference)


def zero_star(of: str = "flow") -> ZeroStar:
    """CFG-Zero*: the weak estimate is first scaled to be as near to the strong one as it gets.

    ``y = y_strong + (scale - 1) (y_strong - s y_weak)``, s = <y_strong, y_weak> / |y_weak|^2.  The other half of the
    paper, no motion in the first steps, is `diffjax.guidance.zero_init`, which composes with any guidance.

    CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models, arXiv:2503.18886.

    Raises ValueError for another ``of``.
    """
    _among(of)
    return ZeroStar(of)


@value
class ZeroStar:
    of: str = static()
    factory = "zero_star"

    def combine(self, strong: Tree, weak: Tree, scale: Array, x: Tree, level: Level, memory: Tree) -> tuple:
        def change(a: Tree, b: Tree) -> Tree:
            square = dot(b, b)
            s = jnp.where(square > 0, dot(a, b) / jnp.where(square > 0, square, 1.0), 1.0)
            return extrapolated(a, jax.tree.map(lambda leaf: s * leaf, b), scale)

        return changed_in(self.of, strong, weak, x, level, change), memory


# --- quantities -----------------------------------------------------------------------------------------------------


def changed_in(of: str, strong: Tree, weak: Tree, x: Tree, level: Level, change: Callable[[Tree, Tree], Tree]) -> Tree:
    """``change(y_strong, y_weak)`` in the quantity ``of``, as a clean estimate."""
    if of == "data":
        return change(strong, weak)
    a, b = in_target(of, strong, x, level), in_target(of, weak, x, level)
    y = change(a, b)
    from_x0, _ = _coefficients(of, level)
    moved = jnp.where(level.sigma == 0, 0.0, level.sigma / from_x0)
    # strong plus a difference, so that no change is no change to the last bit
    return jax.tree.map(lambda s, new, old: s + moved * (new - old), strong, y, a)


def in_target(of: str, x0: Tree, x: Tree, level: Level) -> Tree:
    """The quantity ``of`` of a clean estimate; 0 at sigma = 0."""
    if of == "data":
        return x0
    from_x0, from_x = _coefficients(of, level)
    still = level.sigma == 0
    per = jnp.where(still, 0.0, 1 / jnp.where(still, 1.0, level.sigma))
    return jax.tree.map(lambda clean, state: (from_x0 * clean + from_x * state) * per, x0, x)


def _coefficients(of: str, level: Level) -> tuple[Array, Array]:
    """Of x0 and x in sigma y, where y = a x0 + b eps: ``a sigma - b alpha`` and b."""
    if of == "velocity":
        return -(level.alpha**2 + level.sigma**2), level.alpha
    return -(level.alpha + level.sigma), jnp.ones_like(level.alpha)


def _among(of: str) -> None:
    if of not in TARGETS:
        raise ValueError(f"of must be among {TARGETS}, got {of!r}.")


def _std(tree: Tree) -> Array:
    """Over all entries of all leaves."""
    count = sum(np.size(leaf) for leaf in jax.tree.leaves(tree))
    mean = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tree)) / count
    return root(sum(jnp.sum((leaf - mean) ** 2) for leaf in jax.tree.leaves(tree)) / count)
