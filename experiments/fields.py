"""Guide exact models of physical systems, a magnet and a chaotic flow, to laws that are known, by methods that are not.

    python -m experiments.fields
    python -m experiments.fields --parts lorenz

Magnet: Ising spins on a cylinder, whose denoiser, magnetisation and energy a transfer matrix gives exactly.  The
condition is an external field, or a lower temperature; guidance of scale s extrapolates it, since p_c^s p^(1-s) is the
magnet at s times the field (of the inverse temperature: s times the difference).  Plain guidance is compared with
characteristic guidance, and with the denoiser of the extrapolated magnet on the same noise.  Why the latter two agree
in a field: a field is a linear tilt, x0_c(x) = x0(x + sigma^2 field / alpha), and then d = sigma^2 field / alpha makes
both estimates of characteristic guidance the exact one, whatever the law.  In temperature its fixed point says that
the free energy of the mean spins is extrapolated, which is right to first order (mean-field theory), and has several
solutions where the extrapolated magnet is ordered.

Lorenz: pieces of trajectories with noise of observation, whose denoiser is exact, and whose law given an event is known
by rejection sampling: a mean on one wing (linear), a high peak (rare), calm oscillations (of Fourier amplitudes).
Event guidance draws them one by one; sequential Monte Carlo with the same twist weighs them, which is unbiased.  The
mean over noised data of what the twist says is its probability of the event, at every noise level.

Writes magnet.png, lorenz.png, metrics.json.

Run time: 1 min on 2 CPU cores.
Expect: in a field, at scales 6, 8, 11, a mean spin of 0.523, 0.641, 0.771 by plain guidance, where the law has 0.496,
0.590, 0.688 and its own denoiser draws 0.487, 0.581, 0.679; characteristic guidance has 0.488, 0.582, 0.680.  In
temperature (0.10 to 0.13, at scale 11 to 0.43, near the transition) a root mean square of 0.291, 0.322, 0.364 by plain
and 0.370, 0.521, 0.649 by characteristic guidance, where the law has 0.349, 0.448, 0.660: the latter overshoots on the
way to the transition.
Guided trajectories are in the event: all, all, and 0.89 of the calm ones.  Lobe (probability 0.1): at 1.4 times the
floor, the mean path within 0.06.  Peak (0.02): at 3.7 times the floor, and particles say 0.001, since the twist is
wrong at high noise, where the mean of paths with peaks has none, and few sets hold the paths with the weight.  Calm
(0.1): at 2.8 times the floor, particles at 1.1 times, which say 0.124: of what the sampler draws without guidance in 40
rows 0.125 are calm (0.103 in 160 rows).
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

import diffjax
from diffjax import grids, guidance, metrics, processes, smc, solvers
from diffjax.levels import Array
from experiments import _ising, _lorenz, _plots, _run

PARTS = ("magnet", "lorenz")
PROCESS = processes.vp()
TINY = (
    *("--size", "3", "--magnets", "64", "--rows", "8", "--scales", "1", "6", "--iterations", "2"),
    *("--pieces", "128", "--draws", "16", "--particles", "16", "--populations", "2", "--events", "lobe"),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Guide a magnet and a chaotic flow."""

    parts: tuple[str, ...] = PARTS
    """What to do: magnet, lorenz."""
    size: int = 6
    """Rings of the cylinder, and sites of a ring."""
    magnets: int = 2048
    """Configurations drawn of each law."""
    rows: int = 40
    """Steps of the samplers."""
    scales: tuple[float, ...] = (1.0, 2.0, 4.0, 6.0, 8.0, 11.0)
    """Scales of guidance on the magnet."""
    iterations: int = 6
    """Of the fixed point of characteristic guidance."""
    pieces: int = 2048
    """Trajectories of the set."""
    blur: float = 0.1
    """Noise of observation on them, in units of their spread."""
    draws: int = 256
    """Draws of event guidance."""
    particles: int = 256
    """Particles of sequential Monte Carlo."""
    populations: int = 4
    """Independent sets of particles."""
    events: tuple[str, ...] = tuple(_lorenz.EVENTS)
    """Events."""
    seed: int = 0
    """Seed of everything that is random."""
    out: Path = Path("runs/fields")
    """Output folder."""


