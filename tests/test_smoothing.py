"""Kernels that compose: linear-Gaussian chains, hidden Markov models, trees, Gamma processes, against exact answers."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from jax.flatten_util import ravel_pytree

from diffjax import smoothing
from diffjax.smoothing import chain, copies, finite, linear_gaussian, observed, parallel, point, sequential

LENGTH, SIZE = 5, 2
RANDOM = np.random.default_rng(0)
PHI = np.eye(SIZE) * 0.8 + 0.3 * RANDOM.standard_normal((LENGTH, SIZE, SIZE))
BETA = RANDOM.standard_normal((LENGTH, SIZE))
SCALE = RANDOM.standard_normal((LENGTH, SIZE, 1))  # singular: one noise for two entries
SEEN, BLUR = RANDOM.standard_normal((LENGTH, 1, SIZE)), np.array([[0.5]])
Y = RANDOM.standard_normal((LENGTH, 1))
MEAN, ROOT = np.array([0.3, -0.2]), np.array([[0.9, 0.0], [0.4, 0.7]])


@pytest.fixture(autouse=True)
def double(x64):
    """All tests here run in float64."""


def _gaussian_link(phi, beta, scale, seen, y):
    leaf = linear_gaussian(seen, jnp.zeros(1), BLUR).backward(point(y))[1]
    return sequential(linear_gaussian(phi, beta, scale), observed(leaf))


def _links():
    return [_gaussian_link(*arrays) for arrays in zip(PHI, BETA, SCALE, SEEN, Y, strict=True)]


def _bracketings(parts):
    """From the left, from the right, and by halves."""
    halves = lambda p: p[0] if len(p) == 1 else sequential(halves(p[: len(p) // 2]), halves(p[len(p) // 2 :]))
    return (
        functools.reduce(sequential, parts),
        functools.reduce(lambda later, first: sequential(first, later), reversed(parts)),
        halves(parts),
    )


def _joint():
    """Mean and covariance of all states, from x_0 on, and the log-evidence, conditioned in one piece."""
    mean, cover = [MEAN], np.zeros((SIZE * (LENGTH + 1),) * 2)
    cover[:SIZE, :SIZE] = ROOT @ ROOT.T
    for i in range(LENGTH):
        mean.append(PHI[i] @ mean[-1] + BETA[i])
        now, new = slice(SIZE * i, SIZE * (i + 1)), slice(SIZE * (i + 1), SIZE * (i + 2))
        cover[new, : SIZE * (i + 1)] = PHI[i] @ cover[now, : SIZE * (i + 1)]
        cover[: SIZE * (i + 1), new] = cover[new, : SIZE * (i + 1)].T
        cover[new, new] = PHI[i] @ cover[now, now] @ PHI[i].T + SCALE[i] @ SCALE[i].T
    mean = np.concatenate(mean)
    look = np.zeros((LENGTH, len(mean)))
    for i in range(LENGTH):
        look[i, SIZE * (i + 1) : SIZE * (i + 2)] = SEEN[i, 0]
    noisy = look @ cover @ look.T + BLUR[0, 0] ** 2 * np.eye(LENGTH)
    gain = np.linalg.solve(noisy, look @ cover).T
    log_evidence = scipy.stats.multivariate_normal(look @ mean, noisy).logpdf(Y[:, 0])
    return mean + gain @ (Y[:, 0] - look @ mean), cover - gain @ look @ cover, log_evidence


@pytest.mark.paper("Compositionality in algorithms for smoothing")
@pytest.mark.paper("Automatic Backward Filtering Forward Guiding for Markov processes and graphical models")
def test_the_composed_optic_of_a_gaussian_chain_is_the_smoother_however_it_is_bracketed():
    mean, cover, log_evidence = _joint()
    prior = smoothing.normal_prior(MEAN, ROOT)
    parts = [prior, *_links()]
    noise = None
    for kernel in _bracketings(parts):
        message, source = kernel.backward(smoothing.flat(SIZE))
        np.testing.assert_allclose(source.log_scale, log_evidence, rtol=1e-12)
        end = kernel.push(message, smoothing.start(source))
        np.testing.assert_allclose(end.mean, mean[-SIZE:], atol=1e-12)
        np.testing.assert_allclose(end.covariance, cover[-SIZE:, -SIZE:], atol=1e-12)
        np.testing.assert_allclose(end.log_mass, log_evidence, rtol=1e-12)
        flat = ravel_pytree(kernel.noise(jax.random.key(3)))[0]
        assert noise is None or np.array_equal(noise, flat)  # noise belongs to the number of the kernel
        noise = flat
        assert len(np.unique(flat)) == len(flat)
        # a draw is affine in the noise: its value at 0 is the mean, its derivative a root of the covariance
        middle, root = _affine_draw(kernel, message)
        np.testing.assert_allclose(middle, mean, atol=1e-12)
        np.testing.assert_allclose(root @ root.T, cover, atol=1e-12)


def _affine_draw(kernel, message):
    """The path for noise 0 and its derivative in the noise."""
    noise, unravel = ravel_pytree(kernel.noise(jax.random.key(0)))

    def run(z):
        guided = kernel.forward(message, jnp.zeros(0), unravel(z))
        return ravel_pytree(guided.path)[0] + guided.log_weight

    return jax.jit(lambda z: (run(z), jax.jacfwd(run)(z)))(0 * noise)


@pytest.mark.paper("Compositionality in algorithms for smoothing")
def test_a_scanned_chain_and_an_associative_scan_are_the_composition():
    mean, cover, log_evidence = _joint()
    stacked = jax.vmap(_gaussian_link)(PHI, BETA, SCALE, SEEN, Y)
    links = functools.reduce(sequential, _links())
    _, expected = links.backward(smoothing.flat(SIZE))
    prior = smoothing.Normal(jnp.asarray(MEAN), jnp.asarray(ROOT @ ROOT.T), jnp.zeros(()))
    draws = None
    for associative in (False, True):
        kernel = chain(stacked, associative=associative)
        assert len(kernel) == LENGTH and kernel.parts == LENGTH
        message, source, begin, marginals, guided = _smoothed(kernel, smoothing.flat(SIZE), prior, MEAN)
        for found, wanted in zip(jax.tree.leaves(source), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(begin.log_mass, log_evidence, rtol=1e-12)
        np.testing.assert_allclose(begin.mean, mean[:SIZE], atol=1e-12)
        np.testing.assert_allclose(begin.covariance, cover[:SIZE, :SIZE], atol=1e-12)
        np.testing.assert_allclose(marginals.mean.reshape(-1), mean[SIZE:], atol=1e-11)
        for i in range(LENGTH):
            block = slice(SIZE * (i + 1), SIZE * (i + 2))
            np.testing.assert_allclose(marginals.covariance[i], cover[block, block], atol=1e-11)
        assert draws is None or np.allclose(guided.path[0], draws, rtol=1e-9)
        draws = guided.path[0]
    # the noise of a chain is that of the sequence it stands for
    message, _ = links.backward(smoothing.flat(SIZE))
    one = links.forward(message, jnp.asarray(MEAN), links.noise(jax.random.key(3)))
    np.testing.assert_allclose(one.x, draws[-1], rtol=1e-9)


@jax.jit
def _smoothed(kernel, h, prior, x):
    message, source = kernel.backward(h)
    begin = smoothing.start(source, prior)
    _, marginals = kernel.marginals(message, begin)
    return message, source, begin, marginals, kernel.forward(message, x, kernel.noise(jax.random.key(3)))


@pytest.mark.paper("Compositionality in algorithms for smoothing")
def test_marginals_of_an_associative_chain_are_made_by_no_loop():
    """Of log depth: no scan is left in the program; a known end and observations alone are the plain chain's."""
    stacked = jax.vmap(lambda phi, beta: linear_gaussian(phi, beta, ROOT))(PHI, BETA)
    sure = smoothing.Normal(jnp.asarray(MEAN), jnp.zeros((2, 2)), jnp.zeros(()))

    def marginals(kernel, h):
        return kernel.marginals(kernel.backward(h)[0], sure)

    h = point(np.array([0.5, 1.0]))
    kernels = [chain(stacked, associative=associative) for associative in (True, False)]
    found, wanted = (jax.jit(marginals)(kernel, h) for kernel in kernels)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, wanted)
    texts = [str(jax.make_jaxpr(marginals)(kernel, h)) for kernel in kernels]
    assert " scan[" not in texts[0] and " scan[" in texts[1]
    looks = observed(smoothing.quadratic(np.zeros((3, 2, 2))[0], np.ones(2)))
    looks = chain(jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), looks), associative=True)
    last, all_ = marginals(looks, smoothing.flat(2))
    assert np.array_equal(last.mean, MEAN) and all_.mean.shape == (3, 2)


