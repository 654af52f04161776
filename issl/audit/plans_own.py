"""The plans of the notebooks that go beyond the paper; see `plan` for what all plans share."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from pydantic import Field, model_validator
from torch import nn

from issl.audit.cache import Stage
from issl.audit.given import Given
from issl.audit.plan import (
    BY,
    UNTRAINED,
    Cells,
    Epochs,
    Labels,
    Plan,
    Readable,
    Scored,
    Snapshots,
    Unit,
    noise_in,
    under,
)
from issl.audit.settings import Data
from issl.audit.stages import (
    AnyEncoder,
    Asked,
    CopiesTrainedOn,
    Cross,
    Draw,
    Embed,
    Evaluate,
    Influence,
    Nearness,
    Neighbours,
    Pairs,
    Pick,
    Pretrain,
    Prune,
    Spread,
    Stability,
    State,
    ThroughTraining,
    Top,
    Without,
)
from issl.audit.table_stages import (
    Bottlenecks,
    CopiesDiscount,
    ExplainedBy,
    Known,
    Map,
    Pixels,
    Removals,
)
from issl.influence.curvature import EKFAC, Curvature, Identity, LoGra, named_curvature
from issl.influence.perturbation import ClippedNoise
from issl.pretraining import recipes
from issl.pretraining.batchnorm import estimate_statistics
from issl.pretraining.encoder import Normalize, Output
from issl.pretraining.learner import Learner

SIMILARITY = "cosine similarity"  # of features, in place of cross-influence
ALL = -1  # in place of an image that is left out: trained on all images
MEASURED = 1000  # the noise seed of measurements: no score uses these draws
CONTINUED = 100  # where the seeds for order and views of continued trainings start
Other = Literal["PCA", "EK-FAC", "first convolution", "last block", "clipped"]  # ways to score
Kind = Literal["continued", "from scratch"]  # ways to retrain
# how a retrained encoder is measured: with BatchNorm's running statistics held, so only weights
# differ; as it was trained; or with only its statistics, on the weights of the scored encoder
Channel = Literal["BatchNorm held", "as trained", "BatchNorm alone"]


class Retrained(Scored):
    """A notebook that retrains without some images, and measures what that changes.

    queries            how many test images, the first ones, are queries
    draws              perturbation draws per image, in scores and in measurements
    candidates         how many images, the first ones, are scored, and trained on when training
                       continues; None: all
    continued_epochs   how long a "continued" encoder continues training without the images
    continued_lr       its learning rate (for a batch of 256); the views have the size that its
                       training ended on
    continued_batch    its batch size; None: that of its training
    """

    n: int = Field(256, ge=16)  # many small trainings
    width: int = Field(4, ge=1)
    queries: int = Field(24, ge=4)
    draws: int = Field(4, ge=1)
    seeds: int = Field(2, ge=2)
    candidates: int | None = Field(None, ge=16)
    continued_epochs: int = Field(4, ge=1)
    continued_lr: float = Field(0.05, gt=0)
    continued_batch: int | None = Field(None, ge=2)

    def channels(self, kind: Kind) -> tuple[Channel, ...]:
        """The ways to measure. (Weights from scratch and the statistics of another network do not
        fit together.)"""
        both: tuple[Channel, ...] = ("BatchNorm held", "as trained")
        return (*both, "BatchNorm alone") if kind == "continued" else both

    def scored(self) -> Data:
        """The images that are scored, and left out."""
        return self.data(first=self.candidates)

    def retrained(
        self,
        kind: Kind,
        seed: int,
        first: Pretrain,
        without: Draw | Pick | Top | None = None,
        gaps: bool = False,
    ) -> Pretrain:
        """Training number `seed` without these images: from fresh weights, or continued from the
        encoder `first`."""
        if kind == "from scratch":
            return self.training(number=seed, without=without, gaps=gaps, snapshots=None)
        small = 1.0 if first.recipe.small == 1 else 0.0
        # plain steps: LARS would scale each layer's gradient, which no score models
        recipe = replace(first.recipe, optimizer="sgd", lr=self.continued_lr, small=small)
        return first.model_copy(
            update={
                "start": first,
                "data": self.scored(),
                "recipe": recipe,
                "epochs": self.continued_epochs,
                "batch_size": self.continued_batch or first.batch_size,
                "seed": self.seed + CONTINUED + seed,
                "without": without,
                "gaps": gaps,
                "snapshots": None,
            }
        )

    def query_data(self) -> Data:
        return self.data("test", first=self.queries)

    def cross(self, first: Pretrain, curvature: Curvature | None = None) -> Cross:
        """Cross-influence of the scored images on the queries under an encoder."""
        return Cross(
            pretrain=first,
            data=self.scored(),
            query=self.query_data(),
            perturbation=self.noise,
            curvature=curvature or self.curvature,
            seed=self.noise_seed,
            draws=self.draws,
        )

    def nearness(self, first: Pretrain) -> Nearness:
        """Cosine similarity of the scored images and the queries under an encoder."""
        return Nearness(
            train=self.features(first, self.scored()), query=self.features(first, self.query_data())
        )

    def measured(self, encoder: Pretrain, kind: Kind, channel: Channel) -> dict[str, Any]:
        """The fields of a stage that measures this retrained encoder."""
        if channel == "BatchNorm alone":
            return {"pretrain": encoder.start, "statistics": encoder}
        if channel == "as trained":
            return {"pretrain": encoder}
        held = (
            {"statistics": encoder.start} if kind == "continued" else {"estimated": self.scored()}
        )
        return {"pretrain": encoder, **held}

    def losses(self, data: Data, **measured: Any) -> Stability:
        """Stability losses with noise that no score has seen."""
        return Stability(
            **measured, data=data, perturbation=self.noise, seed=MEASURED, draws=self.draws
        )

    def query_losses(self, **measured: Any) -> Stability:
        return self.losses(self.query_data(), **measured)


class Validation(Retrained):
    """10_validation: does the score predict what retraining shows?"""

    notebook: ClassVar[str] = "10_validation"

    retraining: tuple[Kind, ...] = Field(get_args(Kind), min_length=1)
    images: int = Field(6, ge=4)  # left out one at a time, evenly over the ranks of the score
    subsets: int = Field(12, ge=4)
    share: float = Field(0.5, gt=0, lt=1)  # of the images, in a subset
    kinds: tuple[str, ...] = ("logra-pca", "ekfac", "diagonal", "exact")  # other curvatures
    points: int = Field(200, ge=20)  # images of the linear encoder

    ranks: ClassVar[tuple[int, ...]] = (4, 64)  # of LoGra, beside `rank`
    dampings: ClassVar[tuple[float, ...]] = (0.001, 10.0)  # beside `damping`

    def curvatures(self) -> dict[str, Curvature]:
        """The curvatures by name; the first is the paper's."""
        usual = self.curvature
        found: dict[str, Curvature] = {f"LoGra, rank {self.rank}": usual}
        found |= {f"LoGra, rank {r}": replace(usual, rank=r) for r in self.ranks}
        names = {"logra-pca": "LoGra, PCA", "ekfac": "EK-FAC"}
        for kind in self.kinds:
            found[names.get(kind, kind)] = named_curvature(kind, self.rank, self.damping)
        found |= {f"λ = {d:g} × mean": replace(usual, damping=d) for d in self.dampings}
        return found | {"none (identity)": Identity()}

    def tables(self) -> dict[str, Cells]:
        known = self.encoders_of((self.method,))
        trained = {e: self.training(self.method, e) for e in range(self.encoders)}
        scores = {e: self.influence(first, draws=self.draws) for e, first in trained.items()}
        last = self.images - 1
        picks: dict[Labels, Pick] = {
            (e, i): Pick(influence=scores[e], quantile=i / last)
            for e, i in product(trained, range(self.images))
        }
        draws = {
            k: Draw(data=self.scored(), share=1 - self.share, seed=k) for k in range(self.subsets)
        }
        on_queries: dict[Labels, Pairs] = {}
        subsets: dict[Labels, Stage] = {}
        alone: dict[Labels, dict[str, Any]] = {}
        for e, first in trained.items():
            for name, curvature in self.curvatures().items():
                on_queries[e, name] = self.cross(first, curvature)
            on_queries[e, SIMILARITY] = self.nearness(first)
            for kind, s in product(self.retraining, range(self.seeds)):
                for channel, (k, draw) in product(self.channels(kind), draws.items()):
                    encoder = self.retrained(kind, s, first, draw)
                    how = self.measured(encoder, kind, channel)
                    subsets[e, kind, channel, s, k] = self.query_losses(**how)
                for i in (ALL, *range(self.images)):
                    # its place in its batch stays empty, so the other batches are the same
                    encoder = self.retrained(kind, s, first, picks.get((e, i)), i != ALL)
                    alone[e, kind, s, i] = self.measured(encoder, kind, "BatchNorm held")
        data, each = self.scored(), "encoder kind seed without"
        features: dict[Labels, Stage] = {k: Embed(**how, data=data) for k, how in alone.items()}
        before: dict[Labels, Stage] = {
            (e,): self.query_losses(pretrain=first) for e, first in trained.items()
        }
        return {
            "scores": Cells("encoder", {(e,): stage for e, stage in scores.items()}),
            "accuracy": under(known, self.evaluation),
            "on queries": Cells("encoder score", on_queries),
            "query losses": Cells("encoder", before),
            "picked": Cells("encoder without", picks),
            "left out": Cells("subset", {(k,): draw for k, draw in draws.items()}),
            "after subsets": Cells("encoder kind channel seed subset", subsets),
            "own losses": Cells(each, {k: self.losses(data, **how) for k, how in alone.items()}),
            "own features": Cells(each, features),
        }


