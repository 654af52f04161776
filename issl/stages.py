"""Stages: the heavy steps, each a validated config in and an artifact out (see `issl.artifacts`).

Stages name the stages that they read, so a config says all that its numbers depend on: the encoder that was
trained without the top 5% by influence names the choice of images, which names the scores, which name the
encoder they explain.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field, computed_field
from safetensors.torch import save_file
from torch import Tensor

from issl import curvature as curvatures
from issl import datasets
from issl import perturbation as perturbations
from issl.artifacts import Artifacts, Stage
from issl.config import Config
from issl.encoder import save_encoder
from issl.errors import IsslError
from issl.evaluate import embed, knn_hits, knn_watch, probe_hits
from issl.files import atomic
from issl.gradients import CrossEntropy, stability_loss
from issl.images import Images
from issl.influence import self_influence
from issl.injection import inject
from issl.pretrain import pretrain
from issl.recipes import RECIPES, Recipe


class Injection(Config):
    """What is put into the set, see `issl.injection.inject`."""

    duplicates: float = Field(0.0, ge=0, le=0.5)
    atypical: float = Field(0.0, ge=0, le=1)
    seed: int = Field(0, ge=0)


class Data(Config):
    """Which images. `root` says where they lie and is no part of what they are; `fingerprint` is."""

    name: str
    split: str = "train"
    n: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)
    size: int | None = None
    inject: Injection | None = None
    first: int | None = Field(None, ge=1)  # of the images thus chosen, only so many (the others are not scored)
    root: Path | None = Field(None, exclude=True)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fingerprint(self) -> str:
        return datasets.fingerprint(self.name, self.split, self.root)

    def available(self) -> int | None:
        """How many images the source holds; None where any number can be drawn."""
        return datasets.count(self.name, self.split, self.root)

    def load(self) -> Images:
        images = datasets.load(self.name, self.split, self.n, self.root, self.seed, self.size)
        images = images if self.inject is None else inject(images, **self.inject.model_dump())
        return images if self.first is None else images.subset(range(min(self.first, len(images))))


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
    without: Prune | Thin | None = None  # a choice of such positions, made by another stage
    watch: Data | None = None  # labelled images whose kNN accuracy joins the history
    watch_every: int = Field(1, ge=1)

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        checkpoint, images = folder / "checkpoint.safetensors", self.data.load()
        settings = self.model_dump(include={"width", "epochs", "batch_size", "seed", "order_seed", "view_seed"})
        watch = None if self.watch is None else knn_watch(images, self.watch.load(), artifacts.device)
        encoder, history = pretrain(
            images, self.recipe, **settings, keep=self._keep(len(images), artifacts), device=artifacts.device,
            checkpoint=checkpoint, checkpoint_seconds=artifacts.checkpoint_seconds, deadline=artifacts.deadline,
            watch=watch, watch_every=self.watch_every, progress=artifacts.progress,
        )  # fmt: skip
        with atomic(folder / "history.csv") as part:
            history.to_csv(part, index=False)
        save_encoder(folder / "encoder.safetensors", encoder, {"config": self.model_dump(mode="json")})
        checkpoint.unlink(missing_ok=True)

    def _keep(self, n: int, artifacts: Artifacts) -> Tensor:
        keep = torch.ones(n, dtype=torch.bool)
        if self.left_out and not 0 <= min(self.left_out) <= max(self.left_out) < n:
            raise IsslError(f"left_out holds position {max(self.left_out)} in a set of {n} images")
        keep[list(self.left_out)] = False
        if self.without is not None:
            keep[artifacts.positions(self.without)] = False
        return keep


class Influence(Stage):
    """Score images under an encoder: influence.parquet, settings.json (with the damping per layer)."""

    name: ClassVar[str] = "influence"

    pretrain: Pretrain
    data: Data
    perturbation: Noise | Augmentation = Noise()
    curvature: Curvature = Curvature()
    seed: int = Field(0, ge=0)
    draws: int = Field(1, ge=1)
    average: Literal["gradients", "scores"] = "gradients"
    loss: Literal["stability", "cross_entropy"] = "stability"  # cross_entropy: of a supervised encoder's class scores

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        supervised = self.loss == "cross_entropy"
        if supervised and self.pretrain.recipe.method != "supervised":
            raise IsslError(f"loss='cross_entropy' of a {self.pretrain.recipe.method} encoder: it has no classes")
        encoder, images = artifacts.encoder(self.pretrain, "projector" if supervised else "features"), self.data.load()
        # on a CPU, what a batch touches should be little: fresh memory is slow, and the caches are small
        batch_size = 64 if artifacts.device.type == "cpu" else 256
        scores = self_influence(
            encoder, images, self.perturbation.build(), self.curvature.build(), self.seed, batch_size,
            device=artifacts.device, draws=self.draws, average=self.average,
            loss=CrossEntropy() if supervised else stability_loss, store=folder / "rows", progress=artifacts.progress,
        )  # fmt: skip
        with atomic(folder / "settings.json") as part:
            part.write_text(json.dumps(scores.attrs, indent=1))
        with atomic(folder / "influence.parquet") as part:
            scores.to_parquet(part, index=False)
        shutil.rmtree(folder / "rows")


class Prune(Stage):
    """Choose the share of images with the highest or lowest score, or any: positions.json."""

    name: ClassVar[str] = "prune"

    influence: Influence
    which: Literal["top", "bottom", "random"]
    share: float = Field(gt=0, lt=1)
    column: Literal["influence", "stability_loss", "grad_norm"] = "influence"
    seed: int = Field(0, ge=0)  # of `random`

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        scores = artifacts.scores(self.influence)[self.column].to_numpy()
        count = round(self.share * len(scores))
        order = np.argsort(-scores, kind="stable")
        if self.which == "random":
            order = np.random.default_rng(self.seed).permutation(len(scores))
        chosen = order[-count:] if self.which == "bottom" else order[:count]
        _write_positions(folder, chosen)


class Thin(Stage):
    """Choose images so that of one group only the share `keep` is left; or as many of all at random: positions.json."""

    name: ClassVar[str] = "thin"

    data: Data
    attribute: str
    value: str
    keep: float = Field(0.1, ge=0, lt=1)
    at_random: bool = False
    seed: int = Field(0, ge=0)

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        attributes = self.data.load().attributes
        if self.attribute not in attributes:
            raise IsslError(f"{self.data.name} has no attribute {self.attribute!r}; it has {list(attributes.columns)}")
        members = np.flatnonzero(attributes[self.attribute].astype(str) == self.value)
        if not len(members):
            there = ", ".join(sorted(attributes[self.attribute].astype(str).unique()))
            raise IsslError(f"{self.data.name}: no image has {self.attribute}={self.value!r}; there are {there}")
        rng = np.random.default_rng(self.seed)
        count = len(members) - round(self.keep * len(members))
        _write_positions(folder, rng.permutation(len(attributes) if self.at_random else members)[:count])


def _write_positions(folder: Path, chosen: np.ndarray) -> None:
    with atomic(folder / "positions.json") as part:
        part.write_text(json.dumps(sorted(int(i) for i in chosen)))


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


# Pretrain names Prune, which names Influence, which names Pretrain
for _stage in (Pretrain, Influence, Prune, Thin, Embed, Evaluate):
    _stage.model_rebuild()
