"""The stages that a run makes: the state of each, what can start, what a failure blocks, how long
the rest will take.

`issl run` makes them in its own process or in a few workers, `issl compute` as jobs.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from issl.audit.cache import Artifacts, Stage, in_dependency_order
from issl.audit.cost import CPU, Machine, seconds
from issl.audit.given import Given
from issl.audit.plan import Plan
from issl.audit.settings import Data
from issl.audit.stages import Pretrain
from issl.devices import is_out_of_memory
from issl.errors import IsslError, OutOfTime
from issl.files import why_no_room

# "not needed": its artifact is missing, and so it stays, because everything that would read it is
# there
State = Literal[
    "cached", "not needed", "waiting", "running", "done", "failed", "out of time", "blocked"
]
# s: what one job of a cluster makes; the queue, Python and torch take 10 s and more to start it
BUNDLE = 300.0
BELIEF = 0.2  # the weight of the cost model beside what was measured, as a share of the whole run


@dataclass(frozen=True)
class Ended:
    """How a stage ended; `error` as the reader should see it."""

    seconds: float
    error: str = ""
    late: bool = False  # the error is that the time budget was spent


def make(stage: Stage, artifacts: Artifacts) -> Ended:
    """Make a stage's artifact in this process. Errors are returned, so that the other stages can
    still be made."""
    began, error, late = time.monotonic(), "", False
    try:
        artifacts.get(stage)
    except IsslError as known:
        error, late = str(known), isinstance(known, OutOfTime)
    except Exception as unknown:  # noqa: BLE001 (it is shown whole)
        error = in_short(unknown) or traceback.format_exc()
    return Ended(time.monotonic() - began, error, late)


def in_short(error: Exception) -> str | None:
    """What a full disk or memory is to the reader, in one line; None for any other error, which is
    shown whole."""
    if (why := why_no_room(error)) is not None:
        return f"{getattr(error, 'filename', None) or 'a file'} cannot be written: {why}; make room and run it again"
    if is_out_of_memory(error):
        return "the memory does not suffice; end other programs, or use fewer images, a smaller width or batch size"
    return None


@dataclass
class Task:
    """One stage of the run, with its cost by the model (seconds). A blocked one has the error of
    its cause."""

    stage: Stage
    label: str
    needs: list[Task]
    cost: float
    state: State
    path: float = 0.0  # cost of the longest chain that begins with it
    began: float = 0.0
    seconds: float = 0.0
    error: str = ""
    late: bool = False
    log: str = ""  # where its job on a cluster wrote more, in words


class Scheduler:
    """All stages that the plans read, with all they depend on, in dependency order.

    there   is a stage's artifact there?
    jobs    how many run at once
    on      the machine that costs are reckoned for
    longest_first   what the longest chain waits for starts first, so that none is left over at the
                    end; else what the first plan reads, so that its notebook can run early
    other   the notebooks' share of the work, in seconds of the cost model; the caller lowers it as
            they end
    """

    def __init__(
        self,
        plans: Iterable[Plan],
        there: Callable[[Stage], bool],
        jobs: int = 1,
        other: float = 0.0,
        on: Machine = CPU,
        longest_first: bool = False,
    ):
        plans = list(plans)
        self.jobs, self.other = jobs, other
        self.tasks: dict[
            str, Task
        ] = {}  # a stage's label is the hash of all it depends on, so it is computed once
        listed = {plan.notebook: plan.stages() for plan in plans}
        for stage in in_dependency_order(stage for stages in listed.values() for stage in stages):
            state: State = "cached" if there(stage) else "not needed"
            needs = [self.tasks[need.label] for need in stage.needs().values()]
            label = stage.label
            self.tasks[label] = Task(stage, label, needs, seconds(stage, on), state)
        self._read = {
            name: [self.tasks[stage.label] for stage in stages] for name, stages in listed.items()
        }
        needed = {task.label for tasks in self._read.values() for task in tasks}
        for task in reversed(self.tasks.values()):
            if task.state == "not needed" and task.label in needed:
                task.state = "waiting"
                needed |= {need.label for need in task.needs}
            if task.state == "waiting":  # those that wait for it have been seen
                task.path += task.cost
                for need in task.needs:
                    need.path = max(need.path, task.path)
        # nothing has a longer path than what it needs, so in both orders it comes later
        self._order = sorted(
            self.tasks.values(), key=lambda task: -task.path if longest_first else 0.0
        )
        self.whole = other + sum(task.cost for task in self.to_do())

    def to_do(self) -> list[Task]:
        """Those that are not there at the start and have to be made, whatever became of them
        since."""
        return [task for task in self.tasks.values() if task.state not in ("cached", "not needed")]

    def ready(self) -> list[Task]:
        """The waiting ones whose dependencies are done, in the order in which they should start."""
        waiting = [task for task in self._order if task.state == "waiting"]
        return [
            task for task in waiting if all(need.state in ("cached", "done") for need in task.needs)
        ]

    def bundle(self) -> list[Task]:
        """The next ready stage, with waiting ones that need nothing but it and what is done: those
        that fit with it into BUNDLE seconds by the cost model. Empty where none is ready."""
        chosen: dict[str, Task] = {}
        spent = 0.0
        for task in self._order:
            can = all(
                need.state in ("cached", "done") or need.label in chosen for need in task.needs
            )
            if task.state == "waiting" and can and (not chosen or spent + task.cost <= BUNDLE):
                chosen[task.label] = task
                spent += task.cost
        return list(chosen.values())

    def running(self) -> list[Task]:
        """Those that are being made."""
        return [task for task in self.tasks.values() if task.state == "running"]

    def start(self, task: Task) -> None:
        """Note that a task begins now."""
        task.state, task.began = "running", time.monotonic()

    def postpone(self, tasks: Iterable[Task]) -> None:
        """Note that these were not begun after all."""
        for task in tasks:
            task.state = "waiting"

    def end(self, task: Task, ended: Ended) -> None:
        """Note how a task ended. If it failed, everything that depends on it is blocked."""
        task.seconds, task.error, task.late = ended.seconds, ended.error, ended.late
        task.state = "out of time" if ended.late else "failed" if ended.error else "done"
        for other in self.tasks.values():  # in dependency order: one pass reaches all
            cause = next(
                (n for n in other.needs if n.state in ("failed", "out of time", "blocked")), None
            )
            if other.state == "waiting" and cause is not None:
                other.state, other.error, other.late = "blocked", cause.error, cause.late

    # --- one plan ---

    def settled(self, plan: Plan) -> bool:
        """Has every stage that the plan reads ended, well or not?"""
        return not any(task.state in ("waiting", "running") for task in self._read[plan.notebook])

    def problem(self, plan: Plan) -> Task | None:
        """The first stage that the plan reads and that could not be made."""
        return next((task for task in self._read[plan.notebook] if task.error), None)

    def renewed(self, plan: Plan) -> bool:
        """Was any stage that the plan reads made in this run?"""
        return any(task.state == "done" for task in self._read[plan.notebook])

    # --- how far it is ---

    def finished(self) -> float:
        """Seconds of the cost model that are done, of `whole`."""
        return self.whole - self.other - sum(t.cost for t in self.to_do() if t.state != "done")

    def remaining(self) -> float:
        """Seconds left: the cost model's estimate of the rest, scaled by how the stages done so far
        compare with it.

        The model keeps some weight, so that the first stage alone does not decide.
        """
        if not self.whole:
            return 0.0
        done, belief = (
            [task for task in self.tasks.values() if task.state == "done"],
            BELIEF * self.whole,
        )
        factor = (sum(t.seconds for t in done) + belief) / (sum(t.cost for t in done) + belief)
        now, left = time.monotonic(), factor * self.other
        for task in self.tasks.values():
            if task.state == "waiting":
                left += factor * task.cost
            if task.state == "running":
                left += max(0.0, factor * task.cost - (now - task.began))
        return left / self.jobs

    def count(self) -> str:
        """One line: how many in which state."""
        states = [task.state for task in self.tasks.values()]
        return ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))

    def table(self) -> str:
        """One line per stage: state, name, seconds, what it is."""
        return "\n".join(line(task) for task in self.tasks.values())


def line(task: Task) -> str:
    """A task in one line: state, name, seconds, what it is."""
    took = f"{task.seconds:8.1f} s" if task.seconds else " " * 10
    return f"{task.state:12}{task.label:28}{took}  {summary(task.stage)}"


def summary(stage: Stage) -> str:
    """The settings that distinguish a stage from its neighbours, in a line: its encoder's and its
    images."""
    encoder, data, parts = _encoder(stage), getattr(stage, "data", None), []
    if encoder is not None:
        which = (
            encoder.checkpoint.file.name if isinstance(encoder, Given) else f"seed {encoder.seed}"
        )
        parts.append(f"{encoder.method} {which}")
    if isinstance(data, Data):
        parts.append(f"{data.name} {data.split} n={data.n}")
    return ", ".join(parts)


def _encoder(stage: Stage) -> Pretrain | Given | None:
    if isinstance(stage, Pretrain | Given):
        return stage
    return next(
        (found for need in stage.needs().values() if (found := _encoder(need)) is not None), None
    )
