"""The notebooks as they are committed: no outputs, one source of parameters, lines that can be
read."""

from __future__ import annotations

import ast
import dis

import nbformat
import pytest

from issl.audit import parameters
from issl.audit.profiles import PLANS
from issl.audit.run import notebooks_folder

LONGEST = 100
LINES = 25
COMMITTED = {path.stem for path in notebooks_folder().glob("*.ipynb")}
Cells = list[nbformat.NotebookNode]


@pytest.fixture(params=sorted(COMMITTED | PLANS.keys()))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def cells(name: str) -> Cells:
    return nbformat.read(notebooks_folder() / f"{name}.ipynb", as_version=4).cells


@pytest.fixture
def code(cells: Cells) -> Cells:
    return [cell for cell in cells if cell.cell_type == "code"]


def tagged(cell: nbformat.NotebookNode, *tags: str) -> bool:
    return bool({*tags} & set(cell.metadata.get("tags", [])))


def assigned(source: str) -> set[str]:
    """Every name that a cell binds in the notebook; those inside functions are their own."""
    code = compile(source, "cell", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    kinds = ("STORE_NAME", "STORE_GLOBAL", "DELETE_NAME")
    return {step.argval for step in dis.get_instructions(code) if step.opname in kinds}


def test_the_parameters_cell_holds_the_plans_fields_with_their_defaults(
    name: str, code: Cells
) -> None:
    """`python -m issl.audit.parameters` writes it again."""
    assert [tagged(c, "parameters") for c in code] == [True] + [False] * (len(code) - 1)
    variables: dict[str, object] = {}
    exec(code[0].source, variables)
    wanted: dict[str, object] = {}
    exec(parameters.cell(PLANS[name]), wanted)
    assert variables == wanted
    assert PLANS[name].of(variables) == PLANS[name](out="..")


def test_code_is_as_committed_and_can_be_read(name: str, code: Cells) -> None:
    """No outputs; one idea each (a reader of settings, or of a hidden solution, expects a list)."""
    assert all(not c.outputs and c.execution_count is None for c in code), "clear the outputs"
    made = f"plan = {PLANS[name].__name__}.of(globals())\n"
    assert [made in c.source for c in code[1:3]].count(True) == 1
    own = [c for c in code if not tagged(c, "parameters", "solution")]
    assert max(len(c.source.splitlines()) for c in own) <= LINES
    lines = [line for cell in code for line in cell.source.splitlines()]
    assert max(map(len, lines)) <= LONGEST


def test_no_cell_assigns_a_name_that_a_field_of_the_plan_has(name: str, code: Cells) -> None:
    """Such a name would look like the parameter, and not be it."""
    fields = PLANS[name].model_fields.keys()
    assert assigned("for a, n in b: pass\nimport x as m\nc = [k for k in d]") == {*"anmc"}
    found = set().union(*(assigned(cell.source) for cell in code[1:])) & fields
    assert not found, f"rename these variables: {sorted(found)}"


def test_exercises_hide_their_answers_and_check_them(cells: Cells) -> None:
    (texts,) = [c.source.split("## Exercises\n")[1] for c in cells if "## Exercises\n" in c.source]
    question, hidden = texts.split("<details><summary>Answer", 1)
    assert question.strip() and "nswer:" not in question and hidden.rstrip().endswith("</details>")
    (checked,) = [c for c in cells if tagged(c, "solution")]
    assert checked is cells[-1] and checked.metadata["jupyter"]["source_hidden"]
    assert any(word in checked.source for word in ("assert ", "assert_close(", "assert_allclose("))
