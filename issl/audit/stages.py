"""Stages: the slow steps, each turning a validated config into an artifact (`issl.audit.cache`).

Stages name the stages that they read, so a config says all that its numbers depend on: the encoder
that was trained without the top 5% by influence names the choice of images, which names the scores,
which name the encoder they explain.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.nn.functional import normalize

from issl.audit.cache import Artifacts, Stage
from issl.audit.given import Given
from issl.audit.settings import Data, Weighing
from issl.audit.stats.evaluate import knn_hits, probe_hits
from issl.audit.stats.neighbour_graph import betweenness, knn_graph, nearest
from issl.audit.stats.pixel_features import pixel_features
from issl.data.images import Images
from issl.devices import full_precision
from issl.errors import IsslError
from issl.files import atomic, read_safetensors, write_json, write_safetensors
from issl.influence.curvature import LoGra, RandomProjection
from issl.influence.kept import fit
from issl.influence.layers import scored_layers
from issl.influence.losses import CrossEntropy, stability_loss
from issl.influence.perturbation import Augmentation, GaussianNoise
from issl.influence.scorer import Computing
from issl.influence.scores import as_queries, cross_influence, self_influence
from issl.measures import Measure, embed, knn_margins, mean_of, stability_losses, stability_measures
from issl.pretraining.batchnorm import copy_statistics, estimate_statistics
from issl.pretraining.checkpoint import Checkpoint
from issl.pretraining.encoder import Encoder, Output, load_encoder, save_encoder
from issl.pretraining.learner import Learner, load_learner, save_learner
from issl.pretraining.loop import Execution, pretrain
from issl.pretraining.recipes import RECIPES, Method, Recipe
from issl.pretraining.states import Run
from issl.through_training import Effects, influence_through_training, learner_of, values_of

TOGETHER = 64  # queries of a mean in one pass
# what is pruned
Removed = Literal["top", "bottom", "random", "random of class", "top flat", "random flat"]
# of the backbone; with "all" those of a projector, too
Layers = Literal["all", "first convolution", "last block"]
Asked = Literal["each", "unseen", "own"]  # what is asked after a training


class Pretrain(Stage):
    """Train an encoder: encoder.safetensors, history.csv.

    With `epochs=0` and `calibrated` it is the network before any training, with BatchNorm's
    statistics from one view of each image: the control that shows what an architecture does by
    itself. With `snapshots` (which may be empty) it also writes encoder-EPOCH.safetensors after
    these epochs. Then these files and the last one hold the whole learner, with BYOL's predictor
    and target, in half precision, so what is scored is also what can be shared.
    """

    name: ClassVar[str] = "pretrain"
    version: ClassVar[int] = 3
    takes_hours: ClassVar[bool] = True

    data: Data
    recipe: Recipe = RECIPES["published"]["simclr"]
    width: int = Field(64, ge=1)
    epochs: int = Field(200, ge=0)  # 0: the encoder as it is before training
    batch_size: int = Field(256, ge=2)
    seed: int = Field(0, ge=0)
    without: Choice | None = None  # these images are not trained on; all else stays as it is
    gaps: bool = False  # their places in the batches stay empty
    start: Pretrain | None = None  # continue from this encoder
    start_after: int | None = None  # … as it was after so many epochs, one of its snapshots
    snapshots: tuple[int, ...] | None = None  # the whole learner is kept after these epochs
    calibrated: bool = False  # BatchNorm's statistics are estimated anew at the end

    @property
    def method(self) -> Method:
        return self.recipe.method

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        checkpoint, images = folder / "checkpoint.safetensors", self.data.load()
        keep = torch.ones(len(images), dtype=torch.bool)
        if self.without is not None:
            keep[self.without.read(artifacts)] = False
        settings = self.model_dump(include={"width", "epochs", "batch_size", "seed"})
        about = {"config": self.model_dump(mode="json")}

        def after_epoch(done: int, learner: Learner) -> None:
            if self.snapshots is not None and done == self.epochs:
                save_learner(folder / "encoder.safetensors", learner, about)
            elif done in (self.snapshots or ()):
                path = folder / f"encoder-{done:04d}.safetensors"
                save_learner(path, learner, about | {"epochs_done": done})

        encoder, history = pretrain(
            images,
            self.recipe,
            **settings,
            keep=keep,
            gaps=self.gaps,
            start=self.began(artifacts),
            execution=Execution(device=artifacts.device, progress=artifacts.progress),
            checkpoint=Checkpoint(checkpoint, artifacts.checkpoint_seconds),
            after_epoch=after_epoch,
        )
        with atomic(folder / "history.csv") as part:
            history.to_csv(part, index=False)
        if self.calibrated:
            estimate_statistics(encoder.backbone, images, self.recipe.view_a)
        if self.snapshots is None:
            save_encoder(folder / "encoder.safetensors", encoder, about)
        checkpoint.unlink(missing_ok=True)

    def encoder(
        self, artifacts: Artifacts, output: Output = "features", after: int | None = None
    ) -> nn.Module:
        """The encoder, in eval mode; `after`: as it was after that many epochs, one of
        `snapshots`."""
        return load_encoder(self._file(artifacts, after), output)

    def read(self, artifacts: Artifacts) -> nn.Module:
        return self.encoder(artifacts)

    def began(self, artifacts: Artifacts) -> Encoder | Learner | None:
        """What this training continues from, if not from fresh weights: the whole learner if it was
        kept, else backbone and projector."""
        if self.start is None:
            return None
        if self.start.snapshots is not None:
            return self.start.learner(artifacts, self.start_after)
        encoder = self.start.encoder(artifacts, "projector")
        assert isinstance(encoder, Encoder)
        return encoder

    def learner(self, artifacts: Artifacts, after: int | None = None) -> Learner:
        """The whole learner at the end, or after so many epochs; `snapshots` must be set."""
        return load_learner(self._file(artifacts, after))

    def _file(self, artifacts: Artifacts, after: int | None) -> Path:
        epoch = "" if after in (None, self.epochs) else f"-{after:04d}"
        return artifacts.file(self, f"encoder{epoch}.safetensors")

    def history(self, artifacts: Artifacts) -> pd.DataFrame:
        """One row per epoch, see `issl.pretraining.loop.pretrain`."""
        return pd.read_csv(artifacts.file(self, "history.csv"))


class State(Stage):
    """An encoder as it was after some epochs of a training, one of its `snapshots`: about.json. The
    weights stay with the training."""

    name: ClassVar[str] = "state"

    run: Pretrain
    after: int = Field(ge=1)

    @property
    def method(self) -> Method:
        return self.run.method

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        write_json(folder / "about.json", {"training": self.run.label, "epochs": self.after})

    def encoder(self, artifacts: Artifacts, output: Output = "features") -> nn.Module:
        return self.run.encoder(artifacts, output, self.after)

    def read(self, artifacts: Artifacts) -> nn.Module:
        return self.encoder(artifacts)


class Table(Stage):
    """A stage whose artifact is a table in one file (NAME.parquet unless the subclass says
    otherwise), numbers in single precision. The table's `attrs` name the stage."""

    file: ClassVar[str]
    repeatable: ClassVar[bool] = True  # does another machine give the same, up to rounding?

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" in cls.__dict__ and "file" not in cls.__dict__:
            cls.file = f"{cls.name}.parquet"

    def compute(self, artifacts: Artifacts) -> pd.DataFrame:
        """The table."""
        raise NotImplementedError

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        table = self.compute(artifacts)
        single = table.astype(dict.fromkeys(table.select_dtypes("float64"), "float32"))
        single.attrs = {**table.attrs, "stage": self.label}
        with atomic(folder / self.file) as part:
            single.to_parquet(part, index=False, compression="zstd", use_dictionary=False)

    def read(self, artifacts: Artifacts) -> Any:
        """The table, as the class describes it."""
        return pd.read_parquet(artifacts.file(self, self.file))


