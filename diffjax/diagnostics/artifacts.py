"""Where in a sample the score jumped while it was drawn."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffjax.diagnostics.reinjected import score_jump
from diffjax.levels import Array, Saved


def score_jumps(saved: Saved, low: Array = -2.0, high: Array = 3.0) -> Array:
    """The largest jump of each entry on the way, of a state that is one array: an anomaly map of the sample's shape.

    For every two successive clean estimates (``sample(..., save="x0")``) whose later one is at a half-log-SNR between
    ``low`` and ``high``: by how many robust standard deviations of all entries' changes an entry's change is above
    their median.  -inf where no pair is in the interval.

    Temporal Score Analysis for Understanding and Correcting Diffusion Artifacts, arXiv:2503.16218 (detection; the
    statistic is derived here).

    Raises ValueError if there are no saved estimates.
    """
    if saved.x0 is None or saved.x0_level is None:
        raise ValueError('score_jumps needs the clean estimates of a sample: save="x0".')
    estimates = jnp.asarray(saved.x0)
    jumps = jax.vmap(score_jump)(estimates[1:] - estimates[:-1])
    level = jnp.asarray(saved.x0_level.half_log_snr)[1:]
    level = level.reshape(len(level), -1)
    inside = ((level >= low) & (level <= high)).all(-1)
    return jnp.where(inside.reshape(-1, *(1,) * (jumps.ndim - 1)), jumps, -jnp.inf).max(0)
