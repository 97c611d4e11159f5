"""The denoising loss, for any process, prediction, weighting and law of the noise level.

For one sample with data x0, noise eps and a level drawn from a law,

    loss = w(level) * mean((network(alpha x0 + sigma eps, level, condition) - target)^2)

where the prediction defines the network's input and the target. It is written for one sample and
vmapped, and every sample has a key of its own, so that its noise does not depend on the others.

A law of levels is a quantile function `(process, u) -> Level` of a uniform u in (0, 1), which leaves
it free how the u of a batch are drawn: independently, or stratified, one in each of B equal strata,
as in "Variational Diffusion Models" (arXiv:2107.00630), which lowers the variance of the loss.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from diffjax.levels import CLEAN, Level, Process, is_traced, static, value
from diffjax.predictions import Prediction

Law: TypeAlias = Callable[[Process, Any], Level]
Weighting: TypeAlias = Callable[[Level], Any]

# u stays this far from 0 and 1: a score target is infinite at sigma = 0, a log-SNR at either end.
MARGIN = 2.0**-24


@value
class Uniform:
    low: Any
    high: Any
    factory = "uniform"

    def __call__(self, process: Process, u: Any) -> Level:
        return process.level(process.end * (self.low + (self.high - self.low) * u))


def uniform(low: float | int = 0.0, high: float | int = 1.0) -> Uniform:
    """Times uniform between `low` and `high`, in units of the process's end.

    Raises:
        ValueError: unless 0 <= low < high <= 1.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"low={low} and high={high} must satisfy 0 <= low < high <= 1")
    return Uniform(low, high)


@value
class LogitNormal:
    mean: Any
    std: Any
    factory = "logit_normal"

    def __call__(self, process: Process, u: Any) -> Level:
        return process.level(process.end * jax.nn.sigmoid(_normal(self, u)))


def logit_normal(mean: float | int = 0.0, std: float | int = 1.0) -> LogitNormal:
    """Times t with logit(t / end) normal: most training in the middle of the path.

    "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", arXiv:2403.03206,
    equation 19.
    """
    return LogitNormal(mean, _positive("std", std))


@value
class LogNormal:
    mean: Any
    std: Any
    factory = "log_normal"

    def __call__(self, process: Process, u: Any) -> Level:
        level = process.level(half_log_snr=-_normal(self, u))
        # The same level by its time, which is clipped to the process: its ends are finite.
        return process.level(jnp.clip(level.time, 0.0, process.end))


def log_normal(mean: float | int = -1.2, std: float | int = 1.2) -> LogNormal:
    """Noise levels with log(sigma / alpha) normal, cut off at the ends of the process.

    "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv:2206.00364, table 1.
    """
    return LogNormal(mean, _positive("std", std))


def _normal(law: Any, u: Any) -> Any:
    return law.mean + law.std * jax.scipy.special.ndtri(u)


def _positive(name: str, number: Any) -> Any:
    if not number > 0:
        raise ValueError(f"{name} must be positive, got {number}")
    return number


def unweighted(level: Level) -> Array:
    """Weight one: the plain squared error of the prediction's own target."""
    return jnp.ones_like(level.time)


def weight_limit(step: Any, steps: Any, low: float | int = 5.0, high: float | int = 500.0) -> Any:
    """The largest weight of a loss at a training step: ``low (high / low)^(step / steps)``, and none from ``steps`` on.

    Clean levels, whose weights are the largest, come into the loss gradually: ``jnp.minimum(weight, limit)``.
    Fast Diffusion Model, arXiv:2306.06991 (its loss weight warm-up).

    Raises ValueError unless 0 < low <= high and steps is above 0, where they are concrete.

    >>> float(weight_limit(50, 100)), float(weight_limit(100, 100))
    (50.0, inf)
    """
    if not is_traced(low, high, steps) and not (0 < low <= high and steps > 0):
        raise ValueError(f"needs 0 < low <= high and steps > 0, got low={low!r}, high={high!r}, steps={steps!r}.")
    share = jnp.asarray(step, jnp.float32) / steps
    return jnp.where(share < 1, low * (high / low) ** jnp.minimum(share, 1.0), jnp.inf)


