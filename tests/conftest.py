"""Shared fixtures. jaxtyping's shapes are checked at run time in every test (beartype)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parent))
install_import_hook("issl", "beartype.beartype")


def pytest_configure() -> None:
    torch.set_num_threads(1)  # the workers of pytest-xdist share the cores


@pytest.fixture
def data_root() -> Path:
    """The folder of real data; the test is skipped where there is none."""
    root = os.environ.get("ISSL_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("needs real data: set ISSL_DATA to a folder with cifar10/ and fairface/")
    return Path(root).resolve()


@pytest.fixture
def repository() -> Path:
    return Path(__file__).parent.parent