AnyEncoder = Pretrain | Given | State


def _computing(artifacts: Artifacts) -> Computing:
    """How gradients are computed. On a CPU in small batches: fresh memory is slow there, and caches
    are small."""
    batch_size = 64 if artifacts.device.type == "cpu" else 256
    return Computing(device=artifacts.device, batch_size=batch_size, progress=artifacts.progress)


class Influence(Table):
    """Score images under an encoder: influence.parquet (a row per image, see
    `issl.self_influence`; the damping of each layer is among the table's `attrs`).

    others   these images are scored instead, under the curvature of `data`
    output   the encoder's output whose stability is scored; a projector's layers then count, too
    layers   which layers are scored
    """

    name: ClassVar[str] = "influence"

    pretrain: AnyEncoder
    data: Data
    perturbation: GaussianNoise | Augmentation = GaussianNoise()
    curvature: Weighing = LoGra()
    seed: int = Field(0, ge=0)
    draws: int = Field(1, ge=1)
    # cross_entropy: of a supervised encoder's class scores
    loss: Literal["stability", "cross_entropy"] = "stability"
    others: Data | None = None
    output: Output = "features"
    layers: Layers = "all"

    def compute(self, artifacts: Artifacts) -> pd.DataFrame:
        supervised = self.loss == "cross_entropy"
        encoder = self.pretrain.encoder(artifacts, "projector" if supervised else self.output)
        images, computing = self.data.load(), _computing(artifacts)
        what: dict[str, Any] = {
            "perturbation": self.perturbation,
            "curvature": self.curvature,
            "seed": self.seed,
            "draws": self.draws,
            "loss": CrossEntropy() if supervised else stability_loss,
            "skip": self._skipped(encoder),
            "computing": computing,
        }
        if self.others is None:
            return self_influence(encoder, images, **what)
        return fit(encoder, images, **what).score(self.others.load(), computing=computing)

    def _skipped(self, encoder: nn.Module) -> list[str]:
        """The names of the layers that are not scored."""
        if self.layers == "all":
            return []
        names = list(scored_layers(encoder))
        block = [n for n in names if "projector" not in n][-1].rpartition(".")[0]
        last = {n for n in names if n.startswith(f"{block}.")}
        kept = {names[0]} if self.layers == "first convolution" else last
        return [n for n in names if n not in kept]

    def order(self, artifacts: Artifacts) -> np.ndarray:
        """The positions of the images, from the highest influence to the lowest."""
        return np.argsort(-self.read(artifacts)["influence"].to_numpy(), kind="stable")


