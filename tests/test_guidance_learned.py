"""Guidance that is learned: tiny networks against closed-form tilted laws, and what biased short cuts give instead."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, guidance, oracles, predictions, processes, sample, solvers, training
from tests import tiny

PROCESS = processes.vp()
CLEAN = PROCESS.level(0.0)


def tilted(weights, means, variance, slope):
    """A mixture of isotropic Gaussians times exp(slope . x), normalised."""
    means, slope = np.asarray(means), np.asarray(slope)
    logs = np.log(weights) + means @ slope + 0.5 * variance * slope @ slope
    return oracles.mixture(np.exp(logs - logs.max()), means + variance * slope, np.full(len(weights), variance))


def draws(denoise, count, grid, shape, seed=0):
    one = lambda key: sample(key, denoise, solvers.ancestral(), grid, shape=shape).x
    return jax.vmap(one)(jax.random.split(jax.random.key(seed), count))


@pytest.mark.paper(
    "Contrastive Energy Prediction for Exact Energy-Guided Diffusion Sampling in Offline Reinforcement Learning"
)
def test_contrastive_energy_is_exact_and_the_energy_of_the_mean_is_not():
    """Learned gradient and law of the samples at two temperatures; the energy of the posterior mean is biased."""
    weights, means, variance = np.array([0.75, 0.25]), np.array([[-1.0, 0.0], [1.0, 0.4]]), 0.09
    slope = np.array([1.2, -0.5])  # E = -slope . x
    data = oracles.mixture(weights, means, np.full(2, variance))
    betas = jnp.array([0.75, 1.25])

    def network(params, x, t):
        """log sum_k r_k(x) exp(params . mean_k(x)), which is the exact f at params = beta slope."""
        level = PROCESS.level(t)
        gain = level.alpha * variance / (level.alpha**2 * variance + level.sigma**2)
        centres = means + gain * (x - level.alpha * means)
        return jax.nn.logsumexp(jnp.log(data.responsibilities(x, level)) + centres @ params)

    def fit(beta, key, group=8, normalise="batch"):
        loss = guidance.contrastive_energy(PROCESS, network, group, beta, normalise=normalise)

        def one(params, key):
            x0 = jax.vmap(data.sample)(jax.random.split(key, 1024))
            return loss(params, jax.random.fold_in(key, 1), x0, -x0 @ slope).mean()

        return tiny.train(one, jnp.zeros(2), key, 300, rate=5e-2)[0]

    learned = jax.jit(jax.vmap(fit))(betas, jax.random.split(jax.random.key(0), 2))
    paired = jax.jit(lambda: fit(betas[1], jax.random.key(0), 2, "group"))()  # the paper's softmax, of two samples
    exact = np.asarray(betas)[:, None] * slope
    assert np.all(np.linalg.norm(learned - exact, axis=1) < 0.12 * np.linalg.norm(exact, axis=1)), learned
    assert np.linalg.norm(paired) < 0.8 * np.linalg.norm(learned[1])
    grid = grids.uniform(PROCESS, 30)

    @jax.jit
    @jax.vmap
    def run(params, beta):
        right = guidance.gradient(data, guidance.energy(network, params, PROCESS))
        wrong = guidance.gradient(data, lambda x, level: beta * data(x, level) @ slope)
        levels = jax.vmap(PROCESS.level)(jnp.linspace(0.1, 0.9, 5))
        x = jax.vmap(lambda key, level: jax.vmap(lambda k: data.sample(k, level))(jax.random.split(key, 200)))(
            jax.random.split(jax.random.key(2), 5), levels
        )
        slopes = jax.vmap(lambda level, x: jax.vmap(lambda x: right.slope(x, level))(x))(levels, x)
        return draws(right, 4000, grid, (2,)), draws(wrong, 4000, grid, (2,)), x, levels, slopes

    right, wrong, x, levels, slopes = run(learned, betas)
    for k, beta in enumerate(np.asarray(betas)):
        target = tilted(weights, means, variance, beta * slope)
        share = target.weights[1]
        error = np.sqrt(share * (1 - share) / 4000)
        found, biased = np.mean(right[k, :, 0] > 0), np.mean(wrong[k, :, 0] > 0)
        level = jax.tree.map(lambda leaf, k=k: leaf[k, :, None, None], levels)
        denoised = jax.vmap(lambda x, level, target=target: jax.vmap(lambda x: (target(x, level), data(x, level)))(x))(
            x[k], jax.tree.map(lambda leaf, k=k: leaf[k], levels)
        )
        exact = level.alpha / level.sigma**2 * (denoised[0] - denoised[1])
        off = np.sqrt(np.mean((slopes[k] - exact) ** 2) / np.mean(exact**2))
        assert off < 0.1
        assert abs(found - share) < 4 * error + 0.01 and abs(biased - share) > 4 * error
        mean = target.weights @ target.means
        np.testing.assert_allclose(right[k].mean(0), mean, atol=0.1)


@pytest.mark.paper("Don't Play Favorites: Minority Guidance for Diffusion Models")
def test_ordinal_minority_classifier_raises_the_share_of_the_rare():
    """Levels of the minority score, learned from noisy data: rare components with the level and with the scale."""
    means = np.array([[0.0, 0.0], [2.5, 0.0], [0.0, 2.5]])
    data = oracles.mixture([0.7, 0.2, 0.1], means, np.full(3, 0.09))
    keys = jax.random.split(jax.random.key(0), 1024)
    grid = grids.uniform(PROCESS, 25)

    @jax.jit
    def run():
        x0 = jax.vmap(data.sample)(keys)
        level = PROCESS.level(0.5)
        scores = jax.vmap(lambda k, x: guidance.minority_score(k, data, x, level, draws=8))(keys, x0)
        bins = guidance.bins(guidance.quantile_edges(scores, 4), scores)
        loss = guidance.bin_loss(PROCESS, tiny.apply)

        def one(params, key):
            pick = jax.random.randint(key, (256,), 0, 1024)
            return loss(params, jax.random.fold_in(key, 1), x0[pick], bins[pick]).mean()

        params, _ = tiny.train(one, tiny.init(jax.random.key(1), 2, 4), jax.random.key(2), 600)

        def rare(bin, scale):
            guided = guidance.gradient(data, guidance.bin_probability(tiny.apply, params, PROCESS, bin), scale)
            found = draws(guided, 500, grid, (2,))
            distances = jnp.linalg.norm(found[:, None] - means, axis=-1)
            return jnp.mean(distances.argmin(-1) > 0), jnp.mean(distances.min(-1) < 4 * 0.3)

        return jnp.bincount(bins, length=4), jax.vmap(rare)(jnp.array([0, 0, 3, 3]), jnp.array([0.0, 2.0, 1.0, 3.0]))

    counts, (rare, on) = run()
    assert counts.tolist() == [256] * 4
    error = np.sqrt(0.3 * 0.7 / 500)
    assert abs(rare[0] - 0.3) < 4 * error
    assert rare[1] < rare[0] - 4 * error and rare[2] > rare[0] + 4 * error and rare[3] > rare[2]
    assert on.min() > 0.95


@pytest.mark.paper("Efficient Controllable Diffusion via Optimal Classifier Guidance")
def test_optimal_classifier_comes_nearer_to_the_tilted_law_in_every_round():
    """Reward x on a mixture whose rewarded component is rare: KL to the closed-form law, and the short cut's bias."""
    weights, means, variance, eta = np.array([0.95, 0.05]), np.array([[-1.0], [1.0]]), 0.06, 2.0
    data = oracles.mixture(weights, means, np.full(2, variance))
    target = tilted(weights, means, variance, np.array([eta]))
    edges = np.linspace(-1.7, 2.1, 19)
    rewards = np.concatenate([[edges[0] - 0.1], (edges[1:] + edges[:-1]) / 2, [edges[-1] + 0.1]])
    grid = grids.uniform(PROCESS, 60)

    @jax.jit
    def fit(key, params, visits, bins, mask):
        def one(params, key):
            pick = jax.random.randint(key, (256,), 0, mask.sum().astype(int))  # what is there comes first
            x, level = jax.tree.map(lambda leaf: leaf[pick], (visits.x, visits.level))
            terms = (None, None, None, 0, 0, 0)
            return jax.vmap(guidance.cross_entropy, terms)(tiny.apply, params, PROCESS, x, level, bins[pick]).mean()

        return tiny.train(one, params, key, 600)[0]

    def learn(seed):
        return training.optimal_classifier(
            jax.random.key(seed), data, tiny.apply, tiny.init(jax.random.key(seed + 10), 1, 20), fit, lambda x0: x0[0],
            edges, rewards, solvers.ancestral(), grid, (1,), rounds=4, count=200, eta=eta,
        )  # fmt: skip

    found = [learn(seed) for seed in range(4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[r.params for rounds in found for r in rounds])

    @jax.jit
    def run(stacked):
        def guided(params):
            tilt = guidance.expected_tilt(tiny.apply, params, PROCESS, rewards, eta)
            return draws(guidance.gradient(data, tilt), 1500, grid, (1,))[:, 0]

        short = guidance.gradient(data, lambda x, level: eta * data(x, level)[0])
        return jax.lax.map(guided, stacked), draws(short, 1500, grid, (1,))[:, 0], draws(data, 1500, grid, (1,))[:, 0]

    cells = np.concatenate([[-np.inf], np.linspace(-2.0, 2.2, 22), [np.inf]])
    cdf = lambda m: 0.5 * (1 + jax.scipy.special.erf((cells - m) / np.sqrt(2 * variance)))
    q = np.asarray(np.diff(sum(w * cdf(m) for w, m in zip(target.weights, target.means[:, 0], strict=True)))) + 1e-6

    def divergence(x):
        p = np.histogram(x, cells)[0] / len(x)
        return np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / q), 0))

    guided, short, base = run(stacked)
    rounds = np.array([divergence(x) for x in guided]).reshape(4, 4).mean(0)
    short, base = divergence(short), divergence(base)
    rewarded = np.array([[float(r.reward) for r in rounds] for rounds in found]).mean(0)
    assert base > 1.0 and rounds[0] < 0.4 * base and short > 0.3
    assert rounds[2:].sum() < 0.8 * rounds[:2].sum() and rounds[3] < 0.6 * rounds[0] and rounds[3] < 0.4 * short
    assert rewarded[0] < -0.85 and rewarded[3] > rewarded[0] + 0.2
    with pytest.raises(ValueError, match="stochastic"):
        training.visits(jax.random.key(0), data, None, lambda x0: x0[0], solvers.ddim(), grid, (1,), 4)


