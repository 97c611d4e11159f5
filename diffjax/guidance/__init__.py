"""Guidance: denoiser -> denoiser."""

from diffjax.guidance.classifier_free import classifier_free

__all__ = ["classifier_free"]
