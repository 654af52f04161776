"""What goes wrong around a run: full disks, killed processes, signals, damaged artifacts, failing
tasks, other people's Dask."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import forked
import pytest
import torch

from issl import cli, engine
from issl.audit.cache import MANIFEST, Artifacts, in_dependency_order
from issl.audit.settings import Data
from issl.audit.stages import Embed, Influence, Pretrain
from issl.engine import Engine, Task
from issl.errors import IsslError
from issl.files import PART, REPOSITORY, atomic, remove_leftovers
from issl.pretraining import loop
from issl.pretraining.checkpoint import Checkpoint
from issl.pretraining.recipes import recipe

DATA = Data(name="scenes", n=32)
SIMCLR = {"recipe": recipe("simclr", "short"), "width": 1, "epochs": 2, "batch_size": 16}
TRAINED = Pretrain(data=DATA, snapshots=(1,), **SIMCLR)
STAGES = Influence(pretrain=TRAINED, data=DATA), Embed(pretrain=TRAINED, data=DATA)


def made(root: Path) -> dict[str, str]:
    """Make all stages; the digest of every file, and the history but for how long it took."""
    artifacts = Artifacts(root, checkpoint_seconds=0.0, released=None)
    for stage in in_dependency_order(STAGES):
        artifacts.get(stage)
    found = {}
    for path in root.glob(f"*/*/{MANIFEST}"):
        listed = json.loads(path.read_text())["files"]
        found |= {f"{path.parent.name}/{k}": v for k, v in listed.items() if "history" not in k}
    history = TRAINED.history(artifacts).drop(columns="images_per_second")
    return found | {"history": history.to_csv()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Artifacts that were made without a fault."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("undisturbed")
    return root, made(root)


def left_over(root: Path) -> list[Path]:
    return [p for p in root.rglob("*") if PART in p.name]


def test_a_full_disk_at_every_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: tuple
) -> None:
    """Every write of every stage fails once; the next run goes on from there."""
    count, fails_at = 0, 1

    @contextmanager
    def full(path: Path) -> Iterator[Path]:
        nonlocal count
        with atomic(path) as part:
            yield part
            count += 1
            if count == fails_at:
                raise OSError(errno.ENOSPC, "No space left on device")

    for name, module in list(sys.modules.items()):
        if name.startswith("issl.") and hasattr(module, "atomic"):
            monkeypatch.setattr(module, "atomic", full)
    points, finished = 0, 0
    while True:
        count = 0
        try:
            found = made(tmp_path)
            break
        except IsslError as error:
            points += 1
            assert os.strerror(errno.ENOSPC) in str(error) and left_over(tmp_path) == []
        before, finished = finished, len(list(tmp_path.glob(f"*/*/{MANIFEST}")))
        fails_at = 1 if finished > before else fails_at + 1
    assert points >= 8 and found == undisturbed[1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_while_it_writes(path: Path) -> None:
    with atomic(path) as part:
        part.write_text("half")
        die()


def test_what_a_killed_process_was_writing_is_removed_and_no_part_of_an_artifact(
    tmp_path: Path, undisturbed: tuple
) -> None:
    work = tmp_path / "pretrain" / f"{TRAINED.key}.part"
    file = work / "encoder.safetensors"
    process = forked.context.Process(target=dies_while_it_writes, args=(file,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(left_over(work)) == 1
    with atomic(work / "mine.json") as part:
        part.write_text("{}")
        remove_leftovers(work)
        assert left_over(work) == [part]  # this one is being written
    (work / "mine.json").unlink()
    assert made(tmp_path) == undisturbed[1]
    assert left_over(tmp_path / "pretrain" / TRAINED.key) == []


def test_sigterm_ends_a_command_as_an_interrupt_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "epoch_batches", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    told = "pretrain --data scenes --n 16 --batch-size 8 --width 1 --epochs 1 --out".split()
    assert cli.main([*told, str(tmp_path / "x.safetensors")]) == 130
    assert "issl: stopped" in capsys.readouterr().err and left_over(tmp_path) == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_artifact_is_told_and_made_again_alone(
    tmp_path: Path, undisturbed: tuple, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bit that flipped, a file that is gone, and a manifest of no bytes."""
    encoder = "encoder.safetensors"
    damages = (encoder, flip), (encoder, Path.unlink), (MANIFEST, lambda p: p.write_bytes(b""))
    for k, (name, damage) in enumerate(damages):
        root = shutil.copytree(undisturbed[0], tmp_path / str(k))
        others = {p: p.stat().st_mtime_ns for p in root.glob("[!p]*/*/*")}
        damage(root / "pretrain" / TRAINED.key / name)
        assert made(root) == undisturbed[1]
        assert "; it will be made again" in capsys.readouterr().err
        assert {p: p.stat().st_mtime_ns for p in others} == others


# --- tasks ---


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(f"{text}\n")


def fail() -> None:
    raise IsslError("the cat sat on the tensor")