def hidden(params, x, t, condition=None, features=False):
    """A mixture's exact denoiser as a network, whose hidden states are responsibilities and posterior means."""
    level = PROCESS.level(t)
    x0 = params(x, level)
    return (x0, jnp.concatenate([params.responsibilities(x, level), x0])) if features else x0


@pytest.mark.paper("LaCon: Late-Constraint Diffusion for Steerable Guided Image Synthesis")
def test_a_probe_of_hidden_states_steers():
    """The probe learns the posterior mean of the condition, which has a closed form; its error falls with the scale."""
    means = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    data = oracles.mixture([0.5, 0.3, 0.2], means, np.full(3, 0.2))
    denoise = predictions.data(PROCESS).decode(hidden, data)
    read = lambda params, features, t: features @ params
    loss = guidance.probe_loss(denoise, read)
    grid = grids.uniform(PROCESS, 25)

    @jax.jit
    def run():
        x0 = jax.vmap(data.sample)(jax.random.split(jax.random.key(0), 20_000))
        params = tiny.minimum(lambda p: loss(p, jax.random.key(5), x0, x0[:, 0]).mean(), jnp.zeros(5))
        steer = guidance.probe(read, params, jnp.float32(1.0))

        def off(scale):
            potential = lambda x, level: steer(denoise, x, level)[0]
            return jnp.abs(draws(guidance.gradient(denoise, potential, scale), 300, grid, (2,))[:, 0] - 1.0).mean()

        level = PROCESS.level(0.4)
        x = jax.vmap(lambda key: data.sample(key, level))(jax.random.split(jax.random.key(1), 200))
        found = jax.vmap(lambda x: read(params, hidden(data, x, 0.4, features=True)[1], 0.4))(x)
        exact = jax.vmap(lambda x: data(x, level)[0])(x)
        return found, exact, jax.vmap(off)(jnp.array([0.0, 2.0, 8.0])), steer(denoise, x[0], level)

    found, exact, off, (log_h, x0) = run()
    np.testing.assert_allclose(found, exact, atol=0.1)
    assert off[0] > off[1] + 0.1 and off[1] > off[2] + 0.1
    np.testing.assert_allclose(log_h, -0.5 * (found[0] - 1.0) ** 2, atol=1e-5)
    np.testing.assert_allclose(x0[0], exact[0], atol=1e-5)


