"""Solvers: `ls` of this folder is the list of families, `__all__` the list of methods."""

from diffjax.solvers.accelerated import accelerated_ddim
from diffjax.solvers.adams import adams, res, rosenbrock
from diffjax.solvers.conjugate import conjugate
from diffjax.solvers.ddim import ancestral, ddim
from diffjax.solvers.deis import deis, rho_rk
from diffjax.solvers.dpm import dpm_solver, dpmpp
from diffjax.solvers.exponential_runge_kutta import etdrk
from diffjax.solvers.pndm import gradient_estimation, ipndm, ipndm_v, pndm
from diffjax.solvers.runge_kutta import (
    euler,
    euler_maruyama,
    heun,
    kutta3,
    midpoint,
    ralston,
    rk4,
    runge_kutta,
)
from diffjax.solvers.unipc import unip, unipc

__all__ = [
    "accelerated_ddim",
    "adams",
    "ancestral",
    "conjugate",
    "ddim",
    "deis",
    "dpm_solver",
    "dpmpp",
    "etdrk",
    "euler",
    "euler_maruyama",
    "gradient_estimation",
    "heun",
    "ipndm",
    "ipndm_v",
    "kutta3",
    "midpoint",
    "pndm",
    "ralston",
    "res",
    "rho_rk",
    "rk4",
    "rosenbrock",
    "runge_kutta",
    "unip",
    "unipc",
]