def test_a_chain_is_one_kernel_of_its_kind():
    stacked = jax.vmap(_gaussian_link)(PHI[:3], BETA[:3], SCALE[:3], SEEN[:3], Y[:3])
    h = smoothing.quadratic(np.eye(SIZE), np.ones(SIZE), 0.2)
    pull = jax.jit(lambda kernel, h: (kernel.element().pull(h), kernel.backward(h)[1]))
    for found, wanted in zip(*map(jax.tree.leaves, pull(chain(stacked), h)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-10)


@pytest.mark.parametrize("known", [False, True])
def test_a_chain_of_chains_is_the_chain(known):
    """Four links as two chains of two: pull-back, marginals, noise and draws, by both scans, with a known end too."""
    walk = jax.vmap(lambda phi, beta: linear_gaussian(phi, beta, ROOT))(PHI[:4], BETA[:4])
    seen = jax.vmap(_gaussian_link)(PHI[:4], BETA[:4], SCALE[:4], SEEN[:4], Y[:4])
    links, h = (walk, point(np.array([0.5, 1.0]))) if known else (seen, smoothing.flat(SIZE))
    halves = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), links)
    prior = smoothing.Normal(jnp.asarray(MEAN), jnp.asarray(ROOT @ ROOT.T), jnp.zeros(()))
    _, source, _, marginals, guided = _smoothed(chain(links), h, prior, MEAN)
    for associative in (False, True):
        nested = chain(jax.vmap(lambda half: chain(half, associative=True))(halves), associative=associative)
        assert nested.parts == 4
        message, found, begin, ends, draw = _smoothed(nested, h, prior, MEAN)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(source), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(ends.mean, marginals.mean[1::2], atol=1e-11)
        np.testing.assert_allclose(ends.covariance, marginals.covariance[1::2], atol=1e-11)
        np.testing.assert_allclose(nested.push(message, begin).mean, marginals.mean[-1], atol=1e-11)
        np.testing.assert_allclose(draw.x, guided.x, rtol=1e-8)
        path = draw.path if known else draw.path[0]
        np.testing.assert_allclose(_flat_path(path), _flat_path(guided.path if known else guided.path[0]), rtol=1e-8)


