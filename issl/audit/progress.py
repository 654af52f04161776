"""The progress of a run: how many stages and notebooks are done, and how long the rest will take.

On a terminal one line that is updated (rich); elsewhere plain lines, one per stage.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from issl.audit.cost import NOTEBOOK
from issl.audit.scheduler import Scheduler, Task, summary


class Overview:
    """What a run prints while it works; each notebook that ends lowers the scheduler's rest by
    NOTEBOOK seconds.

    stopped   the run is being stopped: a notebook that ends now was ended, which says nothing about
              it
    """

    def __init__(self, scheduler: Scheduler, notebooks: int):
        self.scheduler, self.notebooks, self.notebooks_done = scheduler, notebooks, 0
        self.stopped = False
        self._progress: Progress | None = None

    def status(self) -> str:
        """How far the run is, in words."""
        to_do = self.scheduler.to_do()
        return (
            f"{sum(task.state == 'done' for task in to_do)} of {len(to_do)} stages, {self.notebooks_done} of "
            f"{self.notebooks} notebooks; about {in_words(self.scheduler.remaining())} left"
        )

    def stage(self, task: Task) -> None:
        """Print a stage that ended well."""
        about = f"        {task.label}: {summary(task.stage)}, {task.seconds:.1f} s"
        self._print(about, "" if self._progress else f"; {self.status()}")

    def notebook(self, line: str) -> None:
        """Print a notebook that ended."""
        if self.stopped:
            return
        self.notebooks_done += 1
        self.scheduler.other -= NOTEBOOK
        self._print(line)

    def say(self, line: str) -> None:
        """Print a line about anything else."""
        self._print(line)

    def _print(self, line: str, more: str = "") -> None:
        if self._progress is None:
            print(line + more, flush=True)
        else:
            self._progress.console.print(line, markup=False, highlight=False)
            done, task = self.scheduler.finished(), self._progress.tasks[0].id
            self._progress.update(
                task, completed=done, total=self.scheduler.whole, status=self.status()
            )

    @contextmanager
    def shown(self) -> Iterator[Overview]:
        """On a terminal, with the line that is updated."""
        if not sys.stdout.isatty():
            yield self
            return
        console = Console()
        with Progress(
            BarColumn(), TextColumn("{task.fields[status]}"), console=console, transient=True
        ) as progress:
            progress.add_task("run", total=None, status=self.status())
            self._progress = progress
            try:
                yield self
            finally:
                self._progress = None


def in_words(duration: float) -> str:
    """40 s, 2.5 min, 12 min, 3.5 h, 2 days."""
    if duration < 90:
        return f"{max(1, round(duration))} s"
    if duration < 570:
        return f"{round(duration / 30) / 2:g} min"
    if duration < 5400:
        return f"{round(duration / 60)} min"
    hours = duration / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{round(hours / 24)} days"
