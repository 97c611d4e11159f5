"""`python -m experiments`: the list of experiments, found in this folder."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple


class Entry(NamedTuple):
    """One experiment, as its docstring describes it."""

    name: str
    summary: str
    run_time: str


def entries(folder: Path = Path(__file__).parent) -> list[Entry]:
    """Every experiment of the folder, in alphabetical order; nothing is imported."""
    found = []
    for path in sorted(folder.glob("*.py")):
        if path.stem.startswith("_"):
            continue
        lines = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
        times = [line.removeprefix("Run time:").strip() for line in lines if line.startswith("Run time:")]
        found.append(Entry(path.stem, lines[0] if lines else "", times[0] if times else "not stated"))
    return found


def main() -> None:
    """Print one line an experiment."""
    for entry in entries():
        print(f"python -m experiments.{entry.name:10}  {entry.summary}  [{entry.run_time.rstrip('.')}]")
    print("\nAdd --help to see the options.")


if __name__ == "__main__":
    main()
