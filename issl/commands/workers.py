"""Processes that make stages side by side, each with its share of this machine's cores.

A stage of a small network gains little from a second thread (those of 01 and 16 of the quick profile: 85 s on one
thread, 70 s on two), so two stages at once on a thread each end much earlier than one after the other on both.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from issl.commands.scheduler import Ended, Task

WORTH_IT = 60.0  # seconds of work, by the cost model: a worker needs some seconds to import torch
AT_MOST = 4  # workers by default: each holds its images


def default_workers(device: str, work: float) -> int:
    """How many stages to make at once: one on a GPU and for little work (in seconds), else one a core, up to four."""
    return 1 if device != "cpu" or work < WORTH_IT else min(AT_MOST, os.cpu_count() or 1)


class Workers:
    """`count` processes; each makes one stage at a time. One that dies takes only its own stage with it."""

    def __init__(self, count: int):
        self._idle = [_worker() for _ in range(count)]
        self._busy: dict[Future[Ended], tuple[Task, ProcessPoolExecutor]] = {}

    @property
    def idle(self) -> int:
        """How many have nothing to do."""
        return len(self._idle)

    def start(self, task: Task, job: Callable[[], Ended]) -> None:
        """Let an idle worker do the task's job."""
        worker = self._idle.pop()
        self._busy[worker.submit(job)] = task, worker

    def ended(self) -> list[tuple[Task, Ended]]:
        """Wait until a stage has ended, well or not; returns those that have."""
        found = []
        for future in wait(self._busy, return_when=FIRST_COMPLETED).done:
            task, worker = self._busy.pop(future)
            try:
                found.append((task, future.result()))
            except BrokenProcessPool:
                worker.shutdown()
                worker = _worker()
                found.append((task, Ended(0.0, f"the process that made {task.label} was killed (out of memory?)")))
            self._idle.append(worker)
        return found

    def close(self) -> None:
        """End the idle processes."""
        for worker in self._idle:
            worker.shutdown()


def _worker() -> ProcessPoolExecutor:
    # spawn: torch's threads do not survive a fork
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Leave Ctrl-C to the process that started this one, and end when it does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