# --- the magnet ---------------------------------------------------------------------------------------------------

# (inverse temperature, field) without and with the condition
CONDITIONS = {"field": ((0.3, 0.0), (0.3, 0.02)), "temperature": ((0.1, 0.0), (0.13, 0.0))}
OBSERVABLES = {"field": "magnetisation", "temperature": "size"}


def law(null: Any, told: Any, scale: Any) -> tuple[Any, Any]:
    """Inverse temperature and field of ``p_told^scale p_null^(1 - scale)``."""
    beta, field = (scale * a + (1 - scale) * b for a, b in zip(told, null, strict=True))
    return beta, field


def programs(options: Options) -> dict[str, Callable[[Any, Any, float], np.ndarray]]:
    """``(null, told, scale) -> configurations`` of every method, from the same noise."""
    shape, grid = (options.size, options.size), grids.log_snr(PROCESS, options.rows, stop=0.01)
    keys = jax.random.split(jax.random.key(options.seed), options.magnets)
    builds: dict[str, Callable[[Any, Any, Array], Any]] = {
        "extrapolated law": lambda null, told, scale: _ising.Ising(law(null, told, scale)),
        "classifier_free": lambda null, told, scale: guidance.classifier_free(_ising.Ising(told), null, scale),
        "characteristic": lambda null, told, scale: guidance.characteristic(
            _ising.Ising(told), null, scale, options.iterations, 3
        ),
    }

    def program(build: Callable[[Any, Any, Array], Any]) -> Callable[[Any, Any, float], np.ndarray]:
        @jax.jit
        def draw(null: Any, told: Any, scale: Array) -> Array:
            denoise = build(null, told, scale)
            return jax.vmap(lambda key: diffjax.sample(key, denoise, solvers.dpmpp(), grid, shape=shape).x)(keys)

        return lambda *numbers: np.asarray(draw(*jax.tree.map(jnp.float32, numbers)))

    return {name: program(build) for name, build in builds.items()}


def magnet(options: Options, ways: dict[str, Any], condition: str) -> dict[str, Any]:
    """Observables of every method at every scale, with those of the law, and the first configurations."""
    (null, told), shape = CONDITIONS[condition], (options.size, options.size)
    found: dict[str, Any] = {
        "exact": [_ising.exact(*law(null, told, scale), shape)._asdict() for scale in options.scales]
    }
    for name, draw in ways.items():
        drawn = [draw(null, told, scale) for scale in options.scales]
        found[name] = {
            "observables": [_ising.measured(spins)._asdict() for spins in drawn],
            "shown": np.stack([spins[:10] for spins in drawn]),
        }
    return found


def plot_magnets(options: Options, found: dict[str, dict[str, Any]]) -> None:
    """Observables against the scale, exact and sampled, and configurations at one scale."""
    titles = {"magnetisation": "mean spin", "size": "root mean square of the mean spin"}
    index = min(3, len(options.scales) - 1)
    with plt.rc_context(_plots.STYLE):
        figure, axes = plt.subplots(len(found), 3, figsize=(14, 3.6 * len(found)), squeeze=False)
        for row, (condition, each) in zip(axes, found.items(), strict=True):
            names = [name for name in each if name != "exact"]
            for axis, observable in zip(row, (OBSERVABLES[condition], "alignment"), strict=False):
                exact = [point[observable] for point in each["exact"]]
                axis.plot(options.scales, exact, color="black", linewidth=3, alpha=0.3, label="exact")
                for name, marker in zip(names, _plots.MARKERS, strict=False):
                    values = [point[observable] for point in each[name]["observables"]]
                    axis.plot(options.scales, values, marker=marker, linewidth=1.3, label=name)
                axis.set(xlabel="scale (1 = conditional model)", title=titles.get(observable, "neighbours' s s'"))
            row[0].set_ylabel(f"condition: {condition}")
            row[0].legend()
            sheet = np.stack([(1 - each[name]["shown"][index]) / 2 for name in names])
            _plots.image_grid(row[2], sheet)
            step = options.size + 2
            row[2].set_yticks(np.arange(len(names)) * step + step / 2 - 0.5, names)
            row[2].set_title(f"the same noise, scale {options.scales[index]:g} (ink: spin -1)")
        _plots.save(figure, options.out / "magnet.png")


