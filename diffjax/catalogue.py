"""What a folder offers: found, not listed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType


def catalogue(package: ModuleType) -> dict[str, Callable]:
    """The public factories of a package of methods, by name, in alphabetical order.

    They are the functions that its ``__init__`` imports, so a new method is one import line there.

    >>> import diffjax
    >>> "ddim" in catalogue(diffjax.solvers)
    True
    """
    found = {
        name: value
        for name, value in vars(package).items()
        if inspect.isfunction(value) and not name.startswith("_") and value.__module__.startswith("diffjax")
    }
    return dict(sorted(found.items()))
