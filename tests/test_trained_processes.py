"""Processes of the literature with small trained networks, where other tests have exact denoisers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import diffjax
from diffjax import coordinates, data, grids, networks, nongaussian, predictions, processes, solvers, training

pytestmark = pytest.mark.slow


def fit(loss, params, draw, steps=400, rate=4e-3):
    """The averaged parameters after ``steps`` of Adam on batches ``draw(key)``, in one compiled loop."""
    optimiser = training.adam(rate, warmup=20, steps=steps)
    update = training.update(loss, optimiser, training.ema.warmed(0.98))
    body = lambda state, key: (update(state, draw(key))[0], None)
    state = training.init(jax.random.key(0), params, optimiser)
    return jax.jit(lambda s: jax.lax.scan(body, s, jax.random.split(jax.random.key(1), steps))[0].ema)(state)


def mlp(size, seed=0, **settings):
    return networks.functional(networks.MLP(size, rngs=nnx.Rngs(seed), **settings))


@functools.cache
def digits(split):
    return np.asarray(data.load("digits", split).arrays().x0, np.float32).reshape(-1, 64)


def apart(made, split="test"):
    """The energy distance of images to the held-out ones."""
    return float(nongaussian.energy_prior(jnp.asarray(made).reshape(-1, 64), jnp.asarray(digits(split))))


def pick(points):
    points = jnp.asarray(points)
    return lambda key, count=128: points[jax.random.randint(key, (count,), 0, len(points))]


# --- the simplex --------------------------------------------------------------------------------------------------


@pytest.mark.paper("Dirichlet Diffusion Score Model for Biological Sequence Generation")
def test_a_network_learns_the_score_on_the_simplex():
    """Three letters with unequal frequencies: denoising score matching on fractions, weighted by g^2, and samples."""
    weights, line = np.array([0.5, 0.3, 0.2]), np.linspace(0.0, 1.0, 257)
    line = 0.5 * (line[1:] + line[:-1])
    times = np.geomspace(0.08, 4.0, 24)
    process = nongaussian.sticks(3)
    grid = jnp.asarray(np.stack([line, line], -1), jnp.float32)
    ratio = jax.jit(jax.vmap(lambda t, s: process.ratio(grid, jnp.full((256, 2), s), t), (0, None)))
    both = np.stack([np.asarray(ratio(jnp.asarray(times, jnp.float32), s)) for s in (0.0, 1.0)])
    both = np.maximum(both, 1e-3)  # (start, time, line, 2); below that the series has no digits in single precision
    stationary = np.stack([np.full(256, 1 / 256), np.full(256, 1 / 256)], -1)
    stationary[:, 0] = 2 * (1 - line) / 256  # Beta(1, 2) and Beta(1, 1)
    mass = np.cumsum(both * stationary, axis=2)
    mass = jnp.asarray(mass / mass[:, :, -1:], jnp.float32)
    slope = jnp.asarray(np.gradient(np.log(both), line, axis=2), jnp.float32)
    uniform = jnp.asarray(np.cumsum(stationary, 0), jnp.float32)
    starts = jnp.asarray(np.nan_to_num(nongaussian.broken(np.eye(3)), nan=-1.0), jnp.float32)
    apply, params = mlp(2, width=64, depth=1, time_scale=10.0)
    gradient = lambda p: lambda v, t: apply(p, 2 * v - 1, jnp.log(t)) / t

    def draw(key):
        which, when, where = jax.random.split(key, 3)
        start = starts[jax.random.choice(which, 3, (256,), p=jnp.asarray(weights))]
        time, u = jax.random.randint(when, (256,), 0, 24), jax.random.uniform(where, (256, 2))

        def one(start, time, u):
            index = (start > 0.5).astype(int)
            table = jnp.where(start[:, None] < 0, uniform.T, mass[index, time, :, jnp.arange(2)])
            place = jnp.clip(jnp.sum(table < u[:, None], 1), 0, 255)
            target = jnp.where(start < 0, 0.0, slope[index, time, place, jnp.arange(2)])
            return jnp.asarray(line, jnp.float32)[place], jnp.asarray(times, jnp.float32)[time], target

        return jax.vmap(one)(start, time, u)

    def loss(p, key, v, t, target):
        off = jax.vmap(gradient(p))(v, t) - target
        return t * jnp.sum(v * (1 - v) * off**2, -1)

    found = fit(loss, params, draw, 800)
    walk = np.geomspace(4.0, 0.08, 101)
    run = lambda key: nongaussian.reverse_jacobi(key, process, gradient(found), walk, (2,)).x
    x = np.asarray(nongaussian.joined(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(2), 2000))))
    assert x.min() >= 0 and np.allclose(x.sum(1), 1, atol=1e-5)
    assert np.mean(x.max(1) > 0.7) > 0.75
    assert np.all(np.abs(np.bincount(x.argmax(1), minlength=3) / 2000 - weights) < 0.07)


# --- functions ----------------------------------------------------------------------------------------------------


SPECTRUM = np.array([1.0, 0.5, 0.25, 0.125])
MODES = coordinates.dct((0,))


def functional_on(points, end):
    k = np.arange(points)
    return processes.functional(1.0 + 0.2 * k, points / (1.0 + k**2), end=end)


def on_functional(points, end, denoise, z, steps=60):
    """Reverse samples from standard normal modes z (N, modes), the others 0, as coefficients of the function."""
    process = functional_on(points, end)
    level, grid = process.level(end), grids.times(process, end * np.linspace(1, 0, steps + 1) ** 2)
    start = jnp.asarray(level.sigma, z.dtype) * jnp.pad(z, ((0, 0), (0, points - z.shape[1])))

    def run(z):
        x = diffjax.sample(jax.random.key(0), denoise, solvers.dpmpp(), grid, x=process.coordinates.leave(z)).x
        return MODES.enter(x) / points**0.5

    return np.asarray(jax.jit(jax.vmap(run))(start))


@pytest.mark.paper("Continuous-Time Functional Diffusion Processes")
def test_functions_have_one_law_on_every_grid(x64):
    """A Gaussian process with four cosines and its exact denoiser on 16 and on 40 points: one map of coefficients.

    What is left of each variance is the solver's error and, where the process ends early, the data's share of the
    state at the end, alpha^2 = exp(-2 rate end), which a sampler does not start with: neither knows the grid.
    """
    found = {}
    for end, points in ((4.0, 16), (4.0, 40), (1.5, 16), (1.5, 40)):
        power = jnp.pad(jnp.asarray(SPECTRUM * (1.0 + np.arange(4) ** 2)), (0, points - 4))  # of the modes / noise's
        share = lambda level, power=power: level.alpha * power / (level.alpha**2 * power + level.sigma**2)
        denoise = lambda z, level, share=share: share(level) * z
        gains = on_functional(points, end, denoise, jnp.eye(6))[:, :6]
        assert np.abs(gains - np.diag(np.diag(gains))).max() < 1e-12
        found[end, points] = np.diag(gains)[:4] ** 2 / SPECTRUM
    for end in (4.0, 1.5):
        np.testing.assert_allclose(found[end, 16], found[end, 40], rtol=1e-9)
    np.testing.assert_allclose(found[4.0, 40], 1.0, atol=0.01)
    np.testing.assert_allclose(found[1.5, 40], 1 - np.exp(-3.0 * (1 + 0.2 * np.arange(4))), atol=0.01)


@pytest.mark.paper("Continuous-Time Functional Diffusion Processes")
def test_a_coordinate_network_is_trained_on_one_grid_and_sampled_on_another():
    """A Gaussian process with four cosines: covariance on 40 points of a network that has seen 16.

    On both grids the same noise becomes the same function, to float precision, so that what is wrong with the
    covariance (at most a fifth) is the network's fit on 16 points and the 5 % of the early end, nothing of the grid's.
    """
    network, params = mlp(6, width=64, depth=1, output=6, time_scale=10.0)

    def apply(p, x, t, condition=None):
        """Noisy context in, the weights of the last layer out; that layer is a function of the coordinate."""
        count = x.shape[0]
        context = MODES.enter(x)[:6] / count**0.5
        place = (jnp.arange(count) + 0.5) / count
        return network(p, context, t) @ jnp.cos(jnp.pi * jnp.arange(6.0)[:, None] * place)

    def draw(key, points=16):
        z = jax.random.normal(key, (256, 4)) * jnp.sqrt(points * jnp.asarray(SPECTRUM))
        return jax.vmap(MODES.leave)(jnp.pad(z, ((0, 0), (0, points - 4)))), None

    loss = training.denoising(predictions.data(functional_on(16, 1.5)), apply)
    found = fit(loss, params, draw, 1200)
    z = jax.random.normal(jax.random.key(3), (2000, 6))
    seen, other = (
        on_functional(points, 1.5, predictions.data(functional_on(points, 1.5)).decode(apply, found), z)
        for points in (16, 40)
    )
    np.testing.assert_allclose(other[:, :6], seen[:, :6], atol=1e-4)
    k, place = np.arange(40)[:, None], (np.arange(40) + 0.5) / 40
    cosines = np.where(k == 0, 1.0, np.sqrt(2.0)) * np.cos(np.pi * k * place)
    exact = cosines[:4].T @ (SPECTRUM[:, None] * cosines[:4])
    x = other @ cosines
    assert np.abs(np.cov(x.T) - exact).max() < 0.2 * exact.max()
    assert np.abs(np.cov(x.T) - exact).mean() < 0.07 * exact.max()


# --- a first guess ------------------------------------------------------------------------------------------------


@pytest.mark.paper("DiffuseVAE: Efficient, Controllable and High-Fidelity Generation from Low-Dimensional Latents")
def test_ten_steps_behind_a_vae():
    """Digits: form 2 behind a VAE of 8 numbers, in ten steps, against ten steps of an unconditional DDIM."""
    encoder, down = mlp(64, seed=1, width=96, depth=1, output=16)
    decoder, up = mlp(8, seed=2, width=96, depth=1, output=64)

    def elbo(p, key, x):
        code = jax.vmap(lambda x: encoder(p["down"], x, 0.0))(x)
        mean, log_std = code[:, :8], jnp.clip(code[:, 8:], -4, 2)
        latent = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        off = jax.vmap(lambda c: decoder(p["up"], c, 0.0))(latent) - x
        relative = 0.5 * jnp.sum(mean**2 + jnp.exp(2 * log_std) - 1 - 2 * log_std, -1)
        return jnp.sum(off**2, -1) / (2 * 0.25**2) + relative

    chosen = pick(digits("train"))
    vae = fit(elbo, {"down": down, "up": up}, lambda key: (chosen(key),), 600)
    encode = jax.jit(jax.vmap(lambda x: encoder(vae["down"], x, 0.0)[:8]))
    decode = jax.jit(jax.vmap(lambda code: decoder(vae["up"], code, 0.0)))
    guesses = decode(encode(digits("train")))
    base = processes.cosine()
    refiner, first = mlp(128, seed=3, width=192, depth=2, output=64)
    plain, second = mlp(64, seed=4, width=192, depth=2)
    # in standard coordinates form 2 is the plain process, so that only the condition is told
    told = lambda p, x, t, guess: refiner(p, jnp.concatenate([x, guess]), t)
    loss = training.denoising(predictions.velocity(base), told)
    pairs = jnp.concatenate([digits("train"), guesses], 1)
    two = lambda key: (lambda both: (both[:, :64], both[:, 64:]))(pick(pairs)(key))
    refined = fit(loss, first, two, 900, 3e-3)
    alone = fit(training.denoising(predictions.velocity(base), plain), second, lambda k: (chosen(k), None), 900, 3e-3)
    codes = np.asarray(encode(digits("train")))
    fresh = np.random.default_rng(0).multivariate_normal(codes.mean(0), np.cov(codes.T), 297)
    start = decode(jnp.asarray(fresh, jnp.float32))
    times = np.linspace(1, 0, 11)

    @jax.jit
    def sample(keys, guesses):
        def behind(key, guess):
            process = processes.diffuse_vae(base, guess)
            seen = predictions.velocity(process)
            apply = lambda p, x, t, c: told(p, x - c, t, c)  # the network was trained on what is left of the guess
            denoise = seen.decode(apply, refined, condition=guess)
            return diffjax.sample(key, denoise, solvers.ddim(), grids.times(process, times), shape=(64,)).x

        denoise = predictions.velocity(base).decode(plain, alone)
        free = lambda key: diffjax.sample(key, denoise, solvers.ddim(), grids.times(base, times), shape=(64,)).x
        return jax.vmap(behind)(keys, guesses), jax.vmap(free)(keys)

    behind, free = sample(jax.random.split(jax.random.key(5), 297), start)
    distance = {"vae": apart(start), "behind": apart(behind), "free": apart(free)}
    assert distance["behind"] < distance["free"] and distance["behind"] < 0.7 * distance["vae"], distance
    # the latent controls the sample: it stays near its own guess
    near = np.linalg.norm(np.asarray(behind) - np.asarray(start), axis=1).mean()
    other = np.linalg.norm(np.asarray(behind) - np.roll(np.asarray(start), 1, 0), axis=1).mean()
    assert near < 0.8 * other


# --- a relay between resolutions -------------------------------------------------------------------------------------


@pytest.mark.paper("Relay Diffusion: Unifying diffusion process across resolutions for image synthesis")
def test_a_cascade_by_relay():
    """Digits: 4 x 4 by a flow, then 8 x 8 from the upsampled image by the relay's process, without noise to start from.

    Its samples are nearer to the held-out digits than what it starts from.
    """
    images = digits("train").reshape(-1, 8, 8)
    low = images.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)
    flow = processes.flow()
    coarse, first = mlp(16, seed=5, width=96, depth=1)
    choose = pick(low)
    small = fit(training.denoising(predictions.flow(flow), coarse), first, lambda key: (choose(key), None), 600)
    process = processes.relay(processes.edm(2.0), (8, 8), block=2, share=0.3, blur=2.0)
    fine, second = mlp(64, seed=6, width=192, depth=2, time_scale=10.0)
    apply = lambda p, x, t, condition=None: fine(p, x.reshape(64), t).reshape(8, 8)
    choose_image = pick(images)
    loss = training.denoising(predictions.data(process), apply, law=training.uniform(0.02, 1.0))
    large = fit(loss, second, lambda key: (choose_image(key), None), 900, 3e-3)
    keys = jax.random.split(jax.random.key(7), (2, 297))
    denoise = predictions.flow(flow).decode(coarse, small)
    walk = grids.uniform(flow, 20)
    run = jax.jit(jax.vmap(lambda key: diffjax.sample(key, denoise, solvers.dpmpp(), walk, shape=(16,)).x))
    made = np.asarray(run(keys[0])).reshape(-1, 4, 4).repeat(2, 1).repeat(2, 2)
    # the blurred, noised image is the start; the upsampled one stands for what the blur leaves
    begin = 1.0
    level = jax.tree.map(jnp.asarray, process.level(begin))
    relay = grids.times(process, begin * np.linspace(1, 0, 31) ** 2)
    told = predictions.data(process).decode(apply, large)

    def refine(key, image):
        noise, walk_key = jax.random.split(key)
        x = process.noised(image, jax.random.normal(noise, (8, 8)), level)
        return diffjax.sample(walk_key, told, solvers.ancestral(), relay, x=x).x

    refined = jax.jit(jax.vmap(refine))(keys[1], jnp.asarray(made))
    distance = {"upsampled": apart(made), "refined": apart(refined)}
    assert distance["refined"] < 0.6 * distance["upsampled"], distance
