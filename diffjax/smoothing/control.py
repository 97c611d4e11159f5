"""Stochastic optimal control: its value function is minus the logarithm of a potential pulled back.

Of ``dX = (b + sigma u) dt + sigma dW`` with the cost ``J(u) = E[int f(X, t) + |u|^2 / 2 dt + g(X_T)]``, with E_0 the
mean without control and W the noise of the controlled path,

    h(t, x) = E_0[exp(-int f - g) | X_t = x] = exp(-V(t, x))      u* = sigma^T grad log h
    log w = -int f - g - int |u|^2 / 2 dt - int u . dW            E_u[w] = h(0, x) for every u,  w = h(0, x) under u*

so the control of least cost is the one whose path weights do not vary, and the guided process of `diffusion` the
controlled one.  On a grid of times the identity E_u[w] = E_0[exp(..)] is exact for the Euler-Maruyama chain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.levels import Array, Tree, as_value, static, value
from diffjax.smc.resampling import log_mean, normalised
from diffjax.smoothing.diffusion import Diffusion, Steps, as_scale
from diffjax.smoothing.potentials import Quadratic, floats
from diffjax.solvers.arguments import choice, integer

LOSSES = ("log_variance", "relative_entropy", "cross_entropy")


def controlled(
    drift: Callable, scale: Any, times: Array, terminal: Callable, running: Callable | None = None
) -> Controlled:
    """The control problem of ``dX = (drift + scale u) dt + scale dW`` on a grid of times.

    Args:
        drift, scale, times: as for `diffjax.smoothing.diffusion`; the noise has M entries.
        terminal: the cost ``g(x)`` at the end; that of a potential is ``lambda x: -h(x)``.
        running: the cost ``f(x, t)`` per time; default 0.

    Raises ValueError for times that are not a vector of at least two.
    """
    times = floats(times)
    if times.ndim != 1 or times.shape[0] < 2:
        raise ValueError(f"times must have shape (N + 1,) with N of at least 1, got {times.shape}.")
    return Controlled(as_value(drift), as_scale(scale), times, as_value(terminal), as_value(running))


class Rollout(NamedTuple):
    """A controlled path: the states at times[1:], what it has cost, and the logarithm of its weight."""

    path: Array
    cost: Array
    log_weight: Array


@value
class Controlled:
    drift: Any
    scale: Any
    times: Array
    terminal: Any
    running: Any
    factory = "controlled"

    def noise(self, key: Array, x: Array) -> Array:
        """The standard normal noise of a path, (N, M)."""
        draws = jax.eval_shape(self.scale, x, self.times[0]).shape[1]
        return jax.random.normal(key, (self.times.shape[0] - 1, draws), self.times.dtype)

    def rollout(self, control: Any, x: Array, noise: Array, follow: Any = None) -> Rollout:
        """A path from x under ``follow(x, t) -> (M,)`` (default: the control), weighed for ``control``.

        ``log w = -int f - g + int |u|^2 / 2 - u . v dt - int u . dW``, with v what is followed: with v = u the weight
        of the module.  The cost is that of v.
        """

        def body(x: Array, inputs: tuple) -> tuple[Array, tuple]:
            t, d, z = inputs
            scale, u = self.scale(x, t), control(x, t)
            v = u if follow is None else follow(x, t)
            running = 0.0 if self.running is None else d * self.running(x, t)
            log_weight = -running + d * (0.5 * u @ u - u @ v) - jnp.sqrt(d) * u @ z
            x = x + d * (self.drift(x, t) + scale @ v) + jnp.sqrt(d) * scale @ z
            return x, (x, running + 0.5 * d * v @ v, log_weight)

        x = jnp.asarray(x, self.times.dtype)
        x, (path, costs, logs) = jax.lax.scan(body, x, (self.times[:-1], jnp.diff(self.times), noise))
        terminal = self.terminal(x)
        return Rollout(path, jnp.sum(costs) + terminal, jnp.sum(logs) - terminal)


def doob_control(segment: Diffusion, message: Steps) -> DoobControl:
    """The control ``scale^T grad log h`` of a guided diffusion: the optimal one where h is exact.

    Args:
        segment: a `diffusion`.
        message: what its backward map returned for ``exp(-g)``.
    """
    return DoobControl(segment.scale, segment.times[:-1], message.potentials)


@value
class DoobControl:
    scale: Any
    times: Array
    potentials: Quadratic
    factory = "doob_control"

    def __call__(self, x: Array, t: Array) -> Array:
        """At the last time of the grid that is not after t."""
        index = jnp.clip(jnp.searchsorted(self.times, t, side="right") - 1, 0, len(self.times) - 1)
        h = jax.tree.map(lambda leaf: leaf[index], self.potentials)
        return self.scale(x, t).T @ h.gradient(x)


def affine_control(steps: int, size: int, draws: int, end: float, begin: float = 0.0) -> AffineControl:
    """The control ``u = gain_i x + offset_i`` on interval i of ``steps`` equal ones of the time; all 0 to begin with.

    Args:
        steps: intervals, each with a gain (draws, size) and an offset (draws,) to be learned.
        size, draws: entries of the state and of the noise.
        end, begin: the times of the problem.

    Raises ValueError for counts below 1 and an end that is not after the beginning.
    """
    for name, given in (("steps", steps), ("size", size), ("draws", draws)):
        integer(name, given, 1, 10**6)
    if not end > begin:
        raise ValueError(f"end must be after begin, got {end!r} and {begin!r}.")
    return AffineControl(jnp.zeros((steps, draws, size)), jnp.zeros((steps, draws)), float(begin), float(end))


@value
class AffineControl:
    gain: Array
    offset: Array
    begin: float = static()
    end: float = static()
    factory = "affine_control"

    def __call__(self, x: Array, t: Array) -> Array:
        count = self.gain.shape[0]
        share = (t - self.begin) / (self.end - self.begin)
        # a time of the grid that rounding left short of where an interval begins is in it
        index = jnp.clip(jnp.floor(share * count + 1e-4).astype(jnp.int32), 0, count - 1)
        return self.gain[index] @ x + self.offset[index]


# --- learning ---------------------------------------------------------------------------------------------------------


def control_loss(kind: str = "log_variance") -> ControlLoss:
    """A loss of a control over a batch of paths, least for the optimal one: ``loss(problem, control, x, noise)``.

    - "log_variance": ``Var[log w]`` over paths that follow the present control, held fixed; 0 at the optimum, where its
      gradient has no variance either.
    - "relative_entropy": the cost J itself, KL(controlled | optimal) up to the value, by the derivative of the paths.
    - "cross_entropy": ``-sum_k w_k log dP_u / dP_v`` with normalised weights, KL(optimal | controlled): needs no
      derivative of the costs.

    ``x`` is one start; ``noise`` has a leading batch axis.  Raises ValueError for another kind.
    """
    choice("kind", kind, LOSSES)
    return ControlLoss(kind)


@value
class ControlLoss:
    kind: str = static()
    factory = "control_loss"

    def __call__(self, problem: Controlled, control: Any, x: Array, noise: Array) -> Array:
        held = jax.lax.stop_gradient(control)
        if self.kind == "relative_entropy":
            return jnp.mean(jax.vmap(lambda z: problem.rollout(control, x, z).cost)(noise))
        logs = jax.vmap(lambda z: problem.rollout(control, x, z, held).log_weight)(noise)
        if self.kind == "log_variance":
            return jnp.var(logs)
        # log w = log (dP / dP_u e^{-cost}), so that minus log dP_u is log w up to what does not depend on u
        return jnp.sum(jax.lax.stop_gradient(normalised(logs)) * logs)


class Learned(NamedTuple):
    """A control and the loss before each of the steps that led to it."""

    control: Any
    losses: Array


def learn_control(
    key: Array,
    problem: Controlled,
    control: Any,
    x: Array,
    optimiser: Any,
    *,
    steps: int,
    batch: int = 64,
    loss: Any = None,
) -> Learned:
    """Learn a control by stochastic gradients.

    Args:
        problem: `controlled`.
        control: a value ``(x, t) -> (M,)`` whose float leaves are learned: `affine_control`, a network with parameters.
        x: where the paths begin, (D,).
        optimiser: a pair ``init, update`` as optax has them, ``optax.adam(1e-2)``.
        steps, batch: updates, and paths for each.
        loss: `control_loss`.

    Raises ValueError for counts below 1 (2 paths at least).
    """
    integer("steps", steps, 1, 10**9)
    integer("batch", batch, 2, 10**9)
    loss = control_loss() if loss is None else loss

    def body(carry: tuple, key: Array) -> tuple[tuple, Array]:
        control, memory = carry
        noise = jax.vmap(lambda k: problem.noise(k, x))(jax.random.split(key, batch))
        now, gradient = jax.value_and_grad(lambda control: loss(problem, control, x, noise))(control)
        updates, memory = optimiser.update(gradient, memory, control)
        return (jax.tree.map(jnp.add, control, updates), memory), now

    start: tuple[Any, Tree] = (control, optimiser.init(control))
    (control, _), losses = jax.lax.scan(body, start, jax.random.split(key, steps))
    return Learned(control, losses)


def value_estimate(log_weights: Array) -> Array:
    """``-log mean w``: the value V(0, x) from the weights of paths under any control, (N,)."""
    return -log_mean(log_weights)
