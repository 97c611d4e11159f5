"""Parts that the networks share: time and condition embeddings, normalisation, attention.

All of them act on one sample: images (H, W, C), token sequences (N, D), vectors (D,). Parameters
are float32; `dtype` is the type of the computation, except for statistics and softmax (float32).

A condition is declared by a `Condition` (or a tuple of them) and given to the network in the same
structure. Its null value, which stands for "not told", is None for any of them, or the number of
classes for a label, or zeros for a vector or a token sequence: values, so that conditional and
unconditional branches fit into one batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import DTypeLike

from diffjax.levels import is_traced

# One object, so that graph definitions of equal modules are equal.
ZERO: dict[str, Any] = {"kernel_init": nnx.initializers.zeros}


def uniform(key: Array, shape: Sequence[int], dtype: Any = jnp.float32, **_: Any) -> Array:
    """Uniform with variance 1 / fan-in, the fan-in being the product of all axes but the last.

    Drawn as a flat array of the next power of two and cut to size: JAX compiles every shape that it
    draws, 0.1 to 0.2 s each, and a network has dozens of shapes but few powers of two.
    """
    size, fan_in = math.prod(shape), math.prod(shape[:-1])
    flat = jax.random.uniform(key, (1 << (size - 1).bit_length(),), dtype, -1.0, 1.0)
    xp = jnp if is_traced(flat) else np
    return jnp.asarray(xp.asarray(flat)[:size].reshape(shape) * xp.asarray((3 / fan_in) ** 0.5, dtype))


def linear_options(dtype: DTypeLike, rngs: nnx.Rngs) -> dict[str, Any]:
    """Keyword arguments that every linear layer and convolution of a network shares."""
    return {"dtype": dtype, "rngs": rngs, "kernel_init": uniform}


class Condition(NamedTuple):
    """What a network is told: `kind` is "label", "vector" or "tokens", `size` its extent."""

    kind: str
    size: int


def label(classes: int) -> Condition:
    """An integer class in 0 .. classes - 1; `classes` itself is the null class."""
    return Condition("label", positive("classes", classes))


def vector(size: int) -> Condition:
    """A vector of shape (size,), for example a measurement or a pooled text embedding."""
    return Condition("vector", positive("size", size))


def tokens(size: int) -> Condition:
    """A sequence of shape (length, size) that the network attends to, of any length."""
    return Condition("tokens", positive("size", size))


def positive(name: str, value: int) -> int:
    """`value` if it is an integer of at least one; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def divides(name: str, part: int, whole_name: str, whole: int) -> None:
    """ValueError unless `part` divides `whole`."""
    if whole % positive(name, part):
        raise ValueError(f"{name}={part} must divide {whole_name}={whole}")


def one_image(x: Array, shape: tuple[int, ...]) -> None:
    """ValueError unless `x` has the `shape` of one image."""
    if x.shape != shape:
        raise ValueError(f"x must be one image of shape {shape} (batches go through jax.vmap), got shape {x.shape}")


def conditions(spec: Any) -> tuple[Condition, ...]:
    """None, one `Condition` or a sequence of them (or of pairs, from JSON) as a tuple."""
    if spec is None:
        return ()
    many = list(spec) if isinstance(spec, (tuple, list)) else [spec]
    many = [spec] if isinstance(spec, Condition) else many
    found = []
    for item in many:
        known = isinstance(item, Sequence) and len(item) == 2
        if not known or item[0] not in ("label", "vector", "tokens"):
            raise ValueError(
                f"condition {item!r} is not known: use networks.label(classes), "
                "networks.vector(size) or networks.tokens(size), or a tuple of them"
            )
        found.append(Condition(item[0], positive(f"condition {item[0]} size", item[1])))
    return tuple(found)


def time_features(
    t: Float[Array, ""], size: int, scale: float | int = 1000.0, period: float | int = 10000.0
) -> Float[Array, " size"]:
    """`cos` and `sin` of `scale * t * period**(-k / (size/2))`, k = 0 .. size/2 - 1."""
    rates = period ** (-jnp.arange(size // 2, dtype=jnp.float32) / (size // 2))
    angles = scale * jnp.asarray(t, jnp.float32) * rates
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])


class Embedding(nnx.Module):
    """One vector of `size` from the time and every pooled condition (labels and vectors)."""

    def __init__(
        self,
        size: int,
        specs: tuple[Condition, ...],
        *,
        features: int = 64,
        time_scale: float | int = 1000.0,
        **options: Any,
    ):
        self.specs, self.features, self.time_scale = specs, features, time_scale
        self.time_in = nnx.Linear(features, size, **options)
        self.time_out = nnx.Linear(size, size, **options)
        # A table of its own for each condition; the last row of a label's table is the null class.
        pooled = [spec for spec in specs if spec.kind != "tokens"]
        self.tables = nnx.List(
            nnx.Embed(spec.size + 1, size, dtype=options["dtype"], rngs=options["rngs"])
            if spec.kind == "label"
            else nnx.Linear(spec.size, size, **options)
            for spec in pooled
        )

    def __call__(
        self, t: Float[Array, ""], condition: Any
    ) -> tuple[Float[Array, " size"], list[Float[Array, "length width"]]]:
        """The embedding, and the token sequences among the conditions, untouched."""
        out = self.time_out(nnx.silu(self.time_in(time_features(t, self.features, self.time_scale))))
        sequences, tables = [], iter(self.tables)
        for spec, value in zip(self.specs, matched(self.specs, condition), strict=True):
            if spec.kind == "tokens":
                sequences.append(value)
            else:
                out = out + next(tables)(value)
        return nnx.silu(out), sequences


