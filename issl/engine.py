"""Tasks that need each other: run in this process, in several on this machine, or by Dask anywhere.

A task that fails blocks what needs it and nothing else. Tasks leave what they make in files, whole
or not at all, so a run that is stopped or a worker that dies costs what was being made.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from issl.errors import IsslError
from issl.files import why_no_room

CLUSTERS = {"slurm": "SLURMCluster", "pbs": "PBSCluster", "lsf": "LSFCluster", "sge": "SGECluster"}
CONNECT = 20.0  # seconds in which a scheduler must answer

# Dask is made for many short tasks; these settings suit a few long ones.
SETTINGS = {
    "distributed.worker.daemon": False,  # a task may start processes
    "distributed.scheduler.worker-ttl": None,  # a long kernel is no death
    "distributed.scheduler.unknown-task-duration": "1h",  # so a cluster grows for each that waits
    "distributed.scheduler.allowed-failures": 3,  # so often a task that kills workers is tried anew
    "distributed.worker.memory.terminate": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.spill": False,
}


@dataclass(frozen=True)
class Task:
    """What is to be done.

    Attributes:
        work: a function without arguments that another process can call; its result is dropped.
            If a worker dies it may be called again, and should then leave what is there.
        needs: names of the tasks that must have ended well before.
    """

    work: Callable[[], object]
    needs: Sequence[str] = ()


@dataclass(frozen=True)
class Ended:
    """How a task ended.

    Attributes:
        name: the task's.
        seconds: that it took.
        error: what went wrong, for the reader; empty if it ended well.
        blocked: the error is that of a task that it needs, so it was not begun.
    """

    name: str
    seconds: float = 0.0
    error: str = ""
    blocked: bool = False


@dataclass(frozen=True)
class Engine:
    """Where tasks run.

    Attributes:
        jobs: how many at once. One, or none given: in this process, without Dask; with `cluster`,
            one job there; with `scheduler`, as many as it has workers.
        cluster: slurm, pbs, lsf or sge: each of up to `jobs` workers is a job there.
        options: (key, value) for the cluster: arguments of dask-jobqueue's class, such as queue and
            walltime; `directive` (repeatable) is one more line for the batch system, `lifetime` how
            long a worker accepts work, below the walltime.
        scheduler: the address of a Dask that is there already, such as tcp://host:8786.

    Raises:
        IsslError: for values that make no sense.
    """

    jobs: int | None = None
    cluster: str | None = None
    options: Sequence[tuple[str, str]] = ()
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise IsslError(f"--jobs {self.jobs}: need 1 or more")
        if self.cluster is not None and self.cluster not in CLUSTERS:
            raise IsslError(f"--cluster {self.cluster!r}: choose {', '.join(CLUSTERS)}")
        if self.cluster is not None and self.scheduler is not None:
            raise IsslError("--cluster starts a scheduler of its own: leave out --scheduler")
        if self.options and self.cluster is None:
            raise IsslError("--cluster-option goes with --cluster")

    @property
    def here(self) -> bool:
        """Do tasks run on this machine?"""
        return self.cluster is None and self.scheduler is None

    def run(self, tasks: Mapping[str, Task]) -> Iterator[Ended]:
        """Run the tasks, each after those it needs, which come before it.

        Yields:
            How each ended, as soon as it has.

        Raises:
            IsslError: if there is no scheduler, or it went away. What was made stays.
        """
        if tasks and self.here and self.jobs in (None, 1):
            graph = _Graph(tasks)
            yield from graph.blocked(tasks)
            while graph.ready:
                name = graph.ready.popleft()
                yield from graph.end(_do(name, tasks[name].work))
        elif tasks:
            yield from self._by_dask(tasks)

    def _by_dask(self, tasks: Mapping[str, Task]) -> Iterator[Ended]:
        try:
            import dask
            from distributed import Client, as_completed
        except ImportError as error:
            raise IsslError(
                f"--jobs, --cluster, --scheduler: {error}; pip install distributed"
            ) from error
        threads = max(1, (os.cpu_count() or 1) // (self.jobs or 1)) if self.here else None
        with ExitStack() as stack:
            stack.enter_context(dask.config.set(SETTINGS))
            at = self.scheduler or stack.enter_context(self._cluster())
            try:
                client = stack.enter_context(Client(at, timeout=CONNECT))
            except (OSError, ValueError) as error:
                raise IsslError(f"--scheduler {at}: no Dask scheduler answers ({error})") from error
            workers = client.scheduler_info(n_workers=-1)["workers"].values()
            on_gpus = any("GPU" in worker["resources"] for worker in workers)
            resources = {"GPU": 1} if on_gpus else None
            # more than its workers can begin is not sent to Dask: a task that kills its worker
            # would take what waits there with it
            at_once = self.jobs or max(1, len(workers))
            names: dict[str, str] = {}
            graph, queue = _Graph(tasks), as_completed()
            yield from graph.blocked(tasks)
            while graph.ready or names:
                while graph.ready and len(names) < at_once:
                    name = graph.ready.popleft()
                    key = f"{name}-{os.getpid()}-{time.time_ns()}"
                    work = (_do, name, tasks[name].work, threads)
                    queue.add(client.submit(*work, key=key, resources=resources))
                    names[key] = name
                ends = []
                for future in queue.next_batch():
                    ends.append(_ended(names.pop(future.key), future, at))
                    future.release()  # else Dask would do it again if its worker dies later
                for end in ends:
                    yield from graph.end(end)

    def _cluster(self) -> Any:
        """Workers that this process starts."""
        if self.cluster is None:
            from distributed import Nanny, Scheduler, SpecCluster

            share = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in _gpus()] or [{}]
            options = {"nthreads": 1, "memory_limit": 0, "silence_logs": "CRITICAL"}
            workers = {
                k: {"cls": Nanny, "options": {**options, "env": share[k % len(share)]}}
                for k in range(self.jobs or 1)
            }
            local = {"host": "127.0.0.1", "port": 0, "dashboard_address": "127.0.0.1:0"}
            return SpecCluster(
                workers, {"cls": Scheduler, "options": local}, silence_logs="CRITICAL"
            )
        try:
            import dask_jobqueue
        except ImportError as error:
            raise IsslError(f"--cluster: {error}; pip install issl[cluster]") from error
        kind = getattr(dask_jobqueue, CLUSTERS[self.cluster])
        submit = kind.job_cls.submit_command.split()[0]
        if shutil.which(submit) is None:  # Dask would wait for jobs that nobody has submitted
            raise IsslError(f"--cluster {self.cluster}: no {submit} here; run it where jobs start")
        given: dict[str, Any] = {"cores": 1, "memory": "4GB", "processes": 1}
        given |= {key: int(v) if v.isdigit() else v for key, v in self.options}
        directives = [value for key, value in self.options if key == "directive"]
        extra = ["--memory-limit", "0"]
        if (lifetime := given.pop("lifetime", None)) is not None:
            extra += ["--lifetime", str(lifetime), "--lifetime-stagger", "1m"]
        given.pop("directive", None)
        try:
            cluster = kind(
                **given,
                job_extra_directives=directives,
                worker_extra_args=extra,
                job_script_prologue=["export DASK_DISTRIBUTED__WORKER__DAEMON=False"],
            )
            cluster.adapt(minimum_jobs=0, maximum_jobs=self.jobs or 1)
        except (TypeError, ValueError, OSError, RuntimeError) as error:
            raise IsslError(f"--cluster {self.cluster}: {error}") from error
        return cluster


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of a command whose tasks may run elsewhere."""
    add = command.add_argument
    add("--jobs", type=int, metavar="N", help="how many at once, here or on the cluster")
    add("--cluster", help=f"start the workers as jobs: {', '.join(CLUSTERS)}")
    add(
        "--cluster-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="for the jobs, such as queue=gpu, walltime=8:00:00, directive=--gpus-per-node=1",
    )
    add("--scheduler", metavar="ADDRESS", help="a Dask that is there, such as tcp://HOST:8786")


