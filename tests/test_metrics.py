"""Every metric against a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from diffjax import metrics

GENERATOR = np.random.default_rng(0)


def covariance(size, rank=None):
    root = GENERATOR.normal(size=(size, size if rank is None else rank))
    return root @ root.T


def with_moments(count, mean, cov):
    """Samples whose empirical mean and covariance are exactly the given ones."""
    z = GENERATOR.normal(size=(count, len(mean)))
    z = z - z.mean(0)
    z = z @ np.linalg.inv(np.linalg.cholesky(np.cov(z, rowvar=False))).T
    return mean + z @ np.linalg.cholesky(cov).T


def test_frechet_distance_of_two_gaussians():
    size = 5
    means, covs = GENERATOR.normal(size=(2, size)), [covariance(size) for _ in range(2)]
    root = scipy.linalg.sqrtm(covs[0] @ covs[1]).real
    expected = np.sum((means[0] - means[1]) ** 2) + np.trace(covs[0] + covs[1] - 2 * root)
    assert metrics.gaussian_frechet_distance(means[0], covs[0], means[1], covs[1]) == pytest.approx(expected, rel=1e-10)
    samples, reference = (with_moments(50, m, c) for m, c in zip(means, covs, strict=True))
    assert metrics.frechet_distance(samples, reference) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_commuting_covariances():
    a, b = np.array([1.0, 4.0, 0.0]), np.array([9.0, 1.0, 2.0])
    basis = np.linalg.qr(GENERATOR.normal(size=(3, 3)))[0]
    found = metrics.gaussian_frechet_distance(np.zeros(3), basis * a @ basis.T, np.ones(3), basis * b @ basis.T)
    assert found == pytest.approx(3 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2), rel=1e-10)


def test_frechet_distance_keeps_its_accuracy_for_singular_covariances():
    cov = covariance(64, rank=3)
    found = metrics.gaussian_frechet_distance(np.zeros(64), cov, np.zeros(64), 4 * cov)
    assert found == pytest.approx(np.trace(cov), rel=1e-10)
    points = GENERATOR.normal(size=(20, 64))  # fewer samples than features
    assert metrics.frechet_distance(points, points) < 1e-12
    assert metrics.frechet_distance(points, points + 1) == pytest.approx(64, rel=1e-10)


def gaussian_mmd(mean, variance, other_mean, other_variance, bandwidth):
    """MMD^2 of two isotropic Gaussians: E k of the difference, which is Gaussian too."""

    def expectation(m, v):
        scale = bandwidth**2 / (bandwidth**2 + v)
        return scale ** (len(m) / 2) * np.exp(-0.5 * np.sum(m**2) / (bandwidth**2 + v))

    zero = np.zeros_like(mean)
    cross = expectation(mean - other_mean, variance + other_variance)
    return expectation(zero, 2 * variance) + expectation(zero, 2 * other_variance) - 2 * cross


def test_mmd_is_unbiased_at_its_closed_form():
    mean, other = np.array([0.0, 0.0]), np.array([0.5, -0.25])
    expected = gaussian_mmd(mean, 1.0, other, 0.5, bandwidth=1.3)
    draws = []
    for _ in range(400):  # small sets: the bias of the other estimator, 2/20, would be seen at once
        a, b = GENERATOR.normal(size=(20, 2)), other + np.sqrt(0.5) * GENERATOR.normal(size=(30, 2))
        draws.append(metrics.mmd(a, b, bandwidth=1.3))
    error = np.std(draws) / np.sqrt(len(draws))
    assert error < 0.01
    assert abs(np.mean(draws) - expected) < 4 * error


def test_mmd_and_kid_of_one_law_are_around_zero():
    pairs = GENERATOR.normal(size=(300, 2, 25, 4))
    for metric in (metrics.mmd, metrics.kid):
        draws = [metric(a, b) for a, b in pairs]
        assert abs(np.mean(draws)) < 4 * np.std(draws) / np.sqrt(len(draws))
        assert np.min(draws) < 0


def test_kid_by_hand():
    a, b = GENERATOR.normal(size=(6, 3)), GENERATOR.normal(size=(5, 3))

    def mean(x, y):
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if x is not y or i != j]
        return np.mean([(x[i] @ y[j] / 3 + 1) ** 3 for i, j in pairs])

    assert metrics.kid(a, b) == pytest.approx(mean(a, a) + mean(b, b) - 2 * mean(a, b), rel=1e-12)


def test_bandwidth_is_the_median_distance_of_the_reference_alone():
    reference = np.array([[0.0], [1.0], [10.0]])  # distances 1, 9, 10
    assert metrics.median_bandwidth(reference) == pytest.approx(9.0)
    samples = GENERATOR.normal(size=(7, 1))
    assert metrics.mmd(samples, reference) == metrics.mmd(samples, reference, bandwidth=9.0)


def test_sliced_wasserstein_of_a_shift():
    points, shift = GENERATOR.normal(size=(300, 8)), GENERATOR.normal(size=8)
    key = jax.random.key(0)
    # along every line the plan is the shift, so that one pair of points with the same lines gives the same number
    for order in (1.0, 2.0):
        one = metrics.sliced_wasserstein(key, np.zeros((1, 8)), shift[None], 64, order)
        assert metrics.sliced_wasserstein(key, points, points + shift, 64, order) == pytest.approx(one, rel=1e-10)
    many = metrics.sliced_wasserstein(key, points, points + shift, 20000)
    assert many == pytest.approx(np.linalg.norm(shift) / np.sqrt(8), rel=0.02)


def test_sliced_wasserstein_of_unequal_numbers_is_exact():
    a, b = GENERATOR.normal(size=(6, 1)), GENERATOR.normal(size=(4, 1))
    # the same laws with 12 equally likely points each
    expected = np.mean(np.abs(np.sort(np.repeat(a, 2)) - np.sort(np.repeat(b, 3))) ** 2) ** 0.5
    assert metrics.sliced_wasserstein(jax.random.key(1), a, b) == pytest.approx(expected, rel=1e-10)


def test_precision_and_recall_of_identical_disjoint_and_half_covered_sets():
    points = GENERATOR.normal(size=(60, 3))
    assert metrics.precision_recall(points, points) == (1.0, 1.0)
    assert metrics.precision_recall(points, points + 100) == (0.0, 0.0)
    both = np.concatenate([points, points + 100])
    assert metrics.precision_recall(points, both) == (1.0, 0.5)  # one of two modes: good but not diverse
    assert metrics.precision_recall(both, points) == (0.5, 1.0)


def test_precision_and_recall_radius_is_the_kth_neighbour():
    reference = np.array([[0.0], [1.0], [3.0], [7.0]])  # k = 1: radii 1, 1, 2, 4
    sample = lambda x: np.array([[x], [x + 1e3]])
    for x, inside in ((-0.9, True), (-1.1, False), (10.9, True), (11.1, False)):
        assert metrics.precision_recall(sample(x), reference, k=1).precision == (0.5 if inside else 0.0)
    assert metrics.precision_recall(np.array([[-2.9], [1e3], [1e4]]), reference, k=2).precision == pytest.approx(1 / 3)


def test_nearest_distance_in_blocks():
    training = GENERATOR.normal(size=(40, 2, 3))
    samples = GENERATOR.normal(size=(5000, 2, 3))
    expected = np.sqrt(((samples[:, None] - training) ** 2).sum((2, 3))).min(1)
    np.testing.assert_allclose(metrics.nearest_distance(samples, training), expected, rtol=1e-6)
    assert np.all(metrics.nearest_distance(training, training) < 1e-6)


def test_accuracy():
    logits = np.eye(4)[[0, 1, 2, 2]]
    assert metrics.accuracy(logits, [0, 1, 2, 3]) == 0.75


def test_sliced_wasserstein_of_equal_sets_has_a_finite_gradient():
    a = np.random.default_rng(0).normal(size=(30, 3))
    slope = jax.grad(lambda x: metrics.sliced_wasserstein(jax.random.key(0), x, x[::-1] + 0 * a))(jnp.asarray(a))
    np.testing.assert_array_equal(slope, 0.0)


def test_a_traced_bandwidth_or_key_with_concrete_sets():
    a, b = np.random.default_rng(0).normal(size=(2, 30, 3))
    assert float(jax.jit(lambda h: metrics.mmd(a, b, h))(0.7)) == pytest.approx(metrics.mmd(a, b, 0.7), abs=1e-5)
    keys = jax.random.split(jax.random.key(0), 3)
    found = jax.vmap(lambda key: metrics.sliced_wasserstein(key, a, b))(keys)
    np.testing.assert_allclose(found, [metrics.sliced_wasserstein(key, a, b) for key in keys], rtol=1e-5)


@pytest.mark.parametrize("metric", ["mmd", "kid", "sliced"])
def test_traced_metrics_agree_and_have_gradients(metric):
    functions = {
        "mmd": metrics.mmd,
        "kid": metrics.kid,
        "sliced": lambda a, b: metrics.sliced_wasserstein(jax.random.key(0), a, b, 32),
    }
    a, b = GENERATOR.normal(size=(2, 10, 3)).astype(np.float32)
    function = functions[metric]
    assert float(jax.jit(function)(a, b)) == pytest.approx(function(a, b), rel=1e-3, abs=1e-5)
    gradient = jax.grad(lambda shift: function(jnp.asarray(a) + shift, b))(jnp.ones(3))
    step = 1e-4
    for i in range(3):
        move = np.ones(3) + step * np.eye(3)[i], np.ones(3) - step * np.eye(3)[i]
        slope = (function(a + move[0], b) - function(a + move[1], b)) / (2 * step)
        assert gradient[i] == pytest.approx(slope, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.mmd(np.ones((1, 2)), np.ones((3, 2))), "samples must be at least 2"),
        (lambda: metrics.kid(np.ones((3, 2)), np.ones((3, 4))), "same size"),
        (lambda: metrics.mmd(np.ones((3, 2)), np.ones((3, 2))), "bandwidth must be above 0"),
        (lambda: metrics.frechet_distance(np.ones(3), np.ones((3, 2))), "same size"),
        (lambda: metrics.gaussian_frechet_distance([0.0], [[1.0]], [0.0, 1.0], [[1.0]]), "shapes"),
        (lambda: metrics.precision_recall(np.ones((3, 1)), np.ones((3, 1)), k=3), "at least 4"),
        (lambda: metrics.sliced_wasserstein(jax.random.key(0), [[0.0]], [[0.0]], order=0.5), "order"),
        (lambda: metrics.accuracy(np.ones((3, 2)), np.ones(2)), "logits"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_kid_in_float32_with_a_large_offset():
    """Features around 30 with spread 1: the cubes cancel to five digits, and so must their rounding errors."""
    rng = np.random.default_rng(0)
    a, b = 30 + rng.normal(size=(200, 16)), 30.3 + rng.normal(size=(150, 16))
    plain = lambda x, y: (x @ y.T / 16 + 1) ** 3
    within = [(plain(p, p).sum() - np.trace(plain(p, p))) / (len(p) * (len(p) - 1)) for p in (a, b)]
    exact = sum(within) - 2 * plain(a, b).mean()
    np.testing.assert_allclose(metrics.kid(a, b), exact, rtol=1e-7)
    found = jax.jit(metrics.kid)(a.astype(np.float32), b.astype(np.float32))
    np.testing.assert_allclose(found, exact, rtol=1e-4)


def test_a_summary_is_that_of_the_whole_set_however_it_is_divided():
    """Means and covariances by updates, kept samples by tickets: nothing depends on the batches."""
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(203, 5)) @ rng.normal(size=(5, 5)) + 1e4  # far from 0: sums of squares would lose digits
    whole = metrics.summary(lambda x: x, [rows], room=50)
    np.testing.assert_allclose(whole.covariance, np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(whole.mean, rows.mean(0), rtol=1e-14)
    for size in (1, 7, 64):
        parts = (rows[i : i + size].reshape(-1, 5, 1) for i in range(0, len(rows), size))
        found = metrics.summary(lambda x: x, parts, room=50)
        np.testing.assert_array_equal(found.kept, whole.kept)
        np.testing.assert_allclose(found.scatter, whole.scatter, rtol=1e-9, atol=1e-7)
    hosts = [
        metrics.summary(lambda x: x, [rows[part]], room=50, first=part.start) for part in (slice(0, 90), slice(90, 203))
    ]
    both = metrics.merged(hosts[1], hosts[0])
    np.testing.assert_array_equal(both.kept, whole.kept)
    np.testing.assert_allclose(both.covariance, whole.covariance, rtol=1e-9, atol=1e-9)
    other = metrics.summary(lambda x: x, [rows], room=50, seed=1)
    assert len(np.unique(whole.kept, axis=0)) == 50 and not np.array_equal(other.kept, whole.kept)


def test_kept_samples_are_a_uniform_sample():
    """Each of 10 samples is kept in 3 of 10 cases: the counts over 2000 seeds within four standard deviations."""
    numbers, counts = np.arange(10.0)[:, None], np.zeros(10)
    for seed in range(2000):
        kept = metrics.summary(lambda x: x, [numbers[:4], numbers[4:]], room=3, seed=seed).kept
        counts[kept.ravel().astype(int)] += 1
    assert np.all(np.abs(counts - 600) < 4 * np.sqrt(2000 * 0.3 * 0.7))


def test_summaries_compare_as_whole_sets_do(tmp_path):
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(60, 4)), rng.normal(size=(70, 4)) + 0.3
    feature = lambda x: jnp.tanh(x)  # the user's own, on the device
    halves = [metrics.summary(feature, np.array_split(x, 3), room=100) for x in (a, b)]
    found = metrics.compare(*halves)
    x, y = (np.asarray(feature(rows), np.float64) for rows in (a, b))
    assert found.frechet_distance == pytest.approx(metrics.frechet_distance(x, y), rel=1e-8)
    # sums over pairs do not depend on their order, but for rounding
    assert found.kid == pytest.approx(metrics.kid(x, y), rel=1e-8)
    assert (found.precision, found.recall) == metrics.precision_recall(x, y)
    assert (found.samples, found.reference) == (60, 70)
    halves[1].save(tmp_path / "reference.npz")
    loaded = metrics.Summary.load(tmp_path / "reference.npz")
    assert metrics.compare(halves[0], loaded) == found


def test_summaries_that_cannot_be_are_refused(tmp_path):
    same = lambda x: x
    with pytest.raises(ValueError, match="at least one sample, got none"):
        metrics.summary(same, [])
    with pytest.raises(ValueError, match="among samples 2 to 3"):
        metrics.summary(same, [np.zeros((2, 1)), np.array([[0.0], [np.nan]])])
    with pytest.raises(ValueError, match="features of one length"):
        metrics.summary(same, [np.zeros((2, 1)), np.zeros((2, 2))])
    with pytest.raises(ValueError, match="room must be at least 1"):
        metrics.summary(same, [np.zeros((2, 1))], room=0)
    one = metrics.summary(same, [np.zeros((1, 2))])
    with pytest.raises(ValueError, match="samples must have at least 2 samples, got 1"):
        metrics.compare(one, one)
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    with pytest.raises(ValueError, match="must hold"):
        metrics.Summary.load(tmp_path / "other.npz")


# --- Sinkhorn divergence ---------------------------------------------------------------------------------------------


def test_sinkhorn_divergence_of_a_shift_and_its_limits():
    """|v|^2 for a shifted set at every entropy; W_2^2 without, and the squared difference of means with all of it."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(12, 1)), rng.normal(0.8, 1.5, size=(12, 1))
    points, shift = rng.normal(size=(15, 3)), np.array([0.5, -1.0, 2.0])
    for entropy in (0.5, 3.0, 30.0):
        found = metrics.sinkhorn_divergence(points + shift, points, entropy, 5000)
        assert found == pytest.approx(shift @ shift, rel=1e-6)
        assert metrics.sinkhorn_divergence(points, points[::-1], entropy, 5000) == pytest.approx(0.0, abs=1e-7)
    sliced = metrics.sliced_wasserstein(jax.random.key(0), a, b) ** 2  # exact on a line
    assert metrics.sinkhorn_divergence(a, b, 1e-3, 20_000) == pytest.approx(sliced, rel=5e-3)
    assert metrics.sinkhorn_divergence(a, b, 1e6) == pytest.approx((a.mean() - b.mean()) ** 2, rel=1e-4)


