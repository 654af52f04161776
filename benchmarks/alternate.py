"""Times several programs in alternation: they take turns batch by batch, in one process.

A machine's speed drifts from minute to minute by more than methods differ. So each program has its
own thread, only one runs at a time, and it hands over at each batch (`turn.next()`). Its time is
counted from getting the turn to handing it over. All programs meet the same drift, so ratios of
times can be compared. Start Python with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Turn:
    """One program's access to the processor."""

    table: Table
    name: str
    # seconds: everything before the first batch, then each batch
    laps: list[float] = field(default_factory=list)
    scale: float = 1.0  # whole task ÷ the part that was run
    began: float = 0.0
    done: bool = False
    result: Any = None
    error: str | None = None

    @property
    def seconds(self) -> float:
        return sum(self.laps)

    @property
    def failure(self) -> str | None:
        """The last line of its error."""
        return None if self.error is None else self.error.strip().splitlines()[-1][:200]

    def next(self) -> None:
        """Hand over to the others; returns when it is this program's turn again."""
        self.laps.append(time.perf_counter() - self.began)
        self.table.hand_over(self)
        self.began = time.perf_counter()


@dataclass
class Table:
    """All programs, and whose turn it is."""

    turns: list[Turn] = field(default_factory=list)
    now: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def hand_over(self, turn: Turn) -> None:
        with self.changed:
            others = [*range(self.now + 1, len(self.turns)), *range(self.now + 1)]
            self.now = next((k for k in others if not self.turns[k].done), -1)
            self.changed.notify_all()
            if not turn.done:
                self.changed.wait_for(lambda: self.turns[self.now] is turn)

    def run(self, turn: Turn, program: Callable[[Turn], Any]) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.turns[self.now] is turn)
        turn.began = time.perf_counter()
        try:
            turn.result = program(turn)
        except BaseException:  # noqa: BLE001  (reported in the table; the others continue)
            turn.error = traceback.format_exc()
        turn.laps.append(time.perf_counter() - turn.began)
        turn.done = True
        print(f"{turn.name}: {turn.seconds:.1f} s", flush=True)
        self.hand_over(turn)


def alternate(programs: Mapping[str, Callable[[Turn], Any]]) -> dict[str, Turn]:
    """Run all of them to the end, taking turns; each gets its `Turn` and calls `next()` at every
    batch."""
    table = Table()
    table.turns = [Turn(table, name) for name in programs]
    threads = [
        threading.Thread(target=table.run, args=(turn, programs[turn.name]), name=turn.name)
        for turn in table.turns
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {turn.name: turn for turn in table.turns}
