"""Processes that need not import everything again: forked from a server that has imported it.

(Not from the test's own: torch refuses a backward pass in a child of a process that has run one.)
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import torch

from issl.audit.cache import Artifacts, Stage

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["issl.audit.stages", "forked"])


def make(root: Path, stage: Stage) -> int:
    """Make a stage, checkpointing at every chance; how many stages had to be computed."""
    torch.set_num_threads(1)
    artifacts = Artifacts(root, checkpoint_seconds=0.0)
    artifacts.get(stage)
    return len(artifacts.computed)