def test_sinkhorn_divergence_is_that_of_the_convex_problem():
    """Both entropic problems by a general optimiser of the dual, and the traced version."""
    optimize = pytest.importorskip("scipy.optimize")
    rng, entropy = np.random.default_rng(1), 0.7
    a, b = rng.normal(size=(4, 2)), rng.normal(size=(3, 2)) + 0.5

    def dual(x, y):
        cost = ((x[:, None] - y[None]) ** 2).sum(-1)

        def negative(both):
            f, g = both[: len(x)], both[len(x) :]
            plan = np.exp((f[:, None] + g[None] - cost) / entropy) / plan_size
            slopes = np.concatenate([1 / len(x) - plan.sum(1), 1 / len(y) - plan.sum(0)])
            return -(f.mean() + g.mean() - entropy * (plan.sum() - 1)), -slopes

        plan_size = len(x) * len(y)
        start = np.zeros(len(x) + len(y))
        return -optimize.minimize(negative, start, jac=True, method="BFGS", options={"gtol": 1e-10}).fun

    exact = dual(a, b) - 0.5 * dual(a, a) - 0.5 * dual(b, b)
    assert metrics.sinkhorn_divergence(a, b, entropy) == pytest.approx(exact, rel=1e-7)
    traced = jax.jit(lambda a, b: metrics.sinkhorn_divergence(a, b, entropy, 200))(a, b)
    assert float(traced) == pytest.approx(exact, rel=1e-4)
    with pytest.raises(ValueError, match="entropy"):
        metrics.sinkhorn_divergence(a, b, 0.0)
