"""Steer samples towards a reward by every method at equal evaluations, and judge them where the steered law is exact.

    python -m experiments.steering
    python -m experiments.steering --digits runs/digits   # the model of experiments.digits instead of training one

Digits: an unconditional model is steered by three rewards: the log-probability of a class under a classifier (so that
the tilted law p e^r is that of the class), ink on the left, mirror symmetry.  Every draw may spend as much as
``--candidates`` samples: best of n, CoDe, SVDD, FK steering, twisted SMC (TDS), guidance by the reward's gradient,
search over starts and paths.  Each is compared with the tilted law itself, by importance weights of many plain samples;
a second classifier that no method has seen says whether the class is real, and distances whether the draws are digits
(to the nearest training image) and different ones (between draws).

Mixture: two-dimensional Gaussian mixtures are annealed, multiplied and tilted.  Followed without weights, the target's
score leads elsewhere; `weighted_sde` corrects it, DriftLite controls it, `steer` knows the tilt alone.  Products and
tilts of mixtures are mixtures, and annealing is integrated: log Z and sliced Wasserstein distances (in units of the
distance of two exact sets) are exact.

Writes digits.png (draws of every method), rewards.png, mixture.png, metrics.json.

Run time: 4 min on 2 CPU cores, 2.5 min with a model given.
Expect (three models): of the draws for class 3 an unseen classifier finds 0.10 to 0.12 without steering, 0.71 to 0.81
in the tilted law, 0.75 to 0.85 of twisted SMC, 0.5 to 0.8 of FK steering, SVDD and best of n, and 0.92 to 1.00 of CoDe
and guided best of n, which overshoot the law.  On mixtures DriftLite's log Z is within 0.02 and its samples at 1.1 to
1.5 times the floor; weights without control are no better than none when annealing or multiplying, and as good as any
on the tilt.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import diffjax
from diffjax import grids, levels, metrics, smc, solvers
from diffjax.levels import Array, value
from experiments import _classifier, _plots, _run, _steered_mixtures, digits

TINY = (
    *("--steps", "3", "--batch", "16", "--channels", "8", "--samples", "3", "--plain", "16", "--candidates", "2"),
    *("--sampling-steps", "4", "--classifier-steps", "3", "--particles", "16", "--rows", "4"),
    *("--methods", "best of n", "--targets", "tilted", "--ways", "weighted SDE"),
)
REWARDS = ("class", "ink on the left", "symmetry")
PANELS = ("annealed", "product", "tilted")


@dataclasses.dataclass(frozen=True)
class Options:
    """Steer digits and mixtures."""

    digits: Path | None = None
    """Folder of a run of experiments.digits whose model is steered; none: one is trained here."""
    steps: int = 1000
    """Training steps of the model, where it is trained here."""
    batch: int = 128
    """Images per training step."""
    channels: tuple[int, ...] = (32, 64)
    """Features of the U-Net at each resolution."""
    classifier_steps: int = 400
    """Training steps of each of the two classifiers."""
    wanted: int = 3
    """The class of the first reward."""
    strength: float = 2.0
    """Of the other rewards, which have standard deviation 1 on the training images."""
    sampling_steps: int = 12
    """Rows of the samplers."""
    candidates: int = 8
    """Samples that one draw may cost."""
    samples: int = 48
    """Draws of every method and reward."""
    plain: int = 2048
    """Plain samples, for the tilted law itself."""
    methods: tuple[str, ...] = ()
    """Methods on digits; none named: all."""
    targets: tuple[str, ...] = PANELS
    """Targets made of mixtures."""
    ways: tuple[str, ...] = ()
    """Ways to them; none named: all."""
    particles: int = 512
    """Particles on the mixtures."""
    rows: int = 96
    """Rows on the mixtures."""
    seed: int = 0
    """Seed of everything that is random."""
    out: Path = Path("runs/steering")
    """Output folder."""


# --- digits -------------------------------------------------------------------------------------------------------


@value
class Rewards:
    """``weights @ (log-probability of the class, ink, symmetry)``: the weights are traced, so all share a program."""

    weights: Array
    params: Any
    centre: Array
    spread: Array
    classifier: Any = levels.static()
    wanted: int = levels.static()

    def parts(self, x0: Array) -> Array:
        """The three rewards, the last two in standard deviations."""
        logits, _ = _classifier._apply(self.classifier, self.params, x0[None])
        half = x0.shape[1] // 2
        ink = jnp.mean(x0[:, :half]) - jnp.mean(x0[:, half:])
        symmetry = -jnp.sqrt(jnp.mean((x0 - x0[:, ::-1]) ** 2) + 1e-6)
        parts = jnp.stack([jax.nn.log_softmax(logits[0])[self.wanted], ink, symmetry])
        return (parts - self.centre) / self.spread

    def __call__(self, x0: Array) -> Array:
        return self.weights @ self.parts(x0)


def rewards(classifier: _classifier.Classifier, images: np.ndarray, wanted: int) -> Rewards:
    """The rewards, with the units of these images."""
    raw = Rewards(jnp.zeros(3), classifier.params, jnp.zeros(3), jnp.ones(3), classifier.graph, wanted)
    found = np.asarray(jax.jit(jax.vmap(raw.parts))(jnp.asarray(images)))
    centre, spread = found.mean(0), found.std(0)
    centre[0], spread[0] = 0.0, 1.0
    return dataclasses.replace(raw, centre=jnp.asarray(centre), spread=jnp.asarray(spread))


Draw = Callable[[Array, Any, Any], tuple[Array, Array]]  # (key, denoiser, reward) -> (image, evaluations)


def methods(options: Options, grid: diffjax.Grid) -> dict[str, Draw]:
    """Every method, at the evaluations of ``candidates`` samples (one of them at those of one sample)."""
    many, ancestral, ddim, shape = options.candidates, solvers.ancestral(), solvers.ddim(), digits.IMAGE
    block = max(1, options.sampling_steps // 4)
    guided = lambda denoise, reward: diffjax.guidance.tilted(denoise, smc.reward(reward))

    def chosen(method: Any, **more: Any) -> Draw:
        def draw(key: Array, denoise: Any, reward: Any) -> tuple[Array, Array]:
            found = method(key, denoise, ancestral, grid, shape, reward=reward, candidates=many, **more)
            return found.x, found.nfe

        return draw

    def steered(**more: Any) -> Draw:
        def draw(key: Array, denoise: Any, reward: Any) -> tuple[Array, Array]:
            key, last = jax.random.split(key)
            twist = smc.reward(reward)
            found = smc.steer(key, denoise, ancestral, grid, shape, particles=many, twist=twist, **more)
            return found.x[jax.random.categorical(last, found.log_weights)], found.nfe

        return draw

    def plain(key: Array, denoise: Any, reward: Any) -> tuple[Array, Array]:
        found = diffjax.sample(key, denoise, ancestral, grid, shape=shape)
        return found.x, found.nfe

    def starts(key: Array, denoise: Any, reward: Any) -> tuple[Array, Array]:
        plan = dict(verifier=reward, candidates=1, rounds=many - 1, radius=0.5)
        found = smc.zero_order_search(key, denoise, ddim, grid, shape, **plan)
        return found.x, found.nfe

    def paths(key: Array, denoise: Any, reward: Any) -> tuple[Array, Array]:
        plan = dict(verifier=reward, kept=2, copies=max(1, many * 3 // 8), back=1, ahead=block + 1, first=block)
        found = smc.path_search(key, denoise, ddim, grid, shape, **plan)
        return found.x, found.nfe

    best = chosen(smc.best_of_n)
    found: dict[str, Draw] = {
        "plain (1 sample)": plain,
        "guided (1 sample)": lambda key, denoise, reward: plain(key, guided(denoise, reward), reward),
        "best of n": best,
        "guided, best of n": lambda key, denoise, reward: best(key, guided(denoise, reward), reward),
        "CoDe": chosen(smc.blockwise, block=block),
        "SVDD": chosen(smc.svdd, temperature=1.0),
        "FK steering (difference)": steered(proposal="base"),
        "FK steering (max)": steered(proposal="base", potential=smc.maximum()),
        "twisted SMC (TDS)": steered(),
        "search over starts": starts,
        "search over paths": paths,
    }
    unknown = set(options.methods) - set(found)
    if unknown:
        raise ValueError(f"methods {sorted(unknown)} are not among {sorted(found)}.")
    return {name: found[name] for name in (options.methods or found)}


def denoiser(model: digits.Model, params: Any) -> Any:
    """The unconditional model."""
    return digits.denoiser(model._replace(params=params), jnp.asarray(digits.CLASSES))


def drawn(options: Options, model: digits.Model, reward: Rewards, draw: Draw, key: Array) -> dict[str, Any]:
    """Images and evaluations a draw, for each of the three rewards."""
    keys = jax.random.split(key, options.samples)

    def one(params: Any, reward: Rewards, key: Array) -> tuple[Array, Array]:
        return draw(key, denoiser(model, params), reward)

    program = jax.jit(jax.vmap(one, (None, None, 0)))
    strengths = np.diag([1.0, options.strength, options.strength]).astype(np.float32)
    found = [program(model.params, dataclasses.replace(reward, weights=jnp.asarray(w)), keys) for w in strengths]
    return {"images": np.stack([np.asarray(x) for x, _ in found]), "nfe": float(np.mean(found[0][1]))}


def measured(images: np.ndarray, index: int, options: Options, reward: Rewards, judge: Any, real: Any) -> dict:
    """What draws for reward ``index`` are worth."""
    far = np.sqrt(np.sum((images[:, None] - images[None]) ** 2, axis=(2, 3, 4)))
    return {
        "reward": float(np.mean(np.asarray(jax.vmap(reward.parts)(jnp.asarray(images)))[:, index])),
        "judge": float(np.mean(np.argmax(judge(images)[0], axis=1) == options.wanted)) if index == 0 else None,
        "nearest": float(np.mean(metrics.nearest_distance(images, real.images))),
        "between": float(far.sum() / (len(images) * (len(images) - 1))),
    }


def tilted_law(images: np.ndarray, index: int, options: Options, reward: Rewards, judge: Any, real: Any) -> dict:
    """The same of the tilted law, by plain samples resampled by their weights; ``ess`` of them are effective."""
    strength = 1.0 if index == 0 else options.strength
    logs = strength * np.asarray(jax.vmap(reward.parts)(jnp.asarray(images)))[:, index].astype(np.float64)
    weights = np.exp(logs - logs.max()) / np.exp(logs - logs.max()).sum()
    picks = np.random.default_rng(options.seed).choice(len(images), options.samples * 8, p=weights)
    found = measured(images[picks], index, options, reward, judge, real)
    return found | {"ess": float(1 / np.sum(weights**2)), "shown": images[picks[:12]]}


# --- pictures -----------------------------------------------------------------------------------------------------


def plot_digits(options: Options, found: dict[str, Any], law: dict[str, Any], columns: int = 12) -> None:
    """Draws of every method, one panel a reward."""
    with plt.rc_context(_plots.STYLE):
        names = [*found, "the tilted law"]
        figure, axes = plt.subplots(1, 3, figsize=(0.36 * 3 * columns + 2.4, 0.36 * len(names) + 0.7))
        for index, (axis, reward) in enumerate(zip(axes, REWARDS, strict=True)):
            columns = min(columns, options.samples)
            rows = [each["images"][index][:columns] for each in found.values()] + [law[reward]["shown"][:columns]]
            _plots.image_grid(axis, np.stack([digits.unit(images) for images in rows]))
            axis.set_title(f"class {options.wanted}" if index == 0 else reward, fontsize=9)
            if index == 0:
                axis.set_yticks(np.arange(len(names)) * 10 + 4.5, names)
        _plots.save(figure, options.out / "digits.png")


def plot_rewards(options: Options, table: dict[str, Any], law: dict[str, Any]) -> None:
    """Reward against the distance to the nearest training image."""
    palette = plt.get_cmap("tab20")
    with plt.rc_context(_plots.STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.0))
        for index, (axis, reward) in enumerate(zip(axes, REWARDS, strict=True)):
            for i, (name, each) in enumerate(table.items()):
                style = {"color": palette(2 * i % 20 + 2 * i // 20), "marker": _plots.MARKERS[i % len(_plots.MARKERS)]}
                axis.plot(each[reward]["reward"], each[reward]["nearest"], label=name, linestyle="", **style)
            point = (law[reward]["reward"], law[reward]["nearest"])
            axis.plot(*point, "k*", markersize=13, label="the tilted law", zorder=0)
            title = f"class {options.wanted}" if index == 0 else reward
            unit = "log-probability" if index == 0 else "standard deviations"
            axis.set(title=title, xlabel=f"mean reward ({unit})")
        axes[0].set_ylabel("distance to the nearest training image")
        axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        _plots.save(figure, options.out / "rewards.png")


def report(table: dict[str, Any], law: dict[str, Any], spent: dict[str, float], mixtures: dict[str, Any]) -> str:
    """All numbers."""
    lines = [f"{'reward / nearest / between':27}" + "".join(f"{reward:>22}" for reward in REWARDS)]
    cells = lambda each: "".join(
        f"  {each[r]['reward']:8.2f} {each[r]['nearest']:5.2f} {each[r]['between']:5.2f}" for r in REWARDS
    )
    for name, each in table.items():
        judge = each[REWARDS[0]]["judge"]
        lines.append(f"{name:27}{cells(each)}  judged {judge:.2f}, {spent[name]:.0f} evaluations")
    lines.append(f"{'the tilted law':27}{cells(law)}  judged {law[REWARDS[0]]['judge']:.2f}")
    for panel, each in mixtures.items():
        for name, result in each.items():
            error = "" if result["log_z_error"] is None else f", log Z off by {result['log_z_error']:.3f}"
            lines.append(f"{panel:9} {name:27} {result['distance']:6.2f} x floor, ess {result['ess']:.2f}{error}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run with command-line arguments (default: those of the process); returns what metrics.json holds."""
    with _run.start(Options, arguments) as run:
        options, clock = run.options, run.clock
        keys = jax.random.split(jax.random.key(options.seed + 1), 6)
        mixtures: dict[str, dict[str, Any]] = {panel: {} for panel in options.targets}
        with clock("mixtures"):
            for panel in run.over(options.targets, "mixtures"):
                for name, steering in _steered_mixtures.steerings(options, panel).items():
                    given = (options, panel, name, steering, keys[4])
                    make = lambda given=given: _steered_mixtures.judged(*given)
                    mixtures[panel][name] = run.part(f"mixture {panel} {name}", make)
        images, real, _ = digits.held_out_digits(None)
        with clock("training"):
            model = _model(run, images)
            classifier = _classifier.train(keys[0], images, options.classifier_steps, options.batch, run)
            judge = run.part("judge", lambda: _judge(keys[1], images, options))
        reward = rewards(classifier, real.images, options.wanted)
        seen = _classifier.Classifier(classifier.graph, _like(judge, classifier.params))
        grid = grids.uniform(digits.PROCESS, options.sampling_steps)
        known, found = methods(options, grid), {}
        with clock("plain samples"):
            bank = run.part("plain samples", lambda: _bank(options, model, grid, keys[2]))
        with clock("methods"):
            for name in run.over(known, "methods"):
                make = lambda name=name: drawn(options, model, reward, known[name], keys[3])
                found[name] = run.part(f"method {name}", make)
        each = (options, reward, seen, real)
        table = {
            name: {r: measured(f["images"][i], i, *each) for i, r in enumerate(REWARDS)} for name, f in found.items()
        }
        law = {r: tilted_law(bank, i, *each) for i, r in enumerate(REWARDS)}
        with clock("pictures"):
            plot_digits(options, found, law)
            plot_rewards(options, table, law)
            _steered_mixtures.plot_mixtures(options, mixtures)
        spent = {name: each["nfe"] for name, each in found.items()}
        plain = lambda entry: {key: value for key, value in entry.items() if key != "shown"}
        result = {
            "evaluations": spent,
            "digits": table,
            "tilted_law": {name: plain(entry) for name, entry in law.items()},
            "mixtures": {panel: {name: plain(e) for name, e in each.items()} for panel, each in mixtures.items()},
            "seconds": clock.seconds,
        }
        (run.out / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
        print(report(table, law, spent, mixtures))
        print(f"{clock}; pictures and metrics.json are in {run.out}/")
    return result


def _model(run: _run.Run[Options], images: Any) -> digits.Model:
    options = run.options
    if options.digits is not None:
        return digits.load(options.digits)
    out = run.folder("training/model")
    wanted = digits.Options(
        steps=options.steps, batch=options.batch, channels=options.channels, seed=options.seed, out=out
    )
    return digits.train(wanted, images, run.resume, run.log)


def _judge(key: Array, images: Any, options: Options) -> list:
    """The parameters of a second classifier."""
    trained = _classifier.train(key, images, options.classifier_steps, options.batch)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(trained.params)]


def _like(leaves: list, params: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _bank(options: Options, model: digits.Model, grid: diffjax.Grid, key: Array) -> np.ndarray:
    """Plain samples."""
    draw = lambda key: (
        diffjax.sample(key, denoiser(model, model.params), solvers.ancestral(), grid, shape=digits.IMAGE).x
    )
    return np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(key, options.plain)))


if __name__ == "__main__":
    main()
