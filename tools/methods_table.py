"""Write docs/methods.md: which paper is implemented where, and the test that shows it.

A test says so with `@pytest.mark.paper("full title")`; a docstring in diffjax/ gives the same
title, followed by its `arXiv:NNNN.NNNNN`. Both are read from the source, nothing is imported.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tools.pages import ROOT, run, table

ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?/\d{7})")
HEADER = """\
# Methods

Made by `make docs` from the tests marked with a paper's title and the docstrings that cite it.

"""


class Mark(NamedTuple):
    """One `paper` mark: the title, the file it stands in, and the test's name in that file."""

    title: str
    file: Path
    test: str


class Citation(NamedTuple):
    """One docstring that gives a title: its file, its dotted name and the arXiv id that follows."""

    file: Path
    name: str
    arxiv: str | None


def titles(node: ast.AST) -> Iterator[str]:
    """Yield the title of every `mark.paper(...)` call at or below a node."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("mark.paper"):
            title = call.args[0] if call.args else None
            if not (isinstance(title, ast.Constant) and isinstance(title.value, str)):
                raise ValueError(f"line {call.lineno}: the title of a paper mark is a plain string")
            yield title.value


def marks(root: Path) -> list[Mark]:
    """Return every paper mark under tests/: on functions, on classes, as `pytestmark`."""
    found = []

    def visit(body: list[ast.stmt], file: Path, parents: tuple[str, ...]) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inside = (*parents, node.name)
                for decorator in node.decorator_list:
                    found.extend(Mark(t, file, "::".join(inside)) for t in titles(decorator))
                if isinstance(node, ast.ClassDef):
                    visit(node.body, file, inside)
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
                found.extend(Mark(t, file, "::".join(parents)) for t in titles(node.value))

    for path in sorted((root / "tests").rglob("*.py")):
        visit(ast.parse(path.read_text()).body, path.relative_to(root), ())
    return found


def docstrings(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield the file, dotted name and text of every docstring in diffjax/."""
    for path in sorted((root / "diffjax").rglob("*.py")):
        file = path.relative_to(root)
        parts = [part for part in file.with_suffix("").parts if part != "__init__"]

        def visit(node, name: str, file: Path = file) -> Iterator[tuple[Path, str, str]]:
            text = ast.get_docstring(node)
            if text:
                yield file, name, text
            for child in node.body:
                if isinstance(child, ast.FunctionDef | ast.ClassDef):
                    yield from visit(child, f"{name}.{child.name}")

        yield from visit(ast.parse(path.read_text()), ".".join(parts))


def title_pattern(title: str) -> re.Pattern[str]:
    """Match a whole title, wrapped or not, and not as a part of a longer one."""
    words = r"\s+".join(map(re.escape, title.split()))
    return re.compile(rf"(?:^|[^\w\s])\s*{words}(?=\s*(?:[^\w\s]|arXiv|$))", re.MULTILINE)


def citations(root: Path, wanted: set[str]) -> dict[str, list[Citation]]:
    """Return, for every wanted title, the docstrings that give it.

    The arXiv id of a title is the first one after it, if no other wanted title comes before that.
    """
    patterns = {title: title_pattern(title) for title in wanted}
    found: dict[str, list[Citation]] = {title: [] for title in wanted}
    for file, name, text in docstrings(root):
        starts = {t: m for t, pattern in patterns.items() if (m := pattern.search(text))}
        for title, match in starts.items():
            following = [m.start() for m in starts.values() if m.start() > match.start()]
            arxiv = ARXIV.search(text, match.end(), min(following, default=len(text)))
            found[title].append(Citation(file, name, arxiv[1] if arxiv else None))
    return found


def problems(root: Path = ROOT) -> list[str]:
    """Return what is wrong: marked titles that no docstring gives together with an arXiv id."""
    wanted = {mark.title for mark in marks(root)}
    found = citations(root, wanted)
    wrong = []
    for title in sorted(wanted):
        ids = {c.arxiv for c in found[title] if c.arxiv}
        if not found[title]:
            wrong.append(f"no docstring in diffjax/ gives the marked title {title!r}")
        elif not ids:
            wrong.append(f"{found[title][0].name} gives {title!r} with no arXiv id after it")
        elif len(ids) > 1:
            wrong.append(f"{title!r} is given with several arXiv ids: {', '.join(sorted(ids))}")
    return wrong


def render(root: Path = ROOT) -> str:
    """Return the text of docs/methods.md."""
    all_marks = marks(root)
    found = citations(root, {mark.title for mark in all_marks})
    rows = []
    for title in sorted(found, key=str.casefold):
        arxiv = next((c.arxiv for c in found[title] if c.arxiv), "")
        where = [f"[`{c.name}`](../{c.file.as_posix()})" for c in found[title]]
        tests = [
            f"[`{'::'.join(filter(None, (m.file.name, m.test)))}`](../{m.file.as_posix()})"
            for m in dict.fromkeys(all_marks)
            if m.title == title
        ]
        link = f"[{arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else ""
        rows.append([title, link, "<br>".join(where), "<br>".join(tests)])
    return HEADER + table(["Paper", "arXiv", "Implemented in", "Shown by"], rows)


def main(arguments: list[str] | None = None) -> int:
    """Report what is wrong, then write or check the page."""
    wrong = problems()
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong)) or run({ROOT / "docs" / "methods.md": render}, arguments)


if __name__ == "__main__":
    sys.exit(main())
