"""Write docs/api.md: every public name with its summary.

A name is public when its folder's `__init__.py` has it, so nothing here, and no list elsewhere,
changes when a method is added.
"""

import importlib
import inspect
import pkgutil
import sys
from types import ModuleType

from tools.pages import ROOT, run, table


def public(module: ModuleType) -> dict[str, object]:
    """Return the public names of a module and what they stand for, sorted.

    They are `__all__`, or else every name without an underscore that diffjax itself defines.
    """
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("diffjax")
    ]
    return {name: getattr(module, name) for name in sorted(names)}


def summary(value: object) -> str:
    """Return the first line of a docstring."""
    return (inspect.getdoc(value) or "").partition("\n")[0]


def render_api(package: str = "diffjax") -> str:
    """Return the text of docs/api.md."""
    root = importlib.import_module(package)
    below = (info.name for info in pkgutil.iter_modules(root.__path__))
    names = [package, *(f"{package}.{name}" for name in sorted(below) if not name.startswith("_"))]
    text = "# Public names\n\nMade by `make docs`.\n"
    for name in names:
        module = importlib.import_module(name)
        text += f"\n## `{name}`\n\n{summary(module)}\n"
        rows = [[f"`{n}`", summary(v)] for n, v in public(module).items() if callable(v)]
        text += "\n" + table(["Name", "What it is"], rows) if rows else ""
    return text


PAGES = {ROOT / "docs" / "api.md": render_api}

if __name__ == "__main__":
    sys.exit(run(PAGES))
