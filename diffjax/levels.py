"""The vocabulary of the library: what a level, a process, a grid, a row and a sample are.

A Gaussian process noises data as ``x_t = alpha(t) x_0 + sigma(t) eps`` with time running from 0 (data) to
``end`` (noise).  A *level* is one point of it, a *grid* is a sequence of steps between levels, a solver's *plan*
turns a grid into *rows* of numbers, and a sampler scans the rows.

Everything here is a value: a NamedTuple, or a frozen dataclass registered as a pytree whose floats and arrays are
leaves and whose integers, strings and functions are static.  So rebuilding an equal object never compiles anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, dataclass_transform, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Array = Any  # a jax.Array, a NumPy array or a Python number: plans are NumPy, loops are JAX
Tree = Any  # any pytree of arrays
T = TypeVar("T")


# --- values -----------------------------------------------------------------------------------------------------


def static(**keywords: Any) -> Any:
    """A dataclass field that is part of the type (an integer, a string, a function), not a leaf."""
    return dataclasses.field(metadata={"static": True}, **keywords)


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def value(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen dataclass and a pytree; ``repr`` shows the call that would rebuild it.

    Fields declared with `static` are metadata, all others are leaves.  JAX rebuilds instances with tracers and
    placeholders, so nothing may be validated here: factories validate.
    """
    cls = dataclasses.dataclass(frozen=True, repr=False, eq=False)(cls)
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    leaves = [f.name for f in fields if not f.metadata.get("static")]
    statics = [f.name for f in fields if f.metadata.get("static")]

    def flatten(self: Any) -> tuple[tuple, tuple]:
        # the class is part of the metadata: jax compares registered dataclasses by their metadata alone, so that
        # two field-less classes would be equal, and one could be served the other's compiled code
        return tuple(getattr(self, name) for name in leaves), (cls, *(getattr(self, name) for name in statics))

    def flatten_with_keys(self: Any) -> tuple[tuple, tuple]:
        children, metadata = flatten(self)
        return tuple(zip(map(jax.tree_util.GetAttrKey, leaves), children, strict=True)), metadata

    def unflatten(metadata: Any, children: Any) -> Any:
        self = object.__new__(cls)  # not __init__: placeholders and tracers must pass
        for name, content in zip((*leaves, *statics), (*children, *metadata[1:]), strict=True):
            object.__setattr__(self, name, content)
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    if "__repr__" not in cls.__dict__:
        cls.__repr__ = _call_repr  # pyright: ignore[reportAttributeAccessIssue]
    return cls


def _call_repr(self: Any) -> str:
    name = getattr(type(self), "factory", type(self).__name__)
    shown = [f"{f.name}={_short(getattr(self, f.name))}" for f in dataclasses.fields(self) if f.repr]
    return f"{name}({', '.join(shown)})"


def _short(leaf: Any) -> str:
    if getattr(leaf, "ndim", 0):
        return f"<{leaf.dtype}[{','.join(map(str, leaf.shape))}]>"
    if isinstance(leaf, np.generic | np.ndarray):
        return repr(leaf.item())
    return getattr(leaf, "__name__", None) or repr(leaf)


@value
class Function:
    """A plain function as a value, compared by identity."""

    function: Callable = static()

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def as_value(function: Any) -> Any:
    """``function`` itself if it is a pytree of its own (or None), else wrapped as a `Function`."""
    return Function(function) if jax.tree_util.all_leaves([function]) else function


def has_functions(*trees: Tree) -> bool:
    """Whether a plain function is somewhere inside."""
    leaves = jax.tree.leaves(trees, is_leaf=lambda node: isinstance(node, Function))
    return any(isinstance(leaf, Function) for leaf in leaves)


# --- arrays: float64 NumPy where everything is concrete, JAX where anything is traced ------------------------------


