"""Processes: schedules against their definitions and derivatives, SDEs against exact moments and the exact flow."""

from __future__ import annotations

import math

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import oracles, processes
from diffjax.levels import squared_diffusion

CUSTOM = processes.gaussian(lambda t: jnp.cos(0.5 * jnp.pi * t) ** 2, lambda t: jnp.sin(0.5 * jnp.pi * t) ** 2)
PROCESSES = {
    "vp": processes.vp(),
    "vp_steep": processes.vp(0.5, 30.0),
    "sub_vp": processes.sub_vp(),
    "cosine": processes.cosine(),
    "flow": processes.flow(),
    "edm": processes.edm(10.0),
    "ve": processes.ve(),
    "ddpm": processes.ddpm(),
    "ddpm_cosine": processes.ddpm(100, schedule="cosine"),
    "ddpm_scaled": processes.ddpm(50, 0.00085, 0.012, "scaled_linear"),
    "custom": CUSTOM,
}
EVERY = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
CLEAN = {name: p for name, p in PROCESSES.items() if name != "ve"}  # those without noise at t = 0


def inside(process, count=37):
    """Times strictly inside, none of them on a knot of a table."""
    return float(process.end) * (np.arange(count) + 0.4137) / count


# --- schedules ----------------------------------------------------------------------------------------------------

BETA_INTEGRAL = lambda t: 0.1 * t + 0.5 * 19.9 * t * t
FORMULAS = {
    "vp": (lambda t: math.exp(-0.5 * BETA_INTEGRAL(t)), lambda t: math.sqrt(-math.expm1(-BETA_INTEGRAL(t)))),
    "sub_vp": (lambda t: math.exp(-0.5 * BETA_INTEGRAL(t)), lambda t: -math.expm1(-BETA_INTEGRAL(t))),
    "cosine": (lambda t: math.cos(math.pi * t / 2), lambda t: math.sin(math.pi * t / 2)),
    "flow": (lambda t: 1 - t, lambda t: t),
    "edm": (lambda t: 1.0, lambda t: t),
    "ve": (lambda t: 1.0, lambda t: 0.01 * (50 / 0.01) ** t),
    "custom": (lambda t: math.cos(math.pi * t / 2) ** 2, lambda t: math.sin(math.pi * t / 2) ** 2),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name):
    process, (alpha, sigma) = PROCESSES[name], FORMULAS[name]
    for t in inside(process):
        level = process.level(t)
        np.testing.assert_allclose(level.alpha, alpha(t), rtol=1e-12)
        np.testing.assert_allclose(level.sigma, sigma(t), rtol=1e-12)
        np.testing.assert_allclose(level.half_log_snr, math.log(alpha(t) / sigma(t)), rtol=1e-11, atol=1e-11)


@EVERY
def test_level_is_consistent(process):
    """half_log_snr is log(alpha / sigma), also in JAX, and decreases."""
    times = inside(process)
    level = process.level(times)
    np.testing.assert_allclose(level.half_log_snr, np.log(level.alpha / level.sigma), rtol=1e-9, atol=1e-10)
    assert np.all(np.diff(level.half_log_snr) < 0)
    with jax.enable_x64(True):
        traced = jax.jit(process.level)(jnp.asarray(times))
    for a, b in zip(traced, level, strict=True):
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


@EVERY
def test_rates(process):
    """alpha', sigma' and sigma sigma' are the derivatives of alpha, sigma and sigma^2 / 2."""
    times, schedule = inside(process), process.schedule
    step = 1e-6 * float(process.end)
    difference = lambda f: (f(times + step) - f(times - step)) / (2 * step)
    scale = 1 / float(process.end)
    np.testing.assert_allclose(schedule.alpha_rate(times), difference(schedule.alpha), rtol=1e-6, atol=1e-8 * scale)
    np.testing.assert_allclose(schedule.sigma_rate(times), difference(schedule.sigma), rtol=1e-6, atol=1e-8 * scale)
    half_variance = lambda t: 0.5 * schedule.sigma(t) ** 2
    np.testing.assert_allclose(schedule.variance_rate(times), difference(half_variance), rtol=1e-6, atol=1e-8 * scale)
    with jax.enable_x64(True):
        for value, rate in (("alpha", "alpha_rate"), ("sigma", "sigma_rate")):
            function = getattr(schedule, value)
            _, automatic = jax.jvp(function, (jnp.asarray(times),), (jnp.ones(len(times)),))
            np.testing.assert_allclose(automatic, getattr(schedule, rate)(times), rtol=1e-9, atol=1e-11)


