"""Diagnostics: pure functions of what a sampler saved, one path at a time, and of what a model says at a point.

``saved = sample(..., save=("states", "x0")).saved`` has a path of states (N + 1, ...), with their levels, and one of
clean estimates (N, ...), the denoising trajectory; a batch is `jax.vmap`.

`reinjected` acts on what a diagnosis finds while sampling.  It changes the law that its solver samples and takes states
of one array, so it is not among the modifiers.
"""

from diffjax.diagnostics.artifacts import score_jumps as score_jumps
from diffjax.diagnostics.calibration import clean_offsets as clean_offsets
from diffjax.diagnostics.conservativity import antisymmetry as antisymmetry
from diffjax.diagnostics.conservativity import gauge_residual as gauge_residual
from diffjax.diagnostics.conservativity import intrinsic_dimension as intrinsic_dimension
from diffjax.diagnostics.conservativity import loop_integral as loop_integral
from diffjax.diagnostics.fokker_planck import fokker_planck_residual as fokker_planck_residual
from diffjax.diagnostics.fokker_planck import gap_bound as gap_bound
from diffjax.diagnostics.hallucination import estimate_variance as estimate_variance
from diffjax.diagnostics.paths import chord_distance as chord_distance
from diffjax.diagnostics.paths import curvature as curvature
from diffjax.diagnostics.paths import path_dimension as path_dimension
from diffjax.diagnostics.paths import path_spectrum as path_spectrum
from diffjax.diagnostics.reinjected import reinjected as reinjected
from diffjax.diagnostics.scores import deviation as deviation
from diffjax.diagnostics.scores import explained_variance as explained_variance
from diffjax.diagnostics.sensitivity import local_share as local_share
from diffjax.diagnostics.sensitivity import sensitivity as sensitivity
