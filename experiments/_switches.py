"""The switches of the training loop by the names that the command line takes."""

from __future__ import annotations

from typing import Any, Literal, get_args

from diffjax import training
from diffjax.training import couplings, weightings

Law = Literal[
    "uniform", "logit-normal", "mode", "cosmap", "log-normal", "log-snr", "importance", "warped", "curriculum"
]
Weighting = Literal[
    "target", "signal-to-noise", "min-snr", "soft-min-snr", "truncated-snr", "p2", "edm", "bound", "sigmoid"
]
Coupling = Literal["independent", "assigned", "nearest"]
States = Literal["noised", "perturbed", "scheduled", "unrolled"]

LAWS: dict[str, Any] = {
    "uniform": training.uniform,
    "logit-normal": training.logit_normal,
    "mode": training.mode,
    "cosmap": training.cosmap,
    "log-normal": training.log_normal,
    "log-snr": lambda: training.log_snr(-10.0, 10.0),
    "importance": training.importance,
    "warped": training.warped,
    "curriculum": training.curriculum,
}
WEIGHTINGS: dict[str, Any] = {
    "target": lambda: weightings.unweighted,
    "signal-to-noise": weightings.signal_to_noise,
    "min-snr": weightings.min_snr,
    "soft-min-snr": weightings.soft_min_snr,
    "truncated-snr": weightings.truncated_snr,
    "p2": weightings.p2,
    "edm": weightings.edm,
    "bound": weightings.on_bound,
    "sigmoid": weightings.sigmoid,
}
COUPLINGS: dict[str, Any] = {
    "independent": couplings.independent,
    "assigned": couplings.assigned,
    "nearest": couplings.nearest,
}
STATES: dict[str, Any] = {
    "noised": lambda: None,
    "perturbed": training.perturbed,
    "scheduled": training.scheduled_sampling,
    "unrolled": training.unrolled,
}


def switches(law: str, weighting: str, coupling: str, states: str, self_conditioning: float) -> dict[str, Any]:
    """The keyword arguments of `training.denoising`, made with their defaults."""
    return {
        "law": LAWS[law](),
        "weighting": WEIGHTINGS[weighting](),
        "coupling": COUPLINGS[coupling](),
        "states": STATES[states](),
        "self_conditioning": self_conditioning,
    }


for _names, _table in ((Law, LAWS), (Weighting, WEIGHTINGS), (Coupling, COUPLINGS), (States, STATES)):
    assert set(get_args(_names)) == set(_table)
