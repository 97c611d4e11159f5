"""Grids: the sequence of noise levels that a sampler walks."""

from diffjax.grids.spacings import cosine, karras, log_snr, quadratic, table, uniform
from diffjax.grids.times import pairs, times

__all__ = ["cosine", "karras", "log_snr", "pairs", "quadratic", "table", "times", "uniform"]
