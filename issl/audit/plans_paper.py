"""The plans of the notebooks about the paper's own results, one class each; see `plan` for what
they share."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from issl.audit.cache import Stage
from issl.audit.claims import Learned
from issl.audit.data import human_choices
from issl.audit.plan import BY, UNTRAINED, Cells, Labels, Plan, Readable, under
from issl.audit.settings import Data, Injection
from issl.audit.stages import (
    AnyEncoder,
    Choice,
    Influence,
    Pretrain,
    Prune,
    Removed,
    Stability,
    Thin,
)
from issl.audit.table_stages import (
    Ablation,
    Ambiguity,
    Closeness,
    FlatBridges,
    Oddness,
    RelatedBridges,
    Thumbnails,
)
from issl.influence.perturbation import Augmentation, GaussianNoise
from issl.pretraining import recipes


class MethodLesson(Plan):
    """00_method: the score step by step on a few images."""

    notebook: ClassVar[str] = "00_method"

    images: int = Field(48, ge=8)
    one: int = Field(0, ge=0)  # the position of the image that is followed
    rank: int = Field(16, ge=1)
    damping: float = Field(0.1, gt=0)

    def tables(self) -> dict[str, Cells]:
        return {"encoder": Cells("method", {(self.method,): self.pretrain()})}


class SeedCorrelation(Readable):
    """01_seed_correlation: do scores agree between two seeds of the noise, and of the training?

    noise_seeds   how many noise seeds every encoder is scored under
    draws         how many noise draws are averaged, for the first `averaged` images only
    """

    notebook: ClassVar[str] = "01_seed_correlation"

    encoders: int = Field(2, ge=1)
    noise_seeds: int = Field(2, ge=2)
    draws: tuple[int, ...] = Field((1, 4), min_length=1)
    averaged: int = Field(128, ge=16)

    @model_validator(mode="after")
    def _two_trainings_to_compare(self) -> SeedCorrelation:
        if self.encoders < 2 and not self.checkpoints:
            raise ValueError(f"encoders = {self.encoders}: give two or more, they are compared")
        return self

    def tables(self) -> dict[str, Cells]:
        known = self.encoders_of(self.methods)
        first = self.data(first=self.averaged)
        scores: dict[Labels, Stage] = {
            (method, k, noise): self.influence(encoder, noise)
            for (method, k), encoder in known.items()
            for noise in sorted({*range(self.noise_seeds), int(k)})  # encoder k has noise k, too
        }
        averaged: dict[Labels, Stage] = {
            (method, draws, k, noise): self.influence(encoder, noise, data=first, draws=draws)
            for (method, k), encoder in known.items()
            if method != UNTRAINED
            for draws in self.draws
            for noise in (0, int(k) or 1)
        }
        return {
            "scores": Cells(f"{BY} noise", scores),
            "averaged": Cells("method draws encoder noise", averaged),
            "accuracy": under(known, self.evaluation),
        }


AUGMENTATIONS = ("crop", "flip", "jitter", "blur", "grayscale", "chain")


class AugmentationAblation(Readable):
    """02_augmentation_ablation: is Gaussian noise the most stable perturbation?

    sigmas    of Gaussian noise with the paper's mean, which is the same shift under every seed
    centred   sigmas of Gaussian noise with mean 0, to compare with augmentations of equal strength
    """

    notebook: ClassVar[str] = "02_augmentation_ablation"

    methods: tuple[recipes.Method, ...] = ("simclr",)
    scored: int = Field(128, ge=16)
    sigmas: tuple[float, ...] = (0.05, 0.2, 0.4)
    centred: tuple[float, ...] = Field((0.02, 0.1, 0.4), min_length=2)
    strengths: tuple[float, ...] = (1.0,)  # 1 must be among them
    draws: tuple[int, ...] = Field((1, 4), min_length=1)

    @property
    def usual(self) -> str:
        """The name of the paper's perturbation."""
        return f"noise {self.std:g}"

    def perturbations(self) -> dict[str, GaussianNoise | Augmentation]:
        """Every perturbation by its name; for flip and grayscale the strength is the share of
        images changed."""
        found: dict[str, GaussianNoise | Augmentation] = {
            f"noise {s:g}": self.gaussian(self.mean, s) for s in self.sigmas
        }
        found |= {f"centred {s:g}": self.gaussian(0.0, s) for s in self.centred}
        for kind in AUGMENTATIONS:
            for strength in self.strengths:
                usual = {"flip": 0.5, "grayscale": 0.2}.get(kind, 1.0)
                found[f"{kind} {strength:g}"] = Augmentation(kind, usual * strength)
        return found

    @property
    def at_full(self) -> list[str]:
        """The augmentations at strength 1."""
        return [f"{kind} 1" for kind in AUGMENTATIONS]

    def draws_of(self, name: str, method: str) -> tuple[int, ...]:
        """The entries of `draws` to average: all for the paper's noise, the crop and the chain; the
        first and the last for the other augmentations at strength 1; else the first. The untrained
        network has only the first, for the paper's noise and all augmentations at strength 1."""
        if method == UNTRAINED:
            return self.draws[:1] if name in (self.usual, *self.at_full) else ()
        if name in (self.usual, "crop 1", "chain 1"):
            return self.draws
        return (self.draws[0], self.draws[-1]) if name in self.at_full else self.draws[:1]

    def under_each(self, method: str, encoder: AnyEncoder) -> Ablation:
        """Scores of an encoder's first images under every perturbation, each with two seeds."""
        first = self.data(first=self.scored)
        each = [
            (name, self.influence(encoder, seed, data=first, perturbation=how, draws=draws))
            for name, how in self.perturbations().items()
            for draws, seed in product(self.draws_of(name, method), range(2))
        ]
        return Ablation(names=[name for name, _ in each], scores=[score for _, score in each])

    def tables(self) -> dict[str, Cells]:
        known, first = self.encoders_of(self.methods), self.data(first=self.scored)
        return {
            "images": self.image_tables(first),
            "scores": Cells(BY, {at: self.under_each(str(at[0]), e) for at, e in known.items()}),
            "accuracy": under(known, self.evaluation),
        }


