"""Shared fixtures. jaxtyping's shapes are checked at run time in every test (beartype)."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
install_import_hook("issl", "beartype.beartype")

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
LONGEST = ("test_notebooks.py", "test_readme.py", "test_run.py")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # the workers of pytest-xdist share the cores
    from issl.devices import keep_freed_memory

    keep_freed_memory()
    if "XDG_CACHE_HOME" not in os.environ:  # of what is known of data sets; workers inherit it
        os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="issl-tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: of two workers one would wait for a file that was begun last."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data; the test is skipped where there is none."""
    root = os.environ.get("ISSL_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("needs real data: set ISSL_DATA to a folder with cifar10/ and fairface/")
    return Path(root).resolve()


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without data; a test of real data is given its `data_root`."""
    monkeypatch.delenv("ISSL_DATA", raising=False)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen JPEGs of mixed size in three folders."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for k in range(13):
        path = folder / "abc"[k * 3 // 13] / f"{k:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30 + k, 40, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, for the report's pages; the test is skipped where there is none."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip("no chromium on the PATH (Debian: apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()