@EVERY
def test_inverse(process):
    """time(half_log_snr(t)) = t, in NumPy, in float32 JAX, and with the right derivative."""
    times, schedule = inside(process), process.schedule
    np.testing.assert_allclose(schedule.time(schedule.half_log_snr(times)), times, rtol=1e-9)
    level = process.level(half_log_snr=np.array([-0.5, 0.0, 1.3]))
    np.testing.assert_allclose(level.half_log_snr, [-0.5, 0.0, 1.3], atol=1e-9)
    single = schedule.time(schedule.half_log_snr(jnp.asarray(times, jnp.float32)))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, times, rtol=3e-4)
    with jax.enable_x64(True):
        targets = jnp.asarray(schedule.half_log_snr(times))
        one = jnp.ones(len(times))
        _, slopes = jax.jvp(schedule.time, (targets,), (one,))
        _, direct = jax.jvp(schedule.half_log_snr, (jnp.asarray(times),), (one,))
    np.testing.assert_allclose(slopes * direct, 1.0, rtol=1e-6)


@pytest.mark.parametrize("process", CLEAN.values(), ids=CLEAN)
def test_data_end(process):
    level = process.level(0.0)
    assert (float(level.alpha), float(level.sigma), float(level.half_log_snr)) == (1.0, 0.0, np.inf)
    single = jax.jit(process.level)(jnp.float32(0.0))
    assert (float(single.alpha), float(single.sigma), float(single.half_log_snr)) == (1.0, 0.0, np.inf)
    assert float(process.schedule.time(np.inf)) == pytest.approx(0.0, abs=1e-12 * float(process.end))
    if process is not CUSTOM:
        assert np.isfinite(process.schedule.variance_rate(0.0))


@pytest.mark.parametrize("process", [processes.flow(), processes.cosine()], ids=repr)
def test_noise_end(process):
    level = process.level(1.0)
    assert (float(level.alpha), float(level.sigma), float(level.half_log_snr)) == (0.0, 1.0, -np.inf)
    single = jax.jit(process.level)(jnp.float32(1.0))
    assert (float(single.alpha), float(single.sigma), float(single.half_log_snr)) == (0.0, 1.0, -np.inf)
    assert float(process.schedule.time(-np.inf)) == 1.0


@EVERY
def test_single_precision(process):
    """sigma and the half-log-SNR keep their float32 precision near the data."""
    times = float(process.end) * np.array([1e-6, 1e-5, 1e-4, 1e-3, 1e-2], np.float32)
    single = jax.jit(process.level)(jnp.asarray(times))
    double = process.level(times.astype(np.float64))
    # the custom process is evaluated as written: sin^2 and cos^2 are as good
    np.testing.assert_allclose(single.sigma, double.sigma, rtol=2e-6)
    np.testing.assert_allclose(single.half_log_snr, double.half_log_snr, rtol=2e-6)