def _flat_path(path):
    return np.asarray(path).reshape(-1, SIZE)


def test_precise_observations_are_smoothed_in_single_precision():
    """A local level seen with an error of 1e-3: smoothing marginals to float32, by both scans, against float64."""
    with jax.enable_x64(False):
        y = np.cumsum(np.random.default_rng(1).standard_normal(8)).astype(np.float32)

        def link(y):
            seen = linear_gaussian(np.eye(1), np.zeros(1), np.array([[1e-3]])).backward(point(y[None]))[1]
            return sequential(linear_gaussian(np.eye(1), np.zeros(1), np.eye(1)), observed(seen))

        stacked = jax.vmap(link)(y)
        prior = smoothing.Normal(jnp.zeros(1), jnp.eye(1), jnp.zeros(()))
        for associative in (False, True):
            begin, marginals = _smoothed(chain(stacked, associative), smoothing.flat(1), prior, jnp.zeros(1))[2:4]
            assert marginals.mean.dtype == np.float32
            joint = np.diag(np.full(9, 2.0)) - np.eye(9, k=1) - np.eye(9, k=-1) + 0.0
            joint[0, 0], joint[8, 8] = 2.0, 1.0
            joint[1:, 1:] += 1e6 * np.eye(8)
            cover = np.linalg.inv(joint)
            mean = cover[:, 1:] @ (1e6 * y.astype(float))
            np.testing.assert_allclose(marginals.mean[:, 0], mean[1:], atol=2e-6 * abs(y).max())
            np.testing.assert_allclose(begin.mean[0], mean[0], rtol=1e-5)
            np.testing.assert_allclose(marginals.covariance[:, 0, 0], np.diag(cover)[1:], rtol=1e-4)
            np.testing.assert_allclose(begin.covariance[0, 0], cover[0, 0], rtol=1e-5)


