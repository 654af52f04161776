"""Tasks that need each other: order, failures, processes that die, other people's Dask."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from issl import engine
from issl.audit.cache import Artifacts
from issl.audit.profiles import PLANS
from issl.audit.stages import Pretrain
from issl.engine import Engine, Task
from issl.errors import IsslError
from issl.files import REPOSITORY


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(f"{text}\n")


def fail() -> None:
    raise IsslError("the cat sat on the tensor")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def one_thread_and_gpu() -> None:
    assert torch.get_num_threads() == max(1, (os.cpu_count() or 1) // 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] in "35"
    assert "MALLOC_TRIM_THRESHOLD_" not in os.environ  # kernels inherit it


def some(log: Path) -> dict[str, Task]:
    return {
        "a": Task(partial(append, log, "a")),
        "wrong": Task(fail, ["a"]),
        "late": Task(partial(append, log, "late"), ["wrong"]),
        "later": Task(partial(append, log, "later"), ["late"]),
        "b": Task(partial(append, log, "b"), ["a"]),
        "c": Task(partial(append, log, "c"), ["a", "b"]),
    }


def test_a_failure_blocks_what_needs_it_and_nothing_else(tmp_path: Path) -> None:
    ended = {end.name: end for end in Engine().run(some(tmp_path / "log"))}
    assert list(ended).index("later") > list(ended).index("late")
    assert (tmp_path / "log").read_text().split() == ["a", "b", "c"]
    assert {name for name, end in ended.items() if end.blocked} == {"late", "later"}
    assert {end.error for end in ended.values()} == {"", "the cat sat on the tensor"}


def trained(stage: Pretrain, root: Path, kill: bool) -> None:
    """Train; `kill`: the first time, until there is a checkpoint."""
    artifacts = Artifacts(root, checkpoint_seconds=0.0, released=None)
    checkpoint = artifacts.folder(stage).with_suffix(".part") / "checkpoint.safetensors"
    if checkpoint.exists():
        append(root / "resumed", str(os.getpid()))

    def watch() -> None:
        while not checkpoint.exists():
            time.sleep(0.01)
        die()

    if kill and not checkpoint.exists():
        threading.Thread(target=watch, daemon=True).start()
    artifacts.get(stage)


def test_processes_that_die(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two, which share the cores and the GPUs: a task that kills its process each time fails;
    another process goes on from a training's checkpoint, and the encoder is the same bit for
    bit."""
    monkeypatch.setitem(engine.SETTINGS, "distributed.scheduler.allowed-failures", 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    stage = PLANS["00_method"](n=32, width=1, epochs=30, batch_size=16).pretrain()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    tasks = some(tmp_path / "log") | {
        "share": Task(one_thread_and_gpu),
        "killer": Task(die, ["whole", "killed"]),  # the last: what waits there would go with it
        "after": Task(fail, ["killer"]),
        "whole": Task(partial(trained, stage, whole, False)),
        "killed": Task(partial(trained, stage, killed, True)),
    }
    ended = {end.name: end for end in Engine(2).run(tasks)}
    assert set(ended) == set(tasks)
    assert "the process that made killer was killed" in ended["killer"].error
    assert {name for name, end in ended.items() if end.blocked} == {"late", "later", "after"}
    well = {name for name, end in ended.items() if not end.error}
    assert well == {"a", "b", "c", "share", "whole", "killed"}
    done = (tmp_path / "log").read_text().split()  # what a dead worker had done may be done again
    assert list(dict.fromkeys(done)) == ["a", "b", "c"]
    assert len((killed / "resumed").read_text().split()) == 1
    a, b = (
        json.loads((Artifacts(root).folder(stage) / "manifest.json").read_text())["files"]
        for root in (whole, killed)
    )
    assert a["encoder.safetensors"] == b["encoder.safetensors"]


@pytest.fixture
def dask(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A scheduler with a worker: the scheduler's process, and its address."""
    told, log = tmp_path / "scheduler.json", (tmp_path / "dask.log").open("wb")

    def start(*command: str) -> subprocess.Popen[bytes]:
        paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
        environment = os.environ | {"PYTHONPATH": paths}
        command = (sys.executable, "-m", "dask", *command, "--scheduler-file", str(told))
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path)

    scheduler = start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
    worker = start("worker", "--no-nanny", "--nthreads", "1")
    try:
        end = time.monotonic() + 120
        while not told.exists() or not told.read_text():
            assert time.monotonic() < end, (tmp_path / "dask.log").read_text()
            time.sleep(0.1)
        yield scheduler, json.loads(told.read_text())["address"]
    finally:
        for process in (scheduler, worker):
            process.kill()
            process.wait()


def test_a_dask_that_is_there_and_goes_away(dask: tuple, tmp_path: Path) -> None:
    scheduler, address = dask
    log = tmp_path / "log"
    tasks = {
        "a": Task(partial(append, log, "done stays done")),
        "b": Task(partial(time.sleep, 600), ["a"]),
    }
    run = Engine(scheduler=address).run(tasks)
    assert next(run).name == "a"
    scheduler.kill()
    with pytest.raises(IsslError, match=f"{address} went away"):
        next(run)
    assert log.read_text() == "done stays done\n"


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Slurm of one node, this machine; its folder."""
    if os.geteuid() != 0 or not all(shutil.which(p) for p in ("slurmctld", "slurmd", "munged")):
        pytest.skip("needs root and Debian's slurm-wlm and munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # a socket's path must be short
    script = REPOSITORY / "tests/slurm.sh"
    subprocess.run([script, "start", folder], check=True)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}")
    try:
        yield folder
    finally:
        subprocess.run([script, "stop", folder], check=True)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_a_real_slurm_runs_two_jobs(slurm: Path, tmp_path: Path) -> None:
    """Each asks for a GPU, which it does not use."""
    log = tmp_path / "log"
    tasks = {"first": Task(partial(append, log, "first"))}
    tasks |= {name: Task(partial(time.sleep, 10), ["first"]) for name in ("a", "b")}
    tasks["last"] = Task(partial(append, log, "last"), ["a", "b"])
    options = [("walltime", "10"), ("memory", "200MB"), ("log_directory", str(tmp_path))]
    options += [("lifetime", "5m"), ("directive", "--gpus-per-node=1")]
    ended = list(Engine(2, "slurm", options).run(tasks))
    assert [end.error for end in ended] == [""] * 4 and ended[-1].name == "last"
    assert log.read_text().split() == ["first", "last"]