class Positions(Stage):
    """A choice of images by their positions in the data: positions.json. The subclasses say
    which."""

    def choose(self, artifacts: Artifacts) -> np.ndarray:
        """The positions, in any order."""
        raise NotImplementedError

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        write_json(folder / "positions.json", sorted(int(i) for i in self.choose(artifacts)))

    def read(self, artifacts: Artifacts) -> list[int]:
        """The chosen positions, in increasing order."""
        chosen: list[int] = json.loads(artifacts.file(self, "positions.json").read_text())
        return chosen


class Prune(Positions):
    """Choose a share of the images: those with the highest or the lowest score, or random ones.
    "of class" chooses as many of each class as are among the highest. "flat" chooses only from the
    images with the flattest frames (`pixel_features`: border_std), twice as many as it chooses."""

    name: ClassVar[str] = "prune"

    influence: Influence
    which: Removed
    share: float = Field(gt=0, lt=1)
    seed: int = Field(0, ge=0)  # of `random`

    def choose(self, artifacts: Artifacts) -> np.ndarray:
        order = highest = self.influence.order(artifacts)
        count = round(self.share * len(order))
        data = self.influence.others or self.influence.data
        if self.which.startswith("random"):
            order = np.random.default_rng(self.seed).permutation(len(order))
        if self.which.endswith("of class"):
            classes = data.load().require_labels().numpy()
            wanted = np.bincount(classes[highest[:count]])
            drawn = [order[classes[order] == k][:some] for k, some in enumerate(wanted)]
            order = np.concatenate(drawn)
        if self.which.endswith("flat"):
            images = data.load()
            frames = pixel_features(images)["border_std"].to_numpy()
            order = order[np.isin(order, np.argsort(frames, kind="stable")[: 2 * count])]
        return order[len(order) - count :] if self.which == "bottom" else order[:count]


