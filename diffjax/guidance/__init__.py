"""Guidance: denoiser -> denoiser.

Scale 1 is the conditional model (or the strong, or the plain one) and 0 the unconditional (weak) one everywhere; what
adds something to a plain denoiser (`tilted` and all that is made of it) is that denoiser at scale 0.
"""

from diffjax.guidance.autoguidance import autoguidance, weak_to_strong
from diffjax.guidance.cads import cads
from diffjax.guidance.characteristic import characteristic
from diffjax.guidance.classifier_free import classifier_free, composed
from diffjax.guidance.conditions import conditioned
from diffjax.guidance.noise_level import noise_direction, refined_noise
from diffjax.guidance.predictor_corrector import predictor_corrector
from diffjax.guidance.residual import onetime_negative, self_negative
from diffjax.guidance.rules import apg, rescale, zero_star
from diffjax.guidance.schedules import interval, ramp, sine
from diffjax.guidance.skipping import adaptive, fitted_weights, linear_guidance, zero_init
from diffjax.guidance.tilted import tilted

__all__ = [
    "adaptive",
    "apg",
    "autoguidance",
    "cads",
    "characteristic",
    "classifier_free",
    "composed",
    "conditioned",
    "fitted_weights",
    "interval",
    "linear_guidance",
    "noise_direction",
    "onetime_negative",
    "predictor_corrector",
    "ramp",
    "refined_noise",
    "rescale",
    "self_negative",
    "sine",
    "tilted",
    "weak_to_strong",
    "zero_init",
    "zero_star",
]
