"""A motif whose place is not known: twists of several measurements, of which one was made."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.guidance.tilted import twist_gradient
from diffjax.inverse.measurement import gaussian_noise, measurement
from diffjax.inverse.operators import Mask, shapes
from diffjax.inverse.twists import GaussianTwist, mmps
from diffjax.levels import Array, Level, Process, Tree, is_traced, value


def one_of(twists: Sequence[Any], weights: Array | None = None) -> OneOf:
    """The twist of a measurement that is one of K, with probabilities ``weights``: ``log h = log sum_k w_k h_k``.

    Its gradient is that of the twists, weighted by ``w_k h_k / h``.  Where every h_k is exact, so is h.  The twists are
    vmapped, and share their call of the denoiser: one, with the vector-Jacobian products of K.

    The shares take the log-determinants at their word, so that guidance depends on them too.  Lanczos estimates of
    "cg" and "gmres" err differently for each (1.4 nats apart have been seen with one probe): `mmps` wants
    ``solver="dense"``.

    Args:
        twists: K of one kind and of one shape, made by one factory (`mmps`, `pigdm`, `exact`, ..).
        weights: (K,), not negative; default even.

    Raises ValueError for twists that are not alike, weights that do not fit, and twists without log-determinants
    (``probes=0`` where the solve is not dense).
    """
    twists = list(twists)
    alike = {jax.tree.structure(twist) for twist in twists}
    if len(alike) != 1:
        raise ValueError(f"twists must be of one kind and shape, at least one of them, got {twists!r}.")
    if not all(_weighs(twist) for twist in twists):
        raise ValueError(f"one_of weighs its twists by log-determinants, which probes=0 leaves out, got {twists[0]!r}.")
    try:
        stacked = jax.tree.map(_stack, *twists)
    except ValueError:
        raise ValueError(f"twists must be of one kind and shape, got {twists!r}.") from None
    return OneOf(stacked, _log_weights(weights, len(twists)))


@value
class OneOf:
    twists: Any  # stacked
    log_weights: Array  # (K,)
    factory = "one_of"

    def __call__(self, denoise: Any, x: Tree, level: Level) -> tuple[Array, Tree]:
        logs, x0 = jax.vmap(lambda twist: twist(denoise, x, level))(self.twists)
        return self._mean(logs), jax.tree.map(lambda leaf: leaf[0], x0)

    def gradient(self, denoise: Any, x: Tree, level: Level) -> tuple[Array, Tree, Tree]:
        """``(log_h, x0, grad log h)``, from what the twists prescribe as theirs."""
        each = lambda twist: twist_gradient(denoise, twist, x, level)
        logs, x0, slopes = jax.vmap(each)(self.twists)
        shares = self._shares(logs)
        slope = jax.tree.map(lambda leaf: jnp.tensordot(shares.astype(leaf.dtype), leaf, 1), slopes)
        return self._mean(logs), jax.tree.map(lambda leaf: leaf[0], x0), slope

    def probabilities(self, denoise: Any, x: Tree, level: Level) -> Array:
        """(K,): of each having been made, given the state."""
        return self._shares(jax.vmap(lambda twist: twist(denoise, x, level)[0])(self.twists))

    def check(self, t: Level) -> None:
        if hasattr(self.twists, "check"):
            self.twists.check(t)

    def _mean(self, logs: Array) -> Array:
        return jax.nn.logsumexp(logs + self.log_weights.astype(logs.dtype))

    def _shares(self, logs: Array) -> Array:
        logs = logs + self.log_weights.astype(logs.dtype)
        return jax.nn.softmax(jnp.where(jnp.max(logs) == -jnp.inf, 0.0, logs))


def _dense(seen: Any) -> Any:
    return mmps(seen, solver="dense")


def motif(
    y: Array,
    placements: Array,
    shape: tuple[int, ...],
    noise: Array = 0.1,
    *,
    rotations: Array | None = None,
    weights: Array | None = None,
    twist: Callable[[Any], Any] = _dense,
    process: Process | None = None,
) -> OneOf:
    """Rows of the sample that are a given motif, at one of several placements, and turned by one of several rotations.

        log h(x) = log mean_{p, R} h(x; y R^T at rows p),     for the likelihood  mean_{p, R} N(y R^T; x_0[p], noise^2)

    Args:
        y: (M, ...) the motif; with rotations (M, D), points.
        placements: (P, M) the rows of the sample where the motif's rows are, those of one placement distinct
            (`segments` lists the contiguous ones).
        shape: (N, ...) of one sample, an array.
        noise: standard deviation, above 0: of how much the sample may differ from the motif.
        rotations: (Q, D, D) orthogonal matrices, for instance draws of ``nongaussian.rotations().uniform``; default
            none.
        weights: (P,) probabilities of the placements, default even.
        twist: ``measurement -> twist``, for every placement and rotation; it has one compiled program for all.  The
            default is `mmps` with the "dense" solver, whose log-determinants are exact.
        process: whose standard state the twist is of, where it has coordinates.

    Practical and Asymptotically Exact Conditional Sampling in Diffusion Models, arXiv:2306.17775, section 3.3
    (inpainting with degrees of freedom).

    Returns a twist, `one_of` placement major; one denoiser call.

    Raises ValueError for shapes that do not fit, rows that are not of the sample or met twice, and noise not above 0.
    """
    y, places = (y if is_traced(y) else np.asarray(y)), np.asarray(placements)
    if places.ndim != 2 or not len(places) or places.shape[1:] != np.shape(y)[:1]:
        raise ValueError(f"placements must be rows (P, {np.shape(y)[:1]}) of the sample, got shape {places.shape}.")
    if not np.issubdtype(places.dtype, np.integer) or places.min() < 0 or places.max() >= shape[0]:
        raise ValueError(f"placements must be integers from 0 to {shape[0] - 1}, got {placements!r}.")
    if any(len(set(rows)) < len(rows) for rows in places.tolist()):
        raise ValueError(f"the rows of a placement must be distinct, got {placements!r}.")
    if np.shape(y)[1:] != tuple(shape[1:]):
        raise ValueError(f"y must have rows of shape {tuple(shape[1:])}, got {np.shape(y)}.")
    if not is_traced(noise) and not np.all(np.asarray(noise) > 0):
        raise ValueError(f"noise must be above 0: placements that are met exactly cannot be weighed, got {noise!r}.")
    turned = [y] if rotations is None else list(_turned(y, rotations))
    log = _log_weights(weights, len(places))
    law = gaussian_noise(noise)
    entries = np.arange(np.prod(shape)).reshape(shape)
    masks = [Mask(entries[place].ravel(), shapes(tuple(shape))) for place in places]
    seen = [measurement(mask, z.reshape(-1), law) for mask in masks for z in turned]
    seen = seen if process is None else [one.under(process) for one in seen]
    made = one_of([twist(one) for one in seen])
    return OneOf(made.twists, jnp.repeat(log, len(turned)) - np.log(len(turned)))


def segments(lengths: Sequence[int], size: int) -> Array:
    """All placements (P, M) in ``size`` rows of a motif made of segments of these lengths, in order, without overlap.

    A segment is contiguous; between two there may be any number of rows, also none.

    Raises ValueError for lengths below 1, and more rows than there are.

    >>> segments((2, 1), 4).tolist()
    [[0, 1, 2], [0, 1, 3], [1, 2, 3]]
    """
    lengths = tuple(lengths)
    free = size - sum(lengths)
    if not lengths or min(lengths) < 1 or free < 0:
        raise ValueError(f"lengths must be at least 1 and sum to at most {size}, got {lengths!r}.")
    before = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    found = []
    for bars in itertools.combinations(range(free + len(lengths)), len(lengths)):
        starts = np.asarray(bars) - np.arange(len(lengths)) + before
        found.append(np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]))
    return np.stack(found)


def _turned(y: Array, given: Array) -> Array:
    given = given if is_traced(given) else np.asarray(given)
    if np.ndim(y) != 2 or np.shape(given)[1:] != 2 * np.shape(y)[1:]:
        raise ValueError(f"rotations must be (Q, D, D) for y (M, D), got {np.shape(given)} for {np.shape(y)}.")
    if not is_traced(given):
        products = given @ np.swapaxes(given, 1, 2)
        if not np.allclose(products, np.eye(given.shape[1]), rtol=0, atol=1e-4):
            raise ValueError(f"rotations must be orthogonal, got {given!r}.")
    return jnp.einsum("md,qed->qme", y, given) if is_traced(y, given) else np.einsum("md,qed->qme", y, given)


def _log_weights(weights: Array | None, count: int) -> Array:
    if weights is None:
        return np.full(count, -np.log(count))
    weights = np.asarray(weights, np.float64)
    if weights.shape != (count,) or np.any(weights < 0) or not weights.sum() > 0:
        raise ValueError(f"weights must be {count} numbers, not negative, got {weights!r}.")
    with np.errstate(divide="ignore"):
        return np.log(weights / weights.sum())


def _weighs(twist: Any) -> bool:
    """Whether log h has its log-determinant."""
    if not isinstance(twist, GaussianTwist) or twist.solve.probes:
        return True
    entries = sum(np.size(leaf) for leaf in jax.tree.leaves(twist.measurement.y))
    return twist.solve.dense(entries)


def _stack(*leaves: Array) -> Array:
    return jnp.stack(leaves) if is_traced(leaves) else np.stack(leaves)
