"""A notebook's parameters: a cell with a plain variable for each field of its plan.

papermill and a reader change the same variables (`papermill 03… out.ipynb -p n 300`). The cell is
written from the plan, so the two cannot differ: `python -m issl.audit.parameters` writes it into
every notebook.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat

from issl.audit.plan import Plan

HEAD = "# Every setting, with its default. papermill replaces those that a profile sets."


def cell(plan: type[Plan]) -> str:
    """The parameters cell of a plan's notebook."""
    defaults = plan(out="..").model_dump(mode="json")
    return "\n".join([HEAD, *(f"{name} = {_literal(value)}" for name, value in defaults.items())])


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value).replace("'", '"')


def write(path: Path, plan: type[Plan]) -> None:
    """Write the cell into a notebook, in place of the one tagged `parameters`."""
    notebook = nbformat.read(path, as_version=4)
    (place,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    place.source = cell(plan)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    from issl.audit.profiles import PLANS
    from issl.files import provided

    for name, plan in PLANS.items():
        write(provided("notebooks") / f"{name}.ipynb", plan)
