"""Who imports whom: the library stands alone, the audit stands on it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter

import pytest

from issl import cli
from issl.files import PACKAGE, REPOSITORY

ABOUT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
NAMES = {re.match(r"[\w-]+", needed)[0] for needed in ABOUT["dependencies"]}
KNOWN = NAMES - {"pillow"} | {"PIL", "issl"} | sys.stdlib_module_names
# what the library may import inside the function that needs it: an extra says what to install
OPTIONAL = {"datasets", "distributed", "dask", "dask_jobqueue", "huggingface_hub"}
OPTIONAL |= {"pyarrow", "timm"}
MODULES = {  # dotted name → file; a package stands for its __init__
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(node: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """What code imports, and whether inside a function; not what is for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from ((f"{child.module}.{alias.name}", inside) for alias in child.names)
        elif not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from imports(child, inside or function)


def not_allowed(text: str) -> list[str]:
    """Imports of the audit, and of what is neither Python's own nor a dependency of the library."""
    return [
        target
        for target, inside in imports(ast.parse(text))
        if target.startswith("issl.audit")
        or target.split(".")[0] not in (KNOWN | OPTIONAL if inside else KNOWN)
    ]


def test_the_library_stands_alone() -> None:
    assert len(not_allowed("def f():\n    import pydantic, issl.audit.claims")) == 2
    found = {k: not_allowed(p.read_text()) for k, p in MODULES.items() if "issl.audit" not in k}
    assert not {name: targets for name, targets in found.items() if targets}


def test_there_is_no_circle() -> None:
    edges = {}
    for name, path in MODULES.items():
        found = {target for target, _ in imports(ast.parse(path.read_text()))}
        found |= {target.rpartition(".")[0] for target in found}
        known = {t for t in found & MODULES.keys() if MODULES[t].name != "__init__.py"}
        edges[name] = known - {name}
    assert sum(map(len, edges.values())) > 100  # it does see the imports
    assert len(list(TopologicalSorter(edges).static_order())) == len(MODULES)


def test_without_the_extra_the_audits_commands_say_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    for command in cli.AUDIT:
        assert cli.main([command]) == 2
        assert "pip install 'issl[audit]'" in capsys.readouterr().err
