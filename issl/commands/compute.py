"""`issl compute`: make all missing artifacts of a profile, independent ones side by side, here or on Slurm.

Each stage is one job of submitit's: a process on this machine, or an entry of a Slurm job array. A job makes
its artifact as `issl run` would, under the same lock and with the same checkpoints; what it depends on was
made before it was submitted. So a job that is killed, preempted or out of its time goes on where it was.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import submitit
import torch
from submitit.helpers import DelayedSubmission

from issl.commands.run import check, read_profile, select, where
from issl.devices import pick_device
from issl.errors import IsslError, OutOfTime
from issl.experiments.cache import Artifacts, Stage, in_dependency_order
from issl.experiments.plan import Plan
from issl.experiments.plans import EXPLORER
from issl.experiments.settings import Data
from issl.experiments.stages import Pretrain

State = Literal["cached", "done", "running", "waiting", "failed", "out of time", "blocked"]
POLL_SECONDS = 0.5
SLURM_MINUTES = 24 * 60  # the time limit of a job where none is given


@dataclass(frozen=True)
class Ended:
    """How a job ended; `error` as the reader should see it."""

    seconds: float
    error: str = ""
    late: bool = False  # the error is that the time budget was spent


@dataclass(frozen=True)
class Job:
    """What a job does: make one artifact. Called again after a preemption, it resumes."""

    stage: Stage
    root: Path
    device: str
    threads: int
    deadline: float | None  # seconds since the epoch: a job may run on another machine

    def __call__(self) -> Ended:
        """Make it."""
        from issl.devices import keep_freed_memory

        keep_freed_memory()
        if self.threads:
            torch.set_num_threads(self.threads)
        began = time.monotonic()
        deadline = None if self.deadline is None else began + self.deadline - time.time()
        try:
            Artifacts(self.root, pick_device(self.device), deadline=deadline).get(self.stage)
        except IsslError as error:
            return Ended(time.monotonic() - began, str(error), isinstance(error, OutOfTime))
        return Ended(time.monotonic() - began)

    def checkpoint(self) -> DelayedSubmission:
        """Slurm is about to stop it: the same again, from its last checkpoint."""
        return DelayedSubmission(self)


@dataclass
class Work:
    """One stage of the run."""

    stage: Stage
    state: State = "waiting"
    job: Any = None
    began: float = 0.0
    seconds: float = 0.0
    error: str = ""


def closure(plans: Iterable[Plan]) -> dict[str, Stage]:
    """Every stage that the plans read, with all they depend on, each once; dependencies come first."""
    return {stage.label: stage for stage in in_dependency_order(stage for plan in plans for stage in plan.stages())}


@dataclass
class Board:
    """The state of all stages, and what is known of their times."""

    works: dict[str, Work]
    began: float = field(default_factory=time.monotonic)

    def ready(self) -> list[Work]:
        """Those that wait for nothing any more."""
        ended = ("cached", "done")
        return [
            w
            for w in self.works.values()
            if w.state == "waiting" and all(self.works[s.label].state in ended for s in w.stage.needs().values())
        ]

    def running(self) -> list[Work]:
        return [w for w in self.works.values() if w.state == "running"]

    def block(self) -> None:
        """What waits for something that failed will not run."""
        for work in self.works.values():
            needed = [self.works[s.label].state for s in work.stage.needs().values()]
            if work.state == "waiting" and any(s in ("failed", "blocked", "out of time") for s in needed):
                work.state = "blocked"

    def remaining(self, jobs: int) -> float | None:
        """Seconds left, if every stage takes what those of its kind took here; None before one of a kind ended."""
        total = 0.0
        for work in self.works.values():
            if work.state in ("waiting", "running"):
                took = [w.seconds for w in self.works.values() if w.state == "done" and w.stage.name == work.stage.name]
                if not took:
                    return None
                spent = time.monotonic() - work.began if work.state == "running" else 0.0
                total += max(0.0, sum(took) / len(took) - spent)
        return total / jobs

    def count(self) -> str:
        """One line: how many in which state."""
        states = [w.state for w in self.works.values()]
        return ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))

    def table(self) -> str:
        """One line a stage: state, name, seconds, what it is."""
        lines = []
        for label, work in self.works.items():
            seconds = f"{work.seconds:8.1f} s" if work.state == "done" else " " * 10
            lines.append(f"{work.state:12}{label:28}{seconds}  {summary(work.stage)}")
        return "\n".join(lines)


def summary(stage: Stage) -> str:
    """The settings that tell a stage from its neighbours, in a line."""
    encoder, told = next((s for s in stage.needs().values() if isinstance(s, Pretrain)), stage), []
    if isinstance(encoder, Pretrain):
        told.append(f"{encoder.recipe.method} seed {encoder.seed}")
    data = getattr(stage, "data", None)
    if isinstance(data, Data):
        told.append(f"{data.name} {data.split} n={data.n}")
    return ", ".join(told)


def compute(
    profile: str = "quick",
    only: str | None = None,
    data_root: Path | None = None,
    device: str = "auto",
    out: Path | None = None,
    jobs: int = 1,
    cluster: str = "local",
    minutes: float | None = None,
    slurm: Mapping[str, str] | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Make what is missing; returns 0 where all is there at the end, 1 where something failed, 3 out of time.

    jobs      at most so many at once; on this machine they share its cores
    minutes   the time budget: running trainings write a checkpoint and end, nothing new begins
    slurm     sbatch's options for each job, such as {"partition": "gpu", "gpus_per_node": "1"}
    """
    if jobs < 1:
        raise IsslError(f"--jobs {jobs}: need 1 or more")
    if cluster not in ("local", "slurm"):
        raise IsslError(f"--cluster {cluster!r}: choose local or slurm")
    out, root = where(out, data_root)
    # the machine that submits to Slurm need not have the GPU that the jobs will find
    here = device if cluster == "local" else "auto"
    names = select(only) + ([EXPLORER.notebook] if only is None else [])  # as `issl run` does
    plans = read_profile(profile, names, out=str(out), data_root=root, device=here)
    check(plans, out)
    artifacts = Artifacts(out / "artifacts")
    board = Board({label: Work(stage) for label, stage in closure(plans.values()).items()})
    for work in board.works.values():
        work.state = "cached" if artifacts.has(work.stage) else "waiting"
    say(f"profile {profile}: {len(board.works)} stages, {board.count()}")
    executor = _executor(cluster, out / "artifacts" / "jobs", jobs, minutes, slurm or {})
    threads = max(1, (os.cpu_count() or 1) // jobs) if cluster == "local" else 0
    deadline = None if minutes is None else time.time() + 60 * minutes
    try:
        while board.ready() or board.running():
            _submit(board, executor, jobs, lambda s: Job(s, artifacts.root, device, threads, deadline))
            time.sleep(POLL_SECONDS)
            for work in board.running():
                if work.job.done():
                    _finish(work)
                    board.block()
                    left = board.remaining(jobs)
                    say(
                        f"{work.state:12}{work.stage.label:28}{work.seconds:8.1f} s  {summary(work.stage)}\n"
                        + (work.error + "\n" if work.error else "")
                        + f"            {board.count()}" + ("" if left is None else f"; about {left:.0f} s left")
                    )  # fmt: skip
    except BaseException:
        for work in board.running():
            work.job.cancel()
        raise
    say(board.table() + f"\n{board.count()} in {time.monotonic() - board.began:.0f} s: {artifacts.root}")
    states = {w.state for w in board.works.values()}
    if states <= {"cached", "done"}:
        return 0
    return 1 if "failed" in states else 3


def _submit(board: Board, executor: Any, jobs: int, job: Callable[[Stage], Job]) -> None:
    """Start what is ready, as far as there is room; what starts together is one job array on Slurm."""
    chosen = board.ready()[: jobs - len(board.running())]
    if not chosen:
        return
    with executor.batch():
        for work in chosen:
            work.job = executor.submit(job(work.stage))
    for work in chosen:
        work.state, work.began = "running", time.monotonic()


def _finish(work: Work) -> None:
    """Read how a job ended."""
    try:
        crash = work.job.exception()
    except submitit.core.utils.UncompletedJobError as gone:  # it left no result: killed from outside
        crash = gone
    ended = Ended(time.monotonic() - work.began, str(crash)) if crash is not None else work.job.result()
    work.seconds = ended.seconds
    work.state = "out of time" if ended.late else "failed" if ended.error else "done"
    if ended.error:
        lines = [*ended.error.strip().splitlines(), f"its log: {work.job.paths.stderr}"]
        work.error = "\n".join("            " + line for line in lines)


def _executor(cluster: str, folder: Path, jobs: int, minutes: float | None, slurm: Mapping[str, str]) -> Any:
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
