"""The schedulers of diffusers: a scheduler's configuration as a process, a prediction and a grid.

A configuration says three things that diffjax keeps apart: how the network was trained (the table of betas and the
prediction: process and prediction), which noise levels sampling walks (the grid), and which solver walks them (choose
one of `diffjax.solvers`).  The levels, and the numbers that the network is told, are those of diffusers: its float
time steps, its rounding and its interpolation, whatever the solver.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from diffjax import predictions, processes
from diffjax.levels import Array, Grid, Level, Process
from diffjax.predictions import Prediction


class Setting(NamedTuple):
    """What a scheduler's configuration becomes."""

    process: Process
    prediction: Prediction
    grid: Grid


def diffusers(config: Mapping[str, Any], steps: int, mu: float | None = None) -> Setting:
    """A diffusers scheduler configuration, the contents of ``scheduler_config.json``, as process, prediction and grid.

    Args:
        config: the configuration; missing fields take the scheduler's own defaults, which differ between schedulers.
        steps: the number of inference steps.
        mu: the shift's exponent where the configuration asks for dynamic shifting; see `diffjax.grids.resolution_mu`.

    Read are the schedulers DDPM, DDIM, PNDM, DPMSolverMultistep, DPMSolverSinglestep, DEISMultistep, UniPCMultistep,
    SASolver, Euler, EulerAncestral, Heun, LMS, KDPM2 (Ancestral), EDMEuler, EDMDPMSolverMultistep, FlowMatchEuler and
    FlowMatchHeun.  Fields that belong to the solver (its order, say) are left to the choice of a solver; clipping and
    thresholding to `diffjax.corrections.clipped` and `thresholded`.  Two differences: every step starts where the one
    before ended (DDIM in diffusers goes to ``t - N // steps``, which for some spacings is not the next level), and a
    table rescaled to zero terminal SNR ends at alpha = 0 and not at 2^-12, but for Karras-like schedules, which need
    a finite level and keep theirs.

    Raises ValueError for another scheduler, and for fields that are unknown or change the result in a way that is not
    supported.

    >>> setting = diffusers({"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}, steps=4)
    >>> setting.process.network_time(setting.grid.t)
    array([750., 500., 250.,   0.])
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}.")
    name = str(config.get("_class_name", ""))
    kind = _KINDS.get(name.removesuffix("Scheduler"))
    if kind is None:
        raise ValueError(f"config['_class_name'] must be one of {sorted(_KINDS)} + 'Scheduler', got {name!r}.")
    fields = {**kind.defaults, **{k: v for k, v in config.items() if not k.startswith("_") and k not in _SOLVER}}
    unknown = sorted(set(fields) - set(kind.defaults))
    if unknown:
        raise ValueError(f"config has fields that are not read for {name}: { {k: config[k] for k in unknown} }.")
    for field, allowed in _ALLOWED.items():
        if field in fields and fields[field] not in allowed:
            raise ValueError(f"config[{field!r}] must be one of {allowed}, got {fields[field]!r}.")
    if fields.get("use_dynamic_shifting") and mu is None:
        raise ValueError("config asks for dynamic shifting: mu is needed.")
    if sum(bool(fields.get(f"use_{s}_sigmas")) for s in ("karras", "exponential", "beta")) > 1:
        raise ValueError("config may ask for one of Karras, exponential and beta sigmas only.")
    return kind.read(fields, steps, mu)


# --- table models -------------------------------------------------------------------------------------------------


def _table(fields: dict, steps: int, mu: float | None) -> Setting:
    """DDPM, DDIM, PNDM: integer time steps of a table."""
    process = _process(fields)
    count = fields["num_train_timesteps"]
    index = _spaced(fields, count, steps, extra=0).round()
    # the last level is the data, or (set_alpha_to_one = False) the table's first entry
    last = 0.0 if fields.get("set_alpha_to_one", True) else 1.0
    return _setting(process, fields, process.level(np.append(index + 1.0, last)))


def _interpolated(fields: dict, steps: int, mu: float | None) -> Setting:
    """Euler, Heun, LMS, KDPM2: noise levels interpolated in a table at real time steps."""
    process = _process(fields)
    count = fields["num_train_timesteps"]
    known = _table_ratios(process, fields)
    index = _spaced(fields, count, steps, extra=0)
    if fields["timestep_spacing"] != "linspace":
        index = index.round()
    ratios = np.interp(index, np.arange(count), known)
    if any(fields.get(f"use_{s}_sigmas") for s in ("karras", "exponential", "beta")):
        ratios = _respaced(fields, ratios[0], ratios[-1], steps)
        index = _index(ratios, known)
    else:
        ratios = np.where(_vanishing(fields, index), np.inf, ratios)
    last = known[0] if fields.get("final_sigmas_type") == "sigma_min" else 0.0
    return _from_ratios(process, fields, index, np.append(ratios, last))


def _multistep(fields: dict, steps: int, mu: float | None) -> Setting:
    """DPM-Solver, UniPC, DEIS, SA-Solver: integer time steps, one of ``steps + 1`` left out, over a whole table."""
    if fields["use_flow_sigmas"]:
        return _multistep_flow(fields, steps, mu)
    process = _process(fields)
    count = fields["num_train_timesteps"]
    known = _table_ratios(process, fields)
    kept = count
    if "lambda_min_clipped" in fields:
        kept = count - int(np.searchsorted(-np.log(known[::-1]), float(fields["lambda_min_clipped"])))
    last = known[0] if fields["final_sigmas_type"] == "sigma_min" else 0.0
    if any(fields.get(f) for f in (*_RESPACED, "use_lu_lambdas")):
        ratios = _respaced(fields, known[-1], known[0], steps)
        index = _index(ratios, known)
        rounded = fields.get("use_karras_sigmas") or fields.get("use_lu_lambdas")
        cosine = fields["rounds_cosine"] is False and fields["beta_schedule"] == "squaredcos_cap_v2"
        index = index.round() if rounded and not cosine else index
        last = ratios[-1] if fields["final_sigmas_type"] == "sigma_min" else 0.0
    else:
        index = _spaced(fields, kept, steps, extra=1).round()
        ratios = np.where(_vanishing(fields, index), np.inf, np.interp(index, np.arange(count), known))
    return _from_ratios(process, fields, np.trunc(index), np.append(ratios, last))


def _process(fields: dict) -> Process:
    count, low, high = fields["num_train_timesteps"], fields["beta_start"], fields["beta_end"]
    schedule = fields["beta_schedule"]
    if fields["trained_betas"] is not None:
        process = processes.table(fields["trained_betas"])
    elif schedule in ("linear", "scaled_linear"):
        process = processes.ddpm(count, low, high, schedule)
    elif schedule == "sigmoid":
        process = processes.table(low + (high - low) / (1 + np.exp(-np.linspace(-6.0, 6.0, count))))
    else:
        process = processes.table(_betas(_PRODUCTS[schedule], count))
    return processes.zero_terminal_snr(process) if fields.get("rescale_betas_zero_snr") else process


def _betas(product: Callable[[float], float], count: int) -> Array:
    """The betas whose products of (1 - beta) follow a function of the share of time, each at most 0.999."""
    values = np.array([product(i / count) for i in range(count + 1)])
    return np.minimum(1 - values[1:] / values[:-1], 0.999)


def _laplace(t: float) -> float:
    rate = -0.5 * math.copysign(1.0, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    return math.sqrt(math.exp(rate) / (1 + math.exp(rate)))


_PRODUCTS = {
    "squaredcos_cap_v2": lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2,
    "exp": lambda t: math.exp(-12.0 * t),
    "laplace": _laplace,
}


def _table_ratios(process: Process, fields: dict) -> Array:
    """sigma / alpha at every entry; the last of a rescaled table at alpha = 2^-12."""
    level = process.level(np.arange(1.0, fields["num_train_timesteps"] + 1))
    finite = np.where(level.alpha == 0, 1.0, level.alpha)
    return np.where(level.alpha == 0, math.sqrt(2.0**24 - 1), level.sigma / finite)


def _spaced(fields: dict, count: int, steps: int, extra: int) -> Array:
    """Time steps from noisy to clean; multistep schedulers make ``extra = 1`` more of them and leave out the last."""
    spacing, total = fields["timestep_spacing"], fields["num_train_timesteps"]
    if steps + extra > total:
        raise ValueError(f"steps must be at most {total - extra}, got {steps!r}.")
    if spacing == "linspace":
        return np.linspace(0, count - 1, steps + extra)[::-1][:steps]
    if spacing == "leading":
        stride = count // (steps + extra)
        return np.arange(steps + extra)[::-1][:steps] * float(stride) + fields["steps_offset"]
    return np.round(count - np.arange(steps) * (total / steps)) - 1.0


def _vanishing(fields: dict, index: Array) -> Array:
    return (index == fields["num_train_timesteps"] - 1) & bool(fields.get("rescale_betas_zero_snr"))


def _index(ratios: Array, known: Array) -> Array:
    """The real time steps of noise levels: linear in log sigma between the table's entries."""
    return np.interp(np.log(np.maximum(ratios, 1e-10)), np.log(known), np.arange(known.size))


_RESPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def _respaced(fields: dict, high: float, low: float, steps: int) -> Array:
    """``steps`` noise levels from ``high`` to ``low``, or those that the configuration gives instead."""
    high = high if fields.get("sigma_max") is None else fields["sigma_max"]
    low = low if fields.get("sigma_min") is None else fields["sigma_min"]
    u = np.linspace(0.0, 1.0, steps)
    if fields.get("use_karras_sigmas"):
        return _karras(high, low, u, 7.0)
    if fields.get("use_beta_sigmas"):
        return low + special.betaincinv(0.6, 0.6, 1 - u) * (high - low)
    return np.exp(math.log(high) + u * (math.log(low) - math.log(high)))  # exponential; Lu's lambdas are the same


def _karras(high: float, low: float, u: Array, rho: float) -> Array:
    return (high ** (1 / rho) + u * (low ** (1 / rho) - high ** (1 / rho))) ** rho


# --- flow matching and EDM ------------------------------------------------------------------------------------------


def _flow(fields: dict, steps: int, mu: float | None) -> Setting:
    """FlowMatchEuler and FlowMatchHeun: sigma is the time, the network is told N times it."""
    count, shift = fields["num_train_timesteps"], fields["shift"]
    lowest = 1 / count if fields["use_dynamic_shifting"] else _shift(1 / count, shift)
    sigmas = _shifted(fields, np.linspace(1.0, lowest, steps), shift, mu)
    if any(fields.get(f) for f in _RESPACED):
        sigmas = _respaced(fields, sigmas[0], sigmas[-1], steps)
    return _flow_setting(count, sigmas, sigmas, 0.0)


