"""Processes of their own that need not import everything again: forked from a server that has
imported it.

(Not from the test's own process: torch refuses a backward pass in a child of a process that has run
one.)
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from issl.audit.cache import Artifacts, Stage
from issl.errors import IsslError
from issl.shards import Shards, from_torchrun

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["issl.audit.stages", "torch.distributed", "forked"])


def make(root: Path, stage: Stage) -> int:
    """Make a stage, checkpointing at every chance; how many stages had to be computed."""
    torch.set_num_threads(1)
    artifacts = Artifacts(root, checkpoint_seconds=0.0)
    artifacts.get(stage)
    return len(artifacts.computed)


def report(queue, function: Callable, *arguments: object) -> None:
    """Run in a child: its result, or its error as text."""
    try:
        queue.put(function(*arguments))
    except IsslError as error:
        queue.put(str(error))
    except BaseException:
        queue.put(traceback.format_exc())
        raise


def shard(
    rank: int, world: int, port: int, timeout_s: float, work: Callable[[Shards], object]
) -> tuple[int, object]:
    """One of `world` gloo processes, as torchrun would start it."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        with from_torchrun(torch.device("cpu"), timeout_s) as shards:
            return rank, work(shards)
    except IsslError as error:
        return rank, str(error)


def on_processes(
    world: int, work: Callable[[Shards], object], dying: int = 0, timeout_s: float = 120
) -> list:
    """What work(shards) gives on each process, an IsslError as its text; `dying` of them give
    nothing."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    queue = context.Queue()
    processes = [
        context.Process(target=report, args=(queue, shard, rank, world, port, timeout_s, work))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    found = [queue.get(timeout=300) for _ in range(world - dying)]
    for process in processes:
        process.join()
    for item in found:
        assert isinstance(item, tuple), item  # else a traceback
    return [value for _, value in sorted(found, key=lambda item: item[0])]
