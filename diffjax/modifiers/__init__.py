"""Modifiers: solver -> solver."""

from diffjax.modifiers.gaps import churned, renoised

__all__ = ["churned", "renoised"]