# --- Lorenz' system -----------------------------------------------------------------------------------------------


def lorenz(run: _run.Run[Options], event: str) -> dict[str, Any]:
    """An event by guidance and by particles, against the members of the set that are one."""
    options, (constraint, share) = run.options, _lorenz.EVENTS[event]
    paths = _lorenz.trajectories(options.pieces)
    limit, real = _lorenz.rejected(constraint, share, paths, options.blur)
    denoise, shape = _lorenz.Trajectories(jnp.asarray(paths), jnp.float32(options.blur)), paths.shape[1:]
    grid = grids.log_snr(PROCESS, options.rows, stop=0.01)
    keys = jax.random.split(jax.random.key(options.seed + 1), 4)
    guided, twist = guidance.event_guided(denoise, constraint, limit), guidance.event(constraint, limit)
    ancestral = solvers.ancestral()

    @jax.jit
    def draw(keys: Array) -> Array:
        return jax.vmap(lambda key: diffjax.sample(key, guided, ancestral, grid, shape=shape).x)(keys)

    @jax.jit
    def steered(key: Array) -> tuple[Array, Array, Array]:
        found = diffjax.steer(key, denoise, ancestral, grid, shape, particles=options.particles, twist=twist)
        chosen = smc.systematic()(jax.random.fold_in(key, 1), found.log_weights)
        return found.x[chosen], found.log_z, found.ess[-1]

    @jax.jit
    def says(time: Array, key: Array) -> Array:
        """The probability of the event by the twist, at states that are noised data."""
        level = PROCESS.level(time)
        at, noise, own = jax.random.split(key, 3)
        clean = denoise.data[jax.random.permutation(at, len(paths))[: options.draws]]
        clean += denoise.blur * jax.random.normal(own, clean.shape)
        states = level.alpha * clean + level.sigma * jax.random.normal(noise, clean.shape)
        return jnp.exp(jax.vmap(lambda x: twist(denoise, x, level)[0])(states)).mean()

    particles, log_z, ess = jax.lax.map(steered, jax.random.split(keys[1], options.populations))
    levels = PROCESS.schedule.time(np.linspace(-3.0, 3.0, 9))
    sets = {"guided": draw(jax.random.split(keys[0], options.draws)), "particles": particles.reshape(-1, *shape)}
    distance = functools.partial(metrics.sliced_wasserstein, keys[3])
    resampled = lambda seed, count: real[np.random.default_rng(seed).integers(0, len(real), count)]
    result: dict[str, Any] = {
        "probability": share,
        "estimates": np.exp(np.asarray(log_z, np.float64)),
        "ess": np.asarray(ess) / options.particles,
        "noise": np.asarray(PROCESS.level(levels).sigma / PROCESS.level(levels).alpha),
        "twist": [float(says(jnp.float32(time), keys[2])) for time in levels],
        "all": moments(paths),
        "event": moments(real),
    }
    for name, x in sets.items():
        finite = np.all(np.isfinite(x), axis=(1, 2))
        x = np.asarray(x)[finite]
        floor = np.mean([distance(resampled(seed, len(x)), real) for seed in range(4)])
        result[name] = moments(x) | {
            "diverged": float(np.mean(~finite)),
            "share": float(np.mean(np.asarray(jax.vmap(constraint)(x)) > limit)),
            "distance": float(distance(x, real) / floor),
            "mean_error": float(np.sqrt(np.mean((x.mean(0) - real.mean(0)) ** 2))),
            "std_error": float(np.sqrt(np.mean((x.std(0) - real.std(0)) ** 2))),
        }
    return result


