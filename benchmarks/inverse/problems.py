"""Inverse problems whose posterior is known: Gaussian, mixture, heavy-tailed and image priors.

A problem is several measurements of one shape, so that one compiled program solves them all.  Exact draws of every
posterior come with it: in closed form, and for the heavy-tailed priors by a Gibbs sampler.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import inverse, oracles
from diffjax.levels import value

DRAWS = 1000
CUTOFF = 0.03  # of the largest singular value: what the codes of DDRM and DDNM leave out of their blurs
NOISES = {"low": 0.1, "high": 0.5, "none": 0.0}  # standard deviation of the noise over the largest singular value
EXACT_Y, BLIND = "inpainting, exact y", "blind deblurring"
KINDS = {EXACT_Y: "exact y", BLIND: "blind"}  # what asks more of a method than a linear, noisy measurement


class Problem(NamedTuple):
    """P measurements of samples of one prior."""

    prior: Any  # the exact denoiser
    seen: Any  # a Measurement whose leaves have a leading axis P
    variance: float  # of the data, per entry, from a thousand samples
    exact: np.ndarray  # (P, 2 DRAWS, ...), two independent sets
    evidence: np.ndarray | None  # (P,) log p(y), where it is known
    twists: Any = None  # the exact twists, with a leading axis P
    tractable: Any = None  # the posteriors of a Gaussian of the prior's mean and covariance, with a leading axis P
    shape: Any = None  # of a sample that is a tree: its leaves lie behind each other in `exact`


def stacked(values: list) -> Any:
    """Values of one structure along a leading axis."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *values)


def random_operator(rng: np.random.Generator, rows: int, size: int) -> Any:
    """MCGdiff's: random orthogonal factors, singular values U(0, 1)."""
    left, _ = np.linalg.qr(rng.normal(size=(rows, rows)))
    right, _ = np.linalg.qr(rng.normal(size=(size, rows)))
    return inverse.matrix(left * np.sort(rng.uniform(size=rows)) @ right.T)


