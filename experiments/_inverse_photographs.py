"""Crops of photographs restored with priors of patches, beside a classical method each, and the prior's own images.

The prior's own images show what is the method's share of a wrong coverage: their patches are independent draws of the
mixture, so that the mean over patches that do not overlap is the exact denoiser, and there is an exact posterior.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax import inverse, metrics
from diffjax.levels import Array
from experiments import _inverse_methods, _inverse_pictures, _photographs, _run

if TYPE_CHECKING:
    from experiments.inverse import Options

SIDE, STRIDE = 8, 4  # of the mixture's patches; the network's are twice as large
OWN = "inpainting of the mixture's own"


def variance() -> float:
    """Of the photographs, per pixel."""
    return float(np.var(np.concatenate([image.reshape(-1) for image in _photographs.photographs()])))


def restored(options: Options, name: str, make: Any, given: Any, task: Any, truth: np.ndarray, key: Array) -> dict:
    """Samples of crops (N, S, H, W, 1) by a method; ``make(given)`` is the denoiser."""
    method = _inverse_methods.LINEAR[name]
    seen = _photographs.measured(task, truth, options.seed, firm=method.divides)
    s = _inverse_methods.setting(_photographs.PROCESS, options.levels, variance(), options.crop_draws, truth.shape[1:])
    program = jax.jit(lambda given, seen: method.each(key, make(given), seen, s)[0])
    return {"samples": np.asarray(program(given, seen))}


def scores(samples: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """What restored crops (N, S, H, W, 1) are worth."""
    inside = (samples.min(1) <= truth) & (truth <= samples.max(1))
    samples, unit = np.clip(samples, -1, 1), _photographs.as_unit
    mean = samples.mean(1)
    return {
        "psnr": float(np.mean(metrics.psnr(unit(mean), unit(truth)))),
        "ssim": float(np.mean(metrics.ssim(unit(mean), unit(truth)))),
        "edges": float(np.mean(_photographs.edge_error(mean, truth))),
        "edges_of_one": float(np.mean([_photographs.edge_error(x, truth) for x in samples.swapaxes(0, 1)])),
        "coverage": float(np.mean(inside)) if samples.shape[1] > 1 else None,
    }


# --- images of the prior itself -----------------------------------------------------------------------------------


def tiled(patches: Array, side: int) -> np.ndarray:
    """Patches (rows columns, 8, 8, 1) as one image (side, side, 1)."""
    count = side // SIDE
    rows = np.asarray(patches).reshape(count, count, SIDE, SIDE)
    return rows.swapaxes(1, 2).reshape(side, side, 1)


def cut(image: np.ndarray) -> np.ndarray:
    """The patches of an image (side, side, 1), as `tiled` puts them together."""
    count = len(image) // SIDE
    return image.reshape(count, SIDE, count, SIDE, 1).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 1)


def own_images(law: Any, count: int, side: int, key: Array) -> np.ndarray:
    """Images (N, side, side, 1) whose patches are independent draws of the mixture."""
    keys = jax.random.split(key, (count, (side // SIDE) ** 2))
    return np.stack([tiled(patches, side) for patches in jax.vmap(jax.vmap(law.sample))(keys)])


def exact_draws(law: Any, task: Any, truth: np.ndarray, draws: int, seed: int, key: Array) -> np.ndarray:
    """Draws (N, S, side, side, 1) of the exact posterior of inpainted `own_images`, patch by patch."""
    back, found = jax.jit(task.operator.adjoint), []
    keep = cut(np.asarray(back(jnp.ones(task.operator.output_shape))))
    for y in np.asarray(_photographs.measured(task, truth, seed).y):
        patches = []
        for j, values in enumerate(cut(np.asarray(back(jnp.asarray(y))))):
            one = inverse.measurement(inverse.diagonal(keep[j]), values, task.std)
            keys = jax.random.split(jax.random.fold_in(key, j), draws)
            patches.append(np.asarray(jax.vmap(inverse.posterior(law, one).sample)(keys)))
        found.append(np.stack([tiled(image, truth.shape[1]) for image in np.stack(patches, 1)]))
    return np.stack(found)


# --- the part -----------------------------------------------------------------------------------------------------


def part(run: _run.Run[Options], key: Array) -> dict:
    """Scores of every task, method and prior; draws photographs."""
    options, truth = run.options, _photographs.crops(run.options.crop)
    fit = lambda: _photographs.fitted_mixture(SIDE, options.components, options.patches, options.seed)
    law = _photographs.mixture(run.part("mixture of patches", fit), SIDE)
    apply, params = _photographs.trained(run, 2 * SIDE, options.patch_channels, options.patch_steps, 32, options.seed)
    priors = {
        "mixture": (lambda law: _photographs.patchwise(law, SIDE, STRIDE), law),
        "network": (lambda given: _photographs.network_prior(apply, given, 2 * SIDE, 2 * STRIDE), params),
    }
    every = _photographs.restorations(options.crop, options.seed)
    pairs = [(name, "mixture") for name in options.patch_methods]
    pairs += [(name, "network") for name in options.network_methods]
    crops, table = {}, {}
    for name in run.over(options.tasks, "photographs"):
        task, found = every[name], {}
        y = np.asarray(_photographs.measured(task, truth, options.seed).y)
        for method, prior in pairs:
            make, given = priors[prior]
            again = lambda m=method, make=make, given=given, task=task: restored(
                options, m, make, given, task, truth, key
            )
            found[f"{method}, {prior}"] = run.part(f"photographs {name} {method} {prior}", again)
        classical = np.stack([task.classical(one) for one in y])
        shown = np.stack([task.shown(one) for one in y])
        crops[name] = {"found": found, "classical": classical, "shown": shown, "name": task.name}
        table[name] = {task.name: scores(classical[:, None, ..., None], truth)}
        table[name] |= {label: scores(each["samples"], truth) for label, each in found.items()}
    _inverse_pictures.plot_photographs(options, crops, truth)
    return table | {OWN: _own(run, law, every["inpainting"], key)}


def _own(run: _run.Run[Options], law: Any, task: Any, key: Array) -> dict:
    """The prior's own images, inpainted by its exact posterior and by the methods."""
    options, (first, second) = run.options, jax.random.split(key)
    truth = own_images(law, 2, options.crop - options.crop % SIDE, first)
    make = lambda law: _photographs.patchwise(law, SIDE, SIDE)
    exact = lambda: {"samples": exact_draws(law, task, truth, options.crop_draws, options.seed, second)}
    found = {"exact posterior": run.part("own images, exact posterior", exact)}
    for name in options.patch_methods:
        again = lambda name=name: restored(options, name, make, law, task, truth, key)
        found[name] = run.part(f"own images, {name}", again)
    return {name: scores(each["samples"], truth) for name, each in found.items()}