def moments(paths: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and standard deviation at every time, (times, 3) each."""
    return {"mean": paths.mean(0), "std": paths.std(0)}


def plot_lorenz(options: Options, found: dict[str, dict[str, Any]]) -> None:
    """The conditional law of one coordinate over time, and the event's probability at every noise level."""
    colours = {"all": "0.6", "event": "black", "guided": "C0", "particles": "C3"}
    labels = {"all": "all", "event": "the event (rejection)", "guided": "event guidance", "particles": "steer"}
    with plt.rc_context(_plots.STYLE):
        figure, axes = plt.subplots(2, len(found), figsize=(4.6 * len(found), 6.4), squeeze=False)
        for (above, below), (event, each) in zip(axes.T, found.items(), strict=True):
            part = 0 if event == "lobe" else 2
            times = 0.1 * np.arange(len(each["all"]["mean"]))
            for name, colour in colours.items():
                mean, std = (each[name][moment][:, part] for moment in ("mean", "std"))
                width = 3.0 if name == "event" else 1.3
                above.plot(times, mean, color=colour, linewidth=width, label=labels[name])
                above.fill_between(times, mean - std, mean + std, color=colour, alpha=0.13, linewidth=0)
            above.set(title=f"{event}: {'xyz'[part]} given the event, mean and std", xlabel="time")
            below.plot(each["noise"], each["twist"], marker="o", label="mean of the twist")
            below.axhline(each["probability"], color="black", linewidth=3, alpha=0.3, label="share of the set")
            for i, estimate in enumerate(each["estimates"]):
                below.plot(each["noise"][0], estimate, "D", color="C3", label=None if i else "steer, by population")
            below.set(xscale="log", yscale="log", title="probability of the event", xlabel="sigma / alpha")
            below.legend()
        axes[0, 0].legend()
        _plots.save(figure, options.out / "lorenz.png")


# --- the run ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run with command-line arguments (default: those of the process); returns what metrics.json holds."""
    with _run.start(Options, arguments) as run:
        options, result = run.options, {}
        if not {*options.parts} <= {*PARTS} or not {*options.events} <= {*_lorenz.EVENTS}:
            known = f"parts must be among {PARTS} and events among {tuple(_lorenz.EVENTS)}"
            raise ValueError(f"{known}, got {options.parts!r} and {options.events!r}.")
        if "magnet" in options.parts:
            with run.clock("magnet"):
                ways = programs(options)
                make = lambda name: run.part(f"magnet {name}", lambda: magnet(options, ways, name))
                found = {name: make(name) for name in CONDITIONS}
            plot_magnets(options, found)
            result["magnet"] = {
                name: {way: points if way == "exact" else points["observables"] for way, points in each.items()}
                for name, each in found.items()
            }
            print(_magnet_table(options, result["magnet"]))
        if "lorenz" in options.parts:
            with run.clock("lorenz"):
                found = {
                    name: run.part(f"lorenz {name}", lambda name=name: lorenz(run, name)) for name in options.events
                }
            plot_lorenz(options, found)
            result["lorenz"] = found
            print(_lorenz_table(found))
        result["seconds"] = run.clock.seconds
        (run.out / "metrics.json").write_text(json.dumps(result, indent=2, default=np.ndarray.tolist) + "\n")
        print(f"{run.clock}; pictures and metrics.json are in {run.out}/")
    return result


def _magnet_table(options: Options, found: dict[str, Any]) -> str:
    lines = [f"{'order / alignment at scale':32}" + "".join(f"{scale:>16g}" for scale in options.scales)]
    for condition, each in found.items():
        for name, points in each.items():
            cells = [f"{point[OBSERVABLES[condition]]:9.3f}{point['alignment']:7.3f}" for point in points]
            lines.append(f"{f'{condition}, {name}':32}" + "".join(cells))
    return "\n".join(lines)


def _lorenz_table(found: dict[str, Any]) -> str:
    lines = []
    for event, each in found.items():
        estimates = np.asarray(each["estimates"])
        error = estimates.std(ddof=1) / np.sqrt(len(estimates))
        lines.append(f"{event}: probability {each['probability']:.4f}, particles {estimates.mean():.4f} +- {error:.4f}")
        for name in ("guided", "particles"):
            m = each[name]
            lines.append(
                f"  {name:10} in the event {m['share']:.3f}, distance / floor {m['distance']:.2f},"
                f" error of mean {m['mean_error']:.3f}, of std {m['std_error']:.3f}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
