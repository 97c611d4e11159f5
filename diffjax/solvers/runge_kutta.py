"""Runge-Kutta methods on the probability-flow ODE ``dx/dt = alpha' x0 + sigma' eps`` in time, and Euler-Maruyama.

A step to sigma = 0 is first order, ``x' = alpha_s x0``, and makes its further stages where nothing is read from them:
no stage is evaluated at sigma = 0.
"""

from __future__ import annotations

import numpy as np

from diffjax.levels import Array, Grid, Level, is_traced, namespace, root, squared_diffusion, static, value
from diffjax.solvers.coefficients import difference, exponential, stochastic_exponential, velocity_reading
from diffjax.solvers.linear import Linear, Table, stack

# name: (order, nodes c of stages 2.., rows a of stages 2.., weights b)
_TABLEAUS = {
    "euler": (1, (), (), (1.0,)),
    "heun": (2, (1.0,), ((1.0,),), (0.5, 0.5)),
    "midpoint": (2, (0.5,), ((0.5,),), (0.0, 1.0)),
}


def euler() -> Linear:
    """Euler in time: ``x_s = x_t + (s - t) dx/dt``; for flow matching and EDM this is DDIM.  Order 1, one call.

    Score-Based Generative Modeling through Stochastic Differential Equations, arXiv:2011.13456, section 4.3.
    """
    return _runge_kutta("euler")


def heun() -> Linear:
    """Heun's method in time: the average of the slopes at both ends.  Order 2, two calls.

    The last step, to sigma = 0, is Euler's; its second call is made and weighs nothing.
    Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364, algorithm 1.
    """
    return _runge_kutta("heun")


def midpoint() -> Linear:
    """The midpoint method in time: the slope half way.  Order 2, two calls."""
    return _runge_kutta("midpoint")


def _runge_kutta(name: str) -> Linear:
    order, nodes, _, _ = _TABLEAUS[name]
    return Linear(RungeKutta(name), order=order, calls=1 + len(nodes))


@value
class RungeKutta:
    name: str = static()

    def __repr__(self) -> str:
        return f"{self.name}()"

    def table(self, grid: Grid) -> Table:
        _, nodes, rows, weights = _TABLEAUS[self.name]
        t, s = grid.t, grid.s
        xp = namespace(t)
        step = difference(t, s)
        last = s.sigma == 0
        one, zero = xp.ones_like(step), xp.zeros_like(step)
        levels = tuple(_between(grid, c, _lowered(last, t.time)) for c in nodes)
        reads = xp.stack([stack(*velocity_reading(grid, level)) for level in (t, *levels)], axis=1)
        stages = tuple(stack(one, *(xp.where(last, 0.0, a) * step for a in row)) for row in rows)
        # the last step reads the clean estimate itself
        keep, weight = exponential(t, s)
        reads = xp.where(last[:, None, None], stack(zero, one)[:, None], reads)
        out = [xp.where(last, keep, one), xp.where(last, weight, weights[0] * step)]
        out += [xp.where(last, zero, b * step) for b in weights[1:]]
        return Table(stack(*out), stages, levels, reads)


def _between(grid: Grid, fraction: float, last: Array) -> Level:
    """The level a fraction of the way through every step, in time; that of the start where the step is the last."""
    xp = namespace(grid.t)
    time = xp.where(last, grid.t.time, grid.t.time + fraction * (grid.s.time - grid.t.time))
    return grid.process.level(time, trailing=grid.t.alpha.ndim - grid.t.time.ndim)


def euler_maruyama(eta: Array = 1.0) -> Linear:
    """Euler-Maruyama on the reverse SDE ``dx = [f x - (1 + eta^2)/2 g^2 score] dt + eta g dW``.

    eta = 1 is the time reversal of the forward SDE.  Where the SDE is singular, at alpha = 0, and for the last step
    to sigma = 0 the exact step for a constant clean estimate is taken instead.
    Score-Based Generative Modeling through Stochastic Differential Equations, arXiv:2011.13456, appendix E.
    One denoiser call a step, weak order 1.

    Raises ValueError unless eta >= 0.
    """
    if not is_traced(eta) and not (np.ndim(eta) == 0 and eta >= 0 and np.isfinite(eta)):
        raise ValueError(f"eta must be a finite number of at least 0, got {eta!r}.")
    deterministic = not is_traced(eta) and eta == 0
    return Linear(EulerMaruyama(eta), order=1, draws=0 if deterministic else 1)


@value
class EulerMaruyama:
    eta: Array
    factory = "euler_maruyama"

    def table(self, grid: Grid) -> Table:
        t, s = grid.t, grid.s
        xp = namespace(t, self.eta)
        singular = (t.alpha == 0) | (s.sigma == 0)
        # values at singular rows are replaced below; any regular time keeps them finite
        time = xp.where(_lowered(singular, t.time), 0.5 * grid.process.end, t.time)
        level = grid.process.level(time, trailing=t.alpha.ndim - t.time.ndim)
        widen = (Ellipsis,) + (None,) * (t.alpha.ndim - t.time.ndim)
        schedule = grid.process.schedule
        drift = (schedule.alpha_rate(time) / schedule.alpha(time))[widen]
        g2 = squared_diffusion(schedule, time)[widen]
        pull = 0.5 * (1 + self.eta**2) * g2 / level.sigma**2
        step = difference(t, s)
        keep, weight = 1 + step * (drift + pull), -step * pull * level.alpha
        std = self.eta * root(g2 * xp.abs(step))
        exact = stochastic_exponential(t, s, xp.minimum(self.eta, 1.0))
        columns = [xp.where(singular, b, a) for a, b in zip((keep, weight, std), exact, strict=True)]
        if not is_traced(self.eta) and self.eta == 0:
            columns = columns[:2]
        return Table(stack(*columns))


def _lowered(mask: Array, like: Array) -> Array:
    """A mask shaped like alpha as one shaped like time: the trailing singleton axes dropped."""
    return mask.reshape(like.shape)
