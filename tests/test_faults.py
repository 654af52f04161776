"""What goes wrong around a run: full disks, killed processes, signals, damaged artifacts."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forked
import pytest
import torch

import issl
from issl import cli, files
from issl.audit.cache import MANIFEST, Artifacts, in_dependency_order
from issl.audit.settings import Data
from issl.audit.stages import Embed, Influence, Pretrain
from issl.files import PART, atomic, remove_leftovers
from issl.pretraining import loop
from issl.pretraining.recipes import recipe

DATA = Data(name="scenes", n=32)
TRAINED = Pretrain(data=DATA, recipe=recipe("simclr", "short"), width=1, epochs=2, batch_size=16)
STAGES = Influence(pretrain=TRAINED, data=DATA), Embed(pretrain=TRAINED, data=DATA)


def made(root: Path) -> dict[str, str]:
    """Make all stages; the digest of every file but the history, which says how long it took."""
    artifacts = Artifacts(root, checkpoint_seconds=0.0, released=None)
    for stage in in_dependency_order(STAGES):
        artifacts.get(stage)
    found = {}
    for path in root.glob(f"*/*/{MANIFEST}"):
        listed = json.loads(path.read_text())["files"]
        found |= {f"{path.parent.name}/{k}": v for k, v in listed.items() if "history" not in k}
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts that were made without a fault."""
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture(scope="module")
def undisturbed(whole: Path) -> dict[str, str]:
    torch.set_num_threads(1)
    return made(whole)


def left_over(root: Path) -> list[Path]:
    return [p for p in root.rglob("*") if PART in p.name]


def test_a_full_disk_at_every_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
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
        if name.startswith("issl.") and hasattr(module, "atomic") and module is not files:
            monkeypatch.setattr(module, "atomic", full)
    points, finished = 0, 0
    while True:
        count = 0
        try:
            found = made(tmp_path)
            break
        except issl.IsslError as error:
            points += 1
            assert "the disk is full" in str(error) and left_over(tmp_path) == []
        before, finished = finished, len(list(tmp_path.glob(f"*/*/{MANIFEST}")))
        fails_at = 1 if finished > before else fails_at + 1
    assert points >= 8 and found == undisturbed


def dies_while_it_writes(path: Path) -> None:
    with atomic(path) as part:
        part.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_was_writing_is_removed_and_no_part_of_an_artifact(
    tmp_path: Path, undisturbed: dict[str, str]
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
    assert made(tmp_path) == undisturbed and left_over(tmp_path / "pretrain" / TRAINED.key) == []


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


DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a flipped bit": ("encoder.safetensors", flip),
    "gone": ("encoder.safetensors", Path.unlink),
    "a manifest of no bytes": (MANIFEST, lambda p: p.write_bytes(b"")),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_artifact_is_told_and_made_again_alone(
    how: str, tmp_path: Path, whole: Path, undisturbed: Any, capsys: Any
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    name, damage = DAMAGE[how]
    others = {p: p.stat().st_mtime_ns for p in tmp_path.glob("[!p]*/*/*")}
    damage(tmp_path / "pretrain" / TRAINED.key / name)
    assert made(tmp_path) == undisturbed
    assert "; it will be made again" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in others} == others