class Thin(Positions):
    """Choose images of one group so that only the share `keep` of it is left, or as many images at
    random."""

    name: ClassVar[str] = "thin"

    data: Data
    attribute: str
    value: str
    keep: float = Field(0.1, ge=0, lt=1)
    at_random: bool = False
    seed: int = Field(0, ge=0)

    def choose(self, artifacts: Artifacts) -> np.ndarray:
        groups = self.data.load().require([self.attribute])[self.attribute].astype(str)
        members = np.flatnonzero(groups == self.value)
        if not len(members):
            there = ", ".join(sorted(groups.unique()))
            raise IsslError(
                f"{self.data.name}: no image has {self.attribute}={self.value!r}; there are {there}"
            )
        rng = np.random.default_rng(self.seed)
        count = len(members) - round(self.keep * len(members))
        return rng.permutation(len(groups) if self.at_random else members)[:count]


class Pick(Positions):
    """Choose the one image at a quantile of the score, 0 the highest and 1 the lowest."""

    name: ClassVar[str] = "pick"

    influence: Influence
    quantile: float = Field(ge=0, le=1)

    def choose(self, artifacts: Artifacts) -> np.ndarray:
        order = self.influence.order(artifacts)
        return order[[round(self.quantile * (len(order) - 1))]]


class Draw(Positions):
    """Choose a share of the images at random."""

    name: ClassVar[str] = "draw"

    data: Data
    share: float = Field(gt=0, lt=1)
    seed: int = Field(0, ge=0)

    def choose(self, artifacts: Artifacts) -> np.ndarray:
        n = len(self.data.load())
        return np.random.default_rng(self.seed).permutation(n)[: round(self.share * n)]


class Top(Positions):
    """Choose the k training images that rank first for one query: those of highest influence on it,
    those nearest to it, or those that, trained on, lowered its measure most."""

    name: ClassVar[str] = "top"

    scores: Cross | Nearness | ThroughTraining
    query: int = Field(ge=0)  # its position
    k: int = Field(ge=1)

    def choose(self, artifacts: Artifacts) -> np.ndarray:
        row = self.scores.sign * self.scores.read(artifacts)[self.query]
        return row.argsort(descending=True, stable=True)[: self.k].numpy()


class Measured(Stage):
    """What is measured on an encoder, by default as it was trained.

    statistics   take BatchNorm's running statistics from this encoder instead
    estimated    … or estimate them on one fixed view (the recipe's, at the images' own size) of
                 each of these images; `pretrain` must then be a training
    output       of the encoder
    """

    pretrain: AnyEncoder
    data: Data
    statistics: Pretrain | None = None
    estimated: Data | None = None
    output: Output = "features"

    def encoder(self, artifacts: Artifacts) -> nn.Module:
        """The encoder with the statistics that are asked for."""
        encoder = self.pretrain.encoder(artifacts, self.output)
        if self.statistics is not None:
            return copy_statistics(self.statistics.encoder(artifacts, self.output), encoder)
        if self.estimated is not None:
            assert isinstance(self.pretrain, Pretrain)
            return estimate_statistics(encoder, self.estimated.load(), self.pretrain.recipe.view_a)
        return encoder


