"""Write the time steps and noise levels of diffusers' schedulers to tests/data/diffusers_schedules.json.

Runs in an environment of its own, which needs torch and diffusers; the test-suite needs only the numbers:

    python benchmarks/peers/schedulers.py
"""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np

STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BETAS = [float(b) for b in np.linspace(1e-4, 0.03, 200)]

CASES: list[tuple[str, dict, int]] = [
    ("DDPM", {}, 10),
    ("DDPM", {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "linspace"}, 7),
    ("DDPM", {"beta_schedule": "sigmoid", "timestep_spacing": "trailing"}, 7),
    ("DDPM", {"beta_schedule": "laplace", "prediction_type": "sample"}, 5),
    ("DDPM", {"trained_betas": BETAS, "num_train_timesteps": 200}, 8),
    ("DDIM", {**STABLE, "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}, 10),
    ("DDIM", {**STABLE, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
              "prediction_type": "v_prediction"}, 6),
    ("PNDM", {**STABLE, "skip_prk_steps": True, "steps_offset": 1}, 10),
    ("PNDM", {"skip_prk_steps": True, "timestep_spacing": "trailing", "set_alpha_to_one": True}, 9),
    ("DPMSolverMultistep", STABLE, 10),
    ("DPMSolverMultistep", {**STABLE, "use_karras_sigmas": True}, 10),
    ("DPMSolverMultistep", {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}, 6),
    ("DPMSolverMultistep", {**STABLE, "use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"}, 7),
    ("DPMSolverMultistep", {**STABLE, "use_beta_sigmas": True}, 7),
    ("DPMSolverMultistep", {**STABLE, "use_lu_lambdas": True}, 7),
    ("DPMSolverMultistep", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}, 6),
    ("DPMSolverMultistep", {**STABLE, "timestep_spacing": "leading", "steps_offset": 1}, 9),
    ("DPMSolverMultistep", {**STABLE, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True,
                            "prediction_type": "v_prediction"}, 7),
    ("DPMSolverMultistep", {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}, 6),
    ("DPMSolverSinglestep", STABLE, 9),
    ("DPMSolverSinglestep", {**STABLE, "use_karras_sigmas": True}, 9),
    ("DEISMultistep", STABLE, 8),
    ("DEISMultistep", {**STABLE, "use_karras_sigmas": True}, 8),
    ("UniPCMultistep", STABLE, 8),
    ("UniPCMultistep", {**STABLE, "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, 8),
    ("UniPCMultistep", {**STABLE, "use_exponential_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0}, 8),
    ("UniPCMultistep", {"use_flow_sigmas": True, "flow_shift": 5.0, "prediction_type": "flow_prediction"}, 8),
    ("UniPCMultistep", {"use_flow_sigmas": True, "use_dynamic_shifting": True, "shift_terminal": 0.1,
                        "prediction_type": "flow_prediction", "_mu": 0.8}, 8),
    ("SASolver", {**STABLE, "timestep_spacing": "trailing"}, 8),
    ("EulerDiscrete", STABLE, 10),
    ("EulerDiscrete", {**STABLE, "timestep_spacing": "leading", "steps_offset": 1}, 10),
    ("EulerDiscrete", {**STABLE, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True,
                       "prediction_type": "v_prediction"}, 10),
    ("EulerDiscrete", {**STABLE, "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, 10),
    ("EulerDiscrete", {**STABLE, "use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0}, 10),
    ("EulerDiscrete", {**STABLE, "use_exponential_sigmas": True}, 6),
    ("EulerDiscrete", {**STABLE, "use_beta_sigmas": True}, 6),
    ("EulerAncestralDiscrete", {}, 7),
    ("HeunDiscrete", {"beta_schedule": "exp"}, 6),
    ("HeunDiscrete", {"use_karras_sigmas": True}, 6),
    ("LMSDiscrete", {**STABLE, "use_karras_sigmas": True}, 6),
    ("KDPM2Discrete", {**STABLE, "timestep_spacing": "trailing"}, 6),
    ("EDMEuler", {}, 10),
    ("EDMDPMSolverMultistep", {"sigma_schedule": "exponential", "sigma_min": 0.01, "sigma_max": 50.0,
                               "sigma_data": 1.0, "final_sigmas_type": "sigma_min"}, 9),
    ("FlowMatchEulerDiscrete", {}, 8),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}, 10),
    ("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True, "_mu": 0.9, "shift_terminal": 0.02}, 10),
    ("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True, "_mu": 2.5, "time_shift_type": "linear"}, 5),
    ("FlowMatchEulerDiscrete", {"shift": 2.0, "use_karras_sigmas": True}, 6),
    ("FlowMatchEulerDiscrete", {"use_beta_sigmas": True}, 6),
    ("FlowMatchHeunDiscrete", {"shift": 2.0}, 6),
]  # fmt: skip


def levels(name: str, config: dict, steps: int) -> dict:
    """What a scheduler walks: each of its levels once, without the second calls of two-call methods."""
    mu = config.get("_mu")
    scheduler = getattr(diffusers, name + "Scheduler")(**{k: v for k, v in config.items() if k != "_mu"})
    scheduler.set_timesteps(steps, **({} if mu is None else {"mu": mu}))
    told = np.asarray(scheduler.timesteps, np.float64)
    if name in ("DDPM", "DDIM", "PNDM"):
        told = told[np.append(True, np.diff(told) != 0)]
        products = np.asarray(scheduler.alphas_cumprod, np.float64)[told.astype(int)]
        sigmas = np.sqrt((1 - products) / products, where=products > 0, out=np.full(products.shape, np.inf))
        final = getattr(scheduler, "final_alpha_cumprod", np.ones(()))
        sigmas = np.append(sigmas, np.sqrt((1 - float(final)) / float(final)))
    else:
        sigmas = np.asarray(scheduler.sigmas, np.float64)
        if name.startswith(("Heun", "FlowMatchHeun", "KDPM2")):  # each inner level is there twice
            told = told[::2]
            last = sigmas[-1:] if "KDPM2" not in name else []  # there the last level is one of those
            sigmas = np.concatenate([sigmas[:1], sigmas[1:-1:2], last])
    assert len(sigmas) == len(told) + 1, (name, config, len(sigmas), len(told))
    return {"timesteps": told.tolist(), "sigmas": [s if np.isfinite(s) else "inf" for s in sigmas.tolist()]}


def main() -> None:
    """Write the file."""
    cases = [
        {"config": {"_class_name": name + "Scheduler", **config}, "steps": steps, **levels(name, config, steps)}
        for name, config, steps in CASES
    ]
    target = Path(__file__).parents[2] / "tests" / "data" / "diffusers_schedules.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(case) for case in cases)
    target.write_text(f'{{"diffusers": "{diffusers.__version__}", "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
