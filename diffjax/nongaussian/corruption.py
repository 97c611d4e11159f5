"""Any corruption instead of noise: restore and degrade again; and smooth warps as the example.

A corruption is a function ``degrade(x0, severity)`` with ``degrade(x0, 0) = x0``, a restoration
``restore(x, severity) -> x0``, learned or known.  Nothing else is asked of it, so it has a sampler of its own, a loop
that returns a `Sample`.

A warp moves every pixel of an image along a smooth velocity field for the time ``severity``.  The flow of a field is
invertible, and its inverse that of the reversed field: nothing folds, up to interpolation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from diffjax.levels import UNSAVED, Array, Sample, Tree, all_finite, is_traced


def restored(
    degrade: Callable[[Tree, Array], Tree],
    restore: Callable[[Tree, Array], Tree],
    x: Tree,
    severities: Array,
    improved: bool = True,
) -> Sample:
    """Undo a corruption in steps: restore from severity t, degrade to severity s < t.

        x <- x - degrade(x0, t) + degrade(x0, s),    x0 = restore(x, t)

    Where degrade is ``x0 + t e`` with a fixed e the state ends in x0 whatever the restoration says; where it is nearly
    so errors of the restoration nearly cancel.

    Args:
        x: the corrupted state, at the first severity.
        severities: decreasing to at least 0, ``(steps + 1,)``.
        improved: the line above; False is ``x <- degrade(x0, s)``, in which errors of the restoration add up.

    Returns a `Sample`; one call of ``restore`` a step.

    Cold Diffusion: Inverting Arbitrary Image Transforms Without Noise, arXiv:2208.09392, algorithms 1 and 2.

    Raises ValueError unless the severities decrease and are at least 0.

    >>> restored(lambda x, s: x + 2 * s, lambda x, s: 0 * x, jnp.array([5.0]), np.array([1.0, 0.5, 0.0])).x
    Array([3.], dtype=float32)
    """
    if not is_traced(severities):
        s = np.asarray(severities, np.float64)
        if s.ndim != 1 or len(s) < 2 or s[-1] < 0 or np.any(np.diff(s) >= 0):
            raise ValueError(f"severities must decrease, to 0 or above, got {severities!r}.")
    severities = jnp.asarray(severities, jnp.result_type(*jax.tree.leaves(x), jnp.float32))

    def body(carry: tuple[Tree, Array], row: tuple[Array, Array, Array]) -> tuple[tuple[Tree, Array], None]:
        x, failed_at = carry
        index, now, later = row
        x0 = restore(x, now)
        after = degrade(x0, later)
        if improved:
            after = jax.tree.map(lambda a, b, c: a - b + c, x, degrade(x0, now), after)
        finite = all_finite(after)
        return (after, jnp.where((failed_at < 0) & ~finite, index, failed_at)), None

    count = len(severities) - 1
    rows = jnp.arange(count, dtype=jnp.int32), severities[:-1], severities[1:]
    (x, failed_at), _ = jax.lax.scan(body, (x, jnp.full((), -1, jnp.int32)), rows)
    calls = jnp.asarray(count, jnp.int32)
    return Sample(x, calls, calls, failed_at, UNSAVED)


def smooth_field(key: Array, shape: tuple[int, int], knots: int = 4, size: Array = 1.0, dtype: Any = None) -> Array:
    """A random smooth velocity field, (height, width, 2), in pixels.

    Normal of standard deviation ``size`` at ``knots`` by ``knots`` points, cubic between them.

    Raises ValueError for less than two knots.
    """
    if not isinstance(knots, int) or knots < 2:
        raise ValueError(f"knots must be an integer of at least 2, got {knots!r}.")
    coarse = size * jax.random.normal(key, (knots, knots, 2), dtype or jnp.float32)
    return jax.image.resize(coarse, (*shape, 2), "cubic")


def flowed(field: Array, time: Array, squarings: int = 6) -> Array:
    """The displacement of every pixel after moving along a field for a time, (height, width, 2), by squaring.

        u <- u + u(. + u),  squarings times from u = field time / 2^squarings

    Raises ValueError for negative squarings.
    """
    if not isinstance(squarings, int) or squarings < 0:
        raise ValueError(f"squarings must be an integer of at least 0, got {squarings!r}.")
    moved = field * (time / 2**squarings)
    for _ in range(squarings):
        moved = moved + warped(moved, moved)
    return moved


def warped(image: Array, displacement: Array) -> Array:
    """``image(place + displacement)``, (height, width, ...), linear between pixels, the border's value outside."""
    places = jnp.meshgrid(*(jnp.arange(n, dtype=displacement.dtype) for n in image.shape[:2]), indexing="ij")
    where = [place + displacement[..., i] for i, place in enumerate(places)]
    channels = image.reshape(*image.shape[:2], -1)
    one = lambda channel: map_coordinates(channel, where, order=1, mode="nearest")
    return jax.vmap(one, in_axes=-1, out_axes=-1)(channels).reshape(image.shape)


def volumes(displacement: Array) -> Array:
    """The Jacobian determinant of ``place + displacement``, (height, width): where it is negative the image folds."""
    (ii, ij), (ji, jj) = (jnp.gradient(displacement[..., i], axis=(0, 1)) for i in (0, 1))
    return (1 + ii) * (1 + jj) - ij * ji