def is_traced(*trees: Tree) -> bool:
    """Whether any leaf is known only inside a transformation (jit, grad, vmap)."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))


def concrete(tree: Tree) -> Tree:
    """The floating leaves of ``tree`` as float64 NumPy arrays if none of them is traced, else ``tree`` unchanged."""
    if isinstance(tree, Process) and tree.coordinates is not None:  # data, which no plan is made from
        return dataclasses.replace(concrete(dataclasses.replace(tree, coordinates=None)), coordinates=tree.coordinates)
    if is_traced(tree):
        return tree
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def arrays(time: Array, *parameters: Array) -> tuple[Any, ...]:
    """``(namespace, time, *parameters)`` on one array namespace and in one dtype.

    NumPy in float64 when ``time`` is a number or a NumPy array and no parameter is traced; otherwise JAX, in the
    dtype of ``time``.  A schedule written on the result serves both the plan and traced code.
    """
    if isinstance(time, jax.Array) or is_traced(time, parameters):
        # by its dtype: a weakly typed float64 (any Python number under x64) is not to become float32
        time = jnp.asarray(time, jnp.promote_types(jnp.asarray(time).dtype, jnp.float32))
        return jnp, time, *(jnp.asarray(p, time.dtype) for p in parameters)
    return np, np.asarray(time, np.float64), *(np.asarray(p, np.float64) for p in parameters)


def namespace(*trees: Tree) -> Any:
    """``jax.numpy`` if any leaf is a JAX array, else ``numpy``."""
    return jnp if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(trees)) else np


def ratio(numerator: Array, denominator: Array) -> Array:
    """``numerator / denominator``, and 1 where they are equal (also where both are zero or infinite)."""
    xp = namespace(numerator, denominator)
    same = xp.equal(numerator, denominator)
    safe = xp.where(same | (denominator == 0), 1.0, denominator)
    return xp.where(same, 1.0, xp.where(denominator == 0, xp.inf, numerator / safe))


def root(square: Array) -> Array:
    """``sqrt(max(square, 0))`` whose derivative at 0 is 0, not infinite: where nothing is added nothing is learned."""
    xp = namespace(square)
    positive = square > 0
    return xp.where(positive, xp.sqrt(xp.where(positive, square, 1.0)), 0.0)


def combine(coefficients: Any, trees: tuple[Tree, ...]) -> Tree:
    """``sum_k coefficients[k] * trees[k]``, leaf by leaf, in the dtype of the leaf.

    ``coefficients`` are K arrays (or one, leading axis K) that broadcast against every leaf: a scalar per term, or one
    number per frame, pixel or mode.
    """

    def leaf(*leaves: Array) -> Array:
        total = coefficients[0] * leaves[0]
        for k in range(1, len(leaves)):
            total = total + coefficients[k] * leaves[k]
        return total.astype(leaves[0].dtype)

    return jax.tree.map(leaf, *trees)


def all_finite(tree: Tree) -> Array:
    """Whether every entry of every leaf is finite."""
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]).all()


def dot(a: Tree, b: Tree) -> Array:
    """The inner product over all entries of all leaves."""
    return sum(jax.tree.leaves(jax.tree.map(lambda u, v: (u * v).sum(), a, b)))


# --- levels and processes -----------------------------------------------------------------------------------------


class Level(NamedTuple):
    """One noise level.

    ``time`` has the shape that the network takes (a scalar, or one per frame); ``alpha``, ``sigma`` and
    ``half_log_snr = log(alpha / sigma)`` (the lambda of the DPM-Solver papers; the SNR is alpha^2 / sigma^2)
    broadcast against the state.
    """

    time: Array
    alpha: Array
    sigma: Array
    half_log_snr: Array


CLEAN = Level(*(np.float64(number) for number in (0.0, 1.0, 0.0, np.inf)))  # of data, in any process


def widened(level: Level) -> Array:
    """The time with the singleton axes that let it broadcast against alpha."""
    return level.time[(Ellipsis,) + (None,) * (level.alpha.ndim - level.time.ndim)]


def narrowed(level: Level) -> Array:
    """The half-log-SNR shaped like the time; ValueError where one time has many."""
    if level.half_log_snr.size != level.time.size:
        raise ValueError(f"needs one noise level a time, got {level.half_log_snr.size} at {level.time.size} times.")
    return level.half_log_snr.reshape(level.time.shape)


def key_at(key: Array, level: Level) -> Array:
    """A key for a level, folded with the bits of its time: for denoisers that draw, which know no row's index."""
    for time in jnp.asarray(level.time, jnp.float32).reshape(-1):
        key = jax.random.fold_in(key, jax.lax.bitcast_convert_type(time, jnp.uint32))
    return key


