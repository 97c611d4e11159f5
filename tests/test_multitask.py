"""Several kinds of data in one diffusion: image and label, against their exact joint law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import guidance, likelihood, networks, oracles, predictions, processes, solvers, training
from diffjax.grids import times
from diffjax.training.multitask import aggregation_share

# three classes, each a Gaussian of "images" in the plane; labels are encoded as vectors added to them
WEIGHTS = np.array([0.5, 0.3, 0.2])
CENTRES = np.array([[1.0, 0.0], [-0.6, 0.8], [-0.4, -0.9]])
VARIANCES = np.array([0.04, 0.09, 0.06])
CODES = np.array([[0.5, 0.5], [-0.5, 0.5], [0.0, -0.7]])
SHARE = 0.8  # of the label
LATENT = oracles.mixture(WEIGHTS, CENTRES + SHARE * CODES, VARIANCES)


def logits(z, level):
    """log p(label, z_t): the exact head of the label, up to what all classes share."""
    variance = level.alpha**2 * jnp.asarray(VARIANCES, z.dtype) + level.sigma**2
    off = z - level.alpha * jnp.asarray(CENTRES + SHARE * CODES, z.dtype)
    return jnp.log(jnp.asarray(WEIGHTS, z.dtype)) - 0.5 * jnp.sum(off**2, -1) / variance - jnp.log(variance)


def image_law(z, level, label):
    """Mean and variance of p(image | z_t, label): the exact head of the image."""
    alpha, variance = level.alpha, jnp.asarray(VARIANCES, z.dtype)[label]
    centre, code = (jnp.asarray(part, z.dtype)[label] for part in (CENTRES, SHARE * CODES))
    gain = alpha * variance / (alpha**2 * variance + level.sigma**2)
    return centre + gain * (z - alpha * (centre + code)), variance * level.sigma**2 / (
        alpha**2 * variance + level.sigma**2
    )


def draw(key, count):
    which, noise = jax.random.split(key)
    label = jax.random.choice(which, 3, (count,), p=jnp.asarray(WEIGHTS))
    spread = jnp.sqrt(jnp.asarray(VARIANCES))[label][:, None]
    return jnp.asarray(CENTRES)[label] + spread * jax.random.normal(noise, (count, 2)), label


@pytest.mark.paper("Diffusion Models for Multi-Task Generative Modeling")
def test_aggregation_is_the_chain():
    """Means of the chain step by step; all in the first step is the plain process on the aggregate."""
    betas, weights = np.array([0.1, 0.3, 0.2, 0.6]), np.array([0.7, 0.4, 0.0, 0.2])
    share, mean, variance = aggregation_share(betas, weights), 0.0, 0.0
    kept = np.cumprod(1 - betas)
    for k in range(4):
        mean, variance = np.sqrt(1 - betas[k]) * (mean + weights[k]), (1 - betas[k]) * variance + betas[k]
        np.testing.assert_allclose([np.sqrt(kept[k]) * share[k], 1 - kept[k]], [mean, variance], rtol=1e-12)
    np.testing.assert_allclose(aggregation_share(betas, np.eye(4)[0]), 1.0)
    with pytest.raises(ValueError, match="one length"):
        aggregation_share(betas, weights[:3])
    with pytest.raises(ValueError, match="as many weights"):
        training.aggregated([np.ones(2)], [1.0, 2.0])
    with pytest.raises(ValueError, match="without coordinates"):
        process = processes.shifted(processes.flow(), np.ones(2))
        nothing = lambda *arguments: ()
        training.multitask(predictions.noise(process), nothing, nothing, nothing, training.uniform(), ())


@pytest.mark.paper("Diffusion Models for Multi-Task Generative Modeling")
def test_the_bound_is_the_likelihood_of_image_and_label(x64):
    """With the exact trunk and heads the multi-task bound is -log p(image, label), sample by sample."""
    process = processes.cosine()
    x, label = draw(jax.random.key(0), 6)

    def bound(key, x, label):
        def decoder(clean, estimate, z, level):
            mean, variance = image_law(z, level, label)
            image = -jnp.sum((x - mean) ** 2) / (2 * variance) - jnp.log(2 * jnp.pi * variance)
            return image + jax.nn.log_softmax(logits(z, level))[label]

        latent = training.aggregated([x, jnp.asarray(CODES)[label]], [1.0, SHARE])
        found = likelihood.continuous_bound(key, latent, LATENT, process, stop=0.05, draws=64, decoder=decoder)
        return found.total

    keys = jax.random.split(jax.random.key(1), (6, 64))
    found = np.asarray(jax.jit(jax.vmap(jax.vmap(bound, (0, None, None))))(keys, x, label))
    density = -np.sum((x - CENTRES[label]) ** 2, 1) / (2 * VARIANCES[label]) - np.log(2 * np.pi * VARIANCES[label])
    error = 4 * found.std(1) / 8 + 2e-3
    assert np.all(np.abs(found.mean(1) + density + np.log(WEIGHTS[label])) < error)


@pytest.mark.paper("Diffusion Models for Multi-Task Generative Modeling")
def test_joint_samples_agree_and_either_part_gives_the_other():
    """Exact trunk and heads: labels as frequent as they are, images of their label, and both conditionals."""
    process = processes.flow()
    grid = times(process, np.linspace(1, 0, 41))
    twist = lambda label: training.head_twist(lambda z, level: jax.nn.log_softmax(logits(z, level))[label])

    @jax.jit
    def sample(keys):
        one = lambda key: diffjax.sample(key, LATENT, solvers.dpmpp(), grid, shape=(2,)).x
        given = lambda key: diffjax.sample(key, guidance.tilted(LATENT, twist(1)), solvers.dpmpp(), grid, shape=(2,)).x
        return jax.vmap(one)(keys), jax.vmap(given)(keys)

    joint, conditional = sample(jax.random.split(jax.random.key(2), 2000))
    level = process.level(1e-3)
    for z, label in ((joint, None), (conditional, 1)):
        said = np.asarray(jax.vmap(lambda z: jnp.argmax(logits(z, level)))(z))
        image = np.asarray(z) - SHARE * CODES[said]
        # another classifier, of the image alone
        scores = np.log(WEIGHTS) - np.sum((image[:, None] - CENTRES) ** 2, -1) / (2 * VARIANCES) - np.log(VARIANCES)
        assert np.mean(scores.argmax(1) == said) > 0.97
        if label is None:
            assert np.all(np.abs(np.bincount(said, minlength=3) / 2000 - WEIGHTS) < 4 * np.sqrt(0.25 / 2000))
            continue
        assert np.mean(said == label) > 0.98
        np.testing.assert_allclose(image[said == label].mean(0), CENTRES[label], atol=0.04)
        np.testing.assert_allclose(image[said == label].var(0), VARIANCES[label], rtol=0.2)
    # of an image that is known its own head says the label: the head's posterior is Bayes' at every level
    x, label = draw(jax.random.key(3), 4000)
    z = x + SHARE * jnp.asarray(CODES)[label]
    eps = jax.random.normal(jax.random.key(4), z.shape)
    middle = process.level(0.5)
    noisy = middle.alpha * z + middle.sigma * eps
    told = np.asarray(jax.nn.softmax(jax.vmap(lambda z: logits(z, middle))(noisy)))
    for low in (0.1, 0.4, 0.7):  # calibrated: of those it is p sure of, a share p is right
        sure = (told > low) & (told < low + 0.2)
        right = np.eye(3)[np.asarray(label)][sure]
        assert abs(right.mean() - told[sure].mean()) < 4 * np.sqrt(0.25 / sure.sum())


@pytest.mark.paper("Diffusion Models for Multi-Task Generative Modeling")
def test_a_trained_trunk_has_both_heads():
    """A small trunk with two heads: the multi-task loss teaches a latent whose samples are images of their labels."""
    from flax import nnx

    process = processes.flow()
    trunk, params = networks.functional(networks.MLP(2, width=32, depth=1, output=2 + 3, rngs=nnx.Rngs(0)))
    apply = lambda p, z, t: (trunk(p, z, t)[:2], trunk(p, z, t)[2:])
    encode = lambda p, x: training.aggregated([x["image"], jnp.asarray(CODES, jnp.float32)[x["label"]]], [1.0, SHARE])
    terms = lambda heads, x, level: (-jax.nn.log_softmax(heads)[x["label"]],)
    prediction = predictions.flow(process)
    loss = training.multitask(prediction, apply, encode, terms, training.uniform(), [0.3])
    steps, optimiser = 400, training.adam(5e-3, warmup=20, steps=400)
    update = training.update(loss, optimiser, training.ema.warmed(0.98))

    def body(state, key):
        image, label = draw(key, 128)
        return update(state, ({"image": image.astype(jnp.float32), "label": label},))[0], None

    state = training.init(jax.random.key(5), params, optimiser)
    state, _ = jax.jit(lambda s: jax.lax.scan(body, s, jax.random.split(jax.random.key(6), steps)))(state)
    denoise = prediction.decode(lambda p, z, t, condition: apply(p, z, t)[0], state.ema)
    grid = times(process, np.linspace(1, 0, 21))
    run = jax.jit(jax.vmap(lambda key: diffjax.sample(key, denoise, solvers.dpmpp(), grid, shape=(2,)).x))
    z = run(jax.random.split(jax.random.key(7), 1000))
    said = np.asarray(jax.vmap(lambda z: jnp.argmax(apply(state.ema, z, jnp.float32(0.02))[1]))(z))
    image = np.asarray(z) - SHARE * CODES[said]
    scores = np.log(WEIGHTS) - np.sum((image[:, None] - CENTRES) ** 2, -1) / (2 * VARIANCES) - np.log(VARIANCES)
    assert np.mean(scores.argmax(1) == said) > 0.9
    assert np.all(np.abs(np.bincount(said, minlength=3) / 1000 - WEIGHTS) < 0.1)
