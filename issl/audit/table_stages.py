"""Stages whose result is small enough to be released: with them a notebook draws figures without
having pixels, features or a graph.

Each is one tidy table; released/README.md explains every column.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from pydantic import Field
from torch import Tensor

from issl.audit.cache import Artifacts
from issl.audit.data import human_choices
from issl.audit.data.known_duplicates import known_duplicates
from issl.audit.settings import Data, Weighing
from issl.audit.stages import (
    AnyEncoder,
    Betweenness,
    Embed,
    Influence,
    Neighbours,
    Stability,
    Table,
)
from issl.audit.stats import baselines, evaluate, explained_variance, neighbour_graph, statistics
from issl.audit.stats.pixel_features import pixel_features, texture
from issl.audit.stats.removals import Seen
from issl.audit.stats.tables import Numbers, tidy
from issl.data.images import Images, LazyPixels, decode, own_names
from issl.devices import full_precision
from issl.errors import IsslError
from issl.influence.curvature import LoGra
from issl.influence.kept import fit
from issl.influence.perturbation import GaussianNoise
from issl.influence.scorer import Computing
from issl.pretraining.encoder import Output

COPY = 1 << 41  # offset of the indices of an image's copies, so that each has its own noise


class Known(Table):
    """What a set says about its images."""

    name: ClassVar[str] = "images"

    data: Data

    def compute(self, artifacts: Artifacts) -> pd.DataFrame:
        images = self.data.load()
        table = own_names(images.attributes, ["class"])
        if images.labels is not None:
            table.insert(1, "class", images.labels.numpy())
        table.attrs = {"name": images.name, "size": list(images.pixels.shape[2:])}
        return table


class Thumbnails(Table):
    """The images that notebooks show, as PNG.

    Without `scores`: the first ones, some of each kind of strange image, and the largest group of
    known duplicates. With `scores`: the `most` highest and lowest by mean rank, and the lowest
    of each class.
    """

    name: ClassVar[str] = "thumbnails"

    data: Data
    scores: tuple[Influence, ...] = ()
    most: int = Field(24, ge=1)

    first: ClassVar[int] = 6
    of_a_kind: ClassVar[int] = 8
    of_a_group: ClassVar[int] = 24
    of_a_class: ClassVar[int] = 5

    def compute(self, artifacts: Artifacts) -> pd.DataFrame:
        images = self.data.load()
        chosen = self._by_scores(images, artifacts) if self.scores else self._by_kind(images)
        shown = images.subset(np.unique(np.concatenate(chosen)).astype(int))
        pngs = [_png(pixels) for pixels in shown.tensor()]
        return pd.DataFrame({"index": shown.index.numpy(), "png": pngs})

    def _by_kind(self, images: Images) -> list[np.ndarray]:
        found = [np.arange(min(self.first, len(images)))]
        if "atypical" in images.attributes:
            kinds = images.attributes["atypical"]
            found += [np.flatnonzero(kinds == k)[: self.of_a_kind] for k in kinds.unique() if k]
        twins = known_duplicates(images, self.data.split)
        if len(groups := twins["duplicate_of"][twins["duplicate_kind"] == "series"]):
            largest = groups.mode()[0]
            together = (images.index.numpy() == largest) | (twins["duplicate_of"] == largest)
            found.append(np.flatnonzero(together)[: self.of_a_group])
        return found

    def _by_scores(self, images: Images, artifacts: Artifacts) -> list[np.ndarray]:
        ranks = [s.read(artifacts)["influence"].rank(method="first") for s in self.scores]
        order = np.argsort(-np.mean(ranks, axis=0), kind="stable")
        found = [order[: self.most], order[::-1][: self.most]]
        if images.labels is not None:
            classes = images.labels.numpy()[order]
            found += [order[classes == c][-self.of_a_class :] for c in np.unique(classes)]
        return found


def _png(pixels: UInt8[torch.Tensor, "3 h w"]) -> bytes:
    with io.BytesIO() as file:
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
        return file.getvalue()


class _Pngs:
    """The pixels of a set's images that are shown: a source of `issl.data.images.LazyPixels`."""

    def __init__(self, name: str, index: np.ndarray, pngs: dict[int, bytes], size: int):
        self.name, self.index, self.pngs, self.size = name, index, pngs, size

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> UInt8[np.ndarray, "3 h w"]:
        index = int(self.index[i])
        if index not in self.pngs:
            raise IsslError(
                f"image {index} of {self.name} is not among the {len(self.pngs)} that are kept to "
                "be shown; load the set itself, with plan.training_set"
            )
        return decode(self.pngs[index], self.size, f"image {index} of {self.name}")

    def identity(self) -> str:
        return f"{self.name}, the {len(self.pngs)} that are shown"