class BackgroundBias(Readable):
    """03_background_bias: do images of high influence have uniform backgrounds?"""

    notebook: ClassVar[str] = "03_background_bias"

    gallery: int = Field(24, ge=1)
    neighbours: int = Field(10, ge=1)
    drawn: int = Field(512, ge=16)
    drawn_epochs: int = Field(4, ge=1)
    swapped: int = Field(96, ge=16)

    def on_scenes(self) -> BackgroundBias:
        """The same plan on scenes; itself, where the data set is scenes."""
        world = {"dataset": "scenes", "n": self.drawn, "size": None, "epochs": self.drawn_epochs}
        changes = {**world, "snapshots": None, "methods": self.methods[:1]}
        return self if self.dataset == "scenes" else self.model_copy(update=changes)

    def tables(self) -> dict[str, Cells]:
        known, scenes = self.encoders_of(self.methods), self.on_scenes()
        drawn = scenes.encoders_of(self.methods[:1])
        swapped = under(drawn, lambda e: self.influence(e, data=self.swapped_scenes()))
        return {
            **self.scored_and_evaluated(known),
            "images": self.image_tables(None, *self.heads(self.methods, most=self.gallery)),
            "pixels": Cells("set", {(self.dataset,): self.pixels()}),
            "geometry": under(known, lambda e: self.geometry(e, self.neighbours)),
            "betweenness": under(known, lambda e: self.betweenness(e, self.neighbours)),
            "flat bridges": under(
                known,
                lambda e: FlatBridges(
                    neighbours=self.nearest(e, self.neighbours), pixels=self.pixels()
                ),
            ),
            "related bridges": under(
                known if self.dataset == "cifar100" else {},
                lambda e: RelatedBridges(neighbours=self.nearest(e, self.neighbours)),
            ),
            "swapped": swapped,
            "accuracy on scenes": under(drawn, scenes.evaluation),
        }

    def swapped_scenes(self) -> Data:
        """The same scenes on a texture, on white, on black and on one colour."""
        return Data(name="scenes-swapped", n=self.swapped)


class Duplicates(Readable):
    """04_duplicates: does low influence find duplicates?

    neighbours   how many are found for each image, the same as in 03; only the nearest one counts
    """

    notebook: ClassVar[str] = "04_duplicates"

    neighbours: int = Field(10, ge=1)

    def tables(self) -> dict[str, Cells]:
        known = self.encoders_of(self.methods)
        return {
            **self.scored_and_evaluated(known),
            "images": self.image_tables(None, *self.heads(self.methods)),
            "closeness": Cells("set", {(self.dataset,): Closeness(data=self.data())}),
            "geometry": under(known, lambda e: self.geometry(e, self.neighbours)),
        }


