"""The shape of sampling paths, hallucinations, and locality: diagnostics and the statements they were made for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import data, diagnostics, grids, oracles, processes, solvers
from diffjax.levels import Level


@functools.cache
def digits(split="train"):
    """Images (N, 8, 8, 1) in [-1, 1], in float64."""
    return np.asarray(data.load("digits", split).arrays().x0, np.float64)


def level_of(process, **at):
    return jax.tree.map(jnp.asarray, process.level(**at))


# --- shapes ---------------------------------------------------------------------------------------------------------


def test_shapes_of_known_paths(x64):
    """A circle of radius 3 at uneven spacing in a tilted plane of R^5, a line, and a point that does not move."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(5, 5)))[0][:2]
    angle = np.sort(rng.uniform(0, 2, 20))
    circle = 3 * np.stack([np.cos(angle), np.sin(angle)], 1) @ basis + 4.0
    np.testing.assert_allclose(diagnostics.curvature(circle), 1 / 3, rtol=1e-9)
    # height of the arc above its chord, at the middle of the angle
    half = (angle[-1] - angle[0]) / 2
    middle = np.abs(np.cos(angle - (angle[0] + angle[-1]) / 2) - np.cos(half)) * 3
    np.testing.assert_allclose(diagnostics.chord_distance(circle), middle, atol=1e-12)
    assert int(diagnostics.path_dimension(circle, 0.9999)) == 2
    spectrum = np.asarray(diagnostics.path_spectrum(circle))
    expected = np.linalg.eigvalsh(np.cov(circle.T))[::-1]
    np.testing.assert_allclose(spectrum, expected / expected.sum(), atol=1e-12)

    line = np.outer(rng.uniform(size=7), rng.normal(size=6)).reshape(7, 2, 3) + 1.0
    np.testing.assert_allclose(diagnostics.chord_distance(line), 0, atol=1e-12)
    np.testing.assert_allclose(diagnostics.curvature(line), 0, atol=1e-6)
    assert int(diagnostics.path_dimension(line)) == 1
    still = np.ones((4, 3))
    for name in ("chord_distance", "curvature", "path_spectrum"):
        np.testing.assert_array_equal(getattr(diagnostics, name)(still), 0)
    loop = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(diagnostics.chord_distance(loop), [0, 5, 0])
    assert int(jax.jit(diagnostics.path_dimension)(circle)) == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda: diagnostics.chord_distance(np.ones((1, 3))),
        lambda: diagnostics.curvature(np.ones((2, 3))),
        lambda: diagnostics.path_dimension(np.ones((3, 3)), 1.0),
        lambda: diagnostics.estimate_variance(np.ones((3, 3)), window=(0.0, 1.0)),
        lambda: diagnostics.explained_variance(np.ones((3, 3)), np.ones((3, 2))),
        lambda: diagnostics.local_share(np.ones((3, 3)), 1),
        lambda: diagnostics.local_share(np.ones((3, 3, 3, 3)), -1),
        lambda: oracles.wiener(np.ones((1, 3))),
        lambda: oracles.local_points(np.ones((4, 3)), threshold=1.5),
        lambda: oracles.local_points(np.ones((4, 3)), chunk=0),
    ],
)
def test_bad_arguments(call):
    with pytest.raises(ValueError, match=r"path|share|window|shape|radius|data|threshold|chunk"):
        call()


# --- the geometry of sampling ---------------------------------------------------------------------------------------


@pytest.mark.paper("A Geometric Perspective on Diffusion Models")
def test_euler_is_an_annealed_mean_shift(x64):
    """x' = (sigma' / sigma) x + (1 - sigma' / sigma) m(x), m the kernel-weighted mean of the data, by NumPy."""
    images = digits()[:200].reshape(200, 64)
    process = processes.edm()
    grid = grids.karras(process, 6)
    x = process.prior(jax.random.key(1), (64,), jnp.float64)
    euler = solvers.euler("noise_to_signal")  # sigma, as alpha = 1
    found = diffjax.sample(jax.random.key(0), oracles.points(images), euler, grid, x=x, save="states")
    state = np.asarray(x)
    for i in range(6):
        sigma, after = float(grid.t.sigma[i]), float(grid.s.sigma[i])
        kernel = np.exp(-0.5 * (np.sum((images - state) ** 2, 1) - np.sum((images - state) ** 2, 1).min()) / sigma**2)
        mean = kernel @ images / kernel.sum()
        state = after / sigma * state + (1 - after / sigma) * mean
        np.testing.assert_allclose(found.saved.states[i + 1], state, atol=1e-10 * sigma + 1e-12)


