"""Artifacts: the cache of the slow steps' results, in open formats and found again by content.

An artifact is in artifacts/<stage>/<key>/. The key is the hash of the config fields that differ
from their defaults, with the keys of nested stages and the identity of the images. So a new field
that nobody sets changes no key, but whoever changes a default must raise the stage's version
(tests/stage_defaults.json pins the defaults).

It appears in one step, with a manifest of checksums: it is either whole or absent. A damaged one is
reported and remade. While it is being made, its files are in <key>.part, under a lock, so a killed
run resumes there and a second process waits. Released artifacts are files with readable names;
`released/index.json` says which stage each belongs to.

(Why not a caching library: the one that fits best, exca, keeps job results as pickles and checks no
checksums. The locks are filelock's, the configs pydantic's.)
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from filelock import FileLock, Timeout

from issl.audit.config import Config
from issl.data.identity import digest
from issl.devices import device_name
from issl.errors import IsslError
from issl.files import check_writable, file_digest, provided, remove_leftovers, write_json

MANIFEST = "manifest.json"
INDEX = "index.json"  # of released artifacts


class Stage(Config):
    """A step with a config and an artifact; `make` writes the artifact's files into a folder."""

    name: ClassVar[str]
    version: ClassVar[int] = 1  # raise it when the same config gives different numbers
    takes_hours: ClassVar[bool] = False

    @cached_property
    def key(self) -> str:
        """Sixteen hex digits: the hash of `content`."""
        return digest(json.dumps(self.content(), sort_keys=True).encode())

    def content(self) -> dict[str, Any]:
        """All that decides the artifact, as plain data: name, version and non-default settings."""
        return {"stage": self.name, "version": self.version, "settings": self.settings()}

    def plain(self) -> str:
        """The stage as it stands in another stage's settings: its label."""
        return self.label

    def needs(self) -> list[Stage]:
        """The stages whose artifacts this one reads."""
        several = [value if isinstance(value, tuple) else (value,) for _, value in self]
        return [stage for stage in chain(*several) if isinstance(stage, Stage)]

    @property
    def label(self) -> str:
        return f"{self.name}/{self.key}"

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        """Write the artifact's files into the folder, reading what it needs from `artifacts`."""
        raise NotImplementedError

    def read(self, artifacts: Artifacts) -> Any:
        """What the artifact holds; it is made first if it is missing."""
        raise NotImplementedError


@dataclass
class Artifacts:
    """The cache: `get` returns a stage's folder, and makes the stage first if it is missing.

    released           the folder of artifacts that come with the repository: read, never written;
                       None: not even read
    only               read only this kind of stage from it, such as pretrain; None: all
    computed, cached   the stages that this object had to make, and those it found
    """

    root: Path
    device: torch.device = torch.device("cpu")
    progress: bool = False
    checkpoint_seconds: float = 20.0
    released: Path | None = field(default_factory=lambda: provided("released"))
    only: str | None = None
    computed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)

    def folder(self, stage: Stage) -> Path:
        """Where the stage's own files are, or will be."""
        return self.root / stage.name / stage.key

    def get(self, stage: Stage) -> Path:
        """The folder of the stage's files, checked against their checksums. For a released stage
        it is the folder of all released files."""
        final, label = self.folder(stage), stage.label
        if not final.is_dir() and self._released(stage) is not None:
            assert self.released is not None
            if label not in self.cached:
                self.cached.append(label)
            return self.released
        known = label in (*self.computed, *self.cached)
        if known and (final / MANIFEST).is_file():  # nobody has deleted it
            return final
        made = self._made(stage, final)
        if label not in (noted := self.computed if made else self.cached):
            noted.append(label)
        return final

    def _made(self, stage: Stage, final: Path) -> bool:
        """Make the artifact if it is missing; returns whether it was made here."""
        if self._there(stage):
            return False
        work = final.with_name(final.name + ".part")
        check_writable(work.parent, f"folder {work.parent} (--out)")
        with _locked(final.with_name(final.name + ".lock"), stage.label):
            if self._sound(final):  # another process has made it while we waited
                return False
            work.mkdir(exist_ok=True)
            remove_leftovers(work, age=0.0)  # they would become part of the artifact
            began = time.monotonic()
            stage.make(work, self)
            _write_manifest(work, stage, self.device, time.monotonic() - began)
            work.replace(final)
        return True

    def file(self, stage: Stage, name: str) -> Path:
        """The path of one of the stage's files; the stage is made first if it is missing."""
        folder = self.get(stage)
        return folder / name if folder != self.released else self.released_file(stage, name)

    def released_file(self, stage: Stage, name: str) -> Path:
        """The path of one of a released stage's files."""
        folder, entry = self.released, self._released(stage)
        assert folder is not None and entry is not None
        path = folder / entry["files"][name]["path"] if name in entry["files"] else None
        if path is None or not path.is_file():
            raise IsslError(
                f"{name} of {stage.label} is not among the released files in {folder}: get it from "
                "the repository, or make it with --from images"
            )
        return path

    def about(self, stage: Stage) -> dict[str, Any] | None:
        """The manifest of the stage's artifact, or else its entry in the released index; None if
        it has neither."""
        manifest = self.folder(stage) / MANIFEST
        if manifest.is_file():
            found: dict[str, Any] = json.loads(manifest.read_text())
            return found
        return self._released(stage)

    def _released(self, stage: Stage) -> dict[str, Any] | None:
        """The stage's entry in the released index; None if it has none, or if a file is damaged or
        all are missing. That is reported, and the stage is made again. Raises IsslError instead if
        making it takes hours."""
        if (
            self.released is None
            or self.only not in (None, stage.name)
            or (entry := released_index(self.released).get(stage.label)) is None
        ):
            return None
        paths = {self.released / file["path"]: file["sha256"] for file in entry["files"].values()}
        wrong = [
            (path, "is damaged (its checksum differs)")
            for path, sha256 in paths.items()
            if path.is_file() and digest_once(path) != sha256
        ]
        if not any(path.is_file() for path in paths):  # a wheel does not carry them all
            wrong.append((next(iter(paths)), "is missing"))
        if not wrong:
            return entry
        path, what = wrong[0]
        said = f"released artifact {path} {what}; get it again (git checkout -- {path})"
        if stage.takes_hours:
            raise IsslError(said)
        _say_once(f"{said}; until then it has to be computed")
        return None

    def has(self, stage: Stage) -> bool:
        """Is the artifact there and whole? A damaged one is removed."""
        return self._there(stage) or self._released(stage) is not None

    def _there(self, stage: Stage) -> bool:
        """Is the artifact in the cache and whole? A damaged one is checked again under its lock,
        since another process may have remade it. If it is still damaged, it is removed."""
        folder = self.folder(stage)
        if damaged(folder) is None:
            return True
        if not folder.is_dir():
            return False
        with _locked(folder.with_name(folder.name + ".lock"), stage.label):
            return self._sound(folder)

    def _sound(self, folder: Path) -> bool:
        """Is the artifact there and whole? A damaged one is reported and removed."""
        if not folder.is_dir():
            return False
        damage = damaged(folder)
        if damage is None:
            return True
        print(f"artifact {folder}: {damage}; it will be made again", file=sys.stderr, flush=True)
        shutil.rmtree(folder)
        return False


@cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def missing(stages: Iterable[Stage], artifacts: Artifacts) -> Iterator[Stage]:
    """What has to be made: the missing ones among these stages and among what they need, each after
    its own needs. A missing stage that only existing stages need is not made."""
    return in_dependency_order(stages, artifacts.has)


def in_dependency_order(
    stages: Iterable[Stage], there: Callable[[Stage], bool] = lambda stage: False
) -> Iterator[Stage]:
    """These stages and all that they read, each once and after the stages that it reads. Stages
    that are `there` are left out, and so is what only they read."""
    seen: set[str] = set()

    def walk(stage: Stage) -> Iterator[Stage]:
        if stage.label not in seen:
            seen.add(stage.label)
            if not there(stage):
                for need in stage.needs():
                    yield from walk(need)
                yield stage

    for stage in stages:
        yield from walk(stage)


def damaged(folder: Path) -> str | None:
    """What is wrong with an artifact, in words; None if every file matches its manifest."""
    try:
        files = dict(json.loads((folder / MANIFEST).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is missing or unreadable ({error})"
    for name, sha256 in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if file_digest(path) != sha256:
            return f"{name} is damaged (its checksum differs)"
    return None


def released_index(folder: Path) -> dict[str, Any]:
    """What a folder of released artifacts holds, by stage label: settings, what it was made with,
    and its files (path and sha256, by their names in the artifact)."""
    path = folder / INDEX
    return _index(path, path.stat().st_mtime_ns) if path.is_file() else {}


@lru_cache
def _index(path: Path, changed: int) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise IsslError(
            f"{path} cannot be read ({error}); get it again (git checkout -- {path})"
        ) from error
    return content


def digest_once(path: Path) -> str:
    """sha256 of a file's bytes, which are read again only if the file has changed."""
    state = path.stat()
    return _digest(path, state.st_mtime_ns, state.st_size)


@cache
def _digest(path: Path, changed: int, size: int) -> str:
    return file_digest(path)


def release(artifacts: Artifacts, stage: Stage, folder: Path, files: dict[str, str]) -> None:
    """Copy these files of an artifact into a folder of released ones, each to a path below it, and
    note them in its index. What is not listed is not released."""
    artifacts.get(stage)
    made, entries = artifacts.about(stage), {}
    assert made is not None
    for name, path in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifacts.file(stage, name), folder / path)
        entries[name] = {"path": path, "sha256": file_digest(folder / path)}
    about = {**stage.content(), "made_with": made["made_with"], "files": entries}
    index = released_index(folder) | {stage.label: about}
    write_json(folder / INDEX, index, indent=1, sort_keys=True)


def _write_manifest(folder: Path, stage: Stage, device: torch.device, seconds: float) -> None:
    files = {p.name: file_digest(p) for p in sorted(folder.iterdir()) if p.name != MANIFEST}
    content: dict[str, Any] = {
        **stage.content(),
        "config": stage.model_dump(mode="json"),
        "files": files,
        "made_with": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": device_name(device),
            "seconds": round(seconds, 2),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    }
    write_json(folder / MANIFEST, content, indent=1)


@contextmanager
def _locked(path: Path, label: str) -> Iterator[None]:
    """Hold the stage's lock, and say so if another process has it. The system frees it if its owner
    dies."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(
            f"{label} is being made by another process; waiting for it", file=sys.stderr, flush=True
        )
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
