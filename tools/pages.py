"""What the page generators share: a table, and writing a page or checking that it is current."""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |\n" for row in lines)


def run(pages: Mapping[Path, Callable[[], str]], arguments: list[str] | None = None) -> int:
    """Write each page, or with `--check` compare it; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the generated pages of docs/.")
    parser.add_argument("--check", action="store_true", help="only say which page is stale")
    check = parser.parse_args(arguments).check
    stale = False
    for path, render in pages.items():
        text = render()
        if path.is_file() and path.read_text() == text:
            continue
        if check:
            print(f"{path} is stale: run `make docs`", file=sys.stderr)
            stale = True
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return int(stale)