def test_a_known_end_is_a_bridge():
    """Towards a point the last kernel has another type; marginals are those of a Gaussian given its end."""
    stacked = jax.vmap(lambda phi, beta: linear_gaussian(phi, beta, ROOT))(PHI[:3], BETA[:3])
    kernel, end = chain(stacked), np.array([0.5, 1.0])
    sure = smoothing.Normal(jnp.asarray(MEAN), jnp.zeros((2, 2)), jnp.zeros(()))

    @jax.jit
    def smoothed(kernel):
        message, source = kernel.backward(point(end))
        guided = kernel.forward(message, MEAN, kernel.noise(jax.random.key(0)))
        return source(MEAN), *kernel.marginals(message, sure), guided

    found, last, marginals, guided = smoothed(kernel)
    mean, cover = [], np.zeros((6, 6))
    x = MEAN
    for i in range(3):
        x = PHI[i] @ x + BETA[i]
        mean.append(x)
        now, new = slice(2 * i - 2, 2 * i), slice(2 * i, 2 * i + 2)
        if i:
            cover[new, : 2 * i] = PHI[i] @ cover[now, : 2 * i]
            cover[: 2 * i, new] = cover[new, : 2 * i].T
        cover[new, new] = ROOT @ ROOT.T + (PHI[i] @ cover[now, now] @ PHI[i].T if i else 0)
    mean = np.concatenate(mean)
    log_density = scipy.stats.multivariate_normal(mean[4:], cover[4:, 4:]).logpdf(end)
    np.testing.assert_allclose(found, log_density, rtol=1e-12)
    gain = np.linalg.solve(cover[4:, 4:], cover[4:, :4]).T
    np.testing.assert_allclose(marginals.mean[:2].reshape(-1), mean[:4] + gain @ (end - mean[4:]), atol=1e-12)
    np.testing.assert_allclose(last.mean, end, atol=1e-15)
    after = cover[2:4, 2:4] - gain[2:] @ cover[4:, 2:4]
    np.testing.assert_allclose(marginals.covariance[1], after, atol=1e-12)
    assert np.array_equal(guided.x, end) and guided.path.shape == (3, 2) and guided.log_weight == 0


# --- finite sets ------------------------------------------------------------------------------------------------------

STATES, TIMES = 3, 4
MATRICES = RANDOM.dirichlet(np.ones(STATES), (TIMES, STATES))
MATRICES[1, 0] = [0.0, 0.25, 0.75]  # a way that is closed
EMIT = RANDOM.dirichlet(np.ones(2), STATES)
WORDS = np.array([1, 0, 1, 1])
FIRST = np.array([[0.2, 0.5, 0.3]])


def _hidden(matrix, word, emit=EMIT, surrogate=None):
    leaf = finite(emit).backward(point(word))[1]
    return sequential(finite(matrix, surrogate), observed(leaf))


def _paths():
    """Every path and its joint probability with what was seen."""
    paths = np.array(list(itertools.product(range(STATES), repeat=TIMES + 1)))
    weight = FIRST[0][paths[:, 0]]
    for i in range(TIMES):
        weight = weight * MATRICES[i][paths[:, i], paths[:, i + 1]] * EMIT[paths[:, i + 1], WORDS[i]]
    return paths, weight


