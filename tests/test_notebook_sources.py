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
EACH = pytest.mark.parametrize("name", sorted(COMMITTED | PLANS.keys()))
Cells = list[nbformat.NotebookNode]


def cells_of(name: str) -> tuple[Cells, Cells]:
    """All cells of a notebook, and those of code."""
    cells = nbformat.read(notebooks_folder() / f"{name}.ipynb", as_version=4).cells
    return cells, [cell for cell in cells if cell.cell_type == "code"]


def tagged(cell: nbformat.NotebookNode, *tags: str) -> bool:
    return bool({*tags} & set(cell.metadata.get("tags", [])))


def assigned(source: str) -> set[str]:
    """Every name that a cell binds in the notebook; those inside functions are their own."""
    code = compile(source, "cell", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    kinds = ("STORE_NAME", "STORE_GLOBAL", "DELETE_NAME")
    return {step.argval for step in dis.get_instructions(code) if step.opname in kinds}


@EACH
def test_the_parameters_are_the_plans_fields_and_no_other_cell_assigns_one(name: str) -> None:
    """`python -m issl.audit.parameters` writes the cell again."""
    plan, (_, code) = PLANS[name], cells_of(name)
    assert [tagged(c, "parameters") for c in code] == [True] + [False] * (len(code) - 1)
    variables: dict[str, object] = {}
    exec(code[0].source, variables)
    wanted: dict[str, object] = {}
    exec(parameters.cell(plan), wanted)
    assert variables == wanted and plan.of(variables) == plan(out="..")
    assert assigned("for a, n in b: pass\nimport x as m\nc = [k for k in d]") == {*"anmc"}
    found = set().union(*(assigned(cell.source) for cell in code[1:])) & plan.model_fields.keys()
    assert not found, f"rename these variables: {sorted(found)}"


@EACH
def test_code_is_as_committed_and_can_be_read(name: str) -> None:
    """No outputs; one idea each (a reader of settings, or of a hidden solution, expects a list)."""
    _, code = cells_of(name)
    assert all(not c.outputs and c.execution_count is None for c in code), "clear the outputs"
    made = f"plan = {PLANS[name].__name__}.of(globals())\n"
    assert [made in c.source for c in code[1:3]].count(True) == 1
    own = [c for c in code if not tagged(c, "parameters", "solution")]
    assert max(len(c.source.splitlines()) for c in own) <= LINES
    assert max(len(line) for cell in code for line in cell.source.splitlines()) <= LONGEST


@EACH
def test_exercises_hide_their_answers_and_check_them(name: str) -> None:
    cells, _ = cells_of(name)
    (texts,) = [c.source.split("## Exercises\n")[1] for c in cells if "## Exercises\n" in c.source]
    question, hidden = texts.split("<details><summary>Answer", 1)
    assert question.strip() and "nswer:" not in question and hidden.rstrip().endswith("</details>")
    (checked,) = [c for c in cells if tagged(c, "solution")]
    assert checked is cells[-1] and checked.metadata["jupyter"]["source_hidden"]
    assert any(word in checked.source for word in ("assert ", "assert_close(", "assert_allclose("))