class Embed(Measured):
    """Features of images under an encoder: features.safetensors (`features`, `index`)."""

    name: ClassVar[str] = "embed"

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        images = self.data.load()
        features = embed(self.encoder(artifacts), images, artifacts.device)
        found = {"features": features, "index": images.index}
        write_safetensors(folder / "features.safetensors", found)

    def read(self, artifacts: Artifacts) -> Tensor:
        """Features (n, d)."""
        path = artifacts.file(self, "features.safetensors")
        return read_safetensors(path, "features")[1]["features"]


class Stability(Measured, Table):
    """Stability losses of images, mean over draws, without gradients: losses.parquet (index,
    stability_loss)."""

    name: ClassVar[str] = "stability"
    file: ClassVar[str] = "losses.parquet"

    perturbation: GaussianNoise | Augmentation = GaussianNoise()
    seed: int = Field(0, ge=0)
    draws: int = Field(1, ge=1)

    def compute(self, artifacts: Artifacts) -> pd.DataFrame:
        images = self.data.load()
        losses = stability_losses(
            self.encoder(artifacts),
            images,
            self.perturbation,
            self.seed,
            self.draws,
            artifacts.device,
        )
        return pd.DataFrame({"index": images.index.numpy(), "stability_loss": losses})


class Pairs(Stage):
    """A number for each query and training image: pairs.safetensors (`scores` (q, n)). `sign` times
    it is high if the image helps the query or resembles it."""

    sign: ClassVar[int] = 1

    def read(self, artifacts: Artifacts) -> Tensor:
        """The numbers (q, n)."""
        return read_safetensors(artifacts.file(self, "pairs.safetensors"), "scores")[1]["scores"]


def _write_pairs(folder: Path, scores: Tensor) -> None:
    write_safetensors(folder / "pairs.safetensors", {"scores": scores})


class Cross(Pairs):
    """Cross-influence of training images on queries."""

    name: ClassVar[str] = "cross"
    version: ClassVar[int] = 2

    pretrain: Pretrain
    data: Data
    query: Data
    perturbation: GaussianNoise | Augmentation = GaussianNoise()
    curvature: Weighing = LoGra()
    seed: int = Field(0, ge=0)
    draws: int = Field(1, ge=1)

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        computing = _computing(artifacts)
        if not isinstance(self.curvature, LoGra | RandomProjection):
            # whole gradients have as many numbers per image as there are weights: make the passes
            # twice, rather than keep tens of gigabytes
            computing = replace(computing, memory="recomputed")
        scores = cross_influence(
            self.pretrain.encoder(artifacts),
            self.data.load(),
            as_queries(self.query.load()),
            self.perturbation,
            self.curvature,
            self.seed,
            draws=self.draws,
            computing=computing,
        )
        _write_pairs(folder, scores)


class Spread(Positions):
    """Choose images evenly over the ranks of the score, the highest and the lowest among them."""

    name: ClassVar[str] = "spread"

    influence: Influence
    count: int = Field(ge=2)

    def choose(self, artifacts: Artifacts) -> np.ndarray:
        order = self.influence.order(artifacts)
        return order[np.linspace(0, len(order) - 1, self.count).round().astype(int)]


