"""Solvers: `ls` of this folder is the list of families, `__all__` the list of methods."""

from diffjax.solvers.accelerated_ddpm import accelerated_ddpm
from diffjax.solvers.ancestral import dpm2_ancestral, dpmpp_2s_ancestral, dpmpp_sde, euler_ancestral
from diffjax.solvers.cps import flow_cps
from diffjax.solvers.ddim import ancestral, ddim
from diffjax.solvers.directions import adjusted_ddim, lml
from diffjax.solvers.dpm import dpmpp
from diffjax.solvers.embedded import bogacki_shampine, dpm_pair, gotta_go_fast, heun_pair
from diffjax.solvers.er_sde import er_sde
from diffjax.solvers.langevin import annealed_langevin
from diffjax.solvers.reverse_sde import generalised_sde, heun_sde, ito, reverse_diffusion
from diffjax.solvers.runge_kutta import euler, euler_maruyama, heun, midpoint
from diffjax.solvers.seeds import seeds
from diffjax.solvers.stochastic_adams import sa_solver, sde_dpmpp

__all__ = [
    "accelerated_ddpm",
    "adjusted_ddim",
    "ancestral",
    "annealed_langevin",
    "bogacki_shampine",
    "ddim",
    "dpm2_ancestral",
    "dpm_pair",
    "dpmpp",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "er_sde",
    "euler",
    "euler_ancestral",
    "euler_maruyama",
    "flow_cps",
    "generalised_sde",
    "gotta_go_fast",
    "heun",
    "heun_pair",
    "heun_sde",
    "ito",
    "lml",
    "midpoint",
    "reverse_diffusion",
    "sa_solver",
    "sde_dpmpp",
    "seeds",
]
