"""The repository itself: one truth for Python and packages, a lock without addresses, the shell
script."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

import issl
from issl.files import REPOSITORY

ABOUT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_packages_and_python_have_one_truth() -> None:
    """pyproject.toml; environment.yml agrees, and the lock holds every dependency with hashes and
    no address."""
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    packages = ["python" + ABOUT["requires-python"], "pip", {"pip": ["-r requirements.lock"]}]
    assert environment["dependencies"] == packages
    wanted = [*ABOUT["dependencies"], *itertools.chain(*ABOUT["optional-dependencies"].values())]
    names = {re.match(r"[A-Za-z0-9-]+", r).group().lower() for r in wanted} - {"issl"}
    text = (REPOSITORY / "requirements.lock").read_text()
    assert "://" not in text and "--index" not in text
    entries = re.split(r"^(?=[a-z0-9-]+==)", text, flags=re.M)[1:]
    assert all("--hash=sha256:" in e for e in entries)
    assert names <= {e.split("==")[0] for e in entries}


def test_version_is_one() -> None:
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["version"]
    latest = re.search(r"^## (\S+)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert ABOUT["version"] == issl.__version__ == cited == latest[1]


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


def test_nothing_names_a_machine_or_a_registry_host() -> None:
    found = subprocess.run(
        ["git", "-C", REPOSITORY, "ls-files"], check=False, capture_output=True, text=True
    )
    if found.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"/(?:work|farm)/|py" + r"pi\.org|npm" + r"js\.org|deb\.deb" + r"ian\.org")
    for name in found.stdout.split():
        path = REPOSITORY / name
        if path.suffix in (".png", ".pdf") or not path.is_file():
            continue
        assert not pattern.search(path.read_text(errors="replace")), name