Task = Literal["classes", "style"]
Way = Literal["first", "second", "more"]


class Continual(Scored):
    """12_continual: an encoder learns a second task. Does influence predict which images of the
    first it forgets?"""

    notebook: ClassVar[str] = "12_continual"

    width: int = Field(4, ge=1)
    tasks: tuple[Task, ...] = ("classes", "style")
    classes: int = Field(5, ge=1)  # of the first task, the first ones; the second has the others
    drawn: int = Field(256, ge=32)  # scenes of each style
    legs: int = Field(2, ge=1)
    leg_epochs: int = Field(2, ge=1)
    seeds: int = Field(1, ge=1)
    neighbours: int = Field(10, ge=1)

    channels: ClassVar[tuple[Channel, ...]] = ("BatchNorm held", "as trained")  # the first decides

    def sets(self, task: Task, split: str = "train") -> tuple[Data, Data]:
        """The images of the first and of the second task."""
        if task == "style":
            n = self.drawn if split == "train" else self.n_test
            first, second = (Data(name="scenes", split=split, n=n, uniform=u) for u in (0.0, 1.0))
            return first, second
        labels = range(100)  # more than any set has
        old, new = labels[: self.classes], labels[self.classes :]
        return self.data(split, classes=old), self.data(split, classes=new)

    def encoder(self, task: Task, seed: int, way: Way = "first", leg: int = 0) -> Pretrain:
        """The encoder after the first task, or after `leg` further legs: on the second task, or
        more on the first."""
        old, new = self.sets(task)
        if way == "first":
            return self.training(number=seed, data=old)
        before = self.encoder(task, seed) if leg == 1 else self.encoder(task, seed, way, leg - 1)
        return before.model_copy(
            update={
                "data": new if way == "second" else old,
                "start": before,
                "epochs": self.leg_epochs,
                "snapshots": None,
                "seed": self.seed + seed + CONTINUED * leg,
            }
        )

    def accuracy(self, task: Task, encoder: Pretrain, on: Literal["old", "new"]) -> Evaluate:
        """Accuracy of an encoder on the first or the second task."""
        at = 0 if on == "old" else 1
        return self.evaluation(encoder, self.sets(task)[at], self.sets(task, "test")[at])

    def tables(self) -> dict[str, Cells]:
        ways: tuple[Way, ...] = ("second", "more")
        path: list[tuple[Way, int]] = [("first", 0), *product(ways, range(1, self.legs + 1))]
        scores: dict[Labels, Stage] = {}
        features: dict[Labels, Stage] = {}
        hits: dict[Labels, Stage] = {}
        learned: dict[str, Cells] = {}
        for task, s, (way, leg) in product(self.tasks, range(self.seeds), path):
            at, old = (task, s, way, leg), self.sets(task)[0]
            encoder = self.encoder(task, s, way, leg)
            scores[at] = self.influence(encoder, data=old)
            for channel in self.channels:
                held = self.encoder(task, s) if leg and channel == "BatchNorm held" else None
                features[*at, channel] = Embed(pretrain=encoder, data=old, statistics=held)
            hits[*at, "old"] = self.accuracy(task, encoder, "old")
            hits[*at, "new"] = self.accuracy(task, encoder, "new")
        for task in self.tasks:
            fresh = self.untrained(self.encoder(task, 0))
            firsts: dict[Labels, Stage] = {
                (self.method, s): hits[task, s, "first", 0, "old"] for s in range(self.seeds)
            }
            firsts[UNTRAINED, 0] = self.accuracy(task, fresh, "old")
            learned[f"accuracy on {task}"] = Cells(BY, firsts)
        columns = "task seed way leg"
        return {
            "scores": Cells(columns, scores),
            "features": Cells(f"{columns} channel", features),
            "hits": Cells(f"{columns} on", hits),
            **learned,
        }