def lowered(mask: Array, level: Level) -> Array:
    """A mask shaped like alpha as one shaped like the time: whether it is set for any of the noise levels there."""
    return mask.reshape(*level.time.shape, -1).any(-1)


def chosen(mask: Array, level: Level, other: Level) -> Level:
    """``level`` where the mask, shaped like alpha, is set, and ``other`` elsewhere."""
    xp = namespace(level, other)
    masks = (lowered(mask, other), mask, mask, mask)
    return Level(*(xp.where(m, a, b) for m, a, b in zip(masks, level, other, strict=True)))


def rise(t: Level, s: Level) -> Array:
    """``h = half_log_snr(s) - half_log_snr(t)``, positive towards the data; 0 where both are the same infinity."""
    xp = namespace(t, s)
    same = xp.equal(t.half_log_snr, s.half_log_snr)
    return xp.where(same, 0.0, xp.where(same, 0.0, s.half_log_snr) - xp.where(same, 0.0, t.half_log_snr))


@runtime_checkable
class Schedule(Protocol):
    """Pure functions of time that define a Gaussian process; NumPy in, NumPy out, JAX in, JAX out."""

    def alpha(self, time: Array) -> Array: ...
    def sigma(self, time: Array) -> Array: ...
    def half_log_snr(self, time: Array) -> Array: ...
    def time(self, half_log_snr: Array) -> Array:
        """The inverse of ``half_log_snr``."""
        ...

    def alpha_rate(self, time: Array) -> Array:
        """d alpha / dt."""
        ...

    def sigma_rate(self, time: Array) -> Array:
        """d sigma / dt, infinite at 0 for variance-preserving processes."""
        ...

    def variance_rate(self, time: Array) -> Array:
        """sigma d sigma / dt, finite everywhere."""
        ...


class SDE(NamedTuple):
    """``dx = drift(x, t) dt + diffusion(x, t) dW``; the diffusion multiplies elementwise (here: a scalar)."""

    drift: Callable[[Tree, Array], Tree]
    diffusion: Callable[[Tree, Array], Array]


