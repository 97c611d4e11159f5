"""Write docs/solvers.md: what every solver declares, and the order that is measured.

Solvers are found and measured as `tests/contract.py` does it. `--check` compares names and what is
declared, and measures nothing: the tests do.
"""

import argparse
import re
import sys

from diffjax import solvers
from tests import contract
from tools.pages import ROOT, table

PAGE = ROOT / "docs" / "solvers.md"
HEADER = """\
# Solvers

Made by `make docs` from what each solver declares (its order, denoiser calls and noise draws a step; without draws
it is deterministic) and from measuring it as the tests do: in float64, from t = 0.9 to 0.01 of the variance-preserving
process, on grids whose neighbouring steps differ by a factor of up to two. Deterministic solvers are measured against
the exact flow, of a correlated Gaussian and of a correlated mixture; stochastic ones by the law that they give on the
Gaussian, whose order (the weak order) is what they declare here.

"""
COLUMNS = ("Solver", "Order", "Measured on a Gaussian", "on a mixture", "Calls", "Draws", "What it is", "Paper")
MEASURED = (2, 3)
PAPER = re.compile(r"([A-Z][^.]*?),\s+arXiv:(\d{4}\.\d{4,5})")


def papers(docstring: str) -> str:
    """Return links to the papers that a docstring cites, by title where it gives one."""
    text = " ".join(docstring.split())
    return "<br>".join(f"[{title}](https://arxiv.org/abs/{number})" for title, number in PAPER.findall(text))


def order(slopes: contract.Slopes | None) -> str:
    """Return a measured order to one decimal."""
    if slopes is None:
        return ""
    return f"{slopes.order:.1f}" if slopes.order < 100 else "exact"


def rows(measure: bool) -> list[list[str]]:
    """Return the table's rows; the measured columns are empty unless asked for."""
    found = []
    for case in contract.found(modified=False):
        solver, factory = case.build(), getattr(solvers, case.name.partition("(")[0])
        doc = factory.__doc__ or ""
        slopes = contract.measured_orders(solver) if measure else {}
        first, second = slopes.get("gaussian", slopes.get("law")), slopes.get("mixture")
        declared = [str(contract.declared_order(solver)), order(first), order(second)]
        counts = [str(solver.calls), str(solver.draws)]
        found.append([f"`{case.name}`", *declared, *counts, doc.partition("\n")[0], papers(doc)])
    return found


def declared(text: str) -> str:
    """Return a page without its measured columns."""

    def without(line: str) -> str:
        cells = re.split(r"(?<!\\)\|", line)
        return "|".join(cell.strip() for i, cell in enumerate(cells) if i - 1 not in MEASURED)

    return "\n".join(without(line) if line.startswith("|") else line for line in text.splitlines())


def render(measure: bool = True) -> str:
    """Return the text of docs/solvers.md."""
    return HEADER + table(COLUMNS, rows(measure))


def stale() -> bool:
    """Return whether the page lacks a solver or says something else than is declared."""
    return not PAGE.is_file() or declared(PAGE.read_text()) != declared(render(measure=False))


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description="Write docs/solvers.md.")
    parser.add_argument("--check", action="store_true", help="only compare names and what is declared")
    if not parser.parse_args(arguments).check:
        PAGE.write_text(render())
        return 0
    if stale():
        print(f"{PAGE} is stale: run `make docs`", file=sys.stderr)
    return int(stale())


if __name__ == "__main__":
    sys.exit(main())
