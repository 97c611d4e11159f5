"""The denoising loss, for any process, prediction, weighting, law of the noise level and coupling.

For one sample with data x0, noise eps and a level drawn from a law,

    loss = w(level) * mean((network(x, level, condition) - target)^2),      x = alpha x0 + sigma eps,

where the prediction defines the network's input and the target. What else training methods change are switches:

* the law of the level (`training.times`), also one that learns from the losses (`training.adaptive`);
* the weight w (`training.weightings`), also a learned one (`uncertainty`);
* which noise goes with which data (`training.couplings`);
* which state the network sees (`states`: `perturbed`, `scheduled_sampling`);
* whether it is told its own estimate (`self_conditioning`).

A loss is written for one sample and vmapped, and every sample has a key of its own, so that its noise does not depend
on the others. What couples samples (strata, assignments) is drawn first, for the whole batch: `draw`, then `each`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from diffjax.levels import CLEAN, Level, as_value, combine, static, value
from diffjax.predictions import Prediction
from diffjax.training.adaptive import Learning, learns
from diffjax.training.couplings import independent
from diffjax.training.self_conditioning import estimate
from diffjax.training.times import MARGIN, Law, uniform
from diffjax.training.weightings import Uncertainty, factor, unweighted

KEPT = 0x5E1F  # folded into a sample's key for whether it is told its own estimate


class Items(NamedTuple):
    """All that is random about a batch, and the batch; every leaf has a leading axis B."""

    key: Any  # of what a sample draws for itself
    u: Any  # the quantile of the level, in (0, 1)
    x0: PyTree  # in the process's standard coordinates
    eps: PyTree
    condition: PyTree  # after dropout


@value
class Denoising:
    prediction: Prediction
    law: Any
    dropout: Any
    null: Any
    weighting: Any
    coupling: Any
    states: Any
    self_conditioning: Any
    apply: Callable = static()
    stratified: bool = static()
    factory = "denoising"

    def draw(self, key: PRNGKeyArray, x0: PyTree, condition: PyTree = None) -> Items:
        """What is random about a batch; arrays have a leading axis of length B."""
        if self.null is not None and condition is None:
            raise ValueError("dropout of the condition needs a batch with a condition, got None")
        count = jax.tree.leaves(x0)[0].shape[0]
        key_samples, key_order = jax.random.split(key)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key_samples, jnp.arange(count))
        key_u, keys = _pairs(keys)
        key_noise, key_drop = _pairs(keys)
        shape = getattr(self.law, "shape", ())
        u = jax.vmap(lambda key: jax.random.uniform(key, shape))(key_u)
        if self.stratified and not shape:
            # Which sample gets which stratum is drawn too: a batch may be in some order.
            u = (jax.random.permutation(key_order, count) + u) / count
        x0 = jax.vmap(lambda one: self.prediction.process.enter(one, CLEAN))(x0)
        eps = self.coupling(key_noise, x0)
        if self.null is not None:
            dropped = jax.vmap(lambda key: jax.random.bernoulli(key, self.dropout))(key_drop)
            condition = jax.vmap(lambda drop, told: _replaced(drop, self.null, told))(dropped, condition)
        return Items(keys, u, x0, eps, condition)

    def one(self, params: PyTree, item: Items) -> Float[Array, ""]:
        """The loss of one sample."""
        learned = isinstance(self.weighting, Uncertainty)
        params, rates = (params["network"], params["uncertainty"]) if learned else (params, None)
        u = jnp.clip(item.u, MARGIN, 1 - MARGIN)
        level = self.law(self.prediction.process, u)
        x, eps = self.seen(params, item, level)
        condition = item.condition
        if self.self_conditioning is not None:
            told = jax.random.bernoulli(jax.random.fold_in(item.key, KEPT), self.self_conditioning)
            condition = (condition, estimate(self.prediction, self.apply, params, x, level, condition, told))
        output = self.prediction.network(self.apply, params, x, level, condition)
        target = self.prediction.encode(item.x0, eps, level)
        squares = jax.tree.map(lambda a, b: jnp.square(a - b), output, target)
        weight = factor(self.weighting, self.prediction, self.law, u, level)
        loss = _weighted(weight, level, squares)
        return self.weighting.loss(rates, level, loss) if learned else loss

    def seen(self, params: PyTree, item: Items, level: Level) -> tuple[PyTree, PyTree]:
        """``(x, eps)``: the state that the network sees, and the noise that would make it of the data."""
        if self.states is None:
            return combine((level.alpha, level.sigma), (item.x0, item.eps)), item.eps
        return self.states(self, params, item, level)

    def each(self, params: PyTree, items: Items) -> Float[Array, " part"]:
        """The losses of all, or of any part, of what `draw` returned."""
        return jax.vmap(self.one, (None, 0))(params, items)

    def __call__(
        self, params: PyTree, key: PRNGKeyArray, x0: PyTree, condition: PyTree = None
    ) -> Float[Array, " batch"]:
        """The losses of a batch, one for each sample; arrays have a leading axis of length B."""
        return self.each(params, self.draw(key, x0, condition))


def denoising(
    prediction: Prediction,
    apply: Callable,
    *,
    law: Law | None = None,
    weighting: Any = unweighted,
    dropout: float | int = 0.0,
    null: PyTree = None,
    stratified: bool = True,
    coupling: Any = None,
    states: Any = None,
    self_conditioning: float | int = 0.0,
) -> Any:
    """The denoising loss `loss(params, key, x0, condition) -> (B,)` of a batch.

    Args:
        prediction: what the network predicts, and of which process.
        apply: the network, `apply(params, x, t, condition)` on one sample.
        law: quantile function `(process, u) -> Level` (`training.times`), default `uniform()` in time; or one that
            learns (`importance`, `warped`, `curriculum`).
        weighting: `weighting(level) -> number` of the target's squared error, or one of `training.weightings`.  With
            `uncertainty` the parameters are `{"network": ..., "uncertainty": weighting.init()}`.
        dropout: probability that a sample's condition is replaced by `null`, as classifier-free
            guidance needs (Classifier-Free Diffusion Guidance, arXiv:2207.12598).
        null: the condition that means "not told", in the structure of a condition.
        stratified: spread the levels of a batch evenly; False draws them independently.
        coupling: which noise goes with which data (`training.couplings`), default `independent()`.
        states: which state the network sees: None, the noised data; `perturbed`, `scheduled_sampling`.
        self_conditioning: probability that the network is told its own estimate, which costs another evaluation; it is
            then given the condition `(condition, estimate)`, see `training.stacked`.  0 never asks it to.

    Returns a plain loss; with a law or weighting that learns one with a memory (`init`, `apply`), which `train_step`
    keeps in `TrainState.loss_state`: give `init(..., loss=loss)`.

    Raises:
        ValueError: probabilities outside [0, 1], or dropout without a null condition.
    """
    for name, chance in {"dropout": dropout, "self_conditioning": self_conditioning}.items():
        if not 0 <= chance <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {chance}")
    if dropout > 0 and null is None:
        raise ValueError(f"dropout={dropout} needs null, the condition that means 'not told'")
    loss = Denoising(
        prediction,
        uniform() if law is None else as_value(law),
        dropout,
        None if dropout == 0 else null,
        as_value(weighting),
        independent() if coupling is None else as_value(coupling),
        states,
        self_conditioning or None,
        apply,
        stratified,
    )
    return Learning(loss) if learns(loss) else loss


def _pairs(keys: Any) -> tuple[Any, Any]:
    pairs = jax.vmap(jax.random.split)(keys)
    return pairs[:, 0], pairs[:, 1]


def _replaced(dropped: Any, null: PyTree, told: PyTree) -> PyTree:
    return jax.tree.map(lambda null, told: jnp.where(dropped, jnp.asarray(null, told.dtype), told), null, told)


def _weighted(weight: Any, level: Level, squares: PyTree) -> Float[Array, ""]:
    """The mean over all entries; a weight per part of the state has the shape of the time."""
    leaves = jax.tree.leaves(squares)
    count = sum(leaf.size for leaf in leaves)
    if jnp.ndim(weight) == 0:
        return jnp.asarray(weight * (sum(jnp.sum(leaf) for leaf in leaves) / count))
    wide = jnp.reshape(weight, jnp.shape(level.alpha))
    return jnp.asarray(sum(jnp.sum(wide * leaf) for leaf in leaves) / count)