@functools.cache
def digit_paths(steps=40, count=6):
    """Paths from noise to the training digits, under EDM's process, and the oracle that they follow."""
    with jax.enable_x64(True):
        process = processes.edm()
        oracle = oracles.points(digits().reshape(-1, 64), chunk=1500)
        grid = grids.karras(process, steps)
        draw = lambda key: diffjax.sample(
            key, oracle, solvers.ddim(), grid, shape=(64,), dtype=jnp.float64, save=("states", "x0")
        )
        saved = jax.vmap(draw)(jax.random.split(jax.random.key(3), count)).saved
        return oracle, grid, jax.tree.map(np.asarray, saved)


@pytest.mark.paper("A Geometric Perspective on Diffusion Models")
def test_likelihood_rises_on_both_trajectories(x64):
    """The kernel estimate of bandwidth sigma at the clean estimate, and after a step, is not below that at the state.

    Mean shift never lowers a Gaussian kernel estimate, so this is a theorem; on digits also along the denoising
    trajectory, for one bandwidth that tells them apart (below the 3 or so between neighbours).
    """
    oracle, _, saved = digit_paths()
    density = jax.jit(jax.vmap(jax.vmap(oracle.log_density, (0, 0)), (0, 0)))
    before = Level(*(leaf[:, :-1] for leaf in saved.states_level))
    here, estimate, after = (
        np.asarray(density(path, before)) for path in (saved.states[:, :-1], saved.x0, saved.states[:, 1:])
    )
    assert np.all(estimate >= here - 1e-9) and np.all(after >= here - 1e-9)
    assert np.all(estimate[:, 0] > here[:, 0] + 1e-3)
    wide = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, before.time.shape), processes.edm().level(0.5))
    along = np.asarray(density(saved.x0, wide))
    assert np.all(along[:, -1] >= along.max(1) - 1e-6) and np.all(along[:, -1] > along[:, 0] + 10)
    fall = np.maximum(-np.diff(along, axis=1), 0).sum(1) / (along[:, -1] - along[:, 0])
    assert np.all(fall < 0.05), fall


@pytest.mark.paper("A Geometric Perspective on Diffusion Models")
def test_paths_to_digits_are_nearly_straight(x64):
    """A small part of the chord's length away from it, in few dimensions, and the estimates are there first."""
    _, grid, saved = digit_paths()
    for states in saved.states:
        length = np.linalg.norm(states[-1] - states[0])
        assert diagnostics.chord_distance(states).max() < 0.02 * length
        assert int(diagnostics.path_dimension(states, 0.999)) == 1
        assert int(diagnostics.path_dimension(states, 0.999999)) <= 4
        # bent where the estimate moves, not at high noise
        bent = np.asarray(diagnostics.curvature(states[:-1]))
        sigma = grid.t.sigma[1:-1]
        assert bent[sigma > 10].max() < 0.02 * bent.max()
    final = saved.states[:, -1:]
    distance = lambda path: np.linalg.norm(path - final, axis=-1)
    states, estimates = distance(saved.states[:, :-1]), distance(saved.x0)
    assert np.all(estimates <= states + 1e-12)
    # halfway through the steps the estimate is nearer than the state by far
    assert np.all(estimates[:, 20] < 0.5 * states[:, 20])


@pytest.mark.paper("A Geometric Perspective on Diffusion Models")
def test_ode_jump_is_a_grid_that_ends_early(x64):
    """``grid[:k]`` with ``final_denoise`` outputs the estimate of step k, and far nearer to the end than the state."""
    oracle, grid, saved = digit_paths()
    k = 20
    keys = jax.random.split(jax.random.key(3), 6)

    def draw(part, **options):
        one = lambda key: diffjax.sample(key, oracle, solvers.ddim(), part, shape=(64,), dtype=jnp.float64, **options)
        return jax.vmap(one)(keys)

    jump = draw(grid[:k], final_denoise=True)
    np.testing.assert_allclose(jump.x, saved.x0[:, k], atol=1e-9)
    assert np.all(np.asarray(jump.nfe) == k + 1)
    early, kept = (np.linalg.norm(x - saved.states[:, -1], axis=-1) for x in (jump.x, draw(grid[:k]).x))
    assert np.all(early < 0.5 * kept)


