"""Generation by restoration, against Gaussian posteriors and the mean-square restoration that it replaces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import multivariate_normal

from diffjax import networks, nongaussian, training

COVARIANCE = np.array([[1.0, 0.6, 0.2, 0.0], [0.6, 0.8, 0.3, 0.1], [0.2, 0.3, 1.2, 0.5], [0.0, 0.1, 0.5, 0.7]])
AVERAGE = np.kron(np.eye(2), np.full((2, 2), 0.5))
SEVERITIES = np.array([2.0, 1.0, 0.0])


def operator(x, severity):
    """Pairs of entries averaged at severity 2, all entries below."""
    return jnp.where(severity > 1.5, nongaussian.block_averages(x, 2, (0,)), x)


def noise(severity):
    return 0.5 * severity


DEGRADE = nongaussian.degradation(operator, noise)


def moments(severity):
    """Gain and covariance of x given y at a severity."""
    a = AVERAGE if severity == 2 else np.eye(4)
    total = a @ COVARIANCE @ a.T + noise(severity) ** 2 * np.eye(4)
    gain = COVARIANCE @ a.T @ np.linalg.inv(total)
    return gain, COVARIANCE - gain @ a @ COVARIANCE, total


@pytest.mark.paper("Restoration based Generative Models")
def test_restorations_that_are_drawn_keep_the_law_and_means_do_not():
    """Averages and noise, then noise, then data: exact with the posterior, too little variance with its mean."""
    parts = {severity: moments(severity) for severity in (2, 1)}
    roots = {s: np.linalg.cholesky(part[1]) for s, part in parts.items()}
    pick = lambda which, severity: jnp.where(severity > 1.5, which[2], which[1])
    gains = {s: jnp.asarray(part[0], jnp.float32) for s, part in parts.items()}
    roots = {s: jnp.asarray(root, jnp.float32) for s, root in roots.items()}
    drawn = lambda y, s, z: pick(gains, s) @ y + pick(roots, s) @ z
    mean = lambda y, s, z: pick(gains, s) @ y
    count = 6000
    x0 = jnp.asarray(np.random.default_rng(0).multivariate_normal(np.zeros(4), COVARIANCE, count), jnp.float32)
    y = jax.vmap(DEGRADE, (0, 0, None))(jax.random.split(jax.random.key(0), count), x0, 2.0)
    keys = jax.random.split(jax.random.key(1), count)
    error = 4 * np.sqrt((COVARIANCE**2 + np.outer(np.diag(COVARIANCE), np.diag(COVARIANCE))) / count)
    found = jax.jit(jax.vmap(lambda k, y: nongaussian.regenerated(k, DEGRADE, drawn, y, SEVERITIES).x))(keys, y)
    assert np.all(np.abs(np.cov(found.T) - COVARIANCE) < error)
    # the mean's law by propagation: restored, degraded, restored
    found = jax.jit(jax.vmap(lambda k, y: nongaussian.regenerated(k, DEGRADE, mean, y, SEVERITIES).x))(keys, y)
    before = parts[2][0] @ parts[2][2] @ parts[2][0].T
    again = parts[1][0] @ (before + noise(1) ** 2 * np.eye(4)) @ parts[1][0].T
    assert np.all(np.abs(np.cov(found.T) - again) < error)
    assert np.trace(again) < 0.55 * np.trace(COVARIANCE)  # 0.506 of it


@pytest.mark.paper("Restoration based Generative Models")
def test_fidelity_and_consistency(x64):
    """The fidelity is -log p(y | x) up to a constant; consistent restorations fit the measurement exactly."""
    rng = np.random.default_rng(1)
    x, other, y = rng.normal(size=(3, 4))
    exact = [multivariate_normal(AVERAGE @ v, noise(2.0) ** 2 * np.eye(4)).logpdf(y) for v in (x, other)]
    found = [DEGRADE.fidelity(jnp.asarray(v), jnp.asarray(y), 2.0) for v in (x, other)]
    np.testing.assert_allclose(found[1] - found[0], exact[0] - exact[1], rtol=1e-9)
    np.testing.assert_allclose(nongaussian.block_averages(x, 2, (0,)), AVERAGE @ x, rtol=1e-12)
    image, mask = rng.normal(size=(4, 6, 1)), rng.random((4, 6, 1)) > 0.5
    expected = image.reshape(2, 2, 3, 2, 1).mean((1, 3)).repeat(2, 0).repeat(2, 1)
    np.testing.assert_allclose(nongaussian.block_averages(image, 2), expected, rtol=1e-12)
    for project in (lambda v: nongaussian.block_averages(v, 2), lambda v: nongaussian.masked(v, mask)):
        seen = project(image)
        nearest = nongaussian.consistent(rng.normal(size=image.shape), seen, project)
        np.testing.assert_allclose(project(nearest), seen, atol=1e-12)
        np.testing.assert_allclose(nongaussian.consistent(image, seen, project), image, atol=1e-12)


def test_priors():
    """The energy distance is 0 in the mean for one law and more for two; a critic's optimum is the log-ratio."""
    a, b = (jax.random.normal(jax.random.key(k), (64, 200, 2)) for k in (0, 1))
    same = np.asarray(jax.vmap(nongaussian.energy_prior)(a, b))
    assert abs(same.mean()) < 4 * same.std() / 8
    assert np.all(np.asarray(jax.vmap(nongaussian.energy_prior)(a[:8] + 2, b[:8])) > 0.5)
    # real with density 3 times that of made: the critic's loss is least at log 3
    loss = lambda c: jnp.sum(jnp.array([0.75, 0.25]) * jnp.array([jax.nn.softplus(-c), jax.nn.softplus(c)]))
    both = lambda c: nongaussian.critic_losses(jnp.full(1, c), jnp.full(3, c))
    np.testing.assert_allclose(jax.grad(loss)(jnp.log(3.0)), 0, atol=1e-6)
    np.testing.assert_allclose(both(0.7)[1], jax.nn.softplus(-0.7) + jax.nn.softplus(0.7), rtol=1e-6)
    np.testing.assert_allclose(both(0.7)[0], -0.7, rtol=1e-6)  # softplus(-c) - softplus(c)


