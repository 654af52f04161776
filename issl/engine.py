"""Tasks that need each other, run in this process, in several on this machine, or by Dask anywhere.

A failed task blocks only the tasks that need it. Tasks write their results to files, complete or
not at all. So a stopped run or a dead worker loses only what was being made.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any

from issl.errors import IsslError
from issl.files import READING, why_no_room

CLUSTERS = {"slurm": "SLURMCluster", "pbs": "PBSCluster", "lsf": "LSFCluster", "sge": "SGECluster"}
CONNECT = 20.0  # seconds in which a scheduler must answer
POLL = 0.05  # seconds between two checks for ended tasks

# Dask is made for many short tasks; these settings suit a few long ones.
SETTINGS = {
    "distributed.worker.daemon": False,  # a task may start processes
    "distributed.scheduler.worker-ttl": None,  # a long kernel is not a dead worker
    "distributed.scheduler.unknown-task-duration": "1h",  # so a cluster grows for each waiting task
    "distributed.scheduler.allowed-failures": 3,  # retries of a task that kills workers
    "distributed.worker.memory.terminate": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.spill": False,
}


@dataclass(frozen=True)
class Task:
    """Work to do: a function that another process can call, and whose result is dropped. If a
    worker dies, it may be called again, and should then keep what is already there."""

    work: Callable[[], object]
    needs: Sequence[str] = ()  # names of the tasks that must succeed first


@dataclass(frozen=True)
class Ended:
    """How a task ended."""

    name: str
    seconds: float = 0.0
    error: str = ""  # a message for the reader; empty if the task succeeded
    blocked: bool = False  # not begun: the error is that of a task it needs


@dataclass(frozen=True)
class Engine:
    """Where tasks run.

    Attributes:
        jobs: how many tasks at once; on this machine they share the GPUs. 1 or None: this process,
            without Dask. None with `cluster`: one job; with `scheduler`: one task per worker.
        cluster: slurm, pbs, lsf or sge: each of up to `jobs` workers is a job there.
        options: (key, value) for the cluster: arguments of dask-jobqueue's class, such as queue and
            walltime. Each `directive` adds a line for the batch system. `lifetime`, below the
            walltime, is how long a worker accepts work.
        scheduler: the address of a running Dask scheduler, such as tcp://host:8786.
    """

    jobs: int | None = None
    cluster: str | None = None
    options: Sequence[tuple[str, str]] = ()
    scheduler: str | None = None

    def run(self, tasks: Mapping[str, Task]) -> Iterator[Ended]:
        """Run each task after those it needs; yields how each one ended, as soon as it ends."""
        graph = TopologicalSorter({name: task.needs for name, task in tasks.items()})
        graph.prepare()
        ready, errors, begun = deque[str](), dict[str, str](), 0
        with ExitStack() as stack:
            here = self.cluster is None and self.scheduler is None and self.jobs in (None, 1)
            place = _Here() if here or not tasks else _Workers(self, stack)
            while graph.is_active():
                ends = []
                for name in graph.get_ready():
                    failed = [errors[need] for need in tasks[name].needs if need in errors]
                    if failed:
                        ends.append(Ended(name, error=failed[0], blocked=True))
                    else:
                        ready.append(name)
                # Dask gets only as many tasks as its workers can begin: one that kills its worker
                # would also take down the tasks waiting there
                while ready and begun < place.at_once and not ends:
                    name = ready.popleft()
                    place.begin(name, tasks[name].work)
                    begun += 1
                if not ends:
                    ends = place.ended()
                    begun -= len(ends)
                for end in ends:
                    if end.error:
                        errors[end.name] = end.error
                    yield end
                    graph.done(end.name)


class _Here:
    """This process, which runs a task as soon as it is begun."""

    at_once = 1

    def begin(self, name: str, work: Callable[[], object]) -> None:
        self._ended = [_do(name, work)]

    def ended(self) -> list[Ended]:
        return self._ended


class _Workers:
    """The workers of a Dask scheduler, which live until the stack is closed."""

    def __init__(self, engine: Engine, stack: ExitStack):
        try:
            import dask
            from distributed import Client, as_completed
        except ImportError as error:
            raise IsslError(f"--jobs, --cluster, --scheduler: {error}; pip install it") from error
        stack.enter_context(dask.config.set(SETTINGS))
        self._at, self._threads = engine.scheduler, None
        self._refused: list[str] = []
        if engine.cluster is not None:
            self._at = stack.enter_context(_jobs(engine, self._refused))
        elif engine.scheduler is None:
            try:
                self._at = stack.enter_context(_processes(engine.jobs or 1))
            except RuntimeError as error:
                raise IsslError(
                    f"--jobs {engine.jobs}: its processes did not start ({error}); is this "
                    "machine's loopback network up?"
                ) from error
            self._threads = max(1, (os.cpu_count() or 1) // (engine.jobs or 1))
        try:
            self._client = stack.enter_context(Client(self._at, timeout=CONNECT))
        except (OSError, ValueError) as error:
            raise IsslError(
                f"--scheduler {self._at}: no Dask scheduler answers ({error})"
            ) from error
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        on_gpus = any("GPU" in worker["resources"] for worker in workers)
        self._resources = {"GPU": 1} if on_gpus else None
        self.at_once = engine.jobs or max(1, len(workers))
        self._queue, self._names = as_completed(), dict[str, str]()

    def begin(self, name: str, work: Callable[[], object]) -> None:
        key = f"{name}-{os.getpid()}-{time.time_ns()}"
        self._names[key] = name
        task = (_do, name, work, self._threads)
        self._queue.add(self._client.submit(*task, key=key, resources=self._resources))

    def ended(self) -> list[Ended]:
        ends = []
        for future in self._next_batch():
            ends.append(_ended(self._names.pop(future.key), future, self._at))
            future.release()  # else Dask would do it again if its worker dies later
        return ends

    def _next_batch(self) -> list[Any]:
        """Futures that have ended, as soon as there are any.

        Raises IsslError if the batch system refuses the jobs and there is no worker, because Dask
        would wait for one."""
        while not (batch := self._queue.next_batch(block=False)):
            if self._refused and not self._client.scheduler_info(n_workers=-1)["workers"]:
                raise IsslError(
                    f"the batch system refuses the job: {self._refused[-1]}; change its options "
                    "with --cluster-option"
                )
            time.sleep(POLL)
        return list(batch)


def _processes(jobs: int) -> Any:
    """`jobs` workers on this machine, which share its GPUs evenly."""
    import torch
    from distributed import Nanny, Scheduler, SpecCluster

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(k) for k in range(torch.cuda.device_count())]
    workers = {}
    for k in range(jobs):
        env = {"CUDA_VISIBLE_DEVICES": gpus[k % len(gpus)]} if gpus else {}
        options = {"nthreads": 1, "memory_limit": 0, "silence_logs": "CRITICAL", "env": env}
        workers[k] = {"cls": Nanny, "options": options}
    local = {"host": "127.0.0.1", "port": 0, "dashboard_address": "127.0.0.1:0"}
    return SpecCluster(workers, {"cls": Scheduler, "options": local}, silence_logs="CRITICAL")


def _jobs(engine: Engine, refused: list[str]) -> Any:
    """Workers that are jobs of a batch system, as many as there is work for. Its message about each
    refused job is appended to `refused`."""
    name = f"--cluster {engine.cluster}"
    try:
        import dask_jobqueue
        from distributed.core import Status
    except ImportError as error:
        raise IsslError(f"{name}: {error}; pip install issl[cluster]") from error
    kind = getattr(dask_jobqueue, CLUSTERS[str(engine.cluster)])
    submit = kind.job_cls.submit_command.split()[0]
    if shutil.which(submit) is None:  # Dask would wait for jobs that nobody has submitted
        raise IsslError(f"{name}: no {submit} here; run it where jobs can be submitted")

    class Job(kind.job_cls):  # type: ignore[misc, name-defined]
        async def _submit_job(self, script_filename: str) -> Any:
            try:
                return await super()._submit_job(script_filename)
            except RuntimeError as error:
                refused.append(" ".join(str(error).split("stderr:")[-1].split()))
                self.status = Status.failed  # else the cluster cannot be closed
                raise

    given: dict[str, Any] = {"cores": 1, "memory": "4GB", "processes": 1}
    given |= {key: int(v) if v.isdigit() else v for key, v in engine.options if key != "directive"}
    extra = ["--memory-limit", "0"]
    if (lifetime := given.pop("lifetime", None)) is not None:
        extra += ["--lifetime", str(lifetime), "--lifetime-stagger", "1m"]
    try:
        cluster = kind(
            **given,
            job_cls=Job,
            job_extra_directives=[value for key, value in engine.options if key == "directive"],
            worker_extra_args=extra,
            job_script_prologue=["export DASK_DISTRIBUTED__WORKER__DAEMON=False"],
        )
        cluster.adapt(minimum_jobs=0, maximum_jobs=engine.jobs or 1)
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        raise IsslError(f"{name}: {error}") from error
    return cluster


def _do(name: str, work: Callable[[], object], threads: int | None = None) -> Ended:
    """Do a task, in any process; errors are returned, so that other tasks go on."""
    import torch  # slow to import, and commands without tasks do not need it

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


def _ended(name: str, future: Any, at: Any) -> Ended:
    """How a task on Dask ended; IsslError if that cannot be known.

    If its worker dies before the result arrives, Dask runs the task again and this waits.
    """
    from distributed import KilledWorker

    try:
        return future.result()
    except KilledWorker:
        text = f"the process that made {name} was killed, again and again (out of memory?)"
        return Ended(name, error=text)
    except Exception as error:
        if future.status == "error":
            return Ended(name, error=f"{type(error).__name__}: {error}")
        raise IsslError(
            f"the Dask scheduler {at} went away; what was made stays: run the same command again"
        ) from error


def in_short(error: BaseException) -> str | None:
    """An error as one line for the reader: bad input, a full disk or full memory. Else None."""
    if isinstance(error, IsslError):
        return str(error)
    if (why := why_no_room(error)) is not None:
        name = getattr(error, "filename", None) or "a file"
        if getattr(error, "errno", None) in READING:
            return f"{name} cannot be read or written: {why}; change its rights, or its place"
        return f"{name} cannot be written: {why}; make room and run it again"
    from issl.devices import is_out_of_memory  # imports torch

    if is_out_of_memory(error):
        return (
            "the memory does not suffice; end other programs, or use fewer images, a smaller width "
            "or batch size"
        )
    return None


# --- options of the commands whose tasks may run elsewhere ---


def whole(least: int) -> Callable[[str], int]:
    """A whole number of `least` or more."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r}: need a whole number, {least} or more")
        return value

    return parse


