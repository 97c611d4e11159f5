"""Guidance: denoiser -> denoiser."""

from diffjax.guidance.classifier_free import classifier_free
from diffjax.guidance.conditions import conditioned
from diffjax.guidance.residual import onetime_negative, self_negative
from diffjax.guidance.tilted import tilted

__all__ = ["classifier_free", "conditioned", "onetime_negative", "self_negative", "tilted"]