class Fairness(Readable):
    """05_fairness: does influence differ between groups of people, and rise in a group that is
    thinned?

    attributes   what makes groups
    thinned      the group (of the first attribute) that is thinned
    smallest     groups with fewer images inside, or fewer outside, are not tested
    """

    notebook: ClassVar[str] = "05_fairness"
    takes_checkpoints: ClassVar[bool] = False

    methods: tuple[recipes.Method, ...] = ("simclr",)
    attributes: tuple[str, ...] = Field(("group", "background"), min_length=1)
    thinned: str = "warm"
    keep: float = Field(0.1, gt=0, lt=1)
    seeds: int = Field(1, ge=1)
    smallest: int = Field(50, ge=2)

    def removal(self, seed: int, at_random: bool = False) -> Thin:
        """Most of the group, or as many images at random."""
        return Thin(
            data=self.data(),
            attribute=self.attributes[0],
            value=self.thinned,
            keep=self.keep,
            at_random=at_random,
            seed=seed,
        )

    def tables(self) -> dict[str, Cells]:
        known, seeds = self.encoders_of(self.methods), range(self.seeds)
        without: dict[Labels, AnyEncoder] = {
            (m, s, what): self.training(m, s, without=self.removal(s, what == "random"))
            for m, s, what in product(self.methods, seeds, ("group", "random"))
        }
        fresh = {(UNTRAINED, 0, "none"): known[UNTRAINED, 0]}
        labels = "method seed removed"
        return {
            "scores": under(known, self.influence),
            "accuracy": under(known, self.evaluation),
            "left out": Cells("seed", {(s,): self.removal(s) for s in seeds}),
            "scores without": under(without, self.influence, labels),
            "accuracy without": under(without | fresh, self.evaluation, labels),
        }


class Pruning(Readable):
    """06_pruning: does removing the images of highest influence improve what is learned?

    arms           what is removed. "random of class" removes as many of each class as "top" does,
                   since classes differ in influence. The "flat" arms take twice as many images,
                   those with the flattest frames, and remove half: "top flat" the half of higher
                   influence (the paper looks at uniform backgrounds of high influence), "random
                   flat" any half
    judges_epochs  epochs of the encoders that judge, which are many; None: as the scored encoder
    """

    notebook: ClassVar[str] = "06_pruning"
    takes_checkpoints: ClassVar[bool] = False

    methods: tuple[recipes.Method, ...] = ("simclr",)
    arms: tuple[Removed, ...] = ("top", "bottom", "random")
    shares: tuple[float, ...] = (0.2,)
    seeds: int = Field(2, ge=1)
    judges_epochs: int | None = Field(None, ge=1)

    @property
    def judges(self) -> range:
        """The seeds that are retrained: the one that was scored cannot judge what its own scores
        remove."""
        return range(self.seed + 1, self.seed + 1 + self.seeds)

    def judge(self, method: recipes.Method, seed: int, without: Choice | None = None) -> Pretrain:
        """An encoder of this seed, trained from scratch on all images or without the chosen
        ones."""
        changes: dict[str, Any] = {"seed": seed, "without": without}
        if self.judges_epochs is not None:
            changes |= {"epochs": self.judges_epochs, "snapshots": None}
        return self.training(method, **changes)

    def scores(self, method: recipes.Method) -> Influence:
        """Scores under the encoder of the first seed."""
        return self.influence(self.pretrain(method))

    def removal(self, method: recipes.Method, which: Removed, share: float, seed: int) -> Prune:
        drawn = which.startswith("random")
        return Prune(
            influence=self.scores(method), which=which, share=share, seed=seed if drawn else 0
        )

    def tables(self) -> dict[str, Cells]:
        each = list(product(self.methods, self.judges))
        kept: dict[Labels, AnyEncoder] = {(m, s): self.judge(m, s) for m, s in each}
        judges: dict[Labels, AnyEncoder] = {(m, "none", 0.0, s): kept[m, s] for m, s in each}
        for which, share, (m, s) in product(self.arms, self.shares, each):
            without = self.removal(m, which, share, s)
            judges[m, which, share, s] = self.judge(m, s, without)
        kept[UNTRAINED, 0] = self.untrained(self.judge(*each[0]))
        return {
            "accuracy": under(kept, self.evaluation),
            "runs": under(judges, self.evaluation, "method removed share seed"),
        }


