"""`issl compute`: make all missing artifacts of a profile, independent ones side by side, here or
on Slurm.

Here they are made by worker processes, on Slurm by jobs of submitit's, entries of job arrays; a job
makes several stages where they are small. An artifact is made as `issl run` would, under the same
lock and with the same checkpoints, after everything it depends on. What was killed, preempted or
out of time can therefore be resumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import DelayedSubmission

from issl.audit.cache import Artifacts
from issl.audit.cost import CPU, H200
from issl.audit.profiles import ProfileOptions, check
from issl.audit.progress import in_words
from issl.audit.scheduler import Ended, Scheduler, Task, line
from issl.audit.workers import Job, Workers, threads_each, visible_gpus
from issl.errors import IsslError

POLL_SECONDS = 0.5
SLURM_MINUTES = 24 * 60  # the time limit of a job where none is given


@dataclass(frozen=True)
class Bundle:
    """What a job on Slurm does: these stages, one after another. Called again after a preemption,
    it resumes."""

    jobs: tuple[Job, ...]

    def __call__(self) -> list[Ended]:
        """Make them; returns how each ended, up to the first that did not end well: the others may
        need it."""
        ends: list[Ended] = []
        for job in self.jobs:
            ends.append(job())
            if ends[-1].error:
                break
        return ends

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
    """Make what is missing; returns 0 where all is there at the end, 1 where something failed, 3
    out of time.

    jobs    how many run at once at most; on this machine they share its cores, or its GPUs
    slurm   sbatch's options for each job, such as {"partition": "gpu", "gpus_per_node": "1"}
    Raises IsslError for input that is wrong, before anything is started.
    """
    if jobs < 1:
        raise IsslError(f"--jobs {jobs}: need 1 or more")
    if cluster not in ("local", "slurm"):
        raise IsslError(f"--cluster {cluster!r}: choose local or slurm")
    slurm = slurm or {}
    # the machine that submits to Slurm need not have the GPU that the jobs will find
    plans = (options if cluster == "local" else replace(options, device="auto")).plans()
    check(plans, options.folder)
    began, artifacts = time.monotonic(), Artifacts(options.folder / "artifacts")
    artifacts = replace(artifacts, released=None) if options.from_scratch else artifacts
    on_gpus = (
        visible_gpus(options.device)
        if cluster == "local"
        else [key for key in slurm if "gpu" in key]
    )
    scheduler = Scheduler(
        plans.values(), artifacts.has, jobs, on=H200 if on_gpus else CPU, longest_first=True
    )
    say(f"profile {options.profile}: {len(scheduler.tasks)} stages, {scheduler.count()}")
    job = partial(
        Job,
        root=artifacts.root,
        device=options.device,
        threads=threads_each(jobs) if cluster == "local" else 0,
        deadline=None if options.minutes is None else time.time() + 60 * options.minutes,
        released=not options.from_scratch,
    )
    made = (
        made_by_workers(scheduler, job, on_gpus)
        if cluster == "local"
        else _made_on_slurm(
            scheduler, job, executor_for(cluster, artifacts.root / "jobs", jobs, slurm)
        )
    )
    for task in made:
        log = f"{task.error.strip()}{task.log}" if task.error else ""
        left = f"{scheduler.count()}; about {in_words(scheduler.remaining())} left"
        say(line(task) + "".join(f"\n{' ' * 12}{text}" for text in [*log.splitlines(), left]))
    say(
        f"{scheduler.table()}\n{scheduler.count()} in {time.monotonic() - began:.0f} s: {artifacts.root}"
    )
    states = {task.state for task in scheduler.to_do()}
    return 0 if states <= {"done"} else 1 if "failed" in states else 3


def made_by_workers(
    scheduler: Scheduler, job: Callable[..., Job], gpus: list[str]
) -> Iterator[Task]:
    """Make all stages in processes on this machine, `scheduler.jobs` at once; yields each that has
    ended."""
    with Workers(scheduler.jobs, gpus) as workers:
        while scheduler.ready() or scheduler.running():
            for task in scheduler.ready()[: workers.idle]:
                scheduler.start(task)
                workers.start(task, job(task.stage))
            for task, ended in workers.ended():
                scheduler.end(task, ended)
                yield task


def _made_on_slurm(scheduler: Scheduler, job: Callable[..., Job], executor: Any) -> Iterator[Task]:
    """The same by jobs on Slurm; what starts together is one job array."""
    running: list[tuple[Any, list[Task]]] = []
    try:
        while scheduler.ready() or running:
            bundles: list[list[Task]] = []
            while len(running) + len(bundles) < scheduler.jobs and (tasks := scheduler.bundle()):
                bundles.append(tasks)
                for task in tasks:
                    scheduler.start(task)
            if bundles:  # submitit's batch may not be empty
                with executor.batch():
                    submitted = [
                        executor.submit(Bundle(tuple(job(t.stage) for t in tasks)))
                        for tasks in bundles
                    ]
                running += zip(submitted, bundles, strict=True)
            time.sleep(POLL_SECONDS)
            over = [entry for entry in running if entry[0].done()]
            running = [entry for entry in running if entry not in over]
            for done, tasks in over:
                ends = _ends(done, tasks[0])
                scheduler.postpone(tasks[len(ends) :])
                for task, ended in zip(tasks, ends, strict=False):
                    task.log = f"\nits log: {done.paths.stderr}"
                    scheduler.end(task, ended)
                    yield task
    except BaseException:
        for unfinished, _ in running:
            unfinished.cancel()
        raise


def _ends(submitted: Any, first: Task) -> list[Ended]:
    """How the stages of a job ended."""
    try:
        crash = submitted.exception()
    except (
        submitit.core.utils.UncompletedJobError
    ) as gone:  # it left no result: killed from outside
        crash = gone
    ends: list[Ended] = (
        submitted.result() if crash is None else [Ended(time.monotonic() - first.began, str(crash))]
    )
    return ends


def executor_for(cluster: str, folder: Path, jobs: int, slurm: Mapping[str, str]) -> Any:
    """submitit's executor; a Slurm that is not there is an error here, before anything is
    submitted."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=20)
    except RuntimeError as error:
        raise IsslError(f"--cluster {cluster}: {error}; is sbatch on the path?") from error
    options: dict[str, Any] = {
        f"slurm_{key}": int(v) if v.isdigit() else v for key, v in slurm.items()
    }
    options.setdefault("slurm_time", SLURM_MINUTES)
    executor.update_parameters(slurm_array_parallelism=jobs, **options)
    return executor
