"""Modifiers: solver -> solver."""

from diffjax.modifiers.doubling import doubled
from diffjax.modifiers.gaps import churned, renoised
from diffjax.modifiers.langevin import langevin
from diffjax.modifiers.reinjected import reinjected, score_jump

__all__ = ["churned", "doubled", "langevin", "reinjected", "renoised", "score_jump"]