def shown_images(known: pd.DataFrame, pictures: Sequence[pd.DataFrame]) -> Images:
    """A set made from its table (`Known`), with pixels for only the images that are shown
    (`Thumbnails`); asking for another image's pixels is an error."""
    labels = torch.from_numpy(known["class"].to_numpy().copy()) if "class" in known else None
    about, attributes = known.attrs, known.drop(columns="class", errors="ignore")
    pngs = {int(i): png for table in pictures for i, png in table.to_numpy()}
    (height, width), index = about["size"], known["index"].to_numpy()
    source = _Pngs(about["name"], index, pngs, height)
    return Images(LazyPixels(source, (height, width)), labels, attributes, about["name"])


class Ablation(Table):
    """Scores of the same images and encoder under several perturbations.

    names   of the perturbations, one for each of the scores
    """

    name: ClassVar[str] = "ablation"

    scores: tuple[Influence, ...] = Field(min_length=1)
    names: tuple[str, ...]

    def compute(self, artifacts: Artifacts) -> pd.DataFrame:
        each = [
            score.read(artifacts).assign(perturbation=name, draws=score.draws, seed=score.seed)
            for name, score in zip(self.names, self.scores, strict=True)
        ]
        return pd.concat(each, ignore_index=True)


class Pixels(Table):
    """What an image's pixels tell without an encoder (see `issl.audit.stats.pixel_features`)."""

    name: ClassVar[str] = "pixels"

    data: Data

    def compute(self, artifacts: Artifacts) -> pd.DataFrame:
        images = self.data.load()
        return pd.concat([pixel_features(images), texture(images)], axis=1)


class Closeness(Table):
    """How close the nearest other image is, without an encoder (`issl.audit.stats.baselines`)."""

    name: ClassVar[str] = "closeness"

    data: Data

    def compute(self, artifacts: Artifacts) -> pd.DataFrame:
        images = self.data.load()
        columns = {
            "pixels": baselines.pixel_closeness(images),
            "hash": baselines.hash_closeness(images),
        }
        return pd.DataFrame({"index": images.index.numpy(), **columns})


class Geometry(Table):
    """Where each image lies in feature space, and in the graph of nearest neighbours."""

    name: ClassVar[str] = "geometry"

    neighbours: Neighbours

    def compute(self, artifacts: Artifacts) -> pd.DataFrame:
        features, images = self.neighbours.features.read(artifacts), self.neighbours.images()
        _, distances = self.neighbours.read(artifacts)
        graph = self.neighbours.graph(artifacts)
        columns = {
            "feature_norm": features.norm(dim=1),
            "nearest": distances[:, 0],
            "knn_distance": distances.mean(1),
            "degree": graph.sum(1).astype(int),
        }
        if images.labels is not None:
            labels = images.labels.numpy()
            columns["cross_class_share"] = neighbour_graph.cross_class_share(graph, labels)
        return pd.DataFrame({"index": images.index.numpy(), **columns})


