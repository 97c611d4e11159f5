"""What the factories of processes check when their arguments are concrete."""

from __future__ import annotations

import numpy as np

from diffjax.levels import Array, is_traced


def positive(**named: Array) -> None:
    """Raise a ValueError unless every named number is finite and above 0; traced ones pass."""
    for name, number in named.items():
        if not is_traced(number) and not (np.all(np.isfinite(number)) and np.all(np.asarray(number) > 0)):
            raise ValueError(f"{name} must be finite and above 0, got {number!r}.")
