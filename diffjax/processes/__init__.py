"""Forward processes: how data become noise."""

from diffjax.processes.conditioning import scaled_time, shared_time
from diffjax.processes.cosine import cosine
from diffjax.processes.custom import gaussian
from diffjax.processes.flow import flow
from diffjax.processes.table import ddpm, table, zero_terminal_snr
from diffjax.processes.variance_exploding import edm, ve
from diffjax.processes.variance_preserving import sub_vp, vp

__all__ = [
    "cosine",
    "ddpm",
    "edm",
    "flow",
    "gaussian",
    "scaled_time",
    "shared_time",
    "sub_vp",
    "table",
    "ve",
    "vp",
    "zero_terminal_snr",
]
