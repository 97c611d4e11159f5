"""Solvers: `ls` of this folder is the list of families, `__all__` the list of methods."""

from diffjax.solvers.ddim import ancestral, ddim
from diffjax.solvers.dpm import dpmpp
from diffjax.solvers.runge_kutta import euler, euler_maruyama, heun, midpoint

__all__ = ["ancestral", "ddim", "dpmpp", "euler", "euler_maruyama", "heun", "midpoint"]
