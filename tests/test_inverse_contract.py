"""What every method of `diffjax.inverse` is held to; the methods are found from the package.

A method is what a function makes that takes a measurement, a denoiser, a solver or a key first, and that is not an
operator, a noise or a law in closed form.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, guidance, inverse, processes, sample, solvers, steer
from diffjax.catalogue import catalogue
from diffjax.levels import Solver, value

KEY = jax.random.key(7)
SHAPE = {"a": (3,), "b": ()}
KEEP = {"a": np.array([True, False, True]), "b": np.array(True)}
Y = {"a": np.array([0.9, -0.4], np.float32), "b": np.array([0.2], np.float32)}
STEPS = 3
EXTRA = {  # arguments without a default
    "lgd": {"variance": 1.5, "key": KEY, "samples": 3},
    "pigdm": {"variance": 1.5},
    "replacement": {"key": KEY},
    "dps": {"step": 0.3},
    "mcg": {"step": 0.3},
    "lanpaint": {"inner": 2},
    "fps": {"key": KEY},
    "blind_dps": {"step": 0.3, "sparsity": {"a": 0.1, "b": 0.0}},
}
LAWS = {"evidence", "exact", "posterior"}  # tested against quadrature
DRIVERS = {"active", "d_flow", "enkg", "expectation_maximisation", "fit_gaussian", "mixed_observation", "thompson"}
DRIVERS |= {"tractable_steering"}
DRIVERS |= {"draw_signal", "p2l", "signal"}  # they need a denoiser of their own kind
NOT_METHODS = {"measurement", "pseudo_inverse", *LAWS, *DRIVERS}  # drivers are of more than one sample or measurement


@value
class Prior:
    """N(0, v I) over any tree."""

    variance: float

    def __call__(self, x, level):
        c = level.alpha**2 * self.variance + level.sigma**2
        gain = jnp.where(c == 0, 1.0, level.alpha * self.variance / jnp.where(c == 0, 1.0, c))
        return jax.tree.map(lambda leaf: gain * leaf, x)


PRIOR = Prior(1.5)
FIRST = {"measurement", "denoise", "solver", "key"}


def found():
    """Every method by name."""
    modules = ("operators", "images", "nonlinear", "measurement", "exact")
    for name, factory in catalogue(inverse).items():
        if name in NOT_METHODS or factory.__module__.split(".")[-1] in modules:
            continue
        if next(iter(inspect.signature(factory).parameters)) in FIRST:
            yield name


def draw(name, key, seen, process, steps=STEPS, prior=PRIOR, shape=SHAPE, **settings):
    """One sample by a method, whatever kind it is; ``(Sample, the evaluations it should have counted)``."""
    factory = getattr(inverse, name)
    settings = EXTRA.get(name, {}) | settings
    grid = grids.uniform(process, steps, start=0.9 * float(process.end))
    base = solvers.ddim(eta=1.0)
    x = start(key, shape)
    kind = next(iter(inspect.signature(factory).parameters))
    if kind == "denoise":
        args = (seen.operator, inverse.pseudo_inverse(seen.operator, seen.y)) if name == "ilvr" else (seen,)
        settings = settings | ({"key": KEY} if name == "ilvr" else {})
        return sample(key, factory(prior, *args, **settings), base, grid, x=x), steps
    if kind == "measurement":
        made = factory(seen, **settings)
        if isinstance(made, Solver):
            return sample(key, prior, made, grid, x=x), steps * made.calls
        if hasattr(made, "ahead"):  # a filter: the first of two particles
            both = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), x)
            out = steer(key, prior, base, grid, x=both, particles=2, proposal=made)
            return out._replace(x=jax.tree.map(lambda leaf: leaf[0], out.x)), 2 * steps
        return sample(key, guidance.tilted(prior, made), base, grid, x=x), steps
    if kind == "solver":
        made = factory(base, seen, **settings)
        return sample(key, prior, made, grid, x=x), steps * made.calls
    if name == "red_diff":
        x = jax.tree.map(jnp.zeros_like, seen.operator.adjoint(seen.y))
        return factory(key, prior, seen, grid, x, **settings), steps
    if name == "pnp_dm":
        stds = np.geomspace(1.0, 0.1, steps)
        return factory(key, prior, seen, process, shape, stds=stds, steps=4, **settings), 4 * steps
    return factory(key, prior, seen, grid, shape, steps=4, **settings), 4 * steps


def start(key, shape):
    """A standard normal state: sample's ``shape`` is that of one array."""
    is_shape = lambda s: isinstance(s, tuple)
    return jax.tree.map(lambda s: jax.random.normal(jax.random.fold_in(key, len(s)), s), shape, is_leaf=is_shape)