def one_thread_and_gpu() -> None:
    assert torch.get_num_threads() == max(1, (os.cpu_count() or 1) // 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] in "35"
    assert "MALLOC_TRIM_THRESHOLD_" not in os.environ  # kernels inherit it


def trained(root: Path, kill: bool) -> None:
    """Train; `kill`: the first time, until there is a checkpoint."""
    artifacts = Artifacts(root, checkpoint_seconds=0.0, released=None)
    checkpoint = artifacts.folder(TRAINED).with_suffix(".part") / "checkpoint.safetensors"
    if checkpoint.exists():
        append(root / "resumed", str(os.getpid()))
    elif kill:
        save = Checkpoint.save

        def last(*arguments: object) -> None:
            save(*arguments)
            die()

        Checkpoint.save = last
    artifacts.get(TRAINED)


def test_processes_that_die(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two, which share the cores and the GPUs: a task that kills its process each time fails,
    which blocks what needs it and nothing else; another process goes on from a training's
    checkpoint, and the encoder is the same bit for bit."""
    monkeypatch.setitem(engine.SETTINGS, "distributed.scheduler.allowed-failures", 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    write = partial(append, tmp_path / "log")
    tasks = {
        "a": Task(partial(write, "a")),
        "wrong": Task(fail, ["a"]),
        "late": Task(partial(write, "late"), ["wrong"]),
        "later": Task(partial(write, "later"), ["late"]),
        "b": Task(partial(write, "b"), ["a"]),
        "c": Task(partial(write, "c"), ["a", "b"]),
        "share": Task(one_thread_and_gpu),
        # the last: what waits for its process would go with it
        "killer": Task(die, ["c", "share", "whole", "killed"]),
        "after": Task(fail, ["killer"]),
        "whole": Task(partial(trained, whole, False)),
        "killed": Task(partial(trained, killed, True)),
    }
    ended = {end.name: end for end in Engine(2).run(tasks)}
    assert set(ended) == set(tasks) and ended["later"].error == "the cat sat on the tensor"
    assert "the process that made killer was killed" in ended["killer"].error
    assert {name for name, end in ended.items() if end.blocked} == {"late", "later", "after"}
    well = {name for name, end in ended.items() if not end.error}
    assert well == {"a", "b", "c", "share", "whole", "killed"}
    done = (tmp_path / "log").read_text().split()  # what a dead worker had done may be done again
    assert list(dict.fromkeys(done)) == ["a", "b", "c"]
    assert len((killed / "resumed").read_text().split()) == 1
    one, two = (Artifacts(root).file(TRAINED, "encoder.safetensors") for root in (whole, killed))
    assert one.read_bytes() == two.read_bytes()


def test_processes_that_do_not_start_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose loopback network is down."""
    failed = Mock(side_effect=RuntimeError("Timed out"))
    monkeypatch.setattr(engine, "_processes", failed)
    with pytest.raises(IsslError, match=r"--jobs 2: .*Timed out.* loopback"):
        list(Engine(jobs=2).run({"one": Task(time.time)}))


def test_a_dask_that_is_there_and_goes_away(tmp_path: Path) -> None:
    told, log = tmp_path / "scheduler.json", tmp_path / "log"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    how = {"env": os.environ | {"PYTHONPATH": paths}, "cwd": tmp_path}

    def start(*words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dask", *words, "--scheduler-file", str(told)]
        process = stack.enter_context(subprocess.Popen(command, **how))
        stack.callback(process.kill)
        return process

    with ExitStack() as stack:
        scheduler = start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        start("worker", "--no-nanny", "--nthreads", "1")
        end = time.monotonic() + 120
        while not told.exists() or not told.read_text():
            assert time.monotonic() < end
            time.sleep(0.1)
        address = json.loads(told.read_text())["address"]
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


@pytest.mark.slow
def test_a_real_slurm_runs_two_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one node, this machine. Each job asks for a GPU, which it does not use."""
    if os.geteuid() != 0 or not all(shutil.which(p) for p in ("slurmctld", "slurmd", "munged")):
        pytest.skip("needs root and Debian's slurm-wlm and munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # a socket's path must be short
    script, log = REPOSITORY / "tests/slurm.sh", tmp_path / "log"
    subprocess.run([script, "start", folder], check=True)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}")
    tasks = {"first": Task(partial(append, log, "first"))}
    tasks |= {name: Task(partial(time.sleep, 10), ["first"]) for name in ("a", "b")}
    tasks["last"] = Task(partial(append, log, "last"), ["a", "b"])
    options = [("walltime", "10"), ("memory", "200MB"), ("log_directory", str(tmp_path))]
    options += [("lifetime", "5m"), ("directive", "--gpus-per-node=1")]
    try:
        ended = list(Engine(2, "slurm", options).run(tasks))
    finally:
        subprocess.run([script, "stop", folder], check=True)
        shutil.rmtree(folder, ignore_errors=True)
    assert [end.error for end in ended] == [""] * 4 and ended[-1].name == "last"
    assert log.read_text().split() == ["first", "last"]
