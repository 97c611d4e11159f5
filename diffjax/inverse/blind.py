"""Blind problems: the sample and what parametrises the operator are one state, and drawn together.

The state is the tree ``{"image": x, "kernel": k}`` and the measurement ``y = A_k x + noise``, a nonlinear operator of
both.  With priors that are independent the posterior mean of the pair is the pair of posterior means, so that `joint`
is exact where its parts are.  Every method for nonlinear operators then applies unchanged: `dps`, `likelihood` and
`lgd` (as guidance, or in `diffjax.steer`), `daps`, `pnp_dm`, `enkg`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.corrections import transform
from diffjax.inverse.gradient_steps import GradientStep
from diffjax.inverse.images import blur
from diffjax.inverse.measurement import Measurement
from diffjax.inverse.nonlinear import Nonlinear, nonlinear
from diffjax.levels import Array, Level, Solver, Tree, as_value, is_traced, remembers, static, value
from diffjax.solvers.arguments import number


def joint(parts: dict[str, Any]) -> Joint:
    """The denoiser of independent parts of a tree: ``{name: parts[name](x[name], level)}``, each by its own denoiser.

    That is E[x_0 | x_t] of the whole where the parts are independent and every part's is its own.  Network evaluations:
    the sum of the parts'.

    Raises ValueError without parts, or if one remembers.

    >>> import diffjax, jax.numpy as jnp
    >>> both = joint({"image": diffjax.oracles.gaussian(0.0, 1.0), "kernel": diffjax.oracles.gaussian(2.0, 0.0)})
    >>> found = both({"image": jnp.array(1.0), "kernel": jnp.array(1.0)}, diffjax.processes.flow().level(0.5))
    >>> float(found["image"]), float(found["kernel"])
    (1.0, 2.0)
    """
    if not parts:
        raise ValueError(f"parts must name at least one denoiser, got {parts!r}.")
    for name, part in parts.items():
        if remembers(part):
            raise ValueError(f"joint cannot hold a denoiser that remembers, got {part!r} as {name!r}.")
    return Joint({name: as_value(part) for name, part in parts.items()})


@value
class Joint:
    parts: dict
    factory = "joint"

    def __call__(self, x: Tree, level: Level) -> Tree:
        return {name: part(x[name], level) for name, part in self.parts.items()}

    def check(self, t: Level) -> None:
        for part in self.parts.values():
            transform.check(part, t)

    def evaluations(self, level: Level) -> Array:
        return sum(transform.evaluations(part, level) for part in self.parts.values())


def blind(family: Callable[[Array], Any], shape: Any, kernel_shape: Any) -> Nonlinear:
    """``y = family(k)(x)``: an operator whose parameters k are part of the state ``{"image": x, "kernel": k}``.

    Args:
        family: from the parameters to an operator, linear or not; it may be given tracers.
        shape, kernel_shape: of x and of k, or trees of shapes.

    Raises ValueError if a shape is not one.
    """
    return nonlinear(Blind(as_value(family)), {"image": shape, "kernel": kernel_shape})


@value
class Blind:
    family: Any

    def __call__(self, x: Tree) -> Tree:
        return self.family(x["kernel"])(x["image"])


def blind_blur(shape: tuple[int, ...], kernel_shape: tuple[int, ...], normalised: bool = False) -> Nonlinear:
    """`blur` with an unknown kernel: ``y = k * x``, circular, over the kernel's axes.

    ``normalised`` divides the kernel by its sum, as in the released code; then its scale is not determined by y.

    Raises ValueError if the kernel does not fit the shape.
    """
    return blind(Blurred(tuple(shape), normalised), tuple(shape), tuple(kernel_shape))


@value
class Blurred:
    shape: tuple = static()
    normalised: bool = static()

    def __call__(self, kernel: Array) -> Any:
        return blur(kernel / jnp.sum(kernel) if self.normalised else kernel, self.shape)


def blind_dps(solver: Solver, measurement: Measurement, step: Array = 1.0, sparsity: Tree = 0.0) -> GradientStep:
    """DPS of image and operator in parallel: after each step both take the gradient of one joint misfit.

        (x, k) <- (x, k) - step grad_{x_t, k_t} ( |y - A_{k0} x0| + sparsity |k0|_1 )

    with the clean estimates x0(x_t) and k0(k_t) of `joint`.  Any operator of any tree; it is `dps` with a penalty on
    the estimates.  Not a sampler of the posterior, for the reasons of `dps`; scale and place of image and kernel are
    determined by their priors alone.  One call of each denoiser and one vector-Jacobian product a step.

    Args:
        measurement: of `blind`, say; any operator and noise.
        step: at least 0, the same for both, as published.
        sparsity: at least 0: a number for the whole state, or a tree with one for every leaf of it,
            ``{"image": 0.0, "kernel": 0.1}``.

    Parallel Diffusion Models of Operator and Image for Blind Inverse Problems, arXiv:2211.10656.

    Raises ValueError for a solver without ``update``, and a step or sparsity below 0.
    """
    if not hasattr(solver, "update"):
        raise ValueError(f"blind_dps needs a solver of one call a step with an update, got {solver!r}.")
    number("step", step)
    for leaf in jax.tree.leaves(sparsity):
        number("sparsity", leaf)
    plain = not is_traced(sparsity) and not any(jax.tree.leaves(sparsity))
    return GradientStep(solver, measurement, step, None if plain else Sparsity(sparsity), project=False)


@value
class Sparsity:
    """``sum strength |x0|_1`` over the leaves."""

    strength: Tree

    def __call__(self, x0: Tree) -> Array:
        strength = self.strength
        if jax.tree.structure(strength) != jax.tree.structure(x0):
            strength = jax.tree.map(lambda leaf: self.strength, x0)
        return sum(jax.tree.leaves(jax.tree.map(lambda leaf, s: s * jnp.sum(jnp.abs(leaf)), x0, strength)))
