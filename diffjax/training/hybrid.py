"""The hybrid loss of a network that also predicts the variance of the reverse step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from diffjax.levels import Array, Grid, Level, Process, Tree, is_traced, namespace, static, value
from diffjax.likelihood.bounds import step_bound
from diffjax.predictions import Prediction
from diffjax.training.adaptive import Learning, importance
from diffjax.training.losses import Denoising, Items, denoising
from diffjax.training.times import MARGIN


def hybrid(
    prediction: Prediction,
    apply: Callable[..., tuple],
    grid: Grid,
    *,
    weight: float | int = 1e-3,
    decoder: Callable[[Tree, Tree, Tree, Level], Array] | None = None,
    resampled: bool = False,
    dropout: float | int = 0.0,
    null: PyTree = None,
) -> Any:
    """L_simple + weight L_vlb over the steps of a grid, for ``apply(params, x, t, condition) -> (output, v)``.

        loss = mean |output - target|^2 + weight N KL(q(x_s | x_t, x0) | p(x_s | x_t)) / (D log 2)

    at a step drawn uniformly: N steps, D entries, so L_vlb is in bits per entry of the data.  The bound's gradient
    does not reach the mean of p: L_simple teaches the mean, the bound the variance (`predictions.learned_range`, which
    is what then samples).

    Args:
        prediction: of ``output``; of the grid's process.
        grid: the chain, from noise to data, without gaps.
        weight: of L_vlb.
        decoder: of the last step where that goes to sigma = 0 (`likelihood.discretised_decoder`): minus its log
            probability takes the divergence's place.  Without one the last step has no such term.
        resampled: draw steps by importance (`importance`), which makes the loss one with a memory.
        dropout, null: as in `denoising`.

    Returns a loss ``(params, key, x0, condition) -> (B,)``, resampled one with ``init`` and ``apply``.

    Improved Denoising Diffusion Probabilistic Models, arXiv:2102.09672.

    Raises ValueError for a grid with gaps or a weight below 0.
    """
    if grid.gaps:
        raise ValueError("hybrid needs a grid without gaps: the bound is one of a chain.")
    if not is_traced(weight) and not weight >= 0:
        raise ValueError(f"weight must be at least 0, got {weight!r}.")
    law = Steps(jax.tree.map(jnp.asarray, grid.t))
    base = denoising(prediction, apply, law=law, dropout=dropout, null=null)
    loss = Hybrid(base, jax.tree.map(jnp.asarray, grid.s), weight, decoder)
    if not resampled:
        return loss
    return Learning(dataclasses.replace(loss, base=dataclasses.replace(base, law=importance(law, len(grid)))))


@value
class Steps:
    """The law of the levels at the starts of steps, each as often."""

    t: Level
    factory = "steps"

    def __call__(self, process: Process, u: Array) -> Level:
        del process
        return jax.tree.map(lambda leaf: leaf[_index(u, self.t)], self.t)


def _index(u: Array, t: Level) -> Array:
    # from the noise, which is where grids begin, for u towards 1
    count = t.time.shape[0]
    return count - 1 - jnp.clip(jnp.floor(u * count), 0, count - 1).astype(jnp.int32)


@value
class Given:
    """A denoiser that says what it has been told, whatever the state."""

    x0: Tree
    share: Tree

    def __call__(self, x: Tree, level: Level) -> Tree:
        return self.x0

    def with_variance(self, x: Tree, level: Level) -> tuple[Tree, Tree]:
        return self.x0, self.share


@value
class Hybrid:
    base: Denoising
    s: Level
    weight: Any
    decoder: Callable | None = static()
    factory = "hybrid"

    law = property(lambda self: self.base.law)
    weighting = property(lambda self: self.base.weighting)

    def draw(self, key: PRNGKeyArray, x0: PyTree, condition: PyTree = None) -> Items:
        return self.base.draw(key, x0, condition)

    def one(self, params: PyTree, item: Items) -> Array:
        """The loss of one sample."""
        prediction = self.base.prediction
        u = jnp.clip(item.u, MARGIN, 1 - MARGIN)
        t = self.law(prediction.process, u)
        index = _index(u, self.s)
        s = jax.tree.map(lambda leaf: leaf[index], self.s)
        x, eps = self.base.seen(params, item, t)
        found = []

        def output_only(*arguments: Any) -> Tree:
            output, v = self.base.apply(*arguments)
            found.append(v)
            return output

        output = prediction.network(output_only, params, x, t, item.condition)
        share = jax.tree.map(lambda v: jnp.clip(0.5 * (v + 1), 0.0, 1.0), found[0])
        clean = prediction.to_x0(output, x, t)
        squares = jax.tree.map(lambda a, b: jnp.square(a - b), output, prediction.encode(item.x0, eps, t))
        size = sum(leaf.size for leaf in jax.tree.leaves(squares))
        simple = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(squares)) / size
        bits = self.s.time.shape[0] * self._divergence(item, x, clean, share, t, s) / (size * jnp.log(2.0))
        return simple + self.weight * bits

    def _divergence(self, item: Items, x: Tree, clean: Tree, share: Tree, t: Level, s: Level) -> Array:
        last = s.sigma == 0
        # at sigma = 0 there is no Gaussian to compare with: some other level stands in, and is not looked at
        safe = jax.tree.map(lambda own, other: jnp.where(last, other, own), s, _between(t))
        term = step_bound(item.key, item.x0, Given(clean, share), t, safe, variance="learned", stop_mean=True)
        if self.decoder is None:
            return jnp.where(last, 0.0, term)
        return jnp.where(last, -self.decoder(item.x0, jax.lax.stop_gradient(clean), x, t), term)

    def each(self, params: PyTree, items: Items) -> Array:
        """The losses of all, or of any part, of what `draw` returned."""
        return jax.vmap(self.one, (None, 0))(params, items)

    def __call__(self, params: PyTree, key: PRNGKeyArray, x0: PyTree, condition: PyTree = None) -> Array:
        """The losses of a batch, one for each sample; arrays have a leading axis of length B."""
        return self.each(params, self.draw(key, x0, condition))


def _between(t: Level) -> Level:
    """A level with half the noise."""
    xp = namespace(t)
    return t._replace(sigma=0.5 * t.sigma, half_log_snr=t.half_log_snr + xp.log(2.0))
