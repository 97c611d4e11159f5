"""Guidance: denoiser -> denoiser.

Scale 1 is the conditional model (or the strong, or the plain one) and 0 the unconditional (weak) one everywhere; what
adds something to a plain denoiser (`tilted` and all that is made of it) is that denoiser at scale 0.
"""

from diffjax.guidance.autoguidance import autoguidance, weak_to_strong
from diffjax.guidance.bins import bin_loss, bin_probability, bins, cross_entropy, expected_tilt, quantile_edges
from diffjax.guidance.cads import cads
from diffjax.guidance.characteristic import characteristic
from diffjax.guidance.classifier import boundary_distance, class_twist, classifier, fitted_temperature
from diffjax.guidance.classifier_free import classifier_free, composed
from diffjax.guidance.conditions import conditioned
from diffjax.guidance.coupled import constrained, coupled, side_by_side
from diffjax.guidance.density import density, score_alignment, tangential
from diffjax.guidance.distilled import guidance_distillation
from diffjax.guidance.energy import contrastive_energy, energy
from diffjax.guidance.event import event, event_guided
from diffjax.guidance.gradient import gradient, likeness, potential_twist
from diffjax.guidance.hooks import perturbed, with_features
from diffjax.guidance.initial_noise import OptimisedNoise, optimised_noise
from diffjax.guidance.minority import minority_score, self_minority
from diffjax.guidance.noise_level import noise_direction, refined_noise
from diffjax.guidance.perturbed_attention import Heads, perturbed_attention, search_heads
from diffjax.guidance.predictor_corrector import predictor_corrector
from diffjax.guidance.probe import probe, probe_loss
from diffjax.guidance.residual import onetime_negative, self_negative
from diffjax.guidance.rules import apg, rescale, zero_star
from diffjax.guidance.schedules import interval, ramp, sine
from diffjax.guidance.skipping import adaptive, fitted_weights, linear_guidance, zero_init
from diffjax.guidance.soft_value import learned_value, soft_value_loss
from diffjax.guidance.tilted import tilted

__all__ = [
    "Heads",
    "OptimisedNoise",
    "adaptive",
    "apg",
    "autoguidance",
    "bin_loss",
    "bin_probability",
    "bins",
    "boundary_distance",
    "cads",
    "characteristic",
    "class_twist",
    "classifier",
    "classifier_free",
    "composed",
    "conditioned",
    "constrained",
    "contrastive_energy",
    "coupled",
    "cross_entropy",
    "density",
    "energy",
    "event",
    "event_guided",
    "expected_tilt",
    "fitted_temperature",
    "fitted_weights",
    "gradient",
    "guidance_distillation",
    "interval",
    "learned_value",
    "likeness",
    "linear_guidance",
    "minority_score",
    "noise_direction",
    "onetime_negative",
    "optimised_noise",
    "perturbed",
    "perturbed_attention",
    "potential_twist",
    "predictor_corrector",
    "probe",
    "probe_loss",
    "quantile_edges",
    "ramp",
    "refined_noise",
    "rescale",
    "score_alignment",
    "search_heads",
    "self_minority",
    "self_negative",
    "side_by_side",
    "sine",
    "soft_value_loss",
    "tangential",
    "tilted",
    "weak_to_strong",
    "with_features",
    "zero_init",
    "zero_star",
]
