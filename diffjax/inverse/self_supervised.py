"""DDS2M: restoration of a cube of images by an untrained network that is fitted to every state of the reverse process.

The denoiser has no training data.  Its estimate at a state is what a network of few factors, images times spectra, can
make of it: `dds2m` of a `spatio_spectral` network, under the solver `ddrm`, which brings in the measurement.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.inverse.variational import adam
from diffjax.levels import Array, Level, Tree, as_value, static, value
from diffjax.solvers.arguments import integer, number

MOST = 1_000_000
SLOPE = 0.2  # of the leaky rectifiers


# --- the network ------------------------------------------------------------------------------------------------------


def spatio_spectral(
    shape: tuple[int, int, int],
    rank: int,
    key: Array,
    widths: tuple[int, ...] = (16, 16),
    hidden: tuple[int, ...] = (64, 64),
    skip: int = 4,
) -> SpatioSpectral:
    """An untrained network whose output is a cube of low rank: ``sum_r abundance_r(h, w) endmember_r(b)``.

    Every abundance is the output of a convolutional hourglass with skip connections (halved and doubled once for each
    of ``widths``), every endmember that of a perceptron, each with weights of its own, both from fixed uniform noise.
    ``init(key)`` draws the parameters and ``network(params)`` is the cube.

    Args:
        shape: (H, W, B), H and W multiples of ``2^len(widths)``.
        rank: the number of factors.
        key: of the fixed inputs.
        hidden: the widths of the perceptron's layers.
        skip: channels of each skip connection.

    Raises ValueError for sizes that do not fit.

    >>> network = spatio_spectral((4, 4, 3), 2, jax.random.key(0), widths=(4,), hidden=(8,))
    >>> network(network.init(jax.random.key(1))).shape
    (4, 4, 3)
    """
    if len(shape) != 3 or any(n % 2 ** len(widths) for n in shape[:2]):
        raise ValueError(f"shape must be (H, W, B) with H and W multiples of {2 ** len(widths)}, got {shape!r}.")
    if not widths or not hidden or min(*widths, *hidden, skip) < 1:
        raise ValueError(f"widths, hidden and skip must be positive, got {widths!r}, {hidden!r}, {skip!r}.")
    integer("rank", rank, 1, MOST)
    first, second = jax.random.split(key)
    spatial = jax.random.uniform(first, (*shape[:2], 1))
    spectral = jax.random.uniform(second, (shape[2],))
    return SpatioSpectral(spatial, spectral, rank, tuple(widths), tuple(hidden), skip)


@value
class SpatioSpectral:
    spatial: Array  # (H, W, 1)
    spectral: Array  # (B,)
    rank: int = static()
    widths: tuple = static()
    hidden: tuple = static()
    skip: int = static()
    factory = "spatio_spectral"

    def init(self, key: Array) -> Tree:
        """Parameters, with the factors along a leading axis."""
        bands = self.spectral.shape[0]
        return jax.vmap(lambda key: self._draw(key, bands))(jax.random.split(key, self.rank))

    def _draw(self, key: Array, bands: int) -> Tree:
        def layer(patch: int, inside: int, outside: int) -> Tree:
            nonlocal key
            key, own = jax.random.split(key)
            bound = np.sqrt(1 / (patch * inside))
            kernel = jax.random.uniform(own, (patch, inside, outside), minval=-bound, maxval=bound)
            return {"kernel": kernel, "bias": jnp.zeros(outside), "scale": jnp.ones(outside)}

        down, up, skips, inside = [], [], [], 1
        for width in self.widths:
            skips.append(layer(1, inside, self.skip))
            down.append(layer(9, inside, width))
            inside = width
        middle = layer(9, inside, inside)
        for width in reversed(self.widths):
            up.append(layer(9, inside + self.skip, width))
            inside = width
        sizes = (bands, *self.hidden, bands)
        dense = [layer(1, a, b) for a, b in itertools.pairwise(sizes)]
        return {"down": down, "middle": middle, "up": up, "skip": skips, "out": layer(1, inside, 1), "dense": dense}

    def __call__(self, params: Tree) -> Array:
        abundances, endmembers = jax.vmap(lambda p: (self._abundance(p), self._endmember(p)))(params)
        return jnp.einsum("rhw,rb->hwb", abundances, endmembers)

    def _abundance(self, params: Tree) -> Array:
        h, kept = self.spatial, []
        for down, skip in zip(params["down"], params["skip"], strict=True):
            kept.append(_active(_convolved(skip, h)))
            h = _active(_convolved(down, h))
            h = h.reshape(h.shape[0] // 2, 2, h.shape[1] // 2, 2, -1).mean((1, 3))
        h = _active(_convolved(params["middle"], h))
        for up, skip in zip(params["up"], reversed(kept), strict=True):
            h = jax.image.resize(h, (2 * h.shape[0], 2 * h.shape[1], h.shape[2]), "bilinear")
            h = _active(_convolved(up, jnp.concatenate([h, skip], axis=-1)))
        return _convolved(params["out"], h, normalised=False)[..., 0]

    def _endmember(self, params: Tree) -> Array:
        h, layers = self.spectral, params["dense"]
        for layer in layers[:-1]:
            h = jax.nn.relu(h @ layer["kernel"][0] + layer["bias"])
        return h @ layers[-1]["kernel"][0] + layers[-1]["bias"]


def _convolved(layer: Tree, h: Array, normalised: bool = True) -> Array:
    """A 1x1 or 3x3 convolution with reflected borders, normalised over space."""
    kernel = layer["kernel"]
    if len(kernel) == 1:
        h = h @ kernel[0]
    else:  # as one product of shifted copies, which stays one under vmap over weights
        rows, columns = h.shape[:2]
        mode = "reflect" if min(rows, columns) > 1 else "edge"
        padded = jnp.pad(h, ((1, 1), (1, 1), (0, 0)), mode=mode)
        shifts = [padded[i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
        h = jnp.concatenate(shifts, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])
    if normalised:
        mean, variance = jnp.mean(h, (0, 1)), jnp.var(h, (0, 1))
        h = (h - mean) * jax.lax.rsqrt(variance + 1e-5) * layer["scale"]
    return h + layer["bias"]


def _active(h: Array) -> Array:
    return jax.nn.leaky_relu(h, SLOPE)


# --- fits -------------------------------------------------------------------------------------------------------------


def dds2m(
    network: Any,
    params: Tree,
    iterations: int = 20,
    optimiser: Any = None,
    average: Array = 0.9,
    variation: Array = 0.0,
    limits: tuple[float, float] | None = None,
) -> Fitted:
    """The denoiser that fits an untrained network f to the state it is given, from where the last fit ended.

        theta <- a step on  mean |x_t - alpha f(theta)|^2 + variation TV(f(theta)),   ``iterations`` times
        x0    <- average x0 + (1 - average) f(theta)  along them

    That is the variational loss of the reverse process, with what f cannot make left out as noise.  Parameters,
    optimiser and average are the denoiser's memory.  Under ``ddrm`` it is DDS2M; any solver, process and network will
    do, and what solver and measurement know of y enters through the state alone.  At alpha = 0 nothing is fitted.

    Args:
        network: ``network(params) -> x0``, `spatio_spectral` or any function.
        params: where the first fit starts.
        iterations: at each call, at least 1: so many evaluations of the network, each with its derivative.
        optimiser: with ``init(params)`` and ``update(gradient, state, params)``, as optax has them; default Adam of
            rate 0.01.
        average: in [0, 1): 0 is the last fit, theirs is 0.98 over more iterations.
        variation: at least 0, the weight of the mean absolute difference between neighbours along every axis.
        limits: the smallest and largest value of the data, to which the estimate is clipped.

    DDS2M: Self-Supervised Denoising Diffusion Spatio-Spectral Model for Hyperspectral Image Restoration,
    arXiv:2303.06682, section 3.

    Raises ValueError for arguments out of range.
    """
    _fit_checked(iterations, average)
    number("variation", variation)
    optimiser = adam(0.01) if optimiser is None else optimiser
    if limits is not None and not limits[0] < limits[1]:
        raise ValueError(f"limits must be (low, high) with low < high, got {limits!r}.")
    return Fitted(as_value(network), params, _as_argument(optimiser), average, variation, limits, iterations)


@value
class Fitted:
    network: Any
    params: Tree
    optimiser: Any
    average: Array
    variation: Array
    limits: tuple | None
    iterations: int = static()
    factory = "dds2m"

    def __repr__(self) -> str:
        return f"dds2m({self.network!r}, iterations={self.iterations!r})"

    def init(self, x: Tree) -> Tree:
        return _start(self.network, self.optimiser, self.params, x)

    def apply(self, x: Tree, level: Level, memory: Tree) -> tuple[Tree, Tree]:
        def loss(f: Tree) -> Array:
            gap = jax.tree.map(lambda leaf, clean: jnp.mean((leaf - level.alpha * clean) ** 2), x, f)
            rough = sum(total_variation(leaf) for leaf in jax.tree.leaves(f))
            return sum(jax.tree.leaves(gap)) + self.variation * rough

        memory = _fitted(self.network, self.optimiser, loss, memory, self.average, self.iterations)
        low_high = self.limits
        if low_high is None:
            return memory[2], memory
        clipped = lambda leaf: jnp.clip(leaf, low_high[0], low_high[1]).astype(leaf.dtype)
        return jax.tree.map(clipped, memory[2]), memory

    def evaluations(self, level: Level) -> Array:
        return self.iterations


def deep_prior(
    network: Any,
    params: Tree,
    measurement: Any,
    iterations: int = 500,
    optimiser: Any = None,
    average: Array = 0.9,
) -> Tree:
    """The deep image prior: ``f(theta)`` fitted to the measurement alone, ``|y - A f(theta)|^2``, for so many steps.

    What regularises is the network and the number of steps, and after too many it has fitted the noise; `dds2m` without
    the diffusion.  Arguments are those of
    `dds2m`; returns the running average of f.

    Raises ValueError for arguments out of range.
    """
    _fit_checked(iterations, average)
    optimiser, network = adam(0.01) if optimiser is None else optimiser, as_value(network)

    def loss(f: Tree) -> Array:
        parts = [jnp.mean(leaf**2) for leaf in jax.tree.leaves(measurement.residual(f))]
        return sum(parts)

    memory = _start(network, optimiser, params, jax.eval_shape(network, params))
    return _fitted(network, optimiser, loss, memory, average, iterations)[2]


def total_variation(x: Array) -> Array:
    """The sum over axes of the mean absolute difference between neighbours."""
    steps = [jnp.diff(x, axis=axis) for axis in range(x.ndim) if x.shape[axis] > 1]
    return sum(jnp.mean(jnp.abs(step)) for step in steps) if steps else jnp.zeros((), x.dtype)


@value
class Given:
    """An optimiser made of functions, as optax's are, compared by identity."""

    optimiser: Any = static()

    def init(self, params: Tree) -> Tree:
        return self.optimiser.init(params)

    def update(self, gradient: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        return self.optimiser.update(gradient, state, params)


def _as_argument(optimiser: Any) -> Any:
    numbers = [isinstance(leaf, float | int) or hasattr(leaf, "dtype") for leaf in jax.tree.leaves(optimiser)]
    return optimiser if all(numbers) else Given(optimiser)


def _fit_checked(iterations: int, average: Array) -> None:
    integer("iterations", iterations, 1, MOST)
    number("average", average, 0.0, 1.0)


def _start(network: Any, optimiser: Any, params: Tree, like: Tree) -> tuple:
    """The memory of a fit: parameters, the optimiser's state and the average so far, which starts at the network's."""
    kind = jnp.result_type(*jax.tree.leaves(like))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, kind), params)
    return params, optimiser.init(params), jax.tree.map(lambda f: f.astype(kind), network(params))


def _fitted(network: Any, optimiser: Any, loss: Any, memory: tuple, average: Array, iterations: int) -> tuple:
    def body(carry: tuple, _: None) -> tuple:
        params, state, mean = carry
        f, pull = jax.vjp(network, params)
        mean = jax.tree.map(lambda m, new: (average * m + (1 - average) * new).astype(m.dtype), mean, f)
        (gradient,) = pull(jax.grad(loss)(f))
        change, state = optimiser.update(gradient, state, params)
        params = jax.tree.map(lambda p, c: (p + c).astype(p.dtype), params, change)
        return (params, state, mean), None

    return jax.lax.scan(body, memory, None, length=iterations)[0]
