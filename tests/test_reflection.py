"""Refinement in context against the exact law of a guessing game, and trained tiny."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import grids, networks, predictions, processes, smc, solvers, training
from diffjax.levels import value
from diffjax.smc import History
from tests import tiny

FLOW = processes.flow()
SIDE, NOISE = 4, 0.05
CENTRES = (np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij"), -1).reshape(-1, 2) - 1.5).astype(
    float
)
GRID = grids.uniform(FLOW, 12)


def cell(x):
    """The coordinates of the nearest cell's centre."""
    return jnp.clip(jnp.round(x + 1.5), 0, SIDE - 1) - 1.5


def judge(place):
    """An object is to be at ``place``: on which side of it the sample is, and minus how many cells off."""

    def one(x):
        gap = place - cell(x)
        return jnp.sign(gap), -jnp.sum(jnp.abs(gap))

    return one


@value
class Listening:
    """Places uniform over the cells that agree with the history, exactly."""

    condition: History

    def __call__(self, x, level):
        h = self.condition
        said = jnp.sign(CENTRES[:, None] - cell(h.x)[None])  # (cells, K, 2)
        wrong = jnp.sum(jnp.any(said != h.feedback[None], axis=-1) * h.present, axis=-1)
        c = level.alpha**2 * NOISE**2 + level.sigma**2
        logs = -30.0 * wrong - 0.5 * jnp.sum((x - level.alpha * CENTRES) ** 2, -1) / c
        means = CENTRES + level.alpha * NOISE**2 / c * (x - level.alpha * CENTRES)
        noisy = jax.nn.softmax(logs) @ means
        return jnp.where(level.sigma == 0, x, noisy)


def exact_success(rounds):
    """P(found within n rounds), n = 1 .. rounds, of uniform guesses among what agrees, by recursion over intervals."""

    @functools.cache
    def rest(a, b, n):  # the place is uniform in an a x b rectangle
        if n == 0:
            return 0.0
        total = 0.0
        for guess, place in ((g, p) for g in np.ndindex(a, b) for p in np.ndindex(a, b)):
            if guess == place:
                total += 1
                continue
            sides = [
                1 if g == p else (size - g - 1 if p > g else g) for g, p, size in zip(guess, place, (a, b), strict=True)
            ]
            total += rest(*sides, n - 1)
        return total / (a * b) ** 2

    return np.array([rest(SIDE, SIDE, n + 1) for n in range(rounds)])


def found_within(rewards):
    """The share of tasks solved within n rounds."""
    return np.mean(np.maximum.accumulate(np.asarray(rewards) == 0, axis=1), axis=0)


def play(denoise, rounds, context, count, tell=None):
    def one(key):
        place = jnp.asarray(CENTRES)[jax.random.randint(jax.random.fold_in(key, 1), (), 0, len(CENTRES))]
        options = dict(judge=judge(place), rounds=rounds, context=context, tell=tell)
        return smc.reflect(key, denoise, solvers.ddim(), GRID, (2,), **options)

    return jax.vmap(one)(jax.random.split(jax.random.key(4), count))


@pytest.fixture(scope="module")
def exact():
    blank = History(jnp.zeros((5, 2)), jnp.zeros((5, 2)), jnp.zeros(5))
    return jax.jit(lambda: play(Listening(blank), 5, 5, 600))()


@pytest.mark.paper(
    "Reflect-DiT: Inference-Time Scaling for Text-to-Image Diffusion Transformers via In-Context Reflection"
)
def test_reflection_finds_as_soon_as_the_best_listener_can(exact):
    """Success by round: that of the recursion within four standard errors, far above best-of-n."""
    wanted = exact_success(5)
    found = found_within(exact.rewards)
    error = np.sqrt(wanted * (1 - wanted) / 600) + 1e-3
    assert np.all(np.abs(found - wanted) < 4 * error + 0.01)  # 12 steps leave some samples between cells
    best_of_n = 1 - (1 - 1 / SIDE**2) ** np.arange(1, 6)
    assert np.all(found[1:] > best_of_n[1:] + 0.1) and found[3] > 0.85 > 3 * best_of_n[3]
    assert exact.nfe.tolist() == [5 * 12] * 600 and exact.failed_at.tolist() == [-1] * 600
    np.testing.assert_array_equal(exact.reward, exact.rewards.max(axis=1))
    chosen = np.argmax(exact.rewards, axis=1)
    np.testing.assert_array_equal(exact.x, np.asarray(exact.samples)[np.arange(600), chosen])


@pytest.mark.paper(
    "Reflect-DiT: Inference-Time Scaling for Text-to-Image Diffusion Transformers via In-Context Reflection"
)
def test_what_is_told_is_the_newest(x64):
    """A denoiser that adds one to its newest sample and counts how many it was told of."""

    @value
    class Counting:
        condition: History

        def __call__(self, x, level):
            return 0 * x + jnp.stack([self.condition.x[-1, 0] + 1, jnp.sum(self.condition.present)])

    blank = History(jnp.zeros((2, 2)), jnp.zeros((2, 1)), jnp.zeros(2))
    judge = lambda x: (x[:1] * 10, -jnp.abs(x[0] - 3))
    out = smc.reflect(
        jax.random.key(0),
        Counting(blank),
        solvers.ddim(),
        grids.uniform(FLOW, 2),
        (2,),
        judge=judge,
        rounds=4,
        context=2,
    )
    np.testing.assert_allclose(out.samples, [[1, 0], [2, 1], [3, 2], [4, 2]], atol=1e-6)
    np.testing.assert_allclose(out.feedback[:, 0], [10, 20, 30, 40], atol=1e-5)
    np.testing.assert_allclose(out.x, [3, 2], atol=1e-6)


