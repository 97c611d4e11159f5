"""Exact denoisers: the posterior mean in closed form for data laws that have one."""

from diffjax.oracles.gaussian import gaussian
from diffjax.oracles.hidden_markov import hidden_markov
from diffjax.oracles.local import local_points, wiener
from diffjax.oracles.mixture import mixture
from diffjax.oracles.points import points

__all__ = ["gaussian", "hidden_markov", "local_points", "mixture", "points", "wiener"]