def seen_by(operator, y, noise):
    return inverse.measurement(operator, y, noise)


def test_methods_are_found():
    assert {"dps", "mmps", "ddrm", "null_space", "daps", "lanpaint"} <= set(found())


@pytest.mark.parametrize("name", list(found()))
def test_contract(name):
    """Trees, jit of a vmapped run, derivatives in y, counts, and processes by turns."""
    keys = jax.random.split(jax.random.key(1), 2)
    process = (processes.flow(), processes.vp())[list(found()).index(name) % 2]

    def run(y, key):
        out, expected = draw(name, key, seen_by(inverse.mask(KEEP), y, 0.3), process)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(out.x)), (out, expected)

    both = jax.jit(jax.vmap(jax.grad(run, has_aux=True), (None, 0)))
    slopes, (out, expected) = both(Y, keys)
    assert jax.tree.map(lambda leaf: leaf.shape[1:], out.x) == SHAPE
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((out.x, slopes)))
    assert out.nfe.tolist() == [int(expected[0])] * 2 and out.failed_at.tolist() == [-1, -1]
    assert any(np.max(np.abs(leaf)) > 1e-3 for leaf in jax.tree.leaves(slopes))  # it heeds y


FILTERS = {"conjugate", "fps", "mcgdiff"}
PLAIN_WITHOUT = sorted(set(found()) - {"daps", "pnp_dm", "red_diff", "diffpir"})


@pytest.mark.parametrize("name", PLAIN_WITHOUT)
def test_no_information_returns_the_prior(name):
    """A = 0: the sample of the plain solver for the same key."""
    seen = seen_by(inverse.matrix(np.zeros((2, 3))), np.zeros(2, np.float32), 0.3)
    nothing = {"ddrm": {"eta": 1.0}, "lanpaint": {"inner": 0}, "diffusion_mbir": {"iterations": 0}}
    nothing["blind_dps"] = {"sparsity": 0.0}
    settings: Any = nothing.get(name, {})
    out, _ = draw(name, KEY, seen, processes.flow(), shape=(3,), **settings)
    grid = grids.uniform(processes.flow(), STEPS, start=0.9)
    kept = {"mcg": 1}.get(name, 0)
    if name == "mcg":  # its further draw shifts the others: compare the law of a deterministic solver
        made = inverse.mcg(solvers.ddim(), seen, 0.3)
        out = sample(KEY, PRIOR, made, grid, x=start(KEY, (3,)))
    base = solvers.flow_cps(1.0) if name == "ddrm" else solvers.ddim(eta=0.0 if kept else 1.0)
    plain = sample(KEY, PRIOR, base, grid, x=start(KEY, (3,)))
    if name in FILTERS:
        both = jnp.stack([start(KEY, (3,)), -start(KEY, (3,))])
        particles = steer(KEY, PRIOR, base, grid, x=both, particles=2, proposal="base")
        plain = plain._replace(x=particles.x[0])
        weights: Any = out._asdict()["log_weights"]
        np.testing.assert_allclose(weights, weights[:1].repeat(2), atol=1e-5)
    np.testing.assert_allclose(out.x, plain.x, rtol=2e-5, atol=2e-5)


MEETS = [
    "ddnm",
    "ddrm",
    "mcg",
    "mmps",
    "null_space",
    "pigdm",
    "replacement",
    "tmpd",
    "lanpaint",
    "ilvr",
    "mcgdiff",
    "fps",
]


@pytest.mark.parametrize("name", MEETS)
def test_an_exact_measurement_is_met(name):
    """Without noise A x = y at the end; the tilted estimates meet it in their last step, to what the step left."""
    operator = inverse.downsample(2, (4,), axes=1)
    y = np.array([0.7, -1.1], np.float32)
    out, _ = draw(name, KEY, seen_by(operator, y, 0.0), processes.flow(), shape=(4,))
    np.testing.assert_allclose(operator(out.x), y, atol=2e-5)