@pytest.mark.paper("Compositionality in algorithms for smoothing")
@pytest.mark.paper("Automatic Backward Filtering Forward Guiding for Markov processes and graphical models")
def test_the_optic_of_a_hidden_markov_model_is_forward_backward():
    paths, weight = _paths()
    stacked = jax.vmap(_hidden)(MATRICES, WORDS)
    nothing = smoothing.table(jnp.zeros(STATES))
    log_z = np.log(weight.sum())
    for parts in _bracketings([finite(FIRST), *map(_hidden, MATRICES, WORDS)]):
        message, source = parts.backward(nothing)
        np.testing.assert_allclose(source.log_values, [log_z], rtol=1e-12)
        end = np.exp(parts.push(message, smoothing.start(source)).log_masses)
        np.testing.assert_allclose(end, np.bincount(paths[:, -1], weight), rtol=1e-12)
    prior = smoothing.Masses(jnp.log(FIRST[0]))
    for associative in (False, True):
        kernel = chain(stacked, associative=associative)
        _, source, begin, marginals, _ = _smoothed(kernel, nothing, prior, jnp.zeros((), jnp.int32))
        np.testing.assert_allclose(np.exp(begin.log_masses), np.bincount(paths[:, 0], weight), rtol=1e-12)
        for i in range(TIMES):
            wanted = np.bincount(paths[:, i + 1], weight)
            np.testing.assert_allclose(np.exp(marginals.log_masses[i]), wanted, rtol=1e-12)
    kernel, draws = sequential(finite(FIRST), kernel), 20_000
    run = jax.jit(jax.vmap(lambda key: smoothing.smooth(key, kernel, nothing, 0)))
    guided = run(jax.random.split(jax.random.key(0), draws))
    assert np.ptp(guided.log_weight) == 0
    np.testing.assert_allclose(guided.log_weight[0], log_z, rtol=1e-12)
    found = np.concatenate([np.asarray(guided.path[0])[:, None], np.asarray(guided.path[1][0])], axis=1)
    counts = np.bincount(np.ravel_multi_index(found.T, (STATES,) * (TIMES + 1)), minlength=len(paths))
    expected = draws * weight / weight.sum()
    likely = expected > 5
    statistic = np.sum((counts - expected)[likely] ** 2 / expected[likely])
    assert counts[weight == 0].sum() == 0
    assert scipy.stats.chi2(likely.sum() - 1).sf(statistic) > 1e-4


def test_a_surrogate_changes_weights_but_not_the_evidence():
    paths, weight = _paths()
    blurred = 0.5 * MATRICES + 0.5 / STATES
    stacked = jax.vmap(lambda m, w, s: _hidden(m, w, surrogate=s))(MATRICES, WORDS, blurred)
    kernel, nothing = sequential(finite(FIRST), chain(stacked)), smoothing.table(jnp.zeros(STATES))

    # of all paths at once: the guided law times the weight is the joint law
    @jax.jit
    def push(kernel):
        message, source = kernel.backward(nothing)
        return kernel.push(message, smoothing.start(source))

    np.testing.assert_allclose(np.exp(push(kernel).log_masses), np.bincount(paths[:, -1], weight), rtol=1e-12)
    run = jax.jit(jax.vmap(lambda key: smoothing.smooth(key, kernel, nothing, 0).log_weight))
    z = np.exp(run(jax.random.split(jax.random.key(1), 20_000)))
    assert z.std() > 0.05 * z.mean()
    assert abs(z.mean() - weight.sum()) < 4 * z.std() / np.sqrt(len(z))


def test_what_cannot_be_has_no_weight_and_is_not_nan():
    kernel = finite(np.array([[1.0, 0.0], [0.0, 1.0]]))
    guided = smoothing.smooth(jax.random.key(0), kernel, smoothing.table(jnp.array([-jnp.inf, 0.0])), 0)
    assert guided.log_weight == -jnp.inf
    assert smoothing.smooth(jax.random.key(0), kernel, point(1), 0).log_weight == -jnp.inf


