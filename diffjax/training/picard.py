"""Fine-tuning a denoiser so that Picard iteration converges in fewer sweeps.

One sweep of `parallel` maps a whole trajectory to the next, ``X^{k+1} = Phi_theta(X^k)``, and its fixed point X* is the
sequential sample.  The base network's iterates X^0 .. X^K and X* are stored once; then theta is trained so that one
sweep from any of them arrives:

    loss = w(k) mean( (Phi_theta(X^k) - X*)^2 ),      k uniform on 0 .. K.

Theta starts from the base network and is used with `corrections.switched`, which ends in the base.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from diffjax.levels import Grid, Row, Solver, static, value
from diffjax.predictions import Prediction
from diffjax.samplers.flat import Flat
from diffjax.samplers.rounds import Values, draws, flattened
from diffjax.samplers.sequential import planned, prepare, sample
from diffjax.samplers.window import solve, sweep


class Iterates(NamedTuple):
    """Picard iterates of one sample: ``states`` (K + 1, N + 1, ...), their limit ``fixed`` (N + 1, ...), its noise."""

    key: PRNGKeyArray  # of the rows' noise
    states: PyTree
    fixed: PyTree


def picard_iterates(
    key: PRNGKeyArray,
    denoise: Any,
    solver: Solver,
    grid: Grid,
    shape: tuple[int, ...] | None = None,
    *,
    sweeps: int,
    x: PyTree = None,
    start: Any = None,
    dtype: Any = jnp.float32,
) -> Iterates:
    """The first ``sweeps`` Picard sweeps over the whole trajectory, from copies of its start, and the limit.

    ``denoise`` may have ``at(sweep)`` (see `corrections.switched`); the limit is that of its call.  Other arguments as
    for `sample`.  Network evaluations: (sweeps + 1) N for N rows of one call.

    Raises ValueError for sweeps < 0, and as `sample` does.
    """
    if not isinstance(sweeps, int | np.integer) or sweeps < 0:
        raise ValueError(f"sweeps must be an integer of at least 0, got {sweeps!r}")
    fixed = sample(key, denoise, solver, grid, shape, x=x, start=start, dtype=dtype, save="states").saved.states
    noise_key, first, rows, solver = prepare(key, denoise, solver, grid, shape, x, start, dtype, None)
    values = Values(denoise, solver, first, jax.tree.map(jnp.asarray, rows), None)
    flat = Flat(solver, first)

    def body(states: Any, k: Any) -> tuple[Any, Any]:
        now = denoise.at(k) if hasattr(denoise, "at") else denoise
        return _sweep(values._replace(denoise=now), flat, noise_key, states), states

    copies = jnp.broadcast_to(flat.start, (rows.t.time.shape[0] + 1, flat.start.size))
    _, states = jax.lax.scan(body, copies, jnp.arange(sweeps + 1))
    return Iterates(noise_key, jax.vmap(jax.vmap(flat.tree))(states), fixed)


def picard_weights(iterates: Iterates) -> Float[np.ndarray, " sweeps"]:
    """``w(k)`` proportional to 1 / sqrt(V(k)), V(k) the mean square of X^k - X* over a set of trajectories; mean 1.

    The weight 1 / sqrt(Var(k)) is the paper's; that the variance is this one, and that it is floored at 1e-4 of its
    largest value, is this library's reading.
    """
    squares = jax.tree.map(
        lambda a, b: np.square(np.asarray(a) - np.asarray(b)[:, None]), iterates.states, iterates.fixed
    )
    leaves = [leaf.swapaxes(0, 1).reshape(leaf.shape[1], -1) for leaf in jax.tree.leaves(squares)]
    variance = np.concatenate(leaves, axis=1).mean(axis=1)
    weights = 1 / np.sqrt(np.maximum(variance, 1e-4 * variance.max()))
    return weights / weights.mean()


@value
class PicardConsistency:
    prediction: Prediction
    solver: Any
    rows: Row
    weights: Any
    apply: Callable = static()
    factory = "picard_consistency"

    def one(self, params: PyTree, key: PRNGKeyArray, iterates: Iterates, condition: PyTree = None) -> Float[Array, ""]:
        """The loss of one trajectory, at an iterate drawn by the key."""
        count = jax.tree.leaves(iterates.states)[0].shape[0]
        k = jax.random.randint(key, (), 0, count)
        states = jax.tree.map(lambda leaf: leaf[k], iterates.states)
        first = jax.tree.map(lambda leaf: leaf[0], states)
        kind = jnp.result_type(*jax.tree.leaves(first))
        rows = jax.tree.map(lambda leaf: jnp.asarray(leaf, kind), self.rows)
        denoise = self.prediction.decode(self.apply, params, condition)
        flat = Flat(self.solver, first)
        swept = _sweep(Values(denoise, self.solver, first, rows, None), flat, iterates.key, flattened(states))
        square = jnp.mean(jnp.square(swept - flattened(iterates.fixed))[1:])
        return square if self.weights is None else jnp.asarray(self.weights, kind)[k] * square

    def __call__(
        self, params: PyTree, key: PRNGKeyArray, iterates: Iterates, condition: PyTree = None
    ) -> Float[Array, " batch"]:
        """The losses of a batch of trajectories; arrays have a leading axis of length B."""
        count = jax.tree.leaves(iterates.fixed)[0].shape[0]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
        return jax.vmap(self.one, (None, 0, 0, 0))(params, keys, iterates, condition)


def picard_consistency(
    prediction: Prediction, apply: Callable, solver: Solver, grid: Grid, *, weights: Any = None
) -> PicardConsistency:
    """The loss ``w(k) mean((Phi_theta(X^k) - X*)^2)`` of a batch, `loss(params, key, iterates, condition) -> (B,)`.

    Args:
        prediction: what the network predicts, and of which process.
        apply: the network, `apply(params, x, t, condition)` on one sample.
        solver, grid: those of the iterates; the solver has no memory beside the state, or makes one call a row.
        weights: w(0 .. K), for example `picard_weights(iterates)`; None is 1.

    Network evaluations: N a trajectory. Fits `training.train_step`, whose moving average is the network to use.

    PCM : Picard Consistency Model for Fast Parallel Sampling of Diffusion Models, arXiv:2503.19731.

    Raises ValueError for weights that are not one positive number for each iterate.
    """
    if weights is not None and (np.ndim(weights) != 1 or not np.all(np.asarray(weights) > 0)):
        raise ValueError(f"weights must be positive, one for each iterate, got {weights!r}")
    plan = planned(None, solver, grid, None, None)
    if Flat(plan.solver, jnp.zeros(1)).held:
        raise ValueError(f"solver must make one call a row or have no memory, got {solver!r}")
    return PicardConsistency(prediction, plan.solver, plan.rows, weights, apply)


def _sweep(values: Values, flat: Flat, key: PRNGKeyArray, states: Any) -> Any:
    """One Picard sweep of a whole trajectory (N + 1, D)."""
    rows = values.rows
    noise = draws(values, flat, key)(jnp.arange(rows.t.time.shape[0]))
    f, *_ = sweep("picard", flat, flat.caller(values.denoise), states[:-1], flat.init(), noise, rows, key)
    change = solve(jnp.ones_like(f[:, :1]), f - states[1:])
    return jnp.concatenate([states[:1], f + jnp.concatenate([jnp.zeros_like(change[:1]), change[:-1]])])
