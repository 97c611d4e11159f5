"""Grids: the sequence of noise levels that a sampler walks."""

from diffjax.grids.changes import resolution_mu, resolution_shift, reverse, shifted, stretched
from diffjax.grids.gaps import half_back, restart, time_travel
from diffjax.grids.progressive import progressive
from diffjax.grids.ratios import beta, exponential, karras
from diffjax.grids.spacings import cosine, log_snr, power, quadratic, sigmoid, table, uniform
from diffjax.grids.times import pairs, times

__all__ = [
    "beta",
    "cosine",
    "exponential",
    "half_back",
    "karras",
    "log_snr",
    "pairs",
    "power",
    "progressive",
    "quadratic",
    "resolution_mu",
    "resolution_shift",
    "restart",
    "reverse",
    "shifted",
    "sigmoid",
    "stretched",
    "table",
    "time_travel",
    "times",
    "uniform",
]
