"""What leaves the library: samplers as artefacts that need jax alone, and the precision they run at."""

from diffjax.deploy.artefact import Artefact, artefact, load
from diffjax.deploy.precision import PrecisionError, precision_error, rounded, with_precision

__all__ = ["Artefact", "PrecisionError", "artefact", "load", "precision_error", "rounded", "with_precision"]
