"""Training as pure functions: loss, step, moving average, optimiser, loop, checkpoints.

loss  = denoising(prediction, apply, law=logit_normal(), dropout=0.1, null=10)
state = init(key, params, optimiser)
state = fit(state, train_step(loss, optimiser), batches, steps=2000, folder="runs/digits")
"""

from diffjax.training import checkpoint, couplings, ema, transfer, weightings
from diffjax.training.adaptive import curriculum, importance, warped
from diffjax.training.compact_prior import prior_diffusion, prior_restorer, prior_sampler, restored
from diffjax.training.exposure import perturbed, scheduled_sampling, unrolled
from diffjax.training.hybrid import hybrid
from diffjax.training.incomplete import incomplete
from diffjax.training.loop import fit
from diffjax.training.losses import denoising
from diffjax.training.maximisation import maximisation
from diffjax.training.multitask import aggregated, aggregation_share, head_twist, multitask
from diffjax.training.noise_predictor import noise_predictor
from diffjax.training.noise_refinement import noise_refinement
from diffjax.training.optimal_classifier import (
    Round,
    Visits,
    optimal_classifier,
    optimal_token_classifier,
    token_tilt,
    token_visits,
    visits,
)
from diffjax.training.optimiser import adam
from diffjax.training.pairs import guided, learned_coupling
from diffjax.training.picard import picard_consistency, picard_iterates, picard_weights
from diffjax.training.precision import mixed
from diffjax.training.progressive import Stage, halved, halvings, progressive_distillation, two_steps
from diffjax.training.self_conditioning import Stacked, self_conditioned, stacked
from diffjax.training.step import Metrics, TrainState, data_mesh, init, train_step, update
from diffjax.training.times import cosmap, log_normal, log_snr, logit_normal, mode, restricted, shifted, uniform
from diffjax.training.transfer import surgery
from diffjax.training.weightings import unweighted, weight_limit

__all__ = [
    "Metrics",
    "Round",
    "Stacked",
    "Stage",
    "TrainState",
    "Visits",
    "adam",
    "aggregated",
    "aggregation_share",
    "checkpoint",
    "cosmap",
    "couplings",
    "curriculum",
    "data_mesh",
    "denoising",
    "ema",
    "fit",
    "guided",
    "halved",
    "halvings",
    "hybrid",
    "importance",
    "incomplete",
    "init",
    "learned_coupling",
    "log_normal",
    "log_snr",
    "logit_normal",
    "maximisation",
    "mixed",
    "mode",
    "multitask",
    "noise_predictor",
    "noise_refinement",
    "optimal_classifier",
    "optimal_token_classifier",
    "perturbed",
    "picard_consistency",
    "picard_iterates",
    "picard_weights",
    "prior_diffusion",
    "prior_restorer",
    "prior_sampler",
    "progressive_distillation",
    "restored",
    "restricted",
    "scheduled_sampling",
    "self_conditioned",
    "shifted",
    "stacked",
    "surgery",
    "token_tilt",
    "token_visits",
    "train_step",
    "transfer",
    "two_steps",
    "uniform",
    "unrolled",
    "unweighted",
    "update",
    "visits",
    "warped",
    "weight_limit",
    "weightings",
]