class Outliers(Readable):
    """07_outliers: does high influence find atypical images?

    made_strange   the share of the test images that is replaced by strange ones (as `atypical` is
                   of training images)
    loss_draws     draws of the stability loss that influence is compared with: four cost less than
                   a score and its gradient
    """

    notebook: ClassVar[str] = "07_outliers"

    made_strange: float = Field(0.1, gt=0, le=0.5)
    loss_draws: int = Field(4, ge=1)

    gallery: ClassVar[int] = 32

    def new_images(self) -> Data:
        """Test images, some of them made strange: no encoder was trained on them."""
        return self.data("test", inject=Injection(atypical=self.made_strange))

    def asked(self, encoder: AnyEncoder) -> dict[str, Stage]:
        """What is measured on the new images under an encoder; influence uses the curvature of the
        training images."""
        new = self.new_images()
        loss: dict[str, Any] = {"perturbation": self.noise, "output": self.output}
        loss |= {"seed": self.noise_seed, "draws": self.loss_draws}
        return {
            "influence": self.influence(encoder, others=new),
            "losses": Stability(pretrain=encoder, data=new, **loss),
            "oddness": Oddness(
                features=self.features(encoder, new), seed=self.seed, train=self.features(encoder)
            ),
        }

    def tables(self) -> dict[str, Cells]:
        known, new = self.encoders_of(self.methods), self.new_images()
        scores = under(known, lambda e: self.asked(e)["influence"])
        first = tuple(s for (who, _), s in scores.stages.items() if who == self.methods[0])
        judged = under(known, lambda e: Ambiguity(**self.asked(e)))
        here = human_choices.missing(self.dataset, self.data_root) is None
        if not here and not all(map(self.store.has, judged.stages.values())):
            judged = Cells(BY, {})
        return {
            "images": self.image_tables(new, Thumbnails(data=new, scores=first, most=self.gallery)),
            "scores": scores,
            "losses": under(known, lambda e: self.asked(e)["losses"]),
            "oddness": under(known, lambda e: self.asked(e)["oddness"]),
            "ambiguity": judged,
            "accuracy": under(known, self.evaluation),
        }


REMOVED = ("top by ssl", "top by supervised", "random")  # what models are retrained without
EQUAL = "supervised, equal strength"  # supervised models under the weaker noise
ON_VIEWS = "supervised, SSL's views"  # … trained on the views of SSL, and scored as usual
CONTROLS = {EQUAL: "supervised_at_equal_strength", ON_VIEWS: "supervised_on_ssl_views"}


