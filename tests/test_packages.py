"""Who imports whom: the library stands alone, the audit stands on it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from issl import cli

REPOSITORY = Path(__file__).parent.parent
ABOUT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
# what the library may import inside the function that needs it: an extra says what to install
OPTIONAL = {"datasets", "distributed", "dask", "dask_jobqueue", "huggingface_hub"}
OPTIONAL |= {"pyarrow", "timm"}


def modules() -> dict[str, Path]:
    """Dotted name → file; a package stands for its __init__."""
    files = {p.relative_to(REPOSITORY): p for p in (REPOSITORY / "issl").rglob("*.py")}
    return {
        ".".join(k.with_suffix("").parts).removesuffix(".__init__"): p for k, p in files.items()
    }


def imports(text: str, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """What a file imports, and whether inside a function; not what is for type checkers alone."""

    def walk(nodes: list[ast.stmt], inside: bool) -> Iterator[tuple[str, bool]]:
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from ((alias.name, inside) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((f"{node.module}.{alias.name}", inside) for alias in node.names)
            elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
                function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                below = [n for n in ast.walk(node) if isinstance(n, ast.stmt)][1:]
                direct = [n for n in below if n in list(ast.iter_child_nodes(node))]
                handlers = [n for h in getattr(node, "handlers", []) for n in h.body]
                yield from walk([*direct, *handlers], inside or function)

    return walk(ast.parse(text).body, inside)


def library() -> dict[str, str]:
    """The text of each module outside issl.audit."""
    return {k: p.read_text() for k, p in modules().items() if not k.startswith("issl.audit")}


def of_the_audit(files: dict[str, str]) -> list[str]:
    return [
        f"{name} imports {target}"
        for name, text in files.items()
        for target, _ in imports(text)
        if target.startswith("issl.audit")
    ]


def strangers(files: dict[str, str]) -> list[str]:
    """Imports of what is neither Python's own nor a dependency of the library."""
    names = [re.match(r"[\w-]+", d).group() for d in ABOUT["dependencies"]]  # type: ignore[union-attr]
    known = {{"pillow": "PIL"}.get(n, n) for n in names} | sys.stdlib_module_names | {"issl"}
    return [
        f"{name} imports {target}"
        for name, text in files.items()
        for target, inside in imports(text)
        if target.split(".")[0] not in (known | OPTIONAL if inside else known)
    ]


def test_the_library_stands_alone() -> None:
    wrong = {"x": "def f():\n    import pydantic, issl.audit.claims"}
    assert strangers(wrong) and of_the_audit(wrong)  # what is not allowed is found
    assert of_the_audit(library()) == [] and strangers(library()) == []


def test_there_is_no_circle() -> None:
    known = modules()
    edges = {}
    for name, path in known.items():
        found = {target for target, _ in imports(path.read_text())}
        found |= {target.rpartition(".")[0] for target in found}
        edges[name] = {t for t in found if t in known and known[t].name != "__init__.py"} - {name}
    assert sum(map(len, edges.values())) > 100  # it does see the imports
    assert len(list(TopologicalSorter(edges).static_order())) == len(known)


def test_without_the_extra_the_audits_commands_say_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    for command in cli.AUDIT:
        assert cli.main([command]) == 2
        assert "pip install 'issl[audit]'" in capsys.readouterr().err
