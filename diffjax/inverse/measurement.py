"""What was measured: an operator, its output y, and the law of the noise."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.inverse.operators import Shapes, shapes, shapes_of
from diffjax.inverse.standard import Standard, StandardFunction, standardised
from diffjax.levels import Array, Process, Tree, is_traced, value


def gaussian_noise(std: Tree = 0.1) -> GaussianNoise:
    """``y = A x + std z``: a number for all of y, or a tree that broadcasts against it.  std = 0 is an exact y.

    Raises ValueError for a concrete std that is negative or not finite.
    """
    for leaf in jax.tree.leaves(std):
        if not is_traced(leaf) and not (np.all(np.isfinite(leaf)) and np.all(np.asarray(leaf) >= 0)):
            raise ValueError(f"std must be finite and not negative, got {leaf!r}.")
    return GaussianNoise(std)


@value
class GaussianNoise:
    std: Tree
    factory = "gaussian_noise"

    def variance(self, y: Tree) -> Tree:
        """The variance of every entry of y."""
        stds = _along(self.std, y)
        return jax.tree.map(lambda s, leaf: jnp.broadcast_to(jnp.asarray(s, leaf.dtype) ** 2, leaf.shape), stds, y)

    def log_likelihood(self, y: Tree, mean: Tree) -> Array:
        """log p(y | A x = mean) in nats; an exact y has 0 where it is met and -inf elsewhere."""

        def leaf(y: Array, mean: Array, variance: Array) -> Array:
            exact = variance == 0
            safe = jnp.where(exact, 1.0, variance)
            noisy = -0.5 * ((y - mean) ** 2 / safe + jnp.log(2 * jnp.pi * safe))
            return jnp.sum(jnp.where(exact, jnp.where(y == mean, 0.0, -jnp.inf), noisy))

        return sum(jax.tree.leaves(jax.tree.map(leaf, y, mean, self.variance(mean))))

    def draw(self, key: Array, mean: Tree) -> Tree:
        """A measurement of what has the noiseless one ``mean``."""
        leaves, structure = jax.tree.flatten(mean)
        stds = jax.tree.leaves(_along(self.std, mean))
        keys = jax.random.split(key, len(leaves))
        draws = [
            leaf + jnp.asarray(s, leaf.dtype) * jax.random.normal(k, leaf.shape, leaf.dtype)
            for k, leaf, s in zip(keys, leaves, stds, strict=True)
        ]
        return structure.unflatten(draws)


def poisson_noise(rate: Array = 1.0) -> PoissonNoise:
    """``y ~ Poisson(rate A x)``, counts; A x is not negative, and an estimate below 1e-3 counts as 1e-3.

    Methods for Gaussian noise use its surrogate, ``y / rate = A x + noise`` of variance ``max(y, 1) / rate^2``.

    Diffusion Posterior Sampling for General Noisy Inverse Problems, arXiv:2209.14687, section 3.2.

    Raises ValueError unless rate > 0.
    """
    if not is_traced(rate) and not (np.all(np.isfinite(rate)) and np.all(np.asarray(rate) > 0)):
        raise ValueError(f"rate must be finite and above 0, got {rate!r}.")
    return PoissonNoise(rate)


@value
class PoissonNoise:
    rate: Array
    factory = "poisson_noise"

    def variance(self, y: Tree) -> Tree:
        """The variance of every entry of ``y / rate``, estimated from y."""
        return jax.tree.map(lambda leaf: jnp.maximum(leaf, 1.0) / self.rate**2, y)

    def log_likelihood(self, y: Tree, mean: Tree) -> Array:
        """log p(y | A x = mean) in nats."""

        def leaf(y: Array, mean: Array) -> Array:
            expected = self.rate * jnp.maximum(mean, 1e-3)
            return jnp.sum(y * jnp.log(expected) - expected - jax.scipy.special.gammaln(y + 1))

        return sum(jax.tree.leaves(jax.tree.map(leaf, y, mean)))

    def draw(self, key: Array, mean: Tree) -> Tree:
        """A measurement of what has the noiseless one ``mean``."""
        leaves, structure = jax.tree.flatten(mean)
        keys = jax.random.split(key, len(leaves))
        return structure.unflatten(
            [
                jax.random.poisson(k, self.rate * jnp.maximum(leaf, 1e-3)).astype(leaf.dtype)
                for k, leaf in zip(keys, leaves, strict=True)
            ]
        )


def measurement(operator: Any, y: Tree, noise: Any = 0.1) -> Measurement:
    """What all methods take: the forward operator, its noisy output, and the noise.

    Args:
        operator: a linear operator of this package, or a nonlinear one where the method can.
        y: of the operator's ``output_shape``.
        noise: `gaussian_noise`, `poisson_noise`, or a number, the standard deviation of Gaussian noise.

    Raises ValueError if y has not the operator's output shape, or the noise is negative.

    >>> import diffjax, jax.numpy as jnp
    >>> seen = measurement(diffjax.inverse.identity((2,)), jnp.array([1.0, 0.0]), 0.5)
    >>> float(seen.log_likelihood(jnp.array([1.0, 0.0])))
    -0.45158...
    """
    if not hasattr(noise, "log_likelihood"):
        noise = gaussian_noise(noise)
    expected, found = shapes(operator.output_shape), shapes_of(y)
    if expected != found:
        raise ValueError(f"y must have the operator's output shape {expected.tree}, got {found.tree}.")
    if isinstance(noise, GaussianNoise):
        _check_std(noise.std, expected)
    return Measurement(operator, y, noise)


@value
class Measurement:
    operator: Any
    y: Tree
    noise: Any
    factory = "measurement"

    def under(self, process: Process) -> Measurement:
        """The same measurement as one of the standard state of ``process``, where that has coordinates, else itself.

        Denoisers, twists and solvers live there (`diffjax.coordinates`): ``y - A m_0 = (A B) z_0 + n``.  Samplers enter
        and leave data as ever.  A spectrum is kept by isometries (a shift, an orthogonal basis); for other linear
        coordinates of small samples `decomposed` makes one.  Functions that draw (`daps`, `pnp_dm`, `red_diff`) take
        the measurement of data and do this themselves.

        Raises ValueError where the coordinates are not of the operator's samples, and for a measurement that has been
        under a process already.

        >>> import diffjax, jax.numpy as jnp
        >>> process = diffjax.processes.changed(diffjax.processes.vp(), diffjax.coordinates.shifted(jnp.ones(2)))
        >>> seen = measurement(diffjax.inverse.identity((2,)), jnp.array([3.0, 0.0]), 0.5)
        >>> [float(entry) for entry in seen.under(process).y]
        [2.0, -1.0]
        """
        if process.coordinates is None:
            return self
        if not self.of_data:
            raise ValueError(f"the measurement is one of a standard state already: {self!r}.")
        shiftable = isinstance(self.noise, GaussianNoise)
        operator, y = standardised(self.operator, self.y, process, shiftable)
        return Measurement(operator, y, self.noise)

    @property
    def of_data(self) -> bool:
        """Whether the operator acts on data, which a sampler of a process with coordinates refuses."""
        return not isinstance(self.operator, Standard | StandardFunction)

    def log_likelihood(self, x0: Tree) -> Array:
        """log p(y | x0) in nats."""
        mean = self.operator(x0)
        y = jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), self.y, mean)
        return self.noise.log_likelihood(y, mean)

    def observed(self, like: Tree) -> Tree:
        """y in the units of A x and the floating type of ``like``, a sample."""
        rate = getattr(self.noise, "rate", 1.0)
        dtype = jnp.result_type(*jax.tree.leaves(like))
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype) / jnp.asarray(rate, dtype), self.y)

    def residual(self, x0: Tree) -> Tree:
        """``y - A x0``, in the units of A x."""
        return jax.tree.map(lambda y, mean: y - mean, self.observed(x0), self.operator(x0))

    def variance(self, like: Tree) -> Tree:
        """The variance of the noise of every entry of `observed` (for Poisson noise an estimate)."""
        dtype = jnp.result_type(*jax.tree.leaves(like))
        return self.noise.variance(jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), self.y))

    @property
    def isotropic(self) -> bool:
        """Whether the noise is Gaussian with one standard deviation for all of y."""
        return (
            isinstance(self.noise, GaussianNoise)
            and jax.tree.structure(self.noise.std).num_leaves == 1
            and (np.ndim(jax.tree.leaves(self.noise.std)[0]) == 0)
        )


def _along(std: Tree, y: Tree) -> Tree:
    """std as a tree of y's structure."""
    if jax.tree.structure(std) == jax.tree.structure(y):
        return std
    return jax.tree.map(lambda leaf: std, y)


def _check_std(std: Tree, expected: Shapes) -> None:
    if jax.tree.structure(std) != expected.structure and len(jax.tree.leaves(std)) != 1:
        raise ValueError(f"std must be a number, or a tree like y, got {std!r}.")
    leaves = jax.tree.leaves(std)
    for size, leaf in zip(expected.sizes, leaves * (len(expected.sizes) if len(leaves) == 1 else 1), strict=True):
        try:
            fits = np.broadcast_shapes(np.shape(leaf), size) == size
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"std of shape {np.shape(leaf)} must broadcast against y of shape {size}.")