def test_cosine_table():
    """The cumulative products of the cosine table are f(k) / f(0) where betas are not clipped."""
    process = processes.ddpm(200, schedule="cosine")
    k = np.arange(1, 195)
    f = lambda t: np.cos((t / 200 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(process.level(k.astype(float)).alpha ** 2, f(k) / f(0), rtol=1e-10)
    last = process.level(np.array([199.0, 200.0])).alpha ** 2
    assert last[1] / last[0] == pytest.approx(1 - 0.999)


def test_linear_table():
    """At integers the table is the textbook's cumulative product; in between it is monotone and continuous."""
    process = processes.ddpm()
    product = 1.0
    for k, beta in enumerate(np.linspace(1e-4, 0.02, 1000)):
        product *= 1 - beta
        if k % 97 == 0 or k == 999:
            level = process.level(float(k + 1))
            assert level.alpha == pytest.approx(math.sqrt(product), rel=1e-12)
            assert level.sigma == pytest.approx(math.sqrt(1 - product), rel=1e-12)
    assert float(process.network_time(process.level(37.0))) == 36.0
    around = process.level(np.array([4 - 1e-9, 4.0, 4 + 1e-9])).alpha
    assert np.ptp(around) < 1e-11


def test_scaled_linear_table():
    betas = 1 - np.diff(np.log(processes.ddpm(50, 0.00085, 0.012, "scaled_linear").level(np.arange(51.0)).alpha))
    roots = np.sqrt(1 - np.exp(2 * (1 - betas)))
    np.testing.assert_allclose(roots, np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 50), rtol=1e-9)


def test_custom_equals_built_in(x64):
    """A process given by two functions is the built-in one with the same formulas."""
    custom = processes.gaussian(lambda t: 1 - t, lambda t: t)
    flow, times = processes.flow(), inside(processes.flow())
    for name in ("alpha", "sigma", "half_log_snr", "alpha_rate", "sigma_rate", "variance_rate"):
        for t in (times, jnp.asarray(times)):
            a, b = getattr(custom.schedule, name)(t), getattr(flow.schedule, name)(t)
            assert isinstance(a, np.ndarray) == isinstance(t, np.ndarray)
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_trailing_axes():
    level = processes.vp().level(np.array([0.1, 0.5]), trailing=2)
    assert level.time.shape == (2,) and level.alpha.shape == level.sigma.shape == level.half_log_snr.shape == (2, 1, 1)


# --- SDEs ---------------------------------------------------------------------------------------------------------


@EVERY
def test_moment_equations(process):
    """dm/dt = f m and dv/dt = 2 f v + g^2, integrated, give alpha and sigma^2: f and g are those of the process."""
    low, high = 0.02 * float(process.end), 0.9 * float(process.end)
    sde = process.sde()

    # a table's rates jump at its knots: whole steps between them
    knots = process.end if hasattr(process.schedule, "network_time") else 1
    per_knot = max(2, int(2000 / float(knots)))
    edges = np.arange(math.ceil(low), math.floor(high) + 1.0) if knots > 1 else np.array([low, high])
    m, v = (float(z) for z in (process.level(edges[0]).alpha, process.level(edges[0]).sigma ** 2))
    h = (edges[1] - edges[0]) / per_knot
    starts = (edges[:-1, None] + h * np.arange(per_knot)).reshape(-1)
    nodes = starts[:, None] + h * np.array([1e-9, 0.5, 1 - 1e-9])  # just inside every step
    drift, squared = sde.drift(np.float64(1.0), nodes), sde.diffusion(None, nodes) ** 2
    for (f0, f1, f2), (g0, g1, g2) in zip(drift.tolist(), squared.tolist(), strict=True):
        rates = lambda f, g, y: np.array([f * y[0], 2 * f * y[1] + g])
        y = np.array([m, v])
        k1 = rates(f0, g0, y)
        k2 = rates(f1, g1, y + h / 2 * k1)
        k3 = rates(f1, g1, y + h / 2 * k2)
        k4 = rates(f2, g2, y + h * k3)
        m, v = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    end = process.level(edges[-1])
    assert m == pytest.approx(float(end.alpha), rel=1e-6, abs=1e-9)
    assert v == pytest.approx(float(end.sigma) ** 2, rel=1e-6)


def test_published_diffusions():
    """The diffusion coefficients of the paper: VP beta, sub-VP beta (1 - exp(-2 B)), VE d sigma^2 / dt."""
    for t in (0.1, 0.5, 0.93):
        beta = 0.1 + 19.9 * t
        assert squared_diffusion(processes.vp().schedule, t) == pytest.approx(beta, rel=1e-12)
        assert processes.vp().sde().drift(2.0, t) == pytest.approx(-beta, rel=1e-12)
        expected = beta * (1 - math.exp(-2 * BETA_INTEGRAL(t)))
        assert squared_diffusion(processes.sub_vp().schedule, t) == pytest.approx(expected, rel=1e-12)
        sigma = 0.01 * 5000**t
        assert squared_diffusion(processes.ve().schedule, t) == pytest.approx(2 * sigma**2 * math.log(5000), rel=1e-12)
        assert squared_diffusion(processes.edm().schedule, t) == pytest.approx(2 * t, rel=1e-12)


ORACLE = oracles.gaussian(np.array([0.5, -0.3]), np.array([[0.8, 0.3], [0.3, 0.4]]))
FLOWS = {name: PROCESSES[name] for name in ("vp", "sub_vp", "cosine", "flow", "edm", "ve", "custom")}


@pytest.mark.parametrize("process", FLOWS.values(), ids=FLOWS)
@pytest.mark.parametrize("eta", [None, 0.0], ids=["probability_flow", "reverse_sde"])
def test_flow_with_diffrax(process, eta, x64):
    """diffrax on the probability-flow ODE, or on the drift of the reverse SDE at eta = 0, meets the exact flow."""
    t, s = (process.level(u * float(process.end)) for u in (0.85, 0.05))
    if eta is None:
        velocity = process.probability_flow(ORACLE)
    else:
        sde = process.reverse_sde(ORACLE, eta)
        velocity = sde.drift
        assert float(sde.diffusion(jnp.zeros(2), jnp.asarray(0.5))) == 0.0

    @jax.jit
    def solve(x):
        term = diffrax.ODETerm(lambda t, x, args: velocity(x, t))
        tolerance = diffrax.PIDController(rtol=1e-8, atol=1e-10)
        times = {"t0": float(t.time), "t1": float(s.time), "dt0": None}
        return diffrax.diffeqsolve(term, diffrax.Tsit5(), **times, y0=x, stepsize_controller=tolerance).ys[-1]

    x = jnp.array([1.2, -0.7]) * t.sigma
    np.testing.assert_allclose(solve(x), ORACLE.flow(x, t, s), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("eta", [0.6, 1.0])
def test_reverse_sde_with_diffrax(eta):
    """diffrax on the reverse SDE, run in the time that is left, ends in the exact Gaussian marginal."""
    process, count = processes.vp(), 8192
    t, s = process.level(0.8), process.level(0.2)
    sde = process.reverse_sde(ORACLE, eta)

    @jax.jit
    @jax.vmap
    def draw(key):
        start, path = jax.random.split(key)
        brownian = diffrax.UnsafeBrownianPath(shape=(2,), key=path)
        noise = lambda u, x, args: diffrax_diagonal(sde.diffusion(x, 0.8 - u))
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda u, x, args: -sde.drift(x, 0.8 - u)), diffrax.ControlTerm(noise, brownian)
        )
        x = ORACLE.sample(start, t)
        return diffrax.diffeqsolve(
            terms, diffrax.Euler(), 0.0, 0.6, 0.6 / 150, x, adjoint=diffrax.DirectAdjoint(), max_steps=151
        ).ys[-1]

    x = np.asarray(draw(jax.random.split(jax.random.key(0), count)), np.float64)
    covariance = s.alpha**2 * np.array([[0.8, 0.3], [0.3, 0.4]]) + s.sigma**2 * np.eye(2)
    # five standard errors of a mean and of a variance, and the bias of 150 Euler steps
    np.testing.assert_allclose(x.mean(0), s.alpha * np.array([0.5, -0.3]), atol=5 / math.sqrt(count) + 0.01)
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.04)