class FlatBridges(Table):
    """Do an image's edges to other classes lead to flat frames?"""

    name: ClassVar[str] = "flat_bridges"

    neighbours: Neighbours
    pixels: Pixels

    def compute(self, artifacts: Artifacts) -> pd.DataFrame:
        images, graph = self.neighbours.images(), self.neighbours.graph(artifacts)
        frames = self.pixels.read(artifacts)["border_std"]
        flat = (frames.rank(pct=True) <= 0.1).to_numpy()
        labels = images.require_labels().numpy()
        share = neighbour_graph.share_of_cross(graph, labels, lambda _, to: flat[to])
        return pd.DataFrame({"index": images.index.numpy(), "cross_flat_share": share})


class RelatedBridges(Table):
    """Do an image's edges to other classes stay within its own superclass?"""

    name: ClassVar[str] = "related_bridges"

    neighbours: Neighbours

    def compute(self, artifacts: Artifacts) -> pd.DataFrame:
        images, graph = self.neighbours.images(), self.neighbours.graph(artifacts)
        group = images.require(["superclass"])["superclass"].to_numpy()
        labels = images.require_labels().numpy()
        share = neighbour_graph.share_of_cross(graph, labels, lambda a, b: group[a] == group[b])
        return pd.DataFrame({"index": images.index.numpy(), "cross_related_share": share})


class Bottlenecks(Table):
    """Each image's part in the first bottlenecks of the graph of nearest neighbours; the table's
    `attrs` hold the eigenvalues."""

    name: ClassVar[str] = "bottlenecks"

    neighbours: Neighbours

    def compute(self, artifacts: Artifacts) -> pd.DataFrame:
        eigenvalues, spread = neighbour_graph.bottlenecks(self.neighbours.graph(artifacts))
        index = self.neighbours.images().index.numpy()
        table = pd.DataFrame({"index": index, "spread": spread})
        table.attrs = {"eigenvalues": eigenvalues.tolist()}
        return table


class Map(Table):
    """Some images in the plane, neighbours near each other (t-SNE of their features)."""

    name: ClassVar[str] = "map"
    repeatable: ClassVar[bool] = False

    features: Embed
    seed: int = Field(0, ge=0)

    points: ClassVar[int] = 2000  # more would hide each other

    def compute(self, artifacts: Artifacts) -> pd.DataFrame:
        from sklearn.manifold import TSNE  # slow to import

        features, index = self.features.read(artifacts), self.features.data.load().index.numpy()
        some = np.random.default_rng(self.seed).permutation(len(features))[: self.points]
        units = torch.nn.functional.normalize(features[some].float(), dim=1).numpy()
        options = {"metric": "cosine", "init": "pca", "random_state": self.seed}
        place = TSNE(perplexity=min(30.0, (len(some) - 1) / 3), **options).fit_transform(units)
        return pd.DataFrame({"index": index[some], "x": place[:, 0], "y": place[:, 1]})


class Estimates(Table):
    """A stage whose result is a few estimates: the labels' columns, metric, value, low, high, n."""

    labels: ClassVar[str]

    def found(self, artifacts: Artifacts) -> Mapping[str, Numbers]:
        """Estimates of each metric, by label."""
        raise NotImplementedError

    def compute(self, artifacts: Artifacts) -> pd.DataFrame:
        return tidy(self.found(artifacts), self.labels)

    def read(self, artifacts: Artifacts) -> dict[str, dict[str, statistics.Estimate]]:
        """Estimates of each metric, by label."""
        table: pd.DataFrame = super().read(artifacts)
        found: dict[str, dict[str, statistics.Estimate]] = {}
        for row in table.to_dict("records"):
            of_label = found.setdefault(row[self.labels], {})
            of_label[row["metric"]] = statistics.Estimate.of(row)
        return found