@pytest.mark.parametrize("name, settings", [("dps", {"step": 0.0}), ("flowchef", {"step": 0.0}), ("lgd", {})])
def test_nothing_done_is_the_plain_solver(name, settings):
    """Steps of size 0, and a tilt of scale 0."""
    seen = seen_by(inverse.mask(KEEP), Y, 0.3)
    grid = grids.uniform(processes.flow(), STEPS, start=0.9)
    plain = sample(KEY, PRIOR, solvers.ddim(eta=1.0), grid, x=start(KEY, SHAPE))
    if name == "lgd":
        twist = inverse.lgd(seen, **EXTRA["lgd"])
        out = sample(KEY, guidance.tilted(PRIOR, twist, 0.0), solvers.ddim(eta=1.0), grid, x=start(KEY, SHAPE))
    else:
        out, _ = draw(name, KEY, seen, processes.flow(), **settings)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), out.x, plain.x)


@pytest.mark.parametrize(
    "wrong, name",
    [
        (lambda seen: inverse.mmps(seen(inverse.hdr((3,)))), "linear operator"),
        (lambda seen: inverse.mmps(seen(inverse.identity((3,))), solver="lu"), "solver"),
        (lambda seen: inverse.mmps(seen(inverse.identity((3,))), iterations=0), "iterations"),
        (lambda seen: inverse.pigdm(seen(inverse.identity((3,))), -1.0), "variance"),
        (lambda seen: inverse.lgd(seen(inverse.identity((3,))), 1.0, KEY, samples=0), "samples"),
        (lambda seen: inverse.likelihood(3), "measurement"),
        (lambda seen: inverse.conjugate(seen(inverse.identity((3,)), 0.0)), "mcgdiff"),
        (lambda seen: inverse.conjugate(seen(inverse.identity((3,))), -1.0), "variance"),
        (lambda seen: inverse.mcgdiff(seen(inverse.hdr((3,)))), "linear"),
        (lambda seen: inverse.fps(seen(inverse.radon(np.zeros(1), (1, 1), 3)), KEY), "spectrum"),
        (lambda seen: inverse.ddrm(seen(inverse.radon(np.zeros(1), (1, 1), 3))), "spectrum"),
        (lambda seen: inverse.ddrm(seen(inverse.identity((3,)), np.full(3, 0.1))), "one standard deviation"),
        (lambda seen: inverse.ddrm(seen(inverse.identity((3,))), eta=1.5), "eta"),
        (lambda seen: inverse.ddnm(solvers.heun(), seen(inverse.identity((3,)))), "kernel"),
        (lambda seen: inverse.dps(solvers.heun(), seen(inverse.identity((3,)))), "update"),
        (lambda seen: inverse.dps(solvers.ddim(), seen(inverse.identity((3,))), -1.0), "step"),
        (lambda seen: inverse.flowchef(solvers.ddim(), 3), "cost"),
        (lambda seen: inverse.lanpaint(solvers.ddim(), seen(inverse.hdr((3,)))), "spectrum"),
        (lambda seen: inverse.lanpaint(solvers.ddim(), seen(inverse.identity((3,))), inner=-1), "inner"),
        (lambda seen: inverse.diffpir(PRIOR, seen(inverse.identity((3,))), 0.0), "strength"),
        (lambda seen: inverse.null_space(PRIOR, seen(inverse.hdr((3,)))), "linear"),
        (lambda seen: inverse.replacement(PRIOR, seen(inverse.radon(np.zeros(1), (1, 1), 3)), KEY), "spectrum"),
        (lambda seen: inverse.ilvr(PRIOR, inverse.hdr((3,)), np.zeros(3), KEY), "spectrum"),
        (
            lambda seen: inverse.pnp_dm(KEY, PRIOR, seen(inverse.identity((3,))), processes.vp(), (3,), stds=[1e9]),
            "stds",
        ),
        (
            lambda seen: inverse.daps(
                KEY, PRIOR, seen(inverse.identity((3,))), grids.uniform(processes.flow(), 3), (3,)
            ),
            "alpha > 0",
        ),
        (
            lambda seen: inverse.red_diff(
                KEY, PRIOR, seen(inverse.identity((3,))), grids.uniform(processes.flow(), 3), np.zeros(3)
            ),
            "alpha > 0",
        ),
    ],
)
def test_refusals(wrong, name):
    def seen(operator, noise=0.1):
        return inverse.measurement(operator, np.zeros(operator.output_shape, np.float32), noise)

    with pytest.raises(ValueError, match=name):
        wrong(seen)