class OfRun(Stage):
    """What is measured on an encoder after a training, in fp32 with fixed seeds.

    run      the training on all images; it is run here, as often as needed, and need not be in
             the cache
    asked    "each": the stability loss of each query. "unseen": its mean over every other query,
             its mean over the rest, and minus the mean kNN margin of all (by the features at the
             start of `run`); lower is better. "own": the stability loss of each image of `picked`
    """

    run: Pretrain
    query: Data
    asked: Asked = "each"
    picked: Spread | None = None
    perturbation: GaussianNoise | Augmentation = GaussianNoise()
    seed: int = Field(0, ge=0)
    draws: int = Field(1, ge=1)

    def training(self, artifacts: Artifacts) -> tuple[Run, list[Measure]]:
        """The training, and what is asked after it."""
        run, images = self.run, self.run.data.load()
        began = run.began(artifacts)
        start = run.seed if began is None else began
        learner = learner_of(start, run.recipe, run.width, images).to(artifacts.device)
        steps = Run(learner, images, run.epochs, run.batch_size, run.seed)
        return steps, self.measures(learner, images, artifacts)

    def effects(self, run: Run, measures: list[Measure], artifacts: Artifacts) -> Effects:
        return influence_through_training(
            run.start,
            run.images,
            measures,
            epochs=run.epochs,
            batch_size=run.batch_size,
            seed=run.seed,
            device=artifacts.device,
            progress=artifacts.progress,
        )

    def measures(self, learner: Learner, images: Images, artifacts: Artifacts) -> list[Measure]:
        """What is asked of the trained backbone."""
        noise = (self.perturbation, self.seed, self.draws)
        if self.picked is not None:
            return stability_measures(images.subset(self.picked.read(artifacts)), *noise)
        query = self.query.load()
        if self.asked == "each":
            return stability_measures(as_queries(query), *noise)
        halves = [as_queries(query.subset(range(k, len(query), 2))) for k in range(2)]
        means = [mean_of(stability_measures(half, *noise, together=TOGETHER)) for half in halves]
        bank = embed(learner.encoder.backbone.eval(), images, artifacts.device)
        margin = mean_of(knn_margins(query, bank, images.require_labels(), together=TOGETHER))
        return [*means, lambda backbone: -margin(backbone)]


class ThroughTraining(OfRun, Pairs):
    """The derivative of what is asked with respect to each image's weight in the training.
    Negative: training on the image lowers it. See `issl.influence_through_training`.

    pairs.safetensors, as `Cross`, and through.json (growth of the adjoint, seconds, bytes)."""

    name: ClassVar[str] = "through_training"
    sign: ClassVar[int] = -1

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        run, measures = self.training(artifacts)
        effects = self.effects(run, measures, artifacts)
        about = {"seconds": effects.seconds, "state_bytes": effects.state_bytes}
        about["growth"] = effects.growth[0].tolist()
        write_json(folder / "through.json", about)
        _write_pairs(folder, effects.derivatives)

    def about(self, artifacts: Artifacts) -> dict[str, Any]:
        """What through.json says."""
        found: dict[str, Any] = json.loads(artifacts.file(self, "through.json").read_text())
        return found


class Without(OfRun, Table):
    """What is asked after the training on all images (subset -1), and after leaving out each of
    some choices of images, whose places stay empty: without.parquet (subset, query, value)."""

    name: ClassVar[str] = "without"

    left_out: tuple[Choice, ...]

    def compute(self, artifacts: Artifacts) -> pd.DataFrame:
        run, measures = self.training(artifacts)
        chosen = {-1: [], **{k: c.read(artifacts) for k, c in enumerate(self.left_out)}}
        parts = []
        with full_precision():
            for number, places in chosen.items():
                value = values_of(run.trained(places), measures)
                found = {"subset": number, "query": range(len(value)), "value": value.numpy()}
                parts.append(pd.DataFrame(found))
        return pd.concat(parts, ignore_index=True)


class CopiesTrainedOn(OfRun, Table):
    """What training on copies of an image does to its own stability loss, as derivatives with
    respect to the weight of one of them, on average, and to all their weights together:
    copies.parquet (index, copies, one, together; a row per image of `picked` and number of copies,
    itself counted). The copies take the places of other images, drawn at random."""

    name: ClassVar[str] = "copies_trained_on"
    file: ClassVar[str] = "copies.parquet"

    copies: tuple[int, ...] = (1, 2, 8)

    def compute(self, artifacts: Artifacts) -> pd.DataFrame:
        run, _ = self.training(artifacts)
        assert self.picked is not None
        places, rng, rows = self.picked.read(artifacts), np.random.default_rng(self.seed), []
        others = np.setdiff1d(np.arange(len(run.images)), places)
        for i, k in product(places, self.copies):
            alike = [i, *rng.choice(others, k - 1, replace=False)]
            shown = np.arange(len(run.images))
            shown[alike] = i
            # copies keep the indices of the images they replace, so they have views of their own
            images = replace(run.images, pixels=run.images.tensor()[shown])
            query = run.images.subset([i])
            own = stability_measures(query, self.perturbation, self.seed, self.draws)
            effects = self.effects(replace(run, images=images), own, artifacts)
            of_each = effects.derivatives[0, alike].numpy()
            row = {"index": int(run.images.index[i]), "copies": k}
            rows.append(row | {"one": of_each.mean(), "together": of_each.sum()})
        return pd.DataFrame(rows)


