"""Modifiers: solver -> solver.

What is listed here keeps the law that its solver samples, on any tree: `diffjax.diagnostics.reinjected` does neither.
"""

from diffjax.modifiers.doubling import doubled
from diffjax.modifiers.gaps import churned, renoised
from diffjax.modifiers.langevin import langevin

__all__ = ["churned", "doubled", "langevin", "renoised"]