class Removals(Estimates):
    """What classes gain when the images at the head of a ranking are removed, compared with as many
    at random (see `issl.audit.stats.removals`).

    test   features of test images, to evaluate a linear probe on; None: no probe
    """

    name: ClassVar[str] = "removals"
    labels: ClassVar[str] = "removed"

    influence: Influence
    betweenness: Betweenness
    test: Embed | None = None
    share: float = Field(gt=0, lt=1)
    draws: int = Field(40, ge=2)
    seed: int = Field(0, ge=0)

    def found(self, artifacts: Artifacts) -> Mapping[str, Numbers]:
        near, score = self.betweenness.neighbours, self.influence.read(artifacts)["influence"]
        features, labels = near.features.read(artifacts), near.images().require_labels()
        rankings = {
            "influence": score.to_numpy(),
            "betweenness": self.betweenness.read(artifacts),
            "lowest influence": -score.to_numpy(),
        }
        images = Seen(labels.numpy(), features, near.graph(artifacts), rankings)
        rng = np.random.default_rng(self.seed)
        gains = images.gains(self.share, self.draws, rng)
        if self.test is None:
            return gains
        asked, truth = self.test.read(artifacts), self.test.data.load().require_labels()

        def probe(keep: np.ndarray) -> np.ndarray:
            own = features[keep], labels[keep]
            return evaluate.probe_hits(*own, asked, truth, self.seed)[0]

        of_probe = images.probe_gains(self.share, probe, rng)
        return {removed: gain | of_probe[removed] for removed, gain in gains.items()}


class Oddness(Table):
    """How far an image's features lie from others' (see `issl.audit.stats.baselines`).

    train   features of labelled training images; adds vote_entropy and prototype_distance
    """

    name: ClassVar[str] = "oddness"

    features: Embed
    seed: int = Field(0, ge=0)
    train: Embed | None = None

    def compute(self, artifacts: Artifacts) -> pd.DataFrame:
        features, index = self.features.read(artifacts), self.features.data.load().index.numpy()
        columns = {
            "knn_distance": baselines.knn_distance(features),
            "isolation": baselines.isolation(features, self.seed),
        }
        labels = None if self.train is None else self.train.data.load().labels
        if self.train is not None and labels is not None:
            known = self.train.read(artifacts), labels
            votes = evaluate.knn_votes(*known, features, device=artifacts.device)
            columns["vote_entropy"] = baselines.vote_entropy(votes)
            columns["prototype_distance"] = baselines.prototype_distance(features, *known)
        return pd.DataFrame({"index": index, **columns})


class Ambiguity(Estimates):
    """Does a detector of strange images rise with people's disagreement? Rank correlations over the
    images that were left unchanged.

    CIFAR-10H may be used but not sold (CC BY-NC-SA 4.0), so only these few numbers are kept of what
    rests on it. "less loss": influence's correlation minus that of the losses of several draws.
    """

    name: ClassVar[str] = "ambiguity"
    labels: ClassVar[str] = "detector"

    influence: Influence
    losses: Stability
    oddness: Oddness

    def found(self, artifacts: Artifacts) -> Mapping[str, Numbers]:
        images = self.oddness.features.data.load()
        alone = images.attributes["atypical"].to_numpy() == ""
        truth = human_choices.ambiguity(images, self.oddness.features.data.root)[alone]
        tables = (stage.read(artifacts) for stage in (self.influence, self.losses, self.oddness))
        own = detectors_of(*tables)[alone]
        found: dict[str, Numbers] = {
            str(name): {"spearman_ambiguity": statistics.spearman(score.to_numpy(), truth)}
            for name, score in own.items()
        }
        less = statistics.correlation_difference(own["influence"], own["losses"], truth)
        found["influence"] = {**found["influence"], "spearman_less_loss": less}
        return found


def detectors_of(scores: pd.DataFrame, losses: pd.DataFrame, oddness: pd.DataFrame) -> pd.DataFrame:
    """The detectors of strange images under one encoder, each high where it suspects one, n rows;
    `losses` are those of several draws."""
    detectors = scores[["influence", "stability_loss"]].assign(losses=losses["stability_loss"])
    further = {"grad_norm": scores["grad_norm"], **oddness.drop(columns="index")}
    return detectors.assign(**further)


