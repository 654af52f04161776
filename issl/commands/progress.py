"""The overview of a run: how many stages and notebooks are done, and how long the rest will take.

On a terminal a line that renews itself (rich); elsewhere plain lines, one a stage.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from issl.experiments.cache import Artifacts, Stage
from issl.experiments.cost import AFTER, NOTEBOOK, missing, seconds
from issl.experiments.plan import Plan


class Overview:
    """What a run has to do, and how far it is.

    plans   of notebooks, of which each costs something too
    more    plans whose stages alone are made
    """

    def __init__(self, plans: Iterable[Plan], artifacts: Artifacts, more: Iterable[Plan] = ()):
        plans = list(plans)
        self.artifacts, self.began = artifacts, time.monotonic()
        self.cost = {stage.label: seconds(stage) for stage in missing([*plans, *more], artifacts)}
        self.notebooks, self.notebooks_done = len(plans), 0
        self.after = AFTER if any(plan.last for plan in plans) else 0.0
        self._progress: Progress | None = None

    @property
    def done(self) -> int:
        """Stages made so far."""
        return sum(label in self.cost for label in self.artifacts.computed)

    def _whole(self) -> float:
        return sum(self.cost.values()) + NOTEBOOK * self.notebooks + self.after

    def _made(self) -> float:
        return sum(self.cost.get(label, 0.0) for label in self.artifacts.computed) + NOTEBOOK * self.notebooks_done

    def remaining(self) -> float:
        """Seconds left: by what the model says of the rest, times what the part that is done took against the model."""
        made, whole, elapsed = self._made(), self._whole(), time.monotonic() - self.began
        # a little of the model's own opinion, so that the first stage does not decide
        belief = 0.2 * whole
        return max(0.0, whole - made) * (elapsed + belief) / (made + belief)

    def told(self) -> str:
        """How far it is, in words."""
        return (
            f"{self.done} of {len(self.cost)} stages, {self.notebooks_done} of {self.notebooks} notebooks; "
            f"about {in_words(self.remaining())} left"
        )

    def stage(self, stage: Stage, took: float) -> None:
        """Tell of a stage that was made."""
        self._say(f"        {stage.label}, {took:.1f} s", "" if self._progress else f"; {self.told()}")

    def notebook(self, line: str) -> None:
        """Tell of a notebook that ended."""
        self.notebooks_done += 1
        self._say(line)

    def _say(self, line: str, more: str = "") -> None:
        if self._progress is None:
            print(line + more, flush=True)
        else:
            self._progress.console.print(line, markup=False, highlight=False)
            task = self._progress.tasks[0].id
            self._progress.update(task, completed=self._made(), total=self._whole(), told=self.told())

    @contextmanager
    def shown(self) -> Iterator[Overview]:
        """On a terminal, with the line that renews itself."""
        if not sys.stdout.isatty():
            yield self
            return
        console = Console()
        with Progress(BarColumn(), TextColumn("{task.fields[told]}"), console=console, transient=True) as progress:
            progress.add_task("run", total=None, told=self.told())
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
