"""Laws of the noise level that learn from the losses, and the loss that carries what they have learned.

Such a law has a base law, an ``init() -> memory``, ``place(memory, v) -> (u, weight)`` that takes a uniform v to the
quantile u of the base and to the weight of the loss there, and ``update(memory, u, losses) -> memory``.  All are pure,
so the memory is part of `TrainState` and of its checkpoints.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from diffjax.levels import Array, Level, Process, as_value, static, value
from diffjax.likelihood.importance import SecondMoment, second_moment
from diffjax.training.step import own_part, whole_batch
from diffjax.training.times import Law, uniform


def learns(loss: Any) -> bool:
    """Whether a switch of a loss needs to remember: a law that learns, a weight that depends on the training step."""
    return hasattr(loss.law, "place") or hasattr(loss.weighting, "at")


class Memory(NamedTuple):
    """What a loss remembers: the number of its calls, and what its law has learned."""

    step: Array
    law: Any


@value
class Learning:
    """A loss with a memory: ``init(params) -> memory``, ``apply(params, memory, key, *batch) -> (losses, memory)``."""

    loss: Any
    axis_name: str | None = static(default=None)

    def over(self, axis_name: str) -> Learning:
        """The same of a part of the batch, on an axis of `pmap`: everything is drawn, and learned from, as a whole."""
        return dataclasses.replace(self, axis_name=axis_name)

    def init(self, params: PyTree = None) -> Memory:
        """The memory before the first step."""
        del params
        return Memory(jnp.zeros((), jnp.int32), self.loss.law.init() if hasattr(self.loss.law, "init") else ())

    def apply(self, params: PyTree, memory: Memory, key: PRNGKeyArray, *batch: Any) -> tuple[Array, Memory]:
        """The losses of a batch, (B,), and the memory after them."""
        loss, law, learned = self.loss, self.loss.law, memory.law
        if hasattr(loss.weighting, "at"):
            loss = dataclasses.replace(loss, weighting=loss.weighting.at(memory.step))
        items, weights = loss.draw(key, *whole_batch(batch, self.axis_name)), None
        if hasattr(law, "place"):
            u, weights = law.place(learned, items.u)
            items = items._replace(u=u)
        losses = loss.each(params, own_part(items, self.axis_name))
        if weights is None:
            return losses, Memory(memory.step + 1, learned)
        learned = law.update(learned, items.u, whole_batch(jax.lax.stop_gradient(losses), self.axis_name))
        return own_part(weights, self.axis_name) * losses, Memory(memory.step + 1, learned)


# --- in proportion to the losses --------------------------------------------------------------------------------------


def importance(law: Law | None = None, bins: int = 32, history: int = 10, share: float = 1e-3) -> Importance:
    """Levels in proportion to the root mean square of their losses, which are weighted so that their mean stays.

    The quantiles of ``law`` are cut into ``bins`` of equal probability; bin k is drawn with probability p_k as
    `likelihood.second_moment` has it (uniform until every bin has ``history`` losses), and its losses count
    ``1 / (bins p_k)``.  So the gradient is unbiased, and its variance least where gradients are as large as losses.

    Improved Denoising Diffusion Probabilistic Models, arXiv:2102.09672, section 3.3.

    Raises ValueError unless bins and history are positive integers and 0 < share <= 1.
    """
    second_moment(bins, history, share)
    return Importance(_base(law), share, bins, history)


@value
class Importance:
    law: Any
    share: Any
    bins: int = static()
    history: int = static()
    factory = "importance"

    def __call__(self, process: Process, u: Any) -> Level:
        return self.law(process, u)

    def init(self) -> SecondMoment:
        return SecondMoment(
            jnp.zeros((self.bins, self.history)), jnp.zeros(self.bins, jnp.int32), jnp.asarray(self.share)
        )

    def place(self, memory: SecondMoment, v: Array) -> tuple[Array, Array]:
        chances = memory.probabilities()
        u, index = quantile(chances, v)
        return u, 1 / (self.bins * chances[index])

    def update(self, memory: SecondMoment, u: Array, losses: Array) -> SecondMoment:
        return memory.update(_bin(u, self.bins), losses)


def warped(
    law: Law | None = None, bins: int = 32, decay: float = 0.99, power: float = 1.0, share: float = 0.05
) -> Warped:
    """Levels in proportion to a power of their mean loss, learned as training goes on, with weight one.

    The mean loss of each of ``bins`` equal parts of ``law`` is tracked, and the law is ``share / bins`` plus the rest
    in proportion to loss^power: with power 1 the loss, as a function of the new u, falls linearly in cumulation, so
    every stretch of u has the same share of what is left to learn.  Where `importance` keeps the objective, this
    changes it: levels that are hard count more.

    Continuous diffusion for categorical data, arXiv:2211.15089 (time warping; there a parametric curve).

    Args:
        decay: of a bin's mean over its last losses, in [0, 1).
        power: of the loss, at least 0.
        share: that stays uniform, in (0, 1].

    Raises ValueError for numbers outside these ranges.
    """
    _count("bins", bins)
    if not 0 <= decay < 1 or not power >= 0 or not 0 < share <= 1:
        raise ValueError(
            f"decay must be in [0, 1), power at least 0, share in (0, 1], got {decay!r}, {power!r}, {share!r}"
        )
    return Warped(_base(law), decay, power, share, bins)


class Tracked(NamedTuple):
    """A running mean for each bin; ``weight`` is how much of it has been seen (0 at first, tends to 1)."""

    mean: Array
    weight: Array


@value
class Warped:
    law: Any
    decay: Any
    power: Any
    share: Any
    bins: int = static()
    factory = "warped"

    def __call__(self, process: Process, u: Any) -> Level:
        return self.law(process, u)

    def init(self) -> Tracked:
        return Tracked(jnp.zeros(self.bins), jnp.zeros(self.bins))

    def probabilities(self, memory: Tracked) -> Array:
        """The law of the bins, (bins,), sum 1; uniform until all have been seen."""
        seen = memory.weight > 0
        size = jnp.where(seen, memory.mean / jnp.where(seen, memory.weight, 1.0), 0.0)
        size = jnp.where(size > 0, jnp.where(size > 0, size, 1.0) ** self.power, 0.0)
        total = jnp.sum(size)
        ready = jnp.all(seen) & (total > 0)
        learned = (1 - self.share) * size / jnp.where(total > 0, total, 1.0) + self.share / self.bins
        return jnp.where(ready, learned, 1 / self.bins)

    def place(self, memory: Tracked, v: Array) -> tuple[Array, Array]:
        return quantile(self.probabilities(memory), v)[0], jnp.ones_like(v)

    def update(self, memory: Tracked, u: Array, losses: Array) -> Tracked:
        index = _bin(u, self.bins)
        count = jnp.zeros(self.bins).at[index].add(1.0)
        batch = jnp.zeros(self.bins).at[index].add(losses) / jnp.maximum(count, 1.0)
        kept = self.decay**count  # as many steps of the average as losses
        return Tracked(kept * memory.mean + (1 - kept) * batch, kept * memory.weight + (1 - kept))


# --- from easy to hard ------------------------------------------------------------------------------------------------


def curriculum(
    law: Law | None = None, clusters: int = 20, patience: int = 200, decay: float = 0.99, tolerance: float = 0.0
) -> Curriculum:
    """Noisy levels first: the ``clusters`` parts of ``law`` come in one by one, each when the loss has stopped falling.

    Stage k trains on the k + 1 noisiest of the equal parts of the quantiles.  The next stage begins when a running
    mean of the loss has had no new minimum (by a factor ``1 - tolerance``) for ``patience`` steps; in the last stage,
    all of ``law``, training goes on.  ``clusters = 1`` is ``law`` itself.

    Denoising Task Difficulty-based Curriculum for Training Diffusion Models, arXiv:2403.10348.

    Args:
        clusters, patience: positive integers.
        decay: of the running mean, in [0, 1).
        tolerance: in [0, 1).

    Raises ValueError for numbers outside these ranges.
    """
    _count("clusters", clusters)
    _count("patience", patience)
    if not 0 <= decay < 1 or not 0 <= tolerance < 1:
        raise ValueError(f"decay and tolerance must be in [0, 1), got {decay!r} and {tolerance!r}")
    return Curriculum(_base(law), decay, tolerance, clusters, patience)


class Stage(NamedTuple):
    """Of a curriculum: the stage, the running mean of the loss in it and its weight, the least and how long ago."""

    stage: Array
    mean: Array
    weight: Array
    least: Array
    waited: Array


@value
class Curriculum:
    law: Any
    decay: Any
    tolerance: Any
    clusters: int = static()
    patience: int = static()
    factory = "curriculum"

    def __call__(self, process: Process, u: Any) -> Level:
        return self.law(process, u)

    def init(self) -> Stage:
        zero = jnp.zeros(())
        return Stage(jnp.zeros((), jnp.int32), zero, zero, zero + jnp.inf, jnp.zeros((), jnp.int32))

    def place(self, memory: Stage, v: Array) -> tuple[Array, Array]:
        share = (memory.stage + 1) / self.clusters
        return 1 - share * (1 - v), jnp.ones_like(v)

    def update(self, memory: Stage, u: Array, losses: Array) -> Stage:
        del u
        mean = self.decay * memory.mean + (1 - self.decay) * jnp.mean(losses)
        weight = self.decay * memory.weight + (1 - self.decay)
        current = mean / weight
        better = current < (1 - self.tolerance) * memory.least
        least = jnp.where(better, current, memory.least)
        waited = jnp.where(better, 0, memory.waited + 1)
        on = (waited >= self.patience) & (memory.stage < self.clusters - 1)
        # what was reached in a stage says nothing of the next
        fresh = self.init()._replace(stage=memory.stage + 1)
        here = Stage(memory.stage, mean, weight, least, waited)
        return jax.tree.map(lambda new, old: jnp.where(on, new, old), fresh, here)


def quantile(chances: Array, v: Array) -> tuple[Array, Array]:
    """``(u, bin)``: u in (0, 1) whose density is ``K chances[k]`` on the k-th of K equal bins, for v uniform."""
    ends = jnp.cumsum(chances)
    index = jnp.clip(jnp.searchsorted(ends, v, side="right"), 0, chances.size - 1)
    inside = jnp.clip((v - (ends[index] - chances[index])) / chances[index], 0.0, 1.0)
    return (index + inside) / chances.size, index


def _bin(u: Array, bins: int) -> Array:
    return jnp.clip(jnp.floor(u * bins), 0, bins - 1).astype(jnp.int32)


def _base(law: Law | None) -> Any:
    return uniform() if law is None else as_value(law)


def _count(name: str, number: Any) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{name} must be a positive integer, got {number!r}")