class Explained(Readable):
    """13_explained: how much of the score do simple statistics explain?"""

    notebook: ClassVar[str] = "13_explained"

    neighbours: int = Field(10, ge=1)

    def tables(self) -> dict[str, Cells]:
        known = self.encoders_of(self.methods)
        scores: dict[Labels, Influence] = {
            (*labels, noise): self.influence(encoder, noise)
            for labels, encoder in known.items()
            for noise in range(2)
        }
        geometry = {k: self.geometry(e, self.neighbours) for k, e in known.items()}
        explained: dict[Labels, Stage] = {
            k: ExplainedBy(
                scores=(scores[*k, 0], scores[*k, 1]),
                pixels=self.pixels(),
                geometry=geometry[k],
                seed=self.seed,
            )
            for k in known
        }
        return {
            "scores": Cells(f"{BY} noise", scores),
            "pixels": Cells("set", {(self.dataset,): self.pixels()}),
            "geometry": Cells(BY, geometry),
            "explained": Cells(BY, explained),
            "accuracy": under(known, self.evaluation),
        }


class Bridges(Readable):
    """14_bridges: do images of high influence hold the classes together? Does rarity raise a
    background's influence?"""

    notebook: ClassVar[str] = "14_bridges"

    neighbours: int = Field(10, ge=1)
    shares: tuple[float, ...] = (0.05, 0.1)
    draws: int = Field(40, ge=20)  # removals at random
    # shares of uniform backgrounds in training
    doses: tuple[float, ...] = Field((0.1, 0.5, 0.9), min_length=3)
    drawn: int = Field(512, ge=32)
    drawn_epochs: int = Field(4, ge=1)
    dose_seeds: int = Field(1, ge=1)

    @property
    def trained_doses(self) -> tuple[float, ...]:
        """The doses for which encoders are trained: none where encoders are given."""
        return () if self.checkpoints else self.doses

    def dose(self, share: float) -> Data:
        """Scenes of which this share has a uniform background; all else is the same at every
        share."""
        return Data(name="scenes", n=self.drawn, uniform=share)

    def dose_encoder(self, share: float, seed: int) -> Pretrain:
        """The first method, trained on these scenes."""
        changes = {"data": self.dose(share), "epochs": self.drawn_epochs, "snapshots": None}
        return self.training(self.methods[0], seed, **changes)

    def removals(self, encoder: Pretrain | Given, labels: Labels, share: float) -> Removals:
        """What classes gain without this share of the images; the untrained network gets no
        probe."""
        trained = labels[0] != UNTRAINED
        return Removals(
            influence=self.influence(encoder),
            betweenness=self.betweenness(encoder, self.neighbours),
            test=self.features(encoder, self.data("test")) if trained else None,
            share=share,
            draws=self.draws,
            seed=self.seed + int(labels[1]),
        )

    def tables(self) -> dict[str, Cells]:
        known, who = self.encoders_of(self.methods), self.methods[0]
        of_each: dict[Labels, AnyEncoder] = {(m, 0): known[m, 0] for m in self.methods}
        removals: dict[Labels, Stage] = {
            (*labels, share): self.removals(encoder, labels, share)
            for (labels, encoder), share in product(known.items(), self.shares)
        }
        drawn: dict[Labels, Pretrain] = {
            dose: self.dose_encoder(*dose)
            for dose in product(self.trained_doses, range(self.dose_seeds))
        }
        on_scenes: dict[Labels, Pretrain] = {(who, k): e for k, e in enumerate(drawn.values())}
        if drawn:
            on_scenes[UNTRAINED, 0] = self.untrained(on_scenes[who, 0])
        # on scenes with the usual backgrounds
        test = Data(name="scenes", split="test", n=self.n_test)
        hits = {labels: self.evaluation(e, e.data, test) for labels, e in on_scenes.items()}
        return {
            **self.scored_and_evaluated(known),
            "images": Cells("part", {(0,): Known(data=self.data())}),
            "removals": Cells(f"{BY} share", removals),
            "map": Cells(
                BY, {(who, 0): Map(features=self.features(known[who, 0]), seed=self.seed)}
            ),
            "geometry": under(of_each, lambda e: self.geometry(e, self.neighbours)),
            "betweenness": under(of_each, lambda e: self.betweenness(e, self.neighbours)),
            "bottlenecks": under(
                of_each, lambda e: Bottlenecks(neighbours=self.nearest(e, self.neighbours))
            ),
            "scenes": Cells("share", {(s,): Known(data=self.dose(s)) for s in self.trained_doses}),
            "doses": Cells(
                "share seed", {dose: self.influence(e, data=e.data) for dose, e in drawn.items()}
            ),
            "accuracy on scenes": Cells(BY, hits),
        }


