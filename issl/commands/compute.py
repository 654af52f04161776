"""`issl compute`: make all missing artifacts of a profile, independent ones side by side, here or on Slurm.

Each stage is one job of submitit's: a process on this machine, or an entry of a Slurm job array. A job makes its
artifact as `issl run` would, under the same lock and with the same checkpoints, after everything it depends on. A job
that was killed, preempted or out of time can therefore be resumed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import submitit
import torch
from submitit.helpers import DelayedSubmission

from issl.commands.profiles import ProfileOptions, check
from issl.commands.progress import in_words
from issl.commands.scheduler import Ended, Scheduler, Task, line, make
from issl.devices import keep_freed_memory, pick_device
from issl.errors import IsslError
from issl.experiments.cache import Artifacts, Stage

POLL_SECONDS = 0.5
SLURM_MINUTES = 24 * 60  # the time limit of a job where none is given


@dataclass(frozen=True)
class Job:
    """What a job does: make one artifact. Called again after a preemption, it resumes."""

    stage: Stage
    root: Path
    device: str
    threads: int
    deadline: float | None  # seconds since the epoch: a job may run on another machine
    gpu: str | None = None  # the only one that it sees; None: what its machine shows it
    released: bool = True  # are artifacts that come with the repository used?

    def __call__(self) -> Ended:
        """Make it."""
        if self.gpu is not None:  # submitit hides all GPUs from local jobs; CUDA reads this when it is first used
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpu
        keep_freed_memory()
        if self.threads:
            torch.set_num_threads(self.threads)
        deadline = None if self.deadline is None else time.monotonic() + self.deadline - time.time()
        artifacts = Artifacts(self.root, pick_device(self.device), deadline=deadline)
        return make(self.stage, artifacts if self.released else replace(artifacts, released=None))

    def checkpoint(self) -> DelayedSubmission:
        """Slurm is about to stop it: submit it again, to continue from its last checkpoint."""
        return DelayedSubmission(self)


def compute(
    options: ProfileOptions,
    jobs: int = 1,
    cluster: str = "local",
    slurm: Mapping[str, str] | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Make what is missing; returns 0 where all is there at the end, 1 where something failed, 3 out of time.

    jobs    how many run at once at most; on this machine they share its cores
    slurm   sbatch's options for each job, such as {"partition": "gpu", "gpus_per_node": "1"}
    Raises IsslError for input that is wrong, before anything is submitted.
    """
    if jobs < 1:
        raise IsslError(f"--jobs {jobs}: need 1 or more")
    if cluster not in ("local", "slurm"):
        raise IsslError(f"--cluster {cluster!r}: choose local or slurm")
    # the machine that submits to Slurm need not have the GPU that the jobs will find
    plans = (options if cluster == "local" else replace(options, device="auto")).plans()
    check(plans, options.folder)
    began, artifacts = time.monotonic(), Artifacts(options.folder / "artifacts")
    artifacts = replace(artifacts, released=None) if options.from_scratch else artifacts
    scheduler = Scheduler(plans.values(), artifacts.has, jobs)
    say(f"profile {options.profile}: {len(scheduler.tasks)} stages, {scheduler.count()}")
    executor = executor_for(cluster, artifacts.root / "jobs", jobs, slurm or {})
    threads = max(1, (os.cpu_count() or 1) // jobs) if cluster == "local" else 0
    deadline = None if options.minutes is None else time.time() + 60 * options.minutes
    gpus = visible_gpus(options.device) if cluster == "local" else []
    try:
        while scheduler.ready() or scheduler.running():
            _submit(
                scheduler,
                executor,
                partial(Job, released=not options.from_scratch),
                artifacts.root,
                options.device,
                threads,
                deadline,
                gpus,
            )
            time.sleep(POLL_SECONDS)
            for task in scheduler.running():
                if task.job.done():
                    scheduler.end(task, _ended(task))
                    log = f"{task.error.strip()}\nits log: {task.job.paths.stderr}" if task.error else ""
                    left = f"{scheduler.count()}; about {in_words(scheduler.remaining())} left"
                    say(line(task) + "".join(f"\n{' ' * 12}{text}" for text in [*log.splitlines(), left]))
    except BaseException:
        for task in scheduler.running():
            task.job.cancel()
        raise
    say(f"{scheduler.table()}\n{scheduler.count()} in {time.monotonic() - began:.0f} s: {artifacts.root}")
    states = {task.state for task in scheduler.to_do()}
    return 0 if states <= {"done"} else 1 if "failed" in states else 3


def visible_gpus(device: str) -> list[str]:
    """The GPUs that jobs on this machine may use, as CUDA_VISIBLE_DEVICES names them; none where they compute on the
    CPU."""
    if pick_device(device).type == "cpu":
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(k) for k in range(torch.cuda.device_count())]


def least_used(gpus: Sequence[str], taken: Sequence[str | None]) -> str | None:
    """The GPU that the fewest jobs have; None where there is none."""
    return min(gpus, key=taken.count) if gpus else None


def _submit(
    scheduler: Scheduler, executor: Any, job: Callable[..., Job], root: Path, device: str, threads: int,
    deadline: float | None, gpus: Sequence[str],
) -> None:  # fmt: skip
    """Start what is ready, as far as there is room; what starts together is one job array on Slurm. Each local job has
    the GPU with the fewest jobs."""
    chosen = scheduler.ready()[: scheduler.jobs - len(scheduler.running())]
    if not chosen:
        return
    taken = [task.gpu for task in scheduler.running()]
    with executor.batch():
        for task in chosen:
            task.gpu = least_used(gpus, taken)
            taken.append(task.gpu)
            task.job = executor.submit(job(task.stage, root, device, threads, deadline, task.gpu))
    for task in chosen:
        scheduler.start(task)


def _ended(task: Task) -> Ended:
    """How a job ended."""
    try:
        crash = task.job.exception()
    except submitit.core.utils.UncompletedJobError as gone:  # it left no result: killed from outside
        crash = gone
    result: Ended = task.job.result() if crash is None else Ended(time.monotonic() - task.began, str(crash))
    return result


def executor_for(cluster: str, folder: Path, jobs: int, slurm: Mapping[str, str]) -> Any:
    """submitit's executor; a Slurm that is not there is an error here, before anything is submitted."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        executor = submitit.AutoExecutor(
            folder, cluster=cluster, **({"slurm_max_num_timeout": 20} if cluster == "slurm" else {})
        )
    except RuntimeError as error:
        raise IsslError(f"--cluster {cluster}: {error}; is sbatch on the path?") from error
    if cluster == "local":
        executor.update_parameters(timeout_min=60 * 24 * 30)
        return executor
    options: dict[str, Any] = {f"slurm_{key}": int(v) if v.isdigit() else v for key, v in slurm.items()}
    options.setdefault("slurm_time", SLURM_MINUTES)
    executor.update_parameters(slurm_array_parallelism=jobs, **options)
    return executor
