"""Find the picture that somebody has in mind by reflection: each sample is told of the earlier ones and their faults.

    python -m experiments.reflection

Somebody wants a digit at one of three places, in one of three inks on one of three papers; the prompt tells the class
alone.  A judge, which is a formula, says in words what is wrong with a sample (class: fine or wrong; place, ink and
paper: fine, more, less).  As in Reflect-DiT (arXiv:2503.12271) a base model draws many samples for every prompt, groups
of them with a judge's words become pairs (some wrong ones with their words, a right one), and a transformer that begins
as the base model (`networks.InContext`, its new cross-attention silent) is trained on the pairs.

The success rate within n samples is compared with best-of-n at the same number of samples, of the base model and of the
trained one when it is told nothing, and with two exact curves: chance, and the best listener, who guesses uniformly
among what agrees with all that was said; both are of one who never fails to draw what he wants to.

Writes success.png (success against samples, and what was right by round), rounds.png (what was drawn, and what was
said), reflection.json.

Run time: 3 min on 2 CPU cores.
Expect: reflection meets 0.20, 0.43, 0.63, 0.94 of 400 wishes within 2, 3, 4, 8 samples, best-of-n of the base model
0.05, 0.07, 0.12, 0.23, chance 0.07, 0.11, 0.14, 0.26, the best listener 0.47, 1, 1, 1.  The model that was trained to
listen is no better than the base model when it is told nothing (0.22 within 8).  From the third sample on the place is
right in 0.9 of the samples, the paper in 0.8, the ink in 0.6; the class, of which the prompt speaks, in 0.85 to 0.9.
After a wish is met, later samples may miss it again: no pair of the training has a right sample in its history.  All
samples cost 12 evaluations; one of the model that listens also encodes the history.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from diffjax import data, grids, networks, predictions, processes, sample, smc, solvers, training
from diffjax.levels import Array, Tree
from experiments import _generation, _plots, _run
from experiments.digits import labelled

TINY = (
    *("--base-steps", "3", "--steps", "3", "--batch", "8", "--width", "16", "--depth", "1", "--bank", "4"),
    *("--group", "4", "--tasks", "3", "--rounds", "3", "--sampling-steps", "2"),
)
CLASSES, CHOICES = 10, 3
CANVAS = (8, 16, 1)
PAPER = np.array([0.0, 0.2, 0.4], np.float32)
INK = np.array([0.6, 0.8, 1.0], np.float32)
FINE, MORE, LESS, WRONG = range(4)
WORDS = ("fine", "more", "less", "wrong")
ATTRIBUTES = ("class", "place", "ink", "paper")
PROCESS = processes.flow()
PREDICTION = predictions.velocity(PROCESS)


@dataclasses.dataclass(frozen=True)
class Options:
    """Train a base model and one that listens, and play with both."""

    base_steps: int = 1200
    """Training steps of the base model."""
    steps: int = 1200
    """Training steps of the model that is told."""
    batch: int = 128
    """Images per training step."""
    width: int = 96
    """Features of a token of the transformer."""
    depth: int = 3
    """Its blocks."""
    context: int = 3
    """Earlier samples that it is told of."""
    bank: int = 256
    """Samples of the base model for each prompt, of which the pairs are made."""
    group: int = 96
    """Samples of a group, of which the best is the target."""
    tasks: int = 400
    """Wishes that the models are tried on."""
    rounds: int = 8
    """Samples for each wish."""
    sampling_steps: int = 12
    """Steps of the sampler."""
    seed: int = 0
    """Seed of everything that is random."""
    out: Path = Path("runs/reflection")
    """Output folder."""


# --- pictures and the judge -----------------------------------------------------------------------------------------


def canvas(image: Array, place: Array, ink: Array, paper: Array) -> Array:
    """A digit (8, 8, 1) in [-1, 1] at one of three places, in one of three inks on one of three papers, (8, 16, 1)."""
    whole = jax.lax.dynamic_update_slice(jnp.zeros(CANVAS), (image + 1) / 2, (0, 4 * place, 0))
    light = jnp.asarray(PAPER)[paper]
    return 2 * (light + (jnp.asarray(INK)[ink] - light) * whole) - 1


def attributes(real: Any) -> Callable[[Array], Array]:
    """What is in a picture: ``x -> (class, place, ink, paper)``, integers.

    Most of a picture is paper; the ink is that of the strongest pixels, the place the centre of what is not paper, and
    the class that of the nearest of the real digits (images, labels) to what is there.
    """
    images = jnp.asarray((real.images.reshape(-1, 64) + 1) / 2)
    labels = jnp.asarray(real.labels, jnp.int32)
    strongest = float(np.sort(np.asarray(images), axis=1)[:, -8:].mean())
    nearest = lambda value, choices: jnp.argmin(jnp.abs(value - choices)).astype(jnp.int32)

    def one(x: Array) -> Array:
        shade = (x[..., 0] + 1) / 2
        paper = nearest(jnp.median(shade), PAPER)
        light = jnp.asarray(PAPER)[paper]
        top = jnp.mean(jax.lax.top_k(shade.ravel(), 8)[0])
        ink = nearest(light + (top - light) / strongest, INK)
        whole = jnp.clip((shade - light) / (jnp.asarray(INK)[ink] - light), 0.0, 1.0)
        strong = jnp.sum(jnp.maximum(whole - 0.15, 0.0), axis=0) + 1e-9
        centre = strong @ jnp.arange(CANVAS[1], dtype=jnp.float32) / jnp.sum(strong)
        place = jnp.clip(jnp.round((centre - 3.5) / 4), 0, CHOICES - 1).astype(jnp.int32)
        crop = jax.lax.dynamic_slice(whole, (0, 4 * place), (8, 8)).ravel()
        return jnp.stack([labels[jnp.argmin(jnp.sum((images - crop) ** 2, axis=1))], place, ink, paper])

    return one


def said(found: Array, wish: Array) -> tuple[Array, Array]:
    """Four words on what was found, and the reward: minus the steps to the wish; a wrong class counts as three."""
    gap = wish[1:] - found[1:]
    words = jnp.where(gap > 0, MORE, jnp.where(gap < 0, LESS, FINE))
    wrong = found[0] != wish[0]
    reward = -jnp.sum(jnp.abs(gap)) - 3 * wrong
    return jnp.concatenate([jnp.where(wrong, WRONG, FINE)[None], words]).astype(jnp.int32), reward.astype(jnp.float32)


def best_listener(rounds: int) -> np.ndarray:
    """P(the wish is met within n samples) of uniform guesses among what agrees, n = 1 .. ``rounds``.

    What was right once stays so: place, ink and paper are found independently of each other.
    """

    def found(size: int, n: int) -> float:  # one attribute, of which `size` neighbouring values are left
        if n == 0:
            return 0.0
        total = 0.0
        for guess in range(size):
            for wish in range(size):
                left = guess if wish < guess else size - guess - 1
                total += 1.0 if guess == wish else found(left, n - 1)
        return total / size**2

    return np.array([found(CHOICES, n + 1) ** 3 for n in range(rounds)])


# --- models ---------------------------------------------------------------------------------------------------------


@functools.cache
def network(options: Options, told: bool) -> tuple[Any, Tree]:
    """The transformer of the prompt alone, or of prompt and history."""
    shape: dict[str, Any] = dict(patch=4, width=options.width, depth=options.depth, heads=4, ratio=2.0)
    label, rngs = networks.label(CLASSES), nnx.Rngs(options.seed)
    if not told:
        return networks.functional(networks.DiT(CANVAS, condition=label, rngs=rngs, **shape))
    size = options.width
    context = networks.ContextTransformer(
        CANVAS,
        networks.label(len(WORDS)),
        len(ATTRIBUTES),
        size,
        patch=8,
        width=options.width,
        depth=min(2, options.depth),
        rngs=rngs,
    )
    dit = networks.DiT(CANVAS, condition=(label, networks.tokens(size)), rngs=rngs, **shape)
    return networks.functional(networks.InContext(dit, context))


def base_model(options: Options, real: Any) -> Tree:
    """The parameters of a model of canvases with their classes."""
    apply, params = network(options, told=False)
    images, labels = jnp.asarray(real.images), jnp.asarray(real.labels, jnp.int32)

    def draw(key: Array) -> tuple:
        first, second = jax.random.split(key)
        index = jax.random.randint(first, (options.batch,), 0, len(images))
        where = jax.random.randint(second, (3, options.batch), 0, CHOICES)
        return jax.vmap(canvas)(images[index], *where), labels[index]

    loss = training.denoising(PREDICTION, apply, law=training.logit_normal())
    return _generation.fitted(loss, params, draw, options.base_steps, 2e-3)


def base_samples(options: Options, params: Tree, key: Array) -> np.ndarray:
    """``bank`` samples of each class, (classes, bank, 16, 16, 1)."""
    apply, _ = network(options, told=False)
    grid, solver = grids.uniform(PROCESS, options.sampling_steps), solvers.dpmpp()

    def draw(params: Tree, key: Array, label: Array) -> Array:
        return sample_of(key, PREDICTION.decode(apply, params, label), solver, grid)

    program = jax.jit(jax.vmap(jax.vmap(draw, (None, 0, None)), (None, 0, 0)))
    keys = jax.random.split(key, (CLASSES, options.bank))
    return np.asarray(program(params, keys, jnp.arange(CLASSES)))


def sample_of(key: Array, denoise: Any, solver: Any, grid: Any) -> Array:
    """A picture."""

    return jnp.clip(sample(key, denoise, solver, grid, shape=CANVAS).x, -1.0, 1.0)


def wish(key: Array, label: Array) -> Array:
    """A class with a place and a brightness."""
    return jnp.concatenate([label[None], jax.random.randint(key, (3,), 0, CHOICES)])


def listening_model(options: Options, base: Tree, bank: np.ndarray, found: np.ndarray) -> Tree:
    """The parameters of a model that begins as the base model, trained on groups of its samples."""
    apply, params = network(options, told=True)
    pictures, content = jnp.asarray(bank), jnp.asarray(found)

    def pair(key: Array) -> tuple[Array, Any]:
        first, second, third, last = jax.random.split(key, 4)
        label = jax.random.randint(first, (), 0, CLASSES)
        index = jax.random.randint(second, (options.group,), 0, bank.shape[1])
        words, rewards = jax.vmap(said, (0, None))(content[label, index], wish(third, label))
        target, history = smc.reflections(last, index, words, rewards, options.context)
        return pictures[label, target], (label, history._replace(x=pictures[label, history.x]))

    loss = training.denoising(PREDICTION, apply, law=training.logit_normal())
    draw = lambda key: jax.vmap(pair)(jax.random.split(key, options.batch))
    return _generation.fitted(loss, networks.grafted(params, {"network": base}), draw, options.steps, 1e-3)


def played(options: Options, models: dict[str, tuple[Tree, float]], real: Any, key: Array) -> dict[str, Any]:
    """Every wish tried for ``rounds`` samples by each model (parameters, hears): pictures, words, rewards.

    A model that does not hear (0) is told of an empty history: with the parameters of the base model it is that model.
    """
    apply, _ = network(options, told=True)
    grid, solver, look = grids.uniform(PROCESS, options.sampling_steps), solvers.dpmpp(), attributes(real)

    def one(params: Tree, hears: Array, key: Array, label: Array) -> tuple[Array, smc.Refined]:
        first, second = jax.random.split(key)
        wanted = wish(first, label)
        tell = lambda history: (label, history._replace(present=history.present * hears))
        judge = lambda x: said(look(x), wanted)
        words = jnp.zeros((options.context, len(ATTRIBUTES)), jnp.int32)
        blank = smc.History(jnp.zeros((options.context, *CANVAS)), words, jnp.zeros(options.context))
        denoise = PREDICTION.decode(apply, params, tell(blank))
        plan: dict[str, Any] = dict(judge=judge, rounds=options.rounds, context=options.context, tell=tell)
        return wanted, smc.reflect(second, denoise, solver, grid, CANVAS, **plan)

    program = jax.jit(jax.vmap(one, (None, None, 0, 0)))
    keys, labels, games = jax.random.split(key, options.tasks), jnp.arange(options.tasks) % CLASSES, {}
    for name, (params, hears) in models.items():
        wanted, found = program(jax.tree.map(jnp.asarray, params), jnp.float32(hears), keys, labels)
        games[name] = {
            "wishes": np.asarray(wanted),
            "rewards": np.asarray(found.rewards),
            "words": np.asarray(found.feedback),
            "shown": np.asarray(found.samples[:SHOWN]),
            "nfe": float(np.mean(found.nfe)),
        }
    return games


SHOWN = 10  # wishes in the picture of rounds


def success(rewards: np.ndarray) -> np.ndarray:
    """The share of wishes that were met within n samples."""
    return np.mean(np.maximum.accumulate(rewards == 0, axis=1), axis=0)


# --- pictures -------------------------------------------------------------------------------------------------------


def plot_success(options: Options, rates: dict[str, np.ndarray], right: np.ndarray) -> None:
    """Success against the number of samples, and the share of right attributes in every round of reflection."""
    count = np.arange(1, options.rounds + 1)
    with plt.rc_context(_plots.STYLE):
        figure, (left, middle) = plt.subplots(1, 2, figsize=(10.5, 4.2))
        for (name, rate), marker in zip(rates.items(), "sDo", strict=False):
            left.plot(count, rate, marker=marker, label=name)
        left.plot(count, best_listener(options.rounds), color="0.4", linestyle="--", label="best listener")
        left.plot(count, 1 - (1 - CHOICES**-3.0) ** count, color="0.4", linestyle=":", label="chance")
        left.set(xlabel="samples", ylabel="wishes met", ylim=(0, 1.02), title="success within n samples")
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
        for name, share, marker in zip(ATTRIBUTES, right.T, "osD^", strict=True):
            middle.plot(count, share, marker=marker, label=name)
        middle.set(xlabel="round", ylim=(0, 1.02), title="reflection: right in the n-th sample")
        middle.legend(loc="lower right")
        for axis in (left, middle):
            axis.set_xticks(count)
        _plots.save(figure, options.out / "success.png")


def plot_rounds(options: Options, game: dict[str, Any]) -> None:
    """A wish a row: the samples in order, with the words that were said; met ones are framed."""
    wishes, words, rewards = game["wishes"], game["words"], game["rewards"]
    rows, columns = len(game["shown"]), min(options.rounds, 6)
    faults = [("", "right", "left", ""), ("", "darker", "paler", ""), ("", "greyer", "whiter", "")]  # by word
    with plt.rc_context(_plots.STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(1.9 * columns, 1.15 * rows), squeeze=False)
        for (i, j), axis in np.ndenumerate(axes):
            heard = words[i, j]
            complaints = [f"not a {wishes[i, 0]}"] if heard[0] else []
            complaints += [fault[word] for fault, word in zip(faults, heard[1:], strict=True) if word]
            axis.imshow(-game["shown"][i, j, ..., 0], cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            axis.set_title(", ".join(complaints) or "met", fontsize=7, pad=2)
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set(visible=bool(rewards[i, j] == 0), color="tab:green", linewidth=2.5)
        for axis, (label, place, ink, paper) in zip(axes[:, 0], wishes, strict=False):
            place, ink = ("left", "middle", "right")[place], ("pale", "medium", "dark")[ink]
            text = f"a {ink} {label}, {place},\non {('white', 'light', 'grey')[paper]} paper"
            axis.set_ylabel(text, fontsize=7, rotation=0, ha="right", va="center")
        _plots.save(figure, options.out / "rounds.png")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run with command-line arguments (default: those of the process); returns what reflection.json holds."""
    with _run.start(Options, arguments) as run:
        options, clock = run.options, run.clock
        keys = jax.random.split(jax.random.key(options.seed + 1), 2)
        real = labelled(data.load("digits", "train"))
        with clock("base model"):
            base = run.part("base model", lambda: base_model(options, real))
        with clock("bank"):
            bank = run.part("bank", lambda: base_samples(options, base, keys[0]))
            found = np.asarray(jax.jit(jax.vmap(jax.vmap(attributes(real))))(jnp.asarray(bank)))
        with clock("listening model"):
            listening = run.part("listening model", lambda: listening_model(options, base, bank, found))
        models = {
            "best of n, base model": (networks.grafted(listening, {"network": base}), 0.0),
            "best of n, told nothing": (listening, 0.0),
            "reflection": (listening, 1.0),
        }
        with clock("games"):
            games = run.part("games", lambda: played(options, models, real, keys[1]))
        rates = {name: success(game["rewards"]) for name, game in games.items()}
        right = np.mean(games["reflection"]["words"] == FINE, axis=0)
        plot_success(options, rates, right)
        plot_rounds(options, games["reflection"])
        result = {
            "success": {name: rate.tolist() for name, rate in rates.items()},
            "best listener": best_listener(options.rounds).tolist(),
            "right by round": dict(zip(ATTRIBUTES, right.T.tolist(), strict=True)),
            "class right in the bank": float(np.mean(found[..., 0] == np.arange(CLASSES)[:, None])),
            "evaluations a wish": {name: game["nfe"] for name, game in games.items()},
            "seconds": clock.seconds,
        }
        (run.out / "reflection.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"the base model draws the class it was asked for: {result['class right in the bank']:.3f}")
        for name, rate in rates.items():
            print(f"{name}: met within n samples {np.round(rate, 3).tolist()}")
        for name, share in result["right by round"].items():
            print(f"reflection, right in the n-th sample, {name}: {np.round(share, 3).tolist()}")
        print(f"{clock}; pictures and reflection.json are in {run.out}/")
    return result


if __name__ == "__main__":
    main()