class Nearness(Pairs):
    """Cosine similarity of training images and queries in feature space."""

    name: ClassVar[str] = "nearness"

    train: Embed
    query: Embed

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        train, query = self.train.read(artifacts), self.query.read(artifacts)
        _write_pairs(folder, normalize(query.double(), dim=1) @ normalize(train.double(), dim=1).T)


class Neighbours(Stage):
    """The k nearest other images of each in feature space: neighbours.safetensors (`places`:
    positions, and `distances`, (n, k) each)."""

    name: ClassVar[str] = "neighbours"

    features: Embed
    k: int = Field(10, ge=1)

    def make(self, folder: Path, artifacts: Artifacts) -> None:
        places, distances = map(torch.from_numpy, nearest(self.features.read(artifacts), self.k))
        found = {"places": places.int(), "distances": distances}
        write_safetensors(folder / "neighbours.safetensors", found)

    def read(self, artifacts: Artifacts) -> tuple[np.ndarray, np.ndarray]:
        """Positions and cosine distances, (n, k) each, the nearest first."""
        kept = read_safetensors(artifacts.file(self, "neighbours.safetensors"), "neighbours")[1]
        return kept["places"].numpy(), kept["distances"].numpy()

    def graph(self, artifacts: Artifacts) -> csr_array:
        """The graph of nearest neighbours, see `issl.audit.stats.neighbour_graph.knn_graph`."""
        return knn_graph(self.read(artifacts)[0])

    def images(self) -> Images:
        """The images whose neighbours these are."""
        return self.features.data.load()


class Betweenness(Table):
    """The share of shortest paths through each image in the graph of nearest neighbours, read as
    (n,)."""

    name: ClassVar[str] = "betweenness"

    neighbours: Neighbours
    seed: int = Field(0, ge=0)

    def compute(self, artifacts: Artifacts) -> pd.DataFrame:
        found = betweenness(self.neighbours.graph(artifacts), seed=self.seed)
        index = self.neighbours.images().index.numpy()
        return pd.DataFrame({"index": index, "betweenness": found})

    def read(self, artifacts: Artifacts) -> np.ndarray:
        return super().read(artifacts)["betweenness"].to_numpy()


class Evaluate(Table):
    """Is the class found by weighted kNN, and by a linear probe? hits.parquet; the probe's C is
    among the table's `attrs`."""

    name: ClassVar[str] = "evaluate"
    file: ClassVar[str] = "hits.parquet"

    train: Embed
    test: Embed
    k: int = Field(200, ge=1)

    def compute(self, artifacts: Artifacts) -> pd.DataFrame:
        train, test = self.train.read(artifacts), self.test.read(artifacts)
        labels, images = self.train.data.load().require_labels(), self.test.data.load()
        truth = images.require_labels()
        probe, c = probe_hits(train, labels, test, truth)
        knn = knn_hits(train, labels, test, truth, self.k, artifacts.device)
        found = pd.DataFrame({"index": images.index.numpy(), "knn": knn, "probe": probe})
        found.attrs["C"] = c
        return found


Choice = Prune | Thin | Pick | Draw | Top

# Pretrain names Prune, which names Influence, which names Pretrain
for _stage in [kind for kind in globals().values() if isinstance(kind, type)]:
    if issubclass(_stage, Stage):
        _stage.model_rebuild()