class ExplainedBy(Estimates):
    """How much of influence simple statistics explain, under one encoder (see
    `issl.audit.stats.explained_variance`).

    scores   under two seeds of the noise
    """

    name: ClassVar[str] = "explained"
    version: ClassVar[int] = 2  # trees that stop by themselves
    labels: ClassVar[str] = "kind"

    scores: tuple[Influence, Influence]
    pixels: Pixels
    geometry: Geometry
    seed: int = Field(0, ge=0)

    def found(self, artifacts: Artifacts) -> Mapping[str, Numbers]:
        both = [scores.read(artifacts) for scores in self.scores]
        pixels, geometry = self.pixels.read(artifacts), self.geometry.read(artifacts)
        tables = [explained_variance.table(pixels, geometry, s["stability_loss"]) for s in both]
        influence = np.stack([s["influence"] for s in both])
        return explained_variance.of_one_encoder(influence, tables, self.seed)


class CopiesDiscount(Table):
    """How far copies of an image lower its score: copies.parquet (index, copies, influence,
    predicted; a row for each of `picked` random images and number of copies).

    If the k copies have the image's own gradient and the damping stays the same, then in each layer

        s_k = (n + k)/n · s / (1 + k s / n),   s = gᵀ (H + λ I)⁻¹ g

    (Sherman and Morrison 1950); the sum over layers is `predicted`. In `influence` each copy has
    noise of its own, as it would in a set, and the curvature is that of all n + k images.
    """

    name: ClassVar[str] = "copies"

    pretrain: AnyEncoder
    data: Data
    perturbation: GaussianNoise = GaussianNoise()
    curvature: Weighing = LoGra()
    output: Output = "features"
    copies: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    picked: int = Field(4, ge=1)

    seed: ClassVar[int] = 0  # of the noise, and of the random images

    def compute(self, artifacts: Artifacts) -> pd.DataFrame:
        encoder, images = self.pretrain.encoder(artifacts, self.output), self.data.load()
        computing = Computing(artifacts.device, batch_size=64, progress=artifacts.progress)
        fitted = fit(
            encoder, images, self.perturbation, self.curvature, self.seed, computing=computing
        )
        known = {name: torch.linalg.eigh(total) for name, total in fitted.sums.items()}
        rng, table = np.random.default_rng(self.seed), []
        for i in rng.choice(len(images), self.picked, replace=False).tolist():
            index = int(images.index[i]) + COPY * np.arange(max(self.copies) + 1)
            pixels = images.tensor()[[i] * len(index)]
            alike = Images(pixels, None, pd.DataFrame({"index": index}), images.name)
            with full_precision():
                rows = fitted.scorer.rows(alike, slice(0, len(index)))
            turned = [
                (e, rows[f"layer.{name}"][:, 0].double().cpu() @ v)
                for name, (e, v) in known.items()
            ]
            for k in (0, *self.copies):
                shares = [self._shares(e, g, fitted.n, k) for e, g in turned]
                measured, predicted = np.sum(shares, axis=0)
                row = {"index": index[0], "copies": k}
                table.append(row | {"influence": measured, "predicted": predicted})
        return pd.DataFrame(table)

    def _shares(
        self, e: Float[Tensor, " r"], g: Float[Tensor, "m r"], n: int, k: int
    ) -> tuple[float, float]:
        """One layer's share of an image's score, with its first k copies C in the curvature by
        (D + CᵀC)⁻¹ = D⁻¹ − D⁻¹Cᵀ (1 + C D⁻¹ Cᵀ)⁻¹ C D⁻¹; and the same as predicted.

        Args:
            e: eigenvalues of n H; all coordinates are those of its eigenvectors.
            g: gradients of the image and of its copies.
        """

        def share(c: Float[Tensor, "k r"]) -> float:
            d = e + self.curvature.damping * (e.sum() + c.square().sum()) / len(e)
            if not d.any():
                return 0.0  # no gradient reaches this layer
            inside = torch.eye(len(c)).to(e) + (c / d) @ c.T
            own, seen = (g[0] / d) @ g[0], (c / d) @ g[0]
            return float((n + len(c)) * (own - seen @ torch.linalg.solve(inside, seen)))

        alone = share(g[:0])
        return share(g[1 : k + 1]), (n + k) / n * alone / (1 + k * alone / n)