def add_arguments(command: argparse.ArgumentParser) -> None:
    """--jobs, --cluster, --cluster-option and --scheduler."""
    add, where = command.add_argument, command.add_mutually_exclusive_group()
    add("--jobs", type=whole(1), metavar="N", help="how many tasks at once, here or on the cluster")
    where.add_argument("--cluster", choices=CLUSTERS, help="start the workers as jobs")
    text = "a running Dask scheduler, such as tcp://HOST:8786"
    where.add_argument("--scheduler", metavar="ADDRESS", help=text)
    text = "for the jobs, such as queue=gpu, walltime=8:00:00, directive=--gpus-per-node=1"
    add("--cluster-option", action="append", default=[], metavar="KEY=VALUE", help=text)


def asked_for(options: argparse.Namespace) -> Engine | None:
    """The engine that these options ask for; None if they leave the choice to the command."""
    given = pairs(options.cluster_option, "--cluster-option", "KEY=VALUE, such as queue=gpu")
    if given and options.cluster is None:
        raise IsslError("--cluster-option goes with --cluster; give both")
    if options.jobs is None and options.cluster is None and options.scheduler is None:
        return None
    return Engine(options.jobs, options.cluster, given, options.scheduler)


def pairs(given: Sequence[str], option: str, example: str) -> list[tuple[str, str]]:
    """Options written as KEY=VALUE, split at the first `=`."""
    found = [text.partition("=") for text in given]
    for text, (key, equals, value) in zip(given, found, strict=True):
        if not (key and equals and value):
            raise IsslError(f"{option} {text}: write {example}")
    return [(key, value) for key, _, value in found]
