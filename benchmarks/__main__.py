"""Run every benchmark of this folder, discovered: `python -m benchmarks [name ...]`; hours-long ones by name only."""

import importlib
import json
import pkgutil
import sys

import benchmarks

HELPERS = {"timing", "problem", "__main__"}
LONG = {"posterior", "restarts"}  # hours, or a run that is killed fifty times


def names() -> list[str]:
    """The modules with a ``main``."""
    found = (module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.ispkg)
    return sorted(name for name in found if name not in HELPERS)


if __name__ == "__main__":
    for name in sys.argv[1:] or [name for name in names() if name not in LONG]:
        print(name, json.dumps(importlib.import_module(f"benchmarks.{name}").main(), indent=1), flush=True)
