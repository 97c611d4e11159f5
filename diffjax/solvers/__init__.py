"""Solvers: `ls` of this folder is the list of families, `__all__` the list of methods."""

from diffjax.solvers.accelerated import accelerated_ddim
from diffjax.solvers.accelerated_ddpm import accelerated_ddpm
from diffjax.solvers.adams import adams, res, rosenbrock
from diffjax.solvers.ancestral import dpm2_ancestral, dpmpp_2s_ancestral, dpmpp_sde, euler_ancestral
from diffjax.solvers.conjugate import conjugate
from diffjax.solvers.cps import flow_cps
from diffjax.solvers.ddim import ancestral, ddim
from diffjax.solvers.deis import deis, rho_rk
from diffjax.solvers.directions import adjusted_ddim, lml
from diffjax.solvers.dpm import dpm_solver, dpmpp
from diffjax.solvers.embedded import bogacki_shampine, dpm_pair, gotta_go_fast, heun_pair
from diffjax.solvers.er_sde import er_sde
from diffjax.solvers.exponential_runge_kutta import etdrk
from diffjax.solvers.langevin import annealed_langevin
from diffjax.solvers.pndm import gradient_estimation, ipndm, ipndm_v, pndm
from diffjax.solvers.reverse_sde import generalised_sde, heun_sde, ito, reverse_diffusion
from diffjax.solvers.runge_kutta import euler, euler_maruyama, heun, kutta3, midpoint, ralston, rk4, runge_kutta
from diffjax.solvers.seeds import seeds
from diffjax.solvers.stochastic_adams import sa_solver, sde_dpmpp
from diffjax.solvers.unipc import unip, unipc

__all__ = [
    "accelerated_ddim",
    "accelerated_ddpm",
    "adams",
    "adjusted_ddim",
    "ancestral",
    "annealed_langevin",
    "bogacki_shampine",
    "conjugate",
    "ddim",
    "deis",
    "dpm2_ancestral",
    "dpm_pair",
    "dpm_solver",
    "dpmpp",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "er_sde",
    "etdrk",
    "euler",
    "euler_ancestral",
    "euler_maruyama",
    "flow_cps",
    "generalised_sde",
    "gotta_go_fast",
    "gradient_estimation",
    "heun",
    "heun_pair",
    "heun_sde",
    "ipndm",
    "ipndm_v",
    "ito",
    "kutta3",
    "lml",
    "midpoint",
    "pndm",
    "ralston",
    "res",
    "reverse_diffusion",
    "rho_rk",
    "rk4",
    "rosenbrock",
    "runge_kutta",
    "sa_solver",
    "sde_dpmpp",
    "seeds",
    "unip",
    "unipc",
]