@value
class Process:
    """A Gaussian forward process ``x_t = alpha(t) x_0 + sigma(t) eps``, ``0 <= t <= end``.

    With ``coordinates`` that is the law of the *standard* state ``z_t = alpha(t) z_0 + sigma(t) eps``, and what is
    noised is ``x_t = m_t + B z_t``, data too: a known mean, which may move, coloured noise, another basis.  Denoisers,
    guidance and solvers live in standard coordinates, where they are those of the plain process; data, networks and
    what a sampler is given and returns are in the coordinates of the data.
    """

    schedule: Any
    end: Array
    coordinates: Any = None

    def __repr__(self) -> str:
        return repr(self.schedule) if self.coordinates is None else f"{self.schedule!r} in {self.coordinates!r}"

    def enter(self, x: Tree, level: Level | None = None) -> Tree:
        """From the coordinates of the data to the standard ones.

        Of a state at a level (of data: at `CLEAN`), or with no level of what has no mean: noise, a network's output.
        """
        return x if self.coordinates is None else self.coordinates.enter(x, level)

    def leave(self, z: Tree, level: Level | None = None) -> Tree:
        """The inverse of `enter`."""
        return z if self.coordinates is None else self.coordinates.leave(z, level)

    def noised(self, x0: Tree, eps: Tree, level: Level) -> Tree:
        """The state at a level of clean data and of standard normal noise in standard coordinates."""
        return self.leave(combine((level.alpha, level.sigma), (self.enter(x0, CLEAN), eps)), level)

    def level(self, time: Array | None = None, *, half_log_snr: Array | None = None, trailing: int = 0) -> Level:
        """The level at a time or at a half-log-SNR (exactly one of them).

        ``trailing`` singleton axes are appended to alpha, sigma and half_log_snr, so that a time per frame acts on
        states of shape (frames, height, width): ``trailing=2``.  Schedules with a noise level per mode append
        their own.

        Raises ValueError for a half-log-SNR where one time has many.
        """
        if (time is None) == (half_log_snr is None):
            raise ValueError(f"level needs exactly one of time={time!r} and half_log_snr={half_log_snr!r}.")
        modes = getattr(self.schedule, "trailing", 0)
        if modes and time is None:
            raise ValueError(
                f"{self!r} has many noise levels at one time, so no time is at half_log_snr={half_log_snr!r}: use"
                " a grid in time, and a multistep solver or one with stages in time."
            )
        at = arrays(self.schedule.time(half_log_snr) if time is None else time)[1]
        wide = at[(Ellipsis,) + (None,) * max(trailing, modes)]
        return Level(at, self.schedule.alpha(wide), self.schedule.sigma(wide), self.schedule.half_log_snr(wide))

    def level_like(self, like: Level, half_log_snr: Array) -> Level:
        """The level at a half-log-SNR shaped like ``like.alpha``; ValueError as `level`."""
        if half_log_snr.size == like.time.size:
            half_log_snr = half_log_snr.reshape(like.time.shape)
        return self.level(half_log_snr=half_log_snr, trailing=like.alpha.ndim - like.time.ndim)

    def sde(self) -> SDE:
        """The forward SDE ``dx = f(t) x dt + g(t) dW`` with f = alpha'/alpha, g^2 = 2 sigma sigma' - 2 f sigma^2.

        This and the two below are in standard coordinates.
        """

        def drift(x: Tree, t: Array) -> Tree:
            rate = _drift(self.schedule, widened(self.level(t)))
            return jax.tree.map(lambda leaf: rate * leaf, x)

        return SDE(drift, self._diffusion)

    def _diffusion(self, x: Tree, t: Array) -> Array:
        del x
        g2 = squared_diffusion(self.schedule, widened(self.level(t)))
        return namespace(g2).sqrt(g2)

    def reverse_sde(self, denoise: Callable[[Tree, Level], Tree], eta: Array = 1.0) -> SDE:
        """The SDE with the marginals of the process that runs from ``end`` down to 0.

        ``dx = [f x - (1 + eta^2)/2 g^2 score] dt + eta g dW`` with dt < 0: ``eta = 1`` is the time reversal of the
        forward SDE, ``eta = 0`` the probability-flow ODE.  (arXiv:2011.13456, equations 6 and 13.)
        """

        def drift(x: Tree, t: Array) -> Tree:
            level = self.level(t)
            x0 = denoise(x, level)
            weight = 0.5 * (1 + eta**2) * squared_diffusion(self.schedule, widened(level)) / level.sigma**2
            linear = _drift(self.schedule, widened(level))
            return jax.tree.map(lambda leaf, clean: linear * leaf - weight * (level.alpha * clean - leaf), x, x0)

        return SDE(drift, lambda x, t: eta * self._diffusion(x, t))

    def probability_flow(self, denoise: Callable[[Tree, Level], Tree]) -> Callable[[Tree, Array], Tree]:
        """The velocity ``(x, t) -> dx/dt = alpha' x0 + sigma' eps``, eps = (x - alpha x0) / sigma, of the flow ODE.

        Finite at alpha = 0; at sigma = 0 it needs a limit that only a velocity network knows, so keep t > 0.
        """

        def velocity(x: Tree, t: Array) -> Tree:
            level = self.level(t)
            x0 = denoise(x, level)
            rate = self.schedule.sigma_rate(widened(level)) / level.sigma
            clean_rate = self.schedule.alpha_rate(widened(level)) - level.alpha * rate
            return jax.tree.map(lambda leaf, clean: rate * leaf + clean_rate * clean, x, x0)

        return velocity

    def network_time(self, level: Level) -> Array:
        """What a network is conditioned on by default: the time, or the table's index for a discrete process."""
        convert = getattr(self.schedule, "network_time", None)
        return level.time if convert is None else convert(level.time)

    def prior(self, key: Array, shape: Any, dtype: Any = jnp.float32, level: Level | None = None) -> Tree:
        """A draw from the noise law N(0, sigma^2 I) at ``level`` (default: at ``end``), in the data's coordinates.

        ``shape`` is that of a sample, or a tree of shapes.
        """
        level = self.level(self.end) if level is None else level
        return self.leave(self.standard_prior(key, shape, dtype, level), level)

    def standard_prior(self, key: Array, shape: Any, dtype: Any, level: Level) -> Tree:
        """`prior` in standard coordinates."""
        like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), shape, is_leaf=is_shape)
        leaves, structure = jax.tree.flatten(jax.eval_shape(self.enter, like))
        keys = [key] if len(leaves) == 1 else list(jax.random.split(key, len(leaves)))
        draws = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
        if hasattr(self.schedule, "coloured"):  # a linear SDE (`diffjax.phase`), whose noise is a covariance
            return structure.unflatten([self.schedule.coloured(z, level.time) for z in draws])
        return structure.unflatten([jnp.asarray(level.sigma, dtype) * z for z in draws])


