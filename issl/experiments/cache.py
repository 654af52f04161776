"""Artifacts: the cache of the heavy steps, files in open formats, found again by content.

An artifact is in artifacts/<stage>/<key>/, where the key is the hash of the stage's whole config with all
it depends on (nested stages, the data's own bytes). It appears in one step, with a manifest of checksums:
it is whole or it is not there, and a damaged one is reported and remade. While it is made, its files
are in <key>.part, under a lock, so a killed run resumes there and a second process waits.

(Why not a caching library: the one that fits best, exca, keeps job results as pickles and checks no
checksums. The locks are filelock's, the configs pydantic's.)
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from filelock import FileLock, Timeout

from issl.config import Config
from issl.devices import device_name
from issl.errors import IsslError, OutOfTime
from issl.files import atomic, file_digest, provided, remove_leftovers

MANIFEST = "manifest.json"


class Stage(Config):
    """A step with a config and an artifact; `make` writes the artifact's files into a folder."""

    name: ClassVar[str]
    version: ClassVar[int] = 1  # raise it when the same config should give other numbers

    @property
    def key(self) -> str:
        """Sixteen hex digits: the hash of this config and all it depends on."""
        needs = {name: stage.key for name, stage in self.needs().items()}
        content = {
            "stage": self.name, "version": self.version, "config": self.model_dump(mode="json"), "needs": needs,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def needs(self) -> dict[str, Stage]:
        """The stages whose artifacts this one reads, by field."""
        return {k: v for k in type(self).model_fields if isinstance(v := getattr(self, k), Stage)}

    @property
    def label(self) -> str:
        return f"{self.name}/{self.key}"

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        """Write the artifact's files into the folder, reading what it needs from `artifacts`."""
        raise NotImplementedError

    def read(self, artifacts: Artifacts) -> Any:
        """What the artifact holds; it is made first where it is not there."""
        raise NotImplementedError


@dataclass
class Artifacts:
    """The cache: `get` gives a stage's folder, made first where it is not there.

    released           artifacts that come with the repository: they are read, never written; None: not even read
    deadline           by time.monotonic(): no stage is begun after it, and a training stops before it
    computed, cached   the stages that this object had to make, and those it found
    """

    root: Path
    device: torch.device = torch.device("cpu")
    progress: bool = False
    checkpoint_seconds: float = 20.0
    deadline: float | None = None
    released: Path | None = field(default_factory=lambda: provided("released"))
    computed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)

    def folder(self, stage: Stage) -> Path:
        """Where the stage's files are, or will be: a released artifact is used where there is none of one's own."""
        own = self.root / stage.name / stage.key
        given = None if self.released is None else self.released / stage.name / stage.key
        return given if given is not None and given.is_dir() and not own.is_dir() else own

    def get(self, stage: Stage) -> Path:
        """The folder of the stage's files, checked against their checksums."""
        final, label = self.folder(stage), stage.label
        if label in self.computed or label in self.cached:
            return final
        if not self._sound(final):
            work = final.with_name(final.name + ".part")
            _make_folder(work.parent)
            with _locked(final.with_name(final.name + ".lock"), label):
                if not self._sound(final):  # another process may have made it while we waited
                    if self.deadline is not None and time.monotonic() >= self.deadline:
                        raise OutOfTime(f"{label} was not begun")
                    _make_folder(work)
                    for folder in (work, *(p for p in work.rglob("*") if p.is_dir())):
                        remove_leftovers(folder)  # they would become part of the artifact
                    began = time.monotonic()
                    stage.make(work, self)
                    _write_manifest(work, stage, self.device, time.monotonic() - began)
                    work.replace(final)
                    self.computed.append(label)
                    return final
        self.cached.append(label)
        return final

    def has(self, stage: Stage) -> bool:
        """Is the artifact there, whole? A damaged one is removed."""
        return self._sound(self.folder(stage))

    def _sound(self, folder: Path) -> bool:
        """Is the artifact there and whole? A damaged one is reported and removed."""
        if not folder.is_dir():
            return False
        damage = damaged(folder)
        if damage is not None and self.released is not None and folder.is_relative_to(self.released):
            raise IsslError(f"released artifact {folder}: {damage}; get it again (git checkout -- {folder})")
        if damage is not None:
            print(f"artifact {folder}: {damage}; it will be made again", file=sys.stderr, flush=True)
            shutil.rmtree(folder)
            return False
        return True


def in_dependency_order(stages: Iterable[Stage]) -> Iterator[Stage]:
    """These stages and all that they read, each once, a stage after those it reads."""
    seen: set[str] = set()

    def walk(stage: Stage) -> Iterator[Stage]:
        if stage.label not in seen:
            seen.add(stage.label)
            for need in stage.needs().values():
                yield from walk(need)
            yield stage

    for stage in stages:
        yield from walk(stage)


def damaged(folder: Path) -> str | None:
    """What is wrong with an artifact, in words; None where every file is as its manifest says."""
    try:
        files = dict(json.loads((folder / MANIFEST).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is missing or unreadable ({error})"
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if file_digest(path) != digest:
            return f"{name} is damaged (its checksum differs)"
    return None


def _write_manifest(folder: Path, stage: Stage, device: torch.device, seconds: float) -> None:
    files = {str(p.relative_to(folder)): file_digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    content: dict[str, Any] = {
        "stage": stage.name, "version": stage.version, "config": stage.model_dump(mode="json"), "files": files,
        "made_with": {
            "torch": torch.__version__, "python": platform.python_version(), "device": device_name(device),
            "seconds": round(seconds, 2), "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    }  # fmt: skip
    with atomic(folder / MANIFEST) as part:
        part.write_text(json.dumps(content, indent=1))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IsslError(f"folder {folder} cannot be written ({error}); choose another place with --out DIR") from error


@contextmanager
def _locked(path: Path, label: str) -> Iterator[None]:
    """Hold the stage's lock; says so when another process has it. The system frees it if its owner dies."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{label} is being made by another process; waiting for it", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
