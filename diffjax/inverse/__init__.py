"""Inverse problems: draw from the law of x given a measurement y = A(x) + noise.

Operators and `measurement` say what was seen.  A function that takes a ``measurement`` first makes a *twist* (for
`diffjax.guidance.tilted` and sequential Monte Carlo) or a solver, one that takes ``denoise`` first a denoiser, one
that takes ``solver`` first a changed solver, and one that takes ``key`` first draws a sample.  Posterior laws in
closed form: `posterior`, `evidence`, `exact`.
"""

from diffjax.inverse.blind import blind, blind_blur, blind_dps, joint
from diffjax.inverse.boundary import Boundary, best_boundary
from diffjax.inverse.choices import active, mixed_observation, predicted_entropy, thompson
from diffjax.inverse.conformal import Intervals, calibrated_quantiles, error_groups, hoeffding_bentkus, k_rcps, rcps
from diffjax.inverse.ensemble import enkg, ensemble_update
from diffjax.inverse.estimates import diffpir, ilvr, null_space, replacement
from diffjax.inverse.exact import evidence, exact, posterior
from diffjax.inverse.filters import conjugate, fps, mcgdiff
from diffjax.inverse.forward_models import draw_signal, signal, through
from diffjax.inverse.gradient_steps import dps, flowchef, mcg
from diffjax.inverse.images import blur, colourisation, downsample, fourier, gaussian_kernel, radon
from diffjax.inverse.inpainting import inpainting
from diffjax.inverse.learned_prior import expectation_maximisation, fit_gaussian
from diffjax.inverse.measurement import Measurement, gaussian_noise, measurement, poisson_noise
from diffjax.inverse.motif import motif, one_of, segments
from diffjax.inverse.nonlinear import hdr, jpeg, nonlinear, phase_retrieval, saturation
from diffjax.inverse.operators import (
    compressed_sensing,
    decomposed,
    diagonal,
    identity,
    linear,
    mask,
    matrix,
    pseudo_inverse,
)
from diffjax.inverse.partial_inversion import NormalNoise, predicted_start
from diffjax.inverse.prompt_tuning import p2l
from diffjax.inverse.self_supervised import dds2m, deep_prior, spatio_spectral
from diffjax.inverse.source import d_flow
from diffjax.inverse.splitting import daps, pnp_dm
from diffjax.inverse.steps import ddnm, ddrm, lanpaint
from diffjax.inverse.tractable import tractable_steering
from diffjax.inverse.twists import lgd, likelihood, mmps, noised, pigdm, tmpd
from diffjax.inverse.variational import adam, red_diff
from diffjax.inverse.volumes import Split, admm_tv, diffusion_mbir, slices, slicewise, split