def test_reflections_are_a_good_sample_and_worse_ones():
    """The target's reward is the group's best, all in the history are worse and told truly; 0 .. K are present."""
    x = jnp.arange(6.0)[:, None]
    rewards = jnp.array([0.0, 2.0, 1.0, 2.0, 0.5, -1.0])
    make = jax.jit(jax.vmap(lambda key: smc.reflections(key, x, 10 * x, rewards, 3)))
    x0, history = make(jax.random.split(jax.random.key(0), 400))
    assert set(np.unique(x0)) == {1.0, 3.0}
    present = np.asarray(history.present) > 0
    told = np.asarray(history.x)[..., 0]
    assert set(np.unique(told[present])) == {0.0, 2.0, 4.0, 5.0}
    assert np.all(told[~present] == 0) and np.all(np.asarray(history.feedback) == 10 * np.asarray(history.x))
    counts = np.bincount(present.sum(1), minlength=4)
    assert np.all(np.abs(counts - 100) < 4 * np.sqrt(75)) and np.all(np.diff(present.astype(int), axis=1) >= 0)
    two = jax.vmap(lambda key: smc.reflections(key, x[:3], x[:3], jnp.array([1.0, 1.0, 0.0]), 2))(
        jax.random.split(jax.random.key(1), 50)
    )
    assert np.all(np.asarray(two[1].present).sum(1) <= 1)  # there is one worse


@pytest.mark.slow
@pytest.mark.paper(
    "Reflect-DiT: Inference-Time Scaling for Text-to-Image Diffusion Transformers via In-Context Reflection"
)
def test_a_small_network_learns_to_reflect():
    """Trained on groups of base samples alone: success by round above best-of-n, of the same network and exact."""
    prediction, context = predictions.velocity(FLOW), 3
    inputs = 2 + context * (2 + 2 + 1)

    def network(params, x, t, condition):
        return tiny.apply(params, jnp.concatenate([x, smc.history_vector(condition)]), t)

    def group(key):
        at, place, chosen = jax.random.split(key, 3)
        cells = jnp.asarray(CENTRES)[jax.random.randint(at, (32,), 0, len(CENTRES))]
        x = cells + NOISE * jax.random.normal(jax.random.fold_in(at, 1), cells.shape)
        said = judge(jnp.asarray(CENTRES)[jax.random.randint(place, (), 0, len(CENTRES))])
        return smc.reflections(chosen, x, *jax.vmap(said)(x), context)

    loss = training.denoising(prediction, network)

    def one(params, key):
        x0, history = jax.vmap(group)(jax.random.split(key, 256))
        return loss(params, jax.random.fold_in(key, 1), x0, history).mean()

    @jax.jit
    def run():
        params, _ = tiny.train(one, tiny.init(jax.random.key(0), inputs, 2, 96), jax.random.key(1), 800, rate=5e-3)
        blank = History(jnp.zeros((context, 2)), jnp.zeros((context, 2)), jnp.zeros(context))
        denoise = prediction.decode(network, params, blank)
        deaf = lambda history: jax.tree.map(jnp.zeros_like, history)
        return play(denoise, 6, context, 400).rewards, play(denoise, 6, context, 400, deaf).rewards

    told, deaf = (found_within(rewards) for rewards in run())
    error = 4 * np.sqrt(0.25 / 400)
    assert np.all(told[2:] > deaf[2:] + error)
    assert told[5] > 0.6 and told[3] > 1.5 * (1 - (15 / 16) ** 4)


@pytest.mark.parametrize(
    "wrong, name",
    [
        (lambda: smc.reflections(jax.random.key(0), jnp.zeros((2, 1)), jnp.zeros((2, 1)), jnp.zeros(2), 2), "context"),
        (lambda: refused(rounds=0), "rounds"),
        (lambda: refused(context=0), "context"),
        (lambda: refused(denoise=lambda x, level: x), "condition"),
    ],
)
def test_bad_input(wrong, name):
    with pytest.raises(ValueError, match=name):
        wrong()


def refused(denoise=None, rounds=1, context=1):
    denoise = Listening(None) if denoise is None else denoise
    options = dict(judge=judge(np.zeros(2)), rounds=rounds, context=context)
    return smc.reflect(jax.random.key(0), denoise, solvers.ddim(), GRID, (2,), **options)


def test_a_transformer_attends_to_the_history():
    """Images and feedback as a token for each remembered sample, through `tell`, in a DiT; shapes only."""
    nnx = pytest.importorskip("flax.nnx")
    shape, told = (4, 4, 1), networks.tokens(16 + 2 + 1)
    judge = lambda x: (x[0, 0, :1].repeat(2), -jnp.sum(x**2))

    def run(key):
        network = networks.DiT(shape, patch=2, width=16, depth=1, heads=2, condition=told, rngs=nnx.Rngs(0))
        apply, params = networks.functional(network)
        denoise = predictions.velocity(FLOW).decode(apply, params, jnp.zeros((3, 19)))
        options = dict(judge=judge, rounds=2, context=3, tell=smc.history_tokens)
        return smc.reflect(key, denoise, solvers.ddim(), grids.uniform(FLOW, 2), shape, **options)

    found = jax.eval_shape(run, jax.random.key(0))
    assert found.samples.shape == (2, *shape) and found.feedback.shape == (2, 2)
