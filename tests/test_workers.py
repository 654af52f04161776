"""Stages side by side in worker processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

import issl
from issl.audit import run, workers
from issl.audit.cache import Artifacts
from issl.audit.plans import PLANS
from issl.audit.scheduler import Ended, Scheduler, Task
from issl.audit.workers import Workers, default_workers


def fine() -> Ended:
    return Ended(float(os.getpid()))


def dies() -> Ended:
    os.kill(os.getpid(), signal.SIGKILL)
    return Ended(0.0)


def task(name: str) -> Task:
    stage = PLANS["00_method"]().pretrain()
    return Task(stage, name, [], 1.0, "running")


def test_a_worker_that_dies_takes_only_its_own_stage_with_it() -> None:
    with Workers(2) as workers:
        _one_dies(workers)


def _one_dies(workers: Workers) -> None:
    workers.start(task("a/1"), fine)
    workers.start(task("b/2"), dies)
    assert workers.idle == 0
    found = {}
    while len(found) < 2:
        found |= {t.label: end for t, end in workers.ended()}
    assert found["a/1"].error == "" and "the process that made b/2 was killed" in found["b/2"].error
    assert workers.idle == 2
    for _ in range(2):  # the one that died was replaced
        workers.start(task("c/3"), fine)
    ends = []
    while len(ends) < 2:
        ends += workers.ended()
    assert len({end.seconds for _, end in ends} - {os.getpid()}) == 2 and not any(
        end.error for _, end in ends
    )


def test_two_at_once_make_what_one_after_another_makes(tmp_path: Path) -> None:
    """The same artifacts, to the rounding of another number of threads."""
    plan = PLANS["04_duplicates"](
        methods=("simclr",), n=32, n_test=16, width=2, epochs=1, batch_size=16, encoders=2, rank=4
    )
    scores = []
    for jobs in (1, 2):
        artifacts = Artifacts(tmp_path / str(jobs))
        scheduler = Scheduler([plan], artifacts.has, jobs)
        ended = [t.label for t in run._made(scheduler, artifacts)]
        assert sorted(ended) == sorted(scheduler.tasks) and all(
            t.state == "done" for t in scheduler.tasks.values()
        )
        needs = {t.label: {need.label for need in t.needs} for t in scheduler.tasks.values()}
        assert all(needs[label] <= set(ended[:k]) for k, label in enumerate(ended))
        scores.append(plan.influence(plan.pretrain()).read(artifacts))
    assert scores[0]["influence"].to_numpy() == pytest.approx(
        scores[1]["influence"].to_numpy(), rel=1e-3
    )


PARENT = """
import sys, time
from functools import partial
from test_workers import Workers, task
if __name__ == "__main__":
    workers = Workers(1)
    workers.start(task("a/1"), partial(time.sleep, 120))
    print("started", flush=True)
    workers.ended()
"""


def test_workers_end_when_the_process_that_started_them_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(issl.__file__).parents[1])])
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert parent.stdout is not None and parent.stdout.readline() == b"started\n"
    time.sleep(5)  # the worker is at its task, or about to be
    children = psutil.Process(parent.pid).children(recursive=True)
    assert children
    parent.kill()
    parent.wait()
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert len(gone) == len(children) and not alive


def command(process: psutil.Process) -> str:
    """Its command line; that of one that has just ended is empty."""
    try:
        return " ".join(process.cmdline())
    except (psutil.ZombieProcess, psutil.NoSuchProcess):
        return ""


def test_after_an_error_they_end_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Workers(2) as workers:
        for _ in range(2):
            workers.start(task("a/1"), partial(time.sleep, 120))
        raise KeyboardInterrupt
    children = [c for c in psutil.Process().children(recursive=True) if "spawn_main" in command(c)]
    assert not psutil.wait_procs(children, timeout=30)[1] and time.monotonic() - began < 60


def test_how_many_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert default_workers("cpu", 600.0) == 4 and default_workers("cpu", 5.0) == 1
    assert default_workers("cpu", 60.0) == 4
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert default_workers("cpu", 600.0) == 2


@pytest.mark.parametrize(
    ("gpus", "cores", "free", "peak", "expected"),
    [
        (1, 16, 80, 0.6, 4),
        (2, 16, 80, 0.6, 8),
        (2, 4, 80, 0.6, 4),
        (1, 16, 24, 9.0, 2),
        (1, 16, 8, 9.0, 1),
        (4, 2, 80, 1.0, 4),
    ],
)
def test_how_many_share_a_gpu_by_default(
    gpus: int, cores: int, free: float, peak: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "visible_gpus", lambda _: [str(k) for k in range(gpus)])
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * 10**9, 80 * 10**9))
    assert (
        default_workers("cuda", 600.0, peak) == expected and default_workers("cuda", 5.0, peak) == 1
    )