class SupervisedVsSSL(Readable):
    """08_supervised_vs_ssl: do supervised and self-supervised models depend on different images?

    encoders     trainings of each method; a supervised model is compared with pairs of these
    supervised   how many supervised models are scored, beside `encoders` of each method
    equal_std    a control: the standard deviation of a weaker noise, which turns a supervised
                 model's features as far as the usual noise turns an SSL encoder's; the supervised
                 models are scored under it, too
    on_views     a control: how many supervised models are trained on the first method's views
    seeds        how many seeds are retrained without the top `share` by either score; 0: none
    """

    notebook: ClassVar[str] = "08_supervised_vs_ssl"
    takes_checkpoints: ClassVar[bool] = False

    encoders: int = Field(2, ge=2)
    supervised: int = Field(1, ge=1)
    equal_std: float | None = Field(None, gt=0)
    on_views: int = Field(0, ge=0)
    share: float = Field(0.2, gt=0, lt=1)
    seeds: int = Field(2, ge=0)

    @property
    def trained(self) -> tuple[recipes.Method, recipes.Method]:
        """The two kinds of model that are retrained after pruning."""
        return self.methods[0], "supervised"

    @property
    def judges(self) -> range:
        """The seeds that are retrained, without the scored one."""
        return range(self.seed + 1, self.seed + 1 + self.seeds)

    def supervised_on_views(self) -> dict[Labels, AnyEncoder]:
        """Supervised models that are trained on the views of the first method."""
        ssl, usual = (recipes.recipe(m, self.recipe) for m in (self.methods[0], "supervised"))
        recipe = replace(usual, view_a=ssl.view_a, view_b=ssl.view_b)
        return {
            (ON_VIEWS, k): self.training("supervised", k, recipe=recipe)
            for k in range(self.on_views)
        }

    def cross_entropy_scores(self, encoder: AnyEncoder) -> Influence:
        """Scores by a supervised model's own loss."""
        still = GaussianNoise(0.0, 0.0)
        return self.influence(encoder, perturbation=still, loss="cross_entropy", output="features")

    def removal(self, removed: str, seed: int) -> Prune | None:
        """The top of one of the two scores, as many images at random, or none."""
        if removed == "none":
            return None
        ssl = self.influence(self.pretrain(self.methods[0]))
        if removed == "random":
            return Prune(influence=ssl, which="random", share=self.share, seed=seed)
        by_label = self.cross_entropy_scores(self.training("supervised"))
        by = ssl if removed == "top by ssl" else by_label
        return Prune(influence=by, which="top", share=self.share)

    def tables(self) -> dict[str, Cells]:
        known, on_views = self.encoders_of(self.methods), self.supervised_on_views()
        classifiers: dict[Labels, AnyEncoder] = {
            ("supervised", k): self.training("supervised", k) for k in range(self.supervised)
        }
        scores: dict[Labels, Influence] = {
            (*labels, noise): self.influence(encoder, noise)
            for labels, encoder in {**known, **classifiers, **on_views}.items()
            for noise in range(2)
        }
        if self.equal_std is not None:
            weak = self.gaussian(self.mean, self.equal_std)
            for ((_, k), encoder), noise in product(classifiers.items(), range(2)):
                scores[EQUAL, k, noise] = self.influence(encoder, noise, perturbation=weak)
        runs: dict[Labels, Stage] = {
            (m, removed, s): self.evaluation(
                self.training(m, seed=s, without=self.removal(removed, s))
            )
            for m, removed, s in product(self.trained, ("none", *REMOVED), self.judges)
        }
        by_label = under(classifiers, self.cross_entropy_scores)
        groups = [
            tuple(stage for (m, _, noise), stage in scores.items() if (m, noise) == (who, 0))
            for who in self.trained
        ]
        heads = [
            Thumbnails(data=self.data(), scores=group)
            for group in (*groups, tuple(by_label.stages.values()))
        ]
        return {
            "images": self.image_tables(None, *heads),
            "scores": Cells(f"{BY} noise", scores),
            "by cross-entropy": by_label,
            "accuracy": under({**known, **classifiers, **on_views}, self.evaluation),
            "runs": Cells("trained removed seed", runs),
        }

    def scale(self, method: str, name: str = "accuracy") -> Learned:
        """What a method's encoders had learned; `knn` is the lowest, supervised models included."""
        own, supervised = super().scale(method, name), super().scale("supervised", name)
        return {**own, "knn": min(own["knn"], supervised["knn"])}


class LinearTheory(Plan):
    """09_linear_theory: the closed form of a linear encoder, checked by retraining without a
    point."""

    notebook: ClassVar[str] = "09_linear_theory"
    takes_checkpoints: ClassVar[bool] = True

    points: int = Field(200, ge=20)
    side: int = Field(8, ge=2)
    outputs: int = Field(16, ge=1)
    anchor: float = Field(0.01, gt=0)
    removed: int = Field(60, ge=5)


class ClaimsAudit(Plan):
    """11_claims_audit: all claims in one table, from the records that the other notebooks left."""

    notebook: ClassVar[str] = "11_claims_audit"
    takes_checkpoints: ClassVar[bool] = True
    last: ClassVar[bool] = True

    def reads(self) -> list[Path]:
        """The records of this profile, and those of others that are kept with the figures."""
        kept = (Path(self.out) / "figures").glob("*/claims.json")
        return sorted(
            [*self.results.glob("claim_*.json"), *(p for p in kept if p.parent != self.figures)]
        )


PAPER: tuple[type[Plan], ...] = (
    MethodLesson,
    SeedCorrelation,
    AugmentationAblation,
    BackgroundBias,
    Duplicates,
    Fairness,
    Pruning,
    Outliers,
    SupervisedVsSSL,
    LinearTheory,
    ClaimsAudit,
)