def _multistep_flow(fields: dict, steps: int, mu: float | None) -> Setting:
    """Multistep schedulers on a flow; the network is told whole numbers."""
    if fields["prediction_type"] != "flow_prediction":
        raise ValueError(f"use_flow_sigmas needs prediction_type 'flow_prediction', got {fields['prediction_type']!r}.")
    if any(fields.get(f) for f in (*_RESPACED, "use_lu_lambdas")):
        raise ValueError("use_flow_sigmas together with respaced sigmas is not supported.")
    count, shift = fields["num_train_timesteps"], fields["flow_shift"]
    if "shift_terminal" in fields:  # UniPC
        sigmas = _shifted(fields, np.linspace(1.0, 1 / count, steps + 1)[:-1], shift, mu)
        sigmas = np.where(sigmas > 1 - 1e-6, sigmas - 1e-6, sigmas)
    else:
        shift = math.exp(mu) if fields["use_dynamic_shifting"] and mu is not None else shift
        sigmas = _shift(1 - np.linspace(1.0, 1 / count, steps + 1), shift)[::-1][:-1]
    last = sigmas[-1] if fields["final_sigmas_type"] == "sigma_min" and "shift_terminal" in fields else 0.0
    if fields["final_sigmas_type"] == "sigma_min" and "shift_terminal" not in fields:
        raise ValueError(
            "use_flow_sigmas with final_sigmas_type 'sigma_min' is not supported: it ends at a table's level."
        )
    return _flow_setting(count, sigmas, np.trunc(sigmas * count) / count, last)


