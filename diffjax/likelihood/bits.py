"""From densities to probabilities of whole numbers: dequantisation, and bits per dimension.

A value k of 0 .. L - 1 is the cell ``low + width [k, k + 1)`` of the model's units.  For any law q on the cells,

    log P(codes) >= E_q [ log p(x) - log q(x | codes) ],        and equals the log-mean-exp over many draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import erf, erfinv

from diffjax.levels import Array
from diffjax.solvers.arguments import positive


def bits_per_dim(log_probability: Array, size: int, width: Array = 1.0) -> Array:
    """Bits per dimension, ``-(log_probability + size log width) / (size log 2)``, from nats.

    Args:
        log_probability: nats of one sample: a probability (``width = 1``), or a density in the model's units.
        size: D, the number of entries.
        width: of a whole number's cell in those units, whose volume width^D turns the density into a probability:
            2 / 256 for 8-bit images in [-1, 1], which adds 7 bits.

    Raises ValueError unless size >= 1 and width > 0.

    >>> float(bits_per_dim(0.0, 12, 2 / 256))
    7.0
    """
    if not size >= 1:
        raise ValueError(f"size must be at least 1, got {size!r}.")
    positive("width", width)
    return -(log_probability / size + jnp.log(width)) / math.log(2)


def dequantised(
    key: Array, codes: Array, width: Array = 2 / 256, low: Array = -1.0, std: Array | None = None
) -> tuple[Array, Array]:
    """``(x, log q(x | codes))``: whole numbers as a draw from their cells, in the model's units.

    Args:
        codes: whole numbers 0 .. L - 1, any shape.
        width, low: cell k is ``low + width [k, k + 1)``; the defaults put 0 .. 255 on [-1, 1].
        std: None draws uniformly; a number draws from the normal law of that standard deviation (in model units) at
            the cell's centre, cut off at the cell's ends: with the noise sigma / alpha of a level it is what the
            forward process adds, kept in the cell, and there is nothing to be learned.

    ``log p(x) - log_q`` is an unbiased estimate of a lower bound on the log-probability of the codes.
    Improved Techniques for Maximum Likelihood Estimation for Diffusion ODEs, arXiv:2305.03935, section 4.2.

    Raises ValueError unless width > 0 and std > 0.
    """
    positive("width", width)
    u = jax.random.uniform(key, jnp.shape(codes), jnp.result_type(float))
    if std is None:
        inside, log_q = u, jnp.zeros_like(u)
    else:
        positive("std", std)
        share = jnp.asarray(std) / width
        # the standard normal law between -+ 1 / (2 share), of mass erf(1 / (2 sqrt 2 share))
        mass = erf(1 / (2 * math.sqrt(2) * share))
        z = math.sqrt(2) * erfinv((2 * u - 1) * mass)
        z = jnp.clip(z, -0.5 / share, 0.5 / share)
        inside = 0.5 + share * z
        log_q = -0.5 * z**2 - 0.5 * math.log(2 * math.pi) - jnp.log(share * mass)
    x = low + width * (codes + inside)
    return x, jnp.sum(log_q) - u.size * jnp.log(width)


def discrete_log_probability(
    key: Array,
    codes: Array,
    log_density: Callable[[Array], Array],
    *,
    width: Array = 2 / 256,
    low: Array = -1.0,
    std: Array | None = None,
    draws: int = 1,
) -> Array:
    """Nats of whole numbers under a density: a lower bound in expectation, tight for many ``draws``.

    ``log mean_j exp(log p(x_j) - log q(x_j | codes))``; ``log_density`` is a function of x, such as
    ``lambda x: likelihood.log_density(x, denoise, grid).log_density``, evaluated once a draw, one after the other.  The
    rest as in `dequantised`.

    Raises ValueError unless draws is an integer of at least 1.
    """
    if not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws must be an integer of at least 1, got {draws!r}.")

    def one(key: Array) -> Array:
        x, log_q = dequantised(key, codes, width, low, std)
        return log_density(x) - log_q

    return jax.nn.logsumexp(jax.lax.map(one, jax.random.split(key, draws))) - math.log(draws)
