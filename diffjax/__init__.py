"""Diffusion models in JAX, as pure functions.

    process --> grid --> levels ;  denoiser (guided by transformations) ;  solver (changed by modifiers) ;  sampler

See docs/design.md for the vocabulary and README.md for the first steps.
"""

from diffjax import coordinates as coordinates
from diffjax import corrections as corrections
from diffjax import deploy as deploy
from diffjax import devices as devices
from diffjax import diagnostics as diagnostics
from diffjax import grids as grids
from diffjax import guidance as guidance
from diffjax import interop as interop
from diffjax import interpolants as interpolants
from diffjax import inverse as inverse
from diffjax import likelihood as likelihood
from diffjax import metrics as metrics
from diffjax import modifiers as modifiers
from diffjax import noises as noises
from diffjax import nongaussian as nongaussian
from diffjax import oracles as oracles
from diffjax import phase as phase
from diffjax import predictions as predictions
from diffjax import processes as processes
from diffjax import smc as smc
from diffjax import smoothing as smoothing
from diffjax import solvers as solvers
from diffjax import unnormalised as unnormalised
from diffjax.levels import Grid as Grid
from diffjax.levels import Info as Info
from diffjax.levels import Level as Level
from diffjax.levels import Process as Process
from diffjax.levels import Row as Row
from diffjax.levels import Sample as Sample
from diffjax.levels import Solver as Solver
from diffjax.samplers import Request as Request
from diffjax.samplers import adaptive as adaptive
from diffjax.samplers import adjoint as adjoint
from diffjax.samplers import advise_parallel as advise_parallel
from diffjax.samplers import block_queue as block_queue
from diffjax.samplers import chords as chords
from diffjax.samplers import coarse_path as coarse_path
from diffjax.samplers import nonlinear as nonlinear
from diffjax.samplers import parallel as parallel
from diffjax.samplers import parallel_scan as parallel_scan
from diffjax.samplers import parareal as parareal
from diffjax.samplers import reuse_then_predict as reuse_then_predict
from diffjax.samplers import sample as sample
from diffjax.samplers import sample_many as sample_many
from diffjax.samplers import similarity_filter as similarity_filter
from diffjax.samplers import speculative as speculative
from diffjax.samplers import stream as stream
from diffjax.samplers import teleport as teleport
from diffjax.smc import steer as steer
from diffjax.suggest import suggest as suggest

__version__ = "0.1.0"