def _shift(sigma: Array, shift: float) -> Array:
    return shift * sigma / (1 + (shift - 1) * sigma)


def _shifted(fields: dict, sigmas: Array, shift: float, mu: float | None) -> Array:
    if fields["use_dynamic_shifting"] and mu is not None:
        shift = math.exp(mu) if fields["time_shift_type"] == "exponential" else mu
    sigmas = _shift(sigmas, shift)
    if fields.get("shift_terminal"):
        sigmas = 1 - (1 - sigmas) * ((1 - fields["shift_terminal"]) / (1 - sigmas[-1]))
    return sigmas


def _flow_setting(count: int, sigmas: Array, told: Array, last: float) -> Setting:
    process = processes.scaled_time(processes.flow(), float(count))
    level = process.level(np.append(sigmas, last))
    return Setting(process, predictions.flow(process), _grid(process, level._replace(time=np.append(told, last))))


def _edm(fields: dict, steps: int, mu: float | None) -> Setting:
    """EDMEuler and EDMDPMSolverMultistep."""
    if fields["prediction_type"] != "epsilon":
        raise ValueError(f"prediction_type must be 'epsilon' for EDM schedulers, got {fields['prediction_type']!r}.")
    high, low = fields["sigma_max"], fields["sigma_min"]
    u = np.linspace(0.0, 1.0, steps)
    if fields["sigma_schedule"] == "karras":
        sigmas = _karras(high, low, u, fields["rho"])
    else:
        sigmas = np.exp(np.linspace(math.log(high), math.log(low), steps))
    process = processes.edm(float(high))
    last = low if fields["final_sigmas_type"] == "sigma_min" else 0.0
    level = process.level(np.minimum(np.append(sigmas, last), high))
    return Setting(process, predictions.edm(process, fields["sigma_data"]), _grid(process, level))


# --- assembly -----------------------------------------------------------------------------------------------------


def _from_ratios(process: Process, fields: dict, index: Array, ratios: Array) -> Setting:
    """Levels of a table at given sigma / alpha; the network is told ``index``, and nothing at the last level."""
    vanishing = np.isinf(ratios)
    finite = np.where(vanishing, 1.0, ratios)
    alpha = np.where(vanishing, 0.0, 1 / np.hypot(1.0, finite))
    sigma = np.where(vanishing, 1.0, finite / np.hypot(1.0, finite))
    with np.errstate(divide="ignore"):
        half_log_snr = -np.log(ratios)
    last = process.schedule.time(half_log_snr[-1:]) if ratios[-1] > 0 else np.zeros(1)
    return _setting(process, fields, Level(np.append(index + 1.0, last), alpha, sigma, half_log_snr))


def _setting(process: Process, fields: dict, level: Level) -> Setting:
    make = {
        "epsilon": predictions.noise,
        "sample": predictions.data,
        "v_prediction": predictions.velocity,
    }.get(fields["prediction_type"])
    if make is None:
        raise ValueError(f"prediction_type {fields['prediction_type']!r} needs use_flow_sigmas.")
    return Setting(process, make(process), _grid(process, level))


def _grid(process: Process, level: Level) -> Grid:
    t, s = (Level(*(leaf[part] for leaf in level)) for part in (slice(None, -1), slice(1, None)))
    return Grid(process, Level(*(leaf[0] for leaf in level)), t, s)


class _Kind(NamedTuple):
    read: Callable[[dict, int, float | None], Setting]
    defaults: dict[str, Any]


