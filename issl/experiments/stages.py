"""Stages: the heavy steps, each a validated config in and an artifact out (see `issl.experiments.cache`).

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
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from issl.analysis.evaluate import embed, knn_hits, knn_watch, probe_hits, stability_losses
from issl.analysis.neighbour_graph import nearest
from issl.data.images import Images
from issl.errors import IsslError
from issl.experiments.cache import Artifacts, Stage
from issl.experiments.settings import Augmentation, Curvature, Data, Noise, absent
from issl.files import atomic
from issl.influence.computing import Computing
from issl.influence.cross import as_queries, cross_influence, top_influences
from issl.influence.losses import CrossEntropy, stability_loss
from issl.influence.self_influence import self_influence
from issl.pretraining.encoder import save_encoder
from issl.pretraining.learner import Learner, save_learner
from issl.pretraining.loop import pretrain
from issl.pretraining.recipes import RECIPES, Recipe


class Pretrain(Stage):
    """Train an encoder: encoder.safetensors, history.csv.

    With `snapshots`, encoder-EPOCH.safetensors too, after these epochs; these files and the last one hold the whole
    learner (BYOL's predictor and target) in half precision, so what is scored is what can be given away.
    """

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
    without: Prune | Thin | Pick | Draw | Top | None = None  # a choice of such positions, made by another stage
    gaps: bool = Field(False, exclude_if=absent)  # their places in the batches stay empty
    start: Pretrain | None = Field(None, exclude_if=absent)  # go on from this encoder
    watch: Data | None = None  # labelled images whose kNN accuracy joins the history
    watch_every: int = Field(1, ge=1)
    snapshots: tuple[int, ...] | None = Field(None, exclude_if=absent)  # the whole learner is kept after these epochs

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        checkpoint, images = folder / "checkpoint.safetensors", self.data.load()
        settings = self.model_dump(include={"width", "epochs", "batch_size", "seed", "order_seed", "view_seed"})
        about = {"config": self.model_dump(mode="json")}

        def keep_state(done: int, learner: Learner) -> None:
            if done == self.epochs:
                save_learner(folder / "encoder.safetensors", learner, about)
            elif done in (self.snapshots or ()):
                save_learner(folder / f"encoder-{done:04d}.safetensors", learner, about | {"epochs_done": done})

        watch = None if self.watch is None else knn_watch(images, self.watch.load(), artifacts.device)
        encoder, history = pretrain(
            images, self.recipe, **settings, keep=self._keep(len(images), artifacts), gaps=self.gaps,
            start=None if self.start is None else artifacts.whole_encoder(self.start), device=artifacts.device,
            checkpoint=checkpoint, checkpoint_seconds=artifacts.checkpoint_seconds, deadline=artifacts.deadline,
            watch=watch, watch_every=self.watch_every,
            after_epoch=None if self.snapshots is None else keep_state, progress=artifacts.progress,
        )  # fmt: skip
        with atomic(folder / "history.csv") as part:
            history.to_csv(part, index=False)
        if self.snapshots is None:
            save_encoder(folder / "encoder.safetensors", encoder, about)
        checkpoint.unlink(missing_ok=True)

    def _keep(self, n: int, artifacts: Artifacts) -> Tensor:
        keep = torch.ones(n, dtype=torch.bool)
        if self.left_out and not 0 <= min(self.left_out) <= max(self.left_out) < n:
            raise IsslError(f"left_out holds position {max(self.left_out)} in a set of {n} images")
        keep[list(self.left_out)] = False
        if self.without is not None:
            keep[artifacts.positions(self.without)] = False
        return keep


def _computing(artifacts: Artifacts, store: Path | None = None) -> Computing:
    """How gradients are computed. On a CPU in small batches: fresh memory is slow there, and caches are small."""
    batch_size = 64 if artifacts.device.type == "cpu" else 256
    return Computing(device=artifacts.device, batch_size=batch_size, store=store, progress=artifacts.progress)


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
        scores = self_influence(
            encoder, images, self.perturbation.build(), self.curvature.build(), self.seed, draws=self.draws,
            average=self.average, loss=CrossEntropy() if supervised else stability_loss,
            computing=_computing(artifacts, store=folder / "rows"),
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
        groups = self.data.load().require([self.attribute])[self.attribute].astype(str)
        members = np.flatnonzero(groups == self.value)
        if not len(members):
            there = ", ".join(sorted(groups.unique()))
            raise IsslError(f"{self.data.name}: no image has {self.attribute}={self.value!r}; there are {there}")
        rng = np.random.default_rng(self.seed)
        count = len(members) - round(self.keep * len(members))
        _write_positions(folder, rng.permutation(len(groups) if self.at_random else members)[:count])


class Pick(Stage):
    """Choose the one image at a quantile of the score, 0 the highest and 1 the lowest: positions.json."""

    name: ClassVar[str] = "pick"

    influence: Influence
    quantile: float = Field(ge=0, le=1)

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        order = np.argsort(-artifacts.scores(self.influence)["influence"].to_numpy(), kind="stable")
        _write_positions(folder, order[[round(self.quantile * (len(order) - 1))]])


class Draw(Stage):
    """Choose a share of the images at random: positions.json."""

    name: ClassVar[str] = "draw"

    data: Data
    share: float = Field(gt=0, lt=1)
    seed: int = Field(0, ge=0)

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        n = len(self.data.load())
        _write_positions(folder, np.random.default_rng(self.seed).permutation(n)[: round(self.share * n)])


class Top(Stage):
    """Choose the k training images of the highest influence on one query, or nearest to it: positions.json."""

    name: ClassVar[str] = "top"

    scores: Cross | Nearness
    query: int = Field(ge=0)  # its position
    k: int = Field(ge=1)

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        row = artifacts.pairs(self.scores)[self.query]
        _write_positions(folder, row.argsort(descending=True, stable=True)[: self.k].numpy())


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


class Stability(Stage):
    """Stability losses of images, mean over draws, without gradients: losses.parquet (index, stability_loss)."""

    name: ClassVar[str] = "stability"

    pretrain: Pretrain
    data: Data
    perturbation: Noise | Augmentation = Noise()
    seed: int = Field(0, ge=0)
    draws: int = Field(1, ge=1)

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        encoder, images = artifacts.encoder(self.pretrain), self.data.load()
        losses = stability_losses(encoder, images, self.perturbation.build(), self.seed, self.draws, artifacts.device)
        with atomic(folder / "losses.parquet") as part:
            pd.DataFrame({"index": images.index.numpy(), "stability_loss": losses}).to_parquet(part, index=False)


class Cross(Stage):
    """Cross-influence of training images on queries: pairs.safetensors (`scores` (q, n), `query`, `index`)."""

    name: ClassVar[str] = "cross"
    version: ClassVar[int] = 2

    pretrain: Pretrain
    data: Data
    query: Data
    perturbation: Noise | Augmentation = Noise()
    curvature: Curvature = Curvature()
    seed: int = Field(0, ge=0)
    draws: int = Field(1, ge=1)

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        encoder, images, query = artifacts.encoder(self.pretrain), self.data.load(), self.query.load()
        scores = cross_influence(
            encoder, images, as_queries(query), self.perturbation.build(), self.curvature.build(), self.seed,
            draws=self.draws, computing=_computing(artifacts),
        )  # fmt: skip
        _write_pairs(folder, scores, images, query)


class Nearness(Stage):
    """Cosine similarity of training images and queries in feature space: pairs.safetensors, as `Cross`."""

    name: ClassVar[str] = "nearness"

    train: Embed
    query: Embed

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        train, query = artifacts.features(self.train), artifacts.features(self.query)
        scores = normalize(query.double(), dim=1) @ normalize(train.double(), dim=1).T
        _write_pairs(folder, scores, self.train.data.load(), self.query.data.load())


class Lists(Stage):
    """Of each image the k nearest others in feature space, and the k others of the highest influence on it, all images
    of one set: lists.parquet (kind nearest or taught, position, rank, other: its position, value)."""

    name: ClassVar[str] = "lists"

    features: Embed
    perturbation: Noise | Augmentation = Noise()
    curvature: Curvature = Curvature()
    seed: int = Field(0, ge=0)
    k: int = Field(6, ge=1)

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        encoder, images = artifacts.encoder(self.features.pretrain), self.features.data.load()
        n, k = len(images), min(self.k, len(images) - 1)
        places, distances = nearest(artifacts.features(self.features), k)
        best = top_influences(
            encoder, images, images, k + 1, self.perturbation.build(), self.curvature.build(), self.seed,
            computing=_computing(artifacts),
        )  # fmt: skip
        best = best[best["query"] != best["index"]].groupby("query", sort=False).head(k)
        position = pd.Series(np.arange(n), index=images.index.numpy())
        ranks = np.tile(np.arange(1, k + 1), n)
        parts = {
            "nearest": (np.repeat(np.arange(n), k), places.ravel(), 1 - distances.ravel()),
            "taught": (position[best["query"]], position[best["index"]], best["influence"]),
        }  # fmt: skip
        tables = [
            pd.DataFrame(
                {"kind": kind, "position": np.asarray(p), "rank": ranks, "other": np.asarray(o), "value": np.asarray(v)}
            )
            for kind, (p, o, v) in parts.items()
        ]
        with atomic(folder / "lists.parquet") as path:
            pd.concat(tables).to_parquet(path, index=False)


def _write_pairs(folder: Path, scores: Tensor, images: Images, query: Images) -> None:
    with atomic(folder / "pairs.safetensors") as part:
        save_file({"scores": scores.contiguous(), "query": query.index, "index": images.index}, part)


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


Choice = Prune | Thin | Pick | Draw | Top  # of positions that are not trained on

# Pretrain names Prune, which names Influence, which names Pretrain
for _stage in (Pretrain, Influence, Prune, Thin, Pick, Draw, Top, Embed, Stability, Cross, Nearness, Lists, Evaluate):
    _stage.model_rebuild()