def gaussian(params, x, t, condition):
    """The exact denoiser of N(mean, variance), the condition, entry by entry, of the flow process."""
    alpha, sigma = 1 - t, t
    mean, variance = condition
    return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)


@pytest.mark.paper("A Noise is Worth Diffusion Guidance")
def test_refined_noise_replaces_guidance():
    """Gaussians, where the refinement is affine and known: learned, low-frequency, at half the evaluations."""
    flow, size, scale = processes.flow(), 8, 2.0
    frequency = np.arange(1, size + 1)
    mean, narrow, wide = 1.5 / frequency**2, 0.6 / frequency, 1.0 / frequency
    told, null = (jnp.asarray(mean), jnp.asarray(narrow)), (jnp.zeros(size), jnp.asarray(wide))
    plain = predictions.data(flow).decode(gaussian, None, told)
    guided = guidance.classifier_free(plain, null, scale)
    grid = grids.uniform(flow, 12)
    refine = lambda params, x: x + params[0] * x + params[1]

    def ends(scale):
        """(gain, shift) of DDIM's affine map per mode, in float64."""
        gain, shift = np.ones(size), np.zeros(size)
        for t, s in zip(grid.t.time, grid.s.time, strict=True):
            a, b = 1 - t, t
            slope = lambda v, a=a, b=b: a * v / (a**2 * v + b**2)
            lean = slope(wide) + scale * (slope(narrow) - slope(wide))
            rest = scale * (mean - slope(narrow) * a * mean)
            keep, take = s / t, (1 - s) - (1 - t) * s / t
            gain, shift = (keep + take * lean) * gain, (keep + take * lean) * shift + take * rest
        return gain, shift

    (gain, shift), (base, offset) = ends(scale), ends(1.0)
    exact = np.stack([gain / base - 1, (shift - offset) / base])

    @jax.jit
    def run():
        losses = [training.noise_refinement(plain, guided, solvers.ddim(), grid, refine, kind)
                  for kind in ("exact", "truncated")]  # fmt: skip
        x = jax.random.normal(jax.random.key(0), (64, size))
        found = [tiny.minimum(lambda p: losses[0](p, jax.random.key(1), x).mean(), jnp.zeros((2, size)))]
        one = lambda params, key: losses[1](params, key, jax.random.normal(key, (32, size))).mean()
        found.append(tiny.train(one, jnp.zeros((2, size)), jax.random.key(0), 300, rate=5e-2)[0])
        z = jax.random.normal(jax.random.key(3), (size,))
        go = lambda denoise, x: sample(jax.random.key(4), denoise, solvers.ddim(), grid, x=x)
        return found, go(plain, refine(found[0], z)), go(guided, z), go(plain, z)

    found, refined, wanted, unrefined = run()
    np.testing.assert_allclose(found[0], exact, atol=5e-3)
    np.testing.assert_allclose(found[1], exact, atol=5e-3)
    np.testing.assert_allclose(refined.x, wanted.x, atol=1e-2)
    assert np.abs(unrefined.x - wanted.x).max() > 0.3
    assert int(wanted.nfe) == 2 * int(refined.nfe) == 24
    assert np.sum(exact[1, :2] ** 2) > 0.9 * np.sum(exact[1] ** 2)  # what is added is of low frequency
    with pytest.raises(ValueError, match="deterministic"):
        training.noise_refinement(plain, guided, solvers.ancestral(), grid, refine)


