"""D-Flow: a measurement, or any cost of the sample, solved by optimising the noise that the sample is made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.levels import Array, Grid, Solver, Tree, as_value, dot, remembers
from diffjax.samplers.sequential import sample
from diffjax.solvers.arguments import number


class Optimised(NamedTuple):
    """What `d_flow` gives back."""

    x: Tree  # the sample of the best noise found
    noise: Tree  # the state at the grid's first level
    costs: Array  # (iterations,) before each iteration
    nfe: Array  # evaluations, one pass for the cost and one for the gradient each; line searches are not counted


def d_flow(
    denoise: Any,
    solver: Solver,
    grid: Grid,
    x: Tree,
    cost: Callable[[Tree], Array],
    *,
    iterations: int = 20,
    penalty: Array = 0.0,
    memory: int = 10,
) -> Optimised:
    """The noise whose sample costs the least, by L-BFGS with a line search through the whole sampler.

        argmin_z cost(x_1(z)) + penalty |z|^2 / 2,     x_1 the end of the solver's steps from z.

    The gradient in z is ``(dx_1/dz)^T grad cost``: the Jacobian keeps the sample to what the model makes.  With
    penalty 1, unit noise and the cost ``-log p(y | x)``, the mode of the noise given y: for Gaussian data the posterior
    mean.  Without one the optimum may be far from any typical noise, and how far is a matter of the start and of the
    iterations.

    Args:
        solver: without noise.
        x: where z starts, a state at the grid's first level: noise, or what inversion makes of a guess.
        cost: a scalar of the sample, finite, for instance ``lambda x: -seen.log_likelihood(x)``.
        iterations: at least 1; each keeps one state a step (`sample`'s remat) and differentiates through all of them.
        penalty: at least 0.
        memory: of L-BFGS.  It is `optax`'s, which must be installed.

    Returns `Optimised`.

    D-Flow: Differentiating through Flows for Controlled Generation, arXiv:2402.14017.

    Raises ValueError for a solver that draws noise, a denoiser that remembers, and numbers out of range.
    """
    import optax

    number("penalty", penalty)
    if iterations < 1 or memory < 1:
        raise ValueError(f"need iterations >= 1 and memory >= 1, got {iterations!r} and {memory!r}.")
    if solver.draws or remembers(denoise):
        raise ValueError(f"d_flow needs a solver without noise and a denoiser without memory, got {solver!r}.")
    denoise, key = as_value(denoise), jax.random.key(0)
    run = lambda z: sample(key, denoise, solver, grid, x=z, remat=True)

    def objective(z: Tree) -> Array:
        return cost(run(z).x) + 0.5 * penalty * dot(z, z)

    optimiser = optax.lbfgs(memory_size=memory)
    value_and_grad = optax.value_and_grad_from_state(objective)

    def body(carry: tuple, _: None) -> tuple:
        z, state = carry
        value, gradient = value_and_grad(z, state=state)
        change, state = optimiser.update(gradient, state, z, value=value, grad=gradient, value_fn=objective)
        return (optax.apply_updates(z, change), state), value

    z = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf, jnp.float32)), x)
    (z, _), costs = jax.lax.scan(body, (z, optimiser.init(z)), None, length=iterations)
    last = run(z)
    return Optimised(last.x, z, costs, last.nfe * (2 * iterations + 1))
