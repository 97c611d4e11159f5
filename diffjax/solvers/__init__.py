"""Solvers: `ls` of this folder is the list of families, `__all__` the list of methods."""

from diffjax.solvers.ddim import ancestral, ddim
from diffjax.solvers.dpm import dpmpp
from diffjax.solvers.embedded import bogacki_shampine, dpm_pair, gotta_go_fast, heun_pair
from diffjax.solvers.runge_kutta import euler, euler_maruyama, heun, midpoint

__all__ = [
    "ancestral",
    "bogacki_shampine",
    "ddim",
    "dpm_pair",
    "dpmpp",
    "euler",
    "euler_maruyama",
    "gotta_go_fast",
    "heun",
    "heun_pair",
    "midpoint",
]
