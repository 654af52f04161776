"""The repository itself: who imports whom, one truth for packages, the notebooks as they are
committed, and the wheel."""

import ast
import dis
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path

import nbformat
import pathspec
import pytest
import yaml

import issl
from issl import cli
from issl.audit import RELEASED, parameters
from issl.audit.cache import released_index
from issl.audit.profiles import PLANS, ProfileOptions
from issl.audit.run import notebooks_folder
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
    """pyproject.toml; environment.yml agrees, and the lock has every hash and no address."""
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
    """Neither `import issl` nor a command's usage imports torch or changes the environment."""
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


def test_without_the_extra_the_audits_commands_say_what_is_missing(monkeypatch, capsys) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    for command in cli.AUDIT:
        assert cli.main([command]) == 2
        assert "pip install 'issl[audit]'" in capsys.readouterr().err


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


def ours(folder: str, pattern: str = "**/*") -> list[Path]:
    """Files of the repository, relative to it, without those that .gitignore names."""
    lines = (REPOSITORY / ".gitignore").read_text().splitlines()
    ignored = pathspec.GitIgnoreSpec.from_lines(lines)
    found = (p for p in (REPOSITORY / folder).glob(pattern) if p.is_file())
    return [p for f in found if not ignored.match_file(p := f.relative_to(REPOSITORY))]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the sdist of this checkout, by kind."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def test_the_wheel_carries_all_that_a_run_reads(built: dict[str, Path]) -> None:
    left_out = {"along", "unfinished"}  # states along trainings, trainings under way
    index = released_index(REPOSITORY / "released")
    plans = ProfileOptions(RELEASED, door="tables").plans().values()
    drawn = {stage.label for plan in plans for stage in plan.stages()} & set(index)
    read = [f["path"] for label in drawn for f in index[label]["files"].values()]
    released = [Path("released", name) for name in (*read, "index.json", "README.md")]
    released += ours("released/encoders")
    parts = [ours("notebooks", "*.ipynb"), ours("notebooks", "profiles/*.yaml"), released]
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = set(wheel.namelist())
        for part in (*parts, ours("figures", "*/claims.json")):
            assert len(part) > 3
            for path in part:
                assert wheel.read(f"issl/bundled/{path}") == (REPOSITORY / path).read_bytes()
    code = {str(p) for p in ours("issl")}
    assert len(code) > 100 and code <= names  # templates, styles, labels and claims.yaml among them
    assert {n.split("/")[0] for n in names} == {"issl", f"issl-{issl.__version__}.dist-info"}
    assert not [n for n in names if left_out & set(n.split("/")) or n.endswith((".png", ".pdf"))]
    assert built["wheel"].stat().st_size < 90e6  # PyPI takes 100


def test_the_sdist_can_build_the_wheel_and_run_the_tests(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames()}
    for folder in ("notebooks", "released", "tests", "docs"):
        here = [p for p in ours(folder) if p.suffix in (".py", ".ipynb", ".yaml", ".md")]
        assert here and set(map(str, here)) <= names
    assert {"pyproject.toml", "README.md", "requirements.lock", "run_all.sh"} <= names


@pytest.mark.slow
def test_it_runs_from_the_wheel_in_any_folder(built: dict[str, Path], tmp_path: Path) -> None:
    """In a new environment and an empty folder, two notebooks of the quick profile.

    The tests' packages are put on the path by a .pth file: one that names a folder does not follow
    the .pth files in it, so the editable installation of this checkout is not seen.
    """
    environment, desk = tmp_path / "environment", tmp_path / "desk"
    desk.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    with zipfile.ZipFile(built["wheel"]) as wheel:
        wheel.extractall(site)
    (site / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    ours_alone = ("PYTHONPATH", "VIRTUAL_ENV", "ISSL_DATA")
    variables = {k: v for k, v in os.environ.items() if k not in ours_alone}

    def run(*arguments: str) -> str:
        command = [environment / "bin/python", "-m", "issl", *arguments]
        return subprocess.check_output(command, text=True, env=variables, cwd=desk)

    assert run("--version").strip() == issl.__version__
    said = run("run", "--profile", "quick", "--only", "00,09", "--jobs", "1")
    assert "2 of 2 notebooks ended well" in said
    assert (desk / "figures/quick/09_linear_theory.png").is_file()
    assert (desk / "results/quick/index.html").is_file()
    written = (desk / "results/quick/claim_method_exact.json").read_text()
    assert f'"commit": "version {issl.__version__}"' in written
    assert run("verdicts").startswith("### ")
    assert not (environment / "artifacts").exists()
