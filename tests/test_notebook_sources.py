"""The notebooks as they are committed: no outputs, one source of parameters, lines that can be
read."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import nbformat
import pytest

from issl.audit.plans import PLANS
from issl.audit.run import notebooks_folder

LONGEST = 120


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


def test_one_cell_of_parameters_holds_one_dict_of_the_plans_fields(
    name: str, code: list[nbformat.NotebookNode]
) -> None:
    assert [is_parameters(c) for c in code] == [True] + [False] * (len(code) - 1)
    (statement,) = ast.parse(code[0].source).body
    assert isinstance(statement, ast.Assign)
    assert [ast.unparse(target) for target in statement.targets] == ["parameters"]
    parameters = ast.literal_eval(statement.value)
    assert isinstance(parameters, dict)
    plan = PLANS[name](**parameters)  # raises for what is no field of the plan
    # the defaults are the plan's: a notebook changes the output folder, since it lies one folder
    # below
    assert plan == PLANS[name](out="..") and "out" in plan.model_fields_set


def test_the_set_up_cell_makes_the_plan_from_the_parameters(
    name: str, code: list[nbformat.NotebookNode]
) -> None:
    assert f"\nplan = {PLANS[name].__name__}(**parameters)\n" in code[1].source
    assert sum("**parameters" in c.source for c in code) == 1
    assert not any("globals(" in c.source for c in code)


def test_no_cell_assigns_a_name_that_a_field_of_the_plan_has(
    name: str, code: list[nbformat.NotebookNode]
) -> None:
    """Such a name would look like the parameter, and not be it."""
    fields = PLANS[name].model_fields.keys()
    found = {n for cell in code for n in assigned(ast.parse(cell.source).body) if n in fields}
    assert not found, f"rename these variables: {sorted(found)}"


def test_lines_of_code_can_be_read(code: list[nbformat.NotebookNode]) -> None:
    long = [line for cell in code for line in cell.source.splitlines() if len(line) > LONGEST]
    assert not long


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
