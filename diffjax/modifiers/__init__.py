"""Modifiers: solver -> solver, and changes of a denoiser's estimates that every solver then sees."""

from diffjax.modifiers.analytic_start import analytic_start
from diffjax.modifiers.doubling import doubled
from diffjax.modifiers.dualfast import dualfast
from diffjax.modifiers.epsilon_scaling import epsilon_scaled, variance_gap
from diffjax.modifiers.gaps import churned, renoised
from diffjax.modifiers.langevin import langevin
from diffjax.modifiers.thresholding import clipped, thresholded
from diffjax.modifiers.time_shift import time_shifted

__all__ = [
    "analytic_start",
    "churned",
    "clipped",
    "doubled",
    "dualfast",
    "epsilon_scaled",
    "langevin",
    "renoised",
    "thresholded",
    "time_shifted",
    "variance_gap",
]