def is_shape(tree: Any) -> bool:
    """Whether ``tree`` is the shape of one array."""
    return isinstance(tree, tuple) and all(isinstance(n, int | np.integer) for n in tree)


def _drift(schedule: Any, t: Array) -> Array:
    return schedule.alpha_rate(t) / schedule.alpha(t)


def squared_diffusion(schedule: Any, t: Array) -> Array:
    """``g(t)^2 = 2 sigma sigma' - 2 (alpha'/alpha) sigma^2``, never negative."""
    g2 = 2 * schedule.variance_rate(t) - 2 * _drift(schedule, t) * schedule.sigma(t) ** 2
    return namespace(g2).maximum(g2, 0.0)


# --- grids and rows -----------------------------------------------------------------------------------------------


@value
class Grid:
    """N steps from level ``t[i]`` to level ``s[i]`` of a process; leaves have a leading axis of length N.

    ``start`` is the level of the state that the sampler is given (usually ``t[0]``).  Usually ``s[i] = t[i + 1]``;
    where ``t[i + 1]`` is noisier, ``gaps`` is set and noise is added in between, times ``inflation``.
    """

    process: Process
    start: Level
    t: Level
    s: Level
    inflation: Array = 1.0
    gaps: bool = static(default=False)

    def __len__(self) -> int:
        return self.t.time.shape[0]

    def __repr__(self) -> str:
        return f"Grid({self.process!r}, steps={len(self)}, gaps={self.gaps})"

    def __getitem__(self, steps: slice) -> Grid:
        """The grid of some of the steps, in order."""
        if not isinstance(steps, slice):
            raise ValueError(f"a grid is indexed by a slice of steps, got {steps!r}.")
        if not range(*steps.indices(len(self))):
            raise ValueError(f"a grid has at least one step, and {steps!r} of {len(self)} steps is none.")
        t, s = (jax.tree.map(lambda leaf: leaf[steps], level) for level in (self.t, self.s))
        return dataclasses.replace(self, start=jax.tree.map(lambda leaf: leaf[0], t), t=t, s=s)


class Row(NamedTuple):
    """One step of a plan: the level ``t`` at entry, ``s`` at exit, and the solver's own numbers."""

    t: Level
    s: Level
    coefficients: Tree