# --- side by side, and trees ------------------------------------------------------------------------------------------


@pytest.mark.paper("Compositionality in algorithms for smoothing")
def test_kernels_side_by_side_are_their_product_kernel():
    """(k x l)(h x g) = kh x lg, against the Kronecker product and the block matrix; and two ways around a square."""
    a, b = MATRICES[0], MATRICES[2]
    h, g = RANDOM.standard_normal((2, STATES))
    _, (left, right) = parallel(finite(a), finite(b)).backward((smoothing.table(h), smoothing.table(g)))
    _, both = finite(np.kron(a, b)).backward(smoothing.table(np.add.outer(h, g).ravel()))
    np.testing.assert_allclose(np.add.outer(left.log_values, right.log_values).ravel(), both.log_values, rtol=1e-12)

    block = lambda u, v: np.block([[u, np.zeros((len(u), v.shape[1]))], [np.zeros((len(v), u.shape[1])), v]])
    ends = [smoothing.quadratic(np.diag(RANDOM.uniform(0, 1, 2)), RANDOM.standard_normal(2), 0.3) for _ in range(2)]
    pair = parallel(*(linear_gaussian(PHI[i], BETA[i], SCALE[i]) for i in range(2)))
    one = linear_gaussian(block(PHI[0], PHI[1]), BETA[:2].ravel(), block(SCALE[0], SCALE[1]))
    joined = smoothing.quadratic(
        block(*(h.precision for h in ends)), jnp.concatenate([h.shift for h in ends]), sum(h.log_scale for h in ends)
    )
    x = RANDOM.standard_normal((2, 2))
    message, apart = pair.backward(tuple(ends))
    other, together = one.backward(joined)
    np.testing.assert_allclose(apart[0](x[0]) + apart[1](x[1]), together(x.ravel()), rtol=1e-12)
    noise = pair.noise(jax.random.key(0))
    guided = pair.forward(message, tuple(x), noise)
    whole = one.forward(other, x.ravel(), jnp.concatenate(noise))
    np.testing.assert_allclose(jnp.concatenate(guided.x), whole.x, rtol=1e-12)

    # two by two: first side by side, then in sequence, or the other way around
    links = [linear_gaussian(PHI[i], BETA[i], SCALE[i]) for i in range(4)]
    rows = sequential(parallel(links[0], links[1]), parallel(links[2], links[3]))
    columns = parallel(sequential(links[0], links[2]), sequential(links[1], links[3]))
    for first, second in zip(rows.backward(tuple(ends))[1], columns.backward(tuple(ends))[1], strict=True):
        jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-12), first, second)


@pytest.mark.paper("Automatic Backward Filtering Forward Guiding for Markov processes and graphical models")
def test_branches_of_a_tree_meet_where_they_part():
    """A root that branches in two, one branch in two again, every leaf observed, against the joint Gaussian."""
    step = [linear_gaussian(PHI[i], BETA[i], ROOT) for i in range(5)]
    see = linear_gaussian(np.array([[1.0, -0.5]]), jnp.zeros(1), BLUR)
    twig = sequential(step[1], copies(2), parallel(step[2], step[3]))
    tree = sequential(smoothing.normal_prior(MEAN, ROOT), copies(2), parallel(twig, step[4]))
    leaf = lambda y: see.backward(point(np.array([y])))[1]
    ends = ((leaf(0.4), leaf(-1.0)), leaf(2.0))
    message, source = tree.backward(ends)
    # x_root, x_1, x_2, x_3, x_4 are affine in ten standard normal numbers
    affine = lambda i, m, a: (PHI[i] @ m + BETA[i], PHI[i] @ a + _at(i + 1))
    root = (MEAN, _at(0))
    first, last = affine(1, *root), affine(4, *root)
    nodes = (root, first, affine(2, *first), affine(3, *first), last)
    mean, factor = np.concatenate([m for m, _ in nodes]), np.concatenate([a for _, a in nodes])
    look = np.zeros((3, 10))
    for row, node in enumerate((2, 3, 4)):
        look[row, 2 * node : 2 * node + 2] = [1.0, -0.5]
    y, cover = np.array([0.4, -1.0, 2.0]), factor @ factor.T
    noisy = look @ cover @ look.T + 0.25 * np.eye(3)
    log_evidence = scipy.stats.multivariate_normal(look @ mean, noisy).logpdf(y)
    np.testing.assert_allclose(source.log_scale, log_evidence, rtol=1e-12)
    gain = np.linalg.solve(noisy, look @ cover).T
    middle, root = _affine_draw(tree, message)
    np.testing.assert_allclose(middle, mean + gain @ (y - look @ mean), atol=1e-12)
    np.testing.assert_allclose(root @ root.T, cover - gain @ look @ cover, atol=1e-12)