@value
class Denoising:
    prediction: Prediction
    law: Any
    dropout: Any
    null: Any
    apply: Callable = static()
    weighting: Callable = static()
    stratified: bool = static()
    factory = "denoising"

    def one(
        self,
        params: PyTree,
        key: PRNGKeyArray,
        u: Float[Array, ""],
        x0: PyTree,
        condition: PyTree = None,
    ) -> Float[Array, ""]:
        """The loss of one sample, at the level that belongs to u in (0, 1)."""
        key_noise, key_drop = jax.random.split(key)
        level = self.law(self.prediction.process, jnp.clip(u, MARGIN, 1 - MARGIN))
        x0 = self.prediction.process.enter(x0, CLEAN)
        eps = _noise_like(key_noise, x0)
        x = jax.tree.map(lambda a, b: level.alpha * a + level.sigma * b, x0, eps)
        if self.null is not None:
            dropped = jax.random.bernoulli(key_drop, self.dropout)
            condition = jax.tree.map(
                lambda null, told: jnp.where(dropped, jnp.asarray(null, told.dtype), told), self.null, condition
            )
        output = self.prediction.network(self.apply, params, x, level, condition)
        target = self.prediction.encode(x0, eps, level)
        squares = jax.tree.map(lambda a, b: jnp.square(a - b), output, target)
        leaves = jax.tree.leaves(squares)
        mean = sum(jnp.sum(leaf) for leaf in leaves) / sum(leaf.size for leaf in leaves)
        return jnp.asarray(self.weighting(level) * mean)

    def draw(self, key: PRNGKeyArray, x0: PyTree, condition: PyTree = None) -> tuple:
        """All that is random about a batch: the arguments of `one` after the parameters, with a leading axis B."""
        if self.null is not None and condition is None:
            raise ValueError("dropout of the condition needs a batch with a condition, got None")
        count = jax.tree.leaves(x0)[0].shape[0]
        key_samples, key_order = jax.random.split(key)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key_samples, jnp.arange(count))
        pairs = jax.vmap(jax.random.split)(keys)
        u = jax.vmap(jax.random.uniform)(pairs[:, 0])
        if self.stratified:
            # Which sample gets which stratum is drawn too: a batch may be in some order.
            u = (jax.random.permutation(key_order, count) + u) / count
        return pairs[:, 1], u, x0, condition

    def each(self, params: PyTree, items: tuple) -> Float[Array, " part"]:
        """The losses of all, or of any part, of what `draw` returned."""
        return jax.vmap(self.one, (None, 0, 0, 0, 0))(params, *items)

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
    weighting: Weighting = unweighted,
    dropout: float | int = 0.0,
    null: PyTree = None,
    stratified: bool = True,
) -> Denoising:
    """The denoising loss `loss(params, key, x0, condition) -> (B,)` of a batch.

    Args:
        prediction: what the network predicts, and of which process.
        apply: the network, `apply(params, x, t, condition)` on one sample.
        law: quantile function `(process, u) -> Level`; default `uniform()` in time.
        weighting: `weighting(level) -> number`.
        dropout: probability that a sample's condition is replaced by `null`, as classifier-free
            guidance needs ("Classifier-Free Diffusion Guidance", arXiv:2207.12598).
        null: the condition that means "not told", in the structure of a condition.
        stratified: spread the levels of a batch evenly; False draws them independently.

    Raises:
        ValueError: dropout outside [0, 1], or dropout without a null condition.
    """
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be in [0, 1], got {dropout}")
    if dropout > 0 and null is None:
        raise ValueError(f"dropout={dropout} needs null, the condition that means 'not told'")
    law = uniform() if law is None else law
    null = None if dropout == 0 else null
    return Denoising(prediction, law, dropout, null, apply, weighting, stratified)


def _noise_like(key: PRNGKeyArray, x0: PyTree) -> PyTree:
    leaves, tree = jax.tree.flatten(x0)
    keys = [key] if len(leaves) == 1 else list(jax.random.split(key, len(leaves)))
    drawn = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)