@pytest.mark.paper("A Geometric Perspective on Diffusion Models")
def test_score_deviation(x64):
    """Of a denoiser from itself nothing, of the Wiener denoiser from the points as they are, one by one."""
    oracle, _, saved = digit_paths()
    linear = oracles.wiener(digits().reshape(-1, 64))
    states, level = saved.states[0, :-1], Level(*(leaf[0, :-1] for leaf in saved.states_level))
    np.testing.assert_array_equal(diagnostics.deviation(oracle, oracle, states, level), 0)
    found = np.asarray(diagnostics.deviation(linear, oracle, states, level))
    for i in (0, 15, 39):
        at = Level(*(leaf[i] for leaf in level))
        expected = np.linalg.norm(linear(jnp.asarray(states[i]), at) - oracle(jnp.asarray(states[i]), at))
        np.testing.assert_allclose(found[i], expected, rtol=1e-8)
    assert found[0] < 0.05 * found.max()  # they agree at high noise


# --- hallucination --------------------------------------------------------------------------------------------------

MODES, SPREAD = np.array([-2.0, 0.0, 2.0]), 0.05


@functools.cache
def trainer(steps=800, width=32):
    """``data (N, 1) -> parameters`` of a small network, one compiled loop for every data set; and its denoiser."""
    from flax import nnx

    from diffjax import networks, training

    apply, params = networks.functional(networks.MLP(1, width=width, depth=1, time_scale=10.0, rngs=nnx.Rngs(0)))
    prediction = diffjax.predictions.flow(processes.flow())
    optimiser = training.adam(4e-3, warmup=20, steps=steps)
    update = training.update(training.denoising(prediction, apply), optimiser, training.ema.warmed(0.99))

    @jax.jit
    def train(points):
        def body(state, key):
            return update(state, (points[jax.random.randint(key, (256,), 0, len(points))], None))[0], None

        state = training.init(jax.random.key(0), params, optimiser)
        return jax.lax.scan(body, state, jax.random.split(jax.random.key(1), steps))[0].ema

    return train, lambda found: prediction.decode(apply, found)


HALLUCINATION_GRID, COUNT = grids.uniform(processes.flow(), 50), 4000


@jax.jit
def drawn(denoise, key):
    """Samples (COUNT, 1) and the variances of their late estimates."""

    def one(key):
        found = diffjax.sample(key, denoise, solvers.ancestral(), HALLUCINATION_GRID, shape=(1,), save="x0")
        return found.x, diagnostics.estimate_variance(found.saved.x0, found.saved.x0_level, (0.02, 0.3))

    return jax.vmap(one)(jax.random.split(key, COUNT))


def between(x):
    return np.abs(np.asarray(x) - MODES).min(1) > 6 * SPREAD


def real(key):
    which, noise = jax.random.split(key)
    modes = jnp.asarray(MODES, jnp.float32)[jax.random.randint(which, (COUNT, 1), 0, 3)]
    return modes + SPREAD * jax.random.normal(noise, (COUNT, 1))


@functools.cache
def first_generation():
    train, denoiser = trainer()
    return tuple(np.asarray(part) for part in drawn(denoiser(train(real(jax.random.key(2)))), jax.random.key(5)))


@pytest.mark.paper("Understanding Hallucinations in Diffusion Models through Mode Interpolation")
def test_hallucinations_are_found_by_their_late_estimates():
    """A trained network puts samples between modes, the exact score none; the variance of late estimates tells them."""
    exact = oracles.mixture(np.ones(3), MODES[:, None], np.full(3, SPREAD**2))
    assert not between(drawn(exact, jax.random.key(5))[0]).any()
    x, scores = first_generation()
    hallucinated = between(x)
    assert 0.01 < hallucinated.mean() < 0.2, hallucinated.mean()
    # the area under the ROC curve, from ranks
    ranks = np.argsort(np.argsort(scores)) + 1.0
    bad, good = hallucinated.sum(), (~hallucinated).sum()
    area = (ranks[hallucinated].sum() - bad * (bad + 1) / 2) / (bad * good)
    threshold = np.quantile(scores[~hallucinated], 0.9)
    removed = np.mean(scores[hallucinated] > threshold)
    assert area > 0.85 and removed > 0.7, (area, removed, hallucinated.mean())
    kept = scores <= threshold  # the filter: of what is kept fewer are between modes
    assert hallucinated[kept].mean() < 0.4 * hallucinated.mean()


@pytest.mark.slow
@pytest.mark.paper("Understanding Hallucinations in Diffusion Models through Mode Interpolation")
def test_a_filter_stabilises_training_on_own_samples():
    """Generations trained on samples of the one before: hallucinations add up, and less where they are filtered out.

    The filter keeps the nine tenths of the samples whose late estimates vary least, and sees no label.
    """
    train, denoiser = trainer()
    shares = {}
    for name, kept in (("plain", 1.0), ("filtered", 0.9)):
        (x, scores), shares[name] = first_generation(), []
        for generation in range(3):
            shares[name].append(between(x).mean())
            points = x[np.argsort(scores)[: int(kept * COUNT)]]
            points = np.resize(points, (COUNT, 1))  # of one size: one program
            x, scores = (
                np.asarray(part)
                for part in drawn(denoiser(train(jnp.asarray(points))), jax.random.key(10 + generation))
            )
        shares[name].append(between(x).mean())
    assert shares["plain"][-1] > 1.5 * shares["plain"][0], shares
    assert shares["filtered"][-1] < 0.6 * shares["plain"][-1], shares


