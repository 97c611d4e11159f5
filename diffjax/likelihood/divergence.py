"""The divergence of a vector field, exact or estimated, from Jacobian-vector products.

An estimator is a value with ``probes(key, size, dtype)``, drawn once for a whole trajectory, so that the divergence is
a smooth function of time, ``products(size)``, the Jacobian-vector products of a call, and

    estimator(field, x, probes) -> (field(x), divergence)

for a field from vectors (size,) to vectors.  The field itself is evaluated once; the products share that evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.levels import Array, static, value

NOISES = ("rademacher", "normal")


def exact(chunk: int | None = 4) -> Exact:
    """The trace of the Jacobian by D Jacobian-vector products, batched ``chunk`` at a time, or (None) all at once.

    One evaluation and D products, which share it.  Under `vmap` over B samples, B times ``chunk`` tangents are held.

    On a CPU that number decides the time, too.  On the digits U-Net (D = 64; least times on a busy machine) up to 256
    tangents cost what products one after the other cost, 512 and more up to three times as much, presumably because
    they leave the cache.  So all at once is for single samples; the default is for batches of up to 64.  Accelerators
    were not measured; one that the batch does not fill should want more.

    Raises ValueError unless chunk is None or an integer of at least 1.

    >>> estimator = exact()
    >>> float(estimator(lambda x: 3.0 * x, jnp.ones(2), None)[1])
    6.0
    """
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk must be None or an integer of at least 1, got {chunk!r}.")
    return Exact(chunk)


def hutchinson(probes: int = 1, noise: str = "rademacher") -> Hutchinson:
    """Hutchinson's estimator ``(1 / K) sum_k z_k . J z_k``, E z z^T = I: unbiased, with K products.

    Args:
        probes: K.
        noise: "rademacher" (signs; exact where the Jacobian is diagonal, and of the smaller variance,
            2 sum_{i != j} S_ij^2 / K with S the symmetric part of J) or "normal" (2 |S|_F^2 / K).

    FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models, arXiv:1810.01367, section 3.1.

    Raises ValueError unless probes >= 1 and noise is one of the two.
    """
    return Hutchinson(_count("probes", probes, 1), _noise(noise))


def hutch_plus_plus(products: int = 3, noise: str = "rademacher") -> HutchPlusPlus:
    """Hutch++: the trace on the range of J S exactly, Hutchinson's estimator on what is orthogonal to it.

    With k = products / 3 columns in S and in G, Q an orthonormal basis of J S, and P = I - Q Q^T,

        tr Q^T J Q + (1 / k) tr G^T P J P G.

    Unbiased; the variance falls like 1 / products^2 for a positive semi-definite J, and it is exact for a rank of at
    most k.  Where k >= D it is the exact trace.
    Hutch++: Optimal Stochastic Trace Estimation, arXiv:2010.09649, algorithm 1.

    Raises ValueError unless products is a positive multiple of 3 and noise "rademacher" or "normal".
    """
    if not isinstance(products, int) or products < 3 or products % 3:
        raise ValueError(f"products must be a positive multiple of 3, got {products!r}.")
    return HutchPlusPlus(products // 3, _noise(noise))


@value
class Exact:
    chunk: int | None = static()
    factory = "exact"

    def products(self, size: int) -> int:
        return size

    def probes(self, key: Array, size: int, dtype: Any) -> None:
        del key, size, dtype

    def __call__(self, field: Callable, x: Array, probes: None) -> tuple[Array, Array]:
        del probes
        y, push = jax.linearize(field, x)
        if self.chunk is None or self.chunk >= x.size:
            return y, jnp.trace(jax.vmap(push)(jnp.eye(x.size, dtype=x.dtype)))
        entry = lambda i: push(jnp.zeros_like(x).at[i].set(1))[i]
        return y, jnp.sum(jax.lax.map(entry, jnp.arange(x.size), batch_size=self.chunk))


@value
class Hutchinson:
    count: int = static()
    noise: str = static()
    factory = "hutchinson"

    def products(self, size: int) -> int:
        del size
        return self.count

    def probes(self, key: Array, size: int, dtype: Any) -> Array:
        return _draw(self.noise, key, (self.count, size), dtype)

    def __call__(self, field: Callable, x: Array, probes: Array) -> tuple[Array, Array]:
        y, push = jax.linearize(field, x)
        return y, _trace(probes, jax.vmap(push)(probes)) / self.count


@value
class HutchPlusPlus:
    count: int = static()
    noise: str = static()
    factory = "hutch_plus_plus"

    def products(self, size: int) -> int:
        return size if self.count >= size else 3 * self.count

    def probes(self, key: Array, size: int, dtype: Any) -> Array | None:
        return None if self.count >= size else _draw(self.noise, key, (2, self.count, size), dtype)

    def __call__(self, field: Callable, x: Array, probes: Array | None) -> tuple[Array, Array]:
        if probes is None:
            return Exact(None)(field, x, None)
        y, push = jax.linearize(field, x)
        push = jax.vmap(push)
        sketch, others = probes
        # for any fixed Q the estimator is unbiased: no derivative of the factorisation is needed, which J = 0 lacks
        basis = jax.lax.stop_gradient(jnp.linalg.qr(push(sketch).T)[0].T)
        rest = others - (others @ basis.T) @ basis
        return y, _trace(basis, push(basis)) + _trace(rest, push(rest)) / self.count


def _trace(a: Array, b: Array) -> Array:
    return jnp.sum(a * b)


def _draw(noise: str, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    draw = jax.random.rademacher if noise == "rademacher" else jax.random.normal
    return draw(key, shape, dtype)


def _count(name: str, number: int, least: int) -> int:
    if not isinstance(number, int) or number < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {number!r}.")
    return number


def _noise(noise: str) -> str:
    if noise not in NOISES:
        raise ValueError(f"noise must be among {NOISES}, got {noise!r}.")
    return noise
