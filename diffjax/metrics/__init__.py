"""Distances between sets of samples, and of reconstructions to the truth, as pure functions of arrays.

A set has shape (N, ...): N samples, flattened to vectors of length D where a metric compares vectors.  Concrete
arrays are measured in float64 on the host, because the differences that matter are small; traced ones in their own
type, so that `mmd`, `kid` and `sliced_wasserstein` also work inside `jit` and `grad`.

No metric has a meaning without its floor: the same metric between two halves of the data, at the same number of
samples.
"""

from diffjax.metrics.classifier import accuracy
from diffjax.metrics.frechet import frechet_distance, gaussian_frechet_distance
from diffjax.metrics.images import psnr, ssim
from diffjax.metrics.kernel import kid, median_bandwidth, mmd
from diffjax.metrics.neighbours import PrecisionRecall, nearest_distance, precision_recall
from diffjax.metrics.summary import Comparison, Summary, compare, merged, summary
from diffjax.metrics.transport import sinkhorn_divergence, sliced_wasserstein

__all__ = [
    "Comparison",
    "PrecisionRecall",
    "Summary",
    "accuracy",
    "compare",
    "frechet_distance",
    "gaussian_frechet_distance",
    "kid",
    "median_bandwidth",
    "merged",
    "mmd",
    "nearest_distance",
    "precision_recall",
    "psnr",
    "sinkhorn_divergence",
    "sliced_wasserstein",
    "ssim",
    "summary",
]
