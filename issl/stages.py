"""Stages: the heavy steps, each a validated config in and files in open formats out, cached by content.

An artifact lies in artifacts/<stage>/<key>/, where the key is the hash of the stage's whole config with all
it depends on (nested stages, the data's own bytes). It appears in one step, with a manifest of checksums:
it is whole or it is not there, and a damaged one is found, named and made again. While it is made, its
files are in <key>.part, under a lock, so a killed run resumes there and a second process waits.

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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pandas as pd
import torch
from filelock import FileLock, Timeout
from pydantic import Field, computed_field
from safetensors.torch import save_file
from torch import Tensor

from issl import curvature as curvatures
from issl import datasets
from issl import perturbation as perturbations
from issl.config import Config
from issl.encoder import load_encoder, save_encoder
from issl.errors import IsslError, OutOfTime
from issl.evaluate import embed, knn_hits, knn_watch, probe_hits
from issl.files import atomic, read_safetensors
from issl.images import Images
from issl.influence import self_influence
from issl.pretrain import pretrain
from issl.recipes import RECIPES, Recipe

MANIFEST = "manifest.json"


class Data(Config):
    """Which images. `root` says where they lie and is no part of what they are; `fingerprint` is."""

    name: str
    split: str = "train"
    n: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)
    size: int | None = None
    root: Path | None = Field(None, exclude=True)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fingerprint(self) -> str:
        return datasets.fingerprint(self.name, self.split, self.root)

    def available(self) -> int | None:
        """How many images the source holds; None where any number can be drawn."""
        return datasets.count(self.name, self.split, self.root)

    def load(self) -> Images:
        return datasets.load(self.name, self.split, self.n, self.root, self.seed, self.size)


class Noise(Config):
    """Gaussian noise of the perturbed view (the paper's default)."""

    mean: float = 0.05
    std: float = Field(0.2, ge=0)

    def build(self) -> perturbations.GaussianNoise:
        return perturbations.GaussianNoise(self.mean, self.std)


class Augmentation(Config):
    """An augmentation in place of the noise, for the ablation; see `issl.perturbation.Augmentation`."""

    kind: perturbations.Kind
    strength: float = Field(1.0, gt=0, le=1)

    def build(self) -> perturbations.Augmentation:
        return perturbations.Augmentation(self.kind, self.strength)


class Curvature(Config):
    """The inverse curvature that weighs the gradients."""

    kind: Literal["logra", "logra-pca", "ekfac", "diagonal", "identity", "exact"] = "logra"
    rank: int | float = Field(16, gt=0)  # of logra, per side; below 1 a fraction of the layer
    damping: float = Field(0.1, gt=0)
    seed: int = Field(0, ge=0)

    def build(self) -> curvatures.Curvature:
        match self.kind:
            case "identity":
                return curvatures.Identity()
            case "exact":
                return curvatures.Exact(self.damping)
            case "diagonal":
                return curvatures.Diagonal(self.damping)
            case "ekfac":
                return curvatures.EKFAC(self.damping)
            case "logra-pca":
                return curvatures.LoGra(self.rank, self.damping, self.seed, projection="pca")
        return curvatures.LoGra(self.rank, self.damping, self.seed)


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
        raise NotImplementedError


class Pretrain(Stage):
    """Train an encoder: encoder.safetensors, history.csv."""

    name: ClassVar[str] = "pretrain"
    version: ClassVar[int] = 3

    data: Data
    recipe: Recipe = RECIPES["published"]["simclr"]
    width: int = Field(64, ge=1)
    epochs: int = Field(200, ge=0)  # 0: the encoder as it is before training
    batch_size: int = Field(256, ge=2)
    seed: int = Field(0, ge=0)
    order_seed: int | None = Field(None, ge=0)
    view_seed: int | None = Field(None, ge=0)
    left_out: tuple[int, ...] = ()  # positions in the data that are not trained on; all else stays as it is
    watch: Data | None = None  # labelled images whose kNN accuracy joins the history
    watch_every: int = Field(1, ge=1)

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        checkpoint, images = folder / "checkpoint.safetensors", self.data.load()
        settings = self.model_dump(include={"width", "epochs", "batch_size", "seed", "order_seed", "view_seed"})
        watch = None if self.watch is None else knn_watch(images, self.watch.load(), artifacts.device)
        encoder, history = pretrain(
            images, self.recipe, **settings, keep=self._keep(len(images)), device=artifacts.device,
            checkpoint=checkpoint, checkpoint_seconds=artifacts.checkpoint_seconds, deadline=artifacts.deadline,
            watch=watch, watch_every=self.watch_every, progress=artifacts.progress,
        )  # fmt: skip
        with atomic(folder / "history.csv") as part:
            history.to_csv(part, index=False)
        save_encoder(folder / "encoder.safetensors", encoder, {"config": self.model_dump(mode="json")})
        checkpoint.unlink(missing_ok=True)

    def _keep(self, n: int) -> Tensor:
        keep = torch.ones(n, dtype=torch.bool)
        if self.left_out and not 0 <= min(self.left_out) <= max(self.left_out) < n:
            raise IsslError(f"left_out holds position {max(self.left_out)} in a set of {n} images")
        keep[list(self.left_out)] = False
        return keep


class Influence(Stage):
    """Score images under an encoder: influence.parquet, settings.json (with the damping per layer)."""

    name: ClassVar[str] = "influence"

    pretrain: Pretrain
    data: Data
    perturbation: Noise | Augmentation = Noise()
    curvature: Curvature = Curvature()
    seed: int = Field(0, ge=0)

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        encoder = artifacts.encoder(self.pretrain)
        # on a CPU, what a batch touches should be little: fresh memory is slow, and the caches are small
        batch_size = 64 if artifacts.device.type == "cpu" else 256
        scores = self_influence(
            encoder, self.data.load(), self.perturbation.build(), self.curvature.build(), self.seed, batch_size,
            device=artifacts.device, store=folder / "rows", progress=artifacts.progress,
        )  # fmt: skip
        with atomic(folder / "settings.json") as part:
            part.write_text(json.dumps(scores.attrs, indent=1))
        with atomic(folder / "influence.parquet") as part:
            scores.to_parquet(part, index=False)
        shutil.rmtree(folder / "rows")


class Embed(Stage):
    """Features of images under an encoder: features.safetensors (`features`, `index`)."""

    name: ClassVar[str] = "embed"

    pretrain: Pretrain
    data: Data

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        encoder, images = artifacts.encoder(self.pretrain), self.data.load()
        with atomic(folder / "features.safetensors") as part:
            save_file({"features": embed(encoder, images, artifacts.device), "index": images.index}, part)


class Evaluate(Stage):
    """Weighted kNN and linear probe: hits.parquet (index, knn, probe: is the class found?), probe.json (its C)."""

    name: ClassVar[str] = "evaluate"

    train: Embed
    test: Embed
    k: int = Field(200, ge=1)
    temperature: float = Field(0.1, gt=0)
    seed: int = Field(0, ge=0)

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        train, test = artifacts.features(self.train), artifacts.features(self.test)
        labels, images = self.train.data.load().require_labels(), self.test.data.load()
        truth = images.require_labels()
        probe, c = probe_hits(train, labels, test, truth, self.seed)
        knn = knn_hits(train, labels, test, truth, self.k, self.temperature)
        with atomic(folder / "probe.json") as part:
            part.write_text(json.dumps({"C": c}))
        with atomic(folder / "hits.parquet") as part:
            pd.DataFrame({"index": images.index.numpy(), "knn": knn, "probe": probe}).to_parquet(part, index=False)


@dataclass
class Artifacts:
    """The cache: `get` gives a stage's folder, made first where it is not there.

    deadline           as of time.monotonic(): no stage is begun after it, and a training stops before it
    computed, cached   the stages that this object had to make, and those it found
    """

    root: Path
    device: torch.device = torch.device("cpu")
    progress: bool = False
    checkpoint_seconds: float = 20.0
    deadline: float | None = None
    computed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)

    def folder(self, stage: Stage) -> Path:
        return self.root / stage.name / stage.key

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
                    began = time.time()
                    stage.make(work, self)
                    _write_manifest(work, stage, self.device, time.time() - began)
                    work.replace(final)
                    self.computed.append(label)
                    return final
        self.cached.append(label)
        return final

    def has(self, stage: Stage) -> bool:
        """Is the artifact there, whole? A damaged one is removed."""
        return self._sound(self.folder(stage))

    def _sound(self, folder: Path) -> bool:
        """Is the artifact there and whole? A damaged one is named, removed, and then is not there."""
        if not folder.is_dir():
            return False
        damage = damaged(folder)
        if damage is not None:
            print(f"artifact {folder}: {damage}; it will be made again", file=sys.stderr, flush=True)
            shutil.rmtree(folder)
            return False
        return True

    # --- readers of the artifacts, for notebooks ---

    def encoder(self, stage: Pretrain) -> torch.nn.Module:
        return load_encoder(self.get(stage) / "encoder.safetensors")

    def history(self, stage: Pretrain) -> pd.DataFrame:
        return pd.read_csv(self.get(stage) / "history.csv")

    def scores(self, stage: Influence) -> pd.DataFrame:
        return pd.read_parquet(self.get(stage) / "influence.parquet")

    def hits(self, stage: Evaluate) -> pd.DataFrame:
        return pd.read_parquet(self.get(stage) / "hits.parquet")

    def features(self, stage: Embed) -> Tensor:
        return read_safetensors(self.get(stage) / "features.safetensors", "features")[1]["features"]


def damaged(folder: Path) -> str | None:
    """What is wrong with an artifact, in words; None where every file is as its manifest says."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
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


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's kind with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