def test_variance_of_estimates_in_a_window():
    """The population variance of the estimates whose times are inside, over all leaves."""
    rng = np.random.default_rng(0)
    tree = {"a": rng.normal(size=(6, 2, 2)), "b": rng.normal(size=(6, 3))}
    level = processes.flow().level(np.linspace(1.0, 0.0, 6))
    inside = slice(2, 5)  # 0.6, 0.4, 0.2
    expected = (tree["a"][inside].var(0).sum() + tree["b"][inside].var(0).sum()) / 7
    np.testing.assert_allclose(diagnostics.estimate_variance(tree, level, (0.15, 0.65)), expected, rtol=1e-5)
    whole = (tree["a"].var(0).sum() + tree["b"].var(0).sum()) / 7
    np.testing.assert_allclose(diagnostics.estimate_variance(tree), whole, rtol=1e-5)
    assert np.isnan(diagnostics.estimate_variance(tree, level, (0.65, 0.75)))


# --- locality -------------------------------------------------------------------------------------------------------


@pytest.mark.paper("Locality in Image Diffusion Models Emerges from Data Statistics")
def test_the_wiener_denoiser_is_least_squares(x64):
    """Against LAPACK: over all noise the squared error is that of one stacked system, [alpha X; sigma sqrt(N) I]."""
    images = digits()
    flat = images.reshape(-1, 64)
    for process in (processes.vp(), processes.edm()):
        level = process.level(np.float64(0.3 * process.end))
        centred = flat - flat.mean(0)
        rows = np.concatenate([level.alpha * centred, level.sigma * np.sqrt(len(flat)) * np.eye(64)])
        best = np.linalg.lstsq(rows, np.concatenate([centred, np.zeros((64, 64))]), rcond=None)[0]
        x = np.random.default_rng(0).normal(size=(8, 8, 1))
        expected = flat.mean(0) + (x.reshape(-1) - level.alpha * flat.mean(0)) @ best
        np.testing.assert_allclose(oracles.wiener(images)(jnp.asarray(x), level).reshape(-1), expected, atol=1e-9)
    line = oracles.wiener(np.array([[0.0], [4.0]]))  # one dimension
    np.testing.assert_allclose(line.variances, [4.0])


@pytest.mark.paper("Locality in Image Diffusion Models Emerges from Data Statistics")
def test_locality_comes_from_the_covariance(x64):
    """Digits: sensitivity is in the neighbourhood; with the pixels in another order it is where they went."""
    images = digits()
    order = np.random.default_rng(1).permutation(64)
    shuffled = images.reshape(-1, 64)[:, order].reshape(images.shape)
    level, x = processes.vp().level(half_log_snr=np.float64(0.0)), jnp.zeros((8, 8, 1))
    jacobians = [diagnostics.sensitivity(oracles.wiener(each), x, level) for each in (images, shuffled)]
    near, far = (float(diagnostics.local_share(_off_diagonal(j), 1)) for j in jacobians)
    chance = float(diagnostics.local_share(_off_diagonal(np.ones((8, 8, 1, 8, 8, 1))), 1))
    assert near > 0.5 and far < 1.5 * chance, (near, far, chance)
    np.testing.assert_allclose(
        jacobians[1].reshape(64, 64), jacobians[0].reshape(64, 64)[np.ix_(order, order)], atol=1e-12
    )
    # the masks of the local denoiser follow
    masks = [
        np.asarray(oracles.local_points(each, threshold=0.2).masks(level, jnp.float64)) for each in (images, shuffled)
    ]
    near, far = (float(diagnostics.local_share(_off_diagonal(mask.reshape(8, 8, 1, 8, 8, 1)), 1)) for mask in masks)
    assert near > 2 * far, (near, far)


def _off_diagonal(jacobian):
    return np.asarray(jacobian) * (1 - np.eye(64)).reshape(8, 8, 1, 8, 8, 1)