def joins(grid: Grid) -> tuple[Array, Array]:
    """``(keep, std)`` of shape (N + 1, ...): what takes the state from before step i to level ``t[i]``.

    ``x <- keep x + std z``: keep = alpha ratio and std^2 = sigma(t_i)^2 - keep^2 sigma(before)^2, the forward
    transition.  The last entry follows the last step and is (1, 0).
    """
    xp = namespace(grid.t, grid.s, grid.start)
    alpha = xp.concatenate([grid.start.alpha[None], grid.s.alpha[:-1]])
    sigma = xp.concatenate([grid.start.sigma[None], grid.s.sigma[:-1]])
    keep = ratio(grid.t.alpha, alpha)
    variance = grid.t.sigma**2 - (keep * sigma) ** 2
    std = root(variance) * grid.inflation
    one = xp.ones_like(keep[:1])
    return xp.concatenate([keep, one]), xp.concatenate([std, 0.0 * one])


def restarts(grid: Grid) -> Array:
    """Shape (N, ...): True where step i does not continue step i - 1, so that no history can be used."""
    xp = namespace(grid.t, grid.s)
    first = xp.ones_like(grid.t.alpha[:1], dtype=bool)
    return xp.concatenate(
        [first, ~xp.isclose(grid.t.half_log_snr[1:], grid.s.half_log_snr[:-1], rtol=1e-9, atol=1e-12)]
    )


# --- denoisers, solvers and samples -------------------------------------------------------------------------------


def remembers(denoise: Any) -> bool:
    """Whether a denoiser is the pair ``init(x) -> memory``, ``apply(x, level, memory) -> (x0, memory)``."""
    return hasattr(denoise, "init") and hasattr(denoise, "apply") and not callable(denoise)


class Info(NamedTuple):
    """What a step tells beside the state: the first clean estimate, and an error estimate where there is one."""

    x0: Tree
    error: Tree | None = None


@runtime_checkable
class Solver(Protocol):
    """Pure functions over rows, and what they declare; see docs/design.md.

    ``noise`` is always a tuple of ``draws`` standard normal trees shaped like the state.

    Optional: ``weak_order`` of a stochastic solver's law (1 where it says nothing); ``constant_coefficients``, true of
    methods that keep their order on slowly varying steps only; ``renoises``, true of those that add the noise of gaps.
    """

    @property
    def order(self) -> int:
        """The order of the deterministic part on a smooth grid."""
        ...

    @property
    def calls(self) -> int:
        """Denoiser calls a row."""
        ...

    @property
    def draws(self) -> int:
        """Standard normal draws a row; 0 is deterministic."""
        ...

    @property
    def embedded(self) -> bool:
        """Whether step reports an error estimate."""
        ...

    def plan(self, grid: Grid) -> Row: ...
    def init(self, x: Tree) -> Tree: ...
    def step(
        self, noise: tuple[Tree, ...], denoise: Callable[[Tree, Level], Tree], x: Tree, memory: Tree, row: Row
    ) -> tuple[Tree, Tree, Info]: ...


class Saved(NamedTuple):
    """What was asked to be kept, along a leading axis; ``None`` where it was not asked for.

    Of `parallel`, by round: ``residuals`` (rounds at most, window), the change of every state of the window over its
    scale, NaN outside the grid and after the last round, and ``final`` (rounds at most,), the rows that were final
    after it, -1 after the last.
    """

    states: Tree | None
    states_level: Level | None
    x0: Tree | None
    x0_level: Level | None
    residuals: Array | None = None
    final: Array | None = None


UNSAVED = Saved(None, None, None, None)


class Sample(NamedTuple):
    """The result of every sampler, for one sample.

    ``nfe`` network evaluations (classifier-free guidance counts two a call), ``rounds`` sequential network calls,
    ``failed_at`` the first row that left a non-finite state, or -1; ``accepted`` and ``rejected`` steps where they are
    chosen while sampling; ``error``, from samplers that approximate, what they say of it.
    """

    x: Tree
    nfe: Array
    rounds: Array
    failed_at: Array
    saved: Saved
    accepted: Array | None = None
    rejected: Array | None = None
    error: Array | None = None