def test_bad_arguments():
    with pytest.raises(ValueError, match="severities must decrease"):
        nongaussian.regenerated(jax.random.key(0), DEGRADE, lambda y, s, z: y, jnp.zeros(4), np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="size must divide"):
        nongaussian.block_averages(np.zeros(3), 2, (0,))
    with pytest.raises(ValueError, match="fidelity must"):
        nongaussian.map_loss(jax.random.key(0), DEGRADE, lambda y, s, z: y, jnp.zeros((2, 4)), 1.0, 0.0, fidelity=-1.0)


CORNERS = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])


def corners(key, count):
    which, spread = jax.random.split(key)
    index = jax.random.randint(which, (count,), 0, 4)
    return jnp.asarray(CORNERS, jnp.float32)[index] + 0.1 * jax.random.normal(spread, (count, 2))


@pytest.mark.paper("Restoration based Generative Models")
def test_two_levels_are_enough_with_a_prior_and_not_with_squares():
    """The same small network and scales, trained to fit and to be data, or to the mean: two restorations each."""
    apply, params = networks.functional(networks.MLP(4, width=48, depth=1, output=2, time_scale=10.0, rngs=nnx.Rngs(0)))
    restored = lambda p: lambda y, s, z: apply(p, jnp.concatenate([y, z]), s)
    pairs, steps = ((2.0, 1.0), (1.0, 0.0)), 300

    def fitted(p, key, x0):
        levels = [nongaussian.map_loss(key, DEGRADE, restored(p), x0, s, u, fidelity=0.05) for s, u in pairs]
        return jnp.full(len(x0), sum(levels))

    def squares(p, key, x0):
        made = lambda s: jax.vmap(restored(p), (0, None, 0))(
            jax.vmap(DEGRADE, (0, 0, None))(jax.random.split(key, len(x0)), x0, s), s, jnp.zeros_like(x0)
        )
        return sum(jnp.sum((made(s) - x0) ** 2, -1) for s, _ in pairs)

    x0 = corners(jax.random.key(1), 1000)
    start = jax.vmap(DEGRADE, (0, 0, None))(jax.random.split(jax.random.key(2), 1000), x0, 2.0)
    distance = {}
    for name, loss in (("fitted", fitted), ("squares", squares)):
        update = training.update(loss, training.adam(5e-3, warmup=20, steps=steps), training.ema.warmed(0.98))
        state = training.init(jax.random.key(3), params, training.adam(5e-3, warmup=20, steps=steps))
        body = lambda state, key, update=update: (update(state, (corners(key, 128),))[0], None)
        state, _ = jax.jit(lambda s, body=body: jax.lax.scan(body, s, jax.random.split(jax.random.key(4), steps)))(
            state
        )
        still = lambda y, s, z, p=state.ema: restored(p)(y, s, 0 * z)
        go = restored(state.ema) if name == "fitted" else still
        run = lambda k, y, go=go: nongaussian.regenerated(k, DEGRADE, go, y, SEVERITIES).x
        made = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(5), 1000), start)
        distance[name] = float(nongaussian.energy_prior(made, corners(jax.random.key(6), 1000)))
    assert distance["fitted"] < 0.5 * distance["squares"] and distance["fitted"] < 0.05, distance
