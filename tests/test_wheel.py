"""The wheel: what it carries, and that it runs without the clone."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pathspec
import pytest

import issl
from issl.audit import RELEASED
from issl.audit.cache import released_index
from issl.audit.profiles import ProfileOptions
from issl.files import REPOSITORY


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
