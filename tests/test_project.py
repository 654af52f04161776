"""The repository itself: who imports whom (the library stands alone, the audit stands on it), one
truth for Python and packages, a lock without addresses."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from itertools import chain

import pytest
import yaml

import issl
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


def test_packages_and_python_have_one_truth() -> None:
    """pyproject.toml; environment.yml agrees, and the lock holds every dependency with hashes and
    no address."""
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    packages = ["python" + ABOUT["requires-python"], "pip", {"pip": ["-r requirements.lock"]}]
    assert environment["dependencies"] == packages
    extras = chain(*ABOUT["optional-dependencies"].values())
    names = {re.match(r"[\w-]+", r)[0].lower() for r in extras} - {"issl"} | NAMES
    text = (REPOSITORY / "requirements.lock").read_text()
    assert "://" not in text and "--index" not in text
    entries = re.split(r"^(?=[a-z0-9-]+==)", text, flags=re.M)[1:]
    assert all("--hash=sha256:" in e for e in entries)
    assert names <= {e.split("==")[0] for e in entries}


def test_version_is_one() -> None:
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["version"]
    latest = re.search(r"^## (\S+)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert ABOUT["version"] == issl.__version__ == cited == latest[1]


def test_nothing_names_a_machine_or_a_registry_host() -> None:
    pattern = r"/(work|farm)/|py[p]i\.org|npm[j]s\.org|deb\.debia[n]\.org"
    command = ["git", "-C", REPOSITORY, "grep", "-nIE", pattern]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    if found.returncode > 1:
        pytest.skip("not a git checkout")
    assert found.stdout == ""


def test_public_names_are_imported_when_they_are_used() -> None:
    """Neither `import issl` nor the usage of a command imports torch, or changes the
    environment."""
    code = """
import os, sys
before = dict(os.environ)
import issl
from issl import cli
for arguments in (["--help"], ["--version"], ["run", "--nonsense"], ["compute"], []):
    try:
        cli.parser(*arguments[:1]).parse_args(arguments)
    except SystemExit:
        pass
assert "torch" not in sys.modules and dict(os.environ) == before
named = {name for names in issl._MODULES.values() for name in names.split()}
assert set(issl.__all__) == named <= set(dir(issl))
names = {}
exec("from issl import *", names)
assert all(names[name] is getattr(issl, name) for name in issl.__all__)
assert "torch" in sys.modules and dict(os.environ) == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


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
