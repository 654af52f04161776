"""The notebooks as they are committed: no outputs, one source of parameters, lines that can be
read."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import nbformat
import pytest

from issl.audit import parameters
from issl.audit.plans import PLANS
from issl.audit.run import notebooks_folder

LONGEST = 100
LINES = 25


@pytest.fixture(params=sorted(p.stem for p in notebooks_folder().glob("*.ipynb")))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def code(name: str) -> list[nbformat.NotebookNode]:
    """The code cells of a notebook."""
    cells = nbformat.read(notebooks_folder() / f"{name}.ipynb", as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def is_parameters(cell: nbformat.NotebookNode) -> bool:
    return "parameters" in cell.metadata.get("tags", [])


def assigned(body: list[ast.stmt]) -> Iterator[str]:
    """Every name that a cell's statements bind in the notebook: those inside functions, classes,
    lambdas and comprehensions are their own."""
    for statement in body:
        yield from bound(statement)


def bound(node: ast.AST) -> Iterator[str]:
    own = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
    elif isinstance(node, own):  # an assignment expression in a comprehension binds outside of it
        yield from (n.target.id for n in ast.walk(node) if isinstance(n, ast.NamedExpr))
    else:
        if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
            yield node.id
        if isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name
        if isinstance(node, (ast.MatchAs, ast.MatchStar)) and node.name:
            yield node.name
        for child in ast.iter_child_nodes(node):
            yield from bound(child)


def test_every_plan_has_its_notebook() -> None:
    assert {p.stem for p in notebooks_folder().glob("*.ipynb")} == set(PLANS)


def test_no_outputs(code: list[nbformat.NotebookNode]) -> None:
    assert all(not c.outputs and c.execution_count is None for c in code), (
        "clear the outputs before committing"
    )


def test_the_parameters_cell_holds_the_plans_fields_with_their_defaults(
    name: str, code: list[nbformat.NotebookNode]
) -> None:
    """`python -m issl.audit.parameters` writes it again."""
    assert [is_parameters(c) for c in code] == [True] + [False] * (len(code) - 1)
    variables: dict[str, object] = {}
    exec(code[0].source, variables)
    wanted: dict[str, object] = {}
    exec(parameters.cell(PLANS[name]), wanted)
    assert variables.keys() == wanted.keys() and variables == wanted
    assert PLANS[name].of(variables) == PLANS[name](out="..")


def test_the_plan_is_made_once_from_the_parameters(
    name: str, code: list[nbformat.NotebookNode]
) -> None:
    made = f"plan = {PLANS[name].__name__}.of(globals())\n"
    assert [made in c.source for c in code[1:3]].count(True) == 1
    assert sum("globals()" in c.source for c in code) == 1


def test_cells_are_short(name: str, code: list[nbformat.NotebookNode]) -> None:
    """One idea each; a reader of the settings, or of a hidden solution, expects a list."""
    own = [c for c in code if not {"parameters", "solution"} & set(c.metadata.get("tags", []))]
    assert max(len(c.source.splitlines()) for c in own) <= LINES


def test_no_cell_assigns_a_name_that_a_field_of_the_plan_has(
    name: str, code: list[nbformat.NotebookNode]
) -> None:
    """Such a name would look like the parameter, and not be it."""
    fields = PLANS[name].model_fields.keys()
    found = {n for cell in code[1:] for n in assigned(ast.parse(cell.source).body) if n in fields}
    assert not found, f"rename these variables: {sorted(found)}"


def test_lines_of_code_can_be_read(name: str, code: list[nbformat.NotebookNode]) -> None:
    lines = [line for cell in code for line in cell.source.splitlines()]
    assert not [line for line in lines if len(line) > LONGEST]


def test_exercises_hide_their_answers_and_check_them(name: str) -> None:
    cells = nbformat.read(notebooks_folder() / f"{name}.ipynb", as_version=4).cells
    (texts,) = [c.source.split("## Exercises\n")[1] for c in cells if "## Exercises\n" in c.source]
    question, hidden = texts.split("<details><summary>Answer", 1)
    assert question.strip() and "nswer:" not in question and hidden.rstrip().endswith("</details>")
    (checked,) = [c for c in cells if "solution" in c.metadata.get("tags", [])]
    assert checked is cells[-1] and checked.metadata["jupyter"]["source_hidden"]
    assert any(word in checked.source for word in ("assert ", "assert_close(", "assert_allclose("))


@pytest.mark.parametrize(
    "source",
    [
        "n = 1",
        "n += 1",
        "n: int = 1",
        "(a, *n) = b",
        "for n in b: pass",
        "with open(p) as n: pass",
        "import x as n",
        "from x import n",
        "def n(): pass",
        "class n: pass",
        "if b:\n    for a, (n, c) in d: pass",
        "(n := 1)",
        "a = [c for b in d if (n := b)]",
        "try:\n    pass\nexcept E as n:\n    pass",
        "import n.m",
        "del n",
        "match b:\n    case n: pass",
    ],
)
def test_an_assigned_name_is_found(source: str) -> None:
    assert "n" in set(assigned(ast.parse(source).body))


@pytest.mark.parametrize(
    "source",
    [
        "a = n",
        "a = [n for n in b]",
        "def f(n):\n    n = 1",
        "f(n=1)",
        "a.n = 1",
        "a = lambda n: n",
        "a[n] = 1",
    ],
)
def test_a_name_that_is_read_or_local_is_not(source: str) -> None:
    assert "n" not in set(assigned(ast.parse(source).body))
