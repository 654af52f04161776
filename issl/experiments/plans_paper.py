"""The plans of the notebooks, one class each; see `issl.experiments.plan` for what they share."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from issl.experiments.cache import Stage
from issl.experiments.plan import Plan, Scored
from issl.experiments.plans_own import BEYOND, Explorer
from issl.experiments.settings import Augmentation, Data, Noise
from issl.experiments.stages import Prune, Thin
from issl.pretraining import recipes


class Method(Plan):
    """00_method: the score step by step on a few images."""

    notebook: ClassVar[str] = "00_method"

    images: int = Field(48, ge=8)
    one: int = Field(0, ge=0)  # the position of the image that is followed
    rank: int = Field(16, ge=1)
    damping: float = Field(0.1, gt=0)


class SeedCorrelation(Scored):
    """01_seed_correlation: do the scores of two seeds agree, of the noise, and of the training?"""

    notebook: ClassVar[str] = "01_seed_correlation"

    methods: tuple[recipes.Method, ...] = recipes.SSL
    noise_seeds: int = Field(2, ge=2)
    train_seeds: int = Field(2, ge=2)

    def stages(self) -> dict[str, Stage]:
        found: dict[str, Stage] = {}
        for method in self.methods:
            for seed in range(self.train_seeds):
                encoder = self.pretrain(method, self.seed + seed)
                found[f"{method}/encoder {seed}"] = encoder
                # the first encoder under every noise; another one under the same noise as the first, and under its own
                for noise in range(self.noise_seeds) if seed == 0 else (0, seed):
                    found[f"{method}/influence {seed} {noise}"] = self.influence(encoder, self.noise_seed + noise)
        return found


class AugmentationAblation(Scored):
    """02_augmentation_ablation: is Gaussian noise the most stable perturbation?"""

    notebook: ClassVar[str] = "02_augmentation_ablation"

    methods: tuple[recipes.Method, ...] = ("simclr",)
    scored: int = Field(128, ge=16)
    sigmas: tuple[float, ...] = (0.05, 0.2, 0.4)
    strengths: tuple[float, ...] = (1.0,)
    draws: tuple[int, ...] = (1, 4)

    def perturbations(self) -> dict[str, Noise | Augmentation]:
        """Every perturbation by its name; of flip and grayscale the strength is the share of images changed."""
        found: dict[str, Noise | Augmentation] = {f"noise {s:g}": Noise(mean=self.mean, std=s) for s in self.sigmas}
        for kind in ("crop", "flip", "jitter", "blur", "grayscale", "chain"):
            for strength in self.strengths:
                usual = {"flip": 0.5, "grayscale": 0.2}.get(kind, 1.0)
                found[f"{kind} {strength:g}"] = Augmentation(kind=kind, strength=usual * strength)
        return found

    def stages(self) -> dict[str, Stage]:
        """`METHOD/PERTURBATION/draws K/seed S`; seeds 0 and 1."""
        found: dict[str, Stage] = {}
        data = self.data().model_copy(update={"first": self.scored})
        for method in self.methods:
            encoder = self.pretrain(method)
            found[f"{method}/encoder"] = encoder
            for name, perturbation in self.perturbations().items():
                # several draws of what the paper uses and of what SSL uses; of the others one
                many = self.draws if name in (f"noise {self.std:g}", "crop 1", "chain 1") else self.draws[:1]
                for draws in many:
                    for seed in range(2):
                        found[f"{method}/{name}/draws {draws}/seed {seed}"] = self.influence(
                            encoder, self.noise_seed + seed, data=data, perturbation=perturbation, draws=draws
                        )
        return found


class BackgroundBias(Scored):
    """03_background_bias: do images of high influence have uniform backgrounds?"""

    notebook: ClassVar[str] = "03_background_bias"

    methods: tuple[recipes.Method, ...] = recipes.SSL
    gallery: int = Field(24, ge=1)
    neighbours: int = Field(10, ge=1)
    drawn: int = Field(512, ge=16)
    drawn_epochs: int = Field(4, ge=1)
    swapped: int = Field(96, ge=16)

    def stages(self) -> dict[str, Stage]:
        """METHOD/encoder, influence, features, evaluation; `swapped`: scores of the same scenes on each background,
        under an encoder of the first method trained on scenes, `drawn encoder`."""
        found = self.per_method(self.methods)
        found |= {f"{method}/evaluation": self.evaluate(self.pretrain(method)) for method in self.methods}
        # on scenes, the encoder is the one of the other questions
        world = {"dataset": "scenes", "n": self.drawn, "size": None, "epochs": self.drawn_epochs}
        drawn = self.model_copy(update=world) if self.dataset != "scenes" else self
        encoder = drawn.pretrain(self.methods[0])
        twins = Data(name="scenes-swapped", n=self.swapped)
        return found | {"drawn encoder": encoder, "swapped": self.influence(encoder, data=twins)}


class Duplicates(Scored):
    """04_duplicates: does low influence find duplicates?"""

    notebook: ClassVar[str] = "04_duplicates"

    methods: tuple[recipes.Method, ...] = recipes.SSL

    def stages(self) -> dict[str, Stage]:
        return self.per_method(self.methods)


GROUPS: dict[str, tuple[tuple[str, ...], str]] = {  # by data set: attributes, and the largest group of the first
    "scenes": (("group", "background"), "warm"),
    "fairface": (("race", "gender", "age"), "White"),
}


class Fairness(Scored):
    """05_fairness: does influence differ between groups of people, and rise in a group that is thinned?"""

    notebook: ClassVar[str] = "05_fairness"

    methods: tuple[recipes.Method, ...] = ("simclr",)
    attributes: tuple[str, ...] | None = Field(None, min_length=1)  # what makes groups; None: what the data set has
    thinned: str | None = None  # the group (of the first attribute) that is thinned; None: the data set's largest
    keep: float = Field(0.1, gt=0, lt=1)
    seeds: int = Field(1, ge=1)

    def groups(self) -> tuple[tuple[str, ...], str]:
        """The attributes and the group that is thinned: those given, else the data set's."""
        attributes, thinned = GROUPS.get(self.dataset, GROUPS["scenes"])
        return self.attributes or attributes, self.thinned or thinned

    def stages(self) -> dict[str, Stage]:
        """METHOD/encoder, influence, features; METHOD/thinned S and METHOD/random S: scores of all images after a
        training without most of the group, and without as many images at random."""
        found = self.per_method(self.methods)
        attributes, thinned = self.groups()
        for method in self.methods:
            for seed in range(self.seeds):
                for name, at_random in (("thinned", False), ("random", True)):
                    thin = Thin(
                        data=self.data(), attribute=attributes[0], value=thinned, keep=self.keep,
                        at_random=at_random, seed=seed,
                    )  # fmt: skip
                    encoder = self.pretrain(method, self.seed + seed, thin)
                    found |= {
                        f"{method}/{name} {seed} positions": thin, f"{method}/{name} {seed} encoder": encoder,
                        f"{method}/{name} {seed}": self.influence(encoder),
                    }  # fmt: skip
        return found


