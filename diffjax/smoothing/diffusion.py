"""Diffusions given what comes later: guided by the h-transform of a linear process, and weighted.

For dX = b(t, X) dt + sigma(t, X) dW and a linear auxiliary process dX = (B(t) X + beta(t)) dt + s(t) dW, whose
pull-back of h is Gaussian, log h(t, x) = c + F . x - x . H x / 2, the guided process and its weight are, with
r = F - H x, a = sigma sigma^T and a~ = s s^T,

    dX = (b + a r) dt + sigma dW
    log w = int (L - L~) h / h dt = int (b - B X - beta) . r + [r . (a - a~) r - tr((a - a~) H)] / 2 dt

and h(0, x) E[w] is the likelihood.  Between two times of the grid the auxiliary process is a linear-Gaussian kernel,
whose moments solve linear differential equations; so H, F and c are never integrated where they blow up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.levels import Array, Process, as_value, is_traced, static, value
from diffjax.smoothing.composition import Chain, chain
from diffjax.smoothing.gaussian import LinearGaussian, gaussian, pulled
from diffjax.smoothing.potentials import Guided, Point, Quadratic, floats

# --- processes --------------------------------------------------------------------------------------------------------


def linear_sde(matrix: Any, shift: Any, scale: Any) -> LinearSDE:
    """The process ``dX = (matrix X + shift) dt + scale dW``: arrays (D, D), (D,), (D, M), or functions of t."""
    wrap = lambda given: as_value(given) if callable(given) else floats(given)
    return LinearSDE(wrap(matrix), wrap(shift), wrap(scale))


def linearised(drift: Callable, scale: Any, around: Array) -> LinearSDE:
    """The linear process with the drift's value and Jacobian at the point ``around``, and its scale there.

    Args:
        drift: ``(x, t) -> (D,)``.
        scale: an array (D, M) or ``(x, t) -> (D, M)``.
        around: shape (D,), for instance what was observed at the end; a drift that is affine in x is itself.
    """
    around = floats(around)
    return LinearSDE(
        Jacobian(as_value(drift), around), Offset(as_value(drift), around), ScaleAt(as_scale(scale), around)
    )


@value
class LinearSDE:
    matrix: Any
    shift: Any
    scale: Any
    factory = "linear_sde"

    def at(self, t: Array) -> tuple[Array, Array, Array]:
        """The three at a time."""
        parts = (self.matrix, self.shift, self.scale)
        matrix, shift, scale = (part(t) if callable(part) else part for part in parts)
        return matrix, shift, scale


@value
class Jacobian:
    drift: Any
    around: Array

    def __call__(self, t: Array) -> Array:
        return jax.jacfwd(lambda x: self.drift(x, t))(self.around)


@value
class Offset:
    drift: Any
    around: Array

    def __call__(self, t: Array) -> Array:
        value, slope = jax.jvp(lambda x: self.drift(x, t), (self.around,), (self.around,))
        return value - slope


@value
class ScaleAt:
    scale: Any
    around: Array

    def __call__(self, t: Array) -> Array:
        return self.scale(self.around, t)


@value
class Fixed:
    scale: Array

    def __call__(self, x: Array, t: Array) -> Array:
        return self.scale


def as_scale(scale: Any) -> Any:
    """An array or ``(x, t) -> array`` as a value to be called."""
    return as_value(scale) if callable(scale) else Fixed(floats(scale))


def reversed_dynamics(process: Process, denoise: Any) -> tuple[Any, Any]:
    """The reverse SDE of a process of vectors, in the time ``end - t`` that grows: ``(drift, scale)``.

    Guided by a potential at its end these are the draws of a diffusion model tilted by a twist: with the exact one the
    guided drift is that of the reverse SDE of `diffjax.guidance.tilted`.  Times are below ``end``, where the data are
    and the score has no value.
    """
    return ReverseDrift(process, as_value(denoise)), ReverseScale(process)


@value
class ReverseDrift:
    process: Process
    denoise: Any

    def __call__(self, x: Array, t: Array) -> Array:
        return -self.process.reverse_sde(self.denoise).drift(x, self.process.end - t)


@value
class ReverseScale:
    process: Process

    def __call__(self, x: Array, t: Array) -> Array:
        return self.process.sde().diffusion(x, self.process.end - t) * jnp.eye(len(x), dtype=x.dtype)


# --- segments ---------------------------------------------------------------------------------------------------------


def diffusion(drift: Callable, scale: Any, times: Array, auxiliary: Any) -> Diffusion:
    """The diffusion ``dX = drift(X, t) dt + scale(X, t) dW`` from ``times[0]`` to ``times[-1]`` as a kernel.

    Backwards the auxiliary process pulls h back exactly (up to the fourth-order solution of its moments); forwards the
    guided process is walked by Euler-Maruyama on the times, its weight by the left-point rule: both are of order 1 in
    the step.  Where drift and scale are the auxiliary process's, the weight is 1.  Towards a `point` (a bridge) its
    scale must be that of the process at the point, and the last state is the point.  The path: states at times[1:].

    Args:
        drift: ``(x, t) -> (D,)``, a function or a value.
        scale: an array (D, M) or ``(x, t) -> (D, M)``.
        times: shape (N + 1,), increasing.
        auxiliary: a `linear_sde`; `linearised` makes one.

    Automatic Backward Filtering Forward Guiding for Markov processes and graphical models, arXiv:2010.03509.

    Raises ValueError for times that do not increase and shapes that do not fit.
    """
    times, drift, scale, draws = _checked(drift, scale, times, auxiliary)
    return Diffusion(drift, scale, times, auxiliary, draws)


def euler(drift: Callable, scale: Any, times: Array, auxiliary: Any) -> Chain:
    """The Euler-Maruyama chain of a diffusion, a `chain` of `gaussian` kernels: weights are exact for the chain.

    The kernel of a step is ``N(x + drift d, scale scale^T d)``, its surrogate that of the auxiliary process; guided
    draws are conditioned on the h after the step, so that a bridge needs no small steps at its end, and pulled(x)
    exp(log w) is unbiased for the chain with any number of steps.  Arguments and errors are those of `diffusion`.
    """
    times, drift, scale, _ = _checked(drift, scale, times, auxiliary)

    def step(t: Array, d: Array) -> Any:
        matrix, shift, spread = auxiliary.at(t)
        eye = jnp.eye(len(shift), dtype=times.dtype)
        surrogate = LinearGaussian(eye + d * matrix, d * shift, jnp.sqrt(d) * spread)
        return gaussian(EulerMean(drift, t, d), EulerScale(scale, t, d), surrogate)

    return chain(jax.vmap(step)(times[:-1], jnp.diff(times)))


@value
class EulerMean:
    drift: Any
    time: Array
    step: Array

    def __call__(self, x: Array) -> Array:
        return x + self.step * self.drift(x, self.time)


@value
class EulerScale:
    scale: Any
    time: Array
    step: Array

    def __call__(self, x: Array) -> Array:
        return jnp.sqrt(self.step) * self.scale(x, self.time)


class Steps(NamedTuple):
    """The message of a diffusion: the potentials at the beginning of every step, and that at the end."""

    potentials: Quadratic
    target: Any


@value
class Diffusion:
    drift: Any
    scale: Any
    times: Array
    auxiliary: LinearSDE
    draws: int = static()
    factory = "diffusion"
    parts = 1

    def noise(self, key: Array, index: Array = 0) -> Array:
        shape = (self.times.shape[0] - 1, self.draws)
        return jax.random.normal(jax.random.fold_in(key, index), shape, self.times.dtype)

    def backward(self, h: Quadratic | Point) -> tuple[Steps, Quadratic]:
        steps = jax.vmap(lambda t, d: transition(self.auxiliary, t, d))(self.times[:-1], jnp.diff(self.times))
        final = pulled(h, *(leaf[-1] for leaf in steps))

        def body(h: Quadratic, step: tuple) -> tuple[Quadratic, Quadratic]:
            source = pulled(h, *step)
            return source, source

        source, before = jax.lax.scan(body, final, tuple(leaf[:-1] for leaf in steps), reverse=True)
        whole = jax.tree.map(lambda many, one: jnp.concatenate([many, one[None]]), before, final)
        return Steps(whole, h), source

    def forward(self, message: Steps, x: Array, noise: Array) -> Guided:
        def body(x: Array, inputs: tuple) -> tuple[Array, tuple[Array, Array]]:
            t, d, h, z = inputs
            x, log_weight = guided_step(self, h, x, t, d, z)
            return x, (x, log_weight)

        steps = (self.times[:-1], jnp.diff(self.times), message.potentials, noise)
        x, (path, log_weights) = jax.lax.scan(body, jnp.asarray(x, self.times.dtype), steps)
        if isinstance(message.target, Point):
            x = jnp.asarray(message.target.x, x.dtype)
            path = path.at[-1].set(x)
        return Guided(x, jnp.sum(log_weights), path)


def guided_step(segment: Diffusion, h: Quadratic, x: Array, t: Array, d: Array, z: Array) -> tuple[Array, Array]:
    """A step of Euler-Maruyama under guidance, and the logarithm of its weight."""
    drift, scale, r = segment.drift(x, t), segment.scale(x, t), h.gradient(x)
    matrix, shift, spread = segment.auxiliary.at(t)
    pull, other = scale.T @ r, spread.T @ r
    excess = scale @ scale.T - spread @ spread.T
    rate = (drift - matrix @ x - shift) @ r
    rate = rate + 0.5 * (pull @ pull - other @ other - jnp.sum(excess * h.precision))
    return x + d * (drift + scale @ pull) + jnp.sqrt(d) * scale @ z, d * rate


def transition(process: LinearSDE, t: Array, step: Array) -> tuple[Array, Array, Array]:
    """``(Phi, m, Q)`` of X_{t + step} = Phi X_t + m + N(0, Q): one step of the classical Runge-Kutta method."""

    def rate(state: tuple, at: Array) -> tuple:
        phi, mean, covariance = state
        matrix, shift, scale = process.at(at)
        grown = matrix @ covariance
        return matrix @ phi, matrix @ mean + shift, grown + grown.T + scale @ scale.T

    add = lambda state, slope, weight: jax.tree.map(lambda u, v: u + weight * v, state, slope)
    eye = jnp.eye(process.at(t)[1].shape[0], dtype=jnp.result_type(t))
    start = (eye, 0.0 * eye[0], 0.0 * eye)
    first = rate(start, t)
    second = rate(add(start, first, step / 2), t + step / 2)
    third = rate(add(start, second, step / 2), t + step / 2)
    fourth = rate(add(start, third, step), t + step)
    end = start
    for slope, weight in ((first, 1), (second, 2), (third, 2), (fourth, 1)):
        end = add(end, slope, weight * step / 6)
    return end


def _checked(drift: Callable, scale: Any, times: Array, auxiliary: Any) -> tuple[Array, Any, Any, int]:
    """Times, drift and scale as values, and the dimension of the noise."""
    if not isinstance(auxiliary, LinearSDE):
        raise ValueError(f"auxiliary must be a linear_sde, got {auxiliary!r}.")
    times = floats(times)
    if times.ndim != 1 or times.shape[0] < 2:
        raise ValueError(f"times must have shape (N + 1,) with N of at least 1, got {times.shape}.")
    if not is_traced(times) and not bool(jnp.all(jnp.diff(times) > 0)):
        raise ValueError(f"times must increase, got {times!r}.")
    drift, scale = as_value(drift), as_scale(scale)
    size = jax.eval_shape(auxiliary.at, times[0])[1].shape
    x = jax.ShapeDtypeStruct(size, times.dtype)
    moved, spread = jax.eval_shape(drift, x, times[0]).shape, jax.eval_shape(scale, x, times[0]).shape
    if moved != size or len(spread) != 2 or spread[:1] != size:
        raise ValueError(
            f"the auxiliary process has states of shape {size}: drift must return that and scale a matrix of as many"
            f" rows, got {moved} and {spread}."
        )
    return times, drift, scale, spread[1]