class Taught(Retrained):
    """15_taught: which training images taught the encoder about this test image? By influence, by
    the derivative of the training itself, and by similarity."""

    notebook: ClassVar[str] = "15_taught"

    # whole learners are kept: training goes on from them
    snapshots: Snapshots = 1
    retraining: tuple[Kind, ...] = Field(get_args(Kind), min_length=1)
    asked: int = Field(3, ge=2)  # how many queries are retrained for: the first ones
    share: float = Field(0.1, gt=0, lt=1)  # of the scored images, removed for a query
    drawn: int = Field(3, ge=2)  # removals at random
    shown: int = Field(3, ge=1)
    top: int = Field(6, ge=1)

    @property
    def k(self) -> int:
        """How many images are removed."""
        return max(1, round(self.share * min(self.n, self.candidates or self.n)))

    def asked_data(self) -> Data:
        """The queries that are retrained for."""
        return self.data("test", first=self.asked)

    def effect(self, first: Pretrain) -> ThroughTraining:
        """What each image did to the stability losses of the asked queries in one more continued
        training."""
        return ThroughTraining(
            run=self.retrained("continued", self.seeds, first),
            query=self.asked_data(),
            perturbation=self.noise,
            seed=self.noise_seed,
            draws=self.draws,
        )

    def scores(self, first: Pretrain) -> dict[str, Cross | ThroughTraining | Nearness]:
        """A number for each query and training image, by the name of the lists that it gives."""
        return {
            "influence": self.cross(first),
            "effect": self.effect(first),
            "nearest": self.nearness(first),
        }

    def removals(self, first: Pretrain) -> dict[Labels, Draw | Top]:
        """The images that are removed, by the name of the list and its query; also random sets of
        as many images, by number."""
        found: dict[Labels, Draw | Top] = {
            (which, query): Top(scores=scores, query=query, k=self.k)
            for which, scores in self.scores(first).items()
            for query in range(self.asked)
        }
        for number in range(self.drawn):
            found["random", number] = Draw(data=self.scored(), share=self.share, seed=number)
        return found

    def tables(self) -> dict[str, Cells]:
        of: dict[str, dict[Labels, Stage]] = {name: {} for name in ("scores", "losses", "features")}
        for e in range(self.encoders):
            first = self.training(self.method, e)
            removals = self.removals(first)
            of["scores"] |= {(e, name): stage for name, stage in self.scores(first).items()}
            for kind, s in product(self.retraining, range(self.seeds)):
                for channel, key in product(self.channels(kind), [("none", ALL), *removals]):
                    encoder = self.retrained(kind, s, first, removals.get(key))
                    how = self.measured(encoder, kind, channel)
                    of["losses"][e, kind, channel, s, *key] = self.query_losses(**how)
                    of["features"][e, kind, channel, s, *key] = Embed(**how, data=self.query_data())
        each = "encoder kind channel seed removed number"
        return {
            "accuracy": under(self.encoders_of((self.method,)), self.evaluation),
            "scores": Cells("encoder score", of["scores"]),
            "losses": Cells(each, of["losses"]),
            "features": Cells(each, of["features"]),
        }


