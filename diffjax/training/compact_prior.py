"""DiffIR: a restorer told by a short vector, which few steps of diffusion draw from the degraded image.

    first, second, draw = prior_restorer(...), prior_diffusion(...), restored(...)

Stage one trains an encoder that sees the clean image, and the restorer with it.  Stage two trains the diffusion of the
encoder's vectors, through its whole sampler and together with the restorer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.levels import Array, Grid, Level, Row, Solver, Tree, static, value
from diffjax.predictions.prediction import Prediction
from diffjax.samplers.sequential import sample
from diffjax.solvers.arguments import number


def mean_absolute(a: Tree, b: Tree) -> Array:
    """The mean of |a - b| over all entries of all leaves."""
    errors = jax.tree.leaves(jax.tree.map(lambda u, v: jnp.abs(u - v), a, b))
    return sum(leaf.sum() for leaf in errors) / sum(leaf.size for leaf in errors)


def prior_restorer(
    encode: Callable, restore: Callable, distance: Callable[[Tree, Tree], Array] = mean_absolute
) -> PriorRestorer:
    """Stage one: the loss ``distance(restore(y, z), x0)`` with ``z = encode(x0, y)``, of encoder and restorer together.

    ``loss(params, key, x0, y) -> (B,)`` with parameters ``{"encode": ..., "restore": ...}``.

    Args:
        encode: ``encode(params, x0, y) -> z``, short: the restorer must not be able to copy x0 from it.
        restore: ``restore(params, y, z) -> x0``.

    DiffIR: Efficient Diffusion Model for Image Restoration, arXiv:2303.09472 (its stage one).
    """
    return PriorRestorer(encode, restore, distance)


@value
class PriorRestorer:
    encode: Callable = static()
    restore: Callable = static()
    distance: Callable = static()
    factory = "prior_restorer"

    def __call__(self, params: Tree, key: Array, x0: Tree, y: Tree) -> Array:
        del key

        def one(x0: Tree, y: Tree) -> Array:
            z = self.encode(params["encode"], x0, y)
            return self.distance(self.restore(params["restore"], y, z), x0)

        return jax.vmap(one)(x0, y)


def prior_sampler(
    prediction: Prediction, apply: Callable, describe: Callable, solver: Solver, grid: Grid, quiet: bool = True
) -> PriorSampler:
    """Few-step diffusion of a vector told by y: ``sampler(params, key, y, z)`` with z the state at the grid's start.

    Args:
        prediction, apply: of the network ``apply(params, z, t, condition)``, parameters ``params["denoise"]``.
        describe: ``describe(params, y) -> condition``, parameters ``params["describe"]``; made once a sample.
        solver: theirs is `diffjax.solvers.ancestral`, quiet.
        grid: short; theirs has 4 steps, from almost no signal (what z noised to its start still tells of z, the vector
            drawn from noise cannot know) to sigma = 0.
        quiet: leave out the noise that the solver adds.

    DiffIR: Efficient Diffusion Model for Image Restoration, arXiv:2303.09472 (its stage two).
    """
    return PriorSampler(prediction, solver, grid, apply, describe, quiet)


def silence(key: Array, index: Array, row: Row, x: Tree, draws: int) -> tuple[Tree, ...]:
    """A source of noise that adds none."""
    del key, index, row
    return (jax.tree.map(jnp.zeros_like, x),) * draws


@value
class PriorSampler:
    prediction: Prediction
    solver: Any
    grid: Grid
    apply: Callable = static()
    describe: Callable = static()
    quiet: bool = static()
    factory = "prior_sampler"

    def __call__(self, params: Tree, key: Array, y: Tree, z: Tree) -> Tree:
        denoise = self.prediction.decode(self.apply, params["denoise"], self.describe(params["describe"], y))
        return sample(key, denoise, self.solver, self.grid, x=z, noise=silence if self.quiet else None).x

    @property
    def start(self) -> Level:
        return self.grid.start


def prior_diffusion(
    sampler: PriorSampler,
    encode: Callable,
    restore: Callable,
    teacher: Tree,
    weight: Array = 1.0,
    distance: Callable[[Tree, Tree], Array] = mean_absolute,
    joint: bool = True,
) -> PriorDiffusion:
    """Stage two: the loss ``distance(restore(y, z'), x0) + weight distance(z', z)``, through the sampler.

    ``z = encode(x0, y)`` of stage one, held constant; z' is what the sampler makes of z noised to the grid's start.
    ``loss(params, key, x0, y) -> (B,)`` with parameters ``{"denoise": ..., "describe": ..., "restore": ...}``, the last
    best from stage one.  So the vector need not be right, only useful, and the restorer learns what it is worth.

    Args:
        sampler: of `prior_sampler`; each sample's derivative goes through all its steps.
        encode, teacher: the encoder of stage one and its parameters, which are not trained.
        weight: of the vector's distance, at least 0.
        joint: False trains the diffusion alone, by the second term: the restorer stays as it is.

    DiffIR: Efficient Diffusion Model for Image Restoration, arXiv:2303.09472 (its stage two).

    Raises ValueError for a negative weight.
    """
    number("weight", weight)
    return PriorDiffusion(sampler, teacher, weight, encode, restore, distance, joint)


@value
class PriorDiffusion:
    sampler: Any
    teacher: Tree
    weight: Array
    encode: Callable = static()
    restore: Callable = static()
    distance: Callable = static()
    joint: bool = static()
    factory = "prior_diffusion"

    def __call__(self, params: Tree, key: Array, x0: Tree, y: Tree) -> Array:
        start, process = self.sampler.start, self.sampler.grid.process

        def one(key: Array, x0: Tree, y: Tree) -> Array:
            key_noise, key_steps = jax.random.split(key)
            z = jax.lax.stop_gradient(self.encode(self.teacher, x0, y))
            eps = jax.random.normal(key_noise, z.shape, z.dtype)
            found = self.sampler(params, key_steps, y, process.noised(z, eps, start).astype(z.dtype))
            apart = self.distance(found, z)
            if not self.joint:
                return apart
            return self.distance(self.restore(params["restore"], y, found), x0) + self.weight * apart

        return jax.vmap(one)(jax.random.split(key, jax.tree.leaves(x0)[0].shape[0]), x0, y)


def restored(sampler: PriorSampler, restore: Callable, params: Tree, key: Array, y: Tree, size: int) -> Tree:
    """A restored y: ``restore(y, z)`` with z of ``size`` numbers drawn by the sampler from noise.

    Evaluations: the sampler's, of a network of vectors, and one of the restorer.
    """
    key_start, key_steps = jax.random.split(key)
    grid = sampler.grid
    z = sampler(params, key_steps, y, grid.process.prior(key_start, (size,), level=grid.start))
    return restore(params["restore"], y, z)