def asked_for(options: argparse.Namespace) -> Engine | None:
    """The engine of these options; None where they leave the choice to the command."""
    pair = pairs(options.cluster_option, "--cluster-option", "KEY=VALUE, such as queue=gpu")
    if options.jobs is None and options.cluster is None and options.scheduler is None and not pair:
        return None
    return Engine(options.jobs, options.cluster, pair, options.scheduler)


def pairs(given: Sequence[str], option: str, example: str) -> list[tuple[str, str]]:
    """Options that are written KEY=VALUE, split."""
    found = [text.partition("=") for text in given]
    for text, (key, equals, value) in zip(given, found, strict=True):
        if not (key and equals and value):
            raise IsslError(f"{option} {text}: write {example}")
    return [(key, value) for key, _, value in found]


def in_short(error: BaseException) -> str | None:
    """An error in a line for the reader: bad input, a full disk, full memory. None for others."""
    if isinstance(error, IsslError):
        return str(error)
    if (why := why_no_room(error)) is not None:
        name = getattr(error, "filename", None) or "a file"
        return f"{name} cannot be written: {why}; make room and run it again"
    from issl.devices import is_out_of_memory  # imports torch

    if is_out_of_memory(error):
        return (
            "the memory does not suffice; end other programs, or use fewer images, a smaller width "
            "or batch size"
        )
    return None


