"""Execute the percent-format sources in notebooks/ and write each as an .ipynb beside it.

`python -m tools.notebooks [SOURCE ...]`; all of notebooks/*.py when none is named.
"""

import sys
from pathlib import Path

import jupytext
from nbclient import NotebookClient

from tools.pages import ROOT


def execute(source: Path, timeout: int = 600) -> Path:
    """Run one source from the repository's root and write the notebook; raise if a cell fails."""
    notebook = jupytext.read(source)
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # random ones would change the file at every run
    NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(ROOT)}},
    ).execute()
    target = source.with_suffix(".ipynb")
    jupytext.write(notebook, target)
    return target


def main(sources: list[str]) -> None:
    """Execute the named sources, or all."""
    for source in map(Path, sources) if sources else sorted((ROOT / "notebooks").glob("*.py")):
        print(execute(source), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
