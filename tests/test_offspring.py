"""Branching with random offspring against enumeration, tilted Beta bridges of Gamma processes against SciPy."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from diffjax import smoothing
from diffjax.smoothing import chain, observed, point, population, sequential
from diffjax.smoothing.branching import multinomial
from diffjax.smoothing.gamma import _term, log_kummer, log_tilt, tilted_beta

OFFSPRING = np.array([[0, 0], [1, 0], [1, 1], [0, 2]])
CHANCES = np.array([[0.3, 0.2, 0.3, 0.2], [0.4, 0.1, 0.2, 0.3]])
SEEN = np.array([[0.1, -0.4], [-0.2, 0.5], [-0.7, 0.4]])  # log-likelihoods of every individual, by generation
ROOT, TIMES = np.array([1, 1]), 3


@pytest.fixture(autouse=True)
def double(x64):
    """All tests here run in float64."""


def one_generation(law, chances=CHANCES):
    """The law of the numbers after every individual, one by one, has drawn its offspring."""
    after = collections.Counter()
    for counts, mass in law.items():
        partial = {(0, 0): mass}
        for kind, number in enumerate(counts):
            for _ in range(number):
                grown = collections.Counter()
                for have, p in partial.items():
                    for children, q in zip(OFFSPRING, chances[kind], strict=True):
                        grown[tuple(np.add(have, children).tolist())] += p * q
                partial = grown
        for have, p in partial.items():
            after[have] += p
    return after


def enumerated(last=None):
    """The joint masses of the last population and all that was seen."""
    law = {tuple(ROOT.tolist()): 1.0}
    for i in range(TIMES):
        law = one_generation(law)
        if i < TIMES - 1 or last is None:
            law = {n: p * np.exp(np.dot(n, SEEN[i])) for n, p in law.items()}
        else:
            law = {n: p * last(np.array(n)) for n, p in law.items()}
    return law


def forest(chances=None, log_likelihood=None):
    """Generations, each observed."""
    step = smoothing.branching(OFFSPRING, CHANCES, chances)
    links = [sequential(step, observed(population(s))) for s in SEEN]
    if log_likelihood is not None:
        links[-1] = sequential(step, observed(population(SEEN[-1]), log_likelihood))
    return sequential(*links)


@pytest.mark.paper("Automatic Backward Filtering Forward Guiding for Markov processes and graphical models")
def test_a_branching_process_is_smoothed_exactly():
    """Evidence to rounding, weight 1, and the law of guided populations, against the enumeration of all trees."""
    law, nothing, draws = enumerated(), population(np.zeros(2)), 3000
    z = sum(law.values())
    kernel = chain(
        jax.vmap(lambda seen: sequential(smoothing.branching(OFFSPRING, CHANCES), observed(population(seen))))(SEEN)
    )
    for tree in (kernel, forest()):
        np.testing.assert_allclose(tree.backward(nothing)[1](ROOT), np.log(z), rtol=1e-12)
    run = jax.jit(jax.vmap(lambda key: smoothing.smooth(key, kernel, nothing, jnp.asarray(ROOT))))
    guided = run(jax.random.split(jax.random.key(0), draws))
    np.testing.assert_allclose(guided.log_weight, np.log(z), rtol=1e-12)
    births = np.asarray(guided.path[0])  # (draws, TIMES, T, K)
    assert births.shape == (draws, TIMES, 2, 4)
    counts = births.sum(2) @ OFFSPRING
    assert np.array_equal(counts[:, -1], guided.x) and np.array_equal(births[:, 0].sum(-1), np.tile(ROOT, (draws, 1)))
    assert np.array_equal(births[:, 1:].sum(-1), counts[:, :-1])  # whoever is born has offspring
    _chi_square(law, map(tuple, np.asarray(guided.x).tolist()), draws)
    # the first of all: its offspring given everything
    first = {}
    _, later = sequential(observed(population(SEEN[0])), *_later()).backward(nothing)
    for ways in np.ndindex(4, 4):
        n = OFFSPRING[list(ways)].sum(0)
        first[ways] = CHANCES[0, ways[0]] * CHANCES[1, ways[1]] * np.exp(later(n))
    assert abs(sum(first.values()) / z - 1) < 1e-12
    _chi_square(first, map(tuple, births[:, 0].argmax(-1).tolist()), draws)


def _later():
    step = smoothing.branching(OFFSPRING, CHANCES)
    return [sequential(step, observed(population(s))) for s in SEEN[1:]]


def _chi_square(law, found, draws):
    expected = {n: draws * p / sum(law.values()) for n, p in law.items()}
    counts = collections.Counter(found)
    assert set(counts) <= set(law)
    likely = [n for n, e in expected.items() if e > 5]
    rest = draws - sum(expected[n] for n in likely)
    terms = [(counts[n] - expected[n]) ** 2 / expected[n] for n in likely]
    terms.append((draws - sum(counts[n] for n in likely) - rest) ** 2 / max(rest, 1.0))
    assert scipy.stats.chi2(len(terms) - 1).sf(sum(terms)) > 1e-4


@pytest.mark.slow
def test_surrogates_and_observations_of_the_whole_are_weighed():
    """Another pull-back, and a count of all individuals, which is no product over them: unbiased."""
    rate, total = 0.8, 3
    poisson = lambda n: scipy.stats.poisson(rate * n.sum()).pmf(total)
    log_likelihood = lambda n: total * jnp.log(rate * n.sum()) - rate * n.sum() - jax.scipy.special.gammaln(total + 1)
    blurred = 0.6 * CHANCES + 0.4 / 4
    kernel, nothing = forest(blurred, log_likelihood), population(np.zeros(2))
    exact = sum(enumerated(poisson).values())
    run = jax.jit(jax.vmap(lambda key: smoothing.smooth(key, kernel, nothing, jnp.asarray(ROOT)).log_weight))
    z = np.exp(run(jax.random.split(jax.random.key(1), 6000)))
    assert z.std() > 0.05 * z.mean()
    assert abs(z.mean() - exact) < 4 * z.std() / np.sqrt(len(z)) < 0.1 * exact


def test_extinction_is_an_iterated_generating_function():
    step = smoothing.branching(OFFSPRING, CHANCES)
    kernel, q = sequential(step, step, step), np.zeros(2)
    for _ in range(3):
        q = np.array([np.sum(CHANCES[i] * np.prod(q**OFFSPRING, axis=1)) for i in range(2)])
    _, source = kernel.backward(population([-jnp.inf, -jnp.inf]))
    np.testing.assert_allclose(np.exp(source.log_values), q, rtol=1e-12)
    guided = smoothing.smooth(jax.random.key(0), kernel, population([-jnp.inf, -jnp.inf]), jnp.array([2, 5]))
    assert guided.x.tolist() == [0, 0]
    np.testing.assert_allclose(guided.log_weight, 2 * np.log(q[0]) + 5 * np.log(q[1]), rtol=1e-12)
    none = smoothing.smooth(jax.random.key(0), step, population([-jnp.inf, 0.0]), jnp.array([0, 0]))
    assert none.x.tolist() == [0, 0] and none.log_weight == 0


def test_multinomial_quantiles():
    shares, draws = np.array([0.2, 0.0, 0.5, 0.3]), 2000
    noise = jax.random.normal(jax.random.key(2), (draws, 3))
    found = np.asarray(jax.jit(jax.vmap(lambda z: multinomial(z, 7, shares)))(noise))
    assert (found.sum(1) == 7).all() and (found[:, 1] == 0).all()
    for k in (0, 2, 3):
        counts = np.bincount(found[:, k].astype(int), minlength=8)
        expected = draws * scipy.stats.binom(7, shares[k]).pmf(np.arange(8))
        assert np.sum((counts - expected) ** 2 / expected) < 35
    assert abs(np.cov(found.T)[0, 2] + 7 * 0.2 * 0.5) < 0.13


# --- Gamma increments -------------------------------------------------------------------------------------------------


def test_kummers_function_and_its_derivatives():
    a, b, x = (m.ravel() for m in np.meshgrid([0.3, 2.0], [2.5, 7.0], [0.0, 1e-3, 3.0, 90.0, 600.0], indexing="ij"))
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(log_kummer, (0, 1, 2))))(a, b, x)
    np.testing.assert_allclose(values, np.log(scipy.special.hyp1f1(a, b, x)), rtol=1e-9, atol=1e-12)
    for i, step in enumerate((1e-5, 1e-5, 1e-5)):
        moved = lambda sign, i=i, step=step: [v + sign * step * (i == j) for j, v in enumerate((a, b, x))]
        rates = np.log(scipy.special.hyp1f1(*moved(1))) - np.log(scipy.special.hyp1f1(*moved(-1)))
        np.testing.assert_allclose(slopes[i], rates / (2 * step), rtol=1e-4, atol=1e-6)
    for t in (-4.0, 5.0):
        density = lambda s, t=t: scipy.stats.beta(1.7, 0.6).pdf(s) * np.exp(-t * s)
        np.testing.assert_allclose(log_tilt(1.7, 0.6, t), np.log(scipy.integrate.quad(density, 0, 1)[0]), rtol=1e-6)
    # minus the mean of b under the tilted law, at t = 0 too, where the rate is that of the backward map
    times = np.array([-4.0, 0.0, 5.0])
    moment = lambda t: scipy.special.hyp1f1(2.7, 3.3, -t) / scipy.special.hyp1f1(1.7, 2.3, -t) * 1.7 / 2.3
    slopes = jax.jit(jax.vmap(jax.grad(log_tilt, 2), (None, None, 0)))(1.7, 0.6, times)
    np.testing.assert_allclose(slopes, -moment(times), rtol=1e-9)


def _log_terms(a, b, x):
    """Logarithms of the terms of e^-x 1F1(a; b; x)."""
    n, log_factorial = np.arange(int(x + 60 * np.sqrt(x) + 300)), scipy.special.gammaln
    rising = lambda c: log_factorial(c + n) - log_factorial(c)
    return n * np.log(x) - log_factorial(n + 1) + rising(a) - rising(b) - x


def test_large_tilts_in_single_precision():
    """log 1F1(a; a + c; -t) and quantiles of n to a few units in the last place, of terms that rise to e^t."""
    corners = np.meshgrid([1e-6, 0.125, 2.0, 40.0], [0.25, 1.0, 50.0], [0.5, 30.0, 600.0, 3000.0], indexing="ij")
    c, a, t = (m.ravel() for m in corners)
    levels = np.array([1e-4, 0.3, 0.9, 0.9999])
    with jax.enable_x64(False):
        single = [v.astype(np.float32) for v in (c, a, t)]
        values = jax.jit(jax.vmap(jax.value_and_grad(log_tilt, 2)))(single[1], single[0], single[2])
        quantiles = jax.vmap(jax.vmap(lambda u, c, a, t: _term(u, c, a + c, t), (None, 0, 0, 0)), (0, None, None, None))
        found = jax.jit(quantiles)(levels.astype(np.float32), *single)
        assert values[0].dtype == found.dtype == np.float32
    for i, arguments in enumerate(zip(*(v.astype(float) for v in single), strict=True)):
        logs = _log_terms(arguments[0], arguments[0] + arguments[1], arguments[2])
        exact, size = scipy.special.logsumexp(logs), arguments[2]
        np.testing.assert_allclose(values[0][i], exact, rtol=5e-7, atol=3e-6, err_msg=str(arguments))
        mean = np.exp(logs - exact) @ np.arange(len(logs))
        np.testing.assert_allclose(values[1][i], mean / size - 1, rtol=2e-5, atol=1e-6, err_msg=str(arguments))
        law = np.cumsum(np.exp(logs - exact))
        # the distribution function steps over the level at the quantile
        n = np.asarray(found[:, i]).astype(int)
        assert np.all(law[n] > levels - 2e-5), arguments
        assert np.all(np.where(n > 0, law[n - 1], 0.0) < levels + 2e-5), arguments


@pytest.mark.paper("Automatic Backward Filtering Forward Guiding for Markov processes and graphical models")
def test_gamma_bridges_of_another_rate_are_tilted_beta_laws():
    """One step: the exact (k h)(x), whatever is drawn, and the law of the draw; large and small tilts of both signs."""
    a, c, draws = 1.3, 0.8, 400
    noise = jax.random.normal(jax.random.key(0), (draws, 2))
    draw = jax.jit(jax.vmap(lambda z, t: tilted_beta(z, a, c, t), (0, None)))
    grid = np.linspace(0, 1, 4001) ** 2  # close to both ends
    grid = np.unique(np.concatenate([0.5 * grid, 1 - 0.5 * grid]))
    middles = 0.5 * (grid[1:] + grid[:-1])
    for t in (-6.0, 0.0, 9.0):
        found = np.asarray(draw(noise, t))
        masses = np.diff(scipy.stats.beta(a, c).cdf(grid)) * np.exp(-t * middles)
        law = np.concatenate([[0.0], np.cumsum(masses)]) / masses.sum()
        assert scipy.stats.kstest(found, lambda s, law=law: np.interp(s, grid, law)).pvalue > 1e-4
    kernel = sequential(smoothing.gamma(a, 2.5, surrogate=1.0), smoothing.gamma(c, 1.0))
    guided = jax.jit(lambda key: smoothing.smooth(key, kernel, point(3.0), 0.5))
    density = lambda y: scipy.stats.gamma(a, scale=0.4).pdf(y - 0.5) * scipy.stats.gamma(c).pdf(3.0 - y)
    exact, _ = scipy.integrate.quad(density, 0.5, 3.0, epsabs=1e-13, epsrel=1e-11, limit=400)
    for seed in range(3):  # the weight does not depend on the draw: it is the likelihood
        np.testing.assert_allclose(guided(jax.random.key(seed)).log_weight, np.log(exact), rtol=1e-7)
    assert smoothing.smooth(jax.random.key(0), kernel, point(0.3), 0.5).log_weight == -jnp.inf  # it never falls


def test_bad_input():
    for match, call in {
        "offspring": lambda: smoothing.branching([[0.5]], [[1.0]]),
        "probabilities": lambda: smoothing.branching(OFFSPRING, CHANCES.T),
        "negative": lambda: smoothing.branching(OFFSPRING, -CHANCES),
        "log_values": lambda: population(np.zeros((2, 2))),
        "population potential": lambda: smoothing.branching(OFFSPRING, CHANCES).backward(point(jnp.array([1, 2]))),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