def grid_mixture(size: int) -> Any:
    """MCGdiff's prior: 25 unit Gaussians at (8 i, 8 j), i and j from -2 to 2, repeated along the axes."""
    rng = np.random.default_rng(25)
    places = np.array([[8.0 * i, 8.0 * j] for i in range(-2, 3) for j in range(-2, 3)])
    weights = rng.uniform(size=25)
    return oracles.mixture(weights, np.tile(places, (1, size // 2)), np.ones(25))


def conditional_draws(rng: np.random.Generator, prior: Any, seen: Any, count: int) -> np.ndarray:
    """Exact draws given y for diagonal components: choose one, draw it, and correct the draw by its gain."""
    a, y, std = np.asarray(seen.operator.entries), np.asarray(seen.y), float(seen.noise.std)
    variances, means = np.asarray(prior.variances), np.asarray(prior.means)
    covariances = np.einsum("md,kd,nd->kmn", a, variances, a) + std**2 * np.eye(len(y))
    offsets = y - means @ a.T
    solved = np.linalg.solve(covariances, offsets[..., None])[..., 0]
    logs = np.log(prior.weights) - 0.5 * ((offsets * solved).sum(1) + np.linalg.slogdet(covariances)[1])
    chosen = rng.choice(len(logs), size=count, p=np.exp(logs - logs.max()) / np.exp(logs - logs.max()).sum())
    x = means[chosen] + np.sqrt(variances[chosen]) * rng.normal(size=(count, means.shape[1]))
    missing = y - x @ a.T - std * rng.normal(size=(count, len(y)))
    gain = np.linalg.solve(covariances, np.einsum("md,kd->kmd", a, variances))  # (K, M, D)
    return x + np.einsum("nm,nmd->nd", missing, gain[chosen])


def log_evidence(prior: Any, seen: Any) -> float:
    """log p(y) for diagonal components, in any dimension."""
    a, y, std = np.asarray(seen.operator.entries), np.asarray(seen.y), float(seen.noise.std)
    covariances = np.einsum("md,kd,nd->kmn", a, np.asarray(prior.variances), a) + std**2 * np.eye(len(y))
    offsets = y - np.asarray(prior.means) @ a.T
    solved = np.linalg.solve(covariances, offsets[..., None])[..., 0]
    logs = -0.5 * ((offsets * solved).sum(1) + np.linalg.slogdet(2 * np.pi * covariances)[1])
    return float(np.logaddexp.reduce(np.log(prior.weights) + logs))


def mixture_problem(size: int, rows: int, noise: str, count: int) -> Problem:
    """MCGdiff's: ``rows`` random projections of the mixture in ``size`` dimensions."""
    prior = grid_mixture(size)
    rng = np.random.default_rng([size, rows, len(noise)])
    measurements, draws = [], []
    for _ in range(count):
        operator = random_operator(rng, rows, size)
        k = rng.choice(25, p=prior.weights)
        truth = prior.means[k] + rng.normal(size=size)
        std = NOISES[noise] * float(np.sqrt(operator.squared.max()))
        y = operator.entries @ truth + std * rng.normal(size=rows)
        measurements.append(inverse.measurement(operator, y, std))
        draws.append(conditional_draws(rng, prior, measurements[-1], 2 * DRAWS))
    evidence = np.array([log_evidence(prior, seen) for seen in measurements])
    twists = stacked([inverse.exact(prior, seen) for seen in measurements])
    tractable = gaussians(prior, measurements)
    return Problem(prior, stacked(measurements), _variance(prior), np.stack(draws), evidence, twists, tractable)


def gaussians(prior: Any, measurements: list) -> Any:
    """The posteriors of the Gaussian that has the mean and the covariance of a prior."""
    shape = measurements[0].operator.input_shape
    if isinstance(prior, ScaleMixture):
        prior = oracles.gaussian(np.zeros(shape), np.full(shape, np.mean(prior.variances)))
    elif hasattr(prior, "means"):
        w, v, vectors = prior.weights, np.asarray(prior.variances), prior.vectors
        mean = np.tensordot(w, prior.means, 1)
        away = (prior.means - mean).reshape(len(w), -1)
        inside = np.diag(w @ v) if vectors is None else np.einsum("k,kde,ke,kfe->df", w, vectors, v, vectors)
        prior = oracles.gaussian(mean, inside + (w[:, None] * away).T @ away)
    return stacked([inverse.posterior(prior, seen) for seen in measurements])


def _variance(prior: Any) -> float:
    """What a user would take: the mean variance of the entries of a thousand samples."""
    rng = np.random.default_rng(1000)
    k = rng.choice(len(prior.weights), size=1000, p=prior.weights)
    size = prior.means.shape[1]
    samples = prior.means[k] + np.sqrt(prior.variances[k]) * rng.normal(size=(1000, size))
    return float(samples.var(axis=0).mean())


def oracle_problem(prior: Any, operators: list, noise: str, key: jax.Array) -> Problem:
    """Priors of moderate size with full covariances, solved by `diffjax.inverse.posterior`."""
    measurements, draws = [], []
    sample = jax.jit(lambda prior, keys: jax.vmap(prior.sample)(keys))
    for i, operator in enumerate(operators):
        first, second, third = jax.random.split(jax.random.fold_in(key, i), 3)
        std = NOISES[noise] * float(np.sqrt(np.max(np.asarray(operator.squared))))
        seen = operator(prior.sample(first))
        y = np.asarray(seen + std * jax.random.normal(second, seen.shape))
        measurements.append(inverse.measurement(operator, y, std))
        after = inverse.posterior(prior, measurements[-1])
        draws.append(np.asarray(sample(after, jax.random.split(third, 2 * DRAWS))))
    evidence = np.array([inverse.evidence(prior, seen) for seen in measurements])
    twists = stacked([inverse.exact(prior, seen) for seen in measurements])
    data = np.asarray(sample(prior, jax.random.split(key, 1000)))
    tractable, variance = gaussians(prior, measurements), float(data.var(0).mean())
    return Problem(prior, stacked(measurements), variance, np.stack(draws), evidence, twists, tractable)


def gaussian_problem(noise: str, count: int) -> Problem:
    """Four projections of a Gaussian in eight dimensions with a full covariance."""
    rng = np.random.default_rng(8)
    root = rng.normal(size=(8, 8))
    prior = oracles.gaussian(rng.normal(size=8), root @ root.T / 8)
    return oracle_problem(prior, [random_operator(rng, 4, 8) for _ in range(count)], noise, jax.random.key(8))


# --- images -----------------------------------------------------------------------------------------------------------


def digits_prior() -> Any:
    """A mixture of ten Gaussians fitted to the classes of scikit-learn's 8 x 8 digits, in [-1, 1]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = data.images / 8.0 - 1.0
    groups = [x[data.target == k].reshape(-1, 64) for k in range(10)]
    covariances = np.stack([np.cov(g.T) + 1e-2 * np.eye(64) for g in groups])
    means = np.stack([g.mean(0) for g in groups]).reshape(10, 8, 8)
    return oracles.mixture(np.array([len(g) for g in groups]), means, covariances)


def image_problem(name: str, noise: str, count: int) -> Problem:
    """One operator of imaging on draws of `digits_prior`."""
    operators = {
        EXACT_Y: lambda: inverse.mask(np.random.default_rng(0).uniform(size=(8, 8)) < 0.5),
        "inpainting": lambda: inverse.mask(np.random.default_rng(0).uniform(size=(8, 8)) < 0.5),
        "deblurring": lambda: inverse.blur(inverse.gaussian_kernel(5, 1.0), (8, 8), CUTOFF),
        "super-resolution": lambda: inverse.downsample(2, (8, 8)),
        "tomography": lambda: inverse.decomposed(inverse.radon(np.linspace(0, np.pi, 5)[:4], (8, 8)), CUTOFF),
    }
    seed = zlib.crc32(name.encode())
    return oracle_problem(digits_prior(), [operators[name]()] * count, noise, jax.random.key(seed))


def blind_problem(noise: str, count: int) -> Problem:
    """A draw of `digits_prior` blurred by one of eight Gaussian kernels: image and kernel are both unknown.

    The kernel is one of finitely many, so that its law given y is known, and that of the image given it.  In the state
    the kernels have the variance of the images' entries.
    """
    prior, rng = digits_prior(), np.random.default_rng(16)
    widths = [(0.5, 0.5), (0.5, 1.0), (0.5, 2.0), (1.0, 0.5), (1.0, 1.0), (2.0, 0.5), (1.0, 2.0), (2.0, 2.0)]
    lines = {std: inverse.gaussian_kernel(5, std, 1) for std in (0.5, 1.0, 2.0)}
    kernels = np.stack([np.outer(lines[a], lines[b]) for a, b in widths])
    sample = jax.jit(lambda prior, keys: jax.vmap(prior.sample)(keys))
    keys = jax.random.split(jax.random.key(16), count + 1)
    variance = float(np.asarray(sample(prior, jax.random.split(keys[-1], 1000))).var(0).mean())
    unit = float(np.sqrt(kernels.var(0).mean() / variance))
    blurs = [inverse.blur(kernel, (8, 8)) for kernel in kernels]
    operator = inverse.blind(Scaled(unit), (8, 8), (5, 5))
    measurements, draws, evidence = [], [], []
    for key in keys[:-1]:
        std = NOISES[noise]
        seen = blurs[rng.integers(len(blurs))](prior.sample(key))
        y = np.asarray(seen + std * rng.normal(size=(8, 8)))
        measurements.append(inverse.measurement(operator, y, std))
        each = [inverse.measurement(a, y, std) for a in blurs]
        logs = np.array([inverse.evidence(prior, one) for one in each]) - np.log(len(blurs))
        chosen = rng.choice(len(blurs), size=2 * DRAWS, p=np.exp(logs - np.logaddexp.reduce(logs)))
        found = np.empty((2 * DRAWS, 64 + 25))
        for k in np.unique(chosen):
            rows = np.flatnonzero(chosen == k)
            after = sample(inverse.posterior(prior, each[k]), jax.random.split(jax.random.fold_in(key, k), 2 * DRAWS))
            found[rows, :64] = np.asarray(after)[rows].reshape(-1, 64)
            found[rows, 64:] = kernels[k].ravel() / unit
        draws.append(found)
        evidence.append(np.logaddexp.reduce(logs))
    both = inverse.joint({"image": prior, "kernel": oracles.points(kernels / unit)})
    shape = {"image": (8, 8), "kernel": (5, 5)}
    return Problem(both, stacked(measurements), variance, np.stack(draws), np.array(evidence), shape=shape)


@value
class Scaled:
    """From the kernel in the state to its blur."""

    unit: float

    def __call__(self, kernel: Any) -> Any:
        return inverse.blur(self.unit * kernel, (8, 8))


# --- heavy tails ------------------------------------------------------------------------------------------------------


@value
class ScaleMixture:
    """Independent entries, each a mixture of centred Gaussians: the exact denoiser of heavy-tailed increments."""

    weights: Any  # (K,)
    variances: Any  # (K,)

    def __call__(self, x: Any, level: Any) -> Any:
        v, w = jnp.asarray(self.variances, x.dtype), jnp.asarray(self.weights, x.dtype)
        c = level.alpha**2 * v + level.sigma**2
        share = jax.nn.softmax(jnp.log(w) - 0.5 * (x[..., None] ** 2 / c + jnp.log(c)))
        return jnp.sum(share * level.alpha * v / c, -1) * x


LAWS = {
    # the scales of a Laplace law are exponential, those of Student's (3 degrees) inverse-gamma: at even quantiles
    "laplace": lambda u: -2.0 * np.log1p(-u) * 0.5,
    "student": lambda u: 1.5 / _gamma_quantile(u),
}


def _gamma_quantile(u: np.ndarray) -> np.ndarray:
    from scipy.stats import gamma

    return gamma.ppf(1 - u, 1.5)


def jump_problem(law: str, noise: str, count: int, size: int = 32, rows: int = 8) -> Problem:
    """Signals with independent heavy-tailed increments, seen at a few places; the unknown are the increments.

    In them the prior is separable, so that its denoiser is exact, and the operator is a sampling of partial sums.
    """
    u = (np.arange(24) + 0.5) / 24
    prior = ScaleMixture(np.full(24, 1 / 24), LAWS[law](u))
    rng = np.random.default_rng(zlib.crc32(law.encode()))
    measurements, draws = [], []
    for _ in range(count):
        places = np.sort(rng.choice(size, size=rows, replace=False))
        operator = inverse.matrix(np.tril(np.ones((size, size)))[places])
        truth = np.sqrt(rng.choice(prior.variances, size=size)) * rng.normal(size=size)
        std = 0.5 * NOISES[noise]
        y = operator.entries @ truth + std * rng.normal(size=rows)
        measurements.append(inverse.measurement(operator, y, std))
        draws.append(gibbs(rng, prior, operator.entries, y, std, 2 * DRAWS))
    variance = float(np.mean(prior.variances))
    tractable = gaussians(prior, measurements)
    return Problem(prior, stacked(measurements), variance, np.stack(draws), None, tractable=tractable)


def gibbs(rng: np.random.Generator, prior: ScaleMixture, a: Any, y: Any, std: float, chains: int, sweeps: int = 80):
    """The scales given the increments, then the increments given the scales: one draw of each of many chains."""
    size, rows = a.shape[1], len(y)
    variances = np.asarray(prior.variances)
    v = rng.choice(variances, size=(chains, size))
    for _ in range(sweeps):
        x = np.sqrt(v) * rng.normal(size=v.shape)
        missing = y - x @ a.T - std * rng.normal(size=(chains, rows))
        covariance = np.einsum("md,cd,nd->cmn", a, v, a, optimize=True) + std**2 * np.eye(rows)
        x = x + v * (np.linalg.solve(covariance, missing[..., None])[..., 0] @ a)
        logs = -0.5 * (x[..., None] ** 2 / variances + np.log(variances))
        gumbel = -np.log(-np.log(rng.uniform(size=logs.shape)))
        v = variances[np.argmax(logs + gumbel, -1)]
    return x


def problems(quick: bool = False) -> dict[str, Any]:
    """The cells' problems by name, each a function of the noise."""
    from functools import partial

    found = {"gaussian 8": partial(gaussian_problem, count=6)}
    for size, count in ((8, 12),) if quick else ((8, 12), (80, 6), (800, 2)):
        for rows in (1, 2, 4):
            found[f"mixture {size}, {rows} seen"] = partial(mixture_problem, size, rows, count=count)
    for law in ("laplace", "student"):
        found[f"{law} jumps"] = partial(jump_problem, law, count=2)
    for name in ("inpainting",) if quick else ("inpainting", "deblurring", "super-resolution", "tomography"):
        found[name] = partial(image_problem, name, count=4)
    return found | {EXACT_Y: partial(image_problem, EXACT_Y, count=4), BLIND: partial(blind_problem, count=4)}


def noises(name: str) -> tuple[str, ...]:
    """The noises of a problem."""
    return ("none",) if name == EXACT_Y else ("low", "high")
