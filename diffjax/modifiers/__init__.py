"""Modifiers: solver -> solver."""

from diffjax.modifiers.doubling import doubled
from diffjax.modifiers.gaps import churned, renoised
from diffjax.modifiers.langevin import langevin

__all__ = ["churned", "doubled", "langevin", "renoised"]
