"""NoiseRefine: an initial noise from which the model without guidance arrives where the guided model does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.levels import Array, Grid, Level, Solver, Tree, as_value, static, value
from diffjax.samplers.sequential import sample


def noise_refinement(
    plain: Any,
    guided: Any,
    solver: Solver,
    grid: Grid,
    refine: Callable[[Tree, Tree], Tree],
    gradient: str = "truncated",
) -> NoiseRefinement:
    """The loss ``loss(params, key, x) -> (B,)`` of a map of initial noise, ``mean( (S(refine(x)) - S_guided(x))^2 )``.

    S is the sampler without guidance, from the refined start, and S_guided the sampler with guidance from the same
    start as drawn.  Afterwards ``sample(key, plain, solver, grid, x=refine(params, x))`` costs what no guidance costs.
    Network evaluations: those of both samplers.

    Args:
        plain, guided: the denoiser without and with guidance.
        solver: deterministic, or the two would meet different noise.
        refine: ``refine(params, x) -> x`` of one start; the paper adds a small correction, ``x + g(params, x)``.
        gradient: "exact" through the whole sampler, or "truncated", which holds the model's velocity: each call's
            derivative is that of ``x0 + (x - stop(x))``, so that no backward pass of the network is needed.

    A Noise is Worth Diffusion Guidance, arXiv:2412.03895 (the loss; "truncated" is in the spirit of its
    multistep score distillation, which drops the network's Jacobian; written down here from that idea alone).

    Raises ValueError for a solver with noise and another gradient.
    """
    if solver.draws:
        raise ValueError(f"solver must be deterministic, got {solver!r}.")
    if gradient not in ("exact", "truncated"):
        raise ValueError(f"gradient must be 'exact' or 'truncated', got {gradient!r}.")
    return NoiseRefinement(as_value(plain), as_value(guided), solver, grid, refine, gradient)


@value
class NoiseRefinement:
    plain: Any
    guided: Any
    solver: Any
    grid: Grid
    refine: Callable = static()
    gradient: str = static()
    factory = "noise_refinement"

    def __call__(self, params: Tree, key: Array, x: Tree) -> Array:
        keys = jax.random.split(key, jax.tree.leaves(x)[0].shape[0])
        plain = self.plain if self.gradient == "exact" else Held(self.plain)

        def one(key: Array, x: Tree) -> Array:
            wanted = sample(key, self.guided, self.solver, self.grid, x=x).x
            found = sample(key, plain, self.solver, self.grid, x=self.refine(params, x)).x
            squares = jax.tree.map(lambda a, b: jnp.square(a - jax.lax.stop_gradient(b)), found, wanted)
            leaves = jax.tree.leaves(squares)
            return sum(leaf.sum() for leaf in leaves) / sum(leaf.size for leaf in leaves)

        return jax.vmap(one)(keys, x)


@value
class Held:
    """A denoiser with the derivative of ``x0 + (x - stop(x))``: dx/dt of a straight path does not change."""

    denoise: Any

    def __call__(self, x: Tree, level: Level) -> Tree:
        x0 = jax.lax.stop_gradient(self.denoise(jax.lax.stop_gradient(x), level))
        return jax.tree.map(lambda a, b: a + (b - jax.lax.stop_gradient(b)), x0, x)
