"""Twists of a measurement: approximations of p(y | x_t) from the denoiser, for guidance and for particles.

All but `likelihood` and `lgd` are Gaussian, with the posterior of x_0 given x_t taken as N(x0, C):

    log h = log N(y; A x0, S + A C A^T)       grad log h = J^T A^T (S + A C A^T)^-1 (y - A x0),   J = d x0 / d x_t

with C held constant in the gradient, so that the tilted estimate is ``x0 + (sigma^2 / alpha) J^T A^T (...)``, and
J^T sigma^2 / alpha is the true covariance of x_0 given x_t where the denoiser is exact.

| twist | C |
|---|---|
| `likelihood` | 0 (DPS) |
| `pigdm` | r^2 I, r^2 = sigma^2 v / (sigma^2 + alpha^2 v), v the variance of the data |
| `tmpd` | diagonal: row sums of sigma^2 / alpha J |
| `mmps` | sigma^2 / alpha J |
| `noised` | (sigma / alpha)^2 I, around x_t / alpha in place of x0 (FPS, MCGdiff) |

At sigma = 0 all are log p(y | x_0) exactly.  At alpha = 0 the state tells nothing, and log h = 0.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.inverse.measurement import Measurement
from diffjax.inverse.operators import cospectral, log_determinant
from diffjax.inverse.systems import (
    Solve,
    ends,
    level_key,
    needs_linear,
    needs_spectrum,
    noise_variance,
    normal_like,
    one_level,
)
from diffjax.levels import Array, Level, Tree, dot, is_traced, static, value
from diffjax.solvers.arguments import choice

METHODS = ("auto", "dense", "cg", "gmres")


def likelihood(measurement: Any) -> Likelihood:
    """``log h = log p(y | x0(x_t))``: the clean estimate taken for the clean sample.

    The approximation of Diffusion Posterior Sampling for General Noisy Inverse Problems, arXiv:2209.14687 (its own
    step size is `dps`).  Any operator and noise.  Too sure of itself at high noise, where x0 is far from x_0: even for
    Gaussian data the tilted estimate is wrong.  One denoiser call.

    Raises ValueError if ``measurement`` has no log-likelihood.
    """
    if not hasattr(measurement, "log_likelihood"):
        raise ValueError(f"likelihood needs a measurement, got {measurement!r}.")
    return Likelihood(measurement)


@value
class Likelihood:
    measurement: Any
    factory = "likelihood"

    def __call__(self, denoise: Any, x: Tree, level: Level) -> tuple[Array, Tree]:
        x0 = denoise(x, level)
        return self.measurement.log_likelihood(x0), x0


def lgd(measurement: Any, variance: Array, key: Array, samples: int = 8) -> LossGuided:
    """``log h = log mean_i p(y | x0 + r z_i)``, r^2 = sigma^2 v / (sigma^2 + alpha^2 v): loss-guided diffusion.

    Monte Carlo over N(x0, r^2 I) instead of a Gaussian formula, so that any operator and any noise will do.  The draws
    are fixed by the key and the level.  Consistent as ``samples`` grows, and then `pigdm`'s value for linear
    operators; with few and many measurements one draw has all the weight.  One denoiser call.

    Loss-Guided Diffusion Models for Plug-and-Play Controllable Generation (Song et al., ICML 2023).

    Args:
        measurement: or anything with ``log_likelihood(x0)``.
        variance: v, that of the data, per entry.
        samples: at least 1.

    Raises ValueError for arguments out of range.
    """
    if not hasattr(measurement, "log_likelihood"):
        raise ValueError(f"lgd needs a measurement, got {measurement!r}.")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples!r}.")
    _positive("variance", variance)
    return LossGuided(measurement, variance, key, samples)


@value
class LossGuided:
    measurement: Any
    variance: Array
    key: Array
    samples: int = static()
    factory = "lgd"

    def __call__(self, denoise: Any, x: Tree, level: Level) -> tuple[Array, Tree]:
        x0 = denoise(x, level)
        std = jnp.sqrt(conditional_variance(self.variance, level))

        def one(key: Array) -> Array:
            moved = jax.tree.map(lambda leaf, z: (leaf + std * z).astype(leaf.dtype), x0, normal_like(key, x0))
            return self.measurement.log_likelihood(moved)

        logs = jax.vmap(one)(jax.random.split(level_key(self.key, level), self.samples))
        return jax.nn.logsumexp(logs) - jnp.log(self.samples), x0


def noised(measurement: Measurement) -> Noised:
    """``log h = log N(y; A x_t / alpha, S + (sigma / alpha)^2 A A^T)``: the measurement of the noisy state itself.

    What p(y | x_t) would be for data of infinite variance.  In sequential Monte Carlo it is the potential of filtering
    methods, which follow a measurement that is noised along with the state: they need no derivative of the network and
    pay with more resampling.  With a vanishing step the tilted proposal is the conjugate kernel that they use.  Through
    the operator's spectrum.  One denoiser call, for the plain estimate.

    Monte Carlo guided Diffusion for Bayesian linear inverse problems, arXiv:2308.07983.  Diffusion Posterior
    Sampling for Linear Inverse Problem Solving: A Filtering Perspective (Dou and Song, ICLR 2024).

    Raises ValueError for an operator without a spectrum or noise that is not isotropic.
    """
    needs_spectrum("noised", measurement)
    return Noised(measurement)


@value
class Noised:
    measurement: Any
    factory = "noised"

    def __call__(self, denoise: Any, x: Tree, level: Level) -> tuple[Array, Tree]:
        return self.log_value(x, level), denoise(x, level)

    def gradient(self, denoise: Any, x: Tree, level: Level) -> tuple[Array, Tree, Tree]:
        """``(log_h, x0, grad log h)``, without a derivative of the denoiser."""
        log_h, slope = jax.value_and_grad(lambda x: self.log_value(x, level))(x)
        return log_h, denoise(x, level), slope

    def check(self, t: Level) -> None:
        one_level("noised", t)

    def log_value(self, x: Tree, level: Level) -> Array:
        """log h at a state."""
        seen = self.measurement
        clean, blank = ends(level)
        raw = jax.tree.map(lambda leaf: leaf / jnp.where(blank, 1.0, level.alpha), x)
        residual = seen.residual(raw)
        noise = noise_variance(seen, x)
        ratio2 = (level.sigma / jnp.where(blank, 1.0, level.alpha)) ** 2
        total = lambda q: jnp.where(jnp.logical_or(clean, blank), 1.0, noise + ratio2 * q)
        inverse = lambda q: jnp.where(total(q) > 0, 1 / jnp.where(total(q) > 0, total(q), 1.0), 0.0)
        solved = cospectral(seen.operator, inverse, residual)
        count = sum(leaf.size for leaf in jax.tree.leaves(residual))
        log_det = log_determinant(seen.operator, total, x)
        gaussian = -0.5 * (dot(residual, solved) + log_det + count * jnp.log(2 * jnp.pi))
        return jnp.where(clean, seen.log_likelihood(raw), jnp.where(blank, 0.0, gaussian))


# --- Gaussian twists ----------------------------------------------------------------------------------------------


def pigdm(measurement: Measurement, variance: Array, solver: str = "auto", iterations: int = 30) -> GaussianTwist:
    """PiGDM with the variance of the data said explicitly: ``C = r^2 I, r^2 = sigma^2 v / (sigma^2 + alpha^2 v)``.

    Exact for Gaussian data N(m, v I).  v decides: 1, as if data had unit variance, makes particles collapse on data
    that have not, and so does a v that is too small; the empirical variance of the data is enough.  Closed form through
    the operator's spectrum where it has one and the noise is isotropic.  One denoiser call and one vector-Jacobian
    product.  The paper has v = 1 and the authors' sampler another step: for exact y it adds
    ``alpha_t alpha_s J^T A^+ (y - A x0)`` to one of DDIM (adaptive weights).  Here the step is the
    likelihood's own, which is what is exact.

    Pseudoinverse-Guided Diffusion Models for Inverse Problems (Song et al., ICLR 2023).

    Args:
        measurement: of a linear operator.
        variance: v, a number above 0, or a tree that broadcasts against the sample.
        solver, iterations: as for `mmps`, where there is no closed form.

    Raises ValueError for a nonlinear operator or a variance that is not above 0.
    """
    _positive("variance", variance)
    return _gaussian("pigdm", measurement, Scalar(variance), solver, iterations, 1)


def tmpd(measurement: Measurement, solver: str = "auto", iterations: int = 30) -> GaussianTwist:
    """Tweedie moment projection, ``C = diag(sigma^2 / alpha J^T 1)``: row sums of the posterior covariance.

    Exact for Gaussian data with a diagonal covariance; no variance to set.  Negative sums count as 0.  One denoiser
    call and two vector-Jacobian products.

    Tweedie Moment Projected Diffusions For Inverse Problems, arXiv:2310.06721.

    Arguments and errors are those of `mmps`.
    """
    return _gaussian("tmpd", measurement, RowSums(), solver, iterations, 1)


def mmps(measurement: Measurement, solver: str = "auto", iterations: int = 10, probes: int = 1) -> GaussianTwist:
    """Moment matching posterior sampling: ``C = sigma^2 / alpha J^T``, all of the denoiser's Jacobian.

    Exact for Gaussian data, with nothing to set; the default twist for linear operators.  One denoiser call, and one
    vector-Jacobian product per measurement ("dense") or iteration.  A network's J^T is not quite symmetric and may have
    negative eigenvalues.  As they stand they let some draws explode (1.6 and more off, root mean square, with a network
    of digits of which 24 projections are seen); "dense" counts them as 0 and "cg" stops before them, as a covariance
    has none (0.28 and 0.30; 0.275 with 3 iterations, which for a network are enough).

    Learning Diffusion Priors from Observations by Expectation Maximization, arXiv:2405.13712, section 4.2.

    Args:
        measurement: of a linear operator; for Poisson noise its Gaussian surrogate is used where sigma > 0.
        solver: "dense" makes the matrix S + A C A^T; "cg" iterates with a symmetric one, "gmres" with any, and
            without a safeguard; "auto" is dense up to 32 measurements, else cg.
        iterations: of cg or gmres.
        probes: of the Lanczos estimate of log det, which is for weights: of particles, and of the twists in `one_of`.

    Raises ValueError for a nonlinear operator or an unknown solver.
    """
    return _gaussian("mmps", measurement, FullJacobian(), solver, iterations, probes)


def _gaussian(
    name: str, measurement: Measurement, spread: Any, solver: str, iterations: int, probes: int
) -> GaussianTwist:
    needs_linear(name, measurement)
    choice("solver", solver, METHODS)
    if iterations < 1 or probes < 0:
        raise ValueError(f"need iterations >= 1 and probes >= 0, got {iterations!r} and {probes!r}.")
    return GaussianTwist(measurement, spread, Solve(solver, iterations, probes))


@value
class GaussianTwist:
    measurement: Any
    spread: Any  # C
    solve: Any

    def __repr__(self) -> str:
        return f"{self.spread.factory}({self.measurement!r}, {self.solve!r})"

    def __call__(self, denoise: Any, x: Tree, level: Level) -> tuple[Array, Tree]:
        log_h, x0, _, _ = self._parts(denoise, x, level)
        return log_h, x0

    def gradient(self, denoise: Any, x: Tree, level: Level) -> tuple[Array, Tree, Tree]:
        """``(log_h, x0, grad log h)``, the covariance held constant."""
        log_h, x0, solved, pull = self._parts(denoise, x, level)
        (gradient,) = pull(self.measurement.operator.adjoint(solved))
        return log_h, x0, gradient

    def _parts(self, denoise: Any, x: Tree, level: Level) -> tuple[Array, Tree, Tree, Any]:
        x0, pull = jax.vjp(lambda x: denoise(x, level), x)
        clean, blank = ends(level)
        outside = jnp.logical_or(clean, blank)
        seen = self.measurement
        residual = jax.tree.map(lambda leaf: jnp.where(outside, 0.0, leaf), seen.residual(x0))
        noise = seen.variance(x0)
        solved, square, log_det = self._solved(x0, pull, level, residual, noise, outside)
        count = sum(leaf.size for leaf in jax.tree.leaves(residual))
        rate = getattr(seen.noise, "rate", 1.0)  # the density of counts, not of counts over the rate
        gaussian = -0.5 * (square + log_det + count * jnp.log(2 * jnp.pi)) - count * jnp.log(rate)
        value = jnp.where(clean, seen.log_likelihood(x0), jnp.where(blank, 0.0, gaussian))
        return value, x0, solved, pull

    def _solved(
        self, x0: Tree, pull: Any, level: Level, residual: Tree, noise: Tree, outside: Array
    ) -> tuple[Tree, Array, Array]:
        """``(S + A C A^T)^-1 residual``, its product with residual, the log-determinant; the identity at the ends."""
        a = self.measurement.operator
        closed = self.spread.scalar(level)
        if closed is not None and self.measurement.isotropic and hasattr(a, "spectral"):
            std = jax.tree.leaves(noise)[0].reshape(-1)[0]
            total = lambda q: jnp.where(outside, 1.0, std + closed * q)
            inverse = lambda q: jnp.where(total(q) > 0, 1 / jnp.where(total(q) > 0, total(q), 1.0), 0.0)
            solved = cospectral(a, inverse, residual)
            return solved, dot(residual, solved), log_determinant(a, total, x0)
        spread = self.spread.apply(x0, pull, level)

        through = lambda v: jax.tree.map(lambda leaf: jnp.where(outside, 0.0, leaf), a(spread(a.adjoint(v))))
        whole = jax.tree.map(lambda s, r: jnp.where(outside, 1.0, jnp.broadcast_to(s, r.shape)), noise, residual)
        return self.solve(whole, through, residual)


@value
class Scalar:
    variance: Tree
    factory = "pigdm"

    def scalar(self, level: Level) -> Array | None:
        """r^2 where it is one number."""
        if any(np.ndim(leaf) for leaf in (*jax.tree.leaves(self.variance), level.alpha)):
            return None
        leaves = jax.tree.leaves(self.variance)
        return conditional_variance(leaves[0], level) if len(leaves) == 1 else None

    def apply(self, x0: Tree, pull: Any, level: Level) -> Any:
        def spread(v: Tree) -> Tree:
            same = jax.tree.structure(self.variance) == jax.tree.structure(v)
            variance = self.variance if same else jax.tree.map(lambda leaf: self.variance, v)
            return jax.tree.map(lambda leaf, s: conditional_variance(s, level) * leaf, v, variance)

        return spread


@value
class RowSums:
    factory = "tmpd"

    def scalar(self, level: Level) -> None:
        return None

    def apply(self, x0: Tree, pull: Any, level: Level) -> Any:
        (sums,) = pull(jax.tree.map(jnp.ones_like, x0))
        diagonal = jax.tree.map(lambda leaf: jnp.maximum(_factor(level) * leaf, 0.0), sums)
        return lambda v: jax.tree.map(jnp.multiply, diagonal, v)


@value
class FullJacobian:
    factory = "mmps"

    def scalar(self, level: Level) -> None:
        return None

    def apply(self, x0: Tree, pull: Any, level: Level) -> Any:
        return lambda v: jax.tree.map(lambda leaf: _factor(level) * leaf, pull(v)[0])


def conditional_variance(variance: Array, level: Level) -> Array:
    """``sigma^2 v / (sigma^2 + alpha^2 v)``: of x_0 given x_t for data of variance v."""
    total = level.sigma**2 + level.alpha**2 * variance
    return level.sigma**2 * variance / jnp.where(total > 0, total, 1.0)


def _factor(level: Level) -> Array:
    return level.sigma**2 / jnp.where(jnp.asarray(level.alpha) > 0, level.alpha, 1.0)


def _positive(name: str, given: Tree) -> None:
    for leaf in jax.tree.leaves(given):
        if not is_traced(leaf) and not (np.all(np.isfinite(leaf)) and np.all(np.asarray(leaf) > 0)):
            raise ValueError(f"{name} must be finite and above 0, got {leaf!r}.")