_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
}
_KARRAS = {f: False for f in _RESPACED}
_HALF = {"beta_start": 0.00085, "beta_end": 0.012}
_LEADING = {**_BETAS, "timestep_spacing": "leading"}
_ANY_MULTISTEP = {
    **_BETAS,
    **_KARRAS,
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "final_sigmas_type": "zero",
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
    "rounds_cosine": True,  # ours: whether Karras time steps are rounded for the cosine table, too
}
_CLIPPED = {"lambda_min_clipped": -math.inf, "variance_type": None}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_MINIMAL = {**_ANY_MULTISTEP, "final_sigmas_type": "sigma_min"}
_EDM = {
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
    "final_sigmas_type": "zero",
}
_FLOW = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "time_shift_type": "exponential",
    "invert_sigmas": False,
    "stochastic_sampling": False,
    **_KARRAS,
}

_KINDS = {
    "DDPM": _Kind(_table, {**_LEADING, **_ZERO_SNR, "variance_type": "fixed_small"}),
    "DDIM": _Kind(_table, {**_LEADING, **_ZERO_SNR, "set_alpha_to_one": True}),
    "PNDM": _Kind(_table, {**_LEADING, "set_alpha_to_one": False}),
    "EulerDiscrete": _Kind(
        _interpolated,
        {
            **_BETAS,
            **_KARRAS,
            **_ZERO_SNR,
            "interpolation_type": "linear",
            "sigma_min": None,
            "sigma_max": None,
            "timestep_type": "discrete",
            "final_sigmas_type": "zero",
        },
    ),
    "EulerAncestralDiscrete": _Kind(_interpolated, {**_BETAS, **_ZERO_SNR}),
    "HeunDiscrete": _Kind(_interpolated, {**_BETAS, **_HALF, **_KARRAS}),
    "LMSDiscrete": _Kind(_interpolated, {**_BETAS, **_KARRAS}),
    "KDPM2Discrete": _Kind(_interpolated, {**_BETAS, **_HALF}),
    "KDPM2AncestralDiscrete": _Kind(_interpolated, {**_BETAS, **_HALF}),
    "DPMSolverMultistep": _Kind(
        _multistep, {**_ANY_MULTISTEP, **_CLIPPED, **_ZERO_SNR, "use_lu_lambdas": False, "rounds_cosine": False}
    ),
    "DPMSolverSinglestep": _Kind(_multistep, {**_ANY_MULTISTEP, **_CLIPPED}),
    "UniPCMultistep": _Kind(
        _multistep, {**_ANY_MULTISTEP, **_ZERO_SNR, "sigma_min": None, "sigma_max": None, "shift_terminal": None}
    ),
    "DEISMultistep": _Kind(_multistep, _MINIMAL),
    "SASolver": _Kind(_multistep, {**_MINIMAL, **_CLIPPED}),
    "EDMEuler": _Kind(_edm, _EDM),
    "EDMDPMSolverMultistep": _Kind(_edm, _EDM),
    "FlowMatchEulerDiscrete": _Kind(_flow, _FLOW),
    "FlowMatchHeunDiscrete": _Kind(_flow, _FLOW),
}

# fields of the solver, of the denoiser's output, of pipelines, and of training
_SOLVER = {
    "algorithm_type",
    "base_image_seq_len",
    "base_shift",
    "clip_sample",
    "clip_sample_range",
    "corrector_order",
    "disable_corrector",
    "dynamic_thresholding_ratio",
    "euler_at_final",
    "lower_order_final",
    "max_image_seq_len",
    "max_shift",
    "predict_x0",
    "predictor_order",
    "sample_max_value",
    "skip_prk_steps",
    "solver_order",
    "solver_p",
    "solver_type",
    "tau_func",
    "thresholding",
}

_ALLOWED = {
    "beta_schedule": ("linear", "scaled_linear", "sigmoid", *_PRODUCTS),
    "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "sigma_schedule": ("karras", "exponential"),
    "time_shift_type": ("exponential", "linear"),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "invert_sigmas": (False,),
    "stochastic_sampling": (False, True),
}