class Pruning(Scored):
    """06_pruning: does removing the images of highest influence improve what is learned?"""

    notebook: ClassVar[str] = "06_pruning"

    methods: tuple[recipes.Method, ...] = ("simclr",)
    shares: tuple[float, ...] = (0.2,)
    seeds: int = Field(2, ge=1)

    def stages(self) -> dict[str, Stage]:
        """METHOD/influence of the encoder of the first seed; METHOD/WHICH SHARE/seed S: evaluation of an encoder
        trained anew without these, and METHOD/none 0/seed S of one trained on all."""
        found: dict[str, Stage] = {}
        for method in self.methods:
            scores = self.influence(self.pretrain(method))
            found[f"{method}/influence"] = scores
            # the seed that was scored is no judge of what was removed by its scores
            for seed in range(self.seed + 1, self.seed + 1 + self.seeds):
                found[f"{method}/none 0/seed {seed}"] = self.evaluate(self.pretrain(method, seed))
                for share in self.shares:
                    for which in ("top", "bottom", "random"):
                        chosen = Prune(
                            influence=scores, which=which, share=share, seed=seed if which == "random" else 0
                        )
                        found[f"{method}/{which} {share:g}/seed {seed}"] = self.evaluate(
                            self.pretrain(method, seed, chosen)
                        )
        return found