def matched(specs: tuple[Condition, ...], condition: Any) -> list[Int[Array, ""] | Float[Array, "..."]]:
    """The values of a condition in the order of `specs`, nulls filled in, shapes checked."""
    if condition is None:
        values = [None] * len(specs)
    elif isinstance(condition, (tuple, list)):
        values = list(condition)
    else:
        values = [condition]
    if len(values) != len(specs):
        raise ValueError(
            f"the network was built for {len(specs)} condition(s) {[tuple(s) for s in specs]} "
            f"but was given {len(values)}"
        )
    return [_checked(spec, value) for spec, value in zip(specs, values, strict=True)]


def _checked(spec: Condition, value: Any) -> Array:
    if value is None:
        null = {"label": spec.size, "vector": jnp.zeros(spec.size)}
        return jnp.asarray(null.get(spec.kind, jnp.zeros((1, spec.size))))
    value = jnp.asarray(value)
    if spec.kind == "label":
        fits = value.shape == () and jnp.issubdtype(value.dtype, jnp.integer)
        expected = "an integer scalar"
    elif spec.kind == "vector":
        fits, expected = value.shape == (spec.size,), f"an array of shape ({spec.size},)"
    else:
        fits = value.ndim == 2 and value.shape[1] == spec.size
        expected = f"an array of shape (length, {spec.size})"
    if not fits:
        raise ValueError(
            f"condition {spec.kind} must be {expected} for one sample (batches go through "
            f"jax.vmap), got shape {value.shape} and dtype {value.dtype}"
        )
    return value


POLICIES = {"dots": jax.checkpoint_policies.dots_saveable, "full": jax.checkpoint_policies.nothing_saveable}


def policy(remat: str | None) -> Callable | None:
    """What the backward pass keeps: None everything, "dots" the outputs of matrix products, "full" the arguments alone.

    Raises ValueError for another name.
    """
    if remat is not None and remat not in POLICIES:
        raise ValueError(f"remat must be None or among {sorted(POLICIES)}, got {remat!r}")
    return None if remat is None else POLICIES[remat]


def called(module: nnx.Module, remat: str | None) -> Callable:
    """A part of a network of which the backward pass keeps what `policy` says, and computes the rest again."""
    if remat is None:
        return module
    graph, params = nnx.split(module)
    part = jax.checkpoint(lambda params, *inputs: nnx.merge(graph, params)(*inputs), policy=policy(remat))
    return lambda *inputs: part(params, *inputs)


def group_norm(x: Float[Array, "h w c"], groups: int) -> Float[Array, "h w c"]:
    """Zero mean and unit variance over positions and the channels of each group, no scale."""
    height, width, channels = x.shape
    split = x.astype(jnp.float32).reshape(height * width, groups, channels // groups)
    centred = split - split.mean((0, 2), keepdims=True)
    variance = jnp.square(centred).mean((0, 2), keepdims=True)
    return (centred * jax.lax.rsqrt(variance + 1e-5)).reshape(x.shape).astype(x.dtype)


def layer_norm(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Zero mean and unit variance over the last axis, no scale."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head attention of N tokens to themselves, or to `context` when it is given.

    Args:
        size: width D of the tokens; `heads` must divide it.
        context: width of the tokens attended to; None for self-attention.
        zero: initialise the output projection with zeros.

    Called with `perturb` (heads,), every head's attention map A is replaced by (1 - u) A + u I: its tokens attend to
    themselves alone at u = 1, and nothing changes at u = 0. Self-attention only. With `mask` (N, M), token i attends
    to those j for which mask[i, j] is true.
    """

    def __init__(
        self,
        size: int,
        heads: int,
        *,
        context: int | None = None,
        zero: bool = False,
        **options: Any,
    ):
        divides("heads", heads, "channels", size)
        self.heads = heads
        self.query = nnx.Linear(size, size, **options)
        self.key_value = nnx.Linear(context or size, 2 * size, **options)
        self.out = nnx.Linear(size, size, **(options | ZERO if zero else options))

    def __call__(
        self,
        x: Float[Array, "n d"],
        context: Float[Array, "m c"] | None = None,
        perturb: Float[Array, " heads"] | None = None,
        mask: Bool[Array, "n m"] | None = None,
    ) -> Float[Array, "n d"]:
        query = self.query(x)
        key, value = jnp.split(self.key_value(x if context is None else context), 2, -1)
        split = [part.reshape(part.shape[0], self.heads, -1) for part in (query, key, value)]
        attended = jax.nn.dot_product_attention(*split, mask=None if mask is None else mask[None])
        if perturb is not None:  # (1 - u) A V + u V: the map itself is never formed
            u = perturb.astype(attended.dtype)[:, None]
            attended = (1 - u) * attended + u * split[2]
        return self.out(attended.reshape(x.shape))
