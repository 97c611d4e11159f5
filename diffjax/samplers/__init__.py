"""Samplers: the drivers that own the loop."""

from diffjax.samplers.many import sample_many
from diffjax.samplers.parallel import parallel
from diffjax.samplers.sequential import sample

__all__ = ["parallel", "sample", "sample_many"]