def diffrax_diagonal(scale):
    return scale * jnp.eye(2)


def test_forward_sde_with_diffrax():
    """diffrax on the forward SDE takes one point to N(alpha x_0, sigma^2 I)."""
    process, count = processes.vp(), 8192
    sde, end = process.sde(), process.level(0.5)

    @jax.jit
    @jax.vmap
    def draw(key):
        brownian = diffrax.UnsafeBrownianPath(shape=(2,), key=key)
        noise = lambda t, x, args: diffrax_diagonal(sde.diffusion(x, t))
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, x, args: sde.drift(x, t)), diffrax.ControlTerm(noise, brownian)
        )
        x = jnp.array([1.5, -1.0])
        return diffrax.diffeqsolve(
            terms, diffrax.Euler(), 0.0, 0.5, 0.005, x, adjoint=diffrax.DirectAdjoint(), max_steps=101
        ).ys[-1]

    x = np.asarray(draw(jax.random.split(jax.random.key(1), count)), np.float64)
    np.testing.assert_allclose(
        x.mean(0), end.alpha * np.array([1.5, -1.0]), atol=5 * end.sigma / math.sqrt(count) + 0.01
    )
    np.testing.assert_allclose(np.cov(x.T), end.sigma**2 * np.eye(2), atol=0.05)


def test_prior():
    process = processes.edm(7.0)
    draw = process.prior(jax.random.key(0), (20_000,))
    assert draw.dtype == jnp.float32 and abs(float(draw.std()) / 7 - 1) < 0.03
    again = process.prior(jax.random.key(0), (20_000,), level=process.level(3.5))
    np.testing.assert_allclose(again, draw / 2, rtol=1e-6)


@pytest.mark.parametrize("make", [processes.vp, processes.sub_vp])
def test_float32_holds_far_into_the_noise(make):
    """Where exp(B) overflows float32 the half-log-SNR is still -B / 2, and its inverse still finds the time."""
    process = make(0.1, 400.0)
    far = jnp.float32(1.0)
    found = process.schedule.half_log_snr(far)
    np.testing.assert_allclose(found, process.schedule.half_log_snr(1.0), rtol=1e-6)
    np.testing.assert_allclose(process.schedule.time(found), 1.0, rtol=1e-5)
