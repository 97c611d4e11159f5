"""The generated pages are current, links lead somewhere, and the generators find their facts."""

import re

import pytest

from tools import api_tables, methods_table, notebooks, pages, solvers_table

GENERATED = {pages.ROOT / "docs" / "methods.md": methods_table.render, **api_tables.PAGES}
WRITTEN = [
    path for pattern in ("README.md", "CONTRIBUTING.md", "docs/**/*.md") for path in sorted(pages.ROOT.glob(pattern))
]


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: path.name)
def test_page_is_current(path):
    assert path.read_text() == GENERATED[path](), "run `make docs`"


def test_every_marked_title_is_cited():
    assert methods_table.problems() == []


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_relative_links_exist(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and not re.match(r"[a-z]+:", target)]
    assert [target for target in local if not (path.parent / target).exists()] == []


@pytest.fixture
def project(tmp_path):
    """A little project: two papers, one with a title that the other's contains."""

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    write(
        "diffjax/solvers.py",
        '"""Solvers."""\n'
        "def fast():\n"
        '    """A step.\n\n    Fast Models, Doe, 2021, equation 3.\n    arXiv:2101.00001\n'
        '    Very Fast Models of\n    Things. arXiv:2202.00002\n    """\n',
    )
    write(
        "tests/test_a.py",
        "import pytest\n"
        '@pytest.mark.paper("Fast Models")\n'
        "def test_one(): ...\n"
        '@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.paper("Fast Models"))])\n'
        "def test_two(n): ...\n"
        '@pytest.mark.paper("Very Fast Models of Things")\n'
        "class TestThree:\n"
        '    @pytest.mark.paper("Fast Models")\n'
        "    def test_four(self): ...\n",
    )
    return tmp_path, write


def test_methods_table_finds_marks_and_citations(project):
    root, _ = project
    assert methods_table.problems(root) == []
    assert methods_table.render(root).splitlines()[-2:] == [
        "| Fast Models | [2101.00001](https://arxiv.org/abs/2101.00001) "
        "| [`diffjax.solvers.fast`](../diffjax/solvers.py) "
        "| [`test_a.py::test_one`](../tests/test_a.py)"
        "<br>[`test_a.py::test_two`](../tests/test_a.py)"
        "<br>[`test_a.py::TestThree::test_four`](../tests/test_a.py) |",
        "| Very Fast Models of Things | [2202.00002](https://arxiv.org/abs/2202.00002) "
        "| [`diffjax.solvers.fast`](../diffjax/solvers.py) "
        "| [`test_a.py::TestThree`](../tests/test_a.py) |",
    ]


@pytest.mark.parametrize(
    ("docstring", "complaint"),
    [
        ("Nothing.", "no docstring .* 'Fast Models'"),
        ("Rather Fast Models, arXiv:2101.00001", "no docstring .* 'Fast Models'"),
        ("Fast Models of Others, arXiv:2101.00001", "no docstring .* 'Fast Models'"),
        ("Fast Models. Very Fast Models of Things. arXiv:2202.00002", "solvers gives 'Fast Mod"),
    ],
)
def test_methods_table_complains(project, docstring, complaint):
    root, write = project
    write("diffjax/solvers.py", f'"""{docstring}"""')
    assert re.search(complaint, "\n".join(methods_table.problems(root)))


def test_methods_table_refuses_a_computed_title(project):
    root, write = project
    write("tests/test_b.py", "import pytest\npytestmark = [pytest.mark.paper(TITLE)]\n")
    with pytest.raises(ValueError, match="line 2: the title"):
        methods_table.marks(root)


def test_run_writes_then_checks(tmp_path, capsys):
    path = tmp_path / "docs" / "page.md"
    assert pages.run({path: lambda: "new"}, ["--check"]) == 1
    assert f"{path} is stale" in capsys.readouterr().err
    assert not path.exists()
    assert pages.run({path: lambda: "new"}, []) == 0
    assert pages.run({path: lambda: "new"}, ["--check"]) == 0
    assert pages.run({path: lambda: "newer"}, ["--check"]) == 1


def test_solvers_page_is_current():
    assert not solvers_table.stale(), "run `make docs`"


def test_solvers_page_is_checked_but_for_what_is_measured():
    """Another measured number is no reason to complain; another order, summary or solver is."""
    page = solvers_table.PAGE.read_text()
    line = next(line for line in page.splitlines() if line.startswith("| `heun()` | 2 | 2.0 |"))
    same = lambda changed: solvers_table.declared(page.replace(line, changed)) == solvers_table.declared(page)
    assert same(line.replace("| 2.0 |", "| 1.9 |"))
    assert not same(line.replace("| 2 |", "| 3 |", 1))
    assert not same(line.replace("Heun", "Haun")) and not same("")


def test_papers_of_a_docstring():
    text = "Text. Fast\n Models: a Title, arXiv:2101.00001, equation 3.  Others, arXiv:2202.00002."
    expected = "[Fast Models: a Title](https://arxiv.org/abs/2101.00001)<br>[Others](https://arxiv.org/abs/2202.00002)"
    assert solvers_table.papers(text) == expected


@pytest.mark.slow
def test_notebook_is_executed(tmp_path):
    source = tmp_path / "toy.py"
    source.write_text("# %% [markdown]\n# Text.\n\n# %%\nprint(6 * 7)\n")
    first = notebooks.execute(source).read_text()
    assert '"42\\n"' in first
    assert notebooks.execute(source).read_text() == first
    source.write_text("# %%\nraise KeyError('no')\n")
    with pytest.raises(Exception, match="KeyError"):
        notebooks.execute(source)