def _at(i):
    """ROOT at the i-th pair of ten numbers."""
    return np.concatenate([ROOT if j == i else np.zeros((2, 2)) for j in (0, 2, 3, 4, 5)], axis=1)


# --- other kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.paper("Automatic Backward Filtering Forward Guiding for Markov processes and graphical models")
def test_gamma_increments_are_guided_by_beta_laws():
    shapes, end = np.array([0.7, 1.2, 0.4]), 3.0
    kernel = chain(jax.vmap(lambda a: smoothing.gamma(a, 2.0))(shapes))
    run = jax.jit(jax.vmap(lambda key: smoothing.smooth(key, kernel, point(end), 0.5)))
    guided = run(jax.random.split(jax.random.key(0), 2000))
    np.testing.assert_allclose(guided.log_weight, scipy.stats.gamma(shapes.sum(), scale=0.5).logpdf(2.5), rtol=1e-10)
    assert np.all(guided.x == end)
    share = (np.asarray(guided.path)[:, 0] - 0.5) / 2.5  # increments over their sum are Dirichlet
    assert scipy.stats.kstest(share, scipy.stats.beta(0.7, 1.6).cdf).pvalue > 1e-4
    share = (end - np.asarray(guided.path)[:, 1]) / 2.5
    assert scipy.stats.kstest(share, scipy.stats.beta(0.4, 1.9).cdf).pvalue > 1e-4

    # a rate that depends on the state, with one that does not to pull back: unbiased for the density of two steps
    rate = lambda x: 1.0 + 0.5 * jnp.sin(x)
    kernel = chain(jax.vmap(lambda a: smoothing.gamma(a, rate, surrogate=1.2))(np.array([1.5, 1.2])))
    density = lambda x, a, b, y: scipy.stats.gamma(a, scale=1 / (1.0 + 0.5 * np.sin(b))).pdf(y - x)
    exact, _ = scipy.integrate.quad(lambda y: density(0.5, 1.5, 0.5, y) * density(y, 1.2, y, end), 0.5, end)
    run = jax.jit(jax.vmap(lambda key: smoothing.smooth(key, kernel, point(end), 0.5).log_weight))
    z = np.exp(run(jax.random.split(jax.random.key(1), 4000)))
    assert abs(z.mean() - exact) < 4 * z.std() / np.sqrt(len(z)) < 0.02 * exact


def test_increments_too_small_to_be_seen_keep_their_weight():
    """Most of a path of small shapes is one jump: what is left after it rounds to nothing, in single precision."""
    shape = 0.1
    with jax.enable_x64(False):
        kernel = chain(jax.vmap(lambda a: smoothing.gamma(a, 2.0))(jnp.full(5, shape)))
        run = jax.jit(jax.vmap(lambda key: smoothing.smooth(key, kernel, point(3.0), 0.5)))
        guided = run(jax.random.split(jax.random.key(0), 200))
        assert guided.path.dtype == np.float32 and np.any(guided.path[:, :-1] == 3.0) and np.all(guided.path <= 3.0)
        exact = scipy.stats.gamma(5 * shape, scale=0.5).logpdf(2.5)
        np.testing.assert_allclose(guided.log_weight, exact, rtol=2e-6)
        for start in (3.0, 3.5):  # nothing is to be gained there
            assert smoothing.smooth(jax.random.key(0), kernel, point(3.0), start).log_weight == -jnp.inf