@pytest.mark.paper("On Distillation of Guided Diffusion Models")
def test_a_student_that_is_told_the_scale():
    """A student linear in what guidance is made of finds its coefficients; then one evaluation gives two's sample."""
    told, null = (jnp.array([0.8, -0.5]), jnp.array([0.2, 0.3])), (jnp.zeros(2), jnp.ones(2))
    flow = processes.flow()
    prediction = predictions.data(flow)
    teacher = lambda condition, scale: guidance.classifier_free(
        prediction.decode(gaussian, None, condition), null, scale
    )

    def student(params, x, t, condition):
        inner, scale = condition
        clean, free = gaussian(None, x, t, inner), gaussian(None, x, t, null)
        return params @ jnp.stack([clean, free, scale * clean, scale * free])

    loss = guidance.guidance_distillation(prediction, student, teacher, 1.0, 4.0)

    @jax.jit
    def run():
        mean, variance = (jnp.broadcast_to(leaf, (512, 2)) for leaf in told)
        x0 = mean + jnp.sqrt(variance) * jax.random.normal(jax.random.key(0), (512, 2))
        params = tiny.minimum(lambda p: loss(p, jax.random.key(2), x0, (mean, variance)).mean(), jnp.zeros(4))
        go = lambda denoise: sample(jax.random.key(1), denoise, solvers.ddim(), grids.uniform(flow, 8), shape=(2,))
        scales = jnp.array([1.0, 2.5])
        students = jax.vmap(lambda w: go(prediction.decode(student, params, (told, w))))(scales)
        return params, students, jax.vmap(lambda w: go(teacher(told, w)))(scales)

    params, students, teachers = run()
    np.testing.assert_allclose(params, [0.0, 1.0, 1.0, -1.0], atol=0.02)
    np.testing.assert_allclose(students.x, teachers.x, atol=0.03)
    assert np.abs(teachers.x[0] - teachers.x[1]).max() > 0.1
    assert students.nfe.tolist() == [8, 8] and teachers.nfe.tolist() == [16, 16]


def test_refused():
    with pytest.raises(ValueError, match="group"):
        guidance.contrastive_energy(PROCESS, tiny.apply, 1)
    with pytest.raises(ValueError, match="normalise"):
        guidance.contrastive_energy(PROCESS, tiny.apply, 2, normalise="all")
    with pytest.raises(ValueError, match="divide"):
        guidance.contrastive_energy(PROCESS, tiny.apply, 3)(None, jax.random.key(0), jnp.zeros((4, 2)), jnp.zeros(4))
    with pytest.raises(ValueError, match="low < high"):
        guidance.guidance_distillation(predictions.data(PROCESS), tiny.apply, lambda c, w: c, 2.0, 1.0)
    with pytest.raises(ValueError, match="gradient"):
        grid = grids.uniform(PROCESS, 2)
        training.noise_refinement(None, None, solvers.ddim(), grid, lambda params, x: x, "none")
    with pytest.raises(ValueError, match="network"):
        guidance.with_features(lambda x, level: x, jnp.zeros(2), CLEAN)