class TrainingAware(Retrained):
    """16_training_aware: what did training learn from an image? The derivative of the training
    itself, and how much the scores tell about it.

    runs         how many times the encoder continues training, with other order and views each time
    small_views  use views of half the side, as in most of its training, at a quarter of the cost
    removals     how many random subsets are left out of the first run, by their share of the images
    probes       how many of those of `probed` are left out of the other runs, too
    unseen       how many test images, the first ones, the means are over
    own          how many training images are asked about themselves, evenly over the ranks of the
                 score
    copies       how many copies of such an image are trained on, itself counted
    rates        other learning rates of the first run, to see where it stops being predictable
    batches      other batch sizes of it, for the same purpose
    lengths      other numbers of epochs of it, for the same purpose
    early        start the run at the earliest kept state of the training, for the same purpose
    fresh        epochs of a training from fresh weights, for the same purpose
    whole        runs of one epoch over all images that the encoder was trained on
    """

    notebook: ClassVar[str] = "16_training_aware"

    methods: tuple[recipes.Method, ...] = recipes.SSL
    queries: int = Field(6, ge=2)
    draws: int = Field(2, ge=1)
    candidates: int | None = Field(96, ge=16)
    # whole learners are kept: training goes on from them
    snapshots: Snapshots = 1
    continued_epochs: int = Field(2, ge=1)
    continued_batch: int | None = Field(32, ge=3)
    small_views: bool = True
    runs: int = Field(2, ge=2)
    removals: dict[float, Annotated[int, Field(ge=3)]] = Field({0.01: 4, 0.05: 6, 0.5: 4})
    probes: int = Field(6, ge=3)
    unseen: int = Field(32, ge=4)
    own: int = Field(6, ge=4)
    copies: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 8)
    rates: tuple[float, ...] = (0.4,)
    batches: tuple[Annotated[int, Field(ge=3)], ...] = ()
    lengths: tuple[Epochs, ...] = ()
    early: bool = False
    fresh: int = Field(1, ge=1)
    whole: int = Field(2, ge=2)

    top: ClassVar[float] = 0.05  # of the images, removed by their score
    probed: ClassVar[float] = 0.05  # the share of the removals by which runs are compared

    @model_validator(mode="after")
    def _runs_are_compared(self) -> TrainingAware:
        if self.removals.get(self.probed, 0) < self.probes:
            raise ValueError(
                f"removals = {self.removals}: runs are compared at {self.probed} by {self.probes} "
                "sets (probes); add them"
            )
        return self

    def continued(self, first: Pretrain, run: int, **changes: Any) -> Pretrain:
        """The encoder's training, continued; `changes` are fields of its recipe."""
        found = self.retrained("continued", run, first)
        small = 1.0 if self.small_views else found.recipe.small
        recipe = replace(found.recipe, small=small, **changes)
        return found.model_copy(update={"recipe": recipe})

    def over_all(self, first: Pretrain, run: int) -> Pretrain:
        """The encoder's training, continued for one epoch of all its images."""
        found = in_batches(self.continued(first, run), first.batch_size)
        return found.model_copy(update={"data": first.data, "epochs": 1})

    def asked_of(self, run: Pretrain, asked: Asked, **more: Any) -> dict[str, Any]:
        """The fields of a stage that measures the encoder after this training."""
        query = self.data("test", first=self.unseen if asked == "unseen" else self.queries)
        noise = {"perturbation": self.noise, "seed": MEASURED, "draws": self.draws}
        return {"run": run, "query": query, "asked": asked, **noise, **more}

    def random(self, share: float, count: int) -> tuple[Draw, ...]:
        """Random sets of this share of the scored images."""
        return tuple(Draw(data=self.scored(), share=share, seed=k) for k in range(count))

    def score(self, first: Pretrain, output: Output = "features") -> Influence:
        """The paper's score of the scored images, under the curvature of all that the encoder was
        trained on."""
        others = None if self.candidates is None else self.scored()
        return self.influence(first, others=others, draws=self.draws, output=output)

    def known(self, first: Pretrain) -> dict[str, Stage]:
        """What else is known about each image."""
        return {
            "nearest": Neighbours(features=self.features(first, self.scored()), k=1),
            "projector": self.score(first, "projector"),
            "cross-influence": self.cross(first),
            "similarity": self.nearness(first),
        }

    def variants(self, first: Pretrain) -> dict[str, Pretrain]:
        """The first run at other rates, in other batches, longer, and from earlier weights."""
        run = self.continued(first, 0)
        found = {f"learning rate {self.continued_lr:g}": run}
        for rate in self.rates:
            found[f"learning rate {rate:g}"] = self.continued(first, 0, lr=rate)
        for size in self.batches:
            found[f"batches of {size}"] = in_batches(run, size)
        for epochs in self.lengths:
            found[f"{epochs} epochs"] = run.model_copy(update={"epochs": epochs})
        if self.early and first.snapshots:
            after = first.snapshots[0]
            name = f"after {after} of {first.epochs} epochs"
            found[name] = run.model_copy(update={"start_after": after})
        fresh = {"data": run.data, "epochs": self.fresh, "batch_size": run.batch_size}
        return found | {"fresh weights": first.model_copy(update={**fresh, "snapshots": None})}

    def tables(self) -> dict[str, Cells]:
        names = (
            *("scores", "known", "picked", "each", "unseen", "own", "removed", "tops", "copied"),
            *("everyone", "whole", "variants", "variants_removed"),
        )
        of: dict[str, dict[Labels, Stage]] = {name: {} for name in names}
        probes = self.random(self.probed, self.probes)
        for m, e in product(self.methods, range(self.encoders)):
            first, who = self.training(m, e), (m, e)
            scores = of["scores"][who] = self.score(first)
            of["known"] |= {(*who, k): stage for k, stage in self.known(first).items()}
            picked = Spread(influence=scores, count=self.own)
            of["picked"][who] = picked
            for r in range(self.runs):
                run = self.continued(first, r)
                for asked in get_args(Asked):
                    fields = self.asked_of(run, asked, picked=picked if asked == "own" else None)
                    of[asked][*who, r] = ThroughTraining(**fields)
                if r:  # measured under the order and views of this run; the first: below
                    of["removed"][*who, r, self.probed] = Without(
                        **self.asked_of(run, "each"), left_out=probes
                    )
            of["everyone"][who] = self.influence(first)
            for r in range(self.whole):
                fields = self.asked_of(self.over_all(first, r), "unseen")
                of["whole"][*who, r] = ThroughTraining(**fields)
            run = self.continued(first, 0)
            for share, count in self.removals.items():
                of["removed"][*who, 0, share] = Without(
                    **self.asked_of(run, "each"), left_out=self.random(share, count)
                )
            top = Prune(influence=scores, which="top", share=self.top)
            flat = Prune(influence=scores, which="top flat", share=self.top)
            of["tops"][who] = Without(
                **self.asked_of(run, "unseen"), left_out=(top, flat, *self.random(self.top, 3))
            )
            if e == 0:
                fields = self.asked_of(run, "own", picked=picked)
                of["copied"][who] = CopiesTrainedOn(**fields, copies=self.copies)
                for name, variant in self.variants(first).items():
                    fields = self.asked_of(variant, "each")
                    of["variants"][m, name] = ThroughTraining(**fields)
                    of["variants_removed"][m, name] = Without(**fields, left_out=probes)
        columns = {"known": f"{BY} about", "removed": f"{BY} run share"}
        columns |= dict.fromkeys(("each", "unseen", "own", "whole"), f"{BY} run")
        columns |= dict.fromkeys(("variants", "variants_removed"), "method variant")
        return {
            "accuracy": under(self.encoders_of(self.methods), self.evaluation),
            "pixels": Cells("set", {(self.dataset,): Pixels(data=self.scored())}),
            **{name: Cells(columns.get(name, BY), stages) for name, stages in of.items()},
        }


