"""Reading what other libraries wrote."""

from diffjax.interop.diffusers import Setting, diffusers

__all__ = ["Setting", "diffusers"]
