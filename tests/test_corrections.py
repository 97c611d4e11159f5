"""Corrections of denoisers, the Langevin corrector, step doubling, shared times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import corrections, grids, modifiers, oracles, processes, solvers

KEY = jax.random.key(0)
MIXTURE = oracles.mixture([0.4, 0.6], [[-1.0, 0.3], [1.2, -0.5]], [[0.1, 0.3], [0.05, 0.2]])
SOLVERS = [solvers.ddim(), solvers.ddim(0.7), solvers.dpmpp(), solvers.heun(), solvers.euler_maruyama()]
START = np.array([0.9, -1.4])


def _level(process, time):
    return jax.tree.map(jnp.asarray, process.level(np.float64(time)))


def _run(denoise, solver, grid, x=START, key=KEY, **options):
    return diffjax.sample(key, denoise, solver, grid, x=jnp.asarray(x), **options)


# --- thresholding -------------------------------------------------------------------------------------------------


def test_clipping_and_dynamic_thresholding_against_their_definitions():
    level = _level(processes.cosine(), 0.4)
    x0 = np.random.default_rng(0).normal(size=(8, 8)) * 3
    given = lambda x, level: jnp.asarray(x0)
    x = jnp.zeros((8, 8))
    np.testing.assert_allclose(corrections.clipped(given, -0.5, 2.0)(x, level), np.clip(x0, -0.5, 2.0), rtol=1e-6)
    s = np.quantile(np.abs(x0), 0.9)
    found = corrections.thresholded(given, 0.9)(x, level)
    np.testing.assert_allclose(found, np.clip(x0, -s, s) / s, rtol=1e-5)
    assert np.abs(found).max() <= 1 + 1e-6
    np.testing.assert_allclose(
        corrections.thresholded(given, 0.9, bound=2.0)(x, level), np.clip(x0, -s, s) * 2 / s, rtol=1e-5
    )
    np.testing.assert_allclose(corrections.thresholded(given, 0.9, maximum=1.5)(x, level), np.clip(x0, -1.5, 1.5) / 1.5,
                               rtol=1e-5)  # fmt: skip
    small = lambda x, level: jnp.asarray(0.1 * x0 / np.abs(x0).max())
    np.testing.assert_array_equal(corrections.thresholded(small)(x, level), small(x, level))


@pytest.mark.paper("DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models")
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_thresholding_keeps_strong_guidance_in_range(solver):
    process = processes.cosine()

    @diffjax.levels.value
    class Conditional:
        condition: jax.Array

        def __call__(self, x, level):  # class means +-0.6 of data in [-1, 1]; class 2 is both
            means, variances = jnp.asarray([0.6, -0.6, 0.0])[self.condition], jnp.asarray([0.01, 0.01, 0.37])
            v = variances[self.condition]
            return means + level.alpha * v / (level.alpha**2 * v + level.sigma**2) * (x - level.alpha * means)

    guided = diffjax.guidance.classifier_free(Conditional(jnp.asarray(0)), null=2, scale=30.0)
    grid = grids.uniform(process, 12, start=0.99)
    x = jax.random.normal(KEY, (16,))
    plain = _run(guided, solver, grid, x).x
    held = _run(corrections.thresholded(guided), solver, grid, x).x
    assert np.all(np.isfinite(held)) and np.abs(held).max() <= 1 + 1e-5
    assert np.abs(plain).max() > 1.2


# --- epsilon scaling ------------------------------------------------------------------------------------------------


@pytest.mark.paper("Elucidating the Exposure Bias in Diffusion Models")
def test_epsilon_scaling_divides_the_noise_estimate():
    process = processes.vp()
    x = jnp.asarray(START)
    for time in (0.05, 0.5, 1.0):
        level = _level(process, time)
        eps = lambda denoise, level=level: (x - level.alpha * denoise(x, level)) / level.sigma
        np.testing.assert_allclose(
            eps(corrections.epsilon_scaled(MIXTURE, 1.25)), eps(MIXTURE) / 1.25, rtol=2e-4, atol=1e-5
        )
        scaled = corrections.epsilon_scaled(MIXTURE, 1.0, slope=0.1)
        np.testing.assert_allclose(eps(scaled), eps(MIXTURE) / (1 + 0.1 * time), rtol=2e-4, atol=1e-5)
        np.testing.assert_array_equal(corrections.epsilon_scaled(MIXTURE, 1.0)(x, level), MIXTURE(x, level))
    start = _level(processes.flow(), 1.0)
    assert np.all(np.isfinite(corrections.epsilon_scaled(MIXTURE, 1.1)(x, start)))


@pytest.mark.paper("Elucidating the Exposure Bias in Diffusion Models")
def test_epsilon_scaling_shrinks_the_variance_gap_of_a_wrong_network(x64):
    process, data = processes.edm(20.0), oracles.gaussian(0.0, 0.5)
    grid = grids.karras(process, 100, sigma_min=0.05)

    def network(x, level):  # too much noise, by 1 to 3 per cent
        excess = 0.02 + 0.01 * jnp.sin(3 * level.half_log_snr)
        return data(x, level) - excess * (x - data(x, level))

    def gap(denoise):  # everything is linear: two states one standard deviation from 0 have the variance of all
        std = np.sqrt(20.0**2 + 0.5)
        draw = lambda x: diffjax.sample(KEY, denoise, solvers.dpmpp(), grid, x=x, save="states", every=25).saved
        saved = jax.vmap(draw)(jnp.asarray([std, -std]))
        level = jax.tree.map(lambda leaf: leaf[0], saved.states_level)
        return np.asarray(corrections.variance_gap(saved.states, level, 0.5))

    exact, wrong = gap(data), gap(network)
    assert exact.shape == (5,) and abs(exact[0]) < 1e-9
    np.testing.assert_allclose(exact[-1], 0.0, atol=5e-3)
    gaps = {scale: abs(gap(corrections.epsilon_scaled(network, scale))[-1]) for scale in (1.0, 1.01, 1.02, 1.03)}
    assert gaps[1.0] == abs(wrong[-1]) and gaps[1.0] > 0.03
    assert min(gaps, key=gaps.get) == 1.02 and gaps[1.02] < 0.2 * gaps[1.0], gaps


# --- analytic start -------------------------------------------------------------------------------------------------


def test_analytic_start_saves_calls_and_is_exact_for_gaussian_data():
    grid = grids.karras(processes.edm(), 8)
    data = oracles.gaussian(np.array([0.5, -0.2]), np.array([[0.6, 0.2], [0.2, 0.3]]))
    for solver in (solvers.ddim(), solvers.heun(), solvers.dpmpp()):
        base = _run(data, solver, grid, 80 * START)
        early = _run(corrections.analytic_start(data, grid, 2, prior=data), solver, grid, 80 * START)
        np.testing.assert_allclose(early.x, base.x, rtol=1e-6)
        # heun calls the second level of step 1 at the start of step 2, which is early, too
        saved = 3 if solver.calls == 2 else 2
        assert base.nfe - early.nfe == saved
    none = _run(corrections.analytic_start(MIXTURE, grid, 0), solvers.ddim(), grid, 80 * START)
    np.testing.assert_array_equal(none.x, _run(MIXTURE, solvers.ddim(), grid, 80 * START).x)
    # far from the data the mixture's posterior mean is nearly that of a Gaussian
    afs = _run(corrections.analytic_start(MIXTURE, grid), solvers.ddim(), grid, 80 * START)
    np.testing.assert_allclose(afs.x, none.x, atol=0.1)
    batch = jax.vmap(lambda x: _run(corrections.analytic_start(MIXTURE, grid), solvers.ddim(), grid, x).nfe)(
        jnp.asarray([START, -START])
    )
    np.testing.assert_array_equal(batch, 7)


def test_analytic_start_does_not_call_the_network():
    calls = []

    def network(x, level):
        jax.debug.callback(lambda t: calls.append(float(t)), level.time)
        return 0.5 * x

    grid = grids.uniform(processes.flow(), 4)
    jax.vmap(lambda x: _run(corrections.analytic_start(network, grid, 2), solvers.ddim(), grid, x).x)(
        jnp.stack([jnp.asarray(START)] * 3)
    )
    jax.effects_barrier()
    assert max(calls) == 0.5


# --- time shift -----------------------------------------------------------------------------------------------------


def _white(size=256, variance=0.25):
    return oracles.gaussian(np.zeros(size), variance)


@pytest.mark.paper("Alleviating Exposure Bias in Diffusion Models through Sampling with Shifted Time Steps")
@pytest.mark.parametrize("solver", [solvers.ddim(), solvers.heun(), solvers.dpmpp()], ids=repr)
def test_time_shift_without_a_window_is_the_base(solver):
    process, data = processes.ddpm(), _white()
    grid = grids.table(process, 10)
    x = jax.random.normal(KEY, (256,))
    base = _run(data, solver, grid, x)
    same = _run(corrections.time_shifted(data, process, window=0.0), solver, grid, x)
    np.testing.assert_allclose(base.x, same.x, rtol=1e-5)
    assert same.nfe == base.nfe
    late = _run(corrections.time_shifted(data, process, 100.0, cutoff=2000.0), solver, grid, x)
    np.testing.assert_allclose(base.x, late.x, rtol=1e-5)


@pytest.mark.paper("Alleviating Exposure Bias in Diffusion Models through Sampling with Shifted Time Steps")
def test_time_shift_asks_at_the_level_of_the_variance():
    process = processes.ddpm()
    shifted = corrections.time_shifted(_white(), process, window=40.0, points=41)
    x = np.random.default_rng(1).normal(size=256)
    for time, target in ((500.0, 512.0), (500.0, 488.0), (500.0, 700.0), (500.0, 100.0)):
        sigma = process.level(np.float64(target)).sigma
        state = jnp.asarray(x / x.std(ddof=1) * sigma)
        found = shifted.level(state, _level(process, time)).time
        assert abs(found - np.clip(target, 480, 520)) <= 1.0, (time, target, found)
    # the estimate keeps the noise that the network saw there
    level, near = _level(process, 500.0), shifted.level(state, _level(process, 500.0))
    eps = lambda x0, level: (state - level.alpha * x0) / level.sigma
    np.testing.assert_allclose(
        eps(shifted(state, level), level), eps(_white()(state, near), near), rtol=1e-4, atol=1e-5
    )


@pytest.mark.paper("Alleviating Exposure Bias in Diffusion Models through Sampling with Shifted Time Steps")
def test_time_shift_lowers_the_error_of_a_sampler_with_exposure_bias(x64):
    # a network that removes too little noise at first: its later states have too large a variance
    process, data = processes.vp(), _white(variance=0.8)
    grid = grids.uniform(process, 30, stop=1e-3)

    def network(x, level):
        eps = jnp.where(level.time > 0.5, 0.95, 1.0) * (x - level.alpha * data(x, level)) / level.sigma
        return (x - level.sigma * eps) / level.alpha

    x = jax.random.normal(KEY, (256,), jnp.float64)
    error = lambda denoise: abs(float(jnp.var(_run(denoise, solvers.ddim(), grid, x).x)) - 0.8)
    shifted = corrections.time_shifted(network, process, window=0.1, points=101, variance=0.8)
    assert error(network) > 0.2
    assert error(shifted) < 0.5 * error(network)


# --- dualfast -------------------------------------------------------------------------------------------------------


@pytest.mark.paper("DualFast: Dual-Speedup Framework for Fast Sampling of Diffusion Models")
@pytest.mark.parametrize("solver", [solvers.ddim(), solvers.heun(), solvers.dpmpp()], ids=repr)
def test_dualfast_without_strength_is_the_base(solver):
    grid = grids.log_snr(processes.vp(), 8)
    base, same = (_run(d, solver, grid) for d in (MIXTURE, corrections.dualfast(MIXTURE, 0.0)))
    np.testing.assert_allclose(base.x, same.x, rtol=1e-5)
    assert same.nfe == base.nfe


@pytest.mark.paper("DualFast: Dual-Speedup Framework for Fast Sampling of Diffusion Models")
@pytest.mark.parametrize("reference", ["first", "previous"])
def test_dualfast_extrapolates_the_noise(reference, x64):
    process = processes.vp()
    grid = grids.uniform(process, 6, stop=0.01)
    out = _run(corrections.dualfast(MIXTURE, 0.3, reference), solvers.ddim(), grid, START)
    x, earlier = jnp.asarray(START), None
    for i in range(6):
        t, s = (jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), level) for level in (grid.t, grid.s))
        eps = (x - t.alpha * MIXTURE(x, t)) / t.sigma
        earlier = eps if earlier is None else earlier
        c = 0.3 * t.time / grid.t.time[0]
        used = (1 + c) * eps - c * earlier
        x = s.alpha * (x - t.sigma * used) / t.alpha + s.sigma * used
        earlier = eps if reference == "previous" else earlier
    np.testing.assert_allclose(out.x, x, rtol=1e-9)


@pytest.mark.paper("DualFast: Dual-Speedup Framework for Fast Sampling of Diffusion Models")
def test_dualfast_lowers_the_error_of_a_network_that_regresses_to_the_mean(x64):
    # approximation error that grows as the noise falls, and the discretisation error of 8 steps
    process = processes.vp()
    mean = jnp.asarray([0.32, -0.18])

    def network(x, level):
        share = 0.1 * (1 - level.time)
        return (1 - share) * MIXTURE(x, level) + share * mean

    x = jax.vmap(lambda k: jax.random.normal(k, (2,), jnp.float64))(jax.random.split(KEY, 128))
    run = lambda denoise, n: jax.vmap(lambda x: _run(denoise, solvers.dpmpp(), grids.log_snr(process, n), x).x)(x)
    truth = run(MIXTURE, 200)
    error = lambda denoise, n: float(jnp.sqrt(jnp.mean((run(denoise, n) - truth) ** 2)))
    discretisation, approximation, total = error(MIXTURE, 8), error(network, 200), error(network, 8)
    assert min(discretisation, approximation) > 0.05 and total > discretisation
    for reference in ("first", "previous"):
        assert error(corrections.dualfast(network, 0.8, reference), 8) < 0.92 * total


# --- langevin -------------------------------------------------------------------------------------------------------


def test_langevin_corrector_with_fixed_size_has_the_exact_law(x64):
    # variance c of N(0, c0)-data's score: c' = (1 - e / c0)^2 c + 2 e, then the inner step
    process, data = processes.vp(), oracles.gaussian(0.0, 0.3)
    grid = grids.uniform(process, 3, start=0.8, stop=0.2)
    solver = modifiers.langevin(solvers.ddim(), steps=2, size=0.05)
    rows = solver.plan(grid)
    row = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), rows)
    assert solver.calls == 3 and solver.draws == 2
    take = lambda x, *noise: solver.step(noise, data, x, solver.init(x), row)[0]
    a, b0, b1 = jax.grad(take, argnums=(0, 1, 2))(0.3, 0.1, -0.2)
    t, s = row.t, row.s
    c_t, c_s = (level.alpha**2 * 0.3 + level.sigma**2 for level in (t, s))
    e = 0.05 * t.sigma**2
    gain = s.sigma / t.sigma + (s.alpha - t.alpha * s.sigma / t.sigma) * t.alpha * 0.3 / c_t
    np.testing.assert_allclose(a, gain * (1 - e / c_t) ** 2, rtol=1e-10)
    np.testing.assert_allclose(b0, gain * (1 - e / c_t) * np.sqrt(2 * e), rtol=1e-10)
    np.testing.assert_allclose(b1, gain * np.sqrt(2 * e), rtol=1e-10)
    # from a wrong variance many corrections lead to that of the level
    c = 5.0
    for _ in range(2000):
        c = (1 - e / c_t) ** 2 * c + 2 * e
    np.testing.assert_allclose(c, c_t / (1 - e / (2 * c_t)), rtol=1e-6)
    assert c_s > 0


def test_langevin_corrector_with_snr_is_that_of_score_sde():
    process = processes.ve()
    solver = modifiers.langevin(solvers.ddim(), snr=0.16)
    grid = grids.uniform(process, 4)
    row = jax.tree.map(lambda leaf: jnp.asarray(leaf[1], jnp.float32), solver.plan(grid))
    rng = np.random.default_rng(0)
    x, z = (jnp.asarray(rng.normal(size=(4, 4)), jnp.float32) for _ in range(2))
    data = oracles.gaussian(np.zeros((4, 4)), 0.2)
    found = solver.step((z,), data, x, (), row)[0]
    score = np.asarray(data.score(x, row.t))
    size = (0.16 * np.linalg.norm(z) / np.linalg.norm(score)) ** 2 * 2
    corrected = x + size * score + np.sqrt(2 * size) * z
    inner = solvers.ddim()
    expected = inner.step((), data, corrected, (), row)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    # the ratio of drift and noise is what it is called
    np.testing.assert_allclose(np.linalg.norm(size * score) / np.linalg.norm(np.sqrt(2 * size) * z), 0.16, rtol=1e-4)


def test_langevin_runs_from_pure_noise_to_the_data_and_counts():
    grid = grids.uniform(processes.flow(), 5)
    out = diffjax.sample(KEY, MIXTURE, modifiers.langevin(solvers.heun(), steps=3), grid, (2,))
    assert np.all(np.isfinite(out.x)) and out.nfe == 5 * 5
    gapped = grids.time_travel(grid, 2, 2)
    assert np.all(np.isfinite(diffjax.sample(KEY, MIXTURE, modifiers.langevin(solvers.ddim()), gapped, (2,)).x))


# --- doubling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [solvers.ddim(), solvers.heun(), solvers.midpoint()], ids=repr)
def test_doubling_estimates_the_error_and_extrapolation_gains_an_order(solver, x64):
    process = processes.vp()
    exact = oracles.gaussian(np.array([0.5, -0.2]), np.array([0.6, 0.05]))

    def local(h, extrapolate=False):
        ends = process.level(half_log_snr=np.array([0.2, 0.2 + h])).time
        doubled = modifiers.doubled(solver, extrapolate)
        row = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), doubled.plan(grids.times(process, ends)))
        x = jnp.asarray(START)
        out, _, info = doubled.step((), exact, x, doubled.init(x), row)
        return np.abs(out - exact.flow(x, row.t, row.s)).max(), np.abs(info.error).max()

    errors, estimates = zip(*(local(h) for h in (0.08, 0.02)), strict=True)
    np.testing.assert_allclose(np.divide(estimates, errors), 1.0, atol=0.1)
    better = [local(h, True)[0] for h in (0.08, 0.02)]
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]) / 2, solver.order + 1, atol=0.2)
    assert np.log2(better[0] / better[1]) / 2 > solver.order + 1.65
    grid = grids.uniform(process, 6)
    out = _run(exact, modifiers.doubled(solver), grid)
    assert np.all(np.isfinite(out.x)) and out.nfe == 6 * 3 * solver.calls


# --- time-condition sharing -----------------------------------------------------------------------------------------


@pytest.mark.paper("Eliminating Lipschitz Singularities in Diffusion Models")
def test_shared_times_are_piecewise_constant_below_the_boundary_only():
    process = processes.shared_time(processes.ddpm(), boundary=100.0, intervals=5)
    told = lambda k: process.network_time(process.level(np.asarray(k) + 1.0))
    np.testing.assert_array_equal(told([0.0, 7.0, 19.9, 20.0, 59.0, 99.9]), [0, 0, 0, 20, 40, 80])
    np.testing.assert_array_equal(told([100.0, 101.0, 999.0]), [100, 101, 999])
    a, b = process.level(np.arange(1.0, 1001.0)), processes.ddpm().level(np.arange(1.0, 1001.0))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
    assert float(jax.grad(lambda t: process.network_time(process.level(t)))(30.0)) == 0.0


@pytest.mark.paper("Eliminating Lipschitz Singularities in Diffusion Models")
def test_shared_times_remove_the_singularity_of_the_noise_estimate(x64):
    # the exact noise estimate has a derivative in time that grows without bound near 0; a network that is told shared
    # times has none, in training (the same prediction object) and in sampling
    process = processes.vp()
    data = oracles.gaussian(0.0, 1.0)

    def network(params, x, t, condition):
        level = process.level(jnp.maximum(t, 1e-8))
        return (x - level.alpha * data(x, level)) / level.sigma

    def slope(process, time):
        predict = diffjax.predictions.noise(process)
        eps = lambda t: predict.network(network, (), jnp.asarray(1.0), process.level(t))
        return abs(float(jax.grad(eps)(time)))

    shared = processes.shared_time(process, boundary=0.1, intervals=5)
    plain = [slope(process, t) for t in (5e-4, 5e-6, 5e-8)]
    assert plain[1] > 3 * plain[0] and plain[2] > 3 * plain[1]
    assert [slope(shared, t) for t in (5e-4, 5e-6, 5e-8)] == [0.0, 0.0, 0.0]
    assert slope(shared, 0.3) == slope(process, 0.3) > 0


# --- all together ---------------------------------------------------------------------------------------------------


def test_transformations_compose_forward_what_they_wrap_and_recompile_nothing():
    process = processes.vp()
    prediction = diffjax.predictions.velocity(process)
    network = lambda params, x, t, condition: params * x + condition
    denoise = prediction.decode(network, jnp.asarray(0.1), condition=jnp.asarray(0.2))
    guided = diffjax.guidance.classifier_free(denoise, null=0.0, scale=2.0)
    grid = grids.uniform(process, 5)
    wrapped = corrections.thresholded(corrections.epsilon_scaled(guided, 1.01))
    assert _run(wrapped, solvers.heun(), grid).nfe == 2 * 10
    np.testing.assert_allclose(wrapped.condition, 0.2)
    dual = corrections.clipped(corrections.dualfast(guided))
    assert _run(dual, solvers.ddim(), grid).nfe == 2 * 5
    with pytest.raises(ValueError, match="does not determine"):
        noise = diffjax.predictions.noise(processes.flow()).decode(network, 0.1, condition=0.0)
        _run(corrections.clipped(noise), solvers.ddim(), grids.uniform(processes.flow(), 3))
    from diffjax.samplers import sequential

    before = sequential._compiled._cache_size()
    _run(corrections.thresholded(corrections.epsilon_scaled(guided, 1.07), 0.9), solvers.heun(), grid)
    assert sequential._compiled._cache_size() == before
    scale = jax.grad(lambda c: _run(corrections.epsilon_scaled(denoise, c), solvers.ddim(), grid).x.sum())(1.01)
    assert np.isfinite(scale) and scale != 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: corrections.clipped(MIXTURE, 1.0, 1.0),
        lambda: corrections.thresholded(MIXTURE, 0.0),
        lambda: corrections.thresholded(MIXTURE, 0.9, bound=2.0, maximum=1.0),
        lambda: corrections.epsilon_scaled(MIXTURE, 0.0),
        lambda: corrections.analytic_start(MIXTURE, grids.uniform(processes.vp(), 3), 4),
        lambda: corrections.analytic_start(corrections.dualfast(MIXTURE), grids.uniform(processes.vp(), 3)),
        lambda: corrections.time_shifted(MIXTURE, processes.vp(), -1.0),
        lambda: corrections.time_shifted(MIXTURE, processes.vp(), 0.1, points=4),
        lambda: corrections.dualfast(MIXTURE, -0.1),
        lambda: corrections.dualfast(MIXTURE, reference="last"),
        lambda: corrections.dualfast(corrections.dualfast(MIXTURE)),
        lambda: modifiers.langevin(solvers.ddim(), steps=0),
        lambda: modifiers.langevin(solvers.ddim(), snr=-1.0),
        lambda: modifiers.doubled(solvers.ddim(0.5)),
        lambda: modifiers.doubled(solvers.dpmpp()),
        lambda: processes.shared_time(processes.vp(), 0.0),
        lambda: processes.shared_time(processes.vp(), 0.1, 0),
        lambda: processes.scaled_time(processes.vp(), 0.0),
    ],
)
def test_refusals(call):
    with pytest.raises(ValueError):
        call()
