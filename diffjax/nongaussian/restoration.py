"""Generation by restoration: degrade in any linear way with noise, restore by a network that makes up its mind.

A degradation is ``y = A_s x + sigma_s eps`` at severity s, with A_s blur, block averages, masks, or 1.  Its restoration
is a map ``G(y, s, z)`` of noise z too, trained to fit the measurement and to be one of the data,

    lambda |y - A_s G|^2 / (2 sigma_s^2) + prior(G),

not to be the mean of all that fit: then few levels are enough, restored and degraded again one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.levels import UNSAVED, Array, Sample, Tree, all_finite, as_value, is_traced, value
from diffjax.samplers.sequential import normal_noise


def degradation(operator: Callable[[Tree, Array], Tree], noise: Callable[[Array], Array]) -> Degradation:
    """``y = A_s x + sigma_s eps`` as ``degraded(key, x, severity)``.

    Args:
        operator: ``(x, severity) -> A_s x``, linear in x; see `block_averages` and `masked`.
        noise: ``severity -> sigma_s``.

    Restoration based Generative Models, arXiv:2303.05456, section 3.
    """
    return Degradation(as_value(operator), as_value(noise))


@value
class Degradation:
    operator: Any
    noise: Any
    factory = "degradation"

    def __call__(self, key: Array, x: Tree, severity: Array) -> Tree:
        """A draw of y."""
        (eps,) = normal_noise(key, 0, x, 1)
        return jax.tree.map(lambda a, z: a + self.noise(severity) * z, self.operator(x, severity), eps)

    def fidelity(self, x: Tree, y: Tree, severity: Array) -> Array:
        """``|y - A_s x|^2 / (2 sigma_s^2)``: -log p(y | x) but for a constant."""
        off = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), y, self.operator(x, severity))
        return sum(jax.tree.leaves(off)) / (2 * self.noise(severity) ** 2)


def block_averages(x: Array, size: int, axes: tuple[int, ...] = (0, 1)) -> Array:
    """Every block of ``size`` along ``axes`` replaced by its mean: down and up again, an orthogonal projection.

    Raises ValueError where size does not divide an axis.

    >>> block_averages(np.array([1.0, 3.0, 5.0, 7.0]), 2, (0,)).tolist()
    [2.0, 2.0, 6.0, 6.0]
    """
    if any(x.shape[axis] % size for axis in axes):
        raise ValueError(f"size must divide the axes {axes} of {x.shape}, got {size!r}.")
    for axis in axes:
        axis = axis % x.ndim
        split = x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])
        x = (split.mean(axis + 1, keepdims=True) + 0 * split).reshape(x.shape)
    return x


def masked(x: Array, mask: Array) -> Array:
    """``mask x``: what is not seen is 0."""
    return x * mask


def consistent(x: Tree, y: Tree, operator: Callable[[Tree], Tree]) -> Tree:
    """``x + y - A x`` for an orthogonal projection A: the nearest x that fits a measurement y = A x without noise.

    Of block averages and masks this is the limit of large lambda.
    """
    return jax.tree.map(lambda a, b, c: a + b - c, x, y, operator(x))


def regenerated(
    key: Array,
    degrade: Callable[[Array, Tree, Array], Tree],
    restore: Callable[[Tree, Array, Tree], Tree],
    x: Tree,
    severities: Array,
) -> Sample:
    """Restore and degrade again, each with noise of its own: ``y_s = A_s G(y_t, t, z) + sigma_s eps``.

    With a G that draws from the posterior of x every y_s has the law of degraded data, in any number of steps; with
    the posterior mean (cold diffusion's restoration) it has too little variance.

    Args:
        key: of z and of eps.
        degrade: ``(key, x, severity)``, a `degradation` or any other.
        restore: ``(y, severity, z)``, z standard normal shaped like y; a network may use as much of it as it wants.
        x: a degraded state at the first severity.
        severities: decreasing, ``(steps + 1,)``; at the last, where that is 0, the restoration is not degraded.

    Returns a `Sample`; one call of ``restore`` a step.

    Restoration based Generative Models, arXiv:2303.05456, section 3.

    Raises ValueError unless the severities decrease and are at least 0.

    >>> seen = degradation(lambda x, s: x, lambda s: s)
    >>> regenerated(jax.random.key(0), seen, lambda y, s, z: 0 * y + 3.0, jnp.zeros(2), np.array([1.0, 0.5, 0.0])).x
    Array([3., 3.], dtype=float32)
    """
    if not is_traced(severities):
        s = np.asarray(severities, np.float64)
        if s.ndim != 1 or len(s) < 2 or s[-1] < 0 or np.any(np.diff(s) >= 0):
            raise ValueError(f"severities must decrease, to 0 or above, got {severities!r}.")
    severities = jnp.asarray(severities, jnp.result_type(*jax.tree.leaves(x), jnp.float32))

    def body(carry: tuple[Tree, Array], row: tuple[Array, Array, Array]) -> tuple[tuple[Tree, Array], None]:
        (y, failed_at), (index, now, later) = carry, row
        (z,) = normal_noise(key, 2 * index, y, 1)
        clean = restore(y, now, z)
        again = degrade(jax.random.fold_in(key, 2 * index + 1), clean, later)
        y = jax.tree.map(lambda a, b: jnp.where(later == 0, a, b), clean, again)
        return (y, jnp.where((failed_at < 0) & ~all_finite(y), index, failed_at)), None

    count = len(severities) - 1
    rows = jnp.arange(count, dtype=jnp.int32), severities[:-1], severities[1:]
    (x, failed_at), _ = jax.lax.scan(body, (x, jnp.full((), -1, jnp.int32)), rows)
    calls = jnp.asarray(count, jnp.int32)
    return Sample(x, calls, calls, failed_at, UNSAVED)


def energy_prior(made: Array, real: Array) -> Array:
    """The energy distance of two batches (N, ...), ``2 E|a - b| - E|a - a'| - E|b - b'|``: 0 in the mean for one law.

    An implicit prior without a critic; unbiased, differentiable in both.
    """
    a, b = (part.reshape(len(part), -1) for part in (made, real))
    far = lambda u, v: jnp.sqrt(jnp.sum((u[:, None] - v[None]) ** 2, -1) + 1e-12)
    inside = lambda u: jnp.sum(far(u, u)) / (len(u) * (len(u) - 1))
    return 2 * jnp.mean(far(a, b)) - inside(a) - inside(b)


def critic_losses(made: Array, real: Array) -> tuple[Array, Array]:
    """``(of the generator, of the critic)`` from a critic's numbers: the adversarial prior, not saturating.

    softplus(-made) - softplus(made), and softplus(-real) + softplus(made), in their means.
    """
    soft = jax.nn.softplus
    return jnp.mean(soft(-made) - soft(made)), jnp.mean(soft(-real) + soft(made))


def map_loss(
    key: Array,
    degrade: Degradation,
    restore: Callable[[Array, Array, Array], Array],
    x0: Array,
    severity: Array,
    later: Array,
    prior: Callable[[Array, Array], Array] = energy_prior,
    fidelity: Array = 1.0,
) -> Array:
    """The objective of a batch at one severity: ``lambda |y - A_s G|^2 / (2 sigma_s^2 N) + prior(G again, x_0 again)``.

    The prior compares restorations and data both degraded to ``later`` < severity, as the sampler does next.

    Args:
        degrade: a `degradation`.
        restore: ``(y, severity, z)``, of one sample.
        x0: data (B, ...).
        prior: ``(made, real) -> number`` of two batches: `energy_prior`, or a critic's (see `critic_losses`).
        fidelity: lambda.

    Restoration based Generative Models, arXiv:2303.05456, equation 6 and section 4 (implicit prior).

    Raises ValueError unless fidelity is at least 0.
    """
    if not is_traced(fidelity) and not fidelity >= 0:
        raise ValueError(f"fidelity must be at least 0, got {fidelity!r}.")
    count = len(x0)
    seen, noise, made_key, real_key = jax.random.split(key, 4)
    each = lambda key: jax.random.split(key, count)
    y = jax.vmap(degrade, (0, 0, None))(each(seen), x0, severity)
    z = jax.random.normal(noise, y.shape, y.dtype)
    clean = jax.vmap(restore, (0, None, 0))(y, severity, z)
    fit = jnp.mean(jax.vmap(degrade.fidelity, (0, 0, None))(clean, y, severity)) / x0[0].size
    made = jax.vmap(degrade, (0, 0, None))(each(made_key), clean, later)
    real = jax.vmap(degrade, (0, 0, None))(each(real_key), x0, later)
    return fidelity * fit + prior(made, real)
