"""The notebooks run from their sources, and what is kept beside them was made from the same code."""

from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")

SOURCES = sorted((Path(__file__).parent.parent / "notebooks").glob("*.py"))
NAMES = [source.stem for source in SOURCES]


def code(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_notebook_runs(source, tmp_path):
    from tools.notebooks import execute

    copy = tmp_path / source.name  # the one beside the source is left alone
    copy.write_text(source.read_text())
    executed = jupytext.read(execute(copy))
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_kept_notebook_is_executed_and_up_to_date(source):
    kept = jupytext.read(source.with_suffix(".ipynb"))
    assert code(kept) == code(jupytext.read(source)), "run `make notebooks`"
    assert all(cell.execution_count for cell in kept.cells if cell.cell_type == "code")
    assert any("image/png" in output.get("data", {}) for cell in kept.cells for output in cell.get("outputs", [])), (
        "no picture"
    )
