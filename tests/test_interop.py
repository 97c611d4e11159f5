"""The schedules of diffusers: levels, what the network is told, and refusals."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax

PATH = Path(__file__).parent / "data" / "diffusers_schedules.json"
CASES = json.loads(PATH.read_text())["cases"]


def _name(case):
    fields = [f"{k}={v}" for k, v in case["config"].items() if not k.startswith("_") and k not in STABLE]
    return "-".join([case["config"]["_class_name"].removesuffix("Scheduler"), *fields, str(case["steps"])])[:80]


STABLE = {"beta_start", "beta_end", "trained_betas"}


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_levels_and_what_the_network_is_told_are_those_of_diffusers(case):
    config = {k: v for k, v in case["config"].items() if k != "_mu"}
    setting = diffjax.interop.diffusers(config, case["steps"], mu=case["config"].get("_mu"))
    process, prediction, grid = setting
    assert len(grid) == case["steps"]
    _, told = prediction.target.inputs(process, grid.t)
    zero_snr = config.get("rescale_betas_zero_snr", False)
    # diffusers computes tables in float32: that moves interpolated steps a little, and truncated ones by a whole one
    name = config["_class_name"]
    truncated = any(map(name.startswith, ("DPM", "UniPC"))) and (
        config.get("use_exponential_sigmas") or config.get("use_beta_sigmas") or "squared" in str(config)
    )
    np.testing.assert_allclose(told, case["timesteps"], rtol=1e-6, atol=1.0 if truncated else 0.02)
    ratio = np.append(np.exp(-grid.t.half_log_snr), np.exp(-grid.s.half_log_snr[-1:]))
    expected = np.array([np.inf if s == "inf" else s for s in case["sigmas"]])
    if "FlowMatch" in name or config.get("use_flow_sigmas"):
        ratio = ratio_to_time(ratio)  # diffusers' sigma is the flow's time
    if zero_snr:
        assert grid.t.alpha[0] == 0 and expected[0] >= 4095
        ratio, expected = ratio[1:], expected[1:]
    # float32 products of a thousand factors; the cosine table's last entries have alpha^2 = 2e-9
    rough = config.get("beta_schedule") in ("squaredcos_cap_v2", "laplace", "exp")
    np.testing.assert_allclose(ratio, expected, rtol=3e-3 if rough else 2e-4)
    # all levels lie on the process
    at = process.level(half_log_snr=grid.t.half_log_snr)
    np.testing.assert_allclose(at.alpha, grid.t.alpha, atol=1e-12)
    np.testing.assert_allclose(at.sigma, grid.t.sigma, atol=1e-12)


def ratio_to_time(ratio):
    return np.where(np.isinf(ratio), 1.0, ratio / (1 + np.where(np.isinf(ratio), 0.0, ratio)))


def test_kind_of_prediction():
    make = lambda kind: (
        diffjax.interop.diffusers({"_class_name": "DDIMScheduler", "prediction_type": kind}, 4).prediction
    )
    assert [repr(make(kind).target) for kind in ("epsilon", "sample", "v_prediction")] == [
        "noise()",
        "data()",
        "velocity()",
    ]
    flow = diffjax.interop.diffusers({"_class_name": "FlowMatchEulerDiscreteScheduler"}, 4).prediction
    assert repr(flow.target) == "flow()"


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "DPMSolverMultistep", "EDMEuler", "FlowMatchEulerDiscrete"])
def test_sampling_on_the_setting_is_right(name, x64):
    # a network that knows the exact answer, told what diffusers tells it
    process, _, grid = diffjax.interop.diffusers({"_class_name": name + "Scheduler"}, 400)
    oracle = diffjax.oracles.gaussian(np.array([0.3, -0.2]), np.array([0.5, 0.1]))
    x = np.array([0.7, -1.1]) * process.level(grid.t.time[0]).sigma
    out = diffjax.sample(jax.random.key(0), oracle, diffjax.solvers.ddim(), grid, x=jnp.asarray(x)).x
    np.testing.assert_allclose(out, oracle.flow(jnp.asarray(x), grid.start, process.level(0.0)), atol=0.02)


@pytest.mark.parametrize(
    ("config", "steps", "match"),
    [
        ({"_class_name": "LCMScheduler"}, 4, "_class_name"),
        ({}, 4, "_class_name"),
        ({"_class_name": "DDIMScheduler", "snr_shift_scale": 3.0}, 4, "snr_shift_scale"),
        ({"_class_name": "DDIMScheduler", "use_karras_sigmas": True}, 4, "use_karras_sigmas"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "flow_prediction"}, 4, "prediction_type"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, 4, "variance_type"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "quadratic"}, 4, "beta_schedule"),
        ({"_class_name": "DDPMScheduler"}, 0, "steps"),
        ({"_class_name": "DDPMScheduler"}, 1001, "steps"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, 4, "timestep_type"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "use_beta_sigmas": True}, 4, "one of"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, 4, "mu"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, 4, "invert_sigmas"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, 4, "flow_prediction"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, 4, "prediction_type"),
    ],
)
def test_what_is_not_supported_is_refused(config, steps, match):
    with pytest.raises(ValueError, match=match):
        diffjax.interop.diffusers(config, steps)