def in_batches(run: Pretrain, size: int) -> Pretrain:
    """The training in batches of another size, with steps of the same learning rate."""
    recipe = replace(run.recipe, lr=run.recipe.lr * run.batch_size / size)
    return run.model_copy(update={"batch_size": size, "recipe": recipe})


class Derivation(Plan):
    """17_derivation: where the formula comes from, on a network small enough for every derivative.

    pool, hidden, outputs   the network: images averaged to pool × pool, `hidden` tanh units,
                            `outputs` features
    anchor                  a of the term a/2 ‖θ − θ₀‖² that holds the weights near their start
    steps                   the most steps of gradient descent before a training is stopped early
    """

    notebook: ClassVar[str] = "17_derivation"
    takes_checkpoints: ClassVar[bool] = True

    images: int = Field(48, ge=12)
    pool: int = Field(4, ge=2)
    hidden: int = Field(5, ge=2)
    outputs: int = Field(5, ge=2)
    anchor: float = Field(0.1, gt=0)
    damping: float = Field(0.1, gt=0)
    steps: int = Field(1000, ge=3)

    def network(self) -> nn.Sequential:
        """Random weights, in double precision; pooling, normalisation and flattening come before
        the first of them. The biases keep features away from 0, where the cosine has no
        derivative."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            net = nn.Sequential(
                nn.AdaptiveAvgPool2d(self.pool),
                Normalize(),
                nn.Flatten(),
                nn.Linear(3 * self.pool**2, self.hidden),
                nn.Tanh(),
                nn.Linear(self.hidden, self.outputs),
            ).double()
        for name in ("3.weight", "5.weight"):
            net.get_parameter(name).data *= 2  # far from 0, too
        return net.eval().requires_grad_(False)


class Objectives(Scored):
    """18_objectives: what the SSL objectives see, and whether following them makes features stable.

    methods          the objectives that are compared, at the weights of the first one
    batch            how many images, the first ones, have their projections examined
    gradient_batch   how many images are in each of the `gradient_draws` batches whose gradients are
                     compared
    asked            how many test images are followed along the trainings, with `draws` noise draws
    """

    notebook: ClassVar[str] = "18_objectives"

    methods: tuple[recipes.Method, ...] = recipes.SSL
    n: int = Field(256, ge=32)
    width: int = Field(4, ge=1)
    epochs: Epochs | dict[recipes.Method, Epochs] = 12
    snapshots: int = Field(5, ge=1)
    batch: int = Field(16, ge=3)
    gradient_batch: int = Field(32, ge=3)
    gradient_draws: int = Field(3, ge=2)
    asked: int = Field(100, ge=8)
    draws: int = Field(2, ge=1)

    measured_seed: ClassVar[int] = MEASURED

    def asked_data(self) -> Data:
        """The test images that are followed."""
        return self.data("test", first=min(self.asked, self.n_test))

    def states(self, method: recipes.Method) -> tuple[int, ...]:
        """The numbers of epochs after which the learner is kept, the end included."""
        run = self.training(method)
        return (*(run.snapshots or ()), run.epochs)

    def moments(self, method: recipes.Method) -> dict[str, int]:
        """The numbers of epochs after which gradients are compared, in words."""
        kept = self.states(method)
        return {"before": 0, "half way": kept[len(kept) // 2 - 1], "at the end": kept[-1]}

    def tables(self) -> dict[str, Cells]:
        followed = (*self.methods, "supervised")
        return {"trainings": Cells("method", {(m,): self.training(m) for m in followed})}

    def learner(self, method: recipes.Method, done: int) -> Learner:
        """What a method trains, after `done` epochs. BatchNorm's statistics are estimated on these
        images at every state. Running averages over a few steps would still contain their initial
        values, and the states could not be compared."""
        stage, images = self.training(method), self.training_set
        if done:
            found = stage.learner(self.store, done)
        else:
            classes = int(images.require_labels().max()) + 1 if method == "supervised" else None
            found = Learner(stage.recipe, self.width, classes, stage.seed)
        estimate_statistics(found.encoder.backbone, images, stage.recipe.view_a)
        return found


class Multiverse(Scored):
    """19_multiverse: on which of the choices that the paper leaves open does each answer depend?

    scored                      how many images, the first ones, are scored; None: all
    ranks, dampings, averaged, others
                                what is varied, one at a time, from each of the four readings
    copies                      how many copies of an image are added, at each of `copied_ranks` and
                                among each of the `copied_among` numbers of images
    """

    notebook: ClassVar[str] = "19_multiverse"

    methods: tuple[recipes.Method, ...] = ("simclr",)
    scored: int | None = Field(None, ge=16)
    ranks: tuple[int, ...] = (4, 64)
    dampings: tuple[float, ...] = (0.01, 1.0)
    averaged: int = Field(4, ge=2)
    others: tuple[Other, ...] = ()
    copies: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    copied_ranks: tuple[int, ...] = (4, 16)
    copied_among: tuple[int, ...] = (128, 512)

    def variations(self, unit: Unit) -> dict[str, dict[str, Any]]:
        """What is varied beside the reading: the fields of a score that change, by name."""
        pca = LoGra(self.rank, self.damping, projection="pca")
        others: dict[Other, dict[str, Any]] = {
            "PCA": {"curvature": pca},
            "EK-FAC": {"curvature": EKFAC(self.damping)},
            "first convolution": {"layers": "first convolution"},
            "last block": {"layers": "last block"},
            "clipped": {"perturbation": noise_in(unit, self.mean, self.std, ClippedNoise)},
        }
        return {
            "as stated": {},
            **{f"rank {r}": {"curvature": LoGra(r, self.damping)} for r in self.ranks},
            **{f"damping {d:g}": {"curvature": LoGra(self.rank, d)} for d in self.dampings},
            "no curvature": {"curvature": Identity()},
            f"{self.averaged} draws": {"draws": self.averaged},
            **{other: others[other] for other in self.others},
        }

    def tables(self) -> dict[str, Cells]:
        known, images = self.encoders_of(self.methods), self.data(first=self.scored)
        scores: dict[Labels, Stage] = {}
        for (labels, encoder), output, unit in product(
            known.items(), get_args(Output), get_args(Unit)
        ):
            noise = noise_in(unit, self.mean, self.std)
            stated = {"data": images, "output": output, "perturbation": noise}
            for varied, changes in self.variations(unit).items():
                scores[*labels, output, unit, varied] = self.influence(encoder, **stated | changes)
        first = {k: e for k, e in known.items() if k[1] == 0}
        copies: dict[Labels, Stage] = {
            (*labels, output, rank, among): CopiesDiscount(
                pretrain=encoder,
                data=self.data(first=among if among < self.n else None),
                perturbation=self.noise,
                curvature=LoGra(rank, self.damping),
                output=output,
                copies=self.copies,
            )
            for labels, encoder in first.items()
            for output, rank, among in product(
                get_args(Output), self.copied_ranks, self.copied_among
            )
        }
        return {
            "images": Cells("part", {(0,): Known(data=images)}),
            "pixels": Cells("set", {(self.dataset,): Pixels(data=images)}),
            "scores": Cells(f"{BY} output unit varied", scores),
            "copies": Cells(f"{BY} output rank among", copies),
        }


class BetterEncoders(Scored):
    """20_better_encoders: do the answers stay the same as encoders get better?

    snapshots   of the first encoder of each method; the last state is the encoder itself
    widths      of further encoders, beside `width`
    outputs, units   the readings of the score
    """

    notebook: ClassVar[str] = "20_better_encoders"

    methods: tuple[recipes.Method, ...] = ("simclr",)
    encoders: int = Field(2, ge=2)
    snapshots: Snapshots = 3
    widths: tuple[int, ...] = (4,)
    outputs: tuple[Output, ...] = get_args(Output)
    units: tuple[Unit, ...] = ("range",)
    neighbours: int = Field(10, ge=1)

    papers: ClassVar[float] = 0.9  # roughly the kNN accuracy of encoders like the paper's

    def states(self) -> dict[Labels, AnyEncoder]:
        """Encoders by method, width, epochs trained and number: all states of the first one, the
        final state of the others, and the untrained network of each width."""
        found: dict[Labels, AnyEncoder] = {}
        for method, k in product(self.methods, range(self.encoders)):
            run = self.training(method, k)
            for after in run.snapshots or () if k == 0 else ():
                found[method, self.width, after, k] = State(run=run, after=after)
            for width in (self.width, *self.widths):
                other = run.model_copy(update={"width": width, "snapshots": None})
                found[method, width, run.epochs, k] = run if width == self.width else other
        for width in (self.width, *self.widths):
            first = self.training(self.methods[0], width=width)
            found[UNTRAINED, width, 0, 0] = self.untrained(first)
        return found

    def tables(self) -> dict[str, Cells]:
        states, of = self.states(), "method width epochs encoder"
        first = {labels: state for labels, state in states.items() if labels[3] == 0}
        scores: dict[Labels, Stage] = {
            (*labels, output, unit, noise): self.influence(
                state, noise, output=output, perturbation=noise_in(unit, self.mean, self.std)
            )
            for labels, state in states.items()
            for output, unit in product(self.outputs, self.units)
            # two trainings are compared under noises of their own
            for noise in ((0, 1) if labels in first else (int(labels[3]),))
        }
        return {
            "images": Cells("part", {(0,): Known(data=self.data())}),
            "scores": Cells(f"{of} output unit noise", scores),
            "reached": under(states, self.evaluation, of),
            "geometry": under(first, lambda state: self.geometry(state, self.neighbours), of),
        }


OWN: tuple[type[Plan], ...] = (
    Validation,
    Continual,
    Explained,
    Bridges,
    Taught,
    TrainingAware,
    Derivation,
    Objectives,
    Multiverse,
    BetterEncoders,
)
