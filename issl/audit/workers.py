"""Processes that make stages side by side, each with its share of this machine's cores and GPUs.

A stage of a small network gains little from a second thread (those of 01 and 16 of the quick
profile: 85 s on one thread, 70 s on two), so two stages at once on a thread each end much earlier
than one after the other on both.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from issl.audit.cache import Artifacts, Stage
from issl.audit.scheduler import Ended, Task, make
from issl.devices import keep_freed_memory, pick_device

WORTH_IT = 60.0  # seconds of work, by the cost model: a worker needs some seconds to import torch
AT_MOST = 4  # workers by default: each holds its images
# workers that share a GPU by default: a training of a narrow network waits for Python most of the
# time. On an H100 four # of width 16 side by side were no slower than two, and nine did less in all
# than four, unless NVIDIA's multi-process # service runs (docs/gpu.md)
ON_A_GPU = 4
CONTEXT = 1.0  # GB of a GPU's memory that each process takes beside its stage


@dataclass(frozen=True)
class Job:
    """What another process does: make one artifact, under the same lock and with the same
    checkpoints as here.

    threads    of torch; 0: as many as it takes by itself
    deadline   seconds since the epoch: the process may run on another machine
    released   are artifacts that come with the repository used?
    """

    stage: Stage
    root: Path
    device: str
    threads: int
    deadline: float | None = None
    released: bool = True

    def __call__(self) -> Ended:
        """Make it."""
        keep_freed_memory()
        if self.threads:
            torch.set_num_threads(self.threads)
        deadline = None if self.deadline is None else time.monotonic() + self.deadline - time.time()
        artifacts = Artifacts(self.root, pick_device(self.device), deadline=deadline)
        return make(self.stage, artifacts if self.released else replace(artifacts, released=None))


class Workers:
    """`count` processes; each makes one stage at a time. One that dies takes only its own stage
    with it.

    gpus   the GPUs that they share; none: each sees what this process sees
    """

    def __init__(self, count: int, gpus: Sequence[str] = ()):
        self._idle = [_Worker(gpus[k % len(gpus)] if gpus else None) for k in range(count)]
        self._busy: dict[Future[Ended], tuple[Task, _Worker]] = {}

    @property
    def idle(self) -> int:
        """How many have nothing to do."""
        return len(self._idle)

    def start(self, task: Task, job: Callable[[], Ended]) -> None:
        """Let an idle worker do the task's job."""
        worker = self._idle.pop()
        self._busy[worker.pool.submit(job)] = task, worker

    def ended(self) -> list[tuple[Task, Ended]]:
        """Wait until a stage has ended, well or not; returns those that have."""
        found = []
        for future in wait(self._busy, return_when=FIRST_COMPLETED).done:
            task, worker = self._busy.pop(future)
            try:
                found.append((task, future.result()))
            except BrokenProcessPool:
                worker.pool.shutdown()
                worker = _Worker(worker.gpu)
                found.append(
                    (
                        task,
                        Ended(
                            0.0, f"the process that made {task.label} was killed (out of memory?)"
                        ),
                    )
                )
            self._idle.append(worker)
        return found

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """End them: the idle ones as they like, after an error all at once."""
        busy = [worker for _, worker in self._busy.values()]
        for worker in (*self._idle, *busy):
            worker.end(at_once=error is not None)


class _Worker:
    """One process, started with its first job."""

    def __init__(self, gpu: str | None):
        self.gpu = gpu
        # spawn: torch's threads do not survive a fork
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, context, initializer=_begin, initargs=(gpu,))

    def end(self, at_once: bool) -> None:
        # copied first: the pool forgets its processes when it shuts down
        processes = list((self.pool._processes or {}).values()) if at_once else []
        self.pool.shutdown(wait=not at_once, cancel_futures=True)
        for process in processes:
            process.kill()


def _begin(gpu: str | None) -> None:
    """What a worker does first: take its GPU, leave Ctrl-C to the process that started it, and end
    when that does."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # CUDA reads this when it is first used
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def default_workers(device: str, work: float, peak: float = 0.0) -> int:
    """How many stages to make at once: for little work (in seconds) one; else one a core, up to
    four; on GPUs up to four on each, as many as its free memory holds where a stage takes `peak`
    GB."""
    cores = os.cpu_count() or 1
    if work < WORTH_IT:
        return 1
    if not (gpus := visible_gpus(device)):
        return min(AT_MOST, cores)
    fit = int(torch.cuda.mem_get_info()[0] / 1e9 / (peak + CONTEXT))
    return len(gpus) * max(1, min(ON_A_GPU, fit, cores // len(gpus)))


def visible_gpus(device: str) -> list[str]:
    """The GPUs that workers may use, as CUDA_VISIBLE_DEVICES names them; none where they compute on
    the CPU."""
    if pick_device(device).type == "cpu":
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(k) for k in range(torch.cuda.device_count())]


def threads_each(workers: int) -> int:
    """The threads of each of so many workers that share this machine's cores."""
    return max(1, (os.cpu_count() or 1) // workers)
