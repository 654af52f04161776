"""What a GPU would refuse: the cases of counterfeit_cases.py, in a process of their own.

A second device can only be registered before torch's autograd first runs, so not in a process that
has run other tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def test_on_the_counterfeit_gpu_everything_stays_on_its_device() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
    ]
    cases = Path(__file__).with_name("counterfeit_cases.py")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, str(cases)],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        cwd=cases.parent.parent,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    if " passed" not in done.stdout:
        pytest.skip("; ".join(re.findall(r"SKIPPED .*?: (.*)", done.stdout)))