class Outliers(Scored):
    """07_outliers: does high influence find atypical images?"""

    notebook: ClassVar[str] = "07_outliers"

    methods: tuple[recipes.Method, ...] = recipes.SSL

    def stages(self) -> dict[str, Stage]:
        return self.per_method(self.methods)


class SupervisedVsSSL(Scored):
    """08_supervised_vs_ssl: do supervised and self-supervised models depend on other images?"""

    notebook: ClassVar[str] = "08_supervised_vs_ssl"

    methods: tuple[recipes.Method, ...] = recipes.SSL
    share: float = Field(0.2, gt=0, lt=1)
    seeds: int = Field(2, ge=1)

    def stages(self) -> dict[str, Stage]:
        """METHOD/influence, features; supervised/influence (of the cross-entropy) and supervised/stability; for the
        first method and the supervised model TRAINED/WHICH by SCORE/seed S: evaluations after pruning."""
        found = self.per_method(self.methods)
        supervised = self.pretrain("supervised")
        loss = self.influence(supervised, perturbation=Noise(mean=0.0, std=0.0), loss="cross_entropy")
        found |= {
            "supervised/encoder": supervised, "supervised/influence": loss,
            "supervised/stability": self.influence(supervised),
        }  # fmt: skip
        scores = {"ssl": self.influence(self.pretrain(self.methods[0])), "supervised": loss}
        for trained in (self.methods[0], "supervised"):
            for seed in range(self.seed + 1, self.seed + 1 + self.seeds):
                found[f"{trained}/none/seed {seed}"] = self.evaluate(self.pretrain(trained, seed))
                choices = {
                    f"top by {name}": Prune(influence=s, which="top", share=self.share) for name, s in scores.items()
                }
                choices["random"] = Prune(influence=scores["ssl"], which="random", share=self.share, seed=seed)
                for name, chosen in choices.items():
                    found[f"{trained}/{name}/seed {seed}"] = self.evaluate(self.pretrain(trained, seed, chosen))
        return found


class LinearTheory(Plan):
    """09_linear_theory: the closed form of a linear encoder, checked by retraining without a point."""

    notebook: ClassVar[str] = "09_linear_theory"

    points: int = Field(200, ge=20)
    side: int = Field(8, ge=2)
    outputs: int = Field(16, ge=1)
    anchor: float = Field(0.01, gt=0)
    removed: int = Field(60, ge=5)

    def stages(self) -> dict[str, Stage]:
        return {}


class ClaimsAudit(Plan):
    """11_claims_audit: all claims in one table, from the records that the other notebooks left."""

    notebook: ClassVar[str] = "11_claims_audit"
    last: ClassVar[bool] = True

    def stages(self) -> dict[str, Stage]:
        return {}

    def reads(self) -> list[Path]:
        """The records of this profile, and those of others that are kept with the figures."""
        kept = (Path(self.out) / "figures").glob("*/claims.json")
        return sorted([*self.results.glob("claim_*.json"), *(p for p in kept if p.parent != self.figures)])


_PAPER: tuple[type[Plan], ...] = (
    Method, SeedCorrelation, AugmentationAblation, BackgroundBias, Duplicates, Fairness, Pruning, Outliers,
    SupervisedVsSSL, LinearTheory, ClaimsAudit,
)  # fmt: skip
PLANS: dict[str, type[Plan]] = {p.notebook: p for p in sorted(_PAPER + BEYOND, key=lambda p: p.notebook)}
EXPLORER = Explorer  # of the report