def _do(name: str, work: Callable[[], object], threads: int | None = None) -> Ended:
    """Do a task, in any process; errors are returned, so that other tasks go on."""
    import torch  # slow to import: commands that run no tasks do without

    from issl.devices import keep_freed_memory

    began, error = time.monotonic(), ""
    if threads is not None:
        torch.set_num_threads(threads)
    keep_freed_memory()
    try:
        work()
    except Exception as problem:  # noqa: BLE001 (it is shown whole)
        error = in_short(problem) or traceback.format_exc()
    return Ended(name, time.monotonic() - began, error)


class _Graph:
    """Which tasks can begin; which never will, because one that they need failed."""

    def __init__(self, tasks: Mapping[str, Task]):
        self.tasks, self.ready = tasks, deque[str]()
        self._ended: dict[str, Ended] = {}
        self._followers: dict[str, list[str]] = {name: [] for name in tasks}
        for name, task in tasks.items():
            for need in set(task.needs):
                self._followers[need].append(name)

    def end(self, ended: Ended) -> Iterator[Ended]:
        """Note how a task ended; yields it, and those that it blocks."""
        self._ended[ended.name] = ended
        yield ended
        yield from self.blocked(self._followers[ended.name])

    def blocked(self, candidates: Iterable[str]) -> Iterator[Ended]:
        """Of tasks whose needs may all have ended: yields the blocked; the others are ready."""
        for name in candidates:
            needs = [self._ended.get(need) for need in self.tasks[name].needs]
            if None not in needs:
                cause = next((need.error for need in needs if need and need.error), None)
                if cause is None:
                    self.ready.append(name)
                else:
                    yield from self.end(Ended(name, error=cause, blocked=True))


def _gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(k) for k in range(torch.cuda.device_count())]


def _ended(name: str, future: Any, at: Any) -> Ended:
    """How a task on Dask ended; IsslError where nobody can tell."""
    from distributed import KilledWorker

    if future.status == "error":
        error = future.exception()
        if isinstance(error, KilledWorker):
            text = f"the process that made {name} was killed, again and again (out of memory?)"
            return Ended(name, error=text)
        return Ended(name, error=f"{type(error).__name__}: {error}")
    if future.status != "finished":
        raise IsslError(
            f"the Dask scheduler {at} went away; what was made stays: run the same command again"
        )
    return future.result()