def test_what_is_impossible_both_ways_has_no_weight():
    """A potential and a likelihood that exclude states: the weight is 0 where either does, not NaN."""
    log_likelihood = lambda x: jnp.array([-jnp.inf, -jnp.inf, -0.5, -0.5])[x]
    seen = observed(smoothing.table(np.array([-np.inf, 0.0, -np.inf, -0.2])), log_likelihood)
    weights = [seen.forward((), jnp.array(i), ()).log_weight for i in range(4)]
    np.testing.assert_allclose(weights, [-np.inf, -np.inf, -np.inf, -0.3], rtol=1e-12)


def test_any_gaussian_kernel_is_weighed_for_its_surrogate():
    """Two nonlinear steps with noise that depends on the state, two observations, one of them not Gaussian."""
    mean = lambda x: jnp.sin(2 * x)
    scale = lambda x: jnp.array([[0.5, 0.2]]) * (1 + x[0] ** 2 / (1 + x[0] ** 2))
    surrogate = linear_gaussian(np.array([[0.9]]), np.zeros(1), np.array([[0.6]]))
    step = smoothing.gaussian(mean, scale, surrogate)
    seen = smoothing.quadratic(np.array([[2.0]]), np.array([1.0]), 0.1)
    other = lambda x: -jnp.abs(x[0] - 0.4)
    kernel = sequential(step, observed(seen, other), step)
    end = smoothing.quadratic(np.array([[3.0]]), np.array([-2.0]), -0.2)

    grid = np.linspace(-6, 6, 2001)
    std = lambda x: np.sqrt(0.29) * (1 + x**2 / (1 + x**2))
    normal = lambda x, y: scipy.stats.norm(np.sin(2 * x), std(x)).pdf(y)
    later = np.trapezoid(normal(grid[:, None], grid) * np.exp(-0.2 - 2 * grid - 1.5 * grid**2), grid, axis=1)
    exact = np.trapezoid(normal(0.3, grid) * np.exp(-np.abs(grid - 0.4)) * later, grid)
    run = jax.jit(jax.vmap(lambda key: smoothing.smooth(key, kernel, end, jnp.array([0.3])).log_weight))
    z = np.exp(run(jax.random.split(jax.random.key(2), 20_000)))
    assert abs(z.mean() - exact) < 4 * z.std() / np.sqrt(len(z)) < 0.05 * exact


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"matrix must be \(E, D\)"):
        linear_gaussian(np.eye(2), np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="must not be negative"):
        finite(np.array([[1.5, -0.5]]))
    with pytest.raises(ValueError, match="needs a surrogate"):
        smoothing.gamma(1.0, lambda x: x)
    with pytest.raises(ValueError, match="shape must be"):
        smoothing.gamma(0.0, 1.0)
    with pytest.raises(ValueError, match="no product"):
        observed(smoothing.flat(1)).backward(smoothing.gamma(1.0, 1.0).backward(point(1.0))[1])
    with pytest.raises(ValueError, match="associative needs"):
        chain(smoothing.gamma(np.ones(2), 1.0), associative=True)
    with pytest.raises(ValueError, match="associative needs"):
        chain(chain(smoothing.gamma(np.ones((2, 2)), 1.0)), associative=True)
    with pytest.raises(ValueError, match="count must be"):
        copies(0)
    with pytest.raises(ValueError, match="2 copies"):
        copies(2).backward((smoothing.flat(1),))
    with pytest.raises(ValueError, match="precision must be"):
        smoothing.quadratic(np.eye(2), np.zeros(1))
    with pytest.raises(ValueError, match="surrogate must be"):
        smoothing.gaussian(lambda x: x, np.eye(1), finite(FIRST))
    with pytest.raises(ValueError, match="point or an Increment"):
        smoothing.gamma(1.0, 1.0).backward(smoothing.flat(1))