@pytest.mark.paper("Locality in Image Diffusion Models Emerges from Data Statistics")
def test_the_local_denoiser_on_held_out_digits(x64):
    """By hand with NumPy; threshold 0 is the point set; on held-out digits it beats both points and Wiener."""
    images, others = digits(), digits("test")[:60]
    process = processes.vp()
    few = images[:30]
    for threshold in (0.1, 0.3):
        denoise = oracles.local_points(few, threshold=threshold, chunk=7)
        level = process.level(half_log_snr=np.float64(0.3))
        x = level.alpha * others[0] + level.sigma * np.random.default_rng(2).normal(size=(8, 8, 1))
        flat, state = few.reshape(30, 64), x.reshape(64)
        covariance = np.cov(flat.T, bias=True)
        filter_ = covariance @ np.linalg.inv(level.alpha**2 * covariance + level.sigma**2 * np.eye(64))
        expected = np.empty(64)
        for q in range(64):
            # where a pixel never changes its row is zero up to rounding, and every mask gives the same answer
            mask = np.abs(filter_[q]) >= threshold * np.abs(filter_[q]).max()
            logits = -0.5 * ((state - level.alpha * flat) ** 2)[:, mask].sum(1) / level.sigma**2
            weights = np.exp(logits - logits.max())
            expected[q] = weights @ flat[:, q] / weights.sum()
        np.testing.assert_allclose(denoise(jnp.asarray(x), level).reshape(64), expected, atol=1e-8)
    level = process.level(half_log_snr=np.float64(0.5))
    same, points = oracles.local_points(few, threshold=0.0, chunk=7), oracles.points(few)
    np.testing.assert_allclose(same(jnp.asarray(x), level), points(jnp.asarray(x), level), atol=1e-10)
    level = process.level(half_log_snr=np.float64(1.0))
    noisy = level.alpha * others + level.sigma * np.random.default_rng(3).normal(size=others.shape)
    error = {
        name: float(np.mean((jax.lax.map(lambda x, d=d: d(x, level), jnp.asarray(noisy)) - others) ** 2))
        for name, d in {
            "points": oracles.points(images),
            "local": oracles.local_points(images, threshold=0.05),
            "wiener": oracles.wiener(images),
        }.items()
    }
    assert error["local"] < 0.7 * error["points"] and error["local"] < 0.8 * error["wiener"], error


@pytest.mark.paper("Locality in Image Diffusion Models Emerges from Data Statistics")
def test_a_trained_network_is_nearer_to_the_local_denoiser_than_to_the_points():
    """What a briefly trained perceptron estimates of noisy held-out digits, explained by the analytic denoisers."""
    from flax import nnx

    from diffjax import networks, training

    process, steps = processes.flow(), 800
    images, others = (digits(split).reshape(-1, 64).astype(np.float32) for split in ("train", "test"))
    apply, params = networks.functional(networks.MLP(64, width=128, depth=2, time_scale=10.0, rngs=nnx.Rngs(0)))
    prediction = diffjax.predictions.flow(process)
    optimiser = training.adam(3e-3, warmup=50, steps=steps)
    update = training.update(training.denoising(prediction, apply), optimiser, training.ema.warmed(0.99))
    known = jnp.asarray(images)

    def body(state, key):
        return update(state, (known[jax.random.randint(key, (128,), 0, len(known))], None))[0], None

    state = training.init(jax.random.key(0), params, optimiser)
    state, _ = jax.jit(lambda state: jax.lax.scan(body, state, jax.random.split(jax.random.key(1), steps)))(state)
    network = prediction.decode(apply, state.ema)
    for time, gap in ((0.4, 0.08), (0.2, 0.1)):
        level = jax.tree.map(jnp.float32, process.level(time))
        noise = np.random.default_rng(0).normal(size=(100, 64)).astype(np.float32)
        x = level.alpha * others[:100] + level.sigma * noise
        run = lambda denoise, x=x, level=level: jax.lax.map(lambda x: denoise(x, level), x)
        reference = run(network)
        share = {
            name: float(diagnostics.explained_variance(run(denoise), reference))
            for name, denoise in {
                "wiener": oracles.wiener(images),
                "points": oracles.points(images),
                "local": oracles.local_points(images, threshold=0.05),
            }.items()
        }
        assert share["local"] > share["points"] + gap and share["wiener"] > 0.85, (time, share)


def test_the_local_denoiser_at_both_ends():
    """The mean at noise, the nearest point's pixels at data; finite, in float32, also where a pixel never changes."""
    images = digits()[:40]
    denoise = oracles.local_points(images, threshold=0.05)
    process = processes.flow()
    x = jnp.asarray(images[3], jnp.float32)
    np.testing.assert_allclose(denoise(x, level_of(process, time=1.0)), images.mean(0), atol=1e-5)
    np.testing.assert_allclose(denoise(x, level_of(process, time=0.0)), images[3], atol=1e-6)
