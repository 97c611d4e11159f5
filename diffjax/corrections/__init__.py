"""Corrections: denoiser -> denoiser, changes of the estimates themselves, which every solver then sees."""

from diffjax.corrections.analytic_start import analytic_start
from diffjax.corrections.calibrated import calibrated
from diffjax.corrections.dualfast import dualfast
from diffjax.corrections.epsilon_scaling import epsilon_scaled, variance_gap
from diffjax.corrections.patchwise import patchwise
from diffjax.corrections.switched import switched
from diffjax.corrections.thresholding import clipped, thresholded
from diffjax.corrections.time_shift import time_shifted

__all__ = [
    "analytic_start",
    "calibrated",
    "clipped",
    "dualfast",
    "epsilon_scaled",
    "patchwise",
    "switched",
    "thresholded",
    "time_shifted",
    "variance_gap",
]
